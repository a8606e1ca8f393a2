"""The settings of an embedding store that learns.

Defaults and ranges stand only here; the command line and the tables of docs/sedimentation.md are
made from or compared with these fields. Knows nothing of how they are used. To add a setting: a
field with its help and range.
"""

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from conch_dna.errors import ConchError
from conch_dna.options.fields import named_settings, option, option_problem

# Kinds of adapters, and how the teacher's weight changes over the epochs of a cycle.
KINDS = ("identity", "ridge", "procrustes", "low_rank", "residual")
SCHEDULES = ("constant", "linear", "cosine", "step")
TRAINING_MODES = ("baseline", "offline", "hybrid")
VECTOR_SPACES = ("symmetric", "asymmetric")
FUSIONS = ("none", "rrf")


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

    training_mode: str = option(
        "baseline",
        "What teaches the adapter: the store's own log of collapsed neighbourhoods (baseline), a "
        "teacher (offline), or both (hybrid).",
        choices=TRAINING_MODES,
    )
    teacher_weight: float = option(
        0.5,
        "Share a of the teacher in a target, between 0 and 1: normalize((1 - a) own + a teacher).",
    )
    teacher_weight_schedule: str = option(
        "constant", "How that share changes over the epochs of a cycle.", choices=SCHEDULES
    )
    teacher_weight_end: float = option(
        1.0, "Share at the end of a cycle whose schedule is not constant.", low=0, high=1
    )
    space: str = option(
        "symmetric",
        "Whether documents and queries are both mapped, or documents carry the teacher's vectors.",
        choices=VECTOR_SPACES,
    )
    fusion: str = option(
        "none", "Whether BM25 is fused with the dense ranking by reciprocal rank.", choices=FUSIONS
    )
    rrf_k: int = option(60, "Constant k of reciprocal rank fusion, 1 / (k + rank).", low=1)
    fusion_share: float = option(
        0.5, "Share of the vectors in that fusion; the rest is BM25's.", low=0, high=1
    )
    top_k: int = option(10, "Documents a query is answered with, and in a neighbourhood.", low=1)
    exact_below: int = option(
        20_000, "Stores with fewer documents are searched without an index.", low=0
    )
    batch_size: int = option(100, "Documents, and pairs of a training step, at once.", low=1)
    adapter: str = option("ridge", "Kind of adapter.", choices=KINDS[1:])
    ridge_strength: float = option(0.01, "Lambda of the ridge.", above=0)
    rank: int = option(32, "Rank of a low-rank adapter.", low=1)
    train_student: bool = option(
        False,
        "Fit the static student's own table of tokens to the teacher, in place of an adapter.",
    )
    table_strength: float = option(
        0.2, "What holds tokens where a map would take them, while their table is fitted.", above=0
    )
    hidden: int = option(256, "Width of a residual adapter's network.", low=1)
    held_out: float = option(
        0.1, "Share of the pairs that only decide when training ends.", above=0, below=1
    )
    patience: int = option(3, "Epochs without a new best before training ends.", low=1)
    threshold: int = option(
        3, "Collapsed neighbourhoods a document must be in before a cycle takes it.", low=1
    )
    learning_rate: float = option(0.001, "Learning rate of a sedimentation cycle.", above=0)
    epochs: int = option(10, "Most epochs of a sedimentation cycle.", low=1)
    offline_learning_rate: float = option(0.005, "Learning rate of offline distillation.", above=0)
    offline_epochs: int = option(15, "Most epochs of offline distillation.", low=1)
    homeostatic_push: float = option(
        0.1, "m: how far a document is pushed from its noise centre.", above=0, high=1
    )
    collapse_percentile: float = option(
        5.0,
        "A neighbourhood is collapsed below this percentile of the corpus's own dispersions.",
        above=0,
        below=100,
    )
    collapse_sample: int = option(500, "Documents whose neighbourhoods calibrate that.", low=1)
    log_rotate_bytes: int = option(
        10_000_000, "Size at which a file of the chelation log is closed.", low=1
    )
    log_queries: bool = option(False, "Whether the log keeps the text of queries.")
    gate_margin: float = option(
        0.005,
        "How much worse than active and raw vectors a change may be, by its intervals' lower ends.",
        low=0,
        high=1,
    )
    gate_confidence: float = option(0.95, "Confidence of the gate's interval.", above=0, below=1)
    gate_queries: int = option(500, "Most pseudo-queries, where there are no judgements.", low=2)
    seed: int = option(0, "Seed of samples, splits, order and networks.", low=0, high=10**9)

    def __post_init__(self) -> None:
        checked = [option_problem(each, getattr(self, each.name)) for each in fields(self)]
        if problems := [problem for problem in checked if problem is not None]:
            raise ConchError("; ".join(problems))
        if not 0 <= self.teacher_weight <= 1:
            nearer = min(max(self.teacher_weight, 0.0), 1.0)
            warnings.warn(
                f"teacher_weight is {self.teacher_weight:g}, outside [0, 1]: {nearer:g} is used",
                UserWarning,
                stacklevel=3,
            )
            object.__setattr__(self, "teacher_weight", nearer)

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
        named = named_settings(values, [each.name for each in fields(cls)], source=source)
        try:
            return cls(**{**named, **(overriding or {})})
        except ConchError as error:
            raise ConchError(f"{source}: {error}") from error

    def having(self, **values: Any) -> "ChelationConfig":
        """The same settings with these values, as far as they are not None.

        Raises:
            ConchError: See the class.
        """
        return replace(self, **{name: value for name, value in values.items() if value is not None})

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return asdict(self)
