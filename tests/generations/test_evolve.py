"""A real line: the embedded student learns new texts, keeps old ones, and is refused bad ones."""

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conch_dna.errors import ConchError, Interrupted, NotWholeError
from conch_dna.generations.data import DATA_FILE, HELDOUT_FILE, earlier_records, init_line
from conch_dna.generations.ensemble import load_generations
from conch_dna.generations.evolve import WORK
from conch_dna.generations.evolve import train_generation_with_teachers as evolve
from conch_dna.generations.laws import Law
from conch_dna.generations.line import Line, folder_digest
from conch_dna.generations.settings import EvolveConfig
from conch_dna.language_model import ADAPTER_FILES, LanguageModel, ModelSource, named_arrays
from conch_dna.training.adapters import adapter_tensors
from conch_dna.training.chats import templates
from conch_dna.training.data.records import json_lines
from lines import config_of, copied, garbage, quick_config, stories, sums
from models import make_model_folder
from tokenizers_made import byte_level_tokenizer, character_tokenizer


def test_a_generation_that_learned_and_did_not_forget_is_promoted(
    grown: tuple[Line, list[Any]],
) -> None:
    line, (first, second, messages) = grown
    assert first.promoted, [v.reason for v in first.verdicts]
    assert second.promoted, [v.reason for v in second.verdicts]
    assert (line.head, first.name, second.name) == ("G002", "G001", "G002")
    assert line.problems() == []
    child, parent = (first.metrics[who]["generalize"] for who in ("child", "parent"))
    assert child["nats_per_token"] < 0.7 * parent["nats_per_token"]
    assert "G000 is the first generation: there is one teacher" in messages
    assert not list(line.folder.glob(f"{WORK}*"))


def test_the_manifest_says_what_it_grew_from(grown: tuple[Line, list[Any]]) -> None:
    line, _ = grown
    manifest = line.manifest("G002")
    assert manifest["teachers"] == [
        {"role": "parent", "path": "G001"},
        {"role": "grandparent", "path": "G000"},
    ]
    assert manifest["digests"]["parents"] == {
        name: folder_digest(line.path(name)) for name in ("G001", "G000")
    }
    assert manifest.keys() >= {
        "evolution_request",
        "teachers",
        "training_params",
        "stabilizers",
        "verdicts",
        "decision",
        "versions",
        "seed",
    }
    assert manifest["evolution_request"]["replay"] > 0
    assert manifest["training_params"]["beta"] == 0.5


def test_two_teachers_are_logged_by_their_strategies(grown: tuple[Line, list[Any]]) -> None:
    line, _ = grown
    rows = json.loads((line.path("G002") / "training_log.json").read_text())
    for row in rows:
        shares = [row[name] / row["tokens"] for name in ("blended", "t1_only", "gold_fallback")]
        assert sum(shares) == pytest.approx(1)
        assert 0 <= row["js"] / row["tokens"] <= 1
    assert any(0 < row["blended"] < row["tokens"] for row in rows), "they agree on some tokens"
    alone = json.loads((line.path("G001") / "training_log.json").read_text())
    assert all(row["blended"] == row["tokens"] for row in alone)


def test_mlx_lm_opens_a_generation(grown: tuple[Line, list[Any]]) -> None:
    from mlx_lm import load

    from conch_dna.language_model import resolve_model

    line, _ = grown
    model, tokenizer = load(
        str(resolve_model("embedded:student")), adapter_path=str(line.path("G002"))
    )
    assert adapter_tensors(model)
    assert tokenizer.encode("Tom")


def shares_of(row: dict[str, Any]) -> dict[str, float]:
    names = ("blended", "t1_only", "gold_fallback")
    return {name: row[name] / row["tokens"] for name in names}


