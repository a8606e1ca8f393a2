"""One request for answers and the client that waits for them: whole replies and streams.

Knows ASGI, jobs and replies; neither addresses nor models. Another kind of event to send: a branch
in `Connection`.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from conch_dna.cortex.answer import Answer
from conch_dna.cortex.server.jobs import Events, Job, Part, Question
from conch_dna.cortex.server.loop import ServerLoop
from conch_dna.cortex.server.openai_api import AnyRequest, ChatRequest
from conch_dna.cortex.server.replies import (
    COMMENT,
    ChatReplies,
    TextReplies,
    server_sent_event,
    warning_header,
)
from conch_dna.web.door import ApiError, json_response

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import Send

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    # Proxies would keep parts until they have more of them.
    (b"x-accel-buffering", b"no"),
]


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
    return TextReplies(asked.model, texts, prompts, asked=len(asked.prompt), counts=counts)


@dataclass
class Connection:
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
        answers = [self.answers[job.index] for job in self.jobs]
        if any(answer.tokens for answer in answers):
            # Log-probabilities of many tokens take seconds to write.
            response = await asyncio.to_thread(self._whole, answers)
        else:
            response = self._whole(answers)
        await response(self.request.scope, self.request.receive, self.send)
        return 200

    def _whole(self, answers: Sequence[Answer]) -> "Response":
        reply = self.replies.whole(answers)
        return json_response(reply, headers=warning_header(self.asked.ignored))

    @property
    def done(self) -> bool:
        """Whether all answers are there."""
        return len(self.answers) == len(self.jobs)

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
        warning = [
            (name.encode(), value.encode())
            for name, value in warning_header(self.asked.ignored).items()
        ]
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
