"""What the phases of a distillation take in truth: a run in a process of its own, phase by phase.

MLX counts what its arrays hold at once; the count begins anew with each phase.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import conch_dna  # noqa: F401  # isort: skip  (loads OpenBLAS before mlx)

from conch_dna.language_model import ModelSource
from conch_dna.training.fit.memory_estimate import Estimate, estimate_run
from conch_dna.training.settings import KDConfig
from conch_dna.training.true_kd import TrueKnowledgeDistiller, plan_domain

ROOT = Path(__file__).parents[1]
PHASES = {
    "the teacher answers": "the teacher answers",
    "the teacher's targets": "the teacher's targets",
    "evaluating the student": "evaluation",
    "training": "training",
    "evaluating the adapter": "evaluation",
}


def estimated(teacher: str, student: str, settings: dict[str, Any], source: Any) -> Estimate:
    """The estimate of what `measured` measures."""
    models = ModelSource(teacher), ModelSource(student)
    config = KDConfig(**settings)
    plan = plan_domain(*models, config, "measured", **source)
    return estimate_run(*models, config, plan["workload"])


def measured(
    teacher: str, student: str, settings: dict[str, Any], source: Any, folder: Path
) -> dict[str, int]:
    """Peak bytes of each phase of a run in a new process.

    Args:
        teacher: As the command line takes it.
        student: The same.
        settings: Of KDConfig, without the output folder.
        source: `prompts` or `data`.
        folder: Where to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    task = folder / "task.json"
    task.write_text(json.dumps([teacher, student, {**settings, "output_dir": str(folder)}, source]))
    command = [sys.executable, __file__, str(task)]
    subprocess.run(command, check=True, cwd=ROOT, env=None, capture_output=True)
    result: dict[str, int] = json.loads((folder / "peaks.json").read_text())
    return result


def _run(task: Path) -> None:
    import mlx.core as mx

    teacher, student, settings, source = json.loads(task.read_text())
    peaks: dict[str, int] = {}
    phase = [""]

    def note(event: str, row: dict[str, Any]) -> None:
        if event == "phase":
            end()
            phase[0] = PHASES[row["name"].partition(": ")[2]]

    def end() -> None:
        if phase[0]:
            peaks[phase[0]] = max(peaks.get(phase[0], 0), mx.get_peak_memory())
        mx.reset_peak_memory()

    distiller = TrueKnowledgeDistiller(teacher, student, KDConfig(**settings), report=note)
    distiller.distill_domain("measured", **source)
    end()
    (task.parent / "peaks.json").write_text(json.dumps(peaks))


if __name__ == "__main__":
    _run(Path(sys.argv[1]))
