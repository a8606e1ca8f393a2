"""A real domain of the embedded student: it learns corrections, keeps the old, refuses poison."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conch_dna.checkpoints import FolderLock
from conch_dna.errors import ConchError, FolderInUseError, Interrupted
from conch_dna.generations.promotion import GateSettings
from conch_dna.generations.settings import EvolveConfig
from conch_dna.language_model import ModelSource
from conch_dna.retraining.domain import (
    Retraining,
    RetrainResult,
    active_adapter,
    settings_over,
    teaching_of,
)
from conch_dna.retraining.experience import Experience
from conch_dna.retraining.lessons import EXPERIENCE, conversation, lessons_of
from conch_dna.retraining.pipeline import TrainingPipeline
from conch_dna.training.settings import KDConfig
from conch_dna.training.true_kd import TrueKnowledgeDistiller
from models import make_model_folder

DOMAIN = "tales"
NAMES = ("Tom", "Sue", "Ben", "Mia", "Sam", "Lily", "Max", "Anna")
THINGS = ("ball", "cat", "hat", "dog", "car", "cup")
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def tales(seed: int, count: int = 24) -> list[dict[str, str]]:
    """Little stories of one pattern, such as the student knows."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        name, thing = (str(random.choice(x)) for x in (NAMES, THINGS))
        text = f" had a little {thing}. {name} took the {thing} to the park."
        found.append({"prompt": f"Once upon a time, {name}", "completion": text})
    return found


def sums(seed: int, count: int = 40) -> list[tuple[str, str]]:
    """Prompts and answers of a pattern that it does not know."""
    random = np.random.default_rng(seed)
    found: dict[str, str] = {}
    while len(found) < count:
        name, thing = (str(random.choice(x)) for x in (NAMES, THINGS))
        number = int(random.integers(2, 99))
        prompt = f"Question {number}: {name} sells {thing}s."
        found[prompt] = f" Answer: {name} sold {number} {thing}s in all."
    return list(found.items())


def poison(seed: int, count: int = 40) -> list[tuple[str, str]]:
    """The old prompts with the letters of the old answers in another order each time."""
    random = np.random.default_rng(seed)
    found = []
    for number, record in enumerate(tales(seed, count)):
        letters = " ".join(
            "".join(random.permutation(list(word))) for word in record["completion"].split()
        )
        found.append((f"{record['prompt']} {number}", f" {letters}"))
    return found


def settings(**changes: Any) -> KDConfig:
    return KDConfig(
        **{
            "num_iters": 40,
            "learning_rate": 3e-3,
            "warmup_iters": 2,
            "batch_size": 8,
            "lora_keys": "all",
            "lora_rank": 8,
            "max_tokens": 12,
            "steps_per_eval": 20,
            "steps_per_save": 20,
            "val_fraction": 0.2,
            **changes,
        }
    )


def config_of(*, training: dict[str, Any] | None = None, **changes: Any) -> EvolveConfig:
    gates = GateSettings(**{"max_tone_drift": 0.5, **changes.pop("gates", {})})
    return EvolveConfig(
        training=settings(**(training or {})),
        gates=gates,
        **{"answers": 4, "ema_decay": 0.9, "replay_share": 0.3, **changes},
    )


