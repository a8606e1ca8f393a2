"""What a client asks for, read from the body of a chat completion; what is refused is named.

Knows OpenAI's chat API as JSON; nothing of HTTP, models or threads. To support another parameter:
take it in `parse_chat`, and out of `_NEUTRAL`.
"""

import json
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from conch_dna.cortex.turn import AskOptions
from conch_dna.errors import ConchError

LAST_SEED = 10**9
MAX_TEMPERATURE = 2.0
_ROLES = ("system", "developer", "user", "assistant")
_TAKEN = {
    *("model", "messages", "temperature", "top_p", "seed", "conch"),
    *("max_tokens", "max_completion_tokens", "stream", "stream_options"),
}
# They are for the provider's own records.
_IGNORED = {"user", "metadata", "store"}
# Parameters of the API that change nothing at these values, and are refused at all others.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "stop": ([],),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logprobs": (False,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none",),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
}
_CONCH = ("hand_over", "structured", "system")


class ApiError(ConchError):
    """A refusal as OpenAI's API tells it.

    Attributes:
        status: Of HTTP.
        param: What of the body is meant; may be None.
        code: A word for programs; may be None.
        headers: To be sent with it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def to_json(self) -> dict[str, Any]:
        """The body of the reply."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": str(self),
                "type": kinds.get(self.status, kind),
                "param": self.param,
                "code": self.code,
            }
        }


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """A chat completion that was asked for.

    Attributes:
        model: The neuron's domain, or EGO.
        messages: The conversation, each with role and content as text.
        options: How it is to be answered.
        stream: Whether the answer is sent as it comes.
        include_usage: Whether a stream ends with the numbers of tokens.
    """

    model: str
    messages: tuple[dict[str, str], ...]
    options: AskOptions
    stream: bool
    include_usage: bool


def parse_chat(body: bytes) -> ChatRequest:
    """Read a request.

    Raises:
        ApiError: It is no JSON object, or something of it is not supported or out of its range.
    """
    given = {name: value for name, value in _object(body).items() if value is not None}
    for name, value in given.items():
        if name in _NEUTRAL and not any(_same(value, one) for one in _NEUTRAL[name]):
            _refuse(f"{name} is not supported by this server: leave it out", name)
        if name not in _TAKEN | _IGNORED and name not in _NEUTRAL:
            _refuse(f"{name} is not known to this server: leave it out", name)
    model = given.get("model")
    if not isinstance(model, str) or not model:
        _refuse("model is missing: name a domain, see /v1/models", "model")
    stream = _boolean(given, "stream", False)
    return ChatRequest(
        model=model,
        messages=_messages(given.get("messages")),
        options=_options(given),
        stream=stream,
        include_usage=_include_usage(given, stream),
    )


def _refuse(message: str, param: str | None = None) -> NoReturn:
    raise ApiError(400, message, param=param)


