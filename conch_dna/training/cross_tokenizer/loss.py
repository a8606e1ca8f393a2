"""The loss of a student whose teacher has another tokenizer.

Knows a model's body and head and a batch of `aligned_targets`; nothing of texts or tokenizers.
To add an alignment whose distributions are compared otherwise: a branch in `soft_sum`.
"""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from conch_dna.language_model import LanguageModel
from conch_dna.losses import (
    LOSSES,
    kept_and_rest,
    likelihood_kl,
    log_softmax,
    log_sum_exp,
    sorted_distance,
    token_cross_entropy,
)
from conch_dna.training.head_loss import (
    Sums,
    chunk_log_probs,
    chunked_loss,
    forward_kl_and_gradient,
    gold_log_probs,
    takes_chunks,
    with_nothing,
)

ROWS = (
    "kept_ids",
    "teacher_log_probs",
    "soft_weights",
    "inner_tokens",
    "inner_outcomes",
    "inner_places",
    "inner_log_probs",
    "outcome_places",
    "inner_told",
    "inner_blank",
    "over_tokens",
    "over_columns",
    "over_own",
    "labels",
    "weights",
)


def gather_roots(logits: mx.array, roots: np.ndarray) -> mx.array:
    """Log-scores of classes of tokens: log-sum-exp over the tokens with the same root.

    Args:
        logits: `[n, V]`, float32, already over the temperature; differentiable.
        roots: `[V]`: each token's root, itself included, or -1 for a token of its own.

    Returns:
        `[n, V]`: a class's score in its root's column, -inf in the columns of its other members.
    """
    own = np.arange(logits.shape[-1])
    roots = roots[: logits.shape[-1]]
    members = np.flatnonzero((roots >= 0) & (roots != own))
    if not len(members):
        return logits
    largest = mx.stop_gradient(logits.max(axis=-1, keepdims=True))
    columns, targets = mx.array(members.astype(np.int32)), mx.array(roots[members].astype(np.int32))
    sums = mx.zeros(logits.shape).at[:, targets].add(mx.exp(logits[:, columns] - largest))
    # The inner where keeps the gradient finite where a class has no other members.
    others = mx.where(sums > 0, largest + mx.log(mx.where(sums > 0, sums, 1.0)), -mx.inf)
    member = np.zeros(len(own), bool)
    member[members] = True
    return mx.where(mx.array(member), -mx.inf, mx.logaddexp(logits, others))


def soft_sum(
    logits: mx.array,
    rows: Sums,
    *,
    alignment: str,
    temperature: float,
    divergence: str,
    nothing: int,
    roots: np.ndarray,
) -> mx.array:
    """`t² D`, summed over the rows whose distributions are compared; differentiable.

    For "roots" with `untold_sum`.

    Args:
        logits: Student's `[n, V]` over the real tokens, for "roots" of the row before as well
            where there is one: `[n + 1, V]`.
        rows: See `AlignedTargets.collate`.
        alignment: A key of ALIGNMENTS.
        temperature: t.
        divergence: A key of LOSSES.
        nothing: The id that stands for no token.
        roots: For "roots", see `vocabulary.common_roots`.
    """
    teacher = rows["teacher_log_probs"]
    if alignment == "roots":
        scaled = logits.astype(mx.float32) / temperature
        own = scaled[-len(teacher) :]
        classes = with_nothing(gather_roots(own, roots), nothing)
        student = kept_and_rest(classes, rows["kept_ids"])
        student = with_reaching(scaled, student, rows, nothing=nothing)
        between = LOSSES[divergence](teacher, student) * rows["soft_weights"]
        # Each divergence is a sum over outcomes, so that of all places of a row is one sum.
        inner = inner_log_probs(own, rows, nothing=nothing)
        inside = LOSSES[divergence](rows["inner_log_probs"], inner)
        return temperature**2 * (between + inside).sum() + untold_sum(
            logits[-len(teacher) :], rows, roots
        )
    if alignment == "uld":
        kept = teacher.shape[-1] - 1
        log_probs = log_softmax(logits, temperature)
        order = mx.stop_gradient(mx.argsort(-log_probs, axis=-1))[:, :kept]
        student = mx.take_along_axis(log_probs, order, axis=-1)
        missing = kept - student.shape[-1]
        if missing > 0:
            student = mx.concatenate([student, mx.full((len(student), missing), -mx.inf)], axis=-1)
        losses = sorted_distance(teacher[:, :-1], student)
    else:
        scaled = logits.astype(mx.float32) / temperature
        student = kept_and_rest(with_nothing(scaled, nothing), rows["kept_ids"])
        losses = LOSSES[divergence](teacher, student)
    return temperature**2 * (losses * rows["soft_weights"]).sum()


