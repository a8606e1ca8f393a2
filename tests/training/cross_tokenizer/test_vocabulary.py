"""Which token is which of another tokenizer, and heads of unequal size; on made and real ones.

What real tokenizers share is counted again from their files, and what they make of a text from
the offsets that the tokenizers library tells; the code under test uses neither.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import oracle
from conch_dna.errors import ConchError
from conch_dna.language_model import load_tokenizer
from conch_dna.losses import compute_kd_loss
from conch_dna.training.cross_tokenizer.token_bytes import TokenBytes, token_bytes
from conch_dna.training.cross_tokenizer.vocabulary import (
    CONTEXTS,
    STRATEGIES,
    VocabProjection,
    align_vocab_sizes,
    build_vocab_projection,
    common_roots,
    compare_tokenizers,
    first_pieces,
    same_tokens,
    shared_tokens,
    shown_bytes,
    vocabulary_digest,
)
from models import ASSETS

LETTERS = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256))]
OTHERS = [value for value in range(256) if chr(value) not in LETTERS]
ALPHABET = {letter: ord(letter) for letter in LETTERS}
ALPHABET |= {chr(256 + place): value for place, value in enumerate(OTHERS)}
# Of gpt2's alphabet, in the order of bytes.
EVERY_BYTE = sorted(ALPHABET, key=lambda letter: ALPHABET[letter])
BYTES = [f"<0x{value:02X}>" for value in range(256)]


def merges(tokens: list[str]) -> list[tuple[str, str]]:
    """One merge for each token that is two others, in the tokens' order."""
    found = []
    for token in tokens:
        splits = ((token[:i], token[i:]) for i in range(len(token) - 1, 0, -1))
        found += [pair for pair in splits if pair[0] in tokens and pair[1] in tokens][:1]
    return found


def wrapped(tokenizer: Tokenizer, end: str | None, unknown: str | None, **special: str) -> Any:
    roles = {"eos_token": end, "unk_token": unknown, **special}
    names = {role: name for role, name in roles.items() if name is not None}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def byte_level(*tokens: str, end: str | None = "<end>", **special: str) -> Any:
    model = models.BPE({t: i for i, t in enumerate(tokens)}, merges(list(tokens)))
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return wrapped(tokenizer, end, special.pop("unknown", None), **special)


