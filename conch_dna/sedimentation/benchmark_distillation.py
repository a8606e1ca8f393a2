"""Measure what sedimentation gains on a collection, against control and ceiling.

The command and its files; the stages are in stages.py, the rows in rows.py, tables and plot in
report.py. To add an option: here, and a field of `ComparisonSettings` of the same name.
"""

import tempfile
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import click

from conch_dna.checkpoints import write_json
from conch_dna.errors import Interrupted
from conch_dna.options.commands import HELP, OneLineErrors, example, options_of
from conch_dna.screen.presentation import print_tables, report_path, write_report
from conch_dna.screen.progress import Progress, Report, silent
from conch_dna.sedimentation.benchmark.collections import read_collection
from conch_dna.sedimentation.benchmark.report import draw_rows, markdown_table, result_table
from conch_dna.sedimentation.benchmark.rows import Benchmark, ComparisonSettings
from conch_dna.sedimentation.benchmark.stages import evaluate_engine, run_training_cycle
from conch_dna.sedimentation.config import ChelationConfig
from conch_dna.sedimentation.engine import DEFAULT_STUDENT
from conch_dna.sedimentation.retrieval import dcg_at_k, ndcg_at_k
from conch_dna.sedimentation.store_options import settings as settings_of
from conch_dna.sedimentation.store_options import share_option

__all__ = [
    "dcg_at_k",
    "evaluate_engine",
    "main",
    "ndcg_at_k",
    "run_benchmark",
    "run_training_cycle",
]

OPTIONS = ("epochs", "learning_rate", "teacher_weight", "threshold", "seed")
RESULTS = "benchmark_distillation_results.json"
PLOT, TABLE = ".png", ".md"


def run_benchmark(
    task: str,
    settings: ComparisonSettings,
    output: Path,
    *,
    split: str = "test",
    cycle_split: str | None = None,
    report: Report = silent,
) -> dict[str, Any]:
    """Measure every row and write the JSON, with a plot and a Markdown table beside it.

    The JSON is written after every row, so that what was measured outlives what comes.

    Args:
        task: A folder in BEIR layout, or a task of mteb.
        settings: What is compared.
        output: The JSON file; one that is there is replaced.
        split: Whose judgements.
        cycle_split: Another split of the folder, whose queries are asked in the cycles.
        report: Gets events, see `progress.Progress`.

    Returns:
        What the JSON holds; see `Benchmark.document`.

    Raises:
        ConchError: The collection, a setting, a model or a file cannot be used.
    """
    output = report_path(output)
    collection = read_collection(task, split=split, cycle_split=cycle_split)
    with tempfile.TemporaryDirectory(prefix="conch-benchmark-") as folder:
        benchmark = Benchmark(
            collection=collection,
            settings=settings,
            folder=Path(folder),
            save=partial(write_json, output),
            report=report,
        )
        document = benchmark.run()
    plot = partial(draw_rows, document=document)
    write_report(output, document, {TABLE: markdown_table(document), PLOT: plot})
    return document


@click.command(
    cls=OneLineErrors,
    context_settings=HELP,
    epilog=example(
        "python -m conch_dna.sedimentation.benchmark_distillation --task ./scifact \\",
        "  --model ./student --teacher sentence-transformers/all-MiniLM-L6-v2",
    ),
)
@click.option(
    "--task",
    required=True,
    metavar="FOLDER|NAME",
    help="A folder in BEIR layout (corpus.jsonl, queries.jsonl, qrels/test.tsv), or the name of a "
    "retrieval task of mteb, such as SciFact.",
)
@click.option("--model", "student", default=DEFAULT_STUDENT, show_default=True, help="The student.")
@click.option(
    "--teacher", multiple=True, required=True, help="The teacher; give it again for several."
)
@share_option
@options_of(ComparisonSettings)
@options_of(ChelationConfig, only=OPTIONS, names={"learning_rate": ("--lr",)})
@click.option(
    "--config",
    "config_file",
    metavar="FILE",
    help="YAML with any settings of the stores; the command line wins.",
)
@click.option("--sweep", is_flag=True, help="Also run every teacher weight from 0.1 to 1.")
@click.option(
    "--split",
    default="test",
    show_default=True,
    help="Split whose judgements are used, such as test.",
)
@click.option(
    "--cycle-split",
    help="Take the cycles' queries from this split of the folder, such as train, so that all of "
    "--split are evaluated. [default: from --split]",
)
@click.option(
    "--teacher-cache",
    metavar="FOLDER",
    help="Keep the teacher's vectors there for another run. [default: for this run only]",
)
@click.option("--device", help="Device of the models: cpu, cuda or mps. [default: chosen]")
@click.option("--trust-remote-code", is_flag=True, help="Let code that comes with a model run.")
@click.option(
    "--output",
    default=RESULTS,
    show_default=True,
    metavar="FILE",
    help="JSON; a plot (.png) and a table (.md) of the same name go beside it.",
)
def main(
    task: str,
    teacher_shares: tuple[float, ...],
    split: str,
    cycle_split: str | None,
    output: str,
    **given: Any,
) -> None:
    """Measure every training mode on a collection with judgements.

    Rows: the student untouched (control), baseline, hybrid and offline symmetric after each cycle,
    asymmetric, the teacher (ceiling), BM25, and the best row fused with BM25; nDCG@10 and
    recall@100 on the whole corpus, with intervals against the control.
    """
    names = {each.name for each in fields(ComparisonSettings)}
    named = {name: value for name, value in given.items() if name in names and value is not None}
    config = settings_of(given)
    settings = ComparisonSettings(**named, teacher_shares=teacher_shares or None, config=config)
    path = report_path(output)
    try:
        with Progress() as progress:
            document = run_benchmark(
                task, settings, path, split=split, cycle_split=cycle_split, report=progress
            )
    except KeyboardInterrupt as error:
        raise Interrupted(
            f"stopped; {path} holds the rows measured so far; the same command begins anew"
        ) from error
    print_tables(result_table(document))
    click.echo(f"written: {path}, {path.with_suffix(TABLE)}, {path.with_suffix(PLOT)}")


if __name__ == "__main__":
    main(prog_name="python -m conch_dna.sedimentation.benchmark_distillation")
