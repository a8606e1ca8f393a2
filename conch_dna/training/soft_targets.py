"""The teacher's soft targets: computed once, compressed to K + 1 outcomes, cached by content.

Knows a loaded teacher and tokenized examples; nothing of students or losses. To store another
figure per position: an array in `compute_targets`, its line in TARGET_ARRAYS, and a new FORMAT.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from conch_dna.checkpoints import content_digest, parse_json, remove_unfinished, save_arrays
from conch_dna.errors import ConchError, NotWholeError
from conch_dna.language_model import LanguageModel, ModelSource, nan_array
from conch_dna.losses import log_softmax, log_sum_exp
from conch_dna.progress import Report, silent
from conch_dna.training.batches import (
    Batch,
    Example,
    ExampleBatches,
    collate,
    first_counted,
    read_by_teacher,
    sequential_batches,
)
from conch_dna.training.data.beginnings import SharedBeginning
from conch_dna.training.head_loss import make_distillation_loss
from conch_dna.training.settings import KDConfig
from conch_dna.training.trainer import Loss

FORMAT = "soft targets 1"
SHARD_POSITIONS = 16_384
HEAD_ROWS = 512
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
    """

    teacher: str
    tokenizer: str
    vocabulary_size: int
    kept_below: int
    top_k: int
    temperatures: tuple[float, ...]

    @property
    def digest(self) -> str:
        """Content address of all of it and of the storage format."""
        numbers: list[Any] = [self.vocabulary_size, self.top_k, self.temperatures]
        if self.kept_below < self.vocabulary_size:
            numbers.append(self.kept_below)
        return content_digest(FORMAT, self.teacher, self.tokenizer, json.dumps(numbers))

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of what is stored."""
        return TARGET_ARRAYS if self.top_k else TARGET_ARRAYS[-1:]

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one counted position takes in the cache."""
        id_bytes = np.dtype(self.id_type).itemsize
        return self.top_k * (id_bytes + 4) + 8 * len(self.temperatures) + 4

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
    with_digests: bool = True,
) -> TargetIdentity:
    """The identity of a teacher's targets, told without loading its weights.

    Args:
        teacher: The model's source.
        top_k: Kept tokens per position, or 0.
        temperature: Of the loss.
        also_at: Other temperatures, where several runs share the targets.
        student: The one whose ids these are to be, where both have the same tokenizer.
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
    log_probs = log_softmax(logits)
    gold = mx.take_along_axis(log_probs, labels[:, None], axis=-1).squeeze(-1)
    if top_k == 0:
        return {"gold_log_prob": gold}
    size = log_probs.shape[-1]
    if top_k < size:
        kept = mx.argpartition(-log_probs[:, :kept_below], top_k - 1, axis=-1)[:, :top_k]
        values = mx.take_along_axis(log_probs, kept, axis=-1)
        order = mx.argsort(-values, axis=-1)
        kept = mx.take_along_axis(kept, order, axis=-1)
        values = mx.take_along_axis(values, order, axis=-1)
        others = mx.put_along_axis(log_probs, kept, mx.array(-mx.inf), axis=-1)
    else:
        kept = mx.argsort(-log_probs, axis=-1)
        values = mx.take_along_axis(log_probs, kept, axis=-1)
        others = None
    normalizers, rests = [], []
    for t in temperatures:
        normalizer = log_sum_exp(log_probs / t)
        normalizers.append(normalizer)
        if others is None:
            rests.append(mx.full(normalizer.shape, -mx.inf))
        else:
            rests.append(log_sum_exp(others / t) - normalizer)
    return {
        "kept_ids": kept.astype(mx.uint32),
        "kept_log_probs": values,
        "log_normalizer": mx.concatenate(normalizers, axis=-1),
        "log_rest": mx.concatenate(rests, axis=-1),
        "gold_log_prob": gold,
    }


def compute_targets(
    teacher: LanguageModel,
    examples: Sequence[Example],
    identity: TargetIdentity,
    *,
    batch_size: int,
    report: Report,
) -> list[dict[str, np.ndarray]]:
    """Run the teacher over examples in batches of similar length.

    A beginning that all of them share, as a system prompt, is computed once.

    The head is applied to 512 counted positions at a time, so logits of a whole batch never
    exist where the head can be taken apart from the body.

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
        parts = []
        for rows, logits in teacher.logits_at(
            inputs, positions, chunk=HEAD_ROWS, cache=shared.cache(len(chosen))
        ):
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
        if identity.top_k:
            arrays["kept_ids"] = arrays["kept_ids"].astype(identity.id_type)
        start = 0
        for i, example in zip(indices, chosen, strict=True):
            results[i] = {name: arrays[name][start : start + example.count] for name in arrays}
            start += example.count
        report("advance", {"by": batch.count})
    return results


