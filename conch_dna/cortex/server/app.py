"""The server's addresses: who may ask them, chats and texts, and how refusals are told.

Knows Starlette, ASGI and jobs; nothing of models, which run in other threads than these
connections. Another address: a method of `Addresses` and its route in `make_app`; one whose answers
are a model's: a line in `ANSWERED`. Another kind of event to send: a branch in `_Connection`.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from conch_dna import __version__
from conch_dna.cortex.server.jobs import Events, Job, Part, Question
from conch_dna.cortex.server.loop import STOPPING, ServerLoop
from conch_dna.cortex.server.metrics import CONTENT_TYPE
from conch_dna.cortex.server.openai_api import (
    AnyRequest,
    ChatRequest,
    CompletionRequest,
    parse_request,
    unknown_model,
)
from conch_dna.cortex.server.replies import (
    COMMENT,
    ChatReplies,
    TextReplies,
    model_entry,
    server_sent_event,
)
from conch_dna.cortex.turn import Answer
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
# So many names of fields that are not known are told in a header.
_MOST_NAMES = 8
UNKNOWN = "unknown"
WARNING_HEADER = "x-conch-warning"
# Bodies from here on are read by another thread, so that short ones do not wait for them.
_LARGE = 2**15
# After a long body its thread rests so many times as long as it worked: Python's threads share one
# lock, and long bodies of a few clients would keep it from those who answer.
_REST = 3.0
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    # Proxies would keep parts until they have more of them.
    (b"x-accel-buffering", b"no"),
]


def make_app(loop: ServerLoop, key: str) -> "tuple[Starlette, AnswerEndpoint]":
    """The ASGI application of a server, and what knows who waits.

    Args:
        loop: Answers.
        key: That clients must send; empty where they need none.
    """
    from starlette.applications import Starlette
    from starlette.routing import Route

    check = partial(check_door, key=key.encode())
    chat = AnswerEndpoint(loop, check)
    addresses = Addresses(loop, chat, check)
    routes = [
        *(Route(path, chat, methods=["POST"]) for path in ANSWERED),
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
        began: When the server did, in seconds since 1970.
    """

    loop: ServerLoop
    chat: "AnswerEndpoint"
    check: "Callable[[Request], None]"
    began: float = field(default_factory=time.time)

    async def models(self, request: "Request") -> "Response":
        """GET /v1/models."""
        self.check(request)
        entries = [model_entry(name, int(self.began)) for name in self.loop.models]
        return json_response({"object": "list", "data": entries})

    async def model(self, request: "Request") -> "Response":
        """GET /v1/models/NAME."""
        self.check(request)
        name, known = request.path_params["name"], self.loop.models
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

    Attributes:
        unfinished: Requests whose connection waits.
    """

    def __init__(self, loop: ServerLoop, check: "Callable[[Request], None]") -> None:
        self.unfinished = 0
        # A place is free before the answer's end is sent, so that a client may go on at once. Each
        # of a request's answers has one.
        self._places: dict[Request, int] = {}
        self._short_bodies = ThreadPoolExecutor(2, "short bodies")
        self._long_bodies = ThreadPoolExecutor(1, "long bodies")
        self._rest_until = 0.0
        self._loop = loop
        self._check = check

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Answer one request."""
        from starlette.requests import ClientDisconnect, Request

        request = Request(scope, receive)
        began = time.perf_counter()
        model, status, counted = UNKNOWN, 500, False
        leave = partial(self._places.pop, request, None)
        try:
            self._check(request)
            self._check_room(request, 1)
            body = await self._whole_body(request)
            # Before the look whether the server is stopping: who is counted is waited for.
            self.unfinished, counted = self.unfinished + 1, True
            self._take_places(request, 1)
            kind = ANSWERED[request.scope["path"]]
            asked = await self._read(body, parse_request, body, kind)
            model = asked.model if asked.model in self._loop.models else UNKNOWN
            questions = await self._read(body, self._loop.prepare, asked)
            self._take_places(request, len(questions))
            replies = make_replies(self._loop, asked, questions)
            connection = _Connection(self._loop, asked, questions, replies, request, send, leave)
            connection.began = began
            status = await self._answer(connection)
        except ApiError as error:
            status = error.status
            raise
        except ClientDisconnect:
            status = CLIENT_GONE
        finally:
            leave()
            self.unfinished -= counted
            self._loop.metrics.ended(model, status, time.perf_counter() - began)

    def close(self) -> None:
        """Read nothing more."""
        for pool in (self._short_bodies, self._long_bodies):
            pool.shutdown(wait=False, cancel_futures=True)

    async def _whole_body(self, request: "Request") -> bytes:
        settings = self._loop.settings
        longest = min(settings.body_timeout_s, settings.request_timeout_s)
        return await read_body(request, settings.max_body_bytes, timeout_s=longest)

    async def _read(self, body: bytes, work: Callable[..., Any], *arguments: Any) -> Any:
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

    async def _answer(self, connection: "_Connection") -> int:
        """Answer until the end, or until the client has gone; gives the status."""
        answering = asyncio.ensure_future(connection.answer())
        leaving = asyncio.ensure_future(connection.client_gone())
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
            connection.close()


def make_replies(loop: ServerLoop, asked: AnyRequest, questions: Sequence[Question]) -> ChatReplies:
    """What writes the replies to a request.

    Raises:
        ApiError: Log-probabilities are asked for, and the tokenizer does not list its tokens.
    """
    told = any(each.options.top_logprobs is not None for each in questions)
    texts = loop.token_texts() if told else ()
    counts = bool(asked.stream_options.include_usage)
    if isinstance(asked, ChatRequest):
        return ChatReplies(asked.model, texts, counts=counts)
    prompts = [str(each.prompt) if asked.echo else "" for each in questions]
    return TextReplies(asked.model, texts, prompts, counts=counts)


