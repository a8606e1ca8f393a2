"""Which tokens of two tokenizers cover the same text, and the ways to teach across them.

Knows byte spans of tokens; nothing of what the tokens mean, of models or of losses. To add a way:
its name in ALIGNMENTS, a kind of `targets.AlignedTargets`, and its entry in `examples.KINDS`.
"""

from dataclasses import dataclass

import numpy as np

from conch_dna.training.cross_tokenizer.token_bytes import TokenSpans

AUTO = "auto"
INDEX = "index"
# Over classes of tokens, and by the likelihoods of chunks.
ALIGNMENTS = ("alm", "roots")
# Only within the package: where two teachers are blended.
SHARED_TOKENS = "shared tokens"


@dataclass(frozen=True, eq=False)
class Alignment:
    """The chunks of a text between neighbouring boundaries that both tokenizations have.

    Attributes:
        teacher: `[C, 2]`, int64: the first of the teacher's tokens in each chunk, and one after
            the last.
        student: `[C, 2]`, int64: the same for the student's tokens.
    """

    teacher: np.ndarray
    student: np.ndarray

    @property
    def one_to_one(self) -> np.ndarray:
        """`[C]`, bool: the chunk is one token on both sides."""
        single: np.ndarray = (np.diff(self.teacher) == 1) & (np.diff(self.student) == 1)
        return single[:, 0]

    def __len__(self) -> int:
        return len(self.teacher)


def align_spans(teacher: TokenSpans, student: TokenSpans) -> Alignment:
    """Cut both tokenizations of one text at the boundaries they have in common.

    A chunk is kept only if all its tokens, on both sides, are exact and follow each other
    without a gap; what else there is stays uncovered.

    Args:
        teacher: Where the teacher's tokens lie in the text.
        student: Where the student's tokens lie in the same text.
    """
    teacher_keys, student_keys = _keys(teacher.ends), _keys(student.ends)
    at = np.searchsorted(student_keys, teacher_keys)
    at[at == len(student_keys)] = -1
    common = np.flatnonzero(student_keys[at] == teacher_keys) if len(student_keys) else at[:0]
    teacher_ranges, student_ranges = _ranges(common), _ranges(at[common])
    sound = _unbroken(teacher, teacher_ranges) & _unbroken(student, student_ranges)
    sound &= teacher.starts[teacher_ranges[:, 0]] == student.starts[student_ranges[:, 0]]
    return Alignment(teacher_ranges[sound], student_ranges[sound])


def _keys(ends: np.ndarray) -> np.ndarray:
    """Ends made different: tokens without text end where the one before them does."""
    keys: np.ndarray = ends * 2**20 + rank_within(ends)
    return keys


def rank_within(groups: np.ndarray) -> np.ndarray:
    """How many of its group stand before each element, of groups in ascending order.

    >>> rank_within(np.array([3, 3, 5, 8, 8, 8])).tolist()
    [0, 1, 0, 0, 1, 2]
    """
    ranks: np.ndarray = np.arange(len(groups)) - np.searchsorted(groups, groups)
    return ranks


def _ranges(last: np.ndarray) -> np.ndarray:
    ranges = np.empty((len(last), 2), np.int64)
    ranges[:, 1] = last + 1
    ranges[:1, 0] = 0
    ranges[1:, 0] = ranges[:-1, 1]
    return ranges


def _unbroken(spans: TokenSpans, ranges: np.ndarray) -> np.ndarray:
    """Whether all tokens of each range are exact and each begins where the one before ends."""
    # A running count: before token i stands entry 2i, behind it entry 2i + 1.
    breaks = np.zeros(2 * len(spans.ends), np.int64)
    breaks[2::2] = spans.starts[1:] != spans.ends[:-1]
    breaks[1::2] = ~spans.exact
    breaks = np.cumsum(breaks)
    unbroken: np.ndarray = breaks[2 * ranges[:, 0]] == breaks[2 * ranges[:, 1] - 1]
    return unbroken
