"""Functions that a neuron may call: how they stand in its prompt, and how calls stand in its text.

Knows OpenAI's form of tools, chat templates and text; nothing of HTTP, engines or models. Another
form of calls: its marks, what `grammar` writes between them, and `read_call`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from conch_dna.errors import ConchError
from conch_dna.training.chats.templates import Turn, render
from conch_dna.training.structured_answers import costly_part
from conch_dna.web.strict_json import JsonError, read_json

MOST_FUNCTIONS = 128
CALL_BEGIN, CALL_END = "<tool_call>", "</tool_call>"
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
# What OpenAI takes where a function has no parameters.
_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
_PASSAGE = """You can call these functions, one JSON object a line:
{functions}
To call one, write its name and arguments, and nothing after it:
<tool_call>
{{"name": "the function's name", "arguments": {{}}}}
</tool_call>
What it gave comes back between <tool_response> and </tool_response>."""


@dataclass(frozen=True, kw_only=True)
class Tools:
    """What functions may be called, and whether one must be.

    Attributes:
        functions: A JSON list of objects with name, perhaps description, and parameters, a JSON
            schema.
        choice: "auto", "required", or the name of the one function to call.
        several: Whether an answer may have more calls than one.

    Raises:
        ConchError: A name is none or stands twice, there are none or too many, or the one to call
            is not there.
    """

    functions: str
    choice: str = "auto"
    several: bool = True

    def __post_init__(self) -> None:
        names = [each["name"] for each in self.listed]
        if not 1 <= len(names) <= MOST_FUNCTIONS:
            raise ConchError(f"there are {len(names)} functions: give 1 to {MOST_FUNCTIONS}")
        for name in names:
            if not _NAME.fullmatch(name):
                raise ConchError(
                    f"a function is called {name[:80]!r}: use 1 to 64 letters, digits, _ and -"
                )
            if names.count(name) > 1:
                raise ConchError(f"two functions are called {name!r}: rename one")
        if problem := costly_part([each.get("parameters") for each in self.listed]):
            raise ConchError(f"the functions together: {problem}")
        if self.choice not in ("auto", "required", *names):
            raise ConchError(
                f"tool_choice names {self.choice[:80]!r}, and there is {', '.join(names)}"
            )

    @cached_property
    def listed(self) -> list[dict[str, Any]]:
        """The functions."""
        functions: list[dict[str, Any]] = json.loads(self.functions)
        return functions

    def grammar(self, schema: Mapping[str, Any] | None, whitespace: str) -> str:
        """What answers may be, in llguidance's Lark.

        Args:
            schema: Of an answer that calls nothing; None where that is any text.
            whitespace: A pattern of what may stand between the parts of JSON.
        """
        options = {"x-guidance": {"whitespace_pattern": whitespace, "lenient": True}}
        call = json.dumps({**options, "anyOf": [self._call(each) for each in self._choosable]})
        body = f'"\\n" %json {call} "\\n{CALL_END}"'
        more = '("\\n" call)*' if self.several else ""
        calls = f'calls: call {more}\ncall: "{CALL_BEGIN}" {body}\n'
        if self.choice != "auto":
            return f"start: calls\n{calls}"
        if schema is not None:
            answer = json.dumps({**schema, **options})
            return f"start: calls | answer\nanswer: %json {answer}\n{calls}"
        # Text up to the mark of a call, which the shortest match of it ends.
        return (
            f"start: {'part* rest' if self.several else 'part | rest'}\nrest: TEXT\n"
            f'TEXT: /(.|\\n)*/\nbegin[lazy]: TEXT "{CALL_BEGIN}"\npart: begin {body}\n'
        )

    @property
    def _choosable(self) -> list[dict[str, Any]]:
        return [each for each in self.listed if self.choice in ("auto", "required", each["name"])]

    @staticmethod
    def _call(function: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "type": "object",
            "properties": {
                "name": {"const": function["name"]},
                "arguments": function.get("parameters") or _NO_PARAMETERS,
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }


@dataclass(frozen=True)
class Call:
    """A function that an answer calls.

    Attributes:
        name: Of the function.
        arguments: A JSON object, as text.
    """

    name: str
    arguments: str


def read_call(text: str) -> Call | None:
    """The call that stands between two marks; None where it is none, such as one broken off."""
    try:
        call = read_json(text)
    except (JsonError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments")
    if not isinstance(arguments, dict):
        return None
    return Call(call["name"], json.dumps(arguments, ensure_ascii=False))


def prompt_with_tools(
    tokenizer: Any, turns: Sequence[Turn], tools: Tools | None
) -> tuple[list[Turn], list[Turn] | None]:
    """A conversation with functions, as the tokenizer's chat template takes it.

    Where the template writes calls in another form, or has no place for them, functions stand in
    the system turn, and calls and what they gave in the text of their turns.

    Returns:
        The turns, and what the template is to write of functions itself.
    """
    functions = [{"type": "function", "function": each} for each in tools.listed] if tools else []
    if _writes_calls(tokenizer):
        return list(turns), functions or None
    plain = [_in_text(turn) for turn in turns]
    if tools is None:
        return plain, None
    lines = "\n".join(json.dumps(each, ensure_ascii=False) for each in tools.listed)
    passage = _PASSAGE.format(functions=lines)
    if plain[0]["role"] == "system":
        return [{**plain[0], "content": f"{plain[0]['content']}\n\n{passage}"}, *plain[1:]], None
    return [{"role": "system", "content": passage}, *plain], None


def _writes_calls(tokenizer: Any) -> bool:
    """Whether the template writes functions, and calls in the form that is read here."""
    if not tokenizer.has_chat_template or tokenizer.tool_call_start != CALL_BEGIN:
        return False
    if not tokenizer.tool_parser.__module__.endswith(".json_tools"):
        return False
    turns = [{"role": "user", "content": "?"}]
    tools = [{"type": "function", "function": {"name": "probe", "parameters": _NO_PARAMETERS}}]
    try:
        return "probe" in render(tokenizer, turns, generation_prompt=True, tools=tools)
    except ConchError:
        return False


def _in_text(turn: Turn) -> Turn:
    """A turn whose calls, or what one gave, stand in its text."""
    if turn["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{turn['content']}\n</tool_response>"}
    calls = [
        f"{CALL_BEGIN}\n{json.dumps(call['function'], ensure_ascii=False)}\n{CALL_END}"
        for call in turn.get("tool_calls", [])
    ]
    parts = [turn["content"], *calls]
    return {"role": turn["role"], "content": "\n".join(part for part in parts if part)}