def with_reaching(logits: mx.array, student: mx.array, rows: Sums, *, nothing: int) -> mx.array:
    """What the student says comes next at a boundary that its tokens may also reach over.

    Behind `th` a student with a token `the` says little of an e: it would have said so a token
    earlier. So its distribution at the boundary counts as far as it had ended its token there,
    and beside it the longer tokens that begin with that one, each for what follows in it. Of all
    ways to cover a text (Phan et al. 2024, arXiv 2410.09303) these are the text's own tokens and
    one longer token behind them.

    Args:
        logits: `[n, V]` or, with the row before, `[n + 1, V]`, float32, already over the
            temperature; differentiable.
        student: Log-probabilities of the outcomes `[n, K + 1]`, as if no token reached over.
        rows: See `ClassTargets.reaching`.
        nothing: The id that stands for no token.

    Returns:
        Log-probabilities of the outcomes `[n, K + 1]`.
    """
    previous = logits[:-1] if len(logits) > len(student) else mx.concatenate([logits[:1], logits])
    previous = with_nothing(previous[: len(student)], nothing)
    ended = mx.take_along_axis(previous, rows["over_own"][:, None], axis=-1)
    over = mx.take_along_axis(previous, rows["over_tokens"], axis=-1)
    # Where nothing reaches over, the token has surely ended.
    ended = mx.where(rows["over_own"][:, None] == nothing, 0.0, ended)
    total = log_sum_exp(mx.concatenate([over, ended], axis=-1))
    row = mx.arange(len(student))[:, None]
    reached = mx.zeros(student.shape).at[row, rows["over_columns"]].add(mx.exp(over - total))
    there = reached > 0
    # The inner where keeps the gradient finite where no token reaches over to an outcome.
    reached = mx.where(there, mx.log(mx.where(there, reached, 1.0)), -mx.inf)
    student = student + ended - total
    nowhere = (student == -mx.inf) & ~there
    both = mx.logaddexp(mx.where(nowhere, 0.0, student), reached)
    return mx.where(nowhere, -mx.inf, both)


def inner_log_probs(logits: mx.array, rows: Sums, *, nothing: int) -> mx.array:
    """The student's distributions inside its own tokens, by what its tokens begin with.

    Args:
        logits: `[n, V]`, float32, already over the temperature; differentiable.
        rows: See `ClassTargets.within`.
        nothing: The id that stands for no token.

    Returns:
        Log-probabilities `[n, S]` of the outcomes, each among those of its place.
    """
    tokens, outcomes, places = (
        rows[name] for name in ("inner_tokens", "inner_outcomes", "inner_places")
    )
    chosen = mx.take_along_axis(with_nothing(logits, nothing), tokens, axis=-1)
    row = mx.arange(tokens.shape[0])[:, None]
    last_place = rows["inner_blank"].shape[-1] + 1
    blank = mx.full((tokens.shape[0], last_place), -mx.inf)
    largest = mx.stop_gradient(blank.at[row, places].maximum(chosen))
    largest = mx.where(largest == -mx.inf, 0.0, largest)
    scores = mx.exp(chosen - mx.take_along_axis(largest, places, axis=-1))
    size = rows["inner_log_probs"].shape[-1] + 1
    sums = mx.zeros((tokens.shape[0], size)).at[row, outcomes].add(scores)[:, :-1]
    totals = mx.zeros((tokens.shape[0], last_place)).at[row, places].add(scores)
    totals = mx.take_along_axis(totals, rows["outcome_places"], axis=-1)
    # The inner where keeps the gradient finite where an outcome has no token.
    there = sums > 0
    logs = mx.log(mx.where(there, sums, 1.0)) - mx.log(mx.where(there, totals, 1.0))
    return mx.where(there, logs, -mx.inf)


def untold_sum(logits: mx.array, rows: Sums, roots: np.ndarray) -> mx.array:
    """Cross-entropy of what classes leave open, summed: only the text can teach that.

    Where the teacher tells the class, it is that of the text's token within its class, 0 for a
    class of one token and where the teacher tells what is inside; where it tells nothing, that of
    the token.
    """
    logits = logits.astype(mx.float32)
    own = np.arange(logits.shape[-1])
    known = roots[: len(own)]
    columns = mx.array(np.where(known >= 0, known, own).astype(np.int32))[rows["labels"]]
    within = mx.take_along_axis(gather_roots(logits, roots), columns[:, None], axis=-1)
    within = within - mx.take_along_axis(logits, rows["labels"][:, None], axis=-1)
    token = token_cross_entropy(logits, rows["labels"])
    told = rows["soft_weights"]
    open_class = told * (1 - rows["inner_told"])
    return (open_class * within.squeeze(-1) + (rows["weights"] - told) * token).sum()


