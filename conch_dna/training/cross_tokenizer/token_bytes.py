"""The bytes of every token, where tokens lie in a text, and what lies inside them.

Knows tokenizers and bytes; nothing of models, classes of tokens or training.
To read another way of writing tokens: a branch in `_spelling` and its line in KINDS.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from conch_dna.errors import ConchError

KINDS = {
    "byte-level": "byte-level BPE: every token is bytes, written in a printable alphabet",
    "sentencepiece": "SentencePiece: ▁ is a space, <0xNN> a byte",
    "wordpiece": "WordPiece: ## goes on with a word, all others begin one",
    "suffix": "BPE with a mark behind the last token of a word",
    "plain": "tokens are written as they are",
}
SPACE_MARK = "\u2581"
LONGEST_PREFIX = 32
# A token is read behind it, so that no space is put in front of it.
CONTEXT = "\n"


@dataclass(frozen=True, eq=False)
class TokenBytes:
    """What every id of a tokenizer stands for, as bytes.

    Attributes:
        kind: A key of KINDS.
        pieces: Bytes of every id, its place in the tuple; a special token's are its name's,
            those of an id that does not exist are empty.
        exists: `[n]`, bool: whether the tokenizer has the id.
        special_ids: Tokens that stand for no text, such as the end of a sequence.
        byte_ids: Tokens that SentencePiece writes as `<0xNN>`.
        end_id: The end-of-sequence token, or None.
        adds_space: Whether encoding puts a space before the text.
    """

    kind: str
    pieces: tuple[bytes, ...]
    exists: np.ndarray
    special_ids: frozenset[int]
    byte_ids: frozenset[int]
    end_id: int | None
    adds_space: bool

    @cached_property
    def ids(self) -> dict[bytes, int]:
        """The id of every ordinary token by its bytes.

        Where two stand for the same bytes, such as `A` and `<0x41>`, it is the one that is not
        written as a byte, since texts are made of that one.
        """
        order = sorted(range(len(self.pieces)), key=lambda index: index in self.byte_ids)
        ids: dict[bytes, int] = {}
        for index in order:
            if self.pieces[index] and index not in self.special_ids:
                ids.setdefault(self.pieces[index], index)
        return ids

    @property
    def count(self) -> int:
        """Real tokens."""
        return int(self.exists.sum())

    @cached_property
    def texts(self) -> tuple[bytes, ...]:
        """The text of every id: its piece, or nothing where it is special."""
        special = self.special_ids
        return tuple(b"" if i in special else piece for i, piece in enumerate(self.pieces))

    def below(self, rows: int) -> "TokenBytes":
        """The table for a model with so many rows: ids from there on do not exist to it."""
        if rows >= len(self.pieces):
            return self
        return replace(
            self,
            pieces=tuple(p if i < rows else b"" for i, p in enumerate(self.pieces)),
            exists=self.exists & (np.arange(len(self.pieces)) < rows),
            special_ids=frozenset(i for i in self.special_ids if i < rows),
            byte_ids=frozenset(i for i in self.byte_ids if i < rows),
            end_id=self.end_id if self.end_id is not None and self.end_id < rows else None,
        )


@lru_cache(maxsize=4)
def token_bytes(tokenizer: Any) -> TokenBytes:
    """Read what every id of a tokenizer stands for.

    Args:
        tokenizer: From transformers, or as mlx_lm wraps it.

    Raises:
        ConchError: It has no vocabulary to read.
    """
    try:
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        added = dict(tokenizer.added_tokens_decoder)
    except (AttributeError, NotImplementedError, TypeError) as error:
        raise ConchError(
            f"tokenizer {type(tokenizer).__name__} does not list its tokens, so it cannot be "
            "compared: use a model with a tokenizer.json"
        ) from error
    if not vocabulary:
        raise ConchError("the tokenizer has no tokens: its files are not complete")
    kind, mark = _kind(tokenizer, vocabulary)
    size = max(vocabulary.values()) + 1
    pieces = [b""] * size
    exists = np.zeros(size, bool)
    byte_ids = set()
    special_ids = {int(i) for i in tokenizer.all_special_ids}
    special_ids |= {int(i) for i, token in added.items() if token.special}
    for token, index in vocabulary.items():
        exists[index] = True
        if index in special_ids or index in added:
            pieces[index] = token.encode("utf-8", "surrogatepass")
        else:
            pieces[index] = _spelling(token, kind, mark)
            if kind == "sentencepiece" and _byte_value(token) is not None:
                byte_ids.add(index)
    end = tokenizer.eos_token_id
    return TokenBytes(
        kind=kind,
        pieces=tuple(pieces),
        exists=exists,
        special_ids=frozenset(special_ids),
        byte_ids=frozenset(byte_ids),
        end_id=None if end is None else int(end),
        adds_space=_adds_space(tokenizer, pieces, special_ids),
    )


def _kind(tokenizer: Any, vocabulary: dict[str, int]) -> tuple[str, str]:
    """How tokens are written, and WordPiece's or the suffix's mark."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = getattr(backend, "decoder", None)
    state = json.loads(decoder.__getstate__()) if decoder is not None else {}
    steps = state.get("decoders", [state])
    names = {step.get("type") for step in steps}
    if "ByteLevel" in names:
        return "byte-level", ""
    if "WordPiece" in names:
        return "wordpiece", next(s["prefix"] for s in steps if s["type"] == "WordPiece")
    if "BPEDecoder" in names:
        return "suffix", next(s["suffix"] for s in steps if s["type"] == "BPEDecoder")
    if names & {"Metaspace", "ByteFallback", "Replace"}:
        return "sentencepiece", ""
    if decoder is None and (
        "<0x0A>" in vocabulary or any(token.startswith(SPACE_MARK) for token in vocabulary)
    ):
        return "sentencepiece", ""
    return "plain", ""


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, int]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: value for value, character in bytes_to_unicode().items()}


