"""Collapsed neighbourhoods: how closely the top hits of a query crowd, and when it counts.

Knows vectors, a store and the log; nothing of embedders, adapters or gates. A collapsed
neighbourhood is one whose documents the active vectors can hardly tell apart. To measure crowding
otherwise: `dispersions`; the null is calibrated with it, so the threshold follows.
"""

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from conch_dna.checkpoints import content_digest, read_json, require_keys, write_json
from conch_dna.errors import ConchError, NotWholeError
from conch_dna.sedimentation.changes.chelation_log import ChelationLog
from conch_dna.sedimentation.config import ChelationConfig
from conch_dna.sedimentation.documents import DocumentId
from conch_dna.sedimentation.embedders.contract import unit
from conch_dna.sedimentation.stores.contract import RAW, Hits, Page, VectorStore
from conch_dna.sedimentation.stores.state import sealed

# Sampled documents whose neighbourhoods are searched and fetched at once.
QUERIES_AT_ONCE = 64
# How the files of nulls begin, each that of one version.
NULL = "null-"


def dispersions(neighbourhoods: Any) -> np.ndarray:
    """1 − ‖mean of the unit vectors‖² of each neighbourhood: the mean of 1 − cosine over its pairs.

    Args:
        neighbourhoods: `[Q, k, D]`; rows of any length, which are brought to 1.

    Returns:
        float64 `[Q]` between 0, all the same, and 1, the vectors cancel; 1 − 1/k for k orthogonal
        ones.

    Raises:
        ConchError: The shape is another, or a row is zero or not finite.

    >>> dispersions([[[1.0, 0.0], [0.0, 1.0]]]).round(6).tolist()
    [0.5]
    """
    table = np.asarray(neighbourhoods, np.float64)
    if table.ndim != 3 or not table.shape[1]:
        raise ConchError(
            f"neighbourhoods have shape {list(table.shape)}: give [Q, k, D] with at least one "
            "vector each"
        )
    # For its refusals; the figure itself is taken in float64.
    unit(table.reshape(-1, table.shape[2]), what="vectors of the neighbourhoods")
    rows = table / np.linalg.norm(table, axis=2, keepdims=True)
    return np.asarray(1 - (rows.mean(axis=1) ** 2).sum(axis=1))


