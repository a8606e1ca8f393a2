"""What every token stands for, and where tokens lie in a text, on made and on real tokenizers.

Real tokenizers are asked through their own decoders, which the code under test does not use.
"""

import itertools
import re
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from conch_dna.errors import ConchError
from conch_dna.language_model import load_tokenizer
from conch_dna.training.cross_tokenizer.token_bytes import (
    KINDS,
    TokenBytes,
    TokenSpans,
    encode_all,
    token_bytes,
    token_spans,
)
from models import ASSETS

# How many texts are tried: a few at every commit, all of them by `make test-slow`.
tried = pytest.mark.parametrize("examples", [100, pytest.param(2000, marks=pytest.mark.slow)])
FAMILIES = ("gpt2", "qwen2.5", "smollm2", "phi-3-mini", "tinystories2k")
MODELS = ("babyllama105", "babyllama361", "stories260K")
# What they do to some texts, all others are kept as they are: compose characters, drop bytes
# without a token, write their space for another character's, run spaces together.
COMPOSE = ("qwen2.5", "tinystories2k")
COLLAPSE = MODELS


@lru_cache
def real_tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def real_tokenizers(shared_data: Path) -> dict[str, Any]:
    folders = [shared_data / "tokenizers" / name for name in FAMILIES]
    folders += [shared_data / "models" / name for name in MODELS]
    return {folder.name: real_tokenizer(folder) for folder in folders}


# Tokenizers made for a test, whose tokens are the ids' places in a list


