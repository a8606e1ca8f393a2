"""What every embedder promises: order, unit vectors, an error for each text without one.

Knows texts and arrays; nothing of models, servers or files. Cosine similarity is the dot product
of two unit vectors.
To add a kind of embedder: subclass `CheckedEmbedder`, give what is abstract there, let
`embedders.open_embedder` find it, and name it in the contract tests.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from conch_dna.errors import ConchError


def unit(vectors: Any, *, what: str = "vectors") -> np.ndarray:
    """Rows scaled to length 1.

    Args:
        vectors: `[N, D]`, any float type.
        what: What they are, for the message.

    Returns:
        float32 `[N, D]`, contiguous.

    Raises:
        ConchError: A row has a value that is not finite, or is all zero; its number is named.

    >>> unit([[3.0, 4.0]]).tolist()
    [[0.6000000238418579, 0.800000011920929]]
    """
    rows = np.asarray(vectors, np.float64)
    if rows.ndim != 2:
        raise ConchError(f"{what} have shape {list(rows.shape)}: give a table [N, D]")
    broken = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(broken):
        raise ConchError(
            f"{len(broken)} of {len(rows)} {what} hold values that are not finite, the first is "
            f"number {broken[0] + 1}: look at what made them"
        )
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    empty = np.flatnonzero(lengths[:, 0] == 0)
    if len(empty):
        raise ConchError(
            f"{len(empty)} of {len(rows)} {what} are all zero, the first is number "
            f"{empty[0] + 1}: they have no direction to compare"
        )
    return np.ascontiguousarray((rows / lengths).astype(np.float32))


@dataclass(frozen=True, eq=False)
class Embedded:
    """Vectors of the texts that have one, and why the others have none.

    Attributes:
        vectors: Unit float32 `[n, D]`, in the order of the texts; D also where n is 0.
        kept: Which text each row belongs to, counted from 0, increasing.
        errors: For every other text, why it could not be embedded.
    """

    vectors: np.ndarray
    kept: list[int]
    errors: dict[int, str] = field(default_factory=dict)

    def all_vectors(self, *, what: str = "texts") -> np.ndarray:
        """The vectors, if every text has one.

        Args:
            what: What the texts are, for the message.

        Raises:
            ConchError: A text has none; the first is named with its reason.
        """
        if self.errors:
            first, reason = next(iter(sorted(self.errors.items())))
            raise ConchError(
                f"{len(self.errors)} of {len(self.errors) + len(self.kept)} {what} could not be "
                f"embedded, the first is number {first + 1}: {reason}. Leave them out or mend them"
            )
        return self.vectors


class Embedder(ABC):
    """Texts in, unit vectors out."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What the user calls it."""

    @property
    @abstractmethod
    def dimension(self) -> int:
        """D of its vectors; asking loads the model if need be."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """Content address of what decides its vectors; told without loading the model."""

    @abstractmethod
    def _embed(self, texts: Iterable[str], *, queries: bool) -> Embedded:
        """Vectors of any number of texts; an error of one leaves the others as they are."""

    def embed(self, texts: Iterable[str], *, queries: bool) -> Embedded:
        """Embed texts, as queries or as documents.

        Raises:
            ConchError: The model as a whole cannot be used, or one text was given for a list.
        """
        if isinstance(texts, str):
            raise ConchError(
                f"{self.name} was given one text where a list of texts is needed: put it in a list"
            )
        return self._embed(texts, queries=queries)

    def documents(self, texts: Iterable[str]) -> Embedded:
        """Embed texts that are to be found, with the model's prompt for them."""
        return self.embed(texts, queries=False)

    def queries(self, texts: Iterable[str]) -> Embedded:
        """Embed texts that are searched with, with the model's prompt for them."""
        return self.embed(texts, queries=True)


class CheckedEmbedder(Embedder):
    """Keeps the contract around a model's own encoding, whatever that returns."""

    @abstractmethod
    def _encode(self, texts: list[str], *, queries: bool) -> tuple[np.ndarray, dict[int, str]]:
        """Rows `[n, D]` in the order of the texts, and why some have none (their rows are ignored).

        A row that is not finite or all zero needs no reason of its own.
        """

    def _embed(self, texts: Iterable[str], *, queries: bool) -> Embedded:
        texts = list(texts)
        errors = problems_of(texts)
        asked = [number for number in range(len(texts)) if number not in errors]
        if not asked:
            return Embedded(np.zeros((0, self.dimension), np.float32), [], errors)
        encoded, refused = self._encode([texts[number] for number in asked], queries=queries)
        rows = np.asarray(encoded)
        if rows.shape != (len(asked), self.dimension):
            raise ConchError(
                f"{self.name} gave vectors of shape {list(rows.shape)} for {len(asked)} texts of "
                f"{self.dimension} dimensions: the model changed under way, open it again"
            )
        finite = np.isfinite(rows).all(axis=1)
        zero = (rows == 0).all(axis=1)
        kept = []
        for row, number in enumerate(asked):
            if row in refused:
                errors[number] = refused[row]
            elif not finite[row]:
                errors[number] = f"{self.name} gave a vector with values that are not finite"
            elif zero[row]:
                errors[number] = f"{self.name} knows no part of it: its vector is all zero"
            else:
                kept.append(row)
        vectors = unit(rows[kept], what="embeddings")
        return Embedded(vectors, [asked[row] for row in kept], dict(sorted(errors.items())))


def problems_of(texts: Sequence[object]) -> dict[int, str]:
    """Why texts cannot be embedded by any model, by number; the others are left out.

    >>> problems_of(["an owl", "   "])
    {1: 'it is empty or only white space'}
    """
    reasons = ((number, _problem_of(text)) for number, text in enumerate(texts))
    return {number: reason for number, reason in reasons if reason is not None}


def _problem_of(text: object) -> str | None:
    if not isinstance(text, str):
        return f"it is no text but {type(text).__name__}"
    if not text.strip():
        return "it is empty or only white space"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "it holds half a character (a lone surrogate), which has no UTF-8 form"
    return None
