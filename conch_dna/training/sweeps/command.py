"""The command of sweeps: parse, call, print; it decides nothing.

Options are those of `distill`, with several values where a setting can be swept.
To add an option: to the command, or a field of KDConfig.
"""

import os
import sys
from pathlib import Path
from typing import Any

import click

from conch_dna.command_parts import HELP, OneLineErrors, example, options_of, read_yaml
from conch_dna.errors import ConchError
from conch_dna.metrics import BETTER
from conch_dna.option_fields import named_settings
from conch_dna.presentation import pairs_table, print_tables
from conch_dna.training.settings import DEFAULT_STUDENT, DEFAULT_TEACHER, KDConfig
from conch_dna.training.sweeps.grid import SWEEPABLE, grid_runs, settings_text

RUN_KEYS = ("domain", "teacher", "student", "data", "prompts", "test_data")
MOST_RUNS = 32


@click.command(
    cls=OneLineErrors,
    context_settings=HELP,
    epilog=example(
        "conch-dna sweep --domain thinking --temperature 1,2,4 --alpha 0.5,0.7,0.9",
        "conch-dna sweep --domain stories --teacher embedded:teacher --student embedded:student \\",
        "  --prompts openings.txt --alpha 0.5,1 --lora-rank 8,16 --test-data test.jsonl",
    ),
)
@click.option("--domain", metavar="NAME", help="What to distil, as in distill.")
@click.option(
    "--teacher",
    metavar="MODEL",
    help=f"Hub id, folder, or embedded:teacher. [default: {DEFAULT_TEACHER}]",
)
@click.option(
    "--student",
    metavar="MODEL",
    help=f"Hub id, folder, or embedded:student. [default: {DEFAULT_STUDENT}]",
)
@click.option("--data", metavar="FILE", help="JSONL to train on, instead of the teacher's answers.")
@click.option(
    "--prompts", metavar="FILE", help="Prompts for the teacher to answer, one a line or JSONL."
)
@click.option(
    "--test-data",
    metavar="FILE",
    help="JSONL on which the best run is measured once, when it is chosen.",
)
@click.option(
    "--config",
    "config_file",
    metavar="FILE",
    help="YAML with any of these options, lists for several values; the command line wins.",
)
@click.option("--resume", is_flag=True, help="Go on with a stopped sweep, or add runs to one.")
@click.option("--overwrite", is_flag=True, help="Train every run of an earlier sweep again.")
@click.option(
    "--max-runs",
    type=click.IntRange(1),
    default=MOST_RUNS,
    show_default=True,
    help="Refuse a sweep of more runs.",
)
@click.option("--dry-run", is_flag=True, help="Show which runs there would be, and do nothing.")
@options_of(
    KDConfig,
    names={"num_iters": ("--num-iters", "--iters"), "learning_rate": ("--learning-rate", "--lr")},
    several=SWEEPABLE,
)
def sweep(
    config_file: str | None,
    resume: bool,
    overwrite: bool,
    max_runs: int,
    dry_run: bool,
    **given: Any,
) -> None:
    """Distil with many settings over one cache, and compare.

    Options whose value is shown with [,…] take several with commas; every combination is a run.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    values = {name: value for name, value in given.items() if value is not None}
    if config_file:
        known = [*RUN_KEYS, *KDConfig.__dataclass_fields__]
        aliases = {"iters": "num_iters", "lr": "learning_rate"}
        in_file = named_settings(
            read_yaml(Path(config_file)), known, source=config_file, aliases=aliases
        )
        values = in_file | values
    named = {key: values.pop(key) for key in RUN_KEYS if key in values}
    if wrong := [f"{k} is {v!r}: it must be text" for k, v in named.items() if type(v) is not str]:
        raise ConchError(f"{config_file}: {'; '.join(wrong)}")
    if "domain" not in named:
        raise ConchError("give --domain NAME")
    if resume and overwrite:
        raise ConchError("give either --resume to go on or --overwrite to start again")
    if "data" in named and "prompts" in named:
        raise ConchError("give either --data or --prompts: with data the teacher answers nothing")
    shared, runs = grid_runs(named["domain"], values, most=max_runs)
    source = _read_source(named)

    from conch_dna.language_model import ModelSource
    from conch_dna.progress import Progress
    from conch_dna.training.adapters import require_trainable
    from conch_dna.training.sweeps.report import choice_text, sweep_table
    from conch_dna.training.sweeps.sweep import PICTURE_FILE, SWEEP_FILE, Sweep, plan_sweep
    from conch_dna.training.true_kd import plan_domain

    plan = plan_sweep(runs, named["domain"])
    click.echo(_plan_text(plan), err=True)
    teacher, student = (
        ModelSource(
            named.get(role, default),
            trust_remote_code=shared.trust_remote_code,
            weights=not dry_run,
        )
        for role, default in (("teacher", DEFAULT_TEACHER), ("student", DEFAULT_STUDENT))
    )
    if dry_run:
        most = max((each.config for each in runs), key=lambda config: config.num_iters)
        for each in runs:
            require_trainable(student, each.config)
        source.pop("test", None)
        domain = plan_domain(teacher, student, most, named["domain"], **source)
        rows = {
            "teacher": domain["teacher"],
            "student": domain["student"],
            "data": domain["data"],
            "examples": f"{domain['examples']}, of which {domain['heldout_examples']} held out",
            **{
                f"run {number}": settings_text(each.settings) for number, each in enumerate(runs, 1)
            },
            "folder": str(Path(shared.output_dir).parent),
        }
        print_tables(pairs_table(f"{named['domain']}: dry run, nothing was done", rows))
        for warning in domain["warnings"]:
            click.echo(f"warning: {warning}", err=True)
        return
    with Progress() as progress:
        work = Sweep(teacher, student, shared, runs, named["domain"], report=progress)
        document = work.run(**source, resume=resume, overwrite=overwrite)
    print_tables(sweep_table(document))
    gained = document["runs"][0]["verdict"]["verdict"] == BETTER
    for line in choice_text(document):
        click.secho(line, fg=None if gained else "red", bold=not gained)
    click.echo(f"adapter: {document['runs'][0]['adapter']}")
    click.echo(f"written: {work.folder / SWEEP_FILE}, {work.folder / PICTURE_FILE}")
    for name, reason in document["failures"].items():
        click.echo(f"error: run {name}: {reason}", err=True)
    if document["failures"]:
        sys.exit(1)


def _plan_text(plan: dict[str, Any]) -> str:
    left = plan["runs"] - plan["finished"]
    text = f"{plan['runs']} runs, {plan['finished']} of them finished: {plan['steps']:,} steps left"
    if plan["seconds"] is None:
        return f"{text}; how long they take is told after the first run"
    return f"{text}, about {plan['seconds'] / 60:.1f} minutes" if left else text


def _read_source(named: dict[str, str]) -> dict[str, Any]:
    from conch_dna.training.data.records import read_prompts, read_records

    source: dict[str, Any] = {}
    if "data" in named:
        source["data"] = read_records(Path(named["data"]))
    if "prompts" in named:
        source["prompts"] = read_prompts(Path(named["prompts"]))
    if "test_data" in named:
        source["test"] = read_records(Path(named["test_data"]))
    return source
