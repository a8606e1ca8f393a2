"""What a teacher says of counted tokens, compressed to K + 1 outcomes, and what that depends on.

Knows a loaded teacher and tokenized examples; nothing of files, students or losses. To tell
another figure per position: an array in `compress`, and its line in TARGET_ARRAYS.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from conch_dna.checkpoints import content_digest
from conch_dna.errors import ConchError
from conch_dna.language_model import LanguageModel, ModelSource, nan_array
from conch_dna.losses import Rest, exponential, log_sum_exp
from conch_dna.screen.progress import Report
from conch_dna.training.batches import Example, collate, first_counted, sequential_batches
from conch_dna.training.data.beginnings import SharedBeginning
from conch_dna.training.settings import LOSS_MEMORY

# Of the address of what is stored; files in several formats may hold it.
ADDRESS = "soft targets 1"
# Stands for float32 among the bits of a log-probability.
EXACT_BITS = 32
SEARCH_BLOCK = 64
DRAWN_ARRAYS = ("drawn_ids", "gold_log_prob")
TARGET_ARRAYS = ("kept_ids", "kept_log_probs", "log_normalizer", "log_rest", "gold_log_prob")


@dataclass(frozen=True, kw_only=True)
class TargetIdentity:
    """What a teacher's targets depend on besides the text.

    Attributes:
        teacher: Digest of configuration and weights.
        tokenizer: Digest of the tokenizer.
        vocabulary_size: Real tokens of the teacher.
        kept_below: Only ids below it are kept, since a student has no rows for others.
        top_k: Kept tokens per position; with 0 only the text's own log-probability is stored.
        temperatures: At which the rest is exact, ascending; 1 is always among them, unless
            nothing is kept.
        bits: In which a kept log-probability is stored; 32 is float32.
        draws: Tokens that are drawn at each position, at the only temperature, instead of kept.
    """

    teacher: str
    tokenizer: str
    vocabulary_size: int
    kept_below: int
    top_k: int
    temperatures: tuple[float, ...]
    bits: int = EXACT_BITS
    draws: int = 0

    @property
    def is_compact(self) -> bool:
        """Whether log-probabilities are stored in fewer bits than they have."""
        return bool(self.top_k) and self.bits < EXACT_BITS

    @property
    def exact(self) -> "TargetIdentity":
        """The same with log-probabilities as they are."""
        return replace(self, bits=EXACT_BITS)

    @property
    def digest(self) -> str:
        """Content address of all of it and of the storage format."""
        numbers: list[Any] = [self.vocabulary_size, self.top_k, self.temperatures]
        if self.kept_below < self.vocabulary_size:
            numbers.append(self.kept_below)
        if self.is_compact:
            numbers.append({"bits": self.bits})
        if self.draws:
            numbers.append({"draws": self.draws})
        return content_digest(ADDRESS, self.teacher, self.tokenizer, json.dumps(numbers))

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of what is stored."""
        if self.draws:
            return DRAWN_ARRAYS
        return TARGET_ARRAYS if self.top_k else TARGET_ARRAYS[-1:]

    def row_shape(self, name: str) -> tuple[int, ...]:
        """What one of the arrays has of each position."""
        if name == "drawn_ids":
            return (self.draws,)
        if name in ("kept_ids", "kept_log_probs"):
            return (self.top_k,)
        return () if name == "gold_log_prob" else (len(self.temperatures),)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one counted position takes in the cache, where it is compact about."""
        floats = len(self.temperatures)
        if self.is_compact:
            # As measured with 7 and 8 bits on TinyStories and gsm8k.
            return round(self.top_k * (self.bits + 5) / 8) + 4 * floats + 8
        id_bytes = np.dtype(self.id_type).itemsize
        if self.draws:
            return self.draws * id_bytes + 4
        return self.top_k * (id_bytes + 4) + 8 * floats + 4

    @property
    def id_type(self) -> type[np.unsignedinteger[Any]]:
        """Smallest unsigned type that holds every token id."""
        return np.uint16 if self.vocabulary_size <= 2**16 else np.uint32


def target_identity(
    teacher: ModelSource,
    *,
    top_k: int,
    temperature: float,
    also_at: Iterable[float] = (),
    student: ModelSource | None = None,
    bits: int = EXACT_BITS,
    with_digests: bool = True,
) -> TargetIdentity:
    """The identity of a teacher's targets, told without loading its weights.

    Args:
        teacher: The model's source.
        top_k: Kept tokens per position, or 0.
        temperature: Of the loss.
        also_at: Other temperatures, where several runs share the targets.
        student: The one whose ids these are to be, where both have the same tokenizer.
        bits: In which a kept log-probability is stored.
        with_digests: Read the weight files for their digest; without, only sizes are right.

    Raises:
        ConchError: More tokens are to be kept than the teacher has, or than the student has rows
            for where the teacher says others too.
    """
    size = teacher.vocabulary_size
    if top_k > size:
        raise ConchError(
            f"top_k is {top_k}, but teacher {teacher.model_id} has {size} tokens: lower --top-k"
        )
    kept_below = min(size, student.vocabulary_size if student else size)
    if top_k >= kept_below < size:
        raise ConchError(
            f"top_k is {top_k}, but the student has rows for {kept_below} of the teacher's {size} "
            "tokens, so that nothing would be left for the others: lower --top-k"
        )
    return TargetIdentity(
        teacher=teacher.weights_digest if with_digests else "",
        tokenizer=teacher.tokenizer_digest,
        vocabulary_size=size,
        kept_below=kept_below,
        top_k=top_k,
        temperatures=tuple(sorted({1.0, *map(float, (temperature, *also_at))})) if top_k else (),
        bits=bits,
    )


def compress(
    logits: mx.array,
    labels: mx.array,
    *,
    top_k: int,
    temperatures: Sequence[float],
    kept_below: int | None = None,
) -> dict[str, mx.array]:
    """Keep the K likeliest tokens of each position, and what makes the rest exact.

    Args:
        logits: `[N, V]` over the real tokens only.
        labels: The text's own next tokens `[N]`.
        top_k: K, at most V.
        temperatures: At which the rest is stored.
        kept_below: Only ids below it are kept; None for all.

    Returns (with K = 0 only the last):
        `kept_ids` `[N, K]`, likeliest first; `kept_log_probs` `[N, K]` at temperature 1;
        `log_normalizer` `[N, n]`, L_t = log Σ exp(log p / t), so that log p at t is
        (log p) / t − L_t; `log_rest` `[N, n]`, log-probability at t of all that is not kept
        (-inf where nothing is left); `gold_log_prob` `[N]` at temperature 1. float32, nats.
    """
    logits = logits.astype(mx.float32)
    gold = mx.take_along_axis(logits, labels[:, None], axis=-1)
    if top_k == 0:
        return {"gold_log_prob": (gold - log_sum_exp(logits)).squeeze(-1)}
    kept_ids = likeliest(logits[:, :kept_below], top_k)
    kept = mx.take_along_axis(logits, kept_ids, axis=-1)
    rest = Rest(logits, kept_ids, (1.0, *temperatures), alone=True)
    # Differences to the likeliest, which lose less where logits are large.
    largest = kept.max(axis=-1, keepdims=True)
    wholes, rests = {}, {}
    for t in sorted({1.0, *temperatures}):
        rests[t] = rest.log_sum(t) - largest / t
        wholes[t] = log_sum_exp(mx.concatenate([(kept - largest) / t, rests[t]], axis=-1))
    whole = wholes[1.0]
    return {
        "kept_ids": kept_ids.astype(mx.uint32),
        "kept_log_probs": kept - largest - whole,
        "log_normalizer": mx.concatenate([wholes[t] - whole / t for t in temperatures], axis=-1),
        "log_rest": mx.concatenate([rests[t] - wholes[t] for t in temperatures], axis=-1),
        "gold_log_prob": (gold - largest - whole).squeeze(-1),
    }


def drawn(
    logits: mx.array, labels: mx.array, uniform: np.ndarray, *, temperature: float
) -> dict[str, np.ndarray]:
    """Draw tokens of each position, with replacement.

    Over many draws each token comes as often as the teacher says it at the temperature, so that
    the cross-entropy against what was drawn is that against the teacher on average.

    Args:
        logits: `[N, V]` over the real tokens only.
        labels: The text's own next tokens `[N]`.
        uniform: Numbers from 0 to 1 by which to draw `[N, n]`.
        temperature: t.

    Returns:
        `drawn_ids` `[N, n]` uint32, ascending; `gold_log_prob` float32 `[N]` at temperature 1.

    Source: Anshumann et al. (2025), "Sparse Logit Sampling", arXiv 2503.16870.
    """
    logits = logits.astype(mx.float32)
    gold = compress(logits, labels, top_k=0, temperatures=())["gold_log_prob"]
    weights = exponential((logits - logits.max(axis=-1, keepdims=True)) / temperature)
    ends = np.cumsum(np.asarray(weights), axis=1, dtype=np.float64)
    ids = [
        np.searchsorted(row, numbers * row[-1], side="right")
        for row, numbers in zip(ends, np.sort(uniform, axis=1), strict=True)
    ]
    last = logits.shape[-1] - 1
    chosen = np.array(ids, np.uint32).reshape(uniform.shape).clip(max=last)
    return {"drawn_ids": chosen, "gold_log_prob": np.asarray(gold)}


def shares_drawn(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What was drawn as outcomes: each token once, with the share of the draws that it had.

    Args:
        ids: `[N, n]`, ascending.

    Returns:
        Distinct ids `[N, n]`, of which those behind the drawn ones are any others, below 2 n or
        drawn; log-shares float32 `[N, n + 1]`, -inf for the others and for the rest.
    """
    count = ids.shape[1]
    rows = np.arange(len(ids))[:, None]
    first = np.diff(ids.astype(np.int64), axis=1, prepend=-1) != 0
    place = np.cumsum(first, axis=1) - 1
    times = np.zeros((len(ids), count + 1))
    np.add.at(times, (rows, place), 1)
    # The smallest ids that were not drawn, for the places that are left.
    used = np.zeros((len(ids), 2 * count), bool)
    small = np.where(ids < 2 * count, ids, 2 * count - 1)
    used[rows, small] |= ids < 2 * count
    others = np.argsort(used, axis=1, kind="stable")
    behind = np.arange(count) - first.sum(axis=1, keepdims=True)
    distinct = np.take_along_axis(others, behind.clip(min=0), axis=1)
    distinct[rows, place] = ids
    with np.errstate(divide="ignore"):
        return distinct, np.log(times / count).astype(np.float32)


