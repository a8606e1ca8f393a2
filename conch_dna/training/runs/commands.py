"""The commands that look at runs: parse, call, print; they decide nothing.

To add a command: a function here, with help, an example, a line in conch_dna/cli.py and README.md.
"""

from pathlib import Path

import click

from conch_dna.options.commands import HELP, OneLineErrors, example
from conch_dna.training.settings import KDConfig

_JSON = click.option("--json", "json_file", metavar="FILE", help="Write the figures there too.")


@click.command(
    cls=OneLineErrors,
    context_settings=HELP,
    epilog=example("conch-dna runs", "conch-dna runs models/demo --json runs.json"),
)
@click.argument(
    "folder",
    default=KDConfig.output_dir,
    help=f"Output folder of distillations. [default: {KDConfig.output_dir}]",
)
@_JSON
def runs(folder: str, json_file: str | None) -> None:
    """List the runs of an output folder: state, steps, verdict."""
    from conch_dna.checkpoints import write_json
    from conch_dna.screen.presentation import print_tables
    from conch_dna.training.runs.listing import describe_run, find_runs, runs_table

    place = Path(folder).expanduser()
    rows = [describe_run(path) for path in find_runs(place)]
    print_tables(runs_table(place, rows))
    for row in rows:
        if row["reason"]:
            click.echo(f"{row['path']} is {row['state']}: {row['reason']}", err=True)
    if json_file:
        write_json(Path(json_file), rows)


@click.command(
    cls=OneLineErrors,
    context_settings=HELP,
    epilog=example(
        "conch-dna compare models/distilled_neurons/support \\",
        "  models/distilled_neurons/runs/slow/support",
    ),
)
@click.argument(
    "folders", nargs=-1, required=True, metavar="A B …", help="Folders of two or more runs."
)
@_JSON
def compare(folders: tuple[str, ...], json_file: str | None) -> None:
    """Show what differs between runs: settings beside figures."""
    from conch_dna.checkpoints import write_json
    from conch_dna.screen.presentation import print_tables
    from conch_dna.training.runs.comparing import compare_runs, comparison_tables
    from conch_dna.training.runs.listing import describe_run, find_run

    paths = [find_run(Path(folder).expanduser()) for folder in folders]
    compared = compare_runs([describe_run(path) for path in paths])
    if tables := comparison_tables(compared):
        for number, path in enumerate(compared["runs"], 1):
            click.echo(f"run {number}: {path}")
        print_tables(*tables)
    else:
        click.echo("neither settings nor figures differ")
    for warning in compared["warnings"]:
        click.echo(f"warning: {warning}", err=True)
    if json_file:
        write_json(Path(json_file), compared)
