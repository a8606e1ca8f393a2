"""TRUE knowledge distillation: a teacher's distributions into one LoRA adapter per domain.

Decides which domains run and when the teacher goes, and tells beforehand what a run would do;
knows nothing of how a domain's run works.
Run it: python -m conch_dna.training.true_kd --domain thinking
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from conch_dna.checkpoints import write_atomically, write_json
from conch_dna.errors import ConchError, Interrupted, number_of
from conch_dna.language_model import ModelSource
from conch_dna.loading.output_head import rows_at_once
from conch_dna.losses import compute_ce_loss, compute_kd_loss
from conch_dna.screen.progress import Report, silent
from conch_dna.training.adapters import require_trainable
from conch_dna.training.batches import read_by_teacher
from conch_dna.training.chats.conversations import prompt_ids, require_room
from conch_dna.training.cross_tokenizer.vocabulary import align_vocab_sizes
from conch_dna.training.data.answers import teacher_prompt_ids
from conch_dna.training.data.examples import Examples, data_warnings
from conch_dna.training.data.records import Record, json_lines, numbered, split_heldout
from conch_dna.training.data.sources import leak_warnings
from conch_dna.training.data.target_files import (
    DATA_FOLDER,
    require_replaceable,
    write_data,
    write_weightless,
)
from conch_dna.training.data.views import prompt_text, taught_by
from conch_dna.training.distillation import DOMAIN_PROMPTS, domain_examples
from conch_dna.training.fit.workload import answers_to_come, given_examples
from conch_dna.training.machines.ranks.leading import run_teacher
from conch_dna.training.runs.domain_run import DATA_FILE, DomainRun
from conch_dna.training.runs.on_policy.own_teacher import require_own
from conch_dna.training.runs.on_policy.questions import questions_of, require_room_for_own
from conch_dna.training.runs.on_policy.rounds import require_room_to_score, rollouts_of_a_round
from conch_dna.training.runs.privilege import require_more, require_more_asked
from conch_dna.training.runs.stages import RunData
from conch_dna.training.settings import (
    DEFAULT_STUDENT,
    DEFAULT_TEACHER,
    TEACHER,
    KDConfig,
    KDResult,
    domain_systems,
    get_kd_adapter_path,
    output_folder,
    validate_domain,
)

__all__ = [
    "KDConfig",
    "KDResult",
    "TrueKnowledgeDistiller",
    "align_vocab_sizes",
    "compute_ce_loss",
    "compute_kd_loss",
    "get_kd_adapter_path",
]

SUMMARY_FILE = "kd_summary.json"


class TrueKnowledgeDistiller:
    """Distils a teacher language model into one LoRA adapter of a student per domain.

    The models are loaded lazily, and the teacher's memory is free before the student loads.

    Args:
        teacher_model_id: Hub id, local folder or embedded name; "self" for the student, which
            then has to read more as a teacher.
        student_model_id: The same of the student, which may have another tokenizer.
        config: Everything that shapes a run; the defaults where None.
        report: Gets `(event, row)` of all progress, see `conch_dna.screen.progress.Progress`.
    """

    def __init__(
        self,
        teacher_model_id: str = DEFAULT_TEACHER,
        student_model_id: str = DEFAULT_STUDENT,
        config: KDConfig | None = None,
        *,
        report: Report = silent,
    ) -> None:
        self.teacher_model_id = teacher_model_id
        self.student_model_id = student_model_id
        self.config = config or KDConfig()
        self.report = report

    @property
    def teacher(self) -> ModelSource:
        """The teacher, found on disk or downloaded."""
        return self._models[0]

    @property
    def student(self) -> ModelSource:
        """The student, found on disk or downloaded."""
        return self._models[1]

    @cached_property
    def _models(self) -> tuple[ModelSource, ModelSource]:
        trust = self.config.trust_remote_code
        names = (taught_by(self.teacher_model_id, self.student_model_id), self.student_model_id)
        return (
            run_teacher(names[0], self.config, report=self.report),
            ModelSource(names[1], trust_remote_code=trust, report=self.report),
        )

    def generate_training_data(self, prompts: Sequence[str | Record], domain: str) -> list[Record]:
        """Let the teacher answer prompts in batches, with the domain's system prompt.

        The teacher stays in memory until `train_with_kd` has its targets.

        Args:
            prompts: What to answer: texts, or objects with `prompt` and `context`.
            domain: One of DOMAIN_PROMPTS, or a new name, which has no system prompt.

        Returns:
            Records for `train_with_kd`; also written to training_data.jsonl in mlx-lm's form.

        Raises:
            ConchError: A prompt is too long, or the folder is in use or full.
        """
        run = self._run(domain, with_own_data=True)
        with run.lock():
            records = run.generate(prompts)
            write_atomically(run.folder / DATA_FILE, json_lines(records))
            return records

    def train_with_kd(
        self,
        train_data: Sequence[Record],
        domain: str,
        *,
        valid_data: Sequence[Record] = (),
        test_data: Sequence[Record] = (),
        resume: bool = False,
        overwrite: bool = False,
    ) -> KDResult:
        """Train a fresh adapter on records with the teacher's distributions, and evaluate it.

        Args:
            train_data: Records in one of mlx-lm's forms; a share is held out.
            domain: Names the folder.
            valid_data: Held out, instead of a share of the others.
            test_data: Measured once, at the end.
            resume: See `distill_domain`.
            overwrite: See `distill_domain`.

        Raises:
            ConchError: Bad data, other settings than the run to resume, a full disk, a loss that
                is not finite; see the message.
        """
        return self.distill_domain(
            domain,
            data=train_data,
            valid_data=valid_data,
            test_data=test_data,
            resume=resume,
            overwrite=overwrite,
        )

    def distill_domain(
        self,
        domain: str,
        *,
        prompts: Sequence[str | Record] | None = None,
        data: Sequence[Record] | None = None,
        valid_data: Sequence[Record] = (),
        test_data: Sequence[Record] = (),
        resume: bool = False,
        overwrite: bool = False,
    ) -> KDResult:
        """Do everything for one domain: answers (or your data), targets, training, evaluation.

        Args:
            domain: One of DOMAIN_PROMPTS, or a new name with prompts or data.
            prompts: For the teacher to answer, instead of the domain's examples: texts, or objects
                with `prompt` and what only the teacher reads, its `context`.
            data: Records to train on, instead of the teacher's answers; kept in the adapter's
                folder, since a later retraining replays them.
            valid_data: Records to hold out, instead of a share of the others.
            test_data: Records to measure once, at the end.
            resume: Go on from the newest whole checkpoint; a finished run with more `num_iters`
                too.
            overwrite: Start again although a run lies in the folder; a finished adapter stays
                until the new one takes its place.
        """
        run = self._run(domain, with_own_data=prompts is not None or data is not None)
        with run.lock():
            source = [list(prompts or []), list(data or [])]
            if valid_data or test_data:
                source += [list(valid_data), list(test_data)]
            finished = run.begin(source, resume=resume, overwrite=overwrite)
            if finished:
                return finished
            with run.failure_recorded():
                records = run.generate(prompts) if data is None else data
                run_data = run.prepare(records, valid=valid_data, test=test_data)
                self.teacher.release()
                return run.finish(run_data, run.train(run_data))

    def make_targets(
        self,
        domain: str,
        *,
        prompts: Sequence[str | Record] | None = None,
        data: Sequence[Record] | None = None,
        valid_data: Sequence[Record] = (),
        test_data: Sequence[Record] = (),
        overwrite: bool = False,
    ) -> Path:
        """Make all that a teacher has to say, so that a machine without it can go on.

        Args:
            domain: See `distill_domain`, as the others.
            prompts: For the teacher to answer.
            data: Instead of its answers.
            valid_data: To hold out.
            test_data: To measure at the end.
            overwrite: Replace the data of other targets.

        Returns:
            The domain's folder. In it lie soft_targets and answers; `teacher`, which is the
            teacher without its weights; and the records as the folder `data`.
        """
        run = self._run(domain, with_own_data=prompts is not None or data is not None)
        with run.lock():
            require_replaceable(run.shared / TEACHER)
            run.examples.trained_identity(with_digests=False)
            records = run.generate(prompts) if data is None else data
            made = run.prepare(records, valid=valid_data, test=test_data, of_all=True)
            self.teacher.release()
            sets = {"train": made.records, "valid": valid_data, "test": test_data}
            write_data(run.shared / DATA_FOLDER, sets, overwrite=overwrite)
            write_weightless(self.teacher, run.shared / TEACHER)
        return run.shared

    def distill_all(
        self,
        domains: Sequence[str] | None = None,
        *,
        prompts: Mapping[str, Sequence[str | Record] | None] | None = None,
        resume: bool = False,
        overwrite: bool = False,
    ) -> dict[str, Any]:
        """Distil several domains, the teacher's work for all of them first.

        A domain that fails is reported with its reason, and the others still run.

        Args:
            domains: Names; all of DOMAIN_PROMPTS by default.
            prompts: What the teacher answers, by domain; its own examples where there is nothing.
            resume: Go on with stopped runs, each from its newest whole checkpoint.
            overwrite: Start again over unfinished runs, and replace finished ones.

        Returns:
            `results` by domain and `failures` by domain, as written to kd_summary.json.
        """
        names = list(DOMAIN_PROMPTS if domains is None else domains)
        runs = {name: self._run(name, with_own_data=False) for name in names}
        results: dict[str, KDResult] = {}
        failures: dict[str, str] = {}
        ready: dict[str, RunData] = {}

        def attempt(name: str, work: Callable[[DomainRun], None]) -> None:
            try:
                work(runs[name])
            except Interrupted:
                raise
            except (ConchError, OSError, RuntimeError, MemoryError) as error:
                failures[name] = str(error) or type(error).__name__
                self.report("warning", {"message": f"domain {name} failed: {failures[name]}"})

        def prepare(run: DomainRun) -> None:
            locks.enter_context(run.lock())
            asked = (prompts or {}).get(run.domain)
            finished = run.begin([list(asked or []), []], resume=resume, overwrite=overwrite)
            if finished:
                results[run.domain] = finished
                return
            with run.failure_recorded():
                ready[run.domain] = run.prepare(run.generate(asked))

        def train(run: DomainRun) -> None:
            run_data = ready.pop(run.domain)
            with run.failure_recorded():
                results[run.domain] = run.finish(run_data, run.train(run_data))

        with ExitStack() as locks:
            for name in names:
                attempt(name, prepare)
            self.teacher.release()
            for name in list(ready):
                attempt(name, train)
        summary = {
            "teacher": self.teacher_model_id,
            "student": self.student_model_id,
            "finished": datetime.now().astimezone().isoformat(timespec="seconds"),
            "results": {name: result.to_json() for name, result in results.items()},
            "failures": failures,
        }
        write_json(output_folder(self.config) / SUMMARY_FILE, summary)
        return {"results": results, "failures": failures}

    def _run(self, domain: str, *, with_own_data: bool) -> DomainRun:
        validate_domain(domain, with_own_data=with_own_data)
        return DomainRun(self.teacher, self.student, self.config, domain, self.report)


def plan_domain(
    teacher: ModelSource,
    student: ModelSource,
    config: KDConfig,
    domain: str,
    *,
    prompts: Sequence[str | Record] | None = None,
    data: Sequence[Record] | None = None,
    valid_data: Sequence[Record] = (),
    test_data: Sequence[Record] = (),
) -> dict[str, Any]:
    """Work out what `distill_domain` would do with the same arguments.

    Returns:
        `examples`, `heldout_examples`, `test_examples` (those of a test set are none of the
        `examples`), `counted_tokens` of the teacher (or an upper bound where it has yet to
        answer: `counted_tokens_exact` tells), `longest_example`, `epochs`,
        `own_answers` (`prompts`, `answers` and `rounds`; None where there are none),
        `warnings` of too little data, `disk_bytes` of the soft targets, `teacher_bytes` and
        `student_bytes` of the weights
        (None where they are still on the hub and their size is unknown) and
        `logits_bytes` of one chunk of the loss; `workload`, from which memory and time follow;
        `alignment` and, with another tokenizer and given data, its `coverage`.

    Raises:
        ConchError: As the run itself would.
    """
    batches = config.given_batches if config.alpha > 0 else 0
    validate_domain(domain, with_own_data=prompts is not None or data is not None)
    require_trainable(student, config, weights=False)
    require_own(teacher, student, config)
    pair = Examples(teacher, student, config, domain=domain)
    aligned: dict[str, Any] = {"alignment": pair.alignment}
    if data is not None:
        split = pair.split(data, valid=valid_data, test=test_data)
        examples = [*split.train, *split.heldout]
        if teacher.model_id == student.model_id:
            require_more(examples, config)
        count, heldout_count = len(examples), len(split.heldout)
        read = map(read_by_teacher, split.read(config))
        tokens = sum({example.digest: example.count for example in read}.values())
        aligned = pair.described(examples)
        longest = max(len(example.ids) for example in examples)
        work = given_examples(split, config)
    else:
        prompts = domain_examples(domain) if prompts is None else prompts
        system, of_student = domain_systems(domain, config)
        if teacher.model_id == student.model_id:
            require_more_asked(prompts, (system, of_student), config)
        encoded = [teacher_prompt_ids(teacher.tokenizer, prompt, system) for prompt in prompts]
        for number, ids in enumerate(encoded, 1):
            teacher.require_rows(ids, f"prompt {number}")
        longest = min(teacher.context_length or config.max_seq_length, config.max_seq_length)
        require_room(encoded, answer=config.max_tokens, longest=longest)
        wanted = [
            {"text": prompt_text(each)}
            for each in prompts
            for _ in range(config.samples_per_prompt)
        ]
        judging = pair.as_read([*valid_data, *test_data])
        made = pair.make(judging)[1] if judging else []
        tokens = sum(read_by_teacher(example).count for example in made)
        if valid_data:
            count, heldout_count = len(wanted) + len(valid_data), len(valid_data)
        else:
            _, heldout = split_heldout(wanted, config.val_fraction, seed=config.seed)
            count, heldout_count = len(wanted), len(heldout)
            tokens += heldout_count * config.max_tokens
        longest = max(len(ids) for ids in encoded) + config.max_tokens
        drawn = min(count - heldout_count, batches * config.batch_size)
        tokens += drawn * config.max_tokens
        own = [prompt_ids(student.tokenizer, prompt_text(p), of_student) for p in prompts]
        work = answers_to_come(
            encoded,
            heldout_count + len(test_data),
            drawn,
            config,
            of_student=max(map(len, own)),
        )
    if count - heldout_count < config.batch_size:
        raise ConchError(
            f"{number_of(count - heldout_count, 'training example')} cannot fill one batch of "
            f"{config.batch_size}: give more data or a smaller --batch-size"
        )
    own_answers = None
    if config.on_policy:
        asked = count - heldout_count
        if data is None:
            texts = {prompt_text(prompt) for prompt in prompts or ()}
            asked = len(texts) - (
                0 if valid_data else -(-heldout_count // config.samples_per_prompt)
            )
        else:
            questions = questions_of(split.train_records, numbered(split.train), student.tokenizer)
            require_room_for_own(questions, student, config)
            require_room_to_score(split.train, teacher, config)
            asked = len(questions)
        size = rollouts_of_a_round(asked, config)
        drawn = -(-config.own_batches // config.rollout_reuse) * config.batch_size
        tokens += drawn * config.rollout_tokens
        own_answers = {"prompts": asked, "answers": drawn, "rounds": -(-drawn // size)}
    # The digests are not needed for the size, so no weights have to be there.
    identity = pair.trained_identity(with_digests=False)
    width = max(teacher.token_count, student.token_count)
    rows = min(rows_at_once(config.loss_memory, width), config.batch_size * longest)
    return {
        "domain": domain,
        "teacher": teacher.model_id,
        "student": student.model_id,
        "data": "given" if data is not None else "answers of the teacher",
        "examples": count,
        "heldout_examples": heldout_count,
        "counted_tokens": tokens,
        "counted_tokens_exact": data is not None and not config.on_policy,
        "longest_example": longest,
        "epochs": config.examples_read / max(1, count - heldout_count),
        "own_answers": own_answers,
        "disk_bytes": tokens * identity.bytes_per_token,
        "teacher_bytes": teacher.weight_bytes,
        "student_bytes": student.weight_bytes,
        "logits_bytes": 4 * rows * width,
        "workload": work,
        "test_examples": len(test_data),
        "warnings": [
            *data_warnings(
                count - heldout_count, heldout_count, config, own_heldout=bool(valid_data)
            ),
            *leak_warnings(data or [], {"validation": valid_data, "test": test_data}),
        ],
        **aligned,
    }


if __name__ == "__main__":
    from conch_dna.__main__ import run

    run("conch_dna.training.cli", "distill", name="python -m conch_dna.training.true_kd")
