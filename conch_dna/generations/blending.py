"""Two teachers into one target: confidence, disagreement, and what a token is taught by.

Knows distributions, as arrays; nothing of models, tokens' text or files. Works alike on dense
distributions and on K + 1 outcomes, whose last stands for the tokens that were not kept. Functions
of logits and of probabilities are for users; a generation works on log-probabilities.
To add a measure of confidence: a branch in `confidence` and its name in settings.CONFIDENCES.
"""

from enum import IntEnum

import mlx.core as mx
import numpy as np

from conch_dna.generations.settings import CONFIDENCES
from conch_dna.losses import (
    forward_kl,
    generalised_jsd,
    log_softmax,
    sum_last,
)

Outcomes = tuple[np.ndarray, np.ndarray]
"""Ids `[n, K]` (the number of tokens or more for none) and log-probabilities `[n, K + 1]`."""
LN_2 = float(np.log(2))


class Strategy(IntEnum):
    """What teaches a token; the numbers are those in arrays."""

    BLENDED = 0
    T1_ONLY = 1
    GOLD_FALLBACK = 2
    SKIP = 3


def _logs(probs: mx.array) -> mx.array:
    """Natural logarithms of probabilities, -inf where one is 0."""
    probs = mx.array(probs).astype(mx.float32)
    # The inner where keeps the gradient finite at outcomes of probability 0.
    return mx.where(probs > 0, mx.log(mx.where(probs > 0, probs, 1.0)), -mx.inf)


def confidence(log_probs: mx.array, method: str = "top1", *, rest_tokens: int = 0) -> mx.array:
    """How sure a distribution is of its next token, between 0 and 1.

    Args:
        log_probs: log p `[..., V]`, or `[..., K + 1]` with the rest last.
        method: "top1", the largest probability of a token, or "entropy", `1 - H(p) / ln V`.
        rest_tokens: Tokens for which the last outcome stands, 0 where it is a token itself.
            They count as equally likely: then the entropy is the largest it can be.

    Returns:
        `[...]`, float32: 1 for a certain token; 0 for the uniform distribution by "entropy", and
        1 / V by "top1".

    Raises:
        ValueError: The method has another name.
    """
    if method not in CONFIDENCES:
        raise ValueError(f"confidence is measured by {' or '.join(CONFIDENCES)}, not by {method!r}")
    kept = log_probs[..., :-1] if rest_tokens else log_probs
    if method == "top1":
        return mx.exp(kept.max(axis=-1))
    tokens = kept.shape[-1] + rest_tokens
    possible = log_probs > -mx.inf
    finite = mx.where(possible, log_probs, 0.0)
    entropy = -sum_last(mx.exp(log_probs) * finite).squeeze(-1)
    if rest_tokens:
        entropy = entropy + mx.exp(log_probs[..., -1]) * float(np.log(rest_tokens))
    if tokens == 1:
        return mx.ones(entropy.shape)
    return mx.clip(1 - entropy / float(np.log(tokens)), 0.0, 1.0)


def calculate_confidence(probs: mx.array, method: str = "top1") -> mx.array:
    """How sure probabilities `[..., V]` are of their next token, `[...]` between 0 and 1.

    Args:
        probs: Any float dtype.
        method: "top1" or "entropy", as `confidence` explains them.

    >>> calculate_confidence(mx.array([0.5, 0.5])).item()
    0.5
    >>> calculate_confidence(mx.array([0.5, 0.5]), "entropy").item()
    0.0
    """
    return confidence(_logs(probs), method)


def disagreement(first_log_probs: mx.array, second_log_probs: mx.array) -> mx.array:
    """Jensen-Shannon divergence `(½ KL(p‖m) + ½ KL(q‖m)) / ln 2`, with `m = (p + q) / 2`.

    Args:
        first_log_probs: log p `[..., V]`, float32; -inf where an outcome is excluded.
        second_log_probs: log q of the same outcomes.

    Returns:
        `[...]` between 0, identical, and 1, disjoint.

    Source: Lin (1991), "Divergence measures based on the Shannon entropy", in bits.
    """
    distance = generalised_jsd(first_log_probs, second_log_probs, beta=0.5) / LN_2
    return mx.clip(distance, 0.0, 1.0)


