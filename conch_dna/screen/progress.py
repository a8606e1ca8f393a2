"""Progress of long work: live bars in a terminal, plain lines elsewhere.

Knows events and their rows, and Ctrl-C; nothing of what the work is.
To show another event: a branch in `Progress.__call__`.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

EVERY_S = 5.0
# Plain output says that work goes on when nothing was said for so long.
QUIET_S = 15.0
# And that it has begun to load after so long.
LATER_S = 1.5

Report = Callable[[str, dict[str, Any]], None]
"""Gets `(event, row)`; the events are those that `Progress` shows, and `checkpoint`."""


def silent(event: str, row: dict[str, Any]) -> None:
    """The report of those who want none."""


class Progress:
    """Shows events of a run on standard error; use as a context manager and as `report`.

    Args:
        plain: Lines instead of bars; by default where standard error is not a terminal.
    """

    def __init__(self, *, plain: bool | None = None) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, highlight=False)
        self.plain = not self.console.is_terminal if plain is None else plain
        self._bars: Any = None
        self._task: Any = None
        self._name, self._unit = "", ""
        self._done, self._first, self._total = 0, 0, 0
        self._began = self._shown = time.monotonic()
        self._note = ""
        self._spoke = self._began
        self._over = threading.Event()

    def __enter__(self) -> "Progress":
        if not self.plain:
            from rich.progress import (
                BarColumn,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )
            from rich.progress import Progress as Bars

            self._bars = Bars(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[count]}"),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self.console,
            )
            self._bars.start()
        else:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self._bars:
            if self._task is not None and not self._total:
                # A bar without an end would stay on the screen as if it were under way.
                self._bars.remove_task(self._task)
            self._bars.stop()

    def _watch(self) -> None:
        while not self._over.wait(1.0):
            self._say_alive()

    def _say_alive(self) -> None:
        """A line where nothing was said for long, so that silence means that it has ended."""
        now = time.monotonic()
        if self._name and now - self._spoke >= QUIET_S:
            self._line(f"{self._name}: still at work after {_clock(now - self._began)}")

    def __call__(self, event: str, row: dict[str, Any]) -> None:
        """Take one event."""
        if event == "phase":
            self._start(row["name"], row.get("total", 0), row.get("unit", ""))
        elif event == "loading":
            self._start(row["name"], 0, "", later=True)
        elif event == "advance":
            self._advance(self._done + row["by"], row.get("note", ""))
        elif event in ("step", "skipped"):
            self._advance(row["step"], self._note)
        elif event == "train":
            self._note = f"{_figures(row)}, {row['tokens_per_second']:,.0f} tokens/s"
            self._line(f"step {row['step']}: {self._note}{self._remaining()}", live=False)
        elif event == "heldout":
            best = " (best so far)" if row["best_step"] == row["step"] else ""
            self._line(f"step {row['step']}: held out {_figures(row)}{best}")
        elif event == "within":
            self._within(row["text"])
        elif event == "resumed":
            self._done = self._first = row["step"]
            if self._task is not None:
                self._bars.update(self._task, completed=self._done, count=self._count())
            self._line(f"going on from step {row['step']} ({row['path']})")
        elif event == "warning":
            self._line(f"warning: {row['message']}")
        elif event == "message":
            self._line(row["message"])

    def _start(self, name: str, total: int, unit: str, *, later: bool = False) -> None:
        self._name, self._unit, self._total = name, unit, total
        self._done = self._first = 0
        self._began = self._shown = time.monotonic()
        self._note = ""
        if not self._bars:
            if later:
                # What is refused at once is refused in one line.
                self._spoke = self._began - QUIET_S + LATER_S
            else:
                self._line(f"{name}: {total:,} {unit}" if total else name)
            return
        if self._task is not None:
            self._bars.remove_task(self._task)
        self._task = self._bars.add_task(
            name, total=total or None, count=self._count(), rate="", note=""
        )

    def _count(self) -> str:
        if self._total:
            return f"{self._done:,}/{self._total:,}"
        return f"{self._done:,}" if self._done else ""

    def _within(self, text: str) -> None:
        """Where a step of this phase is."""
        if self._bars:
            if self._task is not None:
                self._bars.update(self._task, note=text)
        elif time.monotonic() - self._spoke >= EVERY_S:
            self._line(f"{self._name}: {text}")

    def _advance(self, done: int, note: str) -> None:
        self._done = done
        elapsed = time.monotonic() - self._began
        if self._bars:
            if self._task is not None:
                speed = (done - self._first) / elapsed if elapsed > 0 else 0.0
                rate = f"{speed:.1f} {self._unit}/s" if speed else ""
                self._bars.update(
                    self._task, completed=done, count=self._count(), rate=rate, note=note
                )
        elif time.monotonic() - self._shown >= EVERY_S and self._unit != "steps":
            self._shown = time.monotonic()
            of = f" of {self._total:,}" if self._total else ""
            rate = f"{done / elapsed:.1f} {self._unit}/s"
            self._line(f"{self._name}: {done:,}{of} {self._unit}, {rate}{self._remaining()}")

    def _remaining(self) -> str:
        elapsed = time.monotonic() - self._began
        # What an earlier process did took this one no time.
        done = self._done - self._first
        if not (done and self._total):
            return ""
        seconds = max(0, round(elapsed / done * (self._total - self._done)))
        return f", {_clock(seconds)} remaining"

    def _line(self, text: str, *, live: bool = True) -> None:
        if self._bars and not live:
            return
        self._spoke = time.monotonic()
        self.console.print(text, markup=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _figures(row: dict[str, Any]) -> str:
    labels = {"kl": "KL", "loss": "loss", "kd": "KD", "ce": "CE"}
    return ", ".join(f"{label} {row[name]:.4f}" for name, label in labels.items() if name in row)


@contextmanager
def first_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """Let the first Ctrl-C only ask for a stop; the second one interrupts at once.

    Args:
        stop: Called at the first. Outside of the main thread nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: Any) -> None:
        stop()
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
