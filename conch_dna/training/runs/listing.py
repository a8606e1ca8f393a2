"""The runs of an output folder, told from their files alone: no model is looked for.

Knows run folders and what a distillation leaves in them; changes nothing. To show another figure:
a key in `describe_run`, and its place in `runs_table`.
"""

import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conch_dna.checkpoints import (
    folder_digests,
    numbered_folders,
    read_json,
    require_files,
    require_keys,
)
from conch_dna.errors import ConchError, NotWholeError
from conch_dna.metrics import BETTER
from conch_dna.screen.presentation import text_table
from conch_dna.training.runs.run_file import RUN_FILE
from conch_dna.training.settings import CHECKPOINT_PREFIX, RUNS, KDConfig, is_folder_name

if TYPE_CHECKING:
    from rich.table import Table

RESULT_FILE, SWEEP_FILE = "kd_result.json", "sweep.json"
# Of the runs that a message names.
MOST_NAMED = 8
FINISHED, UNFINISHED, RUNNING = "finished", "unfinished", "running"
FAILED, UNREADABLE, NOT_WHOLE = "FAILED", "UNREADABLE", "NOT WHOLE"


def find_runs(folder: Path) -> list[Path]:
    """The folders of runs in an output folder, or the folder itself where it is one.

    Args:
        folder: As `distill --output-dir` had it, of a sweep, or of a single run.

    Returns:
        Their paths, by domain and then by the run's name, those without one first.

    Raises:
        ConchError: It is no folder, or holds no run.
    """
    if not folder.is_dir():
        raise ConchError(f"there is no folder {folder}: give the --output-dir of a distillation")
    if _is_run(folder):
        return [folder]
    found = [*folder.glob("*/"), *folder.glob(f"{RUNS}/*/*/")]
    for sweep in (folder / SWEEP_FILE, *folder.glob(f"*/{SWEEP_FILE}")):
        found += sweep.parent.glob("*/*/") if sweep.exists() else []
    runs = {path for path in found if _is_run(path)}
    if runs:
        return sorted(runs, key=lambda path: (path.name, _run_name(path)))
    raise ConchError(
        f"{folder} holds no run: make one with 'conch-dna distill --domain thinking', or give "
        "another folder"
    )


def find_run(folder: Path) -> Path:
    """The one run of a folder.

    Raises:
        ConchError: As `find_runs`, or there are several; names them.
    """
    first, *others = found = find_runs(folder)
    if not others:
        return first
    names = [str(path) for path in found[:MOST_NAMED]]
    more = f" and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
    raise ConchError(
        f"{folder} holds {len(found)} runs: give the folders of those that you mean, of "
        f"{', '.join(names)}{more}"
    )


def _run_name(folder: Path) -> str:
    """What tells a run from others of its domain; of a sweep's run with the sweep's folder."""
    above = folder.parent.parent
    if (above / SWEEP_FILE).exists():
        return f"{above.name}/{folder.parent.name}"
    return folder.parent.name if above.name == RUNS else ""


def _is_run(folder: Path) -> bool:
    names = (RUN_FILE, KDConfig.adapter_subdir, RESULT_FILE)
    return any((folder / name).exists() for name in names) or bool(
        numbered_folders(folder, CHECKPOINT_PREFIX)
    )


def describe_run(folder: Path) -> dict[str, Any]:
    """What there is of one run, as JSON can hold it.

    Args:
        folder: Of the run, or of the adapter in it.

    Returns:
        `path`, `domain`, `run` (empty for one without a name; of a sweep's run also the sweep's
        folder), `state` (one of the words of this module), `reason` for those in capitals;
        `teacher`, `student`, `steps` taken and `planned`; and of a finished run `result`, the
        content of kd_result.json. What is not known is None.
    """
    document: dict[str, Any] = {
        "path": str(folder),
        "domain": folder.name,
        "run": _run_name(folder),
        **dict.fromkeys(("reason", "teacher", "student", "steps", "planned", "result")),
    }
    try:
        if (folder / RESULT_FILE).is_file():
            return _merged(document, _of_result(folder))
        run = read_json(folder / RUN_FILE, needs={"identity": dict, "finished": bool})
        named = {"teacher": str, "student": str, "num_iters": int}
        require_keys(run["identity"], folder / RUN_FILE, needs=named)
        document |= {name: run["identity"][name] for name in ("teacher", "student")}
        document["planned"] = run["identity"]["num_iters"]
        steps = [step for step, _ in numbered_folders(folder, CHECKPOINT_PREFIX)]
        document["steps"] = steps[-1] if steps else 0
        if run["finished"]:
            subdir = run.get("adapter", KDConfig.adapter_subdir)
            if not is_folder_name(subdir):
                raise NotWholeError(f"{folder / RUN_FILE} names {subdir!r} as the adapter's folder")
            return _merged(document, _of_result(folder / subdir))
    except (ConchError, OSError) as error:
        return {**document, "state": UNREADABLE, "reason": str(error)}
    if _in_use(folder):
        return {**document, "state": RUNNING}
    failed = run.get("failed")
    return {**document, "state": FAILED if failed else UNFINISHED, "reason": failed}


