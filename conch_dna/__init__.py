"""conch_dna: distil what big language models know into small ones, with MLX.

Importing the package loads nothing heavy: the public names below arrive on first use, and on
Linux the BLAS that makes MLX's float32 products fast on a CPU is loaded, because it has to be in
the process before mlx is. It knows nothing about models or training.
To make a name public, add it to ``_HOMES`` (and below ``TYPE_CHECKING`` for type checkers).
"""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from conch_dna.training.distillation import DOMAIN_PROMPTS as DOMAIN_PROMPTS
    from conch_dna.training.settings import KDConfig as KDConfig
    from conch_dna.training.settings import KDResult as KDResult
    from conch_dna.training.true_kd import TrueKnowledgeDistiller as TrueKnowledgeDistiller

__version__ = "0.1.0"

_HOMES = {
    "DOMAIN_PROMPTS": "conch_dna.training.distillation",
    "KDConfig": "conch_dna.training.true_kd",
    "KDResult": "conch_dna.training.true_kd",
    "TrueKnowledgeDistiller": "conch_dna.training.true_kd",
}


def _load_openblas() -> str:
    """Load OpenBLAS ahead of mlx and say what came of it.

    mlx's Linux wheel carries a reference BLAS; symbols of a library that was loaded globally
    before it take precedence, which makes float32 products about 40 times faster.
    """
    if sys.platform != "linux":
        return "not needed: this is not Linux"
    if os.environ.get("CONCH_DNA_NO_OPENBLAS") == "1":
        return "skipped: CONCH_DNA_NO_OPENBLAS is 1"
    if "mlx.core" in sys.modules:
        return "too late: mlx was imported before conch_dna"
    try:
        ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return "absent: the system has no libopenblas.so.0 (Debian package libopenblas0-pthread)"
    return "loaded"


openblas_state: str = _load_openblas()
openblas_loaded: bool = openblas_state == "loaded"


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