def jensen_shannon_divergence(p: mx.array, q: mx.array) -> mx.array:
    """Divergence of two arrays of probabilities `[..., V]`: 0 for equal ones, 1 for disjoint ones.

    >>> jensen_shannon_divergence(mx.array([1.0, 0.0]), mx.array([0.0, 1.0])).item()
    1.0
    """
    return disagreement(_logs(p), _logs(q))


def mixture(
    first_log_probs: mx.array, second_log_probs: mx.array, first_weight: mx.array
) -> mx.array:
    """`log(w p + (1 - w) q)`, elementwise over the outcomes `[..., V]`.

    Args:
        first_log_probs: log p `[..., V]`, float32.
        second_log_probs: log q of the same outcomes.
        first_weight: w `[...]`, between 0 and 1.
    """
    weight = first_weight[..., None]
    logs = [
        log_probs + _logs(share)
        for log_probs, share in ((first_log_probs, weight), (second_log_probs, 1 - weight))
    ]
    excluded = (logs[0] == -mx.inf) & (logs[1] == -mx.inf)
    # The inner where keeps the gradient finite at outcomes that both exclude.
    both = mx.logaddexp(*(mx.where(excluded, 0.0, log) for log in logs))
    return mx.where(excluded, -mx.inf, both)


def shares(first: mx.array, second: mx.array) -> tuple[mx.array, mx.array]:
    """Weights in proportion to two confidences `[...]`, one half each where both are 0."""
    total = first + second
    weight = mx.where(total > 0, first / mx.where(total > 0, total, 1.0), 0.5)
    return weight, 1 - weight


def blend_teacher_predictions(
    logits_t1: mx.array, logits_t2: mx.array, temperature: float = 2.0, *, method: str = "top1"
) -> tuple[mx.array, tuple[mx.array, mx.array]]:
    """Blend two teachers' distributions in proportion to their confidence.

    Confidence is what a teacher has without a temperature; the distributions that are blended
    are softened by it.

    Args:
        logits_t1: The first teacher's `[..., V]`, any float dtype.
        logits_t2: The second's, over the same tokens.
        temperature: Above 0.
        method: Measure of confidence, "top1" or "entropy".

    Returns:
        Log-probabilities of the blend `[..., V]`, float32, and the weights `[...]` of both.
    """
    _same_shape(logits_t1, logits_t2)
    both = (logits_t1, logits_t2)
    first, second = shares(*(confidence(log_softmax(logits), method) for logits in both))
    soft = [log_softmax(logits, temperature) for logits in both]
    return mixture(soft[0], soft[1], first), (first, second)


def choose(
    distance: mx.array,
    first_confidence: mx.array,
    has_gold: mx.array,
    *,
    js_threshold: float = 0.1,
    confidence_threshold: float = 0.8,
) -> mx.array:
    """What teaches each token `[...]`; see `Strategy`.

    Where the teachers disagree by less than the threshold, both; else the first alone, where its
    confidence is above its threshold; else the text's own token; without one, nothing.

    Args:
        distance: Disagreement of the teachers, between 0 and 1.
        first_confidence: Of the first teacher, at temperature 1.
        has_gold: Whether there is a token of the text that may be taught.
        js_threshold: Between 0 and 1.
        confidence_threshold: Between 0 and 1.

    Returns:
        int32 `[...]`.
    """
    for name, value in (
        ("js_threshold", js_threshold),
        ("confidence_threshold", confidence_threshold),
    ):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value:g}; it lies between 0 and 1")
    alone = mx.where(has_gold, Strategy.GOLD_FALLBACK.value, Strategy.SKIP.value)
    alone = mx.where(first_confidence > confidence_threshold, Strategy.T1_ONLY.value, alone)
    return mx.where(distance < js_threshold, Strategy.BLENDED.value, alone).astype(mx.int32)


