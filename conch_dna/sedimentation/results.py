"""What the engine's methods give back, and the tables in which people look at it.

Knows plain values; nothing of how they came about, and decides nothing. To report another figure:
a field here, and a row of its table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from conch_dna.screen.presentation import pairs_table, text_table
from conch_dna.sedimentation.documents import DocumentId, embedded_text

if TYPE_CHECKING:
    from rich.table import Table

# Letters of a document that a table of answers shows.
SHOWN = 100


@dataclass(frozen=True, kw_only=True)
class IngestResult:
    """What became of given documents.

    Attributes:
        added: New ones.
        unchanged: Those that were there already with the same text and payload.
        updated: Those whose payload changed, or whose text did and was to be replaced.
        errors: Those that could not be embedded, by id, with the reason; they are not in the store.
        documents: In the store now.
        seconds: In all.
        embedding_seconds: Of them in the student (and, where documents carry its vectors, in the
            teacher).
    """

    added: int
    unchanged: int
    updated: int
    errors: dict[DocumentId, str]
    documents: int
    seconds: float
    embedding_seconds: float


@dataclass(frozen=True)
class VerifiedPart:
    """One thing that a store keeps, compared with its digest.

    Attributes:
        name: Of it.
        whole: Whether it is as it was written.
        detail: How much it is; or what is wrong, in one line.
    """

    name: str
    whole: bool
    detail: str


@dataclass(frozen=True, kw_only=True)
class DeleteResult:
    """What was forgotten.

    Attributes:
        deleted: Ids of the documents, as they are in the store.
        events: Logged neighbourhoods that named one of them.
        documents: In the store now.
    """

    deleted: list[DocumentId]
    events: int
    documents: int


@dataclass(frozen=True, kw_only=True)
class InferenceResult:
    """The documents nearest to a query.

    Attributes:
        ids: As given at ingest, best first.
        scores: Cosines, or with fusion sums of reciprocal ranks.
        payloads: What was given with them, and title and text.
        version: Of the vectors that answered.
        dispersion: Of the neighbourhood; None where there are too few documents to have one, or
            where a filter chose them.
        collapsed: Whether that lies below the threshold; None where it is not known.
    """

    ids: list[DocumentId]
    scores: list[float]
    payloads: list[dict[str, Any]]
    version: str
    dispersion: float | None
    collapsed: bool | None


@dataclass(frozen=True, kw_only=True)
class ChangeResult:
    """What a cycle or a distillation came to.

    Attributes:
        kind: "cycle" or "distillation".
        mode: The training mode.
        activated: Whether new vectors are active now.
        version: What is active now.
        candidate: What was built; None where nothing was.
        reason: What the gate said, or why nothing was built.
        figures: Of the gate, comparison by comparison.
        questions: Of the gate: whose they are, and whether they were asked before.
        documents: How many were learned from.
        fit: Figures of the adapter's training.
        steps: How many targets came from each step of the fallback chain.
        reasons: Why steps of that chain were left, and why the gate's queries are not new.
        seconds: Of each stage.
    """

    kind: str
    mode: str
    activated: bool
    version: str
    candidate: str | None
    reason: str
    figures: dict[str, Any] = field(default_factory=dict)
    questions: dict[str, Any] = field(default_factory=dict)
    documents: int = 0
    fit: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def ingest_table(result: IngestResult) -> "Table":
    """What became of given documents, and how fast."""
    taken = result.added + result.updated
    rate = f", {taken / result.seconds:,.0f} documents a second" if taken else ""
    return pairs_table(
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


def delete_table(result: DeleteResult) -> "Table":
    """What was forgotten."""
    return pairs_table(
        "delete",
        {
            "deleted": f"{len(result.deleted):,}",
            "logged neighbourhoods left out": f"{result.events:,}",
            "documents": f"{result.documents:,}",
        },
    )


def hits_table(query: str, result: InferenceResult) -> "Table":
    """The documents that answer a query, best first."""
    rows: list[Sequence[object]] = []
    hits = zip(result.ids, result.scores, result.payloads, strict=True)
    for rank, (name, score, payload) in enumerate(hits, 1):
        text = " ".join(embedded_text(payload).split())
        shown = text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
        rows.append((rank, f"{score:.4f}", name, shown))
    neighbourhood = ", neighbourhood collapsed" if result.collapsed else ""
    return text_table(
        f"{query} ({result.version}{neighbourhood})",
        ("", "score", "id", "document"),
        rows,
        numbers=("", "score"),
    )


def change_table(result: ChangeResult) -> "Table":
    """What the gate said of a candidate, measure by measure, against the active version and raw."""
    rows: list[Sequence[object]] = []
    for name, each in result.figures.items():
        if not each:
            rows.append((name, "", "too few queries", "REFUSED"))
            continue
        rows.append(
            (
                f"{each['measure']} against {each['against']}, {each['queries']:,} queries",
                f"{each['before']:.4f} → {each['after']:.4f}",
                _difference(each),
                "passed" if each["passed"] else "REFUSED",
            )
        )
    decision = "activated" if result.activated else "refused"
    numbers = ("before → after", "difference [bounds]")
    return text_table(
        f"{result.kind} ({result.mode}): {result.candidate} {decision}",
        ("measure", *numbers, ""),
        rows,
        numbers=(*numbers, ""),
    )


def _difference(figures: Mapping[str, Any]) -> str:
    """How much better, and the bounds of the interval where they are known."""
    bounds = ", ".join(f"{bound:+.4f}" for bound in figures.get("interval", ()))
    return f"{figures['difference']:+.4f}" + (f" [{bounds}]" if bounds else "")


def status_table(status: Mapping[str, Any]) -> "Table":
    """Whose a store is, what it holds and which version answers."""
    log = status["log"]
    return pairs_table(
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
    carried = {"teacher": "the teacher's own"}.get(origin["documents"], origin["documents"])
    own = "a table of its own, " if origin.get("own_student") else ""
    if origin.get("own_student_name"):
        own = f"queries to {origin['own_student_name']}, "
    return (
        f"{origin['kind']} ({origin['mode']}){teacher}, {own}{version['adapter']} adapter, "
        f"{version['out_dimension']} dimensions, documents' vectors {carried}"
    )


def verify_table(location: str, parts: Sequence[VerifiedPart]) -> "Table":
    """What is whole and what is not."""
    rows = [(each.name, "whole" if each.whole else "NOT WHOLE", each.detail) for each in parts]
    return text_table(f"verify {location}", ("what", "", "detail"), rows)


def history_table(history: list[dict[str, Any]]) -> "Table":
    """Every judgement of the gate, oldest first."""
    rows: list[Sequence[object]] = []
    for each in history:
        # A measure without evidence has no figures.
        measured = {name: figures for name, figures in each["figures"].items() if figures}
        gains = [
            f"{name} {_difference(figures)}{'' if figures.get('passed', True) else ' REFUSED'}"
            for name, figures in measured.items()
        ]
        rows.append(
            (
                each["time"][:16].replace("T", " "),
                f"{each['kind']} ({each['mode']})",
                f"{each['candidate']} after {each['against']}",
                "passed" if each["passed"] else "REFUSED",
                "\n".join(gains) or each["reason"],
            )
        )
    return text_table("gate history", ("time", "change", "candidate", "", "why"), rows)
