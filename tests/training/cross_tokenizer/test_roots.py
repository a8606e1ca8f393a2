"""What a teacher says in classes of tokens, against enumerations of texts in float64."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aligned_pairs import Pair, aligned_targets, teacher_log_probs
from conch_dna.language_model import ModelSource
from conch_dna.training.batches import Example
from conch_dna.training.cross_tokenizer.records import AlignedExample
from conch_dna.training.cross_tokenizer.roots import (
    ClassBatch,
    ClassRows,
    columns_of,
    token_before,
    trimmed,
)
from conch_dna.training.cross_tokenizer.token_bytes import token_bytes, token_spans
from conch_dna.training.cross_tokenizer.vocabulary import common_roots


def class_batch(targets: Any, examples: list[AlignedExample]) -> ClassBatch:
    """What roots look at while they lay a batch."""
    return ClassBatch(
        targets._read(examples)[1], targets.classes, nothing=targets.student.token_count
    )


def test_rows_are_trimmed_to_what_some_row_needs_likeliest_first() -> None:
    ids = np.full((2, 70), -1)
    log_probs = np.full((2, 71), -np.inf)
    ids[0, [3, 50]], log_probs[0, [3, 50, 70]] = [7, 8], [-2.0, -1.0, -3.0]
    ids[1, 69], log_probs[1, [69, 70]] = 9, [-0.5, -0.7]
    found, logs = trimmed(ids, log_probs)
    assert found.shape == (2, 32) and logs.shape == (2, 33)
    assert found[:, :2].tolist() == [[8, 7], [9, -1]]
    assert logs[:, :2].tolist() == [[-1.0, -2.0], [-0.5, -np.inf]]
    assert logs[:, -1].tolist() == [-3.0, -0.7]


def test_stacked_rows_keep_their_rest_last() -> None:
    row, known = np.array([4]), np.array([True])
    narrow = ClassRows(row, np.array([[1]]), np.array([[-1.0, -2.0]]), known)
    wide = ClassRows(row + 1, np.array([[2, 3]]), np.array([[-3.0, -4.0, -5.0]]), ~known)
    both = narrow.above(wide)
    assert both.rows.tolist() == [4, 5] and both.known.tolist() == [True, False]
    assert both.ids.tolist() == [[1, -1], [2, 3]]
    assert both.log_probs.tolist() == [[-1.0, -np.inf, -2.0], [-3.0, -4.0, -5.0]]


def test_the_token_before_counts_only_where_it_is_taught_as_well() -> None:
    """Behind a prompt, and behind a question within a conversation, there is none."""
    counted = np.array([False, False, True, True, False, True])
    example = Example(np.arange(10, 16, dtype=np.int32), counted, "a conversation")
    assert token_before([example, example]).tolist() == [-1, 12, -1] * 2


def test_a_column_is_found_by_its_id_in_its_own_row() -> None:
    kept = np.array([[4, 2, 9], [1, 9, 9]])
    rows, ids = np.array([0, 0, 1, 1, 1]), np.array([2, 1, 1, -1, 4])
    assert columns_of(kept, rows, ids).tolist() == [1, 3, 0, 3, 3]


def test_at_a_boundary_the_teacher_says_what_comes_next_in_both_of_its_ways(
    pair: Pair, tmp_path: Path
) -> None:
    """With everything kept: tokens that begin there, and longer ones for the token that ended.

    Against an enumeration in float64; what follows in a token that reaches over is read from the
    student's own tokenization of it.
    """
    teacher, student = pair
    examples, targets = aligned_targets(pair, tmp_path, "roots", top_k=teacher.token_count)
    roots, own_roots = common_roots(teacher.tokenizer, student.tokenizer)
    batch = class_batch(targets, examples)
    rows = batch.part.chunks.teacher
    ids, log_probs = batch.at_boundaries(rows)
    texts, table = token_bytes(teacher.tokenizer).texts, token_bytes(student.tokenizer)
    probabilities, tokens = [], []
    for example in examples:
        dense = np.exp(teacher_log_probs(teacher, example.teacher.ids, 1.0))
        counted = np.flatnonzero(example.teacher.counted)
        probabilities += [(dense[at - 1], dense[at - 2]) for at in counted]
        joined = example.teacher.counted[counted - 1]
        tokens += np.where(joined, example.teacher.ids[counted - 1], -1).tolist()
    reaching = 0
    for number in range(0, len(rows), 2):
        here, before = probabilities[rows[number]]
        own = tokens[rows[number]]
        over: dict[int, float] = {}
        for token, piece in enumerate(texts) if own >= 0 and texts[own] else ():
            if piece.startswith(texts[own]) and piece != texts[own]:
                root = -1
                try:
                    read = student.tokenizer.encode("\n" + piece.decode(), add_special_tokens=False)
                except UnicodeDecodeError:
                    read = []
                spans = token_spans(b"\n" + piece, read, table) if read else None
                for at in np.flatnonzero(spans.starts == len(texts[own]) + 1) if spans else ():
                    root = int(own_roots[read[at]])
                over[root] = over.get(root, 0.0) + float(before[token])
        ended = float(before[own]) if own >= 0 else 1.0
        expected = {
            int(root): ended * float(here[roots == root].sum()) for root in set(roots.tolist())
        }
        for root, p in over.items():
            expected[root] = expected.get(root, 0.0) + p
        reaching += len(over) > 0
        total = ended + sum(over.values())
        got = np.exp(log_probs[number].astype(np.float64))
        assert set(ids[number][ids[number] >= 0].tolist()) >= {r for r in over if r >= 0}
        for column in np.flatnonzero(ids[number] >= 0):
            assert got[column] == pytest.approx(
                expected[int(ids[number, column])] / total, rel=2e-3, abs=1e-6
            )
        assert got[-1] == pytest.approx(expected.get(-1, 0.0) / total, abs=1e-4)
    assert (reaching > 0) == (len(texts) > 1000), "only words reach over a boundary"


def test_inside_a_teachers_token_its_longer_tokens_say_what_comes_next(
    characters: ModelSource, tmp_path: Path, tiny_teacher: Path
) -> None:
    """With everything kept: of all tokens that begin with what was read, by their next byte."""
    teacher = ModelSource(str(tiny_teacher))
    examples, targets = aligned_targets(
        (teacher, characters), tmp_path, "roots", top_k=teacher.token_count
    )
    inner = class_batch(targets, examples).inside_teacher()
    rows, ids, log_probs = inner.rows, inner.ids, inner.log_probs
    assert inner.known.all() and len(rows) > 20
    pieces = token_bytes(teacher.tokenizer).texts
    own = token_bytes(characters.tokenizer)
    found = {int(row): number for number, row in enumerate(rows)}
    checked = offset = 0
    for example in examples:
        dense = teacher_log_probs(teacher, example.teacher.ids, 1.0)
        number = np.cumsum(example.counted) - 1 + offset
        for (first, last), (start, end) in zip(
            example.chunks.teacher, example.chunks.student, strict=True
        ):
            for at in range(start + 1, end) if last - first == 1 else ():
                read = b"".join(own.texts[i] for i in example.ids[start:at])
                expected: dict[int, float] = {}
                exact = 0.0
                for token, piece in enumerate(pieces):
                    p = float(np.exp(dense[first - 1, token]))
                    if piece == read:
                        exact += p
                    elif piece.startswith(read) and "\ufffd" not in piece.decode(errors="replace"):
                        letter = own.ids[piece[len(read) : len(read) + 1]]
                        expected[letter] = expected.get(letter, 0.0) + p
                total = exact + sum(expected.values())
                row = found[int(number[at])]
                got = dict(zip(ids[row].tolist(), np.exp(log_probs[row]).tolist(), strict=False))
                for letter, p in expected.items():
                    assert got[letter] == pytest.approx(p / total, rel=1e-3, abs=1e-6)
                assert np.exp(log_probs[row, -1]) == pytest.approx(exact / total, abs=1e-4)
                checked += 1
        offset += example.count
    assert checked == len(rows)


def test_inside_a_token_nothing_is_known_where_too_much_was_not_kept(
    characters: ModelSource, tmp_path: Path, tiny_teacher: Path
) -> None:
    """A random teacher's mass lies outside a few kept tokens; it may begin as the text did."""
    examples, targets = aligned_targets(
        (ModelSource(str(tiny_teacher)), characters), tmp_path, "roots", top_k=4
    )
    assert not class_batch(targets, examples).inside_teacher().known.any()
    batch = targets.collate(examples, 1.0)
    chunks = sum(len(example.chunks) for example in examples)
    assert 0 < batch.arrays["soft_weights"].sum() <= chunks


