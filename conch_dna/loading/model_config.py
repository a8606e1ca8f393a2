"""A model's config.json: read, and its sizes believed only if a model can have them.

Knows JSON; nothing of mlx or mlx_lm.
"""

from pathlib import Path
from typing import Any

from conch_dna.checkpoints import read_json
from conch_dna.errors import ConchError, NotWholeError, one_line

# Larger than of any model there is. mlx_lm would work for minutes on the modules of more.
_MOST = {
    "num_hidden_layers": 1_000,
    "num_layers": 1_000,
    "n_layers": 1_000,
    "n_layer": 1_000,
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "intermediate_size": 2**24,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "head_dim": 2**16,
    "num_experts": 2**14,
    "num_local_experts": 2**14,
    "n_routed_experts": 2**14,
    "max_position_embeddings": 2**32,
}


def head_rows(config: dict[str, Any]) -> int | None:
    """How many rows a model's configuration gives its head; None where it does not say."""
    text = config.get("text_config")
    rows = (text if isinstance(text, dict) else config).get("vocab_size")
    return rows if isinstance(rows, int) else None


def read_config(folder: Path) -> dict[str, Any]:
    """A model's config.json.

    Raises:
        ConchError: It is missing or not JSON, or a size in it is none or above that of any model.
    """
    path = folder / "config.json"
    try:
        config = read_json(path, needs={})
    except NotWholeError as error:
        raise ConchError(f"cannot read a model's configuration: {error}") from error
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for name, most in _MOST.items():
            if (value := part.get(name)) is None:
                continue
            values = value if isinstance(value, list) else [value]
            numbers = all(isinstance(v, int | float) and 0 <= v <= most for v in values)
            if not numbers or any(isinstance(v, bool) for v in values):
                shown = one_line(repr(value))
                raise ConchError(f"{path}: {name} is {shown}, not between 0 and {most:,}")
    return config
