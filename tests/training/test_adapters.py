"""Adapters are fresh, sit where they are asked to, and come back from disk through mlx_lm.

Tiny random models; the fused query-key-value layer is a module written here.
"""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map, tree_unflatten

from conch_dna.checkpoints import verify_folder
from conch_dna.errors import ConchError
from conch_dna.language_model import LanguageModel, ModelSource, named_arrays
from conch_dna.training.adapters import (
    adapter_tensors,
    attach_lora,
    checkpoint_layers,
    linear_names,
    load_verified,
    make_trainable,
    save_adapter,
    trained_tensors,
)
from conch_dna.training.head_loss import make_distillation_loss
from conch_dna.training.settings import KDConfig
from models import EXPERTS, make_model_folder

LINEAR = [
    "mlp.down_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "self_attn.k_proj",
    "self_attn.o_proj",
    "self_attn.q_proj",
    "self_attn.v_proj",
]
IDS = mx.array([[5, 6, 7, 8, 9], [3, 1, 4, 1, 5]])


@pytest.fixture
def student(tiny_student: Path) -> LanguageModel:
    return ModelSource(str(tiny_student)).load()


def adapted(student: LanguageModel) -> dict[int, list[str]]:
    """Which modules of which layer carry an adapter."""
    found: dict[int, set[str]] = {}
    for name in adapter_tensors(student.model):
        _, _, layer, *module, _ = name.split(".")
        found.setdefault(int(layer), set()).add(".".join(module))
    return {layer: sorted(modules) for layer, modules in sorted(found.items())}


def train_a_little(student: LanguageModel) -> None:
    """Give every adapter tensor a value that a fresh one would not have."""
    for number, (name, value) in enumerate(adapter_tensors(student.model).items()):
        mx.random.seed(number)
        student.model.load_weights(
            [(name, value + 0.03 * mx.random.normal(value.shape))], strict=False
        )
    mx.eval(student.model.parameters())


# Where adapters go


def test_all_linear_layers_of_a_layer_are_found(student):
    assert linear_names(student.model) == LINEAR


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("attention", ["self_attn.q_proj", "self_attn.v_proj"]),
        ("all", LINEAR),
        ("mlp.up_proj", ["mlp.up_proj"]),
        (" mlp.up_proj , self_attn.o_proj,", ["mlp.up_proj", "self_attn.o_proj"]),
        ("q_proj,v_proj", ["self_attn.q_proj", "self_attn.v_proj"]),
        ("up_proj,attention", ["mlp.up_proj", "self_attn.q_proj", "self_attn.v_proj"]),
    ],
)
def test_keys_choose_the_modules_of_every_layer(student, keys, expected):
    config = attach_lora(student, KDConfig(lora_keys=keys, lora_rank=3))
    assert adapted(student) == {0: expected, 1: expected}
    assert sorted(config["lora_parameters"]["keys"]) == expected
    tensors = adapter_tensors(student.model)
    for name, value in tensors.items():
        assert (value.shape[1] if name.endswith("lora_a") else value.shape[0]) == 3


def test_the_end_of_an_outer_name_will_do(student):
    config = attach_lora(student, KDConfig(lora_keys="embed_tokens"))
    assert config["lora_parameters"]["keys"] == ["model.embed_tokens"]


@pytest.mark.parametrize("keys", ["self_attn.w_pack", "proj", "mlp.up_proj,lm_head", "", " , "])
def test_unknown_keys_are_refused_with_what_there_is(student, keys):
    with pytest.raises(ConchError) as caught:
        attach_lora(student, KDConfig(lora_keys=keys))
    assert f"It has {', '.join(LINEAR)}" in str(caught.value)
    assert not adapter_tensors(student.model)
    for name in ("self_attn.w_pack", "lm_head"):
        assert (f": {name}. It has" in str(caught.value)) == (name in keys)
    attach_lora(student, KDConfig())


