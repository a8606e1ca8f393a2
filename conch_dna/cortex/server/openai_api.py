"""OpenAI's chat API as data: requests that are read, refusals and replies that are written.

Knows the API as JSON, and answers; nothing of HTTP, models or threads. To support another
parameter: a field of `ChatRequest`, and out of `_NEUTRAL`. What clients are to learn of an answer
beyond that API: a field of `Answer`.
"""

import json
import reprlib
import secrets
import time
import uuid
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from conch_dna.cortex.options import AskOptions, HandOver, schema_problem
from conch_dna.cortex.turn import Answer
from conch_dna.web.door import ApiError, json_object

M = TypeVar("M", bound=BaseModel)
# A seed is any number of 64 bits; as many different draws there are.
FIRST_SEED, LAST_SEED = -(2**63), 2**63 - 1
SEEDS = 10**9 + 1
# Most values of a body: each may be a problem of its own, and each problem takes its time.
MAX_VALUES = 50_000
# So many problems of a request are told; of more their number.
MAX_PROBLEMS = 8
DONE = b"data: [DONE]\n\n"
COMMENT = b": waiting\n\n"

# What response_format's json_object asks for.
ANY_OBJECT = '{"type": "object"}'
_LIMIT = "a whole number from 1 to 2,147,483,647"
# They are for the provider's own records and caches.
_IGNORED = {
    "user",
    "metadata",
    "store",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prediction",
}
# Parameters of the API that change nothing at these values, and are refused at all others.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "stop": ([],),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "function_call": ("none",),
    "tool_choice": ("none",),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default", "flex", "priority"),
    "verbosity": ("medium",),
}
# Of an answer, what stands elsewhere in the reply.
_ELSEWHERE = ("domain", "text", "finish_reason", "prompt_tokens", "completion_tokens")


def unknown_model(name: str, known: Sequence[str]) -> ApiError:
    """The refusal of a model that is not there."""
    message = f"there is no model {name!r}: there is {', '.join(known)}"
    return ApiError(404, message, param="model", code="model_not_found")


# What is asked for. A field's description is what a message says to give instead of a wrong value.


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class _Part(_Strict):
    model_config = ConfigDict(extra="ignore")

    type: Literal["text"] = Field(description="text, the only kind that is supported")
    text: str = Field(description="a text")


class _Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"] = Field(
        description="system, developer, user or assistant"
    )
    content: list[_Part] = Field(description="a text, or a list of text parts")
    # Tells speakers of one role apart for the provider; no template has a place for it.
    name: str | None = Field(default=None, description="a text")

    @model_validator(mode="before")
    @classmethod
    def _without_empty_fields(cls, message: Any) -> Any:
        """Clients send empty fields of an answer back with it."""
        if not isinstance(message, dict):
            return message
        return {
            name: value
            for name, value in message.items()
            if name in cls.model_fields or value not in (None, [], "", {})
        }

    @field_validator("content", mode="before")
    @classmethod
    def _as_parts(cls, content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content


class _StreamOptions(_Strict):
    include_usage: bool | None = Field(default=None, description="true or false")
    include_obfuscation: Literal[False] | None = Field(default=None, description="false")


class _Schema(_Strict):
    model_config = ConfigDict(extra="ignore")

    schema_: dict[str, Any] = Field(alias="schema", description="a JSON schema of an object")

    @field_validator("schema_")
    @classmethod
    def _of_an_object(cls, schema: dict[str, Any]) -> dict[str, Any]:
        if problem := schema_problem(schema):
            raise PydanticCustomError("clash", problem)
        return schema


class _Format(_Strict):
    type: Literal["text", "json_object", "json_schema"] = Field(
        description="text, json_object or json_schema"
    )
    json_schema: _Schema | None = Field(
        default=None, validate_default=True, description="an object with schema"
    )

    @field_validator("json_schema")
    @classmethod
    def _where_it_belongs(cls, schema: _Schema | None, info: ValidationInfo) -> _Schema | None:
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


class _Conch(_Strict):
    """The options that only this server has."""

    hand_over: HandOver | None = Field(default=None, description="auto, never or always")
    structured: bool | None = Field(default=None, description="true or false")
    constrained: bool | None = Field(default=None, description="true or false")
    system: str | None = Field(default=None, description="a text")


class ChatRequest(_Strict):
    """A chat completion that was asked for, in the API's own fields."""

    model: str = Field(min_length=1, description="the name of a domain, see /v1/models")
    messages: list[_Message] = Field(
        min_length=1, description="a list of objects with role and content"
    )
    temperature: float = Field(
        default=AskOptions.temperature, ge=0, le=2, description="a number from 0 to 2"
    )
    top_p: float = Field(
        default=AskOptions.top_p, gt=0, le=1, description="a number above 0, up to 1"
    )
    seed: int | None = Field(
        default=None,
        ge=FIRST_SEED,
        le=LAST_SEED,
        description="a whole number of 64 bits, from -2^63 to 2^63 - 1",
    )
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**31, description=_LIMIT)
    max_tokens: int | None = Field(default=None, ge=1, lt=2**31, description=_LIMIT)
    stream: bool = Field(default=False, description="true or false")
    stream_options: _StreamOptions = Field(
        default=_StreamOptions(), description="an object with include_usage"
    )
    conch: _Conch = Field(
        default=_Conch(),
        description="an object with hand_over, structured, constrained or system",
    )
    response_format: _Format | None = Field(
        default=None, description="an object with type, and json_schema where that is its type"
    )

    @field_validator("max_tokens")
    @classmethod
    def _one_limit(cls, limit: int | None, info: ValidationInfo) -> int | None:
        if info.data.get("max_completion_tokens") not in (None, limit):
            raise PydanticCustomError(
                "clash", "max_tokens and max_completion_tokens differ: give one of them"
            )
        return limit

    @field_validator("stream_options", mode="before")
    @classmethod
    def _only_for_streams(cls, options: Any, info: ValidationInfo) -> Any:
        if options and info.data.get("stream") is False:
            raise PydanticCustomError(
                "clash", "stream_options is for streams: leave it out, or set stream"
            )
        return options

    @property
    def turns(self) -> list[dict[str, str]]:
        """The conversation, each turn with role and content as text."""
        return [
            {
                "role": "system" if message.role == "developer" else message.role,
                "content": "".join(part.text for part in message.content),
            }
            for message in self.messages
        ]

    @cached_property
    def options(self) -> AskOptions:
        """How it is to be answered; who draws without a seed gets another answer each time."""
        seed = self.seed
        if seed is None:
            seed = secrets.randbelow(SEEDS) if self.temperature else AskOptions.seed
        return AskOptions(
            max_tokens=self.max_tokens or self.max_completion_tokens or AskOptions.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=seed % SEEDS,
            schema=self.response_format.schema_text if self.response_format else None,
            **self.conch.model_dump(exclude_none=True),
        )


