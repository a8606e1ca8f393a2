"""What a store says of itself without its models: whose it is, its versions, log and gate history.

Knows where a store's parts lie; loads no student and no teacher. To tell more: a key in
`StoredState.to_json`, and a row in tables.py.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from conch_dna.checkpoints import FolderLock
from conch_dna.errors import ConchError
from conch_dna.sedimentation.adapters.adapter import ADAPTER_FILE
from conch_dna.sedimentation.changes.chelation_log import ChelationLog, log_files
from conch_dna.sedimentation.changes.gate import read_history
from conch_dna.sedimentation.changes.versions import Versions
from conch_dna.sedimentation.config import ChelationConfig
from conch_dna.sedimentation.stores.contract import RAW, VectorStore
from conch_dna.sedimentation.stores.edge import MANIFEST
from conch_dna.sedimentation.stores.folders import LOG, VECTORS, VERSIONS, state_of
from conch_dna.sedimentation.stores.open_store import open_store


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
        self.versions = Versions(store, state / VERSIONS, int(store.identity["dimension"]))
        self.log = ChelationLog(state / LOG)
        self.history = read_history(state)
        self.recovered = [*self.log.recovered, *self.versions.recovered]

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
        text = (self.versions.folder / name / ADAPTER_FILE).read_text(encoding="utf-8")
        document = json.loads(text)
        about = {each: document[each] for each in ("in_dimension", "out_dimension", "origin")}
        return {"adapter": document["kind"], **about}


def state_folder(location: str, given: str | None, collection: str) -> Path:
    """Where adapters, log and history of a store lie, as the engine has it.

    Raises:
        ConchError: The store is in memory, where no other command would find it.
    """
    if location == ":memory:":
        raise ConchError(
            "a store in memory ends with its command: give a folder or the URL of a server"
        )
    return state_of(location, given, collection)


def _open_vectors(location: str, state: Path, collection: str, api_key: str | None) -> VectorStore:
    if "://" in location:
        return open_store(location, collection=collection, api_key=api_key)
    if not (state / VECTORS / MANIFEST).is_file():
        raise ConchError(f"{location} holds no store yet: ingest documents first")
    return open_store(state / VECTORS)


def has_store(location: str, *, state: str | None, collection: str, api_key: str | None) -> bool:
    """Whether there is a store; see `stored_student`.

    Of a server that does not answer this says no, and so leaves the message to whoever opens it.
    """
    if "://" not in location:
        return (state_folder(location, state, collection) / VECTORS / MANIFEST).is_file()
    try:
        open_store(location, collection=collection, api_key=api_key).close()
    except ConchError:
        return False
    return True


def stored_student(
    location: str,
    *,
    state: str | None,
    collection: str,
    api_key: str | None,
) -> str:
    """The name of the student that a store was made with.

    Args:
        location: A folder or the URL of a server.
        state: Where the rest of the store lies; see `AntigravityEngine`.
        collection: Of a server.
        api_key: Of a server.

    Raises:
        ConchError: There is no store, or it cannot be opened.
    """
    folder = state_folder(location, state, collection)
    with _open_vectors(location, folder, collection, api_key) as store:
        return str(store.identity["student"])


@contextmanager
def opened_state(
    location: str,
    *,
    state: str | None,
    collection: str,
    api_key: str | None,
) -> Iterator[StoredState]:
    """A store without its models, locked while it is open; see `stored_student`.

    Raises:
        FolderInUseError: Another process has it open.
        ConchError: There is no store, or it is not whole.
    """
    folder = state_folder(location, state, collection)
    with ExitStack() as opening:
        store = opening.enter_context(_open_vectors(location, folder, collection, api_key))
        opening.enter_context(FolderLock(folder, elsewhere="give another location or --state"))
        yield StoredState(location, folder, store)
