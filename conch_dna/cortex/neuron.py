"""CORTEX: one resident student, a neuron for each domain, and EGO for what they are unsure of.

Knows folders of adapters, the engine that answers, and EGO; how a question becomes an answer is in
turn.py. To give neurons another ability: a method of `Neuron`, made of turns.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from conch_dna.cortex.answer import Answer
from conch_dna.cortex.calibration.confidence import CALIBRATION_FILE, load_calibration
from conch_dna.cortex.engine.adapter_bank import AdapterBank
from conch_dna.cortex.engine.batching import AnswerEngine, interrupt_held_back
from conch_dna.cortex.hand_over import Drafts, Given, ego_answers, ego_stream, remember
from conch_dna.cortex.options import AskOptions, DraftSettings
from conch_dna.cortex.turn import Domain, Turn
from conch_dna.ego.model import EgoModel
from conch_dna.ego.settings import EgoAnswer, EgoConfig
from conch_dna.errors import ConchError, EgoUnavailableError
from conch_dna.language_model import ModelSource
from conch_dna.retraining.domain import (
    active_adapter,
    adapter_config,
    known_domains,
    read_systems,
    student_name,
)
from conch_dna.retraining.pipeline import TrainingPipeline
from conch_dna.training.adapters import ADAPTER_CONFIG, ADAPTER_FILE
from conch_dna.training.chats.conversations import Prompt
from conch_dna.training.settings import EGO
from conch_dna.training.structured_answers import DOMAIN_SCHEMAS

MOST_NOTES = 100

# Time of change and size of a file; None where there is none.
Stamp = tuple[int, int] | None


class Mark(NamedTuple):
    """What lies on disk of a domain, at a glance.

    Attributes:
        folder: Of its active adapter.
        adapter: Of the adapter's tensors; distilled anew, it has the same folder.
        calibration: Of its calibration.
    """

    folder: Path
    adapter: Stamp
    calibration: Stamp


@dataclass(frozen=True)
class Delta:
    """A part of a streamed answer.

    Attributes:
        text: What is new of it; final, so that it can be shown.
        answer: With the last part, the whole.
    """

    text: str
    answer: Answer | None = None


class CortexSuite:
    """The neurons of a folder of adapters on one student in memory. For one thread.

    Args:
        adapters_dir: As `distill` and retraining leave it.
        student: The base of all adapters; that which the first one names where None.
        ego: Who answers what neurons are not sure of: a model's id, its settings, or EGO itself;
            nobody where None. It is loaded when it is first needed.
        domains: Which; all that have an adapter where None.
        pipeline: Remembers what was handed over; nothing is remembered where None.
        draft: Who drafts EGO's answers; `DraftSettings()` by default.
        trust_remote_code: Let Python code that comes with the student run.

    Attributes:
        bank: The adapters in memory.
        drafts: Who drafts EGO's answers.
        engine: What answers.
        notes: What is to be known of the neurons, such as a calibration of another adapter; each
            once, MOST_NOTES at most.

    Raises:
        ConchError: There is no adapter, one belongs to another student or has EGO's name, or a
            model cannot be loaded, or the draft that was named is none for this EGO.
    """

    def __init__(
        self,
        adapters_dir: Path,
        student: str | None = None,
        *,
        ego: EgoModel | EgoConfig | str | None = None,
        domains: Sequence[str] | None = None,
        pipeline: TrainingPipeline | None = None,
        draft: DraftSettings | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.adapters_dir = Path(adapters_dir).expanduser()
        if isinstance(ego, str):
            ego = EgoConfig(model=ego, trust_remote_code=trust_remote_code)
        self.ego = EgoModel(ego) if isinstance(ego, EgoConfig) else ego
        self.pipeline = pipeline
        self.notes: list[str] = []
        self._wanted = list(domains) if domains is not None else None
        marks = self.marks()
        if not marks:
            raise ConchError(
                f"{self.adapters_dir} holds no adapter: make one with 'conch-dna distill --domain "
                "thinking', or name another folder of adapters"
            )
        student = student or student_of(next(iter(marks.values())).folder)
        self.source = ModelSource(student, trust_remote_code=trust_remote_code)
        self.base = self.source.load()
        self.bank = AdapterBank(self.base)
        self.engine = AnswerEngine(self.bank)
        self._taken: dict[str, Mark] = {}
        self._domains: dict[str, Domain] = {}
        self.reload()
        drafts = draft or DraftSettings()
        self.drafts = Drafts(drafts, self.ego, self.bank, self.adapters_dir)

    def reload(self) -> list[str]:
        """Take in adapters that are new or have another active version, and calibrations.

        Requests under way are finished by the adapter that they began with.

        Returns:
            The domains whose adapter is another now.

        Raises:
            ConchError: One is not whole, belongs to another student or has EGO's name; the others
                are taken in.
        """
        changed, problems = [], []
        for name, mark in self.marks().items():
            if name == EGO:
                problems.append(
                    f"a domain is called {EGO!r}, as the big teacher is: rename its folder in "
                    f"{self.adapters_dir}"
                )
                continue
            taken = self._taken.get(name)
            if taken is None or taken[:2] != mark[:2]:
                try:
                    (self.bank.replace if taken else self.bank.add)(name, mark.folder)
                except ConchError as error:
                    problems.append(str(error))
                    continue
                self.engine.prefixes.forget(name)
                self._taken[name] = mark
                changed.append(name)
        self.notes = []
        self._domains = {name: self._domain(name) for name in self._taken}
        if problems:
            raise ConchError("; ".join(problems))
        return changed

    def marks(self) -> dict[str, Mark]:
        """What lies on disk of each domain: `reload` finds something where it is another than then.

        Raises:
            ConchError: A domain that was named has no adapter any more.
        """
        marks = {}
        for name in known_domains(self.adapters_dir) if self._wanted is None else self._wanted:
            # A folder of EGO's name is told of by `reload`, which goes on with the others.
            is_ego = name == EGO
            folder = self.adapters_dir / name if is_ego else active_adapter(self.adapters_dir, name)
            calibration = self.adapters_dir / name / CALIBRATION_FILE
            marks[name] = Mark(folder, _stamp(folder / ADAPTER_FILE), _stamp(calibration))
        return marks

    def _domain(self, name: str) -> Domain:
        ego_system, system = read_systems(self.adapters_dir, name)
        return Domain(
            name=name,
            source=self.source,
            system=system,
            ego_system=ego_system,
            schema=DOMAIN_SCHEMAS.get(name),
            calibration=load_calibration(
                self.adapters_dir, name, self.bank.digest_of(name), report=self._note
            ),
        )

    def take_calibration(self, domain: str) -> None:
        """Take in a domain's calibration anew, and nothing else; see `reload`."""
        self.domain(domain)
        self._domains[domain] = self._domain(domain)

    @property
    def domains(self) -> list[str]:
        """Names of the neurons."""
        return list(self._domains)

    def folder(self, domain: str) -> Path:
        """Where a domain's active adapter lies."""
        self.domain(domain)
        return self._taken[domain].folder

    def domain(self, name: str) -> Domain:
        """What a neuron knows.

        Raises:
            ConchError: There is none of that name.
        """
        if name not in self._domains:
            raise ConchError(
                f"there is no neuron {name!r} in {self.adapters_dir}: there is "
                f"{', '.join(self._domains)}; make one with 'conch-dna distill --domain {name}'"
            )
        return self._domains[name]

    def __getitem__(self, name: str) -> "Neuron":
        self.domain(name)
        return Neuron(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.domains)

    # Questions

    def turn(self, domain: str, prompt: Prompt, options: AskOptions, *, live: bool = False) -> Turn:
        """A question to a neuron, for whoever drives the engine; see `Turn`."""
        has_ego = self.ego is not None
        return Turn(self.domain(domain), prompt, options, has_ego=has_ego, live=live)

    def ask(self, domain: str, prompt: Prompt, **options: Any) -> Answer:
        """The answer to one question; see `ask_many`."""
        return self.ask_many([(domain, prompt)], **options)[0]

    def ask_many(self, questions: Sequence[tuple[str, Prompt]], **options: Any) -> list[Answer]:
        """Answer questions of any domains together.

        Args:
            questions: Domain and prompt of each: a text, or a conversation that waits for its
                answer, of messages with role and content.
            **options: Of all; see `AskOptions`.

        Returns:
            The answers in the order of the questions.

        Raises:
            ConchError: A domain is missing, a prompt is none or longer than the context, or an
                option is out of its range; nothing is answered then.
            EgoUnavailableError: EGO was asked for by name and is not there.
        """
        how = AskOptions(**options)
        turns = [self.turn(domain, prompt, how) for domain, prompt in questions]
        for turn in turns:
            if turn.request is not None:
                self.engine.check(turn.request)
        for _ in self._driven(turns):
            pass
        alike: dict[Any, list[Turn]] = {}
        for turn in turns:
            if turn.asks_ego:
                alike.setdefault(turn.drawn, []).append(turn)
        for group in alike.values():
            self.answer_by_ego(group)
        return [turn.answer for turn in turns if turn.answer is not None]

    def stream(self, domain: str, prompt: Prompt, **options: Any) -> Iterator[Delta]:
        """Parts of one answer as they become certain, a neuron's or EGO's; see `Turn.streams`.

        The engine answers nothing else meanwhile. Not read to its end, the rest is not computed.

        Raises:
            ConchError: See `ask_many`.
            EgoUnavailableError: Besides, EGO's answer broke off.
        """
        turn = self.turn(domain, prompt, AskOptions(**options), live=True)
        if turn.request is not None:
            self.engine.check(turn.request)
        return self._streamed(turn)

    def _streamed(self, turn: Turn) -> Iterator[Delta]:
        sent = turn.streams
        for _, text in self._driven([turn]):
            if text and turn.streams:
                yield Delta(text)
        if turn.asks_ego:
            for text in self.stream_by_ego(turn):
                sent = True
                yield Delta(text)
        assert turn.answer is not None
        yield Delta("" if sent else turn.answer.text, turn.answer)

    def _driven(self, turns: Sequence[Turn]) -> Iterator[tuple[Turn, str]]:
        """Run turns until they have answers or wait for EGO, and give every piece of text."""
        under_way: dict[int, Turn] = {}
        try:
            for turn in turns:
                self._submit(turn, under_way)
            while under_way:
                for piece in self.engine.step():
                    turn = under_way[piece.uid]
                    asked = turn.request
                    text = turn.add(piece)
                    if turn.request is not asked:
                        if piece.finish_reason is None:
                            self.engine.cancel(piece.uid)
                        del under_way[piece.uid]
                        self._submit(turn, under_way)
                    yield turn, text
        finally:
            for uid in under_way:
                self.engine.cancel(uid)

    def _submit(self, turn: Turn, under_way: dict[int, Turn]) -> None:
        if turn.request is None:
            return
        try:
            # Broken off between the two, nobody would know of the request.
            with interrupt_held_back():
                under_way[self.engine.submit(turn.request)] = turn
        except ConchError as error:
            turn.refuse_request(error)

    def answer_by_ego(
        self, turns: Sequence[Turn], *, check: Callable[[], None] = lambda: None
    ) -> None:
        """Let EGO answer turns that wait for it and are drawn alike; nothing else is touched.

        Args:
            turns: At least one.
            check: Called after each token of a local EGO; what it raises ends the work.

        Raises:
            EgoUnavailableError: See `Turn.take_ego`; the turns that have an answer all the same
                have it.
        """
        assert self.ego is not None
        refused = None
        for turn, answer in zip(
            turns, ego_answers(self.ego, turns, self.drafts, check), strict=True
        ):
            try:
                self._take_ego(turn, answer)
            except EgoUnavailableError as error:
                refused = refused or error
        if refused is not None:
            raise refused

    def stream_by_ego(
        self, turn: Turn, *, check: Callable[[], None] = lambda: None
    ) -> Generator[str, None, None]:
        """Let EGO answer a turn that waits for it, piece by piece; then the turn has its answer.

        Args:
            turn: Is EGO's to answer.
            check: Called after each token of a local EGO; what it raises ends the work.

        Raises:
            EgoUnavailableError: See `Turn.take_ego`; or the answer broke off after its first piece.
        """
        assert self.ego is not None
        self._take_ego(turn, (yield from ego_stream(self.ego, turn, self.drafts, check)))

    def _take_ego(self, turn: Turn, answer: Given) -> None:
        if isinstance(answer, EgoAnswer) and answer.undrafted:
            self._note(f"nobody drafts EGO's answers for {turn.domain.name}: {answer.undrafted}")
        try:
            turn.take_ego(answer)
        finally:
            if problem := remember(self.pipeline, turn):
                self._note(problem)

    def _note(self, text: str) -> None:
        """Keep what is to be known, each once and not without end."""
        if text not in self.notes and len(self.notes) < MOST_NOTES:
            self.notes.append(text)

    # What there is

    def status(self) -> list[dict[str, Any]]:
        """For each neuron what it is and where it comes from, as JSON can hold."""
        return [
            {
                "domain": name,
                "adapter": str(self.folder(name)),
                "structured": domain.schema is not None,
                "calibrated": domain.calibration is not None,
            }
            for name, domain in self._domains.items()
        ]

    def close(self) -> None:
        """Give all memory back, EGO's too."""
        self.engine.close()
        self.base.release()
        if self.ego is not None:
            self.ego.unload()

    def __enter__(self) -> "CortexSuite":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@dataclass(frozen=True, eq=False)
