"""How a child learns: its teachers' targets, one teacher after the other, and then its training.

Knows models, examples and settings; nothing of lines, gates or promotion. Three models are never
resident together: each teacher answers and leaves before the next one comes.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from conch_dna.errors import ConchError
from conch_dna.generations.data import GenerationData, TwoTeacherBatches
from conch_dna.generations.settings import EvolveConfig
from conch_dna.generations.two_teachers import (
    TeacherCache,
    TwoTeacherTargets,
    make_two_teacher_loss,
)
from conch_dna.language_model import LanguageModel, ModelSource
from conch_dna.screen.progress import Report
from conch_dna.training.adapters import checkpoint_layers, make_trainable, trained_tensors
from conch_dna.training.batches import sequential_batches
from conch_dna.training.cross_tokenizer.alignments import INDEX, SHARED_TOKENS
from conch_dna.training.data.examples import Examples
from conch_dna.training.settings import KDConfig, TrainingResult, trainer_settings
from conch_dna.training.trainer import Trainer

"""The alignment that tells a teacher's tokens that are the student's too."""


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A frozen model that a child learns from.

    Attributes:
        role: "parent" or "grandparent": whose place it has.
        path: The generation's name, or the model's where another stands in its place.
        source: Where its weights are.
        examples: Makes its examples.
        of_line: Whether it is a generation of the line.
    """

    role: str
    path: str
    source: ModelSource
    examples: Examples
    of_line: bool

    @property
    def foreign(self) -> bool:
        """Whether its tokenizer is not the student's."""
        return self.examples.alignment != INDEX


@dataclass(frozen=True, kw_only=True)
class TrainedChild:
    """What training made of a child.

    Attributes:
        training: The trainer's figures.
        adapter_config: What mlx_lm must be told of the adapter.
        tensors: What was trained.
        rounds: Figures of the rounds of its own answers, if it learned from such.
    """

    training: TrainingResult
    adapter_config: dict[str, Any]
    tensors: dict[str, mx.array]
    rounds: list[dict[str, Any]] = field(default_factory=list)


def teacher_examples(
    teacher: ModelSource, student: ModelSource, config: KDConfig, report: Report
) -> Examples:
    """Makes the examples of a teacher in a blend: by index, or where tokens are the same text.

    A blend needs outcomes that are the student's own tokens; the alignment "roots" compares
    classes of tokens, and so it does not serve here.
    """
    return Examples(teacher, student, config, report=report, across=SHARED_TOKENS)


def filled_cache(
    teacher: Teacher, data: GenerationData, folder: Path, batch_size: int, report: Report
) -> TeacherCache:
    """A teacher's targets for all that is taught; its model may be left in memory.

    Args:
        teacher: Asked for what is missing.
        data: What is taught; `aligned` holds the examples of foreign teachers.
        folder: Of the caches.
        batch_size: Examples at once.
        report: Gets a phase where something is missing.
    """
    aligned = data.aligned[teacher.role] if teacher.foreign else None
    cache = TeacherCache(teacher.examples.targets(folder), aligned)
    examples = cache.examples(data.with_targets)
    if missing := cache.targets.missing(examples):
        tokens = sum(example.count for example in missing)
        name = f"targets of {teacher.path}"
        report("phase", {"name": name, "total": tokens, "unit": "tokens"})
    cache.targets.fill(teacher.source, examples, batch_size=batch_size)
    return cache


def loaded_child(
    base: ModelSource, config: KDConfig, start: Path | None, report: Report
) -> tuple[LanguageModel, dict[str, Any]]:
    """A child in memory as it is before its first step, and what mlx_lm is told of its adapter.

    Args:
        base: The line's model.
        config: What is trained, for how long.
        start: The parent's adapter; None where the parent is the base itself.
        report: Gets that training begins.
    """
    student = base.load()
    adapter_config = make_trainable(student, config, start=start)
    if config.grad_checkpoint:
        checkpoint_layers(student.model)
    report("phase", {"name": "training", "total": config.num_iters, "unit": "steps"})
    return student, adapter_config


def train_child(
    base: ModelSource,
    start: Path | None,
    data: GenerationData,
    targets: TwoTeacherTargets,
    config: EvolveConfig,
    folder: Path,
    *,
    resume: bool,
    report: Report,
) -> TrainedChild:
    """Train a child from its parent's adapter.

    Args:
        base: The line's model.
        start: The parent's adapter; None where the parent is the base itself.
        data: What there is to learn.
        targets: What its teachers say of them.
        config: Settings of the generation.
        folder: For checkpoints.
        resume: Go on from the last one.
        report: Gets the events of the run.

    Raises:
        ConchError: Every held-out token would be skipped.
        Interrupted: Ctrl-C; its state was saved.
    """
    training = config.training
    heldout = [
        targets.collate([data.heldout[i] for i in indices], training.temperature)
        for indices in sequential_batches(data.heldout, training.batch_size, training.val_batches)
    ]
    if not any(batch.count for batch in heldout):
        raise ConchError(
            "every held-out token would be skipped, so the best step could not be chosen: "
            "fewer taboo words, or other thresholds"
        )
    student, adapter_config = loaded_child(base, training, start, report)
    trainer = Trainer(
        student.model,
        make_two_teacher_loss(student, config, with_taboo=targets.taboo is not None),
        TwoTeacherBatches(data, targets, config),
        heldout,
        # A row for each step: shares of the strategies are told apart by steps.
        trainer_settings(training, ema_decay=config.ema_decay, steps_per_report=1),
        folder,
        # A teacher that is its own parent would choose the child that did not move.
        select_by="hard" if config.alpha > 0 else "loss",
        report=report,
    )
    result = trainer.run(resume=resume)
    tensors = trained_tensors(student)
    student.release()
    return TrainedChild(training=result, adapter_config=adapter_config, tensors=tensors)
