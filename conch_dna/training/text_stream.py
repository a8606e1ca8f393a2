"""The text of an answer, piece by piece as its tokens come.

Knows a tokenizer and token ids; nothing of models or of where tokens come from. Pieces joined are
the text that `continuation_text` gives for the whole answer.
"""

from typing import Any

from conch_dna.training.answers import continuation_text

# Tokens that are decoded anew with each new one, and those before them that they lean on.
_WINDOW = 16
_CONTEXT = 8
_UNFINISHED = "\ufffd"


class TextStream:
    """Token ids in, pieces of text out.

    A piece is kept back while its last character may still lack bytes.

    Args:
        tokenizer: As mlx_lm wraps it.
        prompt: Token ids that the answer continues.
    """

    def __init__(self, tokenizer: Any, prompt: list[int]) -> None:
        self._tokenizer = tokenizer
        self._context = list(prompt)
        self._window: list[int] = []
        self._given = ""

    def add(self, token: int) -> str:
        """The text that a token makes certain, often empty."""
        self._window.append(token)
        text = self._text()
        if text.endswith(_UNFINISHED) or not text.startswith(self._given):
            return ""
        piece = text[len(self._given) :]
        self._given = text
        if len(self._window) >= _WINDOW:
            self._context = [*self._context, *self._window][-_CONTEXT:]
            self._window, self._given = [], ""
        return piece

    def end(self) -> str:
        """What was kept back, unfinished characters included."""
        return self._text()[len(self._given) :] if self._window else ""

    def _text(self) -> str:
        return continuation_text(self._tokenizer, self._context, self._window)