def sentencepiece(
    *tokens: str, end: str | None = "</s>", unknown: str | None = None, **special: str
) -> Any:
    """Bytes are fallen back to if all of them are tokens."""
    model = models.BPE(
        {t: i for i, t in enumerate(tokens)},
        merges(list(tokens)),
        unk_token=unknown,
        byte_fallback=set(BYTES) <= set(tokens),
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return wrapped(tokenizer, end, unknown, **special)


@lru_cache
def real_tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@lru_cache
def real_table(folder: Path) -> TokenBytes:
    return token_bytes(real_tokenizer(folder))


def folder_of(shared_data: Path, name: str) -> Path:
    group = "tokenizers" if (shared_data / "tokenizers" / name).is_dir() else "models"
    return shared_data / group / name


def pieces_of(table: TokenBytes, ids: Any) -> list[bytes]:
    return [table.pieces[i] for i in ids]


# The same or not


def with_added_token(folder: Path, token: str) -> Path:
    """A copy of the embedded tokenizer with one more token behind the others."""
    for path in (ASSETS / "student").glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    tokens = json.loads((folder / "tokenizer.json").read_text())
    entry = {**tokens["added_tokens"][0], "id": len(tokens["model"]["vocab"]), "content": token}
    tokens["added_tokens"].append(entry)
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    return folder


def test_the_embedded_pair_has_one_vocabulary(tmp_path: Path) -> None:
    teacher, student = (load_tokenizer(ASSETS / name) for name in ("teacher", "student"))
    other = load_tokenizer(with_added_token(tmp_path, "<|tool|>"))
    assert vocabulary_digest(teacher) == vocabulary_digest(student) != vocabulary_digest(other)
    assert same_tokens(token_bytes(teacher), token_bytes(student))
    assert not same_tokens(token_bytes(teacher), token_bytes(other))
    assert compare_tokenizers(teacher, student).verdict == "same"
    comparison = compare_tokenizers(teacher, other)
    assert comparison.verdict == "different"
    assert comparison.shared_tokens == comparison.same_ids == comparison.teacher_tokens == 1536
    assert comparison.student_tokens == 1537
    assert comparison.teacher_examples == ()
    assert comparison.student_examples == ("'<|tool|>'",)
    assert comparison.id_examples == ((1536, "nothing", "'<|tool|>'"),)


@pytest.mark.parametrize(
    ("rows", "verdict"),
    [
        ((None, None), "same"),
        ((4, None), "same"),
        ((4, 4), "same"),
        ((8, 4), "same up to padding rows"),
        ((4, 8), "same up to padding rows"),
    ],
)
def test_rows_of_heads_tell_padding(rows: tuple[int | None, int | None], verdict: str) -> None:
    teacher, student = (byte_level("a", "b", "ab") for _ in range(2))
    comparison = compare_tokenizers(teacher, student, teacher_rows=rows[0], student_rows=rows[1])
    assert comparison.verdict == verdict
    assert (comparison.teacher_rows, comparison.student_rows) == rows
    assert comparison.shared_tokens == comparison.same_ids == 4
    assert comparison.id_examples == ()


def test_padding_does_not_hide_another_token() -> None:
    teacher, student = byte_level("a", "b", end=None), byte_level("a", "c", end=None)
    comparison = compare_tokenizers(teacher, student, teacher_rows=4, student_rows=2)
    assert comparison.verdict == "different"


def test_the_same_tokens_in_another_order_are_another_tokenizer() -> None:
    """Compared by index, one model's "a" would be taught as the other's "b"."""
    teacher, student = byte_level("a", "b"), byte_level("b", "a")
    assert not same_tokens(token_bytes(teacher), token_bytes(student))
    comparison = compare_tokenizers(teacher, student)
    assert comparison.verdict == "different"
    assert comparison.shared_tokens == 3
    assert comparison.same_ids == 1
    assert comparison.id_examples == ((0, "'a'", "'b'"), (1, "'b'", "'a'"))


def test_the_same_bytes_written_otherwise_are_the_same_tokenizer() -> None:
    teacher = byte_level("a", "Ġ", "Ġa", "Ã©", "Ċ", end="</s>")
    student = sentencepiece("a", "▁", "▁a", "é", "<0x0A>")
    comparison = compare_tokenizers(teacher, student)
    assert comparison.verdict == "same"
    assert (comparison.teacher_kind, comparison.student_kind) == ("byte-level", "sentencepiece")
    assert same_tokens(token_bytes(teacher), token_bytes(student))


def test_a_comparison_by_hand() -> None:
    """Ids 1, 2 and 3 are the same; `a`, ` a` and the ends are shared besides."""
    teacher = byte_level("a", "b", "ab", "Ġ", "Ġa", "Ã", end="<end>")
    student = sentencepiece("?", "b", "ab", "▁", "<0x61>", "a", "▁a", "d", end="</s>")
    comparison = compare_tokenizers(teacher, student)
    assert comparison.verdict == "different"
    assert comparison.teacher_tokens == 7
    assert comparison.student_tokens == 9
    assert comparison.shared_tokens == 6
    assert comparison.same_ids == 3
    assert comparison.teacher_examples == ("bytes c3",)
    assert comparison.student_examples == ("'?'", "'a'", "'d'")
    assert set(comparison.shared_examples) <= {"'a'", "'b'", "'ab'", "' '", "' a'", "'<end>'"}
    differing = {
        (0, "'a'", "'?'"),
        (4, "' a'", "'a'"),
        (5, "bytes c3", "'a'"),
        (6, "'<end>'", "' a'"),
        (7, "nothing", "'d'"),
        (8, "nothing", "'</s>'"),
    }
    assert set(comparison.id_examples) < differing
    assert len(set(comparison.id_examples)) == len(set(comparison.shared_examples)) == 5


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 6, 7, 11, 50])
def test_examples_are_as_many_as_there_are_up_to_five(count: int) -> None:
    """None is shown twice."""
    tokens = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"[:count]
    comparison = compare_tokenizers(byte_level("1", *tokens), byte_level("1"))
    assert len(comparison.teacher_examples) == min(count, 5)
    assert len(set(comparison.teacher_examples)) == min(count, 5)
    assert list(comparison.teacher_examples) == sorted(comparison.teacher_examples, key=ascii_order)


