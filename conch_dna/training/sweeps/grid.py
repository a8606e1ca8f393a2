"""Which runs a sweep has: settings with several values each, and every combination of them.

Knows names and values of settings and where runs lie; no model. To let another field be swept: take
it out of FIXED, if runs that differ in it are measured on the same examples by the same figure.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice, product
from math import prod
from pathlib import Path
from typing import Any

from conch_dna.errors import ConchError
from conch_dna.options.fields import kind_of
from conch_dna.training.settings import KDConfig

SHARED = "shared"
_OTHER_DATA = "runs that differ in it are measured on other examples"
_OTHER_FIGURE = "runs that differ in it are measured by other figures"
_NOTHING = "runs that differ in it train equal adapters"
FIXED = {
    "steps_per_report": _NOTHING,
    "steps_per_save": _NOTHING,
    "resident": _NOTHING,
    "loss_memory": "runs that differ in it differ by rounding alone",
    "top_k": _OTHER_FIGURE,
    "target_bits": _OTHER_FIGURE,
    "targets": _OTHER_DATA,
    "target_draws": _OTHER_DATA,
    "alignment": _OTHER_FIGURE,
    "seed": _OTHER_DATA,
    "val_fraction": _OTHER_DATA,
    "max_seq_length": _OTHER_DATA,
    "too_long": _OTHER_DATA,
    "max_tokens": _OTHER_DATA,
    "samples_per_prompt": _OTHER_DATA,
    "sampling_temperature": _OTHER_DATA,
    "generation_batch_size": _OTHER_DATA,
}
"""Numbers and choices that have one value in a sweep, each with the reason."""
SWEEPABLE = tuple(
    each.name
    for each in fields(KDConfig)
    if each.name not in FIXED
    and (kind_of(each) in ("float", "int") or each.metadata["choices"] is not None)
)


_OF_LORA = ("lora_rank", "lora_scale", "lora_dropout", "lora_layers")
_OF_OWN = ("rollouts", "rollout_tokens", "rollout_temperature", "rollout_reuse")
_OF_KD = ("temperature", "divergence", "soft_weight", "chunk_weight", "chunk_scale")


@dataclass(frozen=True, kw_only=True)
class GridRun:
    """One run of a sweep.

    Attributes:
        name: Of its folder, made of the values that it does not share with all others.
        settings: Those values, by field, without those that change nothing in this run.
        config: All of its settings.
    """

    name: str
    settings: dict[str, Any]
    config: KDConfig


def settings_text(settings: Mapping[str, Any]) -> str:
    """Values of settings as people read them.

    >>> settings_text({"temperature": 2.0, "lora_rank": 8})
    'temperature 2, lora-rank 8'
    """
    return ", ".join(f"{name.replace('_', '-')} {value_text(v)}" for name, v in settings.items())


def sweep_folder(domain: str, config: KDConfig) -> Path:
    """The folder that holds everything of a domain's sweep.

    >>> sweep_folder("stories", KDConfig(output_dir="models")).as_posix()
    'models/stories-sweep'
    """
    return Path(config.output_dir) / f"{domain}-sweep"


def run_of(settings: Mapping[str, Any], base: KDConfig, folder: Path) -> GridRun:
    """The run with these settings in a sweep's folder; each run has an output folder of its own."""
    name = "_".join(f"{each}-{value_text(value)}" for each, value in settings.items())
    config = replace(base, **settings, output_dir=str(folder / name))
    return GridRun(name=name, settings=dict(settings), config=config)


def idle_settings(config: KDConfig) -> dict[str, str]:
    """The fields that change nothing in a run of these settings, each with what makes it so.

    >>> idle_settings(KDConfig(chunk_weight=0.0, on_policy=0.5))
    {'chunk_scale': 'chunk-weight 0'}
    """
    idle = {} if config.chunk_weight else {"chunk_scale": "chunk-weight 0"}
    # The KD loss may still choose the step that is kept.
    if not config.alpha and config.select_by != "kd":
        idle |= dict.fromkeys(_OF_KD, "alpha 0")
    if not config.on_policy:
        idle |= dict.fromkeys(_OF_OWN, "on-policy 0")
    return idle | (dict.fromkeys(_OF_LORA, "--full") if config.full else {})


