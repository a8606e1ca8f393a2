"""conch_dna: distil what big language models know into small ones, with MLX.

Importing the package loads nothing heavy: the public names below arrive on first use. On
Linux the BLAS that makes MLX's float32 products fast on a CPU is loaded when mlx is imported,
because it has to be in the process before mlx is. It knows nothing about models or training.
To make a name public, add it to ``_HOMES`` (and below ``TYPE_CHECKING`` for type checkers).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from conch_dna.loading.blas import BLAS

if TYPE_CHECKING:
    from conch_dna.training.distillation import DOMAIN_PROMPTS as DOMAIN_PROMPTS
    from conch_dna.training.settings import KDConfig as KDConfig
    from conch_dna.training.settings import KDResult as KDResult
    from conch_dna.training.true_kd import TrueKnowledgeDistiller as TrueKnowledgeDistiller

__version__ = "0.1.0"
BLAS.watch()

_HOMES = {
    "DOMAIN_PROMPTS": "conch_dna.training.distillation",
    "KDConfig": "conch_dna.training.true_kd",
    "KDResult": "conch_dna.training.true_kd",
    "TrueKnowledgeDistiller": "conch_dna.training.true_kd",
}


def __getattr__(name: str) -> Any:
    """Import a public name on its first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted({*globals(), *_HOMES})
