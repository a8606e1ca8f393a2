"""A prompt to answer, how its tokens are drawn, and the pieces of its answer.

Knows token ids and probabilities; nothing of models, batches or text. Another way to draw tokens: a
field of `Request` and a branch in `make_request_sampler`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from conch_dna.digests import content_digest
from conch_dna.errors import ConchError
from conch_dna.training.answers import make_sampler

Sampler = Callable[[mx.array], mx.array]


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to answer.

    Attributes:
        domain: The adapter's name in the bank; None for the base without one.
        tokens: Ids of the whole prompt.
        max_tokens: Longest answer; shorter where the model's context ends.
        temperature: Of the draw; 0 takes the likeliest token.
        top_p: Draw only from the likeliest tokens that together have this probability at
            temperature 1; 1 for all.
        seed: Of the draw.
        prefix: A beginning of `tokens` that other requests of the domain have too, such as its
            system prompt; it is computed once.

    Raises:
        ConchError: A value is out of its range, or the prefix is no beginning of the tokens.
    """

    domain: str | None
    tokens: tuple[int, ...]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    prefix: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        problems = []
        if not self.tokens:
            problems.append("the prompt has no tokens")
        if self.max_tokens < 1:
            problems.append(f"max_tokens is {self.max_tokens}: use 1 or more")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            problems.append(f"temperature is {self.temperature}: use 0 or more")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p is {self.top_p}: use more than 0, up to 1")
        if tuple(self.tokens[: len(self.prefix)]) != tuple(self.prefix):
            problems.append("the prefix is not the beginning of the prompt's tokens")
        if problems:
            raise ConchError(f"this request cannot be answered: {'; '.join(problems)}")


@dataclass(frozen=True)
class Piece:
    """One token of an answer.

    Attributes:
        uid: The request's number.
        token: Its id; the token that stops an answer comes too.
        log_prob: Its log-probability in nats, at temperature 1 and over the real tokens.
        finish_reason: None until the last token; then "stop" or, where max_tokens or the
            context ends, "length".
    """

    uid: int
    token: int
    log_prob: float
    finish_reason: Literal["stop", "length"] | None


def make_request_sampler(request: Request, vocabulary_size: int) -> Sampler:
    """A sampler for one request, with a chain of random keys that follows from its seed alone."""
    key = mx.random.key(int(content_digest("request", str(request.seed))[:16], 16))
    draw = make_sampler(request.temperature, vocabulary_size, key)
    if request.temperature == 0 or request.top_p == 1:
        return draw
    from mlx_lm.sample_utils import apply_top_p

    # As an array it is an input of the compiled function, which a number would compile anew.
    top_p = mx.array(request.top_p)
    return lambda log_probs: draw(apply_top_p(log_probs, top_p))
