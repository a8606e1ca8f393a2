"""What a tokenizer's tokens say about the text inside them, for a reader with smaller tokens.

Knows two tokenizers; nothing of models. A teacher that gives `the` and `then` their probabilities
has also said what follows `th`.
"""

from functools import cached_property
from typing import Any

import numpy as np

from conch_dna.training.cross_tokenizer.token_bytes import TokenBytes, encode_all, token_spans

LONGEST_PREFIX = 32
CONTEXT = "\n"


class TokenInsides:
    """Prefixes of the teacher's tokens, and with which token the student goes on behind each.

    Args:
        teacher: The teacher's tokens.
        student: The student's.
        student_tokenizer: From transformers, or as mlx_lm wraps it.

    Attributes:
        prefixes: `[n, 33]`, int32: a number for the first k bytes of each of the teacher's
            tokens, the same for the same bytes; 0 where the token is shorter.
        lengths: `[n]`: bytes of each token.
        following: `[n, 33]`, int32: the student's token behind those bytes when it reads the
            teacher's token; -1 where it has no boundary there.
    """

    def __init__(self, teacher: TokenBytes, student: TokenBytes, student_tokenizer: Any) -> None:
        size = len(teacher.texts)
        self.lengths = np.fromiter(map(len, teacher.texts), np.int64, size)
        self.prefixes = np.zeros((size, LONGEST_PREFIX + 1), np.int32)
        self.following = np.full((size, LONGEST_PREFIX + 1), -1, np.int32)
        numbers: dict[bytes, int] = {}
        readable = []
        for token, piece in enumerate(teacher.texts):
            for length in range(1, min(len(piece), LONGEST_PREFIX) + 1):
                number = numbers.setdefault(piece[:length], len(numbers) + 1)
                self.prefixes[token, length] = number
            if len(piece) > 1:
                try:
                    readable.append((token, CONTEXT + piece.decode()))
                except UnicodeDecodeError:
                    continue
        encoded = encode_all(student_tokenizer, [text for _, text in readable])
        for (token, text), ids in zip(readable, encoded, strict=True):
            spans = token_spans(text.encode(), ids, student)
            places = spans.starts - len(CONTEXT)
            for at in np.flatnonzero((places > 0) & (places <= LONGEST_PREFIX) & spans.exact):
                self.following[token, places[at]] = ids[at]

    @cached_property
    def _beginners(self) -> dict[tuple[int, int], np.ndarray]:
        """By a prefix's number and length: the tokens that begin with it, itself included."""
        found: dict[tuple[int, int], np.ndarray] = {}
        for length in range(1, LONGEST_PREFIX + 1):
            column = self.prefixes[:, length]
            order = np.argsort(column, kind="stable")
            numbers, first = np.unique(column[order], return_index=True)
            for number, tokens in zip(numbers, np.split(order, first[1:]), strict=True):
                if number:
                    found[int(number), length] = tokens
        return found

    def beginning(self, own: int, read: int) -> np.ndarray:
        """Tokens whose first bytes are those of a token; none where more than 32 are asked for."""
        if not 1 <= read <= LONGEST_PREFIX:
            return np.zeros(0, np.int64)
        return self._beginners[int(self.prefixes[own, read]), read]

    def behind(
        self, read: np.ndarray, own: np.ndarray, kept: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What kept tokens say about a text of which the reader has read a part of one token.

        Args:
            read: Bytes read `[n]`.
            own: The token that the text really has there `[n]`.
            kept: Tokens that the teacher gave a probability `[n, K]`.

        Returns:
            `[n, K]`: the student's next token if the text goes on as the kept token does, or -1
            where it has no boundary there; whether the kept token goes on behind what was read,
            and whether it is exactly that, `[n, K]`, bool.
        """
        inside = (read >= 1) & (read <= LONGEST_PREFIX)
        place = np.where(inside, read, 0)
        wanted = self.prefixes[own, place]
        same = (self.prefixes[kept, place[:, None]] == wanted[:, None]) & (wanted > 0)[:, None]
        ended = same & (self.lengths[kept] == read[:, None])
        goes_on = same & ~ended
        following = np.where(goes_on, self.following[kept, place[:, None]], -1)
        return following, goes_on, ended
