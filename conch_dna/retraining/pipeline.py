"""Learning from use: what happened is recorded, and an adapter is retrained from it.

Knows what a user of adapters asks for; nothing of files, lines or training, which the modules
beside it know. To let users ask for something else: a method of `TrainingPipeline`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from conch_dna.ego.model import EgoModel
from conch_dna.errors import ConchError
from conch_dna.generations.line import Line
from conch_dna.generations.settings import EvolveConfig
from conch_dna.language_model import ModelSource
from conch_dna.retraining.buffer import ExperienceBuffer
from conch_dna.retraining.domain import Retraining, RetrainResult, line_of, read_systems
from conch_dna.retraining.experience import Experience, Message
from conch_dna.retraining.lessons import Lessons, lessons_of
from conch_dna.screen.progress import Report, silent
from conch_dna.training.data.records import Record
from conch_dna.training.settings import EXPERIENCE_FOLDER, LINES
from conch_dna.training.structured_answers import DOMAIN_SCHEMAS, parse_answer


def _misshapen(experience: Experience, *, schema: Mapping[str, Any] | None) -> str:
    """Why EGO's answer in a hand-over would teach the wrong form; empty where it would not."""
    own = experience.messages[0]["role"] == "system"
    if schema is None or own or experience.kind != "fallback":
        return ""
    answer = parse_answer(experience.target, schema)
    if answer.valid:
        return ""
    return f"EGO's answer does not keep to the domain's schema: {answer.problems[0]}"


@dataclass(frozen=True, kw_only=True)
class RetrainAdvice:
    """Whether a domain should be retrained.

    Attributes:
        retrain: The advice.
        reason: One line with the figures.
        counts: Experiences that are "new", of these the "lessons" (corrections and hand-overs),
            and those "used", "refused" and "left_out" by what became of them.
    """

    retrain: bool
    reason: str
    counts: dict[str, int]


