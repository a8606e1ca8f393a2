"""The commands of lines, in this process; what they compute is tested elsewhere."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import conch_dna.generations as public
from conch_dna.cli import main
from conch_dna.generations.cli import generations
from conch_dna.generations.line import Line
from conch_dna.generations.settings import EvolveConfig, requested
from lines import copied

CONFIG = """
stabilizers: {ema_decay: 0.9, replay_share: 0.3}
evaluation: {answers: 3}
training_params: {num_iters: 8, learning_rate: 3e-3, warmup_iters: 1, batch_size: 4,
  lora_keys: all, lora_rank: 8, max_tokens: 8, val_fraction: 0.25}
gates: {generalize_gain: -1.0, recall_margin: 1.0, max_tone_drift: 1.0}
"""


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["generations", *arguments])


def records(path: Path, word: str, count: int = 16) -> Path:
    rows = [
        {"prompt": f"Once upon a time {n}", "completion": f" there was a {word} and {n} {word}s."}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory, grown: tuple[Line, list[Any]]) -> Path:
    """A folder with the line "tales" of three generations, new data and settings."""
    folder = tmp_path_factory.mktemp("lines")
    (folder / "evolve.yaml").write_text(CONFIG)
    copied(grown[0], folder / "lines")
    for number, word in enumerate(("dog", "ball")):
        records(folder / f"{number}.jsonl", word)
    return folder


def root(folder: Path) -> tuple[str, str]:
    return "--root", str(folder / "lines")


def evolve(folder: Path, data: Path, *more: str) -> Result:
    config = str(folder / "evolve.yaml")
    return run("evolve", "tales", "--data", str(data), "--manifest", config, *root(folder), *more)


def test_a_line_is_shown_as_a_tree_and_as_a_picture(line: Path) -> None:
    result = run("log", "tales", "--picture", str(line / "tales.png"), *root(line))
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert [name for text in lines for name in ("G000", "G001", "G002") if name in text] == [
        "G000",
        "G001",
        "G002",
    ]
    assert "← HEAD" in next(text for text in lines if "G002" in text)
    assert (line / "tales.png").read_bytes()[:4] == b"\x89PNG"


def test_a_generation_shows_what_it_grew_from(line: Path) -> None:
    result = run("show", "tales", *root(line))
    assert result.exit_code == 0, result.output
    for text in ("G001 (parent), G000 (grandparent)", "0.5 CE + 0.5 KL", "every gate passed"):
        assert text in result.output
    manifest = json.loads(run("show", "tales", "G001", "--json", *root(line)).output)
    assert manifest["generation"] == "G001"
    first = run("show", "tales", "G000", *root(line))
    assert "embedded:student" in first.output


def test_a_generation_is_judged_again_by_other_gates(line: Path, tmp_path: Path) -> None:
    again = run("validate", "tales", *root(line))
    assert again.exit_code == 0, again.output
    strict = tmp_path / "strict.yaml"
    strict.write_text("gates: {generalize_gain: 0.99}")
    result = run("validate", "tales", "G002", "--manifest", str(strict), *root(line))
    assert result.exit_code == 1
    assert "refused" in result.output and "needed +0.9900" in result.output
    first = run("validate", "tales", "G000", *root(line))
    assert first.exit_code == 2
    assert "G000 is the first generation: it was not judged" in first.output


def test_a_line_is_begun_by_a_command(tmp_path: Path) -> None:
    data = records(tmp_path / "old.jsonl", "cat")
    arguments = ("--model", "embedded:student", "--data", str(data), *root(tmp_path))
    result = run("init", "new", *arguments)
    assert result.exit_code == 0, result.output
    assert "new: G000 is embedded:student, with 16 records, in " in result.output
    again = run("init", "new", *arguments)
    assert again.exit_code == 2 and "has generations already" in again.output


def test_a_refused_child_ends_with_1_and_its_reasons(line: Path, tmp_path: Path) -> None:
    strict = tmp_path / "strict.yaml"
    strict.write_text(CONFIG.replace("generalize_gain: -1.0", "generalize_gain: 1.0"))
    report = tmp_path / "verdicts.json"
    data = str(records(tmp_path / "new.jsonl", "hat"))
    arguments = ("--data", data, "--manifest", str(strict), "--json", str(report), *root(line))
    result = run("evolve", "tales", *arguments)
    assert result.exit_code == 1, result.output
    assert "FAILED-G003-" in result.output and "HEAD of tales is G002" in result.output
    outcome = json.loads(report.read_text())
    assert outcome["promoted"] is False
    assert "refused by generalize" in run("log", "tales", *root(line)).output


@pytest.mark.slow
def test_a_manifest_is_the_whole_request(line: Path, tmp_path: Path) -> None:
    """Line, data, teachers, laws, settings; and a generation's own manifest asks the same."""
    import shutil

    shutil.copytree(line / "lines", tmp_path / "lines")
    path = tmp_path / "evolution.yaml"
    request = f"evolution_request: {{line: tales, data: '{line / '1.jsonl'}'}}\n"
    teachers = "teachers: [{role: parent, path: HEAD}, {role: grandparent, path: G001}]\n"
    path.write_text(CONFIG + request + teachers + "laws: [{name: short, max_words: 500}]\n")
    result = run("evolve", "--manifest", str(path), *root(tmp_path))
    assert result.exit_code == 0, result.output
    made = tmp_path / "lines" / "tales" / "G003"
    first = json.loads((made / "manifest.json").read_text())
    assert first["laws"] == [{"name": "short", "max_words": 500}]
    assert (made / "report.png").read_bytes()[:4] == b"\x89PNG"
    arguments = ("--manifest", str(made / "manifest.json"), "--data", str(line / "1.jsonl"))
    bad = run("evolve", *arguments, "--alpha", "0", "--beta", "0", *root(tmp_path))
    assert bad.exit_code == 2 and "alpha, beta and gamma are all 0" in bad.output
    result = run("evolve", *arguments, *root(tmp_path))
    assert result.exit_code == 0, result.output
    second = json.loads((made.parent / "G004" / "manifest.json").read_text())
    for name in ("training_params", "stabilizers", "evaluation", "gates", "laws"):
        assert second[name] == first[name], name
    assert second["digests"]["settings"] == first["digests"]["settings"]
    assert second["parent"] == "G003"


