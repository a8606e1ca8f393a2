"""A sweep: every run of a grid over one cache of answers and targets, and what they come to.

Knows when the teacher goes, which runs are finished, and how runs are compared; a run itself is
`runs.domain_run`'s. To compare runs by something else: `_comparison`.
"""

import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import date, datetime
from pathlib import Path
from typing import Any

import numpy as np

from conch_dna.checkpoints import (
    FolderLock,
    content_digest,
    provenance,
    read_json,
    remove_folder,
    require_keys,
    write_atomically,
    write_json,
)
from conch_dna.errors import ConchError, Interrupted, NotWholeError, number_of
from conch_dna.language_model import ModelSource
from conch_dna.metrics import COMPARABLE, verdict
from conch_dna.screen.progress import Report, silent
from conch_dna.training.adapters import require_trainable
from conch_dna.training.cross_tokenizer.alignments import INDEX
from conch_dna.training.data.examples import Examples
from conch_dna.training.data.records import Record, json_lines, numbered
from conch_dna.training.data.sources import leak_warnings
from conch_dna.training.evaluation import HeldoutFigures, figures_on
from conch_dna.training.fit.memory_estimate import estimate_run
from conch_dna.training.fit.workload import Workload
from conch_dna.training.runs.domain_run import (
    FIGURES_FILE,
    RESULT_FILE,
    RUN_FILE,
    DomainRun,
)
from conch_dna.training.runs.listing import SWEEP_FILE
from conch_dna.training.runs.stages import RunData
from conch_dna.training.settings import KDConfig, KDResult, get_kd_adapter_path, validate_domain
from conch_dna.training.sweeps.grid import GridRun, idle_settings, run_of, settings_text
from conch_dna.training.sweeps.report import draw_sweep

PICTURE_FILE = "sweep.png"


