"""Taboo words, against a search in the text that each token would make."""

import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conch_dna.errors import ConchError
from conch_dna.generations.taboo import TabooTokens, mask_taboo_tokens
from conch_dna.language_model import ModelSource
from conch_dna.losses import log_softmax
from conch_dna.training.cross_tokenizer.token_bytes import token_bytes
from models import make_model_folder
from tokenizers_made import character_tokenizer

WORDS = ("cat", "the dog", "été")
LETTER = rb"[0-9A-Za-z_\x80-\xff]"


@pytest.fixture(scope="module", params=["BPE", "characters"])
def tokenizer(
    request: pytest.FixtureRequest, tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    if request.param == "BPE":
        return ModelSource(str(tiny_teacher)).tokenizer
    folder = tmp_path_factory.mktemp("characters")
    return ModelSource(
        str(
            make_model_folder(folder / "model", tokenizer=character_tokenizer(folder / "tokenizer"))
        )
    ).tokenizer


def finishes(text: bytes, piece: bytes, spellings: set[bytes]) -> bool:
    """Whether the piece is the last of a word that no letter stands before or behind."""
    whole = text + piece
    return any(
        match.end(1) > len(text)
        for spelling in spellings
        for match in re.finditer(
            b"(?<!" + LETTER + b")(?=(" + re.escape(spelling) + b")(?!" + LETTER + b"))", whole
        )
    )


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_exactly_the_tokens_are_excluded_that_would_finish_a_word(
    data: Any, tokenizer: Any
) -> None:
    taboo = TabooTokens(tokenizer, WORDS)
    parts = st.sampled_from(
        ["a", " ", "c", "ca", "C", "the do", "The d", "THE ", "é", "ét", "x", "."]
    )
    text = "".join(data.draw(st.lists(parts, max_size=6))).encode()
    spellings = {f.encode() for w in WORDS for f in (w, w.upper(), w[0].upper() + w[1:])}
    expected = [
        token
        for token, piece in enumerate(token_bytes(tokenizer).texts)
        if piece and finishes(text, piece, spellings)
    ]
    assert taboo.after(text).tolist() == expected


def test_each_place_of_a_text_excludes_what_would_finish_the_word_there(tokenizer: Any) -> None:
    taboo = TabooTokens(tokenizer, ["cat"])
    table = token_bytes(tokenizer)
    ids = [table.ids[bytes([byte])] for byte in b"a ca"]
    excluded = taboo.excluded([*ids, table.ids[b"t"]])
    t = table.ids[b"t"]
    assert [t in tokens.tolist() for tokens in excluded] == [False, False, False, False, True]


def test_a_part_of_another_word_is_not_taboo(tokenizer: Any) -> None:
    """Neither what comes behind a letter nor what goes on with one in the same token."""
    taboo = TabooTokens(tokenizer, ["at"])
    t = token_bytes(tokenizer).ids[b"t"]
    assert t in taboo.after(b"c a").tolist()
    assert t not in taboo.after(b"ca").tolist()


@pytest.mark.parametrize("text", ["A cat sat.", "a CAT", "Cat", "(cat)"])
def test_every_token_that_writes_a_part_of_the_word_is_found(text: str, tokenizer: Any) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    spelled = TabooTokens(tokenizer, ["cat"]).spelled(ids)
    pieces = token_bytes(tokenizer).texts
    written = b"".join(pieces[i] for i, taboo in zip(ids, spelled, strict=True) if taboo)
    assert b"cat" in written.lower()
    rest = b"".join(b"|" if t else pieces[i] for i, t in zip(ids, spelled, strict=True))
    assert b"cat" not in rest.lower()


def test_a_text_without_the_word_keeps_all_its_tokens(tokenizer: Any) -> None:
    ids = tokenizer.encode("The category of concatenation", add_special_tokens=False)
    assert not TabooTokens(tokenizer, ["cat"]).spelled(ids).any()


def test_tokens_by_their_numbers_are_excluded_everywhere(tokenizer: Any) -> None:
    taboo = TabooTokens(tokenizer, ids=[9, 4, 9])
    assert [tokens.tolist() for tokens in taboo.excluded([4, 5])] == [[4, 9], [4, 9]]
    assert taboo.spelled([3, 4, 9]).tolist() == [False, True, True]


def test_nothing_is_taboo_where_nothing_was_named(tokenizer: Any) -> None:
    taboo = TabooTokens(tokenizer)
    assert not taboo
    assert taboo.after(b"a cat").tolist() == []
    assert not taboo.spelled([1, 2]).any()


def test_what_is_no_word_or_no_token_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ConchError, match="' ' is empty"):
        TabooTokens(tokenizer, [" "])
    with pytest.raises(ConchError, match=r"taboo ids -1, 999999 are no tokens"):
        TabooTokens(tokenizer, ids=[3, 999999, -1])


def test_masked_tokens_have_no_probability_and_the_others_keep_their_ratios() -> None:
    logits = np.random.default_rng(0).normal(size=(3, 7)).astype(np.float32)
    excluded = [np.array([1, 4]), np.array([], np.int64), np.array([0])]
    got = np.asarray(mx.exp(log_softmax(mask_taboo_tokens(mx.array(logits), excluded))))
    for row, tokens in enumerate(excluded):
        p = np.exp(logits[row].astype(np.float64))
        p[tokens] = 0
        np.testing.assert_allclose(got[row], p / p.sum(), rtol=1e-5)


def test_one_list_serves_all_rows_and_one_row_needs_no_other() -> None:
    both = mask_taboo_tokens(mx.zeros((2, 3)), np.array([1]))
    assert np.isneginf(np.asarray(both)).tolist() == [[False, True, False]] * 2
    assert mask_taboo_tokens(mx.zeros(3), np.array([2])).tolist() == [0.0, 0.0, -np.inf]


def test_a_list_too_few_is_refused() -> None:
    with pytest.raises(ValueError, match="1 lists of excluded tokens for 2 rows"):
        mask_taboo_tokens(mx.zeros((2, 3)), [np.array([1])])


def test_a_student_is_not_pushed_towards_a_masked_token() -> None:
    """The gradient of what is compared has no part at an excluded token."""
    from conch_dna.losses import forward_kl

    teacher = log_softmax(mask_taboo_tokens(mx.array([[3.0, 1.0, 0.5]]), np.array([0])))

    def loss(x: mx.array) -> mx.array:
        return forward_kl(teacher, log_softmax(mask_taboo_tokens(x, np.array([0])))).sum()

    gradient = mx.grad(loss)(mx.array([[0.0, 2.0, -1.0]]))
    assert gradient[0, 0].item() == 0
    assert mx.isfinite(gradient).all().item() and gradient[0, 1].item() != 0
