"""Ways to teach across tokenizers that wrote worse than the text alone; kept for comparison.

Each stands in for `roots` while it is measured, so that the rest of a run is the same. Figures:
docs/measurements.md. To add one: a kind of `AlignedTargets` and its entry in BASELINES.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from unittest import mock

import mlx.core as mx
import numpy as np

from conch_dna.losses import log_softmax, total_variation
from conch_dna.training.cross_tokenizer.loss import SoftLoss
from conch_dna.training.cross_tokenizer.targets import (
    AlignedRows,
    Arrays,
    SharedTokenTargets,
    chunk_arrays,
)
from conch_dna.training.cross_tokenizer.vocabulary import build_vocab_projection
from conch_dna.training.data.examples import KINDS
from conch_dna.training.head_loss import Sums
from conch_dna.training.settings import KDConfig


class BytesTargets(SharedTokenTargets):
    """Shared tokens where a chunk is one token on both sides, likelihoods of all other chunks."""

    name = "bytes"

    def arrays(self, part: AlignedRows, temperature: float) -> Arrays:
        several = part.chunks.where(~part.chunks.one_to_one)
        return super().arrays(part, temperature) | chunk_arrays(part, several)


class TruncateTargets(SharedTokenTargets):
    """By index, though the tokens are others: what many scripts do."""

    name = "truncate"

    @property
    def student_ids(self) -> np.ndarray:
        teacher, student = (len(table.pieces) for table in self.tables)
        ids = np.arange(teacher)
        return np.where(ids < student, ids, -1)


class ProjectTargets(SharedTokenTargets):
    """A teacher's token gives its probability to the first one that the student makes of it."""

    name = "project"

    @cached_property
    def student_ids(self) -> np.ndarray:  # type: ignore[override]
        return build_vocab_projection(self.teacher.tokenizer, self.student.tokenizer).targets

    def arrays(self, part: AlignedRows, temperature: float) -> Arrays:
        return self.mapped(part, part.chunks, self.student_ids, temperature)


class UldTargets(SharedTokenTargets):
    """Sorted probabilities, whatever they stand for.

    Boizard et al. (2024), "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation
    Loss for LLMs", eq. 5.
    """

    name = "uld"

    def arrays(self, part: AlignedRows, temperature: float) -> Arrays:
        ids, kept, rest = part.outcomes(part.chunks.teacher, temperature)
        log_probs = np.concatenate([kept, rest[:, None]], axis=1)
        # The ids say only that something is compared.
        return self.laid(np.zeros_like(ids), log_probs, part.chunks.student, part.count)

    def soft_loss(self, config: KDConfig) -> SoftLoss:
        return partial(sorted_distance_sum, temperature=config.temperature)


def sorted_distance_sum(logits: mx.array, rows: Sums, *, temperature: float) -> mx.array:
    """`t²` times the L1 distance of sorted probabilities, summed over the compared rows."""
    teacher = rows["teacher_log_probs"][:, :-1]
    log_probs = log_softmax(logits, temperature)
    order = mx.stop_gradient(mx.argsort(-log_probs, axis=-1))[:, : teacher.shape[-1]]
    student = mx.take_along_axis(log_probs, order, axis=-1)
    missing = teacher.shape[-1] - student.shape[-1]
    if missing > 0:
        student = mx.concatenate([student, mx.full((len(student), missing), -mx.inf)], axis=-1)
    distances = 2 * total_variation(teacher, student)
    return temperature**2 * (distances * rows["soft_weights"]).sum()


BASELINES = {
    kind.name: kind for kind in (BytesTargets, TruncateTargets, ProjectTargets, UldTargets)
}


@contextmanager
def instead_of_roots(name: str | None) -> Iterator[None]:
    """Runs with different tokenizers use a baseline while this is entered; None changes nothing."""
    with mock.patch.dict(KINDS, {"roots": BASELINES[name]} if name else {}):
        yield