class TrainingPipeline:
    """Records experience of a suite of adapters and retrains them from it.

    Args:
        adapters_dir: As `distill` leaves it; `lines/` and `experience/` are made in it.
        student: The base of all adapters: a folder, a hub id or an embedded name.
        ego: The big teacher: a model, which teaches by its distributions; the address of an
            endpoint, which teaches by the texts of its answers alone; or None.
        config: How to train and judge. Without it, training is as the domain was distilled, and
            the rest as `EvolveConfig` has it. What makes up an adapter's shape (LoRA's rank,
            scale, keys and layers, DoRA, full) is always that of the active one.
        min_new: Corrections and hand-overs from which a retraining is advised.
        max_records: Most experiences of one domain, 1 or more; see `ExperienceBuffer` for what
            goes when there is no room.
        redact: Names of REDACTIONS, or True for all: secrets that are replaced before anything is
            kept.
        report: Gets all progress, see `conch_dna.screen.progress.Progress`.

    Attributes:
        buffer: The experience.
        ego: EGO's model, folder or address; empty where there is none.

    Raises:
        ConchError: min_new is below 1, or two models are to stand in the first teacher's place.
    """

    def __init__(
        self,
        adapters_dir: Path,
        student: str,
        *,
        ego: EgoModel | str | None = None,
        config: EvolveConfig | None = None,
        min_new: int = 50,
        max_records: int = 10_000,
        redact: Sequence[str] | bool = False,
        report: Report = silent,
    ) -> None:
        if min_new < 1:
            raise ConchError(f"min_new is {min_new}: it must be 1 or more")
        self.ego = ego.config.model if isinstance(ego, EgoModel) else ego or ""
        if config and config.first_teacher and self.ego:
            raise ConchError(
                f"config has {config.first_teacher} as first teacher, the place of EGO, which is "
                f"{self.ego}: give one of them"
            )
        self.adapters_dir = adapters_dir
        self.student = student
        self.config = config
        self.min_new = min_new
        self.report = report
        self.buffer = ExperienceBuffer(
            adapters_dir / EXPERIENCE_FOLDER,
            max_records=max_records,
            redact=redact,
            settled=self._settled,
            report=report,
        )

    @cached_property
    def _base(self) -> ModelSource:
        trust = self.config is not None and self.config.training.trust_remote_code
        return ModelSource(self.student, trust_remote_code=trust)

    def line(self, domain: str) -> Line:
        """The versions of a domain's adapter, whether or not there are any yet."""
        return line_of(self.adapters_dir, domain)

    def _retraining(self, domain: str) -> Retraining:
        return Retraining(
            self.adapters_dir, domain, lambda: self._base, ego=self.ego, config=self.config
        )

    def record_success(
        self,
        domain: str,
        prompt: str | Sequence[Message],
        answer: str,
        *,
        confidence: float | None = None,
        by: str = "neuron",
        finish_reason: str = "stop",
    ) -> bool:
        """Keep a good answer; durable when it returns.

        Args:
            domain: Whose adapter was asked.
            prompt: A text, or the conversation up to the answer.
            answer: What was answered.
            confidence: The neuron's, between 0 and 1; None where it was not measured.
            by: Who answered: "neuron" or "ego".
            finish_reason: "length" where the answer was cut off, else "stop".

        Returns:
            False where the same is known already.

        Raises:
            ConchError: Something is not of its kind, there is no room, or the disk is full.
        """
        facts = {"confidence": confidence, "by": by, "finish_reason": finish_reason}
        return self._record("success", domain, prompt, answer=answer, **facts)

    def record_correction(
        self,
        domain: str,
        prompt: str | Sequence[Message],
        answer: str,
        better: str,
        *,
        problem: str = "",
        confidence: float | None = None,
        by: str = "neuron",
        finish_reason: str = "stop",
    ) -> bool:
        """Keep an answer, what should have been said, and what was wrong.

        The other arguments and the result are those of `record_success`.
        """
        facts = {"confidence": confidence, "by": by, "finish_reason": finish_reason}
        texts = {"answer": answer, "better": better, "problem": problem}
        return self._record("correction", domain, prompt, **texts, **facts)

    def record_fallback(
        self,
        domain: str,
        prompt: str | Sequence[Message],
        answer: str,
        ego_answer: str,
        *,
        reason: str = "",
        confidence: float | None = None,
        finish_reason: str = "stop",
    ) -> bool:
        """Keep an answer that was not given, EGO's in its place, and why.

        The other arguments and the result are those of `record_success`.
        """
        facts = {"confidence": confidence, "by": "ego", "finish_reason": finish_reason}
        texts = {"answer": answer, "better": ego_answer, "problem": reason}
        return self._record("fallback", domain, prompt, **texts, **facts)

    def _record(
        self, kind: str, domain: str, prompt: str | Sequence[Message], **values: Any
    ) -> bool:
        # Refuses a name that no domain can have.
        line_of(self.adapters_dir, domain)
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        experience = Experience(domain=domain, kind=kind, messages=tuple(turns), **values)
        return self.buffer.add(experience)

    def _settled(self, domain: str) -> set[str]:
        return set().union(*self._retraining(domain).states().values())

    def should_retrain(self, domain: str) -> RetrainAdvice:
        """Whether there is enough to learn since the last retraining."""
        retraining = self._retraining(domain)
        experiences, _ = self.buffer.read(domain)
        states = retraining.states()
        settled = set().union(*states.values())
        fresh = [each for each in experiences if each.id not in settled]
        lessons = sum(1 for each in fresh if each.kind != "success")
        counts = {
            "new": len(fresh),
            "lessons": lessons,
            **{name: sum(each.id in ids for each in experiences) for name, ids in states.items()},
        }
        if (unfinished := retraining.unfinished) is not None:
            reason = f"the retraining that began {unfinished['began']} is not finished: resume it"
            return RetrainAdvice(retrain=True, reason=reason, counts=counts)
        enough = lessons >= self.min_new
        how_many = "at least" if enough else "fewer than"
        reason = f"{lessons} new corrections and hand-overs, {how_many} {self.min_new}"
        return RetrainAdvice(retrain=enough, reason=reason, counts=counts)

    def prepare_training_data(self, domain: str, *, with_refused: bool = False) -> Lessons:
        """What a retraining would learn from now.

        Args:
            domain: Whose experience.
            with_refused: Try again what the gates refused, or what was rolled back.
        """
        experiences, problems = self.buffer.read(domain)
        states = self._retraining(domain).states()
        settled = states["used"] | states["left_out"]
        settled |= set() if with_refused else states["refused"]
        _, system = read_systems(self.adapters_dir, domain)
        return lessons_of(
            experiences,
            settled,
            self._base.tokenizer,
            system=system,
            problems=problems,
            refuse=partial(_misshapen, schema=DOMAIN_SCHEMAS.get(domain)),
        )

    def settings_for(self, domain: str) -> EvolveConfig:
        """How a domain would be retrained: by the pipeline's settings and the adapter's shape."""
        return self._retraining(domain).settings

    def retrain(
        self,
        domain: str,
        *,
        resume: bool = False,
        overwrite: bool = False,
        with_refused: bool = False,
        old_data: Sequence[Record] | None = None,
        report: Report | None = None,
    ) -> RetrainResult:
        """Evolve a domain's line by its new experience; its gates decide what is active then.

        Args:
            domain: Whose adapter.
            resume: Go on with an unfinished retraining, with the experience it began with.
            overwrite: Start again over an unfinished one.
            with_refused: Try again what the gates refused, or what was rolled back.
            old_data: What the domain was distilled from, where its run did not keep it: later
                versions are measured on a part of it and replay the rest. Used when the line
                begins.
            report: Instead of the pipeline's.

        Raises:
            ConchError: There is nothing new, an unfinished retraining lies there, another one is
                under way, or the adapter belongs to another student.
            Interrupted: Ctrl-C in training; its state was saved.
        """
        report = report or self.report

        def prepare() -> Lessons:
            lessons = self.prepare_training_data(domain, with_refused=with_refused)
            for problem in lessons.problems:
                report("warning", {"message": f"not learned from: {problem}"})
            return lessons

        return self._retraining(domain).run(
            prepare, resume=resume, overwrite=overwrite, old_data=old_data, report=report
        )

    def rollback(self, domain: str, to: str | None = None) -> str:
        """Let an earlier version be active again, by default the one before; nothing is deleted.

        The experience of the version that was left counts as refused.

        Returns:
            The version that is active then.

        Raises:
            ConchError: There is none to go back to.
        """
        line = self.line(domain)
        if not line.generations():
            raise ConchError(f"{domain} was never retrained: there is no version to go back to")
        with line.lock():
            line.recover()
            return line.rollback(to)

    def get_stats(self) -> dict[str, Any]:
        """For each domain with experience or versions: what there is of both, as JSON can hold."""
        folders = (self.adapters_dir / LINES).glob("*")
        lines = [path.name for path in folders if self.line(path.name).exists]
        recorded = self.buffer.stats()
        stats = {}
        for domain in sorted({*recorded, *lines}):
            line = self.line(domain)
            stats[domain] = {
                "records": recorded.get(domain, {}),
                "advice": asdict(self.should_retrain(domain)),
                "active": line.head if line.exists else None,
                "versions": line.generations(),
                "refused_versions": line.failed(),
                "last_change": line.log()[-1].time if line.exists else None,
            }
        return stats
