"""Which batches are the student's own answers, and which settings of that cannot be.

Knows numbers only, so that settings can be checked before anything is loaded.
"""

from fractions import Fraction
from math import floor
from typing import Any


def own_batches(share: float, batches: int) -> int:
    """How many of the first so many batches are the student's own answers, spread evenly.

    >>> [own_batches(0.5, count) for count in range(5)]
    [0, 0, 1, 1, 2]
    """
    return floor(Fraction(share).limit_denominator(1_000) * batches)


def own_answer_problems(config: Any) -> list[str]:
    """What is wrong with the settings of a run that learns from the student's own answers.

    Args:
        config: A `KDConfig` whose values are in their ranges.
    """
    problems = []
    if config.rollouts % config.batch_size:
        problems.append(
            f"rollouts is {config.rollouts}, which is no multiple of batch_size "
            f"{config.batch_size}: some would never be used; give another number"
        )
    if config.teacher_ema < 1 and config.on_policy < 1:
        problems.append(
            f"teacher_ema is {config.teacher_ema:g} and on_policy {config.on_policy:g}: a teacher "
            "that follows the student scores its own answers only; use on_policy 1"
        )
    if not config.on_policy:
        return problems
    if not config.alpha:
        problems.append(
            "on_policy is above 0 and alpha is 0: of its own answers the student learns only "
            "what the teacher thinks of them; raise alpha"
        )
    if not config.own_batches:
        problems.append(
            f"on_policy is {config.on_policy:g}, which makes none of {config.given_batches} "
            "batches the student's own answers: raise it, or take more steps"
        )
    if config.train_on_prompt:
        problems.append("on_policy and train_on_prompt do not go together: leave out one of them")
    return problems
