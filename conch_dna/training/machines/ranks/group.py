"""The processes of `mlx.launch`: messages from the first to the others, and sums over all.

Knows mlx's collectives, whatever carries them (ring, JACCL, MPI, NCCL); nothing of models. What
messages mean stands in helper.py.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import mlx.core as mx
import numpy as np

from conch_dna.errors import ConchError

_MESSAGE = "message"
_END = {"do": "end"}


class RankLostError(ConchError):
    """A process of the run is gone, or cannot be reached."""


class Ranks:
    """All processes of a run.

    Args:
        group: Of mlx; it has several.

    Attributes:
        rank: Of this one, from 0; 0 leads.
        size: How many there are.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.rank, self.size = int(group.rank()), int(group.size())
        self._listening = True

    def sum(self, value: mx.array) -> mx.array:
        """An array's sum over all processes, evaluated.

        Raises:
            RankLostError: One of them is gone.
        """
        with self.watched():
            total = mx.distributed.all_sum(value, group=self.group)
            mx.eval(total)
        return total

    @contextmanager
    def together(self) -> Iterator[None]:
        """What all do at once, so that none listens to messages until it is done."""
        self._listening = False
        yield
        self._listening = True

    def end(self) -> None:
        """Let the others go, as far as they listen; the rest find out that this one is gone."""
        if self._listening:
            self.send(_END, {})

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Tells what goes wrong between the processes in one line."""
        try:
            yield
        except RuntimeError as error:
            # Whatever is sent from now on would be waited for in vain.
            self._listening = False
            raise RankLostError(
                f"another of the {self.size} processes was lost ({error}): look at what it said, "
                "and go on with --resume, with as many processes as you like"
            ) from error

    def send(self, message: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Give a message to the others; called by the first, while they `receive`."""
        from safetensors.numpy import save

        text = np.frombuffer(json.dumps(message).encode("utf-8"), np.uint8)
        whole = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
        data = np.frombuffer(save({**whole, _MESSAGE: text}), np.uint8)
        self.sum(mx.array(len(data)))
        self.sum(mx.array(data))

    def receive(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """The next message of the first; waits for it."""
        from safetensors.numpy import load

        size = int(self.sum(mx.array(0)))
        data = np.asarray(self.sum(mx.zeros((size,), mx.uint8)))
        arrays = load(data.tobytes())
        message: dict[str, Any] = json.loads(arrays.pop(_MESSAGE).tobytes())
        return message, arrays

    def gathered(self, rows: np.ndarray) -> np.ndarray:
        """Rows of which each process has some, and zeros for another's, as all of them."""
        wide = rows.astype(np.uint32) if rows.dtype.kind == "u" else rows
        return np.asarray(self.sum(mx.array(wide))).astype(rows.dtype)


def joined() -> Ranks | None:
    """The processes that this one was started with; None where it is alone.

    Raises:
        RankLostError: They do not find each other.
    """
    try:
        group = mx.distributed.init()
    except RuntimeError as error:
        raise RankLostError(
            f"the processes do not find each other ({error}): check the host file's addresses, "
            "and that nothing else listens at its ports"
        ) from error
    return Ranks(group) if group.size() > 1 else None


_current: Ranks | None = None


def current() -> Ranks | None:
    """The processes that this one leads; None where it is alone."""
    return _current


@contextmanager
def leading(ranks: Ranks) -> Iterator[None]:
    """Makes processes those of `current`, and lets them go in the end."""
    global _current
    _current = ranks
    try:
        yield
    finally:
        _current = None
        # Whoever is gone by now need not be told.
        with suppress(RankLostError):
            ranks.end()