def ascii_order(shown: str) -> tuple[bool, str]:
    """Small letters before large ones, as the test above numbers them."""
    return shown.isupper(), shown


@pytest.mark.parametrize(
    ("piece", "shown"),
    [(None, "nothing"), (b" a\n", r"' a\n'"), ("é".encode(), "'é'"), (b"a\xc3", "bytes 61 c3")],
)
def test_bytes_are_shown_as_text_where_they_are_some(piece: bytes | None, shown: str) -> None:
    assert shown_bytes(piece) == shown


def tokens_in_files(folder: Path) -> tuple[set[bytes], set[str], set[tuple[str, int]]]:
    """Bytes of ordinary tokens, names of special ones but the end, and `<0x41>` where `A` is too.

    From the files alone; the last are told apart by their ids.
    """
    state = json.loads((folder / "tokenizer.json").read_text())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    added = {token["content"]: token["special"] for token in state["added_tokens"]}
    special = {name for name, is_special in added.items() if is_special}
    ordinary = {name.encode() for name in added.keys() - special}
    written = state["model"]["vocab"].keys() - added.keys()
    if state["decoder"]["type"] == "ByteLevel":
        ordinary |= {bytes(ALPHABET[letter] for letter in token) for token in written}
    else:
        as_bytes = {name: bytes([value]) for value, name in enumerate(BYTES)}
        ordinary |= {as_bytes.get(t, t.replace("▁", " ").encode()) for t in written}
    vocabulary = state["model"]["vocab"]
    twice = {name: "▁" if value == 32 else chr(value) for value, name in enumerate(BYTES[:128])}
    again = {(n, vocabulary[n]) for n, character in twice.items() if {n, character} <= written}
    return ordinary, special - {config["eos_token"]}, again


@pytest.mark.parametrize(
    ("teacher", "student", "count"),
    [
        ("qwen2.5", "smollm2", 39237),
        pytest.param("qwen2.5", "gpt2", 42257, marks=pytest.mark.slow),
        pytest.param("qwen2.5", "phi-3-mini", 26344, marks=pytest.mark.slow),
        pytest.param("qwen2.5", "tinystories2k", 1929, marks=pytest.mark.slow),
        ("stories260K", "babyllama361", 361),
        ("babyllama105", "stories260K", 105),
    ],
)
def test_real_tokenizers_share_what_their_files_say(
    shared_data: Path, teacher: str, student: str, count: int
) -> None:
    folders = [folder_of(shared_data, name) for name in (teacher, student)]
    comparison = compare_tokenizers(*map(real_tokenizer, folders))
    # Ordinary tokens, special ones, second tokens for a byte, and the end, which all of them have.
    common = [ours & theirs for ours, theirs in zip(*map(tokens_in_files, folders), strict=True)]
    assert comparison.shared_tokens == sum(map(len, common)) + 1 == count
    assert comparison.verdict == "different"
    assert comparison.teacher_tokens == len(real_tokenizer(folders[0]))
    assert comparison.student_tokens == len(real_tokenizer(folders[1]))


# Which token is which


def test_shared_tokens_by_hand() -> None:
    """By bytes at any id; special ones by name; ends whatever they are called."""
    teacher = byte_level("a", "b", "ab", "Ġ", end="<end>", pad_token="<pad>", bos_token="<s>")
    student = sentencepiece("▁", "ab", "<0x61>", "a", "<pad>", end="</s>", bos_token="<s>")
    first, second = token_bytes(teacher), token_bytes(student)
    assert first.pieces == (b"a", b"b", b"ab", b" ", b"<s>", b"<end>", b"<pad>")
    assert second.pieces == (b" ", b"ab", b"a", b"a", b"<pad>", b"<s>", b"</s>")
    assert shared_tokens(first, second).tolist() == [3, -1, 1, 0, 5, 6, -1]
    assert shared_tokens(second, first).tolist() == [3, 2, -1, 0, -1, 4, 5]


def test_an_end_is_joined_before_its_name_is() -> None:
    """The student ends with what is some other special token for the teacher."""
    teacher = byte_level("a", end="<end>", pad_token="<turn>")
    student = byte_level("a", end="<turn>", pad_token="<end>")
    first, second = token_bytes(teacher), token_bytes(student)
    assert first.pieces == (b"a", b"<end>", b"<turn>")
    assert second.pieces == (b"a", b"<turn>", b"<end>")
    assert shared_tokens(first, second).tolist() == [0, 1, -1]