def test_with_larger_tokens_there_is_no_inside(
    characters: ModelSource, tmp_path: Path, tiny_student: Path
) -> None:
    examples, targets = aligned_targets(
        (characters, ModelSource(str(tiny_student))), tmp_path, "roots"
    )
    assert not len(class_batch(targets, examples).inside_teacher().rows)


def test_inside_a_students_token_the_teacher_says_how_its_tokens_go_on(
    characters: ModelSource, tmp_path: Path, tiny_student: Path
) -> None:
    """Against an enumeration of the student's tokens by the text they begin with.

    The teacher reads characters and keeps all of them, so a class is a first character and every
    outcome a next one; a token that ends is the rest, and where none can, the rest is left out.
    """
    student = ModelSource(str(tiny_student))
    top_k = characters.token_count
    examples, targets = aligned_targets(
        (characters, student), tmp_path / "cache", "roots", top_k=top_k
    )
    batch = targets.collate(examples, 1.0).arrays
    letters = token_bytes(characters.tokenizer)
    pieces = token_bytes(student.tokenizer).texts
    ordinary = [i for i, piece in enumerate(pieces) if piece]
    checked = offset = 0
    for example in examples:
        dense = np.exp(teacher_log_probs(characters, example.teacher.ids, 1.0))
        number = np.cumsum(example.counted) - 1 + offset
        offset += example.count
        for (first, _), (start, end) in zip(
            example.chunks.teacher, example.chunks.student, strict=True
        ):
            own = pieces[example.ids[start]]
            if end - start > 1 or not own.isascii():
                continue
            row = number[start]
            for place in range(batch["inner_blank"].shape[1]):
                of_place = batch["outcome_places"][row] == place
                entries = batch["inner_places"][row] == place
                if not np.isfinite(batch["inner_log_probs"][row][of_place]).any():
                    continue
                read = own[: place + 1]
                after = dense[first + place]
                expected: dict[Any, float] = {}
                for token in ordinary:
                    piece = pieces[token]
                    if piece == read:
                        expected["rest"] = 0.0
                    elif piece.startswith(read) and "\ufffd" not in piece.decode(errors="replace"):
                        key = letters.ids[piece[len(read) : len(read) + 1]]
                        # <0x61> and a are both an a.
                        same = [i for i, t in enumerate(letters.texts) if t == letters.texts[key]]
                        expected[key] = float(after[same].sum())
                known = sum(expected.values())
                if "rest" in expected:
                    expected["rest"] = 1 - known
                else:
                    expected = {key: p / known for key, p in expected.items()}
                got: dict[Any, float] = {}
                for member, outcome in zip(
                    batch["inner_tokens"][row][entries],
                    batch["inner_outcomes"][row][entries],
                    strict=True,
                ):
                    assert pieces[member].startswith(read)
                    rest = pieces[member][len(read) :]
                    key = letters.ids[rest[:1]] if rest else "rest"
                    got[key] = float(np.exp(batch["inner_log_probs"][row, outcome]))
                assert got.keys() == expected.keys()
                assert got == pytest.approx(expected, rel=1e-2, abs=1e-5)
                checked += 1
    assert checked > 20


