"""A settings file of `mlx_lm.lora` as settings of a run: what each of its names means here.

Knows mlx-lm's names and defaults; nothing of files or models. To take another name: an entry in
SAME, or in one of the tables below, or a branch in `understood`.
"""

from collections.abc import Mapping
from typing import Any

from conch_dna.errors import ConchError
from conch_dna.options.fields import refuse_unknown

# Names that mean the same.
SAME = {
    "model": "student",
    "iters": "num_iters",
    "num_layers": "lora_layers",
    "save_every": "steps_per_save",
    "lr": "learning_rate",
}
# Features of a record, as `--map` has them.
FEATURES = {
    "prompt_feature": "prompt",
    "completion_feature": "completion",
    "chat_feature": "messages",
    "text_feature": "text",
}
# What mlx-lm does with them is done here by itself, or elsewhere.
IGNORED = {
    "adapter_path": "an adapter lies in OUTPUT_DIR/DOMAIN/adapters_kd; see output_dir",
    "test_batches": "the whole test set is measured",
    "clear_cache_threshold": "MLX's cache is left to itself",
    "config": "one settings file is read",
}
REFUSED = {
    "hf_dataset": "give data: OWNER/NAME, data_split and map instead",
    "resume_adapter_file": "every run begins from the pristine student; fuse that adapter into it "
    "with mlx_lm.fuse, or let a line of generations go on from it",
}
# Defaults that are others here, in words.
UNLIKE = {
    "iters": "200 steps (1000)",
    "learning_rate": "1e-4 (1e-5)",
    "lr_schedule": "warm-up and a cosine to 0 (constant, as by schedule: constant)",
    "mask_prompt": "prompts do not count (they do)",
    "num_layers": "all (the last 16)",
}
LORA = {"rank": "lora_rank", "scale": "lora_scale", "dropout": "lora_dropout", "keys": "lora_keys"}
_OTHER = (
    "fine_tune_type",
    "grad_accumulation_steps",
    "lora_parameters",
    "lr_schedule",
    "mask_prompt",
    "optimizer",
    "optimizer_config",
    "train",
)
NAMES = frozenset({*SAME, *FEATURES, *IGNORED, *REFUSED, *_OTHER})


def understood(values: Mapping[str, Any], *, source: str) -> tuple[dict[str, Any], list[str]]:
    """Settings with mlx-lm's names and own ones, all by their own names.

    Args:
        values: As a file has them, underscores for dashes.
        source: The file, for messages.

    Returns:
        The settings, and what a user should know of what became of the others, a sentence each.

    Raises:
        ConchError: A name stands for what there is not, or is given twice under two names.
    """
    given = dict(values)
    notes: list[str] = []
    if "model" in values and (missing := _unlike(values)):
        unlike = "; ".join(f"{name}: {UNLIKE[name]}" for name in missing)
        notes.append(f"{source} leaves out what is not as in mlx-lm by default: {unlike}")
    found: dict[str, Any] = {}

    def take(name: str, value: Any, said: str) -> None:
        if name in found or name in given:
            raise ConchError(f"{source} gives {name} twice, once as {said}: leave one")
        found[name] = value

    for name, why in REFUSED.items():
        if given.pop(name, None):
            raise ConchError(f"{source}: {name} is not understood: {why}")
    for name, why in IGNORED.items():
        if given.pop(name, None) not in (None, -1, 0):
            notes.append(f"{source}: {name} is ignored: {why}")
    if given.pop("train", None) is False:
        raise ConchError(
            f"{source}: train is false, but distill trains; an adapter is measured by "
            "python -m conch_dna.training.benchmark"
        )
    _lora(given, take, notes, source)
    _optimiser(given, take, notes, source)
    for name, own in SAME.items():
        if name in given:
            take(own, given.pop(name), name)
    mapping = {key: given.pop(name) for name, key in FEATURES.items() if given.get(name)}
    if mapping:
        take("map", mapping, "features of records")
    if (masked := given.pop("mask_prompt", None)) is not None:
        if not isinstance(masked, bool):
            raise ConchError(f"{source}: mask_prompt is {masked!r}: use true or false")
        take("train_on_prompt", not masked, "mask_prompt")
    return {**given, **found}, notes


def _unlike(values: Mapping[str, Any]) -> list[str]:
    """What mlx-lm has another default for, of what a file leaves out."""
    own = {"lr_schedule": "schedule"}
    named = {name for name in UNLIKE if {name, SAME.get(name), own.get(name)} & values.keys()}
    return [name for name in UNLIKE if name not in named]


