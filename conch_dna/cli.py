"""Puts the groups of commands together, nothing else.

It knows names; what a command does stands in the cli.py of its part.
To add a command: a line here, and one in README.md or docs/.
"""

import importlib
from importlib.metadata import version

import click

from conch_dna import __version__
from conch_dna.cortex.cli import cortex
from conch_dna.ego.teaching.command import teach
from conch_dna.errors import ConchError
from conch_dna.exporting.command import export, fuse, import_, merge
from conch_dna.generations.cli import generations
from conch_dna.loading.blas import blas_state
from conch_dna.options.commands import HELP, OneLineGroup, example, passed_on
from conch_dna.sedimentation.cli import sediment
from conch_dna.training.cli import distill, vocab
from conch_dna.training.data.target_command import targets
from conch_dna.training.machines.ranks.start import several_problem
from conch_dna.training.runs.commands import compare, runs
from conch_dna.training.runs.report_command import report
from conch_dna.training.students.command import student
from conch_dna.training.sweeps.command import sweep


def _print_version(context: click.Context, _parameter: click.Parameter, asked: bool) -> None:
    """Print what decides this program's numbers here."""
    if not asked:
        return
    try:
        importlib.import_module("mlx.core")  # which loads the BLAS
    except ConchError as error:
        click.echo(f"error: {error}", err=True)
        context.exit(2)
    versions = f"conch_dna {__version__}, mlx {version('mlx')}"
    click.echo(f"{versions}, BLAS: {blas_state()}")
    context.exit()


@click.group(
    cls=OneLineGroup,
    context_settings=HELP,
    epilog=example("conch-dna distill --domain thinking"),
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the versions of this package and of mlx, and the BLAS in use, and stop.",
)
@click.pass_context
def main(context: click.Context) -> None:
    """Distil what big language models know into small ones, with MLX."""
    if context.invoked_subcommand and (why := several_problem(context.invoked_subcommand)):
        raise click.UsageError(why)


for command in (
    distill,
    sweep,
    runs,
    compare,
    report,
    vocab,
    targets,
    student,
    fuse,
    export,
    merge,
    import_,
    teach,
    cortex,
    generations,
    sediment,
):
    main.add_command(command)


@passed_on(
    main,
    "conch_dna.training.benchmark",
    "conch-dna benchmark --domain thinking --ego mlx-community/Qwen2.5-7B-Instruct-4bit",
)
def benchmark(arguments: tuple[str, ...]) -> None:
    """Measure student, adapters and EGO on held-out data; --help shows its options."""
    from conch_dna.cortex.benchmark.command import main as run

    run.main(list(arguments), prog_name="conch-dna benchmark", standalone_mode=False)