def likeliest(logits: mx.array, count: int) -> mx.array:
    """The tokens with the largest logits, largest first: `[N, V]` to ids `[N, count]`.

    The largest `count` of all lie in the `count` blocks with the largest maxima, so that only
    these are sorted through.
    """
    size = logits.shape[-1]
    whole = size // SEARCH_BLOCK * SEARCH_BLOCK
    if count == size:
        return mx.argsort(-logits, axis=-1)
    if whole < 2 * count * SEARCH_BLOCK:
        ids = mx.argpartition(-logits, count - 1, axis=-1)[:, :count]
    else:
        blocks = logits[:, :whole].reshape(len(logits), -1, SEARCH_BLOCK)
        found = mx.argpartition(-blocks.max(axis=-1), count - 1, axis=-1)[:, :count]
        columns = found[..., None] * SEARCH_BLOCK + mx.arange(SEARCH_BLOCK)
        tail = mx.broadcast_to(mx.arange(whole, size), (len(logits), size - whole))
        columns = mx.concatenate([columns.reshape(len(logits), -1), tail], axis=-1)
        among = mx.take_along_axis(logits, columns, axis=-1)
        chosen = mx.argpartition(-among, count - 1, axis=-1)[:, :count]
        ids = mx.take_along_axis(columns, chosen, axis=-1)
    order = mx.argsort(-mx.take_along_axis(logits, ids, axis=-1), axis=-1)
    return mx.take_along_axis(ids, order, axis=-1)


