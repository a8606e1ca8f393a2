"""Settings of fusing: every default stands here.

Knows names, defaults and ranges; nothing of models. To add a setting: a field made by `option`,
and its row in docs/leaving.md.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any

from conch_dna.errors import ConchError
from conch_dna.options.fields import option, option_problem
from conch_dna.training.settings import LOSS_MEMORY

OWN, FLOAT = "own", "float"
# Numbers of GGUF files, by llama.cpp's names.
GGUF_KINDS = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
WIDTHS = ("2", "3", "4", "5", "6", "8")
# What decides whether a fused model is taken, and where it is looked at; not what it is.
NOT_IDENTITY = ("max_kl", "answers", "loss_memory")


def _problems(settings: Any) -> list[str]:
    return [
        p for each in fields(settings) if (p := option_problem(each, getattr(settings, each.name)))
    ]


@dataclass(frozen=True, kw_only=True)
class FuseSettings:
    """How an adapter becomes part of its model.

    Raises:
        ConchError: Values are out of their ranges, or do not go together; all are named.
    """

    bits: str = option(
        OWN,
        "Bits of a weight; own is what the adapter's model has, float leaves weights whole.",
        choices=(OWN, FLOAT, *WIDTHS),
    )
    mean_bits: float = option(
        0.0,
        "Bits of a weight on average, instead of --bits: each part of the model gets more or fewer "
        "by what rounding it costs; 0 is the same for all.",
        low=2,
        high=8,
        besides=0,
    )
    group_size: int = option(0, "Weights that share a scale; 0 is the model's own, or 64.", low=0)
    fit: str = option(
        "outputs",
        "How codes and scales are chosen: so that each layer's outputs change little on the "
        "texts, or rounded, as mlx_lm does.",
        choices=("outputs", "rounded"),
    )
    fit_tokens: int = option(8192, "Tokens of the texts that outputs are compared on.", low=64)
    steps: int = option(
        0,
        "Steps in which all scales are trained on the adapter's distributions.",
        low=0,
        high=10**6,
    )
    learning_rate: float = option(
        1e-3, "Learning rate of these steps, as a share of a scale.", above=0, high=1
    )
    batch_size: int = option(4, "Texts in such a step.", low=1)
    max_kl: float = option(
        0.0,
        "Most nats a token by which the fused model may differ from the adapter; 0 asks only that "
        "it is nearer to it than the model without it.",
        low=0,
    )
    answers: int = option(
        16, "Held-out prompts answered, where the domain's answers have a schema; 0 is none.", low=0
    )
    val_fraction: float = option(
        0.2, "Share of --data that is held out, to judge by.", above=0, high=0.5
    )
    loss_memory: float = option(
        LOSS_MEMORY, "Megabytes for logits and what is made of them.", low=0.1, high=10**6
    )
    seed: int = option(
        0, "Seed of the order of texts, and of what --data holds out.", low=0, high=10**9
    )

    def __post_init__(self) -> None:
        problems = _problems(self)
        if not problems and self.group_size not in (0, 32, 64, 128):
            problems = [f"group_size is {self.group_size}: mlx has groups of 32, 64 and 128"]
        if not problems and self.mean_bits and self.bits != OWN:
            problems = [f"bits is {self.bits} and mean_bits {self.mean_bits:g}: leave one"]
        if not problems and self.bits == FLOAT and self.steps:
            problems = ["steps train the scales of a quantised model, and bits is float: leave one"]
        if problems:
            raise ConchError("; ".join(problems))

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return asdict(self)

    def identity(self) -> dict[str, Any]:
        """What must be the same for a fused model to be the same."""
        return {name: value for name, value in self.to_json().items() if name not in NOT_IDENTITY}


@dataclass(frozen=True, kw_only=True)
class MergeSettings:
    """How several adapters become one.

    Raises:
        ConchError: Values are out of their ranges; all are named.
    """

    rank: int = option(
        0, "Rank of the merged adapter; 0 is the largest of theirs.", low=0, high=2**16
    )
    steps: int = option(200, "Steps of training.", low=1, high=10**6)
    learning_rate: float = option(1e-4, "Peak learning rate.", above=0, high=1)
    batch_size: int = option(2, "Texts of each adapter in a step.", low=1)
    recall_margin: float = option(
        0.05,
        "How much less than its own adapter it may recall of a domain: a share of the tokens of "
        "held-out texts that it ranks first.",
        low=0,
        high=1,
    )
    answers: int = option(
        16,
        "Held-out prompts of each domain answered, where its answers have a schema; 0 is none.",
        low=0,
    )
    loss_memory: float = option(
        LOSS_MEMORY, "Megabytes for logits and what is made of them.", low=0.1, high=10**6
    )
    seed: int = option(0, "Seed of the order of texts, and of the adapter.", low=0, high=10**9)

    def __post_init__(self) -> None:
        if problems := _problems(self):
            raise ConchError("; ".join(problems))

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return asdict(self)

    def identity(self) -> dict[str, Any]:
        """What must be the same for a merged adapter to be the same."""
        left = (*NOT_IDENTITY, "recall_margin")
        return {name: value for name, value in self.to_json().items() if name not in left}
