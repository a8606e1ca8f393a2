"""The teacher's targets laid over another tokenizer's tokens, against float64 from full logits."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as numpy_arrays

from conch_dna.language_model import ModelSource
from conch_dna.training.batches import Example
from conch_dna.training.cross_tokenizer.alignments import ALIGNMENTS
from conch_dna.training.cross_tokenizer.outcome_rows import (
    columns_of,
    merged,
    stacked,
    token_before,
    trimmed,
)
from conch_dna.training.cross_tokenizer.records import AlignedExample, RecordAligner
from conch_dna.training.cross_tokenizer.targets import AlignedTargets
from conch_dna.training.cross_tokenizer.token_bytes import token_bytes, token_spans
from conch_dna.training.cross_tokenizer.vocabulary import (
    build_vocab_projection,
    common_roots,
    shared_tokens,
)
from conch_dna.training.soft_targets import SoftTargetCache, target_identity
from models import make_model_folder
from tokenizers_made import character_tokenizer

TEXTS = [
    {"prompt": "Once upon a time", "completion": " there was a little cat who was very happy."},
    {"prompt": "The dog", "completion": " ran to the park. It saw a big red ball!"},
    {"text": "Tom and Sue went home because it was late."},
]
TEMPERATURE = 2.0


@pytest.fixture(scope="module", params=["characters teach BPE", "BPE teaches characters"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path
) -> tuple[ModelSource, ModelSource]:
    folder = tmp_path_factory.mktemp("pair")
    tokenizer = character_tokenizer(folder / "tokenizer")
    other = make_model_folder(folder / "other", seed=5, tokenizer=tokenizer)
    models = ModelSource(str(other)), ModelSource(str(tiny_teacher))
    return models if request.param == "characters teach BPE" else (models[1], models[0])


def made(
    pair: tuple[ModelSource, ModelSource], folder: Path, alignment: str, top_k: int = 16
) -> tuple[list[AlignedExample], AlignedTargets]:
    teacher, student = pair
    aligner = RecordAligner(teacher, student)
    examples = [aligner.align(record, f"example {n}") for n, record in enumerate(TEXTS, 1)]
    kept = top_k if ALIGNMENTS[alignment].soft != "nowhere" else 0
    identity = target_identity(teacher, top_k=kept, temperature=TEMPERATURE)
    targets = AlignedTargets(SoftTargetCache(folder, identity), teacher, student, alignment)
    targets.fill(teacher, examples, batch_size=2)
    return examples, targets


def teacher_log_probs(teacher: ModelSource, ids: np.ndarray, temperature: float) -> np.ndarray:
    """float64 `[T - 1, V]`: what the teacher says about the token behind each."""
    logits = np.asarray(teacher.resident().logits(mx.array(ids)[None]), np.float64)[0, :-1]
    scaled = logits / temperature
    shifted = scaled - scaled.max(-1, keepdims=True)
    log_probs: np.ndarray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return log_probs


@pytest.mark.parametrize("alignment", sorted(set(ALIGNMENTS) - {"alm"}))
def test_every_row_keeps_all_of_the_teachers_probability(
    alignment: str, pair: tuple[ModelSource, ModelSource], tmp_path: Path
) -> None:
    examples, targets = made(pair, tmp_path, alignment)
    batch = targets.collate(examples, TEMPERATURE)
    told = batch.arrays["soft_weights"] > 0
    assert told.sum() > 3
    mass = np.exp(batch.arrays["teacher_log_probs"].astype(np.float64)).sum(-1)
    np.testing.assert_allclose(mass[told], 1, atol=1e-5)


@pytest.mark.parametrize("alignment", ["bytes", "project", "truncate"])
def test_the_outcomes_are_the_teachers_full_distribution_coarsened(
    alignment: str, pair: tuple[ModelSource, ModelSource], tmp_path: Path
) -> None:
    """Each kept token of the student gets what the teacher gives the tokens that map to it."""
    teacher, student = pair
    examples, targets = made(pair, tmp_path, alignment)
    tables = token_bytes(teacher.tokenizer), token_bytes(student.tokenizer)
    if alignment == "project":
        maps = build_vocab_projection(teacher.tokenizer, student.tokenizer).targets
    elif alignment == "bytes":
        maps = shared_tokens(*tables)
    else:
        maps = np.where(np.arange(len(tables[0].pieces)) < len(tables[1].pieces), 1, 0)
        maps = np.where(maps, np.arange(len(maps)), -1)
    batch = targets.collate(examples, TEMPERATURE)
    row = 0
    checked = 0
    for example in examples:
        dense = teacher_log_probs(teacher, example.teacher.ids, TEMPERATURE)
        counted = np.flatnonzero(example.counted)
        for (first, last), (own, own_last) in zip(
            example.chunks.teacher, example.chunks.student, strict=True
        ):
            single = last - first == 1 and own_last - own == 1
            if ALIGNMENTS[alignment].soft == "one-to-one" and not single:
                continue
            at = row + int(np.searchsorted(counted, own))
            assert batch.arrays["soft_weights"][at] == 1
            top = np.argsort(-dense[first - 1], kind="stable")[:16]
            expected: dict[int, float] = {}
            for token in top:
                if maps[token] >= 0:
                    p = float(np.exp(dense[first - 1, token]))
                    expected[int(maps[token])] = expected.get(int(maps[token]), 0.0) + p
            ids = batch.arrays["kept_ids"][at]
            probabilities = np.exp(batch.arrays["teacher_log_probs"][at].astype(np.float64))
            got = {
                int(i): float(p)
                for i, p in zip(ids, probabilities, strict=False)
                if i != student.token_count
            }
            assert got.keys() == expected.keys()
            for token, p in expected.items():
                assert got[token] == pytest.approx(p, rel=1e-3, abs=1e-6)
            assert probabilities[-1] == pytest.approx(1 - sum(expected.values()), abs=1e-4)
            checked += 1
        row += example.count
    assert checked > 3
    assert batch.arrays["soft_weights"].sum() == checked


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
    narrow = np.array([[1]]), np.array([[-1.0, -2.0]])
    wide = np.array([[2, 3]]), np.array([[-3.0, -4.0, -5.0]])
    ids, log_probs = stacked(narrow, wide)
    assert ids.tolist() == [[1, -1], [2, 3]]
    assert log_probs.tolist() == [[-1.0, -np.inf, -2.0], [-3.0, -4.0, -5.0]]


def test_the_token_before_counts_only_where_it_is_taught_as_well() -> None:
    """Behind a prompt, and behind a question within a conversation, there is none."""
    counted = np.array([False, False, True, True, False, True])
    example = Example(np.arange(10, 16, dtype=np.int32), counted, "a conversation")
    assert token_before([example, example]).tolist() == [-1, 12, -1] * 2


def test_a_column_is_found_by_its_id_in_its_own_row() -> None:
    kept = np.array([[4, 2, 9], [1, 9, 9]])
    rows, ids = np.array([0, 0, 1, 1, 1]), np.array([2, 1, 1, 9, 4])
    assert columns_of(kept, rows, ids, 9).tolist() == [1, 3, 0, 3, 3]


def test_at_a_boundary_the_teacher_says_what_comes_next_in_both_of_its_ways(
    pair: tuple[ModelSource, ModelSource], tmp_path: Path
) -> None:
    """With everything kept: tokens that begin there, and longer ones for the token that ended.

    Against an enumeration in float64; what follows in a token that reaches over is read from the
    student's own tokenization of it.
    """
    teacher, student = pair
    examples, targets = made(pair, tmp_path, "roots", top_k=teacher.token_count)
    roots, own_roots = common_roots(teacher.tokenizer, student.tokenizer)
    stored = [targets.cache.read(example.teacher) for example in examples]
    rows = targets._rows(examples)[0]
    ids, log_probs = targets.classes.at_boundaries(examples, stored, rows)
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


def test_likelihoods_of_chunks_are_sums_over_the_teachers_tokens(
    pair: tuple[ModelSource, ModelSource], tmp_path: Path
) -> None:
    teacher, _ = pair
    examples, targets = made(pair, tmp_path, "alm")
    batch = targets.collate(examples, 1.0)
    expected, spans, row = [], [], 0
    for example in examples:
        dense = teacher_log_probs(teacher, example.teacher.ids, 1.0)
        counted = np.flatnonzero(example.counted)
        for (first, last), (own, own_last) in zip(
            example.chunks.teacher, example.chunks.student, strict=True
        ):
            tokens = range(first, last)
            expected.append(sum(dense[t - 1, example.teacher.ids[t]] for t in tokens))
            spans.append(row + np.searchsorted(counted, np.arange(own, own_last)))
        row += example.count
    count = len(expected)
    np.testing.assert_allclose(batch.arrays["chunk_log_probs"][:count], expected, rtol=1e-4)
    assert batch.arrays["chunk_weights"].sum() == count
    for number, rows in enumerate(spans):
        assert (batch.arrays["chunk_index"][rows] == number).all()
    outside = np.ones(len(batch.arrays["labels"]), bool)
    outside[np.concatenate(spans)] = False
    assert (batch.arrays["chunk_index"][outside] == len(batch.arrays["chunk_weights"])).all()


def test_likelihoods_alone_take_four_bytes_a_token(
    pair: tuple[ModelSource, ModelSource], tmp_path: Path
) -> None:
    examples, targets = made(pair, tmp_path, "alm")
    assert targets.identity.bytes_per_token == 4
    data = sum(example.teacher.count for example in examples) * 4
    (shard,) = targets.cache.folder.glob("*.safetensors")
    assert data <= shard.stat().st_size < data + 2000, "the listing of three examples is small"
    assert set(targets.cache.read(examples[0].teacher)) == {"gold_log_prob"}


def test_the_cache_serves_every_alignment_that_keeps_as_much(
    pair: tuple[ModelSource, ModelSource], tmp_path: Path
) -> None:
    made(pair, tmp_path, "bytes")
    teacher, student = pair
    for alignment in ("project", "roots", "uld", "truncate"):
        identity = target_identity(teacher, top_k=16, temperature=TEMPERATURE)
        targets = AlignedTargets(SoftTargetCache(tmp_path, identity), teacher, student, alignment)
        aligner = RecordAligner(teacher, student)
        assert targets.missing([aligner.align(record, "example") for record in TEXTS]) == []


def test_the_stream_digest_tells_alignments_apart(
    pair: tuple[ModelSource, ModelSource], tmp_path: Path
) -> None:
    digests = {made(pair, tmp_path / name, name)[1].digest for name in ("bytes", "roots", "uld")}
    assert len(digests) == 3


def test_evaluation_means_the_same_whatever_was_trained(
    pair: tuple[ModelSource, ModelSource], tmp_path: Path
) -> None:
    batches = []
    for alignment in ("bytes", "roots", "uld"):
        examples, targets = made(pair, tmp_path, alignment)
        batches.append(targets.evaluation_batch(examples).arrays)
    for other in batches[1:]:
        assert batches[0].keys() == other.keys()
        for name, value in batches[0].items():
            np.testing.assert_array_equal(value, other[name])


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_merging_adds_what_goes_to_one_id_and_what_goes_nowhere(data: Any) -> None:
    rows, kept = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    ids = data.draw(numpy_arrays(np.int64, (rows, kept), elements=st.integers(-1, 4)))
    weights = data.draw(numpy_arrays(np.float64, (rows, kept + 1), elements=st.floats(0.001, 1.0)))
    probabilities = weights / weights.sum(1, keepdims=True)
    log_probs = np.log(probabilities)
    got_ids, got, rest = merged(ids, log_probs[:, :-1], log_probs[:, -1])
    for row in range(rows):
        expected: dict[int, float] = {}
        for token, p in zip(ids[row], probabilities[row], strict=False):
            expected[int(token)] = expected.get(int(token), 0.0) + p
        nowhere = expected.pop(-1, 0.0)
        found = {int(i): np.exp(v) for i, v in zip(got_ids[row], got[row], strict=True) if i >= 0}
        assert found == pytest.approx(expected)
        assert np.isneginf(got[row][got_ids[row] < 0]).all()
        assert np.exp(rest[row]) == pytest.approx(probabilities[row, -1] + nowhere)


def test_inside_a_teachers_token_its_longer_tokens_say_what_comes_next(
    tmp_path: Path, tiny_teacher: Path
) -> None:
    """With everything kept: of all tokens that begin with what was read, by their next byte."""
    tokenizer = character_tokenizer(tmp_path / "tokenizer")
    reader = ModelSource(str(make_model_folder(tmp_path / "reader", tokenizer=tokenizer)))
    teacher = ModelSource(str(tiny_teacher))
    examples, targets = made((teacher, reader), tmp_path, "roots", top_k=teacher.token_count)
    stored = [targets.cache.read(example.teacher) for example in examples]
    rows, ids, log_probs, told = targets.classes.inside(examples, stored)
    assert told.all() and len(rows) > 20
    pieces = token_bytes(teacher.tokenizer).texts
    own = token_bytes(reader.tokenizer)
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


def test_inside_a_token_nothing_is_told_where_too_much_was_not_kept(
    tmp_path: Path, tiny_teacher: Path
) -> None:
    """A random teacher's mass lies outside a few kept tokens; it may begin as the text did."""
    tokenizer = character_tokenizer(tmp_path / "tokenizer")
    reader = ModelSource(str(make_model_folder(tmp_path / "reader", tokenizer=tokenizer)))
    examples, targets = made((ModelSource(str(tiny_teacher)), reader), tmp_path, "roots", top_k=4)
    stored = [targets.cache.read(example.teacher) for example in examples]
    *_, told = targets.classes.inside(examples, stored)
    assert not told.any()
    batch = targets.collate(examples, 1.0)
    chunks = sum(len(example.chunks) for example in examples)
    assert 0 < batch.arrays["soft_weights"].sum() <= chunks