@dataclass(frozen=True, kw_only=True)
class CollapseNull:
    """What dispersion neighbourhoods of this corpus have, and below what one is collapsed.

    The threshold is a percentile of the corpus's own values, so it needs no number that depends on
    the dimension, the student or the collection.

    Attributes:
        percentile: Of the values, between 0 and 100.
        threshold: The value at that percentile (linear between two values).
        k: Documents in a neighbourhood.
        sample: How many neighbourhoods the values are of.
        seed: Of the sample.
        version: Which vectors they are of.
        lowest: The least value.
        median: The value in the middle.
        highest: The greatest value.
        values_digest: Content address of the sorted float64 values.
    """

    percentile: float
    threshold: float
    k: int
    sample: int
    seed: int
    version: str
    lowest: float
    median: float
    highest: float
    values_digest: str

    @classmethod
    def fit(cls, store: VectorStore, config: ChelationConfig, *, version: str) -> "CollapseNull":
        """Calibrate on documents of the corpus as queries, each left out of its own neighbourhood.

        The sample is decided by ids and seed alone, so every kind of store takes the same one.

        Args:
            store: Where the vectors are.
            config: Its `top_k` (size of a neighbourhood), `collapse_percentile`,
                `collapse_sample` (most documents to take as queries) and `seed`.
            version: Which of the store's vectors.

        Raises:
            ConchError: There are fewer than k + 1 documents.
        """
        k, count = config.top_k, store.count(version)
        if count < k + 1:
            raise ConchError(
                f"collapse cannot be calibrated on {count} documents: a neighbourhood of {k} needs "
                f"at least {k + 1}; ingest more, or choose a smaller top_k"
            )
        page = sampled(store, sample=config.collapse_sample, seed=config.seed, version=version)
        values: list[float] = []
        for first in range(0, len(page.ids), QUERIES_AT_ONCE):
            part = slice(first, first + QUERIES_AT_ONCE)
            ids = page.ids[part]
            hits = store.search(page.vectors[part], version=version, top_k=k + 1)
            near = [
                [each for each in row.ids if each != document][:k]
                for document, row in zip(ids, hits, strict=True)
            ]
            if short := [each for each, row in zip(ids, near, strict=True) if len(row) < k]:
                raise ConchError(
                    f"the store found fewer than {k} neighbours of {short[0]!r} among {count} "
                    "documents: look at its index"
                )
            values += dispersions(_vectors_of(store, near, version)).tolist()
        ordered = np.sort(values)
        return cls(
            percentile=float(config.collapse_percentile),
            threshold=float(np.percentile(ordered, config.collapse_percentile)),
            k=k,
            sample=len(ordered),
            seed=config.seed,
            version=version,
            lowest=float(ordered[0]),
            median=float(np.median(ordered)),
            highest=float(ordered[-1]),
            values_digest=content_digest(ordered),
        )

    def is_collapsed(self, value: float) -> bool:
        """Whether a dispersion lies below the threshold."""
        return value < self.threshold

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return asdict(self)

    @classmethod
    def read(cls, path: Path) -> "tuple[CollapseNull, Any] | None":
        """What `write` was given; None where the file has no digest, as those of earlier versions.

        Raises:
            ConchError: It cannot be read, or was altered.
        """
        document = read_json(path, needs={"null": dict})
        null = cls.from_json(document["null"], source=str(path))
        if "digest" not in document:
            return None
        made_of = document.get("made_of")
        if document != sealed({"null": null.to_json(), "made_of": made_of}):
            raise NotWholeError(
                f"{path} was altered, its digest is another: delete it, and it is made anew"
            )
        return null, made_of

    def write(self, path: Path, made_of: Any) -> None:
        """Keep it in a file, with what it depends on and a digest."""
        write_json(path, sealed({"null": self.to_json(), "made_of": made_of}))

    @classmethod
    def from_json(cls, document: Mapping[str, Any], *, source: str) -> "CollapseNull":
        """Read back what `to_json` gave.

        Raises:
            ConchError: Fields are missing or unknown.
        """
        names = {each.name for each in fields(cls)}
        if set(document) != names:
            raise ConchError(
                f"{source} is no collapse null: it must have {', '.join(sorted(names))}, and "
                f"differs in {', '.join(sorted(names ^ set(document)))}; calibrate again"
            )
        numbers = dict.fromkeys(("percentile", "threshold", "lowest", "median", "highest"), float)
        counts = dict.fromkeys(("k", "sample", "seed"), int)
        texts = dict.fromkeys(("version", "values_digest"), str)
        require_keys(document, source, needs={**numbers, **counts, **texts})
        return cls(**document)


def _vectors_of(
    store: VectorStore, neighbourhoods: Sequence[Sequence[DocumentId]], version: str
) -> np.ndarray:
    """The vectors of neighbourhoods of one size, `[Q, k, D]`."""
    vectors = store.get([each for ids in neighbourhoods for each in ids], version).vectors
    return vectors.reshape(len(neighbourhoods), -1, vectors.shape[1])


@dataclass(eq=False)
class Neighbourhoods:
    """Measures neighbourhoods and logs those that have collapsed.

    Attributes:
        store: Where the vectors are.
        log: Of collapsed ones.
        config: Size, percentile, sample and seed.
        folder: For `null-<version>.json`.
        student_digest: For the events.
    """

    store: VectorStore
    log: ChelationLog
    config: ChelationConfig
    folder: Path
    student_digest: str
    _null: CollapseNull | None = field(default=None, init=False)
    _made_of: Any = field(default=None, init=False)

    def measure(
        self, queries: Sequence[str], hits: Sequence[Hits], version: str
    ) -> list[tuple[float | None, bool | None]]:
        """Dispersion of each query's neighbourhood, and whether it has collapsed; logs those.

        Both are None where there are too few documents to have a neighbourhood.
        """
        null = self._calibrated(version)
        if null is None:
            return [(None, None)] * len(queries)
        near = [row.ids[: self.config.top_k] for row in hits]
        values = dispersions(_vectors_of(self.store, near, version)).tolist()
        for query, ids, value in zip(queries, near, values, strict=True):
            if null.is_collapsed(value):
                self.log.append(
                    query=query,
                    version=version,
                    student_digest=self.student_digest,
                    dispersion=value,
                    threshold=null.threshold,
                    neighbourhood=ids,
                )
        return [(value, null.is_collapsed(value)) for value in values]

    def _calibrated(self, version: str) -> CollapseNull | None:
        """The null of a version, made when it is first needed and kept in the folder."""
        config, store = self.config, self.store
        made_of = {
            "revision": store.revision,
            "collapse_sample": config.collapse_sample,
            "top_k": config.top_k,
            "collapse_percentile": float(config.collapse_percentile),
            "seed": config.seed,
        }
        if store.count(RAW) < config.top_k + 1:
            return None
        path = self.folder / f"{NULL}{version}.json"
        if self._null is None or self._null.version != version:
            self._null, self._made_of = None, {}
            if path.is_file() and (kept := CollapseNull.read(path)):
                self._null, self._made_of = kept
        if self._null is None or self._made_of != made_of:
            self._null = CollapseNull.fit(store, config, version=version)
            self._made_of = made_of
            self._null.write(path, made_of)
        return self._null


