"""Files that are either whole or absent, what addresses them, and what versions made them.

Knows nothing of models or training; it moves named arrays and JSON documents to disk and back.
To store something new: give `write_folder` one more document or group of arrays. To record another
package: its name in PACKAGES.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from glob import escape
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from conch_dna import __version__
from conch_dna.errors import ConchError, FolderInUseError, NotWholeError, one_line
from conch_dna.loading.blas import blas_state

if TYPE_CHECKING:
    import mlx.core as mx

DIGESTS = "digests.json"
# Of what this program writes, nothing is nested so deeply or counts so far.
MOST_LEVELS, MOST_BITS = 64, 64
_TEMPORARY = ".writing-"
PACKAGES = ("mlx", "mlx-lm", "numpy")


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_digest(*parts: bytes | str | np.ndarray) -> str:
    """SHA-256 over parts, each preceded by its length so that no two lists collide."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else bytes(part)
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def provenance() -> dict[str, Any]:
    """Versions of this package and of those that decide its numbers, BLAS and platform."""
    versions = {"conch_dna": __version__, **{name: version(name) for name in PACKAGES}}
    return {"versions": versions, "platform": platform.platform(), "blas": blas_state()}


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes | str | Callable[[Path], None]) -> None:
    """Write one file to a temporary name, sync it, rename it; on failure nothing is left.

    Args:
        path: The file to make or replace; its folder is made when missing.
        content: Its bytes, its text, or a function that writes the file it is given (which has
            the same suffix).

    Raises:
        ConchError: The disk is full or not writable; the old file, if any, is untouched.
    """
    temporary = path.with_name(f"{_TEMPORARY}{os.getpid()}-{path.name}")

    def undo() -> None:
        # Where the parent is itself a file, not even `missing_ok` helps.
        with suppress(OSError):
            temporary.unlink()

    with _whole_or_absent(path, undo):
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            remove_left(path)
            content(temporary)
        elif isinstance(content, str):
            temporary.write_text(content, encoding="utf-8")
        else:
            temporary.write_bytes(content)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)


@contextmanager
def _whole_or_absent(path: Path, undo: Callable[[], None]) -> Iterator[None]:
    """Undoes what a failed or interrupted writer of `path` left, and says so in one line."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        undo()
        raise ConchError(
            f"cannot write {path}: {str(error).rstrip('.')}. Nothing half-written was left; free "
            "some disk space or choose another place, then run the same command again, with "
            "--resume where it has that"
        ) from error
    except BaseException:
        # Ctrl-C as well must leave nothing half-written.
        undo()
        raise


def write_json(path: Path, document: Any) -> None:
    """Write a JSON document atomically, indented, keys in their order."""
    write_atomically(path, json_text(document))


def json_text(document: Any) -> str:
    """A document as indented JSON text; NaN and infinities are refused."""
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def require_plain(value: Any) -> None:
    """Refuse what JSON or YAML may hold and nothing here can be meant to.

    Python cannot write an integer of thousands of digits, nor what is nested thousands deep, so
    that even a message about it would fail.

    Raises:
        ValueError: It is nested deeper than MOST_LEVELS, or an integer has more than MOST_BITS.
    """
    parts, levels = [value], 0
    while parts:
        if any(isinstance(part, int) and part.bit_length() > MOST_BITS for part in parts):
            raise ValueError(f"an integer has more than {MOST_BITS} bits")
        if levels == MOST_LEVELS and any(isinstance(part, dict | list) for part in parts):
            raise ValueError(f"it is nested deeper than {MOST_LEVELS} levels")
        mappings = [part.values() for part in parts if isinstance(part, dict)]
        lists = [part for part in parts if isinstance(part, list)]
        parts = list(chain.from_iterable([*mappings, *lists]))
        levels += 1


def parse_json(text: str | bytes, source: object) -> Any:
    """What a JSON text holds that another process may have cut off or altered.

    Args:
        text: As it was read.
        source: Where it comes from, for the message.

    Raises:
        NotWholeError: It is not JSON, or `require_plain` refuses it.
    """
    try:
        value = json.loads(text)
        require_plain(value)
        # Half a surrogate pair could be neither digested nor written.
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise NotWholeError(f"{source} cannot be read: {one_line(error)}") from error
    return value


def read_text(path: Path) -> str:
    """The text of a file that was written as UTF-8.

    Raises:
        NotWholeError: It cannot be read, or is no such text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise NotWholeError(f"{path} cannot be read: {one_line(error)}") from error


