"""What only the server store does: attempts with pauses, keys, other processes, aliases."""

import json
import logging
import socket
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from qdrant_client import models

from conch_dna.errors import ConchError, NotWholeError
from conch_dna.sedimentation.embedders.contract import unit
from conch_dna.sedimentation.stores import server as server_store
from conch_dna.sedimentation.stores.contract import RAW, VectorStore
from conch_dna.sedimentation.stores.open_store import open_store
from conch_dna.sedimentation.stores.server import ABOUT, ServerStore, shown_url
from conch_dna.sedimentation.stores.state import sealed, unsealed
from conch_dna.sedimentation.stores.stored_documents import ContentSum
from qdrant_over_http import QdrantOverHttp

D = 8
IDENTITY = {"student": "tiny-student", "digest": "d1", "dimension": D}
KEY = "a-secret-key"

# Local mode says so once; the parameters are for the server.
pytestmark = pytest.mark.filterwarnings("ignore:Local mode performs exact:UserWarning")


@pytest.fixture
def over(monkeypatch: pytest.MonkeyPatch) -> Iterator[QdrantOverHttp]:
    monkeypatch.setattr(server_store, "RETRY_WAITS_S", (0.01, 0.01, 0.01))
    with QdrantOverHttp() as server:
        yield server


def rows_of(count: int, *, seed: int = 0, dimension: int = D) -> np.ndarray:
    return unit(np.random.default_rng(seed).normal(size=(count, dimension)))


def fill(store: VectorStore, count: int = 6, *, first: int = 0) -> None:
    ids = list(range(first, first + count))
    vectors = {name: rows_of(count, seed=first) for name in (RAW, *store.versions())}
    store.put(ids, [{"n": i} for i in ids], [f"d{i}" for i in ids], vectors)


def build(store: VectorStore, name: str, count: int = 6) -> str:
    store.add_version(name, D)
    rows = rows_of(count, seed=3)
    store.put_version(name, list(range(count)), rows)
    content = ContentSum()
    content.add(list(range(count)), rows)
    return content.hexdigest()


def steps(store: VectorStore) -> list[Callable[[], object]]:
    """Everything a store sends, in an order that works."""
    return [
        lambda: fill(store),
        lambda: build(store, "v1"),
        lambda: store.activate("v1", count=6, digest=store.digest("v1")),
        lambda: build(store, "v2"),
        lambda: store.activate("v2", count=6, digest=store.digest("v2")),
        lambda: store.rollback(),
        lambda: store.rollback(),
        lambda: build(store, "v3"),
        lambda: store.drop_version("v3"),
        lambda: store.search(rows_of(2), version="v2", top_k=3, where={"n": [1, 2]}),
        lambda: store.digests([1, 2]),
        lambda: fill(store, 3, first=6),
    ]


