"""Experience: what was asked, what was answered, and what should have been said.

Knows JSON lines; nothing of where they are kept, of models or of retraining. To record another
fact: a field of `Experience` with a default, since older lines lack it.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from conch_dna.checkpoints import content_digest, parse_json, require_plain
from conch_dna.errors import ConchError, NotWholeError
from conch_dna.options.fields import refuse_unknown
from conch_dna.training.data.records import read_lines
from conch_dna.training.settings import validate_domain

Message = dict[str, str]

KINDS = ("success", "correction", "fallback")
ANSWERERS = ("neuron", "ego")
ENDS = ("stop", "length")


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
        if not isinstance(self.domain, str):
            raise ConchError(f"domain {self.domain!r} of an experience is not text")
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
            document = parse_json(line, "the line")
            written = document.pop("id")
            messages = tuple(document.pop("messages"))
        except (NotWholeError, AttributeError, KeyError, TypeError) as error:
            raise ConchError(f"no whole record ({len(line)} bytes)") from error
        try:
            experience = cls(messages=messages, **document)
        except TypeError as error:
            unknown = sorted(set(document) - {each.name for each in fields(cls)})
            what = f"unknown fields {', '.join(unknown)}" if unknown else "fields are missing"
            raise ConchError(f"no record: {what}") from error
        if experience.id != written:
            raise ConchError("altered: its id belongs to another content")
        return experience


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


# What a line of a user's file may say: where and when it is recorded says the rest.
_OF_A_USER = {"prompt", *(each.name for each in fields(Experience))} - {"domain", "time"}


def read_experiences(path: Path, domain: str) -> list[Experience]:
    """Read a JSONL file of answers.

    Each line has `prompt` (a text) or `messages` (the conversation up to the answer), `answer`,
    and, where that was not good, `better` and `problem`; it may have the other fields of
    `Experience` but for the domain and the time. What has a better answer is a correction, the
    rest are successes, unless `kind` says otherwise.

    Args:
        path: The file, UTF-8.
        domain: Whose adapter answered.

    Raises:
        ConchError: The file cannot be read, or a line is none of these; the first five such lines
            are named.
    """
    experiences, problems = [], []
    for number, line in enumerate(read_lines(path, "--from"), 1):
        try:
            experiences.append(experience_of(line, domain))
        except ConchError as error:
            problems.append(f"record {number}: {error}")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ConchError(f"{path}: {'; '.join(problems[:5])}{more}. Nothing was recorded")
    return experiences


def experience_of(line: str, domain: str) -> Experience:
    """One line of a file of answers as an experience of a domain.

    Raises:
        ConchError: It has not the form that `read_experiences` describes.
    """
    try:
        values: Any = json.loads(line)
        require_plain(values)
    except (ValueError, RecursionError) as error:
        raise ConchError(f"not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ConchError("not a JSON object with prompt and answer")
    refuse_unknown(values, _OF_A_USER, source="it")
    if ("prompt" in values) == ("messages" in values):
        raise ConchError("give either prompt or messages")
    if "answer" not in values:
        raise ConchError("it has no answer")
    prompt = values.pop("prompt", None)
    turns = values.pop("messages", None) or [{"role": "user", "content": prompt}]
    if not isinstance(turns, list):
        raise ConchError(f"messages is {turns!r}, not a list of turns")
    kind = values.pop("kind", "correction" if values.get("better") is not None else "success")
    return Experience(domain=domain, messages=tuple(turns), kind=kind, **values)
