"""One self-contained HTML page over finished runs: verdicts, curves, samples, settings.

Knows the files that a run leaves and the page's parts; computes nothing of them anew, and loads no
model. To show another part: a key of `_run_parts` or `_page`, and its place in report.html.jinja.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conch_dna.checkpoints import (
    file_digest,
    folder_digests,
    parse_json,
    read_json,
    read_text,
    require_files,
    require_keys,
    write_atomically,
)
from conch_dna.errors import ConchError, NotWholeError
from conch_dna.metrics import BETTER, WORSE
from conch_dna.training.runs import report_charts as charts
from conch_dna.training.runs.report import (
    OWN_COLUMNS,
    ROWS,
    advice,
    caption_of,
    figure_columns,
    gap_text,
    judged_sets,
    own_answers_rows,
    read_samples,
    slice_text,
    verdict_text,
)
from conch_dna.training.runs.run_file import RUN_FILE
from conch_dna.training.settings import KDConfig, KDResult

RESULT, LOG, SAMPLES, HELDOUT = "kd_result.json", "training_log.json", "samples.md", "heldout.jsonl"
TEMPLATE = "report.html.jinja"
# A page that a browser opens at once, and that people read.
MOST_RUNS = 20
MOST_SAMPLES = 20
MOST_LETTERS = 4000
# A run lies in its domain's folder, which may lie among others, also under runs/NAME.
_DEPTHS = ("", "*/", "*/*/", "*/*/*/", "*/*/*/*/")


# Control characters but tab and line feed, what breaks lines or turns text, lone surrogates.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """What is read of one run.

    Attributes:
        folder: Of its adapter.
        result: As kd_result.json holds it.
        history: The trainer's rows.
        samples: The text of samples.md.
        heldout: The digest of what it was judged by.
        unfinished: That a later run in its place has no result yet, in a sentence.
    """

    folder: Path
    result: KDResult
    history: list[dict[str, Any]]
    samples: str
    heldout: str
    unfinished: str = ""

    @property
    def verdict(self) -> dict[str, Any] | None:
        """Of the evaluation; None where the run is older than verdicts."""
        return self.result.evaluation.get("verdict")


def find_runs(folder: Path) -> list[Path]:
    """The adapters' folders of finished runs in a folder, or in folders in it.

    Raises:
        ConchError: There are none.
    """
    if not folder.is_dir():
        raise ConchError(f"{folder} is no folder: give that of a domain or of an adapter")
    found = [path.parent for depth in _DEPTHS for path in folder.glob(f"{depth}{RESULT}")]
    # Hidden ones are being written, or were replaced.
    if shown := sorted(path for path in found if not path.name.startswith(".")):
        return shown
    raise ConchError(
        f"{folder} holds no finished run (no {RESULT} in it or below): give the folder of a domain "
        "or of an adapter, or finish the run with --resume"
    )


def read_run(folder: Path) -> FinishedRun:
    """Read a run's result, log and samples, compared with their digests.

    Args:
        folder: Of its adapter.

    Raises:
        NotWholeError: A file is missing, altered, or has another form.
    """
    digests = folder_digests(folder)
    require_files(folder)
    for name in (RESULT, LOG, SAMPLES):
        try:
            if file_digest(folder / name) != digests.get(name):
                raise NotWholeError(f"{folder} is not whole: {name} was truncated or altered")
        except OSError as error:
            raise NotWholeError(f"{folder} is not whole: {name} cannot be read") from error
    result = read_json(folder / RESULT, needs={"domain": str, "evaluation": dict, "metadata": dict})
    history = parse_json(read_text(folder / LOG), folder / LOG)
    if not isinstance(history, list):
        raise NotWholeError(f"{folder / LOG} is no list of rows")
    for row in history:
        require_keys(row, folder / LOG, needs={"split": str, "step": int})
    samples = read_text(folder / SAMPLES)
    with _as_written(folder):
        found = KDResult(**result)
        heldout = digests.get(HELDOUT, "")
        return FinishedRun(folder, found, history, samples, heldout, _unfinished(folder))


def _unfinished(adapter: Path) -> str:
    """That another run was begun where an adapter lies, in a sentence; empty where none was."""
    with suppress(NotWholeError):
        run = read_json(adapter.parent / RUN_FILE, needs={"finished": bool})
        if not run["finished"] and run.get("adapter", adapter.name) == adapter.name:
            return (
                f"a run in {adapter.parent} is not finished: these figures are of the adapter "
                "that lies there, which may be of an earlier run"
            )
    return ""


@contextmanager
def _as_written(folder: Path) -> Iterator[None]:
    """Turns what another form of a result raises into one line."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise NotWholeError(
            f"{folder} has another form than finished runs have: it is of another version, or was "
            "altered"
        ) from error


