"""One contract for all stores, over each of them.

QDRANT_URL (and QDRANT_API_KEY) name a real server to run it over too.
"""

import hashlib
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qdrant_client import QdrantClient

from conch_dna.errors import ConchError
from conch_dna.sedimentation.embedders.contract import unit
from conch_dna.sedimentation.retrieval import WordFusion
from conch_dna.sedimentation.stores.contract import RAW, VectorStore
from conch_dna.sedimentation.stores.filters import conditions_of, matches
from conch_dna.sedimentation.stores.open_store import open_store
from conch_dna.sedimentation.stores.stored_documents import ContentSum
from qdrant_over_http import QdrantOverHttp

D = 8
IDENTITY = {"student": "tiny-student", "digest": "d1", "dimension": D}
LASTING = ["folder", "http", "server"]
Opens = Callable[..., VectorStore]

# What stands behind `http` says so once; the parameters are for a server.
pytestmark = pytest.mark.filterwarnings("ignore:Local mode performs exact:UserWarning")


@contextmanager
def place_of(kind: str, folder: Path) -> Iterator[Opens]:
    """A function that opens the store of a test, again and again the same one."""
    if kind == "memory":
        yield lambda identity=IDENTITY: open_store(":memory:", identity=identity)
    elif kind == "folder":
        yield lambda identity=IDENTITY: open_store(folder / "db", identity=identity)
    elif kind == "http":
        with QdrantOverHttp() as over:
            yield lambda identity=IDENTITY: open_store(over.url, identity=identity)
    else:
        url, key = os.environ.get("QDRANT_URL"), os.environ.get("QDRANT_API_KEY")
        if not url:
            pytest.skip("QDRANT_URL is not set: this did not run against a real server")
        name = f"test-{uuid.uuid4().hex[:12]}"
        yield lambda identity=IDENTITY: open_store(
            url, identity=identity, collection=name, api_key=key
        )
        client = QdrantClient(url=url, api_key=key)
        for one in client.get_collections().collections:
            if one.name.startswith(f"{name}_"):
                client.delete_collection(one.name)
        client.close()


