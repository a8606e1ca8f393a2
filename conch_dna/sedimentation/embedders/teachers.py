"""Teachers: an embedder whose vectors are kept on disk, and several embedders as one.

Knows embedders and one folder format; nothing of targets, students or stores. A shard is a
safetensors file named by its own digest, never changed: several processes may add at once, a kill
loses what was not yet a shard, and a damaged one is found, deleted and computed again.
To change what a vector depends on: put it into `_key` or into the embedder's digest. To combine
teachers otherwise: another subclass of `Embedder`.
"""

import logging
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np

from conch_dna.checkpoints import content_digest, write_atomically
from conch_dna.errors import ConchError, NotWholeError
from conch_dna.sedimentation.embedders.contract import Embedded, Embedder, problems_of, unit

logger = logging.getLogger(__name__)

SHARD_ROWS = 1024
_SHARDS = "vectors-*.safetensors"
# What lies this long was left by a process that is no more.
_STALE_S = 3600


class VectorCache:
    """Vectors of one embedder in shards; read when first asked.

    Args:
        folder: Of all caches; this one lies in a folder below, named by the embedder's digest.
        digest: The embedder's.
    """

    def __init__(self, folder: Path, digest: str) -> None:
        self.folder = folder / digest[:32]
        self._dimension: int | None = None
        self._last: tuple[Path, np.ndarray] | None = None

    @property
    def dimension(self) -> int | None:
        """Of the vectors; None where there are none."""
        # Reading the shards tells it.
        return self._dimension if self._places else None

    def __len__(self) -> int:
        return len(self._places)

    @cached_property
    def _places(self) -> dict[bytes, tuple[Path, int]]:
        """Where each key's vector lies; the shards are verified the first time."""
        places: dict[bytes, tuple[Path, int]] = {}
        for path in self.folder.glob(".writing-*"):
            # Another process may give it its name at this moment.
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _STALE_S:
                    path.unlink()
        for path in sorted(self.folder.glob(_SHARDS)):
            self._read_shard(path, places)
        return places

    def _read_shard(self, path: Path, places: dict[bytes, tuple[Path, int]]) -> None:
        try:
            found = _shard_of(path)
        except FileNotFoundError:
            # Another process found it damaged and deleted it at this moment.
            return
        if found is None:
            logger.warning(
                "%s is damaged: it is deleted, and its vectors will be computed again", path
            )
            path.unlink(missing_ok=True)
            return
        keys, vectors = found
        self._dimension = vectors.shape[1]
        places.update((key.tobytes(), (path, row)) for row, key in enumerate(keys))

    def find(self, keys: Sequence[bytes]) -> dict[bytes, np.ndarray]:
        """The vectors `[D]` of those keys that have one."""
        places = self._places
        known = sorted(
            ((*places[key], key) for key in set(keys) if key in places), key=lambda place: place[:2]
        )
        found = {}
        for path, row, key in known:
            # Those of a shard that is gone are no longer among them.
            if key in places and (table := self._vectors(path)) is not None:
                found[key] = table[row]
        return found

    def _vectors(self, path: Path) -> np.ndarray | None:
        """A shard's vectors; None where it is gone, and what it held is missing from now on."""
        from safetensors.numpy import load_file

        if self._last is None or self._last[0] != path:
            try:
                self._last = (path, load_file(path)["vectors"])
            except FileNotFoundError:
                logger.warning("%s was deleted: its vectors will be computed again", path)
                gone = [key for key, (place, _) in self._places.items() if place == path]
                for key in gone:
                    del self._places[key]
                return None
        return self._last[1]

    def add(self, keys: Sequence[bytes], vectors: np.ndarray) -> None:
        """Write a shard, durable when this returns.

        Args:
            keys: 32 bytes each.
            vectors: float32 `[n, D]`.

        Raises:
            ConchError: The disk is full or not writable.
        """
        from safetensors.numpy import save

        if not keys:
            return
        places = self._places
        names = np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), 32)
        data = save({"keys": names, "vectors": np.ascontiguousarray(vectors, np.float32)})
        path = self.folder / _shard_name(data)
        write_atomically(path, data)
        self._dimension = vectors.shape[1]
        places.update((key, (path, row)) for row, key in enumerate(keys))


def count_cached(folder: Path) -> int:
    """How many vectors lie in all caches of a folder; nothing is deleted.

    Raises:
        NotWholeError: Some are damaged; the message names their files.
    """
    shards = {path: _shard_of(path) for path in sorted(folder.glob(f"*/{_SHARDS}"))}
    if damaged := [str(path) for path, found in shards.items() if found is None]:
        raise NotWholeError(
            f"{', '.join(damaged)} damaged: delete what is, and its vectors are computed again"
        )
    return sum(len(found[0]) for found in shards.values() if found)


