"""Which token of one tokenizer is which of another, and which of them form a class.

Knows the bytes of tokens and, for heads of unequal size, arrays of logits; nothing of texts,
models or training.
To add a strategy for such heads: a branch in `align_vocab_sizes` and its name in STRATEGIES.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import mlx.core as mx
import numpy as np

from conch_dna.checkpoints import content_digest
from conch_dna.errors import ConchError
from conch_dna.losses import log_softmax
from conch_dna.training.cross_tokenizer.token_bytes import (
    TokenBytes,
    TokenInsides,
    encode_all,
    token_bytes,
    token_spans,
)

SAME = "same"
SAME_UP_TO_PADDING = "same up to padding rows"
DIFFERENT = "different"
EXAMPLES = 5
MOST_BEGINNERS = 512
STRATEGIES = ("project", "truncate")
# Texts that a token may be put behind to see how another tokenizer would go on.
CONTEXTS = ("\n", "a", ".", "1", "")
# By tokenizer: it takes 0.15 s for 49,000 tokens, and is asked for with each record.
_DIGESTS: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def vocabulary_digest(tokenizer: Any) -> str:
    """Content address of what every id stands for; equal for two of the same vocabulary.

    Tokens that are added to the tokenizer afterwards are not seen.
    """
    if tokenizer not in _DIGESTS:
        _DIGESTS[tokenizer] = content_digest(json.dumps(sorted(tokenizer.get_vocab().items())))
    return _DIGESTS[tokenizer]


@dataclass(frozen=True, kw_only=True)
class TokenizerComparison:
    """What two tokenizers have in common.

    Attributes:
        verdict: "same", when every id stands for the same bytes in both; "same up to padding
            rows", when besides one head has more rows than the other; or "different".
        teacher_kind: How the teacher's tokens are written, a key of `token_bytes.KINDS`.
        student_kind: How the student's are.
        teacher_tokens: Real tokens of the teacher.
        student_tokens: Real tokens of the student.
        teacher_rows: Rows of the teacher's head; None where they are not known.
        student_rows: Rows of the student's head; None where they are not known.
        shared_tokens: Teacher's tokens that the student has too, with the same bytes at any id.
        same_ids: Ids that stand for the same bytes in both.
        shared_examples: Some of the shared tokens.
        teacher_examples: Some that only the teacher has.
        student_examples: Some that only the student has.
        id_examples: Some ids that differ: id, the teacher's bytes, the student's.
    """

    verdict: str
    teacher_kind: str
    student_kind: str
    teacher_tokens: int
    student_tokens: int
    teacher_rows: int | None
    student_rows: int | None
    shared_tokens: int
    same_ids: int
    shared_examples: tuple[str, ...]
    teacher_examples: tuple[str, ...]
    student_examples: tuple[str, ...]
    id_examples: tuple[tuple[int, str, str], ...]


def compare_tokenizers(
    teacher: Any,
    student: Any,
    *,
    teacher_rows: int | None = None,
    student_rows: int | None = None,
) -> TokenizerComparison:
    """Tell whether two tokenizers are the same, from the bytes of every id.

    Args:
        teacher: A tokenizer from transformers, or as mlx_lm wraps it.
        student: Another one.
        teacher_rows: Rows of the teacher's head, to tell padding.
        student_rows: Rows of the student's head.
    """
    first, second = token_bytes(teacher), token_bytes(student)
    size = max(len(first.pieces), len(second.pieces))
    differing = [i for i in range(size) if _piece(first, i) != _piece(second, i)]
    same_rows = teacher_rows is None or student_rows is None or teacher_rows == student_rows
    shared = shared_tokens(first, second)
    common = np.flatnonzero(shared >= 0)
    only_teacher = np.flatnonzero((shared < 0) & first.exists)
    only_student = np.setdiff1d(np.flatnonzero(second.exists), shared)
    return TokenizerComparison(
        verdict=DIFFERENT if differing else SAME if same_rows else SAME_UP_TO_PADDING,
        teacher_kind=first.kind,
        student_kind=second.kind,
        teacher_tokens=first.count,
        student_tokens=second.count,
        teacher_rows=teacher_rows,
        student_rows=student_rows,
        shared_tokens=len(common),
        same_ids=int(first.exists.sum()) - sum(_piece(first, i) is not None for i in differing),
        shared_examples=_shown(first, common),
        teacher_examples=_shown(first, only_teacher),
        student_examples=_shown(second, only_student),
        id_examples=tuple(
            (i, shown_bytes(_piece(first, i)), shown_bytes(_piece(second, i)))
            for i in _spread(differing)
        ),
    )


def same_tokens(teacher: TokenBytes, student: TokenBytes) -> bool:
    """Whether every id stands for the same bytes in both."""
    return teacher.pieces == student.pieces and np.array_equal(teacher.exists, student.exists)


def _piece(table: TokenBytes, index: int) -> bytes | None:
    exists = index < len(table.pieces) and table.exists[index]
    return table.pieces[index] if exists else None


def shown_bytes(piece: bytes | None) -> str:
    """Bytes for people: quoted text, or hexadecimal where they are no whole characters."""
    if piece is None:
        return "nothing"
    try:
        return repr(piece.decode())
    except UnicodeDecodeError:
        return f"bytes {piece.hex(' ')}"


def _spread(indices: Sequence[int]) -> list[int]:
    """A few of many, evenly spread."""
    count = min(EXAMPLES, len(indices))
    return [int(indices[(2 * part + 1) * len(indices) // (2 * count)]) for part in range(count)]


def _shown(table: TokenBytes, indices: np.ndarray) -> tuple[str, ...]:
    return tuple(shown_bytes(table.pieces[i]) for i in _spread(indices.tolist()))


def shared_tokens(teacher: TokenBytes, student: TokenBytes) -> np.ndarray:
    """For each of the teacher's ids the student's id of the same token, or -1.

    Tokens are the same when their bytes are, special ones when their names are; the
    end-of-sequence tokens are the same whatever they are called. No two ids share one.

    Returns:
        `[n]` int64, n the teacher's largest id plus one.
    """
    shared = np.full(len(teacher.pieces), -1, np.int64)
    partners = set()

    def join(first: int, second: int | None) -> None:
        if second is not None and shared[first] < 0 and second not in partners:
            shared[first] = second
            partners.add(second)

    if teacher.end_id is not None:
        join(teacher.end_id, student.end_id)
    names = {student.pieces[i]: i for i in student.special_ids}
    for index in teacher.special_ids:
        join(index, names.get(teacher.pieces[index]))
    for piece, index in teacher.ids.items():
        join(index, student.ids.get(piece))
    # What is left stands for the same bytes as another id, and no text is made of it.
    both = np.flatnonzero(teacher.exists[: len(student.exists)] & student.exists[: len(shared)])
    for index in set(both.tolist()) - teacher.special_ids - student.special_ids:
        if teacher.pieces[index] == student.pieces[index]:
            join(index, index)
    return shared


@dataclass(frozen=True, eq=False)
class VocabProjection:
    """The sparse map of one vocabulary's distribution into another's; all mass is kept.

    The matrix has a single 1 per row, so it is stored as the column of each row.

    Attributes:
        targets: `[n]`, int64: the student's id that takes the probability of each teacher's id.
        size: Columns: the student's largest id plus one.
    """

    targets: np.ndarray
    size: int


def build_vocab_projection(teacher_tokenizer: Any, student_tokenizer: Any) -> VocabProjection:
    """Map every token of the teacher to the token with which the student would begin it.

    A shared token goes to itself. Another is tokenized by the student, and its probability goes
    to the first piece: what the student has to predict next if the text goes on with it.

    Args:
        teacher_tokenizer: From transformers, or as mlx_lm wraps it.
        student_tokenizer: The tokenizer of the model that is to predict its own tokens.

    Raises:
        ConchError: The student has neither a token for the beginning of one of the teacher's
            tokens nor an unknown token.

    Source: the retokenising projection of X-Token (NVIDIA NeMo RL), with all weight on the
        first piece.
    """
    teacher, student = token_bytes(teacher_tokenizer), token_bytes(student_tokenizer)
    targets = first_pieces(teacher, student, student_tokenizer)
    missing = [i for i in np.flatnonzero(targets < 0) if teacher.exists[i]]
    unknown = student_tokenizer.unk_token_id
    if missing and unknown is None:
        raise ConchError(
            f"the student's tokenizer cannot spell {shown_bytes(teacher.pieces[missing[0]])} and "
            f"{len(missing) - 1} more of the teacher's tokens: use a student that can, or "
            "`conch-dna distill`, which compares texts"
        )
    targets[targets < 0] = unknown if unknown is not None else 0
    return VocabProjection(targets, len(student.pieces))


def first_pieces(teacher: TokenBytes, student: TokenBytes, student_tokenizer: Any) -> np.ndarray:
    """The student's first token of what each of the teacher's tokens stands for; -1 for none.

    Returns:
        `[n]` int64, n the teacher's largest id plus one.
    """
    firsts = shared_tokens(teacher, student)
    for index in np.flatnonzero((firsts < 0) & teacher.exists):
        firsts[index] = student.ids.get(teacher.pieces[index], -1)
    for context in CONTEXTS:
        waiting, texts = [], []
        for index in np.flatnonzero((firsts < 0) & teacher.exists):
            try:
                texts.append(context + teacher.pieces[index].decode())
            except UnicodeDecodeError:
                continue
            waiting.append(index)
        encoded = encode_all(student_tokenizer, texts)
        for index, text, ids in zip(waiting, texts, encoded, strict=True):
            spans = token_spans(text.encode(), ids, student)
            place = np.flatnonzero((spans.starts == len(context.encode())) & spans.exact)
            place = place[spans.ends[place] > spans.starts[place]]
            if len(place):
                firsts[index] = ids[place[0]]
    # Pieces of characters, and what the tokenizer rewrites: the longest token it begins with.
    for index in np.flatnonzero((firsts < 0) & teacher.exists):
        piece = teacher.pieces[index]
        beginnings = (student.ids.get(piece[:n]) for n in range(len(piece), 0, -1))
        firsts[index] = next((i for i in beginnings if i is not None), -1)
    return firsts


def align_vocab_sizes(
    teacher_logits: mx.array,
    student_logits: mx.array,
    strategy: str = "truncate",
    projection: VocabProjection | None = None,
) -> tuple[mx.array, mx.array]:
    """Bring two heads to the same tokens, so that they can be compared by index.

    Heads are often padded to a round number of rows. "truncate" keeps the rows that both have;
    this is right only when both tokenizers are the same, since then the rows it drops belong to
    no token (`compare_tokenizers` tells). "project" moves the teacher's probabilities to the
    student's tokens and keeps their sum.

    Args:
        teacher_logits: `[..., V_teacher]`.
        student_logits: `[..., V_student]`.
        strategy: One of STRATEGIES.
        projection: For "project", see `build_vocab_projection`. With "truncate" it is refused:
            who has a projection has different tokenizers.

    Returns:
        Both, with a last axis of the same size; "project" gives the teacher's as
        log-probabilities, -inf where no token of the teacher goes.

    Raises:
        ValueError: The strategy is unknown, or the projection is missing, does not fit, or
            is given to "truncate".

    >>> teacher, student = align_vocab_sizes(mx.zeros((2, 152064)), mx.zeros((2, 151936)))
    >>> teacher.shape == student.shape == (2, 151936)
    True
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy {strategy!r} is unknown: use one of {list(STRATEGIES)}")
    if strategy == "truncate":
        if projection is not None:
            raise ValueError(
                "a projection means different tokenizers, whose heads must not be cut by index: "
                "use strategy 'project', or leave the projection out to cut them all the same"
            )
        size = min(teacher_logits.shape[-1], student_logits.shape[-1])
        return teacher_logits[..., :size], student_logits[..., :size]
    if projection is None:
        raise ValueError("strategy 'project' needs a projection: make it by build_vocab_projection")
    real = len(projection.targets)
    if teacher_logits.shape[-1] < real or student_logits.shape[-1] < projection.size:
        raise ValueError(
            f"the projection is from {real} to {projection.size} tokens, but the heads have "
            f"{teacher_logits.shape[-1]} and {student_logits.shape[-1]} rows: they belong to "
            "other tokenizers"
        )
    probabilities = mx.exp(log_softmax(teacher_logits[..., :real]))
    columns = mx.array(projection.targets.astype(np.int32))
    projected = mx.zeros((*teacher_logits.shape[:-1], projection.size))
    projected = projected.at[..., columns].add(probabilities)
    return mx.log(projected), student_logits[..., : projection.size]