@pytest.fixture(params=[*LASTING, "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[VectorStore]:
    with place_of(request.param, tmp_path) as opens, opens() as opened:
        yield opened


@pytest.fixture(params=LASTING)
def opens(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opens]:
    """How to open a store that is still there after it was closed."""
    with place_of(request.param, tmp_path) as found:
        yield found


def rows_of(count: int, *, seed: int = 0, dimension: int = D) -> np.ndarray:
    return unit(np.random.default_rng(seed).normal(size=(count, dimension)))


def fill(store: VectorStore, count: int, *, first: int = 0, **versions: np.ndarray) -> np.ndarray:
    rows = rows_of(count, seed=first)
    ids = [f"doc {n}" for n in range(first, first + count)]
    payloads = [{"n": n, "even": n % 2 == 0} for n in range(first, first + count)]
    store.put(ids, payloads, [f"digest {i}" for i in ids], {RAW: rows, **versions})
    return rows


def build(store: VectorStore, name: str, rows: np.ndarray, *, activate: bool = True) -> str:
    """A version whose vectors are these, in the order of `fill`; its digest."""
    store.add_version(name, rows.shape[1])
    ids = [f"doc {n}" for n in range(len(rows))]
    half = len(ids) // 2
    store.put_version(name, ids[:half], rows[:half])
    store.put_version(name, ids[half:], rows[half:])
    content = ContentSum()
    content.add(ids, rows)
    if activate:
        store.activate(name, count=len(ids), digest=content.hexdigest())
    return content.hexdigest()


# Documents


def test_what_was_put_comes_back_as_it_was_given(store: VectorStore) -> None:
    payload = {
        "title": "Über größe",
        "text": "\u0000 \n",
        "nested": {"a": [1, {"b": None}], "": 0.1},
        "largest": 2**63 - 1,
        "smallest": -(2**63),
        "number": 1.0,
        "true": True,
        "dotted.name": "x",
        "id": "mine",
        "digest": "mine too",
    }
    rows = rows_of(3)
    given = dict(payload)
    store.put(["a", 7, -(10**30)], [payload, {}, {}], ["d1", "d2", "d3"], {RAW: rows})
    assert payload == given
    page = store.get([-(10**30), "a", 7])
    assert page.ids == [-(10**30), "a", 7]
    assert page.payloads == [{}, payload, {}]
    assert type(page.payloads[1]["number"]) is float
    assert page.vectors.dtype == np.float32
    assert page.vectors.tobytes() == rows[[2, 0, 1]].tobytes()
    hits = store.search(rows[:1], version=RAW, top_k=1)[0]
    assert (hits.ids, hits.payloads) == (["a"], [payload])


def test_a_number_and_its_text_are_two_documents(store: VectorStore) -> None:
    store.put([1, "1"], [{"is": "number"}, {"is": "text"}], ["a", "b"], {RAW: rows_of(2)})
    assert store.count() == 2
    assert store.digests([1, "1", "2"]) == {1: "a", "1": "b"}
    assert store.get(["1"]).payloads == [{"is": "text"}]


def test_a_document_put_again_replaces_the_first(store: VectorStore) -> None:
    fill(store, 3)
    new = rows_of(1, seed=9)
    store.put(["doc 1"], [{"only": "this"}], ["new"], {RAW: new})
    assert store.count() == 3
    assert store.digests(["doc 0", "doc 1", "doc 1"]) == {"doc 0": "digest doc 0", "doc 1": "new"}
    page = store.get(["doc 1"])
    assert page.payloads == [{"only": "this"}]
    assert page.vectors.tobytes() == new.tobytes()


def test_what_a_caller_changes_later_does_not_reach_the_store(store: VectorStore) -> None:
    rows, payload = rows_of(1), {"list": [1]}
    store.put(["a"], [payload], ["d"], {RAW: rows})
    before = rows.tobytes()
    rows[:] = 0
    payload["list"].append(2)
    page = store.get(["a"])
    assert page.vectors.tobytes() == before
    assert page.payloads == [{"list": [1]}]
    page.payloads[0]["list"].append(3)
    assert store.get(["a"]).payloads == [{"list": [1]}]


def test_pages_hold_every_document_once_and_in_the_same_order(store: VectorStore) -> None:
    rows = fill(store, 25)
    pages = list(store.pages(size=10))
    assert [len(page.ids) for page in pages] == [10, 10, 5]
    ids = [i for page in pages for i in page.ids]
    assert sorted(ids) == sorted(f"doc {n}" for n in range(25))
    assert ids == [i for page in store.pages(size=7) for i in page.ids]
    vectors = np.concatenate([page.vectors for page in pages])
    order = [int(str(i).split()[1]) for i in ids]
    assert vectors.tobytes() == rows[order].tobytes()
    assert [page.payloads[0]["n"] for page in pages] == [order[0], order[10], order[20]]


def test_an_empty_store_answers_and_an_empty_batch_is_nothing(store: VectorStore) -> None:
    store.put([], [], [], {RAW: np.zeros((0, D), np.float32)})
    assert store.count() == 0
    assert list(store.pages()) == []
    assert store.digests(["a"]) == {}
    assert store.digests([]) == {}
    assert store.get([]).vectors.shape == (0, D)
    (hits,) = store.search(rows_of(1), version=RAW, top_k=3)
    assert (hits.ids, hits.payloads, hits.scores.shape) == ([], [], (0,))
    assert store.search(np.zeros((0, D)), version=RAW, top_k=3) == []
    assert store.digest() == "0" * 64
    assert (store.active, store.previous, store.versions()) == (RAW, None, [])


# Search


def test_search_finds_what_a_comparison_with_all_finds(store: VectorStore) -> None:
    rows = fill(store, 60)
    queries = rows_of(5, seed=99)
    cosines = queries.astype(np.float64) @ rows.astype(np.float64).T
    found = store.search(queries, version=RAW, top_k=7)
    assert len(found) == 5
    for hits, scores in zip(found, cosines, strict=True):
        best = np.argsort(-scores)[:7]
        assert hits.ids == [f"doc {n}" for n in best]
        np.testing.assert_allclose(hits.scores, scores[best], atol=1e-6)
        assert hits.scores.dtype == np.float32
        assert [payload["n"] for payload in hits.payloads] == best.tolist()
    assert len(store.search(queries, version=RAW, top_k=100)[0].ids) == 60
    exact = store.search(queries, version=RAW, top_k=7, exact=True)
    assert [hits.ids for hits in exact] == [hits.ids for hits in found]


KINDS: list[dict[str, Any]] = [
    {"kind": "a", "n": 1, "flag": True, "tags": ["x", "y"], "in": {"kind": "b"}},
    {"kind": "b", "n": 2, "flag": False, "tags": ["y"], "dotted.name": "dot"},
    {"kind": "1", "n": "1", "flag": 1, "tags": [], "a b": "space"},
    {"kind": None, "n": 1.0, "flag": "true", "tags": "x", "größe": 3},
    {"n": True, "tags": [True, 5]},
]


FILTERS: list[tuple[Any, set[int]]] = [
    ({"kind": "a"}, {0}),
    ({"kind": ["a", "b"]}, {0, 1}),
    ({"n": 1}, {0}),
    ({"n": [1, "1"]}, {0, 2}),
    ({"n": {1, "1"}}, {0, 2}),
    ({"n": (1, True)}, {0, 4}),
    ({"n": True}, {4}),
    ({"flag": True}, {0}),
    ({"flag": False}, {1}),
    ({"flag": [True, False]}, {0, 1}),
    ({"flag": ["true", False]}, {1, 3}),
    ({"tags": "x"}, {0, 3}),
    ({"tags": ["y", 5]}, {0, 1, 4}),
    ({"tags": True}, {4}),
    ({"dotted.name": "dot"}, {1}),
    ({"in.kind": "b"}, set()),
    ({"a b": "space"}, {2}),
    ({"größe": 3}, {3}),
    ({"kind": "a", "n": 2}, set()),
    ({"kind": ["a", "b"], "n": 2}, {1}),
    ({"missing": "x"}, set()),
    ({}, {0, 1, 2, 3, 4}),
    (None, {0, 1, 2, 3, 4}),
]


def test_one_definition_says_what_a_filter_means() -> None:
    for where, expected in FILTERS:
        conditions = conditions_of(where)
        found = {n for n, payload in enumerate(KINDS) if matches(payload, conditions)}
        assert found == expected, where


def test_filters_by_payload(store: VectorStore) -> None:
    ids = list(range(len(KINDS)))
    store.put(ids, KINDS, ["d"] * len(ids), {RAW: rows_of(len(ids))})
    store.add_version("v1", 3)
    store.put_version("v1", ids, rows_of(len(ids), dimension=3))
    for where, expected in FILTERS:
        for version, dimension in ((RAW, D), ("v1", 3)):
            queries = rows_of(2, seed=5, dimension=dimension)
            hits = store.search(queries, version=version, top_k=10, where=where)
            assert [set(one.ids) for one in hits] == [expected] * 2, (where, version)


def test_word_fusion_filters_as_the_store_does() -> None:
    with open_store(":memory:", identity=IDENTITY) as store:
        ids = list(range(len(KINDS)))
        payloads = [{**payload, "text": "owl"} for payload in KINDS]
        store.put(ids, payloads, ["d"] * len(ids), {RAW: rows_of(len(ids))})
        fusion = WordFusion(store, 60)
        for where, expected in FILTERS:
            (hits,) = store.search(rows_of(1, seed=5), version=RAW, top_k=10, where=where)
            assert set(fusion.fused("owl", hits, 10, where).ids) == expected, where


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"n": 1.5}, "'n' is to be 1.5 of type float: give texts, integers"),
        ({"n": None}, "'n' is to be None of type NoneType"),
        ({"n": []}, "'n' has no values, so that nothing could be found"),
        ({"n": 2**63}, "'n' is to be 9223372036854775808"),
        ({'a"b': 1}, "cannot be asked for: name a payload field without quotes"),
        ({"": 1}, "'' cannot be asked for"),
    ],
)
def test_a_filter_that_cannot_be_is_refused(
    store: VectorStore, where: dict[str, Any], message: str
) -> None:
    fill(store, 1)
    with pytest.raises(ConchError, match=message):
        store.search(rows_of(1), version=RAW, top_k=1, where=where)


