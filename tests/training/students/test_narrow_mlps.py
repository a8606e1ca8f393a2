"""Narrower MLPs: neurons by their weight's definition, and a folder that says what was measured."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from mlx_lm.utils import load

from conch_dna.cli import main
from conch_dna.errors import ConchError
from conch_dna.language_model import ModelSource
from conch_dna.training.students.block_influence import cut_to, write_student
from conch_dna.training.students.narrow_mlps import cut_down, heaviest, neuron_weights, width_of
from conch_dna.training.students.sizes import Goal
from conch_dna.training.students.student_folder import file_arrays
from models import EXPERTS, make_gemma2_folder, make_model_folder

WINDOWS = [[3, 50, 7, 9, 200, 4], [8, 8, 1], [90, 2, 40, 11]]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A random Llama of three layers with biases in its MLPs, 128 neurons each."""
    return make_model_folder(
        tmp_path_factory.mktemp("m") / "teacher",
        seed=6,
        num_hidden_layers=3,
        intermediate_size=128,
        mlp_bias=True,
    )


def activations(model, window):
    """What comes into each layer's down_proj, `[T, neurons]`, by the layers taken by hand."""
    from mlx_lm.models.base import create_attention_mask

    body = model.model.model
    hidden = body.embed_tokens(mx.array([window]))
    mask, found = create_attention_mask(hidden, None), []
    for layer in body.layers:
        middle = hidden + layer.self_attn(layer.input_layernorm(hidden), mask, None)
        x = np.array(layer.post_attention_layernorm(middle)[0]).astype(np.float64)
        gate, up = (
            x @ np.array(part.weight, np.float64).T + np.array(part.bias, np.float64)
            for part in (layer.mlp.gate_proj, layer.mlp.up_proj)
        )
        found.append(gate / (1 + np.exp(-gate)) * up)
        hidden = layer(hidden, mask, None)
    return found


def test_a_neuron_weighs_what_its_definition_says(teacher):
    model = ModelSource(str(teacher)).load()
    # Before anything else, which a model in memory does once: finding out its size, by running it.
    found = neuron_weights(model, WINDOWS)
    before = ModelSource(str(teacher)).load().logits(mx.array([[1, 2, 3]]))
    by_window = [activations(model, window) for window in WINDOWS]
    for number, layer in enumerate(model.model.model.layers):
        rows = np.concatenate([each[number] for each in by_window])
        norms = np.linalg.norm(np.array(layer.mlp.down_proj.weight, np.float64), axis=0)
        np.testing.assert_allclose(found[number], np.abs(rows).mean(0) * norms, rtol=1e-4)
    assert mx.array_equal(before, model.logits(mx.array([[1, 2, 3]])))


def test_the_heaviest_stay_in_their_order():
    weights = np.array([0.1, 5.0, 0.2, 3.0, 3.0, 9.0])
    assert heaviest(weights, 3).tolist() == [1, 3, 5]
    assert heaviest(np.ones(4), 2).tolist() == [0, 1]


def test_neurons_that_say_nothing_go_without_a_loss(tmp_path):
    """Half of the neurons have a column of zeros in down_proj: those go, and the text stays."""
    folder = make_model_folder(tmp_path / "t", seed=7, intermediate_size=128)
    weights = mx.load(str(folder / "model.safetensors"))
    idle = mx.array(np.random.default_rng(0).permutation(128)[:64])
    for number in range(2):
        weights[f"model.layers.{number}.mlp.down_proj.weight"][:, idle] = 0.0
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    model = ModelSource(str(folder)).load()
    cut = cut_to(model, WINDOWS, Goal(layers=2), mlp=0.5)
    for number in range(2):
        assert not set(cut.neurons[number].tolist()) & set(idle.tolist())
    assert [(point.layers, point.neurons) for point in cut.curve] == [(2, None), (2, 64)]
    assert cut.curve[1].kl_nats == pytest.approx(0, abs=1e-6)
    assert cut.curve[1].top1_agreement == 1


