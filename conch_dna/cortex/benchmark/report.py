"""A benchmark's figures for people: a table of each domain, and a plot of all.

Knows the JSON that `benchmark.run_benchmark` gives; computes nothing of it anew. To show another
figure: a column in COLUMNS, or a panel in BARS.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conch_dna.cortex.benchmark.rows import ADAPTER, ROWS, STUDENT
from conch_dna.cortex.calibration.confidence import RiskCoverage, draw_curves

if TYPE_CHECKING:
    from rich.table import Table

Row = Mapping[str, Any]


def _of(part: str, name: str) -> Callable[[Row], float | None]:
    def find(row: Row) -> float | None:
        found = row.get(part)
        return None if found is None else found[name]

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


def domain_table(name: str, found: Mapping[str, Any], *, width: int | None = None) -> "Table":
    """The three rows of one domain for a rich console.

    Columns in which no row has a figure are left out, and the KL of chunks where that of tokens
    says more.

    Args:
        name: The domain's.
        found: Its part of the document.
        width: Of the console; each word of a heading gets its own line where it is narrow.
    """
    from rich import box
    from rich.table import Table

    closed = found["gap_closed"]
    said = "" if closed is None else f", {closed:.0%} of the KL to EGO taken away"
    table = Table(title=f"{name}: {found['prompts']} held-out prompts{said}", box=box.SIMPLE)
    table.add_column("", no_wrap=True)
    rows = found["rows"]
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
        document: See `benchmark.run_benchmark`; with at least one domain.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    domains = document["domains"]
    panels = {
        title: find
        for title, find in BARS.items()
        if any(find(found["rows"][row]) is not None for found in domains.values() for row in ROWS)
    }
    curves = {name: drawn for name, found in domains.items() if (drawn := _curves(found["rows"]))}
    count = len(panels) + len(curves)
    columns = min(3, count)
    lines = -(-count // columns)
    figure = Figure(figsize=(5 * columns, 3.6 * lines), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    places = list(figure.subplots(lines, columns, squeeze=False).ravel())
    for title, find in panels.items():
        _draw_bars(places.pop(0), domains, title, find)
    for name, drawn in curves.items():
        axes = places.pop(0)
        draw_curves(axes, drawn)
        axes.set_title(f"{name}: risk over coverage", fontsize="medium")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    for axes in places:
        axes.axis("off")
    student, ego = (document[name].rstrip("/").rsplit("/", 1)[-1] for name in ("student", "ego"))
    figure.suptitle(f"{student} and its adapters beside EGO, {ego}")
    figure.savefig(path, format="png")


def _curves(rows: Mapping[str, Row]) -> dict[str, RiskCoverage]:
    found = {}
    for name in (STUDENT, ADAPTER):
        if told := rows[name]["risk_coverage"]:
            found[name] = RiskCoverage(**told["raw"])
            if name == ADAPTER:
                found[f"{name}, calibrated"] = RiskCoverage(**told["calibrated"])
    return found


def _draw_bars(
    axes: Any, domains: Mapping[str, Any], title: str, find: Callable[[Row], float | None]
) -> None:
    names = list(domains)
    share = 0.8 / len(ROWS)
    for number, row in enumerate(ROWS):
        values = [find(domains[name]["rows"][row]) for name in names]
        places = [index + (number - 1) * share for index in range(len(names))]
        told = [(x, y) for x, y in zip(places, values, strict=True) if y is not None]
        if told:
            heights = [y for _, y in told]
            axes.bar([x for x, _ in told], heights, share, label=row, color=f"C{number}")
    axes.set_xticks(range(len(names)), names, fontsize="small")
    axes.set_title(title, fontsize="medium")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize="small")
    if title.startswith(ERRORS):
        # Before and after are for the same eyes.
        drawn = [
            find(found["rows"][row])
            for found in domains.values()
            for row in ROWS
            for name, find in BARS.items()
            if name.startswith(ERRORS)
        ]
        axes.set_ylim(0, 1.1 * max((value for value in drawn if value), default=1))