def _behind(example: Example, length: int) -> Example:
    """An example without its first tokens, none of which counts."""
    if not length:
        return example
    return replace(example, ids=example.ids[length:], counted=example.counted[length:])


class SoftTargetCache:
    """Soft targets of many examples in safetensors shards, memory-mapped when read.

    Each example is addressed by the digests of the teacher, its tokenizer, the exact token ids,
    what counts, K, the temperatures and the format, so a changed data set only computes what is
    new.

    Args:
        folder: Parent; the shards lie in a sub-folder named after the identity.
        identity: See `TargetIdentity`.
        report: Gets ("warning", …) and ("advance", …).
    """

    def __init__(self, folder: Path, identity: TargetIdentity, *, report: Report = silent) -> None:
        self.identity = identity
        self.folder = folder / identity.digest[:16]
        self.report = report
        self._places: dict[str, tuple[Any, int, int]] = {}
        remove_unfinished(self.folder)
        for path in sorted(self.folder.glob("*.safetensors")):
            self._open(path)

    def _open(self, path: Path) -> None:
        try:
            shard, entries = _verified(path)
        except NotWholeError as error:
            self.report("warning", {"message": f"{error}; its targets are computed again"})
            path.unlink()
            return
        for key, start, end in entries:
            self._places[key] = (shard, start, end)

    @property
    def digest(self) -> str:
        """Content address of what the targets depend on besides the text."""
        return self.identity.digest

    def missing(self, examples: Sequence[Example]) -> list[Example]:
        """The examples whose targets are not there, each once."""
        by_digest = {each.digest: each for each in map(read_by_teacher, examples)}
        return [each for digest, each in by_digest.items() if digest not in self._places]

    def fill(self, teacher: ModelSource, examples: Sequence[Example], *, batch_size: int) -> int:
        """Compute what is missing, a shard at a time; returns the number of examples computed.

        The teacher is loaded only if something is missing.

        Raises:
            ConchError: The disk is full, or the teacher's output is not finite.
        """
        absent = self.missing(examples)
        shard: list[Example] = []
        for number, example in enumerate(absent, 1):
            shard.append(example)
            if number == len(absent) or sum(e.count for e in shard) >= SHARD_POSITIONS:
                self._write(teacher.resident(), shard, batch_size)
                shard = []
        return len(absent)

    def _write(self, teacher: LanguageModel, examples: list[Example], batch_size: int) -> None:
        results = compute_targets(
            teacher, examples, self.identity, batch_size=batch_size, report=self.report
        )
        arrays = {name: np.concatenate([r[name] for r in results]) for name in self.identity.arrays}
        ends = np.cumsum([example.count for example in examples]).tolist()
        entries = [
            [example.digest, end - example.count, end]
            for example, end in zip(examples, ends, strict=True)
        ]
        listing = json.dumps(entries)
        metadata = {
            "format": FORMAT,
            "identity": self.identity.digest,
            "entries": listing,
            "digest": _data_digest(listing, arrays),
        }
        path = self.folder / f"{content_digest(*(e.digest for e in examples))[:32]}.safetensors"
        save_arrays(path, {name: mx.array(value) for name, value in arrays.items()}, metadata)
        self._open(path)

    def read(self, example: Example) -> dict[str, np.ndarray]:
        """The stored arrays of one example, as its teacher reads it; see `compress`."""
        shard, start, end = self._places[read_by_teacher(example).digest]
        return {name: shard.get_slice(name)[start:end] for name in self.identity.arrays}

    def gold(self, example: Example) -> np.ndarray:
        """The teacher's log-probabilities of the counted tokens `[N]`, at temperature 1."""
        return self.read(example)["gold_log_prob"]

    def outcomes(
        self, examples: Sequence[Example], temperature: float, rows: int
    ) -> dict[str, np.ndarray]:
        """The teacher's K + 1 outcomes for a batch of examples.

        Args:
            examples: In the batch's order.
            temperature: One of the identity's.
            rows: Rows to pad to, see `batches.collate`; padding repeats the first row, so that
                its loss is finite before its weight of 0 takes it away.

        Returns:
            `kept_ids` int32 `[rows, K]`; `teacher_log_probs` float32 `[rows, K + 1]`, at the
            temperature, the rest last; `gold_log_prob` float32 `[rows]` at temperature 1.
        """
        column = self.identity.temperatures.index(float(temperature))
        parts = [self.read(example) for example in examples]
        joined = {name: np.concatenate([p[name] for p in parts]) for name in TARGET_ARRAYS}
        order = np.zeros(rows, np.int64)
        order[: len(joined["kept_ids"])] = np.arange(len(joined["kept_ids"]))
        normalizer, rest = (joined[n][:, column, None] for n in ("log_normalizer", "log_rest"))
        kept = joined["kept_log_probs"] / np.float32(temperature) - normalizer
        return {
            "kept_ids": joined["kept_ids"][order].astype(np.int32),
            "teacher_log_probs": np.concatenate([kept, rest], axis=1)[order],
            "gold_log_prob": joined["gold_log_prob"][order],
        }

    def collate(self, examples: Sequence[Example], temperature: float) -> Batch:
        """A batch of examples with the teacher's outcomes beside each counted position."""
        batch = collate(examples)
        outcomes = self.outcomes(examples, temperature, len(batch.arrays["labels"]))
        return replace(batch, arrays={**batch.arrays, **outcomes})

    def loss(self, student: LanguageModel, config: KDConfig) -> Loss:
        """The loss of a student over batches of `collate`, for the trainer."""
        return make_distillation_loss(
            student,
            temperature=config.temperature,
            alpha=config.alpha,
            divergence=config.divergence,
            chunk=config.head_chunk,
        )

    def evaluation_batch(self, examples: Sequence[Example]) -> Batch:
        """A batch at temperature 1 in which every counted token is a chunk of its own."""
        batch = self.collate(examples, 1.0)
        rows = len(batch.arrays["labels"])
        chunks = {
            "chunk_index": np.arange(rows, dtype=np.int32),
            "chunk_log_probs": batch.arrays["gold_log_prob"],
            "chunk_weights": batch.arrays["weights"],
            "best_ids": batch.arrays["kept_ids"][:, 0],
            "soft_weights": batch.arrays["weights"],
        }
        return replace(batch, arrays={**batch.arrays, **chunks})


