"""What a store holds, by its own account: versions, numbers, digests, and a write under way.

Knows records, sums and the state that is committed; checks nothing of what a caller gives. Every
write and deletion is committed before it is done, with the contents as they are without its
documents, and once more after it; what a kill cut off is thus settled by reading those documents
alone. To keep another digest: an entry of `_sums_of` and of `_everything`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from conch_dna.errors import ConchError, NotWholeError
from conch_dna.sedimentation.documents import DocumentId
from conch_dna.sedimentation.stores.primitives import StorePrimitives
from conch_dna.sedimentation.stores.state import DOCUMENTS, VersionState
from conch_dna.sedimentation.stores.stored_documents import (
    DIGEST,
    ID,
    ContentSum,
    Record,
    id_of,
    id_text,
    key_of,
    stored_id,
)

RAW = "raw"
REMEDY = "Restore it, or make the store anew from its documents"


def no_contents() -> dict[str, dict[str, Any]]:
    """The contents of a store without documents."""
    return {name: ContentSum().to_json() for name in (RAW, DOCUMENTS)}


class StoreAccounts(StorePrimitives):
    """What every store remembers of itself.

    Attributes:
        place: What messages call it.
        identity: What the raw vectors were made with: `student`, `digest`, `dimension`.
        also_forget: Is told the ids of deleted documents before their deletion is over, and again
            where a kill came between; whatever else names them belongs here.
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
        self.also_forget: Callable[[Sequence[DocumentId]], object] | None = None
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

    def count(self, version: str = RAW) -> int:
        """How many documents have a vector of this version."""
        self._need(version)
        if version not in self._counts:
            self._counts[version] = self._count(version)
        return self._counts[version]

    def refresh(self) -> None:
        """Learn what another process changed: on a server only, as others have one writer."""

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

    def recover(self) -> list[str]:
        """Settle a write or finish a deletion that a killed process began; the caller may write.

        Returns:
            A line for what was under way.
        """
        self._need(RAW)
        if self._state.contents is None:
            contents = {name: content.to_json() for name, content in self._everything()}
            self._advance(replace(self._state, contents=contents))
        writing = self._state.writing
        if writing is None:
            return []
        ids = [id_of(text) for text in writing["ids"]]
        keys = [key_of(each) for each in ids]
        if writing["deletes"]:
            self._remove(keys)
            if self.also_forget is not None:
                self.also_forget(ids)
            self._end({})
            return [f"the deletion of {len(ids)} documents was cut off: it is finished"]
        self._end(self._sums_of(keys))
        return [f"a write of {len(ids)} documents was cut off: what had arrived is counted in"]

    def check(self, version: str) -> None:
        """Compare a version's vectors with their digest; reads all of them.

        Raises:
            NotWholeError: They were altered, or some are missing.
        """
        self._need(version)
        self._compare(version, self._content(version))

    def damage(self) -> dict[str, str]:
        """What differs from its digest, and how: vectors by their version, and DOCUMENTS."""
        found = {}
        for name, content in self._everything():
            try:
                self._compare(name, content)
            except NotWholeError as error:
                found[name] = str(error)
        return found

    def kept_contents(self) -> list[str]:
        """Of what the store keeps a digest."""
        return [DOCUMENTS, RAW, *self._state.kept]

    def _compare(self, name: str, content: ContentSum) -> None:
        what = "the documents" if name == DOCUMENTS else f"the vectors of version {name}"
        expected = self._kept(name)
        if content.to_json() != expected:
            raise NotWholeError(
                f"{what} in {self.place} are not whole: {content.count} with digest "
                f"{content.hexdigest()}, not {expected['count']} with {expected['digest']}. "
                f"{REMEDY}"
            )

    def _kept(self, name: str) -> dict[str, Any]:
        """What the contents say of a version or the documents."""
        contents = self._state.contents
        writing = self._state.writing
        if writing is not None and writing["deletes"]:
            contents = writing["rest"]
        if not contents or name not in contents:
            raise NotWholeError(f"{self.place} has no digest of {name}. {REMEDY}")
        return dict(contents[name])

    def _everything(self) -> Iterator[tuple[str, ContentSum]]:
        """What is stored now, by what contents are kept of."""
        documents = ContentSum()
        for records in self._scan(RAW, 1000, payload=True):
            documents.add(_ids(records), [each.payload for each in records])
        yield DOCUMENTS, documents
        for name in (RAW, *self._state.kept):
            yield name, self._content(name)

    def _sums_of(self, keys: list[str]) -> dict[str, ContentSum]:
        """What is stored of these documents now, by what contents are kept of."""
        sums = {name: ContentSum() for name in self.kept_contents()}
        for name in (RAW, *self._state.kept):
            records = [*self._records(keys, name, payload=True if name == RAW else [ID]).values()]
            if not records:
                continue
            sums[name].add(_ids(records), _vectors(records))
            if name == RAW:
                sums[DOCUMENTS].add(_ids(records), [each.payload for each in records])
        return sums

    def _content(self, version: str) -> ContentSum:
        self._need(version)
        content = ContentSum()
        for records in self._scan(version, 1000, payload=[ID]):
            content.add(_ids(records), _vectors(records))
        return content

    def _begin(self, ids: Sequence[DocumentId], keys: list[str], *, deletes: bool = False) -> None:
        """Commit what is about to be written or deleted, under the next revision."""
        there = self._sums_of([*self._reserved_fields(keys)])
        rest = {
            name: (ContentSum(**self._kept(name)) - part).to_json() for name, part in there.items()
        }
        writing = {"ids": [id_text(each) for each in ids], "deletes": deletes, "rest": rest}
        self._raise_revision(replace(self._state, writing=writing))

    def _end(self, added: Mapping[str, ContentSum]) -> None:
        """Commit what `_begin` told of as done."""
        assert self._state.writing is not None
        contents = {
            name: (ContentSum(**part) + added.get(name, ContentSum())).to_json()
            for name, part in self._state.writing["rest"].items()
        }
        self._raise_revision(replace(self._state, contents=contents, writing=None))

    def _raise_revision(self, state: VersionState | None = None) -> None:
        """Commit a state under the next revision, before what it is raised for is written.

        So a kill between the two leaves at most a cache that is made anew for nothing.
        """
        state = state or self._state
        self._counts.clear()
        self._advance(replace(state, revision=state.revision + 1))

    def _advance(self, state: VersionState) -> None:
        self._commit(state)
        self._state = state


def _ids(records: Iterable[Record]) -> list[DocumentId]:
    return [stored_id(each.payload) for each in records]


def _vectors(records: Iterable[Record]) -> np.ndarray:
    return np.array([each.vector for each in records], np.float32)