def _lora(given: dict[str, Any], take: Any, notes: list[str], source: str) -> None:
    kind = given.pop("fine_tune_type", None) or "lora"
    if kind not in ("lora", "dora", "full"):
        raise ConchError(f"{source}: fine_tune_type is {kind!r}: use lora, dora or full")
    if kind != "lora":
        take(kind, True, f"fine_tune_type: {kind}")
    parameters = given.pop("lora_parameters", None)
    if kind == "full":
        layers = given.pop("num_layers", None)
        if layers not in (None, -1):
            notes.append(f"{source}: num_layers is ignored: in full, every weight is trained")
    elif isinstance(parameters, Mapping):
        refuse_unknown(parameters, [*LORA, "alpha"], source=f"{source}, lora_parameters,")
        if "alpha" in parameters:
            notes.append(f"{source}: alpha of lora_parameters is ignored, as by mlx-lm: see scale")
        for name, own in LORA.items():
            if (value := parameters.get(name)) is not None:
                value = ",".join(map(str, value)) if isinstance(value, list) else value
                take(own, value, f"lora_parameters {name}")
        if parameters.get("keys") is None and "lora_keys" not in given:
            notes.append(
                f"{source}: no keys in lora_parameters: mlx-lm takes all linear layers and the "
                "embedding, here lora_keys is attention (all with lora_keys: all)"
            )
    elif parameters is not None:
        raise ConchError(f"{source}: lora_parameters is {parameters!r}: give rank, scale, dropout")


def _optimiser(given: dict[str, Any], take: Any, notes: list[str], source: str) -> None:
    """The optimiser, its schedule, and what it accumulates."""
    name = given.pop("optimizer", None)
    settings = given.pop("optimizer_config", None) or {}
    each = settings.values() if isinstance(settings, Mapping) else [settings]
    if wrong := [one for one in each if one is not None and not isinstance(one, Mapping)]:
        raise ConchError(
            f"{source}: optimizer_config has {wrong[0]!r}: give a mapping for each optimiser, such "
            "as adamw: {weight_decay: 0.01}"
        )
    if name not in (None, "adam", "adamw"):
        raise ConchError(f"{source}: optimizer is {name!r}: there is adamw, and adam without decay")
    own = dict(settings.get(name or "adam") or {})
    decay = own.pop("weight_decay", 0.0 if name == "adam" else None)
    if own:
        shown = ", ".join(map(str, own))
        raise ConchError(
            f"{source}: optimizer_config gives {shown}, which cannot be set: leave it out"
        )
    if decay is not None and (name == "adamw" or "weight_decay" not in given):
        take("weight_decay", decay, f"optimizer: {name}")
    schedule = given.pop("lr_schedule", None)
    if schedule is not None:
        _schedule(schedule, take, notes, source, given)
    every = given.pop("grad_accumulation_steps", None)
    if every is not None:
        take("accumulation_steps", every, "grad_accumulation_steps")
        iters = given.get("iters")
        if isinstance(every, int) and isinstance(iters, int) and every > 1:
            if iters % every:
                raise ConchError(
                    f"{source}: {iters} iters are batches to mlx-lm, of which {every} make a step: "
                    "give a multiple, or accumulation_steps and num_iters"
                )
            given["iters"] = iters // every
            notes.append(
                f"{source}: {iters} iters are batches to mlx-lm, so {iters // every} steps of "
                f"{every}; steps_per_report, steps_per_eval and save_every count steps here"
            )


def _schedule(
    schedule: Any, take: Any, notes: list[str], source: str, given: dict[str, Any]
) -> None:
    if not isinstance(schedule, Mapping) or schedule.get("name") != "cosine_decay":
        raise ConchError(
            f"{source}: lr_schedule is {schedule!r}: there is a linear warm-up and then a "
            "cosine to 0 or none; give learning_rate, warmup_iters and schedule instead"
        )
    arguments = schedule.get("arguments")
    if not isinstance(arguments, list) or not arguments:
        raise ConchError(f"{source}: arguments of lr_schedule is no list that begins with a rate")
    given.pop("learning_rate", None)
    take("learning_rate", arguments[0], "lr_schedule")
    take("warmup_iters", schedule.get("warmup", 0), "lr_schedule")
    notes.append(
        f"{source}: lr_schedule is a warm-up from 0 and a cosine that ends with 0 at the last step"
    )
