"""Several adapters in one: each domain is recalled about as well, or nothing takes its place."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from conch_dna.cli import main
from conch_dna.errors import ConchError
from conch_dna.exporting.merging import Merging, joined
from conch_dna.exporting.settings import MergeSettings
from conch_dna.exporting.source import AdapterSource
from conch_dna.language_model import ModelSource
from conch_dna.screen.progress import silent
from conch_dna.training.batches import Example, collate
from conch_dna.training.true_kd import KDConfig, TrueKnowledgeDistiller
from models import QUICK, make_model_folder

ANIMALS = ["cat", "dog", "bird", "fox", "frog", "pig", "bear", "duck", "cow", "hen", "goat", "boy"]
STORIES = [
    {"text": f"Once upon a time there was a {animal} who{' very' * n} liked to play {place}."}
    for n in range(3)
    for animal, place in zip(ANIMALS, ["in the park", "by the river"] * 6, strict=True)
]
SONGS = [
    {"text": f"La la la, says the {animal}. La la{' la' * n}, la la, and the {animal} sang again."}
    for n in range(3)
    for animal in ANIMALS
]
DATA = {"stories": STORIES, "songs": SONGS}
HOW: dict[str, Any] = {"steps": 24, "learning_rate": 3e-3}


def distilled(output: Path, domain: str, teacher: Any, student: Any, **settings: Any) -> Path:
    config = KDConfig(**{**QUICK, "output_dir": str(output), "lora_keys": "all", **settings})
    distiller = TrueKnowledgeDistiller(str(teacher), str(student), config)
    return Path(distiller.distill_domain(domain, data=DATA[domain]).adapter_path)


@pytest.fixture(scope="module")
def neurons(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters of the embedded student, of other ranks and layers, in one folder."""
    output = tmp_path_factory.mktemp("neurons")
    how: dict[str, Any] = {
        "num_iters": 24,
        "learning_rate": 3e-3,
        "alpha": 0.0,
        "select_by": "loss",
    }
    distilled(output, "stories", "embedded:teacher", "embedded:student", lora_rank=4, **how)
    other = {**how, "lora_rank": 8, "lora_keys": "attention", "dora": True}
    distilled(output, "songs", "embedded:teacher", "embedded:student", **other)
    return output


def source_of(path: Path, report: Any = silent) -> AdapterSource:
    return AdapterSource.open(path, trust_remote_code=False, report=report)


def merge(neurons: Path, folder: Path, *, report: Any = silent, **how: Any) -> Any:
    resume, overwrite = how.pop("resume", False), how.pop("overwrite", False)
    sources = {name: source_of(neurons / name / "adapters_kd", report) for name in DATA}
    made = Merging(sources, folder, MergeSettings(**{**HOW, **how}), report=report)
    return made.merged(resume=resume, overwrite=overwrite)


def test_each_domain_is_recalled_about_as_by_its_own(neurons, tmp_path):
    verdicts = merge(neurons, tmp_path / "one")
    for name, verdict in verdicts.items():
        found = verdict.figures
        assert verdict.passed, verdict.reason
        assert found["child"] >= found["parent"] - 0.05
        # Or the model without an adapter would do as well.
        assert found["without"] < found["parent"] - 0.1
        assert verdict.reason.startswith(f"{name}: recall: 0.")
        assert "against its own adapter's" in verdict.reason
    merged = json.loads((tmp_path / "one" / "merged.json").read_text())
    assert sorted(merged["verdicts"]) == ["songs", "stories"]
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert config["lora_parameters"]["rank"] == 8
    assert not (tmp_path / "one.merging").exists()


def test_mlx_lm_opens_it_and_it_can_be_fused(neurons, tmp_path):
    from mlx_lm import load

    merge(neurons, tmp_path / "one", recall_margin=1.0, steps=2)
    student = str(ModelSource("embedded:student").folder)
    ids = mx.array([[5, 9, 23, 7]])
    bare, adapted = (
        load(student, adapter_path=path)[0](ids) for path in (None, str(tmp_path / "one"))
    )
    assert float(mx.abs(bare - adapted).max()) > 1e-4
    fuse = ["fuse", str(tmp_path / "one"), str(tmp_path / "whole"), "--bits", "float"]
    result = CliRunner().invoke(main, fuse, standalone_mode=False)
    assert result.exception is None, result.output
    assert (tmp_path / "whole" / "model.safetensors").is_file()


def test_a_joined_batch_holds_each_token_and_each_domain_counts_as_much():
    random = np.random.default_rng(0)

    def example(length: int, name: str) -> Example:
        counted = random.random(length) < 0.6
        counted[0] = False
        counted[1] = True
        return Example(random.integers(1, 99, length).astype(np.int32), counted, name)

    groups = [[example(7, "a"), example(50, "b")], [example(90, "c")]]
    batches = [collate(group) for group in groups]
    made = joined(batches)
    assert made.count == sum(batch.count for batch in batches)
    weights, kd_weights = made.arrays["weights"], made.arrays["kd_weights"]
    assert weights.sum() == made.count
    np.testing.assert_allclose(kd_weights.sum(), made.count, rtol=1e-6)
    ends = np.cumsum([len(batch.arrays["labels"]) for batch in batches])
    for part in np.split(kd_weights, ends[:-1]):
        np.testing.assert_allclose(part.sum(), made.count / 2, rtol=1e-6)
    # Beside each place that counts stands the token before it.
    before = made.arrays["inputs"].reshape(-1)[made.arrays["positions"]][weights > 0]
    expected = [e.ids[np.flatnonzero(e.counted) - 1] for group in groups for e in group]
    np.testing.assert_array_equal(before, np.concatenate(expected))


