"""The settings of an embedding store that learns.

Defaults and ranges stand only here; the command line and the tables of the README are made from
or compared with these fields. Knows nothing of how they are used. To add a setting: a field with
its help and range.
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from conch_dna.errors import ConchError
from conch_dna.sedimentation.choices import KINDS, SCHEDULES

TRAINING_MODES = ("baseline", "offline", "hybrid")
VECTOR_SPACES = ("symmetric", "asymmetric")
FUSIONS = ("none", "rrf")
_KINDS: dict[str, tuple[str, tuple[type, ...]]] = {
    "float": ("a number", (float, int)),
    "int": ("a whole number", (int,)),
    "bool": ("true or false", (bool,)),
    "str": ("text", (str,)),
}


def _option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    limits = {"low": low, "high": high, "above": above, "below": below, "choices": choices}
    return field(default=default, metadata={"help": help, **limits})


@dataclass(frozen=True, kw_only=True)
class ChelationConfig:
    """Everything that shapes a store, its cycles and its gate, except documents and models.

    Whether a mode or space has the teacher that it needs is for whoever opens the models to say.

    A teacher_weight outside [0, 1] is brought to the nearer end with a `UserWarning`, as the
    documents say; every other value out of its range is refused.

    Raises:
        ConchError: Values are of the wrong kind or out of their range; all are named at once.

    >>> ChelationConfig().training_mode
    'baseline'
    """

    training_mode: str = _option(
        "baseline",
        "What teaches the adapter: the store's own log of collapsed neighbourhoods (baseline), a "
        "teacher (offline), or both (hybrid).",
        choices=TRAINING_MODES,
    )
    teacher_weight: float = _option(
        0.5,
        "Share a of the teacher in a target, between 0 and 1: normalize((1 - a) own + a teacher).",
    )
    teacher_weight_schedule: str = _option(
        "constant", "How that share changes over the epochs of a cycle.", choices=SCHEDULES
    )
    teacher_weight_end: float = _option(
        1.0, "Share at the end of a cycle whose schedule is not constant.", low=0, high=1
    )
    space: str = _option(
        "symmetric",
        "Whether documents and queries are both mapped, or documents carry the teacher's vectors.",
        choices=VECTOR_SPACES,
    )
    fusion: str = _option(
        "none", "Whether BM25 is fused with the dense ranking by reciprocal rank.", choices=FUSIONS
    )
    rrf_k: int = _option(60, "Constant k of reciprocal rank fusion, 1 / (k + rank).", low=1)
    top_k: int = _option(10, "Documents a query is answered with, and in a neighbourhood.", low=1)
    exact_below: int = _option(
        20_000, "Stores with fewer documents are searched without an index.", low=0
    )
    batch_size: int = _option(100, "Documents, and pairs of a training step, at once.", low=1)
    adapter: str = _option("ridge", "Kind of adapter.", choices=KINDS[1:])
    ridge_strength: float = _option(0.01, "Lambda of the ridge.", above=0)
    rank: int = _option(32, "Rank of a low-rank adapter.", low=1)
    hidden: int = _option(256, "Width of a residual adapter's network.", low=1)
    held_out: float = _option(
        0.1, "Share of the pairs that only decide when training ends.", above=0, below=1
    )
    patience: int = _option(3, "Epochs without a new best before training ends.", low=1)
    threshold: int = _option(
        3, "Collapsed neighbourhoods a document must be in before a cycle takes it.", low=1
    )
    learning_rate: float = _option(0.001, "Of a sedimentation cycle.", above=0)
    epochs: int = _option(10, "Of a sedimentation cycle.", low=1)
    offline_learning_rate: float = _option(0.005, "Of offline distillation.", above=0)
    offline_epochs: int = _option(15, "Of offline distillation.", low=1)
    homeostatic_push: float = _option(
        0.1, "m: how far a document is pushed from its noise centre.", above=0, high=1
    )
    collapse_percentile: float = _option(
        5.0,
        "A neighbourhood is collapsed below this percentile of the corpus's own dispersions.",
        above=0,
        below=100,
    )
    collapse_sample: int = _option(500, "Documents whose neighbourhoods calibrate that.", low=1)
    log_rotate_bytes: int = _option(
        10_000_000, "Size at which a file of the chelation log is closed.", low=1
    )
    log_queries: bool = _option(False, "Whether the log keeps the text of queries.")
    gate_margin: float = _option(
        0.005, "How much worse a change may be by the lower bound of its interval.", low=0, high=1
    )
    gate_confidence: float = _option(0.95, "Of that interval.", above=0, below=1)
    gate_queries: int = _option(500, "Most pseudo-queries, where there are no judgements.", low=2)
    seed: int = _option(0, "Of samples, splits, order and networks.", low=0, high=10**9)

    def __post_init__(self) -> None:
        problems = [problem for each in fields(self) for problem in self._problems(each)]
        if problems:
            raise ConchError("; ".join(problems))
        if not 0 <= self.teacher_weight <= 1:
            nearer = min(max(self.teacher_weight, 0.0), 1.0)
            warnings.warn(
                f"teacher_weight is {self.teacher_weight:g}, outside [0, 1]: {nearer:g} is used",
                UserWarning,
                stacklevel=3,
            )
            object.__setattr__(self, "teacher_weight", nearer)

    def _problems(self, option: Any) -> list[str]:
        name, limits = option.name, option.metadata
        value: Any = getattr(self, name)
        words, expected = _KINDS[option.type.__name__]
        if not isinstance(value, expected) or (isinstance(value, bool) and bool not in expected):
            return [f"{name} is {value!r}: it must be {words}"]
        if limits["choices"] and value not in limits["choices"]:
            return [f"{name} is {value!r}: use one of {', '.join(limits['choices'])}"]
        if isinstance(value, bool | str):
            return []
        number: float = value  # type: ignore[assignment]
        inside = (
            math.isfinite(number)
            and (limits["low"] is None or number >= limits["low"])
            and (limits["high"] is None or number <= limits["high"])
            and (limits["above"] is None or number > limits["above"])
            and (limits["below"] is None or number < limits["below"])
        )
        return [] if inside else [f"{name} is {value}: it must be {range_text(option)}"]

    @classmethod
    def from_json(
        cls,
        values: Mapping[str, Any],
        *,
        source: str,
        overriding: Mapping[str, Any] | None = None,
    ) -> "ChelationConfig":
        """Make settings from a mapping, refusing names that do not exist.

        Args:
            values: Field names to values; dashes stand for underscores.
            source: Where they come from, for the message.
            overriding: Field names to values that win over them.

        Raises:
            ConchError: A name is unknown or given twice, or a value is out of its range.
        """
        names = [str(name).replace("-", "_") for name in values]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConchError(f"{source} gives {', '.join(twice)} twice: leave one of each")
        known = {each.name for each in fields(cls)}
        if unknown := sorted(set(names) - known):
            raise ConchError(
                f"{source} names unknown settings: {', '.join(unknown)}; known are "
                f"{', '.join(sorted(known))}"
            )
        plain = dict(zip(names, values.values(), strict=True))
        try:
            return cls(**{**plain, **(overriding or {})})
        except ConchError as error:
            raise ConchError(f"{source}: {error}") from error

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return asdict(self)


def range_text(option: Any) -> str:
    """The range of a field in words, such as "0 or more"; "finite" where it has none.

    Args:
        option: One of `dataclasses.fields(ChelationConfig)`.
    """
    words = {"low": "at least", "above": "above", "high": "at most", "below": "below"}
    limits = {name: option.metadata[name] for name in words}
    if limits["low"] is not None and limits["high"] is None and limits["below"] is None:
        return f"{limits['low']:g} or more"
    parts = [f"{words[name]} {limit:g}" for name, limit in limits.items() if limit is not None]
    return " and ".join(parts) or "finite"
