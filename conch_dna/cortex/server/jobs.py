"""One request on its way through the server, and what its threads tell each other about it.

Knows a request, its turn and asyncio's queue; neither HTTP nor models. Something else to tell a
waiting client: a type in `Event`, and a branch where replies are sent (chat.py).
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from conch_dna.cortex.server.replies import Reply
from conch_dna.cortex.server.requests import ApiError, ChatRequest
from conch_dna.cortex.turn import Turn


@dataclass(frozen=True)
class Accepted:
    """The request can be answered; whether it is is another matter."""


@dataclass(frozen=True)
class Text:
    """A part of the answer that is final."""

    text: str


# The last one of a request is a Reply or an ApiError.
Event = Accepted | Text | Reply | ApiError


class Job:
    """A request between the client's connection and the models. Made in the connection's loop.

    Args:
        chat: What was asked for.

    Attributes:
        began: When it came, on `time.perf_counter`.
        events: What the connection waits for.
        turn: A neuron's question; None where EGO was asked for, or before it is taken on.
        uid: Its number in the engine, while it is there.
        gone: Whether nobody waits for it any more.
    """

    def __init__(self, chat: ChatRequest) -> None:
        self.chat = chat
        self.began = time.perf_counter()
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.turn: Turn | None = None
        self.uid: int | None = None
        self.gone = False
        self._loop = asyncio.get_running_loop()

    def tell(self, event: Event) -> None:
        """Tell the waiting connection, from any thread."""
        tell_all([(self, event)])


def tell_all(told: Sequence[tuple[Job, Event]]) -> None:
    """Tell the connections of one server, in one go, from any thread."""

    def put() -> None:
        for job, event in told:
            job.events.put_nowait(event)

    if not told:
        return
    loop = told[0][0]._loop
    if not loop.is_closed():
        loop.call_soon_threadsafe(put)
