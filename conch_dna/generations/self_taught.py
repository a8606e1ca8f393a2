"""How a child teaches itself: its parent, which reads more, scores the child's own answers.

Self-distillation (arXiv 2601.19897) on a line. Knows models, examples and settings; nothing of
lines, gates or promotion.
"""

from pathlib import Path
from typing import Any

from conch_dna.errors import number_of
from conch_dna.generations.data import GenerationData
from conch_dna.generations.settings import SDFT, EvolveConfig
from conch_dna.generations.train_child import TrainedChild, loaded_child
from conch_dna.language_model import ModelSource
from conch_dna.screen.progress import Report
from conch_dna.training.adapters import trained_tensors
from conch_dna.training.data.examples import Examples, Split
from conch_dna.training.data.soft_targets import Targets
from conch_dna.training.evaluation import figures_on
from conch_dna.training.runs.fit_student import fit_student
from conch_dna.training.runs.on_policy.rounds import questions_for, round_figures
from conch_dna.training.runs.privilege import require_help, require_more
from conch_dna.training.runs.stages import RunData
from conch_dna.training.settings import SYSTEMS


def self_taught_data(
    examples: Examples, data: GenerationData, folder: Path, report: Report
) -> RunData:
    """What a child that teaches itself learns from; its parent stays in memory.

    Besides the child's own answers to the new prompts, replayed texts.

    Args:
        examples: Of parent and child.
        data: What there is to learn.
        folder: Of the parent's targets.
        report: Gets what is done.

    Raises:
        ConchError: There are too few prompts for a round, one leaves no room, or what only the
            parent reads is not shown to help it.
    """
    config = examples.config
    require_more([*data.train, *data.heldout], config)
    given = data.replay
    if len(given) < config.batch_size and config.given_batches:
        given = data.train
        few = number_of(len(data.replay), "replayed example")
        report("message", {"message": f"{few} cannot fill a batch: the new texts are given too"})
    split = Split(given, data.heldout, data.train_records, data.heldout_records)
    asked = Split(data.train, data.heldout, data.train_records, data.heldout_records)
    questions = questions_for([config], asked, examples.teacher, examples.student)
    targets = examples.targets(folder)
    needed = split.read(config) if config.given_batches else data.heldout
    if missing := targets.missing(needed):
        tokens = sum(example.count for example in missing)
        name = "targets of the parent"
        report("phase", {"name": name, "total": tokens, "unit": "tokens"})
    targets.fill(examples.teacher, needed, batch_size=config.batch_size)
    _require_help(examples, data, targets, report)
    return RunData([], split, targets, [], [], {}, questions)


def _require_help(
    examples: Examples, data: GenerationData, targets: Targets, report: Report
) -> None:
    report("phase", {"name": "whether what only the parent reads helps it"})
    parent = examples.teacher.resident()
    before = figures_on(parent, data.heldout, targets, examples.config)
    require_help(data.heldout, targets, before, examples.config, report)


def train_self_taught(
    examples: Examples,
    start: Path | None,
    data: RunData,
    ema_decay: float,
    folder: Path,
    *,
    resume: bool,
    report: Report,
) -> TrainedChild:
    """Train a child from its parent's adapter on its own answers.

    Args:
        examples: Of parent and child.
        start: The parent's adapter; None where the parent is the base itself.
        data: Of `self_taught_data`.
        ema_decay: Of the average that is kept.
        folder: For checkpoints and rounds.
        resume: Go on from the last checkpoint.
        report: Gets the events of the run.

    Raises:
        ConchError: See `Rounds`.
        Interrupted: Ctrl-C; its state was saved.
    """
    student, adapter_config = loaded_child(examples.student, examples.config, start, report)
    training = fit_student(
        student,
        examples,
        data,
        "kl_nats",
        folder,
        own_teacher=True,
        ema_decay=ema_decay,
        resume=resume,
        report=report,
    )
    tensors = trained_tensors(student)
    student.release()
    return TrainedChild(
        training=training,
        adapter_config=adapter_config,
        tensors=tensors,
        rounds=round_figures(folder),
    )


def written_down(base: ModelSource, config: EvolveConfig) -> dict[str, Any]:
    """What a child's adapter_config.json says of its making; CORTEX reads the system prompts."""
    recorded: dict[str, Any] = {"student": base.model_id}
    if config.method == SDFT:
        recorded["config"] = {name: getattr(config.training, name) for name in SYSTEMS.values()}
    return recorded
