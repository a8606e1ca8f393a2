"""OpenAI's API as data: what chat and text completions ask for, and how they are refused.

Knows the API as JSON; nothing of HTTP, models or threads. To support another parameter: a field of
`ChatRequest`, `CompletionRequest` or what they share, and out of `_NEUTRAL`.
"""

import json
import reprlib
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Annotated, Any, TypeVar, get_args

from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from conch_dna.cortex.options import AskOptions
from conch_dna.cortex.server.fields import (
    Choice,
    Conch,
    Format,
    Message,
    StreamOptions,
    Strict,
    Tool,
)
from conch_dna.cortex.tools import MOST_FUNCTIONS, Tools
from conch_dna.training.chats.conversations import Prompt
from conch_dna.web.door import ApiError, json_object

# A seed is any number of 64 bits; as many different draws there are.
FIRST_SEED, LAST_SEED = -(2**63), 2**63 - 1
SEEDS = 10**9 + 1
# Most values of a body: each may be a problem of its own, and each problem takes its time.
MAX_VALUES = 50_000
# So many problems of a request are told; of more their number.
MAX_PROBLEMS = 8
# Most answers of one request, most stops, and most tokens told beside each one.
MOST_CHOICES, MOST_STOPS, MOST_TOP = 128, 16, 20

M = TypeVar("M", bound=BaseModel)
R = TypeVar("R", bound="_Asked")
_LIMIT = "a whole number from 1 to 2,147,483,647"
# They are for the provider's own records, caches and queues.
_IGNORED = {
    "user",
    "metadata",
    "store",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prediction",
    "service_tier",
}
# Parameters that change an answer, and are supported at these values only.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "audio": (),
    "suffix": ("",),
    "best_of": (1,),
    "verbosity": ("medium",),
}
_INSTEAD = {"functions": "tools", "function_call": "tool_choice"}


def unknown_model(name: str, known: Sequence[str]) -> ApiError:
    """The refusal of a model that is not there."""
    message = f"there is no model {name!r}: there is {', '.join(known)}"
    return ApiError(404, message, param="model", code="model_not_found")


# What is asked for. A field's description is what a message says to give instead of a wrong value.


