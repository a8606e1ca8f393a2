"""Chat completions over a connection: whole or as a stream, until the end or the client's leaving.

Knows ASGI, jobs and the shapes of replies; nothing of models. It runs in the connections' event
loop, and the models in other threads. Another kind of event to send: a branch in `_Connection`.
"""

import asyncio
import time
from typing import TYPE_CHECKING

from conch_dna.cortex.server.jobs import Event, Job, Text
from conch_dna.cortex.server.loop import STOPPING, ServerLoop
from conch_dna.cortex.server.replies import COMMENT, DONE, Reply, Shapes, event
from conch_dna.cortex.server.requests import ApiError, parse_chat

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

CLIENT_GONE = 499
UNKNOWN = "unknown"
# What is read of a body that is too large, so that the client gets to read why.
_DRAINED = 16


class ChatEndpoint:
    """The ASGI application of /v1/chat/completions.

    Args:
        loop: Answers.
        check: Refuses who may not ask, see `Doors.check`.

    Attributes:
        unfinished: Requests whose connection waits.
    """

    def __init__(self, loop: ServerLoop, check: "Callable[[Request], None]") -> None:
        self.unfinished = 0
        self._places = 0
        self._loop = loop
        self._check = check

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Answer one request."""
        from starlette.requests import ClientDisconnect, Request

        request = Request(scope, receive)
        began = time.perf_counter()
        model, status = UNKNOWN, 500
        # Before the look whether the server is stopping: who is counted is waited for.
        self.unfinished += 1
        leave = self._enter()
        try:
            self._check(request)
            self._check_room()
            async with asyncio.timeout(self._loop.settings.request_timeout_s):
                body = await read_body(request, self._loop.settings.max_body_bytes)
            chat = parse_chat(body)
            model = chat.model if chat.model in self._loop.models else UNKNOWN
            connection = _Connection(self._loop, Job(chat), scope, receive, send, leave)
            status = await self._answer(connection, receive)
        except ApiError as error:
            status = error.status
            raise
        except ClientDisconnect:
            status = CLIENT_GONE
        except TimeoutError as error:
            status = 408
            raise ApiError(408, "the body did not come in time: send it at once") from error
        finally:
            leave()
            self.unfinished -= 1
            self._loop.metrics.ended(model, status, time.perf_counter() - began)

    def _enter(self) -> "Callable[[], None]":
        """Take a place in the queue; what it gives leaves it, once.

        The place is free before the answer's end is sent, so that a client may go on at once.
        """
        self._places += 1
        inside = [True]

        def leave() -> None:
            if inside:
                inside.clear()
                self._places -= 1

        return leave

    def _check_room(self) -> None:
        if self._loop.stopping:
            raise ApiError(503, STOPPING, headers={"Retry-After": "5"})
        most = self._loop.settings.max_queue
        if self._places > most:
            raise ApiError(
                429,
                f"{most} requests wait or are answered, as many as may: ask again later",
                code="queue_full",
                headers={"Retry-After": "1"},
            )

    async def _answer(self, connection: "_Connection", receive: "Receive") -> int:
        """Answer until the end, or until the client has gone; gives the status."""
        answering = asyncio.ensure_future(connection.answer())
        leaving = asyncio.ensure_future(_gone(receive))
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


async def read_body(request: "Request", most: int) -> bytes:
    """The body of a request.

    Raises:
        ApiError: It is larger than it may be, or not said to be JSON.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # What a web page of another site can send without being asked has another type.
        raise ApiError(415, f"the content type is {kind!r}: send application/json")
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size <= most:
            parts.append(part)
        if size > _DRAINED * most:
            break
    if size > most:
        raise ApiError(413, f"the body has more than {most:,} bytes: shorten the conversation")
    return b"".join(parts)


async def _gone(receive: "Receive") -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _Connection:
    """One job and the client that waits for it."""

    def __init__(
        self,
        loop: ServerLoop,
        job: Job,
        scope: "Scope",
        receive: "Receive",
        send: "Send",
        leave: "Callable[[], None]",
    ) -> None:
        self._loop = loop
        self._job = job
        self._scope, self._receive, self._send = scope, receive, send
        self._leave = leave
        self._shapes = Shapes(job.chat.model)
        self._deadline = job.began + loop.settings.request_timeout_s
        self._done = False
        self._has_text = False
        loop.put(job)

    def close(self) -> None:
        """Nobody reads the rest."""
        if not self._done:
            self._loop.forget(self._job)

    async def answer(self) -> int:
        """Send the whole reply; gives its status.

        Raises:
            ApiError: There is none, and nothing was sent.
        """
        await self._next()
        if self._job.chat.stream:
            return await self._stream()
        from starlette.responses import JSONResponse

        while not isinstance(found := await self._next(), Reply):
            pass
        response = JSONResponse(self._shapes.completion(found))
        await response(self._scope, self._receive, self._send)
        return 200

    async def _next(self, wait_s: float | None = None) -> Event | None:
        """The next event; None where there was none in so many seconds.

        Raises:
            ApiError: It was one, or the request took too long.
        """
        left = self._deadline - time.perf_counter()
        wait_s = left if wait_s is None else min(wait_s, left)
        try:
            async with asyncio.timeout(wait_s):
                found = await self._job.events.get()
        except TimeoutError:
            if time.perf_counter() < self._deadline:
                return None
            longest = self._loop.settings.request_timeout_s
            raise ApiError(
                504, f"the request took longer than {longest:g} s: ask for fewer tokens"
            ) from None
        if isinstance(found, Reply | ApiError):
            self._done = True
            self._leave()
        if isinstance(found, ApiError):
            raise found
        if isinstance(found, Text | Reply) and not self._has_text:
            self._has_text = True
            passed = time.perf_counter() - self._job.began
            self._loop.metrics.first_text(self._job.chat.model, passed)
        return found

    async def _stream(self) -> int:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            # Proxies would keep parts until they have more of them.
            (b"x-accel-buffering", b"no"),
        ]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        usage = {"usage": None} if self._job.chat.include_usage else {}
        await self._write(self._shapes.chunk({"role": "assistant", "content": ""}, **usage))
        status, sent = 200, False
        while not self._done:
            try:
                found = await self._next(self._loop.settings.keep_alive_s)
            except ApiError as error:
                status = error.status
                await self._write(event(error.to_json()))
                break
            if found is None:
                await self._write(COMMENT)
            elif isinstance(found, Text):
                sent = True
                await self._write(self._shapes.chunk({"content": found.text}, **usage))
            elif isinstance(found, Reply):
                await self._write(self._end(found, whole=not sent, **usage))
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})
        return status

    def _end(self, reply: Reply, *, whole: bool, **usage: None) -> bytes:
        """The last events; with the text, where none of it was sent before."""
        shapes = self._shapes
        parts = [shapes.chunk({"content": reply.text}, **usage)] if whole and reply.text else []
        parts.append(shapes.chunk({}, finish=reply.finish_reason, conch=reply.conch, **usage))
        if usage:
            parts.append(shapes.usage(reply))
        return b"".join([*parts, DONE])

    async def _write(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": True})
