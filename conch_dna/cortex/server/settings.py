"""How the server is to listen and what it takes on: ServerSettings.

Knows names, defaults and ranges; nothing of HTTP, models or threads. To add a setting: a field made
by `option`, and what cannot be said as a range in `__post_init__`.
"""

import ipaddress
import os
import re
from dataclasses import dataclass, fields

from conch_dna.cortex.engine.batching import MAX_BATCH
from conch_dna.errors import ConchError
from conch_dna.option_fields import option, option_problem


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is this machine's own."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Where the server listens, who may ask, and how much it takes on.

    The fields say themselves what they are, see `option_fields.option`.

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
    max_batch: int = option(MAX_BATCH, "Most requests that are computed together", low=1)
    request_timeout_s: float = option(600.0, "Longest time for one request in seconds", above=0)
    grace_s: float = option(
        30.0, "Seconds in which requests under way are finished when the server stops", low=0
    )
    poll_s: float = option(
        3.0, "Seconds between looks for new versions of adapters; 0 does not look", low=0
    )
    keep_alive_s: float = option(
        10.0, "Seconds of silence in a stream after which a comment keeps it open", above=0
    )

    def __post_init__(self) -> None:
        found = (option_problem(each, getattr(self, each.name)) for each in fields(self))
        problems = [problem for problem in found if problem]
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