ALL_PASS = {"generalize_gain": -1.0, "recall_margin": 1.0, "max_tone_drift": 1.0}
QUICK = config_of(training={"num_iters": 2}, gates=ALL_PASS)


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of adapters with one domain, as `distill` leaves it."""
    folder = tmp_path_factory.mktemp("adapters")
    config = settings(num_iters=4, output_dir=str(folder))
    distiller = TrueKnowledgeDistiller("embedded:teacher", "embedded:student", config)
    distiller.distill_domain(DOMAIN, data=tales(0))
    return folder


def pipeline_in(folder: Path, distilled: Path, **changes: Any) -> TrainingPipeline:
    if not folder.exists():
        shutil.copytree(distilled, folder)
    given = {"config": config_of(), "min_new": 20, **changes}
    return TrainingPipeline(folder, "embedded:student", **given)


def recorded(pipeline: TrainingPipeline, pairs: list[tuple[str, str]]) -> None:
    for prompt, better in pairs:
        assert pipeline.record_correction(DOMAIN, prompt, "I do not know.", better, problem="no")


@pytest.fixture(scope="module")
def retrained(distilled: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder whose domain was retrained once by EGO, and how that went."""
    folder = tmp_path_factory.mktemp("retrained") / "adapters"
    told: list[str] = []

    def report(event: str, row: dict[str, Any]) -> None:
        if event == "message":
            told.append(row["message"])

    pipeline = pipeline_in(folder, distilled, ego="embedded:teacher", report=report)
    before = pipeline.should_retrain(DOMAIN)
    recorded(pipeline, sums(1))
    pipeline.record_success(DOMAIN, "Once upon a time, Tom", " had a little ball.", confidence=0.9)
    advice = pipeline.should_retrain(DOMAIN)
    return folder, (before, advice, pipeline.retrain(DOMAIN), told)


@pytest.mark.slow
def test_corrections_are_learned_and_the_new_version_answers(
    retrained: tuple[Path, Any], distilled: Path
) -> None:
    folder, (before, advice, result, told) = retrained
    assert (before.retrain, advice.retrain) == (False, True)
    assert before.reason == "0 new corrections and hand-overs, fewer than 20"
    assert advice.reason == "40 new corrections and hand-overs, at least 20"
    assert advice.counts == {"new": 41, "lessons": 40, "used": 0, "refused": 0, "left_out": 0}
    assert isinstance(result, RetrainResult)
    assert result.promoted, [verdict.reason for verdict in result.verdicts]
    assert (result.version, result.records, result.experiences) == ("G001", 41, 41)
    assert result.left_out == {}
    child, parent = (result.metrics[who]["generalize"] for who in ("child", "parent"))
    assert child["nats_per_token"] < 0.7 * parent["nats_per_token"]
    assert active_adapter(folder, DOMAIN) == result.path == folder / "lines" / DOMAIN / "G001"
    assert result.taught_by.endswith("the distributions of EGO, embedded:teacher")
    assert f"{DOMAIN} is taught by {result.taught_by}" in told
    manifest = pipeline_in(folder, distilled).line(DOMAIN).manifest("G001")
    assert {"role": "parent", "path": "embedded:teacher"} in manifest["teachers"]
    model = ModelSource("embedded:student").load(adapter_path=result.path)
    model.release()


@pytest.mark.slow
def test_what_was_used_is_old_then(retrained: tuple[Path, Any], distilled: Path) -> None:
    pipeline = pipeline_in(retrained[0], distilled)
    advice = pipeline.should_retrain(DOMAIN)
    assert not advice.retrain
    assert advice.counts == {"new": 0, "lessons": 0, "used": 41, "refused": 0, "left_out": 0}
    assert pipeline.prepare_training_data(DOMAIN).records == []
    with pytest.raises(ConchError, match="there is nothing new to learn for tales"):
        pipeline.retrain(DOMAIN)
    stats = json.loads(json.dumps(pipeline.get_stats()))[DOMAIN]
    assert (stats["active"], stats["versions"]) == ("G001", ["G000", "G001"])
    assert stats["records"]["correction"] == 40 and stats["advice"]["counts"]["used"] == 41


def test_what_there_is_is_told_without_the_student(distilled: Path, tmp_path: Path) -> None:
    """Its name may be that of a model that would have to be downloaded first."""
    pipeline = pipeline_in(tmp_path / "adapters", distilled)
    recorded(pipeline, sums(1, 3))
    elsewhere = TrainingPipeline(tmp_path / "adapters", "nobody/nothing", min_new=3)
    assert elsewhere.get_stats()[DOMAIN]["advice"]["retrain"]


