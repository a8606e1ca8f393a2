"""Two teachers into one target: confidence, disagreement, and what a token is taught by.

Knows distributions, as arrays; nothing of models, tokens' text or files. Works alike on dense
distributions and on K + 1 outcomes, whose last stands for the tokens that were not kept.
To add a measure of confidence: a branch in `confidence` and its name in CONFIDENCES.
"""

from enum import IntEnum

import mlx.core as mx
import numpy as np

from conch_dna.losses import (
    forward_kl,
    generalised_jsd,
    log_softmax,
    log_sum_exp,
    sum_last,
    token_cross_entropy,
)

CONFIDENCES = ("top1", "entropy")
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
    """See `confidence`, for probabilities `[..., V]`.

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
        second_log_probs: log q, likewise, of the same outcomes.

    Returns:
        `[...]` between 0, identical, and 1, disjoint.

    Source: Lin (1991), "Divergence measures based on the Shannon entropy", in bits.
    """
    distance = generalised_jsd(first_log_probs, second_log_probs, beta=0.5) / LN_2
    return mx.clip(distance, 0.0, 1.0)


def jensen_shannon_divergence(p: mx.array, q: mx.array) -> mx.array:
    """See `disagreement`, for probabilities `[..., V]`.

    >>> jensen_shannon_divergence(mx.array([1.0, 0.0]), mx.array([0.0, 1.0])).item()
    1.0
    """
    return disagreement(_logs(p), _logs(q))