SHORT: dict[str, Any] = {"steps": 4, "recall_margin": 1.0}


@pytest.fixture(scope="module")
def whole(neurons, tmp_path_factory) -> bytes:
    """The file of an adapter that was merged at one go."""
    folder = tmp_path_factory.mktemp("merged") / "whole"
    merge(neurons, folder, **SHORT)
    return (folder / "adapters.safetensors").read_bytes()


class TestItStops:
    @pytest.mark.parametrize("where", ["what songs says", "training", "measuring"])
    def test_it_goes_on_to_the_same_bytes(self, neurons, tmp_path, where, whole):
        class Crash(BaseException):
            pass

        def report(event: str, row: dict[str, Any]) -> None:
            if event == "phase" and row["name"].startswith(where):
                raise Crash

        with pytest.raises(Crash):
            merge(neurons, tmp_path / "stopped", report=report, **SHORT)
        assert not (tmp_path / "stopped").exists()
        with pytest.raises(ConchError, match="holds an unfinished adapter: add --resume"):
            merge(neurons, tmp_path / "stopped", **SHORT)
        merge(neurons, tmp_path / "stopped", resume=True, **SHORT)
        assert (tmp_path / "stopped" / "adapters.safetensors").read_bytes() == whole

    def test_a_refused_one_waits_and_can_be_taken(self, neurons, tmp_path):
        with pytest.raises(ConchError, match=r"songs: recall: .*needed -0\.0000.*Nothing stands"):
            merge(neurons, tmp_path / "one", steps=1, recall_margin=0.0)
        assert not (tmp_path / "one").exists()
        said: list[str] = []

        def report(event: str, row: dict[str, Any]) -> None:
            said.append(row.get("name", ""))

        merge(neurons, tmp_path / "one", steps=1, recall_margin=1.0, resume=True, report=report)
        assert "training" not in said
        assert (tmp_path / "one" / "adapters.safetensors").is_file()


def test_what_one_holds_out_no_other_teaches(neurons, tmp_path):
    """Silent failure: a merged adapter is judged on texts that it learned in another domain."""
    said: list[str] = []

    def report(event: str, row: dict[str, Any]) -> None:
        said.append(row.get("message", ""))

    sources = {
        "stories": source_of(neurons / "stories" / "adapters_kd"),
        "again": source_of(
            distilled(
                tmp_path / "out",
                "stories",
                "embedded:teacher",
                "embedded:student",
                seed=7,
                alpha=0.0,
                num_iters=2,
            )
        ),
    }
    settings = MergeSettings(steps=1, recall_margin=1.0, answers=0)
    Merging(sources, tmp_path / "one", settings, report=report).merged()
    assert any("held out of another domain: not taught" in each for each in said)
    learned, heldout = (
        [json.loads(line)["text"] for line in (tmp_path / "one" / name).read_text().splitlines()]
        for name in ("training_data.jsonl", "heldout.jsonl")
    )
    assert set(heldout) <= set(learned)
    # Each of those held out stands there once for each domain that holds it out, never as taught.
    assert sum(text in heldout for text in learned) == len(heldout)


class TestBadInput:
    def test_of_another_model(self, neurons, tmp_path):
        student = make_model_folder(tmp_path / "student", seed=2)
        other = distilled(tmp_path / "out", "songs", student, student, alpha=0.0)
        sources = {
            "stories": source_of(neurons / "stories" / "adapters_kd"),
            "songs": source_of(other),
        }
        with pytest.raises(
            ConchError, match=r"stories is for embedded:student, songs for .*one mod"
        ):
            Merging(sources, tmp_path / "one", MergeSettings())

    def test_not_whole(self, neurons, tmp_path):
        shutil.copytree(neurons / "songs" / "adapters_kd", tmp_path / "songs")
        path = tmp_path / "songs" / "adapters.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(
            ConchError, match=r"songs is not whole: adapters\.safetensors was trunc"
        ):
            source_of(tmp_path / "songs")
        with pytest.raises(ConchError, match="holds no adapter"):
            source_of(neurons / "songs")

    def test_one_and_the_same_and_a_place_that_is_taken(self, neurons, tmp_path):
        sources = {"stories": source_of(neurons / "stories" / "adapters_kd")}
        with pytest.raises(ConchError, match="1 adapter is given: name two or more"):
            Merging(sources, tmp_path / "one", MergeSettings())
        with pytest.raises(ConchError, match="adapters_kd is there: add --overwrite"):
            merge(neurons, neurons / "songs" / "adapters_kd")
        with pytest.raises(ConchError, match="is one of those that are merged"):
            merge(neurons, neurons / "songs" / "adapters_kd", overwrite=True)
        (tmp_path / "taken").mkdir()
        with pytest.raises(ConchError, match="taken is there and is no adapter"):
            merge(neurons, tmp_path / "taken", overwrite=True)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["stories", "songs", "--into", "../one"], "domain '../one' becomes a folder's name"),
            (["stories", "stories", "--into", "one"], "stories is named twice"),
            (["stories", "nobody", "--into", "one"], "there is no adapter of nobody"),
            (["stories", "songs", "--into", "one", "--batch-size", "99"], "smaller --batch-size"),
        ],
    )
    def test_on_the_command_line(self, neurons, arguments, message):
        result = CliRunner().invoke(main, ["merge", *arguments, "--adapters", str(neurons)])
        assert result.exit_code == 2
        assert message in result.output
        assert "Traceback" not in result.output
        assert not (neurons / "one").exists()
