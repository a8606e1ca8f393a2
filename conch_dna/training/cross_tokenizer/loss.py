"""The loss of a student whose teacher has another tokenizer.

Knows a model's body and head and batches of `targets.AlignedTargets`; nothing of texts or
tokenizers. To compare distributions otherwise: a `SoftLoss`, which a kind of targets hands on.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from conch_dna.language_model import LanguageModel
from conch_dna.losses import (
    LOSSES,
    kept_and_rest,
    likelihood_kl,
    log_sum_exp,
    token_cross_entropy,
)
from conch_dna.training.head_loss import (
    Sums,
    at_positions,
    autodiff,
    chunk_log_probs,
    chunked_loss,
    gold_log_probs,
    head_parts,
    takes_chunks,
    with_nothing,
)
from conch_dna.training.optimizer.steps import Loss
from conch_dna.training.settings import KDConfig

# What a batch holds besides arrays with a row for each counted token.
NO_ROWS = ("inputs", "chunk_log_probs", "chunk_weights")
# Another one would change a class of many tokens more than one of few, see `roots`.
CLASS_TEMPERATURE = 1.0
# Of the vocabulary's width, that a chunk of classes takes at a time, the next one's among them.
ARRAYS = 32
# Student's logits `[n, V]` of a chunk and its arrays to what the distributions' comparison adds
# to the loss, a differentiable sum over tokens.
SoftLoss = Callable[[mx.array, Sums], mx.array]


def outcome_sum(
    logits: mx.array, rows: Sums, *, temperature: float, divergence: str, nothing: int
) -> mx.array:
    """`t² D` over the kept tokens and one rest, summed over the rows that are compared.

    Args:
        logits: Student's `[n, V]` over the real tokens; differentiable.
        rows: A chunk's arrays, of which `AlignedTargets.collate` says the shapes.
        temperature: t.
        divergence: A key of LOSSES.
        nothing: The id that stands for no token.
    """
    scaled = logits.astype(mx.float32) / temperature
    student = kept_and_rest(with_nothing(scaled, nothing), rows["kept_ids"])
    losses = LOSSES[divergence](rows["teacher_log_probs"], student)
    return temperature**2 * (losses * rows["soft_weights"]).sum()


def class_sum(
    logits: mx.array, rows: Sums, *, divergence: str, nothing: int, roots: np.ndarray
) -> mx.array:
    """The divergence over classes of tokens, summed, and what only the text can teach of them.

    At boundaries that both have, and at those inside single tokens of one side; see `roots`.

    Args:
        logits: Student's `[n, V]` over the real tokens, of the row before as well where there is
            one: `[n + 1, V]`; differentiable.
        rows: A chunk's arrays, of which `roots.RootTargets.arrays` says the shapes.
        divergence: A key of LOSSES.
        nothing: The id that stands for no token.
        roots: `[V]`, the root of each of the student's tokens; see `vocabulary.common_roots`.
    """
    teacher = rows["teacher_log_probs"]
    scaled = logits.astype(mx.float32) / CLASS_TEMPERATURE
    own = scaled[-len(teacher) :]
    classes = gather_roots(own, roots)
    student = kept_and_rest(with_nothing(classes, nothing), rows["kept_ids"])
    student = with_reaching(scaled, student, rows, nothing=nothing)
    between = LOSSES[divergence](teacher, student) * rows["soft_weights"]
    # Each divergence is a sum over outcomes, so that of all places of a row is one sum.
    inner = inner_log_probs(own, rows, nothing=nothing)
    inside = LOSSES[divergence](rows["inner_log_probs"], inner)
    columns = mx.array(columns_of_roots(roots, own.shape[-1]))
    within = mx.take_along_axis(classes, columns[rows["labels"]][:, None], axis=-1)
    return (between + inside).sum() + open_sum(own, within, rows)


def gather_roots(logits: mx.array, roots: np.ndarray) -> mx.array:
    """Log-scores of classes of tokens: log-sum-exp over the tokens with the same root.

    Args:
        logits: `[n, V]`, float32; differentiable.
        roots: `[V]`: each token's root, itself included, or -1 for a token of its own.

    Returns:
        `[n, V]`: a class's score in its root's column, -inf in the columns of its other members.
    """
    columns = mx.array(columns_of_roots(roots, logits.shape[-1]))
    gather: Any = mx.custom_function(lambda x: _gathered(x, columns))
    gather.vjp(lambda x, cotangent, classes: _scattered(x, cotangent, classes, columns))
    classes: mx.array = gather(logits)
    return classes


def columns_of_roots(roots: np.ndarray, size: int) -> np.ndarray:
    """The column of each token's class, int32 `[size]`: its root's, or its own."""
    roots, own = roots[:size], np.arange(size)
    return np.where(roots >= 0, roots, own).astype(np.int32)


def _gathered(logits: mx.array, columns: mx.array) -> mx.array:
    largest = logits.max(axis=-1, keepdims=True)
    sums = mx.zeros(logits.shape).at[:, columns].add(mx.exp(logits - largest))
    is_root = columns == mx.arange(len(columns))
    # Where a sum is lost below the row's largest token, the root's own score is left of it.
    return mx.where(is_root, mx.maximum(largest + mx.log(sums), logits), -mx.inf)


def _scattered(
    logits: mx.array, cotangent: mx.array, classes: mx.array, columns: mx.array
) -> mx.array:
    """A gradient by classes as one by tokens: each by its share of its class."""
    share = mx.exp(logits - mx.take(classes, columns, axis=-1))
    return share * mx.take(cotangent, columns, axis=-1)


def with_reaching(logits: mx.array, student: mx.array, rows: Sums, *, nothing: int) -> mx.array:
    """What the student says comes next at a boundary that its tokens may also reach over.

    Behind `th` a student with a token `the` says little of an e: it would have said so a token
    earlier. So its distribution at the boundary counts as far as it had ended its token there,
    and beside it the longer tokens that begin with that one, each for what follows in it. Of all
    ways to cover a text (Phan et al. 2024, arXiv 2410.09303) these are the text's own tokens and
    one longer token behind them.

    Args:
        logits: `[n, V]` or, with the row before, `[n + 1, V]`, float32; differentiable.
        student: Log-probabilities of the outcomes `[n, K + 1]`, as if no token reached over.
        rows: A chunk's arrays, of which `roots.RootTargets.arrays` says the shapes.
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
        logits: `[n, V]`, float32; differentiable.
        rows: A chunk's arrays, of which `roots.RootTargets.arrays` says the shapes.
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