def wrapped(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def numbered(*tokens: str) -> dict[str, int]:
    return {token: index for index, token in enumerate(tokens)}


def byte_level(*tokens: str, prefix_space: bool = False, **special: str) -> Any:
    tokenizer = Tokenizer(models.BPE(numbered(*tokens), []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    return wrapped(tokenizer, **special)


def sentencepiece(*tokens: str, prepend: bool = True, **special: str) -> Any:
    model = models.BPE(numbered(*tokens), [], unk_token=tokens[0], byte_fallback=True)
    tokenizer = Tokenizer(model)
    steps = [normalizers.Prepend("▁")] if prepend else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return wrapped(tokenizer, **special)


def metaspace(*tokens: str) -> Any:
    tokenizer = Tokenizer(models.Unigram([(token, -1.0) for token in tokens], 0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return wrapped(tokenizer)


def without_decoder(*tokens: str) -> Any:
    return wrapped(Tokenizer(models.BPE(numbered(*tokens), [])))


def wordpiece(*tokens: str, mark: str = "##") -> Any:
    model = models.WordPiece(numbered(*tokens), unk_token=tokens[0], continuing_subword_prefix=mark)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix=mark)
    return wrapped(tokenizer)


def suffix(*tokens: str) -> Any:
    tokenizer = Tokenizer(models.BPE(numbered(*tokens), [], end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    return wrapped(tokenizer)


# Kinds


@pytest.mark.parametrize(
    ("kind", "make", "spelled"),
    [
        (
            "byte-level",
            byte_level,
            {"a": b"a", "Ġ": b" ", "Ġa": b" a", "Ã©": "é".encode(), "Ã": b"\xc3", "Ċ": b"\n"},
        ),
        ("byte-level", byte_level, {"a": b"a", "日": "日".encode(), "▁a": "▁a".encode()}),
        (
            "sentencepiece",
            sentencepiece,
            {
                "?": b"?",
                "▁": b" ",
                "▁a▁": b" a ",
                "<0x0A>": b"\n",
                "<0xE2>": b"\xe2",
                "Ġ": b"\xc4\xa0",
            },
        ),
        ("sentencepiece", metaspace, {"?": b"?", "▁": b" ", "▁the": b" the", "é": b"\xc3\xa9"}),
        ("sentencepiece", without_decoder, {"▁a": b" a", "a": b"a"}),
        ("sentencepiece", without_decoder, {"a": b"a", "<0x0A>": b"\n"}),
        ("wordpiece", wordpiece, {"?": b" ?", "play": b" play", "##ing": b"ing", "#": b" #"}),
        ("suffix", suffix, {"a": b"a", "a</w>": b"a ", "ab</w>": b"ab ", "<": b"<"}),
        ("plain", without_decoder, {"a": b"a", "Ġ": b"\xc4\xa0", "##b": b"##b", " ": b" "}),
    ],
)
def test_every_kind_is_read_as_bytes(
    kind: str, make: Callable[..., Any], spelled: dict[str, bytes]
) -> None:
    table = token_bytes(make(*spelled))
    assert table.kind == kind
    assert table.pieces == tuple(spelled.values())


def test_wordpiece_may_have_another_mark() -> None:
    assert token_bytes(wordpiece("?", "##a", "@@b", mark="@@")).pieces == (b" ?", b" ##a", b"b")


def test_every_byte_of_both_alphabets_is_read() -> None:
    """GPT-2's alphabet: printable Latin-1 as it is, all others from U+0100 on, in their order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [value for value in range(256) if value not in printable]
    letters = {value: chr(value) for value in printable}
    letters |= {value: chr(256 + place) for place, value in enumerate(others)}
    everything = tuple(bytes([value]) for value in range(256))
    assert token_bytes(byte_level(*(letters[v] for v in range(256)))).pieces == everything
    table = token_bytes(sentencepiece(*(f"<0x{value:02X}>" for value in range(256))))
    assert table.pieces == everything
    assert table.byte_ids == frozenset(range(256))


@pytest.mark.parametrize("token", ["<0xGG>", "<0x+A>", "<0x-A>", "<0x4>", "<0x041>", "<0x٤١>"])
def test_what_only_looks_like_a_byte_is_text(token: str) -> None:
    table = token_bytes(sentencepiece("?", token))
    assert table.pieces[1] == token.encode()
    assert not table.byte_ids


# Single tokens


def test_special_tokens_stand_for_no_text() -> None:
    table = token_bytes(byte_level("a", eos_token="<end>", pad_token="<pad>"))
    assert table.special_ids == {1, 2}
    assert table.pieces == (b"a", b"<end>", b"<pad>")
    assert table.texts == (b"a", b"", b"")
    assert table.ids == {b"a": 0}
    assert table.end_id == 1


def test_tokens_added_as_special_are_special_without_a_role() -> None:
    tokenizer = byte_level("a")
    tokenizer.backend_tokenizer.add_special_tokens(["<|user|>"])
    table = token_bytes(tokenizer)
    assert table.special_ids == {1}
    assert table.end_id is None


def test_added_tokens_stand_for_their_own_characters() -> None:
    """Written as they are: `Ġ` in one is the letter, not the byte-level alphabet's space."""
    tokenizer = byte_level("a", "Ġ")
    tokenizer.add_tokens(["<tool>", "Ġx"])
    table = token_bytes(tokenizer)
    assert not table.special_ids
    assert table.texts == (b"a", b" ", b"<tool>", "Ġx".encode())


@pytest.mark.parametrize("tokens", [("?", "A", "<0x41>"), ("?", "<0x41>", "A")])
def test_of_two_tokens_for_a_byte_the_written_one_counts(tokens: tuple[str, ...]) -> None:
    table = token_bytes(sentencepiece(*tokens))
    assert table.pieces == (b"?", b"A", b"A")
    assert table.ids[b"A"] == tokens.index("A")
    assert table.byte_ids == {tokens.index("<0x41>")}
    assert table.count == 3


def test_ids_may_have_gaps() -> None:
    table = token_bytes(wrapped(Tokenizer(models.WordLevel({"a": 1, "b": 4}, unk_token="a"))))
    assert table.pieces == (b"", b"a", b"", b"", b"b")
    assert table.exists.tolist() == [False, True, False, False, True]
    assert table.count == 2
    assert table.ids == {b"a": 1, b"b": 4}


@pytest.mark.parametrize(
    ("tokenizer", "adds"),
    [
        (byte_level("a", "Ġ"), False),
        (byte_level("a", "Ġ", prefix_space=True), True),
        (sentencepiece("?", "a", "▁"), True),
        (sentencepiece("?", "a", "▁", prepend=False), False),
        (wordpiece("?", "a"), True),
        (without_decoder("a"), False),
        (without_decoder("b"), False),
    ],
)
def test_whether_a_space_is_put_in_front(tokenizer: Any, adds: bool) -> None:
    assert token_bytes(tokenizer).adds_space is adds


def test_a_tokenizer_without_a_vocabulary_is_refused() -> None:
    class Bytes:
        def get_vocab(self) -> dict[str, int]:
            raise NotImplementedError

    class Empty:
        added_tokens_decoder = MappingProxyType[int, Any]({})

        def get_vocab(self) -> dict[str, int]:
            return {}

    with pytest.raises(
        ConchError,
        match=r"^tokenizer object does not list its tokens, so it cannot be compared: use a model "
        r"with a tokenizer\.json$",
    ):
        token_bytes(object())
    with pytest.raises(ConchError, match="tokenizer Bytes does not list its tokens"):
        token_bytes(Bytes())
    with pytest.raises(ConchError, match="has no tokens: its files are not complete"):
        token_bytes(Empty())


def test_mlx_lm_s_wrapper_is_read_like_what_it_wraps() -> None:
    folder = ASSETS / "student"
    wrapper, plain = token_bytes(load_tokenizer(folder)), token_bytes(real_tokenizer(folder))
    assert wrapper.pieces == plain.pieces
    assert wrapper.special_ids == plain.special_ids
    assert wrapper.end_id == plain.end_id


def test_texts_are_encoded_without_what_surrounds_them() -> None:
    """A tokenizer without the library behind it is asked text by text."""
    tokenizer = sentencepiece("?", "▁", "a", bos_token="<s>")

    class Slow:
        def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
            assert not add_special_tokens
            return tuple(map(ord, text))

    assert encode_all(tokenizer, ["a a", "", "aa"]) == [[1, 2, 1, 2], [], [1, 2, 2]]
    assert encode_all(Slow(), ["ab", ""]) == [[97, 98], []]


@pytest.mark.parametrize("name", [*FAMILIES, *MODELS])
def test_real_tokens_decode_to_their_bytes(shared_data: Path, name: str) -> None:
    tokenizer = real_tokenizers(shared_data)[name]
    table = token_bytes(tokenizer)
    assert table.kind in KINDS
    assert table.count == len(tokenizer)
    ids = np.flatnonzero(table.exists)[:: max(1, table.count // 20_000)].tolist()
    decode = tokenizer.backend_tokenizer.decode_batch
    for index, text in zip(ids, decode([[i] for i in ids], skip_special_tokens=False), strict=True):
        expected = table.pieces[index].decode("utf-8", "replace")
        if table.kind == "sentencepiece" and index not in tokenizer.added_tokens_decoder:
            expected = expected.removeprefix(" ")
        assert text == expected


# Spans by hand


def table_of(*pieces: bytes, special: tuple[int, ...] = ()) -> TokenBytes:
    return TokenBytes(
        kind="plain",
        pieces=pieces,
        exists=np.ones(len(pieces), bool),
        special_ids=frozenset(special),
        byte_ids=frozenset(),
        end_id=None,
        adds_space=False,
    )


END = b"<end>"


@pytest.mark.parametrize(
    ("text", "pieces", "expected"),
    [
        ("", [], []),
        ("a", [], []),
        ("the cat", [b"the", b" cat"], [(0, 3, True), (3, 7, True)]),
        ("é", [b"\xc3", b"\xa9"], [(0, 1, True), (1, 2, True)]),
        # A space in front that is no part of the text, alone and before a word.
        ("a", [b" a"], [(0, 1, True)]),
        ("a", [b" ", b"a"], [(0, 0, True), (0, 1, True)]),
        (" a", [b" ", b" a"], [(0, 0, True), (0, 2, True)]),
        (" a", [b"  a"], [(0, 2, True)]),
        ("", [b" "], [(0, 0, True)]),
        ("  a", [b"   ", b"a"], [(0, 2, True), (2, 3, True)]),
        # Special tokens stand for nothing, or for their name where the text holds it.
        ("a", [END, b" a"], [(0, 0, False), (0, 1, True)]),
        ("a", [b"a", END], [(0, 1, True), (1, 1, False)]),
        ("ab", [b"a", END, b"b"], [(0, 1, True), (1, 1, False), (1, 2, True)]),
        ("a<end>e", [b"a", END, b"e"], [(0, 1, True), (1, 6, False), (6, 7, True)]),
        ("e<end>e", [b" e", END, b"e"], [(0, 1, True), (1, 6, False), (6, 7, True)]),
        (
            "e<end><n",
            [b" e", END, b"<", b"n"],
            [(0, 1, True), (1, 6, False), (6, 7, True), (7, 8, True)],
        ),
        ("<end>", [END], [(0, 5, False)]),
        ("<end><end>", [END, END], [(0, 5, False), (5, 10, False)]),
        # Unknown characters go to the token that takes their place.
        ("a☃b", [b"a", END, b"b"], [(0, 1, True), (1, 4, False), (4, 5, True)]),
        ("☃☃b", [b" ", END, b"b"], [(0, 0, True), (0, 6, False), (6, 7, True)]),
        # Rewritten, dropped and added characters make only their own token inexact.
        ("xe\u0301y", [b"x", "é".encode(), b"y"], [(0, 1, True), None, (4, 5, True)]),
        ("a\x04b", [b"a", b"b"], [(0, 1, True), (2, 3, True)]),
        ("a  b", [b"a", b" ", b"b"], [(0, 1, True), (1, 2, True), (3, 4, True)]),
        ("ab", [b"a", b" ", b"b"], [(0, 1, True), (1, 1, False), (1, 2, True)]),
        ("Ab", [b"a", b"b"], [None, (1, 2, True)]),
        ("ac", [b"abc"], [(0, 2, False)]),
        ("a b", [b"a", b"b"], [(0, 1, True), (2, 3, True)]),
    ],
)
def test_spans_by_hand(
    text: str, pieces: list[bytes], expected: list[tuple[int, int, bool] | None]
) -> None:
    """None is a token that has no bytes in common with the text: it must not be exact."""
    table = table_of(*pieces, special=tuple(i for i, piece in enumerate(pieces) if piece == END))
    spans = token_spans(text.encode(), range(len(pieces)), table)
    found = zip(spans.starts.tolist(), spans.ends.tolist(), spans.exact.tolist(), strict=True)
    for place, wanted in zip(found, expected, strict=True):
        assert place == wanted if wanted else not place[2]


# Spans of any text


SINGLES = st.sampled_from(
    [
        *(" ", "  ", "\n", "\n\n", "\r\n", "\t", "a", "the", " cat", "Once upon a time", "1234"),
        *("e\u0301", "é", "\u1e0b\u0323", "\u0301", "가", "\u1100\u1161", "ﬁ", "İ", "\u00a0"),
        *(
            "👩\u200d👩\u200d👧",
            "🏳\ufe0f\u200d🌈",
            "👍🏽",
            "🇩🇪",
            "日本語",
            "नमस्ते",
            "\U000f0000",
            "\x00",
        ),
        *(
            "\u2581",
            "Ġ",
            "<0x0A>",
            "<unk>",
            "<s>",
            "</s>",
            "<|endoftext|>",
            "<|im_end|>",
            "<|end|>",
        ),
    ]
)
TEXTS = st.one_of(
    st.text(max_size=30),
    st.lists(st.one_of(SINGLES, st.text(max_size=6)), max_size=10).map("".join),
)


class Real:
    """A tokenizer, its table, and what is known of the texts that it keeps as they are."""

    def __init__(self, name: str, tokenizer: Any) -> None:
        self.name = name
        self.backend = tokenizer.backend_tokenizer
        self.table = token_bytes(tokenizer)
        self.vocabulary = tokenizer.get_vocab()

    def kept(self, text: str) -> str:
        """The text without what the tokenizer rewrites or drops.

        Every token that is looked for in texts has a `<` in it.
        """
        text = text.replace("<", "")
        if self.name in COMPOSE:
            text = normalizers.NFC().normalize_str(text)
        if self.table.kind == "sentencepiece":
            text = text.replace("\u2581", "")
        if self.name == "babyllama105":
            text = "".join(c for c in text if c in self.vocabulary or c == " ")
        if self.name == "smollm2":
            letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            rare = {c for c in text if c > "~" or c < " "}
            spelled = {c: letters.pre_tokenize_str(c)[0][0] for c in rare}
            lost = {c for c, byte in spelled.items() if not set(byte) <= self.vocabulary.keys()}
            text = "".join(c for c in text if c not in lost)
        if self.name in COLLAPSE:
            text = re.sub(" {2,}", " ", text).strip(" ")
        return text


def require_sound(text: bytes, ids: list[int], spans: TokenSpans, table: TokenBytes) -> None:
    """In their order, within the text, and exact tokens are what the text says there."""
    starts, ends, exact = spans.starts.tolist(), spans.ends.tolist(), spans.exact.tolist()
    assert len(starts) == len(ends) == len(exact) == len(ids)
    edges = [0, *itertools.chain(*zip(starts, ends, strict=True)), len(text)]
    assert edges == sorted(edges)
    in_front = True
    for place, index in enumerate(ids):
        piece = table.pieces[index]
        if exact[place]:
            covered = text[starts[place] : ends[place]]
            assert covered == piece or (in_front and b" " + covered == piece)
            assert index not in table.special_ids
        in_front &= index in table.special_ids or not piece


def require_tiles(text: bytes, spans: TokenSpans) -> None:
    """All tokens are exact, and each begins where the one before it ends."""
    assert spans.exact.all()
    assert [0, *spans.ends] == [*spans.starts, len(text)]


def require_decoding(text: bytes, ids: list[int], spans: TokenSpans, real: Real) -> None:
    """Tokens between characters' ends decode to the text there, but for a space in front."""
    starts, ends = spans.starts.tolist(), spans.ends.tolist()
    whole = [i for i, end in enumerate(ends) if end == len(text) or text[end] & 0xC0 != 0x80]
    cuts = [0, *(place + 1 for place in whole)]
    ranges = list(itertools.pairwise(cuts))
    ranges.append((cuts[len(cuts) // 4], cuts[-1 - len(cuts) // 4]))
    for first, last in ranges:
        if first >= last:
            continue
        found = real.backend.decode(ids[first:last], skip_special_tokens=False)
        expected = text[starts[first] : ends[last - 1]].decode()
        if first == 0:
            assert found in (expected, " " + expected if real.table.adds_space else expected)
        else:
            # SentencePiece's decoder takes a space off the front of whatever it is given.
            spaced = real.table.kind == "sentencepiece"
            assert found == (expected.removeprefix(" ") if spaced else expected)


def require_spans(real: Real, text: str) -> bool:
    """Check a text as it is and without what the tokenizer changes; returns if it changed any."""
    kept = real.kept(text)
    for given_text in dict.fromkeys((text, kept)):
        ids = real.backend.encode(given_text, add_special_tokens=False).ids
        data = given_text.encode()
        spans = token_spans(data, ids, real.table)
        require_sound(data, ids, spans, real.table)
        back = real.backend.decode(ids, skip_special_tokens=False)
        same = back in (given_text, " " + given_text) and real.table.special_ids.isdisjoint(ids)
        if same or given_text == kept:
            require_tiles(data, spans)
            require_decoding(data, ids, spans, real)
    return kept != text


@tried
def test_spans_of_any_text_with_the_embedded_tokenizer(examples: int) -> None:
    real = Real("embedded", real_tokenizer(ASSETS / "student"))

    @settings(max_examples=examples // 4, deadline=None)
    @given(TEXTS)
    def hold(text: str) -> None:
        require_spans(real, text)

    hold()


@tried
def test_spans_of_any_text_with_real_tokenizers(shared_data: Path, examples: int) -> None:
    """Every example is tried on all of them."""
    reals = [Real(name, tokenizer) for name, tokenizer in real_tokenizers(shared_data).items()]
    seen, changed = Counter[str](), Counter[str]()

    @settings(max_examples=examples, deadline=None, derandomize=True)
    @given(TEXTS)
    def hold(text: str) -> None:
        for real in reals:
            changed[real.name] += require_spans(real, text)
            seen[real.name] += 1

    hold()
    assert min(seen.values()) >= examples
    assert min(changed.values()) >= 1
