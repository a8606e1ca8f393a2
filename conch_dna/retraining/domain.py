"""One domain's retraining: an evolution of its line of generations, by what was recorded.

Knows a line, the batch that is under way and which experience every version learned from; gates,
training and the archive are the line's. Another part of a settings file needs nothing here: it is
read as `EvolveConfig.from_manifest` reads it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from conch_dna.checkpoints import (
    FolderLock,
    file_digest,
    folder_digests,
    numbered_folders,
    read_json,
    remove_unfinished,
    require_keys,
    verify_folder,
    write_json,
)
from conch_dna.ego.settings import is_endpoint
from conch_dna.errors import ConchError
from conch_dna.generations.data import (
    DATA_FILE,
    HELDOUT_FILE,
    data_digest,
    earlier_records,
    init_line,
)
from conch_dna.generations.evolve import WORK, train_generation_with_teachers
from conch_dna.generations.line import HEAD_FILE, Line, now
from conch_dna.generations.manifest import Outcome
from conch_dna.generations.promotion import GateVerdict
from conch_dna.generations.settings import MAPPINGS, EvolveConfig
from conch_dna.language_model import ModelSource
from conch_dna.options.fields import named_settings
from conch_dna.retraining.adapter_config import adapter_config, shape_of, student_name, written_down
from conch_dna.retraining.lessons import EXPERIENCE, Lessons
from conch_dna.screen.progress import Report
from conch_dna.training.adapters import ADAPTER_CONFIG, ADAPTER_FILE
from conch_dna.training.data.records import Record, read_records
from conch_dna.training.runs.domain_run import DATA_FILE as TRAINING_DATA
from conch_dna.training.settings import (
    EXPERIENCE_FOLDER,
    LINES,
    SYSTEMS,
    KDConfig,
    domain_systems,
    get_kd_adapter_path,
    validate_domain,
)
from conch_dna.training.trainer import CHECKPOINT_PREFIX

RETRAINING = "retraining"
BATCH_FILE = "batch.json"
LEFT_OUT_FILE = "left_out.json"
UNFIT = "too long for a model, or not to be aligned with the teacher's tokens"


def line_of(adapters_dir: Path, domain: str) -> Line:
    """The versions of a domain's adapter, whether or not there are any yet.

    Raises:
        ConchError: The name is not a plain one, or reserved.
    """
    validate_domain(domain, with_own_data=True)
    return Line(adapters_dir / LINES, domain)


def distillation_folder(adapters_dir: Path, domain: str) -> Path:
    """Where `distill` leaves a domain's adapter, whether or not there is one."""
    return get_kd_adapter_path(domain, KDConfig(output_dir=str(adapters_dir)))


def distillation_settings(adapters_dir: Path, domain: str) -> KDConfig:
    """How a domain was distilled; the defaults where that is not recorded.

    Raises:
        ConchError: The adapter's configuration cannot be read, or has other settings.
    """
    recorded, source = _recorded_settings(adapters_dir, domain)
    return KDConfig.from_json(recorded, source=source)


def _recorded_settings(adapters_dir: Path, domain: str) -> tuple[dict[str, Any], str]:
    """The settings that a distillation wrote down, and where."""
    folder = distillation_folder(adapters_dir, domain)
    document = adapter_config(folder) if folder.is_dir() else {}
    recorded = written_down(document).get("config") or {}
    if not isinstance(recorded, dict):
        raise ConchError(f"{folder / ADAPTER_CONFIG} has no mapping as its config")
    return recorded, str(folder / ADAPTER_CONFIG)


def read_systems(adapters_dir: Path, domain: str) -> tuple[str, str]:
    """The system prompts that a domain's teacher and its adapter read; empty for none.

    Other settings are not looked at: an adapter of another version answers all the same.

    Raises:
        ConchError: The adapter's configuration cannot be read, or one of them is no text.
    """
    recorded, source = _recorded_settings(adapters_dir, domain)
    systems = {name: recorded[name] for name in SYSTEMS.values() if name in recorded}
    return domain_systems(domain, KDConfig.from_json(systems, source=source))


