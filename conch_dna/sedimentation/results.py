"""What the engine's methods give back: figures, never prints.

Knows plain values; nothing of how they came about. To report another figure: a field here.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from conch_dna.sedimentation.documents import DocumentId


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

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return asdict(self)


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

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return asdict(self)


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
        figures: Of the gate, measure by measure.
        documents: How many were learned from.
        fit: Figures of the adapter's training.
        steps: How many targets came from each step of the fallback chain.
        reasons: Why steps of that chain were left.
        seconds: Of each stage.
    """

    kind: str
    mode: str
    activated: bool
    version: str
    candidate: str | None
    reason: str
    figures: dict[str, Any] = field(default_factory=dict)
    documents: int = 0
    fit: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return asdict(self)
