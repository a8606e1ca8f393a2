"""From records to examples and targets, whether the two models share a tokenizer or not.

Knows which of the two cases it is, and what fits the models' contexts; nothing of training.
A third case would be a third class with the methods of `SameTokenizer`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from conch_dna.errors import ConchError, number_of
from conch_dna.language_model import ModelSource
from conch_dna.metrics import FEWEST_EXAMPLES
from conch_dna.screen.progress import Report, silent
from conch_dna.training.batches import (
    Example,
    ExampleBatches,
    PairedExample,
    first_counted,
    read_by_teacher,
)
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
from conch_dna.training.data.outcomes import TargetIdentity, target_identity
from conch_dna.training.data.records import (
    TOKENS,
    Record,
    counted_bytes,
    fitting,
    numbered,
    record_tokens,
    split_heldout,
    tokenize_record,
    with_answer,
)
from conch_dna.training.data.sampled_targets import DrawnTargetCache, SampledTargets, drawn_identity
from conch_dna.training.data.soft_targets import SoftTargetCache, Targets
from conch_dna.training.data.views import differs, view, with_systems
from conch_dna.training.distillation import domain_system
from conch_dna.training.machines.far.teacher import ServedTeacher
from conch_dna.training.settings import STUDENT, TEACHER, KDConfig

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
        test: Examples of a test set, which are measured once, at the end.
        own_heldout: What is held out was given, and is no share of the records.
    """

    train: list[Any]
    heldout: list[Any]
    train_records: list[Record]
    heldout_records: list[Record]
    test: list[Any] = field(default_factory=list)
    own_heldout: bool = False

    def read(self, config: KDConfig) -> list[Any]:
        """The examples whose targets a run will read, each once, in the order of their use.

        Cross-entropy alone needs the teacher for what is held out only.

        Raises:
            ConchError: The training examples cannot fill one batch.
        """
        stream = ExampleBatches(self.train, config.batch_size, seed=config.seed)
        batches = config.given_batches if config.alpha > 0 else 0
        return [*self.heldout, *self.test, *stream.drawn(batches)]


