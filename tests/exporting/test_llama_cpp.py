"""llama.cpp runs what was exported: its log-probabilities, token ids and answers are ours."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from conch_dna.exporting.adapter_files import export_gguf, export_gguf_lora
from conch_dna.exporting.gguf_model import write_gguf_model
from conch_dna.exporting.source import AdapterSource
from conch_dna.language_model import named_arrays
from conch_dna.screen.progress import silent
from llama_cpp import LlamaCpp
from models import make_model_folder, random_adapter

pytest.importorskip("xllamacpp", reason="llama.cpp's package has no wheel for this machine")

IDS = [5, 9, 23, 7, 61, 2, 11, 12]
TEXTS = ["Once upon a time, there were 12 cats.", "a line\nand one", "äöü 日本 🐟", "<|end"]
SPACES = "  two  spaces, and  one"
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    # It says nothing of rope_theta, which is not the same for all kinds then.
    "qwen2": {},
    "qwen3": {"head_dim": 32, "rope_theta": 1e6},
    "stretched": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONCH_DNA_CACHE", str(tmp_path / "cache"))


def made(tmp_path: Path, model: Path) -> AdapterSource:
    return AdapterSource.open(
        random_adapter(model, tmp_path / "adapter"), trust_remote_code=False, report=silent
    )


def ours(adapter: AdapterSource, ids: Sequence[int]) -> np.ndarray:
    model = adapter.base.load(adapter_path=adapter.folder)
    logits = np.asarray(model.logits(mx.array([ids])))[0].astype(np.float64)
    found: np.ndarray = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    return found


def of_kind(tmp_path: Path, kind: str) -> AdapterSource:
    more = {"model_type": "llama" if kind == "stretched" else kind, **KINDS[kind]}
    return made(tmp_path, make_model_folder(tmp_path / "model", seed=3, **more))


@pytest.mark.parametrize("kind", KINDS)
def test_its_log_probabilities_are_ours(tmp_path, kind):
    adapter = of_kind(tmp_path, kind)
    export_gguf(adapter, tmp_path / "model.gguf", "f32", silent)
    expected = ours(adapter, IDS)
    found = LlamaCpp(tmp_path / "model.gguf").log_probabilities(IDS, expected.shape[1])
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_beside_its_model_is_the_same(tmp_path, kind):
    adapter = of_kind(tmp_path, kind)
    bare = named_arrays(adapter.base.load().model.parameters())
    write_gguf_model(tmp_path / "base.gguf", adapter.base, bare, "f32", silent)
    export_gguf_lora(adapter, tmp_path / "lora.gguf")
    expected = ours(adapter, IDS)
    both = LlamaCpp(tmp_path / "base.gguf", tmp_path / "lora.gguf")
    np.testing.assert_allclose(both.log_probabilities(IDS, expected.shape[1]), expected, atol=1e-4)
    alone = LlamaCpp(tmp_path / "base.gguf").log_probabilities(IDS, expected.shape[1])
    assert np.abs(alone - expected).max() > 1


@pytest.mark.parametrize(("bits", "most"), [("f16", 1e-4), ("q8_0", 0.01)])
def test_few_bits_say_nearly_the_same(tmp_path, bits, most):
    adapter = of_kind(tmp_path, "llama")
    export_gguf(adapter, tmp_path / "model.gguf", bits, silent)
    expected = ours(adapter, IDS)
    found = LlamaCpp(tmp_path / "model.gguf").log_probabilities(IDS, expected.shape[1])
    assert (np.exp(expected) * (expected - found)).sum(axis=-1).mean() < most


@pytest.mark.parametrize("name", ["smollm2", "qwen2.5", "gpt2", "phi-3-mini"])
def test_it_reads_texts_into_the_same_tokens(tmp_path, shared_data, name):
    folder = tmp_path / "tokenizer"
    shutil.copytree(shared_data / "tokenizers" / name, folder)
    (folder / "config.json").write_text('{"eos_token_id": 2}')
    small: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32}
    adapter = made(tmp_path, make_model_folder(tmp_path / "model", tokenizer=folder, **small))
    export_gguf(adapter, tmp_path / "model.gguf", "f16", silent)
    found = LlamaCpp(tmp_path / "model.gguf")
    for text in [*TEXTS, SPACES]:
        assert found.tokens(text) == adapter.base.tokenizer.encode(text), text


def test_a_tokenizer_that_shortens_spaces_is_told(tmp_path, shared_data):
    adapter, said = made(tmp_path, shared_data / "models" / "stories260K"), []
    export_gguf(
        adapter, tmp_path / "model.gguf", "f16", lambda event, data: said.append((event, data))
    )
    warnings = [data["message"] for event, data in said if event == "warning"]
    assert len(warnings) == 1 and "llama.cpp does not" in warnings[0]
    found, tokenizer = LlamaCpp(tmp_path / "model.gguf"), adapter.base.tokenizer
    for text in TEXTS:
        assert found.tokens(text) == tokenizer.encode(text), text
    assert found.tokens(SPACES) != tokenizer.encode(SPACES)


def test_a_chat_is_answered_alike(tmp_path):
    """Its template and its greedy answer."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    model = make_model_folder(tmp_path / "model", seed=3, chat_template=template)
    adapter = made(tmp_path, model)
    export_gguf(adapter, tmp_path / "model.gguf", "f32", silent)
    messages = [{"role": "user", "content": "The owl"}]
    body = {"messages": messages, "max_tokens": 12, "temperature": 0.0}
    found = LlamaCpp(tmp_path / "model.gguf").server.handle_chat_completions(body)
    tokenizer = adapter.base.tokenizer
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert found["usage"]["prompt_tokens"] == len(prompt)
    adapted, ids = adapter.base.load(adapter_path=adapter.folder), list(prompt)
    for _ in range(12):
        ids.append(int(mx.argmax(adapted.logits(mx.array([ids]))[0, -1])))
    text = tokenizer.decode(ids[len(prompt) :])
    assert found["choices"][0]["message"]["content"].strip() == text.strip()
