"""Versions of a store's vectors: built whole from the raw ones, then active or dropped.

Knows a store, students, adapters and folders; nothing of training. A version is its vectors in the
store and its adapter's folder, which is there before them and goes after them, so that a killed
process leaves at most one of the two too many; `recover` removes it. A version may have a student
of its own, in a folder beside its adapter's, of which the same holds.
"""

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conch_dna.checkpoints import read_json, remove_unfinished
from conch_dna.errors import ConchError, NotWholeError
from conch_dna.screen.progress import Report, silent
from conch_dna.sedimentation.adapters.adapter import ADAPTER_FILE, EmbeddingAdapter
from conch_dna.sedimentation.documents import DocumentId, embedded_texts
from conch_dna.sedimentation.embedders.contract import Embedded, Embedder
from conch_dna.sedimentation.embedders.local import static_model
from conch_dna.sedimentation.embedders.open_embedder import open_embedder
from conch_dna.sedimentation.embedders.static_folder import write_static
from conch_dna.sedimentation.stores.contract import RAW, Page, VectorStore
from conch_dna.sedimentation.stores.stored_documents import ContentSum

PREFIX = "v"
PAGE = 1000
# What a version's documents carry: their raw vectors through its adapter, or the teacher's.
# Or their raw vectors through its adapter, while queries go to its own student and no adapter.
ADAPTED, OF_TEACHER, BRIDGED = "adapted", "teacher", "bridged"
# Behind a version's name, the folder of its own student; in its origin, that student's digest, and
# its name where it lies elsewhere.
STUDENT_FOLDER, OWN_STUDENT, STUDENT_NAME = "-student", "own_student", "own_student_name"