@pytest.mark.parametrize(("layers", "expected"), [(-1, [0, 1]), (1, [1]), (2, [0, 1])])
def test_the_last_layers_get_adapters(student, layers, expected):
    config = attach_lora(student, KDConfig(lora_layers=layers))
    assert list(adapted(student)) == expected
    assert config["num_layers"] == len(expected)


@pytest.mark.parametrize("layers", [0, 3])
def test_more_layers_than_there_are_or_none_are_refused(student, layers):
    with pytest.raises(ConchError, match=rf"lora_layers is {layers}, .* has 2 layers: use 1 to 2"):
        attach_lora(student, KDConfig(lora_layers=layers))


class FusedLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Module()
        self.attention.Wqkv = nn.Linear(8, 24)
        self.attention.out = nn.Linear(8, 8)


class FusedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = [FusedLayer(), FusedLayer()]

    @property
    def layers(self) -> list[nn.Module]:
        return self.model.layers


def test_attention_means_the_fused_matrix_where_there_is_no_other(tiny_student):
    student = LanguageModel(ModelSource(str(tiny_student)), FusedModel())
    config = attach_lora(student, KDConfig())
    assert config["lora_parameters"]["keys"] == ["attention.Wqkv"]
    assert adapted(student) == {0: ["attention.Wqkv"], 1: ["attention.Wqkv"]}


# What adapters are


def test_only_the_adapter_is_trained_and_at_first_it_changes_nothing(student):
    before = student.logits(IDS)
    base = named_arrays(student.model.parameters())
    attach_lora(student, KDConfig(lora_keys="all"))
    assert set(named_arrays(student.model.trainable_parameters())) == set(
        adapter_tensors(student.model)
    )
    np.testing.assert_array_equal(student.logits(IDS), before)
    after = named_arrays(student.model.parameters())
    for name, value in base.items():
        inside = name.replace(".weight", ".linear.weight")
        assert mx.array_equal(after.get(inside, after.get(name)), value)
    for name, value in adapter_tensors(student.model).items():
        assert bool(mx.any(value != 0)) == name.endswith("lora_a")


def test_adapters_are_drawn_from_the_seed_not_from_what_came_before(tiny_student):
    def drawn(seed: int, before: int) -> dict[str, mx.array]:
        student = ModelSource(str(tiny_student)).load()
        mx.random.seed(before)
        attach_lora(student, KDConfig(seed=seed))
        return adapter_tensors(student.model)

    first, again, other = drawn(3, 1), drawn(3, 2), drawn(4, 1)
    assert all(mx.array_equal(first[name], again[name]) for name in first)
    assert any(not mx.array_equal(first[name], other[name]) for name in first)


def test_a_student_that_carries_an_adapter_is_refused(student):
    """LoRA layers of one domain must not be carried into the next."""
    attach_lora(student, KDConfig())
    with pytest.raises(ConchError, match=r"already carries an adapter: .* load it anew"):
        attach_lora(student, KDConfig(lora_keys="all"))


@pytest.mark.parametrize("quantize", [False, True])
def test_the_update_is_scale_times_a_times_b(tmp_path, quantize):
    folder = make_model_folder(tmp_path / "model", quantize=quantize)
    student = ModelSource(str(folder)).load()
    module = student.model.layers[0].self_attn.q_proj
    x = mx.random.normal((3, 64))
    plain = np.array(module(x))
    attach_lora(student, KDConfig(lora_scale=2.5, lora_rank=4))
    train_a_little(student)
    lora = student.model.layers[0].self_attn.q_proj
    expected = plain + 2.5 * np.array(x) @ np.array(lora.lora_a) @ np.array(lora.lora_b)
    np.testing.assert_allclose(lora(x), expected, rtol=1e-4, atol=1e-4)
    tensors = adapter_tensors(student.model)
    assert tensors["model.layers.0.self_attn.q_proj.lora_a"].shape == (64, 4)
    assert tensors["model.layers.0.self_attn.v_proj.lora_b"].shape == (4, 32)


