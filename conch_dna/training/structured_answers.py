"""Answers as JSON objects: the domains' schemas, and objects found in a text, checked, repaired.

It knows no model, and corrects nothing: what is not exactly one valid object is a list of problems
in words. To add a domain: its schema in DOMAIN_SCHEMAS, and one object of that shape in its system
prompt, which a test compares. To word another schema keyword: a branch in `_in_words`.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any

from conch_dna.errors import ConchError
from conch_dna.web.strict_json import MAX_DEPTH, JsonError, quoted, read_json

if TYPE_CHECKING:
    from jsonschema.exceptions import ValidationError

# Of a schema that somebody sends: more take seconds to make a grammar of, or to check an answer.
MOST_PROPERTIES, GREATEST_FACTOR = 1_000, 10_000
# So many problems stand in the message that asks for a repair; of more their number.
MAX_PROBLEMS = 8
# Of more of them no more is found out than that: each takes the schema's library some 50 us.
MOST_FOUND = 1_000
THOUGHT_END = "</think>"
NO_OBJECT = "there is no JSON object in the answer"

_KINDS = {
    "string": "a text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}

# What is said of schema keywords that need no more than numbers.
_WORDS = {
    "minItems": "{place} needs at least {bound} items, and has {count}",
    "maxItems": "{place} may have at most {bound} items, and has {count}",
    "minimum": "{place} must be at least {bound}, and is {value}",
    "maximum": "{place} must be at most {bound}, and is {value}",
    "uniqueItems": "{place} holds the same item more than once",
}


DIALECT = "https://json-schema.org/draft/2020-12/schema"

TEXT: dict[str, Any] = {"type": "string", "pattern": r"\S"}


def _list(item: dict[str, Any], at_least: int = 0, at_most: int | None = None) -> dict[str, Any]:
    bounds = {"minItems": at_least} | ({} if at_most is None else {"maxItems": at_most})
    return {"type": "array", "items": item, **bounds}


def _object(**properties: dict[str, Any]) -> dict[str, Any]:
    """An object that has all of these properties and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _schema(**properties: dict[str, Any]) -> dict[str, Any]:
    return {"$schema": DIALECT, **_object(**properties)}


# For each domain of DOMAIN_PROMPTS the schema of its answers.
DOMAIN_SCHEMAS: dict[str, dict[str, Any]] = {
    "thinking": _schema(
        conclusion=TEXT,
        reasons=_list(TEXT, 2, 5),
        confidence={"enum": ["low", "medium", "high"]},
        would_change=TEXT,
    ),
    "task": _schema(
        steps=_list(
            _object(
                do=TEXT,
                depends_on={
                    "type": "array",
                    "items": {"type": "integer", "minimum": 1, "maximum": 7},
                    "uniqueItems": True,
                },
            ),
            3,
            8,
        ),
        done_when=TEXT,
    ),
    "action": _schema(
        action=TEXT,
        arguments={"type": "object"},
        why=TEXT,
        if_it_fails=TEXT,
    ),
    "reflection": _schema(
        what_happened=TEXT,
        keep=TEXT,
        change=_list(TEXT, 1, 3),
        check=TEXT,
    ),
    "debug": _schema(
        cause=TEXT,
        verify=TEXT,
        fix=_list(TEXT, 1),
        otherwise=TEXT,
    ),
    "memory": _schema(
        remember=_list(TEXT),
        skip=_list(TEXT),
        answer={"type": ["string", "null"], "pattern": r"\S"},
    ),
}


@dataclass(frozen=True)
class Parsed:
    """What a model's text holds.

    Attributes:
        value: The object; None where there is none, or more than one. With problems it is as the
            model wrote it, and not valid.
        problems: What is wrong, each in words; empty for a valid answer.
    """

    value: dict[str, Any] | None
    problems: list[str]

    @property
    def valid(self) -> bool:
        """Whether there is exactly one object, and it keeps to the schema."""
        return not self.problems


def parse_answer(text: str, schema: Mapping[str, Any]) -> Parsed:
    """Find the one JSON object of an answer and hold it against a schema.

    The object may stand bare, in a code fence or within other text; what a reasoning model
    thinks before `</think>` is no part of the answer. Braces that cannot begin a JSON object
    (`{x}`) are text. An object that is not JSON stays a problem even where another one is.

    Args:
        text: The whole answer.
        schema: A JSON schema that describes an object; without `$schema` of draft 2020-12.

    Returns:
        The object and what is wrong with it.

    Raises:
        ConchError: The schema itself is not valid, or refers to what it does not hold.

    >>> parse_answer('Sure: {"a": 1}', {"properties": {"a": {"type": "integer"}}}).value
    {'a': 1}
    """
    validator = _validator(json.dumps(schema))
    value, problems = _read(text)
    if value is not None and not problems:
        problems = _schema_problems(value, validator)
    return Parsed(value, problems)


