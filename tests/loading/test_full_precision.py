"""On a CPU quantized and 16-bit models are float32, and a line says so."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

from conch_dna.errors import ConchError
from conch_dna.language_model import ModelSource, named_arrays
from conch_dna.loading import full_precision
from conch_dna.loading.full_precision import for_this_device
from models import make_model_folder


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """A random Llama in 4 bits with float32 scales."""
    return make_model_folder(tmp_path_factory.mktemp("m") / "model", seed=5, quantize=True)


def loaded(folder, **more):
    said = []
    source = ModelSource(str(folder), report=lambda event, row: said.append(row["message"]), **more)
    return source, source.load(), said


def test_a_quantized_model_becomes_float32_and_says_the_same(quantized):
    source, model, said = loaded(quantized)
    arrays = named_arrays(model.model.parameters())
    assert {value.dtype for value in arrays.values()} == {mx.float32}
    assert not any(name.endswith(".scales") for name in arrays)
    plain, _ = load_model(quantized)
    ids = mx.array([[1, 5, 9]])
    np.testing.assert_allclose(np.array(model.model(ids)), np.array(plain(ids)), atol=1e-4)
    size = sum(value.nbytes for value in arrays.values())
    assert said == [
        f"{quantized} is quantized, which is slow on a CPU: its weights are loaded as float32 "
        f"({size / 1e6:.0f} MB; CONCH_DNA_CPU_WEIGHTS=keep leaves them)"
    ]
    assert source.weights_digest == ModelSource(str(quantized)).weights_digest


def test_so_does_one_in_16_bits(tmp_path):
    folder = make_model_folder(tmp_path / "model")
    weights = mx.load(str(folder / "model.safetensors"))
    halves = {name: value.astype(mx.bfloat16) for name, value in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), halves)
    _, model, said = loaded(folder)
    assert {value.dtype for value in named_arrays(model.model.parameters()).values()} == {
        mx.float32
    }
    assert len(said) == 1
    assert "is in 16 bits" in said[0]


def test_one_in_float32_is_left_alone(tiny_teacher):
    assert loaded(tiny_teacher)[2] == []


def test_it_is_kept_on_request_and_on_a_gpu(quantized, monkeypatch):
    monkeypatch.setenv("CONCH_DNA_CPU_WEIGHTS", "keep")
    _, model, said = loaded(quantized)
    assert any(name.endswith(".scales") for name in named_arrays(model.model.parameters()))
    monkeypatch.delenv("CONCH_DNA_CPU_WEIGHTS")
    monkeypatch.setattr(full_precision, "on_cpu", lambda: False)
    _, model, said = loaded(quantized)
    assert any(name.endswith(".scales") for name in named_arrays(model.model.parameters()))
    assert said == []


def test_what_does_not_fit_into_memory_stays_and_says_so(quantized, monkeypatch):
    monkeypatch.setattr(full_precision, "_SHARE_OF_MEMORY", 1e-9)
    _, model, said = loaded(quantized)
    assert any(name.endswith(".scales") for name in named_arrays(model.model.parameters()))
    assert "stays quantized, which is slow on a CPU" in said[0]
    monkeypatch.setenv("CONCH_DNA_CPU_WEIGHTS", "float32")
    _, model, said = loaded(quantized)
    assert not any(name.endswith(".scales") for name in named_arrays(model.model.parameters()))


def test_another_choice_is_refused(quantized, monkeypatch):
    monkeypatch.setenv("CONCH_DNA_CPU_WEIGHTS", "float16")
    model, _ = load_model(quantized)
    with pytest.raises(ConchError, match="is 'float16', not auto, float32 or keep"):
        for_this_device(model, "m", say=print)


def test_without_a_report_it_is_logged_once(quantized, caplog, monkeypatch):
    monkeypatch.setattr(full_precision, "_LOGGED", set())
    for _ in range(2):
        ModelSource(str(quantized)).load()
    assert len(caplog.records) == 1


def test_scales_in_16_bits_are_not_multiplied_in_16_bits(tmp_path):
    """Silent failure: 8 bits with a bias of -128 scales, as GGUF has them, lose half of theirs."""
    import mlx.nn as nn

    module = nn.Sequential(nn.Linear(64, 32, bias=False))
    nn.quantize(module, group_size=32, bits=8)
    inner = module.layers[0]
    inner.scales = inner.scales.astype(mx.float16)
    inner.biases = (-128 * inner.scales.astype(mx.float32)).astype(mx.float16)
    numbers = np.array(inner.weight).view(np.uint8).reshape(32, 2, 32).astype(np.float64)
    scales, biases = (
        np.array(inner[n]).astype(np.float64)[:, :, None] for n in ("scales", "biases")
    )
    dense = for_this_device(module, "m", say=lambda text: None)
    expected = (numbers * scales + biases).reshape(32, 64)
    np.testing.assert_allclose(np.array(dense.layers[0].weight), expected, rtol=2e-6, atol=1e-7)
