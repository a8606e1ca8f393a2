"""What a model makes of given texts: held-out figures against a teacher, scores of tokens.

Knows loaded models, batches and examples; nothing of training or files. To add a held-out figure:
a sum in `heldout_figures` and a field of `metrics.TokenMetrics`; one of tokens: `TokenFigures`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from conch_dna.language_model import LanguageModel
from conch_dna.losses import forward_kl, kept_and_rest, likelihood_kl, log_sum_exp
from conch_dna.metrics import (
    COMPARABLE,
    TokenMetrics,
    closed_gap,
    ranges_of,
    token_metrics,
    verdict,
    worst_slice,
)
from conch_dna.training.batches import (
    Batch,
    Example,
    collate,
    read_by_teacher,
    sequential_batches,
)
from conch_dna.training.data.soft_targets import Targets
from conch_dna.training.head_loss import (
    Sums,
    autodiff,
    chunk_log_probs,
    gold_log_probs,
    make_logit_loss,
    with_nothing,
)
from conch_dna.training.optimizer.steps import Loss
from conch_dna.training.settings import LOSS_MEMORY, KDConfig

_ROWS = ("kept_ids", "teacher_log_probs", "best_ids", "soft_weights", "labels", "weights")
_AT_ONE = "at temperature 1: "


@dataclass(frozen=True, eq=False)
class TokenFigures:
    """Figures of every counted token of held-out examples, one example after the other.

    Attributes:
        place: Which of its example's counted tokens it is, from 1 `[n]`.
        kl: KL(teacher‖model) at temperature 1 in nats, or the chunk's that begins with this token
            where no token can be compared `[n]`; 0 where nothing is.
        compared: Whether something is `[n]`, 1 or 0.
        entropy: The teacher's, over the kept tokens and the rest, so a lower bound; in nats
            `[n]`, NaN where no distributions are compared.
        confidence: The probability that the model gives its likeliest token `[n]`.
        right: Whether that is the text's own `[n]`.
    """

    place: np.ndarray
    kl: np.ndarray
    compared: np.ndarray
    entropy: np.ndarray
    confidence: np.ndarray
    right: np.ndarray

    @classmethod
    def joined(cls, parts: Sequence["TokenFigures"]) -> "TokenFigures":
        """Those of several batches behind each other."""
        names = [each.name for each in fields(cls)]
        return cls(**{n: np.concatenate([getattr(part, n) for part in parts]) for n in names})


@dataclass(frozen=True, eq=False)
class HeldoutFigures:
    """What a model makes of held-out examples.

    Attributes:
        metrics: Over all of them.
        by_example: A figure's name in the metrics to its sum over each example, and what the sum
            is to be divided by, in nats and counts `[2, examples]`.
        by_token: Of each of their tokens.
    """

    metrics: TokenMetrics
    by_example: dict[str, np.ndarray]
    by_token: TokenFigures


def heldout_metrics(
    model: LanguageModel, batches: Iterable[Batch], *, memory: float = LOSS_MEMORY
) -> TokenMetrics:
    """The figures of `heldout_figures` over all examples."""
    return heldout_figures(model, batches, memory=memory).metrics


def heldout_figures(
    model: LanguageModel, batches: Iterable[Batch], *, memory: float = LOSS_MEMORY
) -> HeldoutFigures:
    """Figures of a model on held-out batches, at temperature 1.

    The KL is over the kept tokens and the rest, so it is a lower bound of the full KL.

    Args:
        model: Student or other model with the student's tokenizer.
        batches: Of `Targets.evaluation_batch`.
        memory: Megabytes for logits and what is made of them.
    """
    examples: dict[str, list[np.ndarray]] = {name: [] for name in COMPARABLE}
    totals = dict.fromkeys(("kl", "agreeing", "compared", "gold", "chunk_kl", "chunks"), 0.0)
    by_token: list[TokenFigures] = []
    tokens = text_bytes = 0
    for batch in batches:
        tokens += batch.count
        text_bytes += batch.text_bytes
        arrays = {name: mx.array(value) for name, value in batch.arrays.items()}
        gold, kl, sure, right = [], [], [], []
        for part, logits in model.logits_at(arrays["inputs"], arrays["positions"], memory=memory):
            rows = {name: arrays[name][part] for name in _ROWS if name in arrays}
            own, likeliest, confidence = own_and_likeliest(logits, rows["labels"])
            gold.append(own)
            sure.append(confidence)
            right.append(likeliest == rows["labels"])
            sums = {"gold": (gold[-1] * rows["weights"]).sum()}
            if "kept_ids" in rows:
                kl.append(weighted_kl(logits, rows, nothing=model.source.token_count))
                best = likeliest == rows["best_ids"]
                sums["kl"], sums["compared"] = kl[-1].sum(), rows["soft_weights"].sum()
                sums["agreeing"] = (best * rows["soft_weights"]).sum()
            mx.eval(sums, gold[-1], kl[-1:], sure[-1], right[-1])
            for name, value in sums.items():
                totals[name] += float(value)
        student = chunk_log_probs(mx.concatenate(gold), arrays)
        distances = likelihood_kl(arrays["chunk_log_probs"], student) * arrays["chunk_weights"]
        totals["chunk_kl"] += float(distances.sum())
        totals["chunks"] += float(arrays["chunk_weights"].sum())
        for name, pair in _by_example(batch, kl, gold, distances).items():
            examples[name].append(pair)
        by_token.append(_by_token(batch, kl, distances, sure, right))
    metrics = token_metrics(
        kl_sum=totals["kl"],
        cross_entropy_sum=-totals["gold"],
        agreeing=totals["agreeing"],
        compared_tokens=round(totals["compared"]),
        chunk_kl_sum=totals["chunk_kl"],
        chunks=round(totals["chunks"]),
        tokens=tokens,
        text_bytes=text_bytes,
    )
    by_example = {name: np.concatenate(parts, 1) for name, parts in examples.items()}
    return HeldoutFigures(metrics, by_example, TokenFigures.joined(by_token))


def own_and_likeliest(logits: mx.array, labels: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """What a model says of each row's own token and of its likeliest one, at temperature 1.

    Args:
        logits: `[n, V]`.
        labels: The rows' own tokens `[n]`.

    Returns:
        Log-probability of the own token in nats, the likeliest token, its probability; each `[n]`.
    """
    logits = logits.astype(mx.float32)
    whole = log_sum_exp(logits).squeeze(-1)
    likeliest = mx.argmax(logits, axis=-1)
    own, best = (
        mx.take_along_axis(logits, ids[:, None], axis=-1).squeeze(-1) - whole
        for ids in (labels, likeliest)
    )
    return own, likeliest, mx.exp(best)


def figures_on(
    model: LanguageModel, examples: Sequence[Example], targets: Targets, config: KDConfig
) -> HeldoutFigures:
    """The figures of `heldout_figures` on examples whose targets are there, in batches.

    Args:
        model: A student, with or without an adapter.
        examples: Of `Examples.make`.
        targets: The teacher's.
        config: How many examples exist at once, and the memory for logits.

    Returns:
        Their sums by example stand in the order of `sequential_batches`, which is by length.
    """
    chosen = (
        [examples[index] for index in indices]
        for indices in sequential_batches(examples, config.batch_size)
    )
    batches = map(targets.evaluation_batch, chosen)
    return heldout_figures(model, batches, memory=config.loss_memory)


# What of a record says where it comes from.
_ORIGINS = ("domain", "source", "category")


def slices_of(
    examples: Sequence[Example],
    records: Sequence[Mapping[str, Any]],
    figures: HeldoutFigures,
    batch_size: int,
) -> tuple[list[str], dict[str, list[str]]]:
    """By what held-out examples are told apart, in the order of their figures.

    Args:
        examples: As `figures_on` had them.
        records: What they were made of; none where that is not known.
        figures: Of them, for the teacher's entropy.
        batch_size: As `figures_on` had it.

    Returns:
        The name of each, and by length, the teacher's entropy and where records come from (their
        `domain`, `source` or `category`) the name of each one's part.
    """
    order = [int(n) for n in np.concatenate(sequential_batches(examples, batch_size))]
    found = {}
    # The first, since of parts that hold the same examples the first is named.
    for name in _ORIGINS:
        origins = [str(records[number].get(name, "none")) for number in order] if records else []
        if len(set(origins)) > 1:
            found[name] = origins
    found["length"] = ranges_of([examples[number].count for number in order], "tokens")
    by_token = figures.by_token
    owner = np.cumsum(by_token.place == 1) - 1
    known = np.isfinite(by_token.entropy)
    tokens = np.bincount(owner[known], minlength=len(order))
    if tokens.all():
        sums = np.bincount(owner[known], by_token.entropy[known], len(order))
        found["teacher's entropy"] = ranges_of((sums / tokens).tolist(), "nats")
    return [examples[number].name for number in order], found


def named_slice(
    before: np.ndarray,
    after: np.ndarray,
    slices: tuple[Sequence[str], Mapping[str, Sequence[str]]],
    *,
    seed: int,
) -> dict[str, Any] | None:
    """What `metrics.worst_slice` finds, its worst examples by their names.

    Args:
        before: See there.
        after: See there.
        slices: Of `slices_of`.
        seed: Of the resampling.
    """
    names, parts = slices
    if part := worst_slice(before, after, parts, seed=seed):
        part["worst"] = [names[place] for place in part["worst"]]
    return part


def judged(
    before: HeldoutFigures,
    after: HeldoutFigures,
    teacher: TokenMetrics,
    slices: tuple[Sequence[str], Mapping[str, Sequence[str]]],
    *,
    figure: str,
    seed: int,
) -> dict[str, Any]:
    """What evaluation.json says of a set of examples: both figures, the teacher's, the verdict.

    Args:
        before: Of the student without its adapter.
        after: Of the student with it, on the same batches.
        teacher: Its own figures on them.
        slices: See `slices_of`.
        figure: One of `COMPARABLE`, by which the verdict is found.
        seed: Of its bootstrap.
    """
    pair = (before.by_example[figure], after.by_example[figure])
    before_metrics, after_metrics = before.metrics.to_json(), after.metrics.to_json()
    return {
        "before": before_metrics,
        "after": after_metrics,
        "teacher": teacher.to_json(),
        "gap_closed": closed_gap(before_metrics, after_metrics),
        "verdict": {"figure": figure, **verdict(*pair, seed=seed)},
        "slice": named_slice(*pair, slices, seed=seed),
    }


def weighted_kl(logits: mx.array, rows: dict[str, mx.array], *, nothing: int) -> mx.array:
    """KL of each row at temperature 1, times its weight: logits `[n, V]` to nats `[n]`."""
    student = kept_and_rest(with_nothing(logits.astype(mx.float32), nothing), rows["kept_ids"])
    return forward_kl(rows["teacher_log_probs"], student) * rows["soft_weights"]


def _by_example(
    batch: Batch, kl: list[mx.array], gold: list[mx.array], distances: mx.array
) -> dict[str, np.ndarray]:
    """Sums and counts of the comparable figures for each example of a batch `[2, B]`."""
    arrays, size = batch.arrays, len(batch.names)
    owner = arrays["positions"] // arrays["inputs"].shape[1]
    chunks = np.zeros(len(arrays["chunk_weights"]) + 1, np.int64)
    chunks[arrays["chunk_index"]] = owner
    weights, none = arrays["weights"], np.zeros(len(owner))

    def sums(owners: np.ndarray, values: Any, counts: Any) -> np.ndarray:
        return np.stack([np.bincount(owners, np.asarray(v), size) for v in (values, counts)])

    return {
        "kl_nats": sums(
            owner,
            np.concatenate([np.asarray(part) for part in kl]) if kl else none,
            arrays["soft_weights"] if kl else none,
        ),
        "chunk_kl_nats": sums(chunks[:-1], distances, arrays["chunk_weights"]),
        "cross_entropy": sums(owner, -np.asarray(mx.concatenate(gold)) * weights, weights),
    }


def _by_token(
    batch: Batch,
    kl: list[mx.array],
    distances: mx.array,
    sure: list[mx.array],
    right: list[mx.array],
) -> TokenFigures:
    """The figures of a batch's counted tokens, without its padding."""
    arrays, count = batch.arrays, batch.count
    owner = arrays["positions"][:count] // arrays["inputs"].shape[1]
    _, first, of = np.unique(owner, return_index=True, return_inverse=True)
    entropy = np.full(count, np.nan)
    if kl:
        per_token, compared = np.asarray(mx.concatenate(kl)), arrays["soft_weights"]
        log_probs = arrays["teacher_log_probs"][:count].astype(np.float64)
        probs = np.exp(log_probs)
        # An outcome that cannot be adds nothing.
        entropy = -np.sum(np.where(probs > 0, probs * np.maximum(log_probs, -1e9), 0), axis=1)
        entropy[compared[:count] == 0] = np.nan
    else:
        per_token, compared = np.zeros((2, count))
        chunks, begins = np.unique(arrays["chunk_index"][:count], return_index=True)
        real = chunks < len(arrays["chunk_weights"])
        per_token[begins[real]] = np.asarray(distances)[chunks[real]]
        compared[begins[real]] = arrays["chunk_weights"][chunks[real]]
    return TokenFigures(
        place=np.arange(count) - first[of] + 1,
        kl=per_token[:count],
        compared=compared[:count],
        entropy=entropy,
        confidence=np.asarray(mx.concatenate(sure))[:count],
        right=np.asarray(mx.concatenate(right))[:count],
    )


