"""Scales of a quantised model trained on what its adapter said: the same codes, other scales.

Knows quantised modules, targets and the one trainer; nothing of gates or files of models. Another
kind of layer: a class beside `_Linear`, and its entry in KINDS.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from conch_dna.exporting.settings import FuseSettings
from conch_dna.language_model import LanguageModel, ModelSource, named_arrays
from conch_dna.loading.full_precision import on_cpu
from conch_dna.screen.progress import Report
from conch_dna.training.batches import Example, sequential_batches
from conch_dna.training.data.soft_targets import SoftTargetCache, TargetBatches
from conch_dna.training.settings import KDConfig, TrainingResult, trainer_settings
from conch_dna.training.trainer import Trainer


class _Scaled(nn.Module):
    """A quantised layer whose scales and biases are moved by shares of the scales.

    `scales · (1 + gain)` and `biases + scales · shift`: so that one learning rate suits layers
    whose scales differ by orders of magnitude.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        for name in ("weight", "scales", "biases", "bias"):
            if name in layer:
                self[name] = layer[name]
        self.bits, self.group_size = layer.bits, layer.group_size
        self.gain = mx.zeros(layer.scales.shape)
        self.shift = mx.zeros(layer.scales.shape)

    def moved(self) -> tuple[mx.array, mx.array]:
        """Scales and biases as they are now, float32."""
        scales = self.scales.astype(mx.float32)
        return scales * (1 + self.gain), self.biases.astype(mx.float32) + scales * self.shift

    def _product(self, x: mx.array) -> mx.array:
        scales, biases = (each.astype(x.dtype) for each in self.moved())
        how: dict[str, Any] = {"group_size": self.group_size, "bits": self.bits}
        if on_cpu():
            # Where products with codes are slow.
            return x @ mx.dequantize(self.weight, scales, biases, **how).T
        return mx.quantized_matmul(x, self.weight, scales, biases, transpose=True, **how)


class _Linear(_Scaled):
    def __call__(self, x: mx.array) -> mx.array:
        out = self._product(x)
        return out + self.bias if "bias" in self else out


class _Embedding(_Scaled):
    def __call__(self, ids: mx.array) -> mx.array:
        scales, biases = (each.astype(self.scales.dtype)[ids] for each in self.moved())
        return mx.dequantize(self.weight[ids], scales, biases, self.group_size, self.bits)

    def as_linear(self, x: mx.array) -> mx.array:
        return self._product(x)


KINDS: dict[type[nn.Module], type[_Scaled]] = {
    nn.QuantizedLinear: _Linear,
    nn.QuantizedEmbedding: _Embedding,
}


def healed_arrays(
    candidate: ModelSource,
    targets: SoftTargetCache,
    train: Sequence[Example],
    chosen_by: Sequence[Example],
    settings: FuseSettings,
    folder: Path,
    *,
    resume: bool,
    report: Report,
) -> tuple[dict[str, mx.array], TrainingResult]:
    """Train the scales of a quantised model's layers; the codes stay.

    Args:
        candidate: The model's folder.
        targets: What the adapter says of all examples, at temperature 1.
        train: Examples to train on.
        chosen_by: Those by which the step that is kept is chosen.
        settings: Steps, rate and texts in a step.
        folder: For checkpoints.
        resume: Go on from the newest of them.
        report: Gets the progress.

    Returns:
        The model's weights by their names, and what the loop came to.

    Raises:
        ConchError: See `Trainer.run`.
    """
    from mlx.utils import tree_unflatten

    student = LanguageModel(candidate, candidate.modules(lazy=False))
    model = student.model
    layers = {n: KINDS[type(m)](m) for n, m in model.named_modules() if type(m) in KINDS}
    model.update_modules(tree_unflatten(list(layers.items())))
    model.freeze()
    for layer in layers.values():
        layer.unfreeze(keys=["gain", "shift"], recurse=False)
    config = KDConfig(
        temperature=1.0,
        alpha=1.0,
        num_iters=settings.steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        weight_decay=0.0,
        loss_memory=settings.loss_memory,
        steps_per_eval=max(1, settings.steps // 4),
        seed=settings.seed,
    )
    report("phase", {"name": "training of scales", "total": settings.steps, "unit": "steps"})
    batches = sequential_batches(chosen_by, config.batch_size)
    trainer = Trainer(
        model,
        targets.loss(student, config),
        TargetBatches(train, config.batch_size, targets, temperature=1.0, seed=config.seed),
        [targets.collate([chosen_by[i] for i in indices], 1.0) for indices in batches],
        trainer_settings(config),
        folder,
        report=report,
    )
    result = trainer.run(resume=resume)
    for layer in layers.values():
        scales, biases = layer.moved()
        kind = layer.scales.dtype
        layer.scales, layer.biases = scales.astype(kind), biases.astype(kind)
        del layer.gain, layer.shift
    arrays = named_arrays(model.parameters())
    mx.eval(arrays)
    student.release()
    return arrays, result
