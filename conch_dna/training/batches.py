"""Which tokens count, and which examples share a batch in which order.

Knows token ids only: no text, no model, no teacher. Every order is a function of a seed and an
index, so a run can start again anywhere. To add an order: a function like `bucketed_batches`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice

import numpy as np

from conch_dna.checkpoints import content_digest
from conch_dna.errors import ConchError, number_of

LENGTH_MULTIPLE = 32
COUNTED_MULTIPLE = 128
POOL_BATCHES = 16


@dataclass(frozen=True, eq=False)
class Example:
    """One tokenised text.

    Attributes:
        ids: Token ids `[T]`, int32.
        counted: `[T]`, bool: whether the token counts *as a target*. The first never does,
            since nothing predicts it.
        name: Where it came from, for messages.
        text_bytes: UTF-8 bytes of the text whose tokens count; the same in every tokenizer.
    """

    ids: np.ndarray
    counted: np.ndarray
    name: str
    text_bytes: int = 0

    def __post_init__(self) -> None:
        if self.ids.shape != self.counted.shape:
            raise ValueError(f"{self.name}: {self.ids.shape} ids but {self.counted.shape} marks")
        if len(self.ids) and self.counted[0]:
            raise ValueError(f"{self.name}: the first token cannot count, nothing predicts it")

    @property
    def count(self) -> int:
        """How many of its tokens count."""
        return int(self.counted.sum())

    @property
    def digest(self) -> str:
        """Content address of the ids and of what counts."""
        return content_digest(self.ids.astype("<i4").tobytes(), np.packbits(self.counted).tobytes())


@dataclass(frozen=True, eq=False, kw_only=True)
class PairedExample(Example):
    """A text behind which the same tokens count for two models that read different prompts.

    Attributes:
        teacher: What the teacher reads: as many tokens of it count, the same ones in their order.
    """

    teacher: Example

    def __post_init__(self) -> None:
        super().__post_init__()
        if not np.array_equal(self.ids[self.counted], self.teacher.ids[self.teacher.counted]):
            raise ValueError(f"{self.name}: teacher and student have other tokens that count")

    @property
    def digest(self) -> str:
        """Content address of both sides."""
        return content_digest(super().digest, self.teacher.digest)


def read_by_teacher(example: Example) -> Example:
    """The tokens of an example as its teacher reads them; its own where that makes no difference.

    Its counted tokens are not the student's where the tokenizers differ.
    """
    of_teacher: Example = getattr(example, "teacher", example)
    return of_teacher


def first_counted(example: Example) -> int:
    """Place of the first token that counts: how long its prompt is."""
    return int(np.flatnonzero(example.counted)[0])


@dataclass(frozen=True, eq=False)
class Batch:
    """Arrays for one forward pass, and how many tokens of it count.

    Attributes:
        arrays: `inputs` int32 `[B, T]`; `positions` int32 `[N]`, indices into the flattened
            `[B * T]` positions whose next token counts; `labels` int32 `[N]`, those next tokens;
            `weights` float32 `[N]`, 1, or 0 for the padding of N. A source may add more `[N, …]`.
        count: Tokens that count, the sum of the weights.
        names: The examples in it, for messages.
        text_bytes: Of all of them, see `Example`.
    """

    arrays: dict[str, np.ndarray]
    count: int
    names: tuple[str, ...]
    text_bytes: int = 0


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple that is at least `number`."""
    return -(-number // multiple) * multiple


def collate(examples: Sequence[Example]) -> Batch:
    """Pad examples to one shape and list the positions that count.

    T is rounded up to a multiple of 32 and N to one of 128, so that few shapes are compiled.

    Raises:
        ConchError: Nothing in the batch counts.
    """
    count = sum(example.count for example in examples)
    names = tuple(example.name for example in examples)
    if count == 0:
        raise ConchError(f"no token counts in the batch of {', '.join(names)}: give completions")
    length = round_up(max(len(example.ids) for example in examples) - 1, LENGTH_MULTIPLE)
    padded = round_up(count, COUNTED_MULTIPLE)
    inputs = np.zeros((len(examples), length), np.int32)
    positions = np.zeros(padded, np.int32)
    labels = np.zeros(padded, np.int32)
    weights = np.zeros(padded, np.float32)
    weights[:count] = 1
    start = 0
    for row, example in enumerate(examples):
        inputs[row, : len(example.ids) - 1] = example.ids[:-1]
        targets = np.flatnonzero(example.counted)
        end = start + len(targets)
        positions[start:end] = row * length + targets - 1
        labels[start:end] = example.ids[targets]
        start = end
    arrays = {"inputs": inputs, "positions": positions, "labels": labels, "weights": weights}
    return Batch(arrays, count, names, sum(example.text_bytes for example in examples))


def bucketed_batches(
    lengths: Sequence[int], batch_size: int, *, seed: int, epoch: int
) -> list[np.ndarray]:
    """Shuffle examples into batches of similar length, anew for every epoch.

    The shuffled examples are cut into pools of 16 batches, each pool is sorted by length and cut
    into batches, and the batches are shuffled. What does not fill a batch is left out of this
    epoch; another draw is left out of the next.

    Returns:
        Arrays of `batch_size` indices.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))[: len(lengths) // batch_size * batch_size]
    lengths_array = np.asarray(lengths)
    batches: list[np.ndarray] = []
    for start in range(0, len(order), batch_size * POOL_BATCHES):
        pool = order[start : start + batch_size * POOL_BATCHES]
        pool = pool[np.argsort(lengths_array[pool], kind="stable")]
        batches.extend(pool.reshape(-1, batch_size))
    return [batches[index] for index in random.permutation(len(batches))]


class ExampleBatches:
    """An endless, seeded stream of batches of examples; batch `i` is the same in every run.

    Raises:
        ConchError: There are fewer examples than one batch holds.
    """

    def __init__(self, examples: Sequence[Example], batch_size: int, *, seed: int) -> None:
        if len(examples) < batch_size:
            raise ConchError(
                f"{number_of(len(examples), 'training example')} cannot fill one batch of "
                f"{batch_size}: give more data or a smaller --batch-size"
            )
        self.examples = examples
        self.batch_size = batch_size
        self.seed = seed
        self._epoch = lru_cache(maxsize=2)(self._draw)

    def _draw(self, epoch: int) -> list[np.ndarray]:
        lengths = [len(example.ids) for example in self.examples]
        return bucketed_batches(lengths, self.batch_size, seed=self.seed, epoch=epoch)

    @property
    def batches_per_epoch(self) -> int:
        """How many whole batches an epoch has."""
        return len(self.examples) // self.batch_size

    @property
    def digest(self) -> str:
        """Content address of the stream: the examples, the batch size and the seed."""
        parts = [example.digest for example in self.examples]
        return content_digest(*parts, str(self.batch_size), str(self.seed))

    def indices(self, index: int) -> np.ndarray:
        """Which examples batch `index` holds."""
        epoch, within = divmod(index, self.batches_per_epoch)
        return self._epoch(epoch)[within]

    def drawn(self, batches: int) -> list[Example]:
        """The examples that the first so many batches hold, each once, in that order."""
        epochs = -(-batches // self.batches_per_epoch)
        drawn = islice(chain.from_iterable(map(self._draw, range(epochs))), batches)
        return [self.examples[index] for index in dict.fromkeys(chain.from_iterable(drawn))]

    def batch(self, index: int) -> Batch:
        """Batch `index` of the stream, counted over all epochs."""
        return self.parts(index, 1)[0]

    def parts(self, index: int, count: int) -> list[Batch]:
        """Batch `index` in so many parts, none of them empty."""
        examples = [self.examples[i] for i in self.indices(index)]
        return [self.collated(examples[part::count]) for part in range(count)]

    def collated(self, examples: Sequence[Example]) -> Batch:
        """Examples as a batch."""
        return collate(examples)


def sequential_batches(
    examples: Sequence[Example], batch_size: int, limit: int = -1
) -> list[np.ndarray]:
    """Every example once, sorted by length into batches; the last may be smaller.

    Args:
        examples: What to batch.
        batch_size: Examples per batch.
        limit: Take only so many batches, spread evenly over the lengths; -1 takes all.
    """
    order = np.argsort([len(example.ids) for example in examples], kind="stable")
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if 0 <= limit < len(batches):
        chosen = np.linspace(0, len(batches) - 1, limit).round().astype(int)
        batches = [batches[i] for i in chosen]
    return batches