class Versions:
    """The versions of one store.

    Args:
        store: Open; the caller holds the lock.
        folder: Of the adapters' folders.
        dimension: Of the raw vectors.
        student: Who made them; needed to embed texts.
        opener: Opens a model by its name.
    """

    def __init__(
        self,
        store: VectorStore,
        folder: Path,
        dimension: int,
        student: Embedder | None = None,
        opener: Callable[[str], Embedder] = open_embedder,
    ) -> None:
        self.store = store
        self.folder = folder
        self.dimension = dimension
        self._student = student
        self._opener = opener
        self._own_students: dict[str, Embedder] = {}
        self._adapters: dict[str, EmbeddingAdapter] = {}
        self._origins: dict[str, dict[str, Any]] = {}
        self._sums: dict[str, ContentSum] = {}
        self.recovered = self._recover()

    def _recover(self) -> list[str]:
        """Remove what a killed process left; a line for each."""
        removed = []
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(self.folder)
        finished = {self.store.active, self.store.previous} - {RAW, None}
        for name in sorted(finished, key=str):
            if not (self.folder / str(name)).is_dir():
                raise NotWholeError(
                    f"the adapter of version {name} is missing from {self.folder}: put the folder "
                    "back, or make the store anew from its documents"
                )
        for name in self.store.versions():
            if name not in finished:
                self.store.drop_version(name)
                removed.append(f"version {name} was not finished: its vectors are removed")
        for path in sorted(self.folder.iterdir()):
            name = path.name.removesuffix(STUDENT_FOLDER)
            if path.is_dir() and name not in finished:
                shutil.rmtree(path)
                what = "adapter" if name == path.name else "student"
                removed.append(f"version {name} was not finished: its {what} is removed")
        return removed

    @property
    def active(self) -> str:
        """The version that answers."""
        return self.store.active

    def adapter(self, name: str) -> EmbeddingAdapter:
        """What queries of a version go through; read once.

        Raises:
            NotWholeError: Its folder is damaged, or of another store.
        """
        if name == RAW:
            return EmbeddingAdapter.identity(self.dimension)
        if name not in self._adapters:
            adapter = EmbeddingAdapter.load(self.folder / name)
            own = None if self.is_bridged(name) else self.own_student(name)
            dimension = own.dimension if own else self.dimension
            if adapter.in_dimension != dimension:
                raise NotWholeError(
                    f"{self.folder / name} maps vectors of {adapter.in_dimension} dimensions, but "
                    f"{'its student gives' if own else 'the store has raw ones of'} {dimension}: "
                    "put its own adapter back"
                )
            self._adapters[name] = adapter
        return self._adapters[name]

    def own_student(self, name: str) -> Embedder | None:
        """The student that a version alone has; None where it has the store's.

        Raises:
            NotWholeError: It is damaged, or of another version.
        """
        origin = self.origin(name)
        if OWN_STUDENT not in origin:
            return None
        if name not in self._own_students:
            self._own_students[name] = opened_student(self.folder, name, origin, self._opener)
        return self._own_students[name]

    def student_to_keep(self, name: str) -> Any:
        """What `build` is given for a version whose student is a version's own, if it has one."""
        own = self.own_student(name)
        if own is None or STUDENT_NAME in self.origin(name):
            return own
        return static_model(own)

    def is_bridged(self, name: str) -> bool:
        """Whether its documents carry mapped raw vectors, and its queries another model's."""
        return bool(self.origin(name)["documents"] == BRIDGED)

    def student(self, name: str, *, queries: bool = True) -> Embedder:
        """Who embeds the texts of a version: its own student, or the store's."""
        own = self.own_student(name) if queries or not self.is_bridged(name) else None
        student = own or self._student
        assert student is not None, "texts are embedded where the store was opened with its student"
        return student

    def query_adapter(self, name: str) -> EmbeddingAdapter:
        """What a version's queries go through behind its student.

        Raises:
            NotWholeError: See `adapter`.
        """
        adapter = self.adapter(name)
        return (
            EmbeddingAdapter.identity(adapter.out_dimension) if self.is_bridged(name) else adapter
        )

    def embed(
        self, names: Sequence[str], texts: Sequence[str], *, queries: bool, what: str = "texts"
    ) -> dict[str, np.ndarray]:
        """The vectors of texts in versions; a student of several is asked once.

        Args:
            names: Of the versions.
            texts: N of them.
            queries: Whether they search, or are found.
            what: What they are, for messages.

        Returns:
            Unit float32 `[N, E]` of each version, with its own E.

        Raises:
            ConchError: A text cannot be embedded.
            NotWholeError: Student or adapter of a version is damaged.
        """
        raw: dict[str, np.ndarray] = {}
        found = {}
        for name in names:
            student = self.student(name, queries=queries)
            if student.digest not in raw:
                embedded = student.embed(texts, queries=queries)
                raw[student.digest] = embedded.all_vectors(what=what)
            adapter = self.query_adapter(name) if queries else self.adapter(name)
            found[name] = adapter.apply(raw[student.digest])
        return found

    def before_adapter(self, name: str, page: Page) -> np.ndarray:
        """What a version's adapter is given for documents, from a page of raw vectors."""
        own = None if self.is_bridged(name) else self.own_student(name)
        if own is None:
            return page.vectors
        texts = embedded_texts(page.payloads)
        return own.documents(texts).all_vectors(what="documents")

    def origin(self, name: str) -> dict[str, Any]:
        """What a version was made from, read once; of the raw vectors nothing but that.

        Raises:
            NotWholeError: See `origin_of`.
        """
        if name == RAW:
            return {"documents": ADAPTED}
        if name not in self._origins:
            self._origins[name] = origin_of(self.folder / name)
        return self._origins[name]

    def require(self, name: str, teacher: Embedder | None) -> None:
        """Refuse where the models of a version are not there.

        Args:
            name: Of the version.
            teacher: Who is there, if one is.

        Raises:
            ConchError: The documents carry another teacher's vectors, or the student of its own is
                not to be had.
        """
        digest = teacher.digest if teacher else None
        origin = self.origin(name)
        if origin["documents"] == OF_TEACHER and digest != origin.get("teacher_digest"):
            raise ConchError(
                f"the documents of version {name} carry the vectors of {origin.get('teacher')}: "
                "give that teacher (--teacher, with --space asymmetric), or roll back to another "
                "version"
            )
        self.own_student(name)

    def next_name(self, known: Iterable[str] = ()) -> str:
        """A name that no version has or, by what is known of the past, had."""
        names = [*self.store.versions(), *known]
        numbers = [int(name[1:]) for name in names if name[1:].isdigit()]
        return f"{PREFIX}{max(numbers, default=0) + 1:04d}"

    def build(
        self,
        name: str,
        adapter: EmbeddingAdapter,
        origin: dict[str, Any],
        *,
        student: Any = None,
        embed: Callable[[list[str]], Embedded] | None = None,
        change: Callable[[list[DocumentId], np.ndarray], np.ndarray] | None = None,
        report: Report = silent,
    ) -> None:
        """Write a version whole; it is not active.

        Args:
            name: One that `next_name` gave.
            adapter: What its queries go through, and its documents' raw vectors too unless there
                is `embed`.
            origin: What it was made from; `documents` is ADAPTED or OF_TEACHER.
            student: Who embeds its texts, if not the store's student: an `Embedder` that lies
                elsewhere, or a model2vec `StaticModel`, which is written beside the adapter.
            embed: Gives the vectors that documents carry from their texts: the teacher.
            change: What becomes of the vectors `[n, E]` of documents before they are written.
            report: Gets ("advance", …) for each page that was written; see `progress.Progress`.
        """
        self._sums[name] = total = ContentSum()
        if isinstance(student, Embedder):
            origin = {**origin, OWN_STUDENT: student.digest, STUDENT_NAME: lasting(student.name)}
            self._own_students[name] = student
        elif student is not None:
            digest = write_static(student, self.folder / f"{name}{STUDENT_FOLDER}", origin)
            origin = {**origin, OWN_STUDENT: digest}
        adapter.save(self.folder / name, origin)
        self.store.add_version(name, adapter.out_dimension)
        for page in self.store.pages(RAW, size=PAGE):
            if embed is None:
                vectors = adapter.apply(self.before_adapter(name, page))
            else:
                vectors = _all_of(embed(embedded_texts(page.payloads)), page.ids)
            if change is not None:
                vectors = change(page.ids, vectors)
            total.add(page.ids, vectors)
            self.store.put_version(name, page.ids, vectors)
            report("advance", {"by": len(page.ids)})
        self._adapters[name] = adapter

    def activate(self, name: str) -> None:
        """Let a version that was built here answer; older ones but the last go.

        Raises:
            ConchError: The store holds something else than was written.
        """
        written = self._sums.pop(name)
        self.store.activate(name, count=written.count, digest=written.hexdigest())
        kept = {name, self.store.previous}
        for other in self.store.versions():
            if other not in kept:
                self.drop(other)

    def drop(self, name: str) -> None:
        """Remove a version: its vectors first, then its adapter and its student."""
        self.store.drop_version(name)
        self._forget(name)
        self._sums.pop(name, None)
        shutil.rmtree(self.folder / name)
        shutil.rmtree(self.folder / f"{name}{STUDENT_FOLDER}", ignore_errors=True)

    def rollback(self) -> str:
        """Let the version before answer again, if its vectors and its adapter are as they were.

        Raises:
            ConchError: There is none.
            NotWholeError: Either was altered; the active version stays.
        """
        if self.store.previous is not None:
            self._forget(self.store.previous)
            self.adapter(self.store.previous)
        return self.store.rollback()

    def _forget(self, name: str) -> None:
        """Let what was read of a version's folders be read again."""
        for known in (self._adapters, self._own_students, self._origins):
            known.pop(name, None)


