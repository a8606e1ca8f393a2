"""A suite of neurons behind OpenAI's chat API: from a socket and a suite to the last answer.

Knows how threads and signals belong together; the addresses are in app.py, the models in
loop.py. More to listen to than one socket: `CortexServer.__init__`.
"""

import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import click

from conch_dna.cortex.neuron import CortexSuite
from conch_dna.cortex.options import ServerSettings
from conch_dna.cortex.server.app import make_app
from conch_dna.cortex.server.embeddings import EmbeddingThread, open_student
from conch_dna.cortex.server.loop import ServerLoop
from conch_dna.web.connections import guarded_server, listening

# The longest that a thread which reads a long body keeps the others waiting; Python's 5 ms are as
# long as a step of a small model, which waits several times a step.
_SWITCH_S = 0.0005

_to_standard_error = partial(click.echo, err=True)


class CortexServer:
    """A server that listens; it answers while `run` runs.

    The thread that calls `run` owns the suite. Connections have a thread of their own, EGO has one,
    and so have embeddings.

    Args:
        suite: Neurons, EGO and what remembers; closed by whoever made it.
        settings: `ServerSettings()` by default.
        report: Gets a line for what the one who runs it should know.

    Attributes:
        url: The base URL for clients.

    Raises:
        ConchError: The address is taken or not this machine's, the key is missing, a domain has
            EGO's name, or there is no model for embeddings, or one with the name of a domain.
    """

    def __init__(
        self,
        suite: CortexSuite,
        settings: ServerSettings | None = None,
        *,
        report: Callable[[str], None] = _to_standard_error,
    ) -> None:
        self.settings = settings or ServerSettings()
        self._report = report
        self._loop = ServerLoop(suite, self.settings, report=report)
        self._embeddings: EmbeddingThread | None = None
        if self.settings.embeddings:
            student = open_student(
                self.settings.embeddings, trust_remote_code=suite.source.trust_remote_code
            )
            self._embeddings = EmbeddingThread(
                student, taken=suite.domains, failed=self._loop.fail, report=report
            )
        app, chat = make_app(self._loop, self.settings.key(), self._embeddings)
        self._chat = chat
        self._loop.unfinished = lambda: chat.unfinished
        self._socket, self.url = listening(self.settings)
        self._connections = guarded_server(app, self.settings)

    def run(self) -> None:
        """Answer until `stop`, and then until those who wait have their answers."""
        thread = threading.Thread(target=self._connect, name="connections")
        interval = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_S)
        if self._embeddings is not None:
            self._embeddings.start()
        thread.start()
        self._report(f"{', '.join(self._loop.models)} answer at {self.url}")
        if self._embeddings is not None:
            self._report(f"{self._embeddings.name} makes embeddings there")
        try:
            self._loop.run()
        finally:
            if self._embeddings is not None and not self._embeddings.stop(wait_s=1.0):
                self._report("embeddings were left in the middle of a batch")
            self._connections.should_exit = True
            thread.join()
            self._chat.close()
            sys.setswitchinterval(interval)

    def stop(self, grace_s: float | None = None) -> None:
        """Refuse new requests and end when those under way are done; from any thread.

        Args:
            grace_s: Longest wait for them in seconds; the settings' by default.
        """
        self._loop.stop(self.settings.grace_s if grace_s is None else grace_s)

    def _connect(self) -> None:
        try:
            self._connections.run(sockets=[self._socket])
        finally:
            # Without connections there is nothing left to answer.
            self._loop.stop(0)


def serve(
    suite: CortexSuite,
    settings: ServerSettings | None = None,
    *,
    report: Callable[[str], None] = _to_standard_error,
) -> None:
    """Serve until SIGTERM or Ctrl-C; a second one does not wait for requests under way.

    Called in the main thread.

    Args:
        suite: Neurons, EGO and what remembers; closed by whoever made it.
        settings: `ServerSettings()` by default.
        report: Gets a line for what the one who runs it should know; standard error by default.

    Raises:
        ConchError: What a `CortexServer` cannot be made of.
    """
    server = CortexServer(suite, settings, report=report)
    signals = 0

    def leave(number: int, frame: Any) -> None:
        nonlocal signals
        signals += 1
        server.stop(None if signals == 1 else 0)

    before = {each: signal.signal(each, leave) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run()
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
