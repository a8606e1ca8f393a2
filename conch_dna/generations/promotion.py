"""Gates: a child and its parent are measured, and a decision with its reasons comes out.

Knows loaded models, tokenized examples and generated texts; nothing of training, lines or files.
To add a gate: an entry in GATES; it gets the measures of both and the settings.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import numpy as np

from conch_dna.errors import ConchError
from conch_dna.generations.settings import PAIRED, GateSettings
from conch_dna.generations.taboo import TabooTokens
from conch_dna.language_model import LanguageModel
from conch_dna.metrics import paired_interval, ranges_of, worst_slice
from conch_dna.training.batches import Example
from conch_dna.training.data.answers import sample_texts
from conch_dna.training.evaluation import token_scores
from conch_dna.training.settings import LOSS_MEMORY, KDConfig

WORD = re.compile(r"\w+")

Metrics = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class TextScores:
    """How well a model writes texts, one figure for each.

    Attributes:
        top1: Share of a text's counted tokens that the model holds likeliest `[n]`, 0 to 1.
        nats: Cross-entropy of its counted tokens, in nats per token `[n]`.
        tokens: How many tokens count `[n]`.
    """

    top1: np.ndarray
    nats: np.ndarray
    tokens: np.ndarray

    def to_json(self) -> dict[str, float | int]:
        """Means over texts of `top1`, and over tokens of `nats`."""
        return {
            "texts": len(self.tokens),
            "tokens": int(self.tokens.sum()),
            "top1": float(self.top1.mean()) if len(self.top1) else 0.0,
            "nats_per_token": float((self.nats * self.tokens).sum() / max(1, self.tokens.sum())),
        }


def text_scores(
    model: LanguageModel,
    examples: Sequence[Example],
    *,
    batch_size: int,
    memory: float = LOSS_MEMORY,
) -> TextScores:
    """Score every text under a model.

    Args:
        model: Loaded.
        examples: With at least one counted token each.
        batch_size: Texts at once.
        memory: Megabytes for logits and what is made of them.
    """
    scores = token_scores(model, examples, batch_size=batch_size, memory=memory)
    return TextScores(
        np.array([each.likeliest.mean(dtype=np.float64) for each in scores]),
        np.array([-each.log_probs.mean(dtype=np.float64) for each in scores]),
        np.array([example.count for example in examples], np.int64),
    )


@dataclass(frozen=True, eq=False)
class Measures:
    """What gates are decided on: how well one model writes given texts, and what it answers.

    Attributes:
        recall: Its scores on earlier held-out data.
        generalize: Its scores on the new held-out data.
        answers: To the same prompts as the other model's.
    """

    recall: TextScores
    generalize: TextScores
    answers: list[str]

    @property
    def scores(self) -> dict[str, Any]:
        """The figures that gates compare, one for each text, and by what texts are told apart."""
        parts = {"recall": self.recall, "generalize": self.generalize}
        slices = {
            name: {"length": ranges_of(part.tokens.tolist(), "tokens")} if len(part.tokens) else {}
            for name, part in parts.items()
        }
        return {**{name: part.top1.tolist() for name, part in parts.items()}, "slices": slices}

    def to_json(self, taboo: TabooTokens | None, tokenizer: Any) -> dict[str, Any]:
        """The figures, with how many answers hold a taboo word where there are some."""
        figures: dict[str, Any] = {
            "recall": self.recall.to_json(),
            "generalize": self.generalize.to_json(),
        }
        if taboo:
            ids = [tokenizer.encode(text, add_special_tokens=False) for text in self.answers]
            figures["answers_with_taboo_words"] = sum(bool(taboo.spelled(i).any()) for i in ids)
        return figures


def measure(
    model: LanguageModel,
    *,
    recall: Sequence[Example],
    generalize: Sequence[Example],
    prompts: Sequence[Sequence[int]],
    config: KDConfig,
) -> Measures:
    """Score a model on two sets of texts and let it answer prompts.

    Args:
        model: Loaded.
        recall: Earlier held-out texts.
        generalize: New held-out ones.
        prompts: Token ids.
        config: Batch size, and how answers are drawn.
    """
    scores = [
        text_scores(model, part, batch_size=config.batch_size, memory=config.loss_memory)
        for part in (recall, generalize)
    ]
    return Measures(scores[0], scores[1], sample_texts(model, prompts, config))


@dataclass(frozen=True, kw_only=True)
class GateVerdict:
    """What one gate says.

    Attributes:
        gate: Its name.
        passed: Whether the child may go on.
        reason: One line with the figures, after the gate's name.
        figures: What it was decided on.
    """

    gate: str
    passed: bool
    reason: str
    figures: dict[str, Any] = field(default_factory=dict)


def _verdict(gate: str, passed: bool, reason: str, **figures: Any) -> GateVerdict:
    return GateVerdict(gate=gate, passed=passed, reason=f"{gate}: {reason}", figures=figures)


def _no_data(gate: str, who: str) -> GateVerdict:
    return _verdict(gate, False, f"no data of the {who}; nothing is promoted on no evidence")


def _scores(metrics: Metrics, name: str) -> np.ndarray | None:
    """A figure as an array of one score an item; None where there is no evidence."""
    value = metrics.get(name)
    if value is None:
        return None
    scores = np.atleast_1d(np.asarray(value, np.float64))
    return scores if len(scores) and np.isfinite(scores).all() else None


def _at_least(value: float, least: float) -> bool:
    # A difference of exactly the margin passes, whatever the last bit of a float says.
    return value >= least or math.isclose(value, least, abs_tol=1e-9)


def _compared(
    gate: str, child: Metrics, parent: Metrics, settings: GateSettings, *, least: float
) -> GateVerdict:
    """Whether the difference of a score reaches `least`, or its lower bound does."""
    own, other = _scores(child, gate), _scores(parent, gate)
    if own is None or other is None:
        return _no_data(gate, "child" if own is None else "parent")
    difference = float(own.mean() - other.mean())
    figures: dict[str, Any] = {
        "child": float(own.mean()),
        "parent": float(other.mean()),
        "difference": difference,
        "least": least,
        "items": len(own),
    }
    decisive, interval, bound = difference, "", ""
    wants_bound = gate in settings.by_lower_bound
    part = ""
    if len(own) == len(other) and len(own) > 1:
        slices = (child.get("slices") or {}).get(gate, {})
        before, after = (np.stack([-scores, np.ones_like(scores)]) for scores in (other, own))
        if found := worst_slice(before, after, slices, seed=settings.seed):
            figures["slice"] = found
            lost = "lost" if found["lost"] else "not shown to have lost"
            part = f"; of its parts {found['by']} {found['slice']} is worst, {lost} "
            part += f"({-found['difference']:+.4f})"
        low, high = paired_interval(own, other, confidence=settings.confidence, seed=settings.seed)
        figures["interval"] = [low, high]
        interval = f" [{low:+.4f}, {high:+.4f}]"
        if wants_bound:
            decisive, bound = low, "lower bound "
    elif wants_bound:
        reason = (
            f"no interval of {len(own)} and {len(other)} scores; its lower bound was asked for, "
            "which needs the same items of both"
        )
        return _verdict(gate, False, reason, **figures)
    reason = (
        f"{own.mean():.4f} against the parent's {other.mean():.4f}, difference "
        f"{difference:+.4f}{interval}; {bound}needed {least:+.4f}{part}"
    )
    return _verdict(gate, _at_least(decisive, least), reason, **figures)


def _at_most(gate: str, child: Metrics, most: float, *, words: str) -> GateVerdict:
    """Whether a figure of the child's, summed over its items, is small enough."""
    scores = _scores(child, gate)
    if scores is None:
        return _no_data(gate, "child")
    value = float(scores.sum())
    reason = f"{value:.4g} {words}; at most {most:g}"
    return _verdict(gate, _at_least(most, value), reason, child=value, most=most)


