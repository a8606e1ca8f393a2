"""Everything that shapes one generation except the line and the data.

Knows names, defaults and ranges; nothing of how they are used. A default stands here, in
`KDConfig`, `BlendSettings` or `GateSettings`, and nowhere else.
"""

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from conch_dna.errors import ConchError
from conch_dna.generations.laws import Law
from conch_dna.generations.promotion import GateSettings
from conch_dna.generations.two_teachers import BlendSettings
from conch_dna.training.settings import KDConfig


@dataclass(frozen=True, kw_only=True)
class EvolveConfig:
    """Settings of one generation's training and judgement.

    Attributes:
        training: Temperature, LoRA, optimiser, batches, seed; its alpha and alignment are not
            used, and its output_dir is the line's.
        alpha: Share of cross-entropy.
        beta: Share of the teachers' target.
        gamma: Share of `(1 - JS) KL(p₁‖q)`.
        blend: How two teachers become one target.
        gates: What the child must reach.
        ema_decay: See `EMA`; 0 keeps the parameters themselves.
        replay_share: Of earlier data in an epoch; 0 for none.
        replay_size: Most records of earlier data to draw from.
        measured: Most held-out records of earlier data to measure recall on.
        answers: Prompts that child and parent answer, for tone and laws.
        critic: Whether the grandparent teaches too.
        taboo_words: See `TabooTokens`.
        taboo_ids: Likewise.
        laws: What answers must keep to.
    """

    training: KDConfig = field(default_factory=KDConfig)
    alpha: float = 0.1
    beta: float = 0.9
    gamma: float = 0.0
    blend: BlendSettings = field(default_factory=BlendSettings)
    gates: GateSettings = field(default_factory=GateSettings)
    ema_decay: float = 0.999
    replay_share: float = 0.1
    replay_size: int = 1000
    measured: int = 200
    answers: int = 16
    critic: bool = True
    taboo_words: tuple[str, ...] = ()
    taboo_ids: tuple[int, ...] = ()
    laws: tuple[Law, ...] = ()

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name):g}: it must be 0 or more"
            for name in ("alpha", "beta", "gamma")
            if not getattr(self, name) >= 0
        ]
        if not problems and self.alpha + self.beta + self.gamma == 0:
            problems.append("alpha, beta and gamma are all 0: nothing would be learned")
        if not 0 <= self.ema_decay < 1:
            problems.append(f"ema_decay is {self.ema_decay:g}: it must be at least 0 and below 1")
        if not 0 <= self.replay_share < 1:
            problems.append(
                f"replay_share is {self.replay_share:g}: it must be at least 0, below 1"
            )
        problems += [
            f"{name} is {getattr(self, name)}: it must be 1 or more"
            for name in ("replay_size", "measured", "answers")
            if getattr(self, name) < 1
        ]
        if problems:
            raise ConchError("; ".join(problems))

    @classmethod
    def from_json(
        cls,
        values: dict[str, Any],
        *,
        source: str,
        training: dict[str, Any] | None = None,
        overriding: dict[str, Any] | None = None,
    ) -> "EvolveConfig":
        """Make settings from a mapping, refusing names that do not exist.

        Args:
            values: Field names to values; `training`, `blend` and `gates` are mappings.
            source: Where they come from, for the message.
            training: Fields of KDConfig that win over those in `values`.
            overriding: Fields of this class that do.

        Raises:
            ConchError: A name is unknown, a mapping is none, or a value is out of its range.
        """
        plain = {str(name).replace("-", "_"): value for name, value in values.items()}
        nested: dict[str, Any] = {}
        for name in ("training", "blend", "gates"):
            inner = plain.pop(name, {})
            if not isinstance(inner, dict):
                raise ConchError(f"{source}: {name} is {inner!r}, not a mapping of names to values")
            nested[name] = inner
        kinds = {"blend": BlendSettings, "gates": GateSettings}
        _refuse_unknown(plain, cls, source, without=("laws", *nested))
        for name, kind in kinds.items():
            _refuse_unknown(nested[name], kind, f"{source}, {name},")
        for holder in (plain, nested["gates"]):
            for name, value in holder.items():
                holder[name] = tuple(value) if isinstance(value, list) else value
        try:
            return cls(
                training=KDConfig.from_json(
                    nested["training"], source=f"{source}, training,", overriding=training
                ),
                blend=BlendSettings(**nested["blend"]),
                gates=GateSettings(**nested["gates"]),
                **{**plain, **(overriding or {})},
            )
        except TypeError as error:
            raise ConchError(f"{source}: a value is not of its kind: {error}") from error

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return asdict(self)


def _refuse_unknown(
    values: dict[str, Any], kind: Any, source: str, *, without: tuple[str, ...] = ()
) -> None:
    known = {each.name for each in fields(kind)} - set(without)
    if unknown := sorted(set(values) - known):
        raise ConchError(
            f"{source} names unknown settings: {', '.join(unknown)}; known are "
            f"{', '.join(sorted(known))}"
        )
