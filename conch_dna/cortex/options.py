"""Settings of CORTEX: how a question is answered, and how the server listens.

Knows names, defaults and ranges; nothing of models, so that the command line starts without them.
To add a setting: a field made by `option`, and its use in turn.py or in the server.
"""

import ipaddress
import os
import re
from dataclasses import dataclass, fields
from typing import Any, Literal

from conch_dna.errors import ConchError
from conch_dna.option_fields import option, option_problem

HandOver = Literal["auto", "never", "always"]
HAND_OVERS: tuple[HandOver, ...] = ("auto", "never", "always")
MAX_BATCH = 32


def _problems(settings: Any) -> list[str]:
    """What is out of its range, of the fields that `option` made."""
    checked = [each for each in fields(settings) if each.metadata]
    problems = (option_problem(each, getattr(settings, each.name)) for each in checked)
    return [problem for problem in problems if problem]


@dataclass(frozen=True, kw_only=True)
class DrawOptions:
    """How the tokens of an answer are drawn; the fields say themselves what they are.

    Raises:
        ConchError: Values are out of their range; all of them are named.
    """

    max_tokens: int = option(256, "Longest answer in tokens.", low=1)
    temperature: float = option(
        0.0, "Temperature at which tokens are drawn; 0 takes the likeliest one.", low=0
    )
    top_p: float = option(
        1.0, "Draw only from the likeliest tokens with this probability.", above=0, high=1
    )
    seed: int = option(0, "Seed of the random draw of tokens.")

    def __post_init__(self) -> None:
        if problems := _problems(self):
            raise ConchError("; ".join(problems))


@dataclass(frozen=True, kw_only=True)
class AskOptions(DrawOptions):
    """How a question is to be answered.

    Attributes:
        hand_over: Whether EGO answers instead: "auto" where the neuron's answer is not valid or
            not sure enough, "never", or "always".
        system: Instead of the domain's system prompt; its schema is not asked for then.
        structured: Whether an answer must keep to the domain's schema, where it has one.

    Raises:
        ConchError: Values are out of their range; all of them are named.
    """

    hand_over: str = option(
        "auto",
        "Whether EGO answers: where the neuron's answer is not valid or not sure enough, never, "
        "or always.",
        choices=HAND_OVERS,
    )
    system: str | None = None
    structured: bool = True


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Where the server listens, who may ask, and how much it takes on.

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
    max_batch: int = option(MAX_BATCH, "Most requests that are computed together", low=1)
    request_timeout_s: float = option(600.0, "Longest time for one request in seconds", above=0)
    head_timeout_s: float = option(
        10.0, "Longest time for the head of a request in seconds", above=0
    )
    body_timeout_s: float = option(
        30.0, "Longest time for the body of a request in seconds", above=0
    )
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
        problems = _problems(self)
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