def _all_of(embedded: Embedded, ids: Sequence[DocumentId]) -> np.ndarray:
    """The vectors of documents, every one of which must have one."""
    if embedded.errors:
        number, reason = next(iter(embedded.errors.items()))
        more = len(embedded.errors) - 1
        raise ConchError(
            f"document {ids[number]!r}{f' and {more} more' if more else ''} could not be embedded: "
            f"{reason}. Delete or replace such documents first"
        )
    return embedded.vectors


def origin_of(folder: Path) -> dict[str, Any]:
    """What the version of an adapter's folder was made from.

    Raises:
        NotWholeError: It does not say so.
    """
    path = folder / ADAPTER_FILE
    origin: dict[str, Any] = read_json(path, needs={"origin": dict})["origin"]
    if origin.get("documents") not in (ADAPTED, OF_TEACHER, BRIDGED):
        raise NotWholeError(f"{path} does not say what the version's documents carry")
    return origin


def lasting(name: str) -> str:
    """A model's name that means the same from every folder."""
    folder = Path(name).expanduser()
    return str(folder.resolve()) if folder.is_dir() else name


def opened_student(
    folder: Path, name: str, origin: Mapping[str, Any], opener: Callable[[str], Embedder]
) -> Embedder:
    """The own student of a version.

    Args:
        folder: Of the adapters' folders.
        name: Of the version.
        origin: What it was made from.
        opener: Opens a model by its name.

    Raises:
        ConchError: It lies elsewhere and is not there.
        NotWholeError: It is missing, damaged or another.
    """
    place = origin.get(STUDENT_NAME) or str(folder / f"{name}{STUDENT_FOLDER}")
    if STUDENT_NAME not in origin and not Path(place).is_dir():
        raise NotWholeError(f"{place}, the student of version {name}, is missing: put it back")
    try:
        student = opener(place)
    except ConchError as error:
        raise ConchError(
            f"the model of version {name} is not to be had: {error}. Put it back, or roll back"
        ) from error
    if student.digest != origin[OWN_STUDENT]:
        raise NotWholeError(
            f"{place} was altered or is another student than version {name} was made of: put its "
            "own back"
        )
    return student
