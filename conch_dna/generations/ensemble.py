"""Several generations answer together: their predictions are blended, never their weights.

Knows loaded models with one tokenizer; nothing of lines, training or gates. To weigh models
otherwise: another branch in `_weights`.
"""

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from conch_dna.errors import ConchError
from conch_dna.generations.blending import confidence
from conch_dna.language_model import LanguageModel, ModelSource
from conch_dna.losses import log_softmax, log_sum_exp
from conch_dna.training.data.answers import make_sampler, random_key


def load_generations(base: ModelSource, adapters: Sequence[Path | None]) -> list[LanguageModel]:
    """Load a base once and every adapter on it; they share the base's arrays in memory.

    Args:
        base: Without an adapter.
        adapters: A folder for each generation; None for the base itself.
    """
    pristine = base.load()
    return [
        pristine if path is None else base.load(adapter_path=path, share=pristine)
        for path in adapters
    ]


def _weights(log_probs: Sequence[mx.array], weights: Sequence[float] | None) -> list[mx.array]:
    """Log w of each model, `[..., 1]`: by the shares asked for, or in proportion to confidence."""
    if weights is None:
        sure = [confidence(each)[..., None] for each in log_probs]
        total = sum(sure[1:], sure[0])
        return [mx.log(each / total) for each in sure]
    shares = [float(weight) for weight in weights]
    if len(shares) != len(log_probs) or min(shares) < 0 or sum(shares) <= 0:
        raise ConchError(
            f"weights {shares} do not fit {len(log_probs)} models: give one of 0 or more for each, "
            "not all 0"
        )
    return [mx.log(mx.array(weight / sum(shares))) for weight in shares]


def blend_log_probs(
    log_probs: Sequence[mx.array], weights: Sequence[float] | None = None
) -> mx.array:
    """`log Σ w_m p_m` of several distributions.

    Args:
        log_probs: log p `[..., V]` of each model.
        weights: Of each, in any unit; None for each token's confidence (its largest probability).

    Returns:
        Log-probabilities `[..., V]`, float32.

    Raises:
        ConchError: The weights do not fit.
    """
    log_weights = _weights(log_probs, weights)
    parts = [each + weight for each, weight in zip(log_probs, log_weights, strict=True)]
    return log_sum_exp(mx.stack(parts, axis=-1)).squeeze(-1)


def _same_tokens(models: Sequence[LanguageModel]) -> None:
    if not models:
        raise ConchError("an ensemble needs at least one model")
    sizes = {model.model_id: model.vocabulary_size for model in models}
    digests = {model.source.tokenizer_digest for model in models}
    if len(set(sizes.values())) > 1 or len(digests) > 1:
        raise ConchError(
            f"these models do not share a tokenizer, so their tokens cannot be blended: "
            f"{', '.join(sizes)}"
        )


def ensemble_inference(
    input_ids: mx.array, models: Sequence[LanguageModel], weights: Sequence[float] | None = None
) -> mx.array:
    """What several models say together about the token behind each position.

    Args:
        input_ids: `[T]` or `[B, T]`.
        models: Loaded, with the same tokenizer.
        weights: Of each model, in any unit; None for each token's confidence.

    Returns:
        Log-probabilities `[T, V]` or `[B, T, V]`, float32.

    Raises:
        ConchError: The models' tokens differ, or the weights do not fit.
    """
    _same_tokens(models)
    ids = mx.array(input_ids)
    rows = ids[None] if ids.ndim == 1 else ids
    blended = blend_log_probs([log_softmax(model.logits(rows)) for model in models], weights)
    return blended[0] if ids.ndim == 1 else blended


def ensemble_answer(
    prompt: Sequence[int],
    models: Sequence[LanguageModel],
    weights: Sequence[float] | None = None,
    *,
    max_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[int]:
    """Answer a prompt together, token by token, with a key-value cache for each model.

    Args:
        prompt: Token ids, at least one.
        models: Loaded, with the same tokenizer.
        weights: Of each model, in any unit; None for each token's confidence.
        max_tokens: Longest answer; shorter where a model's context ends.
        temperature: Of the draw; 0 takes the likeliest token.
        seed: Of the draw.

    Returns:
        Token ids of the answer; the end-of-sequence token is kept where it came.

    Raises:
        ConchError: The models' tokens differ, or the prompt leaves no room.
    """
    from mlx_lm.models.cache import make_prompt_cache

    _same_tokens(models)
    contexts = [model.source.context_length for model in models]
    room = min([max_tokens, *(length - len(prompt) for length in contexts if length)])
    if not len(prompt) or room < 1:
        raise ConchError(
            f"a prompt of {len(prompt)} tokens leaves no room for an answer within "
            f"{min(length for length in contexts if length) if any(contexts) else max_tokens}"
        )
    key = random_key("ensemble", seed)
    sample = make_sampler(temperature, models[0].vocabulary_size, key)
    stops = set(models[0].tokenizer.eos_token_ids)
    caches = [make_prompt_cache(model.model) for model in models]
    ids = mx.array(list(prompt))[None]
    answer: list[int] = []
    while len(answer) < room:
        log_probs = [
            log_softmax(model.model(ids, cache=cache)[:, -1, : model.vocabulary_size])
            for model, cache in zip(models, caches, strict=True)
        ]
        token = int(np.asarray(sample(blend_log_probs(log_probs, weights)))[0])
        answer.append(token)
        if token in stops:
            break
        ids = mx.array([[token]])
    return answer