class Neuron:
    """One domain of a suite.

    Attributes:
        suite: Answers.
        domain: Its name.
    """

    suite: CortexSuite
    domain: str

    def ask(self, prompt: Prompt, **options: Any) -> Answer:
        """The answer to a question; see `CortexSuite.ask_many`."""
        return self.suite.ask(self.domain, prompt, **options)

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[Delta]:
        """Parts of an answer as they become certain; see `CortexSuite.stream`."""
        return self.suite.stream(self.domain, prompt, **options)

    def chat(self, **options: Any) -> "Chat":
        """A conversation, in which earlier turns are known; options are those of `ask`."""
        return Chat(self, AskOptions(**options))


@dataclass(eq=False)
class Chat:
    """A conversation with a neuron.

    Attributes:
        neuron: Who answers the next question; may be another one's turn.
        options: Of every question.
        messages: What was said so far, without a system prompt.
    """

    neuron: Neuron
    options: AskOptions
    messages: list[dict[str, str]] = field(default_factory=list)

    def say(self, text: str, **changes: Any) -> Iterator[Delta]:
        """Ask the next question; what is said is part of the conversation when it is whole.

        Raises:
            ConchError: See `CortexSuite.ask_many`; the conversation is as it was.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        options = replace(self.options, **changes)
        for delta in self.neuron.stream(messages, **vars(options)):
            if delta.answer is not None:
                answer = {"role": "assistant", "content": delta.answer.text}
                self.messages = [*messages, answer]
            yield delta


def create_cortex_suite(
    adapters_dir: Path | str = "models/distilled_neurons",
    student: str | None = None,
    **more: Any,
) -> CortexSuite:
    """Load a student once, with a neuron for every adapter; see `CortexSuite`.

    Args:
        adapters_dir: The folder of all domains' folders.
        student: The base of the adapters.
        **more: Of `CortexSuite`.
    """
    return CortexSuite(Path(adapters_dir), student, **more)


def student_of(folder: Path) -> str:
    """The model that an adapter says it is for.

    Raises:
        ConchError: It does not say.
    """
    name = student_name(adapter_config(folder))
    if not isinstance(name, str) or not name:
        raise ConchError(
            f"{folder / ADAPTER_CONFIG} does not say which model the adapter is for: name the "
            "student"
        )
    return name


def _stamp(path: Path) -> Stamp:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_size
