"""A static student's table fitted to a teacher's vectors of texts, in closed form.

Knows counts of tokens, tables and one linear system; nothing of stores or files.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from conch_dna.errors import ConchError

# Of the map that tokens which no text has go through.
MAP_STRENGTH = 1.0
# The system is of as many equations as there are texts: 10,000 take 800 MB.
MOST_TEXTS = 10_000
ROWS_AT_ONCE = 512


def token_vectors(student: Any) -> np.ndarray:
    """What each token adds to a text's vector, float32 `[V, D]`.

    Args:
        student: A model2vec `StaticModel`, whose vectors are the direction of the sum of these.
    """
    table = np.asarray(student.embedding, np.float32)
    if student.token_mapping is not None:
        table = table[student.token_mapping]
    if student.weights is not None:
        table = table * student.weights[:, None]
    table = np.array(table, np.float32)
    if student.unk_token_id is not None:
        table[student.unk_token_id] = 0
    return table


class TablePairs:
    """Texts as a static student counts their tokens, and a teacher's vectors of them.

    `solve` gives the table T of least ‖A T − Y‖² + strength ‖(T − E M) / idf‖², where A are the
    counts, scaled so that A E are the student's unit vectors, E its table, Y the teacher's vectors
    and M the ridge from A E to Y. So a token that no text has goes where the map takes it, and one
    that many have moves less. With B = A idf and K = B Bᵀ that is
    T = E M + idf Bᵀ (K + strength mean(diag K) I)⁻¹ (Y − A E M), a system of N equations (the
    dual of ridge regression; Saunders, Gammerman & Vovk 1998).

    Args:
        student: A model2vec `StaticModel`.
    """

    def __init__(self, student: Any) -> None:
        self.student = student
        self.table = token_vectors(student)
        self._counts: list[Any] = []
        self._targets: list[np.ndarray] = []

    def add(self, texts: Sequence[str], targets: np.ndarray) -> None:
        """Count a batch.

        Args:
            texts: n of them, each of which the student can embed.
            targets: Of the teacher, unit `[n, E]`.
        """
        from scipy.sparse import csr_matrix

        ids = self.student.tokenize(list(texts), max_length=None)
        ends = np.cumsum([0, *map(len, ids)])
        flat = np.fromiter((each for row in ids for each in row), np.int64, ends[-1])
        shape = (len(texts), len(self.table))
        counts = csr_matrix((np.ones(len(flat), np.float32), flat, ends), shape=shape)
        counts.sum_duplicates()
        self._counts.append(counts)
        self._targets.append(np.asarray(targets, np.float32))

    def __len__(self) -> int:
        return sum(map(len, self._targets))

    def solve(self, strength: float) -> np.ndarray:
        """The table of least error, float32 `[V, E]`; see the class.

        Args:
            strength: What holds tokens where the map takes them, above 0.

        Raises:
            ConchError: There are no texts.
        """
        from scipy.linalg import solve
        from scipy.sparse import diags, vstack

        if not len(self):
            raise ConchError("there are no texts to fit a table of tokens to")
        counts, targets = vstack(self._counts).tocsr(), np.concatenate(self._targets)
        found_in = np.asarray((counts > 0).sum(axis=0)).ravel()
        idf = np.log1p(len(self) / (1 + found_in)).astype(np.float32)
        lengths = np.linalg.norm(counts @ self.table, axis=1)
        scaled = (diags(1 / lengths) @ counts).astype(np.float32)
        rows = scaled @ self.table
        own = rows.T @ rows + MAP_STRENGTH * np.eye(rows.shape[1])
        mapped = solve(own, rows.T @ targets, assume_a="pos")
        bags = (scaled @ diags(idf)).tocsr()
        gram = np.empty((len(self), len(self)))
        for start in range(0, len(self), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            gram[part] = (bags[part] @ bags.T).toarray()
        gram[np.diag_indices_from(gram)] += strength * gram.diagonal().mean()
        left = targets.astype(np.float64) - rows @ mapped
        moved = bags.T @ solve(gram, left, assume_a="pos", overwrite_a=True, overwrite_b=True)
        return np.ascontiguousarray(self.table @ mapped + idf[:, None] * moved, np.float32)
