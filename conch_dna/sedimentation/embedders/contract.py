"""What every embedder promises: order, one dimension, unit vectors, an error for each text without.

Knows texts and arrays; nothing of models, servers or files.
To add a kind of embedder: subclass `CheckedEmbedder`, give what is abstract there, let
`embedders.open_embedder` find it, and name it in the contract tests.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from conch_dna.errors import ConchError
from conch_dna.sedimentation.vectors import unit


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


class Embedder(Protocol):
    """Texts in, unit vectors out."""

    @property
    def name(self) -> str:
        """What the user calls it."""
        ...

    @property
    def dimension(self) -> int:
        """D of its vectors; asking loads the model if need be."""
        ...

    @property
    def digest(self) -> str:
        """Content address of what decides its vectors; told without loading the model."""
        ...

    @property
    def report(self) -> str:
        """One line for a person: what it is, where it comes from, what it does to long texts."""
        ...

    def documents(self, texts: Iterable[str]) -> Embedded:
        """Embed texts that are to be found."""
        ...

    def queries(self, texts: Iterable[str]) -> Embedded:
        """Embed texts that are searched with."""
        ...


class CheckedEmbedder(ABC):
    """Keeps the contract around a model's own encoding, whatever that returns."""

    @property
    @abstractmethod
    def name(self) -> str:
        """See `Embedder`."""

    @property
    @abstractmethod
    def dimension(self) -> int:
        """See `Embedder`."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """See `Embedder`."""

    @property
    @abstractmethod
    def report(self) -> str:
        """See `Embedder`."""

    @abstractmethod
    def _encode(self, texts: list[str], *, queries: bool) -> tuple[np.ndarray, dict[int, str]]:
        """Rows `[n, D]` in the order of the texts, and why some have none (their rows are ignored).

        A row that is not finite or all zero needs no reason of its own.
        """

    def documents(self, texts: Iterable[str]) -> Embedded:
        """Embed texts that are to be found, with the model's prompt for them.

        Args:
            texts: Any number; an error of one leaves the others as they are.

        Raises:
            ConchError: The model as a whole cannot be used, or one text was given for a list.
        """
        return self._embed(texts, queries=False)

    def queries(self, texts: Iterable[str]) -> Embedded:
        """Embed texts that are searched with, with the model's prompt for them.

        Raises:
            ConchError: See `documents`.
        """
        return self._embed(texts, queries=True)

    def _embed(self, texts: Iterable[str], *, queries: bool) -> Embedded:
        if isinstance(texts, str):
            raise ConchError(
                f"{self.name} was given one text where a list of texts is needed: put it in a list"
            )
        texts = list(texts)
        errors = {
            number: reason
            for number, text in enumerate(texts)
            if (reason := problem_of(text)) is not None
        }
        asked = [number for number in range(len(texts)) if number not in errors]
        if not asked:
            return Embedded(np.zeros((0, self.dimension), np.float32), [], errors)
        found, refused = self._encode([texts[number] for number in asked], queries=queries)
        rows = np.asarray(found)
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


def problem_of(text: object) -> str | None:
    """Why a text cannot be embedded by any model; None where nothing speaks against it.

    >>> problem_of("   ")
    'it is empty or only white space'
    """
    if not isinstance(text, str):
        return f"it is no text but {type(text).__name__}"
    if not text.strip():
        return "it is empty or only white space"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "it holds half a character (a lone surrogate), which has no UTF-8 form"
    return None