# Versions


def test_a_version_is_built_activated_and_rolled_back(store: VectorStore) -> None:
    raw = fill(store, 20)
    first, second = rows_of(20, seed=1), rows_of(20, seed=2, dimension=5)
    build(store, "v1", first, activate=False)
    assert (store.active, store.previous, store.versions()) == (RAW, None, ["v1"])
    assert store.count("v1") == 20
    with pytest.raises(ConchError, match="no previous version to return to"):
        store.rollback()
    store.activate("v1", count=20, digest=store.digest("v1"))
    assert (store.active, store.previous) == ("v1", RAW)
    build(store, "v2", second)
    assert (store.active, store.previous, store.versions()) == ("v2", "v1", ["v1", "v2"])
    page = store.get(["doc 3", "doc 0"], "v2")
    assert page.vectors.tobytes() == second[[3, 0]].tobytes()
    assert page.payloads[0] == {"n": 3, "even": False}
    hits = store.search(second[4:5], version="v2", top_k=1, where={"even": True})[0]
    assert (hits.ids, hits.payloads) == (["doc 4"], [{"n": 4, "even": True}])
    assert store.rollback() == "v1"
    assert (store.active, store.previous) == ("v1", "v2")
    assert store.rollback() == "v2"
    assert store.get([f"doc {n}" for n in range(20)]).vectors.tobytes() == raw.tobytes()


