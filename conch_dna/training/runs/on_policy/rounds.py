"""Rounds of rollouts: the student's own answers, drawn, scored by the teacher, and kept on disk.

Knows a student in training, its teacher and a folder; nothing of the loop. Each batch of answers is
on disk as soon as it is there, and a round is what its files say, so that a run that was killed
goes on bit by bit as it would have.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conch_dna.checkpoints import (
    content_digest,
    numbered_folders,
    read_json,
    remove_folder,
    write_json,
)
from conch_dna.errors import ConchError, Interrupted, NotWholeError, number_of
from conch_dna.language_model import LanguageModel, ModelSource, named_arrays
from conch_dna.screen.progress import Report, first_interrupt
from conch_dna.training.batches import Batch, bucketed_batches, first_counted, read_by_teacher
from conch_dna.training.cross_tokenizer.records import AlignedExample
from conch_dna.training.data.answers import answer_batch
from conch_dna.training.data.examples import Examples, Split
from conch_dna.training.data.soft_targets import Targets
from conch_dna.training.runs.on_policy.own_teacher import (
    ROUND_FILE,
    VALUES_FILE,
    OwnTeacher,
    remedy,
)
from conch_dna.training.runs.on_policy.questions import (
    Question,
    questions_of,
    require_room_for_own,
)
from conch_dna.training.runs.on_policy.residency import ONE, parked, same_random_numbers
from conch_dna.training.runs.on_policy.shares import own_batches
from conch_dna.training.runs.run_file import ANSWERS, ROLLOUTS
from conch_dna.training.settings import CHECKPOINT_PREFIX, KDConfig

# By default a round asks all prompts, but no more than so many.
MOST_ROLLOUTS = 64


@dataclass(frozen=True, kw_only=True)
class RoundFigures:
    """What a round came to.

    Attributes:
        round: Its number, from 0.
        step: Steps that were taken when it was drawn.
        rollouts: Answers that were drawn.
        left_out: Those of them that the teacher cannot read.
        tokens: Of all answers.
        ended: How many gave their end of sequence.
        empty: How many of these said nothing before it.
        last_age: Steps between the draw and the last step that uses it.
        rollout_seconds: To draw them, by whatever process did.
        scoring_seconds: To score what this process scored.
    """

    round: int
    step: int
    rollouts: int
    left_out: int
    tokens: int
    ended: int
    empty: int
    last_age: int
    rollout_seconds: float
    scoring_seconds: float


class Rounds:
    """Batches of the student's own answers, a round of them at a time.

    Args:
        student: In training: it answers with its adapter as it is.
        teacher: Scores the answers.
        questions: What may be asked.
        examples: Of teacher and student.
        config: `rollouts`, `rollout_tokens`, `rollout_temperature`, `rollout_reuse` and more.
        folder: Of the run.
        residency: `residency.ONE` or `BOTH`.
        own_teacher: Where the teacher is the student's own model.
        report: Gets progress.

    Raises:
        ConchError: There are fewer prompts than a round asks for, or one leaves no room.
    """

    def __init__(
        self,
        student: LanguageModel,
        teacher: ModelSource,
        questions: Sequence[Question],
        examples: Examples,
        config: KDConfig,
        folder: Path,
        *,
        residency: str,
        own_teacher: OwnTeacher | None = None,
        report: Report,
    ) -> None:
        self.student = student
        self.teacher = teacher
        self.questions = list(questions)
        self.examples = examples
        self.config = config
        self.folder = folder / ROLLOUTS
        self.residency = residency
        self.own_teacher = own_teacher
        self.report = report
        self.size = rollouts_of_a_round(len(self.questions), config)
        require_room_for_own(self.questions, student.source, config)
        self._warned_of_cuts = False
        self._stop = False
        self._sizes: dict[int, int] = {}
        self._current: tuple[int, list[Any], Targets] | None = None

    def place_in_round(self, place: int) -> tuple[int, int, int]:
        """Where batch `place` of all rounds is: its round, its place there, and their number.

        The last round is no larger than the steps need. It stays so where a run later goes on with
        more of them.

        Args:
            place: From 0.
        """
        config, number, first = self.config, 0, 0
        while True:
            left = max(1, config.own_batches - first)
            needed = -(-left // config.rollout_reuse) * config.batch_size
            size = self._recorded_size(number) or min(self.size, needed)
            batches = size // config.batch_size * config.rollout_reuse
            if place < first + batches:
                return number, place - first, batches
            number, first = number + 1, first + batches

    def _recorded_size(self, number: int) -> int:
        """How many answers a round drew that is there already; 0 for one that is to come."""
        if number not in self._sizes:
            with suppress(NotWholeError):
                row = _read_round(self._folder_of(number) / ROUND_FILE)
                if row["rollouts"] >= self.config.batch_size:
                    self._sizes[number] = row["rollouts"]
        return self._sizes.get(number, 0)

    @property
    def digest(self) -> str:
        """Content address of what is asked, and how."""
        asked = [str(question.ids) for question in self.questions]
        config = self.config
        draw = (config.rollout_tokens, config.rollout_temperature, self.size, config.rollout_reuse)
        return content_digest(*asked, str(draw), str(config.seed))

    def batch(self, place: int, *, step: int, last_step: int) -> Batch:
        """Batch `place` as a whole, see `parts`."""
        return self.parts(place, 1, step=step, last_step=last_step)[0]

    def parts(self, place: int, count: int, *, step: int, last_step: int) -> list[Batch]:
        """Batch `place` of the student's own answers, counted over all rounds, in parts.

        Args:
            place: From 0.
            count: Of the parts.
            step: Steps that are taken already.
            last_step: Steps that will have been taken before the round's last batch is used.
        """
        number, within, batches = self.place_in_round(place)
        per_use = batches // self.config.rollout_reuse
        size = per_use * self.config.batch_size
        if self._current is None or self._current[0] != number:
            self._current = None
            asked = self._asked(number)[:size]
            with same_random_numbers(), first_interrupt(self._request_stop):
                examples, targets = self._round(number, asked, step, last_step, begins=within == 0)
            self._current = (number, examples, targets)
            self._stop_where_asked()
        _, examples, targets = self._current
        use, index = divmod(within, per_use)
        # Where some were left out, others are read twice, so that a round has as many batches.
        order = np.resize(np.arange(len(examples)), size)
        lengths = [len(examples[one].ids) for one in order]
        epoch = number * self.config.rollout_reuse + use
        drawn = bucketed_batches(
            lengths, self.config.batch_size, seed=self.config.seed, epoch=epoch
        )
        chosen = [examples[order[one]] for one in drawn[index]]
        temperature = self.examples.temperature
        return [targets.collate(chosen[part::count], temperature) for part in range(count)]

    def _asked(self, number: int) -> list[Question]:
        """The questions of a round: all in turn, in a new order each time."""
        count = len(self.questions)
        asked = []
        for place in range(number * self.size, (number + 1) * self.size):
            turn, within = divmod(place, count)
            order = np.random.default_rng([self.config.seed, turn]).permutation(count)
            asked.append(self.questions[order[within]])
        return asked

    def _round(
        self, number: int, asked: Sequence[Question], step: int, last_step: int, *, begins: bool
    ) -> tuple[list[Any], Targets]:
        folder = self._folder_of(number)
        if begins and self.own_teacher:
            self.own_teacher.follow(folder, self._folder_of(number - 1) if number else None)
        answers, seconds = self._drawn(folder, number, asked, begins=begins)
        drawn = time.perf_counter()
        tokenizer = self.student.tokenizer
        records = [q.answered(tokenizer, a) for q, a in zip(asked, answers, strict=True)]
        examples, left_out = self.examples.of_rollouts(records, number)
        targets = self.examples.targets(folder, report=self._scoring(number, examples))
        if targets.missing(examples):
            if not begins and self.own_teacher:
                self.own_teacher.recall(folder)
            with self._teacher_there():
                targets.fill(self.teacher, examples, batch_size=self.config.batch_size)
            self._stop_where_asked()
        ends = tokenizer.eos_token_ids
        ended = [answer for answer in answers if answer[-1] in ends]
        figures = RoundFigures(
            round=number,
            step=step,
            rollouts=len(answers),
            left_out=left_out,
            tokens=sum(map(len, answers)),
            ended=len(ended),
            empty=sum(len(answer) == 1 for answer in ended),
            last_age=last_step - step,
            rollout_seconds=seconds,
            scoring_seconds=time.perf_counter() - drawn,
        )
        self._keep(folder, figures)
        self._remove_old()
        return examples, targets

    def _request_stop(self) -> None:
        self._stop = True

    def _stop_where_asked(self) -> None:
        """What was drawn and scored so far is kept, and the run goes on with it."""
        if self._stop:
            raise Interrupted

    def _scoring(self, number: int, examples: Sequence[Any]) -> Report:
        """Says how far the teacher is; a run's own progress counts steps meanwhile."""
        total = sum(read_by_teacher(example).count for example in examples)
        done = 0

        def report(event: str, row: dict[str, Any]) -> None:
            nonlocal done
            if event != "advance":
                self.report(event, row)
                return
            done += row["by"]
            text = f"round {number}: {done:,} of {total:,} tokens scored"
            self.report("within", {"text": text})

        return report

    def _folder_of(self, number: int) -> Path:
        return self.folder / f"{number:05d}"

    @contextmanager
    def _teacher_there(self) -> Iterator[None]:
        """Makes room for the teacher, or lends it the student's own model."""
        if self.own_teacher:
            with self.own_teacher.speaking() as model, self.teacher.lent(model):
                yield
        elif self.residency == ONE:
            with parked(self.student, self.config):
                yield
                self.teacher.release()
        else:
            yield

    def _drawn(
        self, folder: Path, number: int, asked: Sequence[Question], *, begins: bool
    ) -> tuple[list[list[int]], float]:
        """The answers of a round, from disk where they are there, and the seconds they took."""
        config = self.config
        state = self._state() if begins else None
        answers: list[list[int]] = []
        seconds = 0.0
        for start in range(0, len(asked), config.generation_batch_size):
            prompts = [q.ids for q in asked[start : start + config.generation_batch_size]]
            path = folder / f"{ANSWERS}{start:05d}.json"
            kept = _kept_answers(path, prompts, state)
            if kept is None:
                if state is None:
                    raise ConchError(
                        f"{path} is not whole, and the adapter that drew it has learned since: "
                        f"{remedy(folder)}"
                    )
                self.student.model.eval()
                began = time.perf_counter()
                drawn = answer_batch(
                    self.student,
                    prompts,
                    max_tokens=config.rollout_tokens,
                    temperature=config.rollout_temperature,
                    seed=(config.seed, number, start),
                )
                kept = drawn, time.perf_counter() - began
                digest = content_digest(str(prompts), str(drawn))
                row = {"state": state, "answers": drawn, "seconds": kept[1], "digest": digest}
                write_json(path, row)
                text = f"round {number}: {start + len(drawn)} of {len(asked)} answers drawn"
                self.report("within", {"text": text})
            answers += kept[0]
            seconds += kept[1]
            self._stop_where_asked()
        return answers, seconds

    def _state(self) -> str:
        """Content address of the adapter as it is."""
        trained = named_arrays(self.student.model.trainable_parameters())
        parts = (np.array(value, copy=False).tobytes() for value in trained.values())
        return content_digest(*parts)

    def _keep(self, folder: Path, figures: RoundFigures) -> None:
        """Write a round's figures once, and say them."""
        path = folder / ROUND_FILE
        try:
            _read_round(path)
            return
        except NotWholeError as error:
            if path.exists():
                text = f"{error}: the figures of round {figures.round} are written again"
                self.report("warning", {"message": text})
        row = asdict(figures)
        write_json(path, {**row, "digest": content_digest(str(row))})
        self.report("message", {"message": round_text(figures)})
        if figures.ended == 0 and not self._warned_of_cuts:
            self._warned_of_cuts = True
            message = (
                f"round {figures.round}: all {figures.rollouts} answers were cut at "
                f"--rollout-tokens {self.config.rollout_tokens}, so that the student learns no end"
            )
            self.report("warning", {"message": message})
        if figures.empty == figures.rollouts:
            message = (
                f"round {figures.round}: the student answers nothing to all "
                f"{number_of(figures.rollouts, 'prompt')}; there is little to learn from that: "
                "begin with a smaller --on-policy share"
            )
            self.report("warning", {"message": message})

    def remove(self) -> None:
        """Remove whatever an earlier run left."""
        if self.folder.is_dir():
            remove_folder(self.folder)

    def _remove_old(self) -> None:
        """Remove what no checkpoint can go on with: rounds before the oldest, but their figures."""
        checkpoints = numbered_folders(self.folder.parent, CHECKPOINT_PREFIX)
        if not checkpoints:
            return
        batches = checkpoints[0][0] * self.config.accumulation_steps
        needed, _, _ = self.place_in_round(own_batches(self.config.on_policy, batches))
        for folder in self.folder.glob("[0-9]*"):
            if folder.name.isdigit() and int(folder.name) < needed:
                # A teacher that follows the student goes on from the round before.
                kept = {ROUND_FILE, *([VALUES_FILE] if int(folder.name) == needed - 1 else ())}
                for path in folder.iterdir():
                    if path.is_dir():
                        remove_folder(path)
                    elif path.name not in kept:
                        path.unlink(missing_ok=True)


