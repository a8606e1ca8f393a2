"""Requests on their way through the server's threads, and the thread in which EGO answers.

Knows a request, its turn, asyncio's queue and a suite's EGO; neither HTTP nor neurons. Something
else to tell a waiting client: a type in `Event`, and a branch where replies are sent (app.py). What
EGO is to do for clients: a branch in `EgoThread._answer`.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from conch_dna.cortex.answer import Answer
from conch_dna.cortex.engine.batching import Piece
from conch_dna.cortex.neuron import CortexSuite
from conch_dna.cortex.options import AskOptions
from conch_dna.cortex.spoken import drained, pieces_before, text_before
from conch_dna.cortex.turn import Turn
from conch_dna.errors import ConchError, EgoUnavailableError, one_line
from conch_dna.training.chats.conversations import Prompt, prompt_ids, prompt_turns
from conch_dna.web.door import ApiError

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """A part of an answer that is final.

    Attributes:
        text: What is said; the first is empty, and says that the request can be answered.
        tokens: Those that it stands for, where log-probabilities were asked for.
    """

    text: str
    tokens: tuple[Piece, ...] | None = None


# The last event of an answer is an Answer or an ApiError.
Event = Part | Answer | ApiError
# Which answer of a request, and what there is of it.
Events = asyncio.Queue[tuple[int, Event]]


@dataclass(frozen=True)
class Question:
    """One answer that a request asks for.

    Attributes:
        model: Who is to answer.
        prompt: A conversation, or a text to go on with.
        options: How it is to be answered.
        turn: A neuron's question; None where EGO was asked for.
        stream: Whether it is told as it comes.
    """

    model: str
    prompt: Prompt
    options: AskOptions
    turn: Turn | None
    stream: bool


class Job:
    """A question between the client's connection and the models. Made in the connection's loop.

    Args:
        question: What is to be answered.
        events: What the connection waits for.
        index: Which of the request's answers it is.

    Attributes:
        uid: Its number in the engine, while it is there.
        gone: Whether nobody waits for it any more.
        connections: The event loop in which the connection waits.
    """

    def __init__(self, question: Question, events: Events, index: int = 0) -> None:
        self.model = question.model
        self.prompt = question.prompt
        self.options = question.options
        self.turn = question.turn
        self.stream = question.stream
        self.events = events
        self.index = index
        self.uid: int | None = None
        self.gone = False
        self.connections = asyncio.get_running_loop()
        self._sent = self._again = ""
        # Tokens whose text is not certain yet, and how many were sent before it began again.
        self._tokens: list[Piece] = []
        self._sent_tokens = self._tokens_again = 0

    def begin_again(self) -> None:
        """The answer under way comes from its beginning once more."""
        assert self.turn is not None
        self.turn.begin_again()
        # Without a stream nothing was shown, so that it may go on otherwise.
        self._again = self._sent if self.stream else ""
        self._tokens, self._tokens_again = [], self._sent_tokens

    def unsent(self, piece: Piece, text: str) -> Part | None:
        """What of the answer was not sent yet.

        Args:
            piece: Its next token.
            text: What that makes certain.

        Raises:
            ApiError: The answer goes on otherwise than before it began again.
        """
        length = min(len(text), len(self._again))
        if text[:length] != self._again[:length]:
            raise ApiError(500, "the answer broke off and could not be taken up: ask again")
        self._again = self._again[length:]
        self._sent += text[length:]
        told = self.options.top_logprobs is not None
        if self._tokens_again:
            self._tokens_again -= 1
        elif told and piece.finish_reason != "stop":
            self._tokens.append(piece)
        if not text[length:]:
            return None
        tokens, self._tokens = tuple(self._tokens), []
        self._sent_tokens += len(tokens)
        return Part(text[length:], tokens if told else None)


def tell_all(events: Sequence[tuple[Job, Event]]) -> None:
    """Tell the connections of one server, in one go, from any thread."""

    def put() -> None:
        for job, event in events:
            job.events.put_nowait((job.index, event))

    if events and not events[0][0].connections.is_closed():
        events[0][0].connections.call_soon_threadsafe(put)


class _LeftError(Exception):
    """Nobody waits for what EGO is at, or the server ends."""


class EgoThread:
    """Answers jobs one after the other, hand-overs that are drawn alike and greedy together.

    What is streamed is answered alone. The neurons go on meanwhile. A thread of its own also
    because EGO's model may be used by one only.

    Args:
        suite: With an EGO. Only `ego`, `drafts`, `answer_by_ego`, `stream_by_ego` and what these
            remember are used.
        tell: Gets a job that streams and the next text of its answer; called in this thread.
        finish: Gets every job with its answer or why there is none; called in this thread.
        failed: Gets what ends the thread, such as an interrupt.
        report: Gets a line for what the one who runs the server should know.
    """

    def __init__(
        self,
        suite: CortexSuite,
        *,
        tell: Callable[[Job, str], None],
        finish: Callable[[Job, Answer | ApiError], None],
        failed: Callable[[BaseException], None],
        report: Callable[[str], None],
    ) -> None:
        self._suite = suite
        self._tell = tell
        self._finish = finish
        self._failed = failed
        self._report = report
        self._waiting: list[Job] = []
        self._change = threading.Condition()
        self._ending = False
        # A daemon, since a model that reads a long prompt, or an API, cannot be stopped.
        self._thread = threading.Thread(target=self._run, name="ego", daemon=True)

    def start(self) -> None:
        """Begin; EGO is loaded with the first job."""
        self._thread.start()

    def put(self, job: Job) -> None:
        """Let EGO answer; from any thread."""
        with self._change:
            self._waiting.append(job)
            self._change.notify()

    def stop(self, *, wait_s: float) -> bool:
        """End the thread at the next token of what it is at, or the end of an API's answer.

        Returns:
            Whether it ended in that time.
        """
        with self._change:
            self._ending = True
            self._change.notify()
        if self._thread.is_alive():
            self._thread.join(wait_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while jobs := self._next():
                self._attempt(jobs)
        except BaseException as error:  # noqa: BLE001  (raised in the server's thread)
            self._failed(error)

    def _next(self) -> list[Job]:
        """The first job that waits, with those that EGO can answer together with it.

        Returns:
            None at the end.
        """
        with self._change:
            while not self._ending:
                self._waiting = [job for job in self._waiting if not job.gone]
                if self._waiting:
                    jobs = self._alike(self._waiting[0])
                    self._waiting = [job for job in self._waiting if job not in jobs]
                    return jobs
                self._change.wait()
        return []

    def _alike(self, first: Job) -> list[Job]:
        # What is drawn at random depends on who shares a batch.
        if first.turn is None or first.turn.options.temperature > 0 or first.stream:
            return [first]
        assert self._suite.ego is not None
        drawn = first.turn.drawn
        alike = [
            job
            for job in self._waiting
            if job.turn is not None and job.turn.drawn == drawn and not job.stream
        ]
        return alike[: self._suite.ego.config.batch_size]

    def _attempt(self, jobs: list[Job]) -> None:
        """Answer jobs together; where that fails, each alone."""
        try:
            self._answer(jobs)
        except _LeftError:
            pass
        except Exception as error:  # noqa: BLE001  (the failure of these jobs alone)
            self._report(f"EGO failed for {len(jobs)} requests: {one_line(error)}")
            if len(jobs) > 1:
                for job in jobs:
                    self._attempt([job])
                return
            answer = jobs[0].turn and jobs[0].turn.answer
            why = f"EGO failed ({one_line(error)}): ask again, or for fewer tokens"
            self._finish(jobs[0], answer or ApiError(500, why))

    def _answer(self, jobs: list[Job]) -> None:
        if jobs[0].turn is None:
            self._finish(jobs[0], self._by_name(jobs[0]))
            return
        refused = "EGO gave no answer: ask again"
        turns = [job.turn for job in jobs if job.turn is not None]
        waiting = [turn for turn in turns if turn.asks_ego]
        check, known = partial(self._check, jobs), list(self._suite.notes)
        try:
            if waiting and jobs[0].stream:
                self._told(jobs[0], self._suite.stream_by_ego(waiting[0], check=check))
            elif waiting:
                self._suite.answer_by_ego(waiting, check=check)
        except EgoUnavailableError as error:
            refused = str(error)
        for note in self._suite.notes:
            if note not in known:
                self._report(note)
        for job, turn in zip(jobs, turns, strict=True):
            self._finish(job, turn.answer or ApiError(503, refused))

    def _check(self, jobs: Sequence[Job]) -> None:
        """Stop EGO where nobody waits for it.

        Raises:
            _LeftError: So it is.
        """
        if self._ending or all(job.gone for job in jobs):
            raise _LeftError

    def _told(self, job: Job, pieces: Generator[str, None, T]) -> T:
        """Tell a job the pieces of its answer as they come; gives what they end with."""

        def take(piece: str) -> None:
            self._tell(job, piece)
            self._check([job])

        return drained(pieces, take)

    def _by_name(self, job: Job) -> Answer | ApiError:
        """EGO as the model that was asked for."""
        ego, options = self._suite.ego, job.options
        assert ego is not None
        began = time.perf_counter()
        try:
            turns = prompt_turns(job.prompt, options.system or "")
            how: dict[str, Any] = {
                "max_tokens": options.max_tokens,
                "temperature": options.temperature,
                "seed": options.seed,
                "draft": self._suite.drafts.of(None, options, options.schema),
                "check": partial(self._check, [job]),
                "schema": options.schema if options.constrained else None,
            }
            # An API says only at the end how many tokens there were.
            if job.stream or (options.stop and not ego.config.is_endpoint):
                pieces = pieces_before(ego.stream(turns, **how), options.stop)
                answer = self._told(job, pieces) if job.stream else drained(pieces)
            else:
                [answer] = ego.generate_many([turns], **how)
            why = answer.undrafted
            # An API does not say how long a prompt was.
            prompt = None
            if not ego.config.is_endpoint:
                prompt = len(prompt_ids(ego.source.tokenizer, turns, ""))
        except EgoUnavailableError as error:
            return ApiError(503, str(error))
        except ConchError as error:
            return ApiError(400, str(error))
        text, stopped = text_before(answer.text, options.stop)
        return Answer(
            domain=job.model,
            text=text,
            answered_by="ego",
            reason="EGO was asked for" + (f"; not drafted: {why}" if why else ""),
            finish_reason="stop" if stopped else answer.finish_reason,
            prompt_tokens=prompt,
            completion_tokens=answer.tokens,
            draft=answer.draft or None,
            ego_tokens=answer.tokens,
            ego_steps=answer.steps,
            seconds=time.perf_counter() - began,
        )