def test_dora_adds_magnitudes_and_at_first_changes_little(student):
    before = student.logits(IDS)
    config = attach_lora(student, KDConfig(dora=True))
    assert config["fine_tune_type"] == "dora"
    magnitudes = [name for name in adapter_tensors(student.model) if name.endswith(".m")]
    assert len(magnitudes) == 4
    assert set(magnitudes) <= set(named_arrays(student.model.trainable_parameters()))
    np.testing.assert_allclose(student.logits(IDS), before, atol=1e-4)


def test_the_embedding_gets_an_adapter_and_the_loss_then_sees_the_head(student):
    config = attach_lora(student, KDConfig(lora_keys="attention,model.embed_tokens"))
    assert "model.embed_tokens" in config["lora_parameters"]["keys"]
    train_a_little(student)
    tensors = adapter_tensors(student.model)
    assert mx.abs(tensors["model.embed_tokens.lora_b"]).max() > 0
    loss = make_distillation_loss(student, temperature=2.0, alpha=0.5)
    arrays = {
        "inputs": IDS,
        "positions": mx.arange(4),
        "labels": mx.array([1, 2, 3, 4]),
        "weights": mx.ones(4),
        "kept_ids": mx.tile(mx.arange(6)[None], (4, 1)),
        "teacher_log_probs": mx.full((4, 7), -np.log(7)),
    }

    def total(model: nn.Module) -> mx.array:
        return loss(model, arrays)["loss"]

    _, gradient = nn.value_and_grad(student.model, total)(student.model)
    by_head = named_arrays(gradient)["model.embed_tokens.lora_a"]
    # A token that is no input has a gradient through the tied head alone.
    assert 200 not in IDS.reshape(-1).tolist()
    assert mx.abs(by_head[200]).max() > 0


# On disk


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dora": True},
        {"lora_keys": "all", "lora_layers": 1},
        {"lora_keys": "all,model.embed_tokens"},
    ],
)
def test_mlx_lm_opens_what_was_saved(tmp_path, tiny_student, student, changes):
    from mlx_lm import load

    config = attach_lora(student, KDConfig(lora_rank=4, lora_dropout=0.25, **changes))
    train_a_little(student)
    tensors = adapter_tensors(student.model)
    save_adapter(tmp_path / "adapter", tensors, {**config, "model": "m", "conch_dna": {"seed": 1}})
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["conch_dna"] == {"seed": 1}
    assert set(written["lora_parameters"]) == {"rank", "scale", "dropout", "keys"}
    assert written["lora_parameters"]["dropout"] == 0.25
    assert written["lora_parameters"]["rank"] == 4
    assert {"num_layers", "fine_tune_type"} <= set(written)
    stored = mx.load(str(tmp_path / "adapter" / "adapters.safetensors"))
    assert set(stored) == set(tensors)
    model, _ = load(str(tiny_student), adapter_path=str(tmp_path / "adapter"))
    model.eval()
    student.model.eval()
    np.testing.assert_array_equal(model(IDS), student.model(IDS))
    loaded = load_verified(student.source, tmp_path / "adapter", tensors)
    np.testing.assert_array_equal(loaded.logits(IDS), student.logits(IDS))
    plain = ModelSource(str(tiny_student)).load()
    assert not mx.array_equal(plain.logits(IDS), loaded.logits(IDS))


def test_more_files_can_lie_beside_the_adapter(tmp_path, student):
    config = attach_lora(student, KDConfig())
    save_adapter(
        tmp_path / "adapter",
        adapter_tensors(student.model),
        config,
        documents={"evaluation.json": {"kl": 1}},
        writers={"curve.png": lambda path: path.write_bytes(b"png")},
    )
    verify_folder(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "evaluation.json").read_text()) == {"kl": 1}
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text()) == config


