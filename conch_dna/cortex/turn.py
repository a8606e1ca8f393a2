"""One question to a neuron: its prompt, its tokens, its check, and who answers in the end.

Runs no model: whoever has an engine and EGO feeds it, so that a call, a batch and a server do the
same thing. To check an answer for something else: a reason in `Turn._judge`. What stands in its
text besides an answer, such as calls, is told apart in spoken.py.
"""

import json
import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import takewhile
from statistics import fmean
from typing import Any

from conch_dna.cortex.answer import Answer
from conch_dna.cortex.calibration.confidence import Calibration, answer_confidence
from conch_dna.cortex.calibration.drift import Outcome
from conch_dna.cortex.engine.batching import Piece, Request
from conch_dna.cortex.options import DRAWN_BY_NEURONS, AskOptions, DrawOptions
from conch_dna.cortex.spoken import Spoken, text_before
from conch_dna.cortex.tools import prompt_with_tools
from conch_dna.ego.grammars import WHITESPACE
from conch_dna.ego.prompts import checked_prompt, checked_text
from conch_dna.ego.settings import EgoAnswer
from conch_dna.errors import ConchError, EgoUnavailableError
from conch_dna.language_model import ModelSource
from conch_dna.options.fields import changed
from conch_dna.training.chats.conversations import Prompt, prompt_ids, prompt_turns
from conch_dna.training.data.answers import TextStream, continuation_text
from conch_dna.training.structured_answers import parse_answer, repair_messages


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
        live: Whether what `add` gives is shown as it comes, where it is final.

    Attributes:
        request: What an engine is to answer now.
        asks_ego: Whether EGO is to answer now.
        answer: When all is done.
        turns: The conversation that waits for an answer, the system prompt its first turn.
        outcome: When the neuron's first answer is there, what calibration would have seen of it;
            None where it is not of the kind that was calibrated.

    Raises:
        ConchError: The prompt is none, or an option is out of its range.
    """

    def __init__(
        self,
        domain: Domain,
        prompt: Prompt,
        options: AskOptions,
        *,
        has_ego: bool,
        live: bool = False,
    ) -> None:
        self.domain = domain
        self.options = options
        self.answer: Answer | None = None
        self.asks_ego = False
        self.request: Request | None = None
        self.outcome: Outcome | None = None
        # EGO would know nothing of the functions, and a plain text is no question.
        self._has_ego = has_ego and not options.plain and options.tools is None
        self._live = live
        self._prompt = prompt
        self._began = time.perf_counter()
        self._first: float | None = None
        own = options.system is None and not options.plain
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
        if options.hand_over == "always" and options.tools is not None:
            raise ConchError(
                "hand_over is always and there are functions, of which EGO knows nothing: leave "
                "one of them out"
            )
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
    def own_system(self) -> bool:
        """Whether the prompt or the options bring a system message of their own."""
        first = self.turns[0]
        return first["content"] != self.domain.system if first["role"] == "system" else False

    @property
    def drawn(self) -> tuple[DrawOptions, str | None]:
        """How EGO would draw an answer, and the schema that it would keep to.

        Turns that are alike in both can be answered together.
        """
        options = self.options
        draw = DrawOptions(max_tokens=options.max_tokens, temperature=options.temperature)
        if options.temperature > 0:
            draw = replace(draw, seed=options.seed)
        return draw, self._schema_text

    def with_seed(self, seed: int) -> "Turn":
        """The same question, of which nothing has come yet, to be drawn by another seed."""
        other = copy(self)
        other.options = replace(self.options, seed=seed)
        if self.request is not None:
            other.request = replace(self.request, seed=seed)
            other._begin()
        return other

    @cached_property
    def _schema_text(self) -> str | None:
        """The schema that an answer is held to while it is written."""
        held = self.schema is not None and self.options.constrained
        return json.dumps(self.schema) if held else None

    @property
    def streams(self) -> bool:
        """Whether every piece of text that `add` gives is final.

        Not so where the answer may yet be repaired or EGO's: then a neuron's comes in one piece.
        """
        hand_over = self.options.hand_over
        stands = hand_over == "never" or (hand_over == "auto" and not self._has_ego)
        return stands and (self.schema is None or self._form is not None)

    @cached_property
    def _form(self) -> str | None:
        """What the neuron's answer is held to."""
        if self.options.tools is None or not self.options.constrained:
            return self._schema_text
        return self.options.tools.grammar(self.schema, WHITESPACE)

    def _prompt_ids(self, turns: Sequence[dict[str, Any]]) -> list[int]:
        source, options = self.domain.source, self.options
        if options.plain:
            return checked_text(source, turns[0]["content"], "the prompt")
        turns, tools = prompt_with_tools(source.tokenizer, turns, options.tools)
        return checked_prompt(source, turns, "the prompt", tools=tools)

    def _ask(self, turns: Sequence[dict[str, Any]]) -> None:
        ids = self._prompt_ids(turns)
        if not ids:
            raise ConchError("the prompt is empty: there is nothing to answer")
        options = self.options
        self.request = Request(
            domain=self.domain.name,
            tokens=tuple(ids),
            prefix=common(self.domain.prefix, ids) if options.system is None else (),
            form=self._form,
            top_logprobs=options.top_logprobs or 0,
            **{each.name: getattr(options, each.name) for each in fields(DrawOptions)},
        )
        self._prompt_tokens += len(ids)
        self._begin()

    def _begin(self) -> None:
        """What comes of the answer to `request`: nothing yet."""
        assert self.request is not None
        self._pieces: list[Piece] = []
        # Characters that are certain before the first piece and behind each.
        self._certain = [0]
        self._text = TextStream(self.domain.tokenizer, list(self.request.tokens))
        self._spoken = Spoken(self.options.stop, calls=self.options.tools is not None)

    def add(self, piece: Piece) -> str:
        """Take a token of the answer to `request`.

        Where that is None afterwards and the piece is not the last one, the rest of them is not to
        be computed.

        Returns:
            The text that it makes certain; see `streams`.
        """
        assert self.request is not None
        if self._first is None:
            self._first = time.perf_counter() - self._began
        self._pieces.append(piece)
        self._completion_tokens += 1
        text, reason = "", piece.finish_reason
        if reason != "stop":
            more = self._text.add(piece.token)
            self._certain.append(self._certain[-1] + len(more))
            text = self._spoken.add(more)
        if self._spoken.stopped:
            reason = "stop"
        elif reason is not None:
            text += self._spoken.add(self._text.end()) + self._spoken.end()
            reason = "stop" if self._spoken.stopped else reason
        if reason is None:
            return text
        raw = self._spoken.text
        if not self.options.stop and not self.options.tools:
            tokens = self.request.tokens
            ids = [each.token for each in self._said]
            raw = continuation_text(self.domain.tokenizer, tokens, ids)
        if not self._draft.repaired:
            self.outcome = self._outcome(self.request)
        told = self._told() if self.options.top_logprobs is not None else None
        self.request = None
        self._judge(raw, reason, told)
        return text

    @property
    def _said(self) -> tuple[Piece, ...]:
        """The tokens so far, without the one that ends an answer."""
        return tuple(piece for piece in self._pieces if piece.finish_reason != "stop")

    def _told(self) -> tuple[Piece, ...]:
        """The tokens that a text stands for; none of those of a stop alone."""
        if not self._spoken.stopped or self.options.tools is not None:
            return self._said
        # Behind a part of a character, that is not certain yet.
        return self._said[: bisect_left(self._certain, len(self._spoken.text))]

    def _outcome(self, request: Request) -> Outcome | None:
        """What calibration would have seen of the first answer, which it cut at its own length."""
        calibration, options = self.domain.calibration, self.options
        expected = calibration.expected if calibration else None
        usual = AskOptions(
            max_tokens=options.max_tokens, seed=options.seed, top_logprobs=options.top_logprobs
        )
        if calibration is None or expected is None or self.own_system:
            return None
        if replace(options, top_p=usual.top_p) != usual or options.max_tokens < expected.max_tokens:
            return None
        most = expected.max_tokens
        log_probs = [piece.log_prob for piece in self._pieces[:most]]
        unsure = calibration.should_fallback(calibration(answer_confidence(log_probs)))
        ids = [piece.token for piece in self._said[:most]]
        text = continuation_text(self.domain.tokenizer, request.tokens, ids)
        return Outcome(unsure or self._checked(text).get("valid") is False, self._removed(most))

    def _removed(self, most: int | None = None) -> float | None:
        """Mean share of probability that the form took from so many first tokens."""
        shares = [piece.removed for piece in self._pieces[:most] if piece.removed is not None]
        return fmean(shares) if shares else None

    def begin_again(self) -> None:
        """Forget what came of the answer to `request`: all of it is to come once more."""
        assert self.request is not None
        self._completion_tokens -= len(self._pieces)
        self._begin()

    def _judge(self, raw: str, finish_reason: str, told: tuple[Piece, ...] | None) -> None:
        """Whether the neuron's answer stands, is asked for again, or is EGO's to give."""
        confidence = answer_confidence([piece.log_prob for piece in self._pieces])
        calibration = self.domain.calibration
        if calibration is not None:
            confidence = calibration(confidence)
        called = self._spoken.calls and finish_reason == "stop"
        draft = self._draft = replace(
            self._draft,
            text=raw,
            raw=raw,
            finish_reason="tool_calls" if called else finish_reason,
            calls=self._spoken.calls,
            tokens=told,
            confidence=confidence,
            calibrated=calibration is not None,
            removed=self._removed(),
            **({} if self._spoken.calls else self._checked(raw)),
        )
        if draft.calls:
            self._end("the neuron calls a function, so its answer stands")
        elif self.schema is not None and not draft.valid:
            if self._live and self.streams:
                self._end(f"the neuron's answer is not valid, and was shown: {draft.problems[0]}")
            elif draft.repaired:
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
            why += f"; {self._kept_here}"
        self._draft = replace(self._draft, reason=why)
        if not self.asks_ego:
            self._done(self._draft)

    @property
    def _kept_here(self) -> str:
        """Why EGO is not asked, though the neuron's answer is not good enough."""
        if self.options.tools is not None:
            return "a question with functions is not handed over to EGO"
        if self.options.plain:
            return "a text to go on with is not handed over to EGO"
        return "there is no EGO to hand over to"

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
        text, stopped = text_before(ego.text, self.options.stop)
        self._done(
            replace(
                draft,
                text=text,
                answered_by="ego",
                reason=draft.reason + self._left_out(),
                finish_reason="stop" if stopped else ego.finish_reason,
                tokens=None,
                **self._checked(text),
                draft=ego.draft or None,
                ego_tokens=ego.tokens,
                ego_steps=ego.steps,
            )
        )

    def _left_out(self) -> str:
        """What of the options EGO does not know, in words."""
        told = ["logprobs"] if self.options.top_logprobs is not None else []
        if missing := changed(self.options, DRAWN_BY_NEURONS) + told:
            return f"; EGO answers without {', '.join(missing)}"
        return ""

    def _done(self, answer: Answer) -> None:
        self.answer = replace(
            answer,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            first_token_s=self._first,
            seconds=time.perf_counter() - self._began,
        )
