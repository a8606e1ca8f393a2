"""DOMAIN_SCHEMAS: for each domain of DOMAIN_PROMPTS the JSON schema of its answers.

It knows no model and parses nothing; the system prompts say the same in words, and a test holds
the two together. To add a domain: its schema here, one object of that shape in its system prompt.
"""

from typing import Any

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


def _answer(**properties: dict[str, Any]) -> dict[str, Any]:
    return {"$schema": DIALECT, **_object(**properties)}


DOMAIN_SCHEMAS: dict[str, dict[str, Any]] = {
    "thinking": _answer(
        conclusion=TEXT,
        reasons=_list(TEXT, 2, 5),
        confidence={"enum": ["low", "medium", "high"]},
        would_change=TEXT,
    ),
    "task": _answer(
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
    "action": _answer(
        action=TEXT,
        arguments={"type": "object"},
        why=TEXT,
        if_it_fails=TEXT,
    ),
    "reflection": _answer(
        what_happened=TEXT,
        keep=TEXT,
        change=_list(TEXT, 1, 3),
        check=TEXT,
    ),
    "debug": _answer(
        cause=TEXT,
        verify=TEXT,
        fix=_list(TEXT, 1),
        otherwise=TEXT,
    ),
    "memory": _answer(
        remember=_list(TEXT),
        skip=_list(TEXT),
        answer={"type": ["string", "null"], "pattern": r"\S"},
    ),
}