def repair_messages(
    messages: Sequence[Mapping[str, str]],
    raw: str,
    problems: Sequence[str],
    schema: Mapping[str, Any],
) -> list[dict[str, str]]:
    """A conversation that goes on with the failed answer and one message that asks for another.

    Args:
        messages: What led to the answer: role and content of each turn, the last the user's.
        raw: The answer as the model gave it.
        problems: What `parse_answer` says of it.
        schema: What the new answer must keep to; stands in the message as JSON.

    Raises:
        ValueError: There is no problem, so nothing to repair.
    """
    if not problems:
        raise ValueError("the answer has no problem: there is nothing to repair")
    listed = [f"- {problem}" for problem in problems[:MAX_PROBLEMS]]
    if len(problems) > MAX_PROBLEMS:
        listed.append(f"- and {len(problems) - MAX_PROBLEMS} more")
    wanted = json.dumps(
        {key: value for key, value in schema.items() if key != "$schema"}, ensure_ascii=False
    )
    request = "\n".join(
        [
            "That answer cannot be used:",
            *listed,
            "Give the same answer again as one JSON object and nothing else. It must be valid "
            f"under this JSON schema: {wanted}",
        ]
    )
    return [
        *(dict(message) for message in messages),
        {"role": "assistant", "content": raw},
        {"role": "user", "content": request},
    ]


def _read(text: str) -> tuple[dict[str, Any] | None, list[str]]:
    """The one object of a text, or what stands in its way."""
    start = _answer_start(text)
    if start is None:
        return None, [f"{NO_OBJECT}: it ends within its <think> part"]
    objects: list[dict[str, Any]] = []
    problems: list[str] = []
    prose = ""
    places = _Places(text)
    for begin, end, depth in _regions(text, start):
        if len(objects) > MOST_FOUND:
            break
        region = text[begin:end]
        place = places.at(begin)
        like_object = re.match(r'\{\s*["}]', region) is not None
        if prose and not like_object:
            continue
        try:
            if depth > MAX_DEPTH:
                raise JsonError(f"it is nested more than {MAX_DEPTH} deep")
            value = read_json(region)
        except JsonError as error:
            why = str(error)
            if error.offset is not None:
                why += f", at {places.at(begin + error.offset)}"
            if like_object:
                problems.append(f"the object at {place} cannot be read: {why}")
            elif not prose:
                prose = f"; the braces at {place} hold none: {why}"
            continue
        before = begin - 1
        while before >= 0 and text[before].isspace():
            before -= 1
        if before >= 0 and text[before] == "[":
            problems.append(f"the object at {place} stands in a list; it must stand alone")
        objects.append(value)
    if not objects and not problems:
        problems.append(NO_OBJECT + prose)
    elif len(objects) > 1:
        many = (
            f"{'more than ' if len(objects) > MOST_FOUND else ''}{min(len(objects), MOST_FOUND):,}"
        )
        problems.append(f"there are {many} JSON objects in the answer instead of one")
    return (objects[0] if len(objects) == 1 else None), problems


def _answer_start(text: str) -> int | None:
    """Where the answer begins behind a model's thoughts; None if they never end.

    Some chat templates write the opening `<think>` themselves, so that only its end is here.
    """
    beginning = text.lstrip()
    if beginning.startswith(("{", "```")):
        return 0
    end = text.find(THOUGHT_END)
    if end < 0:
        return None if beginning.startswith("<think>") else 0
    return end + len(THOUGHT_END)


def _regions(text: str, start: int) -> Iterator[tuple[int, int, int]]:
    """Each outermost pair of braces: where it begins and ends, and how deep it is nested.

    One that is never closed reaches to the end: what stands inside is no answer of its own.
    """
    while (begin := text.find("{", start)) >= 0:
        depth = deepest = 0
        in_text = escaped = False
        start = len(text)
        for place in range(begin, len(text)):
            sign = text[place]
            if in_text:
                in_text = escaped or sign != '"'
                escaped = sign == "\\" and not escaped
            elif sign == '"':
                in_text = True
            elif sign in "{[":
                depth += 1
                deepest = max(deepest, depth)
            elif sign in "}]":
                depth -= 1
                if depth == 0:
                    start = place + 1
                    break
        yield begin, start, deepest


