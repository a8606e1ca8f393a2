"""How confidence is calibrated and adapters are measured: every default stands here.

Knows names, defaults and ranges; nothing of models or numbers, so that the command line starts
without them. To add a setting: a field made by `option`, and its use where calibrations are made.
"""

from dataclasses import dataclass, fields

from conch_dna.errors import ConchError
from conch_dna.options.fields import option, option_problem

METHODS = ("isotonic", "temperature", "none")
# With fewer answers neither a fit nor the held-out figures mean anything.
MIN_ANSWERS = 20


@dataclass(frozen=True, kw_only=True)
class CalibrationSettings:
    """How a neuron's confidence is measured and calibrated.

    The fields say themselves what they are, see `options.fields.option`.

    Raises:
        ConchError: A value is out of its range; all such values are named at once.
    """

    samples: int = option(200, "Most held-out prompts.", low=MIN_ANSWERS)
    max_tokens: int = option(256, "Longest answer in tokens.", low=1)
    method: str = option("isotonic", "How confidence is calibrated.", choices=METHODS)
    max_risk: float = option(
        0.3,
        "Mean disagreement with EGO allowed among the answers that EGO does not see.",
        low=0,
        high=1,
    )
    confidence: float = option(
        0.95,
        "Probability with which what the neuron keeps stays within --max-risk; 0 takes what the "
        "held-out answers show, and promises nothing.",
        low=0,
        below=1,
    )
    seed: int = option(0, "Seed of the draw of prompts and of their halves.", low=0)

    def __post_init__(self) -> None:
        problems = (option_problem(each, getattr(self, each.name)) for each in fields(self))
        if wrong := [problem for problem in problems if problem]:
            raise ConchError("; ".join(wrong))


@dataclass(frozen=True, kw_only=True)
class AdapterBenchmarkSettings(CalibrationSettings):
    """How a benchmark measures, and how it calibrates for that.

    The fields say themselves what they are, see `options.fields.option`.

    Raises:
        ConchError: A value is out of its range; all such values are named at once.
    """

    samples: int = option(
        100,
        "Most held-out prompts that are answered, and records whose distributions are compared.",
        low=1,
    )
    max_tokens: int = option(128, "Longest answer in tokens.", low=1)
    alone: int = option(8, "Prompts answered one at a time, for the time to a token.", low=1)
