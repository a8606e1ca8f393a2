"""A teacher's targets as files: what lies in a folder, whether it is whole, without the teacher.

Knows shards and what stands beside them; no model is loaded.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conch_dna.checkpoints import read_json, write_folder, write_json
from conch_dna.errors import ConchError, NotWholeError, number_of
from conch_dna.training.data.outcomes import TargetIdentity

if TYPE_CHECKING:
    from rich.table import Table

    from conch_dna.language_model import ModelSource

ABOUT = "about.json"


def write_about(folder: Path, identity: TargetIdentity, teacher: str) -> None:
    """Write beside a folder's shards what they depend on, for people and for `check_shards`."""
    if not (folder / ABOUT).is_file():
        write_json(folder / ABOUT, {"teacher_model": teacher, **asdict(identity)})


def read_about(folder: Path) -> tuple[TargetIdentity, str] | None:
    """What `write_about` wrote; None where it is not there or not of these shards."""
    try:
        found = read_json(folder / ABOUT, needs={"teacher_model": str, "temperatures": list})
        values = {each.name: found[each.name] for each in fields(TargetIdentity)}
        identity = TargetIdentity(**{**values, "temperatures": tuple(values["temperatures"])})
        whole = identity.digest[:16] == folder.name
    except (NotWholeError, KeyError, TypeError, ValueError):
        return None
    return (identity, found["teacher_model"]) if whole else None


def target_folders(place: Path) -> list[Path]:
    """Every folder of shards in a folder or below.

    Raises:
        ConchError: There is none.
    """
    if not place.is_dir():
        raise ConchError(f"{place} is no folder: give one with soft_targets in it")
    shards = place.rglob("soft_targets/*/*.safetensors")
    found = {path.parent for path in shards if not path.name.startswith(".")}
    if place.parent.name == "soft_targets":
        found |= {path.parent for path in place.glob("*.safetensors")}
    elif place.name == "soft_targets":
        found |= {path.parent for path in place.glob("*/*.safetensors")}
    if not found:
        raise ConchError(f"there are no soft targets in {place} or below")
    return sorted(found)


def describe_targets(folder: Path) -> dict[str, Any]:
    """What a folder of shards holds, told from their headers.

    Returns:
        `folder`, `teacher` (None where nobody wrote it down), `kept` or `drawn` tokens, `bits`,
        `temperatures`, `texts`, `tokens`, `bytes`, and `unreadable`: the names of such shards.
    """
    about = read_about(folder)
    texts = tokens = size = 0
    unreadable = []
    for path in sorted(folder.glob("*.safetensors")):
        size += path.stat().st_size
        try:
            entries = _entries(path)
        except NotWholeError:
            unreadable.append(path.name)
            continue
        texts += len(entries)
        tokens += entries[-1][2]
    identity = about[0] if about else None
    return {
        "folder": str(folder),
        "teacher": about[1] if about else None,
        "kept": identity and identity.top_k,
        "drawn": identity and identity.draws,
        "bits": identity and identity.bits,
        "temperatures": list(identity.temperatures) if identity else None,
        "texts": texts,
        "tokens": tokens,
        "bytes": size,
        "unreadable": unreadable,
    }


def targets_table(rows: Sequence[dict[str, Any]]) -> "Table":
    """What `describe_targets` found, a folder a line."""
    from conch_dna.presentation import bytes_text, text_table

    def what(row: dict[str, Any]) -> str:
        if row["teacher"] is None:
            return "not written down"
        if row["drawn"]:
            return f"{row['drawn']} drawn"
        return f"{row['kept']} kept, {row['bits']} bits" if row["kept"] else "likelihoods"

    columns = ("folder", "teacher", "each token", "at", "texts", "tokens", "size", "a token")
    cells = [
        (
            row["folder"],
            row["teacher"] or "?",
            what(row),
            ", ".join(f"{t:g}" for t in row["temperatures"] or ()) or "-",
            f"{row['texts']:,}",
            f"{row['tokens']:,}",
            bytes_text(row["bytes"]),
            f"{row['bytes'] / max(1, row['tokens']):.0f} B",
        )
        for row in rows
    ]
    return text_table("Soft targets", columns, cells, numbers=columns[2:])


def check_shards(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """Read everything in a folder of shards.

    Yields:
        Each shard, and what is wrong with it; None where it is whole.
    """
    from conch_dna.training.data.target_codec import BLOCK
    from conch_dna.training.data.target_shards import open_shard, require_digest

    about = read_about(folder)
    for path in sorted(folder.glob("*.safetensors")):
        try:
            if about is None:
                require_digest(path)
            else:
                shard, entries = open_shard(path, about[0])
                for start in range(0, entries[-1][2], BLOCK):
                    shard.read(start, min(start + BLOCK, entries[-1][2]))
        except (NotWholeError, ValueError) as error:
            yield path, str(error)
        else:
            yield path, None


def _entries(path: Path) -> list[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            entries = json.loads((file.metadata() or {})["entries"])
        return [[str(key), int(start), int(end)] for key, start, end in entries] or [["", 0, 0]]
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise NotWholeError(f"cache shard {path} is truncated or unreadable") from error


def write_weightless(teacher: "ModelSource", folder: Path) -> None:
    """Write a teacher without its weights: enough to learn from targets that it gave before.

    Args:
        teacher: With its weights.
        folder: Where to; one that is there is replaced.
    """
    from conch_dna.language_model import DIGEST_FILE, TOKENIZER_FILES

    kept = ["config.json", "generation_config.json", *TOKENIZER_FILES]
    names = [name for name in kept if (teacher.folder / name).is_file()]

    def copied(name: str) -> Any:
        return lambda path: shutil.copyfile(teacher.folder / name, path)

    known = {"model": teacher.model_id, "weights_digest": teacher.weights_digest}
    if folder.exists():
        shutil.rmtree(folder)
    write_folder(folder, writers={n: copied(n) for n in names}, documents={DIGEST_FILE: known})


def checked_text(whole: int, damaged: int) -> str:
    """How many shards are whole."""
    text = f"{number_of(whole, 'shard')} whole"
    return f"{text}, {damaged} damaged" if damaged else text
