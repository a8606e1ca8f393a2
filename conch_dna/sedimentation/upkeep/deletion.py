"""Documents out of a store and whatever names them.

Knows a store and its log; no models. What else comes to name documents: `recovered`, so that a
deletion which a kill cut off forgets there too.
"""

from collections.abc import Sequence

from conch_dna.errors import ConchError
from conch_dna.sedimentation.changes.chelation_log import ChelationLog
from conch_dna.sedimentation.documents import MOST_DIGITS, DocumentId
from conch_dna.sedimentation.results import DeleteResult
from conch_dna.sedimentation.stores.contract import RAW, VectorStore


def recovered(store: VectorStore, log: ChelationLog) -> list[str]:
    """Finish what a killed process began, and let the log forget what the store forgets.

    Returns:
        A line for what was under way.
    """
    store.also_forget = log.forget
    return store.recover()


def delete(store: VectorStore, log: ChelationLog, ids: Sequence[DocumentId]) -> DeleteResult:
    """Forget documents; durable when it returns. See `AntigravityEngine.delete`."""
    ids = list(dict.fromkeys(ids))
    before = len(log)
    store.delete(ids)
    return DeleteResult(deleted=ids, events=before - len(log), documents=store.count(RAW))


def named(store: VectorStore, names: Sequence[str]) -> list[DocumentId]:
    """The ids that names on a command line mean: a text, or a number where no text is so called.

    Raises:
        ConchError: A name means two documents.
    """
    numbers = {name: int(name) for name in names if _is_number(name)}
    known = store.digests([*names, *numbers.values()])
    if both := [name for name, number in numbers.items() if name in known and number in known]:
        raise ConchError(
            f"{both[0]} and {both[0]!r} are two documents, the number and the text: delete the one "
            "that is meant in Python, by AntigravityEngine.delete"
        )
    return [numbers[name] if numbers.get(name) in known else name for name in names]


def _is_number(name: str) -> bool:
    plain = name.isascii() and name.removeprefix("-").isdigit() and len(name) <= MOST_DIGITS
    return plain and str(int(name)) == name
