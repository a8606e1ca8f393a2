"""What a run takes is told from configurations alone, and is what MLX then counts.

The unit tests count bytes and operations by hand; the slow ones run the whole way, measured phase
by phase in a process of its own.
"""

import importlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from conch_dna.language_model import ASSETS, ModelSource
from conch_dna.training.adapters import make_trainable
from conch_dna.training.fit.graph import cost_of
from conch_dna.training.fit.memory_estimate import (
    DOES_NOT_FIT,
    FITS,
    TIGHT,
    Estimate,
    estimate_run,
    remedies,
)
from conch_dna.training.fit.phases import batch_arrays, outlined, step_cost
from conch_dna.training.fit.workload import Workload
from conch_dna.training.settings import KDConfig
from measured_memory import estimated, measured
from models import EXPERTS, keep_layers, make_model_folder

WORK = Workload(
    longest=65,
    teacher_longest=65,
    counted=256,
    teacher_counted=256,
    mean_share=1.0,
    examples=20,
    heldout=4,
    prompts=8,
    longest_prompt=9,
)


def ones(*shape: int) -> mx.array:
    return mx.ones(shape)


class TestGraph:
    def test_a_product_is_counted(self):
        cost = cost_of(lambda a, b: [a @ b], {"a": ones(8, 16), "b": ones(16, 32)})
        assert cost.flops == 2 * 8 * 16 * 32
        assert cost.peak_bytes == 4 * 8 * 32
        assert cost.seconds(1.0, 1e30) == cost.flops

    def test_another_look_at_a_buffer_takes_nothing(self):
        cost = cost_of(lambda a: [a.T[None].reshape(1, 16, 8, 1)], {"a": ones(8, 16)})
        assert cost.peak_bytes == 0 and not cost.work
        copied = cost_of(lambda a: [a.T.reshape(128)], {"a": ones(8, 16)})
        assert copied.peak_bytes == 4 * 128

    def test_an_array_that_nobody_needs_is_overwritten(self):
        assert cost_of(lambda a: [mx.exp(a @ a) + 1], {"a": ones(64, 64)}).peak_bytes == 4 * 64**2

    def test_an_array_that_is_needed_again_stays(self):
        def both(a: mx.array) -> list[mx.array]:
            product = a @ a
            return [mx.exp(product) @ product]

        assert cost_of(both, {"a": ones(64, 64)}).peak_bytes == 3 * 4 * 64**2

    def test_what_the_caller_gives_away_is_freed(self):
        def chain(a: mx.array) -> list[mx.array]:
            for _ in range(300):
                a = a @ a
            return [a]

        arrays = {"a": ones(64, 64)}
        freed = cost_of(chain, arrays, owned=("a",)).peak_bytes
        # The main thread is at most a hundred dispatches ahead, two of which are a product.
        assert freed == 50 * 4 * 64**2
        assert cost_of(chain, arrays).peak_bytes == 51 * 4 * 64**2

    def test_what_is_compiled_has_nothing_between(self):
        def mixed(a: mx.array) -> list[mx.array]:
            return [mx.exp(a) * mx.sin(a) + mx.cos(a)]

        assert cost_of(mixed, {"a": ones(64, 64)}).peak_bytes > 4 * 64**2
        fused = cost_of(mixed, {"a": ones(64, 64)}, compiled=True)
        assert fused.peak_bytes == 4 * 64**2 and len(fused.work) == 1


def estimate(teacher: Path, student: Path, **settings: Any) -> Estimate:
    config = KDConfig(max_tokens=56, **settings)
    return estimate_run(ModelSource(str(teacher)), ModelSource(str(student)), config, WORK)


