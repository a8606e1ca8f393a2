"""The command `vocab`, and `distill` with models whose tokenizers differ.

Commands run in this process, since importing what they need takes seconds.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from conch_dna.cli import main
from conch_dna.language_model import ModelSource
from conch_dna.training.cross_tokenizer.alignments import ALIGNMENTS
from conch_dna.training.runs import domain_run
from models import make_model_folder
from tokenizers_made import byte_level_tokenizer, character_tokenizer, wordpiece_tokenizer

PAIR = ("embedded:teacher", "embedded:student")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(part) for part in arguments], terminal_width=120)


def finish(*arguments: object) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def refused(*arguments: object) -> str:
    """The one line that is all that a command prints."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def table(text: str) -> dict[str, list[str]]:
    """The rows of a rich table by their first cell, folded cells put together."""
    rows: dict[str, list[str]] = {}
    label = ""
    for line in text.splitlines():
        cells = [cell.strip() for cell in re.split("[│┃]", line)[1:-1]]
        if len(cells) > 1:
            label = cells[0] or label
            before = rows.get(label, [""] * (len(cells) - 1))
            rows[label] = [f"{a} {b}".strip() for a, b in zip(before, cells[1:], strict=True)]
    return rows


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tokenizers of every kind, as folders of their own and in models."""
    base = tmp_path_factory.mktemp("folders")
    made = {
        "characters": character_tokenizer(base / "characters"),
        "letters": character_tokenizer(base / "letters", byte_fallback=False),
        "bpe": byte_level_tokenizer(base / "bpe"),
        "words": wordpiece_tokenizer(base / "words"),
    }
    alone = base / "alone"
    alone.mkdir()
    shutil.copy(made["bpe"] / "tokenizer.json", alone)
    padded = make_model_folder(base / "padded", vocab_size=1600)
    return {**made, "alone": alone, "padded": padded}


# The table


def test_the_same_tokenizer() -> None:
    text = finish("vocab", *PAIR).stdout
    rows = table(text)
    assert "the tokenizers are same" in text
    assert rows["tokens"] == rows["with the same id"] == ["1,536", "1,536"]
    assert rows["shared tokens"] == ["1,536 (100.0%)"] * 2
    assert rows["only here"] == ["", ""]
    assert rows["--alignment auto"][0] == "index"
    assert not any(name.startswith("id ") for name in rows)
    assert "student's tokens" not in rows


def test_the_same_up_to_padding(folders: dict[str, Path]) -> None:
    text = finish("vocab", folders["padded"], PAIR[1]).stdout
    rows = table(text)
    assert "the tokenizers are same up to padding rows" in text
    assert rows["tokens"] == ["1,536", "1,536"]
    assert rows["rows of the head"] == ["1,600", "1,536"]
    assert rows["--alignment auto"][0] == "index"


def test_different_ones(folders: dict[str, Path]) -> None:
    """The 256 bytes and the end of a text are shared, and what the texts were trained to."""
    text = finish("vocab", folders["characters"], folders["bpe"]).stdout
    rows = table(text)
    teacher, student = (
        json.loads((folders[name] / "tokenizer.json").read_text())["model"]["vocab"]
        for name in ("characters", "bpe")
    )
    assert "the tokenizers are different" in text
    assert "SentencePiece" in rows["written as"][0] and "byte-level" in rows["written as"][1]
    assert rows["tokens"] == [str(len(teacher)), str(len(student))]
    assert rows["rows of the head"] == ["unknown", "unknown"]
    shared = {int(cell.split()[0]) for cell in rows["shared tokens"]}
    # All bytes are tokens of both, each once, and so is the end; nothing else is.
    assert shared == {256 + 1}
    assert rows["shared tokens"][1] == f"257 ({257 / len(student):.1%})"
    assert rows["--alignment auto"][0] == "roots"
    ids = [name for name in rows if re.fullmatch(r"id \d+", name)]
    assert len(ids) == 5


def test_a_table_of_every_pair_of_kinds(folders: dict[str, Path]) -> None:
    kinds = ("characters", "letters", "bpe", "words", "alone", "padded")
    same = {frozenset({"bpe", "alone"})} | {frozenset({kind}) for kind in kinds}
    for teacher in kinds:
        for student in kinds:
            rows = table(finish("vocab", folders[teacher], folders[student]).stdout)
            expected = "index" if frozenset({teacher, student}) in same else "roots"
            assert rows["--alignment auto"][0] == expected, (teacher, student)


def test_a_folder_with_a_tokenizer_alone(folders: dict[str, Path]) -> None:
    assert [path.name for path in folders["alone"].iterdir()] == ["tokenizer.json"]
    rows = table(finish("vocab", folders["alone"], PAIR[1]).stdout)
    assert rows["tokens"] == ["330", "1,536"]
    assert rows["rows of the head"] == ["unknown", "1,536"]


def test_names_with_brackets_are_shown_as_they_are(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """Rich would take them for its own marks."""
    folder = shutil.copytree(folders["bpe"], tmp_path / "[bold]x")
    text = "".join(line.strip() for line in finish("vocab", folder, PAIR[1]).stdout.splitlines())
    assert "[bold]" in text


# Coverage of texts


def coverage_of(text: str, *models: object, folder: Path) -> dict[str, float]:
    file = folder / "texts.txt"
    file.write_text(text, encoding="utf-8")
    out = folder / "figures.json"
    shown = table(finish("vocab", *models, "--text", file, "--json", out).stdout)
    shares: dict[str, float] = json.loads(out.read_text())["coverage"]
    assert shown["student's tokens"][0] == (
        f"{shares['one_to_one']:.1%} one to one, {shares['in_chunks']:.1%} in chunks, "
        f"{shares['uncovered']:.1%} uncovered"
    )
    return shares


def test_coverage_of_a_text(folders: dict[str, Path], tmp_path: Path) -> None:
    """Nothing is lost in bytes; of `ab猫` the student's three bytes have no partner."""
    shares = coverage_of(
        "The cat\n\nA big dog 猫\n", folders["characters"], folders["bpe"], folder=tmp_path
    )
    assert shares["uncovered"] == 0 < shares["in_chunks"]
    shares = coverage_of("ab猫", folders["letters"], folders["characters"], folder=tmp_path)
    assert shares == pytest.approx({"one_to_one": 3 / 6, "in_chunks": 0, "uncovered": 3 / 6})


