"""Loss from hidden states, chunk by chunk, without the logits of a whole batch.

Knows a model's body and head and the kept targets of a batch; nothing of files or data order.
A divergence added to `losses.LOSSES` works here at once; only forward KL has a closed form.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from conch_dna.language_model import LanguageModel
from conch_dna.loading.output_head import LOGIT_ARRAYS, rows_at_once
from conch_dna.losses import (
    LOSSES,
    Rest,
    forward_kl,
    kept_and_rest,
    log_softmax,
    log_sum_exp,
    token_cross_entropy,
)
from conch_dna.training.settings import LOSS_MEMORY

Sums = dict[str, mx.array]
LogitLoss = Callable[[mx.array, Sums], tuple[Sums, mx.array]]


def at_positions(values: mx.array, arrays: Sums) -> mx.array:
    """Of a model's output `[B, T, …]` that of the counted positions `[N, …]`."""
    return values.reshape(-1, values.shape[-1])[arrays["positions"]]


def cross_entropy_sums(model: nn.Module, arrays: Sums) -> Sums:
    """Cross-entropy of a batch over full logits, for models whose head is being trained.

    Args:
        model: Maps ids `[B, T]` to logits `[B, T, V]`.
        arrays: Of a batch: `inputs`, and `positions`, `labels` and `weights` of its counted
            tokens.

    Returns:
        `loss`: summed nats over the counted tokens, a scalar.
    """
    logits = at_positions(model(arrays["inputs"]), arrays)
    losses = token_cross_entropy(logits, arrays["labels"])
    return {"loss": (losses * arrays["weights"]).sum()}


def distillation_sums(
    logits: mx.array,
    targets: Sums,
    *,
    temperature: float,
    alpha: float,
    divergence: str,
    hard: float | None = None,
) -> Sums:
    """`alpha t² D + (1 - alpha) CE`, summed over tokens, from logits; differentiable.

    Args:
        logits: Student's `[N, V]` over the real tokens.
        targets: `kept_ids` `[N, K]`, `teacher_log_probs` `[N, K + 1]` at the temperature,
            `labels` `[N]` and `weights` `[N]`; where tokens are not taught alike, `kd_weights`
            and `ce_weights` `[N]` instead of the weights.
        temperature: t.
        alpha: Share of the divergence.
        divergence: A key of LOSSES.
        hard: Share of the cross-entropy where it is not `1 - alpha`.

    Returns:
        `loss`, `kd` (with its t²) and `ce`: sums in nats, scalars.
    """
    student = kept_and_rest(logits, targets["kept_ids"], temperature)
    divergences = LOSSES[divergence](targets["teacher_log_probs"], student)
    kd_weights, ce_weights, hard_share = _shares(targets, alpha, hard)
    kd = temperature**2 * (divergences * kd_weights).sum()
    ce = (token_cross_entropy(logits, targets["labels"]) * ce_weights).sum()
    return {"loss": alpha * kd + hard_share * ce, "kd": kd, "ce": ce}


def _shares(targets: Sums, alpha: float, hard: float | None) -> tuple[mx.array, mx.array, float]:
    """Weights `[N]` of each token's divergence and cross-entropy, and the latter's share."""
    weights = targets["weights"]
    kd_weights, ce_weights = (targets.get(name, weights) for name in ("kd_weights", "ce_weights"))
    return kd_weights, ce_weights, 1 - alpha if hard is None else hard


