"""Forms of training records as people have them, each made into one of mlx-lm's three.

Knows the fields of Alpaca, ShareGPT, questions with answers, and `--map`; no files, no tokenizers.
To take another form: its fields in `FORMS`, and if they are no two texts, a branch in `canonical`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from conch_dna.checkpoints import parse_json
from conch_dna.errors import ConchError, NotWholeError

Record = dict[str, Any]

# The fields that a record of each form must have; two of them are a question and its answer.
FORMS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt and completion": ("prompt", "completion"),
    "prompt and response": ("prompt", "response"),
    "instruction and output": ("instruction", "output"),
    "question and answer": ("question", "answer"),
    "conversations": ("conversations",),
    "text": ("text",),
}
# Those that some forms may have besides.
OPTIONAL = ("input", "system", "tools", "context")
MAPPED = tuple(dict.fromkeys([*(name for names in FORMS.values() for name in names), *OPTIONAL]))
NEEDED = (
    "messages, prompt and completion, or text (or the fields of Alpaca, ShareGPT, or question and "
    "answer)"
)
# ShareGPT's names of who speaks.
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_call": "assistant",
}


def parse_mapping(pairs: Sequence[str]) -> dict[str, str]:
    """What `--map KEY=FIELD`, given once or more often, comes to.

    Returns:
        For each field of a form the field of the user's records that holds it.

    Raises:
        ConchError: A pair is none, a key is unknown or given twice, or all together make no form.

    >>> parse_mapping(["prompt=question", "completion=answer"])
    {'prompt': 'question', 'completion': 'answer'}
    """
    mapping: dict[str, str] = {}
    for pair in pairs:
        key, equals, name = pair.partition("=")
        if not (equals and name) or key not in MAPPED:
            raise ConchError(
                f"--map is {pair!r}: use KEY=FIELD, where KEY is one of {', '.join(MAPPED)}, such "
                "as --map prompt=question"
            )
        if key in mapping:
            raise ConchError(f"--map gives {key} twice, {mapping[key]} and {name}: leave one")
        mapping[key] = name
    if mapping and len(complete := _complete(mapping)) != 1:
        found = f"{len(complete)} forms, {'; '.join(complete)}" if complete else "no form"
        raise ConchError(
            f"--map gives {', '.join(mapping)}, which is {found}: give the fields of one, such as "
            "--map prompt=… --map completion=…"
        )
    return mapping


def _complete(fields: Mapping[str, Any]) -> list[str]:
    """The forms of which a record has all fields."""
    return [form for form, needs in FORMS.items() if all(name in fields for name in needs)]


def canonical(record: Any, where: str, mapping: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A record in one of mlx-lm's forms: `messages`, `prompt` and `completion`, or `text`.

    Alpaca's `input` stands below its `instruction`, a blank line between them. A `system` text or
    `tools` beside a question and its answer make messages of them. A `context` stays beside them.

    Args:
        record: A JSON object of any form.
        where: What messages call it.
        mapping: Of `parse_mapping`; the record then has these fields and no others.

    Raises:
        ConchError: The record is of no form, or of several.
    """
    if not isinstance(record, dict):
        raise ConchError(f"{where}: a record is a JSON object with {NEEDED}")
    if mapping:
        record = _mapped(record, where, mapping)
    present = {name: value for name, value in record.items() if value is not None}
    # Tables have every column in every row, and null where there is nothing.
    record = present if _complete(present) else record
    form = _form_of(record, where, "" if mapping else "; other names with --map KEY=FIELD")
    if form == "text":
        return record
    system, tools = _system(record, where), _tools(record, where)
    if form in ("messages", "conversations"):
        turns = _turns(record[form], where, form)
        kept = {k: v for k, v in record.items() if k not in ("conversations", "system", "tools")}
        return {**kept, "messages": [*system, *turns], **tools}
    names = FORMS[form]
    context = {name: record[name] for name in ("context",) if name in record}
    for name in names:
        if not isinstance(record[name], str):
            raise ConchError(f"{where}: {name} is not text")
    prompt, answer = (record[name] for name in names)
    if form == "instruction and output":
        prompt = _with_input(prompt, record, where)
    if system or tools:
        question = {"role": "user", "content": prompt}
        turns = [*system, question, {"role": "assistant", "content": answer}]
        return {"messages": turns, **tools, **context}
    kept = record if form == "prompt and completion" else context
    kept = {name: value for name, value in kept.items() if name not in ("system", "tools")}
    return {**kept, "prompt": prompt, "completion": answer}


