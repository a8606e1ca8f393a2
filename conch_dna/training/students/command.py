"""The commands that make students: parse, call, print; they decide nothing.

They know nothing of distillation, which `conch-dna distill` does with the folder made here.
To add a way to make one: an option of `make`, or a command beside it.
"""

import os
from pathlib import Path

import click

from conch_dna.options.commands import HELP, OneLineErrors, OneLineGroup, example


@click.group(
    cls=OneLineGroup,
    context_settings=HELP,
    epilog=example("conch-dna student make MODEL models/student --layers 24 --text texts.txt"),
)
def student() -> None:
    """Make a student out of a teacher."""


@student.command(
    cls=OneLineErrors,
    context_settings=HELP,
    epilog=example(
        "conch-dna student make SmolLM2-135M-Instruct.gguf models/student --layers 24 \\",
        "  --text texts.txt",
    ),
)
@click.argument("teacher", help="Hub id, folder, .gguf file or embedded name.")
@click.argument("folder", help="The student's folder, which must not exist.")
@click.option("--layers", type=click.IntRange(min=1), required=True, help="How many layers stay.")
@click.option(
    "--text",
    "text_file",
    metavar="FILE",
    required=True,
    help="UTF-8 texts, one a line, on which the influence of layers is measured.",
)
@click.option(
    "--tokens",
    type=click.IntRange(min=16),
    default=4096,
    show_default=True,
    help="How many tokens of the texts are read.",
)
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
def make(
    teacher: str, folder: str, layers: int, text_file: str, tokens: int, trust_remote_code: bool
) -> None:
    """Leave out the layers of a model that change its hidden state least."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from conch_dna.language_model import ModelSource
    from conch_dna.screen.presentation import print_tables
    from conch_dna.screen.progress import Progress
    from conch_dna.training.data.records import read_lines
    from conch_dna.training.students.block_influence import (
        make_student,
        removals_table,
        windows_of,
    )

    texts = read_lines(Path(text_file), "--text")
    with Progress() as progress:
        source = ModelSource(teacher, trust_remote_code=trust_remote_code, report=progress)
        windows = windows_of(source.tokenizer, texts, tokens=tokens)
        made = make_student(source, Path(folder), windows, layers=layers, report=progress)
    print_tables(removals_table(made, source.model_id))
    click.echo(f"student: {folder} ({layers} of {layers + len(made)} layers)")
