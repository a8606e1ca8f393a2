"""From records to examples and targets, whether the two models share a tokenizer or not.

Knows which of the two cases it is, and what fits the models' contexts; nothing of training.
A third case would be a third class with the methods of `SameTokenizer`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conch_dna.errors import counted
from conch_dna.language_model import ModelSource
from conch_dna.metrics import FEWEST_EXAMPLES
from conch_dna.progress import Report, silent
from conch_dna.training.batches import Example, ExampleBatches
from conch_dna.training.cross_tokenizer.alignments import AUTO, INDEX
from conch_dna.training.cross_tokenizer.records import (
    AlignedExample,
    RecordAligner,
    coverage,
    require_coverage,
)
from conch_dna.training.cross_tokenizer.roots import RootTargets
from conch_dna.training.cross_tokenizer.targets import (
    AlignedTargets,
    ChunkTargets,
    SharedTokenTargets,
)
from conch_dna.training.cross_tokenizer.token_bytes import token_bytes
from conch_dna.training.cross_tokenizer.vocabulary import same_tokens, vocabulary_digest
from conch_dna.training.data.answers import openings
from conch_dna.training.data.records import Record, fitting, split_heldout, tokenize_records
from conch_dna.training.settings import KDConfig
from conch_dna.training.soft_targets import (
    SoftTargetCache,
    TargetIdentity,
    Targets,
    target_identity,
)

AUTO_ALIGNMENT = "roots"
# Reading the same examples more often than this is warned of.
MOST_EPOCHS = 10
KINDS: dict[str, type[AlignedTargets]] = {
    kind.name: kind for kind in (RootTargets, ChunkTargets, SharedTokenTargets)
}


@dataclass(frozen=True, eq=False)
class Split:
    """The examples of a run, and which of them are held out.

    Attributes:
        train: Training examples.
        heldout: Held-out examples.
        train_records: What the training examples were made of.
        heldout_records: What the held-out ones were made of.
    """

    train: list[Any]
    heldout: list[Any]
    train_records: list[Record]
    heldout_records: list[Record]

    def read(self, config: KDConfig) -> list[Any]:
        """The examples whose targets a run will read, each once, in the order of their use.

        Cross-entropy alone needs the teacher for what is held out only.

        Raises:
            ConchError: The training examples do not fill one batch.
        """
        stream = ExampleBatches(self.train, config.batch_size, seed=config.seed)
        batches = config.num_iters * config.accumulation_steps if config.alpha > 0 else 0
        return [*self.heldout, *stream.drawn(batches)]


class Examples:
    """Makes examples and targets of records for a pair of models.

    Args:
        teacher: Its tokenizer is used, not its weights.
        student: The same of the student.
        config: How texts are cut, held out and compared.
        report: Gets ("message", …) and ("warning", …).
        across: A key of KINDS for tokenizers that differ, whatever the configuration says.

    Attributes:
        alignment: "index" where both tokenizers are the same, else the configuration's, "auto"
            resolved.
    """

    def __init__(
        self,
        teacher: ModelSource,
        student: ModelSource,
        config: KDConfig,
        *,
        report: Report = silent,
        across: str | None = None,
    ) -> None:
        self.teacher = teacher
        self.student = student
        self.config = config
        self.report = report
        same = same_tokens(token_bytes(teacher.tokenizer), token_bytes(student.tokenizer))
        self.alignment = resolve_alignment(across or config.alignment, same=same)
        if same and config.alignment != AUTO:
            self._message(
                f"both tokenizers are the same: tokens are compared by index, which is what "
                f"--alignment {config.alignment} comes to"
            )

    def make(self, records: Sequence[Record]) -> tuple[list[int], list[Any]]:
        """Tokenize records, and align them where the tokenizers differ.

        Returns:
            Indices of the records that are kept, and their examples.

        Raises:
            ConchError: A record is too long for a model or --max-seq-length and not to be left
                out, or less than half of the tokens could be aligned.
        """
        if self.alignment == INDEX:
            examples = tokenize_records(
                records,
                self.student.tokenizer,
                train_on_prompt=self.config.train_on_prompt,
                vocabulary=vocabulary_digest(self.student.tokenizer),
            )
            for model in (self.teacher, self.student):
                for example in examples:
                    model.require_rows(example.ids, example.name)
            contexts = (self.teacher.context_length, self.student.context_length)
            kept = self._fitting(examples, contexts)
            return kept, [examples[index] for index in kept]
        aligner = RecordAligner(
            self.teacher, self.student, train_on_prompt=self.config.train_on_prompt
        )
        aligned = [aligner.align(r, f"example {number}") for number, r in enumerate(records, 1)]
        for each in aligned:
            self.student.require_rows(each.ids, each.name)
            self.teacher.require_rows(each.teacher.ids, each.name)
        kept = self._fitting(aligned, (self.student.context_length,))
        of_teacher = [aligned[index].teacher for index in kept]
        kept = [kept[i] for i in self._fitting(of_teacher, (self.teacher.context_length,))]
        return self._covered(kept, aligned)

    def split(self, records: Sequence[Record]) -> Split:
        """Tokenize records and hold a share of them out.

        Raises:
            ConchError: See `make` and `records.split_heldout`.
        """
        indices, examples = self.make(records)
        kept = [records[index] for index in indices]
        train, heldout = split_heldout(kept, self.config.val_fraction, seed=self.config.seed)
        return Split(
            [examples[index] for index in train],
            [examples[index] for index in heldout],
            [kept[index] for index in train],
            [kept[index] for index in heldout],
        )

    def _covered(
        self, kept: list[int], aligned: list[AlignedExample]
    ) -> tuple[list[int], list[AlignedExample]]:
        covered = coverage([aligned[index] for index in kept])
        require_coverage(covered, teacher=self.teacher.model_id, student=self.student.model_id)
        shares = covered.to_json()
        self._message(
            f"the tokenizers differ, alignment {self.alignment}: {shares['one_to_one']:.1%} of "
            f"the student's tokens are one token of the teacher too, {shares['in_chunks']:.1%} "
            f"are in chunks of several, {shares['uncovered']:.1%} are not covered"
        )
        if self.temperature != self.config.temperature:
            self._message(
                "classes of tokens are compared at temperature 1, since a temperature changes "
                f"large ones more than small ones; {self.config.temperature:g} is not used"
            )
        with_chunks = [index for index in kept if len(aligned[index].chunks)]
        if len(with_chunks) < len(kept):
            left_out = [aligned[index].name for index in kept if not len(aligned[index].chunks)]
            shown = ", ".join(left_out[:5]) + (" …" if len(left_out) > 5 else "")
            message = (
                f"{len(left_out)} of {len(kept)} examples have no boundary that both tokenizers "
                f"share: left out ({shown})"
            )
            self.report("warning", {"message": message})
        return with_chunks, [aligned[index] for index in with_chunks]

    def _fitting(self, examples: Sequence[Example], contexts: Sequence[int | None]) -> list[int]:
        longest = min([self.config.max_seq_length, *(c for c in contexts if c)])
        kept = fitting(examples, longest, skip=self.config.too_long == "skip")
        if len(kept) < len(examples):
            left_out = len(examples) - len(kept)
            message = f"{left_out} of {len(examples)} examples exceed {longest} tokens: left out"
            self.report("warning", {"message": message})
        return kept

    def prompts(self, examples: Sequence[Any]) -> tuple[list[list[int]], list[list[int]]]:
        """Beginnings of a few examples as the teacher's tokens and as the student's.

        Where they are aligned, both are cut at the last boundary that they share, or at the first
        where that comes later, so that both are the same text.
        """
        teacher, student = [], []
        for example, length in openings(examples):
            if isinstance(example, AlignedExample):
                chunks = example.chunks
                before = np.flatnonzero(chunks.student[:, 1] <= length)
                # The beginning of the first chunk, or the end of the last one before the cut.
                row, column = (before[-1], 1) if len(before) else (0, 0)
                length = int(chunks.student[row, column])
                teacher.append(example.teacher.ids[: chunks.teacher[row, column]].tolist())
            else:
                teacher.append(example.ids[:length].tolist())
            student.append(example.ids[:length].tolist())
        return teacher, student

    def described(self, examples: Sequence[Any]) -> dict[str, Any]:
        """How examples are aligned, for the result of a run."""
        if self.alignment == INDEX:
            return {"alignment": INDEX}
        return {"alignment": self.alignment, "coverage": coverage(examples).to_json()}

    @property
    def temperature(self) -> float:
        """At which distributions are compared: the configuration's, or 1 for classes of tokens.

        A class of many tokens and one of few would be changed differently by any other.
        """
        return 1.0 if self.alignment == "roots" else self.config.temperature

    def _message(self, text: str) -> None:
        self.report("message", {"message": text})

    def identity(self, *, with_digests: bool = True) -> TargetIdentity:
        """What is stored of the teacher; see `soft_targets.target_identity`."""
        soft = self.alignment == INDEX or KINDS[self.alignment].keeps_outcomes
        return target_identity(
            self.teacher,
            top_k=self.config.top_k if soft else 0,
            temperature=self.config.temperature,
            student=self.student if self.alignment == INDEX else None,
            with_digests=with_digests,
        )

    def targets(self, folder: Path) -> Targets:
        """The teacher's targets, cached in a folder, for examples that `make` made."""
        cache = SoftTargetCache(folder, self.identity(), report=self.report)
        if self.alignment == INDEX:
            return cache
        return KINDS[self.alignment](cache, self.teacher, self.student)


def resolve_alignment(alignment: str, *, same: bool) -> str:
    """The alignment that a setting comes to.

    Args:
        alignment: "auto" or a key of KINDS.
        same: Whether both tokenizers are the same. Then there is nothing to align, and tokens
            are compared by index.

    >>> resolve_alignment("auto", same=False)
    'roots'
    """
    if same:
        return INDEX
    return AUTO_ALIGNMENT if alignment == AUTO else alignment


def data_warnings(train: int, heldout: int, config: KDConfig) -> list[str]:
    """What is to be feared of so few examples, a sentence each.

    Args:
        train: Examples to train on.
        heldout: Examples held out.
        config: How many of them are read.
    """
    drawn = config.examples_read
    warnings = []
    if heldout < FEWEST_EXAMPLES:
        warnings.append(
            f"{counted(heldout, 'held-out example')} cannot show a gain, it takes "
            f"{FEWEST_EXAMPLES}: give more data, or a higher --val-fraction"
        )
    if drawn > MOST_EPOCHS * train:
        warnings.append(
            f"each of {train} examples is read {drawn / max(1, train):.1f} times, which often "
            "makes a student worse: give more data, or fewer --iters"
        )
    return warnings
