"""A model line on disk: its generations, which one is current, and what happened in what order.

Knows folders and JSON; nothing of models, training or gates. A generation's folder is whole or
absent; HEAD names one that is there. `log.jsonl` is a chain: each entry holds the digest of the
one before it and of the folder it speaks of, so an altered ancestor is found.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from conch_dna.checkpoints import (
    DIGESTS,
    FolderLock,
    content_digest,
    file_digest,
    parse_json,
    provenance,
    read_json,
    read_text,
    remove_unfinished,
    require_keys,
    sync,
    verify_folder,
    write_atomically,
)
from conch_dna.errors import ConchError, NotWholeError
from conch_dna.language_model import ADAPTER_FILES

FORMAT = "generation 1"
HEAD_FILE = "HEAD"
LOG_FILE = "log.jsonl"
MANIFEST_FILE = "manifest.json"
CANDIDATE = "CANDIDATE-"
GENERATION = re.compile(r"G(\d{3,})")
FAILED = re.compile(r"FAILED-(G\d{3,})-\S+")
BASE_KEYS = ("model", "weights", "tokenizer")
EVENTS = ("init", "promoted", "failed", "rollback")


def now() -> str:
    """The time, UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def generation_name(number: int) -> str:
    """`G007` for 7."""
    return f"G{number:03d}"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the log.

    Attributes:
        event: One of EVENTS.
        folder: The generation's folder that it speaks of.
        head: What HEAD names from then on.
        folder_digest: Content address of that folder.
        time: UTC, ISO 8601.
        previous: Digest of the entry before, empty for the first.
    """

    event: str
    folder: str
    head: str
    folder_digest: str
    time: str
    previous: str

    @property
    def text(self) -> str:
        """As it stands in the log."""
        return json.dumps(vars(self), ensure_ascii=False, sort_keys=True)

    @property
    def digest(self) -> str:
        """Content address of the entry and, through it, of all before it."""
        return content_digest(self.text)


class Line:
    """A line of generations in a folder.

    Args:
        root: The folder of all lines.
        name: The line's, which becomes a folder's name.

    Raises:
        ConchError: The name is not a plain one.
    """

    def __init__(self, root: Path, name: str) -> None:
        plain = name.replace("_", "").replace("-", "")
        if not (plain.isascii() and plain.isalnum() and len(name) <= 64):
            raise ConchError(
                f"line {name!r} becomes a folder's name: use up to 64 of a to z, A to Z, digits, "
                "- and _"
            )
        self.name = name
        self.folder = root / name

    def lock(self) -> FolderLock:
        """Held by the one process that changes the line."""
        return FolderLock(self.folder, elsewhere="choose another line or --root")

    @property
    def exists(self) -> bool:
        """Whether there is a line, with a first generation."""
        return (self.folder / HEAD_FILE).is_file()

    @property
    def head(self) -> str:
        """The current generation.

        Raises:
            ConchError: There is no line, or HEAD names what is not there.
        """
        try:
            name = (self.folder / HEAD_FILE).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConchError(
                f"there is no line {self.name!r} in {self.folder.parent}: make one with "
                "'conch-dna generations init'"
            ) from error
        if not GENERATION.fullmatch(name) or not os.path.isdir(self.folder / name):
            raise ConchError(
                f"{self.folder / HEAD_FILE} names {name!r}, which is no generation here: write "
                f"one of {', '.join(self.generations()) or 'none'} into it"
            )
        return name

    def generations(self) -> list[str]:
        """The generations that were current once, lowest number first."""
        return self._folders(GENERATION)

    def failed(self) -> list[str]:
        """Children that were refused, in the order of their names."""
        return self._folders(FAILED)

    def _folders(self, pattern: re.Pattern[str]) -> list[str]:
        if not self.folder.is_dir():
            return []
        names = [p.name for p in self.folder.iterdir() if p.is_dir() and pattern.fullmatch(p.name)]
        return sorted(names, key=lambda name: (len(name.split("-")[0]), name))

    def path(self, name: str) -> Path:
        """The folder of a generation or of a refused child.

        Raises:
            ConchError: There is none of that name.
        """
        if name not in (*self.generations(), *self.failed()):
            raise ConchError(
                f"{self.folder} has no generation {name!r}; it has "
                f"{', '.join([*self.generations(), *self.failed()]) or 'none'}"
            )
        return self.folder / name

    def manifest(self, name: str) -> dict[str, Any]:
        """What was written down of a generation; its folder is verified first.

        Raises:
            NotWholeError: The folder was altered.
        """
        path = self.path(name)
        verify_folder(path)
        return read_manifest(path)

    def ancestors(self, name: str) -> list[str]:
        """Parent, grandparent and so on, up to the first generation."""
        names = [name]
        while (parent := self.manifest(names[-1]).get("parent")) is not None:
            if parent in names[1:]:
                raise NotWholeError(f"{self.folder}: {parent} is its own ancestor")
            names.append(parent)
        return names[1:]

    def base(self, name: str) -> dict[str, str]:
        """The model that a generation's line began with: its name, and its content addresses."""
        first = [name, *self.ancestors(name)][-1]
        source = self.path(first) / MANIFEST_FILE
        base = self.manifest(first).get("base")
        require_keys(base, f"the base in {source}", needs=dict.fromkeys(BASE_KEYS, str))
        return dict(base or {})

    def adapter(self, name: str) -> Path | None:
        """The folder of a generation as an adapter; None for a first one that is the base alone."""
        path = self.path(name)
        return path if all((path / file).is_file() for file in ADAPTER_FILES) else None

    @property
    def next_name(self) -> str:
        """Of the next child; a number that was current once is never used again."""
        numbers = [int(name[1:]) for name in self.generations()]
        return generation_name(max(numbers, default=-1) + 1)

    @property
    def candidate(self) -> Path:
        """Where the next child is written, whole or not at all, before it is judged."""
        return self.folder / f"{CANDIDATE}{self.next_name}"

    def next_manifest(
        self, parents: tuple[str | None, str | None], *, seed: int, **facts: Any
    ) -> dict[str, Any]:
        """What is written down of the next child.

        Args:
            parents: Parent and grandparent, where there are any.
            seed: Of everything that was drawn.
            **facts: What else is to be said of it.
        """
        return {
            "format": FORMAT,
            "line": self.name,
            "generation": self.next_name,
            "parent": parents[0],
            "grandparent": parents[1],
            **facts,
            **provenance(),
            "seed": seed,
            "created": now(),
        }

    # What changes the line; the caller holds the lock.

    def promote(self, candidate: Path, *, event: str = "promoted") -> str:
        """Make a candidate the current generation: its folder, then HEAD, then the log.

        Killed in between, the line is whole; `recover` does what was left.

        Raises:
            ConchError: The candidate is not whole, or the line has changed since it was made.
        """
        verify_folder(candidate)
        name = candidate.name.removeprefix(CANDIDATE)
        if name != self.next_name or not candidate.name.startswith(CANDIDATE):
            raise ConchError(f"{candidate} is not the next generation {self.next_name} of the line")
        self._rename(candidate, self.folder / name)
        self._set_head(name)
        self._append(event, name)
        return name

    def archive(self, candidate: Path) -> str:
        """Keep a refused candidate as `FAILED-<name>-<time>`; HEAD stays.

        Raises:
            ConchError: The candidate is not whole.
        """
        verify_folder(candidate)
        child = candidate.name.removeprefix(CANDIDATE)
        name = f"FAILED-{child}-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}"
        self._rename(candidate, self.folder / name)
        self._append("failed", name)
        return name

    def rollback(self, to: str | None = None) -> str:
        """Let HEAD name an ancestor again, by default the parent; nothing is deleted.

        Raises:
            ConchError: The generation is no ancestor of the current one.
        """
        head = self.head
        ancestors = self.ancestors(head)
        target = to or (ancestors[0] if ancestors else None)
        if target is None:
            raise ConchError(
                f"{head} is the first generation of {self.name!r}: nothing is before it"
            )
        if target not in ancestors:
            raise ConchError(
                f"{target} is no ancestor of {head}; its ancestors are "
                f"{', '.join(ancestors) or 'none'}"
            )
        verify_folder(self.folder / target)
        self._set_head(target)
        self._append("rollback", target)
        return target

    def recover(self) -> list[str]:
        """Finish what a killed process left undone, and say what that was.

        Returns:
            A line for each thing that was done; none where nothing was left.
        """
        done = []
        remove_unfinished(self.folder)
        logged = {entry.folder for entry in self.log()}
        for name in self.generations():
            if name not in logged:
                parent = self.manifest(name).get("parent")
                if parent is None or (self.exists and self.head == parent):
                    self._set_head(name)
                self._append("init" if parent is None else "promoted", name)
                done.append(f"finished the promotion of {name}")
        for name in self.failed():
            if name not in logged:
                self._append("failed", name)
                done.append(f"finished the archive of {name}")
        entries = self.log()
        if entries and self.exists and entries[-1].head != self.head:
            # HEAD is written before the log, so it is what was wanted.
            self._append("rollback", self.head)
            done.append(f"finished the return to {self.head}")
        return done

    def _rename(self, source: Path, target: Path) -> None:
        os.rename(source, target)
        sync(self.folder)

    def _set_head(self, name: str) -> None:
        write_atomically(self.folder / HEAD_FILE, name + "\n")

    def _append(self, event: str, name: str) -> None:
        entries = self.log()
        entry = Entry(
            event=event,
            folder=name,
            head=self.head,
            folder_digest=folder_digest(self.folder / name),
            time=now(),
            previous=entries[-1].digest if entries else "",
        )
        text = "".join(f"{each.text}\n" for each in [*entries, entry])
        write_atomically(self.folder / LOG_FILE, text)

    def log(self) -> list[Entry]:
        """What happened, oldest first.

        Raises:
            NotWholeError: A line of the log is none.
        """
        path = self.folder / LOG_FILE
        if not path.is_file():
            return []
        entries = []
        names = [each.name for each in fields(Entry)]
        for number, text in enumerate(read_text(path).splitlines(), 1):
            try:
                values = parse_json(text, path)
                require_keys(values, path, needs=dict.fromkeys(names, str))
                entries.append(Entry(**values))
            except (NotWholeError, TypeError) as error:
                raise NotWholeError(f"{path} is not whole: line {number} is no entry") from error
        return entries

    def problems(self) -> list[str]:
        """Everything about the line that is not as it was written; none for a whole line."""
        faults: list[str] = []
        try:
            entries = self.log()
        except NotWholeError as error:
            return [str(error)]
        previous = ""
        for number, entry in enumerate(entries, 1):
            if entry.previous != previous:
                faults.append(f"{LOG_FILE} line {number} does not follow the one before it")
            previous = entry.digest
        recorded = {entry.folder: entry.folder_digest for entry in entries}
        present = [*self.generations(), *self.failed()]
        faults += [f"{name} is in the log and gone" for name in recorded if name not in present]
        for name in present:
            faults += self._folder_problems(name, recorded)
        try:
            head = self.head
            if entries and entries[-1].head != head:
                faults.append(f"{HEAD_FILE} names {head}, the log's last entry {entries[-1].head}")
        except ConchError as error:
            faults.append(str(error))
        return faults

    def _folder_problems(self, name: str, recorded: Mapping[str, str]) -> Sequence[str]:
        path = self.folder / name
        try:
            verify_folder(path)
            manifest = read_manifest(path)
        except NotWholeError as error:
            return [str(error)]
        problems = []
        if name not in recorded:
            problems.append(f"{name} is not in the log")
        elif folder_digest(path) != recorded[name]:
            problems.append(f"{name} is another than when it entered the log")
        for ancestor, digest in manifest["digests"]["parents"].items():
            if ancestor not in self.generations():
                problems.append(f"{name} grew from {ancestor}, which is gone")
            elif folder_digest(self.folder / ancestor) != digest:
                problems.append(f"{name} grew from another {ancestor} than the one that is there")
        return problems


def read_manifest(path: Path) -> dict[str, Any]:
    """What a generation's folder says of it.

    Raises:
        NotWholeError: It says nothing, or something of another form.
    """
    file = path / MANIFEST_FILE
    manifest = read_json(file, needs={"digests": dict, "parent": str | None})
    require_keys(manifest["digests"], f"digests in {file}", needs={"parents": dict})
    return manifest


def folder_digest(path: Path) -> str:
    """Content address of a folder that `checkpoints.write_folder` made: of all its files.

    Raises:
        NotWholeError: It has no list of digests.
    """
    try:
        return file_digest(path / DIGESTS)
    except OSError as error:
        raise NotWholeError(f"{path} has no readable {DIGESTS}: it is not whole") from error
