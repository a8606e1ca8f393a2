"""Documents into a store, a batch at a time: what is new is embedded, for every version there is.

Knows documents, embedders, versions and a store; nothing of queries, gates or training.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from conch_dna.errors import ConchError
from conch_dna.sedimentation.changes.teacher_distillation import TeacherDistillationHelper
from conch_dna.sedimentation.changes.versions import OF_TEACHER, Versions
from conch_dna.sedimentation.documents import TEXT, TITLE, Document, DocumentId
from conch_dna.sedimentation.embedders.contract import Embedder
from conch_dna.sedimentation.stores.contract import RAW


@dataclass
class Intake:
    """One ingest.

    Attributes:
        versions: Of the store.
        student: Makes the raw vectors.
        teacher: Gives the teacher's helper, where documents of a version carry its vectors.
        replace_changed: Whether another text under a known id replaces the old one.
        counts: Documents added, unchanged and updated so far.
        errors: Why others could not be embedded, by id.
        embedding_seconds: Spent in the models so far.
    """

    versions: Versions
    student: Embedder
    teacher: Callable[[], TeacherDistillationHelper]
    replace_changed: bool
    counts: dict[str, int] = field(
        default_factory=lambda: {"added": 0, "unchanged": 0, "updated": 0}
    )
    errors: dict[DocumentId, str] = field(default_factory=dict)
    embedding_seconds: float = 0.0

    def take_in(self, part: Sequence[Document]) -> None:
        """Store a batch; durable when it returns.

        Raises:
            ConchError: A known id comes with another text, and it is not to be replaced.
        """
        store, counts, errors = self.versions.store, self.counts, self.errors
        known = store.digests([document.id for document in part])
        fresh: dict[DocumentId, Document] = {}
        for document in part:
            before = fresh[document.id].digest if document.id in fresh else known.get(document.id)
            if before == document.digest:
                counts["unchanged"] += 1
            else:
                self._allow(document, fresh.get(document.id), before)
                fresh[document.id] = document
        if not fresh:
            return
        began = time.perf_counter()
        documents = list(fresh.values())
        texts = [document.embedded for document in documents]
        embedded = self.student.documents(texts)
        teacher: dict[int, np.ndarray] = {}
        names = store.versions()
        if any(self.versions.origin(name)["documents"] == OF_TEACHER for name in names):
            found = self.teacher().embed(texts)
            teacher = dict(zip(found.kept, found.vectors, strict=True))
            errors.update((documents[n].id, reason) for n, reason in found.errors.items())
        self.embedding_seconds += time.perf_counter() - began
        errors.update((documents[n].id, reason) for n, reason in embedded.errors.items())
        rows = [row for row, n in enumerate(embedded.kept) if documents[n].id not in errors]
        taken = [embedded.kept[row] for row in rows]
        if not taken:
            return
        raw = embedded.vectors[rows]
        vectors = {RAW: raw}
        for name in names:
            if self.versions.origin(name)["documents"] == OF_TEACHER:
                vectors[name] = np.stack([teacher[n] for n in taken])
            else:
                vectors[name] = self.versions.adapter(name).apply(raw)
        chosen = [documents[n] for n in taken]
        store.put(
            [document.id for document in chosen],
            [document.stored for document in chosen],
            [document.digest for document in chosen],
            vectors,
        )
        for document in chosen:
            counts["updated" if document.id in known else "added"] += 1

    def _allow(self, document: Document, earlier: Document | None, before: str | None) -> None:
        """Refuse a known id with another text; another payload alone is taken."""
        if before is None or self.replace_changed:
            return
        stored = earlier.stored if earlier else self.versions.store.get([document.id]).payloads[0]
        if (stored[TITLE], stored[TEXT]) != (document.title, document.text):
            raise ConchError(
                f"document {document.id!r} is there with another text: give it another id, or let "
                "it replace the old one (replace_changed)"
            )