def test_without_an_end_on_both_sides_none_is_joined() -> None:
    first, second = token_bytes(byte_level("a")), token_bytes(byte_level("a", end=None))
    assert shared_tokens(first, second).tolist() == [0, -1]
    assert shared_tokens(second, first).tolist() == [0]


def test_a_special_token_is_no_text_with_the_same_characters() -> None:
    """Also at the same id."""
    special = token_bytes(byte_level("a", end=None, pad_token="<x>"))
    text = token_bytes(byte_level("a", "<x>", end=None))
    assert special.pieces == text.pieces
    assert shared_tokens(special, text).tolist() == shared_tokens(text, special).tolist() == [0, -1]


def test_of_two_tokens_for_a_byte_the_one_in_texts_is_shared() -> None:
    """Also where the other one stands at the other tokenizer's id."""
    first = token_bytes(sentencepiece("<0x61>", "a", end=None))
    second = token_bytes(byte_level("a", "b", end=None))
    assert shared_tokens(first, second).tolist() == [-1, 0]
    assert shared_tokens(second, first).tolist() == [1, -1]
    assert shared_tokens(first, first).tolist() == [0, 1]


PAIRS = [
    pytest.param("qwen2.5", "smollm2", marks=pytest.mark.slow),
    pytest.param("gpt2", "phi-3-mini", marks=pytest.mark.slow),
    ("phi-3-mini", "gpt2"),
    pytest.param("tinystories2k", "qwen2.5", marks=pytest.mark.slow),
    ("stories260K", "babyllama361"),
    ("babyllama361", "babyllama105"),
]


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_shared_tokens_are_one_to_one(shared_data: Path, teacher: str, student: str) -> None:
    first, second = (real_table(folder_of(shared_data, name)) for name in (teacher, student))
    shared = shared_tokens(first, second)
    own = np.flatnonzero(shared >= 0)
    assert len(np.unique(shared[own])) == len(own)
    assert first.end_id is not None and shared[first.end_id] == second.end_id
    own = own[own != first.end_id]
    assert pieces_of(first, own) == pieces_of(second, shared[own])
    # A token in texts is shared unless the other tokenizer has no such bytes.
    left = [i for piece, i in first.ids.items() if shared[i] < 0]
    assert not set(pieces_of(first, left)) & second.ids.keys()


# Projections


def test_a_projection_by_hand() -> None:
    """Shared tokens go to themselves, others to the first piece that the student makes of them."""
    teacher = byte_level("a", "b", "c", "ab", "abc", "Ġ", "bca", "Ã", "©", end="<end>")
    student = byte_level(
        "b", "a", "c", "ab", "ca", "Ã", "©", "Ã©", "Ġ", "<", "Ċ", "1", ".", end="<e>"
    )
    projection = build_vocab_projection(teacher, student)
    assert projection.size == 14
    assert projection.targets.tolist() == [1, 0, 2, 3, 3, 8, 0, 5, 6, 13]
    assert projection.targets.dtype == np.int64


def test_a_special_token_the_student_lacks_goes_where_its_name_begins() -> None:
    teacher = byte_level("a", end="<end>", pad_token="<pad>")
    student = byte_level(*EVERY_BYTE, "<p", end="<e>")
    assert build_vocab_projection(teacher, student).targets.tolist() == [97, 257, 256]


def test_what_the_student_would_join_to_a_text_before_is_asked_behind_others() -> None:
    """Behind a line break the student takes a second one into the same token."""
    teacher = byte_level("Ċ", "a", "ĊĊĊ", end=None)
    student = byte_level(*EVERY_BYTE, "ĊĊ", end=None)
    assert build_vocab_projection(teacher, student).targets.tolist() == [10, 97, 256]


def test_the_first_piece_need_not_be_the_longest_beginning() -> None:
    """The student joins `b c` before `a b`, and behind a line break has no token that begins."""
    teacher = byte_level("a", "b", "c", "ab", "abc", end=None)
    student = byte_level(*EVERY_BYTE, "bc", "ab", "Ċa", end=None)
    assert student.encode("\nabc") == [258, 256]
    assert build_vocab_projection(teacher, student).targets.tolist() == [97, 98, 99, 257, 97]