def test_raw_can_be_returned_to(store: VectorStore) -> None:
    fill(store, 4)
    build(store, "v1", rows_of(4, seed=1))
    assert store.rollback() == RAW
    assert (store.active, store.previous) == (RAW, "v1")
    store.activate("v1", count=4, digest=store.digest("v1"))
    store.activate(RAW, count=4, digest=store.digest(RAW))
    assert (store.active, store.previous) == (RAW, "v1")
    store.activate(RAW, count=4, digest=store.digest(RAW))
    assert (store.active, store.previous) == (RAW, "v1")


def test_later_documents_need_a_vector_of_every_version(store: VectorStore) -> None:
    fill(store, 4)
    build(store, "v1", rows_of(4, seed=1, dimension=3))
    with pytest.raises(ConchError, match="given for raw, but the store needs them for raw, v1"):
        fill(store, 2, first=4)
    assert store.count() == 4
    later = rows_of(2, seed=8, dimension=3)
    fill(store, 2, first=4, v1=later)
    assert (store.count(), store.count("v1")) == (6, 6)
    assert store.get(["doc 5"], "v1").vectors.tobytes() == later[1:].tobytes()
    assert "doc 4" in store.search(later[:1], version="v1", top_k=2)[0].ids


def test_activation_refuses_what_is_not_whole(store: VectorStore) -> None:
    fill(store, 6)
    build(store, "v1", rows_of(6, seed=1))
    digest = build(store, "v2", rows_of(6, seed=2), activate=False)
    with pytest.raises(ConchError, match=r"v2 .* it holds 6 vectors, not 5\. v1 stays active"):
        store.activate("v2", count=5, digest=digest)
    with pytest.raises(ConchError, match=f"its digest is {digest}, not abc"):
        store.activate("v2", count=6, digest="abc")
    store.add_version("v3", D)
    store.put_version("v3", ["doc 0"], rows_of(1))
    with pytest.raises(ConchError, match="it holds 1 vectors for 6 documents"):
        store.activate("v3", count=1, digest=store.digest("v3"))
    assert (store.active, store.previous) == ("v1", RAW)
    with pytest.raises(ConchError, match=r"5 documents have no v3 vector in .*'doc 1', 'doc 2'"):
        store.get([f"doc {n}" for n in range(6)], "v3")
    assert [page.ids for page in store.pages("v3")] == [["doc 0"]]


def test_versions_that_are_in_use_are_not_dropped(store: VectorStore) -> None:
    fill(store, 4)
    for name in ("v1", "v2", "v3"):
        build(store, name, rows_of(4, seed=5), activate=True)
    build(store, "v4", rows_of(4, seed=6), activate=False)
    for name, kind in ((RAW, "raw"), ("v3", "active"), ("v2", "previous")):
        with pytest.raises(ConchError, match=f"{name} is the {kind} one and cannot be dropped"):
            store.drop_version(name)
    store.drop_version("v1")
    store.drop_version("v4")
    assert store.versions() == ["v2", "v3"]
    with pytest.raises(ConchError, match="has no version v1, only raw, v2, v3"):
        store.count("v1")
    fill(store, 1, first=4, v2=rows_of(1), v3=rows_of(1))
    # A name may be used again, in another dimension.
    store.add_version("v1", 3)
    assert store.count("v1") == 0
    store.put_version("v1", ["doc 0"], rows_of(1, dimension=3))
    assert store.get(["doc 0"], "v1").vectors.shape == (1, 3)