def test_with_larger_tokens_there_is_no_inside(tmp_path: Path, tiny_student: Path) -> None:
    tokenizer = character_tokenizer(tmp_path / "tokenizer")
    speller = ModelSource(str(make_model_folder(tmp_path / "speller", tokenizer=tokenizer)))
    examples, targets = made((speller, ModelSource(str(tiny_student))), tmp_path, "roots")
    stored = [targets.cache.read(example.teacher) for example in examples]
    assert [len(part) for part in targets.classes.inside(examples, stored)] == [0] * 4


def test_inside_a_students_token_the_teacher_says_how_its_tokens_go_on(
    tmp_path: Path, tiny_student: Path
) -> None:
    """Against an enumeration of the student's tokens by the text they begin with.

    The teacher reads characters and keeps all of them, so a class is a first character and every
    outcome a next one; a token that ends is the rest, and where none can, the rest is left out.
    """
    tokenizer = character_tokenizer(tmp_path / "tokenizer")
    speller = ModelSource(str(make_model_folder(tmp_path / "speller", tokenizer=tokenizer)))
    student = ModelSource(str(tiny_student))
    top_k = speller.token_count
    examples, targets = made((speller, student), tmp_path / "cache", "roots", top_k=top_k)
    batch = targets.collate(examples, 1.0).arrays
    letters = token_bytes(speller.tokenizer)
    pieces = token_bytes(student.tokenizer).texts
    ordinary = [i for i, piece in enumerate(pieces) if piece]
    checked = offset = 0
    for example in examples:
        dense = np.exp(teacher_log_probs(speller, example.teacher.ids, 1.0))
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
    tmp_path: Path, tiny_student: Path
) -> None:
    """Against an enumeration by text, for a teacher that reads characters."""
    tokenizer = character_tokenizer(tmp_path / "tokenizer")
    speller = ModelSource(str(make_model_folder(tmp_path / "speller", tokenizer=tokenizer)))
    student = ModelSource(str(tiny_student))
    examples, targets = made(
        (speller, student), tmp_path / "cache", "roots", top_k=speller.token_count
    )
    batch = targets.collate(examples, 1.0).arrays
    letters, texts = token_bytes(speller.tokenizer), token_bytes(student.tokenizer).texts
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
    pair: tuple[ModelSource, ModelSource], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples, targets = made(pair, tmp_path, "roots")
    whole = targets.collate(examples, 1.0).arrays
    monkeypatch.setattr("conch_dna.training.cross_tokenizer.roots.MOST_BEGINNERS", 3)
    cut = targets.collate(examples, 1.0).arrays
    reached = (whole["over_tokens"] != targets.student.token_count).sum(1) >= 3
    assert (cut["soft_weights"][reached] == 0).all()
    np.testing.assert_array_equal(cut["soft_weights"][~reached], whole["soft_weights"][~reached])
    assert ((cut["over_tokens"] != targets.student.token_count).sum(1) < 3).all()


def test_with_the_same_tokens_none_reaches_over(tmp_path: Path, tiny_teacher: Path) -> None:
    source = ModelSource(str(tiny_teacher))
    examples, targets = made((source, source), tmp_path, "roots")
    batch = targets.collate(examples, 1.0).arrays
    assert (batch["over_tokens"] == source.token_count).all()
    assert (batch["over_own"] == source.token_count).all()
