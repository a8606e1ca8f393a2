"""Targets of which each token was drawn from the teacher: right on average, in few bytes.

Knows caches and examples; nothing of models. Texts that are measured have the likeliest tokens
and the rest, so that held-out figures mean the same with either kind.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np

from conch_dna.checkpoints import content_digest
from conch_dna.errors import ConchError
from conch_dna.language_model import LanguageModel, ModelSource
from conch_dna.training.batches import Batch, Example, read_by_teacher
from conch_dna.training.data.outcomes import DRAWN_ARRAYS, TargetIdentity, shares_drawn
from conch_dna.training.data.soft_targets import SoftTargetCache
from conch_dna.training.optimizer.steps import Loss
from conch_dna.training.settings import KDConfig


def drawn_identity(identity: TargetIdentity, config: KDConfig, *, by_index: bool) -> TargetIdentity:
    """What drawn targets depend on, beside those of the likeliest tokens.

    Args:
        identity: Of the latter.
        config: How many are drawn, and at which temperature.
        by_index: Whether both models have the same tokens.

    Raises:
        ConchError: The student has not all tokens of the teacher, or too few for the draws.
    """
    if not by_index or identity.kept_below < identity.vocabulary_size:
        raise ConchError(
            "targets is sampled, and the student has not all of the teacher's tokens, of which any "
            "may be drawn: use --targets topk"
        )
    draws = config.target_draws
    if 2 * draws > identity.vocabulary_size:
        raise ConchError(
            f"target_draws is {draws}, more than half of {identity.vocabulary_size} tokens: lower "
            "--target-draws, or use --targets topk"
        )
    at = (float(config.temperature),)
    return replace(identity, top_k=0, temperatures=at, draws=draws)


class DrawnTargetCache(SoftTargetCache):
    """Tokens drawn from the teacher, in place of its likeliest ones."""

    def outcomes(
        self, examples: Sequence[Example], temperature: float, rows: int
    ) -> dict[str, np.ndarray]:
        """What was drawn as outcomes, with nothing left for the rest; see `SoftTargetCache`.

        The forward KL of them has the gradient of the cross-entropy against what was drawn.
        """
        if self.identity.temperatures != (float(temperature),):
            raise ConchError(
                f"tokens were drawn at temperature {self.identity.temperatures[0]:g} and are asked "
                f"for at {temperature:g}: runs that share drawn targets need one temperature"
            )
        parts = [self.read(example) for example in examples]
        joined = {name: np.concatenate([p[name] for p in parts]) for name in DRAWN_ARRAYS}
        ids, log_shares = shares_drawn(joined["drawn_ids"])
        order = np.zeros(rows, np.int64)
        order[: len(ids)] = np.arange(len(ids))
        return {
            "kept_ids": ids[order].astype(np.int32),
            "teacher_log_probs": log_shares[order],
            "gold_log_prob": joined["gold_log_prob"][order],
        }


class SampledTargets:
    """Drawn tokens for the texts that are trained on, kept ones for those that are measured.

    Args:
        kept: The teacher's likeliest tokens and the rest.
        drawn: What was drawn from it.
        trained: The texts that are trained on.
        measured: The texts that are measured.
    """

    def __init__(
        self,
        kept: SoftTargetCache,
        drawn: DrawnTargetCache,
        trained: Iterable[Example],
        measured: Iterable[Example],
    ) -> None:
        self.kept, self.drawn = kept, drawn
        self.identity = kept.identity
        self._trained, self._measured = (
            {read_by_teacher(example).digest for example in examples}
            for examples in (trained, measured)
        )

    @property
    def digest(self) -> str:
        """Content address of what both depend on besides the text."""
        return content_digest(self.kept.digest, self.drawn.digest)

    def _is_trained(self, example: Example) -> bool:
        return read_by_teacher(example).digest in self._trained

    def _is_kept(self, example: Example) -> bool:
        digest = read_by_teacher(example).digest
        return digest in self._measured or digest not in self._trained

    def _by_cache(
        self, examples: Sequence[Example]
    ) -> tuple[tuple[SoftTargetCache, list[Example]], ...]:
        kept = list(filter(self._is_kept, examples))
        return (self.kept, kept), (self.drawn, list(filter(self._is_trained, examples)))

    def missing(self, examples: Sequence[Example]) -> list[Example]:
        """The examples whose targets are not there."""
        parts = [cache.missing(chosen) for cache, chosen in self._by_cache(examples)]
        return list(chain.from_iterable(parts))

    def fill(self, teacher: ModelSource, examples: Sequence[Example], *, batch_size: int) -> int:
        """Compute what is missing."""
        chosen = self._by_cache(examples)
        return sum(cache.fill(teacher, part, batch_size=batch_size) for cache, part in chosen)

    def collate(self, examples: Sequence[Example], temperature: float) -> Batch:
        """A batch of examples with what was drawn, or with what is kept if all are measured.

        A text may be both, where what is held out repeats what is trained on.
        """
        trained = all(map(self._is_trained, examples)) and not all(map(self._is_kept, examples))
        cache = self.drawn if trained else self.kept
        return cache.collate(examples, temperature)

    def loss(self, student: LanguageModel, config: KDConfig) -> Loss:
        """The loss of a student over batches of `collate`."""
        return self.kept.loss(student, config)

    def evaluation_batch(self, examples: Sequence[Example]) -> Batch:
        """A batch for `evaluation.heldout_metrics`."""
        return self.kept.evaluation_batch(examples)

    def read(self, example: Example) -> dict[str, np.ndarray]:
        """What is kept of a text that is measured."""
        return self.kept.read(example)

    def gold(self, example: Example) -> np.ndarray:
        """The teacher's log-probabilities of a measured text's tokens."""
        return self.kept.gold(example)