def _shard_of(path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """Keys and vectors of a shard; None where it is damaged."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    data = path.read_bytes()
    try:
        arrays = load(data) if path.name == _shard_name(data) else {}
        keys, vectors = arrays["keys"], arrays["vectors"]
        sound = vectors.ndim == 2 and len(keys) == len(vectors)
    except (SafetensorError, KeyError, TypeError, ValueError):
        return None
    return (keys, vectors) if sound else None


def _shard_name(data: bytes) -> str:
    return f"vectors-{content_digest(data)[:32]}.safetensors"


def _key(text: str, *, queries: bool) -> bytes:
    return bytes.fromhex(content_digest("query" if queries else "document", text))


class CachedEmbedder(Embedder):
    """An embedder that computes a text's vector once; the model loads only for what is missing.

    Args:
        embedder: Whose vectors they are.
        folder: Of all caches.

    Attributes:
        computed: Texts that the model had to embed.
        found: Texts whose vector lay in the cache.
    """

    def __init__(self, embedder: Embedder, folder: Path) -> None:
        self.embedder = embedder
        self._folder = folder
        self.computed = 0
        self.found = 0

    @cached_property
    def cache(self) -> VectorCache:
        """Its shards."""
        return VectorCache(self._folder, self.embedder.digest)

    @property
    def name(self) -> str:
        """The embedder's."""
        return self.embedder.name

    @property
    def dimension(self) -> int:
        """The embedder's; told by the cache where it holds vectors."""
        return self.cache.dimension or self.embedder.dimension

    @property
    def digest(self) -> str:
        """The embedder's."""
        return self.embedder.digest

    def _embed(self, texts: Iterable[str], *, queries: bool) -> Embedded:
        source = iter(texts)
        # A shard's worth at a time, so that a kill loses no more than that.
        parts = []
        while batch := list(islice(source, SHARD_ROWS)):
            parts.append(self._part(batch, queries=queries))
        if not parts:
            return Embedded(np.zeros((0, self.dimension), np.float32), [])
        kept: list[int] = []
        errors: dict[int, str] = {}
        start = 0
        for part in parts:
            kept += [start + number for number in part.kept]
            errors |= {start + number: reason for number, reason in part.errors.items()}
            start += len(part.kept) + len(part.errors)
        return Embedded(np.concatenate([part.vectors for part in parts]), kept, errors)

    def _part(self, texts: list[str], *, queries: bool) -> Embedded:
        errors = problems_of(texts)
        keys = {
            number: _key(text, queries=queries)
            for number, text in enumerate(texts)
            if number not in errors
        }
        vectors = self.cache.find(list(keys.values()))
        self.found += sum(key in vectors for key in keys.values())
        missing = {key: texts[number] for number, key in keys.items() if key not in vectors}
        reasons = self._compute(missing, vectors, queries=queries)
        errors |= {number: reasons[key] for number, key in keys.items() if key in reasons}
        kept = [number for number, key in keys.items() if key in vectors]
        rows = [vectors[keys[number]] for number in kept]
        table = np.stack(rows) if rows else np.zeros((0, self.dimension), np.float32)
        return Embedded(table, kept, dict(sorted(errors.items())))

    def _compute(
        self, missing: dict[bytes, str], vectors: dict[bytes, np.ndarray], *, queries: bool
    ) -> dict[bytes, str]:
        """Embed what is missing, add it to the shards and to `vectors`; reasons of the rest."""
        if not missing:
            return {}
        keys = list(missing)
        fresh = self.embedder.embed(missing.values(), queries=queries)
        dimension = fresh.vectors.shape[1]
        if self.cache.dimension not in (None, dimension):
            raise ConchError(
                f"{self.name} gives {dimension} dimensions and {self.cache.folder} holds vectors "
                f"of {self.cache.dimension}: delete that folder"
            )
        kept = [keys[number] for number in fresh.kept]
        self.cache.add(kept, fresh.vectors)
        self.computed += len(kept)
        vectors.update(zip(kept, fresh.vectors, strict=True))
        return {keys[number]: reason for number, reason in fresh.errors.items()}


class TeacherEnsemble(Embedder):
    """Vectors of several embedders, each times √weight, side by side.

    The weights sum to 1, so rows have length 1 and the cosine of two texts is the weighted mean
    of the embedders' cosines. A text that one of them cannot embed is an error.

    Args:
        embedders: Two or more.
        weights: One for each, above 0; scaled to sum to 1. Equal where None.

    Raises:
        ConchError: The weights do not fit.
    """

    def __init__(self, embedders: Sequence[Embedder], weights: Sequence[float] | None) -> None:
        shares = np.asarray([1.0] * len(embedders) if weights is None else weights, np.float64)
        if shares.shape != (len(embedders),) or not (np.isfinite(shares) & (shares > 0)).all():
            raise ConchError(
                f"weights {list(weights or [])} do not fit {len(embedders)} teachers: give each "
                "one number above 0"
            )
        self.embedders = tuple(embedders)
        self.weights = tuple(float(weight) for weight in shares / shares.sum())

    @property
    def name(self) -> str:
        """Names and weights."""
        parts = zip(self.weights, self.embedders, strict=True)
        return " + ".join(f"{weight:.3g} {embedder.name}" for weight, embedder in parts)

    @property
    def dimension(self) -> int:
        """The sum of theirs."""
        return sum(embedder.dimension for embedder in self.embedders)

    @property
    def digest(self) -> str:
        """Content address of theirs and the weights."""
        parts = zip(self.weights, self.embedders, strict=True)
        return content_digest(
            "ensemble",
            *(part for weight, each in parts for part in (repr(weight), each.digest)),
        )

    def _embed(self, texts: Iterable[str], *, queries: bool) -> Embedded:
        texts = list(texts)
        parts = [embedder.embed(texts, queries=queries) for embedder in self.embedders]
        errors: dict[int, str] = {}
        for part in reversed(parts):
            errors |= part.errors
        kept = [number for number in parts[0].kept if number not in errors]
        columns = []
        for weight, part in zip(self.weights, parts, strict=True):
            row = {number: place for place, number in enumerate(part.kept)}
            columns.append(np.sqrt(weight) * part.vectors[[row[number] for number in kept]])
        vectors = unit(np.concatenate(columns, axis=1), what="teachers' vectors")
        return Embedded(vectors, kept, dict(sorted(errors.items())))
