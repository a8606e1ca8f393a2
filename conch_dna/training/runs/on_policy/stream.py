"""A stream of training batches of which a share are the student's own answers.

Knows two sources of batches and when each has its turn; nothing of models.
"""

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np

from conch_dna.checkpoints import content_digest
from conch_dna.language_model import LanguageModel
from conch_dna.screen.progress import Report
from conch_dna.training.batches import Batch
from conch_dna.training.data.examples import Examples
from conch_dna.training.optimizer.steps import BatchStream
from conch_dna.training.runs.on_policy.own_teacher import OwnTeacher
from conch_dna.training.runs.on_policy.questions import Question
from conch_dna.training.runs.on_policy.residency import BOTH, chosen_residency
from conch_dna.training.runs.on_policy.rounds import Rounds
from conch_dna.training.runs.on_policy.shares import own_batches


def mixed_batches(
    student: LanguageModel,
    examples: Examples,
    questions: Sequence[Question],
    given: BatchStream | None,
    folder: Path,
    *,
    own_teacher: bool,
    resume: bool,
    report: Report,
) -> "MixedBatches":
    """The batches of a run that learns from the student's own answers.

    Args:
        student: In training.
        examples: Of the run; they know teacher and settings.
        questions: What the student may be asked.
        given: Batches of texts that are there; None where all are the student's own.
        folder: Of the run.
        own_teacher: Whether the student as it is now is the teacher.
        resume: Whether it goes on with what lies there.
        report: Gets progress, and what was chosen.

    Raises:
        ConchError: See `Rounds` and `chosen_residency`.
    """
    config, teacher = examples.config, examples.teacher

    def say(text: str) -> None:
        report("message", {"message": text})

    itself = OwnTeacher(student, config.teacher_ema) if own_teacher else None
    if itself:
        residency = BOTH
        say("teacher and student are one model, which is in memory once")
    else:
        residency = chosen_residency(teacher, student, config, say=say)
    rounds = Rounds(
        student,
        teacher,
        questions,
        examples,
        config,
        folder,
        residency=residency,
        own_teacher=itself,
        report=report,
    )
    total = config.own_batches + config.given_batches
    say(
        f"{config.own_batches} of {total} batches are the student's own answers, at most "
        f"{rounds.size} a round"
    )
    if not resume:
        rounds.remove()
    return MixedBatches(given, rounds, config.on_policy, config.accumulation_steps)


class MixedBatches:
    """Batches of given texts and of the student's own answers, in turn.

    Of its own answers only the teacher's distributions are learned: their cross-entropy counts
    nothing.

    Args:
        given: Of texts that are there; None where all are the student's own.
        rounds: Of its own answers.
        share: Of its own answers, above 0 and at most 1.
        accumulation_steps: Batches of a step.
    """

    def __init__(
        self, given: BatchStream | None, rounds: Rounds, share: float, accumulation_steps: int
    ) -> None:
        self.given = given
        self.rounds = rounds
        self.share = share
        self.accumulation_steps = accumulation_steps

    @property
    def digest(self) -> str:
        """Content address of both sources and of the share."""
        given = self.given.digest if self.given else ""
        return content_digest(given, self.rounds.digest, str(self.share))

    def batch(self, index: int) -> Batch:
        """Batch `index` of the stream; a new round is drawn and scored when its first is asked."""
        return self.parts(index, 1)[0]

    def parts(self, index: int, count: int) -> list[Batch]:
        """Batch `index` in so many parts."""
        before, behind = (own_batches(self.share, index + more) for more in (0, 1))
        if before == behind:
            assert self.given is not None
            return self.given.parts(index - before, count)
        _, within, batches = self.rounds.place_in_round(before)
        last_place = before - within + batches - 1
        parts = self.rounds.parts(
            before,
            count,
            step=index // self.accumulation_steps,
            last_step=self._index_of(last_place) // self.accumulation_steps,
        )
        return list(map(_without_cross_entropy, parts))

    def _index_of(self, place: int) -> int:
        """The index in the stream of one of the student's own batches."""
        share = Fraction(self.share).limit_denominator(1_000)
        return -(-(place + 1) * share.denominator // share.numerator) - 1


def _without_cross_entropy(batch: Batch) -> Batch:
    none = np.zeros_like(batch.arrays["weights"])
    return replace(batch, arrays={**batch.arrays, "ce_weights": none})
