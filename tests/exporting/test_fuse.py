"""An adapter in its model: mlx_lm opens it, the gate decides, nothing is half there."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from conch_dna.cli import main
from conch_dna.errors import ConchError
from conch_dna.exporting import fuse as fusing
from conch_dna.exporting.fuse import Fusing
from conch_dna.exporting.settings import FuseSettings
from conch_dna.exporting.source import AdapterSource
from conch_dna.language_model import ModelSource
from conch_dna.screen.progress import silent
from conch_dna.training.true_kd import KDConfig, TrueKnowledgeDistiller
from models import EXPERTS, QUICK, SHARED, keep_layers, make_model_folder

ANIMALS = ["cat", "dog", "bird", "fox", "frog", "pig", "bear", "duck", "cow", "hen", "goat", "boy"]
STORIES = [
    {"text": f"Once upon a time there was a little {animal} who{' very' * (n % 3)} liked to play."}
    for n, animal in enumerate(ANIMALS * 3)
]
THINGS = ["a red ball", "an old hat", "a big cake", "a new kite", "a soft bed", "a small boat"]
PLACES = ["in the park", "by the river", "at the farm", "under the tree", "near the lake"]
# Of layers some hundred numbers wide little can be said by fewer tokens.
LONG = [
    {
        "text": f"Once upon a time there was a little {animal} who liked to play {place}. One day "
        f"the {animal} found {thing}. The {animal} was very happy and ran home to show it to Mom. "
        f'Mom smiled and said, "What a nice surprise!" They played {place} until it was dark, and '
        f"then the {animal} went to sleep."
    }
    for animal, thing, place in zip(ANIMALS * 8, THINGS * 16, PLACES * 20, strict=False)
]


def adapter_of(
    teacher: Any, student: Any, output: Path, *, data: Any = STORIES, **settings: Any
) -> Path:
    config = KDConfig(**{**QUICK, "output_dir": str(output), "lora_keys": "all", **settings})
    distiller = TrueKnowledgeDistiller(str(teacher), str(student), config)
    return Path(distiller.distill_domain("stories", data=data).adapter_path)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the embedded student, after some steps that changed it."""
    output = tmp_path_factory.mktemp("adapter")
    how = {"num_iters": 20, "learning_rate": 5e-3, "batch_size": 4, "data": LONG}
    return adapter_of("embedded:teacher", "embedded:student", output, **how)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random model whose layers groups of 32 divide, and an adapter of it."""
    folder = tmp_path_factory.mktemp("tiny")
    teacher = make_model_folder(folder / "teacher", seed=1)
    student = make_model_folder(folder / "student", seed=2)
    return student, adapter_of(teacher, student, folder / "out", learning_rate=3e-2)


def fuse(
    adapter: Path, folder: Path, *, resume: bool = False, overwrite: bool = False, **settings: Any
) -> Any:
    data, report = settings.pop("data", None), settings.pop("report", silent)
    source = AdapterSource.open(adapter, trust_remote_code=False, report=report)
    chosen = FuseSettings(**{"group_size": 32, **settings})
    made = Fusing(source, folder, chosen, data=data, report=report)
    return made.fused(resume=resume, overwrite=overwrite)


def logits_of(model: Any, ids: Any) -> np.ndarray:
    return np.asarray(model(mx.array([ids])).astype(mx.float32))[0]


def opened(folder: Path, adapter: Path | None = None) -> Any:
    from mlx_lm import load

    return load(str(folder), adapter_path=str(adapter) if adapter else None)[0]


class TestWhatIsMade:
    def test_whole_weights_say_what_the_adapter_says(self, adapter, tmp_path):
        rows = fuse(adapter, tmp_path / "whole", bits="float")
        student = ModelSource("embedded:student").folder
        expected = logits_of(opened(student, adapter), [5, 9, 23, 7])
        bare = logits_of(opened(student), [5, 9, 23, 7])
        found = logits_of(opened(tmp_path / "whole"), [5, 9, 23, 7])
        np.testing.assert_allclose(found, expected, atol=2e-4)
        assert np.abs(bare - expected).max() > 0.1
        assert rows[-1].kl < 1e-6 < rows[1].kl

    @pytest.mark.parametrize("bits", ["2", "4", "8"])
    def test_few_bits_open_in_mlx_lm_and_are_as_few(self, adapter, tmp_path, bits):
        from mlx_lm.utils import compute_bits_per_weight

        fuse(adapter, tmp_path / "few", bits=bits, fit="rounded", max_kl=9.0)
        model = opened(tmp_path / "few")
        assert int(bits) <= compute_bits_per_weight(model) < int(bits) + 2.2
        config = json.loads((tmp_path / "few" / "config.json").read_text())
        assert config["quantization"] == {"group_size": 32, "bits": int(bits), "mode": "affine"}
        assert config["quantization_config"] == config["quantization"]

    def test_fitted_outputs_lose_less_than_rounded_ones(self, adapter, tmp_path):
        lost = {
            how: fuse(adapter, tmp_path / how, bits="3", fit=how, max_kl=9.0)[-1].kl
            for how in ("rounded", "outputs")
        }
        assert lost["outputs"] < 0.8 * lost["rounded"]

    def test_trained_scales_lose_less_than_they_did(self, adapter, tmp_path):
        how = {"bits": "2", "steps": 12, "learning_rate": 1e-2, "batch_size": 4, "max_kl": 9.0}
        before = fuse(adapter, tmp_path / "fitted", bits="2", max_kl=9.0)[-1].kl
        after = fuse(adapter, tmp_path / "trained", **how)[-1].kl
        assert after < 0.95 * before
        assert logits_of(opened(tmp_path / "trained"), [5, 9]).shape[0] == 2

    def test_a_quantised_model_keeps_its_own_bits(self, tmp_path):
        teacher = make_model_folder(tmp_path / "teacher", seed=1)
        student = make_model_folder(tmp_path / "student", seed=2, quantize=4)
        adapter = adapter_of(teacher, student, tmp_path / "out", data=LONG)
        fitted = fuse(adapter, tmp_path / "fused", group_size=0, max_kl=9.0)[-1].kl
        # What lies on the model's own grid stays there, and what it is moved by is made good.
        assert 0 < fitted < 0.7 * fuse(adapter, tmp_path / "r", fit="rounded", max_kl=9.0)[-1].kl
        own, made = (
            mx.load(str(folder / "model.safetensors")) for folder in (student, tmp_path / "fused")
        )
        name = "model.embed_tokens.weight"
        assert mx.array_equal(own[name], made[name])
        config = json.loads((tmp_path / "fused" / "config.json").read_text())
        assert config["quantization"] == {"group_size": 32, "bits": 4, "mode": "affine"}
        whole = fuse(adapter, tmp_path / "whole", bits="float")
        assert whole[-1].kl < 1e-5
        assert "quantization" not in json.loads((tmp_path / "whole" / "config.json").read_text())

    @pytest.mark.parametrize("kind", ["dora", "full"])
    def test_other_kinds_of_adapters(self, tmp_path, kind):
        teacher = make_model_folder(tmp_path / "teacher", seed=1)
        student = make_model_folder(tmp_path / "student", seed=2)
        adapter = adapter_of(teacher, student, tmp_path / "out", learning_rate=1e-2, **{kind: True})
        rows = fuse(adapter, tmp_path / "whole", bits="float")
        assert rows[-1].kl < 1e-5 < rows[1].kl
        fuse(adapter, tmp_path / "few", bits="4", max_kl=9.0)
        opened(tmp_path / "few")

    def test_experts_are_rounded_and_the_rest_is_fitted(self, tmp_path):
        teacher = make_model_folder(tmp_path / "teacher", seed=1, **EXPERTS)
        student = make_model_folder(tmp_path / "student", seed=2, **EXPERTS)
        adapter = adapter_of(teacher, student, tmp_path / "out", learning_rate=1e-2)
        rows = fuse(adapter, tmp_path / "few", bits="8", max_kl=9.0)
        assert rows[-1].kl < 0.02
        opened(tmp_path / "few")

    def test_an_adapter_of_embedding_and_head(self, tmp_path):
        teacher = make_model_folder(tmp_path / "teacher", seed=1)
        student = make_model_folder(tmp_path / "student", seed=2)
        keys = {"lora_keys": "all,model.embed_tokens", "learning_rate": 1e-2}
        adapter = adapter_of(teacher, student, tmp_path / "out", **keys)
        rows = fuse(adapter, tmp_path / "whole", bits="float")
        assert rows[-1].kl < 1e-5 < rows[1].kl

    def test_its_figures_lie_beside_it(self, tiny, tmp_path):
        _, adapter = tiny
        rows = fuse(adapter, tmp_path / "fused", bits="8")
        found = json.loads((tmp_path / "fused" / "fused.json").read_text())
        assert [row["name"] for row in found["figures"]] == ["adapter", "without it", "fused"]
        assert found["figures"][-1]["kl_nats"] == rows[-1].kl
        assert found["kept_share"] == pytest.approx(1 - rows[-1].kl / rows[1].kl)
        assert not (tmp_path / "fused.fusing").exists()


class TestTheGate:
    def test_worse_than_asked_is_not_there_and_can_be_taken_after_all(
        self, tiny, tmp_path, monkeypatch
    ):
        _, adapter = tiny
        folder = tmp_path / "fused"
        with pytest.raises(ConchError, match=r"nats a token from its adapter.*--resume to take it"):
            fuse(adapter, folder, bits="2", max_kl=1e-6)
        assert not folder.exists()
        # Nothing is made again.
        monkeypatch.setattr(fusing, "fuse_in_place", None)
        with pytest.raises(ConchError, match="holds an unfinished model: add --resume"):
            fuse(adapter, folder, bits="2", max_kl=9.0)
        fuse(adapter, folder, bits="2", max_kl=9.0, resume=True)
        assert (folder / "fused.json").is_file()

    def test_nothing_left_of_the_adapter_is_refused(self, tiny, tmp_path):
        _, adapter = tiny
        rows = fuse(adapter, tmp_path / "eight", bits="8")
        assert rows[-1].kl < rows[1].kl
        weak = adapter_of(
            *[make_model_folder(tmp_path / n, seed=s) for n, s in (("a", 1), ("b", 2))],
            tmp_path / "weak",
            learning_rate=1e-6,
        )
        with pytest.raises(ConchError, match="nothing of the adapter would be left"):
            fuse(weak, tmp_path / "two", bits="2")

    def test_other_settings_do_not_go_on(self, tiny, tmp_path):
        _, adapter = tiny
        with pytest.raises(ConchError, match="nats a token"):
            fuse(adapter, tmp_path / "fused", bits="2", max_kl=1e-6)
        with pytest.raises(ConchError, match="bits: was '2', now '3'"):
            fuse(adapter, tmp_path / "fused", bits="3", max_kl=9.0, resume=True)
        fuse(adapter, tmp_path / "fused", bits="3", max_kl=9.0, overwrite=True)


class TestStopsAndGoesOn:
    @pytest.mark.parametrize(
        "stop_at", ["inputs of layers", "weights", "training of scales", "step"]
    )
    def test_an_interrupted_one_ends_with_the_same_bytes(self, tiny, tmp_path, stop_at):
        _, adapter = tiny
        how = {"bits": "3", "steps": 4, "batch_size": 2, "max_kl": 9.0}
        fuse(adapter, tmp_path / "whole", **how)

        def stop(event: str, row: dict[str, Any]) -> None:
            if event == stop_at == "step" and row["step"] == 3:
                raise KeyboardInterrupt
            if event == "phase" and row["name"] == stop_at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fuse(adapter, tmp_path / "again", report=stop, **how)
        assert not (tmp_path / "again").exists()
        fuse(adapter, tmp_path / "again", resume=True, **how)
        first, second = (tmp_path / n / "model.safetensors" for n in ("whole", "again"))
        assert first.read_bytes() == second.read_bytes()

    def test_what_was_damaged_meanwhile_is_made_again(self, tiny, tmp_path):
        _, adapter = tiny
        with pytest.raises(ConchError, match="nats a token"):
            fuse(adapter, tmp_path / "fused", bits="2", max_kl=1e-6)
        path = tmp_path / "fused.fusing" / "candidate" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-8])
        said: list[str] = []
        fuse(
            adapter,
            tmp_path / "fused",
            bits="2",
            max_kl=9.0,
            resume=True,
            report=lambda event, row: said.append(str(row.get("message", ""))),
        )
        assert any("made again" in text for text in said)


class TestBadInput:
    def test_an_adapter_of_another_model(self, tiny, tmp_path):
        _, adapter = tiny
        other = make_model_folder(tmp_path / "other", seed=5)
        source = AdapterSource.open(
            adapter, model=str(other), trust_remote_code=False, report=silent
        )
        with pytest.raises(ConchError, match="was made for"):
            Fusing(source, tmp_path / "fused", FuseSettings(bits="8", group_size=32)).fused()
        assert not (tmp_path / "fused").exists()

    def test_groups_that_no_width_has(self, tiny, tmp_path):
        _, adapter = tiny
        with pytest.raises(ConchError, match="no layer can be in 4 bits with groups of 128"):
            fuse(adapter, tmp_path / "fused", bits="4", group_size=128)

    def test_layers_whose_width_does_not_fit_stay_whole_and_are_told(self, tiny, tmp_path):
        _, adapter = tiny
        said: list[str] = []
        fuse(
            adapter,
            tmp_path / "fused",
            bits="8",
            group_size=64,
            report=lambda event, row: said.append(str(row.get("message", ""))),
        )
        assert any("stay whole" in text for text in said)
        config = json.loads((tmp_path / "fused" / "config.json").read_text())
        assert config["quantization"]["model.layers.0.mlp.down_proj"] is False
        opened(tmp_path / "fused")

    def test_an_adapter_without_its_texts_needs_some(self, tiny, tmp_path):
        import shutil

        _, adapter = tiny
        bare = tmp_path / "bare"
        bare.mkdir()
        for name in ("adapters.safetensors", "adapter_config.json"):
            shutil.copyfile(adapter / name, bare / name)
        with pytest.raises(ConchError, match="--data FILE"):
            fuse(bare, tmp_path / "fused", bits="8")
        data = tmp_path / "texts.jsonl"
        data.write_text("\n".join(map(json.dumps, STORIES)))
        assert fuse(bare, tmp_path / "fused", bits="8", data=data)[-1].kl < 0.1

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"bits": "7"}, "bits is '7'"),
            ({"group_size": 16}, "groups of 32, 64 and 128"),
            ({"bits": "float", "steps": 3}, "leave one"),
            ({"max_kl": -1.0}, "max_kl"),
        ],
    )
    def test_settings_that_cannot_be(self, settings, message):
        with pytest.raises(ConchError, match=message):
            FuseSettings(**settings)

    def test_too_few_tokens_to_fit_by_are_warned_of(self, tiny, tmp_path):
        _, adapter = tiny
        said: list[str] = []

        def report(event: str, row: dict[str, Any]) -> None:
            said.append(f"{event} {row.get('message', '')}")

        fuse(adapter, tmp_path / "few", bits="8", fit_tokens=64, report=report)
        assert any("warning 64 tokens of text are few" in text for text in said)

    def test_a_folder_that_is_there(self, tiny, tmp_path):
        student, adapter = tiny
        (tmp_path / "notes").mkdir()
        with pytest.raises(ConchError, match="is no model"):
            fuse(adapter, tmp_path / "notes", bits="8", overwrite=True)
        with pytest.raises(ConchError, match="add --overwrite"):
            fuse(adapter, student, bits="8")
        with pytest.raises(ConchError, match="is what is fused"):
            fuse(adapter, student, bits="8", overwrite=True)

    def test_a_full_disk_leaves_nothing_at_the_place(self, tiny, tmp_path, monkeypatch):
        def full(*arguments: Any, **named: Any) -> None:
            raise OSError(28, "No space left on device")

        _, adapter = tiny
        with monkeypatch.context() as context:
            context.setattr("mlx.core.save_safetensors", full)
            with pytest.raises(ConchError, match="free some disk space"):
                fuse(adapter, tmp_path / "fused", bits="8")
        assert not (tmp_path / "fused").exists()
        fuse(adapter, tmp_path / "fused", bits="8", resume=True)
        opened(tmp_path / "fused")

    def test_two_at_once(self, tiny, tmp_path):
        from conch_dna.checkpoints import FolderLock

        _, adapter = tiny
        with FolderLock(tmp_path / "fused.fusing"), pytest.raises(ConchError, match="is in use by"):
            fuse(adapter, tmp_path / "fused", bits="8")


def test_the_command_says_what_is_left(tiny, tmp_path):
    _, adapter = tiny
    folder, figures = tmp_path / "fused", tmp_path / "figures.json"
    arguments = ["fuse", str(adapter), str(folder), "--bits", "8", "--group-size", "32"]
    result = CliRunner().invoke(main, [*arguments, "--json", str(figures)])
    assert result.exit_code == 0, result.output
    assert "of the adapter is left" in result.output.splitlines()[-1]
    assert json.loads(figures.read_text())["figures"][0]["kl_nats"] == 0
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 2
    assert "add --overwrite" in again.output


def test_answers_of_a_domain_with_a_schema_are_checked(tmp_path):
    if not SHARED.is_dir():
        pytest.skip("../shared/data is not here")
    story = SHARED / "models" / "stories260K"
    student = keep_layers(story, tmp_path / "student", [0, 2, 4])
    config = KDConfig(**{**QUICK, "output_dir": str(tmp_path / "out"), "max_tokens": 4})
    records = [{"prompt": f"The {animal}", "completion": " was glad."} for animal in ANIMALS]
    result = TrueKnowledgeDistiller(str(story), str(student), config).distill_domain(
        "thinking", data=records
    )
    rows = fuse(Path(result.adapter_path), tmp_path / "fused", bits="8", answers=2, max_kl=9.0)
    assert [len(row.valid) for row in rows] == [2, 0, 2]


class TestMixedBits:
    def test_a_model_has_so_many_bits_and_loses_less(self, adapter, tmp_path):
        rows = {
            name: fuse(adapter, tmp_path / name, max_kl=9.0, answers=0, **how)
            for name, how in {"same": {"bits": "3"}, "mixed": {"mean_bits": 3.0}}.items()
        }
        assert rows["mixed"][-1].kl < 0.9 * rows["same"][-1].kl
        assert rows["mixed"][-1].nbytes <= rows["same"][-1].nbytes
        config = json.loads((tmp_path / "mixed" / "config.json").read_text())
        own = [each for each in config["quantization"].values() if isinstance(each, dict)]
        assert len({each["bits"] for each in own}) > 1
        assert all(
            np.isfinite(np.array(opened(tmp_path / "mixed")(mx.array([[5, 9, 23]])))).ravel()
        )

    def test_scales_of_mixed_widths_are_trained_too(self, adapter, tmp_path):
        before = fuse(adapter, tmp_path / "fitted", mean_bits=2.5, max_kl=9.0, answers=0)[-1].kl
        how = {"steps": 12, "learning_rate": 1e-2, "batch_size": 4}
        after = fuse(adapter, tmp_path / "healed", mean_bits=2.5, max_kl=9.0, answers=0, **how)
        assert after[-1].kl < before
