"""Hubs: documents that are near to everything, found and held back.

Knows a store's pages and vectors; decides nothing about what becomes active. In many dimensions
some documents are among the nearest of far more queries than others (Radovanović, Nanopoulos &
Ivanović 2010), and stand in the way of what is asked for.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from conch_dna.checkpoints import content_digest
from conch_dna.sedimentation.changes.collapse import sampled
from conch_dna.sedimentation.changes.heldout_queries import best_scores
from conch_dna.sedimentation.changes.versions import Versions
from conch_dna.sedimentation.documents import DocumentId
from conch_dna.sedimentation.embedders.contract import unit
from conch_dna.sedimentation.stores.contract import RAW, Page

# In a version's origin, which hubs are held back in it.
HUBS = "hubs"
# A hub is among the nearest of more than so many times as many documents as the mean, and of as
# many at least.
TIMES_MEAN, FEWEST = 5.0, 20
# Documents that ask, drawn by the seed.
ASKING = 2000
PASSES = 3


@dataclass(frozen=True, kw_only=True)
class Hubs:
    """What was found in a version's vectors before any was held back.

    Attributes:
        shares: For each hub, the share of its similarities that is left to it, between 0 and 1.
        skew: Skewness of how often documents are among the nearest of others.
        skew_after: The same with the hubs held back.
        most: How often the one is that is most often.
        asking: Documents that asked.
    """

    shares: dict[DocumentId, float]
    skew: float
    skew_after: float
    most: int
    asking: int

    @property
    def digest(self) -> str:
        """By which the same hubs are known again; it names none of them."""
        return content_digest(*sorted(map(repr, self.shares)))

    def figures(self) -> dict[str, float]:
        """What a reader wants to know of them."""
        return {
            "hubs": len(self.shares),
            "skew": round(self.skew, 3),
            "skew_after": round(self.skew_after, 3),
            "most_often_near": self.most,
            "asking": self.asking,
        }


def hubs_of(
    versions: Versions,
    *,
    neighbours: int,
    seed: int,
    without: Callable[[DocumentId], bool] = lambda identifier: False,
) -> Hubs:
    """The hubs of the active version, and how far each is held back.

    A sample of documents asks for its nearest. A hub's similarities are scaled so that it is among
    the nearest of as many as the mean document is; where others become hubs by that, they are too.
    What was held back before is found again, since its direction stayed.

    Args:
        versions: Of the store.
        neighbours: k.
        seed: Of the sample.
        without: Whether a document is held out, and so does not ask.
    """
    store = versions.store
    page = sampled(store, sample=ASKING, seed=seed, version=versions.active, without=without)
    if not page.ids:
        return Hubs(shares={}, skew=0.0, skew_after=0.0, most=0, asking=0)
    asking = _directions(versions, page)
    mean = neighbours * len(page.ids) / max(1, store.count(RAW))
    least = max(TIMES_MEAN * mean, FEWEST)
    shares: dict[DocumentId, float] = {}
    counts: list[dict[DocumentId, int]] = []
    for _ in range(PASSES):
        counts.append(_counted(versions, page.ids, asking, shares, neighbours))
        found = [each for each, count in counts[-1].items() if count > least]
        if not found:
            break
        shares |= _shares(versions, page.ids, asking, {*shares, *found}, neighbours, mean)
    after = (
        counts[-1] if len(counts) == 1 else _counted(versions, page.ids, asking, shares, neighbours)
    )
    total = store.count(RAW)
    return Hubs(
        shares=shares,
        skew=_skew(counts[0], total),
        skew_after=_skew(after, total),
        most=max(counts[0].values(), default=0),
        asking=len(page.ids),
    )


def held_back(
    ids: list[DocumentId], vectors: np.ndarray, shares: Mapping[DocumentId, float]
) -> np.ndarray:
    """Unit vectors whose products with queries are scaled, by a last dimension that queries lack.

    Args:
        ids: Of the documents.
        vectors: Unit `[n, E]`, the last dimension of no meaning.
        shares: Of hubs.

    Returns:
        Unit float32 `[n, E]`.
    """
    scale = np.array([shares.get(each, 1.0) for each in ids], np.float32)
    rows = unit(np.pad(vectors[:, :-1], ((0, 0), (0, 1)))) * scale[:, None]
    rows[:, -1] = np.sqrt(np.maximum(0, 1 - scale**2))
    return rows


def _counted(
    versions: Versions,
    asked_by: list[DocumentId],
    asking: np.ndarray,
    shares: Mapping[DocumentId, float],
    neighbours: int,
) -> dict[DocumentId, int]:
    """How often each document is among the nearest of those that ask, themselves left out."""
    counts: dict[DocumentId, int] = {}
    ids, _ = best_scores(_scaled_pages(versions, shares), asking, top_k=neighbours + 1)
    for own, row in zip(asked_by, ids, strict=True):
        for each in [each for each in row if each != own][:neighbours]:
            counts[each] = counts.get(each, 0) + 1
    return counts


def _shares(
    versions: Versions,
    asked_by: list[DocumentId],
    asking: np.ndarray,
    hubs: set[DocumentId],
    neighbours: int,
    mean: float,
) -> dict[DocumentId, float]:
    """What is left of each hub's similarities, so that the mean number of askers finds it near."""
    pages = _scaled_pages(versions, {}, without=hubs)
    ids, scores = best_scores(pages, asking, top_k=neighbours + 1)
    edges = np.zeros(len(asking))
    for number, (own, row) in enumerate(zip(asked_by, ids, strict=True)):
        others = [place for place, each in enumerate(row) if each != own][:neighbours]
        edges[number] = scores[number, others[-1]] if others else 0.0
    page = versions.store.get(sorted(hubs, key=str), versions.active)
    found = {}
    for name, vector in zip(page.ids, _directions(versions, page), strict=True):
        near = asking @ vector
        counted = np.array([each != name for each in asked_by]) & (near > 0)
        ratios = np.sort(np.clip(edges[counted] / near[counted], 0, 1))
        found[name] = float(ratios[min(int(mean), len(ratios) - 1)]) if len(ratios) else 1.0
    return found


def _scaled_pages(
    versions: Versions,
    shares: Mapping[DocumentId, float],
    *,
    without: Collection[DocumentId] = (),
) -> Iterator[tuple[list[DocumentId], np.ndarray]]:
    """All documents' vectors of the active version, hubs scaled and some left out, by pages."""
    for page in versions.store.pages(versions.active):
        rows = _directions(versions, page)
        scale = np.array([shares.get(each, 1.0) for each in page.ids], np.float32)
        kept = [number for number, each in enumerate(page.ids) if each not in without]
        yield [page.ids[number] for number in kept], (rows * scale[:, None])[kept]


def _directions(versions: Versions, page: Page) -> np.ndarray:
    """Unit vectors of a page of the active version, as if none were held back."""
    if HUBS in versions.origin(versions.active):
        return unit(page.vectors[:, :-1])
    return page.vectors


def _skew(counts: Mapping[DocumentId, int], documents: int) -> float:
    """Skewness of the counts of all documents, those that are never near among them."""
    values = np.zeros(documents)
    values[: len(counts)] = list(counts.values())
    deviation = values - values.mean()
    spread = float((deviation**2).mean())
    return float((deviation**3).mean()) / spread**1.5 if spread else 0.0
