"""Where things are to stand: taken, nameless and foreign places; what is looked at before."""

import json
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from conch_dna.cli import main
from conch_dna.errors import ConchError
from conch_dna.exporting import adapter_files
from conch_dna.exporting.work_folder import RUN_FILE, WorkFolder
from conch_dna.screen.progress import silent
from conch_dna.training.students import block_influence
from models import make_model_folder, random_adapter

TEXTS = [
    {"text": f"There were {n} owls in the old tree, and {n + 1} cats under it."} for n in range(24)
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONCH_DNA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in TEXTS))
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model_folder(tmp_path / "model", seed=3)


def run(*arguments: Any) -> tuple[int, str]:
    found = CliRunner().invoke(main, [str(each) for each in arguments])
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    return found.exit_code, found.output


def fuse(adapter: Path, folder: Any, data: Path, *more: Any) -> tuple[int, str]:
    how = ["--data", data, "--group-size", 32, "--fit", "rounded", "--max-kl", 99, *more]
    return run("fuse", adapter, folder, *how)


def test_a_model_fused_twice_has_its_own_figures(model, data, tmp_path):
    code, said = fuse(random_adapter(model, tmp_path / "a"), tmp_path / "first", data, "--bits", 8)
    assert code == 0, said
    second = random_adapter(tmp_path / "first", tmp_path / "b", seed=8)
    code, said = fuse(second, tmp_path / "second", data, "--bits", 4)
    assert code == 0, said
    told = json.loads((tmp_path / "second" / "fused.json").read_text())
    assert told["adapter"] == str(second) and told["settings"]["bits"] == "4"


def test_a_base_is_not_replaced_by_what_is_made_of_it(model, data, tmp_path):
    adapter = random_adapter(model, tmp_path / "a")
    link = tmp_path / "link"
    link.symlink_to(model)
    before = (model / "model.safetensors").read_bytes()
    for place in (model, link):
        code, said = fuse(adapter, place, data, "--bits", 4, "--overwrite")
        assert code == 2 and "is what is fused: name another folder" in said
    assert (model / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("place", [".", "/", ""])
def test_a_place_without_a_name(model, data, tmp_path, place, monkeypatch):
    adapter = random_adapter(model, tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    for found in (
        fuse(adapter, place, data, "--bits", 4),
        run("export", adapter, place, "--to", "gguf"),
        run("export", adapter, place, "--to", "peft"),
    ):
        assert found[0] == 2 and len(found[1].strip().splitlines()[-1]) > 20, found


def test_steps_need_few_bits_and_enough_texts(model, data, tmp_path):
    adapter = random_adapter(model, tmp_path / "a")
    code, said = fuse(adapter, tmp_path / "f", data, "--steps", 2)
    assert code == 2 and "give --bits 4, or leave --steps out" in said
    code, said = fuse(adapter, tmp_path / "f", data, "--bits", 4, "--steps", 2, "--batch-size", 99)
    assert code == 2 and "a smaller --batch-size" in said
    code, said = fuse(adapter, tmp_path / "f", data, "--bits", 4)
    assert code == 0, said


def test_few_texts_to_judge_by_are_told(model, tmp_path):
    data = tmp_path / "few.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in TEXTS[:8]))
    _, said = fuse(random_adapter(model, tmp_path / "a"), tmp_path / "f", data, "--bits", 4)
    assert "cannot show what is lost, it takes 6" in " ".join(said.split())


class TestWorkFolder:
    def test_a_folder_of_others_is_left_alone(self, tmp_path):
        own = tmp_path / "out.fusing" / "mydata"
        own.mkdir(parents=True)
        work = WorkFolder(tmp_path / "out", "fusing", "model", silent)
        for overwrite in (False, True):
            with work.held(), pytest.raises(ConchError, match=r"holds mydata .* move it away"):
                work.begin({"a": 1}, resume=False, overwrite=overwrite)
        assert own.is_dir()

    def test_what_was_begun_cannot_be_read(self, tmp_path):
        work = WorkFolder(tmp_path / "out", "fusing", "model", silent)
        with work.held():
            work.begin({"a": 1}, resume=False, overwrite=False)
            (work.path / "candidate").mkdir()
            (work.path / RUN_FILE).write_text("{")
            for resume in (True, False):
                with pytest.raises(ConchError, match="add --overwrite to begin anew"):
                    work.begin({"a": 1}, resume=resume, overwrite=False)
            assert (work.path / "candidate").is_dir()
            work.begin({"a": 1}, resume=False, overwrite=True)
            assert not (work.path / "candidate").exists()

    @pytest.mark.parametrize("finished", [True, False])
    def test_what_was_killed_while_it_removed_its_folder(self, tmp_path, finished):
        work = WorkFolder(tmp_path / "out", "fusing", "model", silent)
        made = work.path / "candidate" / "config.json"
        made.parent.mkdir(parents=True)
        made.write_text("{}")
        (tmp_path / "out").mkdir()
        if finished:
            os.link(made, tmp_path / "out" / "config.json")
        else:
            (tmp_path / "out" / "config.json").write_text("{}")
        with pytest.raises(ConchError, match="is there: add --overwrite"):
            work.require_place("config.json", overwrite=False)
        assert work.path.exists() != finished


def peft_of(model: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "peft"
    code, said = run("export", random_adapter(model, tmp_path / "a"), folder, "--to", "peft")
    assert code == 0, said
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_alpha": 0}, "lora_alpha 0, which is no scale"),
        ({"lora_alpha": float("inf")}, "lora_alpha inf, which is no scale|Infinity"),
        ({"r": 0}, "r 0, which is no rank"),
        ({"use_dora": True}, "has no magnitudes"),
        ({"alpha_pattern": {"q_proj": 1e400}}, "alpha_pattern|Infinity"),
        ("nan", "numbers that are not finite"),
        ("no rank", "of one rank"),
    ],
)
def test_what_is_wrong_in_a_foreign_adapter_is_one_line(model, tmp_path, change, message):
    import re

    folder = peft_of(model, tmp_path)
    if isinstance(change, dict):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    else:
        path = folder / "adapter_model.safetensors"
        arrays = dict(mx.load(str(path)))
        name = next(each for each in arrays if "lora_A" in each)
        layer = name.removesuffix("lora_A.weight")
        if change == "nan":
            arrays[name] = arrays[name] * np.nan
        else:
            arrays[name] = arrays[name][:0]
            arrays[f"{layer}lora_B.weight"] = arrays[f"{layer}lora_B.weight"][:, :0]
        mx.save_safetensors(str(path), arrays)
    code, said = run("import", folder, tmp_path / "back", "--model", model)
    assert code == 2 and re.search(message, said), said
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "back").exists()