def with_evaluation(batch: Batch, evaluation: Batch) -> Batch:
    """A held-out batch of the trainer's with what `and_kl` needs beside its own arrays."""
    own = batch.arrays
    rows = {
        _AT_ONE + name: value
        for name, value in evaluation.arrays.items()
        if not (name in own and np.array_equal(own[name], value))
    }
    return replace(batch, arrays={**own, **rows})


def and_kl(loss: Loss, student: LanguageModel, figure: str, *, memory: float) -> Loss:
    """A held-out loss with `kl` beside its sums: what `heldout_figures` reports, at each step.

    Where both read the same ids they share one pass through the student's body.

    Args:
        loss: Over the batches without `with_evaluation`.
        student: Loaded model, adapter attached.
        figure: `kl_nats` or `chunk_kl_nats`, which stands under the name of `kl`.
        memory: Megabytes for logits and what is made of them.
    """

    def sums_of(logits: mx.array, rows: Sums) -> Sums:
        kl = weighted_kl(logits, rows, nothing=student.source.token_count)
        return {"loss": kl.sum(), "kl_count": rows["soft_weights"].sum()}

    names = ("kept_ids", "teacher_log_probs", "soft_weights")
    token_kl = make_logit_loss(student, names, sums_of, autodiff(sums_of), memory=memory)

    def chunk_kl(arrays: Sums) -> Sums:
        gold = []
        for part, logits in student.logits_at(arrays["inputs"], arrays["positions"], memory=memory):
            gold.append(gold_log_probs(logits, arrays["labels"][part]))
        ours = chunk_log_probs(mx.concatenate(gold), arrays)
        weights = arrays["chunk_weights"]
        distances = likelihood_kl(arrays["chunk_log_probs"], ours)
        return {"loss": (distances * weights).sum(), "kl_count": weights.sum()}

    def both(model: nn.Module, arrays: Sums) -> Sums:
        own = {name: value for name, value in arrays.items() if not name.startswith(_AT_ONE)}
        apart = {n.removeprefix(_AT_ONE): value for n, value in arrays.items() if n not in own}
        rows = {**own, **apart}
        with student.one_pass():
            kl = token_kl(model, rows) if figure == "kl_nats" else chunk_kl(rows)
            return {**loss(model, own), "kl": kl["loss"], "kl_count": kl["kl_count"]}

    return both


