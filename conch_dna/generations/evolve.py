"""One generation: learn from two frozen teachers, be measured, and be promoted or archived.

Ties the rooms of this part together for a line; knows what happens when, and what a kill leaves
behind. How a child learns is in train_child.py, how it is judged in promotion.py.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import partial
from typing import Any

import mlx.core as mx

from conch_dna.checkpoints import (
    content_digest,
    differences,
    numbered_folders,
    read_json,
    remove_folder,
    remove_unfinished,
    require_keys,
    write_folder,
    write_json,
)
from conch_dna.errors import ConchError, NotWholeError
from conch_dna.generations.data import (
    GenerationData,
    base_digests,
    data_digest,
    gather,
    record_files,
)
from conch_dna.generations.laws import violations
from conch_dna.generations.line import MANIFEST_FILE, Line, folder_digest, read_manifest
from conch_dna.generations.manifest import (
    METRICS_FILE,
    Outcome,
    make_manifest,
    models_of,
    outcome_of,
    settings_digest,
)
from conch_dna.generations.promotion import Measures, gate_verdicts, measure, tone_drift
from conch_dna.generations.self_taught import (
    self_taught_data,
    train_self_taught,
    written_down,
)
from conch_dna.generations.settings import SDFT, TWO_TEACHERS, EvolveConfig
from conch_dna.generations.tables import draw_learning
from conch_dna.generations.taboo import TabooTokens
from conch_dna.generations.train_child import (
    Teacher,
    TrainedChild,
    filled_cache,
    teacher_examples,
    train_child,
)
from conch_dna.generations.two_teachers import TeacherCache, TwoTeacherTargets
from conch_dna.language_model import LanguageModel, ModelSource
from conch_dna.screen.progress import Report, silent
from conch_dna.training.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    load_verified,
    require_trainable,
    save_adapter,
)
from conch_dna.training.chats.templates import dated
from conch_dna.training.data.answers import openings
from conch_dna.training.data.examples import Examples
from conch_dna.training.data.records import Record
from conch_dna.training.data.sources import with_demonstrations
from conch_dna.training.runs.report import draw_curve
from conch_dna.training.runs.run_file import holds_answers
from conch_dna.training.trainer import CHECKPOINT_PREFIX

SAMPLES_FILE = "samples.json"
LOG_FILE = "training_log.json"
REPORT_FILE = "report.png"
RUN_FILE = "run.json"
WORK = "work-"
TARGETS = "soft_targets"
# What was learned from, the child, its parent's measures, and what nobody may teach.
Learned = tuple[GenerationData, TrainedChild, Measures, TabooTokens | None]


class Evolution:
    """The stages of one generation; `run` calls them, holding the line's lock.

    Args:
        line: An existing one.
        records: New data.
        config: Settings of the generation.
        report: Gets the events of the run.
    """

    def __init__(
        self, line: Line, records: Sequence[Record], config: EvolveConfig, report: Report
    ) -> None:
        self.line = line
        shown = {"data": list(records)}
        self.records = with_demonstrations(shown, config.demonstrations or None)["data"]
        self.config = config
        self.report = report

    def run(self, *, resume: bool = False, overwrite: bool = False) -> Outcome:
        """The whole step, from data to HEAD.

        Args:
            resume: Go on with an unfinished run of the same data and settings.
            overwrite: Start again over an unfinished one.

        Raises:
            ConchError: The line was altered, the data are of no use, or an unfinished run lies
                there that is neither to be resumed nor overwritten.
            Interrupted: Ctrl-C in training; its state was saved.
        """
        line, config = self.line, self.config
        with line.lock():
            for text in line.recover():
                self._message(text)
            self.work = line.folder / f"{WORK}{line.next_name}"
            self.parent = line.head
            self._require_whole()
            ancestors = line.ancestors(self.parent)
            self.grandparent = None
            if config.method == TWO_TEACHERS and config.critic and ancestors:
                self.grandparent = ancestors[0]
            self.chain = [self.parent, *ancestors]
            self._read_base()
            self.teachers = self._teachers()
            require_trainable(self.base, config.training, start=line.adapter(self.parent))
            if resume and (finished := self._finished()) is not None:
                return finished
            if (judged := self._judged()) is not None:
                return judged
            self._begin(resume=resume, overwrite=overwrite)
            learn = self._taught_by_itself if config.method == SDFT else self._taught_by_teachers
            return self._finish(*learn(ancestors, resume=resume))

    def _taught_by_teachers(self, ancestors: list[str], *, resume: bool) -> Learned:
        """Targets of parent and grandparent, and the child that learns from them."""
        line, config = self.line, self.config
        if len(self.teachers) == 1:
            why = "is the first generation" if not ancestors else "teaches alone, as was asked"
            self._message(f"{self.parent} {why}: there is one teacher")
        own = Examples(self._source(self.parent), self.base, config.training, report=self.report)
        foreign = {each.role: each.examples for each in self.teachers if each.foreign}
        # What templates write must be the same in a resumed run.
        with dated(self._begun):
            data = gather(line, self.chain, own, self.records, config, foreign=foreign)
        targets, parent = self._ask_teachers(data)
        child = train_child(
            self.base,
            line.adapter(self.parent),
            data,
            targets,
            config,
            self.work,
            # Checkpoints of a run that is not to be resumed are gone.
            resume=resume,
            report=self.report,
        )
        return data, child, parent, targets.taboo

    def _taught_by_itself(self, ancestors: list[str], *, resume: bool) -> Learned:
        """The child's own answers, scored by its parent that reads more."""
        line, config = self.line, self.config
        source = self._source(self.parent)
        examples = Examples(source, self.base, config.distillation, report=self.report)
        with dated(self._begun):
            records = examples.as_read(self.records)
            data = gather(line, self.chain, examples, records, config, foreign={})
            learned = self_taught_data(examples, data, line.folder / TARGETS, self.report)
        parent = self._measure_parent(source, data)
        source.release()
        child = train_self_taught(
            examples,
            line.adapter(self.parent),
            learned,
            config.ema_decay,
            self.work,
            resume=resume,
            report=self.report,
        )
        return data, child, parent, None

    def _message(self, text: str) -> None:
        self.report("message", {"message": text})

    def _phase(self, name: str) -> None:
        self.report("phase", {"name": name, "total": 0, "unit": ""})

    # Who takes part.

    def _require_whole(self) -> None:
        problems = self.line.problems()
        if problems:
            raise NotWholeError(
                f"line {self.line.name!r} is not as it was written: {'; '.join(problems)}. "
                "Nothing grows from it until that is mended"
            )

    def _read_base(self) -> None:
        recorded = self.line.base(self.parent)
        model_id = recorded.pop("model")
        self.base = ModelSource(model_id, trust_remote_code=self.config.training.trust_remote_code)
        if changed := differences(recorded, base_digests(self.base)):
            raise NotWholeError(
                f"the base model {model_id} is another than the line began with: "
                f"{'; '.join(changed)}"
            )

    def _source(self, name: str) -> ModelSource:
        return ModelSource(
            self.base.model_id,
            trust_remote_code=self.base.trust_remote_code,
            adapter=self.line.adapter(name),
        )

    def _teachers(self) -> list[Teacher]:
        """One or two, the first of them first."""
        config, trust = self.config, self.config.training.trust_remote_code
        teachers = []
        for role, name, model in (
            ("parent", self.parent, config.first_teacher),
            ("grandparent", self.grandparent, config.second_teacher if config.critic else ""),
        ):
            if model:
                source = ModelSource(model, trust_remote_code=trust)
            elif name:
                source = self._source(name)
            else:
                continue
            examples = teacher_examples(source, self.base, config.training, self.report)
            teachers.append(
                Teacher(
                    role=role,
                    path=model or str(name),
                    source=source,
                    examples=examples,
                    of_line=not model,
                )
            )
        return teachers

    # What was begun, or judged, before.

    @property
    def _identity(self) -> dict[str, Any]:
        names = {"output_dir", "adapter_subdir", "run", "trust_remote_code", "force"}
        settings = self.config.to_json()
        training = {k: v for k, v in settings.pop("training").items() if k not in names}
        # As JSON gives it back, where there are no tuples.
        plain: dict[str, Any] = json.loads(json.dumps({**settings, **training}))
        return {
            "parents": {name: folder_digest(self.line.path(name)) for name in self.chain[:2]},
            "models": models_of(self.teachers),
            "data": data_digest(self.records),
            **plain,
        }

    def _finished(self) -> Outcome | None:
        """The outcome of the same request, where it was the last thing that happened."""
        name = self.line.log()[-1].folder
        manifest = self.line.manifest(name)
        request = {"data": data_digest(self.records), "settings": settings_digest(self.config)}
        if "decision" not in manifest or not request.items() <= manifest["digests"].items():
            return None
        self._message(f"{name} is already finished")
        return outcome_of(self.line.path(name))

    def _judged(self) -> Outcome | None:
        """A candidate that a killed run had judged: its promotion or archive is done now.

        Returns:
            Its outcome where it is of the same data and settings; else none, and the line's next
            generation grows from what is HEAD then.
        """
        candidate = self.line.candidate
        if not candidate.is_dir():
            return None
        manifest = read_manifest(candidate)
        require_keys(manifest, candidate / MANIFEST_FILE, needs={"decision": str})
        same = manifest["digests"].get("request") == content_digest(json.dumps(self._identity))
        outcome = self._decide(manifest)
        self._message(f"finished what was judged before: {outcome.name}")
        if same:
            return outcome
        raise ConchError(
            f"a child of other data or settings was judged and is now {outcome.name}: run the "
            "same command again to evolve from what is HEAD now"
        )

    def _begin(self, *, resume: bool, overwrite: bool) -> None:
        """Make the folder of the run, or find the one that is to be resumed as it should be."""
        self.work.mkdir(parents=True, exist_ok=True)
        remove_unfinished(self.work)
        path = self.work / RUN_FILE
        identity = self._identity
        before: dict[str, Any] = {}
        with suppress(NotWholeError):
            before = read_json(path, needs={})
        begun = before.pop("begun", None)
        checkpoints = numbered_folders(self.work, CHECKPOINT_PREFIX)
        if resume and not before:
            self._message("there is no unfinished generation to go on with: a new one begins")
        if before and resume and (changed := differences(before, identity)):
            raise ConchError(
                f"{self.work} was begun with other settings: {'; '.join(changed)}. Resume with the "
                "same ones, or start again with --overwrite"
            )
        if (checkpoints or holds_answers(self.work)) and not (resume or overwrite):
            raise ConchError(
                f"{self.work} holds an unfinished generation: add --resume to go on with it, or "
                "--overwrite to start again"
            )
        if not (resume and before):
            for _, folder in checkpoints:
                remove_folder(folder)
            begun = None
        self._begun = date.today().isoformat()
        with suppress(TypeError, ValueError):
            self._begun = date.fromisoformat(begun or self._begun).isoformat()
        write_json(path, {**identity, "begun": self._begun})

    # Teaching and judging.

    def _ask_teachers(self, data: GenerationData) -> tuple[TwoTeacherTargets, Measures]:
        """The teachers' targets and the parent's measures; each model is loaded once and alone."""
        config = self.config
        parent = None
        caches: list[TeacherCache] = []
        for teacher in self.teachers:
            folder, batch_size = self.line.folder / TARGETS, config.training.batch_size
            caches.append(filled_cache(teacher, data, folder, batch_size, self.report))
            if teacher.of_line and teacher.path == self.parent:
                parent = self._measure_parent(teacher.source, data)
            teacher.source.release()
        if parent is None:
            # Another model teaches in its place.
            source = self._source(self.parent)
            parent = self._measure_parent(source, data)
            source.release()
        taboo = TabooTokens(self.base.tokenizer, config.taboo_words, config.taboo_ids)
        first, second = caches[0], caches[1] if len(caches) > 1 else None
        return TwoTeacherTargets(first, second, self.base, config.blend, taboo), parent

    def _measure_parent(self, source: ModelSource, data: GenerationData) -> Measures:
        self._phase(f"measuring {self.parent}")
        return self._measure(source.resident(), data)

    def _measure(self, model: LanguageModel, data: GenerationData) -> Measures:
        beginnings = openings(data.judged_by, self.config.answers)
        return measure(
            model,
            recall=data.recall,
            generalize=data.heldout,
            prompts=[example.ids[:length].tolist() for example, length in beginnings],
            config=self.config.training,
        )

    def _finish(
        self,
        data: GenerationData,
        trained: TrainedChild,
        parent: Measures,
        taboo: TabooTokens | None,
    ) -> Outcome:
        self._phase("measuring the child")
        training = trained.training
        adapter_config = {
            **trained.adapter_config,
            "model": self.base.openable_name,
            "conch_dna": written_down(self.base, self.config),
        }
        save_adapter(self.work / "candidate", trained.tensors, adapter_config)
        model = load_verified(self.base, self.work / "candidate", trained.tensors)
        child = self._measure(model, data)
        model.release()
        decode = self.base.tokenizer.decode
        reference = [decode(each.ids[each.counted].tolist()) for each in data.judged_by]
        broken = violations(self.config.laws, child.answers)
        drift = tone_drift(child.answers, parent.answers, reference)
        answers_that_break = len({violation.answer for violation in broken})
        scores: dict[str, dict[str, Any]] = {
            "child": {**child.scores, "tone_drift": drift, "law_violations": answers_that_break},
            "parent": parent.scores,
        }
        verdicts = gate_verdicts(scores["child"], scores["parent"], self.config.gates)
        manifest = make_manifest(
            self.line,
            (self.parent, self.grandparent),
            self.teachers,
            self.config,
            data,
            verdicts,
            request=self._identity,
        )
        metrics = {
            "child": child.to_json(taboo, self.base.tokenizer),
            "parent": parent.to_json(taboo, self.base.tokenizer),
            "tone_drift": drift,
            "law_violations": [asdict(violation) for violation in broken],
            "scores": scores,
            "best_step": training.best_step,
            "skipped_steps": training.skipped_steps,
            "peak_memory_bytes": mx.get_peak_memory(),
            **({"rounds": trained.rounds} if trained.rounds else {}),
        }
        title = f"{self.parent}'s child: what taught it"
        drawn: dict[str, Any] = {"history": training.history, "best": training.best_step}
        draw = partial(draw_learning, **drawn, title=title, teachers=len(self.teachers))
        if self.config.method == SDFT:
            draw = partial(draw_curve, **drawn, title=title)
        write_folder(
            self.line.candidate,
            arrays={ADAPTER_FILE: trained.tensors},
            documents={
                ADAPTER_CONFIG: adapter_config,
                MANIFEST_FILE: manifest,
                METRICS_FILE: metrics,
                SAMPLES_FILE: {"child": child.answers, "parent": parent.answers},
                LOG_FILE: training.history,
                **record_files(data.train_records, data.heldout_records),
            },
            writers={REPORT_FILE: draw},
        )
        # The candidate holds all that is needed from here on; see `_judged`.
        return self._decide(manifest)

    def _decide(self, manifest: dict[str, Any]) -> Outcome:
        if self.work.is_dir():
            remove_folder(self.work)
        act = self.line.promote if manifest["decision"] == "promoted" else self.line.archive
        return outcome_of(self.line.path(act(self.line.candidate)))