def default_output(folder: Path) -> Path:
    """Where a page goes if nobody says: into the folder, or beside it where it is an adapter's."""
    return (folder.resolve().parent if (folder / RESULT).exists() else folder) / "report.html"


def write_report(folders: Sequence[Path], output: Path) -> list[FinishedRun]:
    """Write the page over all runs in some folders.

    Args:
        folders: Of domains or adapters.
        output: The file; what stands there is replaced.

    Returns:
        The runs in it, each once, in the order of the folders.

    Raises:
        ConchError: There is no finished run, there are too many, or one is not whole.
    """
    if output.suffix != ".html":
        raise ConchError(f"--output {output} must end in .html")
    if (output.parent / RESULT).exists():
        raise ConchError(
            f"--output {output} would lie in the folder of an adapter, which is only whole without "
            "other files: choose another folder"
        )
    paths = {path.resolve(): path for folder in folders for path in find_runs(folder)}
    if len(paths) > MOST_RUNS:
        raise ConchError(f"these are {len(paths)} runs, and a page holds {MOST_RUNS}: give fewer")
    runs = [read_run(path) for path in paths.values()]
    write_atomically(output, html_page(runs))
    return runs


def html_page(runs: Sequence[FinishedRun]) -> str:
    """The page as text: no scripts, no addresses, every text of a run escaped.

    Control characters, and those that turn the direction of text, are shown as escapes.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = Markup
    page = environment.get_template(TEMPLATE).render(_page(runs))
    return _UNSEEN.sub(lambda found: repr(found[0])[1:-1], page)


def _page(runs: Sequence[FinishedRun]) -> dict[str, Any]:
    parts = []
    for number, run in enumerate(runs, 1):
        with _as_written(run.folder):
            parts.append(_run_parts(run, f"run {number}: {run.result.domain}"))
    words = [judged["title"] for part in parts for judged in part["judged"]]
    page: dict[str, Any] = {
        "title": "; ".join(words[:3]) + ("; …" if len(words) > 3 else ""),
        "runs": parts,
    }
    if len(runs) > 1:
        figures = {run.verdict["figure"] for run in runs if run.verdict}
        page |= {
            "differing": _differing(runs),
            "warning": _not_comparable(runs),
            "figure": ", ".join(sorted(figures)),
            "chart": charts.differences(
                {f"run {number}": run.verdict for number, run in enumerate(runs, 1)}
            ),
        }
    return page


def _run_parts(run: FinishedRun, name: str) -> dict[str, Any]:
    result, evaluation, metadata = run.result, run.result.evaluation, run.result.metadata
    best = metadata["best_step"]
    history, every = charts.thinned(run.history, best)
    drawn, samples = read_samples(run.samples)
    unsure = run.verdict and run.verdict["verdict"] != BETTER
    return {
        "name": name,
        "folder": str(run.folder),
        "unfinished": run.unfinished,
        "judged": [_judged(each, evaluated) for each, evaluated in sets_of(run).items()],
        "advice": _advice(result) if unsure else "",
        "facts": {key: _shown(value) for key, value in _facts(result).items()},
        "settings": {key: _shown(value) for key, value in metadata["config"].items()},
        "curves": charts.curves(history, best=best),
        "every": every,
        "best": best,
        "dependences": _dependences(evaluation.get("breakdown")),
        "own_answers": own_answers_rows(evaluation),
        "own_columns": OWN_COLUMNS,
        "drawn": drawn,
        "labels": list(ROWS[2:] + ROWS[:2]),
        "samples": [{k: _cut(v) for k, v in each.items()} for each in samples[:MOST_SAMPLES]],
        "left_out": max(0, len(samples) - MOST_SAMPLES),
    }


def sets_of(run: FinishedRun) -> dict[str, dict[str, Any]]:
    """What the run was judged by; see `report.judged_sets`."""
    return judged_sets(run.result.domain, run.result.evaluation)


def headline(evaluation: dict[str, Any]) -> tuple[str, str]:
    """The verdict on a set that a run was judged by, in a word and in a line."""
    if "verdict" not in evaluation:
        return "no verdict", (
            "it cannot be said whether the student is better: this run is older than verdicts; "
            "run it again to get one"
        )
    return evaluation["verdict"]["verdict"], verdict_text(evaluation)


def _judged(title: str, evaluation: dict[str, Any]) -> dict[str, Any]:
    word, sentence = headline(evaluation)
    columns = figure_columns(evaluation)
    return {
        "title": f"{title}: {word if word == BETTER else word.upper()}",
        "tone": {BETTER: "good", WORSE: "bad"}.get(word, "unsure"),
        "sentence": sentence,
        "part": slice_text(evaluation),
        "caption": f"{title}: {gap_text(evaluation)}; {caption_of(evaluation)}",
        "headings": list(columns),
        "rows": [
            (row, [_cell(values[n], form) for form, values in columns.values()])
            for n, row in enumerate(ROWS)
        ],
    }


def _advice(result: KDResult) -> str:
    try:
        config = KDConfig.from_json(result.metadata["config"], source=RESULT)
    except ConchError:
        # Of another version: what it says of its options cannot be read by this one.
        return ""
    return advice(result, config)


def _facts(result: KDResult) -> dict[str, Any]:
    """What is known of a run besides its settings."""
    metadata, config = result.metadata, result.metadata["config"]
    left_out = {"config", "domain", "peak_memory_bytes", "best_step", "rounds"}
    rounds = metadata.get("rounds", [])
    drawn = sum(each["rollouts"] for each in rounds)
    seconds = (sum(r[f"{name}_seconds"] for r in rounds) for name in ("rollout", "scoring"))
    own = "{:,} in {:,} rounds, {:,.0f} s to draw and {:,.0f} s to score"
    return {
        "finished": result.timestamp,
        "kept": f"step {metadata['best_step']} of {config['num_iters']}",
        "training took": f"{result.training_time_seconds:,.0f} s",
        "peak memory": f"{metadata['peak_memory_bytes'] / 2**20:,.0f} MiB",
        **({"own answers": own.format(drawn, len(rounds), *seconds)} if rounds else {}),
        **{name: value for name, value in metadata.items() if name not in left_out},
    }


def _dependences(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The charts of `breakdown.breakdown`, with the numbers behind them; None without any."""
    if found is None:
        return None
    position, entropy, sure = (
        found[name] for name in ("by_position", "by_teacher_entropy", "calibration")
    )
    return {
        "chunks": found["figure"] == "chunk_kl_nats",
        "position": charts.by_position(position),
        "positions": _bins(charts.position_labels(position["first"]), position),
        "entropy": entropy and charts.by_entropy(entropy),
        "entropies": entropy and _bins([f"{mean:.2f}" for mean in entropy["mean"]], entropy),
        "calibration": charts.calibration(sure),
        "errors": {name: f"{bins['ece']:.3f}" for name, bins in sure.items()},
    }


