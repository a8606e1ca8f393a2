"""The layers of a model: a list of one kind, of which some can be left out for a while.

Knows the body of a model in memory and its configuration; nothing of influence, files or sizes.
Another sign that layers differ: a line in `require_uniform`.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from conch_dna.errors import ConchError
from conch_dna.language_model import LanguageModel, ModelSource, named_arrays

# Names in configurations that make a layer's kind depend on its number.
_BY_NUMBER = re.compile(r"pattern|interval|period|layer_step|layer_freq|no_rope")


def layers_of(model: LanguageModel) -> list[Any]:
    """The layers that a model has now, in their order.

    Raises:
        ConchError: It is not built of a list of layers.
    """
    layers = getattr(getattr(model.model, "model", None), "layers", None)
    if not isinstance(layers, list) or not layers:
        raise ConchError(
            f"{model.model_id} is not built of a list of layers that follow each other: no layer "
            "can be left out of it here"
        )
    return layers


@contextmanager
def with_layers(model: LanguageModel, layers: Sequence[Any]) -> Iterator[None]:
    """The model with other layers in its body, for as long as this is entered."""
    own = model.model.model.layers
    model.model.model.layers = list(layers)
    try:
        yield
    finally:
        model.model.model.layers = own


def require_uniform(source: ModelSource, model: LanguageModel) -> None:
    """Refuse a model whose layers differ: one at another place would be another layer.

    Raises:
        ConchError: A setting or the weights make layers differ.
    """
    for name, value in source.config.items():
        different = isinstance(value, list) and len({json.dumps(each) for each in value}) > 1
        by_layer = different and len(value) == source.config.get("num_hidden_layers")
        if by_layer or (_BY_NUMBER.search(name) and value not in (None, 0, 1, False, [])):
            raise ConchError(
                f"the layers of {source.model_id} differ by their number ({name} in its "
                "config.json): none can be left out of it here"
            )
    shapes = [
        (
            type(layer),
            {name: value.shape for name, value in named_arrays(layer.parameters()).items()},
        )
        for layer in layers_of(model)
    ]
    if other := [number for number, each in enumerate(shapes) if each != shapes[0]]:
        raise ConchError(
            f"layer {other[0]} of {source.model_id} is not built as its first: none can be left "
            "out of it here"
        )
