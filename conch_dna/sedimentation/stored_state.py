"""What a store says of itself without its models: its student, versions, log and history.

Knows where a store's parts lie; loads no student and no teacher. To tell more: a key in
`StoredState.to_json`, and a row of `status_table`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conch_dna.checkpoints import FolderLock, read_json, require_keys
from conch_dna.errors import ConchError
from conch_dna.sedimentation.adapters.adapter import ADAPTER_FILE
from conch_dna.sedimentation.changes.chelation_log import ChelationLog, log_files
from conch_dna.sedimentation.changes.gate import read_history
from conch_dna.sedimentation.changes.versions import Versions
from conch_dna.sedimentation.config import ChelationConfig
from conch_dna.sedimentation.stores.contract import RAW, VectorStore
from conch_dna.sedimentation.stores.edge import MANIFEST
from conch_dna.sedimentation.stores.open_store import LOG, VECTORS, VERSIONS, open_store, state_of
from conch_dna.sedimentation.upkeep.deletion import recovered


class StoredState:
    """An open store with everything beside it but its models.

    Attributes:
        location: As it was given.
        store: Of the vectors.
        versions: Of the vectors, with their adapters.
        log: Of collapsed neighbourhoods.
        history: Judgements of the gate, oldest first.
        recovered: What opening put right.
    """

    def __init__(self, location: str, state: Path, store: VectorStore) -> None:
        self.location = location
        self.store = store
        self.log = ChelationLog(state / LOG)
        unfinished = recovered(store, self.log)
        self.versions = Versions(store, state / VERSIONS, int(store.identity["dimension"]))
        self.history = read_history(state)
        self.recovered = [*self.log.recovered, *unfinished, *self.versions.recovered]

    def to_json(self) -> dict[str, Any]:
        """Everything that `status` shows, as a JSON object."""
        active, threshold = self.versions.active, ChelationConfig().threshold
        ready = self.log.documents_logged(at_least=threshold, version=active)
        files = log_files(self.log.folder)
        return {
            "location": self.location,
            **{name: self.store.identity[name] for name in ("student", "digest", "dimension")},
            "documents": self.store.count(RAW),
            "active": active,
            "previous": self.store.previous,
            "versions": {name: self._version(name) for name in self.store.versions()},
            "log": {
                "events": len(self.log),
                "bytes": sum(path.stat().st_size for path in files),
                "files": len(files),
                "threshold": threshold,
                "documents_at_threshold": len(ready),
            },
            "gate_history": self.history,
            "recovered": self.recovered,
        }

    def _version(self, name: str) -> dict[str, Any]:
        needs = {"kind": str, "in_dimension": int, "out_dimension": int, "origin": dict}
        path = self.versions.folder / name / ADAPTER_FILE
        document = read_json(path, needs=needs)
        about_origin = dict.fromkeys(("kind", "mode", "documents"), str)
        require_keys(document["origin"], f"origin in {path}", needs=about_origin)
        about = {each: document[each] for each in ("in_dimension", "out_dimension", "origin")}
        return {"adapter": document["kind"], **about}


@dataclass(frozen=True)
class StorePlace:
    """Where a store lies that commands come back to.

    Attributes:
        location: A folder or the URL of a server.
        state: Where adapters, logs and caches lie, if not where they lie by default.
        collection: Of a server.
        api_key: Of a server.
    """

    location: str
    state: str | None
    collection: str
    api_key: str | None

    @property
    def is_server(self) -> bool:
        """Whether the vectors are elsewhere."""
        return "://" in self.location

    @property
    def folder(self) -> Path:
        """Where adapters, log and history lie, as the engine has it.

        Raises:
            ConchError: The store is in memory, where no other command would find it.
        """
        if self.location == ":memory:":
            raise ConchError(
                "a store in memory ends with its command: give a folder or the URL of a server"
            )
        return state_of(self.location, self.state, self.collection)

    def open_vectors(self) -> VectorStore:
        """The store of the vectors alone.

        Raises:
            ConchError: There is none, or it cannot be opened.
        """
        if self.is_server:
            return open_store(self.location, collection=self.collection, api_key=self.api_key)
        if not self.has_store():
            raise ConchError(f"{self.location} holds no store yet: ingest documents first")
        return open_store(self.folder / VECTORS)

    def has_store(self) -> bool:
        """Whether there is a store.

        Of a server that does not answer this says no, and so leaves the message to whoever opens
        it.
        """
        if not self.is_server:
            return (self.folder / VECTORS / MANIFEST).is_file()
        try:
            self.open_vectors().close()
        except ConchError:
            return False
        return True

    def student(self) -> str:
        """The name of the student that the store was made with.

        Raises:
            ConchError: There is no store, or it cannot be opened.
        """
        with self.open_vectors() as store:
            return str(store.identity["student"])

    @contextmanager
    def opened(self) -> Iterator[StoredState]:
        """The store without its models, locked while it is open.

        Raises:
            FolderInUseError: Another process has it open.
            ConchError: There is no store, or it is not whole.
        """
        folder = self.folder
        elsewhere = "give another location or --state"
        with self.open_vectors() as store, FolderLock(folder, elsewhere=elsewhere):
            yield StoredState(self.location, folder, store)
