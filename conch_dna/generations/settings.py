"""Everything that shapes one generation except the line and the data.

Knows names, defaults and ranges; nothing of how they are used. A default stands here, in
options.py, `KDConfig`, `BlendSettings` or `GateSettings`, and nowhere else.
"""

import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from conch_dna.errors import ConchError
from conch_dna.generations.laws import Law, laws_of
from conch_dna.generations.options import NUMBERS, UNUSED
from conch_dna.generations.promotion import GateSettings
from conch_dna.generations.two_teachers import BlendSettings
from conch_dna.option_fields import refuse_unknown
from conch_dna.training.settings import KDConfig

GENERATION_NAME = re.compile(r"HEAD|G\d{3,}")
LOSS_PARTS = ("alpha", "beta", "gamma", "blend")
STABILIZERS = ("ema_decay", "replay_share", "replay_size", "taboo_words", "taboo_ids")
EVALUATION = ("measured", "answers")
MAPPINGS = ("training_params", "stabilizers", "evaluation", "gates")
REQUEST = ("evolution_request", "teachers", *MAPPINGS, "laws")
# What a generation's manifest says besides, of what became of it.
RECORDED = (
    "format",
    "line",
    "generation",
    "parent",
    "grandparent",
    "verdicts",
    "decision",
    "reasons",
    "digests",
    "versions",
    "platform",
    "git_commit",
    "seed",
    "created",
)


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
        critic: Whether a second teacher teaches too.
        first_teacher: A model (hub id or folder) in the parent's place as a teacher; the child
            grows from the parent and is compared with it all the same. Empty for the parent.
        second_teacher: A model in the grandparent's place. Empty for the grandparent.
        taboo_words: See `TabooTokens`.
        taboo_ids: Likewise.
        laws: What answers must keep to.
    """

    training: KDConfig = field(default_factory=KDConfig)
    alpha: float = NUMBERS["alpha"].default
    beta: float = NUMBERS["beta"].default
    gamma: float = NUMBERS["gamma"].default
    blend: BlendSettings = field(default_factory=BlendSettings)
    gates: GateSettings = field(default_factory=GateSettings)
    ema_decay: float = NUMBERS["ema_decay"].default
    replay_share: float = NUMBERS["replay_share"].default
    replay_size: int = 1000
    measured: int = 200
    answers: int = 64
    critic: bool = True
    first_teacher: str = ""
    second_teacher: str = ""
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
    def from_manifest(
        cls,
        manifest: dict[str, Any],
        *,
        source: str,
        training: dict[str, Any] | None = None,
        overriding: dict[str, Any] | None = None,
    ) -> "EvolveConfig":
        """Make settings from a manifest: one written by hand, or that of a generation.

        Args:
            manifest: The mappings `training_params`, `stabilizers`, `evaluation` and `gates`, the
                list `teachers` and the list `laws`, each optional; see REQUEST. What a generation's
                manifest says of the past is not read.
            source: Where it comes from, for the message.
            training: Fields of KDConfig that win.
            overriding: Fields of this class that do.

        Raises:
            ConchError: A name is unknown, a mapping is none, or a value is out of its range.
        """
        unknown = sorted(set(manifest) - set(REQUEST) - set(RECORDED))
        if unknown:
            raise ConchError(
                f"{source} names unknown parts: {', '.join(unknown)}; known are "
                f"{', '.join(REQUEST)}"
            )
        parts = {name: _mapping(manifest, name, source) for name in MAPPINGS}
        params = parts["training_params"]
        own = {name: params.pop(name) for name in LOSS_PARTS if name in params}
        blend = own.pop("blend", {})
        usable = {option.name for option in fields(KDConfig)} - set(UNUSED)
        refuse_unknown(
            params, {*usable, *LOSS_PARTS, "iters"}, source=f"{source}, training_params,"
        )
        if not isinstance(blend, dict):
            raise ConchError(f"{source}: blend is {blend!r}, not a mapping of names to values")
        for name, known in (("stabilizers", STABILIZERS), ("evaluation", EVALUATION)):
            refuse_unknown(parts[name], known, source=f"{source}, {name},")
            own |= parts[name]
        for holder in (own, parts["gates"]):
            for name, value in holder.items():
                holder[name] = tuple(value) if isinstance(value, list) else value
        kinds: tuple[tuple[dict[str, Any], Any, str], ...] = (
            (blend, BlendSettings, "blend"),
            (parts["gates"], GateSettings, "gates"),
        )
        for values, kind, name in kinds:
            names = [each.name for each in fields(kind)]
            refuse_unknown(values, names, source=f"{source}, {name},")
        try:
            return cls(
                training=KDConfig.from_json(
                    params, source=f"{source}, training_params,", overriding=training
                ),
                blend=BlendSettings(**blend),
                gates=GateSettings(**parts["gates"]),
                **{
                    **_teachers(manifest.get("teachers") or [], source),
                    "laws": tuple(laws_of(manifest.get("laws") or [], f"{source}: laws")),
                    **own,
                    **(overriding or {}),
                },
            )
        except TypeError as error:
            raise ConchError(f"{source}: a value is not of its kind: {error}") from error

    def to_manifest(self) -> dict[str, Any]:
        """The parts of a manifest that `from_manifest` reads, but for the teachers."""
        values = self.to_json()
        training = {n: v for n, v in values["training"].items() if n not in UNUSED}
        return {
            "training_params": {**training, **{name: values[name] for name in LOSS_PARTS}},
            "stabilizers": {name: values[name] for name in STABILIZERS},
            "evaluation": {name: values[name] for name in EVALUATION},
            "gates": values["gates"],
            "laws": [law.to_json() for law in self.laws],
        }

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return asdict(self)


def requested(
    manifest: dict[str, Any], source: str, *, line: str | None, data: str | None
) -> dict[str, str]:
    """Which line is to evolve and from which data, as given or as a manifest says.

    Args:
        manifest: See `EvolveConfig.from_manifest`; its `evolution_request` is read.
        source: Where it comes from, for the message.
        line: Wins over the manifest's.
        data: Likewise.

    Returns:
        `line` and `data`.

    Raises:
        ConchError: One of them is said by neither.
    """
    said = _mapping(manifest, "evolution_request", source)
    found = {"line": line or said.get("line"), "data": data or said.get("data")}
    if missing := [name for name, value in found.items() if not value]:
        raise ConchError(
            f"{source} gives no {' and no '.join(missing)}: name the line, and give --data, or "
            "both in a manifest's evolution_request"
        )
    return {name: str(value) for name, value in found.items()}


def _mapping(manifest: dict[str, Any], name: str, source: str) -> dict[str, Any]:
    values = manifest.get(name) or {}
    if not isinstance(values, dict):
        raise ConchError(f"{source}: {name} is {values!r}, not a mapping of names to values")
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def _teachers(listed: Any, source: str) -> dict[str, Any]:
    """Models in the teachers' places; a generation's name asks for what is there anyway."""
    found: dict[str, Any] = {}
    roles = {"parent": "first_teacher", "grandparent": "second_teacher"}
    for each in listed if isinstance(listed, list) else [listed]:
        if not (isinstance(each, dict) and each.get("role") in roles and each.get("path")):
            raise ConchError(
                f"{source}: teacher {each!r} is not a mapping with a role, parent or grandparent, "
                "and a path"
            )
        if not GENERATION_NAME.fullmatch(str(each["path"])):
            found[roles[each["role"]]] = str(each["path"])
    return found
