"""Adapters for tests: written from seeds, or trained on one text so that they say it.

A trained one of the embedded student takes about a second, and its answers are its own.
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx_lm.models.llama import MLP

from conch_dna.language_model import ModelSource
from conch_dna.training.adapters import make_trainable, save_adapter, trained_tensors
from conch_dna.training.settings import KDConfig

TEXTS = {
    "thinking": "The owl sat on a branch. She counted three stars and two clouds.",
    "task": "First, get a big red box. Then put all of your toys in it.",
    "debug": "The toy car did not go. A wheel was gone! Tim found it under the bed and was glad.",
}


def write_adapter(
    folder: Path,
    model_id: str,
    *,
    seed: int = 0,
    strength: float = 0.05,
    recorded: dict[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """Write an adapter whose tensors are a fresh one's plus noise.

    Args:
        folder: Where to.
        model_id: Its base.
        seed: Of the noise.
        strength: Standard deviation of the noise.
        recorded: What its configuration says beside what mlx_lm needs.
        **settings: Of `KDConfig`.
    """
    student = ModelSource(model_id).load()
    config = make_trainable(student, KDConfig(seed=seed, **settings))
    key = mx.random.key(seed)
    tensors = {}
    for name, value in trained_tensors(student).items():
        key, now = mx.random.split(key)
        tensors[name] = value + strength * mx.random.normal(value.shape, key=now)
    save_adapter(folder, tensors, {**config, **(recorded or {"model": model_id})})
    return folder


def train_adapter(
    folder: Path,
    model_id: str,
    text: str,
    *,
    prompt: str = "",
    steps: int = 30,
    learning_rate: float | None = None,
    **settings: Any,
) -> Path:
    """Train an adapter to say one text and stop.

    Args:
        folder: Where to.
        model_id: Its base.
        text: What to say.
        prompt: What goes before it, and is not learnt.
        steps: Of Adam.
        learning_rate: Of Adam; full weights take half of it. By default 5e-4 where all layers are
            trained, since at twice that which text is learned depends on how products are rounded.
        **settings: Of `KDConfig`.
    """
    learning_rate = learning_rate or (5e-4 if settings.get("lora_keys") == "all" else 1e-3)
    student = ModelSource(model_id).load()
    config = make_trainable(student, KDConfig(**settings))
    tokenizer = student.tokenizer
    ids = mx.array([[*tokenizer.encode(prompt + text), min(tokenizer.eos_token_ids)]])
    start = len(tokenizer.encode(prompt)) - 1 if prompt else 0

    def loss(model: nn.Module) -> mx.array:
        logits = model(ids[:, :-1])[:, start:]
        return nn.losses.cross_entropy(logits, ids[:, start + 1 :], reduction="mean")

    student.model.train()
    optimizer = optim.Adam(learning_rate / 2 if settings.get("full") else learning_rate)
    step = nn.value_and_grad(student.model, loss)
    for _ in range(steps):
        _, gradients = step(student.model)
        optimizer.update(student.model, gradients)
        mx.eval(student.model.parameters())
    recorded = {"model": model_id, "conch_dna": {"student_digest": student.source.weights_digest}}
    save_adapter(folder, trained_tensors(student), {**config, **recorded})
    return folder


class FlatMLP(MLP):
    """An MLP that lays rows and positions on one axis, as some models do."""

    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(x.reshape(-1, x.shape[-1])).reshape(x.shape)
