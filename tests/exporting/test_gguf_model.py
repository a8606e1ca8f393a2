"""A model with its adapter as one GGUF file: our own reader and gguf's find what was meant."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from conch_dna.errors import ConchError
from conch_dna.exporting.adapter_files import export_gguf
from conch_dna.exporting.source import AdapterSource
from conch_dna.language_model import ModelSource
from conch_dna.screen.progress import silent
from models import ASSETS, make_model_folder, random_adapter

TEXTS = [
    "Once upon a time, there were 12 cats.",
    "  two  spaces\nand a line",
    "äöü 日本 🐟",
    "<|end",
]


def adapter_of(folder: Path, model: Path) -> AdapterSource:
    return AdapterSource.open(
        random_adapter(model, folder / "adapter"), trust_remote_code=False, report=silent
    )


def logits(source: ModelSource, ids: list[int], adapter: Path | None = None) -> np.ndarray:
    return np.asarray(source.load(adapter_path=adapter).logits(mx.array([ids])))[0]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONCH_DNA_CACHE", str(tmp_path / "cache"))


def exported(tmp_path: Path, model: Path, kind: str = "f32") -> tuple[AdapterSource, Path]:
    adapter = adapter_of(tmp_path, model)
    export_gguf(adapter, tmp_path / "model.gguf", kind, silent)
    return adapter, tmp_path / "model.gguf"


@pytest.mark.parametrize(
    ("kind", "most"), [("f32", 1e-4), ("f16", 0.02), ("q8_0", 0.2), ("q4_0", 3.0)]
)
def test_it_says_what_the_adapter_says(tmp_path, kind, most):
    model = make_model_folder(tmp_path / "model", seed=3)
    adapter, path = exported(tmp_path, model, kind)
    ids = [5, 9, 23, 7, 61, 2]
    expected = logits(adapter.base, ids, adapter.folder)
    found = logits(ModelSource(str(path)), ids)
    assert np.abs(found - expected).max() < most
    assert np.abs(logits(adapter.base, ids) - expected).max() > 1.0


def test_the_tokenizer_reads_texts_alike(tmp_path):
    model = make_model_folder(tmp_path / "model", seed=3, chat_template="{{ messages }}x")
    adapter, path = exported(tmp_path, model)
    back = ModelSource(str(path)).tokenizer
    for text in TEXTS:
        assert back.encode(text) == adapter.base.tokenizer.encode(text)
    assert back.chat_template == "{{ messages }}x"
    assert back.eos_token_ids == adapter.base.tokenizer.eos_token_ids


def test_sentence_pieces_and_a_small_model_of_others(tmp_path, shared_data):
    model = shared_data / "models" / "stories260K"
    adapter, path = exported(tmp_path, model)
    back = ModelSource(str(path))
    for text in TEXTS:
        assert back.tokenizer.encode(text) == adapter.base.tokenizer.encode(text)
    ids = adapter.base.tokenizer.encode(TEXTS[0])
    expected = logits(adapter.base, ids, adapter.folder)
    np.testing.assert_allclose(logits(back, ids), expected, atol=1e-3)


@pytest.mark.parametrize("name", ["smollm2", "qwen2.5", "gpt2", "phi-3-mini"])
def test_real_tokenizers(tmp_path, shared_data, name):
    import shutil

    folder = tmp_path / "tokenizer"
    shutil.copytree(shared_data / "tokenizers" / name, folder)
    if not (folder / "config.json").is_file():
        (folder / "config.json").write_text('{"eos_token_id": 2}')
    small: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32}
    model = make_model_folder(tmp_path / "model", tokenizer=folder, **small)
    adapter, path = exported(tmp_path, model, "f16")
    back = ModelSource(str(path)).tokenizer
    for text in TEXTS:
        assert back.encode(text) == adapter.base.tokenizer.encode(text), text


def test_other_kinds_of_models_have_llama_cpps_names(tmp_path):
    import gguf

    model = make_model_folder(
        tmp_path / "model", seed=3, model_type="qwen3", head_dim=16, rope_theta=1e6
    )
    adapter, path = exported(tmp_path, model)
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "qwen3"
    assert fields["qwen3.rope.freq_base"] == 1e6
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    own = mx.load(str(model / "model.safetensors"))
    name = "model.layers.1.self_attn.q_norm.weight"
    np.testing.assert_array_equal(tensors["blk.1.attn_q_norm.weight"], np.array(own[name]))
    assert adapter.folder.is_dir()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "stretches positions"),
        ({"model_type": "gemma2"}, "of the kind gemma2"),
        ({"rope_traditional": True}, "turns neighbouring numbers"),
    ],
)
def test_what_is_not_written_is_named(tmp_path, changes, message):
    import json

    model = make_model_folder(tmp_path / "model", seed=3)
    adapter = adapter_of(tmp_path, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))
    adapter.base.config.update(changes)
    with pytest.raises(ConchError, match=message):
        export_gguf(adapter, tmp_path / "model.gguf", "f16", silent)
    assert not (tmp_path / "model.gguf").exists()


def test_the_embedded_student_comes_out_whole(tmp_path):
    adapter, path = exported(tmp_path, ASSETS / "student")
    ids = [5, 9, 23]
    expected = logits(adapter.base, ids, adapter.folder)
    np.testing.assert_allclose(logits(ModelSource(str(path)), ids), expected, atol=1e-3)
