"""The chelation log: queries that found a collapsed neighbourhood, in files that only grow.

Knows events and files; nothing of vectors, models or what is done about collapse. Each line holds
its own digest and that of the line before, and the ledger how many there are, so damage is found.
To record another fact: a field of `Event`, documented there; older lines then lack it, so give it a
default.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from conch_dna.checkpoints import (
    content_digest,
    remove_unfinished,
    replaced_folder,
    sync,
    write_atomically,
)
from conch_dna.errors import ConchError, NotWholeError
from conch_dna.sedimentation.documents import DocumentId
from conch_dna.sedimentation.stores.ledger import LEDGER, Least, acknowledge, least_of

EVENTS_FILE = "chelation_events.jsonl"
# In the ledger, which lies beside the log's folder.
CHELATION_LOG = "chelation log"
_REMEDY = f": restore it, or move all of the log's files and {LEDGER} away to begin a new log"
_ROTATED = re.compile(r"chelation_events\.(\d{6})\.jsonl")


@dataclass(frozen=True, kw_only=True)
class Event:
    """One query whose neighbourhood was collapsed. A line of the log is its fields as JSON.

    Attributes:
        number: From 1, without gaps.
        time: UTC, ISO 8601.
        query_digest: Content address of the query's text, `content_digest(text)`.
        query: The text, or None where the log was not asked to keep texts.
        version: Which version of the vectors answered.
        student_digest: Content address of the student that embedded the query.
        dispersion: Of the neighbourhood, see `collapse.dispersions`.
        threshold: What it lay below.
        neighbourhood: Ids of the documents found, best first.
        previous: Digest of the event before, empty for the first.
    """

    number: int
    time: str
    query_digest: str
    query: str | None
    version: str
    student_digest: str
    dispersion: float
    threshold: float
    neighbourhood: list[DocumentId]
    previous: str

    @property
    def digest(self) -> str:
        """Content address of the event and, through `previous`, of all before it."""
        return content_digest(json.dumps(asdict(self), sort_keys=True))

    @property
    def line(self) -> bytes:
        """As it stands in the log."""
        document = {**asdict(self), "digest": self.digest}
        return json.dumps(document, ensure_ascii=False, sort_keys=True).encode() + b"\n"


def log_files(folder: Path) -> list[Path]:
    """The log's files, oldest first, whether or not there are any."""
    rotated = sorted(path for path in folder.glob("*.jsonl") if _ROTATED.fullmatch(path.name))
    current = folder / EVENTS_FILE
    return [*rotated, current] if current.exists() else rotated


def read_events(folder: Path) -> Iterator[Event]:
    """Every event of a log, oldest first, each checked against its digest and the one before.

    Another process may be writing: a last line without its end is not there yet.

    Raises:
        NotWholeError: A line was altered, or lines or a file are missing; the message names where.
    """
    previous, number = "", 0
    # Before the log, which another process may be adding to.
    least = least_of(folder.parent, CHELATION_LOG)
    for path in log_files(folder):
        with open(path, "rb") as file:
            for row, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                event = _parsed(line, f"{path}, line {row}")
                if (event.number, event.previous) != (number + 1, previous):
                    raise NotWholeError(
                        f"{path}, line {row} is event {event.number} and does not follow event "
                        f"{number}: lines or a file of the log are missing{_REMEDY}"
                    )
                previous, number = event.digest, event.number
                least.require(str(path), number, previous, remedy=_REMEDY)
                yield event
    what = f"the chelation log in {folder}"
    least.require(what, number, previous, remedy=_REMEDY, ended=True)


def _parsed(line: bytes, where: str) -> Event:
    try:
        document = json.loads(line)
        written = document.pop("digest")
        event = Event(**document)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise NotWholeError(f"{where} is no event of the log{_REMEDY}") from error
    if event.digest != written:
        raise NotWholeError(f"{where} was altered, its digest is another{_REMEDY}")
    return event


