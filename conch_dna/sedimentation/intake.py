"""Documents into a store, a batch at a time: what is new is embedded for every version.

Knows documents, embedders, versions and a store; nothing of queries, gates or training.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from conch_dna.errors import ConchError
from conch_dna.sedimentation.changes.teacher_distillation import TeacherDistillationHelper
from conch_dna.sedimentation.changes.versions import OF_TEACHER, Versions
from conch_dna.sedimentation.documents import TEXT, TITLE, Document, DocumentId
from conch_dna.sedimentation.embedders.contract import Embedded, Embedder, problems_of
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
        others = self._embedded_otherwise(texts)
        for found in others.values():
            errors.update((documents[n].id, reason) for n, reason in found.errors.items())
        self.embedding_seconds += time.perf_counter() - began
        errors.update((documents[n].id, reason) for n, reason in embedded.errors.items())
        rows = [row for row, n in enumerate(embedded.kept) if documents[n].id not in errors]
        numbers = [embedded.kept[row] for row in rows]
        if not numbers:
            return
        raw = embedded.vectors[rows]
        vectors = {RAW: raw}
        for name in store.versions():
            if name not in others:
                vectors[name] = self.versions.adapter(name).apply(raw)
                continue
            places = {n: row for row, n in enumerate(others[name].kept)}
            rows_of = others[name].vectors[[places[n] for n in numbers]]
            of_teacher = self.versions.origin(name)["documents"] == OF_TEACHER
            vectors[name] = rows_of if of_teacher else self.versions.adapter(name).apply(rows_of)
        documents = [documents[n] for n in numbers]
        store.put(
            [document.id for document in documents],
            [document.stored for document in documents],
            [document.digest for document in documents],
            vectors,
        )
        for document in documents:
            counts["updated" if document.id in digests else "added"] += 1

    def _embedded_otherwise(self, texts: list[str]) -> dict[str, Embedded]:
        """What versions whose documents are not embedded by the store's student make of texts."""
        found: dict[str, Embedded] = {}
        by_teacher: Embedded | None = None
        for name in self.versions.store.versions():
            if self.versions.origin(name)["documents"] == OF_TEACHER:
                helper = self.teacher()
                self.versions.require(name, helper.teacher)
                found[name] = by_teacher = by_teacher or helper.embed(texts)
            elif not self.versions.is_bridged(name) and (own := self.versions.own_student(name)):
                found[name] = own.documents(texts)
        return found

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
                "it replace the old one (--replace, replace_changed)"
            )
