"""The graphs of what a run does: answers, targets, a training step, held-out figures; none is run.

Knows a model's outline and the shapes of batches; nothing of machines, or of what fits. To add a
phase: a function that makes its graph and gives its cost.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map_with_path, tree_unflatten

import conch_dna.losses
from conch_dna.language_model import LanguageModel, ModelSource, named_arrays, weight_files
from conch_dna.training.adapters import outline
from conch_dna.training.data.answers import make_sampler
from conch_dna.training.data.outcomes import compress
from conch_dna.training.evaluation import own_and_likeliest, weighted_kl
from conch_dna.training.fit.graph import Cost, cost_of
from conch_dna.training.head_loss import make_distillation_loss
from conch_dna.training.settings import KDConfig

# Of mlx_lm's caches: they grow by as many positions.
CACHE_STEP = 256
PREFILL_STEP = 2048


def outlined(source: ModelSource) -> LanguageModel | None:
    """A model whose arrays have shapes and types but are never computed.

    Returns:
        None where its own code would be needed and is not here.

    Raises:
        ConchError: The model is broken, or of a kind mlx_lm does not know.
    """
    if (model := outline(source)) is None:
        return None
    if not weight_files(source.folder):
        text = source.config.get("text_config") or {}
        names = ("torch_dtype", "dtype")
        stated = next((c[n] for c in (source.config, text) for n in names if c.get(n)), "float32")
        model.model.set_dtype(getattr(mx, str(stated).removeprefix("torch."), mx.float32))
    # It would be found out by running it.
    model.__dict__["vocabulary_size"] = source.vocabulary_size
    return model


def _traced(
    model: LanguageModel,
    function: Callable[[dict[str, mx.array]], Sequence[mx.array]],
    arrays: dict[str, mx.array],
    owned: Sequence[str] = (),
    compiled: bool = False,
) -> Cost:
    """The cost of a function of a model and some arrays, whose parameters are inputs as well."""
    parameters = named_arrays(model.model.parameters())

    def call(**given: mx.array) -> Sequence[mx.array]:
        model.model.update(tree_unflatten([(name, given[name]) for name in parameters]))
        return function({name: given[name] for name in arrays})

    try:
        with _own_gradients_told():
            return cost_of(call, {**arrays, **parameters}, owned=owned, compiled=compiled)
    finally:
        model.model.update(tree_unflatten(list(parameters.items())))


@contextmanager
def _own_gradients_told() -> Iterator[None]:
    """Functions with a gradient of their own, as MLX can tell of them.

    The chunked loss has stored its gradient by the hidden states when the backward pass begins; a
    product with it has the same gradient and keeps the same arrays. Where MLX differentiates the
    log-sum-exp itself, in divergences other than forward KL, it keeps an array more.
    """
    losses: Any = conch_dna.losses
    kept = mx.custom_function, losses._log_sum_exp
    mx.custom_function, losses._log_sum_exp = _StoredGradient, losses._log_sum_exp_forward  # type: ignore[misc,assignment]
    try:
        yield
    finally:
        mx.custom_function, losses._log_sum_exp = kept  # type: ignore[misc]


class _StoredGradient:
    """Stands for the custom function of the chunked loss."""

    def __init__(self, function: Callable[[mx.array], dict[str, Any]]) -> None:
        self.function = function

    def vjp(self, pull_back: Any) -> None:
        """The gradient is what the function stores."""

    def __call__(self, states: mx.array) -> dict[str, Any]:
        outputs = self.function(mx.stop_gradient(states))
        loss = outputs["sums"]["loss"] + (states * outputs["gradient"]).sum()
        return {**outputs, "sums": {**outputs["sums"], "loss": loss}}


def batch_arrays(size: int, tokens: int, counted: int, top_k: int) -> dict[str, mx.array]:
    """The arrays of a batch `[size, tokens]` with so many counted tokens, see `collate`."""
    return {
        "inputs": mx.zeros((size, tokens), mx.int32),
        "positions": mx.zeros(counted, mx.int32),
        "labels": mx.zeros(counted, mx.int32),
        "weights": mx.zeros(counted),
        "kept_ids": mx.zeros((counted, top_k), mx.int32),
        "teacher_log_probs": mx.zeros((counted, top_k + 1)),
    }


def targets_cost(teacher: LanguageModel, arrays: dict[str, mx.array], config: KDConfig) -> Cost:
    """A batch of the teacher's targets, up to those of its first chunk."""
    temperatures = tuple(sorted({1.0, config.temperature}))

    def first(given: dict[str, mx.array]) -> list[mx.array]:
        memory = config.loss_memory
        rows, logits = next(teacher.logits_at(given["inputs"], given["positions"], memory=memory))
        labels = given["labels"][rows]
        return list(
            compress(logits, labels, top_k=config.top_k, temperatures=temperatures).values()
        )

    return _traced(teacher, first, arrays)


