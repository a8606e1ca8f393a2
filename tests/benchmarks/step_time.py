"""Step time and peak memory of KD on cached targets against mlx_lm's own LoRA step.

The student is stories260K with layers 0, 2 and 4 kept, LoRA rank 16 on all linear layers, 4
examples of at most 352 tokens. Both steps see the same examples; their batches are taken in turn,
so that drifts of the machine hit both.
"""

import conch_dna  # noqa: F401  # isort: skip  (loads OpenBLAS before mlx)

import tempfile
import time
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from _ratios import note_ratio
from _setting import print_setting, shared_data, spread, stories
from mlx_lm.tuner.trainer import default_loss

from conch_dna.language_model import ModelSource
from conch_dna.training.adapters import attach_lora
from conch_dna.training.batches import collate
from conch_dna.training.data.outcomes import target_identity
from conch_dna.training.data.records import fitting, tokenize_records
from conch_dna.training.data.soft_targets import SoftTargetCache, TargetBatches
from conch_dna.training.head_loss import make_distillation_loss
from conch_dna.training.settings import KDConfig
from conch_dna.training.trainer import Trainer, TrainerSettings
from models import keep_layers

ROUNDS = 20
WARM_UP = 4
CONFIG = KDConfig(lora_keys="all")


def mlx_lm_step(student_folder: Path):
    """mlx_lm's training step, as its `train` builds it, on a fresh student."""
    student = ModelSource(str(student_folder)).load()
    attach_lora(student, CONFIG)
    model = student.model
    optimizer = optim.AdamW(learning_rate=1e-4)
    value_and_grad = nn.value_and_grad(model, default_loss)
    state = [model.state, optimizer.state, mx.random.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(batch, lengths):
        (loss, tokens), gradients = value_and_grad(model, batch, lengths)
        optimizer.update(model, gradients)
        return loss, tokens

    def run(examples) -> None:
        longest = max(len(example.ids) for example in examples)
        width = 1 + 32 * ((longest + 31) // 32)
        batch = np.zeros((len(examples), width), np.int32)
        for row, example in enumerate(examples):
            batch[row, : len(example.ids)] = example.ids
        lengths = mx.array([(0, len(example.ids)) for example in examples])
        loss, tokens = step(mx.array(batch), lengths)
        mx.eval(state, loss, tokens)

    model.train()
    return run


def kd_step(student_folder: Path, cache: SoftTargetCache, examples, folder: Path):
    """The trainer's own step on cached targets, on a fresh student."""
    student = ModelSource(str(student_folder)).load()
    attach_lora(student, CONFIG)
    loss = make_distillation_loss(student, temperature=2.0, alpha=0.7)
    stream = TargetBatches(examples, 4, cache, temperature=2.0, seed=0)
    heldout = [collate(examples[:1])]
    settings = TrainerSettings(num_iters=10**6, learning_rate=1e-4)
    trainer = Trainer(student.model, loss, stream, heldout, settings, folder)
    trainer.optimizer.init(student.model.trainable_parameters())

    def run(chosen) -> None:
        trainer.train_batches.batch = lambda index: cache.collate(chosen, 2.0)
        trainer._take_step()

    return run


def main() -> None:
    data = shared_data()
    print_setting("KD step on cached targets over mlx_lm's LoRA step (default_loss)")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        teacher = ModelSource(str(data / "models" / "stories260K"))
        cut = keep_layers(teacher.folder, folder / "student", [0, 2, 4])
        examples = tokenize_records(stories("train", 120), teacher.tokenizer)
        examples = [examples[index] for index in fitting(examples, 352, skip=True)][:48]
        identity = target_identity(teacher, top_k=64, temperature=2.0)
        cache = SoftTargetCache(folder / "cache", identity)
        cache.fill(teacher, examples, batch_size=4)
        teacher.release()
        examples.sort(key=lambda example: len(example.ids))
        groups = [examples[start : start + 4] for start in range(0, len(examples), 4)]
        steps = {
            "kd": kd_step(cut, cache, examples, folder),
            "mlx_lm": mlx_lm_step(cut),
        }
        peaks = {}
        for name, step in steps.items():
            mx.clear_cache()
            before = mx.get_active_memory()
            mx.reset_peak_memory()
            for group in groups:
                step(group)
            peaks[name] = mx.get_peak_memory() - before
        times: dict[str, list[float]] = {name: [] for name in steps}
        for number in range(WARM_UP + ROUNDS):
            group = groups[number % len(groups)]
            for name in sorted(steps, reverse=bool(number % 2)):
                began = time.perf_counter()
                steps[name](group)
                if number >= WARM_UP:
                    times[name].append(time.perf_counter() - began)
    ratios = [kd / sft for kd, sft in zip(times["kd"], times["mlx_lm"], strict=True)]
    print(f"  KD step, seconds:      {spread(times['kd'])}")
    print(f"  mlx_lm step, seconds:  {spread(times['mlx_lm'])}")
    told = note_ratio("time, a KD step over mlx_lm's", ratios, "at most 1.15")
    print(f"  ratio of paired steps: {told}; wanted at most 1.15")
    for name, peak in peaks.items():
        print(f"  peak memory of {name} steps above what was resident: {peak / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
