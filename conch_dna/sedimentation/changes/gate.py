"""The gate: whether a change of the vectors may become active, on evidence of held-out queries.

Knows rankings and figures of queries; nothing of models, stores or files. To judge by another
measure: its figures per query, before and after, as one more entry of what `judge_all` is given.
"""

import heapq
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from conch_dna.errors import ConchError
from conch_dna.metrics import RESAMPLES, paired_interval
from conch_dna.sedimentation.changes.collapse import sample_rank
from conch_dna.sedimentation.retrieval import Identifier

NO_EVIDENCE = "nothing is activated on no evidence"
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
# Less than this names no document; less than this of a text is not worth finding.
FEWEST_WORDS = 3


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the gate says.

    Attributes:
        passed: Whether the change may become active.
        reason: One line with the figures.
        figures: What it was decided on; empty where there was no evidence.
    """

    passed: bool
    reason: str
    figures: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class PseudoQueries:
    """Queries made from the corpus, where nobody judged any.

    Attributes:
        queries: Their texts `[Q]`.
        rests: What that document's text is without the query `[Q]`.
        documents: The document that each is to find `[Q]`. No pair of these documents may be
            fitted to, or the queries are not held out.
        titles: How many of them are titles; the others are first sentences.
        unsuitable: Documents seen that have neither title nor sentences enough.
    """

    queries: list[str]
    rests: list[str]
    documents: list[Identifier]
    titles: int
    unsuitable: int

    @property
    def judgements(self) -> dict[str, dict[Identifier, int]]:
        """Query number as text to its one relevant document, for `evaluate_rankings`."""
        return {str(number): {each: 1} for number, each in enumerate(self.documents)}


def pseudo_queries(
    documents: Iterable[tuple[Identifier, str, str]], *, sample: int = 500, seed: int = 0
) -> PseudoQueries:
    """Make known-item queries: a title is to find its document, else a first sentence is.

    What they are worth: a document that holds its query's words is found by any vectors that keep
    words, and a student's raw ones would look perfect. So its `rests`, the text without the title
    or sentence, is what stands for it while the gate looks, before and after alike. Beside the
    figure goes `teacher_agreement`, which leaves the query's own document out. A query needs three
    words, and the rest of its document as many.

    Args:
        documents: Id, title (may be empty) and text; any number of them, one pass.
        sample: Most queries to make. Which is decided by ids and seed, not by the order.
        seed: Of the sample.

    Raises:
        ConchError: sample is below 1.
    """
    if sample < 1:
        raise ConchError(f"{sample} pseudo-queries were asked for: it must be 1 or more")
    unsuitable = 0

    def suitable() -> Iterable[tuple[str, Identifier, str, str, bool]]:
        nonlocal unsuitable
        for identifier, title, text in documents:
            made = _query_of(title, text)
            if made is None:
                unsuitable += 1
            else:
                yield sample_rank(identifier, seed=seed), identifier, *made

    chosen = heapq.nsmallest(sample, suitable(), key=lambda each: each[0])
    return PseudoQueries(
        queries=[query for _, _, query, _, _ in chosen],
        rests=[rest for _, _, _, rest, _ in chosen],
        documents=[identifier for _, identifier, _, _, _ in chosen],
        titles=sum(is_title for *_, is_title in chosen),
        unsuitable=unsuitable,
    )


def _query_of(title: str, text: str) -> tuple[str, str, bool] | None:
    """A document's query, its text without it, and whether that is the title; None if unfit."""

    def enough(part: str) -> bool:
        return len(part.split()) >= FEWEST_WORDS

    title, text = title.strip(), text.strip()
    if enough(title) and enough(text):
        return title, text, True
    first, *rest = _SENTENCE_END.split(text, maxsplit=1)
    return (first, rest[0], False) if rest and enough(first) and enough(rest[0]) else None


def teacher_agreement(
    rankings: Sequence[Sequence[Identifier]],
    teacher: Sequence[Sequence[Identifier]],
    *,
    left_out: Sequence[Identifier] | None = None,
    k: int = 10,
) -> np.ndarray:
    """Which share of the teacher's own top k a ranking has in its top k, query by query.

    Args:
        rankings: Of the vectors to judge, `[Q]` lists, best first; at least k + 1 long where
            documents are left out and the corpus has as many.
        teacher: Of the teacher's vectors of the same documents and queries.
        left_out: One document of each query that does not count, such as the one that a
            pseudo-query was taken from.
        k: How many documents count; fewer where the teacher's ranking is shorter.

    Returns:
        float64 `[Q]` between 0 and 1.

    Raises:
        ConchError: There are not as many of each, k is below 1, or a teacher's ranking is empty.
    """
    lengths = [len(rankings), len(teacher)] + ([len(left_out)] if left_out is not None else [])
    if len(set(lengths)) > 1 or k < 1:
        raise ConchError(
            f"agreement at {k} of {' and '.join(map(str, lengths))} rankings: k must be 1 or "
            "more, and every query needs one of each"
        )
    shares = np.zeros(len(rankings))
    for number, (own, other) in enumerate(zip(rankings, teacher, strict=True)):
        without = {left_out[number]} if left_out is not None else set()
        wanted = [each for each in other if each not in without][:k]
        if not wanted:
            raise ConchError(f"the teacher's ranking of query {number + 1} names no document")
        found = [each for each in own if each not in without][: len(wanted)]
        shares[number] = len(set(wanted) & set(found)) / len(wanted)
    return shares


