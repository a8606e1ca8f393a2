"""The command that writes a page over finished runs: parse, call, print.

Knows options and lines; the page stands in html_report.py. To add an option: here, with help.
"""

from pathlib import Path

import click

from conch_dna.options.commands import command


@command(
    "conch-dna report models/distilled_neurons/thinking",
    "conch-dna report runs/a runs/b --output both.html",
)
@click.argument(
    "folders",
    metavar="FOLDER…",
    nargs=-1,
    required=True,
    help="Folders of domains, of their adapters, or of several domains.",
)
@click.option(
    "--output",
    metavar="FILE",
    help="Write the page there; a page that is there is replaced. [default: report.html in the "
    "first FOLDER, or beside it if it is an adapter's]",
)
def report(folders: tuple[str, ...], output: str | None) -> None:
    """Write one HTML page over finished runs: verdicts, curves, where they fail, samples."""
    from rich.console import Console

    from conch_dna.metrics import BETTER
    from conch_dna.training.runs.html_report import (
        default_output,
        headline,
        sets_of,
        write_report,
    )

    paths = [Path(folder).expanduser() for folder in folders]
    path = Path(output).expanduser() if output else default_output(paths[0])
    runs = write_report(paths, path)
    console = Console(highlight=False)
    for run in runs:
        if run.unfinished:
            click.echo(f"warning: {run.unfinished}", err=True)
        for title, judged in sets_of(run).items():
            word, sentence = headline(judged)
            console.print(
                f"{run.folder}: {title}: {sentence}",
                style=None if word == BETTER else "bold red",
                soft_wrap=True,
                markup=False,
            )
    console.print(f"written: {path}", soft_wrap=True, markup=False)