@pytest.mark.parametrize("fault", ["missing", "different", "another rank"])
def test_an_adapter_that_does_not_come_back_is_refused(tmp_path, student, fault):
    """mlx_lm itself opens a file in which tensors are missing."""
    config = attach_lora(student, KDConfig(lora_rank=4))
    train_a_little(student)
    tensors = adapter_tensors(student.model)
    name = "model.layers.1.self_attn.v_proj.lora_b"
    stored = dict(tensors)
    if fault == "missing":
        del stored[name]
    elif fault == "different":
        stored[name] = stored[name] + 1e-6
    else:
        config["lora_parameters"]["rank"] = 5
        stored = {n: value for n, value in stored.items() if "lora_a" not in n and n != name}
    save_adapter(tmp_path / "adapter", stored, config)
    with pytest.raises(ConchError) as caught:
        load_verified(student.source, tmp_path / "adapter", tensors)
    if fault != "another rank":
        assert "1 tensors are missing or different" in str(caught.value)
        assert name in str(caught.value)
        assert student.source.load(adapter_path=tmp_path / "adapter") is not None


def test_a_tensor_that_should_not_be_there_is_refused(tmp_path, student):
    config = attach_lora(student, KDConfig())
    tensors = adapter_tensors(student.model)
    save_adapter(tmp_path / "adapter", tensors, config)
    fewer = dict(list(tensors.items())[1:])
    with pytest.raises(ConchError, match="1 tensors are missing or different"):
        load_verified(student.source, tmp_path / "adapter", fewer)


# Recomputing activations


def loss_and_gradient(model: nn.Module) -> tuple[mx.array, dict[str, mx.array]]:
    def loss(model: nn.Module) -> mx.array:
        return nn.losses.cross_entropy(model(IDS[:, :-1]), IDS[:, 1:]).mean()

    value, gradient = nn.value_and_grad(model, loss)(model)
    return value, named_arrays(gradient)


def test_recomputing_gives_the_same_loss_and_gradient(student):
    attach_lora(student, KDConfig(lora_keys="all", lora_rank=4))
    train_a_little(student)
    expected, expected_gradient = loss_and_gradient(student.model)
    checkpoint_layers(student.model)
    student.model.train()
    value, gradient = loss_and_gradient(student.model)
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    assert set(gradient) == set(expected_gradient) and len(gradient) == 28
    for name in gradient:
        scale = np.abs(expected_gradient[name]).max()
        assert scale > 0
        np.testing.assert_allclose(gradient[name], expected_gradient[name], atol=1e-5 * scale)


class DropoutLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.weight = mx.ones(1000)

    def __call__(self, x: mx.array) -> mx.array:
        return self.dropout(x * self.weight)


class DropoutModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = [DropoutLayer(), DropoutLayer()]

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_recomputing_draws_the_dropout_of_the_forward_pass(compiled):
    """The output is linear in each weight of 1, so it equals weight times gradient: its sum."""
    model = DropoutModel()
    checkpoint_layers(model)
    model.train()
    value_and_grad = nn.value_and_grad(model, lambda model, x: model(x).sum())
    run = value_and_grad
    if compiled:
        state = [model.state, mx.random.state]
        step = mx.compile(lambda x: value_and_grad(model, x), inputs=state, outputs=state)
        run = lambda model, x: step(x)  # noqa: E731
    masks = set()
    for _ in range(3):
        value, gradient = run(model, mx.ones(1000))
        sums = [layer["weight"].sum().item() for layer in gradient["layers"]]
        assert sums == [value.item()] * 2
        masks.add(np.array(gradient["layers"][0]["weight"]).tobytes())
    assert len(masks) == 3
    model.eval()
    assert model(mx.ones(1000)).sum().item() == 1000


def test_recomputing_does_not_reach_other_models_of_the_class(tiny_student, monkeypatch):
    first, second = (ModelSource(str(tiny_student)).load().model for _ in range(2))
    kind = type(second.layers[0])
    own = kind.__call__
    calls = []
    monkeypatch.setattr(mx, "checkpoint", lambda run: calls.append(run) or run)
    checkpoint_layers(first)
    assert kind.__call__ is own
    assert type(second.layers[0]) is kind
    assert isinstance(first.layers[0], kind) and type(first.layers[0]) is not kind
    assert type(first.layers[0]).__name__ == kind.__name__
    mx.eval(second(IDS))
    assert calls == []
    mx.eval(first(IDS))
    assert len(calls) == len(first.layers)


