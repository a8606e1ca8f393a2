"""Where the adapters, logs and caches of a store lie.

Knows locations and paths; opens nothing.
"""

from pathlib import Path

STATE = "conch_state"
# Folders in a store's: its vectors, their versions' adapters, the chelation log, and a cache.
VECTORS, VERSIONS, LOG, TEACHER_VECTORS = "vectors", "versions", "chelation", "teacher_vectors"


def state_of(location: str, given: str | Path | None, collection: str) -> Path:
    """The folder beside a store's vectors, or that of a store without one.

    Args:
        location: See `AntigravityEngine`.
        given: Wins, where there is one.
        collection: Of a server.

    >>> state_of("http://localhost:6333", None, "papers").as_posix()
    'conch_state/papers'
    """
    if given:
        return Path(given).expanduser()
    return Path(STATE) / collection if "://" in location else Path(location).expanduser()
