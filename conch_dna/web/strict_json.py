"""JSON from those whom nobody knows: as RFC 8259 has it, or a reason why it is none.

Knows texts; nothing of what they are for. Another thing that is refused: a branch in `read_json`.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

# Deeper than any answer or request; Python's own limit would end in a RecursionError.
MAX_DEPTH = 64
# So many doubled keys are named; of more their number.
MOST_NAMED = 8
# An escaped half of a surrogate pair.
_HALF = re.compile(r"\\u[dD][89a-fA-F]")


class JsonError(Exception):
    """Why a text is no JSON, and after how many characters of it, if that is known."""

    def __init__(self, reason: str, offset: int | None = None):
        super().__init__(reason)
        self.offset = offset


def read_json(text: str) -> Any:
    """A JSON value as RFC 8259 has it, without doubled keys, NaN, infinities or half characters.

    Raises:
        JsonError: The text is none; not so for nesting deeper than Python's own limit, which is a
            RecursionError.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(items)
        if len(value) < len(items):
            twice = [key for key, count in Counter(key for key, _ in items).items() if count > 1]
            more = f" and {len(twice) - MOST_NAMED} more" if len(twice) > MOST_NAMED else ""
            raise JsonError(
                f"the key {quoted(twice[:MOST_NAMED])}{more} stands in it more than once"
            )
        return value

    def constant(name: str) -> Any:
        raise JsonError(f"{name} is no JSON number")

    def number(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise JsonError(f"the number {digits} is too large")
        return value

    try:
        value = json.loads(
            text, object_pairs_hook=pairs, parse_constant=constant, parse_float=number
        )
        text.encode()
        if _HALF.search(text):
            # Two halves may be a whole one, which only the value tells.
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"):
            raise JsonError("it ends before its last brace is closed", len(text)) from None
        raise JsonError(error.msg.removesuffix(" at"), error.pos) from None
    except UnicodeEncodeError:
        raise JsonError("it holds half of a surrogate pair") from None
    except ValueError as error:
        # Python refuses whole numbers of more than some thousand digits.
        raise JsonError("it holds a whole number that is too long") from error
    return value


def quoted(values: Iterable[Any]) -> str:
    """Values as JSON, with commas between them."""
    return ", ".join(json.dumps(value, ensure_ascii=False) for value in values)
