"""How much of a store was acknowledged: entries of the files that only grow, and its format.

A chain of digests shows that a line was altered, not that the last ones were cut off. Knows one
file beside them; nothing of what the entries say. To count another file: `acknowledge` after each
of its entries, and `Least` where it is read.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from conch_dna.checkpoints import read_json, require_keys, write_json
from conch_dna.errors import NotWholeError
from conch_dna.sedimentation.stores.state import FORMAT, sealed

LEDGER = "ledger.json"


@dataclass(frozen=True)
class Least:
    """What a file must hold at least; a killed process may have added what nobody was told of.

    Attributes:
        count: Of the entries.
        digest: Of the last of them and all before it.
    """

    count: int = 0
    digest: str = ""

    def require(
        self, what: str, count: int, digest: str, *, remedy: str = "", ended: bool = False
    ) -> None:
        """Compare with what was read up to here.

        Args:
            what: The file, for the message.
            count: Entries that were read.
            digest: Of the last of them and all before it.
            remedy: End of the message.
            ended: There are no more.

        Raises:
            NotWholeError: Entries were cut off or exchanged.
        """
        if count == self.count and digest != self.digest:
            raise NotWholeError(f"{what}: entry {count} is another than {LEDGER} has{remedy}")
        if ended and count < self.count:
            raise NotWholeError(
                f"{what} holds {count} entries, but {self.count} were acknowledged: the end is "
                f"missing{remedy}"
            )


def least_of(folder: Path, name: str) -> Least:
    """What a file must hold at least; nothing where there is no account of it.

    Args:
        folder: Where the ledger lies.
        name: Of the file, as `acknowledge` was given it.

    Raises:
        NotWholeError: The ledger was altered.
    """
    return Least(**_read(folder)["entries"].get(name, {}))


def acknowledge(folder: Path, name: str, least: Least) -> None:
    """Note what a file holds now; durable when it returns.

    Raises:
        NotWholeError: The ledger was altered.
        ConchError: The disk is full; the ledger is as it was.
    """
    known = _read(folder)["entries"]
    if known.get(name) != asdict(least):
        entries = {**known, name: asdict(least)}
        write_json(folder / LEDGER, sealed({"format": FORMAT, "entries": entries}))


def require_format(folder: Path, found: int, source: Path) -> None:
    """Refuse what an earlier format stands in for, as it has no digests to compare with.

    Args:
        folder: Where the ledger lies.
        found: The format of a manifest.
        source: The manifest, for the message.

    Raises:
        NotWholeError: The ledger was altered, or tells of a later format.
    """
    written = _read(folder)["format"]
    if found < written:
        raise NotWholeError(
            f"{source} has format {found}, but {folder / LEDGER} was written with format {written}"
        )


def _read(folder: Path) -> dict[str, Any]:
    path = folder / LEDGER
    if not path.exists():
        return {"format": 0, "entries": {}}
    try:
        document = read_json(path, needs={"format": int, "entries": dict, "digest": str})
        if document != sealed({name: document[name] for name in ("format", "entries")}):
            raise NotWholeError(f"{path} was altered, its digest is another")
        for name, entry in document["entries"].items():
            require_keys(entry, f"{name} in {path}", needs={"count": int, "digest": str})
    except NotWholeError as error:
        raise NotWholeError(f"{error}. Restore {path}") from error
    return document