@pytest.mark.slow
def test_a_poisoned_batch_is_refused_and_stays_out(
    retrained: tuple[Path, Any], distilled: Path, tmp_path: Path
) -> None:
    shutil.copytree(retrained[0], tmp_path / "adapters")
    config = config_of(replay_share=0.0)
    pipeline = pipeline_in(tmp_path / "adapters", distilled, config=config)
    recorded(pipeline, poison(5))
    result = pipeline.retrain(DOMAIN)
    failed = [verdict.gate for verdict in result.verdicts if not verdict.passed]
    assert not result.promoted and "recall" in failed
    assert result.version.startswith("FAILED-G002-")
    assert active_adapter(tmp_path / "adapters", DOMAIN).name == "G001"
    advice = pipeline.should_retrain(DOMAIN)
    assert advice.counts == {"new": 0, "lessons": 0, "used": 41, "refused": 40, "left_out": 0}
    # What comes next is learned without it, unless it is asked for.
    recorded(pipeline, sums(2, 10))
    assert len(pipeline.prepare_training_data(DOMAIN).records) == 10
    assert len(pipeline.prepare_training_data(DOMAIN, with_refused=True).records) == 50
    assert pipeline.line(DOMAIN).problems() == []


@pytest.mark.slow
def test_a_rolled_back_version_takes_its_experience_with_it(
    retrained: tuple[Path, Any], distilled: Path, tmp_path: Path
) -> None:
    shutil.copytree(retrained[0], tmp_path / "adapters")
    pipeline = pipeline_in(tmp_path / "adapters", distilled)
    assert pipeline.rollback(DOMAIN) == "G000"
    first = active_adapter(tmp_path / "adapters", DOMAIN)
    distilled_file = tmp_path / "adapters" / DOMAIN / "adapters_kd" / "adapters.safetensors"
    assert (first / "adapters.safetensors").read_bytes() == distilled_file.read_bytes()
    assert pipeline.should_retrain(DOMAIN).counts["refused"] == 41
    with pytest.raises(ConchError, match="nothing is before it"):
        pipeline.rollback(DOMAIN)
    with pytest.raises(ConchError, match="sonnets was never retrained"):
        pipeline.rollback("sonnets")


