"""What people look at of a store: found documents, the gate's figures, and its status.

Knows results and plain values; formats, decides nothing. To show another figure: a row here.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from conch_dna.sedimentation.documents import embedded_text
from conch_dna.sedimentation.results import ChangeResult, InferenceResult, IngestResult

if TYPE_CHECKING:
    from rich.table import Table

SHOWN = 100


def _plain(title: str, rows: Mapping[str, Any]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), show_header=False)
    table.add_column("", no_wrap=True)
    # Folded, since a folder or digest that ends in an ellipsis is of no use.
    table.add_column("", overflow="fold")
    for label, value in rows.items():
        table.add_row(label, Text(str(value)))
    return table


def ingest_table(result: IngestResult) -> "Table":
    """What became of given documents, and how fast."""
    taken = result.added + result.updated
    rate = f", {taken / result.seconds:,.0f} documents a second" if taken else ""
    return _plain(
        "ingest",
        {
            "added": f"{result.added:,}",
            "updated": f"{result.updated:,}",
            "unchanged": f"{result.unchanged:,}",
            "not embedded": f"{len(result.errors):,}",
            "documents": f"{result.documents:,}",
            "seconds": f"{result.seconds:.1f}, of which {result.embedding_seconds:.1f} in models"
            f"{rate}",
        },
    )


def hits_table(query: str, result: InferenceResult) -> "Table":
    """The documents that answer a query, best first."""
    from rich.table import Table
    from rich.text import Text

    neighbourhood = "" if not result.collapsed else ", neighbourhood collapsed"
    title = f"{query} ({result.version}{neighbourhood})"
    table = Table(title=Text(title))
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("score", justify="right", no_wrap=True)
    table.add_column("id", overflow="fold")
    table.add_column("document")
    found = zip(result.ids, result.scores, result.payloads, strict=True)
    for rank, (name, score, payload) in enumerate(found, 1):
        text = " ".join(embedded_text(payload).split())
        shown = text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
        table.add_row(str(rank), f"{score:.4f}", Text(str(name)), Text(shown))
    return table


def change_table(result: ChangeResult) -> "Table":
    """What the gate said of a candidate, measure by measure."""
    from rich.table import Table
    from rich.text import Text

    decision = "activated" if result.activated else "refused"
    title = f"{result.kind} ({result.mode}): {result.candidate} {decision}"
    table = Table(title=Text(title))
    table.add_column("measure")
    for name in ("before", "after", "difference", "low", "high", "queries"):
        table.add_column(name, justify="right")
    for name, each in result.figures.items():
        if not each:
            table.add_row(name, "", "", "", "", "", "too few")
            continue
        low, high = each["interval"]
        table.add_row(
            name,
            f"{each['before']:.4f}",
            f"{each['after']:.4f}",
            f"{each['difference']:+.4f}",
            f"{low:+.4f}",
            f"{high:+.4f}",
            f"{each['queries']:,}",
        )
    return table


def status_table(status: Mapping[str, Any]) -> "Table":
    """Whose a store is, what it holds and which version answers."""
    log = status["log"]
    return _plain(
        status["location"],
        {
            "student": f"{status['student']}, {status['dimension']} dimensions",
            "digest": status["digest"],
            "documents": f"{status['documents']:,}",
            "active": f"{status['active']}: {_made_from(status, status['active'])}",
            "previous": f"{status['previous']}: {_made_from(status, status['previous'])}"
            if status["previous"]
            else "none",
            "chelation log": f"{log['events']:,} events, {log['bytes']:,} bytes in {log['files']} "
            f"files; {log['documents_at_threshold']:,} documents of the active version logged "
            f"{log['threshold']} times or more",
        },
    )


def _made_from(status: Mapping[str, Any], name: str) -> str:
    if name not in status["versions"]:
        return "the student's own vectors"
    version = status["versions"][name]
    origin = version["origin"]
    teacher = f" by {origin['teacher']}" if origin.get("teacher") else ""
    carried = "the teacher's own" if origin["documents"] == "teacher" else "adapted"
    return (
        f"{origin['kind']} ({origin['mode']}){teacher}, {version['adapter']} adapter, "
        f"{version['out_dimension']} dimensions, documents' vectors {carried}"
    )


def history_table(history: list[dict[str, Any]]) -> "Table":
    """Every judgement of the gate, oldest first."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="gate history")
    for name in ("time", "change", "candidate", "", "why"):
        table.add_column(name)
    for each in history:
        gains = [f"{name} {found['difference']:+.4f}" for name, found in _judged(each)]
        table.add_row(
            each["time"][:16].replace("T", " "),
            f"{each['kind']} ({each['mode']})",
            f"{each['candidate']} after {each['against']}",
            "passed" if each["passed"] else "REFUSED",
            Text(", ".join(gains) or each["reason"]),
        )
    return table


def _judged(entry: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The measures that there was evidence for."""
    return [(name, found) for name, found in entry["figures"].items() if found]
