import json
import math
from collections import Counter

import numpy as np
import pytest
import pytrec_eval

from conch_dna.errors import ConchError
from conch_dna.sedimentation.retrieval import (
    BM25,
    dcg_at_k,
    evaluate_rankings,
    ndcg_at_k,
    rrf,
    weights_of,
)


def random_case(seed):
    """Graded judgements, some of documents that no ranking has; a ranking of 30."""
    generator = np.random.default_rng(seed)
    judged = {
        f"d{n}": int(generator.integers(0, 4)) for n in generator.choice(200, 25, replace=False)
    }
    judged[f"d{generator.integers(200)}"] = 2
    return [f"d{n}" for n in generator.permutation(200)[:30]], judged


@pytest.mark.parametrize("k", [5, 10])
def test_ndcg_is_trec_evals(k):
    cases = {str(seed): random_case(seed) for seed in range(40)}
    evaluator = pytrec_eval.RelevanceEvaluator(
        {query: judged for query, (_, judged) in cases.items()}, {f"ndcg_cut_{k}"}
    )
    expected = evaluator.evaluate(
        {
            query: {each: -float(place) for place, each in enumerate(ranking)}
            for query, (ranking, _) in cases.items()
        }
    )
    assert any(0 < row[f"ndcg_cut_{k}"] < 1 for row in expected.values())
    for query, (ranking, judged) in cases.items():
        assert ndcg_at_k(ranking, judged, k) == pytest.approx(
            expected[query][f"ndcg_cut_{k}"], abs=1e-12
        )


def test_ideal_is_of_all_judged_documents_not_of_the_retrieved():
    """A ranking that found one of three relevant ones is not perfect."""
    judged = {"a": 1, "b": 1, "c": 1}
    ideal = 1 + 1 / math.log2(3) + 1 / math.log2(4)
    assert ndcg_at_k(["a", "x", "y"], judged) == pytest.approx(1 / ideal)
    assert ndcg_at_k(["c", "b", "a"], judged) == pytest.approx(1)
    assert ndcg_at_k(["x"], judged) == 0
    assert ndcg_at_k(["a"], {"a": 0}) == 0


def test_dcg_counts_k_documents_and_no_negative_grades():
    assert dcg_at_k([3, 2, 1], 2) == pytest.approx(3 + 2 / math.log2(3))
    assert dcg_at_k([-1, 1]) == pytest.approx(1 / math.log2(3))
    assert dcg_at_k([]) == 0


def test_evaluation_is_per_query_in_the_order_of_the_judgements():
    cases = {f"q{seed}": random_case(seed) for seed in range(12)}
    judgements = {query: judged for query, (_, judged) in reversed(cases.items())}
    found = evaluate_rankings({query: ranking for query, (ranking, _) in cases.items()}, judgements)
    assert found.queries == list(judgements)
    for query, ndcg, recall in zip(found.queries, found.ndcg, found.recall, strict=True):
        ranking, judged = cases[query]
        relevant = {each for each, grade in judged.items() if grade > 0}
        assert ndcg == pytest.approx(ndcg_at_k(ranking, judged), abs=1e-12)
        assert recall == pytest.approx(len(relevant & set(ranking)) / len(relevant), abs=1e-12)
    assert found.to_json() == {
        "ndcg_at_10": pytest.approx(found.ndcg.mean()),
        "recall_at_100": pytest.approx(found.recall.mean()),
        "queries": 12,
    }


def test_recall_counts_a_hundred():
    ranking = [f"d{n}" for n in range(150)]
    found = evaluate_rankings({"q": ranking}, {"q": {"d99": 1, "d100": 1}})
    assert found.recall.tolist() == [0.5]


def test_numbers_as_ids_and_empty_rankings():
    found = evaluate_rankings({"q": [3, 7], "r": [], "not judged": [1]}, {"q": {7: 1}, "r": {1: 1}})
    assert found.ndcg.tolist() == pytest.approx([1 / math.log2(3), 0])
    assert found.recall.tolist() == [1, 0]


def test_fusion_adds_reciprocal_ranks():
    found = rrf([["a", "b", "c"], ["c", "d"], []])
    assert dict(found) == pytest.approx(
        {"a": 1 / 61, "b": 1 / 62, "c": 1 / 63 + 1 / 61, "d": 1 / 62}
    )
    assert [each for each, _ in found] == ["c", "a", "b", "d"]
    assert rrf([["a", "b", "c"]], top_k=2) == [("a", 1 / 61), ("b", 1 / 62)]
    assert rrf([]) == []
    weighted = dict(rrf([["a", "b"], ["b", "c"]], weights=weights_of(0.25)))
    assert weighted == {"b": 0.5 / 62 + 1.5 / 61, "c": 1.5 / 62, "a": 0.5 / 61}
    assert list(dict(rrf([["a", "b"], ["c"]], weights=weights_of(1.0)))) == ["a", "b", "c"]


