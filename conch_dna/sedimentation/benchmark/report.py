"""A benchmark's rows for people: a table on screen, one in Markdown, a plot.

Knows the JSON that `rows.Benchmark.document` gives; computes nothing of it anew. To show
another figure: a column in COLUMNS.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conch_dna.screen.presentation import drawing, text_table
from conch_dna.sedimentation.benchmark.rows import CONTROL, TEACHER

if TYPE_CHECKING:
    from rich.table import Table

Document = Mapping[str, Any]
# Stages of what is counted whole too: the ingest, and a cycle.
PARTS = ("embedding", "queries", "fit", "rewrite", "gate", "activation")


def _against(row: Document, figure: str) -> str:
    if row["name"] == CONTROL:
        return ""
    gain = row["against_control"][figure]
    low, high = gain["interval"]
    return f"{gain['difference']:+.4f} [{low:+.4f}, {high:+.4f}]"


def _gap(row: Document) -> str:
    return "" if row["gap_closed"] is None else f"{100 * row['gap_closed']:.0f}%"


def _gate(row: Document) -> str:
    if "activated" not in row:
        return ""
    if row["activated"]:
        return "activated"
    return "refused" if row["candidate"] else "nothing to learn"


def _query_cost(row: Document) -> str:
    cost = row.get("milliseconds_per_query")
    return "" if cost is None else f"{cost:.3g}"


def _whole_seconds(row: Document) -> float:
    parts = PARTS if "cycle" in row["seconds"] else PARTS[:1]
    return float(sum(v for name, v in row["seconds"].items() if name not in parts))


COLUMNS: dict[str, Callable[[Document], str]] = {
    "row": lambda row: row["name"],
    "nDCG@10": lambda row: f"{row['ndcg_at_10']:.4f}",
    "against the control": lambda row: _against(row, "ndcg_at_10"),
    "gap closed": _gap,
    "recall@100": lambda row: f"{row['recall_at_100']:.4f}",
    "gate": _gate,
    "ms a query": _query_cost,
    "seconds": lambda row: f"{_whole_seconds(row):.2f}",
    "peak MiB": lambda row: f"{row['peak_memory_bytes'] / 2**20:.0f}",
}
ON_SCREEN = ("row", "nDCG@10", "against the control", "gap closed", "gate")


def result_table(document: Document) -> "Table":
    """The rows for a rich console, in the columns that a narrow one can show."""
    rows = [[COLUMNS[column](row) for column in ON_SCREEN] for row in document["rows"]]
    return text_table(_title(document), ON_SCREEN, rows, numbers=ON_SCREEN[1:3])


def markdown_table(document: Document) -> str:
    """The rows in Markdown, with what they stand on and what the gate said."""
    lines = [f"# {_title(document)}", ""]
    if not document["complete"]:
        lines += ["Stopped before all rows were measured.", ""]
    names = list(COLUMNS)
    lines += [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    for row in document["rows"]:
        lines.append(f"| {' | '.join(cell(row) for cell in COLUMNS.values())} |")
    asked = sum(map(len, document["queries"]["cycles"]))
    versions = ", ".join(f"{name} {value}" for name, value in document["versions"].items())
    lines += [
        "",
        f"{document['corpus']['documents']:,} documents; {len(document['queries']['evaluated'])} "
        f"queries evaluated, {asked} others asked in cycles, seed "
        f"{document['config']['engine']['seed']}. Intervals: paired bootstrap of "
        f"{document['config']['confidence']:.0%} on the same queries. Peak memory is the "
        "process's so far. The row to be fused is chosen by the queries it is judged by.",
        "",
        f"{versions}; {document['platform']}, {document['processors']} processors.",
    ]
    reasons = [f"- {row['name']}: {row['reason']}" for row in document["rows"] if "reason" in row]
    return "\n".join([*lines, "", "What the gate said:", "", *reasons]) + "\n"


def _title(document: Document) -> str:
    student, *teachers = (
        name.rstrip("/").rsplit("/", 1)[-1]
        for name in (document["config"]["student"], *document["config"]["teacher"])
    )
    return f"{document['task']}: {student} taught by {' and '.join(teachers)}"


def draw_rows(path: Path, document: Document) -> None:
    """Draw how every row's nDCG@10 differs from the control's, with intervals, into a PNG.

    Args:
        path: The file to write.
        document: What `Benchmark.document` gave.
    """
    rows = document["rows"]
    swept = [row for row in rows if "teacher_weight " in row["name"]]
    others = [row for row in rows if row not in swept]
    height = 1.5 + 0.35 * len(others)
    heights = [height, 3] if swept else [height]
    with drawing(path, (8, sum(heights))) as figure:
        axes, *more = figure.subplots(len(heights), squeeze=False, height_ratios=heights)[:, 0]
        places = list(range(len(others), 0, -1))
        axes.errorbar(_gains(others), places, xerr=_bars(others), fmt="o", capsize=3)
        for row, gain, place in zip(others, _gains(others), places, strict=True):
            if not row.get("activated", True):
                axes.plot([gain], [place], "x", color="tab:red", markersize=10)
            if row["name"] == TEACHER:
                axes.axvline(gain, color="tab:green", linewidth=0.8, linestyle="--")
        axes.axvline(0, color="grey", linewidth=0.8, linestyle="--")
        axes.set_yticks(places, [f"{row['name']}  {row['ndcg_at_10']:.4f}" for row in others])
        axes.set(xlabel="nDCG@10 less the control's, with its interval; ×: not activated")
        for below in more:
            weights = [row["teacher_weight"] for row in swept]
            below.errorbar(weights, _gains(swept), yerr=_bars(swept), fmt="o-", capsize=3)
            below.axhline(0, color="grey", linewidth=0.8, linestyle="--")
            below.set(
                xlabel="teacher_weight, offline symmetric", ylabel="nDCG@10 less the control's"
            )
        figure.suptitle(_title(document), fontsize="medium")


def _gains(rows: list[Document]) -> list[float]:
    return [row["against_control"]["ndcg_at_10"]["difference"] for row in rows]


def _bars(rows: list[Document]) -> list[list[float]]:
    """How far each interval reaches below and above its row's figure, `[2, n]`."""
    below, above = [], []
    for row in rows:
        found = row["against_control"]["ndcg_at_10"]
        low, high = found["interval"]
        # A percentile interval may miss the mean by the last bit, and matplotlib refuses that.
        below.append(max(0.0, found["difference"] - low))
        above.append(max(0.0, high - found["difference"]))
    return [below, above]
