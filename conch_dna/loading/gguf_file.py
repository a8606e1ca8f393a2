"""What a GGUF file says of itself: its metadata, and each tensor's name, kind, shape and place.

Knows the container, nothing of models. Every length is compared with the file before it is
believed, since mlx reads wherever an offset points. Another kind of tensor: a line in KINDS.
"""

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conch_dna.errors import ConchError

MAGIC, VERSIONS = b"GGUF", (2, 3)
# More than of any model there is.
MOST_KEYS, MOST_TENSORS, MOST_VALUES, MOST_DIMENSIONS, MOST_NAME = 2**16, 2**20, 2**24, 4, 2**10
# Name, weights in a block, bytes of a block, of what mlx reads; others are only named.
KINDS = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    12: ("Q4_K", 256, 144),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
UNREAD = {6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 11: "Q3_K", 13: "Q5_K", 15: "Q8_K", 20: "IQ4_NL"}
UNREAD |= {16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S"}
UNREAD |= {23: "IQ4_XS", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"}
_STRING, _ARRAY = 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_NUMBERS[12] = "d"


@dataclass(frozen=True)
class Tensor:
    """A tensor as the file describes it.

    Attributes:
        kind: A name of KINDS.
        shape: As mlx has it: rows first, the file's order turned round.
    """

    kind: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class GgufFile:
    """What stands in a file before its weights.

    Attributes:
        path: The file.
        metadata: Values by key; arrays of numbers as NumPy's, arrays of texts as lists.
        tensors: By the file's own names.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """A value of the metadata, or the default where it is absent.

        Raises:
            ConchError: It is absent and there is no default, or it has another type.
        """
        value = self.metadata.get(key, default)
        if value is None:
            raise ConchError(f"{self.path} does not say {key}: the file is not complete")
        plain = not isinstance(value, bool) or kind is bool
        if not (plain and isinstance(value, kind)):
            raise ConchError(f"{self.path}: {key} is of another type than it should be")
        return value


def read_gguf(path: Path) -> GgufFile:
    """Read everything but the weights, in which every tensor is known to lie within the file.

    Raises:
        ConchError: It cannot be read, is cut off or no GGUF file, or holds what mlx cannot read.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path, data).read()
    except (OSError, ValueError) as error:
        raise ConchError(f"cannot read {path}: {error}") from error


class _Reader:
    """A place in a file's bytes, which moves on with what is read."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def wrong(self, what: str) -> ConchError:
        return ConchError(f"{self.path} is no whole GGUF file: {what}; fetch it again")

    def take(self, size: int) -> int:
        """Move on by `size` bytes, and give where they begin."""
        start = self.at
        if size > len(self.data) - start:
            raise self.wrong(f"at byte {start:,} of {len(self.data):,} it ends too soon")
        self.at += size
        return start

    def number(self, code: str) -> Any:
        start = self.take(struct.calcsize("<" + code))
        return struct.unpack_from("<" + code, self.data, start)[0]

    def count(self, code: str, most: int, what: str) -> int:
        value: int = self.number(code)
        if value > most:
            raise self.wrong(f"it counts {value:,} {what}, more than {most:,}")
        return value

    def text(self, most: int | None = None) -> str:
        size = self.number("Q")
        if most is not None and size > most:
            raise self.wrong(f"a name of {size:,} bytes")
        start = self.take(size)
        # Pieces of some vocabularies are no whole characters.
        return self.data[start : start + size].decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind != _ARRAY:
            raise self.wrong(f"a value of the unknown type {kind}")
        inner = self.number("I")
        count = self.count("Q", MOST_VALUES, "values in one array")
        if inner == _STRING:
            return [self.text() for _ in range(count)]
        if inner not in _NUMBERS:
            raise self.wrong(f"an array of the type {inner}")
        dtype = np.dtype("<" + _NUMBERS[inner] if inner != 7 else "?")
        start = self.take(count * dtype.itemsize)
        return np.frombuffer(self.data, dtype, count, start).copy()

    def named(self, count: int, read: Callable[[], Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(count):
            name = self.text(MOST_NAME)
            if name in found:
                raise self.wrong(f"it says {name} twice")
            found[name] = read()
        return found

    def read(self) -> GgufFile:
        if self.data[:4] != MAGIC:
            raise ConchError(f"{self.path} does not begin with GGUF: it is no GGUF file")
        self.at = 4
        if (version := self.number("I")) not in VERSIONS:
            raise ConchError(f"{self.path} is of GGUF version {version}, not 2 or 3")
        tensors = self.count("Q", MOST_TENSORS, "tensors")
        keys = self.count("Q", MOST_KEYS, "keys")
        metadata = self.named(keys, lambda: self.value(self.number("I")))
        placed = self.named(tensors, self.tensor)
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 2**16:
            raise self.wrong(f"general.alignment is {alignment!r}")
        first = -(-self.at // alignment) * alignment
        for name, (_, offset, size) in placed.items():
            if offset % alignment or first + offset + size > len(self.data):
                raise self.wrong(f"{name} does not lie within its {len(self.data):,} bytes")
        return GgufFile(self.path, metadata, {name: part[0] for name, part in placed.items()})

    def tensor(self) -> tuple[Tensor, int, int]:
        """A tensor, its offset behind the metadata, and its size in bytes."""
        dimensions = self.count("I", MOST_DIMENSIONS, "dimensions")
        sizes = [self.number("Q") for _ in range(dimensions)]
        kind, offset = self.number("I"), self.number("Q")
        if kind not in KINDS:
            raise ConchError(
                f"{self.path} holds weights of the kind {UNREAD.get(kind, kind)}, which mlx cannot "
                f"read: take a file in one of {', '.join(name for name, *_ in KINDS.values())}"
            )
        name, block, size = KINDS[kind]
        total = 1
        for each in sizes:
            total *= each
        if not sizes or not 0 < total < 2**40 or sizes[0] % block:
            raise self.wrong(f"a tensor of the shape {sizes} as {name}")
        return Tensor(name, tuple(reversed(sizes))), offset, total // block * size
