"""What a store of vectors can do: every check, and the steps from version to version.

Knows neither embedders nor adapters, neither files nor servers: a version is a name with one
vector for each document, and a subclass writes, reads and commits.
To add a store: subclass `VectorStore`, give what is abstract there, choose it in `open_store`, add
it to the contract tests.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from conch_dna.errors import ConchError
from conch_dna.sedimentation.documents import DocumentId
from conch_dna.sedimentation.stores.accounts import RAW, StoreAccounts
from conch_dna.sedimentation.stores.filters import Where, conditions_of
from conch_dna.sedimentation.stores.state import DOCUMENTS, VERSION_NAME
from conch_dna.sedimentation.stores.stored_documents import (
    DIGEST,
    ContentSum,
    Record,
    as_given,
    checked_rows,
    key_of,
    keys_of,
    stored_id,
    to_stored,
)

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


class VectorStore(StoreAccounts):
    """Documents with immutable raw vectors, and versions of adapted ones of which one is active.

    A version is begun with `add_version`, filled with `put_version`, and made active by
    `activate`, which is one atomic step. A version that was begun and never active is gone when
    the store is opened again.

    What it holds is accounted for as it is written, see `StoreAccounts`.
    """

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
        self._prepare()
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
            self._begin(ids, keys)
            self._write(keys, stored, rows)
            added = {name: ContentSum() for name in self.kept_contents()}
            for name, content in added.items():
                content.add(ids, stored if name == DOCUMENTS else rows[name])
            self._end(added)

    def delete(self, ids: Sequence[DocumentId]) -> None:
        """Forget documents in every version; durable when it returns.

        A kill in the middle leaves a deletion that `recover`, and so the next opening, finishes.

        Args:
            ids: As they were given; one that comes twice counts once.

        Raises:
            ConchError: Some are not there, and the message names them; nothing is deleted.
        """
        self._prepare()
        ids = list(dict.fromkeys(ids))
        keys = keys_of(ids)
        there = self._reserved_fields(keys)
        missing = [repr(each) for each, key in zip(ids, keys, strict=True) if key not in there]
        if missing:
            names = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
            raise ConchError(
                f"{self.place} has no document {names}: nothing was deleted; leave out what is "
                "not there"
            )
        if keys:
            self._begin(ids, keys, deletes=True)
            self.recover()

    def fields_missing(self, fields: Iterable[str]) -> tuple[list[str], list[str]]:
        """Those of payload fields that no document has, and some that documents have.

        Reads documents until all fields are found.
        """
        self._need(RAW)
        missing, known = dict.fromkeys(fields), dict[str, None]()
        for records in self._scan(RAW, 1000, payload=True):
            _, payloads = as_given(records)
            known = known or dict.fromkeys(name for payload in payloads for name in payload)
            for name in [name for name in missing if any(name in each for each in payloads)]:
                del missing[name]
            if not missing:
                break
        return list(missing), list(known)

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
        self._prepare()
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
        if keys and name in self._state.kept:
            self._begin(ids, keys)
            self._fill(name, keys, rows)
            self.recover()
        elif keys:
            self._raise_revision()
            self._fill(name, keys, rows)
            if self.SHARED:
                # Who looked while the write was under way shall look again.
                self._raise_revision()

    def digest(self, version: str = RAW) -> str:
        """Digest of all ids and vectors of a version, whatever their order: see `ContentSum`."""
        return self._content(version).hexdigest()

    def drop_version(self, name: str) -> None:
        """Delete a version; RAW, the active and the previous one are refused."""
        self._prepare()
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
        self._prepare()
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
        contents = {**(self._state.contents or {}), name: content.to_json()}
        self._flush()
        self._advance(
            replace(
                self._state,
                active=name,
                previous=previous,
                kept=kept,
                building=building,
                contents=contents,
            )
        )

    def rollback(self) -> str:
        """Make the previous version active, in one step; the two change places.

        Returns:
            The version that is active now.

        Raises:
            ConchError: There is no previous version.
            NotWholeError: Its vectors were altered; the active version stays.
        """
        self._prepare()
        if self.previous is None:
            raise ConchError(f"the store in {self.place} has no previous version to return to")
        self.check(self.previous)
        self._advance(replace(self._state, active=self.previous, previous=self.active))
        return self.active

    def index(self) -> bool:
        """Build HNSW graphs now if the store is large enough and builds them itself.

        Returns:
            Whether something was built. It takes about a minute for 50,000 documents.
        """
        return self.count(RAW) >= self._exact_below and self._optimize()

    def close(self) -> None:
        """Release the store; every later call is refused."""
        if not self._closed:
            self._closed = True
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _prepare(self) -> None:
        """Before every write: what others changed, and what a killed process left, come first."""
        self.refresh()
        self.recover()

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

    def _page(self, records: Sequence[Record], version: str) -> Page:
        ids, payloads = as_given(records)
        rows = np.array([each.vector for each in records], np.float32)
        return Page(ids, rows.reshape(len(records), self._dimension(version)), payloads)
