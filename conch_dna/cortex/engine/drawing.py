"""How one request's tokens are drawn from the model's probabilities.

Knows log-probabilities and numbers; nothing of grammars, batches or text. Another way to draw: a
field of `DrawOptions`, and a step in `make_request_sampler`.
"""

import math
from collections.abc import Callable

import mlx.core as mx
import numpy as np

from conch_dna.cortex.options import DrawOptions
from conch_dna.training.data.answers import make_sampler, random_key

Sampler = Callable[[mx.array], mx.array]


def make_request_sampler(request: DrawOptions, vocabulary_size: int) -> Sampler:
    """A sampler for one request, with a chain of random keys that follows from its seed alone.

    Penalties come first, then the limits of what is drawn, then temperature.

    Args:
        request: Its temperature, limits, penalties and seed.
        vocabulary_size: Tokens that there are.

    Returns:
        Log-probabilities `[1, tokens]` to the id drawn, `[1]`. It remembers what it drew where
        there are penalties.
    """
    key = random_key("request", request.seed)
    draw = make_sampler(request.temperature, vocabulary_size, key)
    if request.temperature > 0:
        draw = _limited(request, vocabulary_size, draw)
    if request.presence_penalty or request.frequency_penalty or request.logit_bias:
        draw = _penalized(request, vocabulary_size, draw)
    return draw


def _limited(request: DrawOptions, vocabulary_size: int, draw: Sampler) -> Sampler:
    """Draw only from the likeliest tokens, by each limit that is set."""
    from mlx_lm.sample_utils import apply_top_p

    # A number would be compiled anew for each value, and kept; an array is an input.
    top_p = mx.array(request.top_p)
    least = math.log(request.min_p) if request.min_p > 0 else -math.inf

    def limited(log_probs: mx.array) -> mx.array:
        if request.top_p < 1:
            log_probs = apply_top_p(log_probs, top_p)
        floor = mx.max(log_probs, axis=-1, keepdims=True) + least
        if 0 < request.top_k < vocabulary_size:
            # Not mlx_lm's, which is compiled for each number too.
            best = mx.topk(log_probs, request.top_k, axis=-1)
            floor = mx.maximum(floor, mx.min(best, axis=-1, keepdims=True))
        return draw(mx.where(log_probs < floor, -mx.inf, log_probs))

    return limited if request.top_p < 1 or request.top_k or request.min_p else draw


def _penalized(request: DrawOptions, vocabulary_size: int, draw: Sampler) -> Sampler:
    """Draw after OpenAI's penalties on what the answer has already, and after its bias."""
    # One array at once: as many steps as there are tokens would keep all other requests waiting.
    values = np.zeros(vocabulary_size, np.float32)
    for token, value in request.logit_bias:
        values[token] = value
    bias = mx.array(values)
    counts = mx.zeros(vocabulary_size)

    def penalized(log_probs: mx.array) -> mx.array:
        nonlocal counts
        log_probs = log_probs[..., :vocabulary_size].astype(mx.float32)
        penalty = request.presence_penalty * (counts > 0) + request.frequency_penalty * counts
        biased = log_probs + bias - penalty
        token = draw(biased - mx.logsumexp(biased, axis=-1, keepdims=True))
        counts = counts.at[token].add(1)
        return token

    return penalized
