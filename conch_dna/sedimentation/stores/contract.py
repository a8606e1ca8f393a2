"""What a store of vectors can do.

Knows neither embedders nor adapters: a version is a name with one vector for each document.
To add a store: subclass `CheckedStore`, choose it in `open_store`, add it to the contract tests.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import numpy as np

RAW = "raw"
# Fewer documents are compared with one by one; from here on HNSW is faster.
EXACT_BELOW = 20_000

Id = str | int
Where = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Hits:
    """What one query found, best first.

    Attributes:
        ids: As they were given.
        scores: Cosine similarities, float32 `[k]`, between −1 and 1.
        payloads: As they were given.
    """

    ids: list[Id]
    scores: np.ndarray
    payloads: list[dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Page:
    """Some documents with their vectors of one version.

    Attributes:
        ids: As they were given.
        vectors: Unit rows, float32 `[n, D]`.
        payloads: As they were given.
    """

    ids: list[Id]
    vectors: np.ndarray
    payloads: list[dict[str, Any]]


class VectorStore(Protocol):
    """Documents with immutable raw vectors, and versions of adapted ones of which one is active.

    A version is begun with `add_version`, filled with `put_version`, and made active by
    `activate`, which is one atomic step. A version that was begun and never active is gone when
    the store is opened again.

    Attributes:
        identity: What the raw vectors were made with: `student`, `digest`, `dimension`.
        active: The version that queries use, or RAW.
        previous: What `rollback` returns to; None before the first activation.
    """

    @property
    def identity(self) -> dict[str, Any]: ...  # noqa: D102
    @property
    def active(self) -> str: ...  # noqa: D102
    @property
    def previous(self) -> str | None: ...  # noqa: D102

    def digests(self, ids: Sequence[Id]) -> dict[Id, str]:
        """The content digests of those documents that are stored; others are left out."""

    def put(
        self,
        ids: Sequence[Id],
        payloads: Sequence[Mapping[str, Any]],
        digests: Sequence[str],
        vectors: Mapping[str, np.ndarray],
    ) -> None:
        """Add or replace documents; durable when it returns.

        Args:
            ids: Each once. 1 and "1" are two documents.
            payloads: JSON objects of at most 64-bit integers; no field begins with `_conch_`.
            digests: Of what was embedded, for `digests`.
            vectors: For RAW and each name in `versions`, unit rows, float32 `[N, D]`.

        Raises:
            ConchError: Anything of this does not hold, or it cannot be written.
        """

    def count(self, version: str = RAW) -> int:
        """How many documents have a vector of this version."""

    def pages(self, version: str = RAW, *, size: int = 1000) -> Iterator[Page]:
        """Every document of a version once, in an order that is the same each time."""

    def get(self, ids: Sequence[Id], version: str = RAW) -> Page:
        """Documents in the order asked for.

        Raises:
            ConchError: Some are not there; the message names them.
        """

    def search(
        self,
        queries: np.ndarray,
        *,
        version: str,
        top_k: int,
        where: Where | None = None,
        exact: bool | None = None,
    ) -> list[Hits]:
        """The nearest documents of each query.

        Args:
            queries: Unit rows, `[Q, D]` with the dimension of the version.
            version: Whose vectors to compare with.
            top_k: At most this many for each query.
            where: Payload field to the value it must have, or to several of which it must have
                one. Fields stand at the top of the payload; values are texts, integers or
                booleans. A field that holds a list has each of its items.
            exact: Compare with all; by default below `EXACT_BELOW` documents.
        """

    def versions(self) -> list[str]:
        """Names besides RAW, those that are not finished included."""

    def add_version(self, name: str, dimension: int) -> None:
        """Begin a version of this dimension, without vectors."""

    def put_version(self, name: str, ids: Sequence[Id], vectors: np.ndarray) -> None:
        """Give stored documents their vectors of a version, unit rows `[N, D]`."""

    def digest(self, version: str = RAW) -> str:
        """Digest of all ids and vectors of a version, whatever their order: see `ContentSum`."""

    def drop_version(self, name: str) -> None:
        """Delete a version; RAW, the active and the previous one are refused."""

    def activate(self, name: str, *, count: int, digest: str) -> None:
        """Make a version the active one, in one step that a kill leaves done or not begun.

        Args:
            name: The version, or RAW.
            count: How many documents it must hold; they must be all.
            digest: What `digest` must say of it.

        Raises:
            ConchError: It holds something else; the active version stays.
        """

    def rollback(self) -> str:
        """Make the previous version active, in one step; the two change places.

        Returns:
            The version that is active now.

        Raises:
            ConchError: There is no previous version.
        """

    def index(self) -> bool:
        """Build HNSW graphs now if the store is large enough and builds them itself.

        Returns:
            Whether something was built. It takes about a minute for 50,000 documents.
        """

    def refresh(self) -> None:
        """Learn what another process changed: on a server only, as others have one writer."""

    def close(self) -> None:
        """Release the store; every later call is refused."""

    def __enter__(self) -> "VectorStore": ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...
