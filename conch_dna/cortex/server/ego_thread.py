"""The thread in which EGO answers, so that the neurons go on meanwhile.

Knows jobs, a suite's EGO and its experience; no neurons and no HTTP. A thread of its own also
because EGO's model may be used by one only. What EGO is to do for clients: a branch in `_answer`.
"""

import threading
import time
from collections import deque
from collections.abc import Callable

from conch_dna.cortex.neuron import CortexSuite
from conch_dna.cortex.server.jobs import Job
from conch_dna.cortex.server.replies import Reply, reply_of, reply_of_ego
from conch_dna.cortex.server.requests import ApiError
from conch_dna.errors import ConchError, EgoUnavailableError
from conch_dna.training.chats.conversations import prompt_ids, prompt_turns

Finish = Callable[[Job, Reply | ApiError], None]


class EgoThread:
    """Answers jobs one after the other, hand-overs that are drawn alike and greedy together.

    Args:
        suite: With an EGO. Only `ego`, `answer_by_ego` and what that remembers are used.
        finish: Gets every job with its reply or why there is none; called in this thread.
        failed: Gets an error that is no user's mistake; the thread is at its end then.
    """

    def __init__(
        self, suite: CortexSuite, *, finish: Finish, failed: Callable[[BaseException], None]
    ) -> None:
        self._suite = suite
        self._finish = finish
        self._failed = failed
        self._waiting: deque[Job] = deque()
        self._change = threading.Condition()
        self._ending = False
        # A daemon, since a model that is in the middle of an answer cannot be stopped.
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
        """End the thread when it has answered what it is at.

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
                self._answer(jobs)
        except BaseException as error:  # noqa: BLE001  (raised in the server's thread)
            self._failed(error)

    def _next(self) -> list[Job]:
        """The jobs to answer now; none at the end."""
        with self._change:
            while not self._ending:
                while self._waiting and self._waiting[0].gone:
                    self._waiting.popleft()
                if self._waiting:
                    return self._alike()
                self._change.wait()
        return []

    def _alike(self) -> list[Job]:
        """The first that waits, with those that EGO can answer together with it."""
        first = self._waiting.popleft()
        # What is drawn at random depends on who shares a batch.
        if first.turn is None or first.turn.options.temperature > 0:
            return [first]
        assert self._suite.ego is not None
        most = self._suite.ego.config.batch_size
        drawn = first.turn.drawn
        fits = [
            job
            for job in self._waiting
            if not job.gone and job.turn is not None and job.turn.drawn == drawn
        ][: most - 1]
        for job in fits:
            self._waiting.remove(job)
        return [first, *fits]

    def _answer(self, jobs: list[Job]) -> None:
        if jobs[0].turn is None:
            self._finish(jobs[0], self._by_name(jobs[0]))
            return
        refused = ""
        try:
            self._suite.answer_by_ego([job.turn for job in jobs if job.turn is not None])
        except EgoUnavailableError as error:
            refused = str(error)
        for job in jobs:
            assert job.turn is not None
            answer = job.turn.answer
            self._finish(job, reply_of(answer) if answer else ApiError(503, refused))

    def _by_name(self, job: Job) -> Reply | ApiError:
        """EGO as the model that was asked for."""
        ego, options = self._suite.ego, job.chat.options
        assert ego is not None
        began = time.perf_counter()
        try:
            turns = prompt_turns(list(job.chat.messages), options.system or "")
            [answer] = ego.generate_many(
                [turns],
                max_tokens=options.max_tokens,
                temperature=options.temperature,
                seed=options.seed,
            )
            # An API does not say how long a prompt was.
            prompt = None
            if not ego.config.is_endpoint:
                prompt = len(prompt_ids(ego.source.tokenizer, turns, ""))
        except EgoUnavailableError as error:
            return ApiError(503, str(error))
        except ConchError as error:
            return ApiError(400, str(error))
        return reply_of_ego(answer, prompt, time.perf_counter() - began)
