"""The one thread that owns a suite and its engine: it takes turns on, steps, tells and reloads.

Knows jobs, turns and the engine; nothing of HTTP. Everything reaches it through an inbox, so that
nothing here needs a lock. Something else to do between two steps: a method put into the inbox.
"""

import math
import queue
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from conch_dna.cortex.neuron import EGO, CortexSuite
from conch_dna.cortex.options import ServerSettings
from conch_dna.cortex.server.jobs import EgoThread, Event, Job, tell_all
from conch_dna.cortex.server.metrics import ServerMetrics
from conch_dna.cortex.server.openai_api import ApiError, unknown_model
from conch_dna.cortex.turn import Answer
from conch_dna.errors import ConchError

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

    Raises:
        ConchError: A domain has EGO's name.
    """

    def __init__(
        self, suite: CortexSuite, settings: ServerSettings, *, report: Callable[[str], None]
    ) -> None:
        if suite.ego is not None and EGO in suite:
            raise ConchError(
                f"a domain is called {EGO!r}, as the big teacher is: rename its folder in "
                f"{suite.adapters_dir}"
            )
        self.suite = suite
        self.settings = settings
        self.unfinished: Callable[[], int] = lambda: 0
        self.stopping = False
        self.metrics = ServerMetrics(
            unfinished=lambda: self.unfinished(), computed=lambda: suite.engine.pending
        )
        self._report = report
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._jobs: set[Job] = set()
        self._under_way: dict[int, Job] = {}
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
                finish=lambda job, end: self._inbox.put(lambda: self._finish(job, end)),
                failed=self.fail,
            )
        suite.engine.max_batch = settings.max_batch

    # From any thread

    @property
    def models(self) -> list[str]:
        """What can be asked."""
        return [*self.suite.domains, *([EGO] if self._ego else [])]

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
            except ConchError as error:
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

    def _over(self) -> bool:
        if self._failure is not None:
            return True
        done = not (self._jobs or self.unfinished())
        return self.stopping and (done or time.monotonic() >= self._deadline)

    def _read_inbox(self) -> None:
        """Do what came in; sleeps until something does where no request is computed."""
        wait_s = _LEAVING_S if self.stopping else min(_IDLE_S, self._next_look - time.monotonic())
        if self.suite.engine.pending:
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
        except ConchError as error:
            # Once, and not at every look.
            if str(error) != self._problem:
                self._problem = str(error)
                self._report(f"not taken in: {error}")

    def _reload(self) -> list[str]:
        # Before, so that what changes meanwhile is seen at the next look.
        self._marks = self.suite.marks()
        before = {name: id(self.suite.bank.get(name)) for name in self.suite.bank.names}
        try:
            return self.suite.reload()
        finally:
            for name in self.suite.bank.names:
                if before.get(name) != id(self.suite.bank.get(name)):
                    self.metrics.reloads.labels(name).inc()
                    self._report(f"{name} answers by {self.suite.folder(name)} now")

    def _take(self, job: Job) -> None:
        if job.gone:
            return
        self._jobs.add(job)
        chat = job.chat
        try:
            if chat.model == EGO and self._ego is not None:
                if chat.options.top_p != 1:
                    raise ApiError(400, f"top_p is not supported by {EGO}: leave it out")
                self._events.append((job, ""))
                self._ego.put(job)
                return
            if chat.model not in self.suite:
                raise unknown_model(chat.model, self.models)
            job.turn = self.suite.turn(chat.model, chat.turns, chat.options)
            if job.turn.request is not None:
                self.suite.engine.check(job.turn.request)
            self._events.append((job, ""))
            self._go_on(job)
        except ApiError as error:
            self._finish(job, error)
        except ConchError as error:
            self._finish(job, ApiError(400, str(error)))

    def _go_on(self, job: Job) -> None:
        """Whatever is next for a neuron's turn: the engine, EGO, or its end."""
        turn = job.turn
        assert turn is not None
        if turn.request is not None:
            try:
                job.uid = self.suite.engine.submit(turn.request)
                self._under_way[job.uid] = job
            except ConchError as error:
                turn.refuse_request(error)
        if turn.asks_ego:
            assert self._ego is not None
            self._ego.put(job)
        elif turn.answer is not None:
            self._finish(job, turn.answer)

    def _step(self) -> None:
        engine = self.suite.engine
        if not engine.pending:
            return
        for piece in engine.step():
            job = self._under_way[piece.uid]
            assert job.turn is not None
            text = job.turn.add(piece)
            if text and job.turn.streams:
                self._events.append((job, text))
            if piece.finish_reason is not None:
                del self._under_way[piece.uid]
                job.uid = None
                self._go_on(job)

    def _finish(self, job: Job, end: Answer | ApiError) -> None:
        if job not in self._jobs:
            return
        self._jobs.discard(job)
        if isinstance(end, Answer):
            handed_over = end.answered_by == "ego" and job.turn is not None
            self.metrics.answered(job.chat.model, end, handed_over=handed_over)
        self._events.append((job, end))

    def _drop(self, job: Job) -> None:
        self._jobs.discard(job)
        if job.uid is not None:
            self.suite.engine.cancel(job.uid)
            self._under_way.pop(job.uid, None)
            job.uid = None

    def _tell(self) -> None:
        events, self._events = self._events, []
        tell_all(events)
