"""Experience on disk: what was asked, what was answered, and what should have been said.

Knows JSON lines and locks; nothing of models, adapters or retraining. To record another fact: a
field of `Experience` with a default, since older lines lack it.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from conch_dna.checkpoints import sync, write_atomically
from conch_dna.digests import content_digest
from conch_dna.errors import ConchError, FolderInUseError
from conch_dna.progress import Report, silent
from conch_dna.retraining.redaction import redacted, redaction_names
from conch_dna.training.settings import validate_domain

Message = dict[str, str]

KINDS = ("success", "correction", "fallback")
ANSWERERS = ("neuron", "ego")
ENDS = ("stop", "length")
SUFFIX = ".jsonl"
LOCK_TIMEOUT_S = 30.0
# What stays after the oldest were dropped, so that not every record rewrites the file.
KEPT_SHARE = 0.9
_TAIL_BYTES = 256


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@dataclass(frozen=True, kw_only=True)
class Experience:
    """One answer, and what became of it. A line of the file is its fields as JSON.

    Attributes:
        domain: Whose adapter was asked.
        messages: The conversation up to the answer, as `{"role", "content"}`.
        answer: What the neuron answered.
        kind: "success", the answer was good; "correction", somebody said a better one;
            "fallback", EGO answered instead.
        better: What should have been said; None for a success.
        problem: What was wrong, in words; may be empty.
        confidence: The neuron's, between 0 and 1; None where it was not measured.
        by: Who answered the user: "neuron", or "ego" after it was handed over.
        finish_reason: "length" where the text to learn was cut off, so that its end is not learned.
        time: UTC, ISO 8601.

    Raises:
        ConchError: A field is not of its kind; all such fields are named at once.
    """

    domain: str
    messages: tuple[Message, ...]
    answer: str
    kind: str
    better: str | None = None
    problem: str = ""
    confidence: float | None = None
    by: str = "neuron"
    finish_reason: str = "stop"
    time: str = field(default_factory=_now)

    def __post_init__(self) -> None:
        validate_domain(self.domain, with_own_data=True)
        problems = [
            f"{name} {value!r} is not one of {', '.join(known)}"
            for name, value, known in (
                ("kind", self.kind, KINDS),
                ("by", self.by, ANSWERERS),
                ("finish_reason", self.finish_reason, ENDS),
            )
            if value not in known
        ]
        problems += _message_problems(self.messages)
        problems += [
            f"{name} is {getattr(self, name)!r}, not text"
            for name in ("answer", "problem", "time")
            if not isinstance(getattr(self, name), str)
        ]
        if self.kind == "success":
            if self.better is not None:
                problems.append("a success has no better answer: it is a correction with one")
            if self.answer == "":
                problems.append("a success with an empty answer teaches nothing")
        elif not (isinstance(self.better, str) and self.better):
            problems.append(f"a {self.kind} needs the better answer as text, and it is not empty")
        sure = self.confidence
        number = isinstance(sure, int | float) and not isinstance(sure, bool)
        # NaN is not between anything.
        if sure is not None and not (number and 0 <= sure <= 1):
            problems.append(f"confidence {sure!r} is not between 0 and 1")
        if not problems:
            try:
                json.dumps(asdict(self), ensure_ascii=False).encode()
            except UnicodeEncodeError:
                problems.append("half a surrogate pair (\\ud800 to \\udfff) is no character")
        if problems:
            raise ConchError(f"experience of {self.domain}: {'; '.join(problems)}")

    @property
    def target(self) -> str:
        """What is to be learned: the better answer, or the good one."""
        return self.answer if self.better is None else self.better

    @property
    def id(self) -> str:
        """Content address of what can be learned from it; when and how sure do not count."""
        parts = (self.domain, self.kind, self.answer, self.better, self.finish_reason)
        return content_digest(json.dumps([*parts, list(self.messages)], sort_keys=True))[:32]

    @property
    def line(self) -> bytes:
        """As it stands in the file."""
        document = {**asdict(self), "id": self.id}
        return json.dumps(document, ensure_ascii=False, sort_keys=True).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> "Experience":
        """Read a line of the file back.

        Raises:
            ConchError: It is not whole, or was altered.
        """
        try:
            document = json.loads(line)
            written = document.pop("id")
            messages = tuple(document.pop("messages"))
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise ConchError(f"no whole record ({len(line)} bytes)") from error
        unknown = sorted(set(document) - {each.name for each in fields(cls)})
        try:
            found = cls(messages=messages, **document)
        except TypeError as error:
            what = f"unknown fields {', '.join(unknown)}" if unknown else "fields are missing"
            raise ConchError(f"no record: {what}") from error
        if found.id != written:
            raise ConchError("altered: its id belongs to another content")
        return found


def _message_problems(messages: Any) -> list[str]:
    if not isinstance(messages, tuple) or not messages:
        return ["messages are a tuple of at least one turn"]
    for turn in messages:
        if (
            not isinstance(turn, dict)
            or set(turn) != {"role", "content"}
            or not all(isinstance(value, str) for value in turn.values())
        ):
            return [f"the turn {turn!r} is no object of a role and a content, both text"]
    if messages[-1]["role"] == "assistant":
        return ["messages end before the answer, and these end with one"]
    return []


@dataclass
class _Known:
    """What this process has read of a file: up to where, how that ended, and which records."""

    inode: int = -1
    size: int = 0
    tail: bytes = b""
    ids: set[str] = field(default_factory=set)


class ExperienceBuffer:
    """Experience of each domain in `<folder>/<domain>.jsonl`, to which any process may append.

    A record is on the disk when `add` returns. What a killed process left half-written is no
    record; the next one begins on a line of its own.

    Args:
        folder: Made when something is added.
        max_records: Most records of one domain. Beyond it the oldest that are settled are dropped,
            then the oldest successes; where that does not make room, the new one is refused.
        redact: Names of REDACTIONS, or True for all: these are replaced before anything is kept.
        settled: Gives the ids of a domain's records that were learned from, or never will be.
        report: Gets ("message", {"message"}) when records were dropped.

    Raises:
        ConchError: max_records is below 1, or a redaction is unknown.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_records: int = 10_000,
        redact: Sequence[str] | bool = False,
        settled: Callable[[str], Collection[str]] = lambda domain: (),
        report: Report = silent,
    ) -> None:
        if max_records < 1:
            raise ConchError(f"max_records is {max_records}: it must be 1 or more")
        self.folder = folder
        self.max_records = max_records
        self.redactions = redaction_names(redact)
        self.settled = settled
        self.report = report
        self._known: dict[str, _Known] = {}

    @property
    def domains(self) -> list[str]:
        """Those of which there is experience, in alphabetical order."""
        return sorted(path.stem for path in self.folder.glob(f"*{SUFFIX}"))

    def path(self, domain: str) -> Path:
        """The file of a domain, whether or not it is there."""
        validate_domain(domain, with_own_data=True)
        return self.folder / f"{domain}{SUFFIX}"

    def add(self, experience: Experience) -> bool:
        """Keep an experience; durable when it returns.

        Returns:
            False where the same one is there already.

        Raises:
            ConchError: There is no room, or the disk is full; then the file is as it was.
        """
        return self.add_many([experience]) == 1

    def add_many(self, experiences: Sequence[Experience]) -> int:
        """Keep several with one wait for the disk for each domain.

        Returns:
            How many were not there.
        """
        by_domain: dict[str, dict[str, Experience]] = {}
        for experience in map(self._without_secrets, experiences):
            by_domain.setdefault(experience.domain, {})[experience.id] = experience
        added = 0
        for domain, own in by_domain.items():
            with self._locked(domain):
                known = self._catch_up(domain)
                fresh = [each for id_, each in own.items() if id_ not in known.ids]
                if len(known.ids) + len(fresh) > self.max_records:
                    self._make_room(domain, len(fresh))
                self._append(domain, b"".join(each.line for each in fresh))
                added += len(fresh)
        return added

    def read(self, domain: str) -> tuple[list[Experience], list[str]]:
        """Everything of a domain, oldest first.

        Returns:
            The good records, each once, and for each bad line what is wrong with it and its number.
        """
        if not self.path(domain).is_file():
            return [], []
        with self._locked(domain):
            content = self.path(domain).read_bytes()
        found: dict[str, Experience] = {}
        problems = []
        for number, line in enumerate(content.split(b"\n"), 1):
            if not line:
                continue
            try:
                experience = Experience.from_line(line)
                found.setdefault(experience.id, experience)
            except ConchError as error:
                problems.append(f"{self.path(domain)}, line {number}: {error}")
        return list(found.values()), problems

    def stats(self) -> dict[str, dict[str, int]]:
        """For each domain how many records of each kind, how many bad lines, and the bytes."""
        found = {}
        for domain in self.domains:
            experiences, problems = self.read(domain)
            counts = Counter(each.kind for each in experiences)
            found[domain] = {
                **{kind: counts[kind] for kind in KINDS},
                "bad_lines": len(problems),
                "bytes": self.path(domain).stat().st_size,
            }
        return found

    def _without_secrets(self, experience: Experience) -> Experience:
        if not self.redactions:
            return experience

        def clean(text: str) -> str:
            return redacted(text, self.redactions)

        return replace(
            experience,
            messages=tuple(
                {**turn, "content": clean(turn["content"])} for turn in experience.messages
            ),
            answer=clean(experience.answer),
            better=None if experience.better is None else clean(experience.better),
            problem=clean(experience.problem),
        )

    @contextmanager
    def _locked(self, domain: str) -> Iterator[None]:
        from filelock import FileLock, Timeout

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(
                self.folder / f"{domain}.lock", timeout=LOCK_TIMEOUT_S, poll_interval=0.005
            )
            lock.acquire()
        except Timeout:
            raise FolderInUseError(
                f"{self.path(domain)} has been locked for {LOCK_TIMEOUT_S:g} s by another process: "
                "wait for it to end, or end it"
            ) from None
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            yield
        finally:
            lock.release()

    def _catch_up(self, domain: str) -> _Known:
        """Read what was appended since this process last looked; all of it after a rewrite."""
        known = self._known.setdefault(domain, _Known())
        path = self.path(domain)
        if not path.is_file():
            self._known[domain] = _Known()
            return self._known[domain]
        with open(path, "rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            file.seek(max(0, known.size - len(known.tail)))
            # An inode's number may be given again, the end of a record is that of one record.
            if inode != known.inode or file.read(len(known.tail)) != known.tail:
                known = self._known[domain] = _Known(inode=inode)
                file.seek(0)
            content = file.read()
        whole = content.rfind(b"\n") + 1
        for line in content[:whole].split(b"\n"):
            try:
                known.ids.add(Experience.from_line(line).id)
            except ConchError:
                # `read` tells of it; here it is only no record that a new one could repeat.
                continue
        known.size += whole
        known.tail = (known.tail + content[:whole])[-_TAIL_BYTES:]
        return known

    def _append(self, domain: str, lines: bytes) -> None:
        if not lines:
            return
        path = self.path(domain)
        size = path.stat().st_size if path.is_file() else -1
        if size > self._known[domain].size:
            # A killed process left half a line; what comes next is not to be part of it.
            lines = b"\n" + lines
        try:
            with open(path, "ab") as file:
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
            if size < 0:
                sync(self.folder)
        except OSError as error:
            if path.is_file():
                os.truncate(path, max(0, size))
            raise self._unwritable(error) from error
        self._catch_up(domain)

    def _make_room(self, domain: str, count: int) -> None:
        """Drop the oldest records that nothing can be learned from any more, by one rewrite."""
        content = self.path(domain).read_bytes() if self.path(domain).is_file() else b""
        lines = [line for line in content.split(b"\n") if line]
        kinds: list[tuple[str, str]] = []
        for line in lines:
            try:
                found = Experience.from_line(line)
                kinds.append((found.id, found.kind))
            except ConchError:
                kinds.append(("", ""))
        records = sum(1 for id_, _ in kinds if id_)
        settled = set(self.settled(domain))
        needed = records + count - self.max_records
        used = [n for n, (id_, _) in enumerate(kinds) if id_ in settled]
        used = used[: max(needed, records + count - int(KEPT_SHARE * self.max_records))]
        good = [n for n, (id_, kind) in enumerate(kinds) if kind == "success" and n not in used]
        good = good[: max(0, needed - len(used))]
        dropped = {*used, *good}
        if len(dropped) < needed:
            raise ConchError(
                f"experience of {domain} holds {records:,} records, the most it may, and too few "
                "of them were learned from to make room: retrain the domain, or raise max_records"
            )
        kept = b"".join(line + b"\n" for n, line in enumerate(lines) if n not in dropped)
        for left in self.folder.glob(f".writing-*-{domain}{SUFFIX}"):
            left.unlink(missing_ok=True)
        write_atomically(self.path(domain), kept)
        message = (
            f"experience of {domain} reached {self.max_records:,} records: dropped the oldest, "
            f"{len(used)} that were learned from and {len(good)} successes that were not"
        )
        self.report("message", {"message": message})
        self._catch_up(domain)

    def _unwritable(self, error: OSError) -> ConchError:
        return ConchError(
            f"cannot write experience to {self.folder}: {error}. Free some disk space or choose "
            "another folder; what was recorded before is whole"
        )