def forward_kl_and_gradient(
    logits: mx.array,
    targets: Sums,
    *,
    temperature: float,
    alpha: float,
    hard: float | None = None,
) -> tuple[Sums, mx.array]:
    """`distillation_sums` for forward KL with the gradient by logits in closed form.

    With q over K + 1 outcomes and s_v a token's share of the rest, the gradient of t² KL is
    t (q_v - p_v) at a kept token and t s_v (q_rest - p_rest) at any other. One exponential over
    the vocabulary serves both temperatures, loss and gradient.

    Returns:
        The sums, and the gradient of `loss` by the logits `[N, V]`, float32.
    """
    logits = logits.astype(mx.float32)
    kept_ids, labels = targets["kept_ids"], targets["labels"][:, None]
    kd_weights, ce_weights, hard_share = _shares(targets, alpha, hard)
    rest = Rest(logits, kept_ids, (1.0, temperature))
    kept = mx.take_along_axis(logits, kept_ids, axis=-1)
    outcomes = mx.concatenate([kept / temperature, rest.log_sum(temperature)], axis=-1)
    student = outcomes - log_sum_exp(outcomes)
    teacher = targets["teacher_log_probs"]
    kd = temperature**2 * (forward_kl(teacher, student) * kd_weights).sum()

    full = log_sum_exp(mx.concatenate([kept, rest.log_sum(1.0)], axis=-1))
    gold = mx.take_along_axis(logits, labels, axis=-1)
    ce = ((full - gold).squeeze(-1) * ce_weights).sum()

    soft = kd_weights[:, None] * (alpha * temperature)
    gold_scale = ce_weights[:, None] * hard_share
    excess = soft * (mx.exp(student) - mx.exp(teacher))
    gradient = rest.shares(temperature, excess[:, -1:])
    gradient += rest.shares(1.0, gold_scale * mx.exp(rest.log_sum(1.0) - full))
    kept_gradient = excess[:, :-1] + gold_scale * mx.exp(kept - full)
    gradient = mx.put_along_axis(gradient, kept_ids, kept_gradient, axis=-1)
    gold_gradient = mx.take_along_axis(gradient, labels, axis=-1) - gold_scale
    gradient = mx.put_along_axis(gradient, labels, gold_gradient, axis=-1)
    return {"loss": alpha * kd + hard_share * ce, "kd": kd, "ce": ce}, gradient


def autodiff(sums_of: Callable[[mx.array, Sums], Sums]) -> LogitLoss:
    """A loss that is differentiated by MLX, as `chunked_loss` wants it.

    Args:
        sums_of: Logits and targets to sums, of which `loss` is differentiated.
    """

    def loss_and_gradient(logits: mx.array, targets: Sums) -> tuple[Sums, mx.array]:
        def total(x: mx.array) -> tuple[mx.array, Sums]:
            sums = sums_of(x, targets)
            return sums["loss"], sums

        (_, sums), gradient = mx.value_and_grad(total)(logits.astype(mx.float32))
        return sums, gradient

    return loss_and_gradient


def gold_log_probs(logits: mx.array, labels: mx.array) -> mx.array:
    """Log-probability of each row's own next token: logits `[n, V]` to float32 nats `[n]`."""
    return -token_cross_entropy(logits, labels)


def gold_and_gradient(logits: mx.array, targets: Sums) -> tuple[mx.array, mx.array]:
    """Log-probability of each row's own next token, and its gradient by the row's logits.

    Returns:
        Nats `[n]`, and `[n, V]`: 1 at the token less the softmax. float32.
    """
    labels = targets["labels"]
    gradient = -mx.exp(log_softmax(logits))
    own = mx.take_along_axis(gradient, labels[:, None], axis=-1) + 1
    gradient = mx.put_along_axis(gradient, labels[:, None], own, axis=-1)
    return gold_log_probs(logits, labels), gradient


def with_nothing(logits: mx.array, size: int) -> mx.array:
    """Logits with columns of probability 0 behind them, up to and with number `size`.

    A kept token that the student does not have points at the last of them.
    """
    missing = size + 1 - logits.shape[-1]
    return mx.concatenate([logits, mx.full((*logits.shape[:-1], missing), -mx.inf)], axis=-1)


def chunk_log_probs(gold: mx.array, arrays: Sums) -> mx.array:
    """The student's log-probability of every chunk `[C]`, the sum over its tokens."""
    count = arrays["chunk_weights"].shape[0]
    return mx.zeros(count + 1).at[arrays["chunk_index"]].add(gold)[:count]


class ChunkedLoss(NamedTuple):
    """What `chunked_loss` comes to.

    Attributes:
        sums: The sums of all chunks; of them only `loss` carries a gradient.
        gold: Log-probability of each row's own token `[N]`, differentiable; empty if not wanted.
    """

    sums: Sums
    gold: mx.array


