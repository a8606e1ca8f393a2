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
        "conch-dna student make SmolLM2-135M-Instruct.gguf models/student --size 0.8 \\",
        "  --text texts.txt",
    ),
)
@click.argument("teacher", help="Hub id, folder, .gguf file or embedded name.")
@click.argument("folder", help="The student's folder, which must not exist.")
@click.option("--layers", type=click.IntRange(min=1), help="How many layers stay.")
@click.option(
    "--size",
    type=float,
    metavar="SHARE",
    help="Instead: share of the teacher's weights, in bytes, that stays at most, such as 0.6.",
)
@click.option(
    "--budget-mb",
    type=float,
    metavar="MB",
    help="Instead: megabytes (10^6 bytes) that the student's weights take at most.",
)
@click.option(
    "--mlp",
    type=float,
    metavar="SHARE",
    help="Share of each MLP's neurons that stays, such as 0.75. [default: all]",
)
@click.option(
    "--text",
    "text_file",
    metavar="FILE",
    required=True,
    help="UTF-8 texts, one a line, on which layers and neurons are measured.",
)
@click.option(
    "--tokens",
    type=click.IntRange(min=16),
    default=4096,
    show_default=True,
    help="How many tokens of the texts are read; by the last quarter the curve is measured.",
)
@click.option("--curve-only", is_flag=True, help="Print size and quality, and write nothing.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
def make(
    teacher: str,
    folder: str,
    layers: int | None,
    size: float | None,
    budget_mb: float | None,
    mlp: float | None,
    text_file: str,
    tokens: int,
    curve_only: bool,
    trust_remote_code: bool,
) -> None:
    """Leave out the parts of a model that change least what it says.

    Layers go, the least influential first, until what stays is as small as --layers, --size or
    --budget-mb says; then, with --mlp, neurons.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from conch_dna.language_model import ModelSource
    from conch_dna.screen.presentation import print_tables
    from conch_dna.screen.progress import Progress
    from conch_dna.training.data.records import read_lines
    from conch_dna.training.students.block_influence import (
        cut_to,
        removals_table,
        windows_of,
        write_student,
    )
    from conch_dna.training.students.curve import curve_table
    from conch_dna.training.students.sizes import Goal
    from conch_dna.training.students.student_folder import require_free

    goal = Goal(layers=layers, size=size, budget_mb=budget_mb)
    if not curve_only:
        require_free(Path(folder))
    texts = read_lines(Path(text_file), "--text")
    with Progress() as progress:
        source = ModelSource(teacher, trust_remote_code=trust_remote_code, report=progress)
        windows = windows_of(source.tokenizer, texts, tokens=tokens)
        model = source.load()
        cut = cut_to(model, windows, goal, mlp=mlp, report=progress)
    if cut.removals:
        print_tables(removals_table(cut.removals, source.model_id))
    print_tables(curve_table(cut.curve, source.model_id, tokens=sum(map(len, cut.apart))))
    if cut.width:
        click.echo(
            f"MLPs: {cut.width.neurons} of {cut.width.of} neurons stay, a multiple of "
            f"{cut.width.multiple}"
        )
    if curve_only:
        return
    write_student(model, Path(folder), cut)
    made = cut.curve[-1]
    click.echo(
        f"student: {folder} ({made.layers} of {cut.curve[0].layers} layers, "
        f"{made.weight_bytes / 1e6:.1f} MB)"
    )