def heldout_cost(student: LanguageModel, arrays: dict[str, mx.array], config: KDConfig) -> Cost:
    """A batch of held-out figures, up to those of its first chunk."""

    def first(given: dict[str, mx.array]) -> list[mx.array]:
        memory = config.loss_memory
        rows, logits = next(student.logits_at(given["inputs"], given["positions"], memory=memory))
        own = {name: given[name][rows] for name in given if name != "inputs"}
        own["soft_weights"] = own["weights"]
        kl = weighted_kl(logits, own, nothing=student.vocabulary_size)
        gold, likeliest, sure = own_and_likeliest(logits, own["labels"])
        return [(gold * own["weights"]).sum(), kl.sum(), gold, kl, likeliest, sure]

    return _traced(student, first, arrays)


def step_cost(student: LanguageModel, arrays: dict[str, mx.array], config: KDConfig) -> Cost:
    """A training step with its optimiser, of a student that `make_trainable` has prepared."""
    model = student.model
    model.train()
    loss = make_distillation_loss(
        student,
        temperature=config.temperature,
        alpha=config.alpha,
        divergence=config.divergence,
        memory=config.loss_memory,
    )
    optimizer = optim.AdamW(learning_rate=config.learning_rate, bias_correction=True)
    optimizer.init(model.trainable_parameters())
    moments: Any = optimizer.state
    state = {f"optimizer.{name}": value for name, value in named_arrays(moments).items()}

    def step(given: dict[str, mx.array]) -> list[mx.array]:
        optimizer.state = tree_map_with_path(lambda name, _: given[f"optimizer.{name}"], moments)
        batch = {name: given[name] for name in arrays}
        if config.grad_checkpoint:
            total, gradients = _checkpointed(student, loss, batch)
        else:
            total, gradients = nn.value_and_grad(model, lambda b: loss(model, b)["loss"])(batch)
        gradients, norm = optim.clip_grad_norm(gradients, config.max_grad_norm)
        optimizer.update(model, gradients)
        after = [named_arrays(tree) for tree in (model.trainable_parameters(), optimizer.state)]
        return [total, norm, *chain.from_iterable(part.values() for part in after)]

    cost = _traced(student, step, {**arrays, **state}, compiled=True)
    model.eval()
    return cost


def _checkpointed(
    student: LanguageModel,
    loss: Callable[[nn.Module, dict[str, mx.array]], dict[str, mx.array]],
    batch: dict[str, mx.array],
) -> tuple[mx.array, Any]:
    """Loss and gradients of layers that run again in the backward pass, one after the other.

    The gradient by the last layer's states stands for that by what a norm makes of them.
    """
    runs: list[tuple[nn.Module, mx.array, tuple[Any, ...], dict[str, Any]]] = []
    layers = student.model.layers
    kinds = [type(layer) for layer in layers]

    def recorded(self: nn.Module, states: mx.array, *more: Any, **named: Any) -> Any:
        runs.append((self, states, more, named))
        return mx.stop_gradient(kinds[len(runs) - 1].__call__(self, states, *more, **named))

    for layer, kind in zip(layers, kinds, strict=True):
        layer.__class__ = type(kind.__name__, (kind,), {"__call__": recorded})
    try:
        hidden = student.body(batch["inputs"])
    finally:
        for layer, kind in zip(layers, kinds, strict=True):
            layer.__class__ = kind

    def of_states(states: mx.array) -> mx.array:
        student.body = lambda inputs, *, cache=None: states  # type: ignore[method-assign]
        try:
            return loss(student.model, batch)["loss"]
        finally:
            student.__dict__.pop("body")

    total, by_states = mx.value_and_grad(of_states)(hidden)
    gradients: dict[str, mx.array] = {}
    for number in reversed(range(len(runs))):
        layer, states, more, named = runs[number]
        trained = named_arrays(layer.trainable_parameters())
        states = mx.depends([states], [by_states])[0]

        def run(
            states: mx.array,
            *values: mx.array,
            _layer: nn.Module = layer,
            _names: tuple[str, ...] = tuple(trained),
            _more: tuple[Any, ...] = more,
            _named: dict[str, Any] = named,
        ) -> mx.array:
            _layer.update(tree_unflatten(list(zip(_names, values, strict=True))))
            result: mx.array = _layer(states, *_more, **_named)
            return result

        _, (by_states, *by_values) = mx.vjp(run, [states, *trained.values()], [by_states])
        layer.update(tree_unflatten(list(trained.items())))
        gradients |= {
            f"model.layers.{number}.{name}": value
            for name, value in zip(trained, by_values, strict=True)
        }
    for name, value in named_arrays(student.model.trainable_parameters()).items():
        gradients.setdefault(name, mx.zeros_like(value))
    return total, tree_unflatten(list(gradients.items()))


