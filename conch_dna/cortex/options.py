"""How a question to a neuron is to be answered: every default stands here.

Knows names, defaults and ranges; nothing of models, so that the command line starts without them.
To add an option: a field of `AskOptions`, and its use in turn.py.
"""

from dataclasses import dataclass
from typing import Literal

from conch_dna.errors import ConchError
from conch_dna.option_fields import option

HandOver = Literal["auto", "never", "always"]
HAND_OVERS: tuple[HandOver, ...] = ("auto", "never", "always")


@dataclass(frozen=True, kw_only=True)
class AskOptions:
    """How a question is to be answered.

    Attributes:
        max_tokens: Longest answer of the neuron and of EGO; shorter where a context ends.
        temperature: 0 takes the likeliest token.
        top_p: Draw only from the likeliest tokens that together have this probability.
        seed: Of the draw.
        hand_over: Whether EGO answers instead: "auto" where the neuron's answer is not valid or
            not sure enough, "never", or "always".
        system: Instead of the domain's system prompt; its schema is not asked for then.
        structured: Whether an answer must keep to the domain's schema, where it has one.

    Raises:
        ConchError: hand_over is none of them. The numbers are for `Request` to check.
    """

    max_tokens: int = option(256, "Longest answer in tokens.", low=1)
    temperature: float = option(0.0, "Of the draw; 0 takes the likeliest token.", low=0)
    top_p: float = option(
        1.0, "Draw only from the likeliest tokens with this probability.", above=0, high=1
    )
    seed: int = option(0, "Of the draw.")
    hand_over: str = option(
        "auto",
        "Whether EGO answers: where the neuron's answer is not valid or not sure enough, never, "
        "or always.",
        choices=HAND_OVERS,
    )
    system: str | None = None
    structured: bool = True

    def __post_init__(self) -> None:
        if self.hand_over not in HAND_OVERS:
            raise ConchError(f"hand_over is {self.hand_over!r}: use one of {', '.join(HAND_OVERS)}")