class Sweep:
    """Every run of a grid, one after the other, over one cache; the teacher is loaded once at most.

    Args:
        teacher: Whose distributions are learned.
        student: Whose adapters are trained.
        shared: Settings of what the runs share; see `grid.grid_runs`.
        runs: What to train.
        domain: A name, as a single run's.
        report: Gets the progress of all runs.
    """

    def __init__(
        self,
        teacher: ModelSource,
        student: ModelSource,
        shared: KDConfig,
        runs: Sequence[GridRun],
        domain: str,
        *,
        report: Report = silent,
    ) -> None:
        self.teacher = teacher
        self.student = student
        self.shared = shared
        self.runs = list(runs)
        self.domain = domain
        self.report = report
        self.folder = Path(shared.output_dir).parent

    def run(
        self,
        *,
        prompts: Sequence[str | Record] | None = None,
        data: Sequence[Record] | None = None,
        valid_data: Sequence[Record] = (),
        test_data: Sequence[Record] = (),
        resume: bool = False,
        overwrite: bool = False,
    ) -> dict[str, Any]:
        """Train what is not finished, compare all runs, and measure the best one on the test data.

        Args:
            prompts: For the teacher to answer, instead of the domain's examples.
            data: Records to train on, instead of the teacher's answers.
            valid_data: Records to choose by, instead of a share of the others.
            test_data: Records that no run learns from or is chosen by.
            resume: Go on with a sweep that lies in the folder, or add runs to it.
            overwrite: Train all of its runs again; answers and targets are kept.

        Returns:
            What sweep.json holds; see `_comparison`, and `failures` by run.

        Raises:
            ConchError: A run cannot be made so, the data are of no use, a sweep lies there that is
                neither to be resumed nor overwritten, or every run failed.
            Interrupted: Ctrl-C in training; its state was saved.
        """
        validate_domain(self.domain, with_own_data=prompts is not None or data is not None)
        with FolderLock(self.folder):
            before, earlier = self.require_possible(
                prompts=prompts,
                data=data,
                valid_data=valid_data,
                test_data=test_data,
                resume=resume,
                overwrite=overwrite,
            )
            begun = _day_of(before)
            write_json(self.folder / SWEEP_FILE, {**before, "begun": begun})
            shared = DomainRun(
                self.teacher, self.student, self.shared, self.domain, self.report, begun=begun
            )
            records = shared.generate(prompts) if data is None else list(data)
            configs = [each.config for each in self.runs]
            run_data = shared.prepare(records, valid=valid_data, shared_by=configs)
            for warning in leak_warnings(records, {"test": test_data}):
                self.report("message", {"message": f"warning: {warning}"})
            tested = self._tested(shared, run_data, test_data)
            self.teacher.release()
            if overwrite:
                # Not before it is clear that others can take their place.
                for run in self.folder.glob(f"*/{self.domain}/{RUN_FILE}"):
                    remove_folder(run.parent.parent)
                write_json(self.folder / SWEEP_FILE, {"begun": begun})
            source = _source_of(prompts, data, valid_data)
            results, failures = self._train(source, run_data, earlier)
            if not results:
                raise ConchError(f"every run failed; {self.runs[0].name}: {failures.popitem()[1]}")
            document = {
                "domain": self.domain,
                "teacher": self.teacher.model_id,
                "student": self.student.model_id,
                "begun": begun,
                "finished": datetime.now().astimezone().isoformat(timespec="seconds"),
                **self._comparison(results, [*self.runs, *earlier]),
                "failures": failures,
                **provenance(),
            }
            confirmed = read_json(self.folder / SWEEP_FILE, needs={}).get("confirmed", [])
            document["confirmed"] = confirmed
            if tested:
                self._confirm(document, run_data, tested, digest=_digest(test_data))
            write_atomically(self.folder / PICTURE_FILE, lambda path: draw_sweep(path, document))
            write_json(self.folder / SWEEP_FILE, document)
            return document

    def require_possible(
        self,
        *,
        prompts: Sequence[str | Record] | None = None,
        data: Sequence[Record] | None = None,
        valid_data: Sequence[Record] = (),
        test_data: Sequence[Record] = (),
        resume: bool = False,
        overwrite: bool = False,
        weights: bool = True,
    ) -> tuple[dict[str, Any], list[GridRun]]:
        """Refuse what can be known to be of no use before anything is written.

        Args:
            prompts: As `run` has them, and all the others.
            data: Of `run`.
            valid_data: Of `run`.
            test_data: Of `run`.
            resume: Of `run`.
            overwrite: Of `run`.
            weights: Whether the models' weights are here.

        Returns:
            What sweep.json holds of before, empty where there is none that can be read, and the
            runs of it that stay in the comparison.

        Raises:
            ConchError: A sweep lies in the folder, or one of other settings, a run cannot be made
                so or would be equal to another, or a test example is among the others.
        """
        before: dict[str, Any] = {}
        with suppress(NotWholeError):
            before = read_json(self.folder / SWEEP_FILE, needs={})
        trained = any(self.folder.glob(f"*/{self.domain}/{RUN_FILE}"))
        if not (resume or overwrite) and (trained or "runs" in before):
            raise ConchError(
                f"{self.folder} holds a sweep: add --resume to go on with it or to add runs, "
                "--overwrite to train all again, or choose another --output-dir"
            )
        for number, each in enumerate(self.runs):
            # The weights are the same for all.
            require_trainable(self.student, each.config, weights=weights and number == 0)
        examples = Examples(self.teacher, self.student, self.shared, domain=self.domain)
        self._require_effect(examples.alignment)
        if test_data and (others := [*(data or []), *valid_data]):
            known = {each.digest for each in examples.make(others)[1]}
            _require_unseen(_test_examples(examples, test_data), known)
        source = _source_of(prompts, data, valid_data)
        return before, self._earlier(before, source, weights=weights) if resume else []

    def _earlier(self, before: dict[str, Any], source: object, *, weights: bool) -> list[GridRun]:
        """The finished runs of sweep.json that are not among those to train.

        Raises:
            ConchError: These or those were made with other settings.
        """
        for each in self.runs:
            self._run_of(each, silent).require_goes_on(source, weights=weights)
        names = {each.name for each in self.runs}
        swept = {name for each in self.runs for name in each.settings}
        base = replace(self.shared, **{name: getattr(KDConfig(), name) for name in swept})
        earlier = []
        require_keys({"runs": [], **before}, self.folder / SWEEP_FILE, needs={"runs": list})
        for row in before.get("runs", []):
            require_keys(row, self.folder / SWEEP_FILE, needs={"name": str, "settings": dict})
            if row["name"] in names:
                continue
            settings = set(row["settings"])
            config = replace(base, **{n: v for n, v in row["settings"].items() if n in swept})
            if not (settings <= swept <= settings | set(idle_settings(config))):
                raise ConchError(
                    f"{self.folder} holds a sweep of {_options(settings)}, and this one is of "
                    f"{_options(swept)}: sweep the same options, or choose another --output-dir"
                )
            each = run_of(row["settings"], base, self.folder)
            run = self._run_of(each, silent)
            run.require_goes_on(source, weights=weights)
            if not weights or run.finished(source):
                earlier.append(each)
                continue
            text = f"run {each.name} of {SWEEP_FILE} is not whole, or not as long: it is left out"
            self.report("warning", {"message": text})
        return earlier

    def _run_of(self, each: GridRun, report: Report) -> DomainRun:
        return DomainRun(self.teacher, self.student, each.config, self.domain, report)

    def _require_effect(self, alignment: str) -> None:
        """Refuse values that change nothing for this pair of models: runs would be equal."""
        across = ("soft_weight", "chunk_weight", "chunk_scale")
        without = {"roots": ("temperature",), INDEX: across}
        swept = {name for each in self.runs for name in each.settings}
        for name in without.get(alignment, ()):
            if name in swept:
                why = "with one tokenizer" if alignment == INDEX else f"with alignment {alignment}"
                raise ConchError(f"{name} changes nothing {why}: its runs would be equal; leave it")

    def _tested(self, shared: DomainRun, data: RunData, test: Sequence[Record]) -> list[Any]:
        """The test data as examples whose targets are there."""
        if not test:
            return []
        examples = _test_examples(shared.examples, test)
        _require_unseen(
            examples, {each.digest for each in (*data.split.train, *data.split.heldout)}
        )
        data.targets.fill(self.teacher, examples, batch_size=self.shared.batch_size)
        return examples

    def _train(
        self,
        source: object,
        data: RunData,
        earlier: Sequence[GridRun],
    ) -> tuple[dict[str, KDResult], dict[str, str]]:
        results = {
            each.name: result
            for each in [*self.runs, *earlier]
            if (result := self._run_of(each, silent).finished(source))
        }
        if results:
            text = f"{number_of(len(results), 'run')} already finished"
            self.report("message", {"message": text})
        failures: dict[str, str] = {}
        seconds: list[float] = []
        to_train = [each for each in self.runs if each.name not in results]
        for number, each in enumerate(to_train, 1):
            left = ""
            if seconds:
                minutes = sum(seconds) / len(seconds) * (len(to_train) - number + 1) / 60
                left = f", about {minutes:.1f} minutes left"
            message = f"run {number} of {len(to_train)}: {settings_text(each.settings)}{left}"
            self.report("message", {"message": message})
            began = time.monotonic()
            try:
                run = self._run_of(each, self._report_of(each))
                with run.lock():
                    result = run.begin(source, resume=True, overwrite=False)
                    if result is None:
                        result = run.finish(data, run.train(data))
                        seconds.append(time.monotonic() - began)
                results[each.name] = result
            except Interrupted:
                raise
            except (ConchError, OSError, RuntimeError, MemoryError) as error:
                failures[each.name] = str(error) or type(error).__name__
                self.report("warning", {"message": f"{each.name} failed: {failures[each.name]}"})
        return results, failures

    def _report_of(self, run: GridRun) -> Report:
        """The report under a run's name, instead of the domain's."""

        def report(event: str, row: dict[str, Any]) -> None:
            if event == "phase":
                row = {
                    **row,
                    "name": row["name"].replace(self.domain, settings_text(run.settings), 1),
                }
            self.report(event, row)

        return report

    def _comparison(self, results: dict[str, KDResult], runs: Sequence[GridRun]) -> dict[str, Any]:
        """What runs came to beside each other, the best first.

        Returns:
            `figure`, the one by which they are compared: the nearest to KL that any of them is
            judged by; `before`, the student's; `heldout_examples`; `best`, the run whose figure is
            lowest; and of each of `runs` its `settings`, `after`, `verdict` against the student
            before, and `against_best`, as `metrics.verdict` gives it, of the best run and itself.
        """
        judged = {result.evaluation["verdict"]["figure"] for result in results.values()}
        figure = min(judged, key=COMPARABLE.index)
        order = sorted(results, key=lambda name: results[name].evaluation["after"][figure])
        pairs = {name: _pair(results[name], figure) for name in order}
        settings = {each.name: each.settings for each in runs}
        best = results[order[0]]
        rows = [
            {
                "name": name,
                "settings": settings[name],
                "adapter": results[name].adapter_path,
                "best_step": results[name].metadata["best_step"],
                "seconds": results[name].training_time_seconds,
                "after": results[name].evaluation["after"],
                "verdict": results[name].evaluation["verdict"],
                "against_best": verdict(pairs[order[0]], pairs[name], seed=self.shared.seed),
            }
            for name in order
        ]
        return {
            "figure": figure,
            "before": best.evaluation["before"],
            "heldout_examples": best.metadata["heldout_examples"],
            "best": order[0],
            "runs": rows,
        }

    def _confirm(
        self, document: dict[str, Any], data: RunData, examples: list[Any], *, digest: str
    ) -> None:
        """Measure the best run on the test data, unless that was done; added to `confirmed`."""
        best = document["runs"][0]
        adapter = {"run": best["name"], "test_data": digest}
        if any(adapter.items() <= done.items() for done in document["confirmed"]):
            return
        self.report("phase", {"name": f"{self.domain}: the best on the test data"})
        figures = {}
        for moment, path in {"before": None, "after": Path(best["adapter"])}.items():
            student = self.student.load(adapter_path=path)
            figures[moment] = figures_on(student, examples, data.targets, self.shared)
            student.release()
        document["confirmed"].append(
            {**adapter, "examples": len(examples), **_change(figures, document["figure"])}
        )