def read_json(path: Path, *, needs: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object from a file that another process may have cut off or altered.

    Args:
        path: The file.
        needs: Keys that must be there, and the types of their values.

    Raises:
        NotWholeError: It cannot be read, is not JSON or nested too deeply, is no object, or
            lacks a key or has another type there.
    """
    value = parse_json(read_text(path), path)
    require_keys(value, path, needs=needs)
    return dict(value)


def require_keys(value: Any, source: object, *, needs: Mapping[str, Any]) -> None:
    """Refuse what is no JSON object with these keys and types.

    Args:
        value: As `parse_json` gives it.
        source: Where it comes from, for the message.
        needs: Keys that must be there, and the types of their values.

    Raises:
        NotWholeError: It is no object, or lacks a key or has another type there.
    """
    if not isinstance(value, dict):
        raise NotWholeError(f"{source} is no JSON object")
    if wrong := [name for name, kind in needs.items() if not isinstance(value.get(name), kind)]:
        raise NotWholeError(f"{source} has no {', '.join(wrong)} as it should")


def save_arrays(
    path: Path, arrays: Mapping[str, mx.array], metadata: dict[str, str] | None = None
) -> None:
    """Write arrays as one safetensors file, atomically; their order does not matter."""
    write_atomically(path, lambda file: _save(file, arrays, metadata))


def _save(
    path: Path, arrays: Mapping[str, mx.array], metadata: dict[str, str] | None = None
) -> None:
    import mlx.core as mx

    # MLX writes in an order that depends on the mapping's: arrays that came from a file again, as
    # in a resumed run, would have the same values in other bytes, and another digest.
    mx.save_safetensors(str(path), dict(sorted(arrays.items())), metadata)


def write_folder(
    path: Path,
    *,
    arrays: Mapping[str, Mapping[str, mx.array]] | None = None,
    documents: Mapping[str, Any] | None = None,
    writers: Mapping[str, Callable[[Path], None]] | None = None,
    look: Callable[[Path], None] | None = None,
) -> None:
    """Make a folder of files that appears whole or not at all.

    Everything is written under a temporary name in the same parent, synced, and renamed. A
    folder that stands at `path` is replaced.

    Args:
        path: The folder to make.
        arrays: File name (ending in .safetensors) to named arrays.
        documents: File name (ending in .json) to JSON document, or other name to text.
        writers: File name to a function that writes the file it is given.
        look: Is given the finished folder before it stands at `path`, and may raise.

    Raises:
        ConchError: The disk is full or not writable; what stood at `path` is untouched.
    """
    with replaced_folder(path) as temporary:
        for name, group in (arrays or {}).items():
            _save(temporary / name, group)
        for name, document in (documents or {}).items():
            text = json_text(document) if name.endswith(".json") else document
            (temporary / name).write_text(text, encoding="utf-8")
        for name, write in (writers or {}).items():
            write(temporary / name)
        digests = {file.name: file_digest(file) for file in sorted(temporary.iterdir())}
        (temporary / DIGESTS).write_text(json_text(digests), encoding="utf-8")
        if look:
            look(temporary)


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill, which then stands at `path` in place of what was there.

    Raises:
        ConchError: The disk is full or not writable; what stood at `path` is untouched.
    """
    path = Path(os.path.realpath(path))  # What a link names is replaced, not the link.
    temporary = path.with_name(f"{_TEMPORARY}{os.getpid()}-{path.name}")
    replaced = path.with_name(f"{_TEMPORARY}old-{path.name}")

    def undo() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        if replaced.is_dir() and not path.exists():
            os.rename(replaced, path)

    with _whole_or_absent(path, undo):
        shutil.rmtree(temporary, ignore_errors=True)
        remove_left(path)
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.iterdir():
            sync(file)
        sync(temporary)
        if path.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(path, replaced)
        os.rename(temporary, path)
        sync(path.parent)
        shutil.rmtree(replaced, ignore_errors=True)


def verify_folder(path: Path) -> None:
    """Check every file of a folder against the digests stored in it.

    Raises:
        NotWholeError: A file is missing, added, truncated or altered; the message names it.
    """
    digests = folder_digests(path)
    try:
        for name, digest in digests.items():
            file = path / name
            if not file.is_file():
                raise NotWholeError(f"{path} is not whole: {name} is missing")
            if file_digest(file) != digest:
                raise NotWholeError(f"{path} is not whole: {name} was truncated or altered")
        for file in sorted(path.iterdir()):
            # Hidden files, such as the Finder's .DS_Store, are not read and do no harm.
            if file.name not in digests and file.name != DIGESTS and not file.name.startswith("."):
                raise NotWholeError(f"{path} is not whole: {file.name} was added")
    except OSError as error:
        raise NotWholeError(f"{path} cannot be read: {one_line(error)}") from error


def folder_digests(path: Path) -> dict[str, str]:
    """The digests stored in a folder, by file name; the files themselves are not looked at.

    Raises:
        NotWholeError: They are missing, or no digests of files in it.
    """
    try:
        digests = read_json(path / DIGESTS, needs={})
        plain = all(
            name and Path(name).name == name and isinstance(d, str) for name, d in digests.items()
        )
        if not plain:
            raise NotWholeError(f"{path / DIGESTS} holds other things than digests of files")
    except NotWholeError as error:
        raise NotWholeError(f"{path} has no readable {DIGESTS}: it is not whole") from error
    return digests


def require_files(path: Path) -> None:
    """Check that every file of a folder is there, without reading them; see `verify_folder`.

    Raises:
        NotWholeError: The digests cannot be read, or a file is missing; the message names them.
    """
    if missing := [name for name in folder_digests(path) if not (path / name).is_file()]:
        verb = "is" if len(missing) == 1 else "are"
        raise NotWholeError(f"{path} is not whole: {', '.join(missing)} {verb} missing")


def read_folder(path: Path) -> tuple[dict[str, dict[str, mx.array]], dict[str, Any]]:
    """Read back what `write_folder` wrote, verifying it first.

    Returns:
        The groups of arrays and the JSON documents, by file name.

    Raises:
        NotWholeError: A file is missing, added, truncated or altered; the message names it.
    """
    import mlx.core as mx

    verify_folder(path)
    arrays: dict[str, dict[str, mx.array]] = {}
    documents: dict[str, Any] = {}
    for name in sorted(folder_digests(path)):
        file = path / name
        if file.suffix == ".safetensors":
            try:
                loaded = mx.load(str(file))
                assert isinstance(loaded, dict)
                mx.eval(loaded)
            except (OSError, RuntimeError, ValueError) as error:
                raise NotWholeError(f"{file} cannot be read: {one_line(error)}") from error
            arrays[name] = loaded
        elif file.suffix == ".json":
            documents[name] = parse_json(read_text(file), file)
    return arrays, documents


def numbered_folders(parent: Path, prefix: str) -> list[tuple[int, Path]]:
    """Folders named `<prefix><number>` in `parent`, lowest number first."""
    folders = {path.name.removeprefix(prefix): path for path in parent.glob(f"{prefix}*/")}
    return sorted((int(name), path) for name, path in folders.items() if name.isdecimal())


def remove_folder(path: Path) -> None:
    """Delete a folder that is whole until it is gone, whenever the process is killed."""
    gone = path.with_name(f"{_TEMPORARY}{os.getpid()}-{path.name}")
    shutil.rmtree(gone, ignore_errors=True)
    os.rename(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


def remove_unfinished(parent: Path) -> None:
    """Delete temporary files and folders that a killed process left in `parent`.

    A folder that was moved aside for a replacement that never came is put back.
    """
    for path in parent.glob(f"{_TEMPORARY}*"):
        # The same path where nothing was moved aside.
        original = path.with_name(path.name.removeprefix(f"{_TEMPORARY}old-"))
        if path.is_dir() and not original.exists():
            os.rename(path, original)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def remove_left(path: Path) -> None:
    """Delete what killed processes left when they wrote a path; others' and what runs stays."""
    for left in path.parent.glob(f"{_TEMPORARY}*-{escape(path.name)}"):
        with suppress(PermissionError, ValueError):
            try:
                os.kill(int(left.name[len(_TEMPORARY) : -len(path.name) - 1]), 0)
            except (ProcessLookupError, OverflowError):
                shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Every key whose value differs, as `name: was A, now B`, in the order of the keys."""
    names = dict.fromkeys([*saved, *now])
    pairs = {name: (saved.get(name, "absent"), now.get(name, "absent")) for name in names}
    return [
        f"{name}: was {before!r}, now {after!r}"
        for name, (before, after) in pairs.items()
        if before != after
    ]


class FolderLock:
    """Lets one process at a time write to a folder; a killed process frees it.

    Use as a context manager.

    Args:
        folder: Made where it is not there.
        elsewhere: What a user can do instead of waiting, for the messages.

    Raises:
        FolderInUseError: Another process holds it; the message names that process.
    """

    def __init__(self, folder: Path, *, elsewhere: str = "choose another --output-dir") -> None:
        self.folder = folder
        self.elsewhere = elsewhere
        self._owner = folder / "run.lock.json"
        self._lock: Any = None

    def __enter__(self) -> FolderLock:
        from filelock import FileLock, Timeout

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.folder / "run.lock", timeout=0)
            self._lock.acquire()
        except Timeout:
            raise FolderInUseError(
                f"{self.folder} is in use by {self._holder()}: wait for it to end, or "
                f"{self.elsewhere}"
            ) from None
        except OSError as error:
            raise ConchError(
                f"cannot write to {self.folder}: {error}. Free it, or {self.elsewhere}"
            ) from error
        owner = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        try:
            write_json(self._owner, owner)
        except BaseException:
            # Whatever it was, a lock without an owner would keep everyone out.
            self._lock.release()
            raise
        return self

    def _holder(self) -> str:
        try:
            owner = read_json(self._owner, needs={"pid": int, "host": str, "since": str})
            return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
        except NotWholeError:
            return "another process"

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # A folder that was deleted meanwhile has no lock any more.
        with suppress(OSError):
            self._owner.unlink()
        with suppress(OSError):
            self._lock.release()
        if isinstance(error, OSError | RuntimeError) and not self.folder.is_dir():
            raise ConchError(
                f"{self.folder} was deleted or moved while it was in use: leave it where it is, "
                "and run the same command again"
            ) from error
