"""EGO asked in a neuron's place: several together, or one as it comes; who drafts, what is kept.

Knows EGO, turns, experience and adapters' modules; nothing of the engine or of clients. Another way
to choose who drafts: a branch in `Drafts.of`.
"""

import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

from conch_dna.cortex.engine.adapter_bank import AdapterBank
from conch_dna.cortex.engine.adapter_modules import read_adapter
from conch_dna.cortex.options import DRAFT_AUTO, DRAFT_NONE, DraftSettings, DrawOptions
from conch_dna.cortex.spoken import drained, pieces_before
from conch_dna.cortex.turn import Turn
from conch_dna.ego.drafting import Draft, other_vocabulary
from conch_dna.ego.model import EgoModel
from conch_dna.ego.settings import EgoAnswer
from conch_dna.errors import ConchError, EgoUnavailableError, one_line
from conch_dna.language_model import ModelSource
from conch_dna.retraining.domain import active_adapter, known_domains
from conch_dna.retraining.pipeline import TrainingPipeline
from conch_dna.training.settings import EGO

Given = EgoAnswer | EgoUnavailableError


# Answers of fewer tokens say little of how fast tokens come; each so many, the slower way is tried
# again, since machines and neurons change.
_LEAST_TOKENS, _AGAIN = 8, 16


class Pace:
    """Whether drafts make EGO's answers faster, by the answers so far."""

    def __init__(self) -> None:
        self._seconds: dict[bool, float] = {}
        self._asked = 0

    def wants_draft(self) -> bool:
        """Whether the next answer is to be drafted: the first is, the second is not."""
        self._asked += 1
        if len(self._seconds) < 2:
            return True not in self._seconds
        faster = self._seconds[True] <= self._seconds[False]
        return faster if self._asked % _AGAIN else not faster

    def took(self, answer: EgoAnswer, seconds: float) -> None:
        """Count an answer, the later ones more."""
        if not answer.tokens or answer.tokens < _LEAST_TOKENS or answer.undrafted:
            return
        each, drafted = seconds / answer.tokens, bool(answer.draft)
        self._seconds[drafted] = (self._seconds.get(drafted, each) + each) / 2


class Drafts:
    """Who drafts EGO's answers.

    Args:
        settings: Whom the user wants.
        ego: Whose answers they are; nobody where None.
        bank: The neurons.
        adapters_dir: Where domains lie, of which some may not be in the bank.

    Raises:
        ConchError: A draft was named, and EGO is nobody or an API, there is no such model, or it
            has other tokens than EGO.
    """

    def __init__(
        self,
        settings: DraftSettings,
        ego: EgoModel | None,
        bank: AdapterBank,
        adapters_dir: Path,
    ) -> None:
        self.settings = settings
        self._ego = ego
        self._bank = bank
        self._fixed: Draft | None = None
        self._paces: dict[str, Pace] = {}
        name = settings.draft
        if name in (DRAFT_AUTO, DRAFT_NONE):
            return
        if ego is None or ego.config.is_endpoint:
            who = "there is no EGO" if ego is None else f"EGO {ego.model_id} is an API"
            raise ConchError(
                f"the draft is {name} and {who}: drafts are for a local EGO, give its --ego or "
                "leave --draft out"
            )
        base = bank.base
        if name in bank.names:
            source = base.source
        elif name in known_domains(adapters_dir):
            source = base.source
            tree = read_adapter(active_adapter(adapters_dir, name), base, bank.shared).tree
            self._fixed = Draft(name, source, tree, settings.draft_tokens)
        else:
            trusted = base.source.trust_remote_code
            try:
                source = ModelSource(name, trust_remote_code=trusted)
            except ConchError as error:
                here = ", ".join(sorted(known_domains(adapters_dir)))
                raise ConchError(f"the draft is {name}, and neurons are {here}: {error}") from error
        try:
            problem = other_vocabulary(ego.source, source)
        except EgoUnavailableError:
            # Told when EGO is asked.
            problem = ""
        if problem:
            raise ConchError(
                f"the draft is {name}: {problem}; name a model of EGO's family, or a neuron whose "
                "student is one, or leave --draft out"
            )
        if name not in bank.names and self._fixed is None:
            same = source.folder.resolve() == base.source.folder.resolve()
            tree = bank.tree(None) if same else source.load().model
            self._fixed = Draft(name, source, tree, settings.draft_tokens)

    def of(self, domain: str | None, options: DrawOptions, schema: str | None) -> Draft | None:
        """Who drafts an answer to a domain's question, the neuron as it is now; None for nobody.

        Where nobody was named, the neuron drafts greedy answers if that makes them faster here.

        Args:
            domain: None where EGO was asked by its own name.
            options: How it is drawn.
            schema: What it is held to; then nobody drafts.
        """
        auto = self.settings.draft == DRAFT_AUTO
        name = domain if auto else self.settings.draft
        if self._ego is None or self._ego.config.is_endpoint or name in (None, DRAFT_NONE):
            return None
        if schema is not None:
            return None
        if auto and (options.temperature > 0 or not self._pace(str(name)).wants_draft()):
            return None
        if self._fixed is not None:
            return self._fixed
        tree = self._bank.tree(name)
        return Draft(str(name), self._bank.base.source, tree, self.settings.draft_tokens)

    def took(self, turn: Turn, answer: EgoAnswer, seconds: float) -> None:
        """Learn from an answer whether drafts pay, where it might have been drafted."""
        options, schema = turn.drawn
        if options.temperature == 0 and schema is None:
            self._pace(turn.domain.name).took(answer, seconds)

    def _pace(self, domain: str) -> Pace:
        """How fast a domain's answers come with and without drafts."""
        return self._paces.setdefault(domain, Pace())