@pytest.mark.slow
def test_an_interrupted_retraining_goes_on_with_what_it_began_with(
    distilled: Path, tmp_path: Path
) -> None:
    import signal

    training = {"num_iters": 12, "steps_per_save": 3, "steps_per_eval": 6}
    config = config_of(training=training, gates=ALL_PASS)
    whole = pipeline_in(tmp_path / "whole", distilled, config=config)
    stopped = pipeline_in(tmp_path / "stopped", distilled, config=config)
    for pipeline in (whole, stopped):
        recorded(pipeline, sums(1))
    expected = whole.retrain(DOMAIN)

    def stop(event: str, row: dict[str, Any]) -> None:
        if event == "step" and row["step"] == 5:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        stopped.retrain(DOMAIN, report=stop)
    # Life goes on in the meantime.
    recorded(stopped, sums(7, 5))
    advice = stopped.should_retrain(DOMAIN)
    assert advice.retrain and "is not finished: resume it" in advice.reason
    with pytest.raises(ConchError, match="is not finished: resume it, or start again"):
        stopped.retrain(DOMAIN)
    result = stopped.retrain(DOMAIN, resume=True)
    assert result.experiences == 40
    assert result.metrics["child"] == expected.metrics["child"]
    files = [each.path / "adapters.safetensors" for each in (expected, result)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert stopped.should_retrain(DOMAIN).counts["lessons"] == 5


@pytest.mark.slow
def test_killed_when_all_was_done_but_to_say_so_it_is_done(
    distilled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = pipeline_in(tmp_path / "adapters", distilled, config=QUICK)
    recorded(pipeline, sums(1, 20))

    class Killed(BaseException):
        pass

    def killed(*arguments: Any, **more: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Retraining, "_finish", killed)
        with pytest.raises(Killed):
            pipeline.retrain(DOMAIN)
    advice = pipeline.should_retrain(DOMAIN)
    assert not advice.retrain and advice.counts["used"] == 20
    again = pipeline.retrain(DOMAIN, resume=True)
    assert (again.version, again.experiences, again.promoted) == ("G001", 20, True)
    assert pipeline.line(DOMAIN).generations() == ["G000", "G001"]
    recorded(pipeline, sums(2, 20))
    assert pipeline.retrain(DOMAIN).version == "G002"


def test_two_retrainings_at_once_are_one(distilled: Path, tmp_path: Path) -> None:
    pipeline = pipeline_in(tmp_path / "adapters", distilled, config=QUICK)
    recorded(pipeline, sums(1, 20))
    # Nor is one begun while something else is under way on the line.
    with FolderLock(pipeline.line(DOMAIN).folder), pytest.raises(FolderInUseError):
        pipeline.retrain(DOMAIN)
    refused: list[str] = []

    def another(event: str, row: dict[str, Any]) -> None:
        if event == "phase" and not refused:
            with pytest.raises(FolderInUseError) as caught:
                pipeline_in(tmp_path / "adapters", distilled).retrain(DOMAIN)
            refused.append(str(caught.value))
            # Recording goes on.
            assert pipeline.record_success(DOMAIN, "And now?", " Now too.")

    result = pipeline.retrain(DOMAIN, report=another)
    assert result.promoted and result.version == "G001"
    assert len(refused) == 1 and "\n" not in refused[0]
    assert "is in use by process" in refused[0] and "retrain another domain" in refused[0]


ENDPOINT = "http://127.0.0.1:9/v1"


@pytest.fixture(scope="module")
def by_text(
    distilled: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainingPipeline, RetrainResult]:
    """A retraining from hand-overs to an endpoint, one of which is too long, and what it gave."""
    config = config_of(
        training={"num_iters": 2, "max_seq_length": 60, "too_long": "skip"}, gates=ALL_PASS
    )
    folder = tmp_path_factory.mktemp("by_text") / "adapters"
    pipeline = pipeline_in(folder, distilled, config=config, ego=ENDPOINT)
    for prompt, answer in sums(1, 20):
        pipeline.record_fallback(DOMAIN, prompt, "?", answer, reason="unsure", confidence=0.1)
    recorded(pipeline, [("And then?", " And then" * 100)])
    return pipeline, pipeline.retrain(DOMAIN)


def test_an_endpoint_teaches_by_text_alone_and_says_so(
    by_text: tuple[TrainingPipeline, RetrainResult],
) -> None:
    pipeline, result = by_text
    assert f"{ENDPOINT} is an endpoint and gives no distributions" in result.taught_by
    manifest = pipeline.line(DOMAIN).manifest(result.version)
    assert manifest["teachers"] == [{"role": "parent", "path": "G000"}]
    assert "there is no EGO" in teaching_of("")


def test_what_does_not_fit_is_told_and_not_tried_for_ever(
    by_text: tuple[TrainingPipeline, RetrainResult],
) -> None:
    pipeline, result = by_text
    assert (result.records, result.experiences) == (20, 20)
    assert [why.split(",")[0] for why in result.left_out.values()] == ["too long for a model"]
    assert pipeline.should_retrain(DOMAIN).counts["left_out"] == 1
    assert pipeline.prepare_training_data(DOMAIN).records == []


def test_settings_are_those_of_the_distillation_and_the_shape_the_adapter_has(
    distilled: Path, tmp_path: Path
) -> None:
    plain = pipeline_in(tmp_path / "adapters", distilled, config=None).settings_for(DOMAIN)
    recorded_with = settings(num_iters=4, output_dir=str(distilled))
    keys = plain.training.lora_keys
    assert "self_attn.q_proj" in keys.split(",")
    layers = plain.training.lora_layers
    assert plain.training == replace(recorded_with, lora_keys=keys, lora_layers=layers)
    assert (plain.first_teacher, plain.alpha) == ("", EvolveConfig().alpha)
    asked = config_of(training={"lora_rank": 2, "lora_scale": 1.0, "num_iters": 7})
    found = pipeline_in(tmp_path / "adapters", distilled, config=asked, ego="embedded:teacher")
    training = found.settings_for(DOMAIN).training
    assert (training.lora_rank, training.lora_scale, training.num_iters) == (8, 10.0, 7)
    assert found.settings_for(DOMAIN).first_teacher == "embedded:teacher"


@pytest.mark.slow
def test_what_cannot_be_retrained_is_said_in_one_line(
    distilled: Path, tmp_path: Path, tiny_student: Path
) -> None:
    folder = tmp_path / "adapters"
    pipeline = pipeline_in(folder, distilled, config=QUICK)
    with pytest.raises(ConchError, match="there is no adapter of sonnets in"):
        pipeline.retrain("sonnets")
    with pytest.raises(ConchError, match="a domain cannot be called lines"):
        pipeline.record_success("lines", "?", "!")
    with pytest.raises(ConchError, match="becomes a folder's name"):
        pipeline.record_success("a/b", "?", "!")
    recorded(pipeline, sums(1, 20))
    other = TrainingPipeline(folder, str(tiny_student), config=QUICK)
    with pytest.raises(ConchError, match=r"was made for embedded:student, not for /.*student"):
        other.retrain(DOMAIN)
    # As distillations left it that kept the data beside the adapter's folder, which is gone.
    adapter = folder / DOMAIN / "adapters_kd"
    (adapter / "training_data.jsonl").unlink()
    digests = json.loads((adapter / "digests.json").read_text())
    del digests["training_data.jsonl"]
    (adapter / "digests.json").write_text(json.dumps(digests))
    with pytest.raises(ConchError, match="tales was distilled from data that are not in"):
        pipeline.retrain(DOMAIN)
    # A refusal is no unfinished retraining.
    assert pipeline.retrain(DOMAIN, old_data=tales(0)).version == "G001"
    recorded(pipeline, sums(2, 20))
    with pytest.raises(ConchError, match=r"began with embedded:student, not with /.*student"):
        other.retrain(DOMAIN)
    config = settings(num_iters=2, seed=3, output_dir=str(folder))
    distiller = TrueKnowledgeDistiller("embedded:teacher", "embedded:student", config)
    distiller.distill_domain(DOMAIN, data=tales(9), overwrite=True)
    with pytest.raises(ConchError, match="was distilled anew since its line began"):
        pipeline.retrain(DOMAIN)
    with pytest.raises(ConchError, match="min_new is 0"):
        TrainingPipeline(folder, "embedded:student", min_new=0)
    with pytest.raises(ConchError, match="config has a/b as first teacher, the place of EGO"):
        pipeline_in(folder, distilled, config=config_of(first_teacher="a/b"), ego="c/d")


# Settings from a file.


def test_settings_of_a_file_stand_over_those_of_the_domain() -> None:
    own = EvolveConfig(training=KDConfig(num_iters=7, lora_rank=3), replay_share=0.5, measured=9)
    given = {
        "training_params": {"iters": 2, "learning-rate": 1e-3, "alpha": 0.3},
        "stabilizers": {"taboo_words": ["darn"]},
        "gates": {"recall_margin": 0.2},
        "laws": [{"name": "short", "max_words": 9}],
    }
    found = settings_over(own, given, source="x.yaml", trust_remote_code=True)
    training = found.training
    assert (training.num_iters, training.lora_rank, training.learning_rate) == (2, 3, 1e-3)
    assert training.trust_remote_code and not own.training.trust_remote_code
    assert (found.alpha, found.beta, found.replay_share, found.measured) == (0.3, 0.5, 0.5, 9)
    assert found.gates.recall_margin == 0.2
    assert found.gates.generalize_gain == own.gates.generalize_gain
    assert (found.taboo_words, len(found.laws)) == (("darn",), 1)
    assert settings_over(own, {}, source="x.yaml") == own


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"evolution_request": {"line": "x"}}, "has an evolution_request: a retraining learns"),
        ({"training_params": {"itres": 2}}, "training_params, names unknown settings: itres"),
        ({"training_params": 3}, "training_params is 3, not a mapping"),
        ({"training": {}}, "names unknown parts: training"),
        ({"gates": {"recall": 1}}, "gates, names unknown settings: recall"),
        ({"training_params": {"num_iters": 0}}, "num_iters is 0"),
    ],
)
def test_settings_that_are_refused(given: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConchError, match=expected):
        settings_over(EvolveConfig(), given, source="x.yaml")


