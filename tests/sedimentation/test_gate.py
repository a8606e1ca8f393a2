import math

import numpy as np
import pytest

from conch_dna.errors import ConchError
from conch_dna.sedimentation.changes.gate import (
    PseudoQueries,
    judge,
    judge_all,
    pseudo_queries,
    teacher_agreement,
)
from conch_dna.sedimentation.retrieval import evaluate_rankings


def bounds_oracle(difference, confidence, resamples=4000):
    """Percentiles of the means of resampled differences."""
    generator = np.random.default_rng(99)
    means = [
        difference[generator.integers(len(difference), size=len(difference))].mean()
        for _ in range(resamples)
    ]
    return np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])


def scores(mean_difference, spread, n=300, seed=0):
    """Figures before and after whose difference has exactly this mean."""
    generator = np.random.default_rng(seed)
    before = generator.uniform(0.2, 0.8, size=n)
    noise = generator.normal(size=n)
    noise = (noise - noise.mean()) / noise.std()
    return before, before + mean_difference + spread * noise


@pytest.mark.parametrize(
    ("difference", "spread", "passes"),
    [
        (0.05, 0.1, True),
        # Better on average, but not by enough to know.
        (0.001, 0.1, False),
        (-0.001, 0.01, True),
        (-0.004, 0.001, True),
        (-0.006, 0.001, False),
        (-0.05, 0.1, False),
    ],
)
def test_the_lower_bound_decides(difference, spread, passes):
    before, after = scores(difference, spread)
    verdict = judge(before, after)
    low, high = bounds_oracle(after - before, 0.95)
    assert (low >= -0.005) == passes
    assert verdict.passed == passes
    assert verdict.figures["interval"] == pytest.approx([low, high], abs=0.1 * spread / 17 * 3)
    assert verdict.figures["difference"] == pytest.approx(difference, abs=1e-9)
    assert verdict.figures["before"] == pytest.approx(before.mean())
    assert verdict.figures["queries"] == 300
    found = verdict.figures["interval"]
    assert f"{difference:+.4f} [{found[0]:+.4f}, {found[1]:+.4f}] on 300 queries" in verdict.reason


def test_a_change_of_exactly_the_margin_passes_and_a_hair_more_does_not():
    before = np.full(50, 0.3)
    assert judge(before, before - 0.005).passed
    assert not judge(before, before - 0.00501).passed
    assert judge(before, before).passed
    assert not judge(before, before - 0.005, margin=0).passed


def test_margin_and_confidence_count():
    before, after = scores(0.001, 0.1)
    assert not judge(before, after).passed
    assert judge(before, after, margin=0.02).passed
    assert judge(*scores(0.004, 0.1), confidence=0.5).passed
    assert not judge(*scores(0.004, 0.1), confidence=0.95).passed


def test_the_pairing_counts():
    """The same figures, matched with other queries, are no evidence any more."""
    before, after = scores(0.004, 0.005)
    assert judge(before, after).passed
    assert not judge(before, np.roll(after, 1)).passed


def test_the_verdict_is_a_function_of_the_seed():
    before, after = scores(0.01, 0.1)
    assert judge(before, after, seed=1) == judge(before, after, seed=1)
    assert judge(before, after, seed=1) != judge(before, after, seed=2)


@pytest.mark.parametrize(("count", "words"), [(0, "no held-out queries"), (1, "1 held-out query,")])
def test_no_evidence_activates_nothing(count, words):
    verdict = judge(np.zeros(count), np.ones(count))
    assert not verdict.passed
    assert words in verdict.reason
    assert verdict.reason.endswith("nothing is activated on no evidence")
    none = judge_all({})
    assert (none.passed, none.reason) == (
        False,
        "no held-out queries; nothing is activated on no evidence",
    )


def test_every_measure_must_pass_and_the_refused_one_comes_first():
    good, bad = scores(0.05, 0.1), scores(-0.05, 0.1)
    verdict = judge_all({"nDCG@10 of pseudo-queries": good, "teacher agreement": bad})
    assert not verdict.passed
    assert verdict.reason.startswith("teacher agreement: ")
    assert " | nDCG@10 of pseudo-queries: " in verdict.reason
    assert verdict.figures["teacher agreement"]["difference"] == pytest.approx(-0.05)
    both = judge_all({"nDCG@10": good, "teacher agreement": good})
    assert both.passed
    assert both.to_json()["figures"] == both.figures
    one_missing = judge_all({"nDCG@10": good, "teacher agreement": ([], [])})
    assert not one_missing.passed