class TestEstimate:
    def test_weights_and_adapter_are_those_of_the_files(self, tiny_teacher, tiny_student):
        found = estimate(tiny_teacher, tiny_student)
        for role, folder in (("teacher", tiny_teacher), ("student", tiny_student)):
            arrays = mx.load(str(folder / "model.safetensors"))
            assert found.parts[f"{role}'s weights"] == sum(a.nbytes for a in arrays.values())
        config = json.loads((tiny_student / "config.json").read_text())
        width, heads = config["hidden_size"], config["num_attention_heads"]
        head = config.get("head_dim") or width // heads
        rows = heads * head + config["num_key_value_heads"] * head
        trained = config["num_hidden_layers"] * 16 * (2 * width + rows)
        assert found.parts["adapter, gradients, AdamW's moments"] == 4 * 4 * trained
        assert not found.unknown and all(found.phases.values())

    def test_the_cache_of_answers_is_in_whole_steps(self, tiny_teacher, tiny_student):
        config = json.loads((tiny_teacher / "config.json").read_text())
        head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        a_position = 4 * 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head
        found = estimate(tiny_teacher, tiny_student)
        assert found.parts["KV cache of 8 answers at once"] == 8 * 256 * a_position

    def test_no_weights_have_to_be_there(self, tmp_path):
        folder = make_model_folder(tmp_path / "model", quantize=True, **EXPERTS)
        bare = shutil.copytree(folder, tmp_path / "bare")
        (bare / "model.safetensors").unlink()
        assert estimate(bare, bare) == estimate(folder, folder)

    def test_a_type_that_is_stated_counts(self, tmp_path):
        bare = shutil.copytree(ASSETS / "student", tmp_path / "bare")
        (bare / "model.safetensors").unlink()
        before = estimate(bare, bare).parts["student's weights"]
        config = json.loads((bare / "config.json").read_text())
        (bare / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
        assert before and estimate(bare, bare).parts["student's weights"] == before // 2

    def test_less_is_needed_with_checkpoints_and_smaller_batches(self, tiny_teacher, tiny_student):
        usual = estimate(tiny_teacher, tiny_student, lora_keys="all").phases["training"]
        again = estimate(tiny_teacher, tiny_student, lora_keys="all", grad_checkpoint=True)
        assert again.phases["training"] < usual

    def test_what_is_not_known_is_named(self, tmp_path, tiny_student):
        bare = shutil.copytree(tiny_student, tmp_path / "own code")
        (bare / "model.safetensors").unlink()
        config = json.loads((bare / "config.json").read_text())
        (bare / "config.json").write_text(json.dumps({**config, "model_file": "own.py"}))
        found = estimate(bare, tiny_student)
        assert found.unknown == ("all phases of the teacher: its own code is not here yet",)
        assert "the teacher answers" not in found.phases and found.phases["training"]

    def test_nothing_is_computed(self, tiny_student):
        model = outlined(ModelSource(str(tiny_student)))
        config = KDConfig()
        make_trainable(model, config, compute=False)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        cost = step_cost(model, batch_arrays(4, 512, 2048, 64), config)
        assert mx.get_peak_memory() - before < cost.peak_bytes / 1000

    def test_a_verdict_leaves_the_system_some_room(self):
        found = Estimate(parts={}, phases={"a": 70, "b": 30, "c": None}, seconds={})
        assert found.peak_bytes == 70 and found.highest == "a"
        assert [found.verdict(b) for b in (100, 80, 69)] == [FITS, TIGHT, DOES_NOT_FIT]

    def test_a_remedy_is_one_that_fits(self, tiny_teacher, tiny_student):
        source = ModelSource(str(tiny_teacher)), ModelSource(str(tiny_student))
        config = KDConfig(max_tokens=56, lora_keys="all")
        peak = estimate_run(*source, config, WORK).peak_bytes
        words = remedies(*source, config, WORK, int(peak * 0.9))
        assert words.startswith("try --grad-checkpoint")
        assert remedies(*source, config, WORK, 1000).startswith("use smaller models")


def require_near(case: tuple[Any, ...], folder: Path, *, share: float = 0.2) -> None:
    """Every phase's estimate is within a share of what was measured."""
    found = estimated(*case)
    peaks = measured(*case, folder)
    assert set(peaks) == set(found.phases)
    ratios = {name: found.phases[name] / peak for name, peak in peaks.items()}
    assert all(1 - share < ratio < 1 + share for ratio in ratios.values()), ratios


@pytest.mark.slow
def test_the_embedded_pair_takes_what_was_estimated(tmp_path):
    openings = (ASSETS / "story_openings.txt").read_text().splitlines()[:24]
    settings = {"num_iters": 3, "max_tokens": 120, "steps_per_eval": 3}
    case = ("embedded:teacher", "embedded:student", settings, {"prompts": openings})
    require_near(case, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_real_tiny_pair_takes_what_was_estimated(tmp_path, shared_data, checkpointed):
    teacher = shared_data / "models" / "stories260K"
    student = keep_layers(teacher, tmp_path / "student", [0, 2, 4])
    lines = (shared_data / "text" / "tinystories" / "train.jsonl").read_text().splitlines()[:60]
    settings = {
        "num_iters": 3,
        "max_seq_length": 352,
        "too_long": "skip",
        "max_tokens": 60,
        "lora_keys": "all",
        "steps_per_eval": 3,
        "grad_checkpoint": checkpointed,
    }
    data = [json.loads(line) for line in lines]
    require_near((str(teacher), str(student), settings, {"data": data}), tmp_path / "run")


@pytest.mark.slow
def test_a_model_of_135_million_parameters_takes_what_was_estimated(tmp_path):
    folder = os.environ.get("CONCH_DNA_SMOLLM2", "")
    if not Path(folder, "config.json").is_file():
        pytest.skip("CONCH_DNA_SMOLLM2 names no folder of SmolLM2-135M-Instruct")
    settings = {"num_iters": 2, "max_tokens": 8, "steps_per_eval": 2}
    data = [{"text": f"{number} dogs ran to the park. " * 6} for number in range(8)]
    require_near((folder, folder, settings, {"data": data}), tmp_path / "run")


@pytest.mark.slow
def test_the_guide_has_the_table_that_the_code_computes():
    table = importlib.import_module("benchmarks.mac_memory").table
    guide = (Path(__file__).parents[2] / "TRUE_KD_README.md").read_text(encoding="utf-8")
    assert all(row in guide for row in table())