def test_pieces_of_characters_go_to_the_longest_token_they_begin_with() -> None:
    """What cannot be decoded is no text that a tokenizer takes."""
    teacher = byte_level("Ã", "aÃ", "abÃ", "©a", "âĤ", end=None)
    pieces = (b"\xc3", b"a\xc3", b"ab\xc3", b"\xa9a", b"\xe2\x82")
    assert token_bytes(teacher).pieces == pieces
    by_bytes = byte_level(*EVERY_BYTE, "ab", end=None)
    assert build_vocab_projection(teacher, by_bytes).targets.tolist() == [0xC3, 97, 256, 0xA9, 0xE2]
    by_fallback = sentencepiece("?", *BYTES, "a", "b", "ab", "▁", end=None, unknown="?")
    expected = [1 + 0xC3, 257, 259, 1 + 0xA9, 1 + 0xE2]
    assert build_vocab_projection(teacher, by_fallback).targets.tolist() == expected


def test_what_the_student_cannot_spell_goes_to_its_unknown_token() -> None:
    teacher = byte_level("a", "b", "Ã", end=None)
    student = sentencepiece("<unk>", "a", "▁", end=None, unknown="<unk>")
    assert build_vocab_projection(teacher, student).targets.tolist() == [1, 0, 0]


def test_without_an_unknown_token_either_it_is_refused() -> None:
    teacher = byte_level("a", "b", "Ã", end=None)
    student = sentencepiece("a", "▁", end=None)
    with pytest.raises(
        ConchError,
        match=r"^the student's tokenizer cannot spell 'b' and 1 more of the teacher's tokens: use "
        r"a student that can, or `conch-dna distill`, which compares texts$",
    ):
        build_vocab_projection(teacher, student)


def test_ids_without_a_token_are_no_reason_to_refuse() -> None:
    teacher = wrapped(Tokenizer(models.WordLevel({"a": 0, "b": 3}, unk_token="a")), None, None)
    targets = build_vocab_projection(teacher, byte_level(*EVERY_BYTE, end=None)).targets
    assert targets[[0, 3]].tolist() == [97, 98]
    assert len(targets) == 4


def first_in_text(tokenizer: Any, table: TokenBytes, text: str) -> set[int]:
    """Tokens with which the tokenizer goes on with the text behind some other character."""
    found = set()
    for context in CONTEXTS:
        encoding = tokenizer.backend_tokenizer.encode(context + text, add_special_tokens=False)
        for index, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if start == len(context) and end > start:
                if text.encode().startswith(table.pieces[index]):
                    found.add(index)
                break
    return found