def test_a_cut_model_computes_as_one_whose_other_neurons_are_silenced(teacher):
    """The oracle: columns of zeros in down_proj in place of neurons that are gone."""
    model = ModelSource(str(teacher)).load()
    neurons = {n: mx.array(np.arange(n, 128, 2, dtype=np.int32)) for n in (0, 2)}
    ids = mx.array([WINDOWS[0]])
    with cut_down(model, [0, 2], neurons):
        found = model.logits(ids)
        mx.eval(found)
    other = ModelSource(str(teacher)).load()
    layers = other.model.model.layers
    for number, kept in neurons.items():
        silent = mx.zeros((128,))
        silent[kept] = 1.0
        layers[number].mlp.down_proj.weight *= silent
    other.model.model.layers = [layers[0], layers[2]]
    wanted = other.logits(ids)
    assert mx.allclose(found, wanted, atol=1e-4)
    with cut_down(model, [0, 2], None):
        assert not mx.allclose(model.logits(ids), wanted, atol=1e-2)


def test_what_was_written_says_what_was_measured(teacher, tmp_path):
    source = ModelSource(str(teacher))
    model = source.load()
    cut = cut_to(model, WINDOWS, Goal(layers=2), mlp=0.5)
    write_student(model, tmp_path / "s", cut)
    config = json.loads((tmp_path / "s" / "config.json").read_text())
    assert (config["intermediate_size"], config["num_hidden_layers"]) == (64, 2)
    document = json.loads((tmp_path / "s" / "student.json").read_text())
    assert document["mlp"] == {"share": 0.5, "neurons": 64, "of": 128, "multiple": 64}
    assert [point["neurons"] for point in document["curve"]] == [None, None, 64]
    student, _ = load(str(tmp_path / "s"))
    assert student.layers[1].mlp.up_proj.bias.shape == (64,)
    # Influence is measured on the first ten tokens, the curve on the last three.
    apart = mx.array([WINDOWS[2][1:]])
    rows = []
    for logits in (model.logits(apart), student(apart)[..., : model.vocabulary_size]):
        each = np.array(logits[0]).astype(np.float64)
        rows.append(each - np.log(np.exp(each).sum(-1, keepdims=True)))
    kl = (np.exp(rows[0]) * (rows[0] - rows[1])).sum(-1).mean()
    assert cut.curve[-1].kl_nats == pytest.approx(kl, abs=1e-4)
    assert kl > 1e-3
    saved = mx.load(str(tmp_path / "s" / "model.safetensors"))
    assert cut.curve[-1].weight_bytes == sum(each.nbytes for each in saved.values())


def test_a_student_that_says_another_thing_is_not_left_there(teacher, tmp_path, monkeypatch):
    """Other neurons in the file than those that were measured."""
    from conch_dna.training.students import student_folder

    def shifted(name, array, neurons):
        return own(name, array, {number: each + 1 for number, each in neurons.items()})

    own = student_folder.narrowed
    model = ModelSource(str(teacher)).load()
    cut = cut_to(model, WINDOWS, Goal(layers=2), mlp=0.5)
    cut.neurons.update({number: mx.arange(64) for number in cut.neurons})
    monkeypatch.setattr(student_folder, "narrowed", shifted)
    with pytest.raises(ConchError, match="says another thing when it is read again"):
        write_student(model, tmp_path / "s", cut)
    assert not (tmp_path / "s").exists()


def test_neurons_are_measured_without_the_layers_that_are_gone(teacher):
    model = ModelSource(str(teacher)).load()
    cut = cut_to(model, WINDOWS, Goal(layers=1), mlp=0.5)
    (kept,) = cut.kept
    with cut_down(model, cut.kept, None):
        (alone,) = neuron_weights(model, cut.measured)
    assert cut.neurons[kept].tolist() == heaviest(alone, 64).tolist()


