"""A teacher whose tokenizer is not the student's, asked for by the student's own examples.

Knows both sides' examples and the teacher's cache; nothing of blending or of lines. What it says
is told where both have one token for the same text (`SharedTokenTargets`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from conch_dna.digests import content_digest
from conch_dna.language_model import LanguageModel, ModelSource
from conch_dna.progress import Report
from conch_dna.training.batches import Batch, Example
from conch_dna.training.cross_tokenizer.alignments import SHARED_TOKENS
from conch_dna.training.cross_tokenizer.records import AlignedExample
from conch_dna.training.examples import Examples
from conch_dna.training.settings import KDConfig
from conch_dna.training.soft_targets import Targets
from conch_dna.training.trainer import Loss


def examples_for(
    teacher: ModelSource, student: ModelSource, config: KDConfig, report: Report
) -> Examples:
    """Makes the examples of a teacher in a blend: by index, or where tokens are the same text.

    A blend needs outcomes that are the student's own tokens; the alignment "roots" compares
    classes of tokens, and so it does not serve here.
    """
    return Examples(teacher, student, config, report=report, across=SHARED_TOKENS)


class ForeignTargets:
    """Targets of a teacher with another tokenizer, under the student's own examples.

    Args:
        examples: See `examples_for`.
        aligned: The teacher's example for the digest of each of the student's.
        folder: Of the cache.
    """

    def __init__(
        self, examples: Examples, aligned: Mapping[str, AlignedExample], folder: Path
    ) -> None:
        self.inner: Targets = examples.targets(folder)
        self.identity = self.inner.identity
        self.aligned = aligned

    @property
    def digest(self) -> str:
        """Content address of the teacher's targets and of how they are laid."""
        return content_digest("foreign", self.inner.digest)

    def _view(self, examples: Sequence[Example]) -> list[AlignedExample]:
        return [self.aligned[example.digest] for example in examples]

    def missing(self, examples: Sequence[Example]) -> list[Example]:
        """The teacher's examples whose targets are not there."""
        return self.inner.missing(self._view(examples))

    def fill(self, teacher: ModelSource, examples: Sequence[Example], *, batch_size: int) -> int:
        """See `SoftTargetCache.fill`."""
        return self.inner.fill(teacher, self._view(examples), batch_size=batch_size)

    def collate(self, examples: Sequence[Example], temperature: float) -> Batch:
        """See `AlignedTargets.collate`; `soft_weights` tells where the teacher says something."""
        return self.inner.collate(self._view(examples), temperature)

    def loss(self, student: LanguageModel, config: KDConfig) -> Loss:
        """The loss of a student of this teacher alone."""
        return self.inner.loss(student, config)

    def evaluation_batch(self, examples: Sequence[Example]) -> Batch:
        """See `AlignedTargets.evaluation_batch`."""
        return self.inner.evaluation_batch(self._view(examples))

    def gold(self, example: Example) -> np.ndarray:
        """The teacher's log-probabilities of its own tokens of a text."""
        return self.inner.gold(self.aligned[example.digest])