def _byte_value(token: str) -> int | None:
    written = re.fullmatch("<0x([0-9A-Fa-f]{2})>", token)
    return int(written[1], 16) if written else None


def _spelling(token: str, kind: str, mark: str) -> bytes:
    text = token
    if kind == "byte-level":
        alphabet = _byte_alphabet()
        if all(character in alphabet for character in token):
            return bytes(alphabet[character] for character in token)
    elif kind == "sentencepiece":
        value = _byte_value(token)
        if value is not None:
            return bytes([value])
        text = token.replace(SPACE_MARK, " ")
    elif kind == "wordpiece":
        text = token.removeprefix(mark) if token.startswith(mark) else " " + token
    elif kind == "suffix" and token.endswith(mark):
        text = token.removesuffix(mark) + " "
    return text.encode("utf-8", "surrogatepass")


def _adds_space(tokenizer: Any, pieces: Sequence[bytes], special_ids: set[int]) -> bool:
    ids = tokenizer.encode("a", add_special_tokens=False)
    return next((pieces[i][:1] == b" " for i in ids if i not in special_ids), False)


def encode_all(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of many texts, without what a tokenizer puts around them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [list(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    return [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]


@dataclass(frozen=True, eq=False)
class TokenSpans:
    """Where tokens lie in a text, in bytes.

    Attributes:
        starts: `[n]`, int64: first byte of every token; never falls.
        ends: `[n]`: one after its last byte; at most the next start.
        exact: `[n]`, bool: the text there is what the token stands for. A token that is only
            the space put in front is exact with an empty span; a special one never is. Where
            tokens spell the whole text, their spans tile it.
    """

    starts: np.ndarray
    ends: np.ndarray
    exact: np.ndarray


def token_spans(text: bytes, ids: Sequence[int], table: TokenBytes) -> TokenSpans:
    """Lay the tokens of a text over its bytes.

    A space that the tokenizer put in front belongs to no byte of the text. Where the tokens do
    not spell the text (normalised, unknown or dropped characters, pieces of a template), the
    shortest edit between both says which bytes are whose; only tokens that still match are exact.

    Args:
        text: UTF-8.
        ids: Tokens of it, in their order.
        table: Of the tokenizer.
    """
    pieces = [table.texts[i] for i in ids]
    spelled = b"".join(pieces)
    front = -1
    if spelled != text:
        if not table.special_ids.isdisjoint(ids):
            named = [table.pieces[i] for i in ids]
            if b"".join(named) in (text, b" " + text):
                pieces, spelled = named, b"".join(named)
        spaces = _leading_spaces(spelled) - _leading_spaces(text)
        if spaces == 1:
            front = next(i for i, piece in enumerate(pieces) if piece)
            pieces[front] = pieces[front][1:]
            spelled = spelled[1:]
    lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
    ends = np.cumsum(lengths)
    starts = ends - lengths
    if spelled == text:
        exact = lengths > 0
        if not table.special_ids.isdisjoint(ids):
            exact &= np.fromiter((i not in table.special_ids for i in ids), bool, len(lengths))
        spans = TokenSpans(starts, ends, exact)
    else:
        spans = _edited_spans(text, spelled, starts, ends)
    if front >= 0 and not pieces[front]:
        spans.exact[front] = spans.starts[front] == spans.ends[front]
    return spans


def _leading_spaces(text: bytes) -> int:
    return len(text) - len(text.lstrip(b" "))


def _edited_spans(text: bytes, spelled: bytes, starts: np.ndarray, ends: np.ndarray) -> TokenSpans:
    from rapidfuzz.distance import Indel

    # Of every place between two spelled bytes: where it lies in the text before and after what
    # the edit inserts there.
    before = np.zeros(len(spelled) + 1, np.int64)
    after = np.zeros(len(spelled) + 1, np.int64)
    matched = np.zeros(len(spelled) + 1, np.int64)
    for step in Indel.opcodes(spelled, text):
        source = np.arange(step.src_start + 1, step.src_end + 1)
        if step.tag == "equal":
            before[source] = after[source] = source - step.src_start + step.dest_start
            matched[source] = 1
        else:
            before[source] = after[source] = step.dest_start
            after[step.src_end] = step.dest_end
    matched = np.cumsum(matched)
    empty = ends == starts
    last_empty = empty & ~np.append(empty[1:], False)
    text_starts = np.where(empty, before[starts], after[starts])
    text_ends = np.where(last_empty, after[ends], before[ends])
    lengths = ends - starts
    exact = ~empty & (matched[ends] - matched[starts] == lengths)
    return TokenSpans(text_starts, text_ends, exact & (text_ends - text_starts == lengths))


class TokenInsides:
    """What tokens say about the text inside them, to a reader with another tokenizer.

    A model that gives `the` and `then` their probabilities has also said what follows `th`.

    Args:
        tokens: Of the model that says something.
        reader: Of the model that reads it.
        reader_tokenizer: From transformers, or as mlx_lm wraps it.

    Attributes:
        lengths: `[n]`, int64: bytes of each token.
        prefixes: `[n, 33]`, int32: a number for the first k bytes of each token, the same for
            the same bytes; 0 where the token is shorter.
        following: `[n, 33]`, int32: the reader's token behind those bytes when it reads the
            token; -1 where it has no boundary there.
    """

    def __init__(self, tokens: TokenBytes, reader: TokenBytes, reader_tokenizer: Any) -> None:
        size = len(tokens.texts)
        self.lengths = np.fromiter(map(len, tokens.texts), np.int64, size)
        self.prefixes = np.zeros((size, LONGEST_PREFIX + 1), np.int32)
        self.following = np.full((size, LONGEST_PREFIX + 1), -1, np.int32)
        numbers: dict[bytes, int] = {}
        readable = []
        for token, piece in enumerate(tokens.texts):
            for length in range(1, min(len(piece), LONGEST_PREFIX) + 1):
                number = numbers.setdefault(piece[:length], len(numbers) + 1)
                self.prefixes[token, length] = number
            if len(piece) > 1:
                try:
                    readable.append((token, CONTEXT + piece.decode()))
                except UnicodeDecodeError:
                    continue
        encoded = encode_all(reader_tokenizer, [text for _, text in readable])
        for (token, text), ids in zip(readable, encoded, strict=True):
            spans = token_spans(text.encode(), ids, reader)
            places = spans.starts - len(CONTEXT)
            for at in np.flatnonzero((places > 0) & (places <= LONGEST_PREFIX) & spans.exact):
                self.following[token, places[at]] = ids[at]

    @cached_property
    def _by_prefix(self) -> list[np.ndarray]:
        """For each number of a prefix the tokens that begin with it, ascending."""
        numbers = self.prefixes.ravel()
        tokens = np.argsort(numbers, kind="stable") // self.prefixes.shape[1]
        groups = np.split(tokens, np.cumsum(np.bincount(numbers))[:-1])
        return [tokens[:0], *groups[1:]]

    def beginning(self, token: int, length: int) -> np.ndarray:
        """The tokens that begin with a token's first bytes, itself included; none beyond 32."""
        if not 1 <= length <= LONGEST_PREFIX:
            return np.zeros(0, np.int64)
        return self._by_prefix[self.prefixes[token, length]]

    def behind(
        self, read: np.ndarray, own: np.ndarray, kept: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What kept tokens say about a text of which the reader has read a part of one token.

        Args:
            read: Bytes read `[n]`.
            own: The token that the text really has there `[n]`.
            kept: Tokens that the model gave a probability `[n, K]`.

        Returns:
            `[n, K]`: the reader's next token if the text goes on as the kept token does, or -1
            where it has no boundary there; whether the kept token goes on behind what was read,
            and whether it is exactly that, `[n, K]`, bool.
        """
        inside = (read >= 1) & (read <= LONGEST_PREFIX)
        place = np.where(inside, read, 0)
        prefix = self.prefixes[own, place]
        same = (self.prefixes[kept, place[:, None]] == prefix[:, None]) & (prefix > 0)[:, None]
        ended = same & (self.lengths[kept] == read[:, None])
        goes_on = same & ~ended
        following = np.where(goes_on, self.following[kept, place[:, None]], -1)
        return following, goes_on, ended