def test_narrower_mlps_count_towards_the_size(teacher):
    """Fewer layers have to go where each of them is smaller."""
    model = ModelSource(str(teacher)).load()
    whole, two, _ = (p.weight_bytes for p in cut_to(model, WINDOWS, Goal(layers=1)).curve)
    assert len(cut_to(model, WINDOWS, Goal(budget_mb=(two - 1) / 1e6)).kept) == 1
    cut = cut_to(model, WINDOWS, Goal(budget_mb=(two - 1) / 1e6), mlp=0.5)
    assert len(cut.kept) == 2
    assert cut.curve[-1].weight_bytes < two
    enough = cut_to(model, WINDOWS, Goal(budget_mb=(whole - 1) / 1e6), mlp=0.5)
    assert (enough.removals, len(enough.kept), len(enough.curve)) == ([], 3, 2)


@pytest.mark.parametrize(
    ("width", "share", "neurons", "multiple"),
    [
        (1536, 0.75, 1152, 64),
        (1536, 0.72, 1088, 64),
        (96, 0.75, 64, 32),
        (72, 0.5, 32, 8),
        (172, 0.75, 128, 8),
    ],
)
def test_widths_are_multiples_of_what_the_width_allows(tmp_path, width, share, neurons, multiple):
    folder = make_model_folder(tmp_path / "m", intermediate_size=width, num_hidden_layers=1)
    source = ModelSource(str(folder))
    found = width_of(source.load(), file_arrays(source), share)
    assert (found.neurons, found.of, found.multiple) == (neurons, width, multiple)


def refused(folder, share=0.5):
    source = ModelSource(str(folder))
    with pytest.raises(ConchError) as caught:
        width_of(source.load(), file_arrays(source), share)
    return str(caught.value)


def test_what_cannot_be_narrowed_is_refused_by_name(tmp_path):
    whole = make_model_folder(tmp_path / "m")
    assert "0.99 of 96 neurons is 96 in multiples of 32" in refused(whole, 0.99)
    assert "give a share between 0.333 and 0.667" in refused(whole, 0.1)
    quantised = make_model_folder(tmp_path / "q", quantize=True)
    assert "is quantised" in refused(quantised)
    assert refused(quantised).endswith("make it of the whole model")
    experts = make_model_folder(tmp_path / "e", **EXPERTS)
    assert "Qwen3MoeSparseMoeBlock with gate.weight" in refused(experts)
    other = make_model_folder(
        *(tmp_path / "p",), model_type="phi3", intermediate_size=64, rope_theta=1e4
    )
    assert "MLP with gate_up_proj.weight, down_proj.weight, not an MLP of gate_proj" in refused(
        other
    )
    config = json.loads((whole / "config.json").read_text())
    source = ModelSource(str(whole))
    model, arrays = source.load(), file_arrays(source)
    arrays["model.layers.1.mlp.up.weight"] = arrays.pop("model.layers.1.mlp.up_proj.weight")
    with pytest.raises(ConchError, match="name the weights of its MLPs in another way"):
        width_of(model, arrays, 0.5)
    source.config["intermediate_size"] = config["intermediate_size"] + 1
    with pytest.raises(ConchError, match=r"intermediate_size .* is 97, and its MLPs have 96"):
        width_of(model, file_arrays(source), 0.5)


def test_another_activation_and_kind_of_model(tmp_path):
    """Gemma-2: GELU in its MLPs, norms behind them, capped logits."""
    source = ModelSource(str(make_gemma2_folder(tmp_path / "g")))
    model = source.load()
    write_student(model, tmp_path / "s", cut_to(model, WINDOWS, Goal(layers=1), mlp=0.5))
    made = ModelSource(str(tmp_path / "s")).load()
    assert made.model.model.layers[0].mlp.gate_proj.weight.shape[0] == 64


def test_the_command(teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "texts.txt").write_text("Once upon a time.\nThe dog ran home.\n")
    arguments = ["student", "make", str(teacher), str(tmp_path / "s"), "--layers", "3"]
    arguments += ["--mlp", "0.5", "--text", str(tmp_path / "texts.txt")]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert "MLPs: 64 of 128 neurons stay, a multiple of 64" in done.output
    assert "(3 of 3 layers, " in done.output
    assert "block influence" not in done.output