def test_an_interrupted_look_leaves_nothing(model, tmp_path, monkeypatch):
    folder = peft_of(model, tmp_path)

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(adapter_files.AdapterSource, "load", stopped)
    run("import", folder, tmp_path / "back", "--model", model)
    monkeypatch.setattr(block_influence, "says_the_same", stopped)
    text = tmp_path / "t.txt"
    text.write_text("\n".join(row["text"] for row in TEXTS))
    run("student", "make", model, tmp_path / "cut", "--layers", 1, "--text", text)
    assert sorted(tmp_path.iterdir()) == sorted([*before, text, *tmp_path.glob("cache")])


def test_a_full_disk_leaves_neither_file(model, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adapter_files, "write_gguf_model", full)
    adapter = random_adapter(model, tmp_path / "a")
    code, said = run("export", adapter, tmp_path / "m.gguf", "--to", "gguf")
    assert code == 2 and "No space left" in said
    assert not list(tmp_path.glob("m.*"))


def test_one_adapter_is_not_merged_with_itself(model, tmp_path):
    random_adapter(model, tmp_path / "out" / "a" / "adapters_kd")
    random_adapter(model, tmp_path / "out" / "b" / "adapters_kd")
    code, said = run("merge", "a", "b", "--into", "one", "--adapters", tmp_path / "out")
    assert code == 2 and "a and b are the same adapter" in said


def test_a_students_place_is_looked_at_first(model, tmp_path):
    text = tmp_path / "t.txt"
    text.write_text("a\n")
    (tmp_path / "file").write_text("")
    code, said = run(
        "student", "make", model, tmp_path / "file" / "s", "--layers", 1, "--text", text
    )
    assert code == 2 and "is a file: name another place" in said
