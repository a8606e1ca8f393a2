"""A student's training in a run: which batches, which loss, what chooses the step.

Knows what the run has prepared and the one training loop; nothing of answers or folders' names.
Another source of batches: a branch in `_batches`.
"""

from pathlib import Path

from conch_dna.language_model import LanguageModel
from conch_dna.screen.progress import Report
from conch_dna.training.batches import ExampleBatches, sequential_batches
from conch_dna.training.data.examples import Examples
from conch_dna.training.data.soft_targets import TargetBatches
from conch_dna.training.evaluation import and_kl, with_evaluation
from conch_dna.training.head_loss import make_cross_entropy_loss
from conch_dna.training.machines.ranks.group import current
from conch_dna.training.machines.ranks.leading import shared_steps
from conch_dna.training.optimizer.steps import BatchStream
from conch_dna.training.runs.on_policy.stream import mixed_batches
from conch_dna.training.runs.stages import RunData
from conch_dna.training.settings import TrainingResult, trainer_settings
from conch_dna.training.trainer import Trainer


def fit_student(
    student: LanguageModel,
    examples: Examples,
    data: RunData,
    figure: str,
    folder: Path,
    *,
    own_teacher: bool,
    ema_decay: float = 0.0,
    resume: bool,
    report: Report,
) -> TrainingResult:
    """Train a student's adapter on what a run has prepared; the best parameters stay in it.

    Args:
        student: In memory, with what is trained attached.
        examples: Of the run; they know its settings and its teacher.
        data: Examples, targets and questions.
        figure: The held-out figure that the run is judged by.
        folder: Of the run.
        own_teacher: Whether the student as it is now is the teacher.
        ema_decay: See `TrainerSettings`.
        resume: Go on with the checkpoints that lie there.
        report: Gets the progress.

    Raises:
        ConchError: See `Trainer.run` and `on_policy.stream.mixed_batches`.
    """
    config, targets = examples.config, data.targets
    loss = heldout_loss = targets.loss(student, config)
    if not config.alpha:
        # No step needs the teacher; what is held out is still compared with it.
        loss = make_cross_entropy_loss(student, memory=config.loss_memory)
    chosen = sequential_batches(data.split.heldout, config.batch_size, config.val_batches)
    parts = [[data.split.heldout[index] for index in indices] for indices in chosen]
    heldout = [targets.collate(part, examples.temperature) for part in parts]
    select_by = config.selected
    if select_by in ("kl", "cross_entropy"):
        select_by = "ce" if figure == "cross_entropy" else "kl"
    if select_by == "kl":
        heldout_loss = and_kl(heldout_loss, student, figure, memory=config.loss_memory)
        heldout = [
            with_evaluation(batch, targets.evaluation_batch(part))
            for batch, part in zip(heldout, parts, strict=True)
        ]
    settings, ranks, steps = trainer_settings(config, ema_decay=ema_decay), current(), None
    if ranks is not None:
        steps = shared_steps(ranks, student, examples, loss, settings)
    trainer = Trainer(
        student.model,
        loss,
        _batches(
            student, examples, data, folder, own_teacher=own_teacher, resume=resume, report=report
        ),
        heldout,
        settings,
        folder,
        heldout_loss=heldout_loss,
        select_by=select_by,
        steps=steps,
        report=report,
    )
    result = trainer.run(resume=resume)
    if ranks is not None:
        ranks.send({"do": "trained"}, {})
    return result


def _batches(
    student: LanguageModel,
    examples: Examples,
    data: RunData,
    folder: Path,
    *,
    own_teacher: bool,
    resume: bool,
    report: Report,
) -> BatchStream:
    config, train = examples.config, data.split.train
    if not config.alpha:
        return ExampleBatches(train, config.batch_size, seed=config.seed)
    given = None
    if config.given_batches:
        given = TargetBatches(
            train,
            config.batch_size,
            data.targets,
            temperature=examples.temperature,
            seed=config.seed,
        )
    if given and not config.on_policy:
        return given
    return mixed_batches(
        student,
        examples,
        data.questions,
        given,
        folder,
        own_teacher=own_teacher,
        resume=resume,
        report=report,
    )