def test_the_digest_is_of_ids_and_vectors_whatever_their_order(store: VectorStore) -> None:
    rows = rows_of(5)
    ids: list[Any] = [1, "1", "b", "größe", -2]
    store.put(ids[:2], [{}, {}], ["", ""], {RAW: rows[:2]})
    store.put(ids[:1:-1], [{"a": 1}] * 3, ["x"] * 3, {RAW: rows[:1:-1]})
    total = 0
    for identifier, row in zip(ids, rows, strict=True):
        name = f"{'s' if isinstance(identifier, str) else 'i'}{identifier}".encode()
        content = len(name).to_bytes(8, "little") + name + row.astype("<f4").tobytes()
        total += int.from_bytes(hashlib.sha256(content).digest(), "little")
    assert store.digest() == f"{total % 2**256:064x}"
    changed = rows[:1].copy()
    changed[0, 0] = np.nextafter(changed[0, 0], np.float32(2))
    store.put([1], [{}], [""], {RAW: changed})
    assert store.digest() != f"{total % 2**256:064x}"


# Refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": ["a", "a"]}, "id 'a' comes twice in one batch"),
        ({"ids": ["a", True]}, "id True is of type bool: give a text or an integer"),
        ({"ids": ["a", 1.0]}, "id 1.0 is of type float"),
        ({"ids": ["a", "\ud800"]}, "is no valid Unicode text"),
        ({"ids": ["a"]}, "1 ids, 2 payloads and 2 digests"),
        ({"payloads": [{}, {"_conch_id": 1}]}, "'b': payload field '_conch_id' begins with _conch"),
        ({"payloads": [{}, {"a": [float("nan")]}]}, "document 'b': payload holds the number nan"),
        ({"payloads": [{}, {"a": {1: 2}}]}, "payload holds the field 1"),
        ({"payloads": [{}, {"a": (1, 2)}]}, r"payload holds \(1, 2\) of type tuple"),
        ({"payloads": [{}, {"a": 2**63}]}, "payload holds the integer 9223372036854775808"),
        ({"payloads": [{}, {"a": np.float32(1)}]}, "of type float32"),
        ({"payloads": [{}, {"a": "\udcff"}]}, "payload holds the invalid text"),
        ({"vectors": {}}, "given for no version, but the store needs them for raw"),
        ({"vectors": {RAW: rows_of(2), "v9": rows_of(2)}}, "needs them for raw$"),
        ({"vectors": {RAW: rows_of(3)}}, r"have shape \[3, 8\], but \[2, 8\] is needed"),
        ({"vectors": {RAW: rows_of(2, dimension=9)}}, r"shape \[2, 9\], but \[2, 8\] is needed"),
        ({"vectors": {RAW: rows_of(2)[0]}}, r"shape \[8\], but"),
        ({"vectors": {RAW: rows_of(2) * [[1], [2]]}}, "1 of 2 .* is number 2 with 2: pass them"),
        ({"vectors": {RAW: rows_of(2) * [[1], [np.nan]]}}, "the first is number 2 with nan"),
    ],
)
def test_a_batch_with_a_mistake_is_refused_whole(
    store: VectorStore, change: dict[str, Any], message: str
) -> None:
    batch: dict[str, Any] = {
        "ids": ["a", "b"],
        "payloads": [{}, {}],
        "digests": ["", ""],
        "vectors": {RAW: rows_of(2)},
    }
    with pytest.raises(ConchError, match=message):
        store.put(**{**batch, **change})
    assert store.count() == 0


def test_calls_that_cannot_be_are_refused(store: VectorStore) -> None:
    fill(store, 3)
    store.add_version("v1", 4)
    refused: list[tuple[Callable[[], Any], str]] = [
        (lambda: store.search(rows_of(1), version=RAW, top_k=0), "top_k is 0: it must be 1"),
        (
            lambda: store.search(rows_of(1), version="v1", top_k=1),
            r"query vectors have shape \[1, 8\], but \[N, 4\] is needed",
        ),
        (lambda: store.search(rows_of(1), version="v2", top_k=1), "no version v2, only raw, v1"),
        (lambda: store.get(["doc 9", 3]), "2 documents have no raw vector in .*: 'doc 9', 3"),
        (lambda: store.add_version("v1", 4), "version v1 exists already"),
        (lambda: store.add_version("raw", 4), "'raw' is no name of a version"),
        (lambda: store.add_version("../v", 4), "'../v' is no name of a version"),
        (lambda: store.add_version("v2", 0), "version v2 has dimension 0"),
        (lambda: store.put_version(RAW, ["doc 0"], rows_of(1)), "raw vectors never change"),
        (
            lambda: store.put_version("v1", ["doc 0", "b"], rows_of(2, dimension=4)),
            "1 documents have no raw vector in .*: 'b'. Ingest them first",
        ),
        (lambda: store.put_version("v1", ["doc 0"], rows_of(1)), "vectors of v1 have shape"),
        (lambda: store.activate("v2", count=0, digest=""), "no version v2"),
        (lambda: next(store.pages("v2")), "no version v2"),
    ]
    for call, message in refused:
        with pytest.raises(ConchError, match=message):
            call()
    assert store.count("v1") == 0
    assert not store.index()


