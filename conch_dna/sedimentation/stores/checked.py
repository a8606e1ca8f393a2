"""What all stores have in common: every check, and the steps by which versions come and go.

Knows neither files nor servers: a subclass writes, reads and commits. To add a store, implement
the methods that begin with an underscore and are abstract here.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import numpy as np

from conch_dna.errors import ConchError
from conch_dna.sedimentation.stores.contract import RAW, Hits, Id, Page, Where
from conch_dna.sedimentation.stores.state import NAME, Found, VersionState
from conch_dna.sedimentation.stores.stored_documents import (
    DIGEST,
    ContentSum,
    checked_rows,
    from_stored,
    key_of,
    keys_of,
    stored_id,
    to_stored,
    wanted,
)


class CheckedStore(ABC):
    """A store that checks what it is given and asks the subclass for the rest."""

    def __init__(
        self, place: str, identity: dict[str, Any], state: VersionState, exact_below: int
    ) -> None:
        self.place = place
        self.identity = identity
        self._state = state
        self._exact_below = exact_below
        self._closed = False

    @property
    def active(self) -> str:
        """The version that queries use."""
        return self._state.active

    @property
    def previous(self) -> str | None:
        """What `rollback` returns to."""
        return self._state.previous

    def versions(self) -> list[str]:
        """See `VectorStore.versions`."""
        return [*self._state.kept, *self._state.building]

    def digests(self, ids: Sequence[Id]) -> dict[Id, str]:
        """See `VectorStore.digests`."""
        self._need(RAW)
        found = self._fetch([*dict.fromkeys(map(key_of, ids))], None)
        return {stored_id(one.payload): one.payload[DIGEST] for one in found.values()}

    def put(
        self,
        ids: Sequence[Id],
        payloads: Sequence[Mapping[str, Any]],
        digests: Sequence[str],
        vectors: Mapping[str, np.ndarray],
    ) -> None:
        """See `VectorStore.put`."""
        self.refresh()
        self._need(RAW)
        if not len(ids) == len(payloads) == len(digests):
            raise ConchError(
                f"{len(ids)} ids, {len(payloads)} payloads and {len(digests)} digests: each "
                "document needs one of each"
            )
        needed = [RAW, *self.versions()]
        if set(vectors) != set(needed):
            raise ConchError(
                f"vectors are given for {', '.join(vectors) or 'no version'}, but the store needs "
                f"them for {', '.join(needed)}"
            )
        rows = {
            name: checked_rows(
                vectors[name],
                count=len(ids),
                dimension=self._dimension(name),
                what=f"vectors of {name}",
            )
            for name in needed
        }
        keys = keys_of(ids)
        stored = [to_stored(*one) for one in zip(ids, payloads, digests, strict=True)]
        if keys:
            self._write(keys, stored, rows)

    def count(self, version: str = RAW) -> int:
        """See `VectorStore.count`."""
        self._need(version)
        return self._size(version)

    def pages(self, version: str = RAW, *, size: int = 1000) -> Iterator[Page]:
        """See `VectorStore.pages`."""
        self._need(version)
        for found in self._scan(version, size, with_payload=True):
            yield self._page(found, version)

    def get(self, ids: Sequence[Id], version: str = RAW) -> Page:
        """See `VectorStore.get`."""
        self._need(version)
        keys = [key_of(i) for i in ids]
        found = self._fetch([*dict.fromkeys(keys)], version)
        missing = [i for i, key in zip(ids, keys, strict=True) if key not in found]
        if missing:
            raise self._missing(missing, version)
        return self._page([found[key] for key in keys], version)

    def search(
        self,
        queries: np.ndarray,
        *,
        version: str,
        top_k: int,
        where: Where | None = None,
        exact: bool | None = None,
    ) -> list[Hits]:
        """See `VectorStore.search`."""
        self._need(version)
        rows = checked_rows(
            queries, count=None, dimension=self._dimension(version), what="query vectors"
        )
        if top_k < 1:
            raise ConchError(f"top_k is {top_k}: it must be 1 or more")
        conditions = wanted(where)
        if exact is None:
            exact = self._size(version) < self._exact_below
        if not len(rows):
            return []
        hits = []
        for found in self._nearest(rows, version, top_k, conditions, exact):
            known = [from_stored(one.payload) for one in found]
            scores = np.array([one.score for one in found], np.float32)
            hits.append(Hits([i for i, _ in known], scores, [payload for _, payload in known]))
        return hits

    def add_version(self, name: str, dimension: int) -> None:
        """See `VectorStore.add_version`."""
        self.refresh()
        self._need(RAW)
        if not NAME.fullmatch(name) or name == RAW:
            raise ConchError(
                f"{name!r} is no name of a version: use up to 64 of a-z, 0-9, '.', '_' and '-', "
                f"beginning with a letter or digit, other than {RAW}"
            )
        if name in self.versions():
            raise ConchError(f"version {name} exists already: drop it or choose another name")
        if dimension < 1:
            raise ConchError(f"version {name} has dimension {dimension}: it must be 1 or more")
        # Noted before it is made: what a killed process began, the next one can delete.
        building = {**self._state.building, name: dimension}
        self._advance(replace(self._state, building=building))
        self._create(name, dimension)

    def put_version(self, name: str, ids: Sequence[Id], vectors: np.ndarray) -> None:
        """See `VectorStore.put_version`."""
        self._need(name)
        if name == RAW:
            raise ConchError("raw vectors never change: add a version for adapted ones")
        rows = checked_rows(
            vectors,
            count=len(ids),
            dimension=self._dimension(name),
            what=f"vectors of {name}",
        )
        keys = keys_of(ids)
        found = self._fetch(keys, None)
        missing = [i for i, key in zip(ids, keys, strict=True) if key not in found]
        if missing:
            raise self._missing(missing, RAW)
        if keys:
            self._fill(name, [found[key] for key in keys], rows)

    def digest(self, version: str = RAW) -> str:
        """See `VectorStore.digest`."""
        return self._content(version).hexdigest()

    def drop_version(self, name: str) -> None:
        """See `VectorStore.drop_version`."""
        self.refresh()
        self._need(name)
        for kind, used in (("raw", RAW), ("active", self.active), ("previous", self.previous)):
            if name == used:
                raise ConchError(f"version {name} is the {kind} one and cannot be dropped")
        kept = {other: about for other, about in self._state.kept.items() if other != name}
        rest = {other: size for other, size in self._state.building.items() if other != name}
        if name in self._state.kept:
            going = {**rest, name: self._dimension(name)}
            self._advance(replace(self._state, kept=kept, building=going))
        self._erase(name)
        self._advance(replace(self._state, kept=kept, building=rest))

    def activate(self, name: str, *, count: int, digest: str) -> None:
        """See `VectorStore.activate`."""
        self.refresh()
        content = self._content(name)
        stored = self._size(RAW)
        problems = []
        if content.count != count:
            problems.append(f"it holds {content.count} vectors, not {count}")
        if content.count != stored:
            problems.append(f"it holds {content.count} vectors for {stored} documents")
        if content.hexdigest() != digest:
            problems.append(f"its digest is {content.hexdigest()}, not {digest}")
        if problems:
            raise ConchError(
                f"version {name} is not what it should be: {'; '.join(problems)}. "
                f"{self.active} stays active; build {name} anew"
            )
        kept, building = dict(self._state.kept), dict(self._state.building)
        if name != RAW:
            about = {"dimension": self._dimension(name), "count": count, "digest": digest}
            kept[name] = about
            building.pop(name, None)
        previous = self.previous if name == self.active else self.active
        self._flush()
        self._advance(VersionState(active=name, previous=previous, kept=kept, building=building))

    def rollback(self) -> str:
        """See `VectorStore.rollback`."""
        self.refresh()
        self._need(RAW)
        if self.previous is None:
            raise ConchError(f"the store in {self.place} has no previous version to return to")
        self._advance(replace(self._state, active=self.previous, previous=self.active))
        return self.active

    def index(self) -> bool:
        """See `VectorStore.index`."""
        self._need(RAW)
        return self._size(RAW) >= self._exact_below and self._optimize()

    def refresh(self) -> None:  # noqa: B027
        """Nothing, where there is one writer."""

    def close(self) -> None:
        """See `VectorStore.close`."""
        if not self._closed:
            self._closed = True
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _dimension(self, version: str) -> int:
        if version == RAW:
            return int(self.identity["dimension"])
        if version in self._state.kept:
            return int(self._state.kept[version]["dimension"])
        return self._state.building[version]

    def _need(self, version: str) -> None:
        if self._closed:
            raise ConchError(f"the store in {self.place} is closed: open it again")
        if version != RAW and version not in self.versions():
            known = ", ".join([RAW, *self.versions()])
            raise ConchError(f"the store in {self.place} has no version {version}, only {known}")

    def _missing(self, ids: Sequence[Id], version: str) -> ConchError:
        names = ", ".join(repr(i) for i in ids[:5]) + (", …" if len(ids) > 5 else "")
        return ConchError(
            f"{len(ids)} documents have no {version} vector in {self.place}: {names}. Ingest them "
            "first"
        )

    def _page(self, found: Sequence[Found], version: str) -> Page:
        known = [from_stored(one.payload) for one in found]
        vectors = np.array([one.vector for one in found], np.float32)
        rows = vectors.reshape(len(found), self._dimension(version))
        return Page([i for i, _ in known], rows, [payload for _, payload in known])

    def _content(self, version: str) -> ContentSum:
        self._need(version)
        content = ContentSum()
        for found in self._scan(version, 1000, with_payload=False):
            vectors = np.array([one.vector for one in found], np.float32)
            content.add([stored_id(one.payload) for one in found], vectors)
        return content

    def _advance(self, state: VersionState) -> None:
        self._commit(state)
        self._state = state

    @abstractmethod
    def _write(
        self, keys: list[str], stored: list[dict[str, Any]], rows: Mapping[str, np.ndarray]
    ) -> None:
        """Add or replace documents with all their vectors; durable when it returns."""

    @abstractmethod
    def _fetch(self, keys: list[str], version: str | None) -> dict[str, Found]:
        """Those of these documents that are there, by key; None for no vector and any version."""

    @abstractmethod
    def _scan(self, version: str, size: int, *, with_payload: bool) -> Iterator[list[Found]]:
        """All documents with a vector of a version; without payload, still with the id."""

    @abstractmethod
    def _nearest(
        self,
        queries: np.ndarray,
        version: str,
        top_k: int,
        where: Mapping[str, list[str | int | bool]],
        exact: bool,
    ) -> list[list[Found]]:
        """The best documents of each query, with payload and score, best first."""

    @abstractmethod
    def _size(self, version: str) -> int:
        """How many documents have a vector of a version."""

    @abstractmethod
    def _create(self, name: str, dimension: int) -> None:
        """Make room for a version."""

    @abstractmethod
    def _fill(self, name: str, found: list[Found], rows: np.ndarray) -> None:
        """Store vectors of a version for stored documents."""

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