DOCUMENTS = [
    (1, "Reefs in cold water", "Coral grows slowly there. It needs light."),
    ("two", "", "A first sentence stands here. And then a second one."),
    (3, "Too short", "Does it? Yes, it surely does have one. And more of it."),
    (4, "A title without any text", ""),
    (5, "", "One sentence and nothing that could be found by it"),
    (6, "  ", "Only two. Though this has more words."),
]


def test_titles_find_their_documents_and_else_first_sentences():
    made = pseudo_queries(DOCUMENTS, sample=10)
    found = dict(zip(made.documents, made.queries, strict=True))
    assert found == {1: "Reefs in cold water", "two": "A first sentence stands here."}
    assert (made.titles, made.unsuitable) == (1, 4)
    assert made.judgements == {str(n): {each: 1} for n, each in enumerate(made.documents)}


def test_the_sample_does_not_depend_on_the_order_but_on_the_seed():
    many = [(n, f"Title of document {n}", "A text of some words.") for n in range(200)]

    def made(documents, seed):
        return pseudo_queries(iter(documents), sample=20, seed=seed)

    assert made(many, 0) == made(many[::-1], 0)
    assert len(made(many, 0).queries) == 20
    assert set(made(many, 0).documents) != set(made(many, 1).documents)
    grown = {*made([*many, (200, "One more title here", "And its own text.")], 0).documents}
    assert len(grown & set(made(many, 0).documents)) >= 19


def test_a_known_item_at_rank_r_counts_as_the_formula_says():
    queries, rests = ["a b c", "d e f"], ["g h i", "j k l"]
    made = PseudoQueries(queries=queries, rests=rests, documents=[7, 8], titles=2, unsuitable=0)
    rankings = {"0": [1, 2, 7], "1": [8, 1]}
    assert evaluate_rankings(rankings, made.judgements).ndcg.tolist() == pytest.approx(
        [1 / math.log2(4), 1]
    )


def test_agreement_is_the_share_of_the_teachers_top():
    own = [["a", "b", "c", "d"], ["x", "y"], ["a", "b"]]
    teacher = [["b", "a", "e", "f"], ["p", "q"], ["a", "b"]]
    assert teacher_agreement(own, teacher, k=4).tolist() == [0.5, 0, 1]
    assert teacher_agreement(own, teacher, k=1).tolist() == [0, 0, 1]
    assert teacher_agreement([], []).tolist() == []


def test_agreement_leaves_the_querys_own_document_out_of_both():
    own, teacher = [["self", "a", "b", "c"]], [["self", "c", "d", "a"]]
    assert teacher_agreement(own, teacher, k=2).tolist() == [0.5]
    assert teacher_agreement(own, teacher, left_out=["self"], k=2).tolist() == [0]
    assert teacher_agreement(own, teacher, left_out=["self"], k=3).tolist() == [2 / 3]
    assert teacher_agreement(own, [["self", "b"]], left_out=["self"], k=10).tolist() == [0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: judge([0.1, 0.2], [0.1]), r"given \[2\] figures before and \[1\] after"),
        (lambda: judge([0.1, np.nan], [0.1, 0.2]), "nDCG@10 of the gate's .* not finite"),
        (lambda: judge([0.1], [0.1], margin=-1), "gate margin -1 must be 0 or more"),
        (lambda: judge([0.1], [0.1], margin=math.nan), "gate margin nan"),
        (lambda: judge([0.1], [0.1], confidence=1), "confidence 1 between"),
        (lambda: pseudo_queries([], sample=0), "0 pseudo-queries"),
        (lambda: teacher_agreement([["a"]], []), "of 1 and 0 rankings"),
        (lambda: teacher_agreement([["a"]], [["a"]], left_out=[]), "of 1 and 1 and 0 rankings"),
        (lambda: teacher_agreement([["a"]], [["a"]], k=0), "agreement at 0"),
        (lambda: teacher_agreement([["a"]], [["a"]], left_out=["a"]), "query 1 names no document"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ConchError, match=message):
        make()
