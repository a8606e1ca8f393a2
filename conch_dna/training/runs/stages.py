"""What the stages of a run give each other, so that the models between them can go.

Knows data, targets and figures as they are; computes nothing. What another stage needs: a field.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from conch_dna.training.data.examples import Split
from conch_dna.training.data.records import Record
from conch_dna.training.data.soft_targets import Targets
from conch_dna.training.evaluation import HeldoutFigures
from conch_dna.training.runs.on_policy.questions import Question
from conch_dna.training.trainer import TrainingResult


@dataclass(frozen=True, eq=False)
class RunData:
    """All that training needs once the teacher has gone.

    Attributes:
        records: What the domain learns from, as it was given or answered.
        split: The examples, those of a test set among them.
        targets: The teacher's, for those of them that are read.
        prompts: The student's token ids of a few held-out prompts.
        teacher_texts: What the teacher made of them.
        finish_reasons: How many records ended how.
        questions: What the student may be asked for its own answers.
        heldout_questions: Of what is held out, those whose answers are measured.
    """

    records: Sequence[Record]
    split: Split
    targets: Targets
    prompts: list[list[int]]
    teacher_texts: list[str]
    finish_reasons: dict[str, int]
    questions: list[Question] = field(default_factory=list)
    heldout_questions: list[Question] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Trained:
    """All that is left of the student once it has gone.

    Attributes:
        before: Its held-out figures without the adapter.
        before_test: The same on the test set, if there is one.
        before_texts: What it made of the held-out prompts.
        before_answers: What it said to the held-out questions, as tokens.
        adapter_config: What adapter_config.json says of its layers.
        training: What the loop came to.
        tensors: The adapter.
        peak_memory_bytes: The highest so far in this process.
    """

    before: HeldoutFigures
    before_test: HeldoutFigures | None
    before_texts: list[str]
    before_answers: list[list[int]]
    adapter_config: dict[str, Any]
    training: TrainingResult
    tensors: dict[str, mx.array]
    peak_memory_bytes: int
