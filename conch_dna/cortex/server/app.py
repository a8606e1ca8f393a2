"""The server's addresses, who may ask them, and how refusals are told.

Knows Starlette and the loop; chat completions are in chat.py. Another address: a method of
`Addresses` and its route in `make_app`.
"""

import asyncio
import hmac
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from conch_dna import __version__
from conch_dna.cortex.options import is_loopback
from conch_dna.cortex.server.chat import ChatEndpoint
from conch_dna.cortex.server.loop import STOPPING, ServerLoop
from conch_dna.cortex.server.metrics import CONTENT_TYPE
from conch_dna.cortex.server.replies import model_entry, model_list, unknown_model
from conch_dna.cortex.server.requests import ApiError
from conch_dna.errors import ConchError

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response


class Doors:
    """Who may ask.

    Args:
        key: That clients must send; empty where they need none.
    """

    def __init__(self, key: str) -> None:
        self._key = key.encode()

    def check(self, request: "Request") -> None:
        """Refuse who may not ask.

        Without a key only programs of this machine may, and no web page that a browser on it
        shows: neither by its own name (the Origin header) nor by a name that it lets point here
        (the Host header).

        Raises:
            ApiError: It is one of those, or the key is not the right one.
        """
        if not self._key:
            for header in ("host", "origin"):
                value = request.headers.get(header, "")
                host = urlsplit(value if header == "origin" else f"//{value}").hostname or ""
                if value and not is_loopback(host):
                    raise ApiError(
                        403, f"the {header} is {value!r}: without a key only this machine may ask"
                    )
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        # As the bytes that came, which Starlette reads as Latin-1.
        right = hmac.compare_digest(given.strip().encode("latin-1"), self._key)
        if kind.lower() != "bearer" or not right:
            raise ApiError(
                401,
                "the key is missing or wrong: send it as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


class Addresses:
    """What is answered besides chat completions.

    Args:
        loop: Knows the suite.
        chat: Knows who waits.
        doors: Who may ask.
    """

    def __init__(self, loop: ServerLoop, chat: ChatEndpoint, doors: Doors) -> None:
        self._loop = loop
        self._chat = chat
        self._doors = doors
        self._began = time.time()

    async def models(self, request: "Request") -> "Response":
        """GET /v1/models."""
        from starlette.responses import JSONResponse

        self._doors.check(request)
        return JSONResponse(model_list(self._loop.models, int(self._began)))

    async def model(self, request: "Request") -> "Response":
        """GET /v1/models/NAME."""
        from starlette.responses import JSONResponse

        self._doors.check(request)
        name, known = request.path_params["name"], self._loop.models
        if name not in known:
            raise ApiError(404, unknown_model(name, known), param="model", code="model_not_found")
        return JSONResponse(model_entry(name, int(self._began)))

    async def health(self, request: "Request") -> "Response":
        """GET /health; needs no key."""
        from starlette.responses import JSONResponse

        loop = self._loop
        said = {
            "status": "stopping" if loop.stopping else "ok",
            "version": __version__,
            "domains": loop.suite.domains,
            "ego": loop.suite.ego is not None,
            "queue": {"unfinished": self._chat.unfinished, "max": loop.settings.max_queue},
            "uptime_s": round(time.time() - self._began, 1),
        }
        return JSONResponse(said, status_code=503 if loop.stopping else 200)

    async def metrics(self, request: "Request") -> "Response":
        """GET /metrics, for Prometheus."""
        from starlette.responses import Response

        self._doors.check(request)
        return Response(self._loop.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def reload(self, request: "Request") -> "Response":
        """POST /admin/reload: take in new versions of adapters now."""
        from starlette.responses import JSONResponse

        self._doors.check(request)
        if self._loop.stopping:
            raise ApiError(503, STOPPING)
        try:
            changed = await asyncio.wrap_future(self._loop.reload())
        except ConchError as error:
            raise ApiError(409, str(error)) from error
        notes = list(self._loop.suite.notes)
        return JSONResponse({"changed": changed, "domains": self._loop.models, "notes": notes})


def make_app(loop: ServerLoop, key: str) -> "tuple[Starlette, ChatEndpoint]":
    """The ASGI application of a server, and what knows who waits.

    Args:
        loop: Answers.
        key: That clients must send; empty where they need none.
    """
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    def refused(request: "Request", error: Any) -> "Response":
        return JSONResponse(error.to_json(), error.status, headers=error.headers)

    def not_there(request: "Request", error: Any) -> "Response":
        method, path = request.method, request.url.path
        known = ApiError(error.status_code, f"{method} {path}: {error.detail}")
        return JSONResponse(known.to_json(), error.status_code, headers=error.headers)

    def broken(request: "Request", error: Exception) -> "Response":
        # The server's log has the traceback.
        return JSONResponse(ApiError(500, "the server made a mistake").to_json(), 500)

    doors = Doors(key)
    chat = ChatEndpoint(loop, doors.check)
    addresses = Addresses(loop, chat, doors)
    routes = [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/models", addresses.models),
        Route("/v1/models/{name}", addresses.model),
        Route("/health", addresses.health),
        Route("/metrics", addresses.metrics),
        Route("/admin/reload", addresses.reload, methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {ApiError: refused, HTTPException: not_there, Exception: broken}
    return Starlette(routes=routes, exception_handlers=handlers), chat