def _change(figures: dict[str, HeldoutFigures], figure: str) -> dict[str, Any]:
    pair = (figures[moment].by_example[figure] for moment in ("before", "after"))
    metrics = {moment: each.metrics.to_json() for moment, each in figures.items()}
    return {**metrics, "verdict": {"figure": figure, **verdict(*pair)}}


def _pair(result: KDResult, figure: str) -> np.ndarray:
    """Each held-out example's sum and count of a figure `[2, n]`, as a run wrote them down."""
    stored = read_json(Path(result.adapter_path) / FIGURES_FILE, needs={figure: list})
    return np.array(stored[figure], dtype=np.float64)


def _day_of(before: dict[str, Any]) -> str:
    """The day on which a sweep began, by its sweep.json; today where that does not say."""
    with suppress(KeyError, TypeError, ValueError):
        return date.fromisoformat(before["begun"]).isoformat()
    return date.today().isoformat()


def _test_examples(examples: Examples, test: Sequence[Record]) -> list[Any]:
    return examples.make(test, numbered(test, "test example"))[1]


def _require_unseen(tested: Sequence[Any], known: set[str]) -> None:
    if seen := sum(each.digest in known for each in tested):
        raise ConchError(
            f"{seen} of {len(tested)} test examples are among the others too, so they would "
            "confirm nothing: take them out of --test-data"
        )


