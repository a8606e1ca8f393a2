"""The commands of a teacher's targets: parse, call, print; they decide nothing.

To add a command: a function here, with help and an example, and a line in README.md or docs/.
"""

import sys
from pathlib import Path

import click

from conch_dna.options.commands import (
    HELP,
    OneLineErrors,
    OneLineGroup,
    example,
    json_option,
    passed_on,
    write_figures,
)
from conch_dna.training.settings import KDConfig

_FOLDER = click.argument(
    "folder",
    default=KDConfig.output_dir,
    help=f"Folder in which soft_targets lie, at any depth. [default: {KDConfig.output_dir}]",
)


@click.group(
    cls=OneLineGroup,
    context_settings=HELP,
    epilog=example("conch-dna targets info models/distilled_neurons/thinking"),
)
def targets() -> None:
    """Look at a teacher's targets, or make them for another machine."""


@targets.command(
    cls=OneLineErrors, context_settings=HELP, epilog=example("conch-dna targets info models/demo")
)
@_FOLDER
@json_option
def info(folder: str, json_file: str | None) -> None:
    """Show whose targets lie in a folder, of how many tokens, in how many bytes."""
    from conch_dna.screen.presentation import print_tables
    from conch_dna.training.data.target_files import (
        describe_targets,
        target_folders,
        targets_table,
    )

    rows = [describe_targets(found) for found in target_folders(Path(folder).expanduser())]
    print_tables(targets_table(rows))
    for row in rows:
        for name in row["unreadable"]:
            click.echo(f"warning: {row['folder']}/{name} cannot be read", err=True)
    write_figures(json_file, rows)


@targets.command(
    cls=OneLineErrors,
    context_settings=HELP,
    epilog=example("conch-dna targets verify models/demo"),
)
@_FOLDER
def verify(folder: str) -> None:
    """Read every target in a folder, and what lies beside them; exit 1 if something is damaged."""
    from conch_dna.training.data.target_files import (
        check_beside,
        check_shards,
        checked_text,
        target_folders,
    )

    whole = damaged = 0
    places = target_folders(Path(folder).expanduser())
    for wrong in check_beside(places):
        damaged += 1
        click.echo(wrong, err=True)
    for place in places:
        for _, problem in check_shards(place):
            whole, damaged = whole + (problem is None), damaged + (problem is not None)
            if problem:
                click.echo(problem, err=True)
    click.echo(checked_text(whole, damaged))
    if damaged:
        sys.exit(1)


@passed_on(
    targets,
    "conch_dna.training.true_kd",
    "conch-dna targets make --domain thinking --student HuggingFaceTB/SmolLM2-360M-Instruct",
)
def make(arguments: tuple[str, ...]) -> None:
    """Make a teacher's answers and targets and no adapter, as distill --targets-only does."""
    from conch_dna.training.cli import distill

    distill.main(
        [*arguments, "--targets-only"], prog_name="conch-dna targets make", standalone_mode=False
    )