@pytest.mark.parametrize("after", [False, True])
def test_lost_requests_and_lost_answers_are_made_up_for(
    over: QdrantOverHttp, after: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Every request is lost once: none may do harm when it is made twice."""
    over.after = after
    wanted = over.answer
    asked: list[str] = []

    def answer(method: str, path: str, body: dict) -> object:
        asked.append(f"{method} {path}")
        return wanted(method, path, body)

    over.answer = answer  # type: ignore[method-assign]
    over.drop = 1
    with caplog.at_level(logging.WARNING), open_store(over.url, identity=IDENTITY) as store:
        for step in steps(store):
            over.drop = 1
            step()
        assert (store.active, store.previous, store.versions()) == ("v2", "v1", ["v1", "v2"])
        assert (store.count(), store.count("v1"), store.count("v2")) == (9, 9, 9)
        assert len(list(store.pages("v2", size=2))) == 5
    assert caplog.messages.count(caplog.messages[0]) >= len(steps(store))
    assert f"{over.url}, collection documents: " in caplog.text
    assert "trying again in 0.01 s" in caplog.text
    # What was lost before it took effect was never answered, so it was asked once.
    assert len(over.seen) > len(asked) if not after else len(over.seen) == len(asked)


@pytest.mark.parametrize("after", [False, True])
def test_each_single_request_can_be_lost(over: QdrantOverHttp, after: bool) -> None:
    """As above, with every second request lost, so that those within a step are too."""
    over.after = after
    original, turn = over.answer, [0]

    def answer(method: str, path: str, body: dict) -> object:
        turn[0] += 1
        over.drop = turn[0] % 2
        return original(method, path, body)

    over.answer = answer  # type: ignore[method-assign]
    with open_store(over.url, identity=IDENTITY) as store:
        for step in steps(store):
            step()
        assert (store.active, store.previous, store.versions()) == ("v2", "v1", ["v1", "v2"])
        assert store.count("v2") == 9


def test_a_document_without_all_its_vectors_is_not_told_of(over: QdrantOverHttp) -> None:
    with open_store(over.url, identity=IDENTITY) as store:
        fill(store)
        store.activate((name := "v1"), count=6, digest=build(store, name))
        original = over.answer

        def answer(method: str, path: str, body: dict) -> object:
            if (method, path) == ("PUT", "/collections/documents_v1/points"):
                raise ValueError("gone")
            return original(method, path, body)

        over.answer = answer  # type: ignore[method-assign]
        with pytest.raises(ConchError, match="refused: 400 gone"):
            fill(store, 3, first=6)
        over.answer = original  # type: ignore[method-assign]
        assert store.digests([5, 6, 7, 8]) == {5: "d5"}
        fill(store, 3, first=6)
        assert (store.count(), store.count("v1")) == (9, 9)


def test_a_server_that_goes_down_loses_nothing_acknowledged(over: QdrantOverHttp) -> None:
    with open_store(over.url, identity=IDENTITY) as store:
        fill(store)
        over.drop = 4
        with pytest.raises(ConchError) as refused:
            fill(store, 3, first=6)
        assert "\n" not in str(refused.value)
        assert (
            f"the Qdrant server at {over.url}, collection documents cannot be reached (4 "
            in str(refused.value)
        )
        assert over.drop == 0
        fill(store, 3, first=6)
        assert store.count() == 9
        assert sorted(store.digests(list(range(9)))) == list(range(9))


@pytest.mark.filterwarnings("ignore:Api key is used with an insecure connection:UserWarning")
def test_no_server_is_one_line_without_the_key(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server_store, "RETRY_WAITS_S", (0.01, 0.01))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ConchError) as refused:
        open_store(f"http://me:{KEY}@127.0.0.1:{port}/", identity=IDENTITY, api_key=KEY)
    message = str(refused.value)
    assert f"the Qdrant server at http://127.0.0.1:{port}, collection documents cannot" in message
    assert "(3 attempts)" in message
    assert "start the server and go on" in message
    assert "\n" not in message
    assert len(caplog.messages) == 2
    assert KEY not in message + caplog.text


@pytest.mark.filterwarnings("ignore:Api key is used with an insecure connection:UserWarning")
def test_a_key_is_sent_and_never_shown() -> None:
    with QdrantOverHttp(key=KEY) as over:
        with open_store(over.url, identity=IDENTITY, api_key=KEY) as store:
            fill(store)
        seen = len(over.seen)
        with pytest.raises(ConchError, match=r"does not accept the API key \(403\)") as refused:
            open_store(over.url, identity=IDENTITY, api_key="another-secret")
        assert "secret" not in str(refused.value)
        assert len(over.seen) == seen + 1
    with pytest.raises(ConchError, match="the API key is empty or holds a line break") as refused:
        open_store(over.url, identity=IDENTITY, api_key=f"{KEY}\n")
    assert KEY not in str(refused.value)


def test_busy_is_tried_again_and_a_mistake_is_not(over: QdrantOverHttp) -> None:
    with open_store(over.url, identity=IDENTITY) as store:
        for status, attempts, message in (
            (503, 4, r"cannot be reached \(4 attempts\): 503 as the test wants it"),
            (429, 4, r"cannot be reached \(4 attempts\): 429"),
            (400, 1, "refused: 400 as the test wants it"),
            (500, 1, "refused: 500 as the test wants it"),
        ):
            over.status, before = status, len(over.seen)
            with pytest.raises(ConchError, match=message):
                store.count()
            assert len(over.seen) - before == attempts
        over.status = None
        assert store.count() == 0


def test_the_alias_leads_to_the_active_version(over: QdrantOverHttp) -> None:
    def leads() -> str:
        (alias,) = over.local.get_aliases().aliases
        assert alias.alias_name == "mine"
        return alias.collection_name

    with open_store(over.url, identity=IDENTITY, collection="mine") as store:
        assert leads() == "mine_raw"
        fill(store)
        store.activate((name := "v1"), count=6, digest=build(store, name))
        assert leads() == "mine_v1"
        moves = over.seen.count("POST /collections/aliases")
        store.rollback()
        assert over.seen.count("POST /collections/aliases") == moves + 1
        assert leads() == "mine_raw"
        # Others that know nothing of versions can search by the alias, with filters.
        store.rollback()
        points = over.local.query_points(
            "mine",
            query=rows_of(6, seed=3)[4].tolist(),
            query_filter=models.Filter(
                must=[models.FieldCondition(key="n", match=models.MatchAny(any=[4, 5]))]
            ),
        ).points
        assert [point.payload["n"] for point in points] == [4, 5]


@pytest.mark.parametrize("request_number", range(4))
def test_an_activation_cut_off_anywhere_leaves_the_old_or_the_new(
    over: QdrantOverHttp, request_number: int
) -> None:
    """Activation writes, moves the alias and writes; the server goes away before each of them."""
    with open_store(over.url, identity=IDENTITY) as store:
        fill(store)
        store.activate((name := "v1"), count=6, digest=build(store, name))
        digest = build(store, "v2")
        writes = [0]
        original = over.answer

        def answer(method: str, path: str, body: dict) -> object:
            if method == "PATCH" or (path == "/collections/aliases" and method == "POST"):
                if writes[0] == request_number:
                    raise ValueError("gone")
                writes[0] += 1
            return original(method, path, body)

        over.answer = answer  # type: ignore[method-assign]
        if request_number < 3:
            with pytest.raises(ConchError, match="refused: 400 gone"):
                store.activate("v2", count=6, digest=digest)
        else:
            store.activate("v2", count=6, digest=digest)
        over.answer = original  # type: ignore[method-assign]
        done = request_number >= 2
        store.refresh()
        assert (store.active, store.previous) == (("v2", "v1") if done else ("v1", RAW))
    with open_store(over.url) as store:
        assert (store.active, store.previous) == (("v2", "v1") if done else ("v1", RAW))
        assert store.versions() == (["v1", "v2"] if done else ["v1"])
        assert store.digest("v2" if done else "v1") == digest
        fill(store, 2, first=6)
        # The next writer clears what was begun, under any name.
        store.add_version("v3", D)
        names = {one.name for one in over.local.get_collections().collections}
        kept = {"documents_raw", "documents_v1", "documents_v3"}
        assert names == (kept | {"documents_v2"} if done else kept)


def test_a_reader_follows_the_writer_and_disturbs_nothing(over: QdrantOverHttp) -> None:
    with open_store(over.url, identity=IDENTITY) as writer, open_store(over.url) as reader:
        fill(writer)
        digest = build(writer, "v1")
        with open_store(over.url) as another:
            assert another.versions() == []
        reader.refresh()
        assert (reader.active, reader.versions(), reader.count()) == (RAW, [], 6)
        writer.activate("v1", count=6, digest=digest)
        reader.refresh()
        assert (reader.active, reader.versions()) == ("v1", ["v1"])
        with pytest.raises(ConchError, match="given for raw, but the store needs them for raw, v1"):
            reader.put([9], [{}], [""], {RAW: rows_of(1)})
        assert reader.rollback() == RAW
        writer.refresh()
        assert (writer.active, writer.previous) == (RAW, "v1")


def test_stores_with_names_that_begin_alike_do_not_touch_each_other(over: QdrantOverHttp) -> None:
    with (
        open_store(over.url, identity=IDENTITY, collection="docs") as one,
        open_store(over.url, identity=IDENTITY, collection="docs_old") as other,
    ):
        fill(other)
        build(other, "v1")
        one.add_version("v1", D)
        assert other.count("v1") == 6


def test_collections_of_others_are_refused(over: QdrantOverHttp) -> None:
    size = models.VectorParams(size=D, distance=models.Distance.COSINE)
    over.local.create_collection("theirs_raw", vectors_config=size)
    with pytest.raises(ConchError, match="theirs_raw is there but was not made by conch_dna"):
        open_store(over.url, identity=IDENTITY, collection="theirs")
    over.local.create_collection("plain", vectors_config=size)
    with pytest.raises(ConchError, match="refused: 400 Collection plain already exists"):
        open_store(over.url, identity=IDENTITY, collection="plain")
    with pytest.raises(ConchError, match="'a/b' is no name of a collection"):
        open_store(over.url, identity=IDENTITY, collection="a/b")
    open_store(over.url, identity=IDENTITY, collection="moved").close()
    over.local.create_collection("moved_x", vectors_config=size)
    for target, message in (("moved_x", "leads to x, of which nothing is"), ("plain", "to plain")):
        move = models.CreateAlias(collection_name=target, alias_name="moved")
        over.local.update_collection_aliases([models.CreateAliasOperation(create_alias=move)])
        with pytest.raises((ConchError, NotWholeError), match=message):
            open_store(over.url, collection="moved")


@pytest.mark.parametrize(
    "change",
    [
        lambda about: "[" * 100_000,
        lambda about: "[1]",
        lambda about: '{"format": ' + "9" * 5000 + "}",
        lambda about: {**about, "identity": {}},
        lambda about: {**about, "kept": {"v0001": 3}},
        lambda about: {**about, "building": {"v0001": "x"}},
        lambda about: {name: value for name, value in about.items() if name != "previous_of"},
        lambda about: 7,
    ],
)
def test_what_a_store_says_of_itself_is_read_by_its_form(
    change: Callable[[dict[str, Any]], object], over: QdrantOverHttp
) -> None:
    """Altered metadata of the raw collection ended in tracebacks."""
    with open_store(over.url, identity=IDENTITY, collection="own") as store:
        info = over.local.get_collection("own_raw")
        changed = change(unsealed(json.loads(info.config.metadata[ABOUT]), "it"))
        text = json.dumps(sealed(changed)) if isinstance(changed, dict) else changed
        over.local.update_collection("own_raw", metadata={ABOUT: text})
        with pytest.raises(ConchError, match="says of itself") as caught:
            store.refresh()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_lost_alias_is_made_again(over: QdrantOverHttp) -> None:
    with open_store(over.url, identity=IDENTITY) as store:
        fill(store)
        store.activate((name := "v1"), count=6, digest=build(store, name))
    lost = models.DeleteAlias(alias_name="documents")
    over.local.update_collection_aliases([models.DeleteAliasOperation(delete_alias=lost)])
    with open_store(over.url) as store:
        assert (store.active, store.previous) == ("v1", RAW)
    (alias,) = over.local.get_aliases().aliases
    assert alias.collection_name == "documents_v1"


def test_large_batches_are_sent_in_parts(
    over: QdrantOverHttp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_store, "REQUEST_BYTES", 3000)
    monkeypatch.setattr(ServerStore, "KEYS_AT_ONCE", 7)
    with open_store(over.url, identity=IDENTITY) as store:
        fill(store, 40)
        assert over.seen.count("PUT /collections/documents_raw/points") > 2
        assert store.count() == 40
        rows = rows_of(40)
        page = store.get(list(range(40)))
        assert page.vectors.tobytes() == rows.tobytes()
        assert [hits.ids[0] for hits in store.search(rows, version=RAW, top_k=1)] == page.ids


def test_a_store_whose_collections_were_deleted_says_so(over: QdrantOverHttp) -> None:
    with open_store(over.url, identity=IDENTITY) as store:
        over.local.delete_collection("documents_raw")
        with pytest.raises(ConchError, match="collection documents: the collection was deleted"):
            store.rollback()


def test_a_url_is_shown_without_secrets() -> None:
    assert shown_url("https://me:pass@host:6333/a/?api_key=x") == "https://host:6333/a"
    with pytest.raises(ConchError, match="http://host:port is no URL of a server"):
        open_store("http://host:port", identity=IDENTITY)
