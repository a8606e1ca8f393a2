"""How small a student is to be: a number of layers, a share of its teacher's weights, or a budget.

Knows numbers of layers and bytes of weights; nothing of models or which layers go. Another goal: a
field of `Goal`, and its bytes in `Goal.most_bytes`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from conch_dna.errors import ConchError

_OPTIONS = {"layers": "--layers", "size": "--size", "budget_mb": "--budget-mb"}


@dataclass(frozen=True, kw_only=True)
class Goal:
    """How small a student is to be; one of the three.

    Attributes:
        layers: How many stay.
        size: Share of the teacher's weights, in bytes, that stays at most, between 0 and 1.
        budget_mb: Megabytes of weights that stay at most, above 0.

    Raises:
        ConchError: None or several are given, or one is out of its range.
    """

    layers: int | None = None
    size: float | None = None
    budget_mb: float | None = None

    def __post_init__(self) -> None:
        given = [_OPTIONS[name] for name, value in asdict(self).items() if value is not None]
        if len(given) != 1:
            raise ConchError(
                "how small a student is to be is told by one of --layers, --size and --budget-mb, "
                f"not by {' and '.join(given) or 'nothing'}: give one"
            )
        if self.size is not None and not 0 < self.size < 1:
            raise ConchError(f"--size is {self.size:g}: give a share between 0 and 1, such as 0.6")
        if self.budget_mb is not None and not 0 < self.budget_mb < math.inf:
            raise ConchError(
                f"--budget-mb is {self.budget_mb:g}: give a number above 0, such as 900"
            )

    def most_bytes(self, whole: int) -> float:
        """Bytes that a student's weights take at most.

        Args:
            whole: Those of the teacher's.
        """
        if self.budget_mb is not None:
            return self.budget_mb * 1e6
        return math.inf if self.size is None else self.size * whole

    def is_reached(self, layers: int, nbytes: int, whole: int) -> bool:
        """Whether a student of so many layers and bytes is small enough."""
        return layers <= (self.layers or layers) and nbytes <= self.most_bytes(whole)


def most_removals(
    goal: Goal,
    name: str,
    count: int,
    bytes_of: Callable[[Sequence[int]], int],
    *,
    whole: int,
    is_narrower: bool,
) -> int:
    """How many layers go at most before a goal is reached.

    Args:
        goal: What is wanted.
        name: The teacher's.
        count: Its layers.
        bytes_of: What the weights of a student with some layers take.
        whole: What those of the teacher take.
        is_narrower: Whether the student is smaller than its teacher with all layers too.

    Raises:
        ConchError: No student of this teacher reaches it, or the teacher itself does.
    """
    most = count if is_narrower else count - 1
    if goal.layers is not None:
        if not 1 <= goal.layers <= most:
            raise ConchError(
                f"{name} has {count} layers: keep from 1 to {most} of them, not {goal.layers}"
            )
        return count - goal.layers
    if not is_narrower and goal.is_reached(count, whole, whole):
        raise ConchError(
            f"{name} takes {whole / 1e6:.1f} MB, which --budget-mb {goal.budget_mb:g} holds with "
            "all its layers: give a smaller one"
        )
    # The smallest first: in the order of their influence no more have to go.
    smallest_first = sorted(range(count), key=lambda number: bytes_of([number]))
    for gone in range(count):
        if goal.is_reached(count - gone, bytes_of(sorted(smallest_first[gone:])), whole):
            return gone
    smallest = bytes_of(smallest_first[:1])
    if goal.is_reached(1, smallest, whole):
        return count - 1
    raise too_small(goal, name, smallest, whole)


def too_small(goal: Goal, name: str, nbytes: int, whole: int) -> ConchError:
    """What is said of a goal below a student of one layer, whose weights take so many bytes."""
    limit = goal.most_bytes(whole) / 1e6
    if goal.size is not None:
        given, remedy = f"--size {goal.size:g}", f"{math.ceil(1e4 * nbytes / whole) / 1e4:g}"
    else:
        given = f"--budget-mb {goal.budget_mb:g}"
        remedy = f"{math.ceil(nbytes / 1e5) / 10:g}, or a teacher in fewer bits"
    return ConchError(
        f"{name} with one layer takes {nbytes / 1e6:.2f} MB, and {given} allows {limit:.2f} MB: "
        f"give at least {remedy}"
    )