def recall_gate(child: Metrics, parent: Metrics, settings: GateSettings) -> GateVerdict:
    """What earlier generations learned must not be forgotten: parent's recall less the margin."""
    return _compared("recall", child, parent, settings, least=-settings.recall_margin)


def generalize_gate(child: Metrics, parent: Metrics, settings: GateSettings) -> GateVerdict:
    """Held-out data of the new domain: the parent's score and the gain."""
    return _compared("generalize", child, parent, settings, least=settings.generalize_gain)


def tone_gate(child: Metrics, parent: Metrics, settings: GateSettings) -> GateVerdict:
    """How much further from the reference the child's words lie than the parent's."""
    return _at_most("tone_drift", child, settings.max_tone_drift, words="more than the parent")


def law_gate(child: Metrics, parent: Metrics, settings: GateSettings) -> GateVerdict:
    """Answers that break a law."""
    return _at_most("law_violations", child, settings.max_law_violations, words="answers")


GATES: dict[str, Callable[[Metrics, Metrics, GateSettings], GateVerdict]] = {
    "recall": recall_gate,
    "generalize": generalize_gate,
    "tone_drift": tone_gate,
    "law_violations": law_gate,
}


def gate_verdicts(
    child: Metrics, parent: Metrics, settings: GateSettings | None = None
) -> list[GateVerdict]:
    """What every gate says, in their order."""
    settings = settings or GateSettings()
    return [gate(child, parent, settings) for gate in GATES.values()]