# Lessons.


def of(prompt: str, answer: str, better: str | None = None, **changes: Any) -> Experience:
    kind = changes.pop("kind", "success" if better is None else "correction")
    turns = ({"role": "user", "content": prompt},)
    given = {"domain": DOMAIN, "messages": turns, "answer": answer, "better": better}
    return Experience(**{**given, "kind": kind, **changes})


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return ModelSource("embedded:student").tokenizer


def test_the_newest_correction_of_a_prompt_is_what_it_teaches(tokenizer: Any) -> None:
    good, old, new = of("a", "x"), of("a", "y", "first"), of("a", "x", "second")
    same = of("a", "z", "second", kind="fallback", by="ego")
    after = of("a", "second")
    other, more = of("b", "x", "third"), of("c", "good")
    prepared = lessons_of([good, old, new, same, after, other, more], (), tokenizer)
    assert [(r["prompt"], r["completion"]) for r in prepared.records] == [
        ("a", "second"),
        ("b", "third"),
        ("c", "good"),
    ]
    assert prepared.records[0][EXPERIENCE] == [new.id, same.id]
    assert prepared.used == [new.id, same.id, other.id, more.id]
    assert prepared.left_out == {
        good.id: "a fallback of the same prompt says something else",
        old.id: "a fallback of the same prompt says something else",
        after.id: "a fallback of the same prompt teaches the same answer",
    }
    # What was corrected long ago stays corrected.
    assert lessons_of([good, new], {new.id}, tokenizer).records == []