@dataclass
class _Connection:
    """The jobs of one request, and the client that waits for them.

    Attributes:
        loop: Answers.
        asked: By the client.
        questions: What is to be answered.
        replies: Writes what is sent.
        request: Of the client.
        send: To the client.
        leave: Frees the client's places in the queue.
        began: When the request came, on `time.perf_counter`.
        answers: Those that are there.
        has_text: Whether a text has come.
    """

    loop: ServerLoop
    asked: AnyRequest
    questions: list[Question]
    replies: ChatReplies
    request: "Request"
    send: "Send"
    leave: Callable[[], object]
    began: float = field(default_factory=time.perf_counter)
    answers: dict[int, Answer] = field(default_factory=dict)
    has_text: bool = False

    def __post_init__(self) -> None:
        self.events: Events = asyncio.Queue()
        # Tokens whose log-probabilities were sent, of each answer.
        self.told = [0] * len(self.questions)
        self.jobs = [Job(each, self.events, index) for index, each in enumerate(self.questions)]
        for job in self.jobs:
            self.loop.put(job)

    async def client_gone(self) -> None:
        """Wait until the client has left."""
        while (await self.request.receive())["type"] != "http.disconnect":
            pass

    def close(self) -> None:
        """Nobody reads the rest."""
        for job in self.jobs:
            if job.index not in self.answers:
                self.loop.forget(job)

    async def answer(self) -> int:
        """Send the whole reply; gives its status.

        Raises:
            ApiError: There is none, and nothing was sent.
        """
        # Whether each can be answered; of the first ones more may have come by then.
        begun: set[int] = set()
        early = []
        while len(begun) < len(self.jobs):
            event = await self._next()
            assert event is not None
            begun.add(event[0])
            early.append(event)
        if self.asked.stream:
            return await self._stream(deque(early))
        while not self.done:
            await self._next()
        reply = self.replies.whole([self.answers[job.index] for job in self.jobs])
        response = json_response(reply, headers=self._warning)
        await response(self.request.scope, self.request.receive, self.send)
        return 200

    @property
    def done(self) -> bool:
        """Whether all answers are there."""
        return len(self.answers) == len(self.jobs)

    @property
    def _warning(self) -> dict[str, str]:
        """The header that names fields that were left out of account."""
        names = self.asked.ignored
        if not names:
            return {}
        told = [name if name.isascii() and name.isprintable() else repr(name) for name in names]
        told = [quote(name[:64], safe="._-[] ") for name in told[:_MOST_NAMES]]
        more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
        return {WARNING_HEADER: f"not known here and ignored: {', '.join(told)}{more}"}

    async def _next(self, wait_s: float | None = None) -> tuple[int, Part | Answer] | None:
        """The next event, and of which answer; None where there was none in so many seconds.

        Raises:
            ApiError: It was one, or the request took too long.
        """
        longest = self.loop.settings.request_timeout_s
        left = self.began + longest - time.perf_counter()
        try:
            async with asyncio.timeout(left if wait_s is None else min(wait_s, left)):
                index, event = await self.events.get()
        except TimeoutError:
            if wait_s is not None and wait_s < left:
                return None
            raise ApiError(
                504, f"the request took longer than {longest:g} s: ask for fewer tokens"
            ) from None
        if isinstance(event, ApiError):
            self.leave()
            raise event
        if isinstance(event, Answer):
            self.answers[index] = event
            if self.done:
                self.leave()
        if not self.has_text and (isinstance(event, Answer) or event.text):
            self.has_text = True
            passed = time.perf_counter() - self.began
            self.loop.metrics.first_text.labels(self.asked.model).observe(passed)
        return index, event

    async def _stream(self, early: "deque[tuple[int, Part | Answer]]") -> int:
        warning = [(name.encode(), value.encode()) for name, value in self._warning.items()]
        headers = [*_STREAM_HEADERS, *warning]
        await self.send({"type": "http.response.start", "status": 200, "headers": headers})
        for job in self.jobs:
            await self._write(self.replies.begin(job.index))
        sent: set[int] = set()
        while early or not self.done:
            try:
                wait_s = self.loop.settings.keep_alive_s
                event = early.popleft() if early else await self._next(wait_s)
            except ApiError as error:
                await self._write(server_sent_event(error.to_json()))
                await self._write(b"", more=False)
                return error.status
            if event is None:
                await self._write(COMMENT)
                continue
            index, part = event
            if isinstance(part, Answer):
                if index not in sent and part.text:
                    await self._write(self._part(index, Part(part.text, part.tokens)))
                rest = None if part.tokens is None else part.tokens[self.told[index] :]
                await self._write(self.replies.end(index, part, rest))
            elif part.text:
                sent.add(index)
                await self._write(self._part(index, part))
        await self._write(self.replies.last([self.answers[job.index] for job in self.jobs]))
        await self._write(b"", more=False)
        return 200

    def _part(self, index: int, part: Part) -> bytes:
        self.told[index] += len(part.tokens or ())
        return self.replies.part(index, part.text, part.tokens)

    async def _write(self, data: bytes, *, more: bool = True) -> None:
        if data or not more:
            await self.send({"type": "http.response.body", "body": data, "more_body": more})
