"""The door of a server: where it listens, who may ask, how large a request is, what refusals say.

Knows Starlette's requests and JSON; nothing of what is asked for. Another bound on requests: a
field of `ListenSettings`, and where it is kept to.
"""

import asyncio
import hmac
import ipaddress
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from conch_dna.errors import ConchError
from conch_dna.options.fields import option, option_problems
from conch_dna.web.strict_json import MAX_DEPTH, JsonError, read_json

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

# A host and perhaps a port; no user before it, nothing behind it.
_HOST = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+)(?::[0-9]{1,5})?")
_ORIGIN = re.compile(rf"[A-Za-z][A-Za-z0-9+.-]*://{_HOST.pattern}")
# What is read of a body that is too large, so that the client gets to read why.
_DRAINED = 16
# A string of JSON; one that never ends reaches to the end, so that each character is read once.
_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_LONGEST_REASON = 300


@dataclass(frozen=True, kw_only=True)
class ListenSettings:
    """Where a server listens, who may ask, and how large and slow a request may be.

    The fields say themselves what they are.

    Raises:
        ConchError: A value is out of its range, or others could reach the server without a key;
            all such problems are named at once.
    """

    host: str = option("127.0.0.1", "Address to listen at; another than this machine's needs a key")
    port: int = option(8642, "Port to listen at; 0 takes a free one", low=0, high=65535)
    api_key_env: str = option(
        "", "Environment variable with the key that clients must send; empty asks for none"
    )
    max_body_bytes: int = option(2**20, "Largest body of a request", low=1)
    max_queue: int = option(256, "Most requests that wait or are answered at once", low=1)
    request_timeout_s: float = option(600.0, "Longest time for one request in seconds", above=0)
    head_timeout_s: float = option(
        10.0, "Longest time for the head of a request in seconds", above=0
    )
    body_timeout_s: float = option(
        30.0, "Longest time for the body of a request in seconds", above=0
    )

    def __post_init__(self) -> None:
        problems = option_problems(self)
        if not problems:
            if not re.fullmatch(r"([A-Za-z_][A-Za-z0-9_]*)?", self.api_key_env):
                problems.append(
                    "api_key_env is no name of an environment variable: give the variable's "
                    "name, not the key"
                )
            if not self.api_key_env and not is_loopback(self.host):
                problems.append(
                    f"host is {self.host!r}, where other machines reach the server: name a "
                    "variable with a key by --api-key-env, or listen at 127.0.0.1"
                )
        if problems:
            raise ConchError("; ".join(problems))

    def key(self) -> str:
        """The key that clients must send; empty where they need none.

        Raises:
            ConchError: The variable that is to hold it is not set, or empty.
        """
        if not self.api_key_env:
            return ""
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            raise ConchError(
                f"the environment variable {self.api_key_env} is empty or not set: put the key "
                "into it"
            )
        return key


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is this machine's own."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


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


