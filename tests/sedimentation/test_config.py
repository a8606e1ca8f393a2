import dataclasses
import json
import warnings

import pytest

from conch_dna.errors import ConchError
from conch_dna.options.fields import range_text
from conch_dna.sedimentation.config import ChelationConfig

OPTIONS = {each.name: each for each in dataclasses.fields(ChelationConfig)}


def test_the_documents_constants():
    config = ChelationConfig()
    assert config.training_mode == "baseline"
    assert config.teacher_weight == 0.5
    assert config.threshold == 3
    assert (config.learning_rate, config.epochs) == (0.001, 10)
    assert (config.offline_learning_rate, config.offline_epochs) == (0.005, 15)
    assert config.batch_size == 100
    assert config.homeostatic_push == 0.1
    assert config.top_k == 10
    assert config.exact_below == 20_000
    assert (config.gate_margin, config.gate_confidence) == (0.005, 0.95)
    assert config.ridge_strength == 0.01


def test_every_setting_says_what_it_is():
    assert all(each.metadata["help"].endswith(".") for each in OPTIONS.values())


def test_an_unknown_training_mode_is_refused_naming_the_three():
    with pytest.raises(
        ConchError, match="training_mode is 'online': use one of baseline, offline, hybrid"
    ):
        ChelationConfig(training_mode="online")


@pytest.mark.parametrize("mode", ["baseline", "offline", "hybrid"])
def test_the_three_training_modes(mode):
    assert ChelationConfig(training_mode=mode).training_mode == mode


@pytest.mark.parametrize(("given", "used"), [(1.5, 1.0), (-0.2, 0.0)])
def test_teacher_weight_is_clamped_with_a_warning(given, used):
    with pytest.warns(UserWarning, match=rf"teacher_weight is {given:g}, outside .*: {used:g} is"):
        config = ChelationConfig(teacher_weight=given)
    assert config.teacher_weight == used
    assert config.to_json()["teacher_weight"] == used


def test_the_warning_names_the_line_that_gave_it():
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        ChelationConfig(teacher_weight=2)
    assert [each.filename for each in found] == [__file__]


@pytest.mark.parametrize("weight", [0, 0.3, 1])
def test_teacher_weight_inside_is_kept_in_silence(weight):
    assert ChelationConfig(teacher_weight=weight).teacher_weight == weight


def outside():
    """For every limit of every setting a value just past it, and one at it that is allowed."""
    for name, each in OPTIONS.items():
        step = 1 if each.type is int else 1e-6
        limits = each.metadata
        for limit, past in (("low", -step), ("high", step), ("above", 0), ("below", 0)):
            if limits[limit] is not None:
                at = each.type(limits[limit])
                yield pytest.param(name, at + past, id=f"{name}-{limit}")


@pytest.mark.parametrize(("name", "value"), list(outside()))
def test_values_out_of_their_range_are_refused_not_clamped(name, value):
    with pytest.raises(ConchError) as found:
        ChelationConfig(**{name: value})
    assert str(found.value) == f"{name} is {value}: it must be {range_text(OPTIONS[name])}"


@pytest.mark.parametrize(
    ("name", "limit"),
    [(n, k) for n, e in OPTIONS.items() for k in ("low", "high") if e.metadata[k]],
)
def test_the_ends_of_closed_ranges_are_allowed(name, limit):
    value = OPTIONS[name].type(OPTIONS[name].metadata[limit])
    assert getattr(ChelationConfig(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 2.5}, "epochs is 2.5: it must be a whole number"),
        ({"epochs": True}, "epochs is True: it must be a whole number"),
        ({"learning_rate": "0.1"}, "learning_rate is '0.1': it must be a number"),
        ({"learning_rate": float("nan")}, "learning_rate is nan: it must be above 0"),
        ({"log_queries": 1}, "log_queries is 1: it must be true or false"),
        ({"teacher_weight": float("inf")}, "teacher_weight is inf: it must be finite"),
        ({"fusion": None}, "fusion is None: it must be text"),
        ({"fusion": "sum"}, "fusion is 'sum': use one of none, rrf"),
        ({"adapter": "identity"}, "adapter is 'identity': use one of ridge, procrustes"),
    ],
)
def test_refusals(values, message):
    with pytest.raises(ConchError, match=message):
        ChelationConfig(**values)


def test_all_problems_are_named_at_once():
    with pytest.raises(ConchError) as found:
        ChelationConfig(training_mode="x", epochs=0, gate_margin=-1.0, teacher_weight="half")
    assert str(found.value).count("; ") == 3
    for name in ("training_mode", "epochs", "gate_margin", "teacher_weight"):
        assert f"{name} is" in str(found.value)


def test_json_round_trip():
    config = ChelationConfig(training_mode="hybrid", epochs=4)
    document = json.loads(json.dumps(config.to_json()))
    assert ChelationConfig.from_json(document, source="config.json") == config


def test_from_json_takes_dashes_and_overriding():
    config = ChelationConfig.from_json(
        {"top-k": 5, "epochs": 4}, source="s.yaml", overriding={"epochs": 6}
    )
    assert (config.top_k, config.epochs) == (5, 6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"speed": 1}, "s.yaml names unknown settings: speed.*; known are adapter, batch_size"),
        ({"top-k": 1, "top_k": 2}, "s.yaml gives top_k twice"),
        ({"epochs": 0}, "s.yaml: epochs is 0: it must be 1 or more"),
    ],
)
def test_from_json_refuses(values, message):
    with pytest.raises(ConchError, match=message):
        ChelationConfig.from_json(values, source="s.yaml")