def test_every_step_is_logged_and_drawn(grown: tuple[Line, list[Any]]) -> None:
    line, _ = grown
    rows = json.loads((line.path("G002") / "training_log.json").read_text())
    assert [row["step"] for row in rows if row["split"] == "train"] == list(range(1, 41))
    assert (line.path("G002") / "report.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.usefixtures("undrawn")
def test_a_generation_is_trained_in_full_from_a_lora_parent(
    tiny_line: Line, tmp_path: Path
) -> None:
    """Every weight moves, mlx_lm opens it, the ensemble takes it, and LoRA cannot follow it."""
    line = copied(tiny_line, tmp_path)
    config = quick_config(training={"num_iters": 6, "full": True})
    outcome = evolve(line, sums(4, 16), config)
    assert outcome.promoted and outcome.metrics["best_step"] > 0
    base = ModelSource(line.base("G003")["model"])
    models = load_generations(base, [line.path(name) for name in ("G003", "G002")])
    assert adapter_tensors(models[1].model) and not adapter_tensors(models[0].model)
    child, parent = (outcome.metrics[who]["generalize"] for who in ("child", "parent"))
    assert child["nats_per_token"] < parent["nats_per_token"]
    again = evolve(line, sums(5, 16), config)
    assert again.promoted
    with pytest.raises(ConchError, match=r"G004 holds every weight, .*: add --full"):
        evolve(line, sums(6, 16), quick_config())
    assert line.head == "G004" and line.problems() == []


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"lora_rank": 5}, "go on from has other tensors than these settings make"),
        ({"lora_layers": 50}, "lora_layers is 50, but"),
        ({"lora_keys": "q_projection"}, "names no layers of"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_teachers_work(
    tiny_line: Line, tmp_path: Path, training: dict[str, Any], message: str
) -> None:
    line = copied(tiny_line, tmp_path)
    before = sorted(line.folder.rglob("*"))
    with pytest.raises(ConchError, match=message):
        evolve(line, sums(4, 16), quick_config(training=training))
    assert sorted(line.folder.rglob("*")) == before


@pytest.mark.usefixtures("undrawn")
def test_a_teacher_with_another_tokenizer_takes_a_place(tiny_line: Line, tmp_path: Path) -> None:
    """It says something where a token is one of both; elsewhere the text does, or the parent."""
    bpe = byte_level_tokenizer(tmp_path / "bpe", size=400)
    other = make_model_folder(tmp_path / "other", tokenizer=bpe)
    config = quick_config(training={"num_iters": 2})
    messages: list[str] = []

    def report(event: str, row: dict[str, Any]) -> None:
        if event == "message":
            messages.append(row["message"])

    for place in ("first", "second"):
        line = copied(tiny_line, tmp_path / place)
        placed = replace(config, **{f"{place}_teacher": str(other)})
        outcome = evolve(line, sums(4, 16), placed, report=report)
        assert outcome.promoted
        manifest = line.manifest(outcome.name)
        role = {"first": "parent", "second": "grandparent"}[place]
        assert {"role": role, "path": str(other)} in manifest["teachers"]
        assert len(manifest["teachers"]) == 2
        assert list(manifest["digests"]["models"]) == [str(other)]
        rows = json.loads((line.path(outcome.name) / "training_log.json").read_text())
        found = shares_of(rows[0])
        assert sum(found.values()) == pytest.approx(1)
        # A random teacher agrees with nobody: the parent or the text teaches.
        assert found["blended"] < 0.1
        assert found["gold_fallback" if place == "first" else "t1_only"] > 0.2, found
    assert any("the tokenizers differ, alignment shared tokens" in text for text in messages)


@pytest.mark.parametrize(
    ("first_teacher", "expected"),
    [
        ("", ["G002", "G001", "base", "candidate"]),
        ("embedded:student", ["base", "G001", "G002", "base", "candidate"]),
    ],
)
@pytest.mark.usefixtures("undrawn")
def test_each_model_is_loaded_once_and_alone(
    tiny_line: Line,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    first_teacher: str,
    expected: list[str],
) -> None:
    """A parent that teaches is measured while it is there; another teacher leaves first."""
    load = ModelSource.load
    names: list[str] = []
    models: list[LanguageModel] = []

    def counted(source: ModelSource, **more: Any) -> LanguageModel:
        assert not any(named_arrays(each.model.parameters()) for each in models)
        adapter = more.get("adapter_path") or source.adapter
        names.append(adapter.name if adapter else "base")
        models.append(load(source, **more))
        return models[-1]

    monkeypatch.setattr(ModelSource, "load", counted)
    config = quick_config(first_teacher=first_teacher)
    evolve(copied(tiny_line, tmp_path), sums(4, 16), config)
    assert names == expected


def test_a_teacher_that_cannot_be_aligned_is_refused(tiny_line: Line, tmp_path: Path) -> None:
    letters = character_tokenizer(tmp_path / "letters", byte_fallback=False)
    other = make_model_folder(tmp_path / "other", tokenizer=letters)
    line = copied(tiny_line, tmp_path)
    records = [{"prompt": f"{n}", "completion": " Жили-были кот и собака."} for n in range(9)]
    config = quick_config(first_teacher=str(other), training={"top_k": 8})
    with pytest.raises(ConchError, match=r"only .*% of the student's tokens could be aligned"):
        evolve(line, records, config)
    assert line.head == "G002" and line.problems() == []


@pytest.mark.slow
def test_poisoned_data_are_refused_by_the_gates(
    grown: tuple[Line, list[Any]], tmp_path: Path
) -> None:
    line = copied(grown[0], tmp_path)
    outcome = evolve(line, garbage(5), config_of(replay_share=0.0))
    failed = [verdict.gate for verdict in outcome.verdicts if not verdict.passed]
    assert not outcome.promoted
    assert "recall" in failed
    assert line.head == "G002" and line.failed() == [outcome.name]
    assert outcome.name.startswith("FAILED-G003-")
    manifest = line.manifest(outcome.name)
    assert manifest["decision"] == "failed"
    assert [reason.split(":")[0] for reason in manifest["reasons"]] == failed
    assert line.problems() == []


@pytest.mark.usefixtures("undrawn")
def test_laws_are_run_over_what_the_child_answers(tiny_line: Line, tmp_path: Path) -> None:
    line = copied(tiny_line, tmp_path)
    config = quick_config(laws=(Law(name="silent", kind="max_characters", value=0),))
    outcome = evolve(line, sums(4, 16), config)
    assert [v.gate for v in outcome.verdicts if not v.passed] == ["law_violations"]
    assert {v["law"] for v in outcome.metrics["law_violations"]} == {"silent"}


def test_an_altered_ancestor_stops_the_line(tiny_line: Line, tmp_path: Path) -> None:
    line = copied(tiny_line, tmp_path)
    (line.path("G000") / "data.jsonl").write_text("")
    with pytest.raises(NotWholeError, match=r"G000 is not whole: data.jsonl was truncated"):
        evolve(line, sums(4, 16), quick_config())


def test_a_line_without_earlier_data_promotes_nothing(tmp_path: Path) -> None:
    """Recall has no evidence, and a replay would be empty: said before anything is trained."""
    line = Line(tmp_path, "bare")
    with pytest.raises(ConchError, match="0 examples with 0 different prompts"):
        init_line(line, "embedded:student", [])


def test_a_line_is_begun_once(grown: tuple[Line, list[Any]]) -> None:
    with pytest.raises(ConchError, match="'tales' has generations already"):
        init_line(grown[0], "embedded:student", stories(0))


def test_what_an_adapter_held_out_stays_held_out(tmp_path: Path) -> None:
    """Of its data nothing else is held out, whatever the split of a new line would choose."""
    adapter, records = tmp_path / "adapter", stories(0)
    adapter.mkdir()
    for name in ADAPTER_FILES:
        (adapter / name).write_text("")
    kept = [records[index] for index in (3, 20)]
    assert all(records.count(record) == 1 for record in kept)
    (adapter / HELDOUT_FILE).write_text(json_lines(kept))
    line = Line(tmp_path, "tales")
    init_line(line, "embedded:student", records, adapter=adapter)
    both = [earlier_records(line, ["G000"], file)["G000"] for file in (DATA_FILE, HELDOUT_FILE)]
    assert both == [[record for record in records if record not in kept], kept]


@pytest.mark.usefixtures("undrawn")
def test_an_interrupted_generation_goes_on_where_it_was(tiny_line: Line, tmp_path: Path) -> None:
    """Stopped in the middle and resumed, it is the generation that was never stopped."""
    config = quick_config(training={"num_iters": 6, "steps_per_save": 2, "steps_per_eval": 2})
    whole = copied(tiny_line, tmp_path / "whole")
    expected = evolve(whole, sums(6, 16), config)
    line = copied(tiny_line, tmp_path / "stopped")

    def stop(event: str, row: dict[str, Any]) -> None:
        if event == "step" and row["step"] == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        evolve(line, sums(6, 16), config, report=stop)
    assert line.head == "G002"
    with pytest.raises(ConchError, match="holds an unfinished generation: add --resume"):
        evolve(line, sums(6, 16), config)
    with pytest.raises(ConchError, match=r"was begun with other settings: .*beta"):
        evolve(line, sums(6, 16), quick_config(beta=0.9), resume=True)
    got = evolve(line, sums(6, 16), config, resume=True)
    assert (got.promoted, got.name.split("-2")[0]) == (
        expected.promoted,
        expected.name.split("-2")[0],
    )
    for name in ("recall", "generalize"):
        assert got.metrics["child"][name] == expected.metrics["child"][name]


@pytest.mark.usefixtures("undrawn")
def test_a_child_that_was_judged_before_a_kill_is_promoted_afterwards(
    tiny_line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = quick_config()
    line = copied(tiny_line, tmp_path)

    class Killed(BaseException):
        pass

    def killed(*arguments: Any, **more: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Line, "promote", killed)
        with pytest.raises(Killed):
            evolve(line, sums(6, 16), config)
    assert line.head == "G002" and line.candidate.is_dir()
    outcome = evolve(line, sums(6, 16), config)
    assert (outcome.name, line.head) == ("G003", "G003")
    assert line.problems() == []


@pytest.mark.usefixtures("undrawn")
def test_what_is_finished_is_not_done_again_when_resumed(tiny_line: Line, tmp_path: Path) -> None:
    """A process may be killed when all is done but to say so."""
    line = copied(tiny_line, tmp_path)
    config = quick_config()
    first = evolve(line, sums(6, 16), config)
    again = evolve(line, sums(6, 16), config, resume=True)
    assert (again.name, again.verdicts) == (first.name, first.verdicts)
    assert line.head == "G003" and len(line.log()) == 4
    other = evolve(line, sums(7, 16), config, resume=True)
    assert other.name == line.head == "G004"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": -1.0}, "alpha is -1.0: it must be 0 or more"),
        ({"alpha": 0.0, "beta": 0.0}, "nothing would be learned"),
        (
            {"ema_decay": 1.0, "answers": 0},
            "ema_decay is 1.0: .*; answers is 0: it must be 1 or more",
        ),
        ({"replay_share": 1.0}, "replay_share is 1.0: it must be at least 0 and below 1"),
    ],
)
def test_settings_out_of_range_are_named_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConchError, match=message):
        EvolveConfig(**settings)


