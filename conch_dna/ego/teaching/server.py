"""A server of one teacher: from a socket and a model to the last reply.

Knows Starlette and threads; the replies are made in completions.py. Another address: a method of
`TeacherServer` and its route in `_app`.
"""

import asyncio
import base64
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click

from conch_dna import __version__
from conch_dna.ego.teaching.completions import CompletionRequest, Completions, parse_completion
from conch_dna.ego.teaching.settings import TeacherSettings
from conch_dna.errors import ConchError, one_line
from conch_dna.language_model import ModelSource
from conch_dna.training.machines.far.teacher import FILES, MOST_FILE_BYTES
from conch_dna.training.machines.far.wire import FORMAT
from conch_dna.web.connections import guarded_server, listening
from conch_dna.web.door import ApiError, check_door, error_handlers, json_response, read_body

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

STOPPING = "the server is stopping: ask again when it is back"
# Between looks whether a client that waits is still there, and whether to stop.
_LOOK_S = 0.5
# Between lines about what was done.
_TOLD_S = 10.0

_to_standard_error = partial(click.echo, err=True)


class TeacherServer:
    """A server that listens; it answers while `run` runs, in the thread that calls it.

    Args:
        source: The teacher.
        settings: `TeacherSettings()` by default.
        name: What the API calls it; its own name by default, of a folder the last part.
        report: Gets a line for what the one who runs it should know.

    Attributes:
        url: The base URL for students.

    Raises:
        ConchError: The model cannot be loaded, the address is taken, or the key is missing.
    """

    def __init__(
        self,
        source: ModelSource,
        settings: TeacherSettings | None = None,
        *,
        name: str = "",
        report: Callable[[str], None] = _to_standard_error,
    ) -> None:
        self._settings = settings or TeacherSettings()
        self._key = self._settings.key().encode()
        self._report = report
        is_folder = Path(source.model_id).expanduser().exists()
        self.name = name or (Path(source.model_id).name if is_folder else source.model_id)
        self._about = about(source, self.name)
        # Before the model is loaded, which takes a while.
        self._socket, self.url = listening(self._settings)
        self._completions = Completions(
            source.resident(),
            self.name,
            memory=self._settings.loss_memory,
            most_tokens=self._settings.max_request_tokens,
        )
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self._waiting = 0
        self._stopping = False
        self._began = time.time()
        self._connections = guarded_server(self._app(), self._settings)

    def run(self) -> None:
        """Answer until `stop`; the request under way is finished."""
        thread = threading.Thread(target=self._connect, name="connections")
        thread.start()
        self._report(
            f"{self.name} teaches at {self.url}; a student's side: conch-dna distill --teacher "
            f"{reached_by(self.url)}"
        )
        work_log = WorkLog(self._report)
        try:
            while not self._stopping:
                work_log.look()
                try:
                    future, work = self._jobs.get(timeout=_LOOK_S)
                except queue.Empty:
                    continue
                if future.set_running_or_notify_cancel():
                    self._do(future, work)
                    work_log.add(future)
        finally:
            work_log.look(now=True)
            self._report("stopped")
            self._stopping = True
            while not self._jobs.empty():
                future, _ = self._jobs.get()
                if future.set_running_or_notify_cancel():
                    future.set_exception(ApiError(503, STOPPING))
            self._connections.should_exit = True
            thread.join()

    def stop(self) -> None:
        """Refuse new requests, and end after the one under way; from any thread."""
        self._stopping = True

    def _connect(self) -> None:
        try:
            self._connections.run(sockets=[self._socket])
        finally:
            self._stopping = True

    def _do(self, future: "Future[Any]", work: Callable[[], Any]) -> None:
        try:
            future.set_result(work())
        except ApiError as error:
            future.set_exception(error)
        except ConchError as error:
            future.set_exception(ApiError(400, str(error)))
        except Exception as error:  # noqa: BLE001  (told, and others are answered)
            why = one_line(error)
            self._report(f"a request failed: {why}")
            future.set_exception(ApiError(500, f"it failed ({why}): ask for less at once"))

    def _app(self) -> "Starlette":
        from starlette.applications import Starlette
        from starlette.routing import Route

        routes = [
            Route("/v1/completions", self._complete, methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/v1/teacher", self._teacher),
            Route("/health", self._health),
        ]
        app = Starlette(routes=routes, exception_handlers=error_handlers())
        app.router.redirect_slashes = False
        return app

    async def _models(self, request: "Request") -> "Response":
        check_door(request, key=self._key)
        entry = {"id": self.name, "object": "model", "created": int(self._began)}
        return json_response({"object": "list", "data": [{**entry, "owned_by": "conch_dna"}]})

    async def _teacher(self, request: "Request") -> "Response":
        check_door(request, key=self._key)
        return json_response(self._about)

    async def _health(self, request: "Request") -> "Response":
        state = {
            "status": "stopping" if self._stopping else "ok",
            "version": __version__,
            "model": self.name,
            "queue": {"unfinished": self._waiting, "max": self._settings.max_queue},
            "uptime_s": round(time.time() - self._began, 1),
        }
        return json_response(state, 503 if self._stopping else 200)

    async def _complete(self, request: "Request") -> "Response":
        from starlette.requests import ClientDisconnect

        check_door(request, key=self._key)
        if self._stopping:
            raise ApiError(503, STOPPING, headers={"Retry-After": "5"})
        if self._waiting >= self._settings.max_queue:
            most = f"{self._waiting} requests wait, as many as may: ask again later"
            raise ApiError(429, most, code="queue_full", headers={"Retry-After": "1"})
        self._waiting += 1
        try:
            settings = self._settings
            body = await read_body(
                request, settings.max_body_bytes, timeout_s=settings.body_timeout_s
            )
            asked = await asyncio.to_thread(parse_completion, body)
            return json_response(await self._reply(request, asked))
        except ClientDisconnect:
            raise _gone() from None
        finally:
            self._waiting -= 1

    async def _reply(self, request: "Request", asked: CompletionRequest) -> Any:
        """What the model's thread makes of a request; it stops where nobody waits any more."""
        future: Future[Any] = Future()
        left = threading.Event()

        def check() -> None:
            if left.is_set():
                raise _gone()

        self._jobs.put((future, lambda: self._completions.answer(asked, check)))
        deadline = time.monotonic() + self._settings.request_timeout_s
        while True:
            try:
                return await asyncio.wait_for(
                    asyncio.shield(asyncio.wrap_future(future)), timeout=_LOOK_S
                )
            except TimeoutError:
                if await request.is_disconnected():
                    left.set()
                    future.cancel()
                    raise _gone() from None
                if time.monotonic() > deadline:
                    left.set()
                    future.cancel()
                    longest = self._settings.request_timeout_s
                    raise ApiError(
                        504, f"the request took longer than {longest:g} s: ask for less at once"
                    ) from None


def _gone() -> ApiError:
    return ApiError(499, "the client has gone")


class WorkLog:
    """Says every ten seconds in which something was done how much it was.

    Args:
        report: Gets the line.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self._since = time.monotonic()
        self._requests = self._tokens = 0

    def add(self, future: "Future[Any]") -> None:
        """Count a request that is done; one that was refused has no tokens."""
        self._requests += 1
        if future.exception() is None:
            self._tokens += future.result()["usage"]["total_tokens"]

    def look(self, *, now: bool = False) -> None:
        """Say what was done, if it is time."""
        passed = time.monotonic() - self._since
        if passed < _TOLD_S and not now:
            return
        if self._requests:
            self._report(f"{self._requests} requests, {self._tokens:,} tokens in {passed:.0f} s")
        self._since = time.monotonic()
        self._requests = self._tokens = 0


def reached_by(url: str) -> str:
    """By which URL other machines reach a server that listens at all addresses."""
    parts = urlsplit(url)
    if parts.hostname not in ("0.0.0.0", "::"):
        return url
    return url.replace(parts.netloc, f"{socket.gethostname()}:{parts.port}")


def about(source: ModelSource, name: str) -> dict[str, Any]:
    """What a student has to know of a teacher: its name, its digest, and its tokenizer's files.

    Raises:
        ConchError: It has no weights here, or a file is too large.
    """
    if source.is_weightless:
        raise ConchError(f"{source.model_id} is a teacher without its weights: serve the whole one")
    files = {}
    for each in FILES:
        path = source.folder / each
        if path.is_file():
            if path.stat().st_size > MOST_FILE_BYTES:
                raise ConchError(f"{path} has more than {MOST_FILE_BYTES:,} bytes: it is no {each}")
            files[each] = base64.b64encode(path.read_bytes()).decode("ascii")
    return {
        "format": FORMAT,
        "version": __version__,
        "model": name,
        "weights_digest": source.weights_digest,
        "files": files,
    }


def serve(server: TeacherServer) -> None:
    """Serve until SIGTERM or Ctrl-C; called in the main thread."""

    def leave(number: int, frame: Any) -> None:
        server.stop()

    before = {each: signal.signal(each, leave) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run()
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
