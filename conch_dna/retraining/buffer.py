"""Experience on disk: a file of JSON lines for each domain, without the secrets in them.

Knows locks, whole lines and patterns of secrets; nothing of models, adapters or retraining. To
redact another kind of secret: an entry in REDACTIONS, and examples of it in the tests.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from conch_dna.checkpoints import sync, write_atomically
from conch_dna.errors import ConchError, FolderInUseError
from conch_dna.retraining.experience import KINDS, Experience
from conch_dna.screen.progress import Report, silent
from conch_dna.training.settings import validate_domain

SUFFIX = ".jsonl"
LOCK_TIMEOUT_S = 30.0
# What stays after the oldest were dropped, so that not every record rewrites the file.
KEPT_SHARE = 0.9
_TAIL_BYTES = 256

# Every pattern is linear in the text's length: none may scan to the end of a run from many of the
# run's places. What the group `before` holds is no part of the secret.
REDACTIONS: dict[str, re.Pattern[str]] = {
    "private_key": re.compile(
        r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL
    ),
    "token": re.compile(
        # Of a run, its first "eyJ" decides: where too little follows it, less follows the others.
        r"(?<![\w-])(?P<before>(?>[\w-]*?\b(?=eyJ)))eyJ[\w-]{8,}+\.[\w-]{8,}+\.[\w-]*+"
        r"|(?i:\bbearer)\s++[\w.~+/-]{16,}+=*+",
    ),
    "api_key": re.compile(
        r"\b(?:sk|pk|rk)[-_][\w-]{16,}|\bgh[opsru]_\w{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{16,}"
        r"|\bhf_\w{20,}|\bxox[abprs]-[\w-]{10,}|\bA(?:KI|SI)A[0-9A-Z]{16}\b|\bAIza[\w-]{30,}"
    ),
    "password": re.compile(
        r"(?i:\b(?:password|passwd|pwd|secret|api[_-]?key|access[_-]?token)\b[\"']?\s*[:=]\s*)"
        r"(?:\"[^\"\n]+\"|'[^'\n]+'|[^\s,;\"']+)|(?<=://)[^\s/:@]{1,64}:[^\s/@]{1,128}(?=@)"
    ),
    "email": re.compile(r"\b[\w.%+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){1,8}\b"),
    "card": re.compile(r"(?<![\d-])\d(?:[ -]?\d){12,18}(?![\d-])"),
    "iban": re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b"),
}


def redaction_names(redact: Sequence[str] | bool) -> tuple[str, ...]:
    """Which entries of REDACTIONS are asked for: all, none, or those named.

    Raises:
        ConchError: A name is none of them.
    """
    if isinstance(redact, bool):
        return tuple(REDACTIONS) if redact else ()
    names = (redact,) if isinstance(redact, str) else tuple(redact)
    if unknown := sorted(set(names) - set(REDACTIONS)):
        raise ConchError(
            f"nothing is known to redact by the name {', '.join(unknown)}: use some of "
            f"{', '.join(REDACTIONS)}, or True for all"
        )
    return tuple(name for name in REDACTIONS if name in names)


def redacted(text: str, names: Sequence[str]) -> str:
    """A text with `[redacted:NAME]` in the place of every secret of these kinds.

    >>> redacted("Write to ann@example.org.", ["email"])
    'Write to [redacted:email].'
    """
    for name in names:
        mark = f"[redacted:{name}]"
        if name == "card":
            text = _without_cards(text, mark)
        else:
            text = REDACTIONS[name].sub(partial(_mark, mark), text)
    return text


def _mark(mark: str, match: re.Match[str]) -> str:
    return (match.groupdict().get("before") or "") + mark


def _without_cards(text: str, mark: str) -> str:
    """A text without its card numbers, wherever they stand, also within longer numbers."""
    numbers = {match[0] for match in REDACTIONS["card"].finditer(text) if _luhn(match[0])}
    lengths = sorted({len(number) for number in numbers}, reverse=True)

    def cleaned(run: re.Match[str]) -> str:
        digits, start, parts = run[0], 0, []
        while start < len(digits):
            ends = (start + length for length in lengths)
            end = next((end for end in ends if digits[start:end] in numbers), None)
            parts.append(digits[start] if end is None else mark)
            start = end or start + 1
        return "".join(parts)

    return re.sub(r"\d(?:[ -]?\d)+", cleaned, text) if numbers else text


def _luhn(number: str) -> bool:
    """Whether the check digit of a card number is right; most other long numbers fail."""
    digits = [int(each) for each in reversed(number) if each.isdigit()]
    doubled = [2 * each - 9 * (each > 4) for each in digits[1::2]]
    return (sum(digits[::2]) + sum(doubled)) % 10 == 0


def _lines_of(content: bytes) -> Iterator[tuple[int, bytes, Experience | ConchError]]:
    """Number and bytes of every line of a file, and its record or what is wrong with it."""
    for number, line in enumerate(content.split(b"\n"), 1):
        if line:
            try:
                yield number, line, Experience.from_line(line)
            except ConchError as error:
                yield number, line, error


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
        experiences: dict[str, Experience] = {}
        problems = []
        for number, _, record in _lines_of(content):
            if isinstance(record, Experience):
                experiences.setdefault(record.id, record)
            else:
                problems.append(f"{self.path(domain)}, line {number}: {record}")
        return list(experiences.values()), problems

    def stats(self) -> dict[str, dict[str, int]]:
        """For each domain how many records of each kind, how many bad lines, and the bytes."""
        counts = {}
        for domain in self.domains:
            experiences, problems = self.read(domain)
            kinds = Counter(each.kind for each in experiences)
            counts[domain] = {
                **{kind: kinds[kind] for kind in KINDS},
                "bad_lines": len(problems),
                "bytes": self.path(domain).stat().st_size,
            }
        return counts

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
        # What is no record is told by `read`; here it is only nothing that a new one could repeat.
        known.ids |= {
            record.id
            for _, _, record in _lines_of(content[:whole])
            if isinstance(record, Experience)
        }
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
        lines = list(_lines_of(content))
        records = {n: each for n, _, each in lines if isinstance(each, Experience)}
        settled = set(self.settled(domain))
        needed = len(records) + count - self.max_records
        most = len(records) + count - int(KEPT_SHARE * self.max_records)
        used = [n for n, each in records.items() if each.id in settled][: max(needed, most)]
        good = [n for n, each in records.items() if each.kind == "success" and n not in used]
        good = good[: max(0, needed - len(used))]
        dropped = {*used, *good}
        if len(dropped) < needed:
            raise ConchError(
                f"experience of {domain} holds {len(records):,} records, the most it may, and too "
                "few of them were learned from to make room: retrain the domain, or raise "
                "max_records"
            )
        kept = b"".join(line + b"\n" for n, line, _ in lines if n not in dropped)
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
