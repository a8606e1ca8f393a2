"""A student's own model as its teacher: as it was, or following the student, and in memory once.

The models are tiny and random; the values that a teacher should have are worked out beside it.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

from conch_dna.errors import ConchError
from conch_dna.language_model import LanguageModel, ModelSource, named_arrays
from conch_dna.training.adapters import make_trainable
from conch_dna.training.data.soft_targets import SoftTargetCache
from conch_dna.training.runs.on_policy import rounds as rounds_module
from conch_dna.training.runs.on_policy.own_teacher import VALUES_FILE, OwnTeacher
from conch_dna.training.runs.on_policy.questions import questions_of
from conch_dna.training.settings import KDConfig
from conch_dna.training.trainer import CHECKPOINT_PREFIX, Trainer
from conch_dna.training.true_kd import TrueKnowledgeDistiller, plan_domain
from models import QUICK, make_model_folder
from watching import stopped

IDS = mx.array([[5, 9, 3, 7]])
RECORDS = [
    {"prompt": f"Who saw {n}?", "completion": f" It was number {n}.", "context": "Read this."}
    for n in range(12)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_model_folder(tmp_path_factory.mktemp("models") / "student"))


@pytest.fixture(params=["lora", "dora", "full"])
def student(request: pytest.FixtureRequest, model: str) -> LanguageModel:
    student = ModelSource(model).load()
    made = {} if request.param == "lora" else {request.param: True}
    make_trainable(student, KDConfig(lora_dropout=0.5, **made))
    return student


def learn(student: LanguageModel, by: float) -> None:
    """Move all that is trained."""
    parameters = student.model.trainable_parameters()
    student.model.update(tree_map(lambda array: array + by, parameters))
    student.model.train()


def test_a_teacher_that_does_not_follow_is_the_model_before(student: LanguageModel, model: str):
    base = ModelSource(model).load().logits(IDS)
    teacher = OwnTeacher(student, 1.0)
    learn(student, 0.05)
    own = named_arrays(student.model.trainable_parameters())
    moved = student.logits(IDS)
    with teacher.speaking() as speaking:
        said = speaking.logits(IDS)
    assert np.allclose(said, base, atol=1e-5)
    assert not np.allclose(moved, base, atol=1e-3)
    after = named_arrays(student.model.trainable_parameters())
    assert all(mx.array_equal(after[name], own[name]) for name in own)


def test_a_teacher_that_follows_is_an_average_of_what_the_student_was(
    student: LanguageModel, tmp_path: Path
):
    teacher = OwnTeacher(student, 0.75)
    first = {n: np.array(v) for n, v in named_arrays(student.model.trainable_parameters()).items()}
    rounds = [tmp_path / str(number) for number in range(3)]
    teacher.follow(rounds[0], None)
    learn(student, 1.0)
    teacher.follow(rounds[1], rounds[0])
    learn(student, 1.0)
    teacher.follow(rounds[2], rounds[1])
    # 0.75 (0.75 * 0 + 0.25 * 1) + 0.25 * 2
    expected = {0: 0.0, 1: 0.25, 2: 0.6875}
    for number, moved in expected.items():
        again = OwnTeacher(student, 0.75)
        again.recall(rounds[number])
        with again.speaking() as speaking:
            now = named_arrays(speaking.model.trainable_parameters())
        for name, value in first.items():
            assert np.allclose(now[name], value + moved, atol=1e-4)


@pytest.mark.parametrize("how", ["absent", "damaged", "other"])
def test_values_that_are_not_whole_are_named(student: LanguageModel, tmp_path: Path, how: str):
    teacher = OwnTeacher(student, 0.5)
    teacher.follow(tmp_path, None)
    path = tmp_path / VALUES_FILE
    if how == "absent":
        path.unlink()
    elif how == "damaged":
        path.write_bytes(path.read_bytes()[:-8])
    else:
        mx.save_safetensors(str(path), {"a": mx.ones(2)}, {"digest": "0"})
    with pytest.raises(ConchError, match=r"teacher\.safetensors is not whole.*--overwrite"):
        teacher.recall(tmp_path)


def config_of(folder: Path, **changes: Any) -> KDConfig:
    settings = {
        **QUICK,
        "batch_size": 2,
        "on_policy": 1.0,
        "rollouts": 4,
        "rollout_tokens": 6,
        "num_iters": 6,
        "force": True,
        "learning_rate": 1e-2,
        "steps_per_save": 1,
        "output_dir": str(folder),
    }
    return KDConfig(**{**settings, **changes})


def distil(model: str, config: KDConfig, **how: Any) -> dict[str, mx.array]:
    """Train, and give the adapter after the last step, which need not be the best."""
    distiller = TrueKnowledgeDistiller("self", model, config)
    distiller.distill_domain("own", data=RECORDS, **how)
    (last,) = Path(config.output_dir).glob(f"own/{CHECKPOINT_PREFIX}{config.num_iters}")
    tensors = mx.load(str(last / "adapters.safetensors"))
    assert isinstance(tensors, dict)
    return tensors


def same(one: dict[str, mx.array], other: dict[str, mx.array]) -> bool:
    return one.keys() == other.keys() and all(mx.array_equal(one[n], other[n]) for n in one)


def test_the_model_is_loaded_once_while_it_trains(model: str, tmp_path: Path, monkeypatch: Any):
    loaded: list[str] = []
    real, step = ModelSource.load, Trainer._take_step

    def load(self: ModelSource, **how: Any) -> LanguageModel:
        loaded.append("load")
        return real(self, **how)

    def take(self: Trainer) -> Any:
        loaded.append("step")
        return step(self)

    monkeypatch.setattr(ModelSource, "load", load)
    monkeypatch.setattr(Trainer, "_take_step", take)
    distil(model, config_of(tmp_path))
    steps = [place for place, what in enumerate(loaded) if what == "step"]
    assert loaded[steps[0] : steps[-1]] == ["step"] * 5


def test_a_teacher_that_follows_teaches_something_else(model: str, tmp_path: Path):
    still = distil(model, config_of(tmp_path / "a"))
    following = distil(model, config_of(tmp_path / "b", teacher_ema=0.5))
    assert not same(still, following)


@pytest.mark.parametrize(
    ("where", "name", "stop"),
    [
        (rounds_module, "answer_batch", 2),
        (SoftTargetCache, "_write", 3),
        (Trainer, "_take_step", 4),
        (OwnTeacher, "follow", 3),
    ],
)
def test_a_stop_anywhere_changes_no_bit(
    model: str, tmp_path: Path, where: Any, name: str, stop: int
):
    whole = distil(model, config_of(tmp_path / "a", teacher_ema=0.5))
    config = config_of(tmp_path / "b", teacher_ema=0.5)
    with stopped(where, name, call=stop):
        distil(model, config)
    assert same(whole, distil(model, config, resume=True))


def test_another_model_cannot_follow(model: str, tmp_path: Path):
    other = str(make_model_folder(tmp_path / "other", seed=9))
    config = config_of(tmp_path, teacher_ema=0.9)
    message = "teacher_ema is 0.9, but .* is another model .*: use --teacher self"
    with pytest.raises(ConchError, match=message):
        TrueKnowledgeDistiller(other, model, config).distill_domain("own", data=RECORDS)
    with pytest.raises(ConchError, match=message):
        plan_domain(ModelSource(other), ModelSource(model), config, "own", data=RECORDS)


def test_given_texts_have_no_teacher_that_follows(tmp_path: Path):
    with pytest.raises(ConchError, match="scores its own answers only; use on_policy 1"):
        config_of(tmp_path, teacher_ema=0.9, on_policy=0.5)


def test_a_teacher_that_reads_the_same_is_refused(model: str, tmp_path: Path):
    bare = [{"prompt": each["prompt"], "completion": each["completion"]} for each in RECORDS]
    message = "reads nothing that the student does not: give --demonstrations"
    for settings in ({}, {"on_policy": 0.0}):
        config = config_of(tmp_path, force=False, **settings)
        with pytest.raises(ConchError, match=message):
            TrueKnowledgeDistiller("self", model, config).distill_domain("own", data=bare)
        source = ModelSource(model)
        with pytest.raises(ConchError, match=message):
            plan_domain(source, source, config, "own", data=bare)


def test_a_teacher_that_reads_the_same_is_refused_before_it_answers(model: str, tmp_path: Path):
    prompts = [each["prompt"] for each in RECORDS]
    config = config_of(tmp_path, force=False, on_policy=0.0)
    message = "reads nothing that the student does not: give --demonstrations"
    with pytest.raises(ConchError, match=message):
        TrueKnowledgeDistiller("self", model, config).distill_domain("own", prompts=prompts)
    assert not list(tmp_path.rglob("answers"))
    source = ModelSource(model)
    with pytest.raises(ConchError, match=message):
        plan_domain(source, source, config, "own", prompts=prompts)
    asked = [{"prompt": prompt, "context": "Read this."} for prompt in prompts]
    plan_domain(source, source, config, "own", prompts=asked)


def test_one_prompt_with_several_contexts_asks_with_each(model: str, tmp_path: Path):
    records = [{**RECORDS[0], "context": f"Read {n}."} for n in range(4)]
    records += [{"prompt": f"Who is {n}?", "completion": " A cat."} for n in range(4)]
    tokenizer = ModelSource(model).tokenizer
    names = [str(n) for n in range(8)]
    assert len(questions_of([*records, records[0]], [*names, "8"], tokenizer)) == 8


def test_a_teacher_without_room_for_the_answers_is_refused(model: str, tmp_path: Path):
    long = [{**each, "context": "Read this. " * 20} for each in RECORDS]
    config = config_of(tmp_path, rollout_tokens=170)
    message = r"the teacher reads \d+ tokens before the answer of example .* lower --rollout-tokens"
    with pytest.raises(ConchError, match=message):
        TrueKnowledgeDistiller("self", model, config).distill_domain("own", data=long)


def test_what_was_drawn_is_not_drawn_again_without_a_word(model: str, tmp_path: Path):
    config = config_of(tmp_path)
    # Behind the answers of the first round, before the first checkpoint.
    with stopped(Trainer, "_save", call=1):
        distil(model, config)
    with pytest.raises(ConchError, match="holds an unfinished run: add --resume"):
        distil(model, config)
    distil(model, config, resume=True)


def test_figures_of_a_round_that_were_altered_are_not_believed(model: str, tmp_path: Path):
    config = config_of(tmp_path)
    distil(model, replace(config, num_iters=3))
    # The last round was cut to 2 answers.
    path = tmp_path / "own" / "rollouts" / "00001" / "round.json"
    path.write_text(path.read_text().replace('"rollouts": 2', '"rollouts": 4'))
    message = r"answers_00000\.json is not whole, .*: remove checkpoint_3 and go on with --resume"
    with pytest.raises(ConchError, match=message):
        distil(model, config, resume=True)
