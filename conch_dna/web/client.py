"""An OpenAI-compatible API, through the official client, and its errors in one line.

Knows addresses, keys and what the client raises; nothing of what is asked for. To tell another
refusal of an API in one line: a branch in `ApiClient.explained`.
"""

import ipaddress
import math
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit

from conch_dna.errors import ConchError, EgoUnavailableError

# What the client asks for where there is no key; servers that want none do not look at it.
_NO_KEY = "none"
# A body may have so many bytes, unpacked, and one that takes longer than its server may be silent
# has to bring so many a second: a server that never ends would fill the memory, or keep us forever.
MOST_BYTES, LEAST_PACE = 2**30, 1_000
_PLAIN = re.compile(r"[\x21-\x7e]+")
# What the client raises of a body that is none of the API's.
_FOREIGN = (ValueError, AttributeError, TypeError, RecursionError)


def is_endpoint(model: str) -> bool:
    """Whether a model's name is the URL of an API."""
    return model.lower().startswith(("http://", "https://"))


def parts_of(url: str) -> SplitResult | None:
    """A URL taken apart; None where it is none."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return None
    return parts


def on_this_machine(url: str) -> bool:
    """Whether a URL names the machine it is read on."""
    parts = parts_of(url)
    host = (parts.hostname if parts else None) or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


@dataclass(frozen=True, kw_only=True)
class Remedies:
    """What messages tell to do, where that differs by who asks.

    Attributes:
        slow: The API gives nothing in time.
        absent: There is no such model or address.
        busy: It is busy or broken.
        unreached: It cannot be reached.
        unkeyed: A key would travel unencrypted; besides https://.
    """

    slow: str = "check the server"
    absent: str = "check the address, which often ends in /v1"
    busy: str = "try again later"
    unreached: str = "check the address, and that the server runs"
    unkeyed: str = "an empty api_key_env if the server wants no key"


class ApiClient:
    """One API.

    Args:
        url: Its base address.
        name: What messages call it.
        key_env: Environment variable with the key; empty for none.
        timeout_s: Longest wait for its next bytes.
        retries: Further tries where it cannot be reached, is busy or fails.
        remedies: For messages.
        keep_alive: Keep connections for the next request, until `close`.

    Attributes:
        client: The official one; several threads may use it.

    Raises:
        ConchError: The key would travel unencrypted to another machine.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str,
        key_env: str,
        timeout_s: float,
        retries: int,
        remedies: Remedies,
        keep_alive: bool = True,
    ) -> None:
        import httpx
        import openai

        here = on_this_machine(url)
        key = os.environ.get(key_env, "").strip() if key_env else ""
        if key and not here and url.lower().startswith("http://"):
            raise ConchError(
                f"the key in {key_env} would go unencrypted to {url}: use https://, or "
                f"{remedies.unkeyed}"
            )
        if key and not _PLAIN.fullmatch(key):
            raise ConchError(
                f"the key in {key_env} has a blank, a line break or another character that cannot "
                "be sent: give one of plain letters, digits and signs"
            )
        self.name = name
        self._key, self._key_env = key, key_env
        self._timeout_s, self._retries = timeout_s, retries
        self._remedies = remedies
        self.client: openai.OpenAI = openai.OpenAI(
            base_url=url,
            api_key=key or _NO_KEY,
            timeout=timeout_s,
            max_retries=retries,
            # A proxy for the world outside must not be asked for a server on this machine.
            http_client=openai.DefaultHttpxClient(
                trust_env=not here,
                event_hooks={"response": [self._bound]},
                limits=openai.DEFAULT_CONNECTION_LIMITS
                if keep_alive
                else httpx.Limits(max_keepalive_connections=0),
            ),
        )

    def close(self) -> None:
        """Close its connections; the object is of no use afterwards."""
        self.client.close()

    def foreign(self) -> EgoUnavailableError:
        """That it is another kind of server."""
        return EgoUnavailableError(
            f"{self.name} does not answer as an OpenAI-compatible API does: check the address, "
            "which often ends in /v1"
        )

    def _bound(self, response: Any) -> None:
        """Let what is read of a response have an end."""
        whole = response.iter_bytes
        silent_s = response.request.extensions["timeout"]["read"] or math.inf
        if response.headers.get("content-type", "").startswith("text/event-stream"):
            # Tokens come as slowly as they are computed.
            silent_s = math.inf

        def parts(chunk_size: int | None = None) -> Iterator[bytes]:
            size, began = 0, time.monotonic()
            for part in whole(chunk_size):
                size += len(part)
                passed = time.monotonic() - began
                if size > MOST_BYTES:
                    raise EgoUnavailableError(
                        f"{self.name} sends an answer of more than {MOST_BYTES:,} bytes: ask for "
                        "less at once, or check the server"
                    )
                if passed > silent_s and size < LEAST_PACE * passed:
                    raise EgoUnavailableError(
                        f"{self.name} sent {size:,} bytes of an answer in {passed:.0f} s: "
                        f"{self._remedies.slow}"
                    )
                yield part

        response.iter_bytes = parts

    @contextmanager
    def explained(self, timeout_s: float | None = None) -> Iterator[None]:
        """Tell the client's errors as ours.

        Args:
            timeout_s: Longest wait of what is asked, where it is another than the client's.

        Raises:
            EgoUnavailableError: The API cannot be reached, gives no access, is busy or broken.
            ConchError: It refuses the request.
        """
        import openai

        tries, remedies = self._retries + 1, self._remedies
        try:
            yield
        except openai.APITimeoutError as error:
            raise EgoUnavailableError(
                f"{self.name} gave nothing for {timeout_s or self._timeout_s:g} s, {tries} times: "
                f"{remedies.slow}"
            ) from error
        except openai.APIConnectionError as error:
            raise EgoUnavailableError(
                f"{self.name} cannot be reached ({self._reason(error.__cause__ or error)}): "
                f"{remedies.unreached}"
            ) from error
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            variable = self._key_env or "api_key_env, which is empty"
            raise EgoUnavailableError(
                f"{self.name} refuses access ({self._reason(error)}): check the key in {variable}"
            ) from error
        except openai.NotFoundError as error:
            raise EgoUnavailableError(
                f"{self.name} is not there ({self._reason(error)}): {remedies.absent}"
            ) from error
        except (openai.RateLimitError, openai.InternalServerError) as error:
            raise EgoUnavailableError(
                f"{self.name} is busy or broken ({self._reason(error)}), after {tries} tries: "
                f"{remedies.busy}"
            ) from error
        except openai.APIStatusError as error:
            raise ConchError(
                f"{self.name} refuses the request ({self._reason(error)}): change it"
            ) from error
        except openai.APIError as error:
            raise EgoUnavailableError(
                f"{self.name} failed ({self._reason(error)}): ask again, or look at its log"
            ) from error
        except ConchError:
            raise
        except (openai.OpenAIError, *_FOREIGN) as error:
            # The client lets through what its JSON parser says of a body that is none.
            raise self.foreign() from error

    def _reason(self, error: BaseException) -> str:
        text = " ".join(str(error).split())[:300] or type(error).__name__
        return text.replace(self._key, "***") if self._key else text


def plain_fields(value: Any) -> dict[str, Any]:
    """The fields of one of the client's objects, those among them that it does not know."""
    found: dict[str, Any] = value.model_dump() if hasattr(value, "model_dump") else {}
    return found
