"""Collapsed neighbourhoods: how closely the top hits of a query crowd, and against what it counts.

Knows vectors and ids; nothing of logs, models or training. A collapsed neighbourhood is one whose
documents the student can hardly tell apart. To measure crowding otherwise: `dispersions`; the null
is calibrated with it, so the threshold follows.
"""

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from conch_dna.digests import content_digest
from conch_dna.errors import ConchError
from conch_dna.sedimentation.embedders.contract import unit

if TYPE_CHECKING:
    from conch_dna.sedimentation.stores.contract import VectorStore

Identifier = str | int
# Sampled documents whose neighbourhoods are searched and fetched at once.
QUERIES_AT_ONCE = 64


def dispersions(neighbourhoods: Any) -> np.ndarray:
    """1 − ‖mean of the unit vectors‖² of each neighbourhood: the mean of 1 − cosine over its pairs.

    Args:
        neighbourhoods: `[Q, k, D]`; rows of any length, which are brought to 1.

    Returns:
        float64 `[Q]` between 0, all the same, and 1, the vectors cancel; 1 − 1/k for k orthogonal
        ones.

    Raises:
        ConchError: The shape is another, or a row is zero or not finite.
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


def dispersion(vectors: Any) -> float:
    """`dispersions` of one neighbourhood `[k, D]`.

    >>> round(dispersion([[1.0, 0.0], [0.0, 1.0]]), 6)
    0.5
    """
    return float(dispersions(np.asarray(vectors)[None])[0])


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
        lowest: Of the values.
        median: Likewise.
        highest: Likewise.
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
    def from_values(
        cls, values: Any, *, percentile: float, k: int, seed: int, version: str
    ) -> "CollapseNull":
        """The null of given dispersions `[S]`.

        Raises:
            ConchError: There are none, one is not finite, or the percentile is out of its range.
        """
        ordered = np.sort(np.asarray(values, np.float64))
        if not ordered.size or not np.isfinite(ordered).all():
            raise ConchError("the collapse null needs at least one dispersion, and finite ones")
        if not 0 < percentile < 100:
            raise ConchError(f"collapse percentile {percentile:g} is not between 0 and 100")
        return cls(
            percentile=float(percentile),
            threshold=float(np.percentile(ordered, percentile)),
            k=k,
            sample=len(ordered),
            seed=seed,
            version=version,
            lowest=float(ordered[0]),
            median=float(np.median(ordered)),
            highest=float(ordered[-1]),
            values_digest=content_digest(ordered),
        )

    @classmethod
    def fit(
        cls,
        store: "VectorStore",
        *,
        version: str,
        k: int = 10,
        percentile: float = 5.0,
        sample: int = 500,
        seed: int = 0,
    ) -> "CollapseNull":
        """Calibrate on documents of the corpus as queries, each left out of its own neighbourhood.

        The sample is decided by ids and seed alone, so every kind of store takes the same one.

        Args:
            store: Where the vectors are.
            version: Which of them.
            k: Documents in a neighbourhood.
            percentile: See the class.
            sample: Most documents to take as queries.
            seed: Of the sample.

        Raises:
            ConchError: There are fewer than k + 1 documents, or a setting is out of its range.
        """
        if k < 1 or sample < 1:
            raise ConchError(f"k is {k} and sample {sample}: both must be 1 or more")
        count = store.count(version)
        if count < k + 1:
            raise ConchError(
                f"collapse cannot be calibrated on {count} documents: a neighbourhood of {k} needs "
                f"at least {k + 1}; ingest more, or choose a smaller top_k"
            )
        ids, vectors = _sampled(store, version, sample, seed)
        values: list[float] = []
        for first in range(0, len(ids), QUERIES_AT_ONCE):
            own = ids[first : first + QUERIES_AT_ONCE]
            queries = vectors[first : first + QUERIES_AT_ONCE]
            found = store.search(queries, version=version, top_k=k + 1)
            near = [
                [each for each in hits.ids if each != document][:k]
                for document, hits in zip(own, found, strict=True)
            ]
            if short := [document for document, row in zip(own, near, strict=True) if len(row) < k]:
                raise ConchError(
                    f"the store found fewer than {k} neighbours of {short[0]!r} among {count} "
                    "documents: look at its index"
                )
            wanted = list(dict.fromkeys(each for row in near for each in row))
            page = store.get(wanted, version)
            place = {each: number for number, each in enumerate(page.ids)}
            rows = page.vectors[np.array([[place[each] for each in row] for row in near])]
            values += dispersions(rows).tolist()
        return cls.from_values(values, percentile=percentile, k=k, seed=seed, version=version)

    def is_collapsed(self, value: float) -> bool:
        """Whether a dispersion lies below the threshold."""
        return value < self.threshold

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return asdict(self)

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
        return cls(**document)


def sampled_ids(ids: Iterable[Identifier], *, sample: int, seed: int) -> list[Identifier]:
    """At most `sample` of the ids, decided by each id and the seed, in whatever order they come.

    Returns:
        In the order of the digests that decide; all of them where there are not more.
    """
    return heapq.nsmallest(sample, ids, key=lambda each: sample_rank(each, seed=seed))


def sample_rank(identifier: Identifier, *, seed: int) -> str:
    """What decides whether a document is sampled: those with the lowest are."""
    return content_digest(str(seed), repr(identifier))


def _sampled(
    store: "VectorStore", version: str, sample: int, seed: int
) -> tuple[list[Identifier], np.ndarray]:
    """Sampled ids and their vectors `[S, D]`, in one pass over the pages."""
    ids = sampled_ids(
        (each for page in store.pages(version) for each in page.ids), sample=sample, seed=seed
    )
    page = store.get(ids, version)
    place = {each: number for number, each in enumerate(page.ids)}
    return ids, page.vectors[[place[each] for each in ids]]


def noise_centres(
    neighbourhoods: Iterable[Sequence[Identifier]],
    documents: Sequence[Identifier],
    vectors: Mapping[Identifier, np.ndarray],
) -> np.ndarray:
    """Where each document's crowd lies: its mean noise centre.

    The noise centre of a collapsed neighbourhood is the mean of its members' unit vectors, the
    document itself among them. A document's is the mean of those of all neighbourhoods that it was
    logged in, one for each event, so that what crowds it often counts often.

    Args:
        neighbourhoods: Members of each logged event, see `ChelationLog.events`.
        documents: Those to find the centres of.
        vectors: Raw unit vectors `[D]` of all members; raw, since adaptation starts from raw.

    Returns:
        float64 `[len(documents), D]`, not of unit length.

    Raises:
        ConchError: A member has no vector, or a document was in no neighbourhood.
    """
    wanted = {document: number for number, document in enumerate(documents)}
    dimension = len(next(iter(vectors.values()))) if vectors else 0
    sums, events = np.zeros((len(wanted), dimension)), np.zeros(len(wanted))
    for members in neighbourhoods:
        rows = [wanted[each] for each in dict.fromkeys(members) if each in wanted]
        if not rows:
            continue
        if missing := [each for each in members if each not in vectors]:
            raise ConchError(f"there is no vector of {missing[0]!r}, which an event names")
        sums[rows] += np.mean([vectors[each] for each in members], axis=0, dtype=np.float64)
        events[rows] += 1
    if lacking := [document for document, number in wanted.items() if not events[number]]:
        raise ConchError(f"{lacking[0]!r} is in no logged neighbourhood, so it has no noise centre")
    return sums / events[:, None] if len(wanted) else sums


def homeostatic_targets(
    vectors: Any, centres: Any, *, push: float = 0.1
) -> tuple[np.ndarray, np.ndarray]:
    """`normalize(v + push · normalize(v − noise centre))`: away from the crowd (formulas.md 6).

    Args:
        vectors: v, raw unit vectors `[N, D]`.
        centres: Mean noise centre of each, `[N, D]`.
        push: m, above 0.

    Returns:
        Targets, unit float32 `[N, D]`, and the numbers of the rows that lie on their centre: these
        have no direction to be pushed in and are as they were.

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
    away[still] = 0
    return unit(rows + push * away / lengths), np.flatnonzero(still)