def chunked_loss(
    head: Callable[[mx.array], mx.array],
    hidden: mx.array,
    targets: Sums,
    loss_and_gradient: LogitLoss | None,
    chunk: int,
    *,
    after: Callable[[mx.array], mx.array] | None = None,
    with_gold: bool = False,
    before: int = 0,
    backward: bool = True,
) -> ChunkedLoss:
    """A loss over logits, summed over tokens, whose gradient flows to the hidden states only.

    Logits are the largest arrays of a step: of 1,024 tokens and a vocabulary of 151,936 they take
    622 MB, and a dense loss holds several arrays of that size until the backward pass. Here each
    chunk's logits exist once. Its loss and the gradient of its loss by the logits are computed in
    the forward pass; the gradient goes through the head to the hidden states, which are some
    hundred times smaller, and the logits are dropped before the next chunk begins. The backward
    pass only scales these stored gradients, so the head is never computed a second time.

    That is right because the loss is a sum over tokens: its gradient by a token's hidden state
    needs no other token, and an outer factor (a mean, the optimiser's scale) multiplies it as a
    whole. A figure that is put together from tokens of several chunks has no such factor in
    common. For it `with_gold` gives a log-probability and its own gradient for each token, and
    the backward pass weighs these token by token.

    Args:
        head: Hidden states `[n, D]` to logits `[n, V]`; its parameters get no gradient.
        hidden: `[N, D]`; differentiable.
        targets: Arrays `[N, …]`; with `with_gold` the `labels` among them.
        loss_and_gradient: Logits and targets of a chunk to sums and the gradient of `loss`; None
            for no sums.
        chunk: Tokens per chunk; 0 takes all at once.
        after: What the model does to the logits, such as a soft-cap.
        with_gold: Give the log-probability of each row's own token too.
        before: Rows before a chunk's own whose logits `loss_and_gradient` gets as well (fewer at
            the beginning); its gradient is by these too, its targets are those of its own.
        backward: Whether a gradient will be asked for. Held-out evaluation asks for none, and
            then no gradient goes through the head; the sums are the same to the bit.
    """
    size = chunk or hidden.shape[0]
    pulled_back = partial(_pulled_back, head, after)

    def evaluate(states: mx.array) -> dict[str, Any]:
        sums: Sums = {}
        parts: dict[str, list[mx.array]] = {"gradient": [], "gold": [], "gold_gradient": []}
        for start in range(0, states.shape[0], size):
            shared = min(before, start)
            part = states[start - shared : start + size]
            if start:
                # Without this order the graph may hold the logits of several chunks at a time,
                # for their gradient or for their sums.
                last = [array for arrays in parts.values() for array in arrays[-1:]]
                part = mx.depends([part], [*last, *sums.values()])[0]
            raw = head(part)
            logits = raw if after is None else after(raw)
            own = {name: value[start : start + size] for name, value in targets.items()}
            if loss_and_gradient is not None:
                chunk_sums, by_logits = loss_and_gradient(logits, own)
                if backward:
                    by_states = pulled_back(part, raw, by_logits)
                    if shared:
                        last_rows = parts["gradient"][-1][-shared:] + by_states[:shared]
                        parts["gradient"][-1] = mx.concatenate(
                            [parts["gradient"][-1][:-shared], last_rows]
                        )
                    parts["gradient"].append(by_states[shared:])
                sums = {name: sums.get(name, 0.0) + value for name, value in chunk_sums.items()}
            if with_gold:
                gold, by_logits = gold_and_gradient(logits[shared:], own)
                parts["gold"].append(gold)
                if backward:
                    by_states = pulled_back(part[shared:], raw[shared:], by_logits)
                    parts["gold_gradient"].append(by_states)
        joined = {name: mx.concatenate(arrays) for name, arrays in parts.items() if arrays}
        return {"sums": sums, **joined}

    def pull_back(states: mx.array, cotangents: Any, outputs: Any) -> mx.array:
        gradient = mx.zeros_like(states)
        if loss_and_gradient is not None:
            gradient += cotangents["sums"]["loss"].astype(states.dtype) * outputs["gradient"]
        if with_gold:
            by_gold = cotangents["gold"].astype(states.dtype)
            gradient += by_gold[:, None] * outputs["gold_gradient"]
        return gradient

    compute: Any = evaluate
    if backward:
        compute = mx.custom_function(evaluate)
        compute.vjp(pull_back)
    outputs = compute(hidden)
    return ChunkedLoss(outputs["sums"], outputs.get("gold", mx.zeros(0)))


def _pulled_back(
    head: Callable[[mx.array], mx.array],
    after: Callable[[mx.array], mx.array] | None,
    states: mx.array,
    raw: mx.array,
    by_logits: mx.array,
) -> mx.array:
    """A gradient by logits `[n, V]` as one by the hidden states `[n, D]` behind them.

    `raw` is what the head made of these states.
    """
    by_logits = by_logits.astype(raw.dtype)
    if after is not None:
        by_logits = mx.vjp(after, [raw], [by_logits])[1][0]
    return mx.vjp(head, [states], [by_logits])[1][0]


