"""Whether the neighbourhood of a query has collapsed, by a null that is calibrated when needed.

Knows a store and the log; nothing of embedders, adapters or gates.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from conch_dna.checkpoints import write_json
from conch_dna.sedimentation.changes.chelation_log import ChelationLog
from conch_dna.sedimentation.changes.collapse import CollapseNull, dispersions
from conch_dna.sedimentation.config import ChelationConfig
from conch_dna.sedimentation.stores.contract import RAW, Hits, VectorStore

# The null is calibrated anew when the store has grown or shrunk by this share.
STALE_SHARE = 0.2


class Neighbourhoods:
    """Measures neighbourhoods and logs those that have collapsed.

    Args:
        store: Where the vectors are.
        log: Of collapsed ones.
        config: Size, percentile, sample and seed.
        folder: For `null-<version>.json`.
        student_digest: For the events.
    """

    def __init__(
        self,
        store: VectorStore,
        log: ChelationLog,
        config: ChelationConfig,
        folder: Path,
        student_digest: str,
    ) -> None:
        self.store = store
        self.log = log
        self.config = config
        self.folder = folder
        self.student_digest = student_digest
        self._null: CollapseNull | None = None
        self._null_count = 0

    def judged(
        self, queries: Sequence[str], found: Sequence[Hits], version: str
    ) -> list[tuple[float | None, bool | None]]:
        """Dispersion of each query's neighbourhood, and whether it has collapsed; logs those.

        Both are None where there are too few documents to have a neighbourhood.
        """
        results: list[tuple[float | None, bool | None]] = []
        values = self._dispersions(found, version)
        for query, hits, value in zip(queries, found, values, strict=True):
            collapsed = None
            if value is not None and self._null is not None:
                collapsed = self._null.is_collapsed(value)
                if collapsed:
                    self.log.append(
                        query=query,
                        version=version,
                        student_digest=self.student_digest,
                        dispersion=value,
                        threshold=self._null.threshold,
                        neighbourhood=hits.ids[: self.config.top_k],
                    )
            results.append((value, collapsed))
        return results

    def _dispersions(self, found: Sequence[Hits], version: str) -> list[float | None]:
        """Of each query's neighbourhood, calibrating the null first; None where there is none."""
        k = self.config.top_k
        if not self._calibrated(version):
            return [None] * len(found)
        near = [hits.ids[:k] for hits in found]
        page = self.store.get(list(dict.fromkeys(each for ids in near for each in ids)), version)
        place = {each: number for number, each in enumerate(page.ids)}
        rows = page.vectors[np.array([[place[each] for each in ids] for ids in near])]
        return [float(value) for value in dispersions(rows)]

    def _calibrated(self, version: str) -> bool:
        """Whether there is a null for a version, made when it is first needed."""
        count = self.store.count(RAW)
        if count < self.config.top_k + 1:
            return False
        path = self.folder / f"null-{version}.json"
        if self._null is None or self._null.version != version:
            self._null, self._null_count = None, 0
            if path.is_file():
                document = json.loads(path.read_text(encoding="utf-8"))
                self._null = CollapseNull.from_json(document["null"], source=str(path))
                self._null_count = document["documents"]
        settings = (self.config.top_k, self.config.collapse_percentile, self.config.seed)
        null = self._null
        fresh = null is not None and (null.k, null.percentile, null.seed) == settings
        if not fresh or abs(count - self._null_count) > STALE_SHARE * self._null_count:
            self._null = CollapseNull.fit(
                self.store,
                version=version,
                k=self.config.top_k,
                percentile=self.config.collapse_percentile,
                sample=self.config.collapse_sample,
                seed=self.config.seed,
            )
            self._null_count = count
            write_json(path, {"null": self._null.to_json(), "documents": count})
        return True
