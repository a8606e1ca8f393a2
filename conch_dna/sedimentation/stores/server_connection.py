"""The way to a Qdrant server: attempts with pauses, and one line when they are used up.

Knows no stores. No message shows a key or a password. What may be tried again: `_verdict`.
"""

import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

from conch_dna.errors import ConchError, one_line

Result = TypeVar("Result")
RETRY_WAITS_S = (0.5, 1.0, 2.0, 4.0)
TIMEOUT_S = 60
# Statuses that say nothing of the request but that the server, or what is before it, is not ready.
BUSY = (429, 502, 503, 504)

_log = logging.getLogger(__name__)


def connect(url: str, api_key: str | None) -> Any:
    """A `QdrantClient` of this server; nothing is sent yet.

    Raises:
        ConchError: URL or key cannot be ones.
    """
    from qdrant_client import QdrantClient

    # The HTTP library would show a key with a line break in its message.
    if api_key is not None and not (api_key and api_key.isascii() and api_key.isprintable()):
        raise ConchError("the API key is empty or holds a line break or a letter outside ASCII")
    try:
        # A check of versions would warn, instead of refusing, where the server is down.
        return QdrantClient(url=url, api_key=api_key, timeout=TIMEOUT_S, check_compatibility=False)
    except ValueError as error:
        raise ConchError(f"{shown_url(url)} is no URL of a server: {error}") from error


def shown_url(url: str) -> str:
    """A URL without user, password and query, which may be secret."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}".rstrip("/")


def ask(call: Callable[[], Result], place: str, waits_s: tuple[float, ...]) -> Result:
    """What a call to a server gives, made again while the server cannot be reached.

    Args:
        call: Does no harm when it is made twice, as its answer can be lost.
        place: What messages call the server.
        waits_s: Seconds before each further attempt.

    Raises:
        ConchError: The server refuses, or cannot be reached.
    """
    from qdrant_client.common.client_exceptions import QdrantException
    from qdrant_client.http.exceptions import ApiException

    for wait_s in (*waits_s, None):
        try:
            return call()
        except (ApiException, QdrantException) as error:
            said, again = _verdict(error)
            reason = said.rstrip(".")
            if not again:
                raise ConchError(f"the Qdrant server at {place} refused: {reason}") from error
            if wait_s is None:
                raise ConchError(
                    f"the Qdrant server at {place} cannot be reached ({len(waits_s) + 1} "
                    f"attempts): {reason}. What was acknowledged is there; start the server and "
                    "go on"
                ) from error
            _log.warning("%s: %s; trying again in %g s", place, reason, wait_s)
            time.sleep(wait_s)
    raise AssertionError("the last attempt returns or raises")


def _verdict(error: Any) -> tuple[str, bool]:
    """What went wrong, in one line without what was asked; and whether to try again."""
    from httpx import TransportError
    from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
    from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

    if isinstance(error, ResourceExhaustedResponse):
        return "it is busy", True
    if isinstance(error, ResponseHandlingException):
        source = error.source
        return one_line(f"{type(source).__name__} {source}"), isinstance(source, TransportError)
    if not isinstance(error, UnexpectedResponse):
        return one_line(error), False
    if error.status_code in (401, 403):
        return f"it does not accept the API key ({error.status_code})", False
    try:
        said = error.structured()["status"]["error"]
    except (ValueError, KeyError, TypeError):
        said = error.reason_phrase
    return f"{error.status_code} {one_line(said)}", error.status_code in BUSY
