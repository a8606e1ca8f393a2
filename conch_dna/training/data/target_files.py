"""A teacher's targets as files: what lies in a folder, whether it is whole, without the teacher.

Knows shards and what stands beside them; no model is loaded.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conch_dna.checkpoints import (
    DIGESTS,
    parse_json,
    read_json,
    remove_folder,
    verify_folder,
    write_folder,
    write_json,
)
from conch_dna.errors import ConchError, NotWholeError, number_of, one_line
from conch_dna.training.data.outcomes import TargetIdentity
from conch_dna.training.settings import TEACHER

if TYPE_CHECKING:
    from rich.table import Table

    from conch_dna.language_model import ModelSource

ABOUT = "about.json"
# In a domain's folder, the records that targets were made of.
DATA_FOLDER = "data"


def write_about(folder: Path, identity: TargetIdentity, teacher: str) -> None:
    """Write beside a folder's shards what they depend on, for people and for `check_shards`."""
    if read_about(folder) is None:
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
    place = place.resolve()
    if not place.is_dir():
        raise ConchError(f"{place} is no folder: give one with soft_targets in it")
    shards = place.rglob("soft_targets/*/*.safetensors")
    found = {path.parent for path in shards if path.is_file() and path.name[0] != "."}
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
    for path in _shards(folder):
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
    from conch_dna.screen.presentation import bytes_text, text_table

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
            one_line(row["teacher"] or "?"),
            what(row),
            ", ".join(f"{t:g}" for t in row["temperatures"] or ()) or "-",
            f"{row['texts']:,}",
            f"{row['tokens']:,}",
            bytes_text(row["bytes"]) if row["bytes"] >= 1e6 else f"{row['bytes']:,} B",
            f"{row['bytes'] / row['tokens']:.0f} B" if row["tokens"] else "-",
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
    for path in _shards(folder):
        try:
            if about is None:
                require_digest(path)
            else:
                shard, entries = open_shard(path, about[0])
                for start in range(0, entries[-1][2], BLOCK):
                    shard.read(start, min(start + BLOCK, entries[-1][2]))
        except (ConchError, ValueError) as error:
            yield path, str(error)
        else:
            yield path, None


def check_beside(places: Sequence[Path]) -> Iterator[str]:
    """What is wrong with teachers without weights and records that lie beside folders of shards."""
    for domain in sorted({place.parent.parent for place in places}):
        for folder in (domain / TEACHER, domain / DATA_FOLDER):
            if (folder / DIGESTS).is_file():
                try:
                    verify_folder(folder)
                except NotWholeError as error:
                    yield str(error)


def _shards(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.safetensors") if path.is_file())


def _entries(path: Path) -> list[Any]:
    from safetensors import SafetensorError, safe_open

    from conch_dna.training.data.target_shards import are_entries

    try:
        with safe_open(str(path), framework="numpy") as file:
            entries: list[Any] = parse_json((file.metadata() or {})["entries"], path)
    except (SafetensorError, OSError, KeyError) as error:
        raise NotWholeError(f"cache shard {path} is truncated or unreadable") from error
    if not are_entries(entries):
        raise NotWholeError(f"cache shard {path} does not say whose its rows are")
    return entries


def require_replaceable(folder: Path) -> None:
    """Refuse to replace what `write_weightless` did not write.

    Raises:
        ConchError: Something else lies there, such as a whole model.
    """
    from conch_dna.language_model import DIGEST_FILE, weight_files

    own = folder.is_dir() and not folder.is_symlink() and (folder / DIGEST_FILE).is_file()
    if (folder.exists() or folder.is_symlink()) and (not own or weight_files(folder)):
        raise ConchError(
            f"{folder} is there and no teacher without its weights, whose place it takes: move it, "
            "or choose another --output-dir"
        )


def write_weightless(teacher: "ModelSource", folder: Path) -> None:
    """Write a teacher without its weights: enough to learn from targets that it gave before.

    Args:
        teacher: With its weights, or one without that was brought here.
        folder: Where to; another of its kind that is there is replaced.

    Raises:
        ConchError: Something else lies there.
    """
    from conch_dna.language_model import DIGEST_FILE, TOKENIZER_FILES

    require_replaceable(folder)
    if folder.exists() and folder.samefile(teacher.folder):
        return
    kept = ["config.json", "generation_config.json", *TOKENIZER_FILES]
    names = [name for name in kept if (teacher.folder / name).is_file()]

    def copied(name: str) -> Any:
        return lambda path: shutil.copyfile(teacher.folder / name, path)

    known = {"model": teacher.model_id, "weights_digest": teacher.weights_digest}
    if folder.exists():
        remove_folder(folder)
    write_folder(folder, writers={n: copied(n) for n in names}, documents={DIGEST_FILE: known})


def write_data(folder: Path, sets: Mapping[str, Sequence[Any]], *, overwrite: bool) -> None:
    """Write the records that targets were made of, as `--data` reads a folder.

    Args:
        folder: Where to.
        sets: Records by `train`, `valid` and `test`; empty ones are left out.
        overwrite: Replace others that are there.

    Raises:
        ConchError: Others are there, and are not to be replaced.
    """
    from conch_dna.training.data.records import json_lines

    contents = {
        f"{name}.jsonl": json_lines(rows).encode("utf-8") for name, rows in sets.items() if rows
    }
    if folder.exists():
        there = {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}
        if there == contents:
            return
        if not overwrite:
            raise ConchError(
                f"{folder} holds the data of other targets: choose another --output-dir, or "
                "--overwrite it"
            )
        remove_folder(folder)

    def written(content: bytes) -> Any:
        return lambda path: path.write_bytes(content)

    write_folder(folder, writers={name: written(each) for name, each in contents.items()})


def checked_text(whole: int, damaged: int) -> str:
    """How many shards are whole."""
    text = f"{number_of(whole, 'shard')} whole"
    return f"{text}, {damaged} damaged" if damaged else text
