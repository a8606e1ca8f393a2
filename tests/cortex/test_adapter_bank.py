"""A switched adapter is mlx_lm's own to the bit, and the base is as it was afterwards.

The reference is `mlx_lm.load` with the same folder; the base is a random or the embedded model.
"""

import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from conch_dna.checkpoints import DIGESTS
from conch_dna.cortex.engine.adapter_bank import AdapterBank
from conch_dna.errors import ConchError, NotWholeError
from conch_dna.language_model import LanguageModel, ModelSource, named_arrays
from cortex_models import write_adapter
from models import EXPERTS, make_model_folder

IDS = mx.array([[5, 6, 7, 8, 9, 10, 11], [3, 1, 4, 1, 5, 9, 2]])
# Rank, layers, keys, scale, kind: no two alike.
KINDS: dict[str, dict[str, Any]] = {
    "attention": {"lora_rank": 4, "lora_keys": "attention"},
    "last layer": {"lora_rank": 8, "lora_keys": "all", "lora_layers": 1, "lora_scale": 3.0},
    "dropout": {"lora_rank": 2, "lora_keys": "all", "lora_dropout": 0.5},
    "embedding": {"lora_rank": 4, "lora_keys": "all,model.embed_tokens"},
    "dora": {"lora_rank": 4, "lora_keys": "all", "dora": True},
    "dora embedding": {
        "lora_rank": 3,
        "lora_keys": "attention,model.embed_tokens",
        "dora": True,
    },
    "full": {"full": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("bank") / "base", seed=4)


@pytest.fixture(scope="module")
def adapters(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("adapters")
    return {
        name: write_adapter(place / name.replace(" ", "-"), str(folder), seed=seed, **settings)
        for seed, (name, settings) in enumerate(KINDS.items())
    }


@pytest.fixture
def base(folder: Path) -> LanguageModel:
    return ModelSource(str(folder)).load()


@pytest.fixture
def bank(base: LanguageModel) -> AdapterBank:
    return AdapterBank(base)


def reference(folder: Path, adapter: Path | None = None, ids: mx.array = IDS) -> np.ndarray:
    """What mlx_lm computes when it loads both anew."""
    from mlx_lm import load

    model, _ = load(str(folder), adapter_path=str(adapter) if adapter else None)
    return np.asarray(model(ids))


def logits(model: nn.Module, ids: mx.array = IDS) -> np.ndarray:
    return np.asarray(model(ids))


def parts(model: nn.Module) -> list[tuple[str, int]]:
    """Every module by its name, as the object it is."""
    return [(name, id(module)) for name, module in model.named_modules()]


# Equality to the bit


@pytest.mark.parametrize("name", KINDS)
def test_an_active_adapter_is_what_mlx_lm_loads(name, bank, folder, adapters):
    bank.add("a", adapters[name])
    bank.activate("a")
    expected = reference(folder, adapters[name])
    np.testing.assert_array_equal(logits(bank.base.model), expected)
    np.testing.assert_array_equal(logits(bank.tree("a")), expected)
    assert not np.array_equal(expected, reference(folder))


@pytest.mark.parametrize("name", KINDS)
def test_the_base_is_the_same_objects_and_bits_afterwards(name, bank, folder, adapters):
    before, modules = named_arrays(bank.base.model.parameters()), parts(bank.base.model)
    copies = {key: np.array(value) for key, value in before.items()}
    bank.add("a", adapters[name])
    bank.activate("a")
    logits(bank.base.model)
    bank.activate(None)
    after = named_arrays(bank.base.model.parameters())
    assert parts(bank.base.model) == modules
    assert {key: id(value) for key, value in after.items()} == {
        key: id(value) for key, value in before.items()
    }
    for key, value in copies.items():
        np.testing.assert_array_equal(np.array(after[key]), value)
    np.testing.assert_array_equal(logits(bank.base.model), reference(folder))


def test_any_order_of_switches_gives_each_its_own_output(bank, folder, adapters):
    expected = {name: reference(folder, path) for name, path in adapters.items()}
    expected[None] = reference(folder)
    for name, path in adapters.items():
        bank.add(name, path)
    order = random.Random(0)
    for _ in range(40):
        name = order.choice(list(expected))
        bank.activate(name)
        assert bank.active == name
        np.testing.assert_array_equal(logits(bank.base.model), expected[name])
        other = order.choice(list(expected))
        np.testing.assert_array_equal(logits(bank.tree(other)), expected[other])
    # An adapter may come while another is active, full weights included.
    bank.activate("full")
    bank.add("again", adapters["attention"])
    bank.activate("again")
    np.testing.assert_array_equal(logits(bank.base.model), expected["attention"])
    bank.activate(None)
    np.testing.assert_array_equal(logits(bank.base.model), expected[None])


@pytest.mark.parametrize("settings", [{}, {"dora": True}], ids=["lora", "dora"])
def test_a_quantized_base(settings, tmp_path, monkeypatch):
    # As mlx_lm loads it.
    monkeypatch.setenv("CONCH_DNA_CPU_WEIGHTS", "keep")
    folder = make_model_folder(tmp_path / "base", seed=5, quantize=True)
    adapter = write_adapter(tmp_path / "a", str(folder), lora_keys="all", **settings)
    bank = AdapterBank(ModelSource(str(folder)).load())
    bank.add("a", adapter)
    bank.activate("a")
    np.testing.assert_array_equal(logits(bank.base.model), reference(folder, adapter))
    bank.activate(None)
    np.testing.assert_array_equal(logits(bank.base.model), reference(folder))


def test_a_head_of_its_own(tmp_path):
    folder = make_model_folder(tmp_path / "base", seed=6, tie_word_embeddings=False)
    adapter = write_adapter(tmp_path / "a", str(folder), lora_keys="lm_head,model.embed_tokens")
    bank = AdapterBank(ModelSource(str(folder)).load())
    bank.add("a", adapter)
    bank.activate("a")
    np.testing.assert_array_equal(logits(bank.base.model), reference(folder, adapter))


def test_layers_of_experts(tmp_path):
    folder = make_model_folder(tmp_path / "base", **EXPERTS)
    adapter = write_adapter(tmp_path / "a", str(folder), lora_rank=2, lora_keys="all")
    bank = AdapterBank(ModelSource(str(folder)).load())
    bank.add("a", adapter)
    bank.activate("a")
    np.testing.assert_array_equal(logits(bank.base.model), reference(folder, adapter))
    assert not bank.can_share_batch(["a"])


def test_full_weights_of_some_layers_only(bank, folder, adapters, tmp_path):
    """mlx_lm trains the last layers in full and keeps no others."""
    partial = tmp_path / "partial"
    shutil.copytree(adapters["full"], partial)
    (partial / DIGESTS).unlink()
    tensors = mx.load(str(partial / "adapters.safetensors"))
    some = {name: value for name, value in tensors.items() if "layers.1.mlp" in name}
    mx.save_safetensors(str(partial / "adapters.safetensors"), some)
    bank.add("a", partial)
    assert bank.bytes_of("a") == sum(value.nbytes for value in some.values())
    bank.activate("a")
    np.testing.assert_array_equal(logits(bank.base.model), reference(folder, partial))
    bank.activate(None)
    np.testing.assert_array_equal(logits(bank.base.model), reference(folder))


# Memory, time, random numbers


def test_six_adapters_share_the_base_and_switch_without_loading(folder, tmp_path):
    """Prints the time of a switch; it is measured and not promised."""
    made = [
        write_adapter(tmp_path / f"a{seed}", "embedded:student", seed=seed, lora_rank=4)
        for seed in range(6)
    ]
    base = ModelSource("embedded:student").load()
    bank = AdapterBank(base)
    mx.clear_cache()
    before = mx.get_active_memory()
    for number, path in enumerate(made):
        bank.add(f"a{number}", path)
    own = sum(bank.bytes_of(name) for name in bank.names)
    assert mx.get_active_memory() - before < own + 0.1 * bank.base_bytes
    shared = {id(value) for value in named_arrays(base.model.parameters()).values()}
    for name in bank.names:
        arrays = named_arrays(bank.tree(name).parameters())
        new = [key for key, value in arrays.items() if id(value) not in shared]
        assert new
        assert all(key.rsplit(".", 1)[-1] in ("lora_a", "lora_b") for key in new)
    times = []
    for turn in range(600):
        start = time.perf_counter()
        bank.activate(f"a{turn % 6}")
        times.append(time.perf_counter() - start)
    median, p99 = (np.quantile(times, share) * 1e6 for share in (0.5, 0.99))
    print(f"switch: median {median:.1f} us, p99 {p99:.1f} us, n = {len(times)}")
    assert bank.base_bytes == sum(
        value.nbytes for value in mx.load(str(base.source.folder / "model.safetensors")).values()
    )


def test_adding_draws_no_random_numbers(bank, adapters):
    mx.random.seed(7)
    expected = mx.random.uniform(shape=(4,))
    mx.eval(expected)
    mx.random.seed(7)
    bank.add("a", adapters["attention"])
    np.testing.assert_array_equal(np.asarray(mx.random.uniform(shape=(4,))), np.asarray(expected))


# Names


def test_replaced_while_active(bank, folder, adapters):
    bank.add("a", adapters["attention"])
    bank.activate("a")
    old, version = bank.tree("a"), bank.version
    bank.replace("a", adapters["dora"])
    assert bank.version > version
    assert bank.active == "a"
    np.testing.assert_array_equal(logits(bank.base.model), reference(folder, adapters["dora"]))
    np.testing.assert_array_equal(logits(old), reference(folder, adapters["attention"]))
    bank.activate(None)
    np.testing.assert_array_equal(logits(bank.base.model), reference(folder))


def test_a_refused_replacement_leaves_the_old_one(bank, folder, adapters, tmp_path):
    bank.add("a", adapters["attention"])
    bank.activate("a")
    version, digest = bank.version, bank.digest_of("a")
    with pytest.raises(ConchError, match="holds no adapter"):
        bank.replace("a", tmp_path)
    assert (bank.version, bank.active, bank.digest_of("a")) == (version, "a", digest)
    with pytest.raises(ConchError, match="no adapter 'b': known are a"):
        bank.activate("b")
    np.testing.assert_array_equal(logits(bank.base.model), reference(folder, adapters["attention"]))
    with pytest.raises(ConchError, match="already: replace it"):
        bank.add("a", adapters["dora"])


def test_which_adapters_share_a_batch(bank, adapters):
    for name, path in adapters.items():
        bank.add(name, path)
    assert bank.can_share_batch(["attention", "last layer", "dropout", "embedding", None])
    for other in ("dora", "dora embedding", "full"):
        assert not bank.can_share_batch(["attention", other])


def test_adapters_of_two_dtypes_do_not_share_a_batch(bank, adapters, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(adapters["attention"], half)
    (half / DIGESTS).unlink()
    tensors = mx.load(str(half / "adapters.safetensors"))
    mx.save_safetensors(
        str(half / "adapters.safetensors"),
        {name: value.astype(mx.float16) for name, value in tensors.items()},
    )
    bank.add("a", adapters["attention"])
    bank.add("half", half)
    assert bank.can_share_batch(["half", None])
    assert not bank.can_share_batch(["a", "half"])


# Refusals


def altered(source: Path, target: Path, **changes: Any) -> Path:
    """A copy of an adapter whose configuration differs, without digests."""
    shutil.copytree(source, target)
    (target / DIGESTS).unlink()
    config = json.loads((target / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    return target


def test_an_adapter_of_another_base_is_refused_with_both_names(bank, adapters, tmp_path):
    made_by = {"student_digest": "f" * 64}
    path = altered(adapters["attention"], tmp_path / "a", model="org/other", conch_dna=made_by)
    with pytest.raises(ConchError, match=r"made for org/other .*ffff.*not for .*base") as caught:
        bank.add("a", path)
    assert bank.base.source.weights_digest[:12] in str(caught.value)
    assert bank.names == []


def test_a_recorded_folder_with_other_weights_is_refused(bank, adapters, tmp_path):
    """The shapes would fit: it is the digest of the folder it names that tells."""
    other = make_model_folder(tmp_path / "other", seed=9)
    path = altered(adapters["attention"], tmp_path / "a", model=str(other))
    with pytest.raises(ConchError, match=r"made for .*other"):
        bank.add("a", path)
    same = shutil.copytree(bank.base.source.folder, tmp_path / "same")
    bank.add("a", altered(adapters["attention"], tmp_path / "b", model=str(same)))


def test_a_name_that_cannot_be_followed_is_refused(bank, adapters, tmp_path):
    path = altered(adapters["attention"], tmp_path / "a", model="org/elsewhere")
    with pytest.raises(ConchError, match=r'org/elsewhere.*set "model" in its adapter_config.json'):
        bank.add("a", path)


def test_a_generation_is_judged_by_its_lines_base(bank, adapters, tmp_path):
    line = tmp_path / "line"
    path = altered(adapters["attention"], line / "G001", model="org/base")
    (line / "G000").mkdir()
    manifest = line / "G000" / "manifest.json"
    manifest.write_text(json.dumps({"base": {"model": "org/base", "weights": "e" * 64}}))
    with pytest.raises(ConchError, match=r"org/base .*eeee"):
        bank.add("a", path)
    digest = bank.base.source.weights_digest
    manifest.write_text(json.dumps({"base": {"model": "org/base", "weights": digest}}))
    bank.add("a", path)


def test_every_tensor_that_does_not_fit_is_listed(bank, adapters, tmp_path):
    path = altered(adapters["attention"], tmp_path / "a")
    tensors = mx.load(str(path / "adapters.safetensors"))
    names = sorted(tensors)
    del tensors[names[0]]
    tensors[names[1]] = tensors[names[1]][:1]
    tensors["model.layers.7.lora_a"] = mx.zeros((2, 2))
    tensors[names[2]] = mx.full(tensors[names[2]].shape, float("nan"))
    mx.save_safetensors(str(path / "adapters.safetensors"), tensors)
    with pytest.raises(ConchError) as caught:
        bank.add("a", path)
    message = str(caught.value)
    assert "4 differences" in message
    assert f"{names[2]} has numbers that are not finite" in message
    assert f"{names[0]} is missing" in message
    assert f"{names[1]} is (1, " in message
    assert "model.layers.7.lora_a is no part of it" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fine_tune_type": "prefix"}, "kind 'prefix': known are lora, dora, full"),
        ({"lora_parameters": {"rank": 4, "keys": ["self_attn.q_proj"]}}, "missing required key"),
        ({"lora_parameters": None}, "cannot build the adapter"),
        (
            {"lora_parameters": {"rank": 4, "scale": 1.0, "dropout": 0.0, "keys": ["no.such"]}},
            "names no layer",
        ),
        *(
            ({"lora_parameters": {"rank": 4, "scale": 1.0, "dropout": 0.0, **wrong}}, message)
            for wrong, message in (
                ({"rank": 2**40}, "its rank is 1099511627776, which is none from 1 to 65,536"),
                ({"rank": 0}, "its rank is 0"),
                ({"rank": "4"}, "its rank is '4'"),
                ({"scale": "1"}, "its scale is '1', which is none that float32 holds"),
                ({"scale": 1e300}, "its scale is 1e"),
                ({"scale": float("nan")}, "its scale is nan"),
            )
        ),
    ],
)
def test_a_configuration_that_describes_no_adapter(changes, message, bank, adapters, tmp_path):
    path = altered(adapters["attention"], tmp_path / "a", **changes)
    with pytest.raises(ConchError, match=message):
        bank.add("a", path)


def test_a_folder_that_is_not_whole(bank, adapters, tmp_path):
    path = tmp_path / "a"
    shutil.copytree(adapters["attention"], path)
    tensors = path / "adapters.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-40])
    with pytest.raises(NotWholeError, match="truncated or altered"):
        bank.add("a", path)
    (path / DIGESTS).unlink()
    with pytest.raises(ConchError, match=r"cannot read .*adapters\.safetensors"):
        bank.add("a", path)
    mx.save_safetensors(str(tensors), {})
    with pytest.raises(ConchError, match="holds no tensors"):
        bank.add("a", path)
    (path / "adapter_config.json").write_text("[]")
    with pytest.raises(ConchError, match="no JSON object"):
        bank.add("a", path)
    (path / "adapter_config.json").write_text('{"a":' + "[" * 100_000)
    with pytest.raises(ConchError, match=r"adapter_config\.json cannot be read"):
        bank.add("a", path)
    tensors.unlink()
    with pytest.raises(ConchError, match=r"there is no adapters\.safetensors"):
        bank.add("a", path)


def test_a_base_that_carries_an_adapter_is_refused(folder, adapters):
    carrying = ModelSource(str(folder)).load(adapter_path=adapters["attention"])
    with pytest.raises(ConchError, match="already carries an adapter"):
        AdapterBank(carrying)