@dataclass(frozen=True)
class TeacherStudentTrainer:
    """Grows generations with the same settings.

    Attributes:
        config: Settings of each generation.
        report: Gets the events of the runs.
    """

    config: EvolveConfig = field(default_factory=EvolveConfig)
    report: Report = silent

    def train(
        self,
        line: Line,
        records: Sequence[Record],
        *,
        resume: bool = False,
        overwrite: bool = False,
    ) -> Outcome:
        """Grow one generation on a line.

        Args:
            line: Begun with `init_line`.
            records: New data, as `distill` takes them.
            resume: Go on with an unfinished run of the same data and settings.
            overwrite: Start again over an unfinished one.

        Raises:
            ConchError: The line was altered, the data are of no use, or an unfinished run lies
                there that is neither to be resumed nor overwritten.
        """
        evolution = Evolution(line, records, self.config, self.report)
        return evolution.run(resume=resume, overwrite=overwrite)


def train_generation_with_teachers(
    line: Line,
    records: Sequence[Record],
    config: EvolveConfig | None = None,
    *,
    report: Report = silent,
    resume: bool = False,
    overwrite: bool = False,
) -> Outcome:
    """One generation, from data to HEAD or the archive, as `TeacherStudentTrainer.train` makes it.

    Args:
        line: Begun with `init_line`.
        records: New data, as `distill` takes them.
        config: Settings of the generation; the defaults without any.
        report: Gets the events of the run.
        resume: Go on with an unfinished run of the same data and settings.
        overwrite: Start again over an unfinished one.
    """
    trainer = TeacherStudentTrainer(config or EvolveConfig(), report)
    return trainer.train(line, records, resume=resume, overwrite=overwrite)