def prefill_cost(model: LanguageModel, size: int, tokens: int) -> Cost:
    """The first part of prompts `[size, tokens]` into the cache, which is then there."""

    def fill(given: dict[str, mx.array]) -> list[mx.array]:
        caches = _filled(model, given["inputs"])
        return [array for cache in caches for array in _arrays_of(cache).values()]

    shape = (size, max(1, min(tokens - 1, PREFILL_STEP)))
    return _traced(model, fill, {"inputs": mx.zeros(shape, mx.int32)})


def decode_cost(model: LanguageModel, size: int, tokens: int) -> tuple[Cost, int]:
    """A further token of each of `size` answers behind so many tokens.

    Returns:
        The cost beside the cache, and the bytes of the cache before it.
    """
    inputs = {"inputs": mx.zeros((size, tokens), mx.int32)}
    found: dict[str, Any] = {}

    def look(given: dict[str, mx.array]) -> list[mx.array]:
        found["caches"] = _filled(model, given["inputs"])
        arrays = [_arrays_of(cache) for cache in found["caches"]]
        found["shapes"] = [{k: (a.shape, a.dtype) for k, a in each.items()} for each in arrays]
        return [array for each in arrays for array in each.values()]

    _traced(model, look, inputs)
    state = {
        f"cache.{number}.{name}": mx.zeros(shape, dtype)
        for number, each in enumerate(found["shapes"])
        for name, (shape, dtype) in each.items()
    }
    key = mx.random.key(0)
    sampler = make_sampler(1.0, model.vocabulary_size, key)

    def step(given: dict[str, mx.array]) -> list[mx.array]:
        for number, cache in enumerate(found["caches"]):
            for name in found["shapes"][number]:
                _put(cache, name, given[f"cache.{number}.{name}"])
        logits = model.model(given["inputs"], cache=found["caches"])[:, -1, :]
        log_probs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        after = [array for cache in found["caches"] for array in _arrays_of(cache).values()]
        return [sampler(log_probs), log_probs, *after]

    token = {"inputs": mx.zeros((size, 1), mx.int32)}
    cost = _traced(model, step, {**token, **state}, owned=tuple(state))
    return cost, sum(array.nbytes for array in state.values())


def _filled(model: LanguageModel, inputs: mx.array) -> list[Any]:
    from mlx_lm.models.cache import make_prompt_cache

    caches: list[Any] = make_prompt_cache(model.model)
    model.model(inputs, cache=caches)
    return caches


def _parts(cache: Any) -> Sequence[Any]:
    return getattr(cache, "caches", None) or [cache]


def _arrays_of(cache: Any) -> dict[str, mx.array]:
    """The arrays that a cache holds, by the part and attribute that holds them."""
    return {
        f"{number}.{name}": value
        for number, part in enumerate(_parts(cache))
        for name, value in vars(part).items()
        if isinstance(value, mx.array)
    }


def _put(cache: Any, name: str, value: mx.array) -> None:
    number, _, attribute = name.partition(".")
    setattr(_parts(cache)[int(number)], attribute, value)
