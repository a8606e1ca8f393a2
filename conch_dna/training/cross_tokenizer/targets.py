"""A teacher's cached targets laid over the tokens of a student with another tokenizer.

Knows aligned examples, the teacher's cache and the loss of its kinds; nothing of models' weights.
To add a kind: a class with `name`, `arrays` and `soft_loss`, and its entry in `examples.KINDS`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import ClassVar

import numpy as np

from conch_dna.checkpoints import content_digest
from conch_dna.language_model import LanguageModel, ModelSource
from conch_dna.training.batches import Batch, Example, collate, round_up
from conch_dna.training.cross_tokenizer.alignments import SHARED_TOKENS
from conch_dna.training.cross_tokenizer.loss import SoftLoss, make_aligned_loss, outcome_sum
from conch_dna.training.cross_tokenizer.records import AlignedExample
from conch_dna.training.cross_tokenizer.token_bytes import TokenBytes, token_bytes
from conch_dna.training.cross_tokenizer.vocabulary import shared_tokens
from conch_dna.training.data.soft_targets import SoftTargetCache
from conch_dna.training.optimizer.steps import Loss
from conch_dna.training.settings import KDConfig

CHUNK_MULTIPLE = 32
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class ChunkRows:
    """The chunks of a batch's examples, by rows: the counted tokens, example after example.

    Attributes:
        teacher: `[C]`: the first of the teacher's rows in each chunk.
        student: `[C]`: the first of the student's.
        lengths: `[C, 2]`: tokens of the teacher and of the student.
    """

    teacher: np.ndarray
    student: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, examples: Sequence[AlignedExample]) -> "ChunkRows":
        """All chunks of examples in a batch's order."""
        parts: tuple[list[np.ndarray], ...] = ([], [], [])
        offsets = [0, 0]
        for example in examples:
            sides = (example.teacher, example.chunks.teacher), (example, example.chunks.student)
            for side, (tokens, ranges) in enumerate(sides):
                rows = np.cumsum(tokens.counted) - 1 + offsets[side]
                parts[side].append(rows[ranges[:, 0]])
                offsets[side] += tokens.count
            parts[2].append(np.concatenate([np.diff(ranges) for _, ranges in sides], axis=1))
        return cls(*map(np.concatenate, parts))

    def where(self, chosen: np.ndarray) -> "ChunkRows":
        """Some of the chunks, chosen by a bool for each `[C]`."""
        return ChunkRows(self.teacher[chosen], self.student[chosen], self.lengths[chosen])

    @property
    def one_to_one(self) -> np.ndarray:
        """`[C]`, bool: the chunk is one token on both sides."""
        single: np.ndarray = (self.lengths == 1).all(axis=1)
        return single


