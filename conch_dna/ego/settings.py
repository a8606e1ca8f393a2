"""What EGO is asked with and gives back: EgoConfig, EgoAnswer, TextScore, Correction.

Knows names, defaults and ranges; nothing of models or of the network. Every default stands only
here. To add a setting: a field made by `option`, and what is no range in `_model_problems`.
"""

import math
import re
from dataclasses import dataclass, fields, replace

from conch_dna.errors import ConchError
from conch_dna.options.fields import option, option_problem
from conch_dna.training.chats.conversations import Prompt
from conch_dna.training.settings import DEFAULT_TEACHER
from conch_dna.web.client import is_endpoint, on_this_machine, parts_of

_LAST_SEED = 10**9


@dataclass(frozen=True, kw_only=True)
class EgoConfig:
    """Which teacher EGO is, and how it answers.

    The fields say themselves what they are, see `options.fields.option`. The key of an API is
    never kept in a file or shown.

    Raises:
        ConchError: A value is out of its range; all such values are named at once.
    """

    model: str = option(
        DEFAULT_TEACHER,
        "A hub id, a folder, an embedded name such as embedded:teacher, or the base URL of an "
        "OpenAI-compatible API, such as http://127.0.0.1:8080/v1.",
    )
    remote_model: str = option(
        "", "What the API calls the model; wanted with a URL, and only then."
    )
    api_key_env: str = option(
        "OPENAI_API_KEY",
        "Name of the environment variable that holds the API's key; empty sends none.",
    )
    max_tokens: int = option(512, "Longest answer in tokens.", low=1)
    temperature: float = option(
        0.0,
        "Temperature at which tokens are drawn; 0 takes the likeliest one.",
        low=0,
        high=10,
        between="between {low:g} and {high:g}",
    )
    seed: int = option(
        0,
        "Seed of the random draw of tokens.",
        low=0,
        high=_LAST_SEED,
        between="between {low:g} and {high:g}",
    )
    batch_size: int = option(
        16, "Prompts answered or texts scored at once; requests to a URL under way at once.", low=1
    )
    timeout_s: float = option(120.0, "Longest wait for an API's next bytes, in seconds.", above=0)
    retries: int = option(
        3,
        "Further tries, with growing waits, where an API cannot be reached, is busy or fails.",
        low=0,
    )
    trust_remote_code: bool = option(
        False, "Run Python code that comes with a local model or tokenizer."
    )

    def __post_init__(self) -> None:
        problems = [option_problem(each, getattr(self, each.name)) for each in fields(self)]
        if wrong := [*self._model_problems(), *filter(None, problems)]:
            raise ConchError("; ".join(wrong))

    @property
    def is_endpoint(self) -> bool:
        """Whether the model is the URL of an API."""
        return is_endpoint(self.model)

    @property
    def name(self) -> str:
        """What messages and files call the model."""
        return f"{self.remote_model} at {self.model}" if self.is_endpoint else self.model

    @property
    def on_this_machine(self) -> bool:
        """Whether the model's URL names the machine it is read on."""
        return on_this_machine(self.model)

    def reseeded(self, number: int) -> "EgoConfig":
        """The same with the seed of answer `number` of many."""
        return replace(self, seed=(self.seed + number) % (_LAST_SEED + 1))

    def _model_problems(self) -> list[str]:
        # Neither the address nor the name is shown where a secret may stand in it.
        problems = []
        if not self.model:
            problems.append("model is empty: give a hub id, a folder or a URL")
        if not re.fullmatch(r"([A-Za-z_][A-Za-z0-9_]*)?", self.api_key_env):
            problems.append(
                "api_key_env is no name of an environment variable: give the variable's name, "
                "not the key"
            )
        if not self.is_endpoint:
            if self.remote_model:
                problems.append(
                    f"remote_model is {self.remote_model!r} and model is no URL: leave it out"
                )
            return problems
        parts = parts_of(self.model)
        if parts is None or not parts.hostname:
            problems.append("model is a URL without a host: write http://host:port/v1")
        elif parts.username is not None or parts.password is not None or parts.query:
            problems.append(
                "model is a URL with a user, a password or a query: give the key through "
                "api_key_env instead"
            )
        if not self.remote_model:
            problems.append(
                "remote_model is empty: say what the API at the URL calls the model, by --ego-name"
            )
        return problems


@dataclass(frozen=True)
class EgoAnswer:
    """One answer.

    Attributes:
        text: The answer, without the end-of-sequence token.
        finish_reason: `stop`, or `length` where the answer was cut off.
        tokens: How many were generated, the end-of-sequence token among them for a local model;
            None where an API does not say.
        draft: Who drafted it; empty where nobody did.
        steps: In how many steps EGO said them; None where nobody drafted.
        undrafted: Why a draft that was given was not used; empty where none was, or it was.
    """

    text: str
    finish_reason: str
    tokens: int | None
    draft: str = ""
    steps: int | None = None
    undrafted: str = ""


@dataclass(frozen=True)
class TextScore:
    """What EGO thinks of a text, token by token.

    The first token of a text counts only where the tokenizer puts another in front of it. The
    end-of-sequence token counts, as in training.

    Attributes:
        token_ids: Tokens that count.
        log_probs: Log-probability of each under all before it, in nats, at temperature 1.
        pieces: The bytes of the text that each stands for; none for a special token.
        text_bytes: UTF-8 bytes of the text whose tokens count.
    """

    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    pieces: tuple[bytes, ...]
    text_bytes: int

    @property
    def nats(self) -> float:
        """Log-probability of the whole, in nats; never above 0."""
        return math.fsum(self.log_probs)

    @property
    def bits_per_byte(self) -> float:
        """The whole's bits for each byte of text, the same unit for every tokenizer."""
        return -self.nats / math.log(2) / self.text_bytes


@dataclass(frozen=True)
class Correction:
    """A better answer than the one that failed.

    Attributes:
        text: What should have been said.
        problem: What was wrong with the failed answer.
        domain: Whose answer failed.
        prompt: What was asked, as it was given.
        finish_reason: `stop`, or `length` where the better answer was cut off.
    """

    text: str
    problem: str
    domain: str
    prompt: Prompt
    finish_reason: str
