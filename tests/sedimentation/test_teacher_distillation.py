"""The teacher's vectors, their cache, targets at every weight, and the chain when a teacher fails.

Oracles are float64 numpy from formulas.md 6. Teachers are tiny random models; their vectors are
as real as any, only without meaning.
"""

import gc
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest

from conch_dna.errors import ConchError
from conch_dna.sedimentation.adapters.teacher_alignment import (
    compute_alignment_metric,
    fit_alignment,
    generate_hybrid_targets,
    scheduled_weights,
)
from conch_dna.sedimentation.changes.teacher_distillation import (
    STEPS,
    TeacherDistillationHelper,
    create_distillation_helper,
    targets_with_fallback,
)
from conch_dna.sedimentation.config import SCHEDULES, ChelationConfig
from conch_dna.sedimentation.embedders import teachers as teacher_embedders
from conch_dna.sedimentation.embedders.open_embedder import open_embedder
from conch_dna.sedimentation.embedders.teachers import CachedEmbedder, VectorCache
from tiny_embedders import make_tiny_teacher, tiny_texts

TEXTS = tiny_texts(60, seed=7)


def unit_rows(count: int, dimension: int, *, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, dimension))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def normalized(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return (
        make_tiny_teacher(folder / "first", seed=1),
        make_tiny_teacher(folder / "second", seed=2, hidden=48),
    )


@pytest.fixture
def helper(teachers, tmp_path) -> TeacherDistillationHelper:
    return TeacherDistillationHelper(str(teachers[0]), cache_dir=tmp_path / "cache", device="cpu")


# Loading


def test_nothing_is_loaded_before_it_is_needed_and_then_once(teachers, tmp_path):
    first = TeacherDistillationHelper(str(teachers[0]), device="cpu")
    second = TeacherDistillationHelper(str(teachers[0]), device="cpu", cache_dir=tmp_path)
    assert not first.teacher.is_loaded
    model = first.load_teacher_model().model
    assert first.teacher.is_loaded
    assert second.load_teacher_model().embedder.model is model


def test_threads_that_ask_at_once_share_one_model(teachers, monkeypatch):
    loads = []
    kind = type(open_embedder(str(teachers[0])))
    original = kind._load

    def counted(self):
        loads.append(threading.get_ident())
        time.sleep(0.1)
        return original(self)

    monkeypatch.setattr(kind, "_load", counted)
    helpers = [TeacherDistillationHelper(str(teachers[0]), device="cpu") for _ in range(4)]
    threads = [threading.Thread(target=helper.load_teacher_model) for helper in helpers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loads) == 1
    assert len({id(helper.teacher.model) for helper in helpers}) == 1


def test_a_model_is_shared_by_what_it_is_and_a_batch_size_is_its_askers(teachers, tmp_path):
    """The first asker's batch size held for all, and no model ever left the memory."""
    first = open_embedder(str(teachers[0]), device="cpu", batch_size=2)
    copy = shutil.copytree(teachers[0], tmp_path / "same files")
    second = open_embedder(str(copy), device="cpu", batch_size=7)
    assert first.model is second.model
    assert (first.batch_size, second.batch_size) == (2, 7)
    assert open_embedder(str(teachers[1]), device="cpu").model is not first.model
    shutil.copytree(teachers[1], copy, dirs_exist_ok=True)
    assert open_embedder(str(copy), device="cpu").dimension == 48, "other files of the same name"
    model = weakref.ref(first.model)
    del first
    gc.collect()
    assert model() is not None, "the second still has it"
    del second
    gc.collect()
    assert model() is None


def test_a_missing_teacher_is_said_at_once_by_create_and_later_by_the_class():
    with pytest.raises(ConchError, match="'/nowhere' does not exist"):
        create_distillation_helper("/nowhere")
    late = TeacherDistillationHelper("/nowhere")
    with pytest.raises(ConchError, match="'/nowhere' does not exist"):
        late.load_teacher_model()


@pytest.mark.parametrize("names", ["", [], ["a", ""]])
def test_no_teacher_is_refused(names):
    with pytest.raises(ConchError, match="no teacher is named"):
        TeacherDistillationHelper(names)


# The cache


def test_the_cache_gives_the_same_vectors_and_needs_no_model(helper, teachers, tmp_path):
    vectors = helper.get_teacher_embeddings(TEXTS)
    assert (helper.teacher.computed, helper.teacher.found) == (len(TEXTS), 0)
    again = create_distillation_helper(str(teachers[0]), cache_dir=tmp_path / "cache", device="cpu")
    order = TEXTS[::-1]
    np.testing.assert_array_equal(again.get_teacher_embeddings(order), vectors[::-1])
    assert (again.teacher.computed, again.teacher.found) == (0, len(TEXTS))
    assert again.teacher.dimension == 32
    assert not again.teacher.embedder.is_loaded


def test_only_what_is_missing_is_computed_and_equal_texts_once(helper):
    helper.get_teacher_embeddings(TEXTS[:10])
    vectors = helper.get_teacher_embeddings([TEXTS[3], TEXTS[50], TEXTS[50], TEXTS[3]])
    assert (helper.teacher.computed, helper.teacher.found) == (11, 2)
    np.testing.assert_array_equal(vectors[0], vectors[3])
    np.testing.assert_array_equal(vectors[1], vectors[2])


def test_queries_and_documents_are_kept_apart(helper):
    helper.get_teacher_embeddings(TEXTS[:2])
    helper.get_teacher_embeddings(TEXTS[:2], queries=True)
    assert helper.teacher.computed == 4


def test_another_teacher_finds_nothing_of_this_one(helper, teachers, tmp_path):
    helper.get_teacher_embeddings(TEXTS[:2])
    other = TeacherDistillationHelper(str(teachers[1]), cache_dir=tmp_path / "cache", device="cpu")
    assert other.get_teacher_embeddings(TEXTS[:2]).shape == (2, 48)
    assert other.teacher.found == 0


def test_a_damaged_shard_is_found_said_and_computed_again(helper, tmp_path, caplog):
    vectors = helper.get_teacher_embeddings(TEXTS[:5])
    helper.get_teacher_embeddings(TEXTS[5:8])
    shards = sorted(helper.teacher.cache.folder.glob("vectors-*"))
    assert len(shards) == 2
    damaged = max(shards, key=lambda path: path.stat().st_size)
    data = bytearray(damaged.read_bytes())
    data[-2] ^= 64
    damaged.write_bytes(data)
    again = CachedEmbedder(helper.teacher.embedder, tmp_path / "cache")
    with caplog.at_level(logging.WARNING):
        found = again.documents(TEXTS[:8])
    np.testing.assert_array_equal(found.vectors[:5], vectors)
    assert (again.computed, again.found) == (5, 3)
    assert f"{damaged.name} is damaged" in caplog.text


def test_a_truncated_shard_is_found_too(helper, tmp_path):
    helper.get_teacher_embeddings(TEXTS[:5])
    (shard,) = helper.teacher.cache.folder.glob("vectors-*")
    shard.write_bytes(shard.read_bytes()[:40])
    again = CachedEmbedder(helper.teacher.embedder, tmp_path / "cache")
    assert again.documents(TEXTS[:5]).kept == [0, 1, 2, 3, 4]
    assert again.computed == 5


def test_a_file_that_another_process_renames_or_deletes_meanwhile_is_no_failure(
    helper, tmp_path, monkeypatch, caplog
):
    vectors = helper.get_teacher_embeddings(TEXTS[:5])
    folder = helper.teacher.cache.folder
    (shard,) = folder.glob("vectors-*")
    unfinished = folder / ".writing-1-vectors"
    unfinished.touch()
    now = time.time()

    def clock():
        # Between the look into the folder and the look at the file.
        unfinished.rename(folder / "renamed")
        return now

    monkeypatch.setattr(teacher_embedders.time, "time", clock)
    again = VectorCache(tmp_path / "cache", helper.teacher.digest)
    assert len(again) == 5 and (folder / "renamed").is_file()
    monkeypatch.undo()

    def read_bytes(path):
        path.unlink()
        raise FileNotFoundError(path)

    kept = shard.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", read_bytes)
        assert len(VectorCache(tmp_path / "cache", helper.teacher.digest)) == 0
    shard.write_bytes(kept)
    other = TeacherDistillationHelper(helper.teacher_model_name, cache_dir=tmp_path / "cache")
    assert len(other.teacher.cache) == 5
    shard.unlink()
    np.testing.assert_allclose(other.get_teacher_embeddings(TEXTS[:5]), vectors, atol=1e-6)
    assert "was deleted: its vectors will be computed again" in caplog.text


def test_large_inputs_go_shard_by_shard(helper, monkeypatch):
    monkeypatch.setattr(teacher_embedders, "SHARD_ROWS", 16)
    texts = [*TEXTS[:20], "", *TEXTS[20:40]]
    found = helper.embed(iter(texts))
    assert found.kept == [*range(20), *range(21, 41)] and list(found.errors) == [20]
    assert len(list(helper.teacher.cache.folder.glob("vectors-*"))) == 3
    plain = open_embedder(str(helper.names[0]), device="cpu").documents(texts)
    np.testing.assert_allclose(found.vectors, plain.vectors, atol=2e-6)


def _write_until_killed(folder: Path) -> None:
    cache = VectorCache(folder, "d" * 64)
    for number in range(100_000):
        keys = [bytes([number % 256, number // 256, row] + [0] * 29) for row in range(64)]
        cache.add(keys, np.full((64, 8), number, np.float32))


@pytest.mark.parametrize(
    "delay_s", [0.05, *(pytest.param(each, marks=pytest.mark.slow) for each in (0.11, 0.2))]
)
def test_a_kill_leaves_whole_shards_only(tmp_path, delay_s, caplog):
    process = multiprocessing.get_context("spawn").Process(
        target=_write_until_killed, args=(tmp_path,)
    )
    process.start()
    folder = tmp_path / ("d" * 32)
    while len(list(folder.glob("vectors-*"))) < 3:
        assert process.is_alive()
        time.sleep(0.01)
    time.sleep(delay_s)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    cache = VectorCache(tmp_path, "d" * 64)
    shards = len(list(folder.glob("vectors-*")))
    assert shards >= 3 and len(cache) == 64 * shards
    assert "is damaged" not in caplog.text
    keys = [bytes([2, 0, row] + [0] * 29) for row in range(64)]
    assert {float(vector[0]) for vector in cache.find(keys).values()} == {2.0}


def test_a_text_the_teacher_cannot_embed_is_named(helper):
    with pytest.raises(ConchError, match=r"1 of 3 texts .* number 2: it is empty or only white"):
        helper.get_teacher_embeddings([TEXTS[0], " ", TEXTS[1]])


def test_a_cache_with_another_dimension_is_refused(helper, tmp_path):
    cache = VectorCache(tmp_path / "cache", helper.teacher.digest)
    cache.add([bytes(32)], np.ones((1, 5), np.float32))
    with pytest.raises(ConchError, match=r"gives 32 dimensions and .* holds vectors of 5"):
        helper.get_teacher_embeddings(TEXTS[:1])


# Several teachers


def test_cosines_of_several_teachers_are_the_weighted_mean(teachers, tmp_path):
    names, weights = [str(each) for each in teachers], (3.0, 1.0)
    helper = TeacherDistillationHelper(
        names, weights=weights, device="cpu", cache_dir=tmp_path / "cache"
    )
    both = helper.get_teacher_embeddings(TEXTS[:12]).astype(np.float64)
    assert both.shape == (12, 80)
    parts = [
        TeacherDistillationHelper(name, device="cpu").get_teacher_embeddings(TEXTS[:12])
        for name in names
    ]
    first, second = (part.astype(np.float64) @ part.T.astype(np.float64) for part in parts)
    np.testing.assert_allclose(both @ both.T, 0.75 * first + 0.25 * second, atol=2e-6)
    assert helper.check_dimension_compatibility(80).equal


def test_other_weights_find_the_same_vectors(teachers, tmp_path):
    names = [str(each) for each in teachers]
    digests = set()
    for weights in (None, (1, 2)):
        helper = TeacherDistillationHelper(
            names, weights=weights, device="cpu", cache_dir=tmp_path / "cache"
        )
        helper.get_teacher_embeddings(TEXTS[:4])
        digests.add(helper.teacher.digest)
    assert [each.computed for each in helper.teacher.embedders] == [0, 0]
    assert len(digests) == 2


@pytest.mark.parametrize("weights", [(1,), (1, 0), (1, -1), (1, float("nan"))])
def test_weights_that_do_not_fit_are_refused(teachers, weights):
    with pytest.raises(ConchError, match=r"weights .*do not fit 2 teachers"):
        _ = TeacherDistillationHelper([str(each) for each in teachers], weights=weights).teacher


# Alignment


def test_the_check_tells_a_turn_from_a_map(helper):
    equal, other = (helper.check_dimension_compatibility(each) for each in (32, 20))
    assert (equal.teacher_dimension, equal.student_dimension) == (32, 32)
    assert (equal.equal, equal.needs_map, equal.keeps_cosines) == (True, False, True)
    assert (other.equal, other.needs_map, other.keeps_cosines) == (False, True, False)
    assert helper.check_dimension_compatibility(33).keeps_cosines
    with pytest.raises(ConchError, match="student dimension 0 must be 1 or more"):
        helper.check_dimension_compatibility(0)


def test_a_turned_student_is_turned_back():
    student = unit_rows(200, 16)
    rotation = np.linalg.qr(np.random.default_rng(1).standard_normal((16, 16)))[0]
    found = fit_alignment(student @ rotation, student).apply(student @ rotation)
    np.testing.assert_allclose(found, student, atol=1e-5)


@pytest.mark.parametrize("dimension", [16, 20])
def test_a_student_that_is_not_smaller_keeps_the_teachers_cosines(dimension):
    teacher, student = unit_rows(100, 16, seed=1), unit_rows(100, dimension, seed=2)
    found = fit_alignment(teacher, student).apply(teacher).astype(np.float64)
    assert found.shape == student.shape
    np.testing.assert_allclose(found @ found.T, teacher @ teacher.T, atol=1e-5)


@pytest.mark.parametrize(("dimension", "teacher_dimension"), [(8, 12), (12, 8)])
def test_the_map_is_the_best_isometry_between_the_spaces(dimension, teacher_dimension):
    """No other map with orthonormal columns or rows brings the two closer; 500 were tried."""
    rng = np.random.default_rng(3)
    small = min(dimension, teacher_dimension)
    student = unit_rows(300, dimension, seed=3)
    teacher = unit_rows(300, teacher_dimension, seed=4)
    teacher[:, :small] += student[:, :small]
    teacher = normalized(teacher)
    matrix = fit_alignment(teacher, student).matrix
    found, bias = matrix[:-1], matrix[-1]
    thin = found if teacher_dimension > dimension else found.T
    np.testing.assert_allclose(thin.T @ thin, np.eye(small), atol=1e-6)
    assert not bias.any()
    best = np.sum((teacher @ found) * student)
    for _ in range(500):
        other = np.linalg.qr(thin + 0.1 * rng.standard_normal(thin.shape))[0]
        other *= np.sign(np.sum(other * thin, axis=0))
        other = other if teacher_dimension > dimension else other.T
        assert np.sum((teacher @ other) * student) < best


def test_a_teacher_that_holds_the_student_without_loss_says_nothing_new():
    student = unit_rows(400, 16)
    frame = np.linalg.qr(np.random.default_rng(1).standard_normal((24, 24)))[0]
    found = fit_alignment(student @ frame[:16], student).apply(student @ frame[:16])
    np.testing.assert_allclose(found, student, atol=1e-5)


def test_a_teacher_that_knows_more_draws_the_students_cosines_towards_its_own():
    """A ridge from teacher to student would not: it only repeats the student."""
    meaning = unit_rows(400, 12, seed=5)
    frame = np.linalg.qr(np.random.default_rng(7).standard_normal((12, 12)))[0]
    teacher = meaning @ frame
    student = normalized(meaning[:, :8] + 0.3 * unit_rows(400, 8, seed=6))
    target = generate_hybrid_targets(
        student, fit_alignment(teacher, student).apply(teacher), 0.5
    ).astype(float)
    extended = np.c_[teacher, np.ones(400)]
    ridge = np.linalg.solve(extended.T @ extended + 0.01 * np.eye(13), extended.T @ student)
    repeated = generate_hybrid_targets(student, normalized(extended @ ridge), 0.5).astype(float)
    upper = np.triu_indices(400, 1)
    agreement = [
        np.corrcoef((rows @ rows.T)[upper], (teacher @ teacher.T)[upper])[0, 1]
        for rows in (student, target, repeated)
    ]
    assert agreement[1] > agreement[0] + 0.02


def test_too_few_texts_to_align_on_are_said(caplog):
    with caplog.at_level(logging.WARNING):
        fit_alignment(unit_rows(5, 8), unit_rows(5, 8, seed=1))
    assert "aligned on 5 texts, fewer than the 8 dimensions" in caplog.text
    with pytest.raises(ConchError, match="no texts to align the teacher on"):
        fit_alignment(np.zeros((0, 8)), np.zeros((0, 6)))
    with pytest.raises(ConchError, match="teacher and student vectors of the same texts"):
        fit_alignment(unit_rows(5, 8), unit_rows(6, 8))


# Targets


def test_weight_0_is_a_copy_of_the_students_and_asks_no_teacher():
    helper = TeacherDistillationHelper("/nowhere")
    current = unit_rows(3, 8).astype(np.float32)
    found = helper.generate_distillation_targets(TEXTS[:3], current, 0)
    np.testing.assert_array_equal(found, current)
    assert found is not current and not np.shares_memory(found, current)


@pytest.mark.parametrize("dimension", [32, 20])
def test_weight_1_is_the_teachers_in_its_own_space(helper, dimension):
    found = helper.generate_distillation_targets(TEXTS, unit_rows(60, dimension))
    np.testing.assert_array_equal(found, helper.get_teacher_embeddings(TEXTS))


@pytest.mark.parametrize("dimension", [32, 20, 40])
def test_between_it_is_a_blend_in_the_students_space(helper, dimension):
    current = unit_rows(60, dimension).astype(np.float32)
    teacher = helper.get_teacher_embeddings(TEXTS)
    turned = fit_alignment(teacher, current).apply(teacher).astype(np.float64)
    found = helper.generate_distillation_targets(TEXTS, current, 0.3)
    np.testing.assert_allclose(found, normalized(0.7 * current + 0.3 * turned), atol=1e-6)
    closer = [
        compute_alignment_metric(helper.generate_distillation_targets(TEXTS, current, a), turned)
        for a in (0.1, 0.5, 0.9)
    ]
    assert closer == sorted(closer) and closer[0] < closer[-1]


def test_an_alignment_of_more_texts_is_used_where_given(helper):
    current = unit_rows(60, 32).astype(np.float32)
    alignment = fit_alignment(helper.get_teacher_embeddings(TEXTS), current)
    whole = helper.generate_distillation_targets(TEXTS, current, 0.5)
    part = helper.generate_distillation_targets(TEXTS[:6], current[:6], 0.5, alignment=alignment)
    np.testing.assert_allclose(part, whole[:6], atol=1e-6)


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan")])
def test_weights_out_of_range_are_refused_and_not_clamped(helper, weight):
    with pytest.raises(ConchError, match=r"teacher_weight .* is not between 0"):
        helper.generate_distillation_targets(TEXTS[:1], unit_rows(1, 8), weight)
    with pytest.raises(ConchError, match=r"teacher_weight .* is not between 0"):
        generate_hybrid_targets(unit_rows(1, 8), unit_rows(1, 8), weight)


def test_texts_and_vectors_that_do_not_belong_together_are_refused(helper):
    with pytest.raises(ConchError, match=r"2 texts and vectors of shape \[3, 8\]"):
        helper.generate_distillation_targets(TEXTS[:2], unit_rows(3, 8), 0.5)


def test_hybrid_targets_follow_the_formula():
    homeostatic, teacher = unit_rows(5, 6, seed=1), unit_rows(5, 6, seed=2)
    found = generate_hybrid_targets(homeostatic, teacher, 0.25)
    np.testing.assert_allclose(found, normalized(0.75 * homeostatic + 0.25 * teacher), atol=1e-6)
    np.testing.assert_allclose(
        generate_hybrid_targets(homeostatic, teacher, 0), homeostatic, atol=1e-6
    )
    np.testing.assert_allclose(generate_hybrid_targets(homeostatic, teacher, 1), teacher, atol=1e-6)
    with pytest.raises(ConchError, match=r"shapes \[5, 6\] and \[5, 4\] cannot be mixed"):
        generate_hybrid_targets(homeostatic, teacher[:, :4], 0.5)
    with pytest.raises(ConchError, match="mixed targets are all zero"):
        generate_hybrid_targets([[1.0, 0.0]], [[-1.0, 0.0]], 0.5)


def test_the_metric_is_the_mean_cosine(helper):
    first, second = unit_rows(9, 5, seed=1), unit_rows(9, 5, seed=2)
    expected = np.mean(np.sum(first * second, axis=1))
    assert compute_alignment_metric(3 * first, second) == pytest.approx(expected, abs=1e-6)
    assert helper.compute_alignment_metric(first, -first) == pytest.approx(-1)
    assert compute_alignment_metric([], []) == compute_alignment_metric(np.zeros((0, 4)), []) == 0.0
    with pytest.raises(ConchError, match="have no cosine"):
        compute_alignment_metric(first, second[:, :4])


# The schedule


def weights_of(schedule: str, start: float, end: float, epochs: int) -> list[float]:
    return scheduled_weights(
        ChelationConfig(
            teacher_weight_schedule=schedule,
            teacher_weight=start,
            teacher_weight_end=end,
            epochs=epochs,
        )
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (0.9, 0.2)])
def test_schedules_go_from_start_to_end_without_turning_back(schedule, start, end):
    found = weights_of(schedule, start, end, 11)
    assert len(found) == 11 and found[0] == start
    assert found[-1] == pytest.approx(start if schedule == "constant" else end)
    steps = np.diff(found) * np.sign(end - start)
    assert (steps >= 0).all()
    assert weights_of(schedule, start, end, 1) == [start]


def test_the_middles_of_the_schedules():
    weights = {name: weights_of(name, 0.0, 1.0, 5) for name in SCHEDULES}
    assert {name: found[1] for name, found in weights.items()} == {
        "constant": 0.0,
        "linear": 0.25,
        "cosine": pytest.approx((1 - np.cos(np.pi / 4)) / 2),
        "step": 0.0,
    }
    assert weights["step"][2] == 1.0


# The chain


def pushed(rows: np.ndarray) -> np.ndarray:
    return normalized(rows + 0.1)


def test_where_everything_works_the_targets_are_the_teachers(helper):
    current = unit_rows(60, 32).astype(np.float32)
    chain = targets_with_fallback(TEXTS, current, helper=helper, homeostatic=pushed)
    teacher = helper.get_teacher_embeddings(TEXTS)
    turned = fit_alignment(teacher, current).apply(teacher)
    np.testing.assert_allclose(chain.targets, turned, atol=1e-6)
    np.testing.assert_allclose(chain.without_teacher, pushed(current), atol=1e-6)
    assert chain.kept == list(range(60)) and chain.reasons == []
    assert chain.counts == {"teacher": 60, "homeostatic": 0, "unchanged": 0, "skipped": 0}
    alone = targets_with_fallback(TEXTS, current, helper=helper)
    np.testing.assert_array_equal(alone.without_teacher, current)


def test_without_a_teacher_the_homeostatic_targets_are_no_failure(caplog):
    current = unit_rows(4, 8).astype(np.float32)
    chain = targets_with_fallback(TEXTS[:4], current, homeostatic=pushed)
    np.testing.assert_allclose(chain.targets, pushed(current), atol=1e-6)
    assert chain.counts["homeostatic"] == 4
    assert chain.reasons == [] and caplog.records == []


def test_a_teacher_that_is_missing_leaves_the_homeostatic_and_says_why(caplog):
    current = unit_rows(4, 8).astype(np.float32)
    chain = targets_with_fallback(
        TEXTS[:4], current, helper=TeacherDistillationHelper("/nowhere"), homeostatic=pushed
    )
    np.testing.assert_allclose(chain.targets, pushed(current), atol=1e-6)
    assert chain.counts == {"teacher": 0, "homeostatic": 4, "unchanged": 0, "skipped": 0}
    assert "teacher gave no target for 4 of 4 texts: " in chain.reasons[0]
    assert "'/nowhere' does not exist" in caplog.text


def test_without_a_homeostatic_target_the_vector_stays_as_it_is(caplog):
    def failing(rows):
        raise ConchError("no noise centre")

    current = unit_rows(4, 8).astype(np.float32)
    chain = targets_with_fallback(
        TEXTS[:4], current, helper=TeacherDistillationHelper("/nowhere"), homeostatic=failing
    )
    np.testing.assert_allclose(chain.targets, current, atol=1e-6)
    assert chain.steps == ["unchanged"] * 4
    assert len(chain.reasons) == 2 and "no noise centre" in caplog.text


def test_each_text_takes_the_best_step_it_can(helper, caplog):
    """One text the teacher refuses, one whose homeostatic target is broken, one without vector."""
    texts = list(TEXTS)
    texts[1] = texts[2] = " "
    current = unit_rows(60, 32).astype(np.float32)
    current[3] = np.nan
    current[4] = 0

    def broken_for_2(rows):
        found = pushed(rows)
        found[2] = np.inf
        return found

    with caplog.at_level(logging.WARNING):
        chain = targets_with_fallback(texts, current, helper=helper, homeostatic=broken_for_2)
    assert chain.steps[:6] == [
        "teacher",
        "homeostatic",
        "unchanged",
        "skipped",
        "skipped",
        "teacher",
    ]
    assert chain.counts == {"teacher": 56, "homeostatic": 1, "unchanged": 1, "skipped": 2}
    assert chain.kept == [0, 1, 2, *range(5, 60)]
    assert tuple(chain.counts) == STEPS
    np.testing.assert_allclose(chain.targets[1], pushed(current[1:2])[0], atol=1e-6)
    np.testing.assert_allclose(chain.targets[2], current[2], atol=1e-6)
    critical = [record for record in caplog.records if record.levelno == logging.CRITICAL]
    assert [record.getMessage() for record in critical] == [
        "2 of 60 texts have no usable vector at all: they are skipped"
    ]
    assert len(chain.reasons) == 3


def test_where_no_vector_is_usable_the_result_is_empty():
    chain = targets_with_fallback(TEXTS[:2], np.zeros((2, 8)), homeostatic=pushed)
    assert chain.targets.shape == (0, 8) and chain.kept == []


def test_a_fault_of_the_program_is_no_reason_to_fall_back(helper):
    def faulty(rows):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        targets_with_fallback(TEXTS[:2], unit_rows(2, 8), homeostatic=faulty)
