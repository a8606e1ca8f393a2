"""Documents into a store, a batch at a time: what is new is embedded for every version.

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
from conch_dna.sedimentation.embedders.contract import Embedder, problems_of
from conch_dna.sedimentation.stores.contract import RAW
from conch_dna.sedimentation.stores.stored_documents import check_payload, key_of


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
        part = [document for document in part if self._storable(document)]
        digests = store.digests([document.id for document in part])
        fresh: dict[DocumentId, Document] = {}
        for document in part:
            earlier = fresh.get(document.id)
            before = earlier.digest if earlier else digests.get(document.id)
            if before == document.digest:
                counts["unchanged"] += 1
            else:
                self._allow(document, earlier, before)
                fresh[document.id] = document
        if not fresh:
            return
        began = time.perf_counter()
        documents = list(fresh.values())
        texts = [document.embedded for document in documents]
        embedded = self.student.documents(texts)
        origins = {name: self.versions.origin(name) for name in store.versions()}
        sources = {name: origin["documents"] for name, origin in origins.items()}
        teacher_rows: dict[int, np.ndarray] = {}
        if OF_TEACHER in sources.values():
            by_teacher = self.teacher().embed(texts)
            teacher_rows = dict(zip(by_teacher.kept, by_teacher.vectors, strict=True))
            errors.update((documents[n].id, reason) for n, reason in by_teacher.errors.items())
        self.embedding_seconds += time.perf_counter() - began
        errors.update((documents[n].id, reason) for n, reason in embedded.errors.items())
        rows = [row for row, n in enumerate(embedded.kept) if documents[n].id not in errors]
        numbers = [embedded.kept[row] for row in rows]
        if not numbers:
            return
        raw = embedded.vectors[rows]
        vectors = {RAW: raw}
        for name, source in sources.items():
            if source == OF_TEACHER:
                vectors[name] = np.stack([teacher_rows[n] for n in numbers])
            else:
                vectors[name] = self._adapted(name, raw, [texts[n] for n in numbers])
        documents = [documents[n] for n in numbers]
        store.put(
            [document.id for document in documents],
            [document.stored for document in documents],
            [document.digest for document in documents],
            vectors,
        )
        for document in documents:
            counts["updated" if document.id in digests else "added"] += 1

    def _adapted(self, name: str, raw: np.ndarray, texts: list[str]) -> np.ndarray:
        if self.versions.is_bridged(name) or self.versions.own_student(name) is None:
            return self.versions.adapter(name).apply(raw)
        return self.versions.embed([name], texts, queries=False, what="documents")[name]

    def _storable(self, document: Document) -> bool:
        """Whether a store could give it back; if not, the reason is among the errors."""
        try:
            key_of(document.id)
            check_payload(document.id, document.payload)
        except ConchError as error:
            self.errors[document.id] = str(error)
            return False
        if problems := problems_of([document.embedded]):
            self.errors[document.id] = problems[0]
            return False
        return True

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
