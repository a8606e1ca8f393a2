"""One question to a neuron: its prompt, its tokens, its check, and who answers in the end.

Runs no model: whoever has an engine and EGO feeds it, so that a call, a batch and a server do the
same thing. To check an answer for something else: a reason in `Turn._verdict`.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

from conch_dna.cortex.calibration.confidence import Calibration, answer_confidence
from conch_dna.cortex.engine.batching import Piece, Request
from conch_dna.cortex.options import AskOptions
from conch_dna.ego.settings import EgoAnswer
from conch_dna.errors import ConchError, EgoUnavailableError
from conch_dna.training.answers import continuation_text
from conch_dna.training.conversations import checked_turns
from conch_dna.training.records import Prompt, prompt_ids
from conch_dna.training.structured_answers import Parsed, parse_answer, repair_messages
from conch_dna.training.text_stream import TextStream


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
        finish_reason: "stop" or, where it was cut off, "length".
        prompt_tokens: Of the neuron's prompts, a repair's among them.
        completion_tokens: Of its answers, likewise; with EGO's where it answered and said.
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
    finish_reason: str = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_token_s: float | None = None
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return asdict(self)


class Domain:
    """What a neuron knows before it is asked.

    Args:
        name: Its adapter's in the bank.
        tokenizer: Of the student, as mlx_lm wraps it.
        system: Its system prompt; may be empty.
        schema: Of its answers; None where it has none.
        calibration: Of its confidence; None where there is none.
    """

    def __init__(
        self,
        name: str,
        tokenizer: Any,
        *,
        system: str,
        schema: Mapping[str, Any] | None,
        calibration: Calibration | None,
    ) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.system = system
        self.schema = schema
        self.calibration = calibration

    @cached_property
    def prefix(self) -> tuple[int, ...]:
        """Tokens that every prompt of the domain begins with: of the system prompt, mostly."""
        if not self.system:
            return ()
        return common(*(prompt_ids(self.tokenizer, text, self.system) for text in ("a", "1")))


def common(first: Sequence[int], second: Sequence[int]) -> tuple[int, ...]:
    """The longest beginning that two sequences share."""
    length = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        length += 1
    return tuple(first[:length])


class Turn:
    """A question on its way to an answer.

    While `request` is not None, an engine answers it and every piece goes to `add`. While
    `asks_ego`, EGO answers `turns` and that goes to `take_ego`. Then there is an `answer`.

    Args:
        domain: Who is asked.
        prompt: A text, or a conversation of messages with role and content.
        options: See there.
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
        self._began = time.perf_counter()
        self._first: float | None = None
        own = options.system is None
        self.turns = checked_turns(prompt, domain.system if own else options.system or "")
        self.schema = domain.schema if own and options.structured else None
        self._repaired = False
        self._why = ""
        self._raw = ""
        self._parsed: Parsed | None = None
        self._confidence: float | None = None
        self._finish = "stop"
        self._prompt_tokens = self._completion_tokens = 0
        if options.hand_over == "always":
            self._end("EGO was asked for", ego=True)
        else:
            self._ask(self.turns)

    @property
    def conversation(self) -> list[dict[str, str]]:
        """The turns without the system prompt, as experience keeps them."""
        return [turn for turn in self.turns if turn["role"] != "system"]

    @property
    def drawn(self) -> tuple[int, float, int]:
        """How EGO would draw an answer; turns that are alike in it can be answered together."""
        return self.options.max_tokens, self.options.temperature, self.options.seed

    @property
    def streams(self) -> bool:
        """Whether every piece of text that `add` gives is final.

        Not so where the answer is EGO's, or may yet be repaired or EGO's: then it comes in one
        piece.
        """
        may_pass = self.options.hand_over == "auto" and self._has_ego
        return self.schema is None and not may_pass and self.options.hand_over != "always"

    def _ask(self, turns: Sequence[dict[str, str]]) -> None:
        tokenizer = self.domain.tokenizer
        ids = prompt_ids(tokenizer, list(turns), "")
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
        )
        self._ids: list[int] = []
        self._log_probs: list[float] = []
        self._text = TextStream(tokenizer, ids)
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
        self._completion_tokens += 1
        stopped = piece.finish_reason == "stop"
        text = ""
        if not stopped:
            self._ids.append(piece.token)
            text = self._text.add(piece.token)
        if piece.finish_reason is None:
            return text
        self._finish = piece.finish_reason
        text += self._text.end()
        prompt = self.request.tokens
        self._raw = continuation_text(self.domain.tokenizer, prompt, self._ids)
        self.request = None
        self._verdict()
        return text

    def _verdict(self) -> None:
        """Whether the neuron's answer stands, is asked for again, or is EGO's to give."""
        raw = answer_confidence(self._log_probs)
        calibration = self.domain.calibration
        self._confidence = raw if calibration is None else calibration(raw)
        if self.schema is not None:
            self._parsed = parse_answer(self._raw, self.schema)
            if not self._parsed.valid:
                if not self._repaired and self._repair():
                    return
                why = f"the neuron's answer is not valid: {self._parsed.problems[0]}"
                self._end(why, ego=self.options.hand_over == "auto")
                return
        if calibration is None:
            self._end("the neuron's confidence is not calibrated, so its answer stands")
        elif calibration.should_fallback(self._confidence):
            least = calibration.threshold
            wanted = "none is enough" if least is None else f"below {least:.3f}"
            why = f"the neuron's confidence is {self._confidence:.3f}, {wanted}"
            self._end(why, ego=self.options.hand_over == "auto")
        else:
            self._end(
                f"the neuron's confidence is {self._confidence:.3f}, at least "
                f"{calibration.threshold:.3f}"
            )

    def _repair(self) -> bool:
        """Ask once more, with what is wrong; False where that does not fit into the context."""
        assert self._parsed is not None and self.schema is not None
        self._repaired = True
        again = repair_messages(self.turns, self._raw, self._parsed.problems, self.schema)
        self._ask(again)
        return True

    def refuse_request(self, error: ConchError) -> None:
        """A repair that the engine does not take, such as one that is longer than the context.

        Raises:
            ConchError: It was the question itself.
        """
        if not self._repaired:
            raise error
        assert self.request is not None
        self._prompt_tokens -= len(self.request.tokens)
        self.request = None
        why = f"the neuron's answer is not valid, and its repair cannot be asked for: {error}"
        self._end(why, ego=self.options.hand_over == "auto")

    def _end(self, why: str, *, ego: bool = False) -> None:
        self._why = why
        if ego and self._has_ego:
            self.asks_ego = True
        elif ego:
            self._own(f"{why}; there is no EGO to hand over to")
        else:
            self._own(why)

    def _own(self, reason: str) -> None:
        self._done(self._raw, "neuron", reason, self._parsed, self._finish)

    def take_ego(self, found: EgoAnswer | EgoUnavailableError) -> None:
        """Take EGO's answer, or why there is none: then the neuron's own stands.

        Raises:
            EgoUnavailableError: The neuron was not asked, so that there is no answer at all.
        """
        assert self.asks_ego
        self.asks_ego = False
        if isinstance(found, EgoUnavailableError):
            if self.options.hand_over == "always":
                raise found
            self._own(f"{self._why}; {found}")
            return
        parsed = parse_answer(found.text, self.schema) if self.schema is not None else None
        self._completion_tokens += found.tokens or 0
        self._done(found.text, "ego", self._why, parsed, found.finish_reason)

    def _done(
        self,
        text: str,
        by: Literal["neuron", "ego"],
        reason: str,
        parsed: Parsed | None,
        finish: str,
    ) -> None:
        calibration = self.domain.calibration
        self.answer = Answer(
            domain=self.domain.name,
            text=text,
            answered_by=by,
            reason=reason,
            raw=self._raw,
            parsed=parsed.value if parsed else None,
            valid=parsed.valid if parsed else None,
            problems=tuple(parsed.problems) if parsed else (),
            repaired=self._repaired,
            confidence=self._confidence,
            calibrated=calibration is not None and self._confidence is not None,
            threshold=calibration.threshold if calibration else None,
            finish_reason=finish,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            first_token_s=self._first,
            seconds=time.perf_counter() - self._began,
        )
