"""An estimate for people: a table of parts and phases, whether it fits, what to do, how long.

Knows estimates and this machine; nothing of how they are made.
"""

from typing import TYPE_CHECKING

from conch_dna.language_model import ModelSource
from conch_dna.screen.presentation import bytes_text, pairs_table
from conch_dna.training.fit.memory_estimate import (
    FITS,
    Estimate,
    estimate_run,
    machine_memory,
    remedies,
)
from conch_dna.training.fit.workload import Workload
from conch_dna.training.settings import KDConfig

if TYPE_CHECKING:
    from rich.table import Table


def fit_table(
    name: str, teacher: ModelSource, student: ModelSource, config: KDConfig, work: Workload
) -> "Table":
    """Estimate a run on this machine, and show it.

    Args:
        name: The domain's.
        teacher: Its config.json is enough.
        student: The same.
        config: Of the run.
        work: See `Workload`.
    """
    estimate = estimate_run(teacher, student, config, work, time_it=True)
    memory, whose = machine_memory()
    rows = {part: bytes_text(count) for part, count in estimate.parts.items()}
    rows |= {f"peak while {phase}": bytes_text(peak) for phase, peak in _told(estimate).items()}
    verdict = estimate.verdict(memory)
    if estimate.peak_bytes is None:
        rows["fits"] = "not known"
    else:
        rows["highest peak"] = (
            f"{bytes_text(estimate.peak_bytes)} of {bytes_text(memory)} {whose}: {verdict}"
        )
        if verdict != FITS:
            rows["remedy"] = remedies(teacher, student, config, work, memory)
    rows["time, estimated"] = _time(estimate)
    rows |= {f"not known ({number})": why for number, why in enumerate(estimate.unknown, 1)}
    return pairs_table(f"{name}: memory and time, estimated", rows)


def _told(estimate: Estimate) -> dict[str, int | None]:
    words = {"the teacher's targets": "computing targets", "evaluation": "evaluating"}
    return {words.get(name, name): peak for name, peak in estimate.phases.items()}


def _time(estimate: Estimate) -> str:
    if not estimate.seconds:
        return "not known"
    parts = ", ".join(f"{name} {_duration(s)}" for name, s in estimate.seconds.items())
    return f"{_duration(sum(estimate.seconds.values()))} at this machine's speed now ({parts})"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