def json_response(
    content: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> "Response":
    """A reply whose body is JSON."""
    from starlette.responses import JSONResponse

    return JSONResponse(content, status, headers=headers)


def error_handlers() -> dict[Any, Any]:
    """What a Starlette application answers where something is refused or goes wrong."""
    from starlette.exceptions import HTTPException

    def refused(request: "Request", error: Any) -> "Response":
        return json_response(error.to_json(), error.status, headers=error.headers)

    def not_there(request: "Request", error: Any) -> "Response":
        detail, headers = error.detail, error.headers or {}
        if error.status_code == 404:
            paths = ", ".join(route.path for route in request.app.routes)
            detail = f"there is no such path: there is {paths}"
        elif error.status_code == 405 and "Allow" in headers:
            detail = f"use {headers['Allow']}"
        # Not of request.url, which reads the Host header, whatever that holds.
        message = f"{request.method} {request.scope['path']}: {detail}"
        return refused(request, ApiError(error.status_code, message, headers=error.headers))

    def broken(request: "Request", error: Exception) -> "Response":
        # The server's log has the traceback.
        return refused(request, ApiError(500, "the server made a mistake"))

    return {ApiError: refused, HTTPException: not_there, Exception: broken}


def check_door(request: "Request", *, key: bytes) -> None:
    """Refuse who may not ask.

    Without a key only programs of this machine may, and no web page that a browser on it shows:
    neither by its own name (the Origin header) nor by a name that it lets point here (the Host
    header).

    Args:
        request: Its headers tell.
        key: That clients must send; empty where they need none.

    Raises:
        ApiError: It is one of those, or the key is not the right one.
    """
    if not key:
        for header in ("host", "origin"):
            value = request.headers.get(header, "")
            parts = (_ORIGIN if header == "origin" else _HOST).fullmatch(value)
            if value and not (parts and is_loopback(parts["host"].lower())):
                raise ApiError(
                    403, f"the {header} is {value!r}: without a key only this machine may ask"
                )
        return
    kind, _, sent = request.headers.get("authorization", "").partition(" ")
    # As the bytes that came, which Starlette reads as Latin-1.
    right = hmac.compare_digest(sent.strip().encode("latin-1"), key)
    if kind.lower() != "bearer" or not right:
        raise ApiError(
            401,
            "the key is missing or wrong: send it as 'Authorization: Bearer KEY'",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


async def read_body(request: "Request", most: int, *, timeout_s: float) -> bytes:
    """The body of a request.

    Args:
        request: Of Starlette.
        most: Bytes that it may have.
        timeout_s: Longest time in which it comes.

    Raises:
        ApiError: It is larger or slower than it may be, or not said to be JSON.
    """
    try:
        async with asyncio.timeout(timeout_s):
            return await _bounded_body(request, most)
    except TimeoutError as error:
        raise ApiError(
            408,
            f"the body did not come in {timeout_s:g} s: send it at once",
            headers={"Connection": "close"},
        ) from error


async def _bounded_body(request: "Request", most: int) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # What a web page of another site can send without being asked has another type.
        raise ApiError(415, f"the content type is {kind!r}: send application/json")
    too_large = ApiError(413, f"the body has more than {most:,} bytes: send less at once")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > 20 or int(declared) > _DRAINED * most):
        raise too_large
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size <= most:
            parts.append(part)
        if size > _DRAINED * most:
            break
    if size > most:
        raise too_large
    return b"".join(parts)


def json_object(body: bytes, *, most_values: int) -> dict[str, Any]:
    """The JSON object that a body is.

    Args:
        body: Of the request.
        most_values: Most values in it, at all depths.

    Raises:
        ApiError: It is none, is nested too deep, or has too many values.
    """
    too_many = ApiError(400, f"the body has more than {most_values:,} values: shorten it")
    try:
        text = body.decode(json.detect_encoding(body))
        # Before a hundred thousand objects are made of it.
        if text.count(",") > most_values and _STRING.sub("", text).count(",") > most_values:
            raise too_many
        fields = read_json(text)
    except (JsonError, UnicodeDecodeError, RecursionError) as error:
        why = str(error) if isinstance(error, JsonError) else type(error).__name__
        if len(why) > _LONGEST_REASON:
            why = f"{why[: _LONGEST_REASON // 2]} … {why[-_LONGEST_REASON // 2 :]}"
        raise ApiError(400, f"the body is no JSON ({why}): send one JSON object") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "the body is no JSON object: send one")
    level: list[Any] = [fields]
    depth, values = 0, 1
    while True:
        parts = [each.values() if isinstance(each, dict) else each for each in level]
        level = [value for part in parts for value in part]
        values += len(level)
        depth += 1
        level = [value for value in level if isinstance(value, dict | list)]
        if values > most_values:
            raise too_many
        if not level:
            return fields
        if depth == MAX_DEPTH:
            raise ApiError(400, f"the body is nested more than {MAX_DEPTH} deep: make it flatter")
