"""The one thread that owns a suite and its engine: it takes turns on, steps, tells and reloads.

Knows jobs, turns and the engine; nothing of HTTP. Everything reaches it through an inbox, so that
nothing here needs a lock. Something else to do between two steps: a method put into the inbox.
"""

import math
import queue
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any

from conch_dna.cortex.answer import Answer
from conch_dna.cortex.engine.batching import Piece
from conch_dna.cortex.neuron import CortexSuite
from conch_dna.cortex.options import DRAWN_BY_NEURONS, AskOptions, ServerSettings
from conch_dna.cortex.server.drift_watch import DriftWatch
from conch_dna.cortex.server.jobs import EgoThread, Event, Job, Part, Question, tell_all
from conch_dna.cortex.server.metrics import ServerMetrics
from conch_dna.cortex.server.openai_api import AnyRequest, unknown_model
from conch_dna.errors import ConchError, EgoUnavailableError, one_line
from conch_dna.options.fields import changed
from conch_dna.training.cross_tokenizer.token_bytes import token_bytes
from conch_dna.training.settings import EGO
from conch_dna.web.door import ApiError

STOPPING = "the server is stopping: ask again when it is back"
# Longest sleep of an idle loop, in seconds; what comes in wakes it.
_IDLE_S = 1.0
# After which silence it looks whether the last client has its answer.
_LEAVING_S = 0.02


