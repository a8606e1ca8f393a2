"""Heads of unequal size, and which tokenizers are the same; on real tokenizers."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from conch_dna.errors import ConchError
from conch_dna.language_model import load_tokenizer
from conch_dna.losses import compute_kd_loss
from conch_dna.training.vocabulary import (
    ALIGNERS,
    align_vocab_sizes,
    require_same_tokenizer,
    vocabulary_digest,
    vocabulary_table,
)
from models import ASSETS


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


def test_an_unknown_strategy_is_refused() -> None:
    with pytest.raises(ValueError, match=r"strategy 'pad' is unknown: use one of \['truncate'\]"):
        align_vocab_sizes(mx.zeros((1, 3)), mx.zeros((1, 3)), "pad")


@pytest.mark.parametrize("strategy", sorted(ALIGNERS))
def test_every_strategy_brings_both_to_one_size(strategy: str) -> None:
    teacher, student = align_vocab_sizes(mx.zeros((2, 9)), mx.zeros((2, 7)), strategy)
    assert teacher.shape == student.shape


def with_added_token(folder: Path, token: str) -> Path:
    """A copy of the embedded tokenizer with one more token behind the others."""
    for path in (ASSETS / "student").glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    tokens = json.loads((folder / "tokenizer.json").read_text())
    entry = {**tokens["added_tokens"][0], "id": len(tokens["model"]["vocab"]), "content": token}
    tokens["added_tokens"].append(entry)
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    return folder


def test_the_table_holds_every_real_id_with_added_ones(tmp_path: Path) -> None:
    plain = vocabulary_table(load_tokenizer(ASSETS / "student"))
    more = vocabulary_table(load_tokenizer(with_added_token(tmp_path, "<|tool|>")))
    assert sorted(plain) == list(range(len(plain)))
    assert more == {**plain, len(plain): "<|tool|>"}


def test_the_embedded_pair_has_one_vocabulary(tmp_path: Path) -> None:
    teacher, student = (load_tokenizer(ASSETS / name) for name in ("teacher", "student"))
    other = load_tokenizer(with_added_token(tmp_path, "<|tool|>"))
    assert vocabulary_digest(teacher) == vocabulary_digest(student) != vocabulary_digest(other)
    require_same_tokenizer(
        vocabulary_table(teacher), vocabulary_table(student), teacher="a", student="b"
    )


def test_one_more_token_is_another_tokenizer() -> None:
    """The message says how many ids differ and shows the first."""
    student = {0: "a", 1: "b"}
    with pytest.raises(ConchError) as caught:
        require_same_tokenizer({**student, 2: "c"}, student, teacher="big", student="small")
    assert str(caught.value) == (
        "teacher big (3 tokens) and student small (2 tokens) have different tokenizers: 1 ids "
        "differ, such as 2, which is 'c' for the teacher and None for the student. Choose models "
        "of one family"
    )


def test_the_same_tokens_in_another_order_are_another_tokenizer() -> None:
    """Compared by index, one model's "a" would be taught as the other's "b"."""
    with pytest.raises(ConchError, match=r"2 ids differ, such as 0, which is 'a'.*and 'b'"):
        require_same_tokenizer({0: "a", 1: "b"}, {0: "b", 1: "a"}, teacher="t", student="s")


def test_real_tokenizers_of_different_families(shared_data: Path) -> None:
    names = ("stories260K", "babyllama361")
    loaded = [load_tokenizer(shared_data / "models" / name) for name in names]
    with pytest.raises(ConchError, match=r"stories260K \(512 tokens\) and student babyllama361"):
        require_same_tokenizer(
            *(vocabulary_table(tokenizer) for tokenizer in loaded),
            teacher=names[0],
            student=names[1],
        )
    assert vocabulary_digest(loaded[0]) != vocabulary_digest(loaded[1])
