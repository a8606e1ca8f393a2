"""The command of sweeps: parse, call, print; it decides nothing.

Options are those of `distill`, with several values where a setting can be swept.
To add an option: to the command, or a field of KDConfig.
"""

import os
import sys
from pathlib import Path
from typing import Any

import click

from conch_dna.errors import ConchError
from conch_dna.metrics import BETTER
from conch_dna.options.commands import command, options_of
from conch_dna.screen.presentation import pairs_table, print_tables
from conch_dna.training.cli import OF_KD_CONFIG, distill
from conch_dna.training.settings import KDConfig
from conch_dna.training.sweeps.grid import SWEEPABLE, GridRun, grid_runs, settings_text

SHARED_OPTIONS = (
    "domain",
    "teacher",
    "student",
    "data",
    "valid_data",
    "test_data",
    "data_split",
    "mapped",
    "prompts",
    "demonstrations",
    "config_file",
)
"""Options of `distill` that mean the same to a sweep."""
MOST_RUNS = 32


@command(
    "conch-dna sweep --domain thinking --temperature 1,2,4 --alpha 0.5,0.7,0.9",
    "conch-dna sweep --domain stories --teacher embedded:teacher --student embedded:student \\",
    "  --prompts openings.txt --alpha 0.5,1 --lora-rank 8,16 --test-data test.jsonl",
    headings={"What to distil": "domain", "How to run": "config_file", **OF_KD_CONFIG},
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
    domain: str | None,
    config_file: str | None,
    mapped: tuple[str, ...],
    resume: bool,
    overwrite: bool,
    max_runs: int,
    dry_run: bool,
    **given: Any,
) -> None:
    """Distil with many settings over one cache, and compare.

    Options whose value is shown with [,…] take several with commas, or a list in --config; every
    combination is a run. The best is measured once on --test-data.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from conch_dna.training.runs.request import (
        RUN_KEYS,
        given_in,
        named_models,
        settings_in,
        with_texts,
    )

    values, notes = settings_in(Path(config_file)) if config_file else ({}, [])
    values |= {name: value for name, value in given.items() if value is not None}
    values = with_texts(values)
    values |= {"domain": domain} if domain else {}
    values |= {"map": mapped} if mapped else {}
    asked = {key: values.pop(key) for key in RUN_KEYS if key in values}
    if "domain" not in asked:
        raise ConchError("give --domain NAME")
    if resume and overwrite:
        raise ConchError("give either --resume to go on or --overwrite to start again")
    name = asked["domain"]
    shared, runs = grid_runs(name, values, most=max_runs)
    from conch_dna.training.data.sources import read_given

    def note(text: str) -> None:
        click.echo(f"note: {text}", err=True)

    for text in notes:
        note(text)
    source = read_given(given_in(asked), note)

    from conch_dna.language_model import ModelSource
    from conch_dna.screen.progress import Progress
    from conch_dna.training.machines.far.teacher import teacher_source
    from conch_dna.training.runs.listing import SWEEP_FILE
    from conch_dna.training.sweeps.report import choice_text, sweep_table
    from conch_dna.training.sweeps.sweep import (
        PICTURE_FILE,
        Sweep,
        plan_sweep,
        require_batches,
    )
    from conch_dna.training.true_kd import plan_domain

    options: dict[str, Any] = {
        "trust_remote_code": shared.trust_remote_code,
        "weights": not dry_run,
    }
    name_of_teacher, name_of_student = named_models(asked)
    teacher = teacher_source(name_of_teacher, tokenizer=shared.teacher_tokenizer, **options)
    student = ModelSource(name_of_student, **options)
    longest = max((each.config for each in runs), key=lambda config: config.num_iters)
    plan = plan_domain(teacher, student, longest, name, **source)
    require_batches(plan, runs)
    planned = plan_sweep((teacher, student), runs, name, plan["workload"])
    click.echo(_plan_text(planned), err=True)
    if dry_run:
        work = Sweep(teacher, student, shared, runs, name)
        work.require_possible(**source, resume=resume, overwrite=overwrite, weights=False)
        _print_plan(plan, runs)
        return
    with Progress() as progress:
        work = Sweep(teacher, student, shared, runs, name, report=progress)
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
    text = f"{plan['runs']} runs, {plan['finished']} of them finished: {plan['steps']:,} steps left"
    if plan["seconds"] is None:
        return f"{text}; how long they take is told after the first run"
    how = "by those" if plan["finished"] else "at this machine's speed now"
    return f"{text}, about {plan['seconds'] / 60:.1f} minutes {how}" if plan["steps"] else text


def _print_plan(plan: dict[str, Any], runs: list[GridRun]) -> None:
    rows = {
        "teacher": plan["teacher"],
        "student": plan["student"],
        "data": plan["data"],
        "examples": f"{plan['examples']}, of which {plan['heldout_examples']} held out",
        **{f"run {n}": settings_text(each.settings) for n, each in enumerate(runs, 1)},
        "folder": str(Path(runs[0].config.output_dir).parent),
    }
    print_tables(pairs_table(f"{plan['domain']}: dry run, nothing was done", rows))
    for warning in plan["warnings"]:
        click.echo(f"warning: {warning}", err=True)


sweep.params[:0] = [option for option in distill.params if option.name in SHARED_OPTIONS]