class _Places:
    """Lines and columns of a text, of which those asked for one after the other take no time."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._offset, self._line, self._start = 0, 1, 0

    def at(self, offset: int) -> str:
        """Where something stands that is not before what was asked for last."""
        self._line += self._text.count("\n", self._offset, offset)
        self._start = max(self._start, self._text.rfind("\n", self._offset, offset) + 1)
        self._offset = offset
        return f"line {self._line}, column {offset - self._start + 1}"


@lru_cache(maxsize=64)
def _validator(schema_json: str) -> Any:
    """A validator that fetches nothing.

    Raises:
        ConchError: The schema is not valid.
    """
    # Checking a schema takes ten times as long as checking an answer.
    from jsonschema import Draft202012Validator, SchemaError
    from jsonschema.validators import extend, validator_for
    from referencing import Registry

    schema = json.loads(schema_json)
    kind = validator_for(schema, default=Draft202012Validator)
    # The schema's library takes Python's patterns, which may take for ever.
    kind = extend(kind, {"pattern": _pattern_errors})
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise ConchError(
            f"the answers' JSON schema is not valid at {error.json_path}: {error.message}; "
            "correct the schema"
        ) from error
    return kind(schema, registry=Registry())


@lru_cache(maxsize=256)
def linear_pattern(pattern: str) -> Any:
    """A pattern as RE2 compiles it, which takes no longer than a text is long.

    Raises:
        ValueError: It is none; in words for the user.
    """
    import re2

    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile(pattern, options)
    except UnicodeEncodeError:
        raise ValueError("it holds half of a surrogate pair") from None
    except re2.error as error:
        why = error.args[0].decode() if error.args else "it is not whole"
        raise ValueError(
            f"{why}; patterns are RE2's, without look-around and back-references"
        ) from None


def _pattern_errors(
    validator: Any, pattern: str, value: Any, schema: Any
) -> "Iterator[ValidationError]":
    from jsonschema.exceptions import ValidationError

    if isinstance(value, str) and not linear_pattern(pattern).search(value):
        yield ValidationError(f"{value!r} does not match {pattern!r}")


def costly_part(schema: Any) -> str | None:
    """What of a schema would take too long to keep to, or to check; None where nothing would.

    Args:
        schema: JSON, of at most MAX_DEPTH.
    """
    properties, parts = 0, [schema]
    for part in parts:
        parts += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        if not isinstance(part, dict):
            continue
        if isinstance(named := part.get("properties"), dict):
            properties += len(named)
        if isinstance(part.get("patternProperties"), dict):
            return "the schema has patternProperties, which are not supported: name the keys"
        factor, pattern = part.get("multipleOf"), part.get("pattern")
        if isinstance(factor, int | float) and factor > GREATEST_FACTOR:
            return f"the schema has multipleOf {factor:g}: use at most {GREATEST_FACTOR:,}"
        if isinstance(pattern, str):
            try:
                linear_pattern(pattern)
            except ValueError as error:
                return f"the schema's pattern {pattern[:80]!r} is not supported: {error}"
    if properties > MOST_PROPERTIES:
        return f"the schema has {properties:,} properties: use at most {MOST_PROPERTIES:,}"
    return None


def _schema_problems(value: dict[str, Any], validator: Any) -> list[str]:
    from referencing.exceptions import Unresolvable

    try:
        errors = list(islice(validator.iter_errors(value), MOST_FOUND + 1))
    except Unresolvable as error:
        raise ConchError(
            f"the answers' JSON schema refers to {error.ref!r}, which it does not hold: write that "
            "part into the schema"
        ) from error
    problems = list(dict.fromkeys(_in_words(error) for error in errors[:MOST_FOUND]))
    return [
        *problems,
        *([f"there are more than {MOST_FOUND:,}"] if len(errors) > MOST_FOUND else []),
    ]


def _in_words(error: "ValidationError") -> str:
    """One problem as a person would say it."""
    path = list(error.absolute_path)
    place, value, bound = _place(path), error.instance, error.validator_value
    keyword = error.validator
    if keyword == "required":
        # There is one error for each missing key; all of them get these words, which stand once.
        return f"{place} lacks {quoted(key for key in bound if key not in value)}"
    if keyword == "additionalProperties" and bound is False:
        extra = [key for key in value if key not in error.schema.get("properties", {})]
        return f"{place} must not have {quoted(extra)}"
    if keyword == "type":
        names = [bound] if isinstance(bound, str) else bound
        kinds = " or ".join(_KINDS[name] for name in names)
        return f"{place} must be {kinds}, and is {_kind(value)}"
    if keyword == "enum":
        return f"{place} must be one of {quoted(bound)}, and is {quoted([value])}"
    if keyword == "pattern" and isinstance(value, str) and not value.strip():
        return f"{place} is blank"
    if keyword in _WORDS:
        count = len(value) if isinstance(value, list) else 0
        return _WORDS[keyword].format(place=place, bound=bound, value=value, count=count)
    return f"{place}: {error.message}"


def _place(path: Sequence[str | int]) -> str:
    """`"do" in item 2 of "steps"` for ["steps", 1, "do"]; items are counted from 1."""
    words = ""
    for part in path:
        if isinstance(part, int):
            words = f"item {part + 1} of {words or 'the list'}"
        else:
            words = json.dumps(part, ensure_ascii=False) + (f" in {words}" if words else "")
    return words or "the object"


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    kinds = {str: "string", int: "integer", float: "number", list: "array", dict: "object"}
    return _KINDS[kinds.get(type(value), "null")]
