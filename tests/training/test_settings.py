"""Defaults as documented, every range refused with its name, names that become folders.

A new field of KDConfig is covered as soon as it exists: the tests run over the fields.
"""

import json
import math
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest

from conch_dna.errors import ConchError
from conch_dna.losses import LOSSES
from conch_dna.options.fields import kind_of, range_text
from conch_dna.training.distillation import DOMAIN_PROMPTS
from conch_dna.training.settings import (
    DIVERGENCES,
    KDConfig,
    KDResult,
    domain_folder,
    get_kd_adapter_path,
    validate_domain,
)

FIELDS = {option.name: option for option in fields(KDConfig)}
NUMBERS = [name for name, option in FIELDS.items() if kind_of(option) in ("float", "int")]
DOCUMENTED = {
    "temperature": 2.0,
    "alpha": 0.7,
    "top_k": 64,
    "lora_rank": 16,
    "lora_keys": "attention",
    "learning_rate": 1e-4,
    "batch_size": 4,
    "num_iters": 200,
    "val_fraction": 0.1,
    "output_dir": "models/distilled_neurons",
    "adapter_subdir": "adapters_kd",
    "trust_remote_code": False,
    "dora": False,
}


@pytest.mark.parametrize(("name", "value"), DOCUMENTED.items())
def test_defaults_are_the_documented_ones(name, value):
    assert getattr(KDConfig(), name) == value


def test_every_field_has_help_and_every_number_a_range():
    assert all(option.metadata["help"] for option in FIELDS.values())
    assert all(range_text(FIELDS[name]) for name in NUMBERS)


def outside(name: str) -> list[float]:
    """Values just beyond each end of a field's range."""
    limits = FIELDS[name].metadata
    step = 1 if kind_of(FIELDS[name]) == "int" else 1e-6
    values = []
    if limits["low"] is not None:
        values.append(limits["low"] - step)
    if limits["above"] is not None:
        values += [limits["above"], limits["above"] - step]
    if limits["high"] is not None:
        values.append(limits["high"] + step)
    return values


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_out_of_its_range_is_refused_with_name_and_range(name):
    assert outside(name)
    for value in outside(name):
        with pytest.raises(ConchError) as caught:
            KDConfig(**{name: value})
        assert str(caught.value).startswith(
            f"{name} is {value}: it must be {range_text(FIELDS[name])}"
        )


@pytest.mark.parametrize("name", NUMBERS)
def test_the_ends_of_a_range_are_allowed(name):
    limits = FIELDS[name].metadata
    kind = {"int": int, "float": float}[kind_of(FIELDS[name])]
    for end in (limits["low"], limits["high"]):
        if end is not None:
            # A teacher follows the student on its own answers only.
            more = {"on_policy": 1.0} if name == "teacher_ema" else {}
            assert getattr(KDConfig(**{**more, name: kind(end)}), name) == end


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("val_batches", 0, "it must be -1, or 1 or more"),
        ("accumulation_steps", 100_000_000, "it must be between 1 and 10,000"),
        ("samples_per_prompt", 99_999_999, "it must be between 1 and 1,000"),
        ("num_iters", 10**400, "it must be between 1 and 10,000,000"),
    ],
)
def test_what_would_take_for_ever_or_measure_nothing_is_refused(name, value, words):
    with pytest.raises(ConchError, match=f"{name} is {value}: {words}"):
        KDConfig(**{name: value})
    assert KDConfig(val_batches=-1).val_batches == -1


