"""Ctrl-C, held back while something must not be broken off in the middle.

Knows signals; nothing of what is done meanwhile. Outside of the main thread, which alone hears
Ctrl-C, it does nothing.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interrupt_held_back() -> Iterator[None]:
    """Let Ctrl-C take effect at the end of the block, not inside it."""
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield
        return
    asked: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: asked.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if asked:
            previous(*asked[0])
