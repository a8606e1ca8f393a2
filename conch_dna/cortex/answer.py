"""What comes of a question to a neuron or to EGO.

Knows nothing but its own figures. What clients are to learn of an answer: a field of `Answer`.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from conch_dna.cortex.engine.batching import Piece
from conch_dna.cortex.tools import Call


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came of a question.

    Attributes:
        domain: Whose neuron was asked.
        text: The answer.
        answered_by: "neuron" or "ego".
        reason: Why it was that one, in words.
        raw: What the neuron said in the end; empty where it was not asked.
        parsed: The JSON object of `text`; None where none was asked for or found.
        valid: Whether `text` keeps to the domain's schema; None where none was asked for.
        problems: Why it does not.
        repaired: Whether the neuron was asked a second time for a valid answer.
        confidence: Of the neuron's answer, between 0 and 1; None where it was not asked.
        calibrated: Whether that is the share of agreement with EGO to expect, or the bare
            geometric mean of its tokens' probabilities.
        threshold: The confidence below which EGO answers; None where there is no calibration.
        removed: Mean share of probability that the schema took from the neuron's tokens while it
            wrote; None where it wrote freely. High where it would have said something else.
        finish_reason: "stop", "tool_calls" or, where it was cut off, "length".
        calls: Of functions that it may call.
        tokens: Of the neuron's answer, where they were asked for; None else, and where it is EGO's.
        prompt_tokens: Of the neuron's prompts, a repair's among them; None where EGO alone was
            asked, by an API that does not say.
        completion_tokens: Of its answers, a repaired one among them, and of EGO's where it says;
            None as before.
        draft: Who drafted EGO's answer; None where nobody did.
        ego_tokens: Of EGO's answer; None where the neuron answers, or an API does not say.
        ego_steps: In how many steps EGO said them; None where nobody drafted.
        first_token_s: Seconds to the first token of the neuron; None where it was not asked.
        seconds: From the question to the answer.
    """

    domain: str
    text: str
    answered_by: Literal["neuron", "ego"]
    reason: str
    raw: str = ""
    parsed: dict[str, Any] | None = None
    valid: bool | None = None
    problems: tuple[str, ...] = ()
    repaired: bool = False
    confidence: float | None = None
    calibrated: bool = False
    threshold: float | None = None
    removed: float | None = None
    finish_reason: str = "stop"
    calls: tuple[Call, ...] = ()
    tokens: tuple[Piece, ...] | None = None
    prompt_tokens: int | None = 0
    completion_tokens: int | None = 0
    draft: str | None = None
    ego_tokens: int | None = None
    ego_steps: int | None = None
    first_token_s: float | None = None
    seconds: float = 0.0

    @property
    def acceptance(self) -> float | None:
        """Mean tokens of a step of EGO; None where nobody drafted."""
        if not self.ego_steps or self.ego_tokens is None:
            return None
        return self.ego_tokens / self.ego_steps

    def to_json(self) -> dict[str, Any]:
        """The fields and the acceptance as a JSON object, without the tokens."""
        return asdict(replace(self, tokens=None)) | {"acceptance": self.acceptance}