def common_roots(
    teacher_tokenizer: Any,
    student_tokenizer: Any,
    tables: tuple[TokenBytes, TokenBytes] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Put every token of both vocabularies into the class of the shared token it begins with.

    A shared token is its own root. Any other goes to the root of the first piece that the other
    tokenizer makes of it, again and again until a shared token is reached. The probabilities of
    a class then say the same on both sides: that the text goes on with the root.

    Args:
        teacher_tokenizer: From transformers, or as mlx_lm wraps it.
        student_tokenizer: Of the same kind.
        tables: The bytes of their tokens, where some do not count; else of all.

    Returns:
        For each of the teacher's ids and for each of the student's the *student's* id of the
        root, or -1 where there is none.
    """
    teacher, student = tables or (token_bytes(teacher_tokenizer), token_bytes(student_tokenizer))
    shared = shared_tokens(teacher, student)
    back = np.full(len(student.pieces), -1, np.int64)
    back[shared[shared >= 0]] = np.flatnonzero(shared >= 0)
    of_teacher = np.where(shared >= 0, shared, first_pieces(teacher, student, student_tokenizer))
    of_student = first_pieces(student, teacher, teacher_tokenizer)
    own = np.arange(len(back))
    # The student's next token on the way to the root, from the student's token.
    step = np.where(back >= 0, own, np.where(of_student >= 0, of_teacher[of_student], -1))
    roots = own
    for _ in range(max(map(len, student.pieces), default=0)):
        roots = np.where(roots >= 0, step[roots], -1)
    roots = np.where((roots >= 0) & (back[roots] >= 0), roots, -1)
    return np.where(of_teacher >= 0, roots[of_teacher], -1), roots


class Members(NamedTuple):
    """Tokens of the student that begin alike, and the class of what follows in each.

    Attributes:
        tokens: `[m]`.
        classes: `[m]`: a root, or -1 for a token that ends there, or where the teacher has no
            boundary.
    """

    tokens: np.ndarray
    classes: np.ndarray

    def where(self, chosen: np.ndarray) -> "Members":
        """Some of them, chosen by a bool for each `[m]`."""
        return Members(self.tokens[chosen], self.classes[chosen])

    @classmethod
    def joined(cls, parts: Sequence["Members"]) -> "Members":
        """All of some, behind each other."""
        return cls(*map(np.concatenate, zip(NO_MEMBERS, *parts, strict=True)))


NO_MEMBERS = Members(np.zeros(0, np.int64), np.zeros(0, np.int64))


class TokenClasses:
    """The classes of two vocabularies, and which tokens say something about which class.

    Args:
        tokenizers: The teacher's and the student's.
        tables: The bytes of their tokens.
        shared: The student's id of each of the teacher's tokens that both have, or -1.

    Attributes:
        teacher_roots: The root of each of the teacher's tokens, an id of the student's, or -1.
        student_roots: The root of each of the student's tokens.
    """

    def __init__(
        self,
        tokenizers: tuple[Any, Any],
        tables: tuple[TokenBytes, TokenBytes],
        shared: np.ndarray,
    ) -> None:
        self.tokenizers = tokenizers
        self.tables = tables
        self.shared = shared
        self.teacher_roots, self.student_roots = common_roots(*tokenizers, tables)
        self._members: dict[tuple[int, int], Members] = {}

    @cached_property
    def teacher_insides(self) -> TokenInsides:
        """What the teacher's tokens say to the student."""
        return TokenInsides(*self.tables, self.tokenizers[1])

    @cached_property
    def student_insides(self) -> TokenInsides:
        """What the student's tokens say to the teacher."""
        return TokenInsides(*self.tables[::-1], self.tokenizers[0])

    @cached_property
    def teacher_has(self) -> np.ndarray:
        """Whether the teacher has each of the student's tokens."""
        has = np.zeros(len(self.tables[1].pieces), bool)
        has[self.shared[self.shared >= 0]] = True
        return has

    def beginning(self, token: int, length: int) -> Members:
        """The student's tokens that begin with the first bytes of one of them."""
        if (token, length) not in self._members:
            insides = self.student_insides
            tokens = insides.beginning(token, length)
            following = insides.following[tokens, length] if len(tokens) else tokens
            classes = np.where(following >= 0, self.teacher_roots[following], -1)
            self._members[token, length] = Members(tokens, classes)
        return self._members[token, length]

    def reaching_over(self, token: int, *, shared_before: bool) -> Members:
        """A token of the student and those that begin with it; none for -1.

        Args:
            token: The student's, which ended at a boundary.
            shared_before: Leave out the longer ones that the teacher has too.
        """
        if token < 0:
            return NO_MEMBERS
        members = self.beginning(token, int(self.student_insides.lengths[token]))
        if not shared_before:
            return members
        return members.where(~self.teacher_has[members.tokens] | (members.tokens == token))

    def inside(self, token: int, length: int) -> Members:
        """Of the tokens that begin alike those of the token's class; none of more than 512."""
        members = self.beginning(token, length)
        same = self.student_roots[members.tokens] == self.student_roots[token]
        return members.where(same) if same.sum() <= MOST_BEGINNERS else NO_MEMBERS