def judge(
    before: Any,
    after: Any,
    *,
    margin: float = 0.005,
    confidence: float = 0.95,
    seed: int = 0,
    measure: str = "nDCG@10",
) -> Verdict:
    """Whether a change may become active (formulas.md 6).

    It passes only if the lower bound of the paired bootstrap interval (2,000 resamples) of the
    mean difference is not below -margin. So a change within the noise of few queries is refused,
    and one that changes nothing at all passes.

    Args:
        before: Figures of the active version, one a held-out query, `[Q]`.
        after: Of the candidate, same queries in the same order.
        margin: How much worse it may be, 0 or more.
        confidence: Of the interval, between 0 and 1.
        seed: Of the resampling.
        measure: What the figures are, for the reason.

    Raises:
        ConchError: Lengths differ, a figure is not finite, or a setting is out of its range.
    """
    if not margin >= 0 or not 0 < confidence < 1:
        raise ConchError(
            f"gate margin {margin:g} must be 0 or more and confidence {confidence:g} between 0 and "
            "1, such as 0.005 and 0.95"
        )
    own, other = (np.asarray(figures, np.float64) for figures in (after, before))
    if own.ndim != 1 or own.shape != other.shape:
        raise ConchError(
            f"the gate compares the same queries, and was given {list(other.shape)} figures before "
            f"and {list(own.shape)} after"
        )
    if not (np.isfinite(own).all() and np.isfinite(other).all()):
        raise ConchError(f"{measure} of the gate's queries holds values that are not finite")
    if len(own) < 2:
        found = f"{len(own) or 'no'} held-out quer{'y' if len(own) == 1 else 'ies'}"
        return Verdict(
            passed=False,
            reason=f"{measure}: {found}, and an interval needs at least 2; {NO_EVIDENCE}",
        )
    difference = float((own - other).mean())
    low, high = paired_interval(own, other, confidence=confidence, seed=seed)
    # A bound of exactly the margin passes, whatever the last bit of a float says.
    passed = low >= -margin or math.isclose(low, -margin, abs_tol=1e-9)
    figures = {
        "measure": measure,
        "before": float(other.mean()),
        "after": float(own.mean()),
        "difference": difference,
        "interval": [low, high],
        "confidence": confidence,
        "margin": margin,
        "queries": len(own),
        "resamples": RESAMPLES,
        "seed": seed,
    }
    return Verdict(
        passed=passed,
        reason=f"{measure}: {own.mean():.4f} after {other.mean():.4f}, difference "
        f"{difference:+.4f} [{low:+.4f}, {high:+.4f}] on {len(own)} queries; the lower bound must "
        f"not be below {-margin:+.4f}",
        figures=figures,
    )


def judge_all(
    measures: Mapping[str, tuple[Any, Any]],
    *,
    margin: float = 0.005,
    confidence: float = 0.95,
    seed: int = 0,
) -> Verdict:
    """`judge` by several measures, each of which must pass.

    Judgements are one measure and need no other. Without them there are two, pseudo-queries and
    teacher agreement, or the first alone where no teacher is loaded.

    Args:
        measures: Name to figures before and after, as in `judge`.
        margin: See `judge`.
        confidence: See `judge`.
        seed: See `judge`.

    Returns:
        A verdict whose figures are those of each measure by name, and whose reason begins with
        what was refused.

    Raises:
        ConchError: See `judge`.
    """
    if not measures:
        return Verdict(passed=False, reason=f"no held-out queries; {NO_EVIDENCE}")
    verdicts = {
        name: judge(before, after, margin=margin, confidence=confidence, seed=seed, measure=name)
        for name, (before, after) in measures.items()
    }
    ordered = sorted(verdicts.values(), key=lambda verdict: verdict.passed)
    return Verdict(
        passed=all(verdict.passed for verdict in ordered),
        reason=" | ".join(verdict.reason for verdict in ordered),
        figures={name: verdict.figures for name, verdict in verdicts.items()},
    )