def known_domains(adapters_dir: Path) -> list[str]:
    """Domains with an adapter, distilled or retrained, in the order of their names."""
    distilled = [
        path.name
        for path in adapters_dir.glob("*")
        if path.name not in (LINES, EXPERIENCE_FOLDER)
        and (distillation_folder(adapters_dir, path.name) / ADAPTER_FILE).is_file()
    ]
    retrained = [path.parent.name for path in (adapters_dir / LINES).glob(f"*/{HEAD_FILE}")]
    return sorted({*distilled, *retrained})


def active_adapter(adapters_dir: Path, domain: str) -> Path:
    """The folder of the adapter that a domain answers with.

    That of its line's current generation where it was retrained, else the one that was distilled.

    Raises:
        ConchError: There is neither.
    """
    line = line_of(adapters_dir, domain)
    if line.exists:
        return line.path(line.head)
    path = distillation_folder(adapters_dir, domain)
    if not (path / ADAPTER_FILE).is_file():
        raise ConchError(
            f"there is no adapter of {domain} in {path}: make one with 'conch-dna distill "
            f"--domain {domain}', or name another folder of adapters"
        )
    return path


def teaching_of(ego: str) -> str:
    """Who teaches in a retraining, and by what, in words.

    Args:
        ego: What EGO is called; empty where there is none.
    """
    if not ego:
        return "the recorded texts and the active adapter; there is no EGO"
    if is_endpoint(ego):
        return (
            "the recorded texts, EGO's answers among them, and the active adapter: "
            f"{ego} is an endpoint and gives no distributions"
        )
    return f"the recorded texts and the distributions of EGO, {ego}"


@dataclass(frozen=True, kw_only=True)
class RetrainResult:
    """What a retraining came to.

    Attributes:
        domain: Whose adapter.
        version: The new generation, `G001` or `FAILED-G001-<time>`.
        promoted: Whether it is the active one now.
        verdicts: What every gate said.
        path: Its folder, which mlx_lm opens as an adapter.
        taught_by: Who taught, and by what.
        records: How many it learned from and was judged by.
        experiences: Of how many experiences these are.
        left_out: For the id of each experience that was not learned from, why.
        metrics: Figures of child and parent.
    """

    domain: str
    version: str
    promoted: bool
    verdicts: list[GateVerdict]
    path: Path
    taught_by: str
    records: int
    experiences: int
    left_out: dict[str, str]
    metrics: dict[str, Any]