def test_a_second_call_changes_nothing(student, monkeypatch):
    checkpoint_layers(student.model)
    kinds = [type(layer) for layer in student.model.layers]
    checkpoint_layers(student.model)
    assert [type(layer) for layer in student.model.layers] == kinds
    calls: list[Any] = []
    monkeypatch.setattr(mx, "checkpoint", lambda run: calls.append(run) or run)
    mx.eval(student.model(IDS))
    assert len(calls) == 2


def test_a_recomputing_model_still_takes_and_saves_its_weights(student, tiny_student):
    names = set(named_arrays(student.model.parameters()))
    checkpoint_layers(student.model)
    assert set(named_arrays(student.model.parameters())) == names
    student.model.load_weights(str(tiny_student / "model.safetensors"))


# Every weight instead of LoRA


def moved(student: LanguageModel) -> None:
    """What training would do: every trainable weight becomes another."""
    for name, value in trained_tensors(student).items():
        student.model.update(tree_unflatten([(name, value + 0.01)]))


def test_in_full_every_weight_is_trained_and_comes_back_through_mlx_lm(student, tmp_path):
    before = student.logits(IDS)
    config = make_trainable(student, KDConfig(full=True))
    assert set(trained_tensors(student)) == set(named_arrays(student.model.parameters()))
    np.testing.assert_array_equal(student.logits(IDS), before)
    moved(student)
    after = student.logits(IDS)
    assert float(mx.abs(after - before).max()) > 1e-3
    save_adapter(tmp_path / "full", trained_tensors(student), config)
    loaded = load_verified(student.source, tmp_path / "full", trained_tensors(student))
    np.testing.assert_array_equal(loaded.logits(IDS), after)


def test_a_full_folder_that_lacks_a_weight_is_found_out(student, tmp_path):
    config = make_trainable(student, KDConfig(full=True))
    tensors = trained_tensors(student)
    saved = dict(list(tensors.items())[1:])
    moved(student)
    save_adapter(tmp_path / "full", saved, config)
    with pytest.raises(ConchError, match="does not come back as it was saved"):
        load_verified(student.source, tmp_path / "full", trained_tensors(student))


def lora_folder(student: LanguageModel, folder: Path) -> mx.array:
    config = make_trainable(student, KDConfig(lora_keys="all,model.embed_tokens"))
    moved(student)
    save_adapter(folder, trained_tensors(student), config)
    return student.logits(IDS)


def test_in_full_it_goes_on_from_an_adapter_that_becomes_part_of_the_weights(student, tmp_path):
    said = lora_folder(student, tmp_path / "lora")
    again = student.source.load()
    make_trainable(again, KDConfig(full=True), start=tmp_path / "lora")
    assert not adapter_tensors(again.model)
    np.testing.assert_allclose(again.logits(IDS), said, atol=1e-4)


def test_in_full_it_goes_on_from_a_full_folder(student, tmp_path):
    config = make_trainable(student, KDConfig(full=True))
    moved(student)
    save_adapter(tmp_path / "full", trained_tensors(student), config)
    again = student.source.load()
    make_trainable(again, KDConfig(full=True), start=tmp_path / "full")
    np.testing.assert_array_equal(again.logits(IDS), student.logits(IDS))


def test_lora_goes_on_from_lora(student, tmp_path):
    said = lora_folder(student, tmp_path / "lora")
    again = student.source.load()
    settings = KDConfig(lora_keys="all,model.embed_tokens", seed=7)
    make_trainable(again, settings, start=tmp_path / "lora")
    np.testing.assert_array_equal(again.logits(IDS), said)


def test_lora_on_top_of_a_full_folder_is_refused(student, tmp_path):
    config = make_trainable(student, KDConfig(full=True))
    save_adapter(tmp_path / "full", trained_tensors(student), config)
    with pytest.raises(ConchError, match=r"full holds every weight, .*: add --full"):
        make_trainable(student.source.load(), KDConfig(), start=tmp_path / "full")


