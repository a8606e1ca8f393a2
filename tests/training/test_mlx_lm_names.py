"""Settings files of mlx_lm.lora: what each name means, what is told, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from conch_dna.errors import ConchError
from conch_dna.training.runs.mlx_lm_names import FEATURES, NAMES, UNLIKE, understood
from conch_dna.training.runs.request import Request, requested
from conch_dna.training.settings import KDConfig

# As mlx-lm's own example file has it, every name given.
WHOLE: dict[str, Any] = {
    "model": "student",
    "train": True,
    "fine_tune_type": "lora",
    "optimizer": "adamw",
    "optimizer_config": {"adam": {}, "adamw": {"weight_decay": 0.02}, "sgd": {"momentum": 1}},
    "data": "folder",
    "seed": 3,
    "num_layers": 4,
    "batch_size": 2,
    "iters": 60,
    "val_batches": 5,
    "learning_rate": 1e-3,
    "report_to": None,
    "project_name": None,
    "steps_per_report": 5,
    "steps_per_eval": 20,
    "resume_adapter_file": None,
    "adapter_path": "adapters",
    "save_every": 30,
    "test": False,
    "test_batches": 100,
    "max_seq_length": 256,
    "grad_checkpoint": True,
    "grad_accumulation_steps": 2,
    "clear_cache_threshold": 0,
    "mask_prompt": True,
    "trust_remote_code": False,
    "lora_parameters": {
        "keys": ["self_attn.q_proj", "self_attn.v_proj"],
        "rank": 4,
        "scale": 20.0,
        "dropout": 0.1,
    },
    "lr_schedule": {"name": "cosine_decay", "warmup": 7, "arguments": [2e-3, 60, 0]},
}


def asked(folder: Path, settings: dict[str, Any], **named: Any) -> Request:
    path = folder / "lora.yaml"
    path.write_text(yaml.safe_dump(settings))
    named = {"domain": "s", **named}
    return requested(named, {}, config_file=str(path), all_domains=False)


def test_every_name_of_mlx_lm_is_known():
    from mlx_lm.lora import CONFIG_DEFAULTS

    own = {*KDConfig.__dataclass_fields__, "data", "test", "report_to", "project_name"}
    assert set(CONFIG_DEFAULTS) - NAMES - own == set()


def test_what_is_not_said_differs_as_told():
    from mlx_lm.lora import CONFIG_DEFAULTS

    config = KDConfig()
    for name, own in {"iters": config.num_iters, "learning_rate": config.learning_rate}.items():
        here, there = UNLIKE[name].removesuffix(")").replace("steps", "").split("(")
        assert (float(here), float(there)) == (own, CONFIG_DEFAULTS[name])
    assert CONFIG_DEFAULTS["num_layers"] == 16 and config.lora_layers == -1
    assert CONFIG_DEFAULTS["mask_prompt"] is False and config.train_on_prompt is False


def test_a_whole_file_becomes_a_run(tmp_path):
    request = asked(tmp_path, WHOLE)
    assert request.models[1] == "student" and request.given.data == "folder"
    assert request.given.with_test is False and request.reporters == ()
    assert request.config == KDConfig(
        seed=3,
        lora_layers=4,
        batch_size=2,
        num_iters=30,
        accumulation_steps=2,
        val_batches=5,
        learning_rate=2e-3,
        warmup_iters=7,
        weight_decay=0.02,
        steps_per_report=5,
        steps_per_eval=20,
        steps_per_save=30,
        max_seq_length=256,
        grad_checkpoint=True,
        lora_keys="self_attn.q_proj,self_attn.v_proj",
        lora_rank=4,
        lora_scale=20.0,
        lora_dropout=0.1,
    )
    told = [note.partition(": ")[2].split()[0] for note in request.notes]
    assert told == ["adapter_path", "test_batches", "lr_schedule", "60"]
    assert "so 30 steps of 2" in request.notes[-1]


def test_what_a_file_leaves_out_is_told(tmp_path):
    (note,) = asked(tmp_path, {"model": "m", "num_layers": 8, "mask_prompt": False}).notes
    assert note.endswith(
        "lora.yaml leaves out what is not as in mlx-lm by default: iters: 200 steps (1000); "
        "learning_rate: 1e-4 (1e-5); lr_schedule: warm-up and a cosine to 0 (constant, as by "
        "schedule: constant)"
    )
    (note,) = asked(tmp_path, {"lora_parameters": {"rank": 8, "alpha": 3, "keys": ["q"]}}).notes
    assert "alpha of lora_parameters is ignored" in note
    (note,) = asked(tmp_path, {"lora_parameters": {"rank": 8}}).notes
    assert "here lora_keys is attention" in note
    (note,) = asked(tmp_path, {"fine_tune_type": "full", "num_layers": 8}).notes
    assert note.endswith("num_layers is ignored: in full, every weight is trained")


@pytest.mark.parametrize(
    ("settings", "field", "value"),
    [
        ({"fine_tune_type": "dora"}, "dora", True),
        ({"fine_tune_type": "full", "lora_parameters": {"rank": 8}}, "full", True),
        ({"mask_prompt": False}, "train_on_prompt", True),
        ({"optimizer": "adam"}, "weight_decay", 0.0),
        ({"optimizer": "adamw"}, "weight_decay", 0.01),
        ({"lr": 1e-3}, "learning_rate", 1e-3),
        ({"grad-accumulation-steps": 4}, "accumulation_steps", 4),
    ],
)
def test_a_name_of_mlx_lm_sets_a_field(settings, field, value, tmp_path):
    assert getattr(asked(tmp_path, settings).config, field) == value


def test_fields_of_records_are_mapped(tmp_path):
    assert set(FEATURES) < NAMES
    features = {"prompt_feature": "q", "completion_feature": "a"}
    assert asked(tmp_path, features, data="d").given.mapping == {"prompt": "q", "completion": "a"}
    own = {"map": {"text": "body"}, "data": "d", "test_data": "t"}
    assert asked(tmp_path, own).given.mapping == {"text": "body"}
    assert asked(tmp_path, own, map=("text=b",)).given.mapping == {"text": "b"}
    assert asked(tmp_path, own).given.test_data == "t"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"learning_rat": 1},
            r"learning_rat \(learning_rate\?\); known are .*, data,",
        ),
        ({"modle": "m"}, r"modle \(model\?\); known are .*domain,.* prompts,.* student,.* teacher"),
        (
            {"lora_parameters": {"rnk": 3}},
            r"lora_parameters, names unknown .*: rnk \(rank\?\)",
        ),
        ({"lora_parameters": 3}, "lora_parameters is 3: give rank"),
        ({"iters": 5, "num_iters": 5}, "gives num_iters twice, once as iters: leave one"),
        ({"model": "a", "student": "b"}, "gives student twice, once as model"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd': there is adamw, and adam"),
        ({"optimizer_config": {"adam": {"eps": 1}}}, "optimizer_config gives eps, which cannot"),
        ({"optimizer_config": {"adamw": [1]}}, r"optimizer_config has \[1\]: give a mapping for"),
        ({"optimizer_config": {"adam": "x"}}, "optimizer_config has 'x': give a mapping for each"),
        ({"optimizer_config": 3}, "optimizer_config has 3: give a mapping for each optimiser"),
        ({"optimizer_config": {"adam": {1: 2}}}, "optimizer_config gives 1, which cannot be set"),
        ({"fine_tune_type": "qlora"}, "fine_tune_type is 'qlora': use lora, dora or full"),
        ({"lr_schedule": {"name": "step_decay"}}, "there is a linear warm-up and then a cosine"),
        ({"lr_schedule": {"name": "cosine_decay"}}, "arguments of lr_schedule is no list"),
        ({"train": False}, "train is false, but distill trains"),
        ({"resume_adapter_file": "a.safetensors"}, "every run begins from the pristine student"),
        ({"hf_dataset": {"path": "a/b"}}, "hf_dataset is not understood: give data: OWNER/NAME"),
        ({"mask_prompt": "yes"}, "mask_prompt is 'yes': use true or false"),
        ({"iters": 5, "grad_accumulation_steps": 2}, "5 iters are batches to mlx-lm, of which 2"),
        ({"data": 3}, "data is 3: it must be text"),
        ({"map": "a"}, "map is 'a': it must be a mapping"),
        ({"test": "yes"}, "test is 'yes': it must be true or false"),
        ({"report_to": "slate"}, "report_to is slate: use one or more of tensorboard, wandb"),
        ({"lora_parameters": {"rank": "8"}}, "lora_rank is '8': it must be a whole number"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_reason(settings, message, tmp_path):
    with pytest.raises(ConchError, match=message):
        asked(tmp_path, settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("iters: 5\nmodel: m\niters: 6\n", "gives iters twice in the mapping .* on line 1: leave"),
        ("model: m\nlora_parameters:\n  rank: 1\n  rank: 2\n", "gives rank twice .* on line 3"),
    ],
)
def test_a_name_that_is_given_twice_is_refused(text, message, tmp_path):
    path = tmp_path / "lora.yaml"
    path.write_text(text)
    with pytest.raises(ConchError, match=message):
        requested({"domain": "s"}, {}, config_file=str(path), all_domains=False)


def test_own_names_pass_unchanged():
    values = {"lora_rank": 3, "domain": "s", "alpha": 0.5}
    assert understood(values, source="run.yaml") == (values, [])
