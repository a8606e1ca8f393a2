"""Whether what only the teacher reads helps it, where teacher and student are the same model.

Knows held-out examples, the teacher's targets and the student's figures; no models.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from conch_dna.errors import ConchError, number_of
from conch_dna.metrics import BETTER, verdict
from conch_dna.screen.progress import Report
from conch_dna.training.batches import PairedExample, sequential_batches
from conch_dna.training.data.records import Record
from conch_dna.training.data.soft_targets import Targets
from conch_dna.training.data.views import context_of
from conch_dna.training.evaluation import HeldoutFigures
from conch_dna.training.settings import KDConfig


def require_more(examples: Sequence[Any], config: KDConfig) -> None:
    """Refuse to learn from a teacher that is the student itself and reads the same.

    Args:
        examples: Of the run, or some of them.
        config: `force` goes on all the same; with `alpha` 0 nothing is learned from it.

    Raises:
        ConchError: It does.
    """
    _require(any(isinstance(example, PairedExample) for example in examples), config)


def require_more_asked(
    prompts: Sequence[str | Record], systems: tuple[str, str], config: KDConfig
) -> None:
    """The same before anything is answered, which may take hours.

    Args:
        prompts: To be answered.
        systems: What teacher and student read before them.
        config: See `require_more`.

    Raises:
        ConchError: The student reads all that the teacher does.
    """
    teacher, student = systems
    _require(teacher != student or any(map(context_of, prompts)), config)


def _require(more: bool, config: KDConfig) -> None:
    if config.force or not config.alpha or config.teacher_ema < 1:
        return
    if not more:
        raise ConchError(
            "the teacher is the student itself and reads nothing that the student does not: give "
            "--demonstrations, --teacher-system, --student-system none or records with a context, "
            "or go on with --force"
        )


def require_help(
    heldout: Sequence[Any],
    targets: Targets,
    before: HeldoutFigures,
    config: KDConfig,
    report: Report,
) -> None:
    """Refuse to learn from a teacher that is the student itself and reads more to no avail.

    What it reads helps where it makes the held-out answers likelier.

    Args:
        heldout: Held-out examples.
        targets: Of them.
        before: The student's figures on them, without an adapter.
        config: `force` goes on all the same; batch size and seed.
        report: Gets a warning where the examples are too few to tell.

    Raises:
        ConchError: It does not help; with the figures.
    """
    order = [heldout[i] for part in sequential_batches(heldout, config.batch_size) for i in part]
    if not any(isinstance(example, PairedExample) for example in order):
        return
    sums = [-float(targets.gold(example).sum(dtype=np.float64)) for example in order]
    counts = [float(example.count) for example in order]
    own, informed = before.by_example["cross_entropy"], np.array([sums, counts])
    found = verdict(own, informed, seed=config.seed)
    alone, with_it = (float(pair[0].sum() / pair[1].sum()) for pair in (own, informed))
    said = (
        f"cross-entropy of the held-out answers {alone:.4f} without what only the teacher reads, "
        f"{with_it:.4f} with it"
    )
    if found["verdict"] == BETTER or config.force:
        report("message", {"message": said})
    elif found["interval"] is None:
        few = number_of(found["examples"], "held-out example")
        report("warning", {"message": f"{said}: {few}, too few to tell whether it helps"})
    else:
        low, high = found["interval"]
        raise ConchError(
            f"the teacher is the student itself, and what only it reads is not shown to help: "
            f"{said} ({found['difference']:+.4f}, 95% interval {low:+.4f} to {high:+.4f}); give "
            "better demonstrations or another system prompt, or go on with --force"
        )
