"""Which tokens can follow which in the tokenization of a text.

Knows one tokenizer; nothing of models. A model that reads tokens knows from every boundary what
does not follow: after `th` not `e`, where `the` is a token. A model with other tokens does not.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from conch_dna.training.token_bytes import TokenBytes, encode_all

LONGEST_CLASS = 64


class TokenBoundaries:
    """Tells whether a text can go on, behind a token, with a token of some class.

    What was asked is remembered, so the tokenizer works for a pair only once.

    Args:
        tokenizer: From transformers, or as mlx_lm wraps it.
        table: Its tokens' bytes.
        roots: `[n]`: number of every token's class, -1 for none.
        classes: One more than the largest number.
    """

    def __init__(self, tokenizer: Any, table: TokenBytes, roots: np.ndarray, classes: int) -> None:
        self.tokenizer = tokenizer
        self.table = table
        self.size = classes
        self._known: dict[int, bool] = {}
        self._members: dict[int, list[int]] = {}
        for token in np.flatnonzero(roots >= 0).tolist():
            self._members.setdefault(int(roots[token]), []).append(token)
        for members in self._members.values():
            members.sort(key=lambda token: (len(table.pieces[token]), token))

    def possible(self, previous: np.ndarray, classes: np.ndarray) -> np.ndarray:
        """Whether behind each previous token a token of each class can begin.

        It can if the tokenizer leaves the previous token and some token of the class (of its 64
        shortest) as they are when it meets both together. A special token ends nothing, and of
        bytes that are no characters it cannot be told: everything can follow them.

        Args:
            previous: Ids `[n]`.
            classes: Numbers of classes `[n]`.

        Returns:
            `[n]`, bool.
        """
        keys, inverse = np.unique(previous * self.size + classes, return_inverse=True)
        unknown = [key for key in keys.tolist() if key not in self._known]
        if unknown:
            self._ask(unknown)
        known = np.fromiter((self._known[key] for key in keys.tolist()), bool, len(keys))
        return known[inverse]

    def _ask(self, keys: Sequence[int]) -> None:
        """Ask first about the shortest members, then about all those of classes that failed."""
        waiting = list(keys)
        for first, last, behind in ((0, 1, ""), (0, LONGEST_CLASS, ""), (0, LONGEST_CLASS, "x")):
            # With something behind it a space counts too that a tokenizer drops from the end.
            pairs = [
                (key, key // self.size, token)
                for key in waiting
                for token in self._members.get(key % self.size, [])[first:last]
            ]
            self._known |= dict.fromkeys(waiting, False)
            texts = [self._text(previous, token, behind) for _, previous, token in pairs]
            encoded = iter(encode_all(self.tokenizer, [text for text in texts if text]))
            for (key, previous, token), text in zip(pairs, texts, strict=True):
                if not text or (previous, token) in pairwise(next(encoded)):
                    self._known[key] = True
            waiting = [key for key in waiting if not self._known[key]]

    def _text(self, previous: int, token: int, behind: str) -> str:
        """Both tokens behind a line break; empty where nothing can be told."""
        if {previous, token} & self.table.special_ids:
            return ""
        try:
            both = (self.table.pieces[previous] + self.table.pieces[token]).decode()
        except UnicodeDecodeError:
            return ""
        return "\n" + both + behind
