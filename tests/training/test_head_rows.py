"""Models whose head has fewer rows than their tokenizer has tokens.

A marker was added to the tokenizer and the embedding not resized: mlx would read and write whatever
lies behind the last row. gemma-3-1b is such a model.
"""

import math
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from conch_dna.errors import ConchError
from conch_dna.language_model import ASSETS, ModelSource
from conch_dna.training.data.examples import KINDS, Examples
from conch_dna.training.data.outcomes import compress
from conch_dna.training.true_kd import KDConfig, TrueKnowledgeDistiller, plan_domain
from models import make_model_folder
from tokenizers_made import byte_level_tokenizer, tokenizer_with_marker

TOKENS, MARKER = 1536, "<marker>"
DATA = [{"prompt": f"There was a {n}", "completion": f" and {n} red balls."} for n in range(12)]
SETTINGS = {
    "num_iters": 4,
    "batch_size": 2,
    "learning_rate": 1e-2,
    "warmup_iters": 0,
    "steps_per_eval": 2,
    "steps_per_save": 4,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded tokenizer with one token more, number 1536."""
    folder = tmp_path_factory.mktemp("tokenizer")
    return tokenizer_with_marker(ASSETS / "student", folder, MARKER)


@pytest.fixture(scope="module")
def teacher(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It has a row for the marker, and some for padding."""
    folder = tmp_path_factory.mktemp("models") / "teacher"
    return make_model_folder(folder, seed=1, tokenizer=tokenizer, vocab_size=TOKENS + 32)


@pytest.fixture(scope="module")
def student(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It has none for the marker."""
    folder = tmp_path_factory.mktemp("models") / "student"
    return make_model_folder(folder, seed=2, tokenizer=tokenizer, vocab_size=TOKENS)


def test_the_real_tokens_of_a_model_are_those_it_has_rows_for(teacher, student):
    assert ModelSource(str(teacher)).vocabulary_size == TOKENS + 1
    assert ModelSource(str(student)).vocabulary_size == TOKENS
    assert ModelSource(str(student)).load().vocabulary_size == TOKENS


def test_what_the_student_has_no_row_for_is_part_of_the_rest():
    """Forward KL over K + 1 outcomes would be infinite if such a token were kept."""
    logits = mx.array([[0.0, 1.0, 2.0, 9.0]])
    kept = compress(logits, mx.array([0]), top_k=2, temperatures=(1.0, 2.0), kept_below=3)
    assert sorted(np.asarray(kept["kept_ids"])[0].tolist()) == [1, 2]
    for column, t in enumerate((1.0, 2.0)):
        powers = [math.exp(value / t) for value in (0.0, 1.0, 2.0, 9.0)]
        rest = math.log((powers[0] + powers[3]) / sum(powers))
        assert float(kept["log_rest"][0, column]) == pytest.approx(rest, abs=1e-6)


def test_a_pair_trains_and_keeps_no_token_beyond_the_last_row(teacher, student, tmp_path):
    config = KDConfig(**SETTINGS, top_k=1500, output_dir=str(tmp_path))
    distiller = TrueKnowledgeDistiller(str(teacher), str(student), config)
    result = distiller.distill_domain("own", data=DATA)
    assert math.isfinite(result.final_kd_loss)
    examples = Examples(distiller.teacher, distiller.student, config)
    split = examples.split(DATA)
    targets = examples.targets(tmp_path / "own" / "soft_targets")
    batch = targets.collate(split.heldout, config.temperature)
    assert batch.arrays["kept_ids"].max() < TOKENS
    assert np.allclose(np.exp(batch.arrays["teacher_log_probs"]).sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize("top_k", [TOKENS, TOKENS + 1])
def test_nothing_left_for_the_others_is_refused_before_anything_runs(
    teacher, student, tmp_path, top_k
):
    config = KDConfig(**SETTINGS, top_k=top_k, output_dir=str(tmp_path))
    models = ModelSource(str(teacher)), ModelSource(str(student))
    with pytest.raises(ConchError, match="rows for 1536 of the teacher's 1537 tokens"):
        plan_domain(*models, config, "own", data=DATA)


@pytest.mark.parametrize("planned", [True, False])
def test_a_text_with_such_a_token_is_refused_before_anything_runs(
    teacher, student, tmp_path, planned
):
    config = KDConfig(**SETTINGS, output_dir=str(tmp_path))
    data = [*DATA, {"prompt": "A", "completion": f" ball {MARKER} and a cat."}]
    message = r"example 13 has token 1536 \(<marker>\), but .*student has rows for 0 to 1535"
    models = ModelSource(str(teacher)), ModelSource(str(student))
    run = TrueKnowledgeDistiller(str(teacher), str(student), config).distill_domain
    work = partial(plan_domain, *models, config) if planned else run
    with pytest.raises(ConchError, match=message):
        work("own", data=data)


def test_a_prompt_with_such_a_token_is_refused(student, tmp_path):
    config = KDConfig(**SETTINGS, output_dir=str(tmp_path), force=True)
    distiller = TrueKnowledgeDistiller(str(student), str(student), config)
    with pytest.raises(ConchError, match="prompt 2 has token 1536"):
        distiller.generate_training_data(["A cat", f"A {MARKER} cat"], "own")


# Another tokenizer


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of words that has no rows for the last 24 of its tokenizer's tokens."""
    folder = tmp_path_factory.mktemp("words")
    tokenizer = byte_level_tokenizer(folder / "tokenizer", size=344)
    return make_model_folder(folder / "model", seed=3, tokenizer=tokenizer, vocab_size=320)


# Words whose tokens are all below 320.
PLAIN = [{"text": f"the {a} time upon the {b}, lit and done."} for a in "abcdef" for b in "xyz"]
INDICES = ("kept_ids", "best_ids", "over_own", "over_tokens", "inner_tokens")


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_no_token_without_a_row_is_compared_across_tokenizers(
    teacher, words, tmp_path, kind, reverse
):
    folders = (words, teacher) if reverse else (teacher, words)
    pair = tuple(ModelSource(str(folder)) for folder in folders)
    config = KDConfig(batch_size=4, top_k=256, temperature=1.0)
    examples = Examples(*pair, config, across=kind)
    _, made = examples.make(PLAIN)
    targets = examples.targets(tmp_path)
    targets.fill(pair[0], made, batch_size=4)
    student = pair[1].load()
    rows, nothing = pair[1].vocabulary_size, pair[1].token_count
    assert rows < nothing or reverse
    for batch in (targets.collate(made, 1.0), targets.evaluation_batch(made)):
        for name in INDICES:
            ids = batch.arrays.get(name, np.zeros(0))
            assert ((ids < rows) | (ids == nothing)).all(), name
        if "teacher_log_probs" in batch.arrays:
            mass = np.exp(batch.arrays["teacher_log_probs"]).sum(-1)
            assert np.allclose(mass[batch.arrays["soft_weights"] > 0], 1, atol=1e-5)
    arrays = {n: mx.array(v) for n, v in targets.collate(made, 1.0).arrays.items()}
    sums = targets.loss(student, config)(student.model, arrays)
    assert math.isfinite(sums["loss"].item())
    if kind == "roots":
        assert targets.classes.student_roots.max() < rows
        assert targets.classes.teacher_roots.max() < rows


@pytest.mark.parametrize("alignment", ["roots", "alm"])
def test_such_a_pair_trains(teacher, words, tmp_path, alignment):
    config = KDConfig(**SETTINGS, alignment=alignment, output_dir=str(tmp_path))
    distiller = TrueKnowledgeDistiller(str(teacher), str(words), config)
    result = distiller.distill_domain("own", data=PLAIN)
    assert math.isfinite(result.final_kd_loss)
    figures = [value for value in result.evaluation["after"].values() if value is not None]
    assert all(map(math.isfinite, figures))


def test_a_text_that_needs_such_a_token_is_refused_across_tokenizers(teacher, words, tmp_path):
    config = KDConfig(**SETTINGS, output_dir=str(tmp_path))
    models = ModelSource(str(teacher)), ModelSource(str(words))
    last = models[1].tokenizer.decode([343])
    with pytest.raises(ConchError, match=r"example 19 has token \d+ .*rows for 0 to 319"):
        plan_domain(*models, config, "own", data=[*PLAIN, {"text": f"{last} {last}"}])
