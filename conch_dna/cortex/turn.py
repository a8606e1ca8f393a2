"""One question to a neuron: its prompt, its tokens, its check, and who answers in the end.

Runs no model: whoever has an engine and EGO feeds it, so that a call, a batch and a server do the
same thing. To check an answer for something else: a reason in `Turn._judge`.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import takewhile
from statistics import fmean
from typing import Any, Literal

from conch_dna.cortex.calibration.confidence import Calibration, answer_confidence
from conch_dna.cortex.engine.batching import Piece, Request
from conch_dna.cortex.options import AskOptions, DrawOptions
from conch_dna.ego.prompts import checked_prompt
from conch_dna.ego.settings import EgoAnswer
from conch_dna.errors import ConchError, EgoUnavailableError
from conch_dna.language_model import ModelSource
from conch_dna.training.chats.conversations import Prompt, prompt_ids, prompt_turns
from conch_dna.training.data.answers import TextStream, continuation_text
from conch_dna.training.structured_answers import parse_answer, repair_messages


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came of a question.

    Attributes:
        domain: Whose neuron was asked.
        text: The answer.
        answered_by: "neuron" or "ego".
        reason: Why it was that one, in words.
        raw: What the neuron said in the end; empty where it was not asked.
        parsed: The JSON object of `text`; None where none was asked for or found.
        valid: Whether `text` keeps to the domain's schema; None where none was asked for.
        problems: Why it does not.
        repaired: Whether the neuron was asked a second time for a valid answer.
        confidence: Of the neuron's answer, between 0 and 1; None where it was not asked.
        calibrated: Whether that is the share of agreement with EGO to expect, or the bare
            geometric mean of its tokens' probabilities.
        threshold: The confidence below which EGO answers; None where there is no calibration.
        removed: Mean share of probability that the schema took from the neuron's tokens while it
            wrote; None where it wrote freely. High where it would have said something else.
        finish_reason: "stop" or, where it was cut off, "length".
        prompt_tokens: Of the neuron's prompts, a repair's among them; None where EGO alone was
            asked, by an API that does not say.
        completion_tokens: Of its answers, a repaired one among them, and of EGO's where it says;
            None as before.
        draft: Who drafted EGO's answer; None where nobody did.
        ego_tokens: Of EGO's answer; None where the neuron answers, or an API does not say.
        ego_steps: In how many steps EGO said them; None where nobody drafted.
        first_token_s: Seconds to the first token of the neuron; None where it was not asked.
        seconds: From the question to the answer.
    """

    domain: str
    text: str
    answered_by: Literal["neuron", "ego"]
    reason: str
    raw: str = ""
    parsed: dict[str, Any] | None = None
    valid: bool | None = None
    problems: tuple[str, ...] = ()
    repaired: bool = False
    confidence: float | None = None
    calibrated: bool = False
    threshold: float | None = None
    removed: float | None = None
    finish_reason: str = "stop"
    prompt_tokens: int | None = 0
    completion_tokens: int | None = 0
    draft: str | None = None
    ego_tokens: int | None = None
    ego_steps: int | None = None
    first_token_s: float | None = None
    seconds: float = 0.0

    @property
    def acceptance(self) -> float | None:
        """Mean tokens of a step of EGO; None where nobody drafted."""
        if not self.ego_steps or self.ego_tokens is None:
            return None
        return self.ego_tokens / self.ego_steps

    def to_json(self) -> dict[str, Any]:
        """The fields and the acceptance as a JSON object."""
        return asdict(self) | {"acceptance": self.acceptance}


@dataclass(kw_only=True)
class Domain:
    """What a neuron knows before it is asked.

    Attributes:
        name: Its adapter's in the bank.
        source: Of the student.
        system: Its system prompt; may be empty, also where its adapter learned to do without.
        ego_system: What EGO reads instead.
        schema: Of its answers; None where it has none.
        calibration: Of its confidence; None where there is none.
    """

    name: str
    source: ModelSource
    system: str
    ego_system: str
    schema: Mapping[str, Any] | None
    calibration: Calibration | None

    @property
    def tokenizer(self) -> Any:
        """Of the student, as mlx_lm wraps it."""
        return self.source.tokenizer

    @cached_property
    def prefix(self) -> tuple[int, ...]:
        """Tokens that every prompt of the domain begins with: of the system prompt, mostly."""
        if not self.system:
            return ()
        return common(*(prompt_ids(self.tokenizer, text, self.system) for text in ("a", "1")))


