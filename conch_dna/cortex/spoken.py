"""What an answer's text is made of: what is said, calls of functions, and where it is to stop.

Knows text alone; nothing of tokens or models. Another kind of part: a state in `Spoken`, by
mlx_lm's machine.
"""

from collections.abc import Callable, Generator, Sequence
from functools import lru_cache
from typing import Any, TypeVar

from conch_dna.cortex.tools import CALL_BEGIN, CALL_END, Call, read_call

T = TypeVar("T")
_SAID, _CALL = "said", "call"


@lru_cache(maxsize=4)
def _machine(stops: tuple[str, ...], calls: bool) -> Any:
    """What knows where a text changes; long stops take megabytes, so answers alike share it."""
    from mlx_lm.generate import TextStateMachine

    said: list[tuple[str, str | None]] = [(stop, None) for stop in stops]
    edges = {_SAID: [*said, (CALL_BEGIN, _CALL)] if calls else said}
    if calls:
        edges[_CALL] = [(CALL_END, _SAID)]
    return TextStateMachine(edges)


class Spoken:
    """Tells the parts of a text apart as it comes.

    Args:
        stops: Texts before the first of which it ends.
        calls: Whether it may have calls.

    Attributes:
        stopped: Whether one of those has come; nothing counts after it.
        text: What was said so far; a call that is none, such as one broken off, stands in it.
    """

    def __init__(self, stops: Sequence[str], *, calls: bool) -> None:
        self._machine = _machine(tuple(stops), calls)
        self._state = self._machine.make_state(_SAID)
        # Whether there may be a call before anything is said.
        self._begins = calls
        self._call = self._spaces = ""
        self._found: list[Call] = []
        self.stopped = False
        self.text = ""

    @property
    def calls(self) -> tuple[Call, ...]:
        """The calls so far."""
        return tuple(self._found)

    def add(self, text: str) -> str:
        """Take more of it.

        Returns:
            What is certain to be said.
        """
        if self.stopped or not text:
            return ""
        self._state, segments = self._machine.split(self._state, text)
        given, before = "", None
        for state, part in segments:
            if state == _CALL:
                self._call += part
            else:
                given += self._say(self._end_call() + part if before == _CALL else part)
            before = state
        self.stopped = self._state[0] is None
        return given

    def end(self) -> str:
        """The rest that is said when no more comes: what began like a stop or a call."""
        if self.stopped:
            return ""
        state = self._state[0]
        self._state, rest, _ = self._machine.flush(self._state)
        if state == _CALL:
            rest = CALL_BEGIN + self._call + rest
        return self._say(rest, last=not self._found)

    def _say(self, text: str, *, last: bool = False) -> str:
        """What of a text is said now: spaces in front of calls are not."""
        self._spaces += text
        if self._begins and not last and not self._spaces.strip():
            return ""
        said, self._spaces, self._begins = self._spaces, "", False
        self.text += said
        return said

    def _end_call(self) -> str:
        """Take a call that is whole; gives the text of one that is none."""
        text, self._call = self._call, ""
        if call := read_call(text):
            self._found.append(call)
            self._begins = True
            return ""
        return CALL_BEGIN + text + CALL_END


def text_before(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """A text before the first of several stops, and whether there was one."""
    spoken = Spoken(stops, calls=False)
    return spoken.add(text) + spoken.end(), spoken.stopped


def pieces_before(
    pieces: Generator[str, bool | None, T], stops: Sequence[str]
) -> Generator[str, None, T]:
    """Pieces of a text before the first of several stops; gives what the pieces end with.

    Args:
        pieces: They end where they are sent that it is enough, which they are behind a stop.
        stops: Texts.
    """
    spoken = Spoken(stops, calls=False)
    try:
        while True:
            if text := spoken.add(pieces.send(spoken.stopped or None)):
                yield text
    except StopIteration as end:
        if text := spoken.end():
            yield text
        whole: T = end.value
        return whole
    finally:
        pieces.close()


def drained(pieces: Generator[str, None, T], take: Callable[[str], None] = lambda piece: None) -> T:
    """What pieces end with.

    Args:
        pieces: Closed afterwards.
        take: Gets each; what it raises ends them.
    """
    try:
        while True:
            take(next(pieces))
    except StopIteration as end:
        whole: T = end.value
        return whole
    finally:
        pieces.close()
