"""How a child learns: its teachers' targets, one teacher after the other, and then its training.

Knows models, examples and settings; nothing of lines, gates or promotion. Three models are never
resident together: each teacher answers and leaves before the next one comes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from conch_dna.errors import ConchError
from conch_dna.generations.data import Material, TwoTeacherBatches
from conch_dna.generations.foreign_teacher import ForeignTargets
from conch_dna.generations.settings import EvolveConfig
from conch_dna.generations.taboo import TabooTokens
from conch_dna.generations.two_teachers import TwoTeacherTargets, make_two_teacher_loss
from conch_dna.language_model import ModelSource
from conch_dna.progress import Report
from conch_dna.training.adapters import checkpoint_layers, make_trainable, trained_tensors
from conch_dna.training.batches import sequential_batches
from conch_dna.training.cross_tokenizer.alignments import INDEX
from conch_dna.training.examples import Examples
from conch_dna.training.soft_targets import Targets
from conch_dna.training.trainer import Trainer, TrainingResult, trainer_settings


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
class Learned:
    """What training made of a child.

    Attributes:
        training: The trainer's figures.
        adapter_config: See `adapters.make_trainable`.
        tensors: What was trained.
    """

    training: TrainingResult
    adapter_config: dict[str, Any]
    tensors: dict[str, mx.array]


def teach(
    teachers: Sequence[Teacher],
    material: Material,
    base: ModelSource,
    config: EvolveConfig,
    folder: Path,
    report: Report,
    *,
    before_leaving: Callable[[Teacher], None] = lambda teacher: None,
) -> TwoTeacherTargets:
    """The targets of one or two teachers, one after the other in memory.

    Args:
        teachers: The first one and, if there is one, the second.
        material: Whose `aligned` holds the examples of foreign ones.
        base: The student's model.
        config: Batches, blend and taboo words.
        folder: Of the caches.
        report: See `progress.Report`.
        before_leaving: Called with each teacher before its model's memory is freed, so that
            nothing else that the model is asked needs it loaded once more.
    """
    caches: list[Targets] = []
    for teacher in teachers:
        cache: Targets
        if teacher.foreign:
            cache = ForeignTargets(teacher.examples, material.aligned[teacher.role], folder)
        else:
            cache = teacher.examples.targets(folder)
        if missing := cache.missing(material.taught):
            tokens = sum(example.count for example in missing)
            name = f"targets of {teacher.path}"
            report("phase", {"name": name, "total": tokens, "unit": "tokens"})
        cache.fill(teacher.source, material.taught, batch_size=config.training.batch_size)
        before_leaving(teacher)
        teacher.source.release()
        caches.append(cache)
    taboo = TabooTokens(base.tokenizer, config.taboo_words, config.taboo_ids)
    second = caches[1] if len(caches) > 1 else None
    return TwoTeacherTargets(caches[0], second, base, config.blend, taboo)


def learn(
    base: ModelSource,
    start: Path | None,
    material: Material,
    targets: TwoTeacherTargets,
    config: EvolveConfig,
    folder: Path,
    *,
    resume: bool,
    report: Report,
) -> Learned:
    """Train a child from its parent's adapter.

    Args:
        base: The line's model.
        start: The parent's adapter; None where the parent is the base itself.
        material: What there is to learn.
        targets: See `teach`.
        config: See `EvolveConfig`.
        folder: For checkpoints.
        resume: Go on from the last one.
        report: See `progress.Report`.

    Raises:
        ConchError: Every held-out token would be skipped.
        Interrupted: Ctrl-C; its state was saved.
    """
    training = config.training
    heldout = [
        targets.collate([material.heldout[i] for i in indices], training.temperature)
        for indices in sequential_batches(
            material.heldout, training.batch_size, training.val_batches
        )
    ]
    if not any(batch.count for batch in heldout):
        raise ConchError(
            "every held-out token would be skipped, so the best step could not be chosen: "
            "fewer taboo words, or other thresholds"
        )
    student = base.load()
    adapter_config = make_trainable(student, training, start=start)
    if training.grad_checkpoint:
        checkpoint_layers(student.model)
    report("phase", {"name": "training", "total": training.num_iters, "unit": "steps"})
    trainer = Trainer(
        student.model,
        make_two_teacher_loss(
            student,
            temperature=training.temperature,
            alpha=config.alpha,
            beta=config.beta,
            gamma=config.gamma,
            divergence=training.divergence,
            with_taboo=targets.taboo is not None,
            chunk=training.head_chunk,
        ),
        TwoTeacherBatches(material, targets, config),
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
    return Learned(training=result, adapter_config=adapter_config, tensors=tensors)