def common(first: Sequence[int], second: Sequence[int]) -> tuple[int, ...]:
    """The longest beginning that two sequences share."""
    pairs = zip(first, second, strict=False)
    return tuple(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


class Turn:
    """A question on its way to an answer.

    While `request` is not None, an engine answers it and every piece goes to `add`. While
    `asks_ego`, EGO answers `ego_turns` and that goes to `take_ego`. Then there is an `answer`.

    Args:
        domain: Who is asked.
        prompt: A text, or a conversation of messages with role and content.
        options: How it is to be answered.
        has_ego: Whether there is somebody to hand over to.

    Attributes:
        request: What an engine is to answer now.
        asks_ego: Whether EGO is to answer now.
        answer: When all is done.
        turns: The conversation that waits for an answer, the system prompt its first turn.

    Raises:
        ConchError: The prompt is none, or an option is out of its range.
    """

    def __init__(
        self, domain: Domain, prompt: Prompt, options: AskOptions, *, has_ego: bool
    ) -> None:
        self.domain = domain
        self.options = options
        self.answer: Answer | None = None
        self.asks_ego = False
        self.request: Request | None = None
        self._has_ego = has_ego
        self._prompt = prompt
        self._began = time.perf_counter()
        self._first: float | None = None
        own = options.system is None
        self.turns = prompt_turns(prompt, domain.system if own else options.system or "")
        self.schema: Mapping[str, Any] | None
        self.schema = domain.schema if own and options.structured else None
        if options.schema is not None:
            self.schema = json.loads(options.schema)
        threshold = domain.calibration.threshold if domain.calibration else None
        self._draft = Answer(
            domain=domain.name, text="", answered_by="neuron", reason="", threshold=threshold
        )
        self._prompt_tokens = self._completion_tokens = 0
        if options.hand_over == "always":
            self._end("EGO was asked for", hand_over=True)
        else:
            self._ask(self.turns)

    @property
    def ego_turns(self) -> list[dict[str, str]]:
        """The conversation as EGO is asked: with what an adapter may have learned to do without."""
        if self.options.system is not None:
            return self.turns
        return prompt_turns(self._prompt, self.domain.ego_system)

    @property
    def conversation(self) -> list[dict[str, str]]:
        """The turns without the system prompt, as experience keeps them."""
        return [turn for turn in self.turns if turn["role"] != "system"]

    @property
    def drawn(self) -> DrawOptions:
        """How EGO would draw an answer; turns that are alike in it can be answered together."""
        options = self.options
        return DrawOptions(
            max_tokens=options.max_tokens, temperature=options.temperature, seed=options.seed
        )

    @property
    def streams(self) -> bool:
        """Whether every piece of text that `add` gives is final.

        Not so where the answer may yet be repaired or EGO's: then a neuron's comes in one piece.
        """
        hand_over = self.options.hand_over
        stands = hand_over == "never" or (hand_over == "auto" and not self._has_ego)
        return self.schema is None and stands

    def _ask(self, turns: Sequence[dict[str, str]]) -> None:
        ids = checked_prompt(self.domain.source, turns, "the prompt")
        if not ids:
            raise ConchError("the prompt is empty: there is nothing to answer")
        options = self.options
        self.request = Request(
            domain=self.domain.name,
            tokens=tuple(ids),
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=options.seed,
            prefix=common(self.domain.prefix, ids) if options.system is None else (),
            schema=json.dumps(self.schema) if self.schema and options.constrained else None,
        )
        self._ids: list[int] = []
        self._removed: list[float] = []
        self._log_probs: list[float] = []
        self._text = TextStream(self.domain.tokenizer, ids)
        self._prompt_tokens += len(ids)

    def add(self, piece: Piece) -> str:
        """Take a token of the answer to `request`.

        Returns:
            The text that it makes certain; see `streams`.
        """
        assert self.request is not None
        if self._first is None:
            self._first = time.perf_counter() - self._began
        self._log_probs.append(piece.log_prob)
        if piece.removed is not None:
            self._removed.append(piece.removed)
        self._completion_tokens += 1
        text = ""
        if piece.finish_reason != "stop":
            self._ids.append(piece.token)
            text = self._text.add(piece.token)
        if piece.finish_reason is None:
            return text
        text += self._text.end()
        raw = continuation_text(self.domain.tokenizer, self.request.tokens, self._ids)
        self.request = None
        self._judge(raw, piece.finish_reason)
        return text

    def begin_again(self) -> None:
        """Forget what came of the answer to `request`: all of it is to come once more."""
        assert self.request is not None
        self._completion_tokens -= len(self._log_probs)
        self._ids, self._log_probs, self._removed = [], [], []
        self._text = TextStream(self.domain.tokenizer, list(self.request.tokens))

    def _judge(self, raw: str, finish_reason: str) -> None:
        """Whether the neuron's answer stands, is asked for again, or is EGO's to give."""
        confidence = answer_confidence(self._log_probs)
        calibration = self.domain.calibration
        if calibration is not None:
            confidence = calibration(confidence)
        draft = self._draft = replace(
            self._draft,
            text=raw,
            raw=raw,
            finish_reason=finish_reason,
            confidence=confidence,
            calibrated=calibration is not None,
            removed=fmean(self._removed) if self._removed else None,
            **self._checked(raw),
        )
        if self.schema is not None and not draft.valid:
            if draft.repaired:
                why = f"the neuron's answer is not valid: {draft.problems[0]}"
                self._end(why, hand_over=True)
            else:
                self._draft = replace(draft, repaired=True)
                repair = repair_messages(self.turns, raw, draft.problems, self.schema)
                try:
                    self._ask(repair)
                except ConchError as error:
                    self._without_repair(error)
        elif calibration is None:
            self._end("the neuron's confidence is not calibrated, so its answer stands")
        elif calibration.should_fallback(confidence):
            least = calibration.threshold
            enough = "none is enough" if least is None else f"below {least:.3f}"
            why = f"the neuron's confidence is {confidence:.3f}, {enough}"
            self._end(why, hand_over=True)
        else:
            self._end(
                f"the neuron's confidence is {confidence:.3f}, at least {calibration.threshold:.3f}"
            )

    def _checked(self, text: str) -> dict[str, Any]:
        """What the schema, if there is one, says of an answer."""
        if self.schema is None:
            return {}
        parsed = parse_answer(text, self.schema)
        return {
            "parsed": parsed.value,
            "valid": parsed.valid,
            "problems": tuple(parsed.problems),
        }

    def refuse_request(self, error: ConchError) -> None:
        """A repair that the engine does not take, such as one that is longer than the context.

        Raises:
            ConchError: It was the question itself.
        """
        if not self._draft.repaired:
            raise error
        assert self.request is not None
        self._prompt_tokens -= len(self.request.tokens)
        self.request = None
        self._without_repair(error)

    def _without_repair(self, error: ConchError) -> None:
        why = f"the neuron's answer is not valid, and its repair cannot be asked for: {error}"
        self._end(why, hand_over=True)

    def _end(self, why: str, *, hand_over: bool = False) -> None:
        """Let the neuron's answer stand, or EGO answer where it may and is there."""
        hand_over = hand_over and self.options.hand_over != "never"
        self.asks_ego = hand_over and self._has_ego
        if hand_over and not self._has_ego:
            why += "; there is no EGO to hand over to"
        self._draft = replace(self._draft, reason=why)
        if not self.asks_ego:
            self._done(self._draft)

    def take_ego(self, ego: EgoAnswer | EgoUnavailableError) -> None:
        """Take EGO's answer, or why there is none: then the neuron's own stands.

        Raises:
            EgoUnavailableError: The neuron was not asked, so that there is no answer at all.
        """
        assert self.asks_ego
        self.asks_ego = False
        draft = self._draft
        if isinstance(ego, EgoUnavailableError):
            if self.options.hand_over == "always":
                raise ego
            self._done(replace(draft, reason=f"{draft.reason}; {ego}"))
            return
        self._completion_tokens += ego.tokens or 0
        self._done(
            replace(
                draft,
                text=ego.text,
                answered_by="ego",
                finish_reason=ego.finish_reason,
                draft=ego.draft or None,
                ego_tokens=ego.tokens,
                ego_steps=ego.steps,
                **self._checked(ego.text),
            )
        )

    def _done(self, answer: Answer) -> None:
        self.answer = replace(
            answer,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            first_token_s=self._first,
            seconds=time.perf_counter() - self._began,
        )
