"""A prompt's token ids, judged before a model sees them: its size, and the head's rows.

Knows tokenizers and what a model's folder tells; runs no model. Another thing that a prompt must
keep to before it is computed: a line in `checked_prompt`.
"""

import json
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from conch_dna.errors import ConchError
from conch_dna.language_model import ModelSource
from conch_dna.training.chats.conversations import prompt_ids, prompt_messages, text_ids
from conch_dna.training.chats.templates import Turn, render
from conch_dna.training.cross_tokenizer.token_bytes import token_bytes

# Bytes that UTF-8 has.
_BYTES = (*range(0xC0), *range(0xC2, 0xF5))
# Canonical composition makes three bytes of at most twelve.
_COMPOSED = 4
_ASCII_SPACES = b"\t\n\v\f\r\x1c\x1d\x1e\x1f "
# A pattern that matches nothing but spaces.
_SPACES = re.compile(r"(?:\\[Az]|[ +*|{}0-9,^$])*")


def checked_prompt(
    source: ModelSource,
    turns: Sequence[Turn],
    name: str,
    *,
    tools: Sequence[Turn] | None = None,
) -> list[int]:
    """Token ids of a conversation that a model continues with its answer.

    A text that cannot fit into the context is not tokenised, which may take a second.

    Args:
        source: The model's.
        turns: As `prompt_turns` gives them.
        name: What messages call the prompt.
        tools: See `render`.

    Raises:
        ConchError: It has more bytes than the context's tokens could stand for, or a token for
            which the model has no row.
    """
    tokenizer = source.tokenizer
    calls = [turn["tool_calls"] for turn in turns if "tool_calls" in turn]
    parts = map(json.dumps, [*calls, *(tools or ())])
    if _too_large(source, [*(turn["content"] for turn in turns), *parts]):
        texts = [turn["content"] for turn in turns]
        if tokenizer.has_chat_template:
            # Templates may leave parts out.
            messages = prompt_messages(tokenizer, turns, "")
            texts = [render(tokenizer, messages, generation_prompt=True, tools=tools)]
        _require_size(source, texts, name)
    ids = prompt_ids(tokenizer, turns, "", tools=tools)
    source.require_rows(ids, name)
    return ids


def checked_text(source: ModelSource, text: str, name: str) -> list[int]:
    """Token ids of a text that a model continues as it is; see `checked_prompt`."""
    _require_size(source, [text], name)
    ids = text_ids(source.tokenizer, text)
    source.require_rows(ids, name)
    return ids


def _most_bytes(source: ModelSource) -> int | None:
    """Most bytes that the context's tokens can stand for; None where that is not known."""
    context, longest = source.context_length, longest_token(source.tokenizer)
    return None if context is None or longest is None else context * longest


def _too_large(source: ModelSource, texts: Sequence[str]) -> bool:
    most = _most_bytes(source)
    return most is not None and _size(texts) > most


def _require_size(source: ModelSource, texts: Sequence[str], name: str) -> None:
    """Refuse texts of more bytes than the context's tokens can stand for."""
    if _too_large(source, texts):
        raise ConchError(
            f"{name} has {_size(texts):,} bytes without its spaces, and the context of "
            f"{source.model_id} ends at {source.context_length} tokens, each of at most "
            f"{longest_token(source.tokenizer)} bytes: shorten it"
        )


@lru_cache(maxsize=4)
def longest_token(tokenizer: Any) -> int | None:
    """Most bytes of a text, spaces left out, that one token can stand for.

    None where that is not known: where an unknown word of any length is one token, or the
    tokenizer may drop parts of the text.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    table = token_bytes(tokenizer)
    pieces = set(table.pieces)
    takes_all_bytes = table.kind == "byte-level" or getattr(backend.model, "byte_fallback", False)
    if not takes_all_bytes or any(bytes([value]) not in pieces for value in _BYTES):
        return None
    if backend.pre_tokenizer and b'"Removed"' in backend.pre_tokenizer.__getstate__():
        return None
    state = json.loads(backend.normalizer.__getstate__()) if backend.normalizer else {}
    steps = state.get("normalizers", [state] if state else [])
    if not all(_keeps_all(step) for step in steps):
        return None
    composed = any(step["type"] == "NFC" for step in steps)
    return max(map(len, pieces)) * (_COMPOSED if composed else 1)


def _keeps_all(step: dict[str, Any]) -> bool:
    """Whether a normaliser shortens a text by its spaces alone, or by composing characters."""
    if step["type"] == "Replace":
        pattern = step["pattern"].get("Regex", step["pattern"].get("String"))
        return _SPACES.fullmatch(pattern) is not None
    return step["type"] in ("Prepend", "ByteLevel", "NFC")


def _size(texts: Iterable[str]) -> int:
    """Bytes of texts without their spaces, of which a tokenizer may drop any number."""
    size = 0
    for text in texts:
        written = text.encode().translate(None, _ASCII_SPACES)
        # Of a megabyte of words, ten times as slow.
        size += len(written) if text.isascii() else len("".join(text.split()).encode())
    return size
