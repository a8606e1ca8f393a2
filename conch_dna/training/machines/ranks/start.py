"""Where a command finds out that mlx.launch started several of it, and which of them it is.

Knows environment variables and signals; loads nothing else before it has to.
"""

import functools
import os
import signal
from collections.abc import Callable
from typing import Any

from conch_dna.errors import ConchError

# What launchers say to each process that they start.
_VARIABLES = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


def launched() -> bool:
    """Whether a launcher of several processes started this one; not how many there are."""
    return any(name in os.environ for name in _VARIABLES)


def led_by_the_first(function: Callable[..., None]) -> Callable[..., None]:
    """Makes a command do its work in the first process only, and help in the others."""

    @functools.wraps(function)
    def run(*arguments: Any, **values: Any) -> None:
        if not launched():
            function(*arguments, **values)
            return
        from conch_dna.training.machines.ranks.group import joined, leading

        ranks = joined()
        if ranks is None:
            function(*arguments, **values)
        elif ranks.rank:
            _help(ranks)
        else:
            # The launcher ends all where one is gone; this one finds out itself, and saves first.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            with leading(ranks):
                function(*arguments, **values)

    return run


def several_problem(command: str) -> str | None:
    """Why a command cannot run in several processes that know nothing of each other, if so."""
    if not launched() or command == "distill":
        return None
    return (
        f"{command} is one process's work, and a launcher started several: start it by itself, or "
        "use mlx.launch with distill"
    )


def _help(ranks: Any) -> None:
    from conch_dna.training.machines.ranks.helper import Helper

    # A Ctrl-C of the terminal reaches all; the first process decides what comes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        Helper(ranks).run()
    except ConchError as error:
        raise ConchError(f"process {ranks.rank} of {ranks.size}: {error}") from error