def _bins(labels: Sequence[str], bins: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    return [
        (label, f"{count:,}", f"{before / count:.4f}", f"{after / count:.4f}")
        for label, count, before, after in zip(
            labels, bins["count"], bins["before"], bins["after"], strict=True
        )
    ]


def _differing(runs: Sequence[FinishedRun]) -> list[tuple[str, list[str]]]:
    """Settings and facts of which not all runs have the same."""
    facts = [
        {**run.result.metadata, **run.result.metadata["config"], "held-out texts": run.heldout}
        for run in runs
    ]
    left_out = {"config", "peak_memory_bytes"}
    names = dict.fromkeys(name for each in facts for name in each if name not in left_out)
    rows = [(name, [_shown(each.get(name, "absent")) for each in facts]) for name in names]
    return [(name, cells) for name, cells in rows if len(set(cells)) > 1]


def _not_comparable(runs: Sequence[FinishedRun]) -> str:
    """Why the figures of these runs do not mean the same; empty where they do."""
    different: dict[str, set[Any]] = {
        "held-out texts": {run.heldout for run in runs},
        "teachers": {run.result.metadata.get("teacher_digest") for run in runs},
        "figures": {(run.verdict or {}).get("figure") for run in runs},
    }
    names = [name for name, values in different.items() if len(values) > 1]
    return f"these runs were judged by different {', '.join(names)}" if names else ""


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"


def _shown(value: Any) -> str:
    """A setting in one short line; of a digest its beginning."""
    text = str(value)
    if isinstance(value, Mapping):
        text = ", ".join(f"{name} {each}" for name, each in value.items())
    if re.fullmatch("[0-9a-f]{40,}", text):
        return text[:16]
    return text if len(text) <= 300 else f"{text[:300]}… ({len(text):,} letters)"


def _cut(text: str) -> str:
    if len(text) <= MOST_LETTERS:
        return text
    return f"{text[:MOST_LETTERS]}… (cut here: all {len(text):,} letters are in {SAMPLES})"
