"""Versions of a store's vectors: built whole from the raw ones, then active or dropped.

Knows a store, adapters and folders; nothing of training. A version is its vectors in the store and
its adapter's folder, which is there before them and goes after them, so that a killed process
leaves at most one of the two too many; `recover` removes it.
"""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from conch_dna.checkpoints import read_json, remove_unfinished
from conch_dna.errors import NotWholeError
from conch_dna.screen.progress import Report, silent
from conch_dna.sedimentation.adapters.adapter import ADAPTER_FILE, EmbeddingAdapter
from conch_dna.sedimentation.documents import embedded_text
from conch_dna.sedimentation.stores.contract import RAW, VectorStore
from conch_dna.sedimentation.stores.stored_documents import ContentSum

PREFIX = "v"
PAGE = 1000
# What a version's documents carry: their raw vectors through its adapter, or the teacher's.
ADAPTED, OF_TEACHER = "adapted", "teacher"


class Versions:
    """The versions of one store.

    Args:
        store: Open; the caller holds the lock.
        folder: Of the adapters' folders.
        dimension: Of the raw vectors.
    """

    def __init__(self, store: VectorStore, folder: Path, dimension: int) -> None:
        self.store = store
        self.folder = folder
        self.dimension = dimension
        self._adapters: dict[str, EmbeddingAdapter] = {}
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
            if path.is_dir() and path.name not in finished:
                shutil.rmtree(path)
                removed.append(f"version {path.name} was not finished: its adapter is removed")
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
            if adapter.in_dimension != self.dimension:
                raise NotWholeError(
                    f"{self.folder / name} maps vectors of {adapter.in_dimension} dimensions, but "
                    f"the store's raw ones have {self.dimension}: put its own adapter back"
                )
            self._adapters[name] = adapter
        return self._adapters[name]

    def origin(self, name: str) -> dict[str, Any]:
        """What a version was made from; of the raw vectors nothing but that."""
        if name == RAW:
            return {"documents": ADAPTED}
        path = self.folder / name / ADAPTER_FILE
        origin: dict[str, Any] = read_json(path, needs={"origin": dict})["origin"]
        if origin.get("documents") not in (ADAPTED, OF_TEACHER):
            raise NotWholeError(f"{path} does not say what the version's documents carry")
        return origin

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
        embed: Callable[[list[str]], np.ndarray] | None = None,
        report: Report = silent,
    ) -> None:
        """Write a version whole; it is not active.

        Args:
            name: One that `next_name` gave.
            adapter: What its queries go through, and its documents' raw vectors too unless there
                is `embed`.
            origin: What it was made from; `documents` is ADAPTED or OF_TEACHER.
            embed: Gives the vectors that documents carry from their texts: the teacher.
            report: Gets ("advance", …) for each page that was written; see `progress.Progress`.
        """
        self._sums[name] = total = ContentSum()
        adapter.save(self.folder / name, origin)
        self.store.add_version(name, adapter.out_dimension)
        for page in self.store.pages(RAW, size=PAGE):
            if embed is None:
                vectors = adapter.apply(page.vectors)
            else:
                vectors = embed([embedded_text(payload) for payload in page.payloads])
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
        """Remove a version: its vectors first, then its adapter."""
        self.store.drop_version(name)
        self._adapters.pop(name, None)
        self._sums.pop(name, None)
        shutil.rmtree(self.folder / name)

    def rollback(self) -> str:
        """Let the version before answer again, if its vectors and its adapter are as they were.

        Raises:
            ConchError: There is none.
            NotWholeError: Either was altered; the active version stays.
        """
        if self.store.previous is not None:
            self._adapters.pop(self.store.previous, None)
            self.adapter(self.store.previous)
        return self.store.rollback()