def _data_digest(listing: str, arrays: dict[str, np.ndarray]) -> str:
    parts = (part for a in arrays.values() for part in (str(a.dtype), a.tobytes()))
    return content_digest(listing, *parts)


def _verified(path: Path) -> tuple[Any, list[tuple[str, int, int]]]:
    """Open a shard by memory map; check its data and entries against the digest in its header."""
    from safetensors import SafetensorError, safe_open

    try:
        shard = safe_open(str(path), framework="numpy")
        metadata = shard.metadata() or {}
        stored = set(shard.keys())
        arrays = {name: shard.get_tensor(name) for name in TARGET_ARRAYS if name in stored}
        listing = metadata["entries"]
        whole = metadata["digest"] == _data_digest(listing, arrays)
        rows = len(arrays["gold_log_prob"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise NotWholeError(f"cache shard {path} is truncated or unreadable") from error
    if not whole:
        raise NotWholeError(f"cache shard {path} was altered")
    entries = parse_json(listing, path)
    if not isinstance(entries, list) or not all(_is_entry(entry, rows) for entry in entries):
        raise NotWholeError(f"cache shard {path} does not say whose its rows are")
    return shard, [tuple(entry) for entry in entries]


def _is_entry(entry: Any, rows: int) -> bool:
    """Whether something is an example's digest, its first row and one after its last."""
    if not isinstance(entry, list) or [type(part) for part in entry] != [str, int, int]:
        return False
    return bool(0 <= entry[1] <= entry[2] <= rows)


class Targets(Protocol):
    """What a stream of batches and a run need of a teacher's targets."""

    identity: TargetIdentity

    @property
    def digest(self) -> str:
        """Content address of the targets."""

    def missing(self, examples: Sequence[Any]) -> list[Example]:
        """The examples whose targets are not there."""

    def fill(self, teacher: ModelSource, examples: Sequence[Any], *, batch_size: int) -> int:
        """Compute what is missing."""

    def collate(self, examples: Sequence[Any], temperature: float) -> Batch:
        """A batch of examples with their targets."""

    def loss(self, student: LanguageModel, config: KDConfig) -> Loss:
        """The loss of a student over batches of `collate`, for the trainer."""

    def evaluation_batch(self, examples: Sequence[Any]) -> Batch:
        """A batch for `evaluation.heldout_metrics`."""

    def read(self, example: Any) -> dict[str, np.ndarray]:
        """What is stored of a text: rows of the teacher's own tokens, see `compress`."""

    def gold(self, example: Any) -> np.ndarray:
        """The teacher's log-probabilities of its own tokens of a text."""


class TargetBatches(ExampleBatches):
    """A seeded stream of batches that carry the teacher's outcomes."""

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        cache: "Targets",
        *,
        temperature: float,
        seed: int,
    ) -> None:
        super().__init__(examples, batch_size, seed=seed)
        self.cache = cache
        self.temperature = temperature

    @property
    def digest(self) -> str:
        """Content address of the stream and of the targets in it."""
        return content_digest(super().digest, self.cache.digest, str(self.temperature))

    def batch(self, index: int) -> Batch:
        """Batch `index` of the stream with its targets."""
        examples = [self.examples[i] for i in self.indices(index)]
        return self.cache.collate(examples, self.temperature)