def sampled(
    store: VectorStore,
    *,
    sample: int,
    seed: int,
    version: str = RAW,
    without: Callable[[DocumentId], bool] = lambda identifier: False,
) -> Page:
    """At most `sample` documents, decided by each id and the seed, whatever the store's order.

    Returns:
        In the order of the digests that decide; all of them where there are not more.
    """
    ids = (each for page in store.pages(version) for each in page.ids if not without(each))
    ranked = heapq.nsmallest(sample, ids, key=lambda each: sample_rank(each, seed=seed))
    return store.get(ranked, version)


def sample_rank(identifier: DocumentId, *, seed: int) -> str:
    """What decides whether a document is sampled: those with the lowest are."""
    return content_digest(str(seed), repr(identifier))


def is_within(rank: str, share: float) -> bool:
    """Whether a document of this `sample_rank` is among a share of all, whatever their number."""
    return int(rank[:8], 16) < share * 16**8


def noise_centres(
    neighbourhoods: Iterable[Sequence[DocumentId]],
    documents: Sequence[DocumentId],
    vectors: Mapping[DocumentId, np.ndarray],
) -> np.ndarray:
    """Where each document's crowd lies: its mean noise centre.

    The noise centre of a collapsed neighbourhood is the mean of its members' unit vectors, the
    document itself among them. A document's is the mean of those of all neighbourhoods that it was
    logged in, one for each event, so that what crowds it often counts often.

    Args:
        neighbourhoods: Members of each logged event, see `ChelationLog.events`.
        documents: Those to find the centres of.
        vectors: Unit vectors `[D]` of all members, of the version in which they crowded: raw ones
            through its adapter.

    Returns:
        float64 `[len(documents), D]`, not of unit length.

    Raises:
        ConchError: A member has no vector, or a document was in no neighbourhood.
    """
    places = {document: number for number, document in enumerate(documents)}
    dimension = len(next(iter(vectors.values())))
    sums, events = np.zeros((len(places), dimension)), np.zeros(len(places))
    for members in neighbourhoods:
        rows = [places[each] for each in dict.fromkeys(members) if each in places]
        if not rows:
            continue
        if missing := [each for each in members if each not in vectors]:
            raise ConchError(f"there is no vector of {missing[0]!r}, which an event names")
        sums[rows] += np.mean([vectors[each] for each in members], axis=0, dtype=np.float64)
        events[rows] += 1
    if lacking := [document for document, number in places.items() if not events[number]]:
        raise ConchError(f"{lacking[0]!r} is in no logged neighbourhood, so it has no noise centre")
    return sums / events[:, None]


def homeostatic_targets(vectors: Any, centres: Any, *, push: float = 0.1) -> np.ndarray:
    """`normalize(v + push · normalize(v − noise centre))`: away from the crowd (formulas.md 6).

    Args:
        vectors: v, unit vectors of the active version `[N, D]`; what is then trained maps raw
            vectors to the targets, so adaptation still starts from raw.
        centres: Mean noise centre of each in the same space, `[N, D]`.
        push: m, above 0.

    Returns:
        Unit float32 `[N, D]`; NaN where a row lies on its centre, which leaves no direction to push
        it in.

    Raises:
        ConchError: Shapes differ, push is not above 0, or a value is not finite.
    """
    rows, middle = np.asarray(vectors, np.float64), np.asarray(centres, np.float64)
    if rows.ndim != 2 or rows.shape != middle.shape:
        raise ConchError(
            f"vectors have shape {list(rows.shape)} and noise centres {list(middle.shape)}: one "
            "centre is needed for each vector"
        )
    if not push > 0:
        raise ConchError(f"homeostatic push {push:g} must be above 0, such as 0.1")
    if not np.isfinite(middle).all():
        raise ConchError("noise centres hold values that are not finite")
    away = rows - middle
    lengths = np.linalg.norm(away, axis=1, keepdims=True)
    # Differences of float32 vectors have no digits below this.
    still = lengths[:, 0] < 1e-6
    lengths[still] = 1
    targets = unit(rows + push * away / lengths)
    targets[still] = np.nan
    return targets
