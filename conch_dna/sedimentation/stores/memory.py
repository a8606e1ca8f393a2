"""A store in this process's memory, gone with it: for trials, tests and small collections.

Knows no files. Every search is exact. To store something else, see the other two.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from conch_dna.sedimentation.stores.checked import CheckedStore
from conch_dna.sedimentation.stores.contract import EXACT_BELOW, RAW
from conch_dna.sedimentation.stores.state import (
    Found,
    VersionState,
    checked_identity,
)
from conch_dna.sedimentation.stores.stored_documents import ID, matches


class MemoryStore(CheckedStore):
    """See `VectorStore`.

    Args:
        identity: See `open_store`.
        exact_below: Of no effect.
    """

    def __init__(
        self, identity: Mapping[str, Any] | None, *, exact_below: int = EXACT_BELOW
    ) -> None:
        place = ":memory:"
        known = checked_identity(identity, None, place)
        super().__init__(place, known, VersionState(), exact_below)
        self._payloads: dict[str, dict[str, Any]] = {}
        self._vectors: dict[str, dict[str, np.ndarray]] = {RAW: {}}
        # Keys and vectors of a version as one table, for searches; made anew after a change.
        self._tables: dict[str, tuple[list[str], np.ndarray]] = {}

    def _write(
        self, keys: list[str], stored: list[dict[str, Any]], rows: Mapping[str, np.ndarray]
    ) -> None:
        self._payloads.update(zip(keys, copy.deepcopy(stored), strict=True))
        for version, vectors in rows.items():
            self._put_rows(version, keys, vectors)

    def _put_rows(self, version: str, keys: list[str], rows: np.ndarray) -> None:
        # Rows of a copy, as the caller may go on to use its own.
        self._vectors[version].update(zip(keys, rows.copy(), strict=True))
        self._tables.pop(version, None)

    def _found(self, key: str, version: str | None) -> Found:
        vector = None if version is None else self._vectors[version][key]
        return Found(key, copy.deepcopy(self._payloads[key]), vector)

    def _fetch(self, keys: list[str], version: str | None) -> dict[str, Found]:
        held: Mapping[str, Any] = self._payloads if version is None else self._vectors[version]
        return {key: self._found(key, version) for key in keys if key in held}

    def _scan(self, version: str, size: int, *, with_payload: bool) -> Iterator[list[Found]]:
        keys = sorted(self._vectors[version])
        for first in range(0, len(keys), size):
            part = keys[first : first + size]
            if with_payload:
                yield [self._found(key, version) for key in part]
            else:
                yield [
                    Found(key, {ID: self._payloads[key][ID]}, self._vectors[version][key])
                    for key in part
                ]

    def _nearest(
        self,
        queries: np.ndarray,
        version: str,
        top_k: int,
        where: Mapping[str, list[str | int | bool]],
        exact: bool,
    ) -> list[list[Found]]:
        if version not in self._tables:
            held = self._vectors[version]
            table = np.array(list(held.values()), np.float32)
            self._tables[version] = list(held), table.reshape(len(held), queries.shape[1])
        keys, table = self._tables[version]
        if where:
            rows = [n for n, key in enumerate(keys) if matches(self._payloads[key], where)]
            keys, table = [keys[n] for n in rows], table[rows]
        hits = []
        for scores in queries @ table.T:
            best = np.argsort(-scores, kind="stable")[:top_k]
            hits.append([self._found(keys[n], None)._replace(score=float(scores[n])) for n in best])
        return hits

    def _size(self, version: str) -> int:
        return len(self._vectors[version])

    def _create(self, name: str, dimension: int) -> None:
        self._vectors[name] = {}

    def _fill(self, name: str, found: list[Found], rows: np.ndarray) -> None:
        self._put_rows(name, [one.key for one in found], rows)

    def _erase(self, name: str) -> None:
        self._vectors.pop(name, None)
        self._tables.pop(name, None)

    def _commit(self, state: VersionState) -> None:
        """The state in memory is all there is."""

    def _release(self) -> None:
        self._payloads.clear()
        self._vectors.clear()
        self._tables.clear()