def _form_of(record: dict[str, Any], where: str, hint: str) -> str:
    complete = _complete(record)
    if not complete:
        raise ConchError(f"{where}: a record needs {NEEDED}; it has {', '.join(record)}{hint}")
    if len(complete) > 1:
        choice = " ".join(f"--map {name}={name}" for name in FORMS[complete[0]])
        raise ConchError(
            f"{where}: the record is of {len(complete)} forms, {'; '.join(complete)}: leave one, "
            f"or choose it for all, such as {choice}"
        )
    return complete[0]


def _mapped(record: dict[str, Any], where: str, mapping: Mapping[str, str]) -> dict[str, Any]:
    for key, name in mapping.items():
        if name not in record and key not in OPTIONAL:
            raise ConchError(
                f"{where}: --map {key}={name}, but the record has only {', '.join(record)}"
            )
    return {key: record[name] for key, name in mapping.items() if name in record}


def _with_input(instruction: str, record: dict[str, Any], where: str) -> str:
    given = record.get("input") or ""
    if record.get("history"):
        raise ConchError(f"{where}: history is not understood: write the turns as messages")
    if not isinstance(given, str):
        raise ConchError(f"{where}: input is not text")
    return f"{instruction}\n\n{given}" if given else instruction


def _system(record: dict[str, Any], where: str) -> list[dict[str, Any]]:
    text = record.get("system") or ""
    if not isinstance(text, str):
        raise ConchError(f"{where}: system is not text")
    return [{"role": "system", "content": text}] if text else []


def _tools(record: dict[str, Any], where: str) -> dict[str, Any]:
    tools = record.get("tools")
    if isinstance(tools, str) and tools.strip():
        # Tables hold what is nested as text.
        try:
            tools = parse_json(tools, f"{where}: tools")
        except NotWholeError as error:
            raise ConchError(str(error)) from error
    if not tools:
        return {}
    if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ConchError(f"{where}: tools is no list of objects: give the functions' JSON schemas")
    return {"tools": tools}


def _turns(turns: Any, where: str, form: str) -> list[Any]:
    """Turns with role and content, of which some may have had ShareGPT's from and value."""
    if not isinstance(turns, list):
        names = "role and content" if form == "messages" else "from and value"
        raise ConchError(f"{where}: {form} is a list of objects with {names}")
    named = ((turn, f"{where}: turn {number}") for number, turn in enumerate(turns, 1))
    return [_turn(t, name) if isinstance(t, dict) and "from" in t else t for t, name in named]


def _turn(turn: dict[str, Any], where: str) -> dict[str, Any]:
    speaker, value = turn["from"], turn.get("value")
    if "role" in turn or "content" in turn:
        raise ConchError(f"{where} has from and role: leave from and value, or role and content")
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise ConchError(f"{where} is from {speaker!r}: use one of {', '.join(SPEAKERS)}")
    if not isinstance(value, str):
        raise ConchError(f"{where}: value is not text")
    rest = {name: turn[name] for name in ("weight",) if turn.get(name) is not None}
    if speaker != "function_call":
        return {"role": SPEAKERS[speaker], "content": value, **rest}
    try:
        function = parse_json(value, f"{where}: value of a function_call")
    except NotWholeError as error:
        raise ConchError(str(error)) from error
    calls = function if isinstance(function, list) else [function]
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": call} for call in calls],
        **rest,
    }
