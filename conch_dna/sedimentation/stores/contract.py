"""What a store of vectors can do: every check, and the steps from version to version.

Knows neither embedders nor adapters, neither files nor servers: a version is a name with one
vector for each document, and a subclass writes, reads and commits.
To add a store: subclass `VectorStore`, give what is abstract there, choose it in `open_store`, add
it to the contract tests.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from conch_dna.errors import ConchError
from conch_dna.sedimentation.documents import DocumentId
from conch_dna.sedimentation.stores.filters import Where, conditions_of
from conch_dna.sedimentation.stores.primitives import StorePrimitives
from conch_dna.sedimentation.stores.state import VERSION_NAME, VersionState
from conch_dna.sedimentation.stores.stored_documents import (
    DIGEST,
    ID,
    ContentSum,
    Record,
    as_given,
    checked_rows,
    key_of,
    keys_of,
    stored_id,
    to_stored,
)

RAW = "raw"
# Fewer documents are compared with one by one; from here on HNSW is faster.
EXACT_BELOW = 20_000


@dataclass(frozen=True, eq=False)
class Hits:
    """What one query found, best first.

    Attributes:
        ids: As they were given.
        scores: Cosine similarities, float32 `[k]`, between −1 and 1.
        payloads: As they were given.
    """

    ids: list[DocumentId]
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

    ids: list[DocumentId]
    vectors: np.ndarray
    payloads: list[dict[str, Any]]


class VectorStore(StorePrimitives):
    """Documents with immutable raw vectors, and versions of adapted ones of which one is active.

    A version is begun with `add_version`, filled with `put_version`, and made active by
    `activate`, which is one atomic step. A version that was begun and never active is gone when
    the store is opened again.

    Attributes:
        place: What messages call it.
        identity: What the raw vectors were made with: `student`, `digest`, `dimension`.
    """

    # Documents that are asked for at once.
    KEYS_AT_ONCE = 10_000
    # Whether other processes may read while this one writes.
    SHARED = False

    def __init__(
        self, place: str, identity: dict[str, Any], state: VersionState, exact_below: int
    ) -> None:
        self.place = place
        self.identity = identity
        self._state = state
        self._exact_below = exact_below
        self._counts: dict[str, int] = {}
        self._closed = False

    @property
    def active(self) -> str:
        """The version that queries use, or RAW."""
        return self._state.active

    @property
    def previous(self) -> str | None:
        """What `rollback` returns to; None before the first activation."""
        return self._state.previous

    @property
    def revision(self) -> int:
        """Another number after every write of documents or vectors: the key of what is cached.

        Durable. On a server it is asked for each time, as another process may have written.
        """
        self._need(RAW)
        return self._state.revision

    def versions(self) -> list[str]:
        """Names besides RAW, those that are not finished included."""
        return [*self._state.kept, *self._state.building]

    def digests(self, ids: Sequence[DocumentId]) -> dict[DocumentId, str]:
        """The content digests of those documents that are stored; others are left out."""
        self._need(RAW)
        records = self._reserved_fields([*dict.fromkeys(map(key_of, ids))])
        return {stored_id(each.payload): each.payload[DIGEST] for each in records.values()}

    def put(
        self,
        ids: Sequence[DocumentId],
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
        rows = {name: self._checked(name, vectors[name], count=len(ids)) for name in needed}
        keys = keys_of(ids)
        stored = [to_stored(*each) for each in zip(ids, payloads, digests, strict=True)]
        if keys:
            self._raise_revision()
            self._write(keys, stored, rows)
            self._end_write()

    def count(self, version: str = RAW) -> int:
        """How many documents have a vector of this version."""
        self._need(version)
        if version not in self._counts:
            self._counts[version] = self._count(version)
        return self._counts[version]

    def pages(self, version: str = RAW, *, size: int = 1000) -> Iterator[Page]:
        """Every document of a version once, in an order that is the same each time."""
        self._need(version)
        for records in self._scan(version, size, payload=True):
            yield self._page(records, version)

    def get(self, ids: Sequence[DocumentId], version: str = RAW) -> Page:
        """Documents in the order asked for.

        Raises:
            ConchError: Some are not there; the message names them.
        """
        self._need(version)
        keys = [key_of(each) for each in ids]
        records = self._records([*dict.fromkeys(keys)], version)
        self._refuse_missing(ids, keys, records, version)
        return self._page([records[key] for key in keys], version)

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
        self._need(version)
        rows = self._checked(version, queries, count=None, what="query vectors")
        if top_k < 1:
            raise ConchError(f"top_k is {top_k}: it must be 1 or more")
        conditions = conditions_of(where)
        if exact is None:
            exact = self.count(version) < self._exact_below
        if not len(rows):
            return []
        hits = []
        for records in self._nearest(rows, version, top_k, conditions, exact):
            ids, payloads = as_given(records)
            hits.append(Hits(ids, np.array([each.score for each in records], np.float32), payloads))
        return hits

    def add_version(self, name: str, dimension: int) -> None:
        """Begin a version of this dimension, without vectors."""
        self.refresh()
        self._need(RAW)
        if not VERSION_NAME.fullmatch(name) or name == RAW:
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
        self._raise_revision(replace(self._state, building=building))
        self._create(name, dimension)

    def put_version(self, name: str, ids: Sequence[DocumentId], vectors: np.ndarray) -> None:
        """Give stored documents their vectors of a version, unit rows `[N, D]`."""
        self._need(name)
        if name == RAW:
            raise ConchError("raw vectors never change: add a version for adapted ones")
        rows = self._checked(name, vectors, count=len(ids))
        keys = keys_of(ids)
        self._refuse_missing(ids, keys, self._reserved_fields(keys), RAW)
        if keys:
            self._raise_revision()
            self._fill(name, keys, rows)
            self._end_write()

    def digest(self, version: str = RAW) -> str:
        """Digest of all ids and vectors of a version, whatever their order: see `ContentSum`."""
        return self._content(version).hexdigest()

    def drop_version(self, name: str) -> None:
        """Delete a version; RAW, the active and the previous one are refused."""
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
        self._counts.clear()
        self._erase(name)
        self._advance(replace(self._state, kept=kept, building=rest))

    def activate(self, name: str, *, count: int, digest: str) -> None:
        """Make a version the active one, in one step that a kill leaves done or not begun.

        Args:
            name: The version, or RAW.
            count: How many documents it must hold; they must be all.
            digest: What `digest` must say of it.

        Raises:
            ConchError: It holds something else; the active version stays.
        """
        self.refresh()
        content = self._content(name)
        documents = self.count(RAW)
        problems = []
        if content.count != count:
            problems.append(f"it holds {content.count} vectors, not {count}")
        if content.count != documents:
            problems.append(f"it holds {content.count} vectors for {documents} documents")
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
        """Make the previous version active, in one step; the two change places.

        Returns:
            The version that is active now.

        Raises:
            ConchError: There is no previous version.
        """
        self.refresh()
        self._need(RAW)
        if self.previous is None:
            raise ConchError(f"the store in {self.place} has no previous version to return to")
        self._advance(replace(self._state, active=self.previous, previous=self.active))
        return self.active

    def index(self) -> bool:
        """Build HNSW graphs now if the store is large enough and builds them itself.

        Returns:
            Whether something was built. It takes about a minute for 50,000 documents.
        """
        return self.count(RAW) >= self._exact_below and self._optimize()

    def refresh(self) -> None:
        """Learn what another process changed: on a server only, as others have one writer."""

    def close(self) -> None:
        """Release the store; every later call is refused."""
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

    def _checked(
        self, version: str, vectors: Any, *, count: int | None, what: str | None = None
    ) -> np.ndarray:
        return checked_rows(
            vectors,
            count=count,
            dimension=self._dimension(version),
            what=what or f"vectors of {version}",
        )

    def _refuse_missing(
        self,
        ids: Sequence[DocumentId],
        keys: list[str],
        records: Mapping[str, Record],
        version: str,
    ) -> None:
        missing = [repr(each) for each, key in zip(ids, keys, strict=True) if key not in records]
        if missing:
            names = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
            raise ConchError(
                f"{len(missing)} documents have no {version} vector in {self.place}: {names}. "
                "Ingest them first"
            )

    def _records(
        self,
        keys: list[str],
        version: str,
        *,
        payload: bool | list[str] = True,
        vector: bool = True,
    ) -> dict[str, Record]:
        """Those of these documents that have a vector of the version, by key."""
        starts = range(0, len(keys), self.KEYS_AT_ONCE)
        parts = [keys[start : start + self.KEYS_AT_ONCE] for start in starts]
        return {
            each.key: each
            for part in parts
            for each in self._fetch(part, version, payload=payload, vector=vector)
        }

    def _reserved_fields(self, keys: list[str]) -> dict[str, Record]:
        """Those of these documents that there are, without vectors and their own payload."""
        return self._records(keys, RAW, payload=[ID, DIGEST], vector=False)

    def _scan(
        self, version: str, size: int, *, payload: bool | list[str]
    ) -> Iterator[Sequence[Record]]:
        """All documents with a vector of a version, a page at a time."""
        offset = None
        while True:
            records, offset = self._scroll(version, offset, size, payload)
            if records:
                yield records
            if offset is None:
                return

    def _page(self, records: Sequence[Record], version: str) -> Page:
        ids, payloads = as_given(records)
        rows = np.array([each.vector for each in records], np.float32)
        return Page(ids, rows.reshape(len(records), self._dimension(version)), payloads)

    def _content(self, version: str) -> ContentSum:
        self._need(version)
        content = ContentSum()
        for records in self._scan(version, 1000, payload=[ID]):
            rows = np.array([each.vector for each in records], np.float32)
            content.add([stored_id(each.payload) for each in records], rows)
        return content

    def _raise_revision(self, state: VersionState | None = None) -> None:
        """Commit a state under the next revision, before what it is raised for is written.

        So a kill between the two leaves at most a cache that is made anew for nothing.
        """
        state = state or self._state
        self._counts.clear()
        self._advance(replace(state, revision=state.revision + 1))

    def _end_write(self) -> None:
        """Tell readers who looked while the write was under way to look again."""
        if self.SHARED:
            self._raise_revision()

    def _advance(self, state: VersionState) -> None:
        self._commit(state)
        self._state = state
