"""A plan says what a run would do, refuses what a run would refuse, and does nothing itself.

Tiny random models; figures are counted here from the tokens themselves.
"""

import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from conch_dna.errors import ConchError
from conch_dna.language_model import ModelSource
from conch_dna.training.chats.conversations import prompt_ids
from conch_dna.training.cross_tokenizer.vocabulary import vocabulary_digest
from conch_dna.training.distillation import DOMAIN_PROMPTS
from conch_dna.training.settings import KDConfig
from conch_dna.training.true_kd import TrueKnowledgeDistiller, plan_domain
from models import EXPERTS, make_model_folder, memory_of

DATA = [{"text": f"{number} dogs ran to the park." + " They ran." * number} for number in range(20)]
OPENINGS = [f"Once upon a time there were {number} birds" for number in range(10)]


@pytest.fixture(scope="module")
def teacher(tiny_teacher: Path) -> ModelSource:
    return ModelSource(str(tiny_teacher))


@pytest.fixture(scope="module")
def student(tiny_student: Path) -> ModelSource:
    return ModelSource(str(tiny_student))


def plan(teacher: ModelSource, student: ModelSource, **more: Any) -> dict[str, Any]:
    config = KDConfig(**{"batch_size": 4, "max_tokens": 40, "top_k": 8, **more.pop("config", {})})
    return plan_domain(teacher, student, config, more.pop("domain", "birds"), **more)


def test_given_data_are_counted_exactly(teacher, student):
    found = plan(teacher, student, data=DATA, config={"num_iters": 27, "accumulation_steps": 2})
    lengths = [len(student.tokenizer.encode(record["text"])) + 1 for record in DATA]
    assert found["domain"] == "birds" and found["data"] == "given"
    assert found["examples"] == 20 and found["heldout_examples"] == 2
    assert found["counted_tokens"] == sum(lengths) - 20
    assert found["counted_tokens_exact"] is True
    assert found["longest_example"] == max(lengths)
    assert found["epochs"] == 27 * 4 * 2 / 18


def test_exact_answers_of_the_teacher_are_counted_as_the_run_will_train_on_them(teacher, student):
    tokens = {"ids": list(range(9)), "prompt_length": 2}
    tokens["vocabulary"] = vocabulary_digest(student.tokenizer)
    found = plan(
        teacher,
        student,
        data=[*DATA, {"prompt": "a", "completion": "b", "tokens": tokens}],
    )
    assert found["counted_tokens"] - plan(teacher, student, data=DATA)["counted_tokens"] == 7


def test_answers_to_come_are_bounded_from_above(teacher, student):
    found = plan(teacher, student, prompts=OPENINGS, config={"samples_per_prompt": 2})
    lengths = [len(prompt_ids(teacher.tokenizer, text, "")) for text in OPENINGS]
    assert found["data"] == "answers of the teacher"
    assert found["examples"] == 20 and found["heldout_examples"] == 2
    assert found["counted_tokens"] == 20 * 40
    assert found["counted_tokens_exact"] is False
    assert found["longest_example"] == max(lengths) + 40


def test_a_known_domain_needs_neither_data_nor_prompts(tmp_path):
    folder = make_model_folder(tmp_path / "long", max_position_embeddings=4096)
    source = ModelSource(str(folder))
    with pytest.raises(ConchError, match="reads nothing that the student does not"):
        plan(source, source, domain="thinking")
    found = plan(source, source, domain="thinking", config={"force": True})
    known = DOMAIN_PROMPTS["thinking"]
    lengths = [len(prompt_ids(source.tokenizer, p, known["system"])) for p in known["examples"]]
    assert found["examples"] == len(known["examples"])
    assert found["longest_example"] == max(lengths) + 40


def test_sizes_are_those_of_the_files_and_arrays(teacher, student):
    found = plan(
        teacher,
        student,
        data=DATA,
        config={"loss_memory": memory_of(64, teacher), "temperature": 2.0},
    )
    assert found["teacher_bytes"] == (teacher.folder / "model.safetensors").stat().st_size
    assert found["student_bytes"] == (student.folder / "model.safetensors").stat().st_size
    assert found["logits_bytes"] == 4 * 64 * teacher.token_count
    # Eight kept tokens in about 12 bits each, the rest at two temperatures, the text's own token.
    assert found["disk_bytes"] == found["counted_tokens"] * (8 * (7 + 5) // 8 + 2 * 4 + 8)
    at_once = plan(teacher, student, data=DATA, config={"loss_memory": 10_000})
    assert at_once["logits_bytes"] == 4 * 4 * at_once["longest_example"] * teacher.token_count


def test_no_weights_have_to_be_there_and_nothing_is_written(tmp_path, tiny_teacher):
    folder = shutil.copytree(tiny_teacher, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    source = ModelSource(str(folder))
    found = plan(
        source, source, data=DATA, config={"output_dir": str(tmp_path / "out"), "force": True}
    )
    assert found["teacher_bytes"] is None and found["student_bytes"] is None
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConchError, match="not complete"):
        source.load()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"domain": "../birds", "data": DATA}, "becomes a folder's name"),
        ({"domain": "birds"}, "is unknown"),
        ({"data": DATA[:4]}, "3 training examples cannot fill one batch of 4"),
        ({"data": DATA[:1]}, "give at least two"),
        ({"data": DATA, "config": {"max_seq_length": 30}}, "longer than 30 tokens"),
        ({"data": DATA, "config": {"top_k": 1600}}, "top_k is 1600"),
        ({"prompts": OPENINGS[:4]}, "3 training examples cannot fill one batch of 4"),
        ({"prompts": OPENINGS[:1] * 9}, "give at least two"),
        ({"prompts": []}, "give at least two"),
        (
            {"prompts": [*OPENINGS, "The dog ran. " * 100]},
            "prompt 11 has .* exceeds 256",
        ),
        ({"prompts": OPENINGS, "config": {"max_tokens": 256}}, "prompt 1 has .* exceeds 256"),
    ],
)
def test_a_plan_refuses_what_the_run_would_refuse(teacher, student, arguments, message):
    with pytest.raises(ConchError, match=message):
        plan(teacher, student, **arguments)


