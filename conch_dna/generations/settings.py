"""Everything that shapes one generation except the line and the data.

Knows names, defaults, ranges and help; nothing of how they are used. A default stands here or in
`KDConfig`, and nowhere else. To add a setting: a field with its help and range; the command line
takes it from here.
"""

import re
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from typing import Any

from conch_dna.errors import ConchError
from conch_dna.generations.laws import Law, laws_of
from conch_dna.options.fields import (
    changed,
    default_of,
    option,
    option_problems,
    refuse_unknown,
)
from conch_dna.training.settings import KDConfig

GENERATION_NAME = re.compile(r"HEAD|G\d{3,}")
CONFIDENCES = ("top1", "entropy")
"""Measures of how sure a teacher is; `blending.confidence` has a branch for each."""
PAIRED = ("recall", "generalize")
"""Gates that compare one score for each item, so that their difference has an interval."""
# Settings of a distillation for which a generation has no use, or which are its line's.
UNUSED = (
    "alpha",
    "alignment",
    "soft_weight",
    "chunk_weight",
    "chunk_scale",
    "samples_per_prompt",
    "generation_batch_size",
    "steps_per_report",
    "output_dir",
    "adapter_subdir",
    "run",
    "trust_remote_code",
    "own_answers",
    "teacher_tokenizer",
    "shard_teacher",
    "resident",
    "on_policy",
    "targets",
    "target_draws",
)
TWO_TEACHERS, SDFT = "two_teachers", "sdft"
METHODS = (TWO_TEACHERS, SDFT)
# What means something to one of them only, of a distillation's settings and of a generation's.
OF_SDFT = (
    "rollouts",
    "rollout_tokens",
    "rollout_temperature",
    "rollout_reuse",
    "teacher_ema",
    "teacher_system",
    "student_system",
    "force",
    "select_by",
)
OF_TWO_TEACHERS = (
    "critic",
    "alpha",
    "beta",
    "gamma",
    "blend",
    "first_teacher",
    "second_teacher",
    "taboo_words",
    "taboo_ids",
)
LOSS_PARTS = ("method", "demonstrations", "alpha", "beta", "gamma", "blend")
STABILIZERS = ("ema_decay", "replay_share", "replay_size", "taboo_words", "taboo_ids")
EVALUATION = ("measured", "answers")
MAPPINGS = ("training_params", "stabilizers", "evaluation", "gates")
REQUEST = ("evolution_request", "teachers", *MAPPINGS, "laws")
# The last of them are only said of what became of it.
REQUESTED = ("line", "data", "records", "train", "heldout", "recall", "replay")
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
    "blas",
    "git_commit",
    "seed",
    "created",
)
TEACHER_PLACES = {"parent": "first_teacher", "grandparent": "second_teacher"}
"""The setting that puts a model into each teacher's place, by the teacher's role."""

_share = partial(option, low=0, high=1, between="between {low:g} and {high:g}")


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ConchError("; ".join(problems))


@dataclass(frozen=True, kw_only=True)
class BlendSettings:
    """How two teachers become one target.

    Attributes:
        first_share: The first teacher's share of every blend, between 0 and 1; None for one in
            proportion to confidence. The other fields say themselves what they are.

    Raises:
        ConchError: A value is out of its range; all such values are named at once.
    """

    js_threshold: float = _share(0.1, "Disagreement below which both teachers teach a token.")
    confidence_threshold: float = _share(
        0.8, "Confidence above which the first teacher teaches alone where they disagree."
    )
    gold_weight: float = _share(0.5, "Weight of a token that only the text teaches.")
    method: str = option("top1", "Measure of confidence.", choices=CONFIDENCES)
    gated: bool = option(True, "Disagreement counts; without it every token is blended.")
    first_share: float | None = None

    def __post_init__(self) -> None:
        problems = option_problems(self)
        if self.first_share is not None and not 0 <= self.first_share <= 1:
            problems.append(f"first_share is {self.first_share:g}: it must be between 0 and 1")
        _refuse(problems)


@dataclass(frozen=True, kw_only=True)
class GateSettings:
    """What a child must reach.

    Attributes:
        by_lower_bound: Names of gates (of PAIRED) whose difference must reach its bound with the
            confidence asked for, not only as measured. The other fields say themselves what they
            are.

    Raises:
        ConchError: A value is out of its range; all such values are named at once.
    """

    recall_margin: float = option(0.05, "How much less than the parent it may recall, a share.")
    generalize_gain: float = option(
        0.02, "How much more than the parent it must get right of the new domain, a share."
    )
    max_tone_drift: float = option(
        0.05, "How much further than the parent's its words may lie from the reference."
    )
    max_law_violations: int = option(0, "Answers that may break a law.")
    confidence: float = option(
        0.95, "Confidence of the intervals of differences.", above=0, below=1
    )
    by_lower_bound: tuple[str, ...] = ()
    seed: int = option(0, "Seed of the resampling.", low=0)

    def __post_init__(self) -> None:
        problems = option_problems(self)
        if unknown := sorted(set(self.by_lower_bound) - set(PAIRED)):
            problems.append(
                f"by_lower_bound names {', '.join(unknown)}: only {', '.join(PAIRED)} are "
                "differences with an interval"
            )
        _refuse(problems)