def round_figures(folder: Path) -> list[dict[str, Any]]:
    """What every round of a run came to; see `RoundFigures`.

    Args:
        folder: Of the run.
    """
    rows = []
    for path in sorted((folder / ROLLOUTS).glob(f"*/{ROUND_FILE}")):
        with suppress(NotWholeError):
            rows.append(_read_round(path))
    return rows


def _read_round(path: Path) -> dict[str, Any]:
    """The figures of a round, as they were written.

    Raises:
        NotWholeError: They are not there, or altered.
    """
    row = read_json(path, needs={"round": int, "rollouts": int, "digest": str})
    if row.pop("digest") != content_digest(str(row)):
        raise NotWholeError(f"{path} was altered")
    return row


def rollouts_of_a_round(prompts: int, config: KDConfig) -> int:
    """How many answers a round draws, a multiple of the batch.

    Args:
        prompts: Different ones that there are.
        config: `rollouts` (0 for as many as there are prompts, at most 64) and `batch_size`.

    Raises:
        ConchError: There are fewer prompts.
    """
    size = config.batch_size
    wanted = config.rollouts or max(size, min(prompts, MOST_ROLLOUTS) // size * size)
    if wanted > prompts:
        raise ConchError(
            f"a round asks for {wanted} answers to different prompts, and there are {prompts} to "
            "train on: give more prompts, or lower "
            + ("--rollouts" if config.rollouts else "--batch-size")
        )
    return wanted


def questions_for(
    runs: Sequence[KDConfig], split: Split, teacher: ModelSource, student: ModelSource
) -> list[Question]:
    """What the student may be asked for its own answers; nothing where no run learns from them.

    Args:
        runs: The settings of those that share the data.
        split: Of these.
        teacher: For its context.
        student: For its tokenizer and its context.

    Raises:
        ConchError: There are too few prompts for a round, or one leaves no room.
    """
    learners = [config for config in runs if config.on_policy]
    if not learners:
        return []
    names = [example.name for example in split.train]
    questions = questions_of(split.train_records, names, student.tokenizer)
    for config in learners:
        rollouts_of_a_round(len(questions), config)
        require_room_for_own(questions, student, config)
        require_room_to_score(split.train, teacher, config)
    return questions


def require_room_to_score(examples: Sequence[Any], teacher: ModelSource, config: KDConfig) -> None:
    """Refuse prompts behind which the teacher could not read the student's own answers.

    Args:
        examples: Training examples; those of another tokenizer are only known when they are there.
        teacher: For its context.
        config: Longest example, and longest answer.

    Raises:
        ConchError: One is; it is named.
    """
    longest = min(teacher.context_length or config.max_seq_length, config.max_seq_length)
    for example in examples:
        prompt = first_counted(read_by_teacher(example))
        if not isinstance(example, AlignedExample) and prompt + config.rollout_tokens > longest:
            raise ConchError(
                f"the teacher reads {prompt} tokens before the answer of {example.name}; with "
                f"{config.rollout_tokens} of the student's own answer it exceeds {longest}, its "
                "context or --max-seq-length: shorten what it reads, or lower --rollout-tokens"
            )


def round_text(figures: RoundFigures) -> str:
    """A round in one line."""
    speed = figures.tokens / max(figures.rollout_seconds, 1e-9)
    left_out = f", {figures.left_out} left out" if figures.left_out else ""
    return (
        f"round {figures.round} at step {figures.step}: {figures.rollouts} answers of its own"
        f"{left_out}, {figures.ended / figures.rollouts:.0%} ended, {figures.tokens:,} tokens in "
        f"{figures.rollout_seconds:.1f} s ({speed:,.0f} a second), scored in "
        f"{figures.scoring_seconds:.1f} s"
    )


def _kept_answers(
    path: Path, prompts: Sequence[Sequence[int]], state: str | None
) -> tuple[list[list[int]], float] | None:
    """Answers that were drawn before and their seconds; None for none, or none of this state."""
    needs = {"answers": list, "digest": str, "state": str, "seconds": float}
    with suppress(NotWholeError):
        kept = read_json(path, needs=needs)
        whole = kept["digest"] == content_digest(str(list(prompts)), str(kept["answers"]))
        if whole and state in (None, kept["state"]):
            return kept["answers"], kept["seconds"]
    return None
