"""What an adapter's folder says of it: its student, its shape, and how it was distilled.

Knows `adapter_config.json` as mlx_lm and distillation write it. Another setting that decides an
adapter's shape: a line in `shape_of`.
"""

from pathlib import Path
from typing import Any

from conch_dna.checkpoints import read_json, require_keys
from conch_dna.language_model import EMBEDDED
from conch_dna.training.adapters import ADAPTER_CONFIG


def adapter_config(folder: Path) -> dict[str, Any]:
    """What an adapter's folder says of it.

    Raises:
        ConchError: It cannot be read.
    """
    return read_json(folder / ADAPTER_CONFIG, needs={})


def student_name(document: dict[str, Any]) -> Any:
    """The model that an adapter is for, by its `adapter_config.json`; None where it is silent.

    An embedded one by its name: its path, which mlx_lm needs, may be another installation's.
    """
    called = written_down(document).get("student")
    embedded = isinstance(called, str) and called.startswith(EMBEDDED)
    return called if embedded else document.get("model")


def written_down(document: dict[str, Any]) -> dict[str, Any]:
    """What a distillation wrote into an adapter's configuration; nothing where mlx_lm made it."""
    recorded = document.get("conch_dna")
    return recorded if isinstance(recorded, dict) else {}


def shape_of(document: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide an adapter's shape, as its `adapter_config.json` has them."""
    kind = document.get("fine_tune_type", "lora")
    if kind == "full":
        return {"full": True, "dora": False}
    require_keys(document, ADAPTER_CONFIG, needs={"lora_parameters": dict, "num_layers": int})
    parameters = document["lora_parameters"]
    numbers = {"rank": int, "scale": int | float, "keys": list | None}
    require_keys(parameters, f"lora_parameters in {ADAPTER_CONFIG}", needs=numbers)
    return {
        "full": False,
        "dora": kind == "dora",
        "lora_rank": parameters["rank"],
        "lora_scale": parameters["scale"],
        # mlx_lm itself takes every linear layer where none is named.
        "lora_keys": ",".join(map(str, parameters.get("keys") or ["all"])),
        "lora_layers": document["num_layers"],
    }