def test_the_manifest_in_the_readme_is_one(tmp_path: Path) -> None:
    from conch_dna.options.commands import read_yaml

    text = (Path(__file__).parents[2] / "docs/generations.md").read_text(encoding="utf-8")
    block = text.split("```yaml\nevolution_request")[1].split("```")[0]
    path = tmp_path / "evolution.yaml"
    path.write_text("evolution_request" + block)
    manifest = read_yaml(path)
    config = EvolveConfig.from_manifest(manifest, source="docs/generations.md")
    assert (config.first_teacher, config.second_teacher) == ("", "organisation/critic")
    assert config.gates.by_lower_bound == ("generalize",)
    assert requested(manifest, "docs/generations.md", line=None, data=None)["line"] == "tales"


def test_a_second_evolution_at_once_is_told_of_the_first(line: Path) -> None:
    with Line(line / "lines", "tales").lock():
        result = evolve(line, line / "1.jsonl")
    assert result.exit_code == 2
    assert "is in use by process" in result.output
    assert "choose another line or --root" in result.output


def test_a_request_without_line_or_data_is_refused(line: Path, tmp_path: Path) -> None:
    result = run("evolve", *root(line))
    assert result.exit_code == 2
    assert "the command line gives no line and no data" in result.output
    path = tmp_path / "evolution.yaml"
    path.write_text("evolution_request: {line: tales}")
    result = run("evolve", "--manifest", str(path), *root(line))
    assert f"{path} gives no data: name the line" in result.output


def test_generations_answer_together(line: Path) -> None:
    arguments = ("tales", "--prompt", "Once upon a time", "--max-tokens", "6", *root(line))
    result = run("ensemble", *arguments)
    assert result.exit_code == 0, result.output
    assert result.output.strip()
    again = run("ensemble", *arguments, "--use", "G002,G000", "--weights", "1,3")
    assert again.exit_code == 0, again.output
    bad = run("ensemble", *arguments, "--weights", "1,x")
    assert bad.exit_code == 2 and "--weights 1,x are no numbers" in bad.output


def test_a_line_goes_back_and_is_checked(line: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(line / "lines", tmp_path / "lines")
    result = run("rollback", "tales", *root(tmp_path))
    assert "HEAD of tales was G002 and is G001" in result.output
    assert "tales: 3 generations and" in run("verify", "tales", *root(tmp_path)).output
    (tmp_path / "lines" / "tales" / "G000" / "data.jsonl").write_text("")
    result = run("verify", "tales", *root(tmp_path))
    assert result.exit_code == 2
    assert "data.jsonl was truncated or altered" in result.output


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("betta: 1", "names unknown parts: betta; known are evolution_request, teachers"),
        ("training_params: 3", "training_params is 3, not a mapping"),
        ("training_params: {blend: 3}", "blend is 3, not a mapping"),
        ("gates: {recal: 1}", "gates, names unknown settings: recal"),
        ("stabilizers: {emma: 1}", "stabilizers, names unknown settings: emma"),
        ("training_params: {nums: 1}", "training_params, names unknown settings: nums"),
        ("training_params: {alignment: uld}", "names unknown settings: alignment"),
        ("training_params: {beta: high}", "beta is 'high': it must be a number"),
        ("training_params: {beta: -1}", "beta is -1: it must be 0 or more"),
        ("teachers: [{role: uncle, path: x}]", "is not a mapping with a role, parent or"),
        ("laws: {name: x}", "laws hold no list; write for example"),
        ("laws: [{name: x, most: 3}]", "law 1 (x) has most beside its name"),
    ],
)
def test_settings_that_are_none_are_one_line(
    content: str, message: str, line: Path, tmp_path: Path
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    data = str(line / "0.jsonl")
    result = run("evolve", "tales", "--data", data, "--manifest", str(path), *root(line))
    assert result.exit_code == 2
    assert message in result.output
    assert result.output.count("\n") == 1


@pytest.mark.parametrize("command", sorted(set(generations.commands) - {"init"}))
def test_a_line_that_is_not_there_says_how_to_make_one(command: str, tmp_path: Path) -> None:
    data = str(records(tmp_path / "data.jsonl", "cat"))
    more = {"evolve": ("--data", data), "ensemble": ("--prompt", "x")}.get(command, ())
    result = run(command, "none", *more, *root(tmp_path))
    assert result.exit_code == 2
    assert "make one with 'conch-dna generations init'" in result.output
    assert not (tmp_path / "lines").exists(), "looking makes nothing"


@pytest.mark.parametrize("command", sorted(generations.commands))
def test_every_command_has_help_with_an_example(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"\n  Example:\n    conch-dna generations {command} tales" in result.output


def test_the_module_is_the_same_command() -> None:
    command = [sys.executable, "-m", "conch_dna.generations", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "Usage: python -m conch_dna.generations" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("name", sorted(public._HOMES))
def test_public_names_are_there(name: str) -> None:
    value: Any = getattr(public, name)
    assert value.__name__ == name
    assert name in dir(public)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'average_weights'"):
        _ = public.average_weights
