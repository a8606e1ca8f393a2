"""Fields of settings that know their help and range: how they are made, checked, named and told.

Knows dataclasses; none of the settings themselves, and no command line.
To give options another kind of limit: an argument of `option`, a line in `_is_inside`, and its
words in `range_text`.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, field, fields
from difflib import get_close_matches
from typing import Any

from conch_dna.errors import ConchError

# So many unknown names get the nearest known one as a hint, if they are no longer than that.
_MOST_HINTS, _LONGEST_HINTED = 8, 64
# What a value of each kind is called, and the types it may have.
KIND_WORDS = {"float": "a number", "int": "a whole number", "bool": "true or false", "str": "text"}
_TYPES: dict[str, tuple[type, ...]] = {
    "float": (float, int),
    "int": (int,),
    "bool": (bool,),
    "str": (str,),
}


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    besides: float | None = None,
    choices: tuple[str, ...] | None = None,
    between: str = "at least {low:g} and at most {high:g}",
) -> Any:
    """A field of a dataclass of settings.

    Args:
        default: Its value where none is given.
        help: What it is, as a sentence.
        low: Least value.
        high: Greatest value.
        above: Every value is greater.
        below: Every value is less.
        besides: One value outside these limits that is taken too.
        choices: The only values.
        between: How messages say a range from `low` to `high`.
    """
    limits = {"low": low, "high": high, "above": above, "below": below, "besides": besides}
    metadata = {"help": help, **limits, "choices": choices, "between": between}
    return field(default=default, metadata=metadata)


def changed(settings: Any, names: Collection[str]) -> list[str]:
    """Which of some settings have another value than by default, in their order.

    Args:
        settings: A dataclass.
        names: Of its fields.
    """
    chosen = [each for each in fields(settings) if each.name in names]
    return [each.name for each in chosen if getattr(settings, each.name) != default_of(each)]


def default_of(setting: Any) -> Any:
    """The value of a dataclass's field where none is given."""
    made = setting.default_factory
    return setting.default if made is MISSING else made()


def kind_of(option: Any) -> str:
    """The type of a field: float, int, bool or str."""
    return option.type if isinstance(option.type, str) else str(option.type.__name__)


def is_limited(option: Any) -> bool:
    """Whether a field is a number with a range."""
    return any(option.metadata[name] is not None for name in ("low", "high", "above", "below"))


def range_text(option: Any) -> str:
    """The range of a field in words, such as "0 or more".

    Returns:
        "finite" for a number that may be any; empty for what is no number.
    """
    low, high, above, below = (option.metadata[n] for n in ("low", "high", "above", "below"))
    if kind_of(option) in ("bool", "str"):
        return ""
    besides = option.metadata["besides"]
    if low is not None and high is not None:
        text = str(option.metadata["between"]).format(low=low, high=high)
        return text if besides is None else f"{besides:g}, or {text}"
    if low is not None and below is None:
        return f"{low:g} or more" if besides is None else f"{besides:g}, or {low:g} or more"
    words = {"at least": low, "above": above, "at most": high, "below": below}
    parts = [f"{word} {limit:g}" for word, limit in words.items() if limit is not None]
    return " and ".join(parts) or "finite"


def option_problem(
    option: Any, value: object, *, kind_words: Mapping[str, str] = KIND_WORDS
) -> str | None:
    """What is wrong with a value of a field; None where nothing is.

    Args:
        option: The field, made by `option`.
        value: What it was given.
        kind_words: What a value of each kind is called.
    """
    name, limits, kind = option.name, option.metadata, kind_of(option)
    # True is a whole number to Python.
    if not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind != "bool"):
        return f"{name} is {value!r}: it must be {kind_words[kind]}"
    if limits["choices"] and value not in limits["choices"]:
        return f"{name} is {value!r}: use one of {', '.join(limits['choices'])}"
    if isinstance(value, float | int) and kind != "bool" and not _is_inside(value, limits):
        return f"{name} is {value}: it must be {range_text(option)}"
    if kind == "float" and value and not 2.0**-126 <= abs(value) < 2.0**128:  # type: ignore[arg-type]
        zero = "0 or " if _is_inside(0, limits) else ""
        return (
            f"{name} is {value}: it must be {zero}of a size between 1e-37 and 3e38, as float32 is"
        )
    return None


def option_problems(settings: Any) -> list[str]:
    """What is wrong with the values of settings, field by field; nothing for sound ones.

    Args:
        settings: A dataclass; fields that `option` did not make are not looked at.
    """
    known = (each for each in fields(settings) if "help" in each.metadata)
    problems = (option_problem(each, getattr(settings, each.name)) for each in known)
    return [problem for problem in problems if problem is not None]


def _is_inside(number: float, limits: Mapping[str, Any]) -> bool:
    if number == limits["besides"]:
        return True
    return (
        _is_finite(number)
        and (limits["low"] is None or number >= limits["low"])
        and (limits["high"] is None or number <= limits["high"])
        and (limits["above"] is None or number > limits["above"])
        and (limits["below"] is None or number < limits["below"])
    )


def _is_finite(number: float) -> bool:
    # A whole number may be too large for what math takes.
    return isinstance(number, int) or math.isfinite(number)


def named_settings(
    values: Mapping[Any, Any],
    known: Iterable[str],
    *,
    source: str,
    aliases: Mapping[str, str] | None = None,
    also: Iterable[str] = (),
) -> dict[str, Any]:
    """Values by the names of fields, as a file gives them.

    Args:
        values: Names to values; dashes stand for underscores.
        known: The names that exist.
        source: Where they come from, for the message.
        aliases: Other names that stand for one of them.
        also: Names that are taken too, but not told of.

    Raises:
        ConchError: A name is unknown or given twice.
    """
    names = [str(name).replace("-", "_") for name in values]
    names = [(aliases or {}).get(name, name) for name in names]
    if twice := sorted(name for name, count in Counter(names).items() if count > 1):
        raise ConchError(f"{source} gives {', '.join(twice)} twice: leave one of each")
    refuse_unknown(names, known, source=source, also=also)
    return dict(zip(names, values.values(), strict=True))


def refuse_unknown(
    names: Iterable[str], known: Iterable[str], *, source: str, also: Iterable[str] = ()
) -> None:
    """Refuse names of settings that do not exist, with the nearest that does.

    Args:
        names: As they were given.
        known: Those that exist.
        source: Where the names come from, for the message.
        also: Names that are taken too, but not told of.

    Raises:
        ConchError: Some do not; all of them are named.
    """
    known, also = set(known), set(also)
    if unknown := sorted(set(names) - known - also):
        # The search takes a millisecond for each name, and longer for long ones.
        asked = [name for name in unknown[:_MOST_HINTS] if len(name) <= _LONGEST_HINTED]
        near = {name: get_close_matches(name, [*known, *also], 1) for name in asked}
        shown = (f"{name} ({near[name][0]}?)" if near.get(name) else name for name in unknown)
        raise ConchError(
            f"{source} names unknown settings: {', '.join(shown)}; known are "
            f"{', '.join(sorted(known))}"
        )
