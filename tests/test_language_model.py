"""Models by embedded name, folder or hub id; what runs, what is refused, and the head's real rows.

Tiny random models stand for real ones. No test reaches the hub; that it cannot be reached is one.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from conch_dna.errors import ConchError
from conch_dna.language_model import (
    LanguageModel,
    ModelSource,
    load_tokenizer,
    named_arrays,
    resolve_model,
)
from conch_dna.loading.model_config import read_config
from models import ASSETS, make_model_folder


def copied(source: Path, target: Path, **config: object) -> Path:
    """A copy of a model folder with other entries in its config.json."""
    shutil.copytree(source, target)
    changed = {**json.loads((target / "config.json").read_text()), **config}
    (target / "config.json").write_text(json.dumps(changed))
    return target


# Finding a model


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_embedded_models_are_found(name):
    assert resolve_model(f"embedded:{name}") == ASSETS / name


@pytest.mark.parametrize("name", ["", "nobody", "../assets/teacher", "Teacher"])
def test_an_unknown_embedded_name_is_refused_with_the_known_ones(name):
    with pytest.raises(ConchError, match=r"use one of embedded:student, embedded:teacher"):
        resolve_model(f"embedded:{name}")


def test_a_folder_is_found_by_its_path_and_below_home(tiny_teacher, monkeypatch):
    assert resolve_model(str(tiny_teacher)) == tiny_teacher
    monkeypatch.setenv("HOME", str(tiny_teacher.parent))
    assert resolve_model(f"~/{tiny_teacher.name}") == tiny_teacher


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "~/nowhere", "nowhere", "a/b/c"])
def test_a_missing_folder_is_refused_and_the_embedded_pair_named(name):
    with pytest.raises(ConchError, match=r"does not exist: .*embedded:teacher"):
        resolve_model(name)


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(ConchError, match=r"no config\.json"):
        resolve_model(str(tmp_path))


HUB = (
    r"the hub could not be reached for nobody-here/no-such-model \(no folder is called so\), "
    ".*embedded:teacher and embedded"
)


def test_offline_a_hub_id_is_refused_and_the_embedded_pair_named(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConchError, match=HUB):
        resolve_model("nobody-here/no-such-model")


def test_a_hub_that_refuses_the_connection_is_said_so(tmp_path):
    """Port 9 of this machine answers nobody; the offline switch is not set."""
    script = """
import conch_dna
from conch_dna.errors import ConchError
from conch_dna.language_model import resolve_model
try:
    resolve_model("nobody-here/no-such-model")
except ConchError as error:
    print(error)
