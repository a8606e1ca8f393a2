"""Measure what adapters are worth: `python -m conch_dna.training.benchmark --domain thinking`.

The command and its files; the rows are measured in rows.py, shown in
report.py. To add an option: here, and a field of `BenchmarkSettings` that takes it.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import click

from conch_dna.checkpoints import write_atomically, write_json
from conch_dna.command_parts import HELP, OneLineErrors, example
from conch_dna.cortex.benchmark.rows import BenchmarkSettings, DomainBenchmark
from conch_dna.cortex.calibration.confidence import METHODS
from conch_dna.cortex.neuron import CortexSuite
from conch_dna.digests import provenance
from conch_dna.ego.settings import EgoConfig
from conch_dna.errors import ConchError, Interrupted
from conch_dna.progress import Report, silent
from conch_dna.training.records import Record, read_records
from conch_dna.training.settings import DEFAULT_TEACHER, KDConfig

FORMAT = "cortex benchmark 1"
RESULTS = "benchmark_results.json"
ADAPTERS = KDConfig.output_dir
_DEFAULTS = {field.name: field.default for field in fields(BenchmarkSettings)}


def run_benchmark(
    suite: CortexSuite,
    domains: Sequence[str],
    settings: BenchmarkSettings | None = None,
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
        data: What the one domain was distilled from, where `distill` was given data of its own.
        report: Gets progress; see `conch_dna.progress.Progress`.

    Returns:
        What the JSON holds: `format`, `student`, `ego`, `settings`, `versions`, `platform`,
        `processors`, `batch`, the most prompts answered at once by the student and by EGO;
        `failures` by domain; and by name in `domains`: the `adapter` and its digest, the numbers
        of `prompts` and `heldout_records`, `gap_closed`, the share of the KL that the adapter
        took away, `alignment`, `notes`, and `rows` of `student` (without an adapter), `adapter`
        and `EGO`, each with

        - `heldout`: see `metrics.TokenMetrics`, of the held-out records and EGO's distributions;
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
    settings = settings or BenchmarkSettings()
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
            found = DomainBenchmark(suite, name, settings, data=data, report=report).run()
        except ConchError as error:
            document["failures"][name] = str(error)
            report("warning", {"message": f"domain {name} failed: {error}"})
            continue
        document["domains"][name] = found
        if output is not None:
            _write(output, document)
    if output is not None:
        _write(output, document)
    return document


def _write(output: Path, document: dict[str, Any]) -> None:
    from conch_dna.cortex.benchmark.report import draw_benchmark

    write_json(output, document)
    if document["domains"]:
        write_atomically(output.with_suffix(".png"), partial(draw_benchmark, document=document))


@click.command(
    cls=OneLineErrors,
    context_settings=HELP,
    epilog=example(
        "python -m conch_dna.training.benchmark --domain thinking",
        "python -m conch_dna.training.benchmark --all --ego embedded:teacher --samples 50",
    ),
)
@click.option("--domain", metavar="NAME", help="Which neuron.")
@click.option("--all", "all_domains", is_flag=True, help="Every domain that has an adapter.")
@click.option(
    "--adapters",
    default=ADAPTERS,
    show_default=True,
    metavar="FOLDER",
    help="The folder of all domains' folders.",
)
@click.option(
    "--student",
    metavar="MODEL",
    help="The base of the adapters. [default: which the first adapter names]",
)
@click.option(
    "--ego",
    default=DEFAULT_TEACHER,
    show_default=True,
    metavar="MODEL|URL",
    help="The big teacher: hub id, folder, embedded:teacher, or the URL of an API, which gives no "
    "distributions.",
)
@click.option("--ego-name", default="", help="What the API at the URL calls the model.")
@click.option(
    "--data",
    "data_file",
    metavar="FILE",
    help="JSONL that the domain was distilled from, where that was with --data: what it held out "
    "is found in it.",
)
@click.option(
    "--samples",
    default=_DEFAULTS["samples"],
    show_default=True,
    help="Most held-out prompts and records of a domain.",
)
@click.option(
    "--max-tokens", default=_DEFAULTS["max_tokens"], show_default=True, help="Longest answer."
)
@click.option(
    "--method",
    type=click.Choice(list(METHODS)),
    default=_DEFAULTS["method"],
    show_default=True,
    help="How confidence is calibrated.",
)
@click.option(
    "--max-risk",
    default=_DEFAULTS["max_risk"],
    show_default=True,
    help="Mean disagreement with EGO allowed among the answers that are kept.",
)
@click.option("--seed", default=_DEFAULTS["seed"], show_default=True, help="Of draws and halves.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with a model.")
@click.option(
    "--output",
    default=RESULTS,
    show_default=True,
    metavar="FILE",
    help="JSON; a plot (.png) of the same name goes beside it.",
)
def main(
    domain: str | None,
    all_domains: bool,
    adapters: str,
    student: str | None,
    ego: str,
    ego_name: str,
    data_file: str | None,
    trust_remote_code: bool,
    output: str,
    **given: Any,
) -> None:
    """Measure student, adapter and EGO on what the domains held out.

    Distributions, valid answers, calibration, hand-over, speed and memory. The calibration is made
    for the measurement and not kept: half of the answers fit it, the others are measured.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from rich.console import Console

    from conch_dna.cortex.benchmark.report import domain_table
    from conch_dna.progress import Progress

    if all_domains == (domain is not None):
        raise ConchError("give either --domain NAME or --all")
    if data_file and all_domains:
        raise ConchError("--data goes with one --domain, not with --all")
    path = Path(output).expanduser()
    if path.suffix != ".json":
        raise ConchError(f"--output {output} must end in .json: the plot goes beside it")
    settings = BenchmarkSettings(**given)
    config = EgoConfig(model=ego, remote_model=ego_name, trust_remote_code=trust_remote_code)
    data = read_records(Path(data_file)) if data_file else None
    suite = CortexSuite(
        Path(adapters),
        student,
        ego=config,
        domains=[domain] if domain else None,
        trust_remote_code=trust_remote_code,
    )
    try:
        with suite, Progress() as progress:
            document = run_benchmark(
                suite, suite.domains, settings, output=path, data=data, report=progress
            )
    except KeyboardInterrupt as error:
        raise Interrupted(
            f"stopped; {path} holds the domains measured so far, if any; the same command begins "
            "anew"
        ) from error
    console = Console(highlight=False)
    for name, found in document["domains"].items():
        console.print(domain_table(name, found, width=console.width))
        for note in found["notes"]:
            console.print(note, markup=False, soft_wrap=True)
    if document["domains"]:
        click.echo(f"written: {path}, {path.with_suffix('.png')}")
    for name, reason in document["failures"].items():
        click.echo(f"error: domain {name}: {reason}", err=True)
    if document["failures"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main(prog_name="python -m conch_dna.training.benchmark")