def test_examples_that_are_too_long_are_left_out_if_asked(teacher, student):
    config = {"max_seq_length": 30, "too_long": "skip"}
    lengths = [len(student.tokenizer.encode(record["text"])) + 1 for record in DATA]
    fitting = [length for length in lengths if length <= 30]
    assert 5 < len(fitting) < 20
    found = plan(teacher, student, data=DATA, config=config)
    assert found["examples"] == len(fitting)
    assert found["counted_tokens"] == sum(fitting) - len(fitting)


def test_the_smaller_context_of_both_models_counts(tmp_path, teacher):
    folder = make_model_folder(tmp_path / "short", max_position_embeddings=30)
    short = ModelSource(str(folder))
    for pair in ((teacher, short), (short, teacher)):
        with pytest.raises(ConchError, match="longer than 30 tokens"):
            plan(*pair, data=DATA)


def test_another_tokenizer_is_aligned_and_its_coverage_told(teacher, shared_data):
    other = ModelSource(str(shared_data / "models" / "stories260K"))
    planned = plan(teacher, other, data=DATA)
    assert planned["alignment"] == "roots"
    assert planned["coverage"]["uncovered"] < 0.1
    assert plan(teacher, teacher, data=DATA, config={"force": True})["alignment"] == "index"


# What cannot be trained is refused before the teacher works


def unfit(planned: bool, teacher: ModelSource, folder: Path, out: Path, settings: Any) -> str:
    """What a plan, or the run itself, refuses; the run leaves nothing and asks no teacher."""
    config = KDConfig(batch_size=2, output_dir=str(out), **settings)
    work = TrueKnowledgeDistiller(teacher.model_id, str(folder), config).distill_domain
    if planned:
        work = partial(plan_domain, teacher, ModelSource(str(folder)), config)
    with pytest.raises(ConchError) as caught:
        work("birds", data=DATA)
    assert not list(out.glob("birds/*.json*")) and not (out / "birds" / "soft_targets").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("planned", [True, False])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_keys": "q_proj,w_proj"}, "names no layers of {}: w_proj. It has mlp.down_"),
        ({"lora_layers": 50}, "lora_layers is 50, but {} has 2 layers: use 1 to 2, or -1 for all"),
        ({"lora_keys": "all,model.embed_tokens", "dora": True}, "a quantized embedding (1 such"),
        ({"full": True}, "are quantized, such as"),
    ],
)
def test_what_of_a_student_cannot_be_trained(teacher, tmp_path, settings, message, planned):
    folder = make_model_folder(tmp_path / "student", quantize=True)
    found = unfit(planned, teacher, folder, tmp_path / "out", settings)
    assert message.format(folder) in found


@pytest.mark.parametrize("planned", [True, False])
def test_dora_of_experts_is_refused(teacher, tmp_path, planned):
    folder = make_model_folder(tmp_path / "student", **EXPERTS)
    message = unfit(planned, teacher, folder, tmp_path / "out", {"dora": True, "lora_keys": "all"})
    assert f"DoRA cannot wrap mlp.switch_mlp.down_proj of {folder}, a SwitchLinear" in message
    assert message.endswith("(3 such in all): use LoRA, or name others in --lora-keys")


def test_a_student_on_the_hub_is_judged_by_its_configuration(teacher, tmp_path):
    """A dry run does not download weights."""
    folder = make_model_folder(tmp_path / "student", quantize=True, **EXPERTS)
    (folder / "model.safetensors").unlink()
    student = ModelSource(str(folder))
    plan(teacher, student, data=DATA, config={"lora_keys": "all", "lora_layers": 1})
    for settings in ({"lora_layers": 3}, {"full": True}, {"lora_keys": "all", "dora": True}):
        with pytest.raises(ConchError):
            plan(teacher, student, data=DATA, config=settings)


def test_layers_that_have_none_of_the_names_are_refused(teacher, tmp_path):
    changes = {**EXPERTS, "mlp_only_layers": [1]}
    student = ModelSource(str(make_model_folder(tmp_path / "student", **changes)))
    config = {"lora_keys": "mlp.switch_mlp.up_proj", "lora_layers": 1}
    with pytest.raises(ConchError, match=r"the last 1 layers of .* have none of mlp.switch_mlp"):
        plan(teacher, student, data=DATA, config=config)
    plan(teacher, student, data=DATA, config={**config, "lora_layers": 2})


@pytest.mark.parametrize("planned", [True, False])
def test_a_student_that_mlx_lm_cannot_train_is_named(teacher, tmp_path, planned):
    changes = {
        "model_type": "recurrent_gemma",
        "attention_bias": False,
        "conv1d_width": 4,
        "attention_window_size": 32,
        "logits_soft_cap": 30.0,
        "rope_theta": 10_000.0,
        "block_types": ["recurrent", "attention"],
        "head_dim": 16,
    }
    folder = make_model_folder(tmp_path / "student", **changes)
    message = unfit(planned, teacher, folder, tmp_path / "out", {"lora_keys": "all"})
    assert re.match(
        rf"student {folder} is of the kind recurrent_gemma, which mlx_lm .*: use", message
    )