@lru_cache
def real_firsts(shared_data: Path, teacher: str, student: str) -> np.ndarray:
    folders = [folder_of(shared_data, name) for name in (teacher, student)]
    return build_vocab_projection(*map(real_tokenizer, folders)).targets


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_real_tokens_go_to_the_student_s_own_first_piece(
    shared_data: Path, teacher: str, student: str
) -> None:
    folders = [folder_of(shared_data, name) for name in (teacher, student)]
    first, second = map(real_table, folders)
    targets = real_firsts(shared_data, teacher, student)
    assert len(targets) == len(first.pieces)
    assert targets.min() >= 0 and targets.max() < len(second.pieces)
    shared = shared_tokens(first, second)
    assert (targets[shared >= 0] == shared[shared >= 0]).all()
    tokenizer = real_tokenizer(folders[1])
    unknown = tokenizer.unk_token_id
    checked = {"text": 0, "bytes": 0, "unknown": 0}
    left = np.flatnonzero((shared < 0) & first.exists)
    for index in left[:: max(1, len(left) // 2000)].tolist():
        piece, target = first.pieces[index], int(targets[index])
        beginnings = [piece[:size] for size in range(len(piece), 0, -1)]
        known = [second.ids[b] for b in beginnings if b in second.ids]
        try:
            expected = first_in_text(tokenizer, second, piece.decode())
        except UnicodeDecodeError:
            expected = set()
        if piece in second.ids:
            # A byte that is a token of its own besides, which is shared.
            assert target == second.ids[piece]
        elif expected:
            assert target in expected
            checked["text"] += 1
        elif known:
            assert target == known[0]
            checked["bytes"] += 1
        else:
            assert target == unknown
            checked["unknown"] += 1
    if student == "babyllama105":
        assert checked["unknown"] > 100
    elif len(left) > 1000:
        assert checked["text"] > 1000


# Heads of unequal size


@pytest.mark.parametrize(("teacher_rows", "student_rows"), [(8, 6), (6, 8), (6, 6)])
def test_truncation_keeps_the_rows_that_both_have(teacher_rows: int, student_rows: int) -> None:
    random = np.random.default_rng(0)
    teacher, student = (
        mx.array(random.normal(0, 1, (2, 3, rows)).astype(np.float32))
        for rows in (teacher_rows, student_rows)
    )
    for aligned, given in zip(align_vocab_sizes(teacher, student), (teacher, student), strict=True):
        assert aligned.shape == (2, 3, 6)
        assert mx.array_equal(aligned, given[..., :6])


def test_padding_of_a_head_changes_no_loss_after_alignment() -> None:
    random = np.random.default_rng(1)
    teacher, student = (mx.array(random.normal(0, 1, (4, 6))) for _ in range(2))
    padded = mx.concatenate([teacher, mx.full((4, 2), 30.0)], axis=-1)
    aligned = align_vocab_sizes(padded, student, "truncate")
    assert compute_kd_loss(*aligned).item() == compute_kd_loss(teacher, student).item()


def some_projection(strategy: str, teacher_tokens: int, student_tokens: int) -> Any:
    """A projection for a strategy that takes one; several tokens go to one, and some to none."""
    if strategy == "truncate":
        return None
    random = np.random.default_rng(2)
    return VocabProjection(random.integers(0, student_tokens, teacher_tokens), student_tokens)


def head(tokens: int, padding: int, spread: float, seed: int) -> np.ndarray:
    """Log-probabilities `[2, 3, tokens + padding]`; rows that are no token have none."""
    logits = np.random.default_rng(seed).normal(0, spread, (2, 3, tokens + padding))
    logits[..., tokens:] = -np.inf
    return oracle.log_softmax(logits)


# Teacher's and student's tokens; where only one strategy is right, they differ.
SIZES = {"truncate": (700, 700), "project": (700, 500)}


@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_keeps_the_teacher_s_mass(strategy: str, spread: float) -> None:
    ours, theirs = SIZES.get(strategy, (700, 500))
    projection = some_projection(strategy, ours, theirs)
    teacher, student = head(ours, 4, spread, 3), head(theirs, 12, spread, 4)
    aligned, cut = align_vocab_sizes(mx.array(teacher), mx.array(student), strategy, projection)
    assert aligned.shape == cut.shape
    probabilities = np.exp(np.array(aligned, np.float64))
    np.testing.assert_allclose(probabilities.sum(-1), 1.0, rtol=0, atol=1e-5)
    matrix = np.eye(ours, aligned.shape[-1])
    if projection is not None:
        matrix = np.zeros((ours, theirs))
        matrix[np.arange(ours), projection.targets] = 1
    expected = np.exp(teacher[..., :ours]) @ matrix
    np.testing.assert_allclose(probabilities, expected, rtol=1e-4, atol=1e-7)
    kept = np.array(cut, np.float64)
    np.testing.assert_allclose(
        oracle.softmax(kept)[..., :theirs], np.exp(student)[..., :theirs], rtol=1e-4, atol=1e-7
    )


@pytest.mark.slow
def test_the_mass_of_a_real_head_is_kept(shared_data: Path) -> None:
    """151,665 tokens and 271 padding rows, projected to 49,152."""
    targets = real_firsts(shared_data, "qwen2.5", "smollm2")
    projection = VocabProjection(targets, 49152)
    logits = np.random.default_rng(5).normal(0, 4, (4, 151936)).astype(np.float32)
    aligned, _ = align_vocab_sizes(mx.array(logits), mx.zeros((4, 49152)), "project", projection)
    found = np.exp(np.array(aligned, np.float64))
    np.testing.assert_allclose(found.sum(-1), 1.0, rtol=0, atol=1e-5)
    expected = np.zeros((4, 49152))
    for row, probabilities in enumerate(oracle.softmax(logits[:, :151665])):
        expected[row] = np.bincount(targets, probabilities, 49152)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_half_precision_keeps_its_mass(strategy: str, dtype: mx.Dtype) -> None:
    ours, theirs = SIZES.get(strategy, (700, 500))
    teacher = mx.array(head(ours, 0, 3.0, 6)).astype(dtype)
    student = mx.zeros((2, 3, theirs), dtype)
    aligned, _ = align_vocab_sizes(
        teacher, student, strategy, some_projection(strategy, ours, theirs)
    )
    logits = np.array(aligned.astype(mx.float32), np.float64)
    before = np.exp(np.array(teacher.astype(mx.float32), np.float64)).sum(-1)
    after = np.exp(logits).sum(-1)
    # Log-probabilities are normalised again; logits are passed on as they are.
    assert np.abs(after - (before if strategy == "truncate" else 1)).max() < 1e-5


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_student_learns_through_every_strategy(strategy: str) -> None:
    """The gradient is `t (q - p)` over positions, and 0 in rows that are no token."""
    ours, theirs = SIZES.get(strategy, (700, 500))
    projection = some_projection(strategy, ours, theirs)
    teacher, student = head(ours, 4, 2.0, 7), head(theirs, 0, 2.0, 8)
    student = np.concatenate([student, np.zeros((2, 3, 12))], axis=-1)

    def loss(logits: mx.array) -> mx.array:
        aligned = align_vocab_sizes(mx.array(teacher), logits, strategy, projection)
        return compute_kd_loss(*aligned, temperature=1.0)

    gradient = np.array(mx.grad(loss)(mx.array(student)), np.float64)
    size = theirs if projection is not None else min(teacher.shape[-1], student.shape[-1])
    target = np.zeros((2, 3, size))
    source = np.exp(teacher)
    if projection is None:
        target[:] = source[..., :size]
    else:
        for index, column in enumerate(projection.targets):
            target[..., column] += source[..., index]
    expected = np.zeros(student.shape)
    expected[..., :size] = (oracle.softmax(student[..., :size]) - target) / 6
    assert oracle.error_of_gradient(gradient, expected) < 1e-5


def test_no_gradient_of_the_student_is_lost_to_impossible_tokens() -> None:
    """A column that no token of the teacher goes to is -inf there, and 0 ln 0 is 0."""
    projection = VocabProjection(np.array([0, 0]), 3)
    teacher, student = align_vocab_sizes(mx.zeros((1, 2)), mx.zeros((1, 3)), "project", projection)
    assert teacher.tolist() == [[0.0, -np.inf, -np.inf]]
    loss = compute_kd_loss(teacher, student, temperature=1.0).item()
    assert loss == pytest.approx(np.log(3), rel=1e-6)


def test_an_unknown_strategy_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^strategy 'pad' is unknown: use one of \['project', 'truncate'\]$"
    ):
        align_vocab_sizes(mx.zeros((1, 3)), mx.zeros((1, 3)), "pad")


def test_projecting_without_a_projection_is_refused() -> None:
    with pytest.raises(ValueError, match=r"needs a projection: make it by build_vocab_projection$"):
        align_vocab_sizes(mx.zeros((1, 3)), mx.zeros((1, 3)), "project")


@pytest.mark.parametrize(("teacher_rows", "student_rows"), [(2, 4), (3, 3)])
def test_a_projection_of_other_tokenizers_is_refused(teacher_rows: int, student_rows: int) -> None:
    """Also where MLX would take the ids that are too large as others."""
    with pytest.raises(
        ValueError,
        match=rf"^the projection is from 3 to 4 tokens, but the heads have {teacher_rows} and "
        rf"{student_rows} rows: they belong to other tokenizers$",
    ):
        align_vocab_sizes(
            mx.zeros((1, teacher_rows)),
            mx.zeros((1, student_rows)),
            "project",
            VocabProjection(np.array([0, 1, 3]), 4),
        )


def test_cutting_by_index_with_a_projection_at_hand_is_refused() -> None:
    """Cut by index, tokens of one tokenizer would be compared with others of the other."""
    projection = VocabProjection(np.array([0, 1, 2]), 3)
    with pytest.raises(
        ValueError,
        match=r"^a projection means different tokenizers, whose heads must not be cut by index: "
        r"use strategy 'project', or leave the projection out to cut them all the same$",
    ):
        align_vocab_sizes(mx.zeros((1, 3)), mx.zeros((1, 3)), "truncate", projection)


# Common roots


def test_common_roots_by_hand() -> None:
    """`abc` is `ab c` for the student, `abd` is `ab d`; `dab` is `d a b`, and `da` `d a`."""
    teacher = byte_level("a", "b", "c", "d", "ab", "abc", "dab", "Ċ", "1", ".", end="<end>")
    student = byte_level("Ċ", "d", "c", "b", "a", "ab", "abd", "da", "1", ".", end="<e>")
    of_teacher, of_student = common_roots(teacher, student)
    assert of_teacher.tolist() == [4, 3, 2, 1, 5, 5, 1, 0, 8, 9, 10]
    assert of_student.tolist() == [0, 1, 2, 3, 4, 5, 5, 1, 8, 9, 10]


def test_a_root_is_looked_for_until_it_is_shared() -> None:
    """The teacher's `abcd` is `abc d` for the student, its `abc` is `ab c`, shared by both."""
    rest = ("Ċ", "1", ".")
    teacher = byte_level("a", "b", "c", "d", "ab", "cd", "abcd", *rest, end=None)
    student = byte_level("a", "b", "c", "d", "ab", "abc", *rest, end=None)
    of_teacher, of_student = common_roots(teacher, student)
    assert of_teacher.tolist() == [0, 1, 2, 3, 4, 2, 4, 6, 7, 8]
    assert of_student.tolist() == [0, 1, 2, 3, 4, 4, 6, 7, 8]
    assert first_pieces(token_bytes(teacher), token_bytes(student), student)[6] == 5


def test_what_the_other_cannot_begin_has_no_root() -> None:
    teacher = byte_level("a", "b", "Ã", "bÃ", end=None)
    student = byte_level("a", "Ċ", "aa", end=None)
    of_teacher, of_student = common_roots(teacher, student)
    assert of_teacher.tolist() == [0, -1, -1, -1]
    assert of_student.tolist() == [0, -1, 0]


def test_the_same_tokenizer_has_every_token_as_its_root() -> None:
    tokenizer = real_tokenizer(ASSETS / "student")
    for roots in common_roots(tokenizer, tokenizer):
        assert roots.tolist() == list(range(1536))
    tokenizer = sentencepiece("<unk>", *BYTES, "a", "▁", "▁a", unknown="<unk>")
    for roots in common_roots(tokenizer, tokenizer):
        assert roots.tolist() == list(range(261))


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        pytest.param("gpt2", "phi-3-mini", marks=pytest.mark.slow),
        pytest.param("tinystories2k", "smollm2", marks=pytest.mark.slow),
        ("stories260K", "babyllama361"),
        ("babyllama105", "babyllama361"),
    ],
)
def test_roots_of_real_tokenizers_are_shared_beginnings(
    shared_data: Path, teacher: str, student: str
) -> None:
    folders = [folder_of(shared_data, name) for name in (teacher, student)]
    tokenizers = [real_tokenizer(folder) for folder in folders]
    first, second = map(real_table, folders)
    shared = shared_tokens(first, second)
    own = np.flatnonzero(shared >= 0)
    roots = common_roots(*tokenizers)
    assert (roots[0][own] == shared[own]).all()
    assert (roots[1][shared[own]] == shared[own]).all()
    for table, found in zip((first, second), roots, strict=True):
        assert len(found) == len(table.pieces)
        assert not found[~table.exists].max(initial=-1) >= 0
        rooted = np.flatnonzero(found >= 0)
        assert set(found[rooted].tolist()) == set(shared[own].tolist())
        for index in rooted[rooted != table.end_id]:
            assert table.pieces[index].startswith(second.pieces[found[index]])
    # All that has no root has no beginning either: bytes that the other one lacks.
    for table, other, found in ((first, second, roots[0]), (second, first, roots[1])):
        for index in np.flatnonzero(table.exists & (found < 0)):
            piece = table.pieces[index]
            assert not any(piece[:size] in other.ids for size in range(1, len(piece) + 1))
    # A token's root is that of the first piece that the other tokenizer makes of it.
    pieces = first_pieces(first, second, tokenizers[1])
    told = np.flatnonzero((pieces >= 0) & (shared < 0))
    assert (roots[0][told] == roots[1][pieces[told]]).all()
