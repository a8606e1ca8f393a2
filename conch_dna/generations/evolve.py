"""One generation: learn from two frozen teachers, be measured, and be promoted or archived.

Ties the floors below together for a line; knows what happens when, and what a kill leaves behind.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from conch_dna.checkpoints import (
    differences,
    numbered_folders,
    remove_unfinished,
    write_folder,
    write_json,
)
from conch_dna.digests import content_digest
from conch_dna.errors import ConchError, NotWholeError
from conch_dna.generations.data import (
    DATA_FILE,
    HELDOUT_FILE,
    Material,
    base_digests,
    data_digest,
    gather,
    json_lines,
)
from conch_dna.generations.foreign_teacher import examples_for
from conch_dna.generations.laws import violations
from conch_dna.generations.line import MANIFEST_FILE, Line, folder_digest
from conch_dna.generations.manifest import (
    METRICS_FILE,
    Outcome,
    make_manifest,
    models_of,
    outcome_of,
    settings_digest,
)
from conch_dna.generations.measures import Measured, measure
from conch_dna.generations.promotion import judge, tone_drift
from conch_dna.generations.settings import EvolveConfig
from conch_dna.generations.tables import draw_learning
from conch_dna.generations.train_child import Learned, Teacher, learn, teach
from conch_dna.generations.two_teachers import TwoTeacherTargets
from conch_dna.language_model import LanguageModel, ModelSource
from conch_dna.progress import Report, silent
from conch_dna.training.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    load_verified,
    require_goes_on,
    save_adapter,
)
from conch_dna.training.answers import openings
from conch_dna.training.examples import Examples
from conch_dna.training.records import Record
from conch_dna.training.trainer import CHECKPOINT_PREFIX

SAMPLES_FILE = "samples.json"
LOG_FILE = "training_log.json"
REPORT_FILE = "report.png"
RUN_FILE = "run.json"
WORK = "work-"


@dataclass(frozen=True)
class Taught:
    """What a child was taught, how its parent was measured, and what it learned."""

    targets: TwoTeacherTargets
    parent: Measured
    learned: Learned


class Evolution:
    """The stages of one generation; `run` calls them, holding the line's lock.

    Args:
        line: An existing one.
        records: New data.
        config: See `EvolveConfig`.
        report: See `progress.Report`.
    """

    def __init__(
        self, line: Line, records: Sequence[Record], config: EvolveConfig, report: Report
    ) -> None:
        self.line = line
        self.records = list(records)
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
        line = self.line
        with line.lock():
            for text in line.recover():
                self._message(text)
            self.parent = line.head
            self._require_whole()
            ancestors = line.ancestors(self.parent)
            self.grandparent = ancestors[0] if ancestors and self.config.critic else None
            self.chain = [self.parent, *ancestors]
            self._read_base()
            self.teachers = self._teachers()
            require_goes_on(self.config.training, self._adapter(self.parent))
            if resume and (finished := self._finished()) is not None:
                return finished
            if (judged := self._judged()) is not None:
                return judged
            self.work = line.folder / f"{WORK}{line.next_name}"
            self._begin(resume=resume, overwrite=overwrite)
            if self.grandparent is None and not (self.config.critic and self.config.second_teacher):
                why = "is the first generation" if not ancestors else "teaches alone, as was asked"
                self._message(f"{self.parent} {why}: there is one teacher")
            return self._finish(*self._learn())

    def _message(self, text: str) -> None:
        self.report("message", {"message": text})

    def _phase(self, name: str, total: int = 0, unit: str = "") -> None:
        self.report("phase", {"name": name, "total": total, "unit": unit})

    def _require_whole(self) -> None:
        problems = self.line.problems()
        if problems:
            raise NotWholeError(
                f"line {self.line.name!r} is not as it was written: {'; '.join(problems)}. "
                "Nothing grows from it until that is mended"
            )

    def _read_base(self) -> None:
        first = self.line.manifest(self.chain[-1])
        self.base = ModelSource(
            first["base"]["model"], trust_remote_code=self.config.training.trust_remote_code
        )
        changed = differences(
            {key: value for key, value in first["base"].items() if key != "model"},
            base_digests(self.base),
        )
        if changed:
            raise NotWholeError(
                f"the base model {self.base.model_id} is another than the line began with: "
                f"{'; '.join(changed)}"
            )

    def _source(self, name: str) -> ModelSource:
        return ModelSource(
            self.base.model_id,
            trust_remote_code=self.base.trust_remote_code,
            adapter=self._adapter(name),
        )

    @property
    def _identity(self) -> dict[str, Any]:
        names = {"output_dir", "adapter_subdir", "trust_remote_code"}
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
        digests = manifest["digests"]
        same = (digests.get("data"), digests.get("settings")) == (
            data_digest(self.records),
            settings_digest(self.config),
        )
        if "decision" not in manifest or not same:
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
        manifest = json.loads((candidate / MANIFEST_FILE).read_text(encoding="utf-8"))
        same = manifest["digests"]["request"] == content_digest(json.dumps(self._identity))
        outcome = self._decide(manifest)
        self._message(f"finished what was judged before: {outcome.name}")
        if same:
            return outcome
        raise ConchError(
            f"a child of other data or settings was judged and is now {outcome.name}: run the "
            "same command again to evolve from what is HEAD now"
        )

    def _begin(self, *, resume: bool, overwrite: bool) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        remove_unfinished(self.work)
        path = self.work / RUN_FILE
        identity = self._identity
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            before = None
        checkpoints = numbered_folders(self.work, CHECKPOINT_PREFIX)
        if before and resume and (changed := differences(before, identity)):
            raise ConchError(
                f"{self.work} was begun with other settings: {'; '.join(changed)}. Resume with the "
                "same ones, or start again with --overwrite"
            )
        if checkpoints and not (resume or overwrite):
            raise ConchError(
                f"{self.work} holds an unfinished generation: add --resume to go on with it, or "
                "--overwrite to start again"
            )
        if not (resume and before):
            for _, folder in checkpoints:
                shutil.rmtree(folder)
        write_json(path, identity)
        self.resume = resume

    def _measure(self, model: LanguageModel, material: Material) -> Measured:
        return measure(
            model,
            recall=material.recall,
            generalize=material.heldout,
            prompts=self._prompts(material),
            config=self.config.training,
        )

    def _prompts(self, material: Material) -> list[list[int]]:
        both = [*material.heldout, *material.recall]
        found = openings(both, self.config.answers)
        return [example.ids[:length].tolist() for example, length in found]

    def _learn(self) -> tuple[Material, Taught]:
        """Everything up to the end of training."""
        config = self.config
        own = Examples(self._source(self.parent), self.base, config.training, report=self.report)
        foreign = {each.role: each.examples for each in self.teachers if each.foreign}
        material = gather(self.line, self.chain, own, self.records, config, foreign=foreign)
        cache = self.line.folder / "soft_targets"
        measured: list[Measured] = []

        def measure_parent(source: ModelSource) -> None:
            self._phase(f"measuring {self.parent}")
            measured.append(self._measure(source.resident(), material))

        def before_leaving(teacher: Teacher) -> None:
            if teacher.of_line and teacher.path == self.parent:
                measure_parent(teacher.source)

        targets = teach(
            self.teachers,
            material,
            self.base,
            config,
            cache,
            self.report,
            before_leaving=before_leaving,
        )
        if not measured:
            # Another model teaches in its place.
            source = self._source(self.parent)
            measure_parent(source)
            source.release()
        (parent,) = measured
        learned = learn(
            self.base,
            self._adapter(self.parent),
            material,
            targets,
            config,
            self.work,
            resume=self.resume,
            report=self.report,
        )
        return material, Taught(targets, parent, learned)

    def _teachers(self) -> list[Teacher]:
        """One or two, the first of them first."""
        config = self.config
        found = []
        places = (
            ("parent", self.parent, config.first_teacher),
            ("grandparent", self.grandparent, config.second_teacher if config.critic else ""),
        )
        for role, name, model in places:
            if not (model or name):
                continue
            trust = config.training.trust_remote_code
            source = (
                ModelSource(model, trust_remote_code=trust) if model else self._source(str(name))
            )
            found.append(
                Teacher(
                    role=role,
                    path=model or str(name),
                    source=source,
                    examples=examples_for(source, self.base, config.training, self.report),
                    of_line=not model,
                )
            )
        return found

    def _adapter(self, name: str) -> Path | None:
        path = self.line.path(name)
        return path if (path / ADAPTER_FILE).is_file() else None

    def _finish(self, material: Material, taught: Taught) -> Outcome:
        self._phase("measuring the child")
        training, tensors = taught.learned.training, taught.learned.tensors
        parent = taught.parent
        adapter_config = {**taught.learned.adapter_config, "model": self.base.model_id}
        save_adapter(self.work / "candidate", tensors, adapter_config)
        model = load_verified(self.base, self.work / "candidate", tensors)
        child = self._measure(model, material)
        model.release()
        reference = self._reference(material)
        broken = violations(self.config.laws, child.answers)
        answers_that_break = len({violation.answer for violation in broken})
        child_metrics = {
            "recall": child.recall.top1,
            "generalize": child.generalize.top1,
            "tone_drift": tone_drift(child.answers, parent.answers, reference),
            "law_violations": answers_that_break,
        }
        parent_metrics = {"recall": parent.recall.top1, "generalize": parent.generalize.top1}
        verdicts = judge(child_metrics, parent_metrics, self.config.gates)
        taboo = taught.targets.taboo
        metrics = {
            "child": child.to_json(taboo, self.base.tokenizer),
            "parent": parent.to_json(taboo, self.base.tokenizer),
            "tone_drift": child_metrics["tone_drift"],
            "law_violations": [asdict(violation) for violation in broken],
            "scores": {
                "child": {n: _plain(value) for n, value in child_metrics.items()},
                "parent": {n: _plain(value) for n, value in parent_metrics.items()},
            },
            "best_step": training.best_step,
            "skipped_steps": training.skipped_steps,
            "peak_memory_bytes": mx.get_peak_memory(),
        }
        manifest = make_manifest(
            self.line,
            (self.parent, self.grandparent),
            self.teachers,
            self.config,
            material,
            verdicts,
            request=self._identity,
            data=data_digest(self.records),
        )
        write_folder(
            self.line.candidate,
            arrays={ADAPTER_FILE: tensors},
            documents={
                ADAPTER_CONFIG: adapter_config,
                MANIFEST_FILE: manifest,
                METRICS_FILE: metrics,
                SAMPLES_FILE: {"child": child.answers, "parent": parent.answers},
                LOG_FILE: training.history,
                DATA_FILE: json_lines(material.records[0]),
                HELDOUT_FILE: json_lines(material.records[1]),
            },
            writers={
                REPORT_FILE: partial(
                    draw_learning,
                    history=training.history,
                    title=f"{self.parent}'s child: what taught it",
                    best=training.best_step,
                )
            },
        )
        # The candidate holds all that is needed from here on; see `_judged`.
        shutil.rmtree(self.work)
        return self._decide(manifest)

    def _decide(self, manifest: dict[str, Any]) -> Outcome:
        act = self.line.promote if manifest["decision"] == "promoted" else self.line.archive
        return outcome_of(self.line.path(act(self.line.candidate)))

    def _reference(self, material: Material) -> list[str]:
        decode = self.base.tokenizer.decode
        both = [*material.heldout, *material.recall]
        return [decode(example.ids[example.counted].tolist()) for example in both]


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


class TeacherStudentTrainer:
    """Grows generations with the same settings.

    Args:
        config: See `EvolveConfig`.
        report: See `progress.Report`.
    """

    def __init__(
        self,
        config: EvolveConfig | None = None,
        *,
        report: Report = silent,
    ) -> None:
        self.config = config or EvolveConfig()
        self.report = report

    def train(
        self,
        line: Line,
        records: Sequence[Record],
        *,
        resume: bool = False,
        overwrite: bool = False,
    ) -> Outcome:
        """Grow one generation on a line; see `Evolution.run`."""
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
    """One generation, from data to HEAD or the archive.

    Args:
        line: Begun with `material.init_line`.
        records: New data, as `distill` takes them.
        config: See `EvolveConfig`.
        report: See `progress.Report`.
        resume: Go on with an unfinished run of the same data and settings.
        overwrite: Start again over an unfinished one.

    Raises:
        ConchError: See `Evolution.run`.
    """
    trainer = TeacherStudentTrainer(config, report=report)
    return trainer.train(line, records, resume=resume, overwrite=overwrite)