def grid_runs(
    domain: str, values: Mapping[str, Any], *, most: int
) -> tuple[KDConfig, list[GridRun]]:
    """Settings for what all runs share, and every combination of values, the last changing fastest.

    Args:
        domain: Names the sweep's folder.
        values: Fields of KDConfig to a value, or to a list or tuple of them.
        most: How many runs there may be.

    Returns:
        The first run's settings with the folder of the shared caches as their output folder, and
        the runs; combinations that differ only in what changes nothing are one run.

    Raises:
        ConchError: Nothing is swept, the runs are given a name, a field cannot be swept or changes
            nothing in any run, a value stands twice or is out of its range, or there are more
            runs than that.
    """
    if values.get("run"):
        raise ConchError("a sweep names its runs itself: leave --run, or choose an --output-dir")
    many = {name: tuple(v) for name, v in values.items() if isinstance(v, list | tuple)}
    swept = {each.name: many[each.name] for each in fields(KDConfig) if each.name in many}
    single = {name: v for name, v in values.items() if name not in swept}
    if problems := [problem for name, v in swept.items() if (problem := _problem(name, v))]:
        raise ConchError("; ".join(problems))
    single |= {name: v[0] for name, v in swept.items() if len(v) == 1}
    swept = {name: v for name, v in swept.items() if len(v) > 1}
    if not swept:
        raise ConchError(
            "nothing is swept: give some option several values, such as --temperature 1,2,4"
        )
    base = KDConfig(**single)
    if base.targets == "sampled" and "temperature" in swept:
        raise ConchError(
            "targets is sampled and several temperatures are swept, at each of which other tokens "
            "would be drawn: give one temperature, or use topk"
        )
    folder = sweep_folder(domain, base)
    count = prod(len(v) for v in swept.values())
    # Only as many as it takes to know how many are left.
    combinations = (
        dict(zip(swept, v, strict=True)) for v in islice(product(*swept.values()), 100 * most)
    )
    by_name = {run.name: run for run in (_effective(each, base, folder) for each in combinations)}
    if (count := len(by_name) if count <= 100 * most else count) > most:
        raise ConchError(
            f"the values make {count} runs, more than --max-runs {most}: give fewer values, or a "
            "higher --max-runs"
        )
    used = {name for run in by_name.values() for name in run.settings}
    if without := [name for name in swept if name not in used]:
        why = idle_settings(replace(base, **{name: v[0] for name, v in swept.items()}))
        raise ConchError(
            f"{without[0].replace('_', '-')} changes nothing with {why[without[0]]}: its runs "
            "would be equal; give it one value"
        )
    runs = list(by_name.values())
    return replace(runs[0].config, output_dir=str(folder / SHARED)), runs


def _effective(settings: Mapping[str, Any], base: KDConfig, folder: Path) -> GridRun:
    """The run of a combination of values, named by those that change something in it."""
    if "select_by" in settings:
        settings = {**settings, "select_by": replace(base, **settings).selected}
    idle = idle_settings(replace(base, **settings))
    return run_of({name: v for name, v in settings.items() if name not in idle}, base, folder)


def _problem(name: str, values: Sequence[Any]) -> str | None:
    if not values:
        return f"{name} has no value: give one, or several with commas"
    if len(values) > 1 and name not in SWEEPABLE:
        why = FIXED.get(name, "only numbers and choices can be swept")
        return f"{name} has {len(values)} values, and {why}: give one"
    if twice := sorted({value_text(value) for value in values if values.count(value) > 1}):
        return f"{name} has {', '.join(twice)} twice: leave one of each"
    return None


def value_text(value: Any) -> str:
    """A value as short as it can be without becoming another.

    >>> value_text(1e-4), value_text(0.1234567), value_text("jsd")
    ('0.0001', '0.1234567', 'jsd')
    """
    short = f"{value:g}" if isinstance(value, float) else str(value)
    return short if not isinstance(value, float) or float(short) == value else repr(value)
