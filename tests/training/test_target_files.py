"""Targets made on one machine and used on another, and what lies in a folder of them."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from click.testing import CliRunner, Result
from safetensors import safe_open

from conch_dna.cli import main
from conch_dna.language_model import LanguageModel, ModelSource
from models import ANIMALS, QUICK, make_model_folder, stored_rows

SETTINGS = {**QUICK, "samples_per_prompt": 2}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


def options(teacher: object, student: object, output: Path, **more: Any) -> list[object]:
    values = {"teacher": teacher, "student": student, "output_dir": output, **SETTINGS, **more}
    named = [("--" + name.replace("_", "-"), value) for name, value in values.items()]
    return ["--domain", "s", *(part for pair in named for part in pair)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return make_model_folder(folder / "t", seed=1), make_model_folder(folder / "s", seed=2)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(f"The {animal} saw" for animal in ANIMALS))
    return path


@pytest.fixture(scope="module")
def made(
    models: tuple[Path, Path], prompts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An output folder in which everything of the teacher is, and no adapter."""
    output = tmp_path_factory.mktemp("first") / "out"
    result = run("targets", "make", *options(*models, output, prompts=prompts))
    assert result.exit_code == 0, result.output
    assert "take it to the other machine" in result.stdout
    return output


def there(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_is_made_is_what_the_teacher_has_to_say(made: Path) -> None:
    names = {"soft_targets", "answers", "teacher", "data"}
    assert {name for name in there(made / "s") if not name.startswith("run.lock")} == names
    assert "model.safetensors" not in there(made / "s" / "teacher")
    records = (made / "s" / "data" / "train.jsonl").read_text().splitlines()
    assert len(records) == 2 * len(ANIMALS)
    lengths = [json.loads(line)["tokens"] for line in records]
    tokens = sum(len(each["ids"]) - each["prompt_length"] for each in lengths)
    assert stored_rows(made / "s" / "soft_targets") == tokens


def test_another_machine_learns_the_same_without_the_teacher(
    made: Path,
    models: tuple[Path, Path],
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Made in other batches, products may be rounded otherwise.
    shutil.copytree(made, tmp_path / "whole")
    whole = run("distill", *options(*models, tmp_path / "whole", prompts=prompts))
    assert whole.exit_code == 0, whole.output
    there = tmp_path / "there"
    shutil.copytree(made, there)
    loaded: list[str] = []
    load = ModelSource.load

    def watched(self: ModelSource, **how: Any) -> LanguageModel:
        loaded.append(self.model_id)
        return load(self, **how)

    monkeypatch.setattr(ModelSource, "load", watched)
    teacher, data = there / "s" / "teacher", there / "s" / "data"
    result = run("distill", *options(teacher, models[1], there, data=data))
    assert result.exit_code == 0, result.output
    assert set(loaded) == {str(models[1])}
    adapters = [
        output / "s" / "adapters_kd" / "adapters.safetensors"
        for output in (tmp_path / "whole", there)
    ]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    samples = (there / "s" / "adapters_kd" / "samples.md").read_text()
    assert samples == (tmp_path / "whole" / "s" / "adapters_kd" / "samples.md").read_text()


def test_new_texts_need_the_whole_teacher(
    made: Path, models: tuple[Path, Path], tmp_path: Path
) -> None:
    data = tmp_path / "new.jsonl"
    records = [{"prompt": f"A {animal}", "completion": " sat."} for animal in ANIMALS]
    data.write_text("\n".join(map(json.dumps, records)))
    result = run("distill", *options(made / "s" / "teacher", models[1], tmp_path / "o", data=data))
    assert result.exit_code != 0 and "Traceback" not in result.output
    assert "a teacher without its weights" in result.stderr


def test_given_sets_go_along(models: tuple[Path, Path], tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name, start in (("train", "The"), ("valid", "My"), ("test", "Our")):
        rows = [{"prompt": f"{start} {a} saw", "completion": " a ball."} for a in ANIMALS]
        (data / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    output = tmp_path / "my models"
    result = run("targets", "make", *options(*models, output, data=data))
    assert result.exit_code == 0, result.output
    assert f"--data '{output}/s/data'" in result.stdout
    teacher, records = output / "s" / "teacher", output / "s" / "data"
    result = run("distill", *options(teacher, models[1], output, data=records))
    assert result.exit_code == 0, result.output
    evaluation = json.loads((output / "s" / "adapters_kd" / "evaluation.json").read_text())
    assert evaluation["test"]["after"]["tokens"] > 0


def test_nothing_but_its_own_teacher_is_replaced(
    made: Path, models: tuple[Path, Path], prompts: Path, tmp_path: Path
) -> None:
    output = Path(shutil.copytree(made, tmp_path / "out"))
    again = ["targets", "make", *options(*models, output, prompts=prompts)]
    assert run(*again).exit_code == 0
    weightless = options(output / "s" / "teacher", models[1], output, data=output / "s" / "data")
    assert run("targets", "make", *weightless).exit_code == 0, "it may hand itself on"
    assert (output / "s" / "teacher" / "weights.json").exists()
    other = run("targets", "make", *options(*models, output, prompts=prompts, seed=5))
    assert other.exit_code != 0 and "the data of other targets" in other.stderr
    whole = output / "s" / "teacher" / "model.safetensors"
    whole.write_bytes(b"somebody's")
    result = run(*again)
    assert result.exit_code != 0 and "no teacher without its weights" in result.stderr
    assert whole.read_bytes() == b"somebody's"


def test_what_cannot_be_opened_stays(made: Path, models: tuple[Path, Path], tmp_path: Path) -> None:
    output = Path(shutil.copytree(made, tmp_path / "out"))
    (shard,) = (output / "s" / "soft_targets").rglob("*.safetensors")
    content = mx.load(str(shard))
    with safe_open(str(shard), framework="numpy") as file:
        metadata = {**file.metadata(), "format": "soft targets 9"}
    shard.unlink()
    mx.save_safetensors(str(shard), content, metadata)
    again = options(output / "s" / "teacher", models[1], output, data=output / "s" / "data")
    result = run("distill", *again)
    assert result.exit_code != 0 and "which this version does not know" in result.stderr
    assert shard.exists()


@pytest.mark.parametrize("more", [["--on-policy", "0.5"], ["--dry-run"], ["--require-gain"]])
def test_what_makes_no_sense_without_an_adapter_is_refused(
    models: tuple[Path, Path], prompts: Path, tmp_path: Path, more: list[str]
) -> None:
    result = run("targets", "make", *options(*models, tmp_path / "o", prompts=prompts), *more)
    assert result.exit_code == 2 and "makes no adapter" in result.stderr
    assert not (tmp_path / "o").exists()


def test_info_tells_what_lies_there(
    made: Path, models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = tmp_path / "figures.json"
    result = run("targets", "info", made, "--json", figures)
    assert result.exit_code == 0, result.output
    (row,) = json.loads(figures.read_text())
    assert row["teacher"] == str(models[0]) and (row["kept"], row["bits"]) == (8, 7)
    assert row["temperatures"] == [1.0, 2.0] and row["texts"] == 2 * len(ANIMALS)
    assert row["tokens"] == stored_rows(made / "s" / "soft_targets")
    assert "8 kept, 7 bits" in result.stdout
    monkeypatch.chdir(row["folder"])
    for place in (made / "s", made / "s" / "soft_targets", "..", "."):
        assert "8 kept, 7 bits" in run("targets", "info", place).stdout


@pytest.mark.parametrize(
    "entries",
    ["[" * 100_000, '[["a", 0, Infinity]]', '[["a", 0, "x"]]', "[]", f'[["a",0,{10**40}]]'],
)
def test_info_names_a_shard_that_does_not_say_whose_its_rows_are(
    made: Path, tmp_path: Path, entries: str
) -> None:
    folder = shutil.copytree(made, tmp_path / "copy")
    (shard,) = (folder / "s" / "soft_targets").rglob("*.safetensors")
    with safe_open(shard, framework="mlx") as file:
        metadata, arrays = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    shard.unlink()
    mx.save_safetensors(str(shard), arrays, metadata | {"entries": entries})
    result = run("targets", "info", folder)
    assert result.exit_code == 0, result.exception
    assert f"{shard.name} cannot be read" in result.stderr


@pytest.mark.parametrize("about", [True, False])
def test_verify_finds_a_flipped_bit(made: Path, tmp_path: Path, about: bool) -> None:
    folder = shutil.copytree(made, tmp_path / "copy")
    (shard,) = (folder / "s" / "soft_targets").rglob("*.safetensors")
    if not about:
        (shard.parent / "about.json").unlink()
    result = run("targets", "verify", folder)
    assert (result.exit_code, result.stdout.strip()) == (0, "1 shard whole")
    content = bytearray(shard.read_bytes())
    content[-50] ^= 1
    shard.unlink()
    shard.write_bytes(content)
    result = run("targets", "verify", folder)
    assert result.exit_code == 1 and "1 damaged" in result.stdout
    assert "was altered" in result.stderr and shard.exists(), "looking changes nothing"


@pytest.mark.parametrize("name", ["teacher/tokenizer.json", "data/train.jsonl"])
def test_verify_looks_at_what_lies_beside_the_targets(
    made: Path, tmp_path: Path, name: str
) -> None:
    folder = shutil.copytree(made, tmp_path / "copy")
    (folder / "s" / name).write_bytes(b"{}")
    result = run("targets", "verify", folder)
    assert result.exit_code == 1 and "1 shard whole, 1 damaged" in result.stdout
    assert Path(name).name in result.stderr and "truncated or altered" in result.stderr


@pytest.mark.parametrize("name", ["info", "verify"])
def test_a_folder_without_targets_is_said(tmp_path: Path, name: str) -> None:
    for place in (tmp_path, tmp_path / "none"):
        result = run("targets", name, place)
        assert result.exit_code != 0 and str(place) in result.stderr