DOCUMENTS = {
    10: "coral coral coral reef",
    "b": "the coral reef and the sea",
    "c": "ships sail the sea, the sea, the wide sea",
    "d": "!!",
    "e": "a ship on a reef",
}


def bm25_oracle(query, k1, b):
    """Lucene's formula (bm25s, Lù 2024), on words stemmed and cleared of stop words by hand."""
    words = {
        10: ["coral", "coral", "coral", "reef"],
        "b": ["coral", "reef", "sea"],
        "c": ["ship", "sail", "sea", "sea", "wide", "sea"],
        "d": [],
        "e": ["ship", "reef"],
    }
    mean = np.mean([len(each) for each in words.values()])
    scores = Counter()
    for name, each in words.items():
        for word in query:
            holding = sum(word in other for other in words.values())
            rarity = math.log(1 + (len(words) - holding + 0.5) / (holding + 0.5))
            times = each.count(word)
            scores[name] += rarity * times / (times + k1 * (1 - b + b * len(each) / mean))
    return {name: score for name, score in scores.items() if score > 0}


@pytest.mark.parametrize(("k1", "b"), [(1.5, 0.75), (0.9, 0.4)])
def test_bm25_is_lucenes_formula(k1, b):
    index = BM25(DOCUMENTS, DOCUMENTS.values(), k1=k1, b=b)
    found = index.search(["the reefs of coral", "SHIP"])
    for hits, query in zip(found, (["reef", "coral"], ["ship"]), strict=True):
        expected = bm25_oracle(query, k1, b)
        assert dict(hits) == pytest.approx(expected, rel=1e-5)
        assert [score for _, score in hits] == sorted(dict(hits).values(), reverse=True)


def test_bm25_gives_no_more_than_asked_for_and_nothing_that_shares_no_word():
    index = BM25(DOCUMENTS, DOCUMENTS.values())
    assert [len(hits) for hits in index.search(["coral reef sea ship"], top_k=2)] == [2]
    assert index.search(["the of and", "", "unheard", "☃"], top_k=50) == [[], [], [], []]
    assert [each for each, _ in index.search(["unheard sail"])[0]] == ["c"]


@pytest.mark.slow
def test_bm25_ranks_a_real_collection_as_published(shared_data):
    """BM25 by bm25s has nDCG@10 .687 on SciFact's test queries."""
    folder = shared_data / "retrieval" / "scifact"
    documents, queries = (
        [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for name in ("corpus.jsonl", "queries.jsonl")
    )
    judgements = {}
    for line in (folder / "qrels" / "test.tsv").read_text().splitlines()[1:]:
        query, document, grade = line.split("\t")
        judgements.setdefault(query, {})[document] = int(grade)
    index = BM25(
        [each["_id"] for each in documents],
        [f"{each['title']} {each['text']}" for each in documents],
    )
    texts = {each["_id"]: each["text"] for each in queries}
    hits = index.search([texts[query] for query in judgements], top_k=100)
    rankings = {
        query: [each for each, _ in found] for query, found in zip(judgements, hits, strict=True)
    }
    found = evaluate_rankings(rankings, judgements)
    assert len(found.queries) == 300
    assert found.ndcg.mean() == pytest.approx(0.687, abs=0.005)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dcg_at_k([1], 0), "k is 0"),
        (lambda: ndcg_at_k(["a", "a"], {"a": 1}), "'a' stands in the ranking more than once"),
        (lambda: evaluate_rankings({}, {}), "no judged queries"),
        (lambda: evaluate_rankings({}, {"q": {"a": 1}}), "1 of 1 judged queries .* as 'q'"),
        (
            lambda: evaluate_rankings({"q": ["a"]}, {"q": {"a": 0}}),
            r"query 'q' has no relevant document.*\(1 of 1\)",
        ),
        (
            lambda: evaluate_rankings({"q": [1, "1"]}, {"q": {1: 1}}),
            "'1' stands in the ranking of query 'q' more than once",
        ),
        (lambda: rrf([["a"]], k=0), "fusion is 0"),
        (lambda: rrf([["a", "a"]]), "'a' stands in a ranking more than once"),
        (lambda: BM25([1], ["a text", "another"]), "1 ids came with 2 texts"),
        (lambda: BM25([1, 1], ["a text", "another"]), "1 stands in the corpus more than once"),
        (lambda: BM25([1], ["the !!"]), "no document has a word"),
        (lambda: BM25([], []), "no document has a word"),
        (lambda: BM25([1], ["coral"]).search(["coral"], top_k=0), "top_k is 0"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ConchError, match=message):
        make()