def open_sum(logits: mx.array, classes: mx.array, rows: Sums) -> mx.array:
    """Cross-entropy of what classes leave open, summed: only the text can teach that.

    Where the teacher tells the class, it is that of the text's token within its class: 0 for a
    class of one token, and where the teacher tells what is inside. Where it tells nothing, it is
    that of the token.

    Args:
        logits: `[n, V]`, float32; differentiable.
        classes: Log-scores of the classes of the text's tokens `[n, 1]`.
        rows: A chunk's arrays, of which `roots.RootTargets.arrays` says the shapes.
    """
    within = classes - mx.take_along_axis(logits, rows["labels"][:, None], axis=-1)
    token = token_cross_entropy(logits, rows["labels"])
    by_class = rows["soft_weights"]
    open_class = by_class * (1 - rows["inner_known"])
    return (open_class * within.squeeze(-1) + (rows["weights"] - by_class) * token).sum()


def combine(soft: mx.array, gold: mx.array, arrays: Sums, config: KDConfig) -> Sums:
    """Put together `alpha (w₁ soft + w₂ chunks) + (1 - alpha) CE`, sums over tokens and chunks.

    Args:
        soft: What comparing distributions gave, a sum.
        gold: Log-probability of every counted token `[N]`; differentiable.
        arrays: Of a batch, of which `AlignedTargets.collate` says the shapes.
        config: For alpha, w₁ = `soft_weight`, w₂ = `chunk_weight` and `chunk_scale`.

    Returns:
        `loss`, `kd` (both soft parts, weighted), `ce`, and the parts `soft` and `chunks`.
    """
    chunks = mx.array(0.0)
    if "chunk_index" in arrays:
        student, teacher = chunk_log_probs(gold, arrays), arrays["chunk_log_probs"]
        distances = likelihood_kl(teacher, student, scale=config.chunk_scale)
        chunks = (distances * arrays["chunk_weights"]).sum()
    kd = config.soft_weight * soft + config.chunk_weight * chunks
    ce = -(gold * arrays.get("ce_weights", arrays["weights"])).sum()
    loss = config.alpha * kd + (1 - config.alpha) * ce
    return {"loss": loss, "kd": kd, "ce": ce, "soft": soft, "chunks": chunks}


def make_aligned_loss(
    student: LanguageModel, soft: SoftLoss | None, config: KDConfig, *, before: int = 0
) -> Loss:
    """The loss over batches of `AlignedTargets`, for the trainer.

    Like `head_loss.make_distillation_loss` it never holds the logits of a whole batch, unless
    the student's head makes it.

    Args:
        student: Loaded model, adapter attached.
        soft: Compares distributions; None where only likelihoods of chunks are compared.
        config: Weights of the parts, see `combine`, and the memory for logits.
        before: Rows before its own whose logits `soft` gets as well.
    """
    rule = autodiff(lambda logits, rows: {"loss": soft(logits, rows)}) if soft else None

    def chunked(model: nn.Module, arrays: Sums) -> Sums:
        head, chunk, after = head_parts(student, config.loss_memory, ARRAYS)
        sums, gold = chunked_loss(
            head,
            at_positions(student.body(arrays["inputs"]), arrays),
            {name: value for name, value in arrays.items() if name not in NO_ROWS},
            rule,
            chunk,
            after=after,
            with_gold=True,
            before=before,
            backward=model.training,
        )
        return combine(sums.get("loss", mx.array(0.0)), gold, arrays, config)

    def dense(model: nn.Module, arrays: Sums) -> Sums:
        logits = at_positions(student.logits(arrays["inputs"]), arrays)
        gold = gold_log_probs(logits, arrays["labels"])
        total = soft(logits, arrays) if soft else mx.array(0.0)
        return combine(total, gold, arrays, config)

    return chunked if takes_chunks(student) else dense
