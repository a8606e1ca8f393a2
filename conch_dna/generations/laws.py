"""Laws: what every answer of a model line must keep to, as a user writes it in a YAML file.

Knows texts only. Patterns are RE2's, whose time grows with the text, never with its square or
worse. To add a kind of law: a function in KINDS and its line in the guide.
"""

import json
import reprlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from conch_dna.errors import ConchError
from conch_dna.options.commands import parse_yaml
from conch_dna.training.structured_answers import linear_pattern

Check = Callable[[str, Any], bool]
EXAMPLE = "write for example '- {name: short, max_words: 80}'"


def _is_json(text: str, wanted: Any) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


@lru_cache(maxsize=256)
def _pattern(pattern: str) -> Any:
    """A pattern as RE2 compiles it.

    Raises:
        ValueError: It is none; in words for the user.
    """
    compiled = linear_pattern(pattern)
    if not pattern.isascii() and any(mark in pattern for mark in _ASCII_MARKS):
        raise ValueError(
            f"{', '.join(_ASCII_MARKS)} know the letters of ASCII alone: write (^|\\PL) and "
            "($|\\PL) for the edges of a word, and \\pL for a letter"
        )
    return compiled


def _matches(text: str, pattern: str) -> bool:
    compiled = _pattern(pattern)
    # As Python has it, $ also stands before a line's end that ends the text; RE2 knows bytes only.
    texts = {text, text.removesuffix("\n")}
    return any(compiled.search(each.encode("utf-8", "replace").decode()) for each in texts)


# What RE2 takes for ASCII alone: in other languages' patterns it would be silently wrong.
_ASCII_MARKS = (r"\b", r"\B", r"\w", r"\W")

KINDS: dict[str, tuple[type, Check, str]] = {
    "forbid": (str, lambda text, pattern: not _matches(text, pattern), "a regular expression"),
    "require": (str, _matches, "a regular expression"),
    "max_words": (int, lambda text, most: len(text.split()) <= most, "a whole number"),
    "max_characters": (int, lambda text, most: len(text) <= most, "a whole number"),
    "valid_json": (bool, _is_json, "true"),
}
"""What a law is given, the check (true where the answer keeps it), and that in words."""


@dataclass(frozen=True, kw_only=True)
class Law:
    """One law.

    Attributes:
        name: As reports show it.
        kind: A key of KINDS.
        value: The pattern or number.
    """

    name: str
    kind: str
    value: Any

    def keeps(self, answer: str) -> bool:
        """Whether an answer keeps this law."""
        return KINDS[self.kind][1](answer, self.value)

    def to_json(self) -> dict[str, Any]:
        """As a user writes it."""
        return {"name": self.name, self.kind: self.value}


@dataclass(frozen=True, kw_only=True)
class Violation:
    """An answer that breaks a law: which one, and which answer, counted from 0."""

    law: str
    answer: int


def read_laws(path: Path) -> list[Law]:
    """Read laws from a YAML file: a list of mappings with a name and one kind.

    Raises:
        ConchError: The file cannot be read, or something in it is no law; all of it at once.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConchError(f"laws {path} cannot be read: {error.strerror or error}") from error
    listed = parse_yaml(content, str(path), option="laws")
    if not listed:
        raise ConchError(f"laws {path} hold no list; {EXAMPLE}")
    return laws_of(listed, f"laws {path}")


def laws_of(listed: Any, source: str) -> list[Law]:
    """The laws in a list of mappings with a name and one kind.

    Args:
        listed: As YAML or JSON gives it.
        source: Where it comes from, for the message.

    Raises:
        ConchError: Something in it is no law; all of it at once.
    """
    if not isinstance(listed, list):
        raise ConchError(f"{source} hold no list; {EXAMPLE}")
    laws, problems = [], []
    for number, entry in enumerate(listed, 1):
        law = _law(entry)
        if isinstance(law, Law):
            laws.append(law)
        else:
            problems.append(f"law {number} {law}")
    counts = Counter(law.name for law in laws)
    problems += [f"the name {name!r} is used twice" for name, n in counts.items() if n > 1]
    if problems:
        raise ConchError(f"{source}: {'; '.join(problems)}")
    return laws


def _law(entry: Any) -> Law | str:
    """A law, or what is wrong with the entry."""
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        return "has no name"
    kinds = [key for key in entry if key != "name"]
    if len(kinds) != 1 or kinds[0] not in KINDS:
        return (
            f"({entry['name']}) has {', '.join(map(str, kinds)) or 'nothing'} beside its name; it "
            f"needs one of {', '.join(KINDS)}"
        )
    kind, value = kinds[0], entry[kinds[0]]
    type_, _, words = KINDS[kind]
    if type(value) is not type_ or value is False or (isinstance(value, int) and value < 0):
        return f"({entry['name']}): {kind} is {reprlib.repr(value)}, not {words}"
    if type_ is str:
        try:
            _pattern(value)
        except ValueError as error:
            return f"({entry['name']}): {kind} {value!r} is no regular expression: {error}"
    return Law(name=entry["name"], kind=kind, value=value)


def violations(laws: Sequence[Law], answers: Sequence[str]) -> list[Violation]:
    """Every answer that breaks a law, law after law."""
    return [
        Violation(law=law.name, answer=number)
        for law in laws
        for number, answer in enumerate(answers)
        if not law.keeps(answer)
    ]