def make_distillation_loss(
    student: LanguageModel,
    *,
    temperature: float,
    alpha: float,
    divergence: str = "forward_kl",
    memory: float = LOSS_MEMORY,
) -> Callable[[nn.Module, Sums], Sums]:
    """The loss of a student whose head is frozen, for the trainer.

    Models whose head is trained, or is none that can be taken apart from the body, take the dense
    path: logits of the counted positions all at once, differentiated by MLX.

    Args:
        student: Loaded model, adapter attached.
        temperature: t of the soft part.
        alpha: Share of the soft part.
        divergence: A key of LOSSES.
        memory: Megabytes for logits and what is made of them.

    Returns:
        `loss(model, arrays)` as `trainer.Loss` wants it, with sums `loss`, `kd` and `ce`.
    """
    names = ("kept_ids", "teacher_log_probs", "labels", "weights")
    sums_of = partial(
        distillation_sums, temperature=temperature, alpha=alpha, divergence=divergence
    )
    closed = partial(forward_kl_and_gradient, temperature=temperature, alpha=alpha)
    rule: LogitLoss = closed if divergence == "forward_kl" else autodiff(sums_of)
    return make_logit_loss(
        student, names, sums_of, rule, memory=memory, optional=("kd_weights", "ce_weights")
    )


def make_cross_entropy_loss(
    student: LanguageModel, *, memory: float = LOSS_MEMORY
) -> Callable[[nn.Module, Sums], Sums]:
    """Cross-entropy alone, for batches that carry nothing of a teacher.

    Args:
        student: Loaded model, adapter attached.
        memory: Megabytes for logits and what is made of them.

    Returns:
        `loss(model, arrays)` as `trainer.Loss` wants it, with the equal sums `loss` and `ce`.
    """

    def sums_of(logits: mx.array, targets: Sums) -> Sums:
        ce = (token_cross_entropy(logits, targets["labels"]) * targets["weights"]).sum()
        return {"loss": ce, "ce": ce}

    return make_logit_loss(
        student, ("labels", "weights"), sums_of, autodiff(sums_of), memory=memory
    )


def make_logit_loss(
    student: LanguageModel,
    names: Sequence[str],
    sums_of: Callable[[mx.array, Sums], Sums],
    rule: LogitLoss,
    *,
    memory: float,
    optional: Sequence[str] = (),
) -> Callable[[nn.Module, Sums], Sums]:
    """A loss of logits as the trainer wants it, in chunks where the student's head allows it.

    Args:
        student: Loaded model, adapter attached.
        names: The arrays of a batch with a row for each counted token that the loss needs.
        sums_of: Logits `[N, V]` and these arrays to sums.
        rule: The same with the gradient of `loss` by the logits.
        memory: Megabytes for logits and what is made of them.
        optional: More such arrays, of which a batch may lack some.
    """

    def of_rows(arrays: Sums) -> Sums:
        there = (name for name in optional if name in arrays)
        return {name: arrays[name] for name in (*names, *there)}

    def chunked(model: nn.Module, arrays: Sums) -> Sums:
        hidden = at_positions(student.body(arrays["inputs"]), arrays)
        targets = of_rows(arrays)
        head, chunk, after = head_parts(student, memory)
        backward = model.training
        return chunked_loss(head, hidden, targets, rule, chunk, after=after, backward=backward).sums

    def dense(model: nn.Module, arrays: Sums) -> Sums:
        logits = at_positions(student.logits(arrays["inputs"]), arrays)
        return sums_of(logits, of_rows(arrays))

    return chunked if takes_chunks(student) else dense


def head_parts(
    student: LanguageModel, memory: float, arrays: int = LOGIT_ARRAYS
) -> tuple[Callable[[mx.array], mx.array], int, Callable[[mx.array], mx.array] | None]:
    """What `chunked_loss` takes of a model: `head`, `chunk` and `after`.

    Args:
        student: Whose head can be taken apart.
        memory: Megabytes into which a chunk and what is made of it are to fit.
        arrays: Of the vocabulary's width, that a chunk takes; see `rows_at_once`.
    """
    head = student.output_head
    assert head is not None
    rows = rows_at_once(memory, student.vocabulary_size, arrays)
    linear = partial(head.linear, rows=student.vocabulary_size)
    return linear, rows, None if head.is_last else head.after


def takes_chunks(student: LanguageModel) -> bool:
    """Whether a student's head can be taken apart from its body and is frozen."""
    head = student.output_head
    return head is not None and not head.module.trainable_parameters()