@pytest.mark.parametrize("name", [n for n in NUMBERS if kind_of(FIELDS[n]) == "float"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(name, value):
    with pytest.raises(ConchError, match=f"{name} is {value}"):
        KDConfig(**{name: value})


def test_temperature_and_alpha_have_the_documented_ranges():
    with pytest.raises(ConchError, match=r"temperature is 0\.49: it must be between 0\.5 and 10"):
        KDConfig(temperature=0.49)
    with pytest.raises(ConchError, match=r"alpha is 1\.5: it must be between 0 and 1"):
        KDConfig(alpha=1.5)
    assert KDConfig(temperature=10, alpha=0).temperature == 10


WRONG_TYPES = {
    "float": ["1.0", None, True, [1.0]],
    "int": ["3", 3.0, None, True],
    "bool": [1, "yes", None],
    "str": [3, None, True],
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_value_of_another_type_is_refused_with_the_right_one(name):
    words = {"float": "number", "int": "whole number", "bool": "true or false", "str": "text"}
    kind = kind_of(FIELDS[name])
    for value in WRONG_TYPES[kind]:
        with pytest.raises(ConchError, match=f"{name} is .*: it must be a {words[kind]}"):
            KDConfig(**{name: value})


def test_several_problems_are_named_at_once():
    with pytest.raises(ConchError) as caught:
        KDConfig(
            temperature=99, alpha=-1, batch_size=0, divergence="kl", dora="no", adapter_subdir="/"
        )
    for name in ("temperature", "alpha", "batch_size", "divergence", "dora", "adapter_subdir"):
        assert f"{name} is " in str(caught.value)


@pytest.mark.parametrize("name", [n for n, o in FIELDS.items() if o.metadata["choices"]])
def test_a_choice_lists_the_known(name):
    with pytest.raises(ConchError) as caught:
        KDConfig(**{name: "nonsense"})
    assert all(choice in str(caught.value) for choice in FIELDS[name].metadata["choices"])


def test_several_greedy_answers_to_one_prompt_are_refused():
    with pytest.raises(ConchError, match="all answers would be the same"):
        KDConfig(samples_per_prompt=2, sampling_temperature=0)
    assert KDConfig(samples_per_prompt=1, sampling_temperature=0).samples_per_prompt == 1


@pytest.mark.parametrize(
    "name",
    [
        *("a/b", "/a", "..", ".", "", "../a", "a/", ".hidden"),
        *("run.json", "run.lock", "training_data.jsonl", "checkpoint_2", "answers", "candidate"),
        *("a\nb", "\udcff", "a" * 65, "größe"),
    ],
)
def test_adapter_subdir_is_one_plain_folder_name(name):
    with pytest.raises(ConchError, match=r"adapter_subdir is .*: use one plain folder name"):
        KDConfig(adapter_subdir=name)


def test_a_configuration_does_not_change():
    with pytest.raises(FrozenInstanceError):
        KDConfig().alpha = 0.5
    with pytest.raises(TypeError):
        KDConfig(2.0)


# From and to JSON


def test_json_comes_back_the_same():
    config = KDConfig(temperature=3.5, num_iters=7, lora_keys="all", dora=True, seed=3)
    values = json.loads(json.dumps(config.to_json()))
    assert set(values) == set(FIELDS)
    assert KDConfig.from_json(values, source="file") == config


def test_iters_and_dashes_stand_for_the_fields():
    config = KDConfig.from_json({"iters": 12, "learning-rate": 0.5, "lora_rank": 2}, source="file")
    assert (config.num_iters, config.learning_rate, config.lora_rank) == (12, 0.5, 2)


def test_unknown_names_are_refused_with_their_source_and_the_known():
    with pytest.raises(ConchError, match=r"run\.yaml names .*: alhpa \(alpha\?\), lr; known are"):
        KDConfig.from_json({"lr": 1.0, "alhpa": 0.5, "alpha": 0.5}, source="run.yaml")


@pytest.mark.parametrize(
    "values", [{"iters": 3, "num_iters": 4}, {"batch-size": 1, "batch_size": 2}]
)
def test_a_setting_given_twice_is_refused(values):
    with pytest.raises(ConchError, match=r"run\.yaml gives .* twice"):
        KDConfig.from_json(values, source="run.yaml")


def test_overriding_values_win_by_whatever_name_the_file_gives_them():
    """The command line over `iters:` in a file, say."""
    config = KDConfig.from_json(
        {"iters": 3, "batch-size": 99, "alpha": 7},
        source="f",
        overriding={"num_iters": 4, "alpha": 1},
    )
    assert (config.num_iters, config.batch_size, config.alpha) == (4, 99, 1)


def test_a_name_that_is_not_text_is_refused():
    with pytest.raises(ConchError, match="names unknown settings: 3"):
        KDConfig.from_json({3: 4}, source="run.yaml")


# Domains and paths


def test_the_known_domains_need_no_data():
    for domain in DOMAIN_PROMPTS:
        validate_domain(domain, with_own_data=False)


def test_an_unknown_domain_lists_the_known_and_is_fine_with_data():
    with pytest.raises(ConchError, match=", ".join(DOMAIN_PROMPTS)):
        validate_domain("pirates", with_own_data=False)
    validate_domain("pirates", with_own_data=True)
    validate_domain("My_pirates-2", with_own_data=True)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("lines", "the folder of retrained adapters' versions"),
        ("Experience", "the folder of the answers that retraining learns from"),
        ("EGO", "the name of the big teacher in CORTEX"),
    ],
)
def test_a_name_that_means_something_else_is_no_domain(name, what):
    with pytest.raises(ConchError, match=f"a domain cannot be called {name}: that is {what}; cho"):
        validate_domain(name, with_own_data=True)


@pytest.mark.parametrize(
    "domain",
    [
        "",
        ".",
        "..",
        "a/b",
        "/etc",
        "a\\b",
        "a b",
        "größe",
        "日本",
        "a\n",
        "a.b",
        "~",
        "-_",
        "x" * 65,
    ],
)
def test_a_name_that_is_no_plain_folder_is_refused(domain):
    with pytest.raises(ConchError, match="becomes a folder's name"):
        validate_domain(domain, with_own_data=True)


def test_the_adapter_lies_in_its_domains_folder():
    config = KDConfig(output_dir="/data/out", adapter_subdir="mine")
    assert domain_folder("task", config) == Path("/data/out/task")
    assert get_kd_adapter_path("task", config) == Path("/data/out/task/mine")
    assert get_kd_adapter_path("task") == Path("models/distilled_neurons/task/adapters_kd")


def test_a_result_is_json():
    result = KDResult(
        domain="task",
        num_samples=3,
        adapter_path="a",
        final_kd_loss=0.1,
        final_ce_loss=0.2,
        final_combined_loss=0.15,
        training_time_seconds=1.0,
        timestamp="2025-01-01T00:00:00+00:00",
    )
    assert KDResult(**json.loads(json.dumps(result.to_json()))) == result


def test_the_divergences_are_those_of_the_losses():
    assert tuple(sorted(LOSSES)) == DIVERGENCES


@pytest.mark.parametrize("value", [1e99, -1e99, 1e-99, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["learning_rate", "lora_scale", "max_grad_norm"])
def test_numbers_that_float32_does_not_have_are_refused(name, value):
    with pytest.raises(ConchError, match=f"{name} is .*: it must be "):
        KDConfig(**{name: value})


def test_a_letter_that_folders_do_not_take_is_not_called_none():
    """Letters such as ö are letters, so the message says which ones are meant."""
    with pytest.raises(ConchError, match=r"'größe' becomes .*: use up to 64 of a to z, A to Z"):
        validate_domain("größe", with_own_data=True)
