"""The command that measures adapters: `python -m conch_dna.training.benchmark`.

Knows the command and its files; the rows are measured in rows.py, shown in report.py. To add an
option: a field of `AdapterBenchmarkSettings`.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click

from conch_dna.checkpoints import provenance
from conch_dna.cortex.benchmark.report import domain_table, draw_benchmark
from conch_dna.cortex.benchmark.rows import DomainBenchmark
from conch_dna.cortex.calibration.settings import AdapterBenchmarkSettings
from conch_dna.cortex.commands.shared_options import (
    model_options,
    opened_suite,
    settings_of,
)
from conch_dna.cortex.neuron import CortexSuite
from conch_dna.errors import ConchError, Interrupted
from conch_dna.options.commands import command, options_of
from conch_dna.screen.presentation import print_tables, report_path, write_report
from conch_dna.screen.progress import Progress, Report, silent
from conch_dna.training.data.records import Record, read_records
from conch_dna.training.settings import DEFAULT_TEACHER

FORMAT = "cortex benchmark 1"
RESULTS = "benchmark_results.json"


def run_benchmark(
    suite: CortexSuite,
    domains: Sequence[str],
    settings: AdapterBenchmarkSettings | None = None,
    *,
    output: Path | None = None,
    data: Sequence[Record] | None = None,
    report: Report = silent,
) -> dict[str, Any]:
    """Measure domains one after the other; what fails does not stop the others.

    Args:
        suite: With EGO, and an idle engine.
        domains: Neurons of it.
        settings: How to measure.
        output: A JSON file, written after every domain, with a plot (.png) beside it.
        data: Records that no version of the one domain was trained on; what it held out where
            None.
        report: Gets progress; see `conch_dna.screen.progress.Progress`.

    Returns:
        What the JSON holds: `format`, `student`, `ego`, `settings`, `versions`, `platform`,
        `processors`, `batch`, the most prompts answered at once by the student and by EGO;
        `failures` by domain; and by name in `domains`: the `adapter` and its digest, the numbers
        of `prompts` and `heldout_records`, `gap_closed`, the share of the KL that the adapter
        took away, `alignment`, `notes`, and `rows` of `student` (without an adapter), `adapter`
        and `EGO`, each with

        - `heldout`: figures of `metrics.TokenMetrics`, of held-out records and EGO's distributions;
          null where EGO is an API;
        - `valid_share` of answers that keep to the domain's schema, null without one;
        - `tokens`, `seconds`, `tokens_per_second` of all answers in batches, and `first_token_s`,
          the median time of prompts asked alone;
        - `bytes` of the weights, `adapter_bytes` of them the adapter's own, and `peak_bytes` of
          the process meanwhile, in which the student stays beside EGO;
        - but for EGO, `agreement` with EGO and what it means, `calibration` (threshold, coverage
          and risk; ECE before and after on the held-out half), `risk_coverage` curves of that
          half, and `hand_over_share`, what would go to EGO for not being valid or sure enough.

    Raises:
        ConchError: There is no EGO, a domain is not there, or data are given to several.
    """
    settings = settings or AdapterBenchmarkSettings()
    if suite.ego is None:
        raise ConchError("a benchmark compares with EGO: name one")
    if data is not None and len(domains) != 1:
        raise ConchError("data are those of one domain: benchmark the domains one by one")
    for name in domains:
        suite.domain(name)
    document: dict[str, Any] = {
        "format": FORMAT,
        "student": suite.source.model_id,
        "ego": suite.ego.model_id,
        "settings": asdict(settings),
        **provenance(),
        "processors": os.cpu_count(),
        "batch": {"student": suite.engine.max_batch, "EGO": suite.ego.config.batch_size},
        "domains": {},
        "failures": {},
    }
    for name in domains:
        try:
            figures = DomainBenchmark(suite, name, settings, data=data, report=report).run()
        except ConchError as error:
            document["failures"][name] = str(error)
            report("warning", {"message": f"domain {name} failed: {error}"})
            continue
        document["domains"][name] = figures
        if output is not None:
            _write(output, document)
    if output is not None:
        _write(output, document)
    return document


def _write(output: Path, document: dict[str, Any]) -> None:
    plot = {".png": partial(draw_benchmark, document=document)} if document["domains"] else {}
    write_report(output, document, plot)


@command(
    "python -m conch_dna.training.benchmark --domain thinking",
    "python -m conch_dna.training.benchmark --all --ego embedded:teacher --samples 50",
)
@click.option("--domain", metavar="NAME", help="The neuron that is measured.")
@click.option("--all", "all_domains", is_flag=True, help="Every domain that has an adapter.")
@model_options(ego=DEFAULT_TEACHER)
@click.option(
    "--data",
    "data_file",
    metavar="FILE",
    help="JSONL records that the domain was not trained on. [default: its held-out data]",
)
@options_of(AdapterBenchmarkSettings, leave_out=("alone",))
@click.option(
    "--output",
    default=RESULTS,
    show_default=True,
    metavar="FILE",
    help="JSON; a plot (.png) of the same name goes beside it.",
)
def main(
    domain: str | None, all_domains: bool, data_file: str | None, output: str, **values: Any
) -> None:
    """Measure student, adapter and EGO on what the domains held out.

    Distributions, valid answers, calibration, hand-over, speed and memory. The calibration is made
    for the measurement and not kept: half of the answers fit it, the others are measured.
    """
    if all_domains == (domain is not None):
        raise ConchError("give either --domain NAME or --all")
    if data_file and all_domains:
        raise ConchError("--data goes with one --domain, not with --all")
    path = report_path(output)
    settings = settings_of(AdapterBenchmarkSettings, values)
    data = read_records(Path(data_file)) if data_file else None
    with opened_suite(values, domains=[domain] if domain else None) as suite:
        try:
            with Progress() as progress:
                document = run_benchmark(
                    suite, suite.domains, settings, output=path, data=data, report=progress
                )
        except KeyboardInterrupt as error:
            raise Interrupted(
                f"stopped; {path} holds the domains measured so far, if any; the same command "
                "begins anew"
            ) from error
    for name, figures in document["domains"].items():
        print_tables(domain_table(name, figures))
        for note in figures["notes"]:
            click.echo(note)
    if document["domains"]:
        click.echo(f"written: {path}, {path.with_suffix('.png')}")
    for name, reason in document["failures"].items():
        click.echo(f"error: domain {name}: {reason}", err=True)
    if document["failures"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main(prog_name="python -m conch_dna.training.benchmark")
