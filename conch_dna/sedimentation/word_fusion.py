"""The dense ranking of a query fused with BM25's by reciprocal rank.

Knows a store's texts and rankings; nothing of embedders, versions or gates.
"""

from typing import Any

from conch_dna.sedimentation.documents import DocumentId, embedded_text
from conch_dna.sedimentation.retrieval import BM25, rrf
from conch_dna.sedimentation.stores.contract import RAW, Hits, VectorStore
from conch_dna.sedimentation.stores.filters import Where, conditions_of, matches

# Documents of each ranking that are fused.
FUSED = 100


class WordFusion:
    """Fuses rankings of one store.

    Args:
        store: Its payloads hold the texts.
        k: Constant of reciprocal rank fusion.
    """

    def __init__(self, store: VectorStore, k: int) -> None:
        self.store = store
        self.k = k
        self._words: tuple[int, BM25] | None = None

    def fused(
        self, query: str, hits: Hits, top_k: int, where: Where | None = None
    ) -> tuple[list[DocumentId], list[float], list[dict[str, Any]]]:
        """Ids, scores and payloads of the best documents by both rankings.

        Args:
            query: Its text.
            hits: The dense ranking, FUSED long where there are as many.
            top_k: How many to give.
            where: The filter that the dense ranking had.
        """
        by_words = [each for each, _ in self._bm25().search([query], top_k=FUSED)[0]]
        payloads = dict(zip(hits.ids, hits.payloads, strict=True))
        missing = [each for each in by_words if each not in payloads]
        if missing:
            page = self.store.get(missing, RAW)
            payloads.update(zip(page.ids, page.payloads, strict=True))
        conditions = conditions_of(where)
        by_words = [each for each in by_words if matches(payloads[each], conditions)]
        ranked = rrf([hits.ids, by_words], k=self.k, top_k=top_k)
        ids = [each for each, _ in ranked]
        return ids, [score for _, score in ranked], [payloads[each] for each in ids]

    def _bm25(self) -> BM25:
        """Of the documents there are now; made at the first query after a change."""
        count = self.store.count(RAW)
        if self._words is None or self._words[0] != count:
            ids: list[DocumentId] = []
            texts: list[str] = []
            for page in self.store.pages(RAW):
                ids += page.ids
                texts += [embedded_text(payload) for payload in page.payloads]
            self._words = count, BM25(ids, texts)
        return self._words[1]
