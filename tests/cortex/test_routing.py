"""Rows of one batch with different adapters are what each of them is alone.

The oracle is float64 NumPy from y = Wx + s x A B, and the adapter's own modules.
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from conch_dna.cortex.engine.adapter_bank import AdapterBank
from conch_dna.cortex.engine.routing import (
    RoutedModel,
    RowCache,
    RowLoRAEmbedding,
    RowLoRALinear,
    Rows,
    RowShapeError,
    side_by_side,
)
from conch_dna.language_model import ModelSource
from cortex_models import FlatMLP, write_adapter
from models import make_model_folder

IDS = mx.array([[5, 6, 7, 8], [3, 1, 4, 1], [2, 7, 1, 8], [1, 6, 1, 8], [9, 9, 9, 9]])
SETTINGS: list[dict[str, Any]] = [
    {"lora_rank": 4, "lora_keys": "attention"},
    {"lora_rank": 8, "lora_keys": "all", "lora_layers": 1, "lora_scale": 3.0},
    {"lora_rank": 2, "lora_keys": "self_attn.q_proj,model.embed_tokens"},
]
NAMES = ["a0", "a1", "a2"]


def make_bank(folder: Path, place: Path) -> AdapterBank:
    bank = AdapterBank(ModelSource(str(folder)).load())
    for number, settings in enumerate(SETTINGS):
        path = write_adapter(place / f"a{number}", str(folder), seed=number, **settings)
        bank.add(f"a{number}", path)
    return bank


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> AdapterBank:
    place = tmp_path_factory.mktemp("routing")
    return make_bank(make_model_folder(place / "base", seed=4), place)


def random(*shape: int, seed: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def as64(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)


@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 6), (4, 2, 3, 6)])
def test_a_linear_layer_against_the_formula(shape):
    rows = Rows()
    rows.indices = mx.array([1, 0, 2, 1])
    a = mx.concatenate([random(2, 6, 3, seed=1), mx.zeros((1, 6, 3))])
    b = mx.concatenate([random(2, 3, 5, seed=2), mx.zeros((1, 3, 5))])
    scale = [2.0, 0.5, 0.0]
    factors = side_by_side([(a[0], b[0], 2.0), (a[1], b[1], 0.5), None])
    linear = nn.Linear(6, 5)
    x = random(*shape, seed=3)
    found = RowLoRALinear(linear, *factors, rows)(x)
    weight, bias = as64(linear.weight), as64(linear.bias)
    for row, index in enumerate([1, 0, 2, 1]):
        each = as64(x)[row]
        expected = each @ weight.T + bias
        expected += float(scale[index]) * each @ as64(a)[index] @ as64(b)[index]
        np.testing.assert_allclose(as64(found)[row], expected, atol=1e-5)
    np.testing.assert_array_equal(np.array(found[2]), np.array(linear(x)[2]))


def test_an_embedding_against_the_formula_both_ways():
    rows = Rows()
    rows.indices = mx.array([1, 2, 0])
    a = mx.concatenate([random(2, 10, 3, seed=1), mx.zeros((1, 10, 3))])
    b = mx.concatenate([random(2, 3, 4, seed=2), mx.zeros((1, 3, 4))])
    scale = [2.0, 0.5, 0.0]
    embedding = nn.Embedding(10, 4)
    factors = side_by_side([(a[0], b[0], 2.0), (a[1], b[1], 0.5), None])
    layer = RowLoRAEmbedding(embedding, *factors, rows)
    ids = mx.array([[1, 2], [3, 9], [0, 5]])
    hidden = random(3, 2, 4, seed=5)
    out, logits = as64(layer(ids)), as64(layer.as_linear(hidden))
    for row, index in enumerate([1, 2, 0]):
        table = as64(embedding.weight) + float(scale[index]) * as64(a)[index] @ as64(b)[index]
        np.testing.assert_allclose(out[row], table[np.array(ids[row])], atol=1e-5)
        np.testing.assert_allclose(logits[row], as64(hidden)[row] @ table.T, atol=1e-5)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_the_base_layers_dtype_goes_in_and_comes_out(dtype):
    rows = Rows()
    rows.indices = mx.array([0, 1])
    linear = nn.Linear(6, 5)
    linear.set_dtype(dtype)
    a, b = random(2, 6, 3, seed=1), random(2, 3, 5, seed=2)
    factors = side_by_side([(a[0], b[0], 2.0), (a[1], b[1], 0.5)])
    layer = RowLoRALinear(linear, *factors, rows)
    assert layer(random(2, 1, 6, seed=3).astype(dtype)).dtype == dtype


@pytest.mark.parametrize("x", [mx.zeros((3, 6)), mx.zeros((1, 2, 6)), mx.zeros((6,))])
def test_an_input_without_the_rows_in_front_is_refused(x):
    rows = Rows()
    rows.indices = mx.array([0, 1])
    factors = side_by_side([(mx.zeros((6, 1)), mx.zeros((1, 5)), 1.0)] * 2)
    layer = RowLoRALinear(nn.Linear(6, 5), *factors, rows)
    with pytest.raises(RowShapeError, match="2 rows, but an input of shape"):
        layer(x)


@pytest.mark.parametrize("kind", ["plain", "quantized", "untied"])
def test_mixed_rows_are_what_each_adapter_says_alone(kind, tmp_path):
    changes = {"quantized": {"quantize": True}, "untied": {"tie_word_embeddings": False}}
    folder = make_model_folder(tmp_path / "base", seed=4, **changes.get(kind, {}))
    bank = make_bank(folder, tmp_path)
    routed = RoutedModel(bank, NAMES)
    rows = [2, 0, 3, 1, 2]
    found = as64(routed(IDS, cache=[None, None, RowCache(rows)]))
    alone = {
        row: as64(bank.tree(name)(IDS)) for row, name in [*enumerate(NAMES), (len(NAMES), None)]
    }
    for place, row in enumerate(rows):
        np.testing.assert_allclose(found[place], alone[row][place], atol=2e-5)
        others = [np.abs(found[place] - alone[o][place]).max() for o in alone if o != row]
        assert min(others) > 0.05


def test_rows_of_one_adapter_are_its_own_modules_to_the_bit(bank):
    routed = RoutedModel(bank, NAMES)
    for row, name in [*enumerate(NAMES), (3, None)]:
        found = routed(IDS, cache=[None, None, RowCache([row] * 5)])
        np.testing.assert_array_equal(np.array(found), np.array(bank.tree(name)(IDS)))


def test_a_routed_model_stays_as_it_is_when_the_bank_changes(tmp_path):
    bank = make_bank(make_model_folder(tmp_path / "base", seed=4), tmp_path)
    routed = RoutedModel(bank, NAMES)
    cache = [None, None, RowCache([0, 1, 2, 3, 0])]
    before = np.array(routed(IDS, cache=cache))
    bank.activate("a1")
    bank.replace("a0", tmp_path / "a2")
    bank.replace("a1", tmp_path / "a2")
    np.testing.assert_array_equal(np.array(routed(IDS, cache=cache)), before)


def test_padding_rows_of_the_head_have_no_share(tmp_path):
    folder = make_model_folder(tmp_path / "base", seed=4, vocab_size=1600)
    bank = make_bank(folder, tmp_path)
    found = RoutedModel(bank, NAMES)(IDS, cache=[None, None, RowCache([0, 1, 2, 3, 0])])
    assert found.shape == (5, 4, bank.base.source.token_count)
    assert found.shape[-1] < 1600


def test_a_model_that_mixes_the_rows_is_found_out(bank, tmp_path):
    assert RoutedModel(bank, NAMES).routes()
    folder = make_model_folder(tmp_path / "base", seed=4)
    path = write_adapter(tmp_path / "a", str(folder), lora_keys="all")
    base = ModelSource(str(folder)).load()
    for layer in base.model.layers:
        layer.mlp.__class__ = FlatMLP
    flat = AdapterBank(base)
    flat.add("a", path)
    assert not RoutedModel(flat, ["a"]).routes()


def test_the_rows_entry_goes_through_a_batchs_life():
    merged = RowCache([2]).merge([RowCache([2]), RowCache([0]), RowCache([1])])
    merged.extend(RowCache([3]))
    assert merged.rows == [2, 0, 1, 3]
    merged.prepare(lengths=[1, 2, 3, 4], right_padding=[3, 2, 1, 0])
    merged.finalize()
    merged.filter([3, 1])
    assert merged.rows == [3, 0]
    assert merged.extract(1).rows == [0]
    assert (merged.state, merged.nbytes) == ([], 0)