@dataclass(frozen=True, kw_only=True)
class EvolveConfig:
    """Settings of one generation's training and judgement.

    Attributes:
        training: Temperature, LoRA, optimiser, batches, seed; its alpha and alignment are not
            used, and its output_dir is the line's.
        blend: How two teachers become one target.
        gates: What the child must reach.
        first_teacher: A model in the parent's place as a teacher; the child grows from the parent
            and is compared with it all the same. Empty for the parent.
        taboo_words: Words that nobody may teach, however a tokenizer cuts them.
        taboo_ids: Tokens that nobody may teach.
        laws: What answers must keep to.

    Raises:
        ConchError: A value is out of its range; all such values are named at once.
    """

    training: KDConfig = field(default_factory=KDConfig)
    method: str = option(
        TWO_TEACHERS,
        "Who teaches: parent and grandparent, or with sdft the parent that reads demonstrations, "
        "on the child's own answers, at temperature 1 unless told otherwise.",
        choices=METHODS,
    )
    demonstrations: str = option(
        "",
        "With sdft: a file of records that the parent reads before every prompt, or answer for "
        "each record's own.",
    )
    alpha: float = option(0.5, "Share of cross-entropy in the loss.", low=0)
    beta: float = option(0.5, "Share of the teachers' target.", low=0)
    gamma: float = option(
        0.0, "Share of the pull to the first teacher where both agree, (1 - JS) KL(p₁‖q).", low=0
    )
    blend: BlendSettings = field(default_factory=BlendSettings)
    gates: GateSettings = field(default_factory=GateSettings)
    ema_decay: float = option(
        0.999, "Decay of the averaged adapter; 0 keeps the parameters themselves.", low=0, below=1
    )
    replay_share: float = option(
        0.1, "Share of earlier data in an epoch; 0 for none.", low=0, below=1
    )
    replay_size: int = option(1000, "Most records of earlier data to draw from.", low=1)
    measured: int = option(
        200, "Most held-out records of earlier data to measure recall on.", low=1
    )
    answers: int = option(64, "Prompts that child and parent answer, for tone and laws.", low=1)
    critic: bool = option(True, "A second teacher teaches too.")
    first_teacher: str = option(
        "", "Hub id or folder of a model that teaches in the parent's place, with any tokenizer."
    )
    second_teacher: str = option(
        "", "Hub id or folder of a model that teaches in the grandparent's place."
    )
    taboo_words: tuple[str, ...] = ()
    taboo_ids: tuple[int, ...] = ()
    laws: tuple[Law, ...] = ()

    def __post_init__(self) -> None:
        problems = option_problems(self)
        if not problems and self.alpha + self.beta + self.gamma == 0:
            problems.append("alpha, beta and gamma are all 0: nothing would be learned")
        if not problems:
            problems = self._of_another_method()
        _refuse(problems)

    def _of_another_method(self) -> list[str]:
        """Settings that would be silently without effect."""
        if self.method != SDFT:
            set_ = changed(self.training, ("on_policy", *OF_SDFT))
            set_ += changed(self, ("demonstrations",))
            return [_of_other(name, self.method) for name in set_]
        set_ = changed(self, OF_TWO_TEACHERS)
        problems = [_of_other(name, self.method) for name in set_]
        try:
            _ = self.distillation
        except ConchError as error:
            problems.append(str(error))
        if self.training.teacher_ema < 1 and self.replay_share:
            problems.append(
                f"teacher_ema is {self.training.teacher_ema:g} and replay_share "
                f"{self.replay_share:g}: a teacher that follows the child scores its own answers "
                "only; use replay_share 0"
            )
        return problems

    @property
    def distillation(self) -> KDConfig:
        """The settings of a child that teaches itself: all but what is replayed is its own."""
        share = round(1.0 - self.replay_share, 9)
        return replace(self.training, alpha=1.0, on_policy=share)

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
        if unknown := sorted(set(manifest) - set(REQUEST) - set(RECORDED)):
            raise ConchError(
                f"{source} names unknown parts: {', '.join(unknown)}; known are "
                f"{', '.join(REQUEST)}"
            )
        params, stabilizers, evaluation, gates = (_mapping(manifest, n, source) for n in MAPPINGS)
        loss = {name: params.pop(name) for name in LOSS_PARTS if name in params}
        blend = _mapping(loss, "blend", source)
        usable = {option.name for option in fields(KDConfig)} - set(UNUSED)
        known: dict[str, tuple[dict[str, Any], Any]] = {
            "training_params": (params, {*usable, *LOSS_PARTS, "iters"}),
            "stabilizers": (stabilizers, STABILIZERS),
            "evaluation": (evaluation, EVALUATION),
            "blend": (blend, [each.name for each in fields(BlendSettings)]),
            "gates": (gates, [each.name for each in fields(GateSettings)]),
        }
        for name, (values, names) in known.items():
            refuse_unknown(values, names, source=f"{source}, {name},")
        chosen = {**loss, **stabilizers, **(overriding or {})}
        given = {**params, **(training or {})}
        method = chosen.get("method", TWO_TEACHERS)
        if method == SDFT:
            params = {"temperature": 1.0, **params}
            if given.get("teacher_ema", 1) != 1:
                params["on_policy"] = 1.0
                stabilizers = {"replay_share": 0.0, **stabilizers}
        else:
            # Some of them would be refused for another reason first.
            plain = {each.name: default_of(each) for each in fields(KDConfig)}
            others = [n for n in OF_SDFT if n != "select_by" and given.get(n, plain[n]) != plain[n]]
            _refuse([_of_other(name, method) for name in others])
        distillation = KDConfig.from_json(
            params, source=f"{source}, training_params,", overriding=training
        )
        own = {
            **_teachers(manifest.get("teachers") or [], source),
            "laws": tuple(laws_of(manifest.get("laws") or [], f"{source}: laws")),
            **loss,
            **stabilizers,
            **evaluation,
            **(overriding or {}),
        }
        try:
            blend_settings, gate_settings = BlendSettings(**blend), GateSettings(**_tuples(gates))
            own |= {"training": distillation, "blend": blend_settings, "gates": gate_settings}
            return cls(**_tuples(own))
        except TypeError as error:
            raise ConchError(f"{source}: a value is not of its kind: {error}") from error

    def to_manifest(self) -> dict[str, Any]:
        """The parts of a manifest that `from_manifest` reads, but for the teachers."""
        values = self.to_json()
        training = {n: v for n, v in values["training"].items() if n not in UNUSED}
        without = OF_TWO_TEACHERS if self.method == SDFT else (*OF_SDFT, "demonstrations")
        training |= {name: values[name] for name in LOSS_PARTS}
        return {
            "training_params": {n: v for n, v in training.items() if n not in without},
            "stabilizers": {n: values[n] for n in STABILIZERS if n not in without},
            "evaluation": {name: values[name] for name in EVALUATION},
            "gates": values["gates"],
            "laws": [law.to_json() for law in self.laws],
        }

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return asdict(self)


