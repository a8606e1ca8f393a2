"""Words that no teacher may teach: which tokens would finish one, at every place of a text.

Knows a tokenizer's bytes; nothing of models or training. A word may be written by many tokens,
so what is excluded depends on what stands before: behind `ta` it is `boo`.
"""

import re
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

from conch_dna.errors import ConchError
from conch_dna.training.cross_tokenizer.token_bytes import token_bytes

WORD_BYTE = rb"[0-9A-Za-z_\x80-\xff]"
FEW_EXAMPLES = 5


class TabooTokens:
    """Tells which tokens spell taboo words, however a tokenizer cuts them.

    A word counts as it is written, in lower case, in upper case and with a capital, where no
    letter or digit stands before it. A token that ends with the word is excluded although the next
    one might make a longer word of it.

    Args:
        tokenizer: From transformers, or as mlx_lm wraps it.
        words: Without spaces around them; inside, they may have some.
        ids: Tokens that are excluded everywhere.

    Raises:
        ConchError: A word is empty or an id is no token's.
    """

    def __init__(self, tokenizer: Any, words: Iterable[str] = (), ids: Iterable[int] = ()) -> None:
        self.texts = token_bytes(tokenizer).texts
        self.ids = np.unique(np.array([int(i) for i in ids], np.int64))
        outside = self.ids[(self.ids < 0) | (self.ids >= len(self.texts))]
        if len(outside):
            raise ConchError(
                f"taboo ids {', '.join(map(str, outside[:FEW_EXAMPLES]))} are no tokens: the "
                f"tokenizer's go from 0 to {len(self.texts) - 1}"
            )
        spellings: set[bytes] = set()
        for word in words:
            if not word.strip():
                raise ConchError(f"taboo word {word!r} is empty: it would exclude everything")
            plain = word.strip()
            forms = (plain, plain.lower(), plain.upper(), plain[:1].upper() + plain[1:])
            spellings |= {form.encode() for form in forms}
        self.spellings = sorted(spellings)
        self.longest = max(map(len, self.spellings), default=0)
        self._after = lru_cache(maxsize=65536)(self._finishing)
        self._beginning = lru_cache(maxsize=4096)(self._starting)
        joined = b"|".join(re.escape(s) for s in sorted(self.spellings, key=len, reverse=True))
        self._word = re.compile(
            b"(?<!" + WORD_BYTE + b")(?:" + joined + b")(?!" + WORD_BYTE + b")", re.DOTALL
        )

    def __bool__(self) -> bool:
        return bool(self.spellings) or len(self.ids) > 0

    def after(self, text: bytes) -> np.ndarray:
        """Tokens that would finish a taboo word behind a text, and those excluded everywhere.

        Args:
            text: What stands before; only its end matters.

        Returns:
            Ids `[m]`, ascending.
        """
        return self._after(text[-(self.longest + 1) :] if self.longest else b"")

    def _finishing(self, text: bytes) -> np.ndarray:
        if not self.spellings:
            return self.ids
        begun = [s[k:] for s in self.spellings for k in range(1, len(s)) if _ends(text, s[:k])]
        if not text or not re.match(WORD_BYTE, text[-1:]):
            begun += self.spellings
        tokens = set(self._inside)
        for rest in begun:
            tokens.update(self._beginning(rest))
        return np.union1d(self.ids, np.array(sorted(tokens), np.int64))

    @cached_property
    def _inside(self) -> tuple[int, ...]:
        """Tokens with a whole word inside, behind something that is no letter."""
        return tuple(token for token, text in enumerate(self.texts) if self._word.search(text, 1))

    def _starting(self, rest: bytes) -> tuple[int, ...]:
        """Tokens that begin with the rest of a word and go on with no letter."""
        return tuple(
            token
            for token, text in enumerate(self.texts)
            if text.startswith(rest) and not re.match(WORD_BYTE, text[len(rest) : len(rest) + 1])
        )

    def excluded(self, ids: Sequence[int]) -> list[np.ndarray]:
        """For each token of a text the tokens that may not stand there."""
        before = b""
        by_place = []
        for token in ids:
            by_place.append(self.after(before))
            before = (before + self.texts[int(token)])[-(self.longest + 1) :]
        return by_place

    def spelled(self, ids: Sequence[int]) -> np.ndarray:
        """Which tokens of a text write a part of a taboo word, `[T]`, bool."""
        numbers = np.asarray(ids, np.int64)
        marks = np.isin(numbers, self.ids)
        if not self.spellings:
            return marks
        lengths = np.array([len(self.texts[token]) for token in numbers], np.int64)
        ends = np.cumsum(lengths)
        text = b"".join(self.texts[token] for token in numbers)
        for match in self._word.finditer(text):
            marks |= (ends > match.start()) & (ends - lengths < match.end()) & (lengths > 0)
        return marks


def _ends(text: bytes, begun: bytes) -> bool:
    """Whether a text ends with the beginning of a word, and no letter stands before that."""
    before = text[: len(text) - len(begun)]
    return text.endswith(begun) and not re.match(WORD_BYTE, before[-1:])


def mask_taboo_tokens(logits: mx.array, excluded: Sequence[np.ndarray] | np.ndarray) -> mx.array:
    """Exclude tokens from distributions: a logit of -inf, so that the others share what was theirs.

    Multiplying a logit by 0 would not exclude it: 0 is a logit like any other.

    Args:
        logits: `[V]` or `[T, V]`, logits or log-probabilities.
        excluded: Ids for all rows, or one array of them for each row.

    Returns:
        The same shape and dtype.

    Raises:
        ValueError: Not one array for each row.
    """
    if isinstance(excluded, np.ndarray):
        rows = [excluded] * (1 if logits.ndim == 1 else logits.shape[0])
    else:
        rows = list(excluded)
    if logits.ndim == 2 and len(rows) != logits.shape[0]:
        raise ValueError(f"{len(rows)} lists of excluded tokens for {logits.shape[0]} rows")
    mask = np.zeros((len(rows), logits.shape[-1]), bool)
    for row, tokens in enumerate(rows):
        mask[row, tokens] = True
    return mx.where(mx.array(mask.reshape(logits.shape)), mx.array(-mx.inf, logits.dtype), logits)
