"""Puts the groups of commands together, nothing else.

It knows names; what a command does stands in the cli.py of its part.
To add a command: a line here, and one in README.md.
"""

import click

from conch_dna import __version__
from conch_dna.command_parts import HELP, OneLineGroup, example, passed_on
from conch_dna.cortex.cli import cortex
from conch_dna.generations.cli import generations
from conch_dna.sedimentation.cli import sediment
from conch_dna.training.cli import distill, vocab


@click.group(
    cls=OneLineGroup,
    context_settings=HELP,
    epilog=example("conch-dna distill --domain thinking"),
)
@click.version_option(__version__, prog_name="conch_dna")
def main() -> None:
    """Distil what big language models know into small ones, with MLX."""


for command in (distill, vocab, cortex, generations, sediment):
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