def test_quantized_weights_cannot_be_trained_in_full(student):
    nn.quantize(student.model, group_size=32, bits=8)
    with pytest.raises(ConchError, match=r"layers of .* are quantized, such as .*: use LoRA"):
        make_trainable(student, KDConfig(full=True))


def test_dora_in_full_is_refused():
    with pytest.raises(ConchError, match="full and dora are both true: choose one"):
        KDConfig(full=True, dora=True)


# Experts


@pytest.fixture(params=[False, True], ids=["plain", "quantized"])
def mixture(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> LanguageModel:
    """A mixture of experts, quantized where its files are, on a CPU too."""
    monkeypatch.setenv("CONCH_DNA_CPU_WEIGHTS", "keep")
    folder = make_model_folder(tmp_path / "experts", quantize=request.param, **EXPERTS)
    return ModelSource(str(folder)).load()


@pytest.mark.parametrize("keys", ["all", "mlp.switch_mlp.down_proj"])
def test_experts_get_adapters_that_train_and_come_back_through_mlx_lm(mixture, tmp_path, keys):
    from mlx_lm import load

    before = mixture.logits(IDS)
    config = make_trainable(mixture, KDConfig(lora_keys=keys, lora_rank=2))
    assert "mlp.switch_mlp.down_proj" in adapted(mixture)[1]
    np.testing.assert_array_equal(mixture.logits(IDS), before)

    def total(model: nn.Module) -> mx.array:
        return nn.losses.cross_entropy(model(IDS)[:, :-1], IDS[:, 1:]).mean()

    trainable = mixture.model.trainable_parameters()
    first, gradients = nn.value_and_grad(mixture.model, total)(mixture.model)
    name = "model.layers.0.mlp.switch_mlp.down_proj.lora_b"
    assert mx.abs(named_arrays(gradients)[name]).max() > 0
    mixture.model.update(tree_map(lambda p, g: p - 0.1 * g, trainable, gradients))
    assert total(mixture.model) < first
    save_adapter(tmp_path / "adapter", trained_tensors(mixture), config)
    load_verified(mixture.source, tmp_path / "adapter", trained_tensors(mixture))
    model, _ = load(str(mixture.source.folder), adapter_path=str(tmp_path / "adapter"))
    np.testing.assert_array_equal(model(IDS), mixture.model(IDS))


def test_experts_with_adapters_are_what_their_fused_weights_are(tmp_path):
    source = ModelSource(str(make_model_folder(tmp_path / "experts", **EXPERTS)))
    student = source.load()
    config = make_trainable(student, KDConfig(lora_keys="all", lora_rank=2))
    train_a_little(student)
    said = student.logits(IDS)
    save_adapter(tmp_path / "adapter", trained_tensors(student), config)
    fused = source.load()
    make_trainable(fused, KDConfig(full=True), start=tmp_path / "adapter")
    assert not adapter_tensors(fused.model)
    np.testing.assert_allclose(fused.logits(IDS), said, atol=1e-4)


def test_quantized_experts_cannot_be_trained_in_full(tmp_path):
    source = ModelSource(str(make_model_folder(tmp_path / "experts", quantize=True, **EXPERTS)))
    with pytest.raises(ConchError, match=r"layers of .* are quantized"):
        make_trainable(source.load(), KDConfig(full=True))


@pytest.mark.parametrize("bits", [3, 4, 5, 6, 8])
def test_dora_of_widths_that_mlx_lm_miscounts_is_refused(student, bits):
    nn.quantize(student.model, group_size=32, bits=bits)
    if bits in (4, 8):
        make_trainable(student, KDConfig(dora=True))
        assert mx.isfinite(student.logits(IDS)).all()
        return
    with pytest.raises(ConchError, match=f"DoRA cannot wrap .*, quantized to {bits} bits"):
        make_trainable(student, KDConfig(dora=True))
