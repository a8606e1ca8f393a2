"""Opens a store by its location: a folder, a server's address, or memory.

Knows which class serves which location, and where what belongs to a store lies; nothing of what
they do. To add a store: subclass `VectorStore`, choose it here, add it to the contract tests.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conch_dna.errors import ConchError
from conch_dna.sedimentation.stores.contract import EXACT_BELOW, VectorStore

STATE = "conch_state"
# Folders in a store's: its vectors, their versions' adapters, the chelation log, and a cache.
VECTORS, VERSIONS, LOG, TEACHER_VECTORS = "vectors", "versions", "chelation", "teacher_vectors"


def open_store(
    location: str | Path,
    *,
    identity: Mapping[str, Any] | None = None,
    collection: str = "documents",
    api_key: str | None = None,
    exact_below: int = EXACT_BELOW,
) -> VectorStore:
    """Open a store, or make it where there is none.

    Args:
        location: A folder (Qdrant Edge, in this process), the URL of a Qdrant server beginning
            with `http://` or `https://`, or `:memory:`.
        identity: `student` (a name), `digest` and `dimension` of what makes the raw vectors.
            Needed to make a store; compared with that of one that exists.
        collection: Name on a server, where several stores can be.
        api_key: Of a server.
        exact_below: Documents from which on searches are approximate unless asked for exact ones.

    Raises:
        FolderInUseError: Another process has the folder open.
        ConchError: The store was made with another student or dimension, there is none and no
            identity was given, or the server cannot be reached.
    """
    text = str(location)
    is_server = text.startswith(("http://", "https://"))
    if api_key is not None and not is_server:
        raise ConchError(f"an API key is for a server, but {text} is not the URL of one")
    if is_server or text == ":memory:":
        from conch_dna.sedimentation.stores.server import ServerStore

        return ServerStore(
            text, identity, collection=collection, api_key=api_key, exact_below=exact_below
        )
    if "://" in text:
        raise ConchError(
            f"{text} is no location of a store: give a folder, a URL that begins with http:// or "
            "https://, or :memory:"
        )
    from conch_dna.sedimentation.stores.edge import EdgeStore

    return EdgeStore(Path(location), identity, exact_below=exact_below)


def state_of(location: str, folder: str | Path | None, collection: str) -> Path:
    """The folder beside a store's vectors, or that of a store without one.

    Args:
        location: A folder, or the URL of a server.
        folder: Where a user wants it; None for the usual place.
        collection: Of a server.

    >>> state_of("http://localhost:6333", None, "papers").as_posix()
    'conch_state/papers'
    """
    if folder:
        return Path(folder).expanduser()
    return Path(STATE) / collection if "://" in location else Path(location).expanduser()
