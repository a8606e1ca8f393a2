"""Several teachers as one: their vectors side by side, so that cosines are averaged by weight.

Knows embedders; nothing of caches, students or targets.
To combine teachers otherwise: another class with the members of `Embedder`.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from conch_dna.digests import content_digest
from conch_dna.errors import ConchError
from conch_dna.sedimentation.embedders.contract import Embedded, Embedder
from conch_dna.sedimentation.vectors import unit


class TeacherEnsemble:
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
        given = np.asarray([1.0] * len(embedders) if weights is None else weights, np.float64)
        if given.shape != (len(embedders),) or not (np.isfinite(given) & (given > 0)).all():
            raise ConchError(
                f"weights {list(weights or [])} do not fit {len(embedders)} teachers: give each "
                "one number above 0"
            )
        self.embedders = tuple(embedders)
        self.weights = tuple(float(weight) for weight in given / given.sum())

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

    @property
    def report(self) -> str:
        """What it is, and theirs one after another."""
        parts = "; ".join(embedder.report for embedder in self.embedders)
        return f"{self.name}, {self.dimension} dimensions: {parts}"

    def documents(self, texts: Iterable[str]) -> Embedded:
        """See `Embedder`."""
        texts = texts if isinstance(texts, str) else list(texts)
        return self._joined([embedder.documents(texts) for embedder in self.embedders])

    def queries(self, texts: Iterable[str]) -> Embedded:
        """See `Embedder`."""
        texts = texts if isinstance(texts, str) else list(texts)
        return self._joined([embedder.queries(texts) for embedder in self.embedders])

    def _joined(self, parts: list[Embedded]) -> Embedded:
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