def test_a_closed_store_refuses_everything(store: VectorStore) -> None:
    store.close()
    store.close()
    for call in (store.count, store.digest, store.rollback, lambda: fill(store, 1)):
        with pytest.raises(ConchError, match="is closed: open it again"):
            call()


# Opening again


def test_documents_and_versions_outlive_the_process(opens: Opens) -> None:
    with opens() as store:
        raw = fill(store, 30)
        build(store, "v1", rows_of(30, seed=1, dimension=3))
        build(store, "v2", rows_of(30, seed=2))
        digests = {name: store.digest(name) for name in (RAW, "v1", "v2")}
    with opens(None) as store:
        assert store.identity == IDENTITY
        assert (store.active, store.previous, store.versions()) == ("v2", "v1", ["v1", "v2"])
        assert {name: store.digest(name) for name in (RAW, "v1", "v2")} == digests
        assert store.get(["doc 7"]).vectors.tobytes() == raw[7:8].tobytes()
        assert store.rollback() == "v1"
    with opens() as store:
        assert (store.active, store.previous) == ("v1", "v2")
        store.rollback()
        build(store, "v3", rows_of(30, seed=3))
        store.drop_version("v1")
    with opens() as store:
        assert (store.active, store.previous, store.versions()) == ("v3", "v2", ["v2", "v3"])
        fill(store, 1, first=30, v2=rows_of(1), v3=rows_of(1))


def test_what_was_not_activated_is_gone_when_opened_again(opens: Opens) -> None:
    with opens() as store:
        fill(store, 10)
        build(store, "v1", rows_of(10, seed=1))
        build(store, "v2", rows_of(10, seed=2, dimension=3), activate=False)
    with opens() as store:
        assert (store.active, store.previous, store.versions()) == ("v1", RAW, ["v1"])
        build(store, "v2", rows_of(10, seed=2, dimension=5))
        assert store.get(["doc 0"], "v2").vectors.shape == (1, 5)
    with opens() as store:
        assert store.versions() == ["v1", "v2"]


def test_a_store_of_another_student_is_refused_with_both_names(opens: Opens) -> None:
    opens().close()
    for change, message in (
        (
            {"student": "other", "digest": "d2"},
            "was made with student tiny-student, not other: open it with that",
        ),
        ({"digest": "d2"}, r"other weights or settings of tiny-student \(digest d1, now d2\)"),
        ({"dimension": 9}, "was made in 8 dimensions, not 9"),
        (
            {"student": "other", "dimension": 9},
            "with student tiny-student, not other and in 8 dimensions, not 9",
        ),
        ({"prefix": "query: "}, "'prefix': 'query: '"),
        ({"student": ""}, "identity has student ''"),
        ({"dimension": "8"}, "identity has dimension '8'"),
    ):
        with pytest.raises(ConchError, match=message):
            opens({**IDENTITY, **change})
    # The digest says that it is the same one, in a folder that was moved.
    with opens({**IDENTITY, "student": "moved"}) as store:
        assert store.identity == {**IDENTITY, "student": "moved"}
    with opens() as store:
        assert store.identity == IDENTITY


def test_a_store_that_is_not_there_needs_an_identity(opens: Opens) -> None:
    with pytest.raises(ConchError, match="holds no store yet: ingest documents first"):
        opens(None)
    opens().close()


def test_locations_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConchError, match="ftp://x is no location of a store: give a folder"):
        open_store("ftp://x", identity=IDENTITY)
    with pytest.raises(ConchError, match=r"an API key is for a server, but .* is not the URL"):
        open_store(tmp_path / "db", identity=IDENTITY, api_key="k")
    with pytest.raises(ConchError, match="holds no store yet"):
        open_store(":memory:")
    assert not (tmp_path / "db").exists()