def test_a_resumed_generation_keeps_the_day_on_which_it_began(
    tiny_line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Templates of some models write the day into the text that is learned."""
    line = copied(tiny_line, tmp_path / "line")
    days: list[str] = []

    def stop(*_: Any, **__: Any) -> None:
        days.append(str(templates._DATE.get()))
        raise ConchError("stopped")

    monkeypatch.setattr("conch_dna.generations.evolve.gather", stop)
    with pytest.raises(ConchError, match="stopped"):
        evolve(line, sums(6, 16), quick_config())
    path = line.folder / f"{WORK}{line.next_name}" / "run.json"
    assert json.loads(path.read_text())["begun"] == days[0]
    path.write_text(json.dumps({**json.loads(path.read_text()), "begun": "2026-01-31"}))
    with pytest.raises(ConchError, match="stopped"):
        evolve(line, sums(6, 16), quick_config(), resume=True)
    assert days[1] == "2026-01-31"
    with pytest.raises(ConchError, match="stopped"):
        evolve(line, sums(6, 16), quick_config(), overwrite=True)
    assert days[2] == days[0]


@pytest.mark.parametrize("content", ["[]", "7", '{"begun": 7}', "[" * 200_000])
def test_a_run_file_of_another_form_begins_a_run_anew(
    tiny_line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    line = copied(tiny_line, tmp_path / "line")
    path = line.folder / f"{WORK}{line.next_name}" / "run.json"
    path.parent.mkdir()
    path.write_text(content)

    def stop(*_: Any, **__: Any) -> None:
        raise ConchError("stopped")

    monkeypatch.setattr("conch_dna.generations.evolve.gather", stop)
    with pytest.raises(ConchError, match="stopped"):
        evolve(line, sums(6, 16), quick_config(), resume=True)
    assert json.loads(path.read_text())["begun"]
