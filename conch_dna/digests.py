"""What tells results apart: SHA-256 of what they hold, and the versions that computed them.

Knows bytes and packages, nothing of models or runs. Everything that is cached or resumed is found
or refused by these. To address a new kind of thing: turn it into bytes or text and pass it to
`content_digest`. To record another package: its name in `PACKAGES`.
"""

import hashlib
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from conch_dna import __version__

PACKAGES = ("mlx", "mlx-lm", "numpy")


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_digest(*parts: bytes | str | np.ndarray) -> str:
    """SHA-256 over parts, each preceded by its length so that no two lists collide."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else bytes(part)
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def provenance() -> dict[str, Any]:
    """Versions of this package and of those that decide its numbers, and the platform."""
    versions = {"conch_dna": __version__, **{name: version(name) for name in PACKAGES}}
    return {"versions": versions, "platform": platform.platform()}
