"""A store on a Qdrant server: a collection for each version, an alias to the active one.

Knows Qdrant's client, whose own `:memory:` stands in for a server; nothing of folders.
`<collection>_raw` holds the raw vectors and, as its metadata, what the store is;
`<collection>_<version>` the same documents with a version's vectors; the alias `<collection>`
leads to the active one. No message shows a key or a password. To ask the server for something new,
go through `_ask`, which retries: the call must do no harm when it is made twice.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from conch_dna.checkpoints import parse_json, require_keys
from conch_dna.errors import ConchError, NotWholeError, one_line
from conch_dna.sedimentation.stores.accounts import no_contents
from conch_dna.sedimentation.stores.contract import EXACT_BELOW, RAW, VectorStore
from conch_dna.sedimentation.stores.filters import Conditions, qdrant_filter
from conch_dna.sedimentation.stores.state import (
    FORMAT,
    OLDEST_FORMAT,
    VERSION_NAME,
    VersionState,
    checked_identity,
    sealed,
    unsealed,
)
from conch_dna.sedimentation.stores.stored_documents import Record

MEMORY = ":memory:"
# Field of the raw collection's metadata; its value is text, as a server merges objects.
ABOUT = "conch_dna"
ABOUT_NEEDS = {
    "active": str,
    **dict.fromkeys(("identity", "previous_of", "kept", "building"), dict),
}
# A server takes 32 MiB at once. A number in JSON takes some 20 bytes.
REQUEST_BYTES = 8 * 2**20
NUMBER_BYTES = 20
# Seconds before each further attempt to reach a server.
RETRY_WAITS_S = (0.5, 1.0, 2.0, 4.0)
TIMEOUT_S = 60
# Statuses that say nothing of the request but that the server, or what is before it, is not ready.
BUSY = (429, 502, 503, 504)

_log = logging.getLogger(__name__)


class _About(NamedTuple):
    """What the raw collection's metadata say.

    What is active is told by the alias. `previous_of` has, for each version it may lead to, the
    one before, so that one move of the alias changes both; `active` only says where a lost alias
    led. A version that stands in both `kept` and `building` was about to become active.
    """

    identity: dict[str, Any]
    active: str
    previous_of: dict[str, str | None]
    kept: dict[str, dict[str, Any]]
    building: dict[str, int]
    revision: int = 0
    contents: dict[str, dict[str, Any]] | None = None
    writing: dict[str, Any] | None = None

    def as_metadata(self) -> dict[str, str]:
        return {ABOUT: json.dumps(sealed({"format": FORMAT, **self._asdict()}))}


class ServerStore(VectorStore):
    """A `VectorStore` on a server, or in this process's memory and gone with it.

    Versions that another process builds are not seen; one process at a time may write.

    Args:
        url: Of the server, or MEMORY.
        identity: `student`, `digest` and `dimension` of the raw vectors; may be None where there
            is a store.
        collection: Name of the alias and beginning of the collections' names.
        api_key: Of the server.
        exact_below: Documents from which on searches are approximate. The server itself decides
            when it builds graphs; in memory all are compared with.

    Raises:
        ConchError: It cannot be reached, refuses the key, or holds another store.
    """

    KEYS_AT_ONCE = 1_000
    SHARED = True

    def __init__(
        self,
        url: str,
        identity: Mapping[str, Any] | None = None,
        *,
        collection: str,
        api_key: str | None = None,
        exact_below: int = EXACT_BELOW,
    ) -> None:
        from qdrant_client import models

        if not VERSION_NAME.fullmatch(collection.lower()):
            raise ConchError(
                f"{collection!r} is no name of a collection: use up to 64 of a to z, A to Z, "
                "digits, '.', '_' and '-', beginning with a letter or digit"
            )
        self._models: Any = models
        self._in_memory = url == MEMORY
        self.collection = collection
        # Versions begun by this process, and by others that did not finish them.
        self._mine: set[str] = set()
        self._unfinished: dict[str, int] = {}
        self.place = f"{shown_url(url)}, collection {collection}"
        self._client = _connect(url, api_key)
        try:
            about = self._read_about()
            checked = checked_identity(identity, about and about.identity, self.place)
            super().__init__(self.place, checked, VersionState(active=RAW), exact_below)
            if about is None:
                self._make()
            self.refresh()
        except BaseException:
            self._client.close()
            raise

    def _ask(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """What a call of the client gives, made again while the server cannot be reached.

        Args:
            call: Does no harm when it is made twice, as its answer can be lost.
            *arguments: Of the call.
            **options: Of the call.

        Raises:
            ConchError: The server refuses, or cannot be reached.
        """
        from qdrant_client.common.client_exceptions import QdrantException
        from qdrant_client.http.exceptions import ApiException

        for wait_s in (*RETRY_WAITS_S, None):
            try:
                return call(*arguments, **options)
            except (ApiException, QdrantException) as error:
                reason, is_passing = _reason(error)
                if not is_passing:
                    raise ConchError(
                        f"the Qdrant server at {self.place} refused: {reason}"
                    ) from error
                if wait_s is None:
                    raise ConchError(
                        f"the Qdrant server at {self.place} cannot be reached "
                        f"({len(RETRY_WAITS_S) + 1} attempts): {reason}. What was acknowledged is "
                        "there; start the server and go on"
                    ) from error
                _log.warning("%s: %s; trying again in %g s", self.place, reason, wait_s)
                time.sleep(wait_s)
        raise AssertionError("the last attempt returns or raises")

    def _name(self, version: str) -> str:
        return f"{self.collection}_{version}"

    def _read_about(self) -> _About | None:
        raw = self._name(RAW)
        if not self._ask(self._client.collection_exists, raw):
            return None
        info = self._ask(self._client.get_collection, raw)
        text = (info.config.metadata or {}).get(ABOUT)
        if text is None:
            raise ConchError(
                f"{self.place}: {raw} is there but was not made by conch_dna, or the server is "
                "older than 1.16 and keeps no metadata: choose another collection or a newer server"
            )
        source = f"what {self.place} says of itself"
        document = parse_json(text if isinstance(text, str) else "", source)
        require_keys(document, source, needs={"format": int})
        if document["format"] not in (OLDEST_FORMAT, FORMAT):
            raise ConchError(f"{self.place} was made by another version of conch_dna: use that one")
        document = unsealed(document, source)
        require_keys(document, source, needs=ABOUT_NEEDS)
        require_keys(document["identity"], source, needs={"student": str, "dimension": int})
        for facts in document["kept"].values():
            require_keys(facts, source, needs={"dimension": int, "count": int, "digest": str})
        require_keys(document["building"], source, needs=dict.fromkeys(document["building"], int))
        return _About(**{name: document[name] for name in _About._fields if name in document})

    def _write_about(self, about: _About) -> None:
        metadata = about.as_metadata()
        self._ask(self._client.update_collection, self._name(RAW), metadata=metadata)

    def _make(self) -> None:
        about = _About(self.identity, RAW, {}, {}, {}, contents=no_contents())
        self._create(RAW, int(self.identity["dimension"]), about.as_metadata())
        self._move_alias(RAW)

    def _create(self, name: str, dimension: int, metadata: dict[str, Any] | None = None) -> None:
        vectors = self._models.VectorParams(size=dimension, distance=self._models.Distance.DOT)
        collection = self._name(name)

        def create() -> None:
            # A first attempt may have arrived though its answer did not.
            if not self._client.collection_exists(collection):
                self._client.create_collection(
                    collection, vectors_config=vectors, metadata=metadata
                )

        self._ask(create)

    def _alias(self) -> str | None:
        """The version that the alias leads to; None if there is no alias."""
        aliases = self._ask(self._client.get_aliases).aliases
        targets = {each.alias_name: each.collection_name for each in aliases}
        name: str | None = targets.get(self.collection)
        if name is None:
            return None
        if not name.startswith(f"{self.collection}_"):
            raise ConchError(f"{self.place}: the alias leads to {name}: choose another name")
        return name.removeprefix(f"{self.collection}_")

    def _move_alias(self, version: str) -> None:
        name = self._name(version)
        alias = self._models.CreateAlias(collection_name=name, alias_name=self.collection)
        move = self._models.CreateAliasOperation(create_alias=alias)
        self._ask(self._client.update_collection_aliases, [move])

    @property
    def revision(self) -> int:
        """See `VectorStore`; the counts are asked for again where it is another."""
        about = self._read_about() if not self._closed else None
        if about is not None and about.revision != self._state.revision:
            self._state = replace(self._state, revision=about.revision)
            self._counts.clear()
        return super().revision

    def refresh(self) -> None:
        """Read which version is active, which may be another process's doing."""
        self._need(RAW)
        about = self._read_about()
        if about is None:
            raise ConchError(f"{self.place}: the collection was deleted: ingest documents anew")
        active = self._alias()
        if active is None:
            # Killed before the first alias was made, or someone deleted it.
            active = about.active
            self._move_alias(active)
        if active not in (RAW, *about.kept):
            raise NotWholeError(
                f"{self.place}: the alias leads to {active}, of which nothing is known: let it "
                f"lead to {self._name(RAW)}"
            )
        building = {name: size for name, size in about.building.items() if name != active}
        self._state = VersionState(
            active=active,
            previous=about.previous_of.get(active),
            kept={n: facts for n, facts in about.kept.items() if n not in building},
            building={n: size for n, size in building.items() if n in self._mine},
            revision=about.revision,
            contents=about.contents,
            writing=about.writing,
        )
        self._unfinished = {n: size for n, size in building.items() if n not in self._mine}
        self._counts.clear()

    def add_version(self, name: str, dimension: int) -> None:
        """Begin a version of this dimension; what a killed process had begun is removed first."""
        self.refresh()
        for other in self._unfinished:
            self._erase(other)
        self._unfinished = {}
        super().add_version(name, dimension)

    def _commit(self, state: VersionState) -> None:
        self._mine |= set(state.building)
        building = {**self._unfinished, **state.building}
        before = self._state
        after = _About(
            identity=self.identity,
            active=state.active,
            previous_of={state.active: state.previous},
            kept=state.kept,
            building=building,
            revision=state.revision,
            contents=state.contents,
            writing=state.writing,
        )
        if state.active != before.active:
            # Both moments of the move are told here; which one it is, the alias decides.
            both = {before.active: before.previous, **after.previous_of}
            going = {n: size for n, size in before.building.items() if n == state.active}
            self._write_about(
                after._replace(
                    active=before.active, previous_of=both, building={**building, **going}
                )
            )
            self._move_alias(state.active)
        self._write_about(after)

    def _write(
        self, keys: list[str], stored: list[dict[str, Any]], rows: Mapping[str, np.ndarray]
    ) -> None:
        # Raw comes last: `digests` tells of a document only when it has all its vectors.
        for version in sorted(rows, key=lambda name: name == RAW):
            self._upsert(version, keys, stored, rows[version])

    def _upsert(
        self, version: str, keys: list[str], stored: list[dict[str, Any]], rows: np.ndarray
    ) -> None:
        texts = max(len(str(payload)) for payload in stored)
        size = max(1, REQUEST_BYTES // (texts + rows.shape[1] * NUMBER_BYTES))
        for first in range(0, len(keys), size):
            part = slice(first, first + size)
            batch = self._models.Batch(
                ids=keys[part], vectors=rows[part].tolist(), payloads=stored[part]
            )
            self._ask(self._client.upsert, self._name(version), points=batch, wait=True)

    def _fetch(
        self, keys: list[str], version: str, *, payload: bool | list[str], vector: bool
    ) -> list[Record]:
        points = self._ask(
            self._client.retrieve,
            self._name(version),
            ids=keys,
            with_payload=payload,
            with_vectors=vector,
        )
        return [Record(str(each.id), each.payload, each.vector) for each in points]

    def _scroll(
        self, version: str, offset: Any, size: int, payload: bool | list[str]
    ) -> tuple[list[Record], Any]:
        points, following = self._ask(
            self._client.scroll,
            self._name(version),
            limit=size,
            offset=offset,
            with_payload=payload,
            with_vectors=True,
        )
        return [Record(str(each.id), each.payload, each.vector) for each in points], following

    def _nearest(
        self,
        queries: np.ndarray,
        version: str,
        top_k: int,
        conditions: Conditions,
        exact: bool,
    ) -> list[list[Record]]:
        models = self._models
        condition = qdrant_filter(models, conditions)
        # In memory all are compared with anyway, and the client would warn of that.
        params = None if self._in_memory else models.SearchParams(exact=exact)
        size = max(1, REQUEST_BYTES // (queries.shape[1] * NUMBER_BYTES))
        answers: list[Any] = []
        for first in range(0, len(queries), size):
            requests = [
                models.QueryRequest(
                    query=row, limit=top_k, filter=condition, with_payload=True, params=params
                )
                for row in queries[first : first + size].tolist()
            ]
            name = self._name(version)
            answers += self._ask(self._client.query_batch_points, name, requests=requests)
        return [
            [Record(str(each.id), each.payload, score=each.score) for each in answer.points]
            for answer in answers
        ]

    def _count(self, version: str) -> int:
        return int(self._ask(self._client.count, self._name(version), exact=True).count)

    def _fill(self, name: str, keys: list[str], rows: np.ndarray) -> None:
        # Each collection has the payloads, so that filters work on it.
        records = self._records(keys, RAW, vector=False)
        self._upsert(name, keys, [dict(records[key].payload) for key in keys], rows)

    def _remove(self, keys: list[str]) -> None:
        # Raw goes first: what is begun to be forgotten is not told of.
        for version in (RAW, *self.versions(), *self._unfinished):
            for first in range(0, len(keys), self.KEYS_AT_ONCE):
                points = self._models.PointIdsList(points=keys[first : first + self.KEYS_AT_ONCE])
                self._ask(
                    self._client.delete, self._name(version), points_selector=points, wait=True
                )

    def _erase(self, name: str) -> None:
        self._ask(self._client.delete_collection, self._name(name))

    def _release(self) -> None:
        self._client.close()


def _connect(url: str, api_key: str | None) -> Any:
    """A `QdrantClient` of this server; nothing is sent yet.

    Raises:
        ConchError: URL or key cannot be ones.
    """
    from qdrant_client import QdrantClient

    if url == MEMORY:
        return QdrantClient(MEMORY)
    # The HTTP library would show a key with a line break in its message.
    if api_key is not None and not (api_key and api_key.isascii() and api_key.isprintable()):
        raise ConchError("the API key is empty or holds a line break or a letter outside ASCII")
    try:
        # A check of versions would warn, instead of refusing, where the server is down.
        return QdrantClient(url=url, api_key=api_key, timeout=TIMEOUT_S, check_compatibility=False)
    except ValueError as error:
        raise ConchError(f"{shown_url(url)} is no URL of a server: {error}") from error


def shown_url(url: str) -> str:
    """A URL without user, password and query, which may be secret."""
    if url == MEMORY:
        return url
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}".rstrip("/")


def _reason(error: Any) -> tuple[str, bool]:
    """What went wrong, in one line without what was asked; and whether it may pass."""
    from httpx import TransportError
    from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
    from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

    if isinstance(error, ResourceExhaustedResponse):
        return "it is busy", True
    if isinstance(error, ResponseHandlingException):
        source = error.source
        text = one_line(f"{type(source).__name__} {source}")
        return text.rstrip("."), isinstance(source, TransportError)
    if not isinstance(error, UnexpectedResponse):
        return one_line(error).rstrip("."), False
    if error.status_code in (401, 403):
        return f"it does not accept the API key ({error.status_code})", False
    try:
        text = error.structured()["status"]["error"]
    except (ValueError, KeyError, TypeError):
        text = error.reason_phrase
    return f"{error.status_code} {one_line(text)}".rstrip("."), error.status_code in BUSY
