"""What comes into a model's linear layers: second moments of their inputs on given texts.

Knows modules and token ids; nothing of bits or files. Another figure of inputs: what `note`
sums up.
"""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from conch_dna.language_model import LanguageModel
from conch_dna.screen.progress import Report
from conch_dna.training.students.watching import Heard, in_place

# Bytes of moments that are summed up in one pass over the texts.
ROOM = 4e9


def input_moments(
    model: LanguageModel,
    widths: dict[str, int],
    windows: Sequence[Sequence[int]],
    report: Report,
) -> dict[str, np.ndarray]:
    """The mean outer product of each layer's inputs, over all tokens of the texts, and shrunk.

    Few tokens tell little of how inputs hang together: what stands beside the diagonal is taken
    down by the share width / (width + tokens). As many layers at a time as fit into ROOM, each
    time with a pass over all texts.

    Args:
        model: In memory; it is left as it was.
        widths: Numbers that come into each layer, by its name; layers of the same name.
        windows: Token ids, each read by itself.
        report: Gets a phase.

    Returns:
        By name float32 `[width, width]`; a layer that no text reached is missing, and an
        embedding that is not the head.
    """
    passes = _parts(widths)
    tokens = sum(map(len, windows))
    report("phase", {"name": "inputs of layers", "total": len(passes) * tokens, "unit": "tokens"})
    found: dict[str, np.ndarray] = {}
    modules = dict(model.model.named_modules())
    for names in passes:
        sums: dict[str, mx.array] = {}

        def heard(name: str, sums: dict[str, mx.array]) -> nn.Module:
            def note(x: mx.array) -> None:
                rows = x.reshape(-1, x.shape[-1]).astype(mx.float32)
                sums[name] = sums[name] + rows.T @ rows if name in sums else rows.T @ rows

            return Heard(modules[name], note)

        with in_place(model.model, {name: heard(name, sums) for name in names}):
            for window in windows:
                model.model(mx.array([list(window)]))
                # What comes in is all that is wanted of it.
                mx.eval(sums)
                report("advance", {"by": len(window)})
        found |= {name: _shrunk(np.array(each) / tokens, tokens) for name, each in sums.items()}
    return found


def _shrunk(moments: np.ndarray, tokens: int) -> np.ndarray:
    own = np.diagonal(moments).copy()
    moments *= tokens / (len(moments) + tokens)
    np.einsum("ii->i", moments)[...] = own
    return moments


def _parts(widths: dict[str, int]) -> list[list[str]]:
    """Names in passes, none of which needs more than ROOM."""
    parts: list[list[str]] = [[]]
    left = ROOM
    for name, width in widths.items():
        left -= 4 * width**2
        if left < 0 and parts[-1]:
            parts.append([])
            left = ROOM - 4 * width**2
        parts[-1].append(name)
    return parts