class Retraining:
    """A domain's versions, and the making of the next one.

    Args:
        adapters_dir: As `distill` leaves it.
        domain: A domain in it.
        base: Finds the student of all its adapters, which may be a download; asked when needed.
        ego: What EGO is called; empty where there is none.
        config: How to train and judge; as the domain was distilled where None.
    """

    def __init__(
        self,
        adapters_dir: Path,
        domain: str,
        base: Callable[[], ModelSource],
        *,
        ego: str = "",
        config: EvolveConfig | None = None,
    ) -> None:
        self.adapters_dir = adapters_dir
        self.domain = domain
        self._find_base = base
        self.ego = ego
        self.config = config
        self.line = line_of(adapters_dir, domain)
        self.distilled = distillation_folder(adapters_dir, domain)
        self._folder = self.line.folder / RETRAINING
        self._batch_path = self._folder / BATCH_FILE

    @cached_property
    def base(self) -> ModelSource:
        """The student of all adapters."""
        return self._find_base()

    # Which experience every version learned from.

    def states(self) -> dict[str, set[str]]:
        """Ids of experience by what became of it; what is in none of them is new.

        "used" by the active version or one that it grew from; "refused" with a version that the
        gates refused or that was rolled back; "left_out" of a version that could not learn it.
        Every version keeps its records with the ids of their experience, so whole folders say what
        was used, and no second list can contradict them.
        """
        line = self.line
        chain = [line.head, *line.ancestors(line.head)] if line.exists else []
        states: dict[str, set[str]] = {"used": set(), "refused": set()}
        for name in [*line.generations(), *line.failed()]:
            states["used" if name in chain else "refused"] |= self._learned(name)
        states["refused"] -= states["used"]
        states["left_out"] = set(self._left_out()) - states["used"] - states["refused"]
        return states

    def _learned(self, name: str) -> set[str]:
        """Ids of the experience that a version learned from or was judged by."""
        files = (DATA_FILE, HELDOUT_FILE)
        parts = [earlier_records(self.line, [name], file)[name] for file in files]
        return {id_ for part in parts for record in part for id_ in record.get(EXPERIENCE, ())}

    def _left_out(self) -> dict[str, str]:
        """For the id of each experience that no version could learn, why."""
        path = self._folder / LEFT_OUT_FILE
        return read_json(path, needs={}) if path.is_file() else {}

    # How it is trained.

    def _as_distilled(self) -> EvolveConfig:
        return EvolveConfig(training=distillation_settings(self.adapters_dir, self.domain))

    @property
    def settings(self) -> EvolveConfig:
        """How the next version would be trained and judged."""
        config = self.config or self._as_distilled()
        active = adapter_config(active_adapter(self.adapters_dir, self.domain))
        config = replace(config, training=replace(config.training, **shape_of(active)))
        if self.ego and not is_endpoint(self.ego):
            # In the second place EGO would only be heard where the parent agrees with it.
            config = replace(config, first_teacher=self.ego)
        return config

    # The batch that is under way.

    def _recorded_batch(self) -> dict[str, Any] | None:
        if not self._batch_path.is_file():
            return None
        needs = {"began": str, "records": list, "left_out": dict}
        batch = read_json(self._batch_path, needs=needs)
        for record in batch["records"]:
            require_keys(record, f"a record in {self._batch_path}", needs={EXPERIENCE: list})
        return batch

    @property
    def unfinished(self) -> dict[str, Any] | None:
        """What an unfinished retraining learns from, and when it began; None where there is none.

        One whose process was killed when all was done but to say so is not unfinished.
        """
        if (batch := self._recorded_batch()) is None:
            return None
        entries = self.line.log() if self.line.exists else []
        if entries:
            last = self.line.manifest(entries[-1].folder)
            if last["digests"].get("data") == data_digest(batch["records"]):
                return None
        return batch

    def _can_be_resumed(self) -> bool:
        work = self.line.folder / f"{WORK}{self.line.next_name}"
        return self.line.candidate.is_dir() or bool(numbered_folders(work, CHECKPOINT_PREFIX))

    def _batch(
        self, prepare: Callable[[], Lessons], *, resume: bool, overwrite: bool
    ) -> dict[str, Any]:
        """What to learn from: written down first, so that a resumed run learns from the same."""
        if resume and (recorded := self._recorded_batch()) is not None:
            return recorded
        if (unfinished := self.unfinished) and not overwrite:
            raise ConchError(
                f"the retraining of {self.domain} that began {unfinished['began']} is not "
                "finished: resume it, or start again with overwrite"
            )
        lessons = prepare()
        if not lessons.records:
            raise ConchError(
                f"there is nothing new to learn for {self.domain}; {len(lessons.left_out)} new "
                "experiences are of no use: record corrections first"
            )
        batch = {"began": now(), "records": lessons.records, "left_out": lessons.left_out}
        write_json(self._batch_path, batch)
        return batch

    # The whole step.

    def run(
        self,
        prepare: Callable[[], Lessons],
        *,
        resume: bool,
        overwrite: bool,
        old_data: Sequence[Record] | None,
        report: Report,
    ) -> RetrainResult:
        """Evolve the line by new experience; its gates decide what is active then.

        Args:
            prepare: Gives what there is to learn; not asked where a batch is under way.
            resume: Go on with the batch that is under way.
            overwrite: Start again over it.
            old_data: What the domain was distilled from, where its folder does not keep it.
            report: Gets progress.

        Raises:
            ConchError: There is nothing to learn, or the line or adapter is another one's.
            Interrupted: Ctrl-C in training; its state was saved.
        """
        active_adapter(self.adapters_dir, self.domain)
        elsewhere = f"retrain another domain than {self.domain} meanwhile"
        with FolderLock(self._folder, elsewhere=elsewhere):
            remove_unfinished(self._folder)
            batch = self._batch(prepare, resume=resume, overwrite=overwrite)
            try:
                self._begin_line(old_data)
                report(
                    "message", {"message": f"{self.domain} is taught by {teaching_of(self.ego)}"}
                )
                outcome = train_generation_with_teachers(
                    self.line,
                    batch["records"],
                    self.settings,
                    report=report,
                    resume=resume,
                    overwrite=overwrite,
                )
            except ConchError:
                # Without a checkpoint there is nothing to resume, and newer experience is better.
                if not self._can_be_resumed():
                    self._batch_path.unlink(missing_ok=True)
                raise
            return self._finish(batch, outcome)

    def _begin_line(self, old_data: Sequence[Record] | None) -> None:
        """Make the distilled adapter the first generation, or see that it still is."""
        if not self.line.generations():
            verify_folder(self.distilled)
            self._require_own_student()
            init_line(
                self.line,
                self.base.model_id,
                self._old_data() if old_data is None else old_data,
                # The split of the distillation, so that what it held out stays held out.
                config=self._as_distilled(),
                adapter=self.distilled,
            )
            return
        first = self.line.generations()[0]
        base = self.line.manifest(first)["base"]
        if base["weights"] != self.base.weights_digest:
            raise ConchError(
                f"the line of {self.domain} began with {base['model']}, not with "
                f"{self.base.model_id}: give that student, or another folder of adapters"
            )
        file = self.distilled / ADAPTER_FILE
        digests = folder_digests(self.line.path(first))
        if file.is_file() and file_digest(file) != digests.get(ADAPTER_FILE):
            raise ConchError(
                f"{self.domain} was distilled anew since its line began: {self.distilled} is "
                f"another adapter than {self.line.path(first)}. Move {self.line.folder} away to "
                "begin a new line, or bring the old adapter back"
            )

    def _require_own_student(self) -> None:
        document = adapter_config(self.distilled)
        recorded = written_down(document).get("student_digest")
        if recorded and recorded != self.base.weights_digest:
            raise ConchError(
                f"{self.distilled} was made for {student_name(document)}, not for "
                f"{self.base.model_id}, which has other weights: give the student it belongs to"
            )

    def _old_data(self) -> list[Record]:
        path = self.distilled / TRAINING_DATA
        if not path.is_file():
            # Where distillations before this one left them.
            path = self.distilled.parent / TRAINING_DATA
        if not path.is_file():
            raise ConchError(
                f"{self.domain} was distilled from data that are not in {path.parent}: give "
                "them as old_data (--old-data) once, so that later versions can replay them and "
                "be measured on them"
            )
        return read_records(path)

    def _finish(self, batch: dict[str, Any], outcome: Outcome) -> RetrainResult:
        learned = self._learned(outcome.name)
        offered = [id_ for record in batch["records"] for id_ in record[EXPERIENCE]]
        unfit = {id_: UNFIT for id_ in offered if id_ not in learned}
        if unfit:
            write_json(self._folder / LEFT_OUT_FILE, {**self._left_out(), **unfit})
        self._batch_path.unlink(missing_ok=True)
        return RetrainResult(
            domain=self.domain,
            version=outcome.name,
            promoted=outcome.promoted,
            verdicts=outcome.verdicts,
            path=self.line.path(outcome.name),
            taught_by=teaching_of(self.ego),
            records=sum(1 for record in batch["records"] if learned & set(record[EXPERIENCE])),
            experiences=len(learned),
            left_out={**batch["left_out"], **unfit},
            metrics=outcome.metrics,
        )