def _of_other(name: str, method: str) -> str:
    other = TWO_TEACHERS if method == SDFT else SDFT
    return f"{name} is of --method {other}, not of {method}"


def requested(
    manifest: dict[str, Any], source: str, *, line: str | None, data: str | None
) -> dict[str, str]:
    """Which line is to evolve and from which data, as given or as a manifest says.

    Args:
        manifest: By hand, or a generation's; its `evolution_request` is read.
        source: Where it comes from, for the message.
        line: The line's name, which wins over the manifest's.
        data: The file of new data, which wins over the manifest's.

    Returns:
        `line` and `data`.

    Raises:
        ConchError: One of them is said by neither.
    """
    request = _mapping(manifest, "evolution_request", source)
    refuse_unknown(request, REQUESTED, source=f"{source}, evolution_request,")
    names = {"line": line or request.get("line"), "data": data or request.get("data")}
    if missing := [name for name, value in names.items() if not value]:
        raise ConchError(
            f"{source} gives no {' and no '.join(missing)}: name the line, and give --data, or "
            "both in a manifest's evolution_request"
        )
    return {name: str(value) for name, value in names.items()}


def _mapping(manifest: dict[str, Any], name: str, source: str) -> dict[str, Any]:
    values = manifest.get(name) or {}
    if not isinstance(values, dict):
        raise ConchError(f"{source}: {name} is {values!r}, not a mapping of names to values")
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    """Values as settings hold them, which have tuples where JSON and YAML have lists."""
    return {n: tuple(value) if isinstance(value, list) else value for n, value in values.items()}


def _teachers(listed: Any, source: str) -> dict[str, Any]:
    """Models in the teachers' places; a generation's name asks for what is there anyway."""
    places: dict[str, Any] = {}
    for each in listed if isinstance(listed, list) else [listed]:
        if not (isinstance(each, dict) and each.get("role") in TEACHER_PLACES and each.get("path")):
            raise ConchError(
                f"{source}: teacher {each!r} is not a mapping with a role, parent or grandparent, "
                "and a path"
            )
        if not GENERATION_NAME.fullmatch(str(each["path"])):
            places[TEACHER_PLACES[each["role"]]] = str(each["path"])
    return places
