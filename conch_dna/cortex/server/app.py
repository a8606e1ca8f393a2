"""The server's addresses: who may ask them, chats, texts, embeddings, and how refusals are told.

Knows Starlette, ASGI and jobs; nothing of models, which run in other threads than these
connections. Another address: a method of `Addresses` and its route in `make_app`; one whose answers
are a neuron's: a line in `ANSWERED`.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from conch_dna import __version__
from conch_dna.cortex.server.connection import Connection, make_replies
from conch_dna.cortex.server.embeddings import EmbeddingThread, parse_embeddings
from conch_dna.cortex.server.loop import STOPPING, ServerLoop
from conch_dna.cortex.server.metrics import CONTENT_TYPE
from conch_dna.cortex.server.openai_api import (
    AnyRequest,
    ChatRequest,
    CompletionRequest,
    parse_request,
    unknown_model,
)
from conch_dna.cortex.server.replies import model_entry, warning_header
from conch_dna.errors import ConchError, one_line
from conch_dna.web.door import ApiError, check_door, error_handlers, json_response, read_body

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import Receive, Scope, Send

ANSWERED: dict[str, type[AnyRequest]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
}
CLIENT_GONE = 499
UNKNOWN = "unknown"
# Bodies from here on are read by another thread, so that short ones do not wait for them.
_LARGE = 2**15
# After a long body its thread rests so many times as long as it worked: Python's threads share one
# lock, and long bodies of a few clients would keep it from those who answer.
_REST = 3.0


def make_app(
    loop: ServerLoop, key: str, embeddings: EmbeddingThread | None = None
) -> "tuple[Starlette, AnswerEndpoint]":
    """The ASGI application of a server, and what knows who waits.

    Args:
        loop: Answers.
        key: That clients must send; empty where they need none.
        embeddings: Makes embeddings, if anyone does.
    """
    from starlette.applications import Starlette
    from starlette.routing import Route

    check = partial(check_door, key=key.encode())
    chat = AnswerEndpoint(loop, check, embeds=embeddings.name if embeddings else "")
    addresses = Addresses(loop, chat, check, embeddings)
    routes = [
        *(Route(path, chat, methods=["POST"]) for path in ANSWERED),
        Route("/v1/embeddings", EmbeddingsEndpoint(loop, chat, embeddings), methods=["POST"]),
        Route("/v1/models", addresses.models),
        Route("/v1/models/{name}", addresses.model),
        Route("/health", addresses.health),
        Route("/metrics", addresses.metrics),
        Route("/admin/reload", addresses.reload, methods=["POST"]),
    ]
    app = Starlette(routes=routes, exception_handlers=error_handlers())
    # It would send clients to wherever the Host header says.
    app.router.redirect_slashes = False
    return app, chat


@dataclass
class Addresses:
    """What is answered besides chats and texts.

    Attributes:
        loop: Knows the suite.
        chat: Knows who waits.
        check: Refuses who may not ask.
        embeddings: Makes embeddings, if anyone does.
        began: When the server did, in seconds since 1970.
    """

    loop: ServerLoop
    chat: "AnswerEndpoint"
    check: "Callable[[Request], None]"
    embeddings: EmbeddingThread | None = None
    began: float = field(default_factory=time.time)

    @property
    def known(self) -> list[str]:
        """Every model; a domain that came later may have the name of that of the embeddings."""
        more = [self.embeddings.name] if self.embeddings else []
        return list(dict.fromkeys([*self.loop.models, *more]))

    async def models(self, request: "Request") -> "Response":
        """GET /v1/models."""
        self.check(request)
        entries = [model_entry(name, int(self.began)) for name in self.known]
        return json_response({"object": "list", "data": entries})

    async def model(self, request: "Request") -> "Response":
        """GET /v1/models/NAME."""
        self.check(request)
        name, known = request.path_params["name"], self.known
        if name not in known:
            raise unknown_model(name, known)
        return json_response(model_entry(name, int(self.began)))

    async def health(self, request: "Request") -> "Response":
        """GET /health; needs no key."""
        loop = self.loop
        state = {
            "status": "stopping" if loop.stopping else "ok",
            "version": __version__,
            "domains": loop.suite.domains,
            "ego": loop.suite.ego is not None,
            "embeddings": self.embeddings.name if self.embeddings else None,
            "queue": {"unfinished": self.chat.unfinished, "max": loop.settings.max_queue},
            "uptime_s": round(time.time() - self.began, 1),
        }
        return json_response(state, 503 if loop.stopping else 200)

    async def metrics(self, request: "Request") -> "Response":
        """GET /metrics, for Prometheus."""
        from starlette.responses import Response

        self.check(request)
        return Response(self.loop.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def reload(self, request: "Request") -> "Response":
        """POST /admin/reload: take in new versions of adapters now."""
        self.check(request)
        if self.loop.stopping:
            raise ApiError(503, STOPPING)
        try:
            changed = await asyncio.wrap_future(self.loop.reload())
        except ConchError as error:
            raise ApiError(409, str(error)) from error
        except Exception as error:
            # Told by the loop, which goes on.
            raise ApiError(500, f"the adapters could not be taken in: {one_line(error)}") from error
        notes = list(self.loop.suite.notes)
        return json_response({"changed": changed, "domains": self.loop.models, "notes": notes})


class AnswerEndpoint:
    """The ASGI application of the addresses in `ANSWERED`.

    Bodies are read and prompts tokenised in threads of its own: neither other connections nor the
    models wait for that. What is not whole yet has no place in the queue.

    Args:
        loop: Answers.
        check: Refuses who may not ask.
        embeds: The model that only makes embeddings; empty where there is none.

    Attributes:
        unfinished: Requests whose connection waits.
    """

    def __init__(
        self, loop: ServerLoop, check: "Callable[[Request], None]", *, embeds: str = ""
    ) -> None:
        self.unfinished = 0
        # A place is free before the answer's end is sent, so that a client may go on at once. Each
        # of a request's answers has one.
        self._places: dict[Request, int] = {}
        self._short_bodies = ThreadPoolExecutor(2, "short bodies")
        self._long_bodies = ThreadPoolExecutor(1, "long bodies")
        self._rest_until = 0.0
        self._loop = loop
        self._check = check
        self._embeds = embeds

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Answer one request."""
        from starlette.requests import Request

        request = Request(scope, receive)
        await self.counted(request, partial(self._answer, request, send))

    async def counted(
        self, request: "Request", work: Callable[["_Visit", bytes], Awaitable[int]]
    ) -> None:
        """Let who may in, give it a place in the queue, and count how it ends.

        Args:
            request: Of the client.
            work: Answers a body; gives the status.
        """
        from starlette.requests import ClientDisconnect

        visit = _Visit(time.perf_counter(), leave=partial(self._places.pop, request, None))
        status, counted = 500, False
        try:
            self._check(request)
            self._check_room(request, 1)
            body = await self._whole_body(request)
            # Before the look whether the server is stopping: who is counted is waited for.
            self.unfinished, counted = self.unfinished + 1, True
            self._take_places(request, 1)
            status = await work(visit, body)
        except ApiError as error:
            status = error.status
            raise
        except ClientDisconnect:
            status = CLIENT_GONE
        finally:
            visit.leave()
            self.unfinished -= counted
            self._loop.metrics.ended(visit.model, status, time.perf_counter() - visit.began)

    async def _answer(self, request: "Request", send: "Send", visit: "_Visit", body: bytes) -> int:
        asked = await self.read(body, parse_request, body, ANSWERED[request.scope["path"]])
        visit.model = asked.model if asked.model in self._loop.models else UNKNOWN
        if visit.model == UNKNOWN and asked.model == self._embeds:
            message = f"{asked.model} makes embeddings and no answers: ask it at /v1/embeddings"
            raise ApiError(404, message, param="model", code="model_not_found")
        questions = await self.read(body, self._loop.prepare, asked)
        self._take_places(request, len(questions))
        replies = make_replies(self._loop, asked, questions)
        connection = Connection(
            self._loop, asked, questions, replies, request, send, visit.leave, began=visit.began
        )
        try:
            return await self.until_gone(connection.answer(), request)
        finally:
            connection.close()

    def close(self) -> None:
        """Read nothing more."""
        for pool in (self._short_bodies, self._long_bodies):
            pool.shutdown(wait=False, cancel_futures=True)

    async def _whole_body(self, request: "Request") -> bytes:
        settings = self._loop.settings
        longest = min(settings.body_timeout_s, settings.request_timeout_s)
        return await read_body(request, settings.max_body_bytes, timeout_s=longest)

    async def read(self, body: bytes, work: Callable[..., Any], *arguments: Any) -> Any:
        """Do what takes longer the longer a body is, away from the connections' thread."""
        pool = self._short_bodies
        if len(body) > _LARGE:
            pool, arguments, work = self._long_bodies, (work, *arguments), self._rested
        longest = self._loop.settings.request_timeout_s
        try:
            async with asyncio.timeout(longest):
                return await asyncio.get_running_loop().run_in_executor(pool, work, *arguments)
        except TimeoutError as error:
            raise ApiError(504, f"the request waited for longer than {longest:g} s") from error

    def _rested(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Do something with a long body, when there was rest enough after the last one."""
        time.sleep(max(0.0, self._rest_until - time.monotonic()))
        began = time.monotonic()
        try:
            return work(*arguments)
        finally:
            ended = time.monotonic()
            self._rest_until = ended + _REST * (ended - began)

    def _take_places(self, request: "Request", count: int) -> None:
        self._places[request] = count
        self._check_room(request, count)

    def _check_room(self, request: "Request", count: int) -> None:
        if self._loop.stopping:
            raise ApiError(503, STOPPING, headers={"Retry-After": "5"})
        most = self._loop.settings.max_queue
        others = sum(self._places.values()) - self._places.get(request, 0)
        if others + count > most:
            raise ApiError(
                429,
                f"{most} answers are waited for at most, and there are {others} already: ask again "
                "later",
                code="queue_full",
                headers={"Retry-After": "1"},
            )

    async def until_gone(self, answer: Coroutine[Any, Any, int], request: "Request") -> int:
        """Answer until the end, or until the client has gone; gives the status."""
        answering = asyncio.ensure_future(answer)
        leaving = asyncio.ensure_future(_client_gone(request))
        # A client that does not read what it is sent is waited for a little longer.
        longest = self._loop.settings.request_timeout_s + 5
        try:
            await asyncio.wait(
                {answering, leaving}, timeout=longest, return_when=asyncio.FIRST_COMPLETED
            )
            return await answering if answering.done() else CLIENT_GONE
        finally:
            answering.cancel()
            leaving.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)


async def _client_gone(request: "Request") -> None:
    """Wait until the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


@dataclass
class _Visit:
    """A request from its beginning to its end.

    Attributes:
        began: On `time.perf_counter`.
        leave: Frees its place in the queue.
        model: Under which it is counted.
    """

    began: float
    leave: Callable[[], object]
    model: str = UNKNOWN


class EmbeddingsEndpoint:
    """The ASGI application of /v1/embeddings, whose requests stand in the queue of the chats.

    Args:
        loop: Counts, and has the settings.
        chat: Has the queue, and reads bodies.
        embeddings: Makes them, if anyone does.
    """

    def __init__(
        self, loop: ServerLoop, chat: AnswerEndpoint, embeddings: EmbeddingThread | None
    ) -> None:
        self._loop = loop
        self._chat = chat
        self._embeddings = embeddings

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Answer one request."""
        from starlette.requests import Request

        request = Request(scope, receive)
        await self._chat.counted(request, partial(self._embed, request, send))

    async def _embed(self, request: "Request", send: "Send", visit: _Visit, body: bytes) -> int:
        if self._embeddings is None:
            raise ApiError(404, "no embeddings are made here: start serve with --embeddings FOLDER")
        asked = await self._chat.read(body, parse_embeddings, body)
        self._embeddings.check(asked)
        visit.model = self._embeddings.name
        future = self._embeddings.put(asked)

        async def answer() -> int:
            from starlette.responses import Response

            longest = self._loop.settings.request_timeout_s
            try:
                async with asyncio.timeout(visit.began + longest - time.perf_counter()):
                    made = await asyncio.wrap_future(future)
            except TimeoutError:
                message = f"the request took longer than {longest:g} s: send fewer texts"
                raise ApiError(504, message) from None
            visit.leave()
            self._loop.metrics.embedded(visit.model, made.tokens)
            headers = warning_header(asked.ignored)
            response = Response(made.body, media_type="application/json", headers=headers)
            await response(request.scope, request.receive, send)
            return 200

        return await self._chat.until_gone(answer(), request)
