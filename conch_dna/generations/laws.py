"""Laws: what every answer of a model line must keep to, as a user writes it in a YAML file.

Knows texts only. To add a kind of law: a function in KINDS and its line in the guide.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conch_dna.errors import ConchError

Check = Callable[[str, Any], bool]
EXAMPLE = "write for example '- {name: short, max_words: 80}'"


def _is_json(text: str, wanted: Any) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


KINDS: dict[str, tuple[type, Check, str]] = {
    "forbid": (str, lambda text, pattern: not re.search(pattern, text), "a regular expression"),
    "require": (str, lambda text, pattern: bool(re.search(pattern, text)), "a regular expression"),
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
    import yaml

    try:
        listed = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConchError(f"laws {path} cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConchError(f"laws {path} are not YAML: {' '.join(str(error).split())}") from error
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
    names = [law.name for law in laws]
    problems += [
        f"the name {name!r} is used twice" for name in {n for n in names if names.count(n) > 1}
    ]
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
        return f"({entry['name']}): {kind} is {value!r}, not {words}"
    if type_ is str:
        try:
            re.compile(str(value))
        except re.error as error:
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