def test_of_the_same_tokenizer_all_is_one_to_one(tmp_path: Path) -> None:
    shares = coverage_of("The cat sat. 猫\r\nAnd\u2028more", *PAIR, folder=tmp_path)
    assert shares == {"one_to_one": 1, "in_chunks": 0, "uncovered": 0}


# The file of figures


def test_the_figures_as_json(folders: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "new" / "figures.json"
    shown = finish("vocab", folders["padded"], PAIR[1], "--json", out).stdout
    figures = json.loads(out.read_text())
    assert figures["verdict"] == "same up to padding rows"
    assert figures["auto"] == "index"
    assert (figures["teacher_rows"], figures["student_rows"]) == (1600, 1536)
    assert figures["teacher_tokens"] == figures["shared_tokens"] == figures["same_ids"] == 1536
    assert "coverage" not in figures
    finish("vocab", folders["bpe"], PAIR[1], "--json", out)
    figures = json.loads(out.read_text())
    assert figures["verdict"] == "different" and figures["auto"] == "roots"
    assert figures["teacher_rows"] is None
    assert len(figures["id_examples"]) == 5 and len(figures["teacher_examples"]) > 0
    assert "1,600" in shown


# Refusals


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    for models in ((tmp_path / "nowhere", PAIR[1]), (PAIR[0], tmp_path / "nowhere")):
        message = refused("vocab", *models)
        assert message.startswith(f"model folder {tmp_path / 'nowhere'} does not exist: give an")


def test_a_folder_that_holds_neither_model_nor_tokenizer(tmp_path: Path) -> None:
    message = refused("vocab", tmp_path, PAIR[1])
    assert message == f"{tmp_path} has no config.json: it is not a model folder"


def test_an_unknown_embedded_name() -> None:
    assert refused("vocab", "embedded:giant", PAIR[1]).startswith("there is no embedded model")


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_text_file(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_bytes(content)
    message = refused("vocab", *PAIR, "--text", file)
    assert message == f"{file} is empty: give one text a line"


def test_a_text_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert refused("vocab", *PAIR, "--text", tmp_path / "no.txt").startswith("cannot read --text")
    file = tmp_path / "texts.txt"
    file.write_bytes(b"caf\xe9")
    message = refused("vocab", *PAIR, "--text", file)
    assert message.startswith(f"cannot read --text {file}, line 1: ") and "is not UTF-8" in message


def truncated(text: str) -> str:
    return text[:-40]


def without_model(text: str) -> str:
    return json.dumps({**json.loads(text), "model": None})


def unknown_model(text: str) -> str:
    return json.dumps({**json.loads(text), "model": {"type": "Nope", "vocab": {}}})


def merging_what_is_not_there(text: str) -> str:
    content = json.loads(text)
    content["model"]["merges"] = [["a", "qq"]]
    return json.dumps(content)


def a_list(text: str) -> str:
    return "[]"


@pytest.mark.parametrize(
    "damage", [truncated, without_model, unknown_model, merging_what_is_not_there, a_list]
)
def test_a_broken_tokenizer(
    damage: Callable[[str], str], folders: dict[str, Path], tmp_path: Path
) -> None:
    """The tokenizers library raises Exception itself for most of these."""
    broken = shutil.copytree(folders["characters"], tmp_path / "broken")
    file = broken / "tokenizer.json"
    file.write_text(damage(file.read_text()))
    message = refused("vocab", broken, PAIR[1])
    assert message.startswith(f"cannot read the tokenizer in {broken}: ")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("content", ["{", "[]"])
def test_broken_settings_beside_it(
    name: str, content: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    broken = shutil.copytree(folders["characters"], tmp_path / "broken")
    (broken / name).write_text(content)
    message = refused("vocab", broken, PAIR[1])
    assert message.startswith("cannot read ") and str(broken) in message


def test_rows_that_are_no_number(folders: dict[str, Path], tmp_path: Path) -> None:
    odd = shutil.copytree(folders["bpe"], tmp_path / "odd")
    (odd / "config.json").write_text('{"model_type": "llama", "vocab_size": "many"}')
    assert "'many'" in refused("vocab", odd, PAIR[1])
    (odd / "config.json").write_text('{"model_type": "llama", "text_config": null}')
    assert table(finish("vocab", odd, PAIR[1]).stdout)["rows of the head"] == ["unknown", "1,536"]


def test_a_model_folder_without_its_tokenizer(tiny_student: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_student, tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    assert refused("vocab", folder, PAIR[1]).startswith(f"cannot read the tokenizer in {folder}: ")


def test_a_place_where_no_file_can_be(tmp_path: Path) -> None:
    """The table is there all the same."""
    result = run("vocab", *PAIR, "--json", tmp_path)
    assert result.exit_code == 2
    assert "the tokenizers are same" in result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: cannot write {tmp_path}: ")


def test_one_model_alone_is_a_usage_error() -> None:
    result = run("vocab", PAIR[0])
    assert result.exit_code == 2
    assert "Missing argument 'STUDENT'" in result.stderr


# Help


def test_the_help_has_arguments_options_and_examples() -> None:
    text = finish("vocab", "--help").stdout
    assert "Usage: main vocab [OPTIONS] TEACHER STUDENT" in text
    for name in ("--text FILE", "--json FILE", "--trust-remote-code"):
        assert name in text
    _, found, examples = text.partition("\n  Example:\n")
    assert found
    assert all(line.startswith("    conch-dna vocab ") for line in examples.strip("\n").split("\n"))


def test_the_example_with_the_embedded_pair_runs(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("answers.txt").write_text("Once upon a time\n")
    text = finish("vocab", "--help").stdout
    (example,) = [
        line.split() for line in text.splitlines() if "embedded:" in line and "--" in line
    ]
    assert finish(*example[1:]).exit_code == 0


def test_distill_offers_every_alignment() -> None:
    text = " ".join(finish("distill", "--help").stdout.split())
    assert f"--alignment [auto|{'|'.join(ALIGNMENTS)}]" in text
    result = run("distill", "--domain", "thinking", "--alignment", "by-ear")
    assert result.exit_code == 2
    assert "'by-ear' is not one of 'auto', 'alm', 'roots'" in " ".join(result.stderr.split())


# A whole run


@pytest.fixture(scope="module")
def command(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A `distill` between two kinds, without where it writes to."""
    base = tmp_path_factory.mktemp("models")
    teacher = make_model_folder(base / "teacher", tokenizer=folders["characters"], seed=1)
    student = make_model_folder(base / "student", tokenizer=folders["bpe"], seed=2)
    animals = ["cat", "dog", "bird", "fox", "frog", "pig", "bear", "duck"]
    records = [
        {"prompt": f"Once there was a {animal}", "completion": f" who had {number} red balls."}
        for number, animal in enumerate(animals)
    ]
    data = base / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    options = {
        "domain": "s",
        "teacher": teacher,
        "student": student,
        "data": data,
        "iters": 4,
        "learning-rate": 3e-3,
        "warmup-iters": 1,
        "batch-size": 2,
        "max-tokens": 6,
        "val-fraction": 0.25,
        "steps-per-eval": 2,
        "steps-per-save": 2,
    }
    return ["distill", *(part for name, v in options.items() for part in (f"--{name}", str(v)))]


@pytest.fixture(autouse=True)
def _no_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw nothing, which would take half of a tiny run's time."""
    monkeypatch.setattr(domain_run, "draw_curve", lambda path, *a, **k: path.write_bytes(b"PNG"))


def test_distill_finds_out_that_the_tokenizers_differ(command: list[str], tmp_path: Path) -> None:
    result = finish(*command, "--output-dir", tmp_path)
    lines = result.stderr.splitlines()
    assert any(line.startswith("the tokenizers differ, alignment roots: ") for line in lines)
    adapter = tmp_path / "s" / "adapters_kd"
    evaluation = json.loads((adapter / "evaluation.json").read_text())
    words = " ".join(result.stdout.split())
    (after,) = [line for line in result.stdout.splitlines() if "student after" in line]
    assert len(after) <= 80 and "agreement" in words and "cross-entropy" in words
    names = ("kl_nats", "chunk_kl_nats", "cross_entropy", "bits_per_byte")
    figures = [f"{evaluation['after'][name]:.4f}" for name in names]
    figures.append(f"{evaluation['after']['top1_agreement']:.1%}")
    assert [cell.strip() for cell in after.strip("│ ").split("│")[1:]] == figures
    chunks = evaluation["before"]["chunks"]
    assert f"that are one token of the teacher too, chunk KL on {chunks} chunks;" in words
    assert f"adapter: {adapter}" in result.stdout
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["conch_dna"]["config"]["alignment"] == "auto"


def test_distill_without_distributions_shows_none(command: list[str], tmp_path: Path) -> None:
    result = finish(*command, "--alignment", "alm", "--output-dir", tmp_path)
    assert "alignment alm: " in result.stderr
    (after,) = [line for line in result.stdout.splitlines() if "student after" in line]
    cells = [cell.strip() for cell in after.strip("│ ").split("│")]
    assert cells[1] == cells[-1] == "–" not in cells[2:-1]


def test_a_dry_run_loads_no_weights(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*arguments: Any, **how: Any) -> None:
        raise AssertionError("a dry run loads no weights")

    monkeypatch.setattr(ModelSource, "load", loaded)
    result = finish(*command, "--dry-run", "--output-dir", tmp_path / "out")
    rows = table(result.stdout)
    assert rows["examples"] == ["8, of which 2 held out"]
    whole = "roots, the tokenizers differ; 100.0% of the student's tokens are covered"
    assert rows["alignment"] == [whole]
    assert rows["teacher's tokens to compute"][0].endswith(" of the teacher")
    given = [*command, "--force", "--teacher", command[command.index("--student") + 1]]
    rows = table(finish(*given, "--dry-run", "--output-dir", tmp_path / "out").stdout)
    assert rows["alignment"] == ["by index, the tokenizers are the same"]
    assert rows["teacher's tokens to compute"][0].isdigit()
    assert not (tmp_path / "out").exists()


def test_data_that_cannot_be_aligned_end_in_one_line(
    command: list[str], folders: dict[str, Path], tmp_path: Path
) -> None:
    lossy = make_model_folder(tmp_path / "lossy", tokenizer=folders["letters"])
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"{n} {'猫' * 9}"}) + "\n" for n in range(8)))
    given = [*command, "--teacher", lossy, "--data", data, "--output-dir", tmp_path / "out"]
    for more in ([], ["--dry-run"]):
        assert "could be aligned" in refused(*given, *more)
    assert not (tmp_path / "out" / "s" / "adapters_kd").exists()


def test_the_same_tokenizer_says_that_the_alignment_is_not_needed(
    command: list[str], tmp_path: Path
) -> None:
    given = [*command, "--force", "--teacher", command[command.index("--student") + 1]]
    result = finish(*given, "--alignment", "alm", "--output-dir", tmp_path)
    assert result.stderr.splitlines()[0].startswith("both tokenizers are the same: ")
    lines = result.stdout.splitlines()
    (after,) = [line for line in lines if "student after" in line]
    assert after.endswith("% │") and len(after) <= 80
    headings = " ".join(lines[: lines.index(after)])
    assert all(word in headings for word in ("cross-entropy", "perplexity", "top-1", "agreement"))
