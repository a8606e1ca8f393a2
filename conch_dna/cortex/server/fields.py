"""The objects that OpenAI's requests are made of: messages, tools, formats, and this server's own.

Knows the API as JSON; nothing of whole requests. Another object of the API: a class here, and its
field in openai_api.py. A field's description is what a message says to give instead of a wrong
value.
"""

import json
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from conch_dna.cortex.options import HandOver, schema_problem
from conch_dna.web.strict_json import JsonError, read_json

# What response_format's json_object asks for.
ANY_OBJECT = '{"type": "object"}'


class Strict(BaseModel):
    """What is read as it stands; fields that it does not know are kept apart."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)


class Part(Strict):
    """A part of a message."""

    type: Literal["text"] = Field(description="text, the only kind that is supported")
    text: str = Field(description="a text")


class CalledFunction(Strict):
    """What a call names."""

    name: str = Field(description="a text")
    arguments: str = Field(description="a JSON object, as text")


class ToolCall(Strict):
    """A call that an assistant made."""

    id: str = Field(default="", description="a text")
    type: Literal["function"] = Field(default="function", description="function")
    function: CalledFunction = Field(description="an object with name and arguments")


class Message(Strict):
    """A turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(
        description="system, developer, user, assistant or tool"
    )
    content: list[Part] = Field(description="a text, or a list of text parts")
    # Tells speakers of one role apart for the provider; no template has a place for it.
    name: str | None = Field(default=None, description="a text")
    tool_calls: list[ToolCall] = Field(
        default=[], description="a list of objects with id, type and function"
    )
    tool_call_id: str | None = Field(default=None, description="a text")

    @model_validator(mode="before")
    @classmethod
    def _without_empty_fields(cls, message: Any) -> Any:
        """Clients send empty fields of an answer back with it."""
        if not isinstance(message, dict):
            return message
        kept = {
            name: value
            for name, value in message.items()
            if value not in (None, [], "", {}) or (name in cls.model_fields and value is not None)
        }
        return {"content": "", **kept} if kept.get("tool_calls") else kept

    @field_validator("content", mode="before")
    @classmethod
    def _as_parts(cls, content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content

    @property
    def turn(self) -> dict[str, Any]:
        """As chat templates take it."""
        turn: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": "".join(part.text for part in self.content),
        }
        if self.tool_calls:
            turn["tool_calls"] = [
                {"id": call.id, "type": "function", "function": _called(call.function)}
                for call in self.tool_calls
            ]
        if self.tool_call_id is not None:
            turn["tool_call_id"] = self.tool_call_id
        return turn


def _called(function: CalledFunction) -> dict[str, Any]:
    """A call with its arguments as templates take them: as an object, where they are JSON."""
    try:
        arguments = read_json(function.arguments)
    except (JsonError, RecursionError):
        arguments = function.arguments
    return {"name": function.name, "arguments": arguments}


class StreamOptions(Strict):
    """What else a stream tells."""

    include_usage: bool | None = Field(default=None, description="true or false")
    include_obfuscation: bool | None = Field(default=None, description="true or false")


class Function(Strict):
    """What may be called."""

    name: str = Field(description="a name of 1 to 64 letters, digits, _ and -")
    description: str | None = Field(default=None, description="a text")
    parameters: dict[str, Any] | None = Field(
        default=None, description="a JSON schema of an object"
    )
    strict: bool | None = Field(default=None, description="true or false")

    @field_validator("parameters")
    @classmethod
    def _of_an_object(cls, schema: dict[str, Any] | None) -> dict[str, Any] | None:
        if schema and (problem := schema_problem(schema)):
            raise PydanticCustomError("clash", "parameters of a function: " + problem)
        return schema


class Tool(Strict):
    """A function, in its envelope."""

    type: Literal["function"] = Field(description="function, the only kind that is supported")
    function: Function = Field(description="an object with name, and perhaps parameters")


class Named(Strict):
    """A function that is to be called."""

    name: str = Field(description="a text")


class Choice(Strict):
    """Whether functions are called."""

    type: Literal["none", "auto", "required", "function"] = Field(
        description="none, auto, required, or an object with type function, and function"
    )
    function: Named | None = Field(default=None, description="an object with name")


class Schema(Strict):
    """What answers keep to, in its envelope."""

    schema_: dict[str, Any] = Field(alias="schema", description="a JSON schema of an object")
    name: str | None = Field(default=None, description="a text")
    description: str | None = Field(default=None, description="a text")
    strict: bool | None = Field(default=None, description="true or false")

    @field_validator("schema_")
    @classmethod
    def _of_an_object(cls, schema: dict[str, Any]) -> dict[str, Any]:
        if problem := schema_problem(schema):
            raise PydanticCustomError("clash", problem)
        return schema


class Format(Strict):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"] = Field(
        description="text, json_object or json_schema"
    )
    json_schema: Schema | None = Field(
        default=None, validate_default=True, description="an object with schema"
    )

    @field_validator("json_schema")
    @classmethod
    def _where_it_belongs(cls, schema: Schema | None, info: ValidationInfo) -> Schema | None:
        if (schema is None) == (info.data.get("type") == "json_schema"):
            raise PydanticCustomError(
                "clash", "json_schema belongs to the type json_schema: give both or neither"
            )
        return schema

    @property
    def schema_text(self) -> str | None:
        """A JSON schema as JSON text; None for text."""
        if self.json_schema is not None:
            return json.dumps(self.json_schema.schema_)
        return ANY_OBJECT if self.type == "json_object" else None


class Conch(Strict):
    """The options that only this server has."""

    model_config = ConfigDict(extra="forbid")

    hand_over: HandOver | None = Field(default=None, description="auto, never or always")
    structured: bool | None = Field(default=None, description="true or false")
    constrained: bool | None = Field(default=None, description="true or false")
    system: str | None = Field(default=None, description="a text")
