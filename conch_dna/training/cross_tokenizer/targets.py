"""A teacher's soft targets for a student with another tokenizer.

Knows aligned examples and the teacher's cached targets; nothing of the models' weights.
To add an alignment: see `alignments`; where its ids map otherwise, a branch in `_map`.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from conch_dna.digests import content_digest
from conch_dna.language_model import ModelSource
from conch_dna.training.batches import Batch, Example, collate, round_up
from conch_dna.training.cross_tokenizer.alignments import ALIGNMENTS
from conch_dna.training.cross_tokenizer.outcome_rows import kept_and_rest, merged, stacked
from conch_dna.training.cross_tokenizer.records import AlignedExample
from conch_dna.training.cross_tokenizer.roots import ClassTargets
from conch_dna.training.cross_tokenizer.token_bytes import TokenBytes, token_bytes
from conch_dna.training.cross_tokenizer.vocabulary import build_vocab_projection, shared_tokens
from conch_dna.training.soft_targets import SoftTargetCache

CHUNK_MULTIPLE = 32


class AlignedTargets:
    """The cached targets of a teacher, laid over a student's tokens.

    The cache holds what the teacher said at its own tokens, so it serves every alignment that
    keeps as much; how it is laid over the student's is told anew for each batch.

    Args:
        cache: Of the teacher's examples.
        teacher: For its tokenizer.
        student: Likewise.
        alignment: A key of ALIGNMENTS.
    """

    def __init__(
        self, cache: SoftTargetCache, teacher: ModelSource, student: ModelSource, alignment: str
    ) -> None:
        self.cache = cache
        self.identity = cache.identity
        self.teacher = teacher
        self.student = student
        self.alignment = alignment

    @property
    def digest(self) -> str:
        """Content address of the teacher's targets and of how they are laid."""
        maps = (self._map(self.alignment), self._map("bytes"))
        return content_digest(
            self.identity.digest, self.alignment, *(part.astype("<i8").tobytes() for part in maps)
        )

    def missing(self, examples: Sequence[AlignedExample]) -> list[Example]:
        """The teacher's examples whose targets are not there, each once."""
        return self.cache.missing([example.teacher for example in examples])

    def fill(
        self, teacher: ModelSource, examples: Sequence[AlignedExample], *, batch_size: int
    ) -> int:
        """See `SoftTargetCache.fill`."""
        return self.cache.fill(teacher, [e.teacher for e in examples], batch_size=batch_size)

    def gold(self, example: AlignedExample) -> np.ndarray:
        """The teacher's log-probabilities of its own tokens of the text, at temperature 1."""
        return self.cache.gold(example.teacher)

    @cached_property
    def _tables(self) -> tuple[TokenBytes, TokenBytes]:
        return token_bytes(self.teacher.tokenizer), token_bytes(self.student.tokenizer)

    @cached_property
    def _maps(self) -> dict[str, np.ndarray]:
        return {}

    def _map(self, alignment: str) -> np.ndarray:
        """The student's id of each of the teacher's, or -1."""
        if alignment not in self._maps:
            teacher, student = self._tables
            if alignment == "project":
                made = build_vocab_projection(self.teacher.tokenizer, self.student.tokenizer)
                found = made.targets
            elif alignment == "roots":
                found = self.classes.roots[0]
            elif alignment == "truncate":
                found = np.arange(len(teacher.pieces))
                found[len(student.pieces) :] = -1
            else:
                found = shared_tokens(teacher, student)
            self._maps[alignment] = found
        return self._maps[alignment]

    @property
    def student_roots(self) -> np.ndarray:
        """The root of each of the student's tokens; every token its own unless roots are used."""
        if self.alignment == "roots":
            return self.classes.roots[1]
        return np.arange(self.student.token_count)

    @cached_property
    def classes(self) -> ClassTargets:
        """For the alignment "roots"."""
        return ClassTargets(self.teacher, self.student, self._tables, self.identity)

    def evaluation_batch(self, examples: Sequence[AlignedExample]) -> Batch:
        """A batch at temperature 1 whose figures mean the same with every alignment."""
        return self._batch(examples, 1.0, "bytes" if self.identity.top_k else "alm", every=True)

    def collate(self, examples: Sequence[AlignedExample], temperature: float) -> Batch:
        """A batch of examples with what the teacher said about the same text.

        Args:
            examples: In the batch's order.
            temperature: One of the identity's, where distributions are compared.

        Returns:
            Besides `batches.collate`: `chunk_index` int32 `[N]`, the chunk of each counted token
            (C where it has none), `chunk_log_probs` float32 `[C]`, the teacher's log-probability
            of the chunk, `chunk_weights` `[C]`, 0 for padding; and where distributions are
            compared `kept_ids` int32 `[N, K]` (the student's number of tokens stands for none),
            `teacher_log_probs` `[N, K + 1]`, `best_ids` `[N]` and `soft_weights` `[N]`.
        """
        return self._batch(examples, temperature, self.alignment, every=False)

    def _batch(
        self,
        examples: Sequence[AlignedExample],
        temperature: float,
        alignment: str,
        *,
        every: bool,
    ) -> Batch:
        parts = ALIGNMENTS[alignment]
        batch = collate(examples)
        rows = len(batch.arrays["labels"])
        stored = [self.cache.read(example.teacher) for example in examples]
        teacher_rows, student_rows, lengths, single = self._rows(examples)
        gold = np.concatenate([part["gold_log_prob"] for part in stored]).astype(np.float64)
        all_chunks = np.ones(len(single), bool)
        chosen = {"every": all_chunks, "several": ~single, "none": ~all_chunks}[parts.chunks]
        if every:
            chosen = all_chunks
        arrays = {
            **batch.arrays,
            **_chunk_arrays(gold, teacher_rows, student_rows, lengths, chosen, rows),
        }
        if parts.soft != "nowhere":
            at = single if parts.soft == "one-to-one" else all_chunks
            own_rows, teacher_rows = student_rows[at], teacher_rows[at]
            if alignment == "roots":
                arrays |= self._classed(examples, stored, own_rows, teacher_rows, rows)
            else:
                kept = self._soft(stored, teacher_rows, temperature, alignment)
                arrays |= self._laid(*kept, own_rows, np.ones(len(own_rows), bool), rows)
        return replace(batch, arrays=arrays)

    def _classed(
        self,
        examples: Sequence[AlignedExample],
        stored: Sequence[dict[str, np.ndarray]],
        own_rows: np.ndarray,
        teacher_rows: np.ndarray,
        rows: int,
    ) -> dict[str, np.ndarray]:
        """Arrays of the alignment "roots": at common boundaries, then inside either's tokens."""
        same = self.classes.same_before(examples, teacher_rows, own_rows)
        between = self.classes.at_boundaries(examples, stored, teacher_rows, same)
        same_rows = np.zeros(rows, bool)
        same_rows[own_rows] = same
        inner_rows, *inner, told = self.classes.inside(examples, stored)
        ids, log_probs = stacked(between, (inner[0], inner[1]))
        best = np.concatenate([between[0][:, 0], np.full(len(inner_rows), -1)])
        told = np.concatenate([np.ones(len(own_rows), bool), told])
        own_rows = np.concatenate([own_rows, inner_rows])
        arrays = self._laid(ids, log_probs, best, own_rows, told, rows)
        arrays |= self.classes.within(examples, stored, rows)
        return arrays | self.classes.reaching(examples, arrays, same_rows)

    def _rows(
        self, examples: Sequence[AlignedExample]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Of every chunk: first row on both sides, number of tokens `[C, 2]`, whether 1-to-1.

        Rows count the tokens that count, example after example.
        """
        sides: tuple[list[np.ndarray], ...] = ([], [])
        lengths, single = [], []
        offsets = [0, 0]
        for example in examples:
            chunks = example.chunks
            both = ((example.teacher, chunks.teacher), (example, chunks.student))
            for side, (tokens, ranges) in enumerate(both):
                number = np.cumsum(tokens.counted) - 1 + offsets[side]
                sides[side].append(number[ranges[:, 0]])
                offsets[side] += tokens.count
            lengths.append(np.concatenate([np.diff(chunks.teacher), np.diff(chunks.student)], 1))
            single.append(chunks.one_to_one)
        return (
            np.concatenate(sides[0]),
            np.concatenate(sides[1]),
            np.concatenate(lengths),
            np.concatenate(single),
        )

    def _soft(
        self,
        stored: Sequence[dict[str, np.ndarray]],
        teacher_rows: np.ndarray,
        temperature: float,
        alignment: str,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Kept tokens as the student's, log-probabilities with the rest last, likeliest ids."""
        kept_ids, kept, rest = kept_and_rest(stored, teacher_rows, self.identity, temperature)
        if alignment == "uld":
            # Sorted probabilities have no ids.
            ids = np.zeros(kept.shape, np.int64)
        else:
            ids = self._map(alignment)[kept_ids]
        best = ids[:, 0]
        if alignment != "uld":
            ids, kept, rest = merged(ids, kept, rest)
        return ids, np.concatenate([kept, rest[:, None]], axis=1), best

    def _laid(
        self,
        ids: np.ndarray,
        log_probs: np.ndarray,
        best: np.ndarray,
        student_rows: np.ndarray,
        told: np.ndarray,
        rows: int,
    ) -> dict[str, np.ndarray]:
        """The arrays of some rows among those of all counted tokens and their padding."""
        nothing = self.student.token_count
        kept_ids = np.full((rows, ids.shape[1]), nothing, np.int32)
        best_ids = np.full(rows, nothing, np.int32)
        laid = np.full((rows, log_probs.shape[1]), -np.inf, np.float32)
        # A row without a target has all its mass in the rest, on both sides.
        laid[:, -1] = 0
        weights = np.zeros(rows, np.float32)
        kept_ids[student_rows] = np.where(ids < 0, nothing, ids)
        best_ids[student_rows] = np.where(best < 0, nothing, best)
        laid[student_rows] = log_probs
        weights[student_rows] = told
        return {
            "kept_ids": kept_ids,
            "best_ids": best_ids,
            "teacher_log_probs": laid,
            "soft_weights": weights,
        }


def _chunk_arrays(
    gold: np.ndarray,
    teacher_rows: np.ndarray,
    student_rows: np.ndarray,
    lengths: np.ndarray,
    chosen: np.ndarray,
    rows: int,
) -> dict[str, np.ndarray]:
    count = int(chosen.sum())
    padded = round_up(max(1, count), CHUNK_MULTIPLE)
    before = np.concatenate([[0.0], np.cumsum(gold)])
    first, length = teacher_rows[chosen], lengths[chosen]
    log_probs = np.zeros(padded, np.float32)
    log_probs[:count] = before[first + length[:, 0]] - before[first]
    weights = np.zeros(padded, np.float32)
    weights[:count] = 1
    index = np.full(rows, padded, np.int32)
    number = np.repeat(np.arange(count), length[:, 1])
    within = np.arange(len(number)) - np.repeat(
        np.cumsum(length[:, 1]) - length[:, 1], length[:, 1]
    )
    index[np.repeat(student_rows[chosen], length[:, 1]) + within] = number
    return {"chunk_index": index, "chunk_log_probs": log_probs, "chunk_weights": weights}
