"""Adapters that leave for PEFT and llama.cpp and come back: the same logits, or a reason."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from conch_dna.cli import main
from conch_dna.errors import ConchError
from conch_dna.exporting.adapter_files import export_gguf_lora, export_peft, import_peft
from conch_dna.exporting.gguf_lora import interleaved
from conch_dna.exporting.source import AdapterSource
from conch_dna.language_model import LanguageModel, ModelSource
from conch_dna.screen.progress import silent
from conch_dna.training.adapters import attach_lora, save_adapter, trained_tensors
from conch_dna.training.settings import KDConfig
from models import EXPERTS, make_model_folder

IDS = [5, 9, 23, 7, 61, 2]
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": False, "rope_theta": 1e6},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "rope_theta": 1e6},
}


def made(folder: Path, *, seed: int = 7, kind: str = "llama", **settings: Any) -> tuple[Path, Path]:
    """A random model, and an adapter of random numbers that changes what it says."""
    model = folder / "model"
    if not model.is_dir():
        make_model_folder(model, seed=3, **KINDS[kind])
        config = json.loads((model / "config.json").read_text())
        name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[kind]
        config["architectures"] = [f"{name}ForCausalLM"]
        (model / "config.json").write_text(json.dumps(config))
    source = ModelSource(str(model))
    student = source.load()
    described = attach_lora(student, KDConfig(**{"lora_rank": 4, "lora_keys": "all", **settings}))
    mx.random.seed(seed)
    tensors = {
        name: value * (1 + 0.1 * mx.random.normal(value.shape))
        if name.endswith(".m")
        else 0.1 * mx.random.normal(value.shape)
        for name, value in trained_tensors(student).items()
    }
    save_adapter(folder / "adapter", tensors, {**described, "model": str(model)})
    return model, folder / "adapter"


def opened(adapter: Path) -> AdapterSource:
    return AdapterSource.open(adapter, trust_remote_code=False, report=silent)


def ours(model: Path, adapter: Path) -> np.ndarray:
    loaded: LanguageModel = ModelSource(str(model)).load(adapter_path=adapter)
    return np.asarray(loaded.logits(mx.array([IDS])))[0]


def theirs(model: Path, adapter: Path | None) -> np.ndarray:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    loaded = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32)
    if adapter:
        loaded = PeftModel.from_pretrained(loaded, str(adapter))
    with torch.no_grad():
        logits: np.ndarray = loaded.eval()(torch.tensor([IDS])).logits[0].numpy()
    return logits


@pytest.mark.filterwarnings("ignore")
class TestToPeft:
    @pytest.mark.parametrize("kind", list(KINDS))
    @pytest.mark.parametrize("dora", [False, True])
    def test_the_logits_are_the_same(self, tmp_path, kind, dora):
        model, adapter = made(tmp_path, kind=kind, dora=dora)
        export_peft(opened(adapter), tmp_path / "peft", name="")
        expected = ours(model, adapter)
        np.testing.assert_allclose(theirs(model, tmp_path / "peft"), expected, atol=1e-4)
        assert np.abs(theirs(model, None) - expected).max() > 0.1

    def test_a_tied_embedding_is_changed_where_it_is_read_and_where_it_is_compared(self, tmp_path):
        model, adapter = made(tmp_path, lora_keys="q_proj,model.embed_tokens")
        export_peft(opened(adapter), tmp_path / "peft", name="")
        np.testing.assert_allclose(
            theirs(model, tmp_path / "peft"), ours(model, adapter), atol=1e-4
        )

    def test_an_untied_head_and_its_embedding_are_two(self, tmp_path):
        model, adapter = made(tmp_path, kind="qwen2", lora_keys="model.embed_tokens,lm_head")
        export_peft(opened(adapter), tmp_path / "peft", name="")
        np.testing.assert_allclose(
            theirs(model, tmp_path / "peft"), ours(model, adapter), atol=1e-4
        )

    def test_some_of_the_last_layers(self, tmp_path):
        model, adapter = made(tmp_path, lora_layers=1, lora_keys="q_proj,down_proj")
        export_peft(opened(adapter), tmp_path / "peft", name="Org/Name")
        np.testing.assert_allclose(
            theirs(model, tmp_path / "peft"), ours(model, adapter), atol=1e-4
        )
        config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "Org/Name"
        assert config["lora_alpha"] == 40

    def test_what_has_no_counterpart_is_refused_by_name(self, tmp_path):
        _, adapter = made(tmp_path)
        document = json.loads((adapter / "adapter_config.json").read_text())
        save_adapter(
            tmp_path / "full",
            {"model.norm.weight": mx.ones(64)},
            {**document, "fine_tune_type": "full"},
        )
        with pytest.raises(ConchError, match=r"every weight.*--bits float"):
            export_peft(opened(tmp_path / "full"), tmp_path / "peft", name="")

    def test_experts_are_refused(self, tmp_path):
        make_model_folder(tmp_path / "model", seed=3, **EXPERTS)
        _, adapter = made(tmp_path)
        with pytest.raises(ConchError, match="mixture of experts"):
            export_peft(opened(adapter), tmp_path / "peft", name="")

    def test_what_is_there_is_not_replaced(self, tmp_path):
        _, adapter = made(tmp_path)
        with pytest.raises(ConchError, match="is there"):
            export_peft(opened(adapter), adapter, name="")


@pytest.mark.filterwarnings("ignore")
class TestFromPeft:
    def peft(self, folder: Path, model: Path, **settings: Any) -> Path:
        """An adapter that PEFT itself made and saved."""
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        torch.manual_seed(1)
        base = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32)
        chosen = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
        made = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **{**chosen, **settings}))
        with torch.no_grad():
            for name, value in made.named_parameters():
                if "lora_" in name and "magnitude" not in name:
                    value.copy_(0.1 * torch.randn(value.shape))
        made.save_pretrained(str(folder))
        return folder

    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"use_dora": True},
            {"use_rslora": True},
            {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 5}},
            {"layers_to_transform": [0]},
            {"target_modules": "all-linear"},
        ],
    )
    def test_the_logits_are_the_same(self, tmp_path, settings):
        model, _ = made(tmp_path)
        folder = self.peft(tmp_path / "peft", model, **settings)
        import_peft(folder, tmp_path / "back", ModelSource(str(model)))
        expected = theirs(model, folder)
        np.testing.assert_allclose(ours(model, tmp_path / "back"), expected, atol=1e-4)
        assert np.abs(theirs(model, None) - expected).max() > 0.01

    @pytest.mark.parametrize("keys", ["all", "q_proj,model.embed_tokens"])
    def test_there_and_back_again(self, tmp_path, keys):
        model, adapter = made(tmp_path, lora_keys=keys)
        export_peft(opened(adapter), tmp_path / "peft", name="")
        import_peft(tmp_path / "peft", tmp_path / "back", ModelSource(str(model)))
        first, second = (
            mx.load(str(p / "adapters.safetensors")) for p in (adapter, tmp_path / "back")
        )
        assert first.keys() == second.keys()
        assert all(mx.array_equal(first[name], second[name]) for name in first)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"peft_type": "IA3"}, "kind IA3"),
            ({"bias": "all"}, "trains biases"),
            ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
            ({"r": 0}, "no rank"),
            ({"r": "four"}, "has no r as it should"),
            ({"alpha_pattern": {"(": 3}}, "alpha_pattern"),
            ({"alpha_pattern": {"q_proj": "many"}}, "alpha_pattern"),
            ({"alpha_pattern": ["q_proj"]}, "alpha_pattern"),
        ],
    )
    def test_configurations_that_mlx_lm_cannot_follow(self, tmp_path, change, message):
        model, adapter = made(tmp_path)
        export_peft(opened(adapter), tmp_path / "peft", name="")
        path = tmp_path / "peft" / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        with pytest.raises(ConchError, match=message):
            import_peft(tmp_path / "peft", tmp_path / "back", ModelSource(str(model)))
        assert not (tmp_path / "back").exists()

    def test_pickled_weights_are_not_opened(self, tmp_path):
        model, adapter = made(tmp_path)
        export_peft(opened(adapter), tmp_path / "peft", name="")
        (tmp_path / "peft" / "adapter_model.safetensors").rename(
            tmp_path / "peft" / "adapter_model.bin"
        )
        with pytest.raises(ConchError, match="pickled"):
            import_peft(tmp_path / "peft", tmp_path / "back", ModelSource(str(model)))

    def test_an_adapter_of_another_model(self, tmp_path):
        _, adapter = made(tmp_path)
        export_peft(opened(adapter), tmp_path / "peft", name="")
        other = make_model_folder(tmp_path / "other", hidden_size=32)
        with pytest.raises(ConchError, match="does not fit the model"):
            import_peft(tmp_path / "peft", tmp_path / "back", ModelSource(str(other)))
        assert not (tmp_path / "back").exists()
        small = make_model_folder(tmp_path / "small", num_hidden_layers=1)
        with pytest.raises(ConchError):
            import_peft(tmp_path / "peft", tmp_path / "back", ModelSource(str(small)))

    def test_half_of_a_matrix_and_other_names(self, tmp_path):
        model, adapter = made(tmp_path)
        export_peft(opened(adapter), tmp_path / "peft", name="")
        path = tmp_path / "peft" / "adapter_model.safetensors"
        arrays = mx.load(str(path))
        mx.eval(arrays)
        name = next(iter(arrays))
        kept = {key: value for key, value in arrays.items() if key != name}
        mx.save_safetensors(str(path), kept)
        with pytest.raises(ConchError, match="not both matrices"):
            import_peft(tmp_path / "peft", tmp_path / "back", ModelSource(str(model)))
        mx.save_safetensors(str(path), {**arrays, "base_model.model.x.weight": mx.ones((2, 2))})
        with pytest.raises(ConchError, match="no part of a LoRA"):
            import_peft(tmp_path / "peft", tmp_path / "back", ModelSource(str(model)))


class TestGgufLora:
    @pytest.mark.parametrize("kind", list(KINDS))
    def test_it_is_read_back_equal(self, tmp_path, kind):
        import gguf

        _model, adapter = made(tmp_path, kind=kind)
        export_gguf_lora(opened(adapter), tmp_path / "lora.gguf")
        reader = gguf.GGUFReader(tmp_path / "lora.gguf")
        fields = {name: field.contents() for name, field in reader.fields.items()}
        assert fields["general.architecture"] == kind
        assert fields["general.type"] == "adapter"
        assert fields["adapter.type"] == "lora"
        assert fields["adapter.lora.alpha"] == 40.0
        tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
        own = {n: np.asarray(v) for n, v in mx.load(str(adapter / "adapters.safetensors")).items()}
        assert len(tensors) == len(own)
        names = {"mlp.down_proj": "ffn_down", "self_attn.v_proj": "attn_v"}
        for mine, other in names.items():
            for leaf in ("lora_a", "lora_b"):
                expected = own[f"model.layers.1.{mine}.{leaf}"].T
                np.testing.assert_array_equal(tensors[f"blk.1.{other}.weight.{leaf}"], expected)
        query = own["model.layers.0.self_attn.q_proj.lora_b"].T
        expected = interleaved(query, 4) if kind == "llama" else query
        np.testing.assert_array_equal(tensors["blk.0.attn_q.weight.lora_b"], expected)

    def test_the_order_of_heads_is_that_of_a_models_file(self):
        rows = np.arange(16).reshape(16, 1)
        # Of two heads of eight: first and fifth number side by side, and so on.
        assert interleaved(rows, 2).ravel().tolist()[:8] == [0, 4, 1, 5, 2, 6, 3, 7]

    @pytest.mark.parametrize(
        ("settings", "message"),
        [({"dora": True}, "is dora"), ({"lora_keys": "model.embed_tokens"}, "no linear layer")],
    )
    def test_what_llama_cpp_has_not(self, tmp_path, settings, message):
        _, adapter = made(tmp_path, **settings)
        with pytest.raises(ConchError, match=message):
            export_gguf_lora(opened(adapter), tmp_path / "lora.gguf")
        assert not (tmp_path / "lora.gguf").exists()

    def test_a_kind_of_model_that_is_not_known(self, tmp_path):
        make_model_folder(tmp_path / "model", seed=3, **EXPERTS)
        _, adapter = made(tmp_path, lora_keys="q_proj")
        with pytest.raises(ConchError, match="of the kind qwen3_moe"):
            export_gguf_lora(opened(adapter), tmp_path / "lora.gguf")


def test_the_commands(tmp_path):
    model, adapter = made(tmp_path)
    run = CliRunner().invoke
    result = run(main, ["export", str(adapter), str(tmp_path / "peft"), "--to", "peft"])
    assert result.exit_code == 0, result.output
    result = run(main, ["export", str(adapter), str(tmp_path / "a.gguf"), "--to", "gguf-lora"])
    assert result.exit_code == 0, result.output
    back = ["import", str(tmp_path / "peft"), str(tmp_path / "back"), "--model", str(model)]
    result = run(main, back)
    assert result.exit_code == 0, result.output
    np.testing.assert_array_equal(ours(model, tmp_path / "back"), ours(model, adapter))
    shutil.rmtree(tmp_path / "peft")
    result = run(main, back)
    assert result.exit_code == 2
    assert "error: " in result.output