class ChelationLog:
    """Appends events and reads them back; the caller holds the folder's lock.

    A last line that a killed process left half-written is moved to `chelation_events.half-<number>`
    and named in `recovered`: its event was never acknowledged.

    Args:
        folder: Where the files are; made when missing.
        rotate_bytes: A file that has reached this size is closed under the next number and stays
            part of the log.
        keep_queries: Whether events hold the text of the query, not only its digest.

    Attributes:
        recovered: A line for each thing that opening the log put right.

    Raises:
        NotWholeError: A line was altered, or lines or a file are missing.
        ConchError: The folder cannot be written to, or rotate_bytes is below 1.
    """

    def __init__(
        self, folder: Path, *, rotate_bytes: int = 10_000_000, keep_queries: bool = False
    ) -> None:
        if rotate_bytes < 1:
            raise ConchError(f"rotate_bytes is {rotate_bytes}: it must be 1 or more")
        self.folder = folder
        self.rotate_bytes = rotate_bytes
        self.keep_queries = keep_queries
        self.recovered: list[str] = []
        self._last: Event | None = None
        try:
            # Of a kill while the log was written anew, see `forget`.
            remove_unfinished(folder.parent)
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(folder, error) from error
        for event in read_events(folder):
            self._last = event
        self._set_half_line_aside()
        self._acknowledge()

    @property
    def path(self) -> Path:
        """The file that grows."""
        return self.folder / EVENTS_FILE

    def __len__(self) -> int:
        return self._last.number if self._last else 0

    def append(
        self,
        *,
        query: str,
        version: str,
        student_digest: str,
        dispersion: float,
        threshold: float,
        neighbourhood: Sequence[DocumentId],
    ) -> Event:
        """Log one collapsed neighbourhood; durable when it returns. See `Event`.

        Raises:
            ConchError: A figure is not finite, the neighbourhood is empty, or the disk is full; in
                that case the log is as it was.
        """
        if not (math.isfinite(dispersion) and math.isfinite(threshold)):
            raise ConchError(
                f"dispersion {dispersion} and threshold {threshold} must be finite to be logged"
            )
        if not neighbourhood:
            raise ConchError("a neighbourhood without documents cannot be logged as collapsed")
        event = Event(
            number=len(self) + 1,
            time=datetime.now(UTC).isoformat(timespec="milliseconds"),
            query_digest=content_digest(query),
            query=query if self.keep_queries else None,
            version=version,
            student_digest=student_digest,
            dispersion=float(dispersion),
            threshold=float(threshold),
            neighbourhood=list(neighbourhood),
            previous=self._last.digest if self._last else "",
        )
        before = self._last
        try:
            self._rotate()
            size = self._write(event.line)
        except OSError as error:
            raise _unwritable(self.path, error) from error
        try:
            self._last = event
            self._acknowledge()
        except ConchError as error:
            self._last = before
            self._cut(size)
            raise _unwritable(self.folder.parent / LEDGER, error) from error
        return event

    def events(self, *, version: str | None = None) -> Iterator[Event]:
        """Events, oldest first; only those that this version answered where one is named."""
        return (each for each in read_events(self.folder) if version in (None, each.version))

    def documents_logged(
        self, *, at_least: int, version: str | None = None
    ) -> dict[DocumentId, int]:
        """Documents that lay in collapsed neighbourhoods often enough, with how often.

        One event counts once for each of its documents; the same query asked again is another
        event.

        Args:
            at_least: Events a document must be in.
            version: Whose events count; of all versions where None.

        Returns:
            Most often first, those alike in the order they were first logged.

        Raises:
            ConchError: at_least is below 1.
        """
        if at_least < 1:
            raise ConchError(f"threshold {at_least} must be 1 event or more")
        counts: Counter[DocumentId] = Counter()
        for event in self.events(version=version):
            counts.update(list(dict.fromkeys(event.neighbourhood)))
        return {each: count for each, count in counts.most_common() if count >= at_least}

    def forget(self, ids: Sequence[DocumentId]) -> int:
        """Leave out every event whose neighbourhood names one of these documents.

        The others are numbered and chained anew, in the same files; half-written events that were
        kept aside go. The log is the old one or the new one, whenever the process ends.

        Returns:
            How many events are left out.

        Raises:
            NotWholeError: The log is not whole; it is left as it is.
            ConchError: The disk is full; the log is as it was.
        """
        gone = {(type(each), each) for each in ids}

        def stays(event: Event) -> bool:
            return not any((type(each), each) in gone for each in event.neighbourhood)

        for half in self.folder.glob("*.half-*"):
            half.unlink()
        left_out = sum(not stays(event) for event in self.events())
        if not left_out:
            return 0
        last: Event | None = None
        # A kill may leave the old log or the new one, of which neither is shorter than nothing.
        acknowledge(self.folder.parent, CHELATION_LOG, Least())
        with replaced_folder(self.folder) as folder:
            for path in log_files(self.folder):
                with open(folder / path.name, "wb") as file:
                    for line in path.read_bytes().splitlines(keepends=True):
                        event = _parsed(line, str(path))
                        if not stays(event):
                            continue
                        number, previous = (last.number, last.digest) if last else (0, "")
                        last = replace(event, number=number + 1, previous=previous)
                        file.write(last.line)
        self._last = last
        self._acknowledge()
        return left_out

    def _acknowledge(self) -> None:
        least = Least(len(self), self._last.digest if self._last else "")
        acknowledge(self.folder.parent, CHELATION_LOG, least)

    def _set_half_line_aside(self) -> None:
        """Cut a last line without its end off the file that grows, keeping what there is of it."""
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole == len(content):
            return
        number, aside = len(self) + 1, self.folder / f"chelation_events.half-{len(self) + 1}"
        write_atomically(aside, content[whole:])
        try:
            self._cut(whole)
        except OSError as error:
            raise _unwritable(self.path, error) from error
        self.recovered.append(
            f"event {number} was half-written ({len(content) - whole} bytes) when its process "
            f"ended; kept in {aside.name}"
        )

    def _rotate(self) -> None:
        if not self.path.exists() or self.path.stat().st_size < self.rotate_bytes:
            return
        rotated = [_ROTATED.fullmatch(path.name) for path in log_files(self.folder)]
        number = max((int(match[1]) for match in rotated if match), default=0) + 1
        self.path.rename(self.folder / f"chelation_events.{number:06d}.jsonl")
        sync(self.folder)

    def _write(self, line: bytes) -> int:
        """Add a line; returns how long the file was before."""
        is_new = not self.path.exists()
        size = 0 if is_new else self.path.stat().st_size
        try:
            with open(self.path, "ab") as file:
                file.write(line)
            sync(self.path)
        except OSError:
            self._cut(size)
            raise
        if is_new:
            sync(self.folder)
        return size

    def _cut(self, size: int) -> None:
        os.truncate(self.path, size)
        sync(self.path)


def _unwritable(path: Path, error: Exception) -> ConchError:
    return ConchError(
        f"cannot write the chelation log {path}: {error}. Free some disk space or choose another "
        "folder; what was logged before is whole"
    )
