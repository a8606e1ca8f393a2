"""A benchmark's figures for people: a table of each domain, and a plot of all.

Knows the JSON that `command.run_benchmark` gives; computes nothing of it anew. To show another
figure: an entry in FIGURES.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from conch_dna.cortex.benchmark.rows import ADAPTER, ROWS, STUDENT
from conch_dna.cortex.calibration.risk_coverage import RiskCoverage, draw_curves
from conch_dna.screen.presentation import add_figures, drawing

if TYPE_CHECKING:
    from rich.table import Table

Row = Mapping[str, Any]
Rows = Mapping[str, Row]


class Figure(NamedTuple):
    """A figure of a row, and how it is shown.

    Attributes:
        heading: Of its column in the table.
        place: Its keys in the row, a dot between them.
        form: How the table writes it.
        title: Of its bars in the plot; without one there are none.
        scale: What the row's number is multiplied by.
    """

    heading: str
    place: str
    form: str
    title: str = ""
    scale: float = 1

    def of(self, row: Row) -> float | None:
        """The figure of a row; None where it has none."""
        value: Any = row
        for key in self.place.split("."):
            value = None if value is None else value.get(key)
        return None if value is None else self.scale * value


ERRORS = "calibration error"
CALIBRATED = f"{ADAPTER}, calibrated"
# The bars of each row and its curves have the same colour.
STYLES = {STUDENT: "C0", ADAPTER: "C1", CALIBRATED: "C1--"}
FIGURES = (
    Figure("KL nats", "heldout.kl_nats", ".3f", "held-out KL to EGO, nats"),
    Figure("chunk KL", "heldout.chunk_kl_nats", ".3f"),
    Figure("top-1 agree", "heldout.top1_agreement", ".1%", "held-out top-1 agreement with EGO"),
    Figure("valid JSON", "valid_share", ".0%", "valid JSON"),
    Figure("ECE raw", "calibration.ece_before", ".3f", f"{ERRORS}, raw"),
    Figure("ECE calib.", "calibration.ece_after", ".3f", f"{ERRORS}, calibrated"),
    Figure("to EGO", "hand_over_share", ".0%", "handed over to EGO"),
    Figure("tokens a s", "tokens_per_second", ",.0f", "tokens a second"),
    Figure("first ms", "first_token_s", ".1f", scale=1000),
    Figure("peak MiB", "peak_bytes", ",.0f", scale=2**-20),
)


def domain_table(name: str, document: Mapping[str, Any]) -> "Table":
    """The three rows of one domain for a rich console.

    Columns in which no row has a figure are left out, and the KL of chunks where that of tokens
    says more.

    Args:
        name: The domain's.
        document: Its part of the benchmark's document.
    """
    from rich import box
    from rich.table import Table

    gap, rows = document["gap_closed"], document["rows"]
    closed = "" if gap is None else f", {gap:.0%} of the KL to EGO taken away"
    title = f"{name}: {document['prompts']} held-out prompts{closed}"
    table = Table(title=title, box=box.SIMPLE)
    figures = [each for each in FIGURES if any(each.of(rows[row]) is not None for row in ROWS)]
    if figures[0].heading == "KL nats":
        figures = [each for each in figures if each.heading != "chunk KL"]
    columns = {each.heading: (each.form, [each.of(rows[row]) for row in ROWS]) for each in figures}
    add_figures(table, ROWS, columns)
    return table


def draw_benchmark(path: Path, document: Mapping[str, Any]) -> None:
    """Draw bars of the figures, and each domain's risk-coverage curves, into a PNG.

    Args:
        path: The file to write.
        document: What `run_benchmark` gives, with at least one domain.
    """
    from matplotlib.lines import Line2D

    rows_of = {name: figures["rows"] for name, figures in document["domains"].items()}
    panels = [each for each in FIGURES if each.title and _values(rows_of, each)]
    curves = {name: lines for name, rows in rows_of.items() if (lines := _curves(rows))}
    count = len(panels) + len(curves)
    columns = min(3, count)
    height = -(-count // columns)
    with drawing(path, (5 * columns, 3.6 * height), dpi=110) as figure:
        places = list(figure.subplots(height, columns, squeeze=False).ravel())
        for each in panels:
            _draw_bars(places.pop(0), rows_of, each)
        for name, lines in curves.items():
            axes = places.pop(0)
            draw_curves(axes, lines, STYLES)
            areas = "; ".join(f"{each} {curve.area:.3f}" for each, curve in lines.items())
            axes.set_title(f"{name}: risk over coverage\narea: {areas}", fontsize="small")
            axes.grid(alpha=0.3)
        for axes in places:
            axes.axis("off")
        # One for all, below them: within a panel it would cover bars and curves.
        handles = [Line2D([], [], color=f"C{i}", lw=6, label=row) for i, row in enumerate(ROWS)]
        if curves:
            handles.append(Line2D([], [], color="C1", ls="--", label=f"{CALIBRATED} (curves)"))
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
        student, ego = (document[key].rstrip("/").rsplit("/", 1)[-1] for key in ("student", "ego"))
        figure.suptitle(f"{student} and its adapters beside EGO, {ego}")


def _values(rows_of: Mapping[str, Rows], figure: Figure) -> list[float]:
    """A figure of every row of every domain that has it."""
    values = [figure.of(rows[row]) for rows in rows_of.values() for row in ROWS]
    return [value for value in values if value is not None]


def _curves(rows: Rows) -> dict[str, RiskCoverage]:
    curves = {}
    for name in (STUDENT, ADAPTER):
        if recorded := rows[name]["risk_coverage"]:
            curves[name] = RiskCoverage(**recorded["raw"])
            if name == ADAPTER:
                curves[CALIBRATED] = RiskCoverage(**recorded["calibrated"])
    return curves


def _draw_bars(axes: Any, rows_of: Mapping[str, Rows], figure: Figure) -> None:
    share = 0.8 / len(ROWS)
    for number, row in enumerate(ROWS):
        values = [figure.of(rows[row]) for rows in rows_of.values()]
        bars = [
            (index + (number - 1) * share, value)
            for index, value in enumerate(values)
            if value is not None
        ]
        if bars:
            places, heights = zip(*bars, strict=True)
            axes.bar(places, heights, share, color=f"C{number}")
    axes.set_xticks(range(len(rows_of)), list(rows_of), fontsize="small")
    axes.set_title(figure.title, fontsize="medium")
    axes.grid(axis="y", alpha=0.3)
    if figure.title.startswith(ERRORS):
        # Before and after are for the same eyes.
        both = [each for each in FIGURES if each.title.startswith(ERRORS)]
        highest = max(value for each in both for value in _values(rows_of, each))
        axes.set_ylim(0, 1.1 * (highest or 1))
