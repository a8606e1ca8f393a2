"""Runs side by side: the settings that differ beside the figures that differ.

Knows the rows of `listing.describe_run`; opens nothing. To compare another figure: a line in
FIGURES.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from conch_dna.errors import ConchError
from conch_dna.screen.presentation import text_table
from conch_dna.training.runs.listing import figure
from conch_dna.training.runs.run_file import NOT_IDENTITY

if TYPE_CHECKING:
    from rich.table import Table

Row = dict[str, Any]


def _held_out(moment: str, name: str) -> Callable[[Row], Any]:
    return lambda row: figure(row, moment, name)


def _verdict(name: str) -> Callable[[Row], Any]:
    return lambda row: row["result"]["evaluation"]["verdict"].get(name)


def _metadata(name: str) -> Callable[[Row], Any]:
    return lambda row: row["result"]["metadata"].get(name)


def _own_answers(name: str) -> Callable[[Row], Any]:
    def after(row: Row) -> Any:
        own = row["result"]["evaluation"].get("own_answers", {})
        return own.get(name, {}).get("after")

    return after


FIGURES: dict[str, Callable[[Row], Any]] = {
    "verdict": _verdict("verdict"),
    "judged by": _verdict("figure"),
    "difference": _verdict("difference"),
    "interval": _verdict("interval"),
    "KL before": _held_out("before", "kl_nats"),
    "KL after": _held_out("after", "kl_nats"),
    "chunk KL after": _held_out("after", "chunk_kl_nats"),
    "cross-entropy before": _held_out("before", "cross_entropy"),
    "cross-entropy after": _held_out("after", "cross_entropy"),
    "bits per byte after": _held_out("after", "bits_per_byte"),
    "top-1 agreement before": _held_out("before", "top1_agreement"),
    "top-1 agreement after": _held_out("after", "top1_agreement"),
    "KL on its own answers after": _own_answers("kl_nats"),
    "repetition in them after": _own_answers("repetition"),
    "valid of them after": _own_answers("valid"),
    "held-out tokens": _held_out("after", "tokens"),
    "kept step": _metadata("best_step"),
    "training seconds": lambda row: row["result"]["training_time_seconds"],
}


def compare_runs(rows: Sequence[Row]) -> dict[str, Any]:
    """What differs between finished runs.

    Args:
        rows: Of `describe_run`, two or more.

    Returns:
        `runs`, their paths; `settings` and `figures`, by name the values in the order of the runs,
        where they differ; `warnings`, why figures do not mean the same. Where the runs were judged
        by different figures, the names of their differences and intervals say so, and the change
        of KL of each stands beside them.

    Raises:
        ConchError: There are fewer than two, or one is not finished.
    """
    if len(rows) < 2:
        raise ConchError("one run cannot be compared: give two or more folders")
    if wrong := [row for row in rows if not row["result"]]:
        told = [f"{row['path']} is {row['state']}{_because(row)}" for row in wrong]
        raise ConchError(f"only finished runs can be compared: {'; '.join(told)}")
    settings = [_settings(row) for row in rows]
    names = dict.fromkeys(name for each in settings for name in each)
    values = {name: [each.get(name) for each in settings] for name in names}
    figures = {name: [take(row) for row in rows] for name, take in FIGURES.items()}
    if _differ(figures["judged by"]):
        own = {name: f"{name}, of what judged it" for name in ("difference", "interval")}
        figures = {own.get(name, name): each for name, each in figures.items()}
        figures["KL difference"] = [_change(row, "kl_nats") for row in rows]
    return {
        "runs": [row["path"] for row in rows],
        "settings": {name: each for name, each in values.items() if _differ(each)},
        "figures": {name: each for name, each in figures.items() if _differ(each)},
        "warnings": _warnings(rows, values),
    }


def _change(row: Row, name: str) -> float | None:
    before, after = (figure(row, moment, name) for moment in ("before", "after"))
    return None if before is None or after is None else after - before


def _because(row: Row) -> str:
    return f" ({row['reason']})" if row["reason"] else ""


def _settings(row: Row) -> dict[str, Any]:
    metadata = row["result"]["metadata"]
    config = {k: v for k, v in metadata["config"].items() if k not in NOT_IDENTITY}
    data = {f"{part} examples": metadata.get(f"{part}_examples") for part in ("train", "heldout")}
    models = {"teacher": metadata["teacher"], "student": metadata["student"]}
    digests = {name: str(metadata.get(name))[:12] for name in ("data_digest", "heldout_digest")}
    return {"domain": row["domain"], **models, **digests, **data, **config}


def _differ(values: Sequence[Any]) -> bool:
    return any(value != values[0] for value in values)


def _warnings(rows: Sequence[Row], settings: dict[str, list[Any]]) -> list[str]:
    digests = [_metadata("heldout_digest")(row) for row in rows]
    teachers = [_metadata("teacher_digest")(row) for row in rows]
    warnings = []
    if _differ(judges := [_verdict("figure")(row) for row in rows]):
        warnings.append(
            f"the runs were judged by different figures ({', '.join(map(str, judges))}): their "
            "verdicts, differences and intervals cannot be compared; KL difference and "
            "cross-entropy can"
        )
    if None in digests:
        warnings.append(
            "what was held out is not recorded of every run: whether their figures are of the same "
            "text is not known"
        )
    elif _differ(digests):
        warnings.append(
            "what was held out differs: the figures are of different text and cannot be compared; "
            "each run's change (difference, interval) is of its own"
        )
    if _differ(teachers):
        warnings.append("the teachers differ: KL and agreement are to different models")
    elif _differ(settings.get("top_k", [])):
        warnings.append("top_k differs: KL is over different numbers of the teacher's tokens")
    if _differ(settings.get("alignment", [])):
        warnings.append("the alignments differ: KL may be over different tokens")
    if any(row["result"]["metadata"].get("resumed") for row in rows):
        warnings.append("a run was resumed: its seconds are those of its last process")
    return warnings


def comparison_tables(compared: dict[str, Any]) -> list["Table"]:
    """What `compare_runs` found, for people; the runs are numbered in its order.

    Args:
        compared: Its result.
    """
    # Names of folders would break inside of words, or leave the values no room.
    numbers = [f"run {number}" for number in range(1, len(compared["runs"]) + 1)]
    return [
        text_table(
            title,
            ("", *numbers),
            [(name, *map(_cell, values)) for name, values in compared[part].items()],
        )
        for part, title in (("settings", "settings that differ"), ("figures", "figures"))
        if compared[part]
    ]


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, list):
        return " to ".join(map(_cell, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
