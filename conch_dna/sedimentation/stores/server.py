"""A store on a Qdrant server: a collection for each version, an alias that leads to the active one.

Knows Qdrant's client; nothing of folders. `<collection>_raw` holds the raw vectors and, as its
metadata, what the store is; `<collection>_<version>` the same documents with a version's vectors;
the alias `<collection>` leads to the active one. To ask the server for something new, go through
`_ask`, which retries: the call must do no harm when it is made twice.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np

from conch_dna.errors import ConchError, NotWholeError
from conch_dna.sedimentation.stores.checked import CheckedStore
from conch_dna.sedimentation.stores.contract import EXACT_BELOW, RAW
from conch_dna.sedimentation.stores.server_connection import RETRY_WAITS_S, ask, connect, shown_url
from conch_dna.sedimentation.stores.state import (
    NAME,
    Found,
    VersionState,
    checked_identity,
)
from conch_dna.sedimentation.stores.stored_documents import DIGEST, ID, qdrant_filter

Result = TypeVar("Result")
FORMAT = 1
# Field of the raw collection's metadata; its value is text, as a server merges objects.
ABOUT = "conch_dna"
# A server takes 32 MiB at once. A number in JSON takes some 20 bytes.
REQUEST_BYTES = 8 * 2**20
NUMBER_BYTES = 20
KEYS_AT_ONCE = 1_000


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


def open_server(
    url: str,
    collection: str,
    *,
    identity: Mapping[str, Any] | None,
    api_key: str | None = None,
    exact_below: int = EXACT_BELOW,
) -> "ServerStore":
    """Connect to a server and open a store there; see `open_store`.

    Raises:
        ConchError: It cannot be reached, refuses the key, or holds another store.
    """
    client = connect(url, api_key)
    try:
        return ServerStore(
            client,
            collection,
            identity,
            place=shown_url(url),
            exact_below=exact_below,
            waits_s=RETRY_WAITS_S,
        )
    except BaseException:
        client.close()
        raise


class ServerStore(CheckedStore):
    """See `VectorStore`.

    Versions that another process builds are not seen; one process at a time may write.

    Args:
        client: A `QdrantClient`; `close` closes it.
        collection: Name of the alias and beginning of the collections' names.
        identity: See `open_store`.
        place: What messages call the server.
        exact_below: See `open_store`. The server itself decides when it builds graphs.
        waits_s: Seconds to wait before each further attempt to reach the server.
    """

    def __init__(
        self,
        client: Any,
        collection: str,
        identity: Mapping[str, Any] | None = None,
        *,
        place: str,
        exact_below: int = EXACT_BELOW,
        waits_s: tuple[float, ...],
    ) -> None:
        from qdrant_client import models

        if not NAME.fullmatch(collection.lower()):
            raise ConchError(
                f"{collection!r} is no name of a collection: use up to 64 letters, digits, '.', "
                "'_' and '-', beginning with a letter or digit"
            )
        self._client = client
        self._models: Any = models
        self._waits_s = waits_s
        self.collection = collection
        # Versions begun by this process, and by others that did not finish them.
        self._mine: set[str] = set()
        self._unfinished: dict[str, int] = {}
        self._sizes: dict[str, int] = {}
        self.place = f"{place}, collection {collection}"
        about = self._read_about()
        known = checked_identity(identity, about and about.identity, self.place)
        super().__init__(self.place, known, VersionState(), exact_below)
        if about is None:
            self._make()
        self.refresh()

    def _ask(self, call: Callable[[], Result]) -> Result:
        return ask(call, self.place, self._waits_s)

    def _name(self, version: str) -> str:
        return f"{self.collection}_{version}"

    def _read_about(self) -> _About | None:
        raw = self._name(RAW)
        if not self._ask(lambda: self._client.collection_exists(raw)):
            return None
        info = self._ask(lambda: self._client.get_collection(raw))
        text = (info.config.metadata or {}).get(ABOUT)
        if text is None:
            raise ConchError(
                f"{self.place}: {raw} is there but was not made by conch_dna, or the server is "
                "older than 1.16 and keeps no metadata: choose another collection or a newer server"
            )
        document = json.loads(text)
        if document.pop("format") != FORMAT:
            raise ConchError(f"{self.place} was made by another version of conch_dna: use that one")
        return _About(**document)

    def _write_about(self, about: _About) -> None:
        text = json.dumps({"format": FORMAT, **about._asdict()})
        self._ask(lambda: self._client.update_collection(self._name(RAW), metadata={ABOUT: text}))

    def _make(self) -> None:
        about = _About(self.identity, RAW, {}, {}, {})
        text = json.dumps({"format": FORMAT, **about._asdict()})
        self._make_collection(RAW, int(self.identity["dimension"]), {ABOUT: text})
        self._move_alias(RAW)

    def _make_collection(
        self, version: str, dimension: int, metadata: dict[str, Any] | None = None
    ) -> None:
        vectors = self._models.VectorParams(size=dimension, distance=self._models.Distance.DOT)

        def make() -> None:
            # A first attempt may have arrived though its answer did not.
            if not self._client.collection_exists(self._name(version)):
                self._client.create_collection(
                    self._name(version), vectors_config=vectors, metadata=metadata
                )

        self._ask(make)

    def _alias(self) -> str | None:
        """The version that the alias leads to; None if there is no alias."""
        aliases = self._ask(lambda: self._client.get_aliases()).aliases
        for one in aliases:
            if one.alias_name == self.collection:
                name: str = one.collection_name
                if not name.startswith(f"{self.collection}_"):
                    raise ConchError(
                        f"{self.place}: the alias leads to {name}: choose another name"
                    )
                return name.removeprefix(f"{self.collection}_")
        return None

    def _move_alias(self, version: str) -> None:
        models = self._models
        move = models.CreateAliasOperation(
            create_alias=models.CreateAlias(
                collection_name=self._name(version), alias_name=self.collection
            )
        )
        self._ask(lambda: self._client.update_collection_aliases([move]))

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
            kept={name: known for name, known in about.kept.items() if name not in building},
            building={name: size for name, size in building.items() if name in self._mine},
        )
        self._unfinished = {n: size for n, size in building.items() if n not in self._mine}
        self._sizes.clear()

    def add_version(self, name: str, dimension: int) -> None:
        """See `VectorStore`; first removes what a killed process had begun."""
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
        self._sizes.clear()

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
            self._ask(partial(self._client.upsert, self._name(version), points=batch, wait=True))

    def _retrieve(self, keys: list[str], version: str, *, payload: Any, vector: bool) -> list[Any]:
        records: list[Any] = []
        for first in range(0, len(keys), KEYS_AT_ONCE):
            records += self._ask(
                partial(
                    self._client.retrieve,
                    self._name(version),
                    ids=keys[first : first + KEYS_AT_ONCE],
                    with_payload=payload,
                    with_vectors=vector,
                )
            )
        return records

    def _fetch(self, keys: list[str], version: str | None) -> dict[str, Found]:
        # Whoever wants no vector wants no more than the reserved fields.
        payload = [ID, DIGEST] if version is None else True
        found = self._retrieve(keys, version or RAW, payload=payload, vector=version is not None)
        return {str(one.id): Found(str(one.id), one.payload, one.vector) for one in found}

    def _scan(self, version: str, size: int, *, with_payload: bool) -> Iterator[list[Found]]:
        offset = None
        while True:
            records, offset = self._ask(
                partial(
                    self._client.scroll,
                    self._name(version),
                    limit=size,
                    offset=offset,
                    with_payload=True if with_payload else [ID],
                    with_vectors=True,
                )
            )
            if records:
                yield [Found(str(one.id), one.payload, one.vector) for one in records]
            if offset is None:
                return

    def _nearest(
        self,
        queries: np.ndarray,
        version: str,
        top_k: int,
        where: Mapping[str, list[str | int | bool]],
        exact: bool,
    ) -> list[list[Found]]:
        models = self._models
        condition = qdrant_filter(models, where)
        size = max(1, REQUEST_BYTES // (queries.shape[1] * NUMBER_BYTES))
        answers: list[Any] = []
        for first in range(0, len(queries), size):
            requests = [
                models.QueryRequest(
                    query=row,
                    limit=top_k,
                    filter=condition,
                    with_payload=True,
                    params=models.SearchParams(exact=exact),
                )
                for row in queries[first : first + size].tolist()
            ]
            answers += self._ask(
                partial(self._client.query_batch_points, self._name(version), requests=requests)
            )
        return [
            [Found(str(one.id), one.payload, score=one.score) for one in answer.points]
            for answer in answers
        ]

    def _size(self, version: str) -> int:
        if version not in self._sizes:
            name = self._name(version)
            self._sizes[version] = self._ask(
                lambda: int(self._client.count(name, exact=True).count)
            )
        return self._sizes[version]

    def _create(self, name: str, dimension: int) -> None:
        self._make_collection(name, dimension)

    def _fill(self, name: str, found: list[Found], rows: np.ndarray) -> None:
        keys = [one.key for one in found]
        # Each collection has the payloads, so that filters work on it.
        held = {
            str(one.id): one.payload
            for one in self._retrieve(keys, RAW, payload=True, vector=False)
        }
        self._upsert(name, keys, [held[key] for key in keys], rows)
        self._sizes.pop(name, None)

    def _erase(self, name: str) -> None:
        self._ask(lambda: self._client.delete_collection(self._name(name)))
        self._sizes.pop(name, None)

    def _release(self) -> None:
        self._client.close()