"""
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    environment.pop("HF_HUB_OFFLINE")
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.startswith("the hub could not be reached for nobody-here/no-such-model")
    assert "embedded:teacher and embedded:student" in done.stdout


def test_a_name_the_hub_cannot_have_is_refused():
    with pytest.raises(ConchError, match="the hub has no model what is/this"):
        resolve_model("what is/this?")


def test_a_gated_model_says_how_to_log_in(monkeypatch):
    from huggingface_hub.errors import GatedRepoError

    def refuse(*args: object, **kwargs: object) -> None:
        raise GatedRepoError.__new__(GatedRepoError, "gated")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(ConchError, match="hf auth login"):
        resolve_model("meta-llama/Llama")


def test_only_what_is_needed_is_downloaded(monkeypatch, tmp_path):
    asked = []

    def download(model_id: str, allow_patterns: list[str]) -> str:
        asked.append((model_id, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve_model("organisation/name", weights=False) == tmp_path
    assert resolve_model("organisation/name") == tmp_path
    assert [model_id for model_id, _ in asked] == ["organisation/name"] * 2
    assert not any("safetensors" in pattern or "py" in pattern for pattern in asked[0][1])
    assert "model*.safetensors" in asked[1][1]


# What can be told without the weights


def test_source_tells_config_context_and_sizes(tiny_teacher, tmp_path):
    source = ModelSource(str(tiny_teacher))
    assert source.context_length == 256
    assert source.token_count == len(source.tokenizer.get_vocab())
    assert source.weight_bytes == (tiny_teacher / "model.safetensors").stat().st_size
    silent = copied(tiny_teacher, tmp_path / "silent", max_position_embeddings=None)
    assert ModelSource(str(silent)).context_length is None
    nested = copied(
        tiny_teacher, tmp_path / "nested", text_config={"max_position_embeddings": 4096}
    )
    assert ModelSource(str(nested)).context_length == 4096


def test_digests_follow_what_they_stand_for(tiny_teacher, tmp_path):
    def digests(folder: Path) -> tuple[str, str]:
        source = ModelSource(str(folder))
        return source.weights_digest, source.tokenizer_digest

    before = digests(tiny_teacher)
    changed = digests(copied(tiny_teacher, tmp_path / "changed", rope_theta=5000.0))
    assert changed[0] != before[0] and changed[1] == before[1]
    plain = tmp_path / "plain"
    shutil.copytree(tiny_teacher, plain)
    assert digests(plain) == before
    (plain / "chat_template.jinja").write_text("{{ messages }}")
    assert digests(plain)[0] == before[0] and digests(plain)[1] != before[1]
    data = bytearray((plain / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (plain / "model.safetensors").write_bytes(data)
    assert digests(plain)[0] != before[0]


@pytest.mark.parametrize("text", ["{", "", "[]"])
def test_a_broken_config_is_one_message(tiny_teacher, tmp_path, text):
    folder = copied(tiny_teacher, tmp_path / "broken")
    (folder / "config.json").write_text(text)
    for read in (read_config, load_tokenizer, lambda path: ModelSource(str(path)).context_length):
        with pytest.raises(ConchError, match="cannot read"):
            read(folder)
    with pytest.raises(ConchError, match="cannot"):
        ModelSource(str(folder)).load()


def test_a_missing_or_broken_tokenizer_is_one_message(tiny_teacher, tmp_path):
    folder = copied(tiny_teacher, tmp_path / "broken")
    (folder / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(ConchError, match="cannot read the tokenizer in"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ConchError, match="cannot read the tokenizer in"):
        load_tokenizer(folder)


def test_the_tokenizer_takes_every_end_token_of_the_config(tiny_teacher, tmp_path):
    folder = copied(tiny_teacher, tmp_path / "ends", eos_token_id=[0, 7])
    assert load_tokenizer(folder).eos_token_ids == {0, 7}


# Loading


def test_a_folder_loads_with_its_own_weights(tiny_teacher):
    model = ModelSource(str(tiny_teacher)).load()
    assert model.model_id == str(tiny_teacher)
    assert not model.model.training
    stored = mx.load(str(tiny_teacher / "model.safetensors"))
    loaded = named_arrays(model.model.parameters())
    assert set(loaded) == set(stored)
    assert all(mx.array_equal(loaded[name], stored[name]) for name in stored)


def test_a_model_without_weights_is_not_complete(tiny_teacher, tmp_path):
    folder = copied(tiny_teacher, tmp_path / "partial")
    (folder / "model.safetensors").unlink()
    source = ModelSource(str(folder))
    assert source.weight_bytes is None
    with pytest.raises(ConchError, match="it is not complete"):
        source.load()


def test_a_truncated_or_unfitting_or_unknown_model_is_one_message(tiny_teacher, tmp_path):
    folder = copied(tiny_teacher, tmp_path / "truncated")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    deeper = copied(tiny_teacher, tmp_path / "deeper", num_hidden_layers=3)
    unknown = copied(tiny_teacher, tmp_path / "unknown", model_type="no_such_kind")
    for path in (folder, deeper, unknown):
        with pytest.raises(ConchError, match=f"cannot load {path}: ") as caught:
            ModelSource(str(path)).load()
        assert "\n" not in str(caught.value)


def test_resident_loads_once_until_released(tiny_teacher):
    source = ModelSource(str(tiny_teacher))
    first = source.resident()
    assert source.resident() is first
    source.release()
    assert source.resident() is not first
    source.release()
    source.release()


def test_release_gives_the_memory_back(tmp_path):
    folder = make_model_folder(tmp_path / "big", hidden_size=256, intermediate_size=1024)
    source = ModelSource(str(folder))
    assert source.tokenizer is not None
    mx.clear_cache()
    before = mx.get_active_memory()
    model = source.load()
    mx.eval(model.model.parameters())
    logits = model.logits(mx.array([[1, 2, 3]]))
    mx.eval(logits)
    del logits
    held = mx.get_active_memory() - before
    assert held >= 0.9 * source.weight_bytes
    model.release()
    assert mx.get_active_memory() - before < 0.01 * held


# Code that comes with a model

MARKER = "from pathlib import Path\nPath({marker!r}).write_text('ran')\n"


def test_a_models_own_code_does_not_run_unless_trusted(tiny_teacher, tmp_path):
    marker = tmp_path / "marker"
    folder = copied(tiny_teacher, tmp_path / "model", model_file="custom.py")
    code = MARKER.format(marker=str(marker))
    (folder / "custom.py").write_text(f"{code}from mlx_lm.models.llama import Model, ModelArgs\n")
    with pytest.raises(ConchError, match=r"custom\.py.*--trust-remote-code"):
        ModelSource(str(folder)).load()
    assert not marker.exists()
    ModelSource(str(folder), trust_remote_code=True).load()
    assert marker.read_text() == "ran"


@pytest.mark.parametrize("known_class", [True, False])
def test_a_tokenizers_own_code_does_not_run_unless_trusted(
    tiny_teacher, tmp_path, monkeypatch, known_class
):
    marker = tmp_path / "marker"
    folder = copied(tiny_teacher, tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": [None, "custom_tokenizer.Custom"]}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast" if known_class else "Custom"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "custom_tokenizer.py").write_text(
        f"{MARKER.format(marker=str(marker))}"
        "from transformers import PreTrainedTokenizerFast\n"
        "class Custom(PreTrainedTokenizerFast):\n    pass\n"
    )
    if known_class:
        assert load_tokenizer(folder).encode("Once upon a time")
    else:
        with pytest.raises(ConchError, match=r"custom code.*--trust-remote-code"):
            load_tokenizer(folder)
    assert not marker.exists()
    modules = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    assert load_tokenizer(folder, trust_remote_code=True).encode("Once upon a time")
    assert marker.read_text() == "ran"


# The head


def test_the_vocabulary_leaves_out_padded_rows_of_the_head(tmp_path, tiny_teacher):
    real = ModelSource(str(tiny_teacher)).token_count
    ids = mx.array([[3, 4, 5], [6, 7, 8]])
    for tied in (True, False):
        folder = make_model_folder(
            tmp_path / str(tied), vocab_size=real + 37, tie_word_embeddings=tied
        )
        model = ModelSource(str(folder)).load()
        assert model.model(ids).shape == (2, 3, real + 37)
        assert model.vocabulary_size == real
        assert model.logits(ids).shape == (2, 3, real)
        assert mx.array_equal(model.logits(ids), model.model(ids)[..., :real])
        assert model.head(model.body(ids)).shape == (2, 3, real)


def test_the_vocabulary_is_not_larger_than_the_head(tmp_path, tiny_teacher):
    real = ModelSource(str(tiny_teacher)).token_count
    folder = make_model_folder(tmp_path / "small", vocab_size=real - 5)
    assert ModelSource(str(folder)).load().vocabulary_size == real - 5


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quantize", [True, False])
def test_a_llama_is_its_body_and_its_head(tmp_path, tied, quantize):
    folder = make_model_folder(tmp_path / "model", tie_word_embeddings=tied, quantize=quantize)
    model = ModelSource(str(folder)).load()
    assert model.output_head is not None and model.output_head.is_last
    ids = mx.array([[9, 8, 7, 6]])
    np.testing.assert_array_equal(model.head(model.body(ids)), model.logits(ids))


def test_what_a_model_does_to_its_logits_is_part_of_the_head(tiny_teacher):
    from mlx_lm.models import gemma2, gpt2

    source = ModelSource(str(tiny_teacher))
    size = source.token_count
    capped = gemma2.Model(
        gemma2.ModelArgs(
            model_type="gemma2",
            hidden_size=32,
            num_hidden_layers=1,
            intermediate_size=32,
            num_attention_heads=2,
            head_dim=16,
            rms_norm_eps=1e-5,
            vocab_size=size,
            num_key_value_heads=1,
            final_logit_softcapping=1.0,
        )
    )
    otherwise = gpt2.Model(
        gpt2.ModelArgs(
            model_type="gpt2",
            n_ctx=64,
            n_embd=32,
            n_head=2,
            n_layer=1,
            n_positions=64,
            layer_norm_epsilon=1e-5,
            vocab_size=size,
        )
    )
    for model in (capped, otherwise):
        language_model = LanguageModel(source, model)
        head = language_model.output_head
        assert head is not None and head.is_last == (model is otherwise)
        ids = mx.array([[1, 2]])
        expected = language_model.logits(ids)
        assert expected.shape == (1, 2, size)
        assert mx.array_equal(language_model.head(language_model.body(ids)), expected)
        few = head.logits(language_model.body(ids), 7)
        np.testing.assert_allclose(few, expected[..., :7], atol=1e-6)


def test_a_model_that_uses_its_head_twice_is_not_taken_apart(tiny_teacher):
    plain = ModelSource(str(tiny_teacher)).load()

    class Twice(type(plain.model)):
        def __call__(self, inputs, *args, **kwargs):
            states = self.model(inputs, *args, **kwargs)
            head = self.model.embed_tokens.as_linear
            return head(states) + head(2 * states)

    twice = Twice(plain.model.args)
    twice.update(plain.model.parameters())
    model = LanguageModel(plain.source, twice)
    ids = mx.array([[1, 2, 3]])
    assert model.output_head is None
    for part, logits in model.logits_at(ids, mx.array([0, 2]), memory=1):
        assert mx.array_equal(logits, model.logits(ids)[0][mx.array([0, 2])][part])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"vocab_size": 10**12}, "vocab_size is 1000000000000, not between 0 and 16,777,216"),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers is 10000000, not between 0 and 1,000"),
        ({"hidden_size": -1}, "hidden_size is -1, not between 0 and 1,048,576"),
        ({"vocab_size": "many"}, "vocab_size is 'many', not between"),
        ({"text_config": {"num_hidden_layers": 10**7}}, "num_hidden_layers is 10000000"),
        ({"max_position_embeddings": [[]]}, "max_position_embeddings is"),
    ],
)
def test_sizes_that_no_model_has_are_refused_at_once(tmp_path, change, reason):
    folder = make_model_folder(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    source = ModelSource(str(folder))
    for use in (source.load, lambda: source.tokenizer, lambda: source.context_length):
        with pytest.raises(ConchError, match=reason):
            use()


@pytest.mark.parametrize(
    "content", ["[" * 200_000, "[]", "{", '{"a": ' + "[" * 900 + "]" * 900 + "}"]
)
def test_a_configuration_of_another_form_is_refused(tmp_path, content):
    folder = make_model_folder(tmp_path / "model")
    (folder / "config.json").write_text(content)
    with pytest.raises(ConchError, match="cannot read a model's configuration"):
        ModelSource(str(folder)).load()


@pytest.mark.parametrize(
    "change",
    [{"num_attention_heads": 0}, {"rope_scaling": 7}, {"model_type": []}, {"quantization": 1}],
)
def test_a_configuration_that_breaks_the_model_code_ends_in_one_line(tmp_path, change):
    folder = make_model_folder(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ConchError, match="cannot load"):
        ModelSource(str(folder)).load()


def test_a_text_configuration_that_is_none_is_no_mapping(tmp_path):
    folder = make_model_folder(tmp_path / "model", text_config=None)
    assert ModelSource(str(folder)).context_length == 256