def ego_answers(
    ego: EgoModel, turns: Sequence[Turn], drafts: Drafts, check: Callable[[], None]
) -> Sequence[Given]:
    """EGO's answers to turns that wait for it and are drawn alike, or why there is none.

    A single one is drafted and ends at its stop, several are answered as a batch. An API is let
    finish, since it says only then how many tokens there were.

    Args:
        ego: Who answers.
        turns: At least one.
        drafts: Who drafts.
        check: Called after each token; what it raises ends the work.
    """
    options, schema = turns[0].drawn
    if len(turns) == 1 and turns[0].options.stop and not ego.config.is_endpoint:
        try:
            return [drained(ego_stream(ego, turns[0], drafts, check))]
        except EgoUnavailableError as error:
            return [error]
    try:
        ego.load()
        began = time.perf_counter()
        answers = ego.generate_many(
            [turn.ego_turns for turn in turns],
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            seed=options.seed,
            draft=drafts.of(turns[0].domain.name, options, schema) if len(turns) == 1 else None,
            check=check,
            schema=schema,
        )
        if len(turns) == 1:
            drafts.took(turns[0], answers[0], time.perf_counter() - began)
        return answers
    except EgoUnavailableError as error:
        return [error] * len(turns)
    except (ConchError, MemoryError, RuntimeError, ValueError) as error:
        # EGO is there and cannot answer one of them, such as a prompt too long for it, or all
        # together, for which the memory is too small or the model's masks are not made.
        if len(turns) == 1:
            return [_unable(ego, "cannot answer", error)]
        return [answer for turn in turns for answer in ego_answers(ego, [turn], drafts, check)]


def ego_stream(
    ego: EgoModel, turn: Turn, drafts: Drafts, check: Callable[[], None]
) -> Generator[str, None, Given]:
    """Pieces of EGO's answer to a turn as they come, up to the first of its stops.

    Args:
        ego: Who answers.
        turn: Waits for EGO.
        drafts: Who drafts.
        check: Called after each token of a local model; what it raises ends the work.

    Returns:
        The whole, or why there is none.

    Raises:
        EgoUnavailableError: The answer broke off after a piece of it was given.
    """
    options, schema = turn.drawn
    begun = False
    try:
        ego.load()
        began = time.perf_counter()
        pieces = pieces_before(
            ego.stream(
                turn.ego_turns,
                max_tokens=options.max_tokens,
                temperature=options.temperature,
                seed=options.seed,
                draft=drafts.of(turn.domain.name, options, schema),
                check=check,
                schema=schema,
            ),
            turn.options.stop,
        )
        try:
            while True:
                piece = next(pieces)
                begun = True
                yield piece
        except StopIteration as end:
            whole: EgoAnswer = end.value
            drafts.took(turn, whole, time.perf_counter() - began)
            return whole
        finally:
            pieces.close()
    except (ConchError, MemoryError, RuntimeError, ValueError) as error:
        if begun:
            raise _unable(ego, "broke off its answer", error) from error
        if isinstance(error, EgoUnavailableError):
            return error
        return _unable(ego, "cannot answer", error)


def _unable(ego: EgoModel, what: str, error: Exception) -> EgoUnavailableError:
    why = error if isinstance(error, ConchError) else one_line(error)
    return EgoUnavailableError(f"EGO {ego.model_id} {what}: {why}")


def remember(pipeline: TrainingPipeline | None, turn: Turn) -> str:
    """Keep what was handed over, where there is a pipeline and the neuron had answered.

    Returns:
        Why it could not be kept; empty where it was, or there is nothing to keep.
    """
    answer = turn.answer
    if pipeline is None or answer is None or answer.answered_by != EGO:
        return ""
    # EGO was asked for, so that the neuron had no chance; or there is nothing to learn.
    if answer.confidence is None or not answer.text:
        return ""
    try:
        pipeline.record_fallback(
            answer.domain,
            turn.conversation,
            answer.raw,
            answer.text,
            reason=answer.reason,
            confidence=answer.confidence,
            finish_reason=answer.finish_reason,
        )
    except ConchError as error:
        # The answer is there all the same.
        return f"a hand-over of {answer.domain} is not remembered: {error}"
    return ""