def blend(
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
        method: See `confidence`.

    Returns:
        Log-probabilities of the blend `[..., V]`, float32, and the weights `[...]` of both.
    """
    _same_shape(logits_t1, logits_t2)
    plain = [log_softmax(logits) for logits in (logits_t1, logits_t2)]
    first, second = shares(*(confidence(log_probs, method) for log_probs in plain))
    soft = [log_softmax(logits, temperature) for logits in (logits_t1, logits_t2)]
    return blend(soft[0], soft[1], first), (first, second)


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
        distance: See `disagreement`.
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
        js_threshold: See `choose`.
        confidence_threshold: See `choose`.
        gold_weight: Weight of a token that the text alone teaches.
        method: See `confidence`.

    Returns:
        Log-probabilities of the target `[..., V]`, float32; its weight `[...]`, 1 for a teacher's,
        `gold_weight` for the text's, 0 for a skipped one (whose target is the blend); and the
        strategy int32 `[...]`.
    """
    _same_shape(logits_t1, logits_t2)
    plain = [log_softmax(logits) for logits in (logits_t1, logits_t2)]
    sure = [confidence(log_probs, method) for log_probs in plain]
    gold = mx.full(sure[0].shape, -1) if gold_labels is None else mx.array(gold_labels)
    strategy = choose(
        disagreement(plain[0], plain[1]),
        sure[0],
        gold >= 0,
        js_threshold=js_threshold,
        confidence_threshold=confidence_threshold,
    )
    soft = [log_softmax(logits, temperature) for logits in (logits_t1, logits_t2)]
    target = blend(soft[0], soft[1], shares(*sure)[0])
    target = mx.where((strategy == Strategy.T1_ONLY)[..., None], soft[0], target)
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


def two_teacher_loss(
    student_logits: mx.array,
    target: mx.array,
    weight: mx.array,
    strategy: mx.array,
    labels: mx.array,
    *,
    regularizer: mx.array | None = None,
    alpha: float = 0.1,
    beta: float = 0.9,
    gamma: float = 0.0,
    temperature: float = 2.0,
) -> mx.array:
    """`alpha CE + beta t² KL(p̄‖q) + gamma R` of every token, times its weight.

    A token of the text has no temperature: its one-hot target is compared with the student at
    temperature 1 and without t², so that `KL` is its cross-entropy.

    Args:
        student_logits: `[..., V]`; differentiable.
        target: Log-probabilities p̄ `[..., V]`, see `smart_target_selection`.
        weight: `[...]`; 0 leaves a token out of all three parts.
        strategy: `[...]`, see `Strategy`.
        labels: Tokens of the text `[...]`; a negative one has no cross-entropy.
        regularizer: R `[...]`, see `disagreement_regularizer`.
        alpha: Share of cross-entropy.
        beta: Share of the target.
        gamma: Share of the regularizer.
        temperature: t of the target.

    Returns:
        Nats `[...]`, float32.
    """
    has_gold = labels >= 0
    own = mx.where(has_gold, labels, 0)
    ce = mx.where(has_gold, token_cross_entropy(student_logits, own), 0.0)
    soft = forward_kl(target, log_softmax(student_logits, temperature)) * temperature**2
    hard = forward_kl(target, log_softmax(student_logits))
    loss = alpha * ce + beta * mx.where(strategy == Strategy.GOLD_FALLBACK, hard, soft)
    if regularizer is not None:
        loss = loss + gamma * regularizer
    # A skipped token may have a target of no use; times 0 it must not be NaN.
    return mx.where(weight > 0, loss, 0.0) * weight


def exclude(log_probs: mx.array, excluded: mx.array) -> tuple[mx.array, mx.array]:
    """Take outcomes out of a distribution and scale the others up.

    Args:
        log_probs: log p `[..., V]`, float32.
        excluded: bool, `[..., V]` or `[V]`.

    Returns:
        Log-probabilities `[..., V]`, and whether anything was left `[...]`: where not, the
        distribution is all -inf and its token must be skipped.
    """
    left = mx.where(excluded, -mx.inf, log_probs)
    total = log_sum_exp(left)
    some = total > -mx.inf
    return mx.where(some, left - mx.where(some, total, 0.0), -mx.inf), some.squeeze(-1)


def common_outcomes(
    first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray], nothing: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bring two teachers' K + 1 outcomes to the tokens that both kept and one rest.

    What only one kept goes to its rest. Merging outcomes never adds disagreement: JS over them is
    at most that over all tokens.

    Args:
        first: Ids `[n, K]` (`nothing` or more for none) and log-probabilities `[n, K + 1]`, the
            rest last.
        second: Likewise, `[n, K']`.
        nothing: The number of tokens, which stands for no token.

    Returns:
        Ids `[n, K]`, those of the first that both kept and `nothing` elsewhere, and the
        log-probabilities `[n, K + 1]` of both, -inf where there is no token.
    """
    ids, log_probs = first
    other_ids, other = second
    both, at = _matches(ids, other_ids, nothing)
    kept = np.where(both, log_probs[:, :-1], -np.inf)
    lost = np.where(both, -np.inf, log_probs[:, :-1])
    rest = np.logaddexp(log_probs[:, -1], np.logaddexp.reduce(lost, axis=1, initial=-np.inf))
    found = np.where(both, other[:, :-1].ravel()[at], -np.inf)
    # What the second gives no common token, summed itself: 1 - Σ would lose small rests.
    used = np.zeros(other_ids.size, bool)
    used[at[both]] = True
    unused = np.where(used.reshape(other_ids.shape), -np.inf, other[:, :-1])
    other_rest = np.logaddexp(other[:, -1], np.logaddexp.reduce(unused, axis=1, initial=-np.inf))
    return (
        np.where(both, ids, nothing),
        np.concatenate([kept, rest[:, None]], axis=1),
        np.concatenate([found, other_rest[:, None]], axis=1),
    )


def _matches(ids: np.ndarray, other_ids: np.ndarray, nothing: int) -> tuple[np.ndarray, np.ndarray]:
    """Whether each token of one teacher was kept by the other `[n, K]`, and where, flattened."""
    width = nothing + 1
    row = np.arange(len(ids))[:, None] * width
    keys = (row + np.minimum(other_ids, nothing)).ravel()
    order = np.argsort(keys, kind="stable")
    wanted = row + np.minimum(ids, nothing)
    at = order[np.searchsorted(keys[order], wanted).clip(max=max(0, len(keys) - 1))]
    return (keys[at] == wanted) & (ids < nothing), at


def all_outcomes(
    first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray], nothing: int
) -> tuple[np.ndarray, np.ndarray]:
    """Bring two teachers' K + 1 outcomes to the tokens that either kept and one rest.

    Of a token that a teacher did not keep it is taken to say what its rest says of each of its
    tokens on average, which is never more than the least it kept. Over the common tokens alone two
    teachers that keep different ones would seem to agree: nearly all would be rest on both sides.

    Args:
        first: As for `common_outcomes`.
        second: Likewise.
        nothing: The number of tokens.

    Returns:
        The log-probabilities `[n, K + K' + 1]` of both, -inf where there is no token.
    """
    ids, log_probs = first
    other_ids, other = second
    both, at = _matches(ids, other_ids, nothing)
    used = np.zeros(other_ids.size, bool)
    used[at[both]] = True
    only_first = (ids < nothing) & ~both
    only_second = (other_ids < nothing) & ~used.reshape(other_ids.shape)
    each, rest = _share_of_rest(log_probs[:, -1], ids < nothing, only_second, nothing)
    other_each, other_rest = _share_of_rest(other[:, -1], other_ids < nothing, only_first, nothing)
    found = np.where(both, other[:, :-1].ravel()[at], -np.inf)
    one = (
        log_probs[:, :-1],
        np.where(only_second, each[:, None], -np.inf),
        rest[:, None],
    )
    two = (
        np.where(only_first, other_each[:, None], found),
        np.where(only_second, other[:, :-1], -np.inf),
        other_rest[:, None],
    )
    return np.concatenate(one, axis=1), np.concatenate(two, axis=1)


def _share_of_rest(
    rest: np.ndarray, kept: np.ndarray, asked: np.ndarray, nothing: int
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability of each token in a rest, and of what is left without those asked for."""
    tokens = nothing - kept.sum(axis=1)
    with np.errstate(divide="ignore"):
        each = rest - np.log(np.maximum(1, tokens))
        left = rest + np.log(1 - asked.sum(axis=1) / np.maximum(1, tokens))
    return each, left


def _same_shape(*logits: mx.array) -> None:
    shapes = [tuple(x.shape) for x in logits]
    if len(set(shapes)) > 1:
        raise ValueError(
            f"the distributions have shapes {' and '.join(map(str, shapes))}; teachers with other "
            "tokens are laid over the student's first (training.aligned_targets)"
        )
