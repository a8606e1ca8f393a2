"""A run's figures in other programs: TensorBoard, Weights & Biases, SwanLab.

Knows a run's events and how each program takes figures; a program that fails ends no run. To add
one: a class with `log` and `close`, and an entry in REPORTERS.
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from conch_dna.errors import ConchError, one_line
from conch_dna.screen.progress import Report

# Each name's package, which is the extra of this one that brings it.
REPORTERS = {"tensorboard": "tensorboardX", "wandb": "wandb", "swanlab": "swanlab"}
DEFAULT_PROJECT = "conch_dna"


def parse_names(text: str) -> tuple[str, ...]:
    """The names in `--report-to`, whose packages are here.

    Raises:
        ConchError: A name is unknown, or its package is not here.
    """
    names = tuple(dict.fromkeys(filter(None, (name.strip().lower() for name in text.split(",")))))
    if unknown := [name for name in names if name not in REPORTERS]:
        raise ConchError(
            f"report_to is {', '.join(unknown)}: use one or more of {', '.join(REPORTERS)}"
        )
    if missing := [name for name in names if not _is_here(REPORTERS[name])]:
        raise ConchError(
            f"report_to is {', '.join(missing)}, whose package is not here: "
            f"pip install 'conch-dna[{','.join(missing)}]'"
        )
    return names


def _is_here(package: str) -> bool:
    try:
        spec = find_spec(package)
    except ValueError:
        return False
    # A folder of that name, such as the one in which wandb keeps its runs, is no package.
    return spec is not None and spec.origin is not None


class _TensorBoard:
    def __init__(self, run: dict[str, Any], project: str) -> None:
        from tensorboardX import SummaryWriter

        self.writer = SummaryWriter(str(Path(run["folder"]) / "tensorboard"))
        self.writer.add_text("config", "\n".join(f"    {k}: {v}" for k, v in run["config"].items()))

    def log(self, figures: dict[str, float], step: int) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _OfMlxLm:
    """Weights & Biases or SwanLab, by mlx-lm's own callbacks."""

    def __init__(self, name: str, run: dict[str, Any], project: str) -> None:
        from importlib import import_module

        from mlx_lm.tuner.callbacks import get_reporting_callbacks

        self.module = import_module(name)
        self.callback = get_reporting_callbacks(
            name, project_name=project, log_dir=run["folder"], config=run["config"]
        )

    def log(self, figures: dict[str, float], step: int) -> None:
        self.callback.on_train_loss_report({"iteration": step, **figures})

    def close(self) -> None:
        self.module.finish()


class Reporting:
    """Passes a run's events on, and sends the figures in them where they were asked for.

    A `run` event begins a run there (`folder` and `config`), `result` ends it. What fails is told
    once as a warning, and left alone from then on.

    Args:
        report: Gets every event.
        names: Of REPORTERS.
        project: What the programs call all runs together.
    """

    def __init__(self, report: Report, names: tuple[str, ...], project: str | None = None) -> None:
        self.report = report
        self.names = list(names)
        self.project = project or DEFAULT_PROJECT
        self._open: dict[str, Any] = {}

    def __enter__(self) -> "Reporting":
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def __call__(self, event: str, row: dict[str, Any]) -> None:
        """Take one event."""
        self.report(event, row)
        if event == "run":
            self._close()
            for name in list(self.names):
                self._try(name, lambda name=name: self._begin(name, row))  # type: ignore[misc]
        elif event in ("train", "heldout"):
            self._log({f"{event}/{k}": v for k, v in row.items() if k != "step"}, row["step"])
        elif event == "result":
            self._log(_final(row["evaluation"]), row["step"])
            self._close()

    def _begin(self, name: str, run: dict[str, Any]) -> None:
        made = _TensorBoard(run, self.project) if name == "tensorboard" else None
        self._open[name] = made or _OfMlxLm(name, run, self.project)

    def _log(self, figures: dict[str, Any], step: int) -> None:
        numbers = {
            name: float(value)
            for name, value in figures.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        for name, reporter in list(self._open.items()):
            self._try(name, lambda reporter=reporter: reporter.log(numbers, step))  # type: ignore[misc]

    def _close(self) -> None:
        for name, reporter in list(self._open.items()):
            self._try(name, reporter.close)
        self._open = {}

    def _try(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001
            # Whatever another program raises, its figures are not worth the run's.
            self.names = [each for each in self.names if each != name]
            self._open.pop(name, None)
            message = f"{name} failed, and gets no more figures of this run: {one_line(error)}"
            self.report("warning", {"message": message})


def _final(evaluation: dict[str, Any]) -> dict[str, Any]:
    """The figures of evaluation.json in one level: final/before/kl_nats and so on."""
    sets = {"final": evaluation, "test": evaluation.get("test", {})}
    return {
        f"{name}/{moment}/{figure}": value
        for name, found in sets.items()
        for moment in ("before", "after")
        for figure, value in found.get(moment, {}).items()
    }
