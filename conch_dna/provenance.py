"""What computed something: versions and platform, for the files that results lie in.

Knows nothing of models or runs. To record another package: a line in `_versions`.
"""

import importlib.metadata
import platform
from typing import Any

from conch_dna import __version__


def provenance() -> dict[str, Any]:
    """Versions of this package and of those that decide its numbers, and the platform."""
    return {"versions": _versions(), "platform": platform.platform()}


def _versions() -> dict[str, str]:
    return {
        "conch_dna": __version__,
        "mlx": importlib.metadata.version("mlx"),
        "mlx-lm": importlib.metadata.version("mlx-lm"),
        "numpy": importlib.metadata.version("numpy"),
    }