_DESCRIPTIONS = {
    name: str(field.description)
    for kind in (ChatRequest, _StreamOptions, _Schema, _Format, _Conch, _Message, _Part)
    for name, field in kind.model_fields.items()
}


def parse_chat(body: bytes) -> ChatRequest:
    """Read a request.

    Raises:
        ApiError: It is no JSON object, or something of it is not supported or out of its range; all
            of that is named.
    """
    fields = json_object(body, most_values=MAX_VALUES)
    return validated(
        ChatRequest, {name: value for name, value in fields.items() if _matters(name, value)}
    )


def validated(
    kind: type[M], fields: Mapping[str, Any], *, parts: Sequence[type[BaseModel]] = ()
) -> M:
    """A body's fields as a request of a kind.

    Args:
        kind: Its fields have descriptions.
        fields: Of the body.
        parts: Kinds that stand in its fields.

    Raises:
        ApiError: Something of them is not supported or out of its range; all of that is named.
    """
    kinds: list[type[BaseModel]] = [kind, *parts]
    described = _DESCRIPTIONS | {
        name: str(field.description) for each in kinds for name, field in each.model_fields.items()
    }
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        problems = [_problem(each, described) for each in error.errors(include_url=False)]
    messages = [message for _, message in problems[:MAX_PROBLEMS]]
    if len(problems) > MAX_PROBLEMS:
        messages.append(f"and {len(problems) - MAX_PROBLEMS} more")
    raise ApiError(400, " ".join("; ".join(messages).split()), param=problems[0][0])


def _matters(name: str, value: Any) -> bool:
    """Whether a parameter is more than said in passing."""
    # True is a 1 to Python.
    same = (
        value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
        for neutral in _NEUTRAL.get(name, ())
    )
    return value is not None and name not in _IGNORED and not any(same)


def _problem(error: ErrorDetails, described: Mapping[str, str]) -> tuple[str, str]:
    """What of the body is meant, and what is wrong with it."""
    place, names = "", []
    for part in error["loc"]:
        if isinstance(part, int):
            place += f"[{part}]"
        else:
            place = f"{place}.{part}".lstrip(".")
            names.append(part)
    if error["type"] == "clash":
        return place, error["msg"]
    if error["type"] == "extra_forbidden":
        remedy = f"give {described[names[-2]]}" if len(names) > 1 else "leave it out"
        return place, f"{place} is not supported by this server: {remedy}"
    value = "missing" if error["type"] == "missing" else reprlib.repr(error["input"])
    return place, f"{place} is {value}: give {described[names[-1]]}"


# What is answered.


class Shapes:
    """Replies to one request, which share an id.

    Args:
        model: As the client named it.
    """

    def __init__(self, model: str) -> None:
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def completion(self, answer: Answer) -> dict[str, Any]:
        """The whole answer at once."""
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [_choice(answer.finish_reason, message=message)],
            "usage": _usage(answer),
            "conch": _conch(answer),
        }

    def chunk(self, delta: Mapping[str, str], **more: Any) -> bytes:
        """A part of a streamed answer, as the event that is sent."""
        return self._event(choices=[_choice(None, delta=delta)], **more)

    def end(self, answer: Answer, *, include_usage: bool) -> bytes:
        """The last events of a streamed answer, whose text was sent before."""
        choices, conch = [_choice(answer.finish_reason, delta={})], _conch(answer)
        if not include_usage:
            return self._event(choices=choices, conch=conch) + DONE
        last = self._event(choices=choices, conch=conch, usage=None)
        return last + self._event(choices=[], usage=_usage(answer)) + DONE

    def _event(self, **more: Any) -> bytes:
        return server_sent_event({**self._head, "object": "chat.completion.chunk", **more})


def server_sent_event(value: Any) -> bytes:
    """A server-sent event with a JSON value."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


def model_entry(name: str, created: int) -> dict[str, Any]:
    """What /v1/models says of one of them."""
    return {"id": name, "object": "model", "created": created, "owned_by": "conch_dna"}


def _choice(finish_reason: str | None, **text: Mapping[str, Any]) -> dict[str, Any]:
    return {"index": 0, **text, "logprobs": None, "finish_reason": finish_reason}


def _conch(answer: Answer) -> dict[str, Any]:
    """Who answered and why, how sure it is, and what its check found."""
    return {name: value for name, value in answer.to_json().items() if name not in _ELSEWHERE}


def _usage(answer: Answer) -> dict[str, int] | None:
    """Numbers of tokens; None where they are not known."""
    if answer.prompt_tokens is None or answer.completion_tokens is None:
        return None
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
    }