def _same(value: Any, neutral: Any) -> bool:
    """Equal, and no true for a 1."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _object(body: bytes) -> dict[str, Any]:
    def number(text: str) -> NoReturn:
        _refuse(f"the body has {text}, which is no JSON: leave it out")

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(found)
        if len(made) < len(found):
            names = [name for name, _ in found]
            twice = next(name for name in names if names.count(name) > 1)
            _refuse(f"the body gives {twice!r} twice in one object: leave one of them")
        return made

    try:
        value = json.loads(body, parse_constant=number, object_pairs_hook=pairs)
        # Half a surrogate pair is no character, and no tokenizer or reply can hold it.
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        _refuse("the body has half a surrogate pair (\\ud800 to \\udfff): leave it out")
    except (ValueError, RecursionError) as error:
        _refuse(f"the body is no JSON ({type(error).__name__}): send one JSON object")
    if not isinstance(value, dict):
        _refuse("the body is no JSON object: send one, with model and messages")
    return value


def _messages(value: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not value:
        _refuse("messages is missing: give a list of objects with role and content", "messages")
    return tuple(_message(each, f"messages[{place}]") for place, each in enumerate(value))


def _message(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict):
        _refuse(f"{where} is no object: give role and content", where)
    role = value.get("role")
    if role not in _ROLES:
        _refuse(f"{where}.role is {role!r}: use one of {', '.join(_ROLES)}", f"{where}.role")
    for name, more in value.items():
        # Clients send empty fields of an answer back with it.
        if name not in ("role", "content") and more not in (None, [], "", {}):
            _refuse(f"{where}.{name} is not supported by this server: leave it out", where)
    content = value.get("content")
    if isinstance(content, list):
        content = "".join(_part(each, f"{where}.content[{n}]") for n, each in enumerate(content))
    if not isinstance(content, str):
        _refuse(f"{where}.content is no text: give a text, or a list of text parts", where)
    return {"role": "system" if role == "developer" else role, "content": content}


def _part(value: Any, where: str) -> str:
    is_text = isinstance(value, dict) and value.get("type") == "text"
    if not is_text or not isinstance(value.get("text"), str):
        _refuse(f"{where} is no part with text: only those are supported", where)
    return str(value["text"])


def _options(given: Mapping[str, Any]) -> AskOptions:
    defaults = AskOptions()
    temperature = _number(given, "temperature", defaults.temperature, high=MAX_TEMPERATURE)
    top_p = _number(given, "top_p", defaults.top_p, high=1.0)
    if top_p == 0:
        _refuse("top_p is 0: use more than 0, up to 1", "top_p")
    limits = {
        name: _whole(given, name, low=1)
        for name in ("max_tokens", "max_completion_tokens")
        if name in given
    }
    if len(set(limits.values())) > 1:
        _refuse("max_tokens and max_completion_tokens differ: give one of them", "max_tokens")
    seed = given.get("seed")
    if seed is None:
        # Who gives none expects another answer each time.
        seed = secrets.randbelow(LAST_SEED + 1) if temperature else defaults.seed
    else:
        seed = _whole(given, "seed", low=0, high=LAST_SEED)
    return AskOptions(
        max_tokens=next(iter(limits.values()), defaults.max_tokens),
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        **_conch(given.get("conch", {})),
    )


def _conch(value: Any) -> dict[str, Any]:
    """The options that only this server has."""
    if not isinstance(value, dict):
        _refuse(f"conch is no object: give {', '.join(_CONCH)} in it", "conch")
    if unknown := sorted(set(value) - set(_CONCH)):
        _refuse(
            f"conch.{unknown[0]} is not known to this server: it knows {', '.join(_CONCH)}",
            f"conch.{unknown[0]}",
        )
    given = {name: each for name, each in value.items() if each is not None}
    for name in ("hand_over", "system"):
        if not isinstance(given.get(name, ""), str):
            _refuse(f"conch.{name} is {given[name]!r}: give a text", f"conch.{name}")
    _boolean(given, "structured", True, within="conch.")
    try:
        AskOptions(**given)
    except ConchError as error:
        _refuse(f"conch: {error}", "conch")
    return given


def _include_usage(given: Mapping[str, Any], stream: bool) -> bool:
    value = given.get("stream_options", {})
    if not isinstance(value, dict):
        _refuse("stream_options is no object: give include_usage in it", "stream_options")
    if value and not stream:
        _refuse("stream_options is for streams: leave it out, or set stream", "stream_options")
    for name, each in value.items():
        if name != "include_usage" and not (name == "include_obfuscation" and not each):
            _refuse(f"stream_options.{name} is not supported: leave it out", "stream_options")
    return _boolean(value, "include_usage", False, within="stream_options.")


def _boolean(given: Mapping[str, Any], name: str, default: bool, *, within: str = "") -> bool:
    value = given.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        _refuse(f"{within}{name} is {value!r}: it must be true or false", within + name)
    return value


def _number(given: Mapping[str, Any], name: str, default: float, *, high: float) -> float:
    value = given.get(name, default)
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    if not plain or not math.isfinite(value) or not 0 <= value <= high:
        _refuse(f"{name} is {value!r}: it must be a number between 0 and {high:g}", name)
    return float(value)


def _whole(given: Mapping[str, Any], name: str, *, low: int, high: int = 2**31 - 1) -> int:
    value = given[name]
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        _refuse(f"{name} is {value!r}: it must be a whole number between {low} and {high:,}", name)
    return value