@dataclass(frozen=True, eq=False)
class AlignedRows:
    """A batch's examples with what the teacher's cache holds of them.

    Attributes:
        examples: In the batch's order.
        stored: The cache's arrays, all examples behind each other: a row for each of the
            teacher's counted tokens.
        temperatures: Of the cache.
        chunks: Which of the teacher's rows belong to which of the student's.
        count: N, the student's rows with their padding.
    """

    examples: Sequence[AlignedExample]
    stored: Arrays
    temperatures: tuple[float, ...]
    chunks: ChunkRows
    count: int

    def outcomes(
        self, rows: np.ndarray, temperature: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of some of the teacher's rows what it gave its kept tokens and all others.

        Returns:
            Kept ids `[n, K]`, their log-probabilities `[n, K]`, and the rest's `[n]`.
        """
        column = self.temperatures.index(float(temperature))
        kept = self.stored["kept_log_probs"][rows] / np.float32(temperature)
        kept = kept - self.stored["log_normalizer"][rows, column, None]
        ids = self.stored["kept_ids"][rows].astype(np.int64)
        return ids, kept, self.stored["log_rest"][rows, column]


class AlignedTargets(ABC):
    """The cached targets of a teacher, laid over a student's tokens; its kinds say how.

    The cache holds what the teacher said at its own tokens, so it serves every kind that keeps
    as much; how it is laid over the student's is computed for each batch.

    Args:
        cache: Of the teacher's examples.
        teacher: For its tokenizer.
        student: For its tokenizer.

    Attributes:
        name: A key of `examples.KINDS`.
        keeps_outcomes: Whether the cache must hold kept tokens besides the text's own.
        rows_before: Rows before its own whose logits `soft_loss` gets as well.
    """

    name: ClassVar[str]
    keeps_outcomes: ClassVar[bool] = True
    rows_before: ClassVar[int] = 0

    def __init__(self, cache: SoftTargetCache, teacher: ModelSource, student: ModelSource) -> None:
        self.cache = cache
        self.identity = cache.identity
        self.teacher = teacher
        self.student = student

    @property
    def digest(self) -> str:
        """Content address of the teacher's targets and of how they are laid."""
        maps = (part.astype("<i8").tobytes() for part in (self.student_ids, self.shared))
        return content_digest(self.identity.digest, self.name, *maps)

    def missing(self, examples: Sequence[AlignedExample]) -> list[Example]:
        """The teacher's examples whose targets are not there, each once."""
        return self.cache.missing([example.teacher for example in examples])

    def fill(
        self, teacher: ModelSource, examples: Sequence[AlignedExample], *, batch_size: int
    ) -> int:
        """Compute what is missing; returns the number of the teacher's examples computed."""
        return self.cache.fill(teacher, [e.teacher for e in examples], batch_size=batch_size)

    def read(self, example: AlignedExample) -> dict[str, np.ndarray]:
        """What is stored of the teacher's own tokens of the text; see `soft_targets.compress`."""
        return self.cache.read(example.teacher)

    def gold(self, example: AlignedExample) -> np.ndarray:
        """The teacher's log-probabilities of its own tokens of the text, at temperature 1."""
        return self.cache.gold(example.teacher)

    @cached_property
    def tables(self) -> tuple[TokenBytes, TokenBytes]:
        """The bytes of the teacher's tokens and of the student's, where there are rows for them.

        What has no row in a head cannot be said, and a student's token without one counts as rest.
        """
        teacher, student = self.teacher, self.student
        return (
            token_bytes(teacher.tokenizer).below(teacher.vocabulary_size),
            token_bytes(student.tokenizer).below(student.vocabulary_size),
        )

    @cached_property
    def shared(self) -> np.ndarray:
        """The student's id of each of the teacher's tokens that both have, or -1."""
        return shared_tokens(*self.tables)

    @property
    def student_ids(self) -> np.ndarray:
        """The student's id to which each of the teacher's gives its probability, or -1."""
        return self.shared

    def collate(self, examples: Sequence[AlignedExample], temperature: float) -> Batch:
        """A batch of examples with what the teacher said about the same text.

        Args:
            examples: In the batch's order.
            temperature: One of the identity's, where distributions are compared.

        Returns:
            Besides `batches.collate` what the kind compares. Distributions: `kept_ids` int32
            `[N, K]` (the student's number of tokens stands for none), `teacher_log_probs`
            `[N, K + 1]`, the rest last, and `soft_weights` `[N]`, 0 where nothing is compared.
            Likelihoods: `chunk_index` int32 `[N]`, the chunk of each counted token (C where it
            has none), `chunk_log_probs` float32 `[C]`, the teacher's log-probability of the
            chunk, and `chunk_weights` `[C]`, 0 for padding.
        """
        batch, part = self._read(examples)
        return replace(batch, arrays={**batch.arrays, **self.arrays(part, temperature)})

    @abstractmethod
    def arrays(self, part: AlignedRows, temperature: float) -> Arrays:
        """What this kind adds to a batch; see `collate`."""

    @abstractmethod
    def soft_loss(self, config: KDConfig) -> SoftLoss | None:
        """What this kind compares of distributions; None if it does not."""

    def loss(self, student: LanguageModel, config: KDConfig) -> Loss:
        """The loss of a student over batches of `collate`, for the trainer."""
        return make_aligned_loss(student, self.soft_loss(config), config, before=self.rows_before)

    def evaluation_batch(self, examples: Sequence[AlignedExample]) -> Batch:
        """A batch at temperature 1 whose figures mean the same with every kind.

        Every chunk's likelihood is in it, and where tokens are kept the distributions over shared
        tokens, with `best_ids` int32 `[N]`, the one that the teacher holds the likeliest.
        """
        batch, part = self._read(examples)
        arrays = {**batch.arrays, **chunk_arrays(part, part.chunks)}
        if self.identity.top_k:
            single = part.chunks.where(part.chunks.one_to_one)
            arrays |= self.mapped(part, single, self.shared, 1.0)
            likeliest = self.shared[part.stored["kept_ids"][single.teacher, 0]]
            arrays["best_ids"] = self._filled((part.count,))
            arrays["best_ids"][single.student] = self._existing(likeliest)
        return replace(batch, arrays=arrays)

    def _read(self, examples: Sequence[AlignedExample]) -> tuple[Batch, AlignedRows]:
        batch = collate(examples)
        parts = [self.cache.read(example.teacher) for example in examples]
        stored = {n: np.concatenate([part[n] for part in parts]) for n in self.identity.arrays}
        chunks, count = ChunkRows.of(examples), len(batch.arrays["labels"])
        return batch, AlignedRows(examples, stored, self.identity.temperatures, chunks, count)

    def mapped(
        self, part: AlignedRows, chunks: ChunkRows, student_ids: np.ndarray, temperature: float
    ) -> Arrays:
        """The teacher's distributions at the beginning of chunks, over the student's tokens.

        Args:
            part: The batch.
            chunks: Some of its chunks.
            student_ids: The student's id of each of the teacher's, or -1 for the rest.
            temperature: One of the cache's.
        """
        ids, kept, rest = part.outcomes(chunks.teacher, temperature)
        ids, kept, rest = merged(student_ids[ids], kept, rest)
        log_probs = np.concatenate([kept, rest[:, None]], axis=1)
        return self.laid(ids, log_probs, chunks.student, part.count)

    def laid(
        self,
        ids: np.ndarray,
        log_probs: np.ndarray,
        rows: np.ndarray,
        count: int,
        weights: np.ndarray | float = 1.0,
    ) -> Arrays:
        """The distributions of some rows as arrays of a batch; see `collate`.

        Args:
            ids: The student's `[n, K]`, -1 for none.
            log_probs: `[n, K + 1]`, the rest last.
            rows: The student's `[n]`.
            count: N.
            weights: 0 where nothing is compared after all, `[n]`.
        """
        kept_ids = self._filled((count, ids.shape[1]))
        teacher_log_probs = np.full((count, log_probs.shape[1]), -np.inf, np.float32)
        # A row without a target has all its mass in the rest, on both sides.
        teacher_log_probs[:, -1] = 0
        soft_weights = np.zeros(count, np.float32)
        kept_ids[rows] = self._existing(ids)
        teacher_log_probs[rows] = log_probs
        soft_weights[rows] = weights
        return {
            "kept_ids": kept_ids,
            "teacher_log_probs": teacher_log_probs,
            "soft_weights": soft_weights,
        }

    def _filled(self, shape: tuple[int, ...]) -> np.ndarray:
        """An array of ids that stand for no token of the student."""
        return np.full(shape, self.student.token_count, np.int32)

    def _existing(self, ids: np.ndarray) -> np.ndarray:
        """Ids with the student's number of tokens for -1."""
        return np.where(ids < 0, self.student.token_count, ids)


class ChunkTargets(AlignedTargets):
    """The teacher's likelihood of every chunk, and no distributions."""

    name = "alm"
    keeps_outcomes = False

    def arrays(self, part: AlignedRows, temperature: float) -> Arrays:
        """Likelihoods of all chunks; they have no temperature."""
        return chunk_arrays(part, part.chunks)

    def soft_loss(self, config: KDConfig) -> None:
        """None: no distributions are compared."""


class SharedTokenTargets(AlignedTargets):
    """Distributions over the tokens that both have, where a chunk is one token on both sides.

    A student taught by them alone wrote worse than one without a teacher (docs/measurements.md).
    They serve where two teachers are blended, whose outcomes must be the student's own tokens.
    """

    name = SHARED_TOKENS

    def arrays(self, part: AlignedRows, temperature: float) -> Arrays:
        """Distributions at chunks of one token on both sides."""
        single = part.chunks.where(part.chunks.one_to_one)
        return self.mapped(part, single, self.student_ids, temperature)

    def soft_loss(self, config: KDConfig) -> SoftLoss:
        """The divergence over shared tokens and one rest."""
        return partial(
            outcome_sum,
            temperature=config.temperature,
            divergence=config.divergence,
            nothing=self.student.token_count,
        )


def chunk_arrays(part: AlignedRows, chunks: ChunkRows) -> Arrays:
    """The teacher's likelihoods of some chunks as arrays of a batch; see `AlignedTargets.collate`.

    Args:
        part: The batch.
        chunks: Some of its chunks.
    """
    count = len(chunks.teacher)
    padded = round_up(max(1, count), CHUNK_MULTIPLE)
    gold = part.stored["gold_log_prob"].astype(np.float64)
    before = np.concatenate([[0.0], np.cumsum(gold)])
    teacher_tokens, student_tokens = chunks.lengths.T
    log_probs = np.zeros(padded, np.float32)
    log_probs[:count] = before[chunks.teacher + teacher_tokens] - before[chunks.teacher]
    weights = np.zeros(padded, np.float32)
    weights[:count] = 1
    index = np.full(part.count, padded, np.int32)
    rows = np.repeat(chunks.student, student_tokens) + counted_up(student_tokens)
    index[rows] = np.repeat(np.arange(count), student_tokens)
    return {"chunk_index": index, "chunk_log_probs": log_probs, "chunk_weights": weights}


def counted_up(lengths: np.ndarray) -> np.ndarray:
    """0, 1, … anew for each of some lengths, behind each other.

    >>> counted_up(np.array([2, 0, 3])).tolist()
    [0, 1, 0, 1, 2]
    """
    counts: np.ndarray = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return counts


def merged(
    ids: np.ndarray, log_probs: np.ndarray, rest: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Add up what goes to the same id of a row, and what goes to none to the rest.

    Args:
        ids: `[n, K]`, -1 for none.
        log_probs: `[n, K]`.
        rest: `[n]`, log-probabilities.

    Returns:
        Ids `[n, K]`, each once in its row and -1 elsewhere; log-probabilities `[n, K]`, -inf
        where there is no id; and the rest `[n]`.
    """
    order = np.argsort(ids, axis=1, kind="stable")
    ids = np.take_along_axis(ids, order, axis=1)
    log_probs = np.take_along_axis(log_probs, order, axis=1)
    first = np.ones(ids.shape, bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    starts = np.flatnonzero(first.ravel())
    if len(starts):
        sums = np.logaddexp.reduceat(log_probs.ravel(), starts)
        log_probs = np.full(log_probs.size, -np.inf, log_probs.dtype)
        log_probs[starts] = sums
        log_probs = log_probs.reshape(ids.shape)
    nowhere = np.where(ids < 0, log_probs, -np.inf).max(axis=1, initial=-np.inf)
    keep = first & (ids >= 0)
    kept = np.where(keep, log_probs, -np.inf)
    return np.where(keep, ids, -1), kept, np.logaddexp(rest, nowhere)
