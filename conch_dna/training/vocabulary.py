"""Which token of one tokenizer is which of another, and heads of unequal size.

Knows tokenizers and arrays of logits; nothing of training. For now it answers one question: are
two tokenizers the same? To add a strategy for heads of unequal size: an entry in ALIGNERS.
"""

import json
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from conch_dna.digests import content_digest
from conch_dna.errors import ConchError

Aligner = Callable[[mx.array, mx.array], tuple[mx.array, mx.array]]


def _truncate(teacher_logits: mx.array, student_logits: mx.array) -> tuple[mx.array, mx.array]:
    size = min(teacher_logits.shape[-1], student_logits.shape[-1])
    return teacher_logits[..., :size], student_logits[..., :size]


ALIGNERS: dict[str, Aligner] = {"truncate": _truncate}


def align_vocab_sizes(
    teacher_logits: mx.array, student_logits: mx.array, strategy: str = "truncate"
) -> tuple[mx.array, mx.array]:
    """Bring two heads of one tokenizer to the same number of rows.

    Heads are often padded to a round number of rows. "truncate" keeps the rows that both have;
    this is right only when both tokenizers are the same, since then the rows it drops belong to
    no token.

    Args:
        teacher_logits: `[..., V_teacher]`.
        student_logits: `[..., V_student]`.
        strategy: A key of ALIGNERS.

    Returns:
        Both, with a last axis of the smaller size.

    Raises:
        ValueError: The strategy is unknown.

    >>> teacher, student = align_vocab_sizes(mx.zeros((2, 152064)), mx.zeros((2, 151936)))
    >>> teacher.shape == student.shape == (2, 151936)
    True
    """
    if strategy not in ALIGNERS:
        raise ValueError(f"strategy {strategy!r} is unknown: use one of {sorted(ALIGNERS)}")
    return ALIGNERS[strategy](teacher_logits, student_logits)


def vocabulary_table(tokenizer: Any) -> dict[int, str]:
    """The token string of every real id, added and special tokens included."""
    return {index: token for token, index in tokenizer.get_vocab().items()}


def vocabulary_digest(tokenizer: Any) -> str:
    """Content address of what every id stands for; equal for two of the same vocabulary."""
    return content_digest(json.dumps(sorted(tokenizer.get_vocab().items())))


def require_same_tokenizer(
    teacher_table: dict[int, str], student_table: dict[int, str], *, teacher: str, student: str
) -> None:
    """Refuse two tokenizers whose ids do not stand for the same tokens.

    Args:
        teacher_table: See `vocabulary_table`.
        student_table: Likewise.
        teacher: The teacher's name, for the message.
        student: The student's.

    Raises:
        ConchError: They differ; says how much and shows an example.
    """
    if teacher_table == student_table:
        return
    different = [
        index
        for index in sorted(teacher_table.keys() | student_table.keys())
        if teacher_table.get(index) != student_table.get(index)
    ]
    example = different[0]
    raise ConchError(
        f"teacher {teacher} ({len(teacher_table)} tokens) and student {student} "
        f"({len(student_table)} tokens) have different tokenizers: {len(different)} ids differ, "
        f"such as {example}, which is {teacher_table.get(example)!r} for the teacher and "
        f"{student_table.get(example)!r} for the student. Choose models of one family"
    )
