"""What people look at: tables for a terminal, plots as PNG, a report's files.

Knows figures and texts, rich and matplotlib; nothing of what the figures mean. To show another
kind of table: a function here that gives rich's.
"""

import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from conch_dna.checkpoints import write_atomically, write_json
from conch_dna.errors import ConchError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

# Letters in a line of a table that nobody's screen bounds.
WIDEST = 500


def bytes_text(count: float | None, unknown: str = "not known") -> str:
    """Bytes as GB or MB, or a word where they are not known."""
    if count is None:
        return unknown
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def text_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    numbers: Sequence[str] = (),
    show_header: bool = True,
) -> "Table":
    """A table whose cells are shown as they are, without rich's markup.

    Args:
        title: Stands above it.
        columns: Their names.
        rows: A cell for each column.
        numbers: Columns that are set to the right and never broken.
        show_header: Whether the columns' names are shown.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), show_header=show_header)
    for name in columns:
        if name in numbers:
            table.add_column(Text(name), justify="right", no_wrap=True)
        else:
            # Folded, since a folder or digest that ends in an ellipsis is of no use.
            table.add_column(Text(name), overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    return table


def pairs_table(title: str, figures: Mapping[str, object]) -> "Table":
    """A table of names and their values, one a line, without headings."""
    return text_table(title, ("figure", "value"), figures.items(), show_header=False)


def add_figures(
    table: "Table",
    labels: Sequence[str],
    columns: Mapping[str, tuple[str, Sequence[float | None]]],
    *,
    width: int | None = None,
) -> None:
    """Fill a table with numbers, under headings that break between words where it is narrow.

    Args:
        table: An empty one.
        labels: Of its rows.
        columns: By heading the format of the numbers, and one for each row; None is shown as –.
        width: Of the console, in letters: where headings in one line do not fit, each word gets
            its own.
    """
    cells = {
        heading: ["–" if value is None else f"{value:{form}}" for value in values]
        for heading, (form, values) in columns.items()
    }
    lengths = [max(map(len, (heading, *column))) for heading, column in cells.items()]
    whole = 1 + sum(length + 3 for length in (max(map(len, labels)), *lengths))
    fits = width is None or whole <= width
    table.add_column("", no_wrap=True)
    for heading, column in cells.items():
        # Rich itself would shrink the widest columns, whatever words stand in them, and cut off
        # what then still does not fit.
        longest = max(map(len, (*heading.split(), *column)))
        table.add_column(
            heading, justify="right", min_width=longest, width=None if fits else longest
        )
    for row in zip(labels, *cells.values(), strict=True):
        table.add_row(*row)


def print_tables(*tables: Any) -> None:
    """Show tables on standard output; in a pipe as wide as they are, so that no word is broken."""
    from rich.console import Console
    from rich.measure import measure_renderables

    console = Console(highlight=False)
    if tables and not console.is_terminal and "COLUMNS" not in os.environ:
        endless = console.options.update(max_width=WIDEST)
        widest = measure_renderables(console, endless, list(tables)).maximum
        console = Console(highlight=False, width=max(console.width, widest))
    for table in tables:
        console.print(table)


@contextmanager
def drawing(
    path: Path | IO[str], size: tuple[float, float], *, dpi: int = 120, form: str | None = "png"
) -> Iterator["Figure"]:
    """A new figure, written to a file at the end.

    It needs no screen, and nothing of it stays in matplotlib's list of open figures.

    Args:
        path: The file to write, or an open one.
        size: Width and height in inches.
        dpi: Dots per inch.
        form: Of the file; where None, the path's ending decides.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    yield figure
    figure.savefig(path, format=form)


# Stands for the colour of the text around a picture, which a page in the dark has another one of.
_INK = "#010203"


def svg_text(size: tuple[float, float], draw: Callable[["Figure"], None]) -> str:
    """A picture as an SVG element of an HTML page, in the colours of the text around it.

    It has no background, refers to nothing outside of itself, and its texts are texts.

    Args:
        size: Width and height in inches.
        draw: Draws into a new figure.
    """
    from matplotlib import rc_context

    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    clear = {"axes.facecolor": "none", "figure.facecolor": "none", "legend.frameon": False}
    # With a salt of its own the same picture gets the same names of its parts.
    plain = {"svg.fonttype": "none", "svg.hashsalt": "conch_dna", "text.parse_math": False}
    file = io.StringIO()
    with (
        rc_context({**dict.fromkeys(inked, _INK), **clear, **plain}),
        drawing(file, size, form="svg") as figure,
    ):
        draw(figure)
    svg = file.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (xmlns(:\w+)?="[^"]*"|id="\w+_\d+")', "", svg[svg.index("<svg") :])
    return svg.replace(_INK, "currentColor")


def report_path(output: str | Path) -> Path:
    """Where a report's JSON goes; its plot and table have the same name but for the ending.

    Args:
        output: What `--output` was given.

    Raises:
        ConchError: It does not end in .json.
    """
    path = Path(output).expanduser()
    if path.suffix != ".json":
        raise ConchError(f"--output {output} must end in .json: what shows it goes beside it")
    return path


def write_report(
    path: Path, document: Any, beside: Mapping[str, str | Callable[[Path], None]]
) -> None:
    """Write a report's JSON, and what shows it beside it, each file whole or not at all.

    Args:
        path: Of the JSON; see `report_path`.
        document: What the JSON holds.
        beside: By ending, such as .md, a text or a function that writes the file it is given.
    """
    write_json(path, document)
    for suffix, content in beside.items():
        write_atomically(path.with_suffix(suffix), content)
