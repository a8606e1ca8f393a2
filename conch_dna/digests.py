"""Content addresses: SHA-256 of files and of lists of parts.

Knows bytes only. Everything that is cached or resumed is found or refused by these.
To address a new kind of thing: turn it into bytes or text and pass it to `content_digest`.
"""

import hashlib
from pathlib import Path

import numpy as np


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