class _Asked(Strict):
    """What chats and texts have in common."""

    model: str = Field(min_length=1, description="the name of a domain, see /v1/models")
    temperature: float = Field(
        default=AskOptions.temperature, ge=0, le=2, description="a number from 0 to 2"
    )
    top_p: float = Field(
        default=AskOptions.top_p, gt=0, le=1, description="a number above 0, up to 1"
    )
    top_k: int = Field(
        default=AskOptions.top_k, ge=-1, lt=2**31, description="a whole number; 0 or -1 for all"
    )
    min_p: float = Field(default=AskOptions.min_p, ge=0, le=1, description="a number from 0 to 1")
    presence_penalty: float = Field(default=0.0, ge=-2, le=2, description="a number from -2 to 2")
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2, description="a number from -2 to 2")
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field(
        default={},
        max_length=1024,
        description="an object of at most 1,024 token ids with numbers from -100 to 100",
    )
    seed: int | None = Field(
        default=None,
        ge=FIRST_SEED,
        le=LAST_SEED,
        description="a whole number of 64 bits, from -2^63 to 2^63 - 1",
    )
    n: int = Field(
        default=1, ge=1, le=MOST_CHOICES, description=f"a whole number from 1 to {MOST_CHOICES}"
    )
    stop: list[Annotated[str, Field(min_length=1, max_length=1000)]] = Field(
        default=[],
        max_length=MOST_STOPS,
        description=f"a text, or at most {MOST_STOPS}, each of 1 to 1,000 characters",
    )
    max_tokens: int | None = Field(default=None, ge=1, lt=2**31, description=_LIMIT)
    stream: bool = Field(default=False, description="true or false")
    stream_options: StreamOptions = Field(
        default=StreamOptions(), description="an object with include_usage"
    )

    @field_validator("stop", mode="before")
    @classmethod
    def _as_list(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @field_validator("logit_bias")
    @classmethod
    def _of_tokens(cls, bias: dict[str, float]) -> dict[str, float]:
        for token in bias:
            if not token.isdecimal() or len(token) > 9:
                raise PydanticCustomError(
                    "clash", f"logit_bias has {reprlib.repr(token)}: give ids of tokens"
                )
        return bias

    @field_validator("stream_options", mode="before")
    @classmethod
    def _only_for_streams(cls, options: Any, info: ValidationInfo) -> Any:
        if options and info.data.get("stream") is False:
            raise PydanticCustomError(
                "clash", "stream_options is for streams: leave it out, or set stream"
            )
        return options

    @property
    def count(self) -> int:
        """How many answers are asked for."""
        return self.n

    def _drawn(self, **more: Any) -> list[AskOptions]:
        """How each of `n` answers is drawn: the next one by the next seed.

        Without a seed they are drawn otherwise each time.
        """
        seed = self.seed
        if seed is None:
            seed = secrets.randbelow(SEEDS) if self.temperature else AskOptions.seed
        options = AskOptions(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=tuple((int(token), value) for token, value in self.logit_bias.items()),
            stop=tuple(self.stop),
            **more,
        )
        return [replace(options, seed=(seed + index) % SEEDS) for index in range(self.n)]

    @cached_property
    def ignored(self) -> list[str]:
        """Names of what is not known here, and changes nothing."""
        return list(dict.fromkeys(_unknown(self, "")))


class ChatRequest(_Asked):
    """A chat completion that was asked for, in the API's own fields."""

    messages: list[Message] = Field(
        min_length=1, description="a list of objects with role and content"
    )
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**31, description=_LIMIT)
    logprobs: bool = Field(default=False, description="true or false")
    top_logprobs: int = Field(
        default=0, ge=0, le=MOST_TOP, description=f"a whole number from 0 to {MOST_TOP}"
    )
    tools: list[Tool] = Field(
        default=[],
        max_length=MOST_FUNCTIONS,
        description=f"a list of at most {MOST_FUNCTIONS} objects with type and function",
    )
    tool_choice: Choice = Field(
        default=Choice(type="auto"), description="none, auto, required, or an object"
    )
    parallel_tool_calls: bool = Field(default=True, description="true or false")
    conch: Conch = Field(
        default=Conch(),
        description="an object with hand_over, structured, constrained or system",
    )
    response_format: Format | None = Field(
        default=None, description="an object with type, and json_schema where that is its type"
    )

    @field_validator("max_completion_tokens")
    @classmethod
    def _one_limit(cls, limit: int | None, info: ValidationInfo) -> int | None:
        if limit is not None and info.data.get("max_tokens") not in (None, limit):
            raise PydanticCustomError(
                "clash", "max_tokens and max_completion_tokens differ: give one of them"
            )
        return limit

    @field_validator("top_logprobs")
    @classmethod
    def _with_logprobs(cls, count: int, info: ValidationInfo) -> int:
        if count and info.data.get("logprobs") is False:
            raise PydanticCustomError("clash", "top_logprobs needs logprobs: set it to true")
        return count

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _as_choice(cls, choice: Any) -> Any:
        return {"type": choice} if isinstance(choice, str) else choice

    @property
    def turns(self) -> list[dict[str, Any]]:
        """The conversation, as chat templates take it."""
        return [message.turn for message in self.messages]

    @property
    def questions(self) -> list[tuple[Prompt, AskOptions]]:
        """The conversation, and how its answer is drawn, `n` times."""
        turns = self.turns
        options = self._drawn(
            max_tokens=self.max_tokens or self.max_completion_tokens or AskOptions.max_tokens,
            schema=self.response_format.schema_text if self.response_format else None,
            top_logprobs=self.top_logprobs if self.logprobs else None,
            tools=self._tools,
            **self.conch.model_dump(exclude_none=True),
        )
        return [(turns, each) for each in options]

    @property
    def _tools(self) -> Tools | None:
        choice = self.tool_choice.function.name if self.tool_choice.function else None
        if not self.tools:
            if self.tool_choice.type in ("required", "function"):
                raise ApiError(
                    400, "tool_choice asks for a call, and there are no tools", param="tool_choice"
                )
            return None
        if self.tool_choice.type == "none":
            return None
        functions = [
            tool.function.model_dump(include={"name", "description", "parameters"})
            for tool in self.tools
        ]
        return Tools(
            functions=json.dumps(
                [{k: v for k, v in each.items() if v is not None} for each in functions]
            ),
            choice=choice or self.tool_choice.type,
            several=self.parallel_tool_calls,
        )


