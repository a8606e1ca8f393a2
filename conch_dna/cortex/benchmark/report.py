"""A benchmark's figures for people: a table of each domain, and a plot of all.

Knows the JSON that `command.run_benchmark` gives; computes nothing of it anew. To show another
figure: a column in COLUMNS, or a panel in BARS.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conch_dna.cortex.benchmark.rows import ADAPTER, ROWS, STUDENT
from conch_dna.cortex.calibration.risk_coverage import RiskCoverage, draw_curves

if TYPE_CHECKING:
    from rich.table import Table

Row = Mapping[str, Any]


def _of(part: str, name: str) -> Callable[[Row], float | None]:
    def find(row: Row) -> float | None:
        figures = row.get(part)
        return None if figures is None else figures[name]

    return find


def _mebibytes(row: Row) -> float | None:
    return None if row["peak_bytes"] is None else row["peak_bytes"] / 2**20


# Heading, how a figure is found, and how it is written.
COLUMNS: tuple[tuple[str, Callable[[Row], float | None], str], ...] = (
    ("KL nats", _of("heldout", "kl_nats"), ".3f"),
    ("chunk KL", _of("heldout", "chunk_kl_nats"), ".3f"),
    ("top-1 agree", _of("heldout", "top1_agreement"), ".1%"),
    ("valid JSON", lambda row: row["valid_share"], ".0%"),
    ("ECE raw", _of("calibration", "ece_before"), ".3f"),
    ("ECE calib.", _of("calibration", "ece_after"), ".3f"),
    ("to EGO", lambda row: row.get("hand_over_share"), ".0%"),
    ("tokens a s", lambda row: row["tokens_per_second"], ",.0f"),
    ("first ms", lambda row: 1000 * row["first_token_s"], ".1f"),
    ("peak MiB", _mebibytes, ",.0f"),
)
ERRORS = "calibration error"
BARS: dict[str, Callable[[Row], float | None]] = {
    "held-out KL to EGO, nats": _of("heldout", "kl_nats"),
    "held-out top-1 agreement with EGO": _of("heldout", "top1_agreement"),
    "valid JSON": lambda row: row["valid_share"],
    f"{ERRORS}, raw": _of("calibration", "ece_before"),
    f"{ERRORS}, calibrated": _of("calibration", "ece_after"),
    "handed over to EGO": lambda row: row.get("hand_over_share"),
    "tokens a second": lambda row: row["tokens_per_second"],
}


def domain_table(name: str, figures: Mapping[str, Any], *, width: int | None = None) -> "Table":
    """The three rows of one domain for a rich console.

    Columns in which no row has a figure are left out, and the KL of chunks where that of tokens
    says more.

    Args:
        name: The domain's.
        figures: Its part of the document.
        width: Of the console; each word of a heading gets its own line where it is narrow.
    """
    from rich import box
    from rich.table import Table

    gap = figures["gap_closed"]
    closed = "" if gap is None else f", {gap:.0%} of the KL to EGO taken away"
    table = Table(title=f"{name}: {figures['prompts']} held-out prompts{closed}", box=box.SIMPLE)
    table.add_column("", no_wrap=True)
    rows = figures["rows"]
    columns: list[tuple[str, list[str]]] = []
    for heading, find, form in COLUMNS:
        values = [find(rows[row]) for row in ROWS]
        if heading == "chunk KL" and columns and columns[0][0] == "KL nats":
            continue
        if any(value is not None for value in values):
            columns.append((heading, ["–" if v is None else f"{v:{form}}" for v in values]))
    whole = 10 + sum(2 + max(map(len, (heading, *cells))) for heading, cells in columns)
    for heading, cells in columns:
        narrow = max(map(len, (*heading.split(), *cells)))
        fits = width is None or whole <= width
        table.add_column(heading, justify="right", width=None if fits else narrow)
    for index, row in enumerate(ROWS):
        table.add_row(row, *(cells[index] for _, cells in columns))
    return table


def draw_benchmark(path: Path, *, document: Mapping[str, Any]) -> None:
    """Draw bars of the figures, and each domain's risk-coverage curves, into a PNG.

    Args:
        path: The file to write.
        document: What `run_benchmark` gives, with at least one domain.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows_of = {name: figures["rows"] for name, figures in document["domains"].items()}
    panels = {title: find for title, find in BARS.items() if _values(rows_of, find)}
    curves = {name: lines for name, rows in rows_of.items() if (lines := _curves(rows))}
    count = len(panels) + len(curves)
    columns = min(3, count)
    height = -(-count // columns)
    figure = Figure(figsize=(5 * columns, 3.6 * height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    places = list(figure.subplots(height, columns, squeeze=False).ravel())
    for title, find in panels.items():
        _draw_bars(places.pop(0), rows_of, title, find)
    for name, lines in curves.items():
        axes = places.pop(0)
        draw_curves(axes, lines)
        axes.set_title(f"{name}: risk over coverage", fontsize="medium")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    for axes in places:
        axes.axis("off")
    student, ego = (document[name].rstrip("/").rsplit("/", 1)[-1] for name in ("student", "ego"))
    figure.suptitle(f"{student} and its adapters beside EGO, {ego}")
    figure.savefig(path, format="png")


def _values(
    rows_of: Mapping[str, Mapping[str, Row]], find: Callable[[Row], float | None]
) -> list[float]:
    """A figure of every row of every domain that has it."""
    values = [find(rows[row]) for rows in rows_of.values() for row in ROWS]
    return [value for value in values if value is not None]


def _curves(rows: Mapping[str, Row]) -> dict[str, RiskCoverage]:
    curves = {}
    for name in (STUDENT, ADAPTER):
        if recorded := rows[name]["risk_coverage"]:
            curves[name] = RiskCoverage(**recorded["raw"])
            if name == ADAPTER:
                curves[f"{name}, calibrated"] = RiskCoverage(**recorded["calibrated"])
    return curves


def _draw_bars(
    axes: Any,
    rows_of: Mapping[str, Mapping[str, Row]],
    title: str,
    find: Callable[[Row], float | None],
) -> None:
    share = 0.8 / len(ROWS)
    for number, row in enumerate(ROWS):
        values = [find(rows[row]) for rows in rows_of.values()]
        bars = [
            (index + (number - 1) * share, value)
            for index, value in enumerate(values)
            if value is not None
        ]
        if bars:
            places, heights = zip(*bars, strict=True)
            axes.bar(places, heights, share, label=row, color=f"C{number}")
    axes.set_xticks(range(len(rows_of)), list(rows_of), fontsize="small")
    axes.set_title(title, fontsize="medium")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize="small")
    if title.startswith(ERRORS):
        # Before and after are for the same eyes.
        errors = [
            value
            for name, of_row in BARS.items()
            if name.startswith(ERRORS)
            for value in _values(rows_of, of_row)
        ]
        axes.set_ylim(0, 1.1 * (max(errors, default=1) or 1))