class Examples:
    """Makes examples and targets of records for a pair of models.

    Args:
        teacher: Its tokenizer is used, not its weights.
        student: The same of the student.
        config: How texts are cut, held out and compared, and what each side reads before them.
        domain: Whose system prompt that may be.
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
        domain: str = "",
        report: Report = silent,
        across: str | None = None,
    ) -> None:
        self.teacher = teacher
        self.student = student
        self.config = config
        self.domain = domain
        self.report = report
        same = same_tokens(token_bytes(teacher.tokenizer), token_bytes(student.tokenizer))
        self.alignment = resolve_alignment(across or config.alignment, same=same)
        if same and config.alignment != AUTO:
            self._message(
                f"both tokenizers are the same: tokens are compared by index, which is what "
                f"--alignment {config.alignment} comes to"
            )

    def make(
        self, records: Sequence[Record], names: Sequence[str] | None = None
    ) -> tuple[list[int], list[Any]]:
        """Tokenize records, and align them where the tokenizers differ.

        Args:
            records: In one of the three forms.
            names: What messages call them; "example 1" and so on by default.

        Returns:
            Indices of the records that are kept, and their examples.

        Raises:
            ConchError: A record is too long for a model or --max-seq-length and not to be left
                out, or less than half of the tokens could be aligned.
        """
        named = list(zip(records, names or numbered(records), strict=True))
        self._require_answers_only(named)
        examples = [self._example(record, name) for record, name in named]
        of_teacher = list(map(read_by_teacher, examples))
        contexts = self.student.context_length, self.teacher.context_length
        if all(one is other for one, other in zip(examples, of_teacher, strict=True)):
            kept = self._fitting(examples, contexts)
        else:
            kept = self._fitting(examples, contexts[:1])
            longer = self._fitting([of_teacher[index] for index in kept], contexts[1:])
            kept = [kept[i] for i in longer]
        if self.alignment == INDEX:
            return kept, [examples[index] for index in kept]
        return self._covered(kept, examples)

    def of_rollouts(self, records: Sequence[Record], number: int) -> tuple[list[Any], int]:
        """Examples of the student's own answers, and how many of them the teacher cannot read.

        Args:
            records: Of `on_policy.questions`.
            number: Of their round, for the message.

        Raises:
            ConchError: It can read none of them.
        """
        examples, reason = [], "it has no token that can be compared"
        contexts = self.student.context_length, self.teacher.context_length
        for record in records:
            try:
                # Any of them may be what no template keeps, or no tokenizer spells.
                example = self._example(record, "an answer of the student")
                for side, context in zip(
                    (example, read_by_teacher(example)), contexts, strict=True
                ):
                    fitting([side], min(context or self.longest, self.longest))
            except ConchError as error:
                reason = str(error)
                continue
            if not isinstance(example, AlignedExample) or len(example.chunks):
                examples.append(example)
        if not examples:
            raise ConchError(f"round {number}: the teacher can read none of the answers: {reason}")
        return examples, len(records) - len(examples)

    def as_read(self, records: Sequence[Record]) -> list[Record]:
        """Records with the system prompts that teacher and student read; see `views.with_systems`.

        Once they have them, they keep them.
        """
        system = domain_system(self.domain)
        return [with_systems(record, self.config, system) for record in records]

    def _require_answers_only(self, named: Sequence[tuple[Record, str]]) -> None:
        """Refuse to compare prompts where the teacher reads others."""
        apart = next((name for record, name in named if differs(record)), None)
        if apart and self.config.train_on_prompt:
            raise ConchError(
                f"{apart} has another prompt for the teacher than for the student, so that only "
                "its answer can be compared: leave out --train-on-prompt"
            )

    @property
    def longest(self) -> int:
        """Most tokens of an example, whatever a model's context is."""
        return self.config.max_seq_length

    @cached_property
    def _aligner(self) -> RecordAligner:
        return RecordAligner(
            self.teacher, self.student, train_on_prompt=self.config.train_on_prompt
        )

    def _example(self, record: Record, name: str) -> Any:
        """A record as the tokens of both models, none of which is without a row."""
        tokenizer = self.student.tokenizer
        example: Example
        if self.alignment != INDEX:
            example = self._aligner.align(record, name)
        elif differs(record):
            example = paired_example(record, tokenizer, name=name)
        else:
            example = tokenize_record(
                view(record, STUDENT, template=tokenizer.has_chat_template, name=name),
                tokenizer,
                name=name,
                train_on_prompt=self.config.train_on_prompt,
                vocabulary=vocabulary_digest(tokenizer),
            )
        self.student.require_rows(example.ids, name)
        self.teacher.require_rows(read_by_teacher(example).ids, name)
        return example

    def split(
        self,
        records: Sequence[Record],
        *,
        valid: Sequence[Record] = (),
        test: Sequence[Record] = (),
    ) -> Split:
        """Tokenize records and hold a share of them out, or take others to judge by.

        Args:
            records: To train on.
            valid: Held out, instead of a share of the others.
            test: To be measured once, at the end.

        Raises:
            ConchError: See `make` and `records.split_heldout`; or no validation or test example is
                short enough.
        """
        given = {"example": records, "validation example": valid, "test example": test}
        sets = {noun: self.as_read(rows) for noun, rows in given.items()}
        names = [name for noun, rows in sets.items() for name in numbered(rows, noun)]
        everything = [record for rows in sets.values() for record in rows]
        indices, examples = self.make(everything, names)
        made: dict[str, list[tuple[Any, Record]]] = {noun: [] for noun in sets}
        for index, example in zip(indices, examples, strict=True):
            noun = names[index].rpartition(" ")[0]
            made[noun].append((example, everything[index]))
        for noun, rows in sets.items():
            if rows and not made[noun]:
                raise ConchError(f"all of {number_of(len(rows), noun)} were left out: shorten them")
        train, heldout = made["example"], made["validation example"]
        if not valid:
            kept = [record for _, record in train]
            parts = split_heldout(kept, self.config.val_fraction, seed=self.config.seed)
            train, heldout = ([made["example"][index] for index in part] for part in parts)
        return Split(
            [example for example, _ in train],
            [example for example, _ in heldout],
            [record for _, record in train],
            [record for _, record in heldout],
            [example for example, _ in made["test example"]],
            own_heldout=bool(valid),
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
        longest = min([self.longest, *(c for c in contexts if c)])
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
                of_teacher = read_by_teacher(example)
                behind = first_counted(of_teacher) - first_counted(example)
                teacher.append(of_teacher.ids[: length + behind].tolist())
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

    def identity(
        self, *, with_digests: bool = True, also_at: Iterable[float] = ()
    ) -> TargetIdentity:
        """What is stored of the teacher; see `soft_targets.target_identity`."""
        soft = self.alignment == INDEX or KINDS[self.alignment].keeps_outcomes
        return target_identity(
            self.teacher,
            top_k=self.config.top_k if soft else 0,
            temperature=self.config.temperature,
            also_at=also_at,
            student=self.student if self.alignment == INDEX else None,
            bits=self.config.target_bits,
            with_digests=with_digests,
        )

    def trained_identity(self, *, with_digests: bool = True) -> TargetIdentity:
        """What is stored of what is trained on: `identity`, or `drawn_identity`."""
        identity = self.identity(with_digests=with_digests)
        if self.config.targets == "sampled":
            identity = drawn_identity(identity, self.config, by_index=self.alignment == INDEX)
        if isinstance(self.teacher, ServedTeacher):
            self.teacher.require_outcomes(identity, self.config)
        return identity

    def targets(
        self,
        folder: Path,
        *,
        also_at: Iterable[float] = (),
        report: Report | None = None,
        split: "Split | None" = None,
    ) -> Targets:
        """The teacher's targets, cached in a folder, for examples that `make` made.

        Args:
            folder: Of the cache.
            also_at: Other temperatures than the configuration's at which they are to be exact.
            report: Gets their progress, instead of the one that all has.
            split: Which examples are trained on; without it none of them is drawn.
        """
        config, identity = self.config, self.identity(also_at=also_at)
        options: dict[str, Any] = {"memory": config.loss_memory, "report": report or self.report}
        cache = SoftTargetCache(folder, identity, **options)
        if split and config.targets == "sampled":
            drawn = DrawnTargetCache(folder, self.trained_identity(), **options)
            return SampledTargets(cache, drawn, split.train, [*split.heldout, *split.test])
        if self.alignment == INDEX:
            return cache
        return KINDS[self.alignment](cache, self.teacher, self.student)


def paired_example(record: Record, tokenizer: Any, *, name: str) -> PairedExample:
    """A record whose answers are the same tokens behind the prompts of two models.

    Args:
        record: See `views.differs`.
        tokenizer: Of both.
        name: What messages call it.

    Raises:
        ConchError: See `records.record_tokens` and `views.view`.
    """
    exact = record.get(TOKENS)
    known = isinstance(exact, dict) and exact.get("vocabulary") == vocabulary_digest(tokenizer)
    plain = {key: value for key, value in record.items() if key != TOKENS}
    if known:
        # Only the prompt is rendered: what a model said may be what no template keeps.
        plain = with_answer(plain, "?")
    sides = []
    for side in (TEACHER, STUDENT):
        read = view(plain, side, template=tokenizer.has_chat_template, name=name)
        sides.append(record_tokens(read, tokenizer, name=name))
    (teacher, spans), _ = sides
    answers = [teacher[start:end] for start, end in spans]
    if exact and known:
        answers = [list(exact["ids"][exact["prompt_length"] :])]
    examples = []
    for ids, spans in sides:
        joined: list[int] = []
        counted: list[bool] = []
        last = 0
        for (start, end), answer in zip(spans, answers, strict=True):
            joined += [*ids[last:start], *answer]
            counted += [False] * (start - last) + [True] * len(answer)
            last = end
        counted[0] = False
        examples.append(Example(np.asarray(joined, np.int32), np.asarray(counted), name))
    text_bytes = counted_bytes(record, train_on_prompt=False)
    of_teacher, own = examples
    return PairedExample(own.ids, own.counted, name, text_bytes, teacher=of_teacher)


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


def data_warnings(
    train: int, heldout: int, config: KDConfig, *, own_heldout: bool = False
) -> list[str]:
    """What is to be feared of so few examples, a sentence each.

    Args:
        train: Examples to train on.
        heldout: Examples held out.
        config: How many of them are read.
        own_heldout: They were given, and are no share of the data.
    """
    drawn = config.examples_read
    warnings = []
    if heldout < FEWEST_EXAMPLES:
        warnings.append(
            f"{number_of(heldout, 'held-out example')} cannot show a gain, it takes "
            f"{FEWEST_EXAMPLES}: give "
            + ("more --valid-data" if own_heldout else "more data, or a higher --val-fraction")
        )
    if drawn > MOST_EPOCHS * train:
        warnings.append(
            f"each of {number_of(train, 'example')} is read {drawn / max(1, train):.1f} times, "
            "which often makes a student worse: give more data, or fewer --iters"
        )
    return warnings