class CompletionRequest(_Asked):
    """Texts to go on with, in the API's own fields."""

    prompt: list[str] = Field(
        min_length=1,
        max_length=MOST_CHOICES,
        description=f"a text, or a list of 1 to {MOST_CHOICES} texts; token ids are not taken",
    )
    echo: bool = Field(default=False, description="true or false")
    logprobs: int | None = Field(
        default=None, ge=0, le=MOST_TOP, description=f"a whole number from 0 to {MOST_TOP}"
    )

    @field_validator("prompt", mode="before")
    @classmethod
    def _as_prompts(cls, prompt: Any) -> Any:
        return [prompt] if isinstance(prompt, str) else prompt

    @field_validator("logprobs")
    @classmethod
    def _not_of_prompts(cls, count: int | None, info: ValidationInfo) -> int | None:
        if count is not None and info.data.get("echo"):
            raise PydanticCustomError(
                "clash", "logprobs of a prompt are not told: leave out echo or logprobs"
            )
        return count

    @property
    def count(self) -> int:
        """How many answers are asked for."""
        return self.n * len(self.prompt)

    @property
    def questions(self) -> list[tuple[Prompt, AskOptions]]:
        """Each prompt, and how it goes on, `n` times."""
        options = self._drawn(
            max_tokens=self.max_tokens or AskOptions.max_tokens,
            top_logprobs=self.logprobs,
            plain=True,
            hand_over="never",
        )
        return [(prompt, each) for prompt in self.prompt for each in options]


AnyRequest = ChatRequest | CompletionRequest


def _unknown(part: Any, place: str) -> Iterator[str]:
    """Names of fields that are not known, at all depths."""
    if isinstance(part, list):
        for each in part:
            yield from _unknown(each, place)
    elif isinstance(part, BaseModel):
        for name in part.model_extra or ():
            yield f"{place}{name}"
        for name in type(part).model_fields:
            yield from _unknown(getattr(part, name), f"{place}{name}.")


def parse_request(body: bytes, kind: type[R]) -> R:
    """Read a request.

    Args:
        body: JSON.
        kind: `ChatRequest` or `CompletionRequest`.

    Raises:
        ApiError: It is no JSON object, or something of it is not supported or out of its range; all
            of that is named.
    """
    fields = json_object(body, most_values=MAX_VALUES)
    problems = [
        (name, f"{name} is not supported by this server: {_remedy(name)}")
        for name, value in fields.items()
        if name in _NEUTRAL and value is not None and not _is_neutral(value, _NEUTRAL[name])
    ]
    kept = {
        name: value
        for name, value in fields.items()
        if value is not None and name not in _IGNORED and name not in _NEUTRAL
    }
    return validated(kind, kept, problems)


def validated(
    kind: type[M], fields: Mapping[str, Any], problems: Sequence[tuple[str, str]] = ()
) -> M:
    """A body's fields as a request of a kind, whose fields have descriptions.

    Args:
        kind: Of the request.
        fields: Of the body.
        problems: What was found so far: field and words.

    Raises:
        ApiError: Something of them is not supported or out of its range; all of that is named.
    """
    found = list(problems)
    try:
        request = kind.model_validate(fields)
    except ValidationError as error:
        found += [_problem(each, kind) for each in error.errors(include_url=False)]
    if not found:
        return request
    messages = [message for _, message in found[:MAX_PROBLEMS]]
    if len(found) > MAX_PROBLEMS:
        messages.append(f"and {len(found) - MAX_PROBLEMS} more")
    raise ApiError(400, " ".join("; ".join(messages).split()), param=found[0][0])


def _remedy(name: str) -> str:
    return f"use {_INSTEAD[name]}" if name in _INSTEAD else "leave it out"


def _is_neutral(value: Any, neutral: Sequence[Any]) -> bool:
    """Whether a value is one of those that change nothing."""
    # True is a 1 to Python.
    return any(
        value == each and isinstance(value, bool) == isinstance(each, bool) for each in neutral
    )


def _problem(error: ErrorDetails, kind: type[BaseModel]) -> tuple[str, str]:
    """What of the body is meant, and what is wrong with it."""
    place, told, holder = "", "", ""
    part: type[BaseModel] | None = kind
    for step in error["loc"]:
        if isinstance(step, int):
            place += f"[{step}]"
            continue
        place = f"{place}.{step}".lstrip(".")
        # What stands in an object of any names is told of as the field that holds it.
        if part is not None:
            found = {each.alias or name: each for name, each in part.model_fields.items()}
            holder = told
            told, part = _described(found[step]) if step in found else ("", None)
    if error["type"] == "clash":
        return place, error["msg"]
    if error["type"] == "extra_forbidden":
        return place, f"{place} is not supported by this server: give {holder}"
    value = "missing" if error["type"] == "missing" else reprlib.repr(error["input"])
    return place, f"{place} is {value}: give {told}"


def _described(field: FieldInfo) -> tuple[str, type[BaseModel] | None]:
    """What a field's value is, and the object that it is or has, if any."""
    kinds: list[Any] = [field.annotation]
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return str(field.description), kind
        kinds += get_args(kind)
    return str(field.description), None