def _options(names: Iterable[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in sorted(names))


def require_batches(plan: dict[str, Any], runs: Sequence[GridRun]) -> None:
    """Refuse a batch size that the training examples of `true_kd.plan_domain` cannot fill."""
    count = plan["examples"] - plan["heldout_examples"]
    if count < (largest := max(each.config.batch_size for each in runs)):
        raise ConchError(
            f"{number_of(count, 'training example')} cannot fill one batch of {largest}: give "
            "more data or a smaller --batch-size"
        )


def _source_of(
    prompts: Sequence[str | Record] | None, data: Sequence[Record] | None, valid: Sequence[Record]
) -> list[Any]:
    """What a single run puts into its identity; no run of a sweep sees the test data."""
    return [list(prompts or []), list(data or []), *([list(valid), []] if valid else [])]


def _digest(records: Sequence[Record]) -> str:
    return content_digest(json_lines(records))[:16]


def plan_sweep(
    models: tuple[ModelSource, ModelSource],
    runs: Sequence[GridRun],
    domain: str,
    work: Workload,
) -> dict[str, Any]:
    """What is left to do of a grid, and how long it takes.

    Args:
        models: Teacher and student; their configurations are enough.
        runs: Of the grid.
        domain: The name.
        work: How much text they read, of `true_kd.plan_domain`.

    Returns:
        `runs`, `finished`, `steps` that are left, and `seconds` that they take: by the finished
        runs, else as this machine's speed and the models' configurations let expect; None where
        neither tells.
    """
    seconds, steps = 0.0, 0
    left = []
    for each in runs:
        path = get_kd_adapter_path(domain, each.config) / RESULT_FILE
        try:
            result = read_json(path, needs={"training_time_seconds": float})
        except NotWholeError:
            left.append(each)
        else:
            seconds += result["training_time_seconds"]
            steps += each.config.num_iters
    steps_left = sum(each.config.num_iters for each in left)
    expected: float | None = (
        seconds / steps * steps_left if steps else _expected(models, runs, work)
    )
    return {
        "runs": len(runs),
        "finished": len(runs) - len(left),
        "steps": steps_left,
        "seconds": expected,
    }


def _expected(
    models: tuple[ModelSource, ModelSource], runs: Sequence[GridRun], work: Workload
) -> float | None:
    """Seconds of a whole grid: the teacher's work once, the student's for every run."""
    longest = max((each.config for each in runs), key=lambda config: config.num_iters)
    seconds = estimate_run(*models, longest, work, time_it=True).seconds
    training, evaluation = (seconds.pop(name, None) for name in ("training", "evaluation"))
    if training is None or evaluation is None:
        return None
    trained = sum(each.config.num_iters for each in runs) / longest.num_iters * training
    return sum(seconds.values()) + trained + len(runs) * evaluation