def _merged(document: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    return {**document, **found, "run": document["run"] or found["run"]}


def _of_result(adapter: Path) -> dict[str, Any]:
    needs = {"domain": str, "evaluation": dict, "metadata": dict, "timestamp": str}
    path = adapter / RESULT_FILE
    result = read_json(path, needs={**needs, "training_time_seconds": int | float})
    metadata = result["metadata"]
    require_keys(metadata, path, needs={"config": dict, "teacher": str, "student": str})
    require_keys(metadata["config"], path, needs={"num_iters": int})
    require_keys(result["evaluation"], path, needs={"before": dict, "after": dict, "verdict": dict})
    require_keys(result["evaluation"]["verdict"], path, needs={"verdict": str})
    # Whether a file was altered is not looked at here, but whether the folder knows its files.
    folder_digests(adapter)
    whole: dict[str, Any] = {"state": FINISHED, "result": result}
    try:
        require_files(adapter)
    except NotWholeError as error:
        whole = {"state": NOT_WHOLE, "reason": str(error)}
    steps = metadata["config"]["num_iters"]
    return {
        **whole,
        "domain": result["domain"],
        "run": str(metadata["config"].get("run", "")),
        "teacher": metadata["teacher"],
        "student": metadata["student"],
        "steps": steps,
        "planned": steps,
    }


def _in_use(folder: Path) -> bool:
    """Whether a process of this machine that still runs holds the folder."""
    with suppress(NotWholeError, OSError, OverflowError):
        owner = read_json(folder / "run.lock.json", needs={"pid": int, "host": str})
        if owner["host"] == socket.gethostname() and owner["pid"] > 0:
            os.kill(owner["pid"], 0)
            return True
    return False


def figure(row: dict[str, Any], moment: str, name: str) -> float | None:
    """A held-out figure of a finished run; None where there is none."""
    value = row["result"]["evaluation"][moment].get(name) if row["result"] else None
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def runs_table(folder: Path, rows: Sequence[dict[str, Any]]) -> "Table":
    """The rows of `describe_run` for people; 80 columns are enough.

    Args:
        folder: Where they were looked for.
        rows: Of all its runs.
    """
    table = text_table(
        f"runs in {folder}",
        ("domain\nrun", "student\nits teacher", "state\nsteps\ndate", "verdict\nKL"),
        [
            (
                f"{row['domain']}\n{row['run'] or '–'}",
                f"{_short(row['student'])}\n{_short(row['teacher'])}",
                f"{row['state']}\n{_steps(row)}\n{_date(row)}".rstrip(),
                _outcome(row),
            )
            for row in rows
        ],
    )
    table.show_lines = True
    return table


def _short(model: str | None) -> str:
    """The last part of a hub id or path."""
    return model.rstrip("/").rpartition("/")[2] if model else "–"


def _steps(row: dict[str, Any]) -> str:
    if row["planned"] is None:
        return ""
    return (
        f"{row['planned']} steps"
        if row["state"] == FINISHED
        else f"{row['steps']} of {row['planned']}"
    )


def _date(row: dict[str, Any]) -> str:
    return str(row["result"]["timestamp"])[:10] if row["result"] else ""


def _outcome(row: dict[str, Any]) -> str:
    if not row["result"]:
        return "–"
    word = row["result"]["evaluation"]["verdict"]["verdict"]
    name = next(
        (n for n in ("kl_nats", "chunk_kl_nats") if figure(row, "before", n) is not None), ""
    )
    before, after = figure(row, "before", name), figure(row, "after", name)
    said = word if word == BETTER else word.upper()
    return said if before is None or after is None else f"{said}\n{before:.4f} to {after:.4f}"