def test_successes_keep_the_balance_and_the_newest_stay(tokenizer: Any) -> None:
    good = [of(f"g{n}", "yes") for n in range(5)]
    lessons = [of(f"l{n}", "no", "yes") for n in range(2)]
    prepared = lessons_of([*good, *lessons], (), tokenizer)
    assert [r["prompt"] for r in prepared.records] == ["l0", "l1", "g3", "g4"]
    assert set(prepared.left_out) == {each.id for each in good[:3]}
    assert len(prepared.used) + len(prepared.left_out) == 7


def test_a_cut_off_answer_does_not_teach_its_end(tokenizer: Any) -> None:
    prepared = lessons_of([of("a", "x", "y", finish_reason="length")], (), tokenizer)
    assert prepared.records[0]["finish_reason"] == "length"


def test_the_prompt_is_the_one_that_the_adapter_is_asked_with(
    tokenizer: Any, tmp_path: Path
) -> None:
    """With the domain's system prompt, as in distillation, unless the conversation has its own."""
    from conch_dna.language_model import load_tokenizer

    one = of("a", "x", "y")
    plain = lessons_of([one], (), tokenizer, system="Be kind.").records[0]
    assert (plain["prompt"], plain["completion"]) == ("Be kind.\n\na", "y")
    chatting = load_tokenizer(make_model_folder(tmp_path / "chat", chat_template=TEMPLATE))
    record = lessons_of([one], (), chatting, system="Be kind.").records[0]
    assert record["messages"] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "y"},
    ]
    turns = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    assert conversation(chatting, turns, "Be kind.") == turns
    assert conversation(chatting, turns[1:], "") == turns[1:]


def test_a_hand_over_whose_answer_has_the_wrong_form_is_no_lesson(tmp_path: Path) -> None:
    """Nor does it stand in the way of an earlier correction of the same question."""
    pipeline = TrainingPipeline(tmp_path, "embedded:student")
    good = json.dumps({"remember": [], "skip": [], "answer": "7"})
    pipeline.record_correction("memory", "How many?", "?", good)
    pipeline.record_fallback("memory", "How many?", "?", "seven, I think")
    pipeline.record_fallback("memory", "Who?", "?", json.dumps({"answer": "Tom"}))
    prepared = pipeline.prepare_training_data("memory")
    [record] = prepared.records
    assert record["completion"] == good
    assert len(prepared.left_out) == 2
    assert all("does not keep to the domain's schema" in why for why in prepared.left_out.values())
