"""What a kind of store must do itself: the steps that `VectorStore` is made of.

Knows keys, records and rows; checks nothing, as `VectorStore` did. To add a kind of store: see
contract.py.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from conch_dna.sedimentation.stores.filters import Conditions
from conch_dna.sedimentation.stores.state import VersionState
from conch_dna.sedimentation.stores.stored_documents import Record


class StorePrimitives(ABC):
    """The steps, each of them abstract unless a store can do without."""

    @abstractmethod
    def _write(
        self, keys: list[str], stored: list[dict[str, Any]], rows: Mapping[str, np.ndarray]
    ) -> None:
        """Add or replace documents with all their vectors; durable when it returns."""

    @abstractmethod
    def _fetch(
        self, keys: list[str], version: str, *, payload: bool | list[str], vector: bool
    ) -> list[Record]:
        """Those of these documents that have a vector of the version.

        Args:
            keys: At most `KEYS_AT_ONCE`.
            version: RAW where no vector is wanted.
            payload: All of it, or these fields.
            vector: Whether the vector is wanted.
        """

    @abstractmethod
    def _scroll(
        self, version: str, offset: Any, size: int, payload: bool | list[str]
    ) -> tuple[list[Record], Any]:
        """Documents with a vector of a version, and where the next begin; None after the last."""

    @abstractmethod
    def _nearest(
        self,
        queries: np.ndarray,
        version: str,
        top_k: int,
        conditions: Conditions,
        exact: bool,
    ) -> list[list[Record]]:
        """The best documents of each query, with payload and score, best first."""

    @abstractmethod
    def _count(self, version: str) -> int:
        """How many documents have a vector of a version."""

    @abstractmethod
    def _create(self, name: str, dimension: int) -> None:
        """Make room for a version."""

    @abstractmethod
    def _fill(self, name: str, keys: list[str], rows: np.ndarray) -> None:
        """Store vectors of a version for stored documents."""

    @abstractmethod
    def _remove(self, keys: list[str]) -> None:
        """Delete documents with all their vectors, those that are there; durable on return."""

    @abstractmethod
    def _erase(self, name: str) -> None:
        """Delete a version's vectors; nothing where there are none."""

    @abstractmethod
    def _commit(self, state: VersionState) -> None:
        """Make this the state that the next process finds, in one step."""

    def _flush(self) -> None:  # noqa: B027
        """Make everything written so far durable."""

    def _optimize(self) -> bool:
        """Build indexes; whether anything was built."""
        return False

    @abstractmethod
    def _release(self) -> None:
        """Close what is open."""
