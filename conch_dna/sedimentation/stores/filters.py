"""What a `where` filter means: the one definition, for every store and for word fusion.

Knows payloads and Qdrant's names of conditions; nothing of stores. `matches` decides; what
`qdrant_filter` makes must find the same, which the contract tests compare.
To filter by another kind of value: `conditions_of`, `matches` and `qdrant_filter`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from conch_dna.errors import ConchError

Where = Mapping[str, Any]
Conditions = Mapping[str, list[str | int | bool]]

PREFIX = "_conch_"
# Fields that name a payload's true and false fields: Qdrant Edge 0.9 takes a boolean in a filter
# for 1 or 0 and then finds nothing.
BOOLEAN_FIELDS = {True: f"{PREFIX}true", False: f"{PREFIX}false"}
LARGEST = 2**63


def conditions_of(where: Where | None) -> dict[str, list[str | int | bool]]:
    """A filter with a list of values for each field.

    Args:
        where: Payload field to a value, or to a list, tuple or set of them; None for no filter.

    Raises:
        ConchError: A field cannot be asked for, or a value is no text, integer or boolean.
    """
    conditions = {}
    for field, choice in (where or {}).items():
        if not isinstance(field, str) or not field or '"' in field or "\\" in field:
            raise ConchError(
                f"where: {field!r} cannot be asked for: name a payload field without quotes"
            )
        values = list(choice) if isinstance(choice, list | tuple | set | frozenset) else [choice]
        if not values:
            raise ConchError(f"where: {field!r} has no values, so that nothing could be found")
        for value in values:
            is_number = type(value) in (int, bool) and -LARGEST <= value < LARGEST
            if not is_number and not (isinstance(value, str) and is_unicode(value)):
                raise ConchError(
                    f"where: {field!r} is to be {value!r} of type {type(value).__name__}: give "
                    "texts, integers of at most 64 bits or booleans"
                )
        conditions[field] = [str(value) if isinstance(value, str) else value for value in values]
    return conditions


def is_unicode(text: str) -> bool:
    """Whether a text has a UTF-8 form; one with half a character (a lone surrogate) has none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def has_value(content: Any, value: str | int | bool) -> bool:
    """Whether a field's content is this value, or a list with it; 1, 1.0 and True are three."""
    items = content if isinstance(content, list) else [content]
    return any(type(item) is type(value) and item == value for item in items)


def matches(payload: Mapping[str, Any], conditions: Conditions) -> bool:
    """Whether a payload has, in each field, one of the values.

    >>> matches({"year": 1999, "seen": True}, conditions_of({"year": {1998, 1999}}))
    True
    >>> matches({"year": 1999, "seen": True}, conditions_of({"seen": 1}))
    False
    """
    return all(
        field in payload and any(has_value(payload[field], value) for value in values)
        for field, values in conditions.items()
    )


def boolean_fields(payload: Mapping[str, Any]) -> dict[str, list[str]]:
    """The reserved fields that a payload is stored with, for `qdrant_filter` to ask for."""
    flagged = {
        name: [field for field, content in payload.items() if has_value(content, value)]
        for value, name in BOOLEAN_FIELDS.items()
    }
    return {name: fields for name, fields in flagged.items() if fields}


def qdrant_filter(api: Any, conditions: Conditions) -> Any:
    """The filter in Qdrant's words.

    Args:
        api: `qdrant_edge` or `qdrant_client.models`, which name the same things alike.
        conditions: Of `conditions_of`.

    Returns:
        A `Filter` of that module, or None if all documents match.
    """

    def one_of(path: str, values: Sequence[str | int]) -> Any:
        return api.FieldCondition(key=path, match=api.MatchAny(any=list(values)))

    must = []
    for field, values in conditions.items():
        # Quoted, or a dot in the name would lead into an object.
        path = f'"{field}"'
        either = [
            one_of(name, [field])
            for value, name in BOOLEAN_FIELDS.items()
            if has_value(values, value)
        ]
        if texts := [value for value in values if isinstance(value, str)]:
            either.append(one_of(path, texts))
        if numbers := [value for value in values if type(value) is int]:
            either.append(one_of(path, numbers))
        must.append(api.Filter(should=either))
    return api.Filter(must=must) if must else None