def teacher_metrics(examples: Iterable[Example], targets: Targets) -> TokenMetrics:
    """The teacher's own figures over its own tokens, from its stored targets alone."""
    tokens = text_bytes = 0
    total = 0.0
    for example in examples:
        gold = targets.gold(example)
        tokens += len(gold)
        text_bytes += example.text_bytes
        total += float(gold.sum(dtype=np.float64))
    return token_metrics(
        cross_entropy_sum=-total,
        tokens=tokens,
        agreeing=tokens,
        compared_tokens=tokens,
        chunks=tokens,
        text_bytes=text_bytes,
    )


def teacher_confidence(
    examples: Iterable[Any], targets: Targets
) -> tuple[np.ndarray, np.ndarray] | None:
    """How sure the teacher is of its likeliest token, and whether that is the text's own.

    Args:
        examples: Whose stored targets are read.
        targets: Of them.

    Returns:
        Probabilities and bools of the teacher's own counted tokens `[n]`; None where no
        distributions are stored.
    """
    if not targets.identity.top_k:
        return None
    sure, right = [], []
    for example in examples:
        rows, read = targets.read(example), read_by_teacher(example)
        sure.append(np.exp(rows["kept_log_probs"][:, 0]))
        right.append(rows["kept_ids"][:, 0] == read.ids[read.counted])
    return np.concatenate(sure), np.concatenate(right)