def settings_over(
    settings: EvolveConfig,
    manifest: dict[str, Any],
    *,
    source: str,
    trust_remote_code: bool = False,
) -> EvolveConfig:
    """Settings with what a file names instead.

    Args:
        settings: As the domain would be retrained without the file.
        manifest: Parts of a generation's manifest: training_params, stabilizers, evaluation,
            gates and laws, each optional.
        source: Where they come from, for the message.
        trust_remote_code: Let Python code that comes with a model run.

    Raises:
        ConchError: A name is unknown, a value out of its range, or the file asks for a line or
            data.
    """
    if "evolution_request" in manifest:
        raise ConchError(
            f"{source} has an evolution_request: a retraining learns from what was recorded of its "
            "domain; leave it out"
        )
    base = settings.to_manifest()
    merged = {"laws": base["laws"], **manifest}
    for name in MAPPINGS:
        part = manifest.get(name) or {}
        # What is no mapping is refused below.
        if isinstance(part, dict):
            where, aliases = f"{source}, {name},", {"iters": "num_iters"}
            named = named_settings(part, base[name], source=where, aliases=aliases)
            merged[name] = {**base[name], **named}
    training = {"trust_remote_code": True} if trust_remote_code else None
    return EvolveConfig.from_manifest(merged, source=source, training=training)