def validate_student_vs_teachers(
    student_metrics: Metrics,
    teacher1_metrics: Metrics,
    teacher2_metrics: Metrics | None = None,
    *,
    settings: GateSettings | None = None,
) -> tuple[bool, str]:
    """Whether a child replaces its parent.

    Args:
        student_metrics: `recall` and `generalize`, shares between 0 and 1 or one score an item in
            the same order as the parent's; `tone_drift`, what the function of that name gives; and
            `law_violations`, how many answers break a law. What is missing fails its gate.
        teacher1_metrics: The parent's `recall` and `generalize`.
        teacher2_metrics: The grandparent's, for the message only: it has no say.
        settings: What it must reach; the defaults without any.

    Returns:
        Whether every gate passed, and a line for each, the failed ones first.

    >>> parent = {"recall": 0.8, "generalize": 0.5}
    >>> child = {"recall": 0.7, "generalize": 0.6, "tone_drift": 0.0, "law_violations": 0}
    >>> passed, message = validate_student_vs_teachers(child, parent)
    >>> print(passed, message.splitlines()[0])
    False recall: 0.7000 against the parent's 0.8000, difference -0.1000; needed -0.0500
    """
    verdicts = gate_verdicts(student_metrics, teacher1_metrics, settings)
    lines = [each.reason for each in sorted(verdicts, key=attrgetter("passed"))]
    for name in PAIRED:
        scores = _scores(teacher2_metrics or {}, name)
        if scores is not None:
            lines.append(f"{name} of the grandparent: {scores.mean():.4f}")
    return all(verdict.passed for verdict in verdicts), "\n".join(lines)


def word_distance(texts: Sequence[str], reference: Sequence[str]) -> float:
    """Jensen-Shannon divergence, over ln 2, between the words of texts and of a reference.

    Words are runs of letters and digits in lower case. Few texts lie far from any reference by
    chance alone, so only texts of about the same length are compared with each other.

    Returns:
        Between 0, the same shares of the same words, and 1, no word in common; so texts without
        any word are 1 away.

    Raises:
        ConchError: The reference has no word.
    """
    from scipy.spatial.distance import jensenshannon

    counts = [
        Counter(w for t in side for w in WORD.findall(t.lower())) for side in (texts, reference)
    ]
    if not counts[1]:
        raise ConchError("the reference has no words, so tone cannot be measured: give texts")
    if not counts[0]:
        return 1.0
    words = sorted(counts[0] | counts[1])
    first, second = (np.array([side[word] for word in words], np.float64) for side in counts)
    return float(jensenshannon(first, second, base=2) ** 2)


def tone_drift(child: Sequence[str], parent: Sequence[str], reference: Sequence[str]) -> float:
    """How much further the child's words lie from the reference than the parent's.

    Returns:
        Between -1 and 1; 0 where both lie as far, below 0 where the child lies closer.
    """
    return word_distance(child, reference) - word_distance(parent, reference)