class ServerLoop:
    """Answers jobs until it is stopped. `run` is for the thread that owns the suite.

    Args:
        suite: The neurons, and EGO.
        settings: Of the server.
        report: Gets a line for what the one who runs the server should know.

    Attributes:
        metrics: What is counted.
        unfinished: How many requests have a connection that waits; set by whoever has those.
        stopping: Whether new requests are to be refused.
    """

    def __init__(
        self, suite: CortexSuite, settings: ServerSettings, *, report: Callable[[str], None]
    ) -> None:
        self.suite = suite
        self.settings = settings
        self.unfinished: Callable[[], int] = lambda: 0
        self.stopping = False
        self._watch = DriftWatch(suite, report=report)
        self.metrics = ServerMetrics(
            unfinished=lambda: self.unfinished(),
            computed=lambda: suite.engine.pending,
            drift=lambda: self._watch.findings,
        )
        self._report = report
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._jobs: set[Job] = set()
        self._under_way: dict[int, Job] = {}
        # After a batch has failed: the one of its requests that is answered alone, those that will
        # be, how many there were, what came meanwhile, and whether one failed alone too.
        self._single: Job | None = None
        self._singles: deque[Job] = deque()
        self._batch = 0
        self._held: list[Job] = []
        self._culprit = False
        self._events: list[tuple[Job, Event]] = []
        self._deadline = float("inf")
        self._marks: dict[str, Any] = {}
        self._between_looks = settings.poll_s or math.inf
        self._next_look = 0.0
        self._problem = ""
        self._failure: BaseException | None = None
        self._ego: EgoThread | None = None
        if suite.ego is not None:
            self._ego = EgoThread(
                suite,
                tell=lambda job, text: self._inbox.put(lambda: self._part(job, text)),
                finish=lambda job, end: self._inbox.put(lambda: self._finish(job, end)),
                failed=self.fail,
                report=report,
            )
        suite.engine.max_batch = settings.max_batch

    # From any thread

    @property
    def models(self) -> list[str]:
        """What can be asked."""
        return [*self.suite.domains, *([EGO] if self._ego else [])]

    def prepare(self, asked: AnyRequest) -> list[Question]:
        """What a request wants answered, every prompt tokenised.

        Raises:
            ApiError: It cannot be answered.
        """
        model = asked.model
        if model not in self.models:
            raise unknown_model(model, self.models)
        most = self.settings.max_queue
        if asked.count > most:
            raise ApiError(
                400,
                f"the request wants {asked.count} answers, and at most {most} are waited for at "
                "once: ask for fewer",
                param="n",
            )
        try:
            questions = asked.questions
            if model == EGO:
                for _, options in questions:
                    _require_for_ego(options)
                    self._check_form(options)
                return [Question(model, *each, None, asked.stream) for each in questions]
            made = []
            turn = before = None
            for prompt, options in questions:
                if turn is not None and prompt is before:
                    turn = turn.with_seed(options.seed)
                else:
                    turn = self.suite.turn(model, prompt, options, live=asked.stream)
                    if turn.request is not None:
                        self.suite.engine.check(turn.request)
                before = prompt
                made.append(Question(model, prompt, options, turn, asked.stream))
        except ApiError:
            raise
        except ConchError as error:
            raise ApiError(400, str(error)) from error
        return made

    def _check_form(self, options: AskOptions) -> None:
        """Refuse a schema to which EGO cannot keep; one that is not there says so itself."""
        assert self.suite.ego is not None
        if options.schema is not None and options.constrained:
            with suppress(EgoUnavailableError):
                self.suite.ego.check_schema(options.schema)

    def token_texts(self) -> Sequence[bytes]:
        """The bytes of every token of the student.

        Raises:
            ApiError: Its tokenizer does not list them.
        """
        try:
            return token_bytes(self.suite.base.tokenizer).texts
        except ConchError as error:
            raise ApiError(400, f"log-probabilities cannot be told: {error}") from error

    def put(self, job: Job) -> None:
        """Answer a request; its events tell the rest."""
        self._inbox.put(lambda: self._take(job))

    def forget(self, job: Job) -> None:
        """Nobody waits for it any more; nothing happens where it is done."""
        job.gone = True
        self._inbox.put(lambda: self._drop(job))

    def reload(self) -> "Future[list[str]]":
        """Take in what is new in the folder of adapters; gives the domains that changed."""
        changed: Future[list[str]] = Future()

        def now() -> None:
            try:
                changed.set_result(self._reload())
            except Exception as error:  # noqa: BLE001  (raised where it was asked for)
                changed.set_exception(error)

        self._inbox.put(now)
        return changed

    def stop(self, grace_s: float) -> None:
        """Refuse new requests, and end when those under way are done or the time is over."""

        def leave() -> None:
            self._deadline = min(self._deadline, time.monotonic() + grace_s)

        self.stopping = True
        self._inbox.put(leave)

    def fail(self, error: BaseException) -> None:
        """End at once, and raise this in `run`."""

        def leave() -> None:
            self._failure = error

        self._inbox.put(leave)

    # In its own thread

    def run(self) -> None:
        """Answer until `stop`; requests that are not done by then are told so."""
        if self._ego is not None:
            self._ego.start()
        self._marks = self.suite.marks()
        self._next_look = time.monotonic() + self._between_looks
        try:
            while not self._over():
                self._read_inbox()
                self._look()
                self._step()
                self._tell()
                self._watch.save_sometimes()
            if self._failure is not None:
                raise self._failure
        finally:
            self.stopping = True
            while not self._inbox.empty():
                self._inbox.get()()
            for job in list(self._jobs):
                self._drop(job)
                self._events.append((job, ApiError(503, STOPPING)))
            self._tell()
            if self._ego is not None and not self._ego.stop(wait_s=1.0):
                self._report("EGO was left in the middle of an answer")
            self._watch.save(wait_s=2.0)

    def _over(self) -> bool:
        if self._failure is not None:
            return True
        done = not (self._jobs or self.unfinished())
        return self.stopping and (done or time.monotonic() >= self._deadline)

    def _read_inbox(self) -> None:
        """Do what came in; sleeps until something does where no request is computed."""
        wait_s = _LEAVING_S if self.stopping else min(_IDLE_S, self._next_look - time.monotonic())
        if self.suite.engine.pending or self._single is not None or self._singles:
            wait_s = 0
        try:
            while True:
                self._inbox.get(timeout=max(wait_s, 0))()
                wait_s = 0
        except queue.Empty:
            pass

    def _look(self) -> None:
        """Take in new versions, where it is time to look for them."""
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + self._between_looks
        try:
            if self.suite.marks() != self._marks:
                self._reload()
            self._problem = ""
        except Exception as error:  # noqa: BLE001  (the neurons that there are go on)
            why = str(error) if isinstance(error, ConchError) else one_line(error)
            # Once, and not at every look.
            if why != self._problem:
                self._problem = why
                self._report(f"not taken in: {why}")

    def _reload(self) -> list[str]:
        # Before, so that what changes meanwhile is seen at the next look.
        self._marks = self.suite.marks()
        before = {name: id(self.suite.bank.get(name)) for name in self.suite.bank.names}
        try:
            return self.suite.reload()
        finally:
            self._watch.take_in()
            for name in self.suite.bank.names:
                if before.get(name) != id(self.suite.bank.get(name)):
                    self.metrics.reloads.labels(name).inc()
                    self._report(f"{name} answers by {self.suite.folder(name)} now")

    def _take(self, job: Job) -> None:
        if job.gone:
            return
        self._jobs.add(job)
        self._events.append((job, Part("")))
        self._attempt(job, self._go_on)

    def _attempt(self, job: Job, work: Callable[[Job], None]) -> None:
        """Do something for a job; where it fails, it is the failure of this job alone."""
        try:
            work(job)
        except ApiError as error:
            self._end(job, error)
        except ConchError as error:
            self._end(job, ApiError(400, str(error)))
        except Exception as error:  # noqa: BLE001  (told, and the others go on)
            self._fail_alone(job, error)

    def _fail_alone(self, job: Job, error: Exception) -> None:
        self._culprit = self._culprit or job is self._single
        why = one_line(error)
        self._report(f"a request to {job.model} failed: {why}")
        self._end(job, ApiError(500, f"the answer failed ({why}): ask again, or for fewer tokens"))

    def _end(self, job: Job, error: ApiError) -> None:
        self._finish(job, error)
        self._drop(job)

    def _go_on(self, job: Job) -> None:
        """Whatever is next for a job: the engine, EGO, or its end."""
        turn = job.turn
        if turn is not None and turn.request is not None:
            if self._singling and job is not self._single:
                self._held.append(job)
                return
            try:
                job.uid = self.suite.engine.submit(turn.request)
                self._under_way[job.uid] = job
            except ConchError as error:
                turn.refuse_request(error)
        if turn is None or turn.asks_ego:
            assert self._ego is not None
            self._ego.put(job)
        elif turn.answer is not None:
            self._finish(job, turn.answer)

    def _step(self) -> None:
        engine = self.suite.engine
        if not engine.pending:
            self._next_single()
        if not engine.pending:
            return
        try:
            pieces = engine.step()
        except Exception as error:  # noqa: BLE001  (told, and each is answered alone)
            self._batch_failed(error)
            return
        for piece in pieces:
            if job := self._under_way.get(piece.uid):
                self._attempt(job, partial(self._add, piece))

    def _add(self, piece: Piece, job: Job) -> None:
        """Take a token of a job's answer."""
        assert job.turn is not None
        asked = job.turn.request
        text = job.turn.add(piece)
        if job.turn.streams and (part := job.unsent(piece, text)):
            self._events.append((job, part))
        if job.turn.request is not asked:
            if piece.finish_reason is None:
                self.suite.engine.cancel(piece.uid)
            del self._under_way[piece.uid]
            job.uid = None
            if job.index == 0:
                # Several answers to one question are no answers to several.
                self._watch.add(job.turn)
            self._go_on(job)

    def _batch_failed(self, error: Exception) -> None:
        """Forget a batch that failed: its only request fails, each of several is answered alone."""
        jobs = list(self._under_way.values())
        self._under_way.clear()
        self.suite.engine.abandon()
        for job in jobs:
            job.uid = None
        if len(jobs) < 2:
            for job in jobs:
                self._fail_alone(job, error)
            return
        self._report(
            f"a batch of {len(jobs)} requests failed, each is answered alone: {one_line(error)}"
        )
        self._batch = min(len(jobs), self.suite.engine.max_batch)
        self._culprit = False
        for job in jobs:
            job.begin_again()
        self._singles.extend(jobs)

    @property
    def _singling(self) -> bool:
        """Whether requests are answered one at a time, after a batch has failed."""
        return self._single is not None or bool(self._singles)

    def _next_single(self) -> None:
        """Begin the next request that is answered alone; after the last, what came meanwhile."""
        if not self._singling:
            return
        while self._singles:
            self._single = self._singles.popleft()
            if self._single in self._jobs:
                self._attempt(self._single, self._go_on)
            if self.suite.engine.pending:
                return
        self._single = None
        if not self._culprit:
            # Each can be answered and all together cannot: there were too many of them.
            self.suite.engine.max_batch = max(1, self._batch // 2)
            self._report(f"at most {self.suite.engine.max_batch} are answered together from now on")
        held, self._held = self._held, []
        for job in held:
            if job in self._jobs:
                self._attempt(job, self._go_on)

    def _part(self, job: Job, text: str) -> None:
        """Send the next text of EGO's answer."""
        if job in self._jobs:
            self._events.append((job, Part(text)))

    def _finish(self, job: Job, end: Answer | ApiError) -> None:
        if job not in self._jobs:
            return
        self._jobs.discard(job)
        if isinstance(end, Answer):
            handed_over = end.answered_by == "ego" and job.turn is not None
            self.metrics.answered(job.model, end, handed_over=handed_over)
        self._events.append((job, end))

    def _drop(self, job: Job) -> None:
        self._jobs.discard(job)
        if job.uid is not None:
            uid, job.uid = job.uid, None
            self._under_way.pop(uid, None)
            try:
                self.suite.engine.cancel(uid)
            except Exception as error:  # noqa: BLE001  (those who shared a batch with it go on)
                self._batch_failed(error)

    def _tell(self) -> None:
        events, self._events = self._events, []
        tell_all(events)


def _require_for_ego(options: AskOptions) -> None:
    """Refuse what EGO as a model knows nothing of."""
    if options.plain:
        raise ApiError(400, f"{EGO} does not go on with texts: ask it at /v1/chat/completions")
    names = {"top_logprobs": "logprobs"}
    unknown = ("tools", "top_logprobs", *DRAWN_BY_NEURONS)
    if wrong := changed(options, unknown):
        name = names.get(wrong[0], wrong[0])
        raise ApiError(400, f"{name} is not supported by {EGO}: leave it out", param=name)
