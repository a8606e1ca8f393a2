"""One domain's distillation in its folder: answers, targets, training, evaluation, adapter.

Ties the floors below together for one domain; knows what is in memory when, and nothing of other
domains. Each stage leaves on disk what the next one needs, so any of them can be interrupted.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import date, datetime
from itertools import chain
from typing import Any

import mlx.core as mx

from conch_dna.checkpoints import (
    FolderLock,
    content_digest,
    numbered_folders,
    provenance,
    read_json,
    remove_folder,
    remove_unfinished,
    verify_folder,
    write_json,
)
from conch_dna.errors import ConchError, Interrupted, NotWholeError
from conch_dna.language_model import LanguageModel, ModelSource
from conch_dna.metrics import COMPARABLE
from conch_dna.screen.progress import Report
from conch_dna.training.adapters import (
    checkpoint_layers,
    load_verified,
    make_trainable,
    require_trainable,
    save_adapter,
    trained_tensors,
)
from conch_dna.training.batches import PairedExample
from conch_dna.training.chats.templates import dated
from conch_dna.training.data.answers import (
    cached_answer_batch,
    generate_answers,
    sample_draw,
    sample_texts,
    texts_of,
)
from conch_dna.training.data.examples import Examples, data_warnings
from conch_dna.training.data.records import Record, json_lines
from conch_dna.training.data.sources import leak_warnings
from conch_dna.training.distillation import domain_examples
from conch_dna.training.evaluation import (
    HeldoutFigures,
    figures_on,
    judged,
    slices_of,
    teacher_confidence,
    teacher_metrics,
)
from conch_dna.training.runs.breakdown import breakdown
from conch_dna.training.runs.fit_student import fit_student
from conch_dna.training.runs.on_policy.own_answers import (
    answers_of,
    heldout_questions,
    own_answers,
)
from conch_dna.training.runs.on_policy.own_teacher import require_own
from conch_dna.training.runs.on_policy.rounds import questions_for, round_figures
from conch_dna.training.runs.privilege import require_help, require_more, require_more_asked
from conch_dna.training.runs.report import draw_curve, heldout_kd, rise_of, samples_text
from conch_dna.training.runs.run_file import NOT_IDENTITY, RUN_FILE, changes, earlier_run
from conch_dna.training.runs.stages import RunData, Trained
from conch_dna.training.settings import (
    CHECKPOINT_PREFIX,
    KDConfig,
    KDResult,
    domain_folder,
    domain_systems,
    get_kd_adapter_path,
    shared_folder,
)

RESULT_FILE = "kd_result.json"
EVALUATION_FILE = "evaluation.json"
DATA_FILE = "training_data.jsonl"
HELDOUT_FILE = "heldout.jsonl"
FIGURES_FILE = "heldout_figures.json"
CANDIDATE = "candidate"


class DomainRun:
    """The stages of one domain's distillation; call them in their order, holding `lock`.

    Args:
        teacher: Whose distributions are learned; loaded only where something is missing.
        student: Whose adapter is trained; it may have another tokenizer.
        config: Everything else that shapes the run.
        domain: A checked name.
        report: Gets the run's progress.
        begun: The day that chat templates are told, in ISO 8601; today's without any.
    """

    def __init__(
        self,
        teacher: ModelSource,
        student: ModelSource,
        config: KDConfig,
        domain: str,
        report: Report,
        *,
        begun: str | None = None,
    ) -> None:
        self.teacher = teacher
        self.student = student
        self.config = config
        self.domain = domain
        self.report = report
        self.folder = domain_folder(domain, config)
        self.shared = shared_folder(domain, config)
        self.adapter_path = get_kd_adapter_path(domain, config)
        self.examples = Examples(teacher, student, config, domain=domain, report=report)
        self._record: dict[str, Any] = {"begun": begun or date.today().isoformat()}
        self._resume = False

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other processes out of the folder, and out of what the domain's runs share."""
        with ExitStack() as locks:
            for folder in dict.fromkeys((self.shared, self.folder)):
                locks.enter_context(FolderLock(folder))
            yield

    def begin(self, source: object, *, resume: bool, overwrite: bool) -> KDResult | None:
        """Compare with what lies in the folder.

        Args:
            source: The prompts or records of the run, as JSON can hold them; their digest is one
                of the things that must not have changed.
            resume: Go on with a run of the same settings.
            overwrite: Start again over an unfinished one, or replace a finished one.

        Returns:
            The result, if the same run is already finished and is to be resumed.

        Raises:
            ConchError: It was made with other settings, or is there and neither to be resumed nor
                overwritten; or the student cannot be trained so, or its teacher cannot follow it.
        """
        require_trainable(self.student, self.config)
        require_own(self.teacher, self.student, self.config)
        self.examples.trained_identity(with_digests=False)
        if self.teacher.is_weightless and (self.config.on_policy or self.config.own_answers):
            raise ConchError(
                f"{self.teacher.model_id} is a teacher without its weights and cannot score what "
                "a student says: leave out --on-policy and --own-answers, or give the whole one"
            )
        remove_unfinished(self.folder)
        identity = self.identity(source)
        subdir = self.config.adapter_subdir
        run = earlier_run(self.folder, subdir, identity, resume=resume, overwrite=overwrite)
        same_length = run and run["identity"].get("num_iters") == self.config.num_iters
        if run and resume and run["finished"] and same_length and (result := self.read_result()):
            self.report("message", {"message": f"{self.domain} is already finished"})
            return result
        if not resume:
            # Before the new settings are written, or a kill here would mix two runs.
            for _, path in numbered_folders(self.folder, CHECKPOINT_PREFIX):
                remove_folder(path)
        begun = date.today().isoformat()
        if resume and run:
            with suppress(KeyError, TypeError, ValueError):
                begun = date.fromisoformat(run["begun"]).isoformat()
        self._record = {"identity": identity, "adapter": subdir, "begun": begun}
        write_json(self.folder / RUN_FILE, {**self._record, "finished": False})
        self._resume = resume
        return None

    def identity(self, source: object, *, weights: bool = True) -> dict[str, Any]:
        """What must not have changed when the run goes on, with digests of the models or without.

        Args:
            source: As `begin` has it.
            weights: Whether the models' weights are here.
        """
        config = {k: v for k, v in self.config.to_json().items() if k not in NOT_IDENTITY}
        models = {"teacher": self.teacher, "student": self.student}
        return {
            **{role: model.lasting_name for role, model in models.items()},
            **{f"{role}_weights": m.weights_digest for role, m in models.items() if weights},
            "data": content_digest(json.dumps(source))[:16],
            **config,
        }

    def finished(self, source: object) -> KDResult | None:
        """The result, where the same run is finished and its adapter is whole."""
        with suppress(NotWholeError):
            run = read_json(self.folder / RUN_FILE, needs={"identity": dict, "finished": bool})
            if run["finished"] and not changes(run["identity"], self.identity(source)):
                return self.read_result()
        return None

    def require_goes_on(self, source: object, *, weights: bool = True) -> None:
        """Refuse as `begin` does to go on with what lies in the folder; changes nothing.

        Args:
            source: As `begin` has it.
            weights: Whether the models' weights are here, and can be compared too.
        """
        identity = self.identity(source, weights=weights)
        if not weights:
            with suppress(NotWholeError):
                run = read_json(self.folder / RUN_FILE, needs={"identity": dict})
                identity = {
                    **{k: v for k, v in run["identity"].items() if k.endswith("_weights")},
                    **identity,
                }
        subdir = self.config.adapter_subdir
        earlier_run(self.folder, subdir, identity, resume=True, overwrite=False)

    @contextmanager
    def failure_recorded(self) -> Iterator[None]:
        """Writes down why a run that has begun ended without a result; Ctrl-C is no failure."""
        try:
            yield
        except (ConchError, OSError, RuntimeError, MemoryError) as error:
            if not isinstance(error, Interrupted):
                failed = {"finished": False, "failed": str(error) or type(error).__name__}
                # What failed may be the disk.
                with suppress(ConchError):
                    write_json(self.folder / RUN_FILE, {**self._record, **failed})
            raise

    def read_result(self) -> KDResult | None:
        """The result of a finished run; None where there is none, or its adapter is not whole."""
        try:
            verify_folder(self.adapter_path)
            return KDResult(**read_json(self.adapter_path / RESULT_FILE, needs={"domain": str}))
        except (NotWholeError, TypeError):
            return None

    def generate(self, prompts: Sequence[str | Record] | None) -> list[Record]:
        """The teacher's answers to prompts, or to the domain's own examples."""
        prompts = domain_examples(self.domain) if prompts is None else prompts
        systems = domain_systems(self.domain, self.config)
        if self._own_teacher:
            require_more_asked(prompts, systems, self.config)
        self._phase("the teacher answers", len(prompts) * self.config.samples_per_prompt, "prompts")
        with dated(self._record["begun"]):
            return generate_answers(
                self.teacher,
                prompts,
                system=systems[0],
                student_system=systems[1],
                config=self.config,
                folder=self.shared / "answers",
                report=self.report,
            )

    def prepare(
        self,
        records: Sequence[Record],
        *,
        valid: Sequence[Record] = (),
        test: Sequence[Record] = (),
        shared_by: Sequence[KDConfig] = (),
        of_all: bool = False,
    ) -> RunData:
        """Tokenize, split, and compute what is missing of the teacher's targets and samples.

        The teacher is loaded only if something is missing; the caller releases it.

        Args:
            records: To train on; a share of them is held out where nothing else is.
            valid: To be held out.
            test: To be measured once, at the end.
            shared_by: Settings of the runs that will read the same targets instead of this one.
            of_all: Targets of all examples, also of those that this run's steps do not reach.
        """
        config = self.config
        records = self.examples.as_read(records)
        with dated(self._record["begun"]):
            split = self.examples.split(records, valid=valid, test=test)
        if self._own_teacher:
            require_more([*split.train, *split.heldout], config)
        sizes = len(split.train), len(split.heldout)
        warnings = data_warnings(*sizes, config, own_heldout=split.own_heldout)
        warnings += leak_warnings(records, {"validation": valid, "test": test})
        for warning in warnings:
            self.report("message", {"message": f"warning: {warning}"})
        readers = shared_by or [config]
        needed = list(dict.fromkeys(chain.from_iterable(map(split.read, readers))))
        if of_all and config.alpha:
            needed = list(dict.fromkeys([*split.train, *needed]))
        also_at = [reader.temperature for reader in readers]
        targets = self.examples.targets(self.shared / "soft_targets", also_at=also_at, split=split)
        missing = targets.missing(needed)
        if missing:
            tokens = sum(example.count for example in missing)
            self._phase("the teacher's targets", tokens, "tokens")
        targets.fill(self.teacher, needed, batch_size=config.batch_size)
        teacher_prompts, prompts = self.examples.prompts(split.heldout)
        answers = cached_answer_batch(
            self.teacher, self.shared / "answers", teacher_prompts, **sample_draw(config)
        )
        texts = texts_of(self.teacher.tokenizer, teacher_prompts, answers)
        with dated(self._record["begun"]):
            questions = questions_for(readers, split, self.teacher, self.student)
            measured = heldout_questions(config, split, self.student)
        kept = [*split.train_records, *split.heldout_records]
        reasons = dict(Counter(str(r.get("finish_reason", "given")) for r in kept))
        return RunData(records, split, targets, prompts, texts, reasons, questions, measured)

    def train(self, data: RunData) -> Trained:
        """Everything with the student in memory; it is released before this returns."""
        self.report("run", {"folder": str(self.folder), "config": self._provenance()})
        self._phase("evaluating the student")
        student = self.student.load()
        before = self._figures(student, data.split.heldout, data)
        if self._own_teacher:
            require_help(data.split.heldout, data.targets, before, self.config, self.report)
        before_test = self._figures(student, data.split.test, data) if data.split.test else None
        before_texts = sample_texts(student, data.prompts, self.config)
        answers = answers_of(student, data.heldout_questions, self.config)
        adapter_config = make_trainable(student, self.config)
        if self.config.grad_checkpoint:
            checkpoint_layers(student.model)
        self._phase("training", self.config.num_iters, "steps")
        training = fit_student(
            student,
            self.examples,
            data,
            self._figure(before),
            self.folder,
            own_teacher=self._own_teacher,
            resume=self._resume,
            report=self.report,
        )
        self.teacher.release()
        tensors = trained_tensors(student)
        student.release()
        peak = mx.get_peak_memory()
        return Trained(
            before, before_test, before_texts, answers, adapter_config, training, tensors, peak
        )

    @property
    def _own_teacher(self) -> bool:
        """Whether teacher and student are one model."""
        return self.teacher.weights_digest == self.student.weights_digest

    def _figure(self, before: HeldoutFigures) -> str:
        """The held-out figure that the run is judged by: the nearest to KL that there is."""
        if self.config.selected == "cross_entropy":
            return "cross_entropy"
        metrics = before.metrics.to_json()
        return next(name for name in COMPARABLE if metrics[name] is not None)

    def _figures(
        self, student: LanguageModel, examples: Sequence[Any], data: RunData
    ) -> HeldoutFigures:
        return figures_on(student, examples, data.targets, self.config)

    def finish(self, data: RunData, trained: Trained) -> KDResult:
        """Read the adapter back, evaluate what was read, and put the folder in its place."""
        self._phase("evaluating the adapter")
        provenance = self._provenance()
        adapter_config = {**trained.adapter_config, "model": self.student.openable_name}
        adapter_config["conch_dna"] = provenance
        candidate = self.folder / CANDIDATE
        save_adapter(candidate, trained.tensors, adapter_config)
        student = load_verified(self.student, candidate, trained.tensors)
        heldout, test = data.split.heldout, data.split.test
        after = self._figures(student, heldout, data)
        evaluation = self._judged(heldout, trained.before, after, data)
        if trained.before_test:
            after_test = self._figures(student, test, data)
            evaluation["test"] = self._judged(test, trained.before_test, after_test, data)
        after_texts = sample_texts(student, data.prompts, self.config)
        answers = answers_of(student, data.heldout_questions, self.config)
        student.release()
        if answers:
            self._phase("evaluating its own answers")
            evaluation["own_answers"] = own_answers(
                self.examples,
                data.heldout_questions,
                (trained.before_answers, answers),
                candidate,
                self.folder,
                domain=self.domain,
            )
        sure = teacher_confidence(heldout, data.targets)
        evaluation["breakdown"] = breakdown(trained.before.by_token, after.by_token, sure)
        result = self._result(data, trained, evaluation, provenance)
        columns = {
            "teacher": data.teacher_texts,
            "student before": trained.before_texts,
            "student after": after_texts,
        }
        history, best = trained.training.history, trained.training.best_step
        save_adapter(
            self.adapter_path,
            trained.tensors,
            adapter_config,
            documents={
                EVALUATION_FILE: evaluation,
                RESULT_FILE: result.to_json(),
                FIGURES_FILE: {n: pair.tolist() for n, pair in after.by_example.items()},
                "training_log.json": history,
                "samples.md": self._samples(data, columns),
                # With the adapter, so that both are replaced together.
                DATA_FILE: json_lines(data.records),
                HELDOUT_FILE: json_lines(data.split.heldout_records),
            },
            writers={
                "training_curve.png": lambda path: draw_curve(
                    path, history, title=f"{self.domain}: losses", best=best
                ),
            },
        )
        shutil.rmtree(candidate, ignore_errors=True)
        write_json(self.folder / RUN_FILE, {**self._record, "finished": True})
        self.report("result", {"step": self.config.num_iters, "evaluation": evaluation})
        return result

    def _judged(
        self, examples: Sequence[Any], before: HeldoutFigures, after: HeldoutFigures, data: RunData
    ) -> dict[str, Any]:
        teacher, figure = teacher_metrics(examples, data.targets), self._figure(before)
        records = data.split.heldout_records if examples is data.split.heldout else []
        slices = slices_of(examples, records, after, self.config.batch_size)
        found = judged(before, after, teacher, slices, figure=figure, seed=self.config.seed)
        return {**found, "alignment": self.examples.alignment}

    def _result(
        self,
        data: RunData,
        trained: Trained,
        evaluation: dict[str, Any],
        provenance: dict[str, Any],
    ) -> KDResult:
        training, train, heldout = trained.training, data.split.train, data.split.heldout
        best = ("heldout", training.best_step)
        kept = next(row for row in training.history if (row["split"], row["step"]) == best)
        metadata = {
            **provenance,
            "best_step": training.best_step,
            "train_examples": len(train),
            "heldout_examples": len(heldout),
            "test_examples": len(data.split.test),
            "own_heldout": data.split.own_heldout,
            "train_tokens": sum(example.count for example in train),
            "heldout_tokens": sum(example.count for example in heldout),
            "data_digest": content_digest(*(example.digest for example in train)),
            "heldout_digest": content_digest(*(example.digest for example in heldout)),
            "finish_reasons": data.finish_reasons,
            "cache_bytes_per_token": data.targets.identity.bytes_per_token,
            **self.examples.described([*train, *heldout]),
            "peak_memory_bytes": trained.peak_memory_bytes,
            "resumed": training.steps_run < self.config.num_iters,
            "extensions": training.extensions,
            "rise": rise_of(training.history),
            "heldout_kd": heldout_kd(training.history),
            **({"rounds": round_figures(self.folder)} if self.config.on_policy else {}),
        }
        return KDResult(
            domain=self.domain,
            num_samples=len(train) + len(heldout),
            adapter_path=str(self.adapter_path),
            final_kd_loss=kept["kd"],
            final_ce_loss=kept["ce"],
            final_combined_loss=kept["loss"],
            training_time_seconds=training.seconds,
            timestamp=datetime.now().astimezone().isoformat(timespec="seconds"),
            evaluation=evaluation,
            metadata=metadata,
        )

    def _samples(self, data: RunData, columns: dict[str, list[str]]) -> str:
        decode = self.student.tokenizer.decode
        prompts = [decode(prompt, skip_special_tokens=True) for prompt in data.prompts]
        draw = f"temperature {self.config.sampling_temperature:g}, seed {self.config.seed}"
        if any(isinstance(example, PairedExample) for example in data.split.heldout):
            draw += "; the teacher reads more than the prompts that stand here"
        return samples_text(self.domain, prompts, columns, draw=draw)

    def _phase(self, name: str, total: int = 0, unit: str = "") -> None:
        self.report("phase", {"name": f"{self.domain}: {name}", "total": total, "unit": unit})

    def _provenance(self) -> dict[str, Any]:
        return {
            "domain": self.domain,
            "teacher": self.teacher.lasting_name,
            "student": self.student.model_id,
            "teacher_digest": self.teacher.weights_digest,
            "student_digest": self.student.weights_digest,
            "config": self.config.to_json(),
            **provenance(),
        }
