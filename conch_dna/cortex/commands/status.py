"""What there is of each neuron, told from its files alone: no model is looked for.

Knows folders, calibrations and what was recorded; changes nothing. To show another figure: a key
in `neuron_rows` and its column in `status_table`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conch_dna.cortex.answer import Answer
from conch_dna.cortex.calibration.confidence import Calibration, load_calibration
from conch_dna.cortex.calibration.drift import KINDS, RECENT, Drift
from conch_dna.cortex.calibration.drift_file import read_drift, remedy
from conch_dna.cortex.engine.adapter_modules import adapter_digest
from conch_dna.errors import ConchError
from conch_dna.retraining.domain import active_adapter, known_domains
from conch_dna.retraining.pipeline import RetrainAdvice, TrainingPipeline
from conch_dna.screen.presentation import text_table
from conch_dna.training.structured_answers import DOMAIN_SCHEMAS

if TYPE_CHECKING:
    from rich.table import Table

# What drifts, in a table.
WATCHED = {"hand_over": "hand-overs", "mask": "mask"}


def neuron_rows(pipeline: TrainingPipeline) -> tuple[list[dict[str, Any]], list[str]]:
    """Every neuron of a folder of adapters, and of experience without one.

    Args:
        pipeline: Knows the folder.

    Returns:
        For each domain what it is, as JSON can hold; and what is to be known besides.

    Raises:
        ConchError: There is nothing in the folder.
    """
    folder = pipeline.adapters_dir
    known = known_domains(folder)
    domains = sorted({*known, *pipeline.buffer.domains})
    if not domains:
        raise ConchError(
            f"{folder} holds no adapter: make one with 'conch-dna distill --domain thinking', or "
            "name another folder of adapters"
        )
    notes: list[str] = []
    rows = []
    for domain in domains:
        if domain in known:
            rows.append(_row(pipeline, domain, notes))
        else:
            notes.append(f"there is experience of {domain} and no adapter")
        _, problems = pipeline.buffer.read(domain)
        notes += problems
    return rows, notes


def _row(pipeline: TrainingPipeline, domain: str, notes: list[str]) -> dict[str, Any]:
    path = active_adapter(pipeline.adapters_dir, domain)
    digest = adapter_digest(path)
    calibration = load_calibration(pipeline.adapters_dir, domain, digest, report=notes.append)
    line = pipeline.line(domain)
    advice: RetrainAdvice = pipeline.should_retrain(domain)
    return {
        "domain": domain,
        "version": line.head if line.exists else None,
        "versions": line.generations() if line.exists else [],
        "refused_versions": line.failed() if line.exists else [],
        "adapter": str(path),
        "digest": digest,
        "structured": domain in DOMAIN_SCHEMAS,
        "calibration": calibration.to_json() if calibration else None,
        "drift": _drift(pipeline.adapters_dir, domain, calibration, notes),
        "experience": advice.counts,
        "retrain": advice.retrain,
        "advice": advice.reason,
    }


def _drift(
    folder: Path, domain: str, calibration: Calibration | None, notes: list[str]
) -> dict[str, Any] | None:
    """What servers have counted since the calibration; None where nothing can be compared."""
    if calibration is None:
        return None
    if calibration.expected is None:
        notes.append(
            f"{domain}'s calibration does not say what to expect of live answers, so that no drift "
            "is seen: calibrate again"
        )
        return None
    try:
        drift = read_drift(folder / domain, calibration)
    except ConchError as error:
        notes.append(f"what was counted of {domain}'s drift is left out: {error}")
        return None
    findings = (drift or Drift(calibration.expected, "")).findings
    for each in findings:
        if each.drifted:
            notes.append(f"{domain} drifts since {each.drifted}: {each}; {remedy(domain)}")
    counted: dict[str, Any] = {each.kind: each.to_json() for each in findings}
    return {"since": drift.since if drift else None, **counted}


def status_table(folder: Path, rows: Sequence[dict[str, Any]]) -> "Table":
    """The rows of `neuron_rows` for people."""
    from rich.table import Column, Table
    from rich.text import Text

    # Folded, since a folder that ends in an ellipsis is of no use.
    table = Table(
        Column("neuron", overflow="fold"),
        Column("version and adapter", overflow="fold", min_width=18),
        *("answers", "calibrated", "new", "retrain?"),
        title=Text(f"neurons in {folder}"),
    )
    for row in rows:
        path, counts = Path(row["adapter"]), row["experience"]
        shown = path.relative_to(folder) if path.is_relative_to(folder) else path
        table.add_row(
            row["domain"],
            Text(f"{row['version'] or 'distilled'}\n{shown}"),
            "JSON" if row["structured"] else "text",
            _calibrated(row["calibration"]),
            str(counts["new"]),
            f"{'yes' if row['retrain'] else 'no'}: {row['advice']}",
        )
    return table


def _calibrated(calibration: dict[str, Any] | None) -> str:
    if calibration is None:
        return "no"
    threshold = calibration["threshold"]
    sure = "EGO answers all" if threshold is None else f"from {threshold:.3f}"
    return f"{calibration['method']}, {sure}"


def drift_table(rows: Sequence[dict[str, Any]]) -> "Table | None":
    """Live answers against calibration, by `neuron_rows`; None where none is watched."""
    cells = [
        (
            row["domain"],
            WATCHED[kind],
            *(
                # Three digits, so that a column of a narrow terminal has room for them.
                "-" if share is None else f"{100 * share:.3g}%"
                for share in (each["expected"]["mean"], each["live"], each["recent"])
            ),
            str(each["answers"]),
            (row["drift"]["since"] or "-")[:10],
            each["drifted"][:10] or "no",
        )
        for row in rows
        for kind in KINDS
        if (each := (row["drift"] or {}).get(kind))
    ]
    if not cells:
        return None
    shares = ("calibration", "live", f"last {RECENT}")
    columns = ("neuron", "watched", *shares, "answers", "since", "drift")
    title = "live answers against calibration"
    return text_table(title, columns, cells, numbers=("watched", "since", "drift"))


def calibration_table(calibrations: dict[str, Calibration]) -> "Table":
    """How sure neurons are, against how often they agree with EGO.

    Args:
        calibrations: Of each domain.
    """
    headings = ("neuron", "method", "fitted", "held out", "ECE before", "ECE after")
    figures = ("answers itself from", "coverage", "risk")
    rows = [
        (
            domain,
            each.method,
            each.n_fit,
            each.n_held,
            f"{each.ece_before:.3f}",
            f"{each.ece_after:.3f}",
            "never" if each.threshold is None else f"{each.threshold:.3f}",
            f"{each.coverage:.0%}",
            "-" if each.risk is None else f"{each.risk:.3f}",
        )
        for domain, each in calibrations.items()
    ]
    return text_table("calibration on held-out answers", (*headings, *figures), rows)


def who_answered(answer: Answer) -> str:
    """One line for people: who answered, why, and at what cost."""
    who = "EGO" if answer.answered_by == "ego" else answer.domain
    parts = [f"{who}: {answer.reason}"]
    if answer.answered_by == "neuron" and not answer.calibrated and answer.confidence is not None:
        parts.append(f"confidence {answer.confidence:.3f}, not calibrated")
    if answer.acceptance is not None:
        parts.append(f"{answer.draft} drafted, {answer.acceptance:.1f} tokens a step")
    if answer.repaired:
        parts.append("asked a second time for a valid answer")
    if answer.valid is False:
        parts.append(f"not valid: {'; '.join(answer.problems)}")
    if answer.finish_reason == "length":
        parts.append("cut off, since --max-tokens or the context was reached")
    parts.append(f"{answer.completion_tokens} tokens in {answer.seconds:.1f} s")
    return " · ".join(parts)
