"""How much text a run reads and writes, and in batches of what shape.

Knows examples and settings; nothing of models. To add another kind of data: a function that gives a
`Workload`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from conch_dna.training.batches import first_counted, read_by_teacher
from conch_dna.training.data.answers import openings
from conch_dna.training.data.beginnings import shared_length
from conch_dna.training.data.examples import Split
from conch_dna.training.settings import KDConfig


@dataclass(frozen=True, kw_only=True)
class Workload:
    """How much text there is of what length.

    Attributes:
        longest: Tokens of the longest example of the student.
        teacher_longest: The same of the teacher.
        counted: Most counted tokens of a batch of the student.
        teacher_counted: The same of the teacher.
        mean_share: Length of the mean example over that of the longest.
        examples: Examples of which the teacher's targets are computed.
        heldout: Held-out examples.
        prompts: Prompts to answer; 0 where the data are given.
        longest_prompt: Tokens of the longest prompt, also of a held-out beginning.
        shared: Tokens that all of the teacher's texts share at their beginning.
    """

    longest: int
    teacher_longest: int
    counted: int
    teacher_counted: int
    mean_share: float
    examples: int
    heldout: int
    prompts: int
    longest_prompt: int
    shared: int = 0

    def within(self, config: KDConfig, changed: KDConfig) -> "Workload":
        """The same with other batches, and without what is longer than another longest example.

        Args:
            config: What it was made for.
            changed: What it shall be for.
        """
        smaller = changed.batch_size / config.batch_size
        longest = min(self.longest, changed.max_seq_length)
        teacher = min(self.teacher_longest, changed.max_seq_length)
        counted = self.counted * smaller * longest / self.longest
        teacher_counted = self.teacher_counted * smaller * teacher / self.teacher_longest
        return replace(
            self,
            longest=longest,
            teacher_longest=teacher,
            counted=max(1, round(counted)),
            teacher_counted=max(1, round(teacher_counted)),
        )


def given_examples(split: Split, config: KDConfig) -> Workload:
    """The workload of given data; the batch of the longest examples has the largest shape."""
    examples = [*split.train, *split.heldout]
    teachers = list(map(read_by_teacher, examples))
    lengths = [len(example.ids) for example in examples]
    return Workload(
        longest=max(lengths),
        teacher_longest=max(len(example.ids) for example in teachers),
        counted=_counted(examples, config.batch_size),
        teacher_counted=_counted(teachers, config.batch_size),
        mean_share=sum(lengths) / len(lengths) / max(lengths),
        examples=len(split.read(config)),
        heldout=len(split.heldout),
        prompts=0,
        longest_prompt=max(length for _, length in openings(split.heldout)),
        shared=shared_length(
            [each.ids for each in teachers], [first_counted(each) - 1 for each in teachers]
        ),
    )


def _counted(examples: Sequence[Any], size: int) -> int:
    """Counted tokens of a batch of the longest examples."""
    longest = sorted(examples, key=lambda example: -len(example.ids))[:size]
    return sum(example.count for example in longest)


def answers_to_come(
    prompts: Sequence[Sequence[int]],
    heldout: int,
    drawn: int,
    config: KDConfig,
    *,
    of_student: int,
) -> Workload:
    """The workload of prompts, of which the teacher's answers are as long as they may be.

    Args:
        prompts: Token ids of each.
        heldout: Answers that will be held out.
        drawn: Answers that steps will read.
        config: Lengths and batch sizes.
        of_student: Tokens of the longest prompt as the student reads it.
    """
    longest_prompt = max(len(ids) for ids in prompts)
    longest = of_student + config.max_tokens
    counted = config.batch_size * (longest - 1 if config.train_on_prompt else config.max_tokens)
    return Workload(
        longest=longest,
        teacher_longest=longest_prompt + config.max_tokens,
        counted=counted,
        teacher_counted=counted,
        mean_share=1.0,
        examples=heldout + drawn,
        heldout=heldout,
        prompts=len(prompts) * config.samples_per_prompt,
        longest_prompt=longest_prompt,
        shared=shared_length(prompts, [len(ids) - 1 for ids in prompts]),
    )
