"""Records as the tokens of two models with different tokenizers, and which belong together.

Knows records, two tokenizers and bytes; nothing of distributions or weights.
To align another form of record: `training/data/records.py`, which says what its answers are.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from conch_dna.checkpoints import content_digest
from conch_dna.errors import ConchError
from conch_dna.language_model import ModelSource
from conch_dna.training.batches import Example
from conch_dna.training.cross_tokenizer.alignments import Alignment, align_spans
from conch_dna.training.cross_tokenizer.token_bytes import (
    TokenBytes,
    TokenSpans,
    encode_all,
    token_bytes,
    token_spans,
)
from conch_dna.training.cross_tokenizer.vocabulary import vocabulary_digest
from conch_dna.training.data.records import (
    Record,
    counted_bytes,
    plain_text,
    record_texts,
    record_tokens,
)
from conch_dna.training.data.views import differs, view
from conch_dna.training.settings import STUDENT, TEACHER

LEAST_COVERAGE = 0.5


@dataclass(frozen=True, eq=False, kw_only=True)
class AlignedExample(Example):
    """A text as the student's tokens, with the teacher's tokens of the same text.

    Attributes:
        teacher: The text as the teacher's tokens.
        chunks: Which of its tokens cover the same text as which of the student's; indices into
            both `ids`; only tokens that count on both sides.
        to_cover: How many of its counted tokens are of texts that both sides have; a template's
            are not.
    """

    teacher: Example
    chunks: Alignment
    to_cover: int

    @property
    def digest(self) -> str:
        """Content address of both sides and of what belongs together."""
        chunks = (
            part.astype("<i8").tobytes() for part in (self.chunks.teacher, self.chunks.student)
        )
        return content_digest(super().digest, self.teacher.digest, *chunks)


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """How much of the texts that both models read is aligned, in the student's counted tokens.

    Attributes:
        one_to_one: Tokens that are one on both sides.
        in_chunks: Tokens in chunks of several.
        counted: All of them.
    """

    one_to_one: int
    in_chunks: int
    counted: int

    @classmethod
    def of(cls, texts: Iterable[tuple[Alignment, int]]) -> "Coverage":
        """That of several texts, from the chunks and the number of counted tokens of each."""
        one_to_one = in_chunks = counted = 0
        for chunks, tokens in texts:
            single = chunks.one_to_one
            one_to_one += int(single.sum())
            in_chunks += int(np.diff(chunks.student)[~single].sum())
            counted += tokens
        return cls(one_to_one=one_to_one, in_chunks=in_chunks, counted=counted)

    @property
    def share(self) -> float:
        """Share of the tokens that is aligned at all."""
        return (self.one_to_one + self.in_chunks) / max(1, self.counted)

    def to_json(self) -> dict[str, float]:
        """Shares of the counted tokens."""
        total = max(1, self.counted)
        return {
            "one_to_one": self.one_to_one / total,
            "in_chunks": self.in_chunks / total,
            "uncovered": 1 - self.share,
        }


def coverage(examples: Sequence[AlignedExample]) -> Coverage:
    """Count the aligned tokens of examples."""
    return Coverage.of((example.chunks, example.to_cover) for example in examples)


def text_coverage(texts: Sequence[str], teacher: Any, student: Any) -> Coverage:
    """How much of plain texts is aligned.

    Args:
        texts: Whatever both models could be given.
        teacher: The teacher's tokenizer.
        student: The student's tokenizer.
    """
    sides = []
    for tokenizer in (teacher, student):
        table, ids = token_bytes(tokenizer), encode_all(tokenizer, list(texts))
        sides.append([token_spans(t.encode(), i, table) for t, i in zip(texts, ids, strict=True)])
    pairs = zip(*sides, strict=True)
    return Coverage.of((align_spans(first, second), len(second.ends)) for first, second in pairs)


def require_coverage(covered: Coverage, *, teacher: str, student: str) -> None:
    """Refuse data of which less than half could be aligned.

    Raises:
        ConchError: With the share.
    """
    if covered.share < LEAST_COVERAGE:
        raise ConchError(
            f"only {covered.share:.1%} of the student's tokens could be aligned with the "
            f"teacher's, less than {LEAST_COVERAGE:.0%}: one of the tokenizers of {teacher} and "
            f"{student} rewrites or drops most of this text (see `conch-dna vocab`); use another "
            "pair, or text that both can spell"
        )


class RecordAligner:
    """Tokenizes records for both models, each with its own template, and aligns the answers.

    Where neither has a chat template the whole text is the same for both and is aligned; else
    only the answers are. The end-of-sequence tokens after an answer belong together.

    Args:
        teacher: Its tokenizer is used, not its weights.
        student: The model that is to learn; its tokenizer is used, not its weights.
        train_on_prompt: The student's prompt tokens count too.
    """

    def __init__(
        self, teacher: ModelSource, student: ModelSource, *, train_on_prompt: bool = False
    ) -> None:
        self.tokenizers = teacher.tokenizer, student.tokenizer
        self.tables = tuple(token_bytes(tokenizer) for tokenizer in self.tokenizers)
        self.digests = tuple(vocabulary_digest(tokenizer) for tokenizer in self.tokenizers)
        self.train_on_prompt = train_on_prompt

    def align(self, record: Record, name: str) -> AlignedExample:
        """One record; messages call it by the name.

        Raises:
            ConchError: It cannot be tokenized for one of the models (see
                `records.record_tokens`), or none of its tokens counts.
        """
        views = [
            view(record, side, template=tokenizer.has_chat_template)
            for side, tokenizer in zip((TEACHER, STUDENT), self.tokenizers, strict=True)
        ]
        whole = None if differs(record) else plain_text(views[1], *self.tokenizers)
        texts = record_texts(record) if whole is None else [whole]
        sides = []
        for side, tokenizer in enumerate(self.tokenizers):
            ids, ranges = record_tokens(
                views[side], tokenizer, name=name, vocabulary=self.digests[side]
            )
            counted = np.zeros(len(ids), bool)
            everything = self.train_on_prompt and (whole is not None or side == 1)
            for start, end in [(0, len(ids))] if everything else ranges:
                counted[start:end] = True
            counted[0] = False
            if not counted.any():
                raise ConchError(f"{name}: no token counts, nothing could be learned")
            ends = set(tokenizer.eos_token_ids)
            places = [(0, len(ids))] if whole is not None else ranges
            answers = [
                _answer(text, ids, place, self.tables[side], ends)
                for text, place in zip(texts, places, strict=True)
            ]
            sides.append((Example(np.asarray(ids, np.int32), counted, name), answers))
        (teacher, first), (student, second) = sides
        parts = [_join(a, b) for a, b in zip(first, second, strict=True)]
        teacher_ranges = np.concatenate([part.teacher for part in parts])
        student_ranges = np.concatenate([part.student for part in parts])
        keep = _all_counted(teacher.counted, teacher_ranges)
        keep &= _all_counted(student.counted, student_ranges)
        return AlignedExample(
            student.ids,
            student.counted,
            name,
            counted_bytes(views[1], train_on_prompt=self.train_on_prompt),
            teacher=teacher,
            to_cover=sum(
                int(student.counted[answer.start : answer.end].sum()) for answer in second
            ),
            chunks=Alignment(teacher_ranges[keep], student_ranges[keep]),
        )


@dataclass(frozen=True)
class _Answer:
    """An answer's tokens: their spans, the first, one after the last, one after its end."""

    spans: TokenSpans
    start: int
    last: int
    end: int


def _answer(
    text: str, ids: Sequence[int], place: tuple[int, int], table: TokenBytes, ends: set[int]
) -> _Answer:
    start, end = place
    last = end
    while last > start and ids[last - 1] in ends and ids[last - 1] in table.special_ids:
        last -= 1
    return _Answer(token_spans(text.encode(), ids[start:last], table), start, last, end)


def _join(teacher: _Answer, student: _Answer) -> Alignment:
    chunks = align_spans(teacher.spans, student.spans)
    ranges = [chunks.teacher + teacher.start, chunks.student + student.start]
    if teacher.end > teacher.last and student.end > student.last:
        ends = [[[side.last, side.last + 1]] for side in (teacher, student)]
        ranges = [np.concatenate(pair) for pair in zip(ranges, ends, strict=True)]
    return Alignment(*ranges)


def _all_counted(counted: np.ndarray, ranges: np.ndarray) -> np.ndarray:
    before = np.concatenate([[0], np.cumsum(counted)])
    full: np.ndarray = before[ranges[:, 1]] - before[ranges[:, 0]] == ranges[:, 1] - ranges[:, 0]
    return full
