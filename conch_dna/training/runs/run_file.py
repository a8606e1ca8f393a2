"""run.json: what a run was asked for and how it ended, and whether another may take its place.

Knows a run's folder and settings; no model, no data. What may be another when a run goes on is
`settings.MAY_CHANGE`.
"""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from conch_dna.checkpoints import differences, numbered_folders, read_json
from conch_dna.errors import ConchError, NotWholeError
from conch_dna.training.settings import CHECKPOINT_PREFIX, MAY_CHANGE, is_folder_name

RUN_FILE = "run.json"
# In a run's folder that of its rounds, and how files of a student's own answers begin there.
ROLLOUTS, ANSWERS = "rollouts", "answers_"
# Where a run lies and whether code may run do not change what it computes.
NOT_IDENTITY = (
    *("output_dir", "adapter_subdir", "run", "trust_remote_code", "force", "shard_teacher"),
)
_ELSEWHERE = "--run NAME to keep both, or choose another --output-dir"


def earlier_run(
    folder: Path, adapter: str, identity: Mapping[str, Any], *, resume: bool, overwrite: bool
) -> dict[str, Any] | None:
    """What run.json says of the run that lies in a folder.

    Args:
        folder: Of the run.
        adapter: Name of the adapter's folder in it.
        identity: Models, data and settings of the run that is to begin or go on.
        resume: It is to go on.
        overwrite: Whatever lies there may be replaced.

    Returns:
        The document; None where there is none that can be read.

    Raises:
        ConchError: What lies there may neither go on so nor be replaced.
    """
    run, done = _read(folder)
    changed = changes(run["identity"], identity) if run else []
    if resume:
        _require_same(folder, run, identity, done)
        return run
    if overwrite:
        return run
    names = [adapter, *([run["adapter"]] if run and is_folder_name(run.get("adapter")) else [])]
    if any((folder / name).is_dir() for name in names):
        raise ConchError(_refusal(folder, run, changed, identity, done))
    if run and not run["finished"] and (done or holds_answers(folder)):
        raise ConchError(
            f"{folder} holds an unfinished run: add --resume to go on with it, --overwrite to "
            f"start again, {_ELSEWHERE}"
        )
    return run


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """How what a run depends on differs, in words.

    A teacher that is called otherwise, as it is behind a URL or in another folder, is the same
    where its weights are.
    """
    weights = before.get("teacher_weights")
    if weights is not None and weights == now.get("teacher_weights"):
        now = {**now, "teacher": before.get("teacher")}
    return differences(before, now)


def holds_answers(folder: Path) -> bool:
    """Whether answers of a student lie in the folder of a run, known to a checkpoint or not."""
    return any(folder.glob(f"{ROLLOUTS}/*/{ANSWERS}*.json"))


def own_steps(folder: Path) -> int | None:
    """How many steps the run in a folder was asked for; None where no run can be read."""
    run, _ = _read(folder)
    steps = run["identity"].get("num_iters") if run else None
    return steps if type(steps) is int else None


def require_no_file(folder: Path) -> None:
    """Refuse a folder of a run that could not be made.

    Raises:
        ConchError: It, or one that holds it, is a file.
    """
    there = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    if there.exists() and not there.is_dir():
        raise ConchError(
            f"cannot write to {folder}: {there} is a file. Free it, or choose another --output-dir"
        )


def outlook(
    folder: Path, adapter: str, settings: Mapping[str, Any], *, resume: bool, overwrite: bool
) -> str:
    """What a run would do with what lies in its folder, in words; empty where nothing does.

    Args:
        folder: Of the run.
        adapter: Name of the adapter's folder in it.
        settings: Those of `KDConfig`; models and data are compared by the run itself.
        resume: It is to go on.
        overwrite: Whatever lies there may be replaced.
    """
    run, done = _read(folder)
    if run is None and not (folder / adapter).is_dir():
        return ""
    finished = bool(run and run["finished"])
    what = "a finished run" if finished else "an unfinished run" if run else "an adapter"
    kept = (folder / adapter).is_dir()
    if resume:
        identity = {k: settings.get(k, v) for k, v in (run or {"identity": {}})["identity"].items()}
        try:
            _require_same(folder, run, {"num_iters": settings["num_iters"], **identity}, done)
        except ConchError as error:
            return f"would be refused: {error}"
        if finished and run and run["identity"].get("num_iters") == settings["num_iters"]:
            return "holds a finished run: its result would be shown"
        anew = "would go on with its own answers" if holds_answers(folder) else "would begin anew"
        return f"would go on from step {done}" if done else anew
    if overwrite:
        return f"holds {what}, which would be replaced"
    if kept or done or (run and not finished and holds_answers(folder)):
        on = f", --resume to go on from step {done}" if done and not finished else ""
        return f"holds {what}: would be refused without --overwrite or --run NAME{on}"
    return ""


def _read(folder: Path) -> tuple[dict[str, Any] | None, int]:
    """What run.json says, if it can be read, and the step of the newest checkpoint."""
    run = None
    with suppress(NotWholeError):
        run = read_json(folder / RUN_FILE, needs={"identity": dict, "finished": bool})
    checkpoints = numbered_folders(folder, CHECKPOINT_PREFIX)
    return run, checkpoints[-1][0] if checkpoints else 0


def _require_same(
    folder: Path, run: dict[str, Any] | None, identity: Mapping[str, Any], done: int
) -> None:
    if run is None:
        if done:
            raise ConchError(
                f"{folder} has checkpoints but no readable {RUN_FILE}, so it cannot be told "
                "what they belong to: start again with --overwrite"
            )
        return
    kept = [
        {k: v for k, v in one.items() if k not in MAY_CHANGE} for one in (run["identity"], identity)
    ]
    if changed := changes(*kept):
        raise ConchError(
            f"{folder} was made with other settings: {'; '.join(changed)}. Resume with the same "
            f"ones, or add {_ELSEWHERE}"
        )
    before, now = run["identity"].get("num_iters"), identity["num_iters"]
    if before == now:
        return
    if run["finished"] and not done:
        raise ConchError(
            f"{folder} holds a finished run of {before} steps and no checkpoint to go on from: "
            f"add --overwrite to train {now} steps anew, {_ELSEWHERE}"
        )
    if done >= now:
        raise ConchError(
            f"{folder} has taken {done} steps already, and --iters is {now}: give more to go on, "
            f"add --overwrite to train anew, {_ELSEWHERE}"
        )


def _refusal(
    folder: Path,
    run: dict[str, Any] | None,
    changed: list[str],
    identity: Mapping[str, Any],
    done: int,
) -> str:
    """Why an adapter is not replaced, and what to do."""
    if run is None:
        return (
            f"{folder} holds an adapter and no readable {RUN_FILE} that tells what it is of: add "
            f"--overwrite to replace it, {_ELSEWHERE}"
        )
    what = "a finished run" if run["finished"] else "an unfinished run and an adapter"
    names = {each.partition(":")[0] for each in changed}
    if not names:
        show = "see its result" if run["finished"] else "go on with it"
        return (
            f"{folder} holds {what} with the same settings: add --resume to {show}, --overwrite "
            f"to replace it, {_ELSEWHERE}"
        )
    longer = names <= set(MAY_CHANGE) and 0 < done < identity["num_iters"]
    on = f"--resume to go on from step {done}, " if longer else ""
    return (
        f"{folder} holds {what} with other settings ({'; '.join(changed)}): add {on}--overwrite "
        f"to replace it, {_ELSEWHERE}"
    )
