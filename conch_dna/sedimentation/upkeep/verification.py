"""Whether a store is whole: everything that it keeps, compared with its digest.

Knows where a store's parts lie and who reads each; loads no model. To verify another part: a call
of `look` in `verified`.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from conch_dna.checkpoints import FolderLock, verify_folder
from conch_dna.errors import ConchError, FolderInUseError, NotWholeError, one_line
from conch_dna.sedimentation.adapters.adapter import EmbeddingAdapter
from conch_dna.sedimentation.changes.chelation_log import ChelationLog, log_files, read_events
from conch_dna.sedimentation.changes.collapse import NULL, CollapseNull
from conch_dna.sedimentation.changes.gate import GATE_HISTORY, read_history
from conch_dna.sedimentation.changes.versions import (
    OWN_STUDENT,
    STUDENT_FOLDER,
    STUDENT_NAME,
    opened_student,
    origin_of,
)
from conch_dna.sedimentation.documents import TEXT, TITLE, Document
from conch_dna.sedimentation.embedders.open_embedder import open_embedder
from conch_dna.sedimentation.embedders.teachers import count_cached
from conch_dna.sedimentation.results import VerifiedPart
from conch_dna.sedimentation.stored_state import StorePlace
from conch_dna.sedimentation.stores.contract import RAW, VectorStore
from conch_dna.sedimentation.stores.edge import MANIFEST, SHARD
from conch_dna.sedimentation.stores.ledger import LEDGER
from conch_dna.sedimentation.stores.open_store import LOG, TEACHER_VECTORS, VECTORS, VERSIONS
from conch_dna.sedimentation.stores.state import DOCUMENTS
from conch_dna.sedimentation.stores.stored_documents import coarse
from conch_dna.sedimentation.upkeep.deletion import recovered

NAMED = 5


def verified(place: StorePlace) -> list[VerifiedPart]:
    """Every part of a store, with what is wrong of those that are not whole.

    Reads all vectors and documents. What a killed process left is put right first, as by every
    other opening.

    Raises:
        FolderInUseError: Another process has it open.
        ConchError: There is no store, or its server cannot be reached.
    """
    parts: list[VerifiedPart] = []

    def look(name: str, at: Callable[[], str]) -> None:
        try:
            parts.append(VerifiedPart(name, True, at()))
        except NotWholeError as error:
            parts.append(VerifiedPart(name, False, one_line(error)))

    folder = place.folder
    if place.is_server:
        # Before a folder is made for a store that is not there; damage is told below.
        with suppress(NotWholeError):
            place.open_vectors().close()
    elif not (folder / VECTORS).is_dir():
        raise ConchError(f"{place.location} holds no store yet: ingest documents first")
    with FolderLock(folder, elsewhere="give another location or --state"):
        look("chelation log", lambda: _log(folder / LOG))
        growing = [*log_files(folder / LOG), *folder.glob(GATE_HISTORY)]
        if growing and not (folder / LEDGER).is_file():
            look("ledger", lambda: _no_ledger(folder))
        for path in sorted(folder.glob(f"{NULL}*.json")):
            look(f"null of version {path.stem.removeprefix(NULL)}", partial(_null, path))
        if (folder / TEACHER_VECTORS).is_dir():
            look("teacher vectors", lambda: f"{count_cached(folder / TEACHER_VECTORS):,}")
        found_there = (path.name for path in (folder / VERSIONS).glob("[!.]*") if path.is_dir())
        names = [each for each in found_there if not each.endswith(STUDENT_FOLDER)]
        try:
            store = _opened(place)
        except NotWholeError as error:
            look("gate history", lambda: _history(folder, RAW))
            parts.append(VerifiedPart("store", False, one_line(error)))
        else:
            with store:
                look("gate history", lambda: _history(folder, store.active))
                look("store", lambda: _settled(store, folder / LOG))
                damage = store.damage()
                for name in store.kept_contents():
                    what = "documents" if name == DOCUMENTS else f"vectors of version {name}"
                    count = store.count(RAW if name == DOCUMENTS else name)
                    found = damage.get(name, "")
                    if name == DOCUMENTS and found and (altered := _altered(store)):
                        found = f"{found}. Altered: {altered}"
                    parts.append(VerifiedPart(what, not found, found or f"{count:,}"))
                names = [each for each in (store.active, store.previous) if each not in (RAW, None)]
        for name in sorted(names):
            look(f"adapter of version {name}", partial(_adapter, folder / VERSIONS / name))
            with suppress(NotWholeError):
                origin = origin_of(folder / VERSIONS / name)
                if OWN_STUDENT in origin and STUDENT_NAME not in origin:
                    look(f"student of version {name}", partial(_student, folder, name, origin))
    return parts


def _history(folder: Path, active: str) -> str:
    history = read_history(folder)
    if active not in (RAW, *(entry["candidate"] for entry in history if entry["passed"])):
        raise NotWholeError(
            f"{GATE_HISTORY} lacks the decision that let {active} pass: put it back"
        )
    return f"{len(history)} decisions"


def _no_ledger(folder: Path) -> str:
    raise NotWholeError(
        f"{folder / LEDGER} is missing, so that nobody knows whether log and history have their "
        "ends: put it back, or use the store once where an earlier version made it"
    )


def _null(path: Path) -> str:
    kept = CollapseNull.read(path)
    return f"threshold {kept[0].threshold:.4f}" if kept else "of an earlier version, made anew"


def _opened(place: StorePlace) -> VectorStore:
    vectors = place.folder / VECTORS
    if not place.is_server and not place.has_store() and (vectors / SHARD).exists():
        raise NotWholeError(f"{vectors} has documents but no {MANIFEST}: put the file back")
    try:
        return place.open_vectors()
    except FolderInUseError:
        raise
    except ConchError as error:
        if place.is_server or not place.has_store():
            raise
        raise NotWholeError(str(error)) from error


def _settled(store: VectorStore, folder: Path) -> str:
    try:
        lines = recovered(store, ChelationLog(folder))
    except NotWholeError:
        # It is named as a part of its own; what waits for it, waits on.
        lines = []
    return "; ".join(lines) or f"active {store.active}, previous {store.previous or 'none'}"


def _log(folder: Path) -> str:
    return f"{sum(1 for _ in read_events(folder)):,} events"


def _adapter(folder: Path) -> str:
    if not folder.is_dir():
        raise NotWholeError(f"{folder} is missing: put it back")
    verify_folder(folder)
    adapter = EmbeddingAdapter.load(folder)
    return f"{adapter.kind}, {adapter.in_dimension} to {adapter.out_dimension} dimensions"


def _student(folder: Path, name: str, origin: dict[str, Any]) -> str:
    student = opened_student(folder / VERSIONS, name, origin, open_embedder)
    verify_folder(folder / VERSIONS / f"{name}{STUDENT_FOLDER}")
    return f"{student.dimension} dimensions"


def _altered(store: VectorStore) -> str:
    """The first documents that are others than their own digests say."""
    found: list[str] = []
    for page in store.pages(RAW):
        digests = store.digests(page.ids)
        for name, payload in zip(page.ids, page.payloads, strict=True):
            rest = {field: v for field, v in payload.items() if field not in (TITLE, TEXT)}
            title, text = str(payload.get(TITLE, "")), str(payload.get(TEXT, ""))
            # Of floats the last bit may be another, so that they prove nothing.
            is_exact = coarse(rest) == rest
            if is_exact and Document(name, text, title, rest).digest != digests.get(name):
                found.append(repr(name))
    return ", ".join(found[:NAMED]) + (", …" if len(found) > NAMED else "")