def combine(
    soft: mx.array,
    gold: mx.array,
    arrays: Sums,
    *,
    alpha: float,
    soft_weight: float,
    chunk_weight: float,
    chunk_scale: float,
) -> Sums:
    """Put together `alpha (w₁ soft + w₂ chunks) + (1 - alpha) CE`, sums over tokens and chunks.

    Args:
        soft: See `soft_sum`.
        gold: Log-probability of every counted token `[N]`; differentiable.
        arrays: See `AlignedTargets.collate`.
        alpha: Share of what comes from the teacher.
        soft_weight: w₁.
        chunk_weight: w₂.
        chunk_scale: s of `losses.likelihood_kl`.

    Returns:
        `loss`, `kd` (both soft parts, weighted), `ce`, and the parts `soft` and `chunks`.
    """
    likelihoods = chunk_log_probs(gold, arrays)
    distances = likelihood_kl(arrays["chunk_log_probs"], likelihoods, scale=chunk_scale)
    chunks = (distances * arrays["chunk_weights"]).sum()
    kd = soft_weight * soft + chunk_weight * chunks
    ce = -(gold * arrays["weights"]).sum()
    return {
        "loss": alpha * kd + (1 - alpha) * ce,
        "kd": kd,
        "ce": ce,
        "soft": soft,
        "chunks": chunks,
    }


def make_aligned_loss(
    student: LanguageModel,
    *,
    alignment: str,
    temperature: float,
    alpha: float,
    divergence: str,
    soft_weight: float,
    chunk_weight: float,
    chunk_scale: float,
    roots: np.ndarray,
    chunk: int = 1024,
) -> Callable[[nn.Module, Sums], Sums]:
    """The loss over batches of `AlignedTargets`, for the trainer.

    Like `head_loss.make_distillation_loss` it never holds the logits of a whole batch, unless
    the student's head makes it.

    Args:
        student: Loaded model, adapter attached.
        alignment: A key of ALIGNMENTS.
        temperature: t of the distributions that are compared.
        alpha: Share of what comes from the teacher.
        divergence: A key of LOSSES.
        soft_weight: Of the compared distributions.
        chunk_weight: Of the compared likelihoods.
        chunk_scale: s of `losses.likelihood_kl`.
        roots: For "roots": each token's root.
        chunk: Tokens whose logits exist at once; 0 takes all.
    """
    nothing = student.source.token_count
    weights = {
        "alpha": alpha,
        "soft_weight": soft_weight,
        "chunk_weight": chunk_weight,
        "chunk_scale": chunk_scale,
    }

    def soft(logits: mx.array, rows: Sums) -> mx.array:
        return soft_sum(
            logits,
            rows,
            alignment=alignment,
            temperature=temperature,
            divergence=divergence,
            nothing=nothing,
            roots=roots,
        )

    def soft_and_gradient(logits: mx.array, rows: Sums) -> tuple[Sums, mx.array]:
        if divergence == "forward_kl" and alignment not in ("uld", "roots"):
            extended = with_nothing(logits.astype(mx.float32), nothing)
            targets = {**rows, "weights": rows["soft_weights"]}
            sums, gradient = forward_kl_and_gradient(
                extended, targets, temperature=temperature, alpha=1.0
            )
            return {"loss": sums["kd"]}, gradient[:, : logits.shape[-1]]
        value, gradient = mx.value_and_grad(lambda x: soft(x, rows))(logits.astype(mx.float32))
        return {"loss": value}, gradient

    def chunked(model: nn.Module, arrays: Sums) -> Sums:
        hidden = student.body(arrays["inputs"])
        hidden = hidden.reshape(-1, hidden.shape[-1])[arrays["positions"]]
        sums, gold = chunked_loss(
            student.head,
            hidden,
            {name: arrays[name] for name in ROWS if name in arrays},
            soft_and_gradient if "kept_ids" in arrays else None,
            chunk,
            with_gold=True,
            before=1 if alignment == "roots" else 0,
        )
        return combine(sums.get("loss", mx.array(0.0)), gold, arrays, **weights)

    def dense(model: nn.Module, arrays: Sums) -> Sums:
        logits = student.logits(arrays["inputs"])
        logits = logits.reshape(-1, logits.shape[-1])[arrays["positions"]]
        gold = gold_log_probs(logits, arrays["labels"])
        total = soft(logits, arrays) if "kept_ids" in arrays else mx.array(0.0)
        return combine(total, gold, arrays, **weights)

    return chunked if takes_chunks(student) else dense