def smart_target_selection(
    logits_t1: mx.array,
    logits_t2: mx.array,
    gold_labels: mx.array | None = None,
    *,
    temperature: float = 2.0,
    js_threshold: float = 0.1,
    confidence_threshold: float = 0.8,
    gold_weight: float = 0.5,
    method: str = "top1",
) -> tuple[mx.array, mx.array, mx.array]:
    """Choose per token what it is taught by, and make that its target.

    Agreement and confidence are taken at temperature 1, so that thresholds mean the same
    whatever softens the targets.

    Args:
        logits_t1: The first teacher's (the parent's) `[..., V]`.
        logits_t2: The second's (the grandparent's), over the same tokens.
        gold_labels: Tokens of the text `[...]`; a negative one is none.
        temperature: Of the targets.
        js_threshold: Disagreement below which both teach, between 0 and 1.
        confidence_threshold: Confidence above which the first teaches alone, between 0 and 1.
        gold_weight: Weight of a token that the text alone teaches.
        method: Measure of confidence, "top1" or "entropy".

    Returns:
        Log-probabilities of the target `[..., V]`, float32; its weight `[...]`, 1 for a teacher's,
        `gold_weight` for the text's, 0 for a skipped one (whose target is the blend); and the
        strategy int32 `[...]`.
    """
    blended, _ = blend_teacher_predictions(logits_t1, logits_t2, temperature, method=method)
    first, second = log_softmax(logits_t1), log_softmax(logits_t2)
    sure = confidence(first, method)
    gold = mx.full(sure.shape, -1) if gold_labels is None else mx.array(gold_labels)
    strategy = choose(
        disagreement(first, second),
        sure,
        gold >= 0,
        js_threshold=js_threshold,
        confidence_threshold=confidence_threshold,
    )
    alone = log_softmax(logits_t1, temperature)
    target = mx.where((strategy == Strategy.T1_ONLY)[..., None], alone, blended)
    tokens = mx.arange(logits_t1.shape[-1])
    one_hot = mx.where(tokens == gold[..., None], 0.0, -mx.inf)
    target = mx.where((strategy == Strategy.GOLD_FALLBACK)[..., None], one_hot, target)
    return target, weights_of(strategy, gold_weight), strategy


def weights_of(strategy: mx.array, gold_weight: float = 0.5) -> mx.array:
    """The weight of each token's target: 1, `gold_weight` where the text teaches, 0 if skipped."""
    weight = mx.where(strategy == Strategy.GOLD_FALLBACK, gold_weight, 1.0)
    return mx.where(strategy == Strategy.SKIP, 0.0, weight)


def disagreement_regularizer(
    logits_t1: mx.array, logits_t2: mx.array, student_logits: mx.array, temperature: float = 1.0
) -> mx.array:
    """`(1 - JS(p₁, p₂)) KL(p₁‖q)`: stay with the first teacher where the second agrees with it.

    Args:
        logits_t1: The first teacher's `[..., V]`.
        logits_t2: The second's.
        student_logits: q's; differentiable.
        temperature: Of all three.

    Returns:
        Nats `[...]`, at least 0; 0 where the student equals the first teacher and where the
        teachers are disjoint.
    """
    _same_shape(logits_t1, logits_t2, student_logits)
    first, second, student = (
        log_softmax(logits, temperature) for logits in (logits_t1, logits_t2, student_logits)
    )
    return (1 - disagreement(first, second)) * forward_kl(first, student)


