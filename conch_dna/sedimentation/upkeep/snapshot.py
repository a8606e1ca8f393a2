"""A copy of a store in a folder, taken while nobody writes and looked at before it stands.

Knows folders and what verifies them; loads no model.
"""

import os
import shutil
from pathlib import Path

from conch_dna.checkpoints import FolderLock, remove_left, sync
from conch_dna.errors import ConchError, NotWholeError, one_line
from conch_dna.sedimentation.stored_state import StorePlace
from conch_dna.sedimentation.upkeep.verification import verified


def snapshot(place: StorePlace, copy: Path) -> int:
    """Copy a store whole: documents, vectors of all versions, adapters, log, history and caches.

    Args:
        place: Of the store, in a folder; what a killed process left in it is put right first.
        copy: The folder to make. What is in it is a store again.

    Returns:
        Bytes that were copied.

    Raises:
        ConchError: The store is on a server, or is not there; the folder is there, or lies in the
            store; or the disk is full. Nothing half-written is left.
        FolderInUseError: Another process has the store open.
        NotWholeError: The store is not whole; what is not is named.
    """
    if place.is_server:
        raise ConchError(
            "a server's vectors are copied by the server's own snapshots: give a store's folder"
        )
    folder, copy = place.folder, copy.expanduser()
    if copy.exists():
        raise ConchError(f"{copy} is there: name another folder, or move it away")
    if folder.resolve() in copy.resolve().parents:
        raise ConchError(f"{copy} lies in the store itself: name a folder elsewhere")
    if broken := [part for part in verified(place) if not part.whole]:
        raise NotWholeError(f"{folder} is not whole: {broken[0].name}: {broken[0].detail}")
    # As in checkpoints: a name that `remove_left` knows, then one rename.
    temporary = copy.with_name(f".writing-{os.getpid()}-{copy.name}")
    remove_left(copy)
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        with FolderLock(folder, elsewhere="give another location"):
            shutil.copytree(folder, temporary, ignore=shutil.ignore_patterns("run.lock*"))
        taken = StorePlace(str(temporary), None, place.collection, None)
        if broken := [part for part in verified(taken) if not part.whole]:
            raise NotWholeError(f"the copy is not whole: {broken[0].name}: {broken[0].detail}")
        for path in (*temporary.rglob("*"), temporary):
            sync(path)
        os.rename(temporary, copy)
        sync(copy.parent)
    except (OSError, shutil.Error) as error:
        raise ConchError(
            f"cannot copy to {copy}: {one_line(error)}. Free some disk space or name another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return sum(path.stat().st_size for path in copy.rglob("*") if path.is_file())
