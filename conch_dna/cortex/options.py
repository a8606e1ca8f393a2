"""Settings of CORTEX: how a question is answered, and how the server listens.

Knows names, defaults and ranges; nothing of models, so that the command line starts without them.
To add a setting: a field made by `option`, and its use in turn.py or in the server.
"""

import reprlib
from dataclasses import dataclass
from typing import Any, Literal

from conch_dna.cortex.tools import Tools
from conch_dna.errors import ConchError
from conch_dna.options.fields import option, option_problems
from conch_dna.training.structured_answers import costly_part
from conch_dna.web.door import ListenSettings
from conch_dna.web.strict_json import JsonError, read_json

HandOver = Literal["auto", "never", "always"]
HAND_OVERS: tuple[HandOver, ...] = ("auto", "never", "always")
MAX_BATCH = 32
# Characters of all stops: what looks for them takes some kilobytes for each.
MOST_STOPPED = 1_000
DRAFT_AUTO, DRAFT_NONE = "auto", "none"
# Options of a draw that EGO knows nothing of.
DRAWN_BY_NEURONS = (
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
)


def schema_problem(schema: Any) -> str | None:
    """What keeps a JSON value from being the schema of an answer; None where nothing does."""
    kind = schema.get("type") if isinstance(schema, dict) else schema
    if kind == "object":
        return costly_part(schema)
    return f"the schema's type is {reprlib.repr(kind)}: answers are objects, give 'object'"


@dataclass(frozen=True, kw_only=True)
class DrawOptions:
    """How the tokens of an answer are drawn; the other fields say themselves what they are.

    Attributes:
        logit_bias: Tokens, and what is added to the logit of each.

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
    top_k: int = option(0, "Draw only from so many of the likeliest tokens; 0 from all.", low=0)
    min_p: float = option(
        0.0,
        "Draw only tokens with at least this share of the likeliest one's probability.",
        low=0,
        high=1,
    )
    presence_penalty: float = option(
        0.0, "Taken from the logit of what the answer has already.", low=-2, high=2
    )
    frequency_penalty: float = option(
        0.0, "Taken from a logit for every time that the answer has its token.", low=-2, high=2
    )
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = option(0, "Seed of the random draw of tokens.")

    def __post_init__(self) -> None:
        if problems := option_problems(self):
            raise ConchError("; ".join(problems))

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken, as the model has it."""
        changes = self.presence_penalty or self.frequency_penalty or self.logit_bias
        return self.temperature == 0 and not changes


@dataclass(frozen=True, kw_only=True)
class AskOptions(DrawOptions):
    """How a question is to be answered.

    Attributes:
        hand_over: Whether EGO answers instead: "auto" where the neuron's answer is not valid or
            not sure enough, "never", or "always".
        system: Instead of the domain's system prompt; its schema is not asked for then.
        structured: Whether an answer must keep to the domain's schema, where it has one.
        schema: A JSON schema of an object, as JSON text, instead of the domain's.
        constrained: Whether the neuron can write nothing else than what keeps to its schema; else
            the answer is checked when it is there.
        stop: Texts before the first of which the answer ends.
        top_logprobs: How many of the likeliest tokens are told beside each one of the neuron's
            answer, with their log-probabilities; None tells of no tokens.
        plain: The prompt is a text that the neuron continues: without a template, a system prompt,
            the domain's schema or a hand-over.
        tools: What functions the neuron may call; None where it may not, see tools.py.

    Raises:
        ConchError: Values are out of their range; all of them are named. Or the schema is none of
            an object.
    """

    hand_over: str = option(
        "auto",
        "Whether EGO answers: where the neuron's answer is not valid or not sure enough, never, "
        "or always.",
        choices=HAND_OVERS,
    )
    system: str | None = None
    structured: bool = True
    schema: str | None = None
    constrained: bool = True
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    plain: bool = False
    tools: Tools | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if sum(map(len, self.stop)) > MOST_STOPPED:
            raise ConchError(
                f"stops have {sum(map(len, self.stop)):,} characters: at most {MOST_STOPPED:,} are "
                "looked for"
            )
        if "" in self.stop:
            raise ConchError("a stop is an empty text, which is everywhere: leave it out")
        if self.schema is None:
            return
        try:
            problem = schema_problem(read_json(self.schema))
        except (JsonError, RecursionError) as error:
            problem = f"the schema is no JSON: {error}"
        if problem:
            raise ConchError(problem)


@dataclass(frozen=True, kw_only=True)
class DraftSettings:
    """Who drafts what EGO says, so that it says it in fewer steps; the fields say what they are.

    Raises:
        ConchError: Values are out of their range; all of them are named.
    """

    draft: str = option(
        DRAFT_AUTO,
        "Who drafts EGO's answers, which stay EGO's: auto for the neuron that was asked, where "
        "that is faster, none, a domain for its neuron, or a model.",
    )
    draft_tokens: int = option(
        4,
        "Tokens that are drafted at a time.",
        low=1,
        high=32,
    )

    def __post_init__(self) -> None:
        if problems := option_problems(self):
            raise ConchError("; ".join(problems))


@dataclass(frozen=True, kw_only=True)
class ServerSettings(ListenSettings):
    """Where the server listens, who may ask, and how much it takes on.

    The fields say themselves what they are.

    Raises:
        ConchError: A value is out of its range, or others could reach the server without a key;
            all such problems are named at once.
    """

    max_batch: int = option(MAX_BATCH, "Most requests that are computed together", low=1)
    grace_s: float = option(
        30.0, "Seconds in which requests under way are finished when the server stops", low=0
    )
    poll_s: float = option(
        3.0, "Seconds between looks for new versions of adapters; 0 does not look", low=0
    )
    keep_alive_s: float = option(
        10.0, "Seconds of silence in a stream after which a comment keeps it open", above=0
    )
    embeddings: str = option(
        "",
        "Folder of a model that answers /v1/embeddings: a student of `sediment make-student`, or "
        "what `sediment export` wrote",
    )