@dataclass(frozen=True, eq=False)
class TokenScores:
    """One text's counted tokens under a model, at temperature 1.

    Attributes:
        log_probs: Log-probability of each, in nats `[n]`.
        likeliest: Whether it is the token that the model holds likeliest there `[n]`.
    """

    log_probs: np.ndarray
    likeliest: np.ndarray


def token_scores(
    model: LanguageModel,
    examples: Sequence[Example],
    *,
    batch_size: int,
    memory: float = LOSS_MEMORY,
) -> list[TokenScores]:
    """Score the counted tokens of every example.

    Args:
        model: Loaded.
        examples: With at least one counted token each.
        batch_size: Examples at once.
        memory: Megabytes for logits and what is made of them.

    Returns:
        Scores in the order of the examples.
    """
    scores: dict[int, TokenScores] = {}
    for indices in sequential_batches(examples, batch_size):
        batch = collate([examples[index] for index in indices])
        inputs = mx.array(batch.arrays["inputs"])
        positions = mx.array(batch.arrays["positions"][: batch.count])
        labels = mx.array(batch.arrays["labels"][: batch.count])
        log_probs, likeliest = [], []
        for part, logits in model.logits_at(inputs, positions, memory=memory):
            log_probs.append(gold_log_probs(logits, labels[part]))
            likeliest.append(mx.argmax(logits, axis=-1) == labels[part])
            # Here, so that only one chunk's logits exist.
            mx.eval(log_probs[-1], likeliest[-1])
        all_probs = np.asarray(mx.concatenate(log_probs))
        all_likeliest = np.asarray(mx.concatenate(likeliest))
        ends = np.cumsum([examples[index].count for index in indices])
        for index, end in zip(indices, ends, strict=True):
            part = slice(end - examples[index].count, end)
            scores[int(index)] = TokenScores(all_probs[part], all_likeliest[part])
    return [scores[index] for index in range(len(examples))]
