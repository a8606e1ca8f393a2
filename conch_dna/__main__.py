"""``python -m conch_dna``, and how every command starts: Ctrl-C is one line from the first moment.

It knows nothing about the commands; those stand in the cli.py of their part.
"""

import os
import signal
import sys
from importlib import import_module
from threading import Timer
from typing import Any

# What has said nothing on a terminal for so long is loading libraries.
SILENT_S = 1.0


def run(module: str = "conch_dna.cli", command: str = "main", *, name: str | None = None) -> None:
    """Import a command, which takes most of a second on a slow machine, and run it.

    Args:
        module: Where it is.
        command: What it is called there.
        name: What its help calls it; by default how it was called.
    """
    # Inside an import KeyboardInterrupt may come out as another error, or be lost.
    before = signal.signal(signal.SIGINT, _stop)
    tell_loading()
    start = getattr(import_module(module), command)
    signal.signal(signal.SIGINT, before)
    start(prog_name=name)


def tell_loading(after: float = SILENT_S) -> None:
    """Write "loading …" on a terminal's standard error, unless something is written before.

    Args:
        after: Seconds.
    """
    out, err = sys.stdout, sys.stderr
    if not (err and err.isatty()):
        return
    write = err.write
    timer = Timer(after, lambda: (write("loading …\n"), err.flush()))
    timer.daemon = True

    def once(stream: Any) -> None:
        own = stream.write

        def first(text: str) -> Any:
            timer.cancel()
            stream.write = own
            return own(text)

        stream.write = first

    for stream in (out, err):
        once(stream)
    timer.start()


def _stop(*_: object) -> None:
    os.write(2, b"stopped\n")
    os._exit(130)


if __name__ == "__main__":
    run(name="python -m conch_dna")