def test_of_a_students_longer_tokens_each_counts_for_what_follows_in_it(
    characters: ModelSource, tmp_path: Path, tiny_student: Path
) -> None:
    """Against an enumeration by text, for a teacher that reads characters."""
    student = ModelSource(str(tiny_student))
    examples, targets = aligned_targets(
        (characters, student), tmp_path / "cache", "roots", top_k=characters.token_count
    )
    batch = targets.collate(examples, 1.0).arrays
    letters, texts = token_bytes(characters.tokenizer), token_bytes(student.tokenizer).texts
    rest = batch["kept_ids"].shape[1]
    row = checked = 0
    for example in examples:
        for at in np.flatnonzero(example.counted):
            own = texts[example.ids[at - 1]]
            longer = {t for t, text in enumerate(texts) if own and text.startswith(own)}
            longer -= {t for t in longer if texts[t] == own}
            told = batch["soft_weights"][row] and example.counted[at - 1]
            # One that both have would have been said a token earlier by both.
            longer = {t for t in longer if len(own) > 1 or texts[t] not in letters.ids}
            columns = batch["over_columns"][row]
            got = dict(zip(batch["over_tokens"][row].tolist(), columns.tolist(), strict=True))
            got.pop(student.token_count, None)
            assert got.keys() == (longer if told else set())
            for token, column in got.items():
                if column < rest:
                    root = batch["kept_ids"][row, column]
                    assert texts[token][len(own) :].startswith(texts[root])
                else:
                    assert not texts[token].isascii()
            checked += len(got)
            row += 1
    assert checked > 100


def test_a_boundary_that_too_many_tokens_reach_over_is_left_to_the_text(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples, targets = aligned_targets(pair, tmp_path, "roots")
    whole = targets.collate(examples, 1.0).arrays
    monkeypatch.setattr("conch_dna.training.cross_tokenizer.roots.MOST_BEGINNERS", 3)
    cut = targets.collate(examples, 1.0).arrays
    reached = (whole["over_tokens"] != targets.student.token_count).sum(1) >= 3
    assert (cut["soft_weights"][reached] == 0).all()
    np.testing.assert_array_equal(cut["soft_weights"][~reached], whole["soft_weights"][~reached])
    assert ((cut["over_tokens"] != targets.student.token_count).sum(1) < 3).all()


def test_with_the_same_tokens_none_reaches_over(tmp_path: Path, tiny_teacher: Path) -> None:
    source = ModelSource(str(tiny_teacher))
    examples, targets = aligned_targets((source, source), tmp_path, "roots")
    batch = targets.collate(examples, 1.0).arrays
    assert (batch["over_tokens"] == source.token_count).all()
    assert (batch["over_own"] == source.token_count).all()
