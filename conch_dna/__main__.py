"""``python -m conch_dna``, and how every command starts: Ctrl-C is one line from the first moment.

It knows nothing about the commands; those stand in the cli.py of their part.
"""

import os
import signal
from importlib import import_module


def run(module: str = "conch_dna.cli", command: str = "main", *, name: str | None = None) -> None:
    """Import a command, which takes most of a second on a slow machine, and run it.

    Args:
        module: Where it is.
        command: What it is called there.
        name: What its help calls it; by default how it was called.
    """
    # Inside an import KeyboardInterrupt may come out as another error, or be lost.
    before = signal.signal(signal.SIGINT, _stop)
    start = getattr(import_module(module), command)
    signal.signal(signal.SIGINT, before)
    start(prog_name=name)


def _stop(*_: object) -> None:
    os.write(2, b"stopped\n")
    os._exit(130)


if __name__ == "__main__":
    run(name="python -m conch_dna")