def compute_targets(
    teacher: LanguageModel,
    examples: Sequence[Example],
    identity: TargetIdentity,
    *,
    batch_size: int,
    memory: float = LOSS_MEMORY,
    report: Report,
) -> list[dict[str, np.ndarray]]:
    """Run the teacher over examples in batches of similar length.

    A beginning that all of them share, as a system prompt, is computed once.

    The head is applied to as many counted positions at a time as fit into `memory`, in megabytes,
    so logits of a whole batch never exist where the head can be taken apart from the body.

    Returns:
        For each example the arrays of `compress`, with N its counted tokens.
    """
    results: list[dict[str, np.ndarray]] = [{} for _ in examples]
    texts = [example.ids for example in examples]
    # The last of them predicts the first token that counts; a text may have none.
    before = [first_counted(e) - 1 if e.count else len(e.ids) - 1 for e in examples]
    shared = SharedBeginning(teacher.model, texts, before)
    for indices in sequential_batches(examples, batch_size):
        chosen = [_behind(examples[i], shared.length) for i in indices]
        batch = collate(chosen)
        inputs, positions, labels = (
            mx.array(batch.arrays[name]) for name in ("inputs", "positions", "labels")
        )
        parts: list[dict[str, np.ndarray]] = []
        uniform = _uniform([examples[i] for i in indices], len(labels), identity.draws)
        for rows, logits in teacher.logits_at(
            inputs, positions, memory=memory, cache=shared.cache(len(chosen))
        ):
            if identity.draws:
                (t,) = identity.temperatures
                parts.append(drawn(logits, labels[rows], uniform[rows], temperature=t))
                continue
            part = compress(
                logits,
                labels[rows],
                top_k=identity.top_k,
                temperatures=identity.temperatures,
                kept_below=identity.kept_below,
            )
            mx.eval(part)
            parts.append({name: np.asarray(value) for name, value in part.items()})
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in identity.arrays}
        log_probs = arrays.get("kept_log_probs", arrays["gold_log_prob"])
        if not np.isfinite(log_probs).all():
            weight = nan_array(teacher.model.parameters())
            why = f"its weight {weight} is NaN" if weight else "its weights or precision are broken"
            raise ConchError(
                f"teacher {teacher.model_id} gives non-finite log-probabilities on "
                f"{', '.join(batch.names)}: {why}; use one that is whole"
            )
        for name in {"kept_ids", "drawn_ids"} & arrays.keys():
            arrays[name] = arrays[name].astype(identity.id_type)
        start = 0
        for i, example in zip(indices, chosen, strict=True):
            results[i] = {name: arrays[name][start : start + example.count] for name in arrays}
            start += example.count
        report("advance", {"by": batch.count})
    return results


def _uniform(examples: Sequence[Example], rows: int, draws: int) -> np.ndarray:
    """Numbers to draw by `[rows, draws]`, which are an example's own, whatever its batch."""
    parts = [
        np.random.default_rng(int(example.digest[:16], 16)).random((example.count, draws))
        for example in examples
    ]
    uniform = np.zeros((rows, draws))
    uniform[: sum(map(len, parts))] = np.concatenate(parts)
    return uniform


def _behind(example: Example, length: int) -> Example:
    """An example without its first tokens, none of which counts."""
    if not length:
        return example
    return replace(example, ids=example.ids[length:], counted=example.counted[length:])