def common_outcomes(
    first: Outcomes, second: Outcomes, nothing: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bring two teachers' K + 1 outcomes to the tokens that both kept and one rest.

    What only one kept goes to its rest. Merging outcomes never adds disagreement: JS over them is
    at most that over all tokens.

    Args:
        first: `[n, K]` and `[n, K + 1]`, the rest last.
        second: `[n, K']` and `[n, K' + 1]`.
        nothing: The number of tokens, which stands for no token.

    Returns:
        Ids `[n, K]`, those of the first that both kept and `nothing` elsewhere, and the
        log-probabilities `[n, K + 1]` of both, -inf where there is no token.
    """
    ids, log_probs = first
    _, other = second
    both, theirs, unused = _matches(first, second, nothing)
    kept = np.where(both, log_probs[:, :-1], -np.inf)
    return (
        np.where(both, ids, nothing),
        _with_rest(kept, np.where(both, -np.inf, log_probs[:, :-1]), log_probs[:, -1]),
        # What the second gives no common token, summed itself: 1 - Σ would lose small rests.
        _with_rest(theirs, np.where(unused, other[:, :-1], -np.inf), other[:, -1]),
    )


def _with_rest(kept: np.ndarray, lost: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """Log-probabilities of kept tokens and of a rest to which the lost ones go."""
    whole = np.logaddexp(rest, np.logaddexp.reduce(lost, axis=1, initial=-np.inf))
    return np.concatenate([kept, whole[:, None]], axis=1)


def _matches(
    first: Outcomes, second: Outcomes, nothing: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which tokens two teachers both kept.

    Returns:
        Whether the second kept each token of the first `[n, K]`, its log-probability of that token
        (-inf where not), and which tokens of the second the first did not keep `[n, K']`.
    """
    (ids, _), (other_ids, other) = first, second
    row = np.arange(len(ids))[:, None] * (nothing + 1)
    keys = (row + np.minimum(other_ids, nothing)).ravel()
    order = np.argsort(keys, kind="stable")
    own_keys = row + np.minimum(ids, nothing)
    at = order[np.searchsorted(keys[order], own_keys).clip(max=max(0, len(keys) - 1))]
    both = (keys[at] == own_keys) & (ids < nothing)
    unused = np.ones(other_ids.size, bool)
    unused[at[both]] = False
    theirs = np.where(both, other[:, :-1].ravel()[at], -np.inf)
    return both, theirs, unused.reshape(other_ids.shape)


def all_outcomes(first: Outcomes, second: Outcomes, nothing: int) -> tuple[np.ndarray, np.ndarray]:
    """Bring two teachers' K + 1 outcomes to the tokens that either kept and one rest.

    Of a token that a teacher did not keep it is taken to say what its rest says of each of its
    tokens on average, which is never more than the least it kept. Over the common tokens alone two
    teachers that keep different ones would seem to agree: nearly all would be rest on both sides.

    Args:
        first: `[n, K]` and `[n, K + 1]`, the rest last.
        second: `[n, K']` and `[n, K' + 1]`.
        nothing: The number of tokens, which stands for no token.

    Returns:
        The log-probabilities `[n, K + K' + 1]` of both, -inf where there is no token.
    """
    (ids, log_probs), (other_ids, other) = first, second
    both, theirs, unused = _matches(first, second, nothing)
    only_first = (ids < nothing) & ~both
    only_second = (other_ids < nothing) & unused
    each, rest = _share_of_rest(log_probs[:, -1], ids < nothing, only_second, nothing)
    other_each, other_rest = _share_of_rest(other[:, -1], other_ids < nothing, only_first, nothing)
    one = (log_probs[:, :-1], np.where(only_second, each, -np.inf), rest)
    two = (
        np.where(only_first, other_each, theirs),
        np.where(only_second, other[:, :-1], -np.inf),
        other_rest,
    )
    return np.concatenate(one, axis=1), np.concatenate(two, axis=1)


def _share_of_rest(
    rest: np.ndarray, kept: np.ndarray, asked: np.ndarray, nothing: int
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability of each token in a rest, and of what is left without those asked for.

    Returns:
        Both `[n, 1]`.
    """
    tokens = np.maximum(1, nothing - kept.sum(axis=1))
    with np.errstate(divide="ignore"):
        each = rest - np.log(tokens)
        left = rest + np.log(1 - asked.sum(axis=1) / tokens)
    return each[:, None], left[:, None]


def _same_shape(*logits: mx.array) -> None:
    shapes = [tuple(x.shape) for x in logits]
    if len(set(shapes)) > 1:
        raise ValueError(
            f"the distributions have shapes {' and '.join(map(str, shapes))}; teachers with other "
            "tokens are laid over the student's first"
        )
