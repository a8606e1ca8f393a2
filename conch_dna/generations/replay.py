"""A sample of what earlier generations learned from, mixed into what a new one learns from.

Knows records and examples; nothing of models or of how a line is kept on disk.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

from conch_dna.checkpoints import content_digest
from conch_dna.errors import ConchError
from conch_dna.training.batches import Example, ExampleBatches, bucketed_batches
from conch_dna.training.data.records import Record


def create_replay_buffer(
    previous_gens: Mapping[str, Sequence[Record]], sample_size: int, *, seed: int = 0
) -> list[Record]:
    """Draw records of earlier generations, as evenly from each as they have them.

    The sample of a generation depends on its own name, records and share alone, so that another
    generation in the line does not change it.

    Args:
        previous_gens: The training records of each earlier generation, by its name.
        sample_size: How many in all; all there are where there are fewer.
        seed: Of the sample.

    Returns:
        Records, generation after generation; none of none, and none twice.

    Raises:
        ConchError: The size is negative, or there are generations but no record in any.
    """
    if sample_size < 0:
        raise ConchError(f"a replay of {sample_size} records cannot be drawn: give 0 or more")
    counts = {name: len(records) for name, records in previous_gens.items()}
    if sample_size and counts and not any(counts.values()):
        raise ConchError(
            f"replay is empty: {', '.join(counts)} kept no training records. Give a share of 0 "
            "to go on without replay"
        )
    drawn: list[Record] = []
    for name, share in _shares(counts, sample_size).items():
        records = previous_gens[name]
        number = int(content_digest(name, str(seed))[:15], 16)
        chosen = np.random.default_rng(number).permutation(len(records))[:share]
        drawn += [records[index] for index in np.sort(chosen)]
    return drawn


def _shares(counts: Mapping[str, int], sample_size: int) -> dict[str, int]:
    """How many to draw of each: equally many, and what one lacks from those that have more."""
    shares = dict.fromkeys(counts, 0)
    left = min(sample_size, sum(counts.values()))
    while left:
        open_names = [name for name in counts if shares[name] < counts[name]]
        each = left // len(open_names)
        # What does not divide goes to the first, one each, when all have had the same.
        for name in open_names if each else open_names[:left]:
            shares[name] += min(max(each, 1), counts[name] - shares[name])
        left = min(sample_size, sum(counts.values())) - sum(shares.values())
    return shares


class ReplayBatches(ExampleBatches):
    """A stream of batches of new examples with a share of replayed ones in every epoch.

    An epoch has every new example once and as many replayed ones as make the share; these go
    round, so that all of them have been seen before one comes again.

    Args:
        examples: New ones.
        replay: Of earlier generations.
        batch_size: Examples per batch.
        share: Of the replayed ones in an epoch, at least 0 and below 1.
        seed: Of all orders.

    Raises:
        ConchError: The share lies elsewhere, there is nothing to replay for it, or there are
            fewer examples than a batch holds.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        replay: Sequence[Example],
        batch_size: int,
        *,
        share: float = 0.1,
        seed: int,
    ) -> None:
        if not 0 <= share < 1:
            raise ConchError(f"replay share {share:g} is not at least 0 and below 1, such as 0.1")
        if share and not replay:
            raise ConchError(
                f"a replay share of {share:g} needs examples of earlier generations, and there "
                "are none: give a share of 0, or earlier data"
            )
        super().__init__([*examples, *replay], batch_size, seed=seed)
        self.new_count = len(examples)
        self.replay_count = len(replay)
        self.share = share
        self.per_epoch = round(share / (1 - share) * len(examples)) if replay else 0
        if len(examples) + self.per_epoch < batch_size:
            raise ConchError(
                f"{len(examples)} new and {self.per_epoch} replayed examples do not fill one "
                f"batch of {batch_size}: give more data or a smaller --batch-size"
            )
        self._round = lru_cache(maxsize=2)(self._draw_round)

    def _draw_round(self, number: int) -> np.ndarray:
        return np.random.default_rng([self.seed, number, 1]).permutation(self.replay_count)

    def replayed(self, epoch: int) -> np.ndarray:
        """Which of the replayed examples an epoch holds, counted from 0."""
        places = np.arange(epoch * self.per_epoch, (epoch + 1) * self.per_epoch)
        rounds, within = places // max(1, self.replay_count), places % max(1, self.replay_count)
        indices = [self._round(int(n))[at] for n, at in zip(rounds, within, strict=True)]
        return np.array(indices, np.int64)

    def _draw(self, epoch: int) -> list[np.ndarray]:
        indices = np.concatenate([np.arange(self.new_count), self.new_count + self.replayed(epoch)])
        lengths = [len(self.examples[index].ids) for index in indices]
        batches = bucketed_batches(lengths, self.batch_size, seed=self.seed, epoch=epoch)
        return [indices[batch] for batch in batches]

    @property
    def digest(self) -> str:
        """Content address of the stream: the examples, which are replayed, the share, the seed."""
        return content_digest(super().digest, str(self.new_count), f"{self.share:.17g}")

    @property
    def batches_per_epoch(self) -> int:
        """How many whole batches an epoch has."""
        return (self.new_count + self.per_epoch) // self.batch_size
