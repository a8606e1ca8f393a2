"""The teacher's soft targets: computed once, compressed to K + 1 outcomes, cached by content.

Knows a loaded teacher, tokenized examples and shards; nothing of their formats, see
`data.target_shards`.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from conch_dna.checkpoints import content_digest, remove_unfinished
from conch_dna.errors import ConchError, NotWholeError
from conch_dna.language_model import LanguageModel, ModelSource
from conch_dna.screen.progress import Report, silent
from conch_dna.training.batches import (
    Batch,
    Example,
    ExampleBatches,
    collate,
    read_by_teacher,
)
from conch_dna.training.data.outcomes import (
    TARGET_ARRAYS,
    TargetIdentity,
    compute_targets,
)
from conch_dna.training.data.target_files import write_about
from conch_dna.training.data.target_shards import RoundedShard, Shard, open_shard, write_shard
from conch_dna.training.head_loss import make_distillation_loss
from conch_dna.training.machines.far.models import StandIn
from conch_dna.training.optimizer.steps import Loss
from conch_dna.training.settings import LOSS_MEMORY, KDConfig

SHARD_POSITIONS = 16_384


class SoftTargetCache:
    """Soft targets of many examples in safetensors shards, memory-mapped when read.

    Each example is addressed by the digests of the teacher, its tokenizer, the exact token ids,
    what counts, K, the temperatures and the format, so a changed data set only computes what is
    new.

    Args:
        folder: Parent; the shards lie in a sub-folder named after the identity.
        identity: See `TargetIdentity`.
        memory: Megabytes for logits and what is made of them.
        report: Gets ("warning", …) and ("advance", …).
    """

    def __init__(
        self,
        folder: Path,
        identity: TargetIdentity,
        *,
        memory: float = LOSS_MEMORY,
        report: Report = silent,
    ) -> None:
        self.identity = identity
        self.memory = memory
        self.folder = folder / identity.digest[:16]
        self.report = report
        self._places: dict[str, tuple[Shard, int, int]] = {}
        remove_unfinished(self.folder)
        self._open_all(identity)
        if identity.is_compact:
            # What another run stored as it is serves as well, rounded to as many bits.
            self._open_all(identity.exact)

    def _open_all(self, identity: TargetIdentity) -> None:
        for path in sorted((self.folder.parent / identity.digest[:16]).glob("*.safetensors")):
            self._open(path, identity)

    def _open(self, path: Path, identity: TargetIdentity) -> None:
        try:
            shard, entries = open_shard(path, identity)
        except NotWholeError as error:
            self.report("warning", {"message": f"{error}; its targets are computed again"})
            with suppress(OSError):
                path.unlink()
            return
        except ConchError as error:
            # Whoever can open it may still need it.
            self.report("warning", {"message": str(error)})
            return
        if identity != self.identity:
            shard = RoundedShard(shard, self.identity)
        for key, start, end in entries:
            self._places.setdefault(key, (shard, start, end))

    @property
    def digest(self) -> str:
        """Content address of what the targets depend on besides the text."""
        return self.identity.digest

    def missing(self, examples: Sequence[Example]) -> list[Example]:
        """The examples whose targets are not there, each once."""
        by_digest = {each.digest: each for each in map(read_by_teacher, examples)}
        return [each for digest, each in by_digest.items() if digest not in self._places]

    def fill(self, teacher: ModelSource, examples: Sequence[Example], *, batch_size: int) -> int:
        """Compute what is missing, a shard at a time; returns the number of examples computed.

        The teacher is loaded only if something is missing.

        Raises:
            ConchError: The disk is full, or the teacher's output is not finite.
        """
        absent = self.missing(examples)
        shard: list[Example] = []
        for number, example in enumerate(absent, 1):
            shard.append(example)
            if number == len(absent) or sum(e.count for e in shard) >= SHARD_POSITIONS:
                self._write(teacher.resident(), shard, batch_size)
                write_about(self.folder, self.identity, teacher.model_id)
                shard = []
        return len(absent)

    def _write(
        self, teacher: LanguageModel | StandIn, examples: list[Example], batch_size: int
    ) -> None:
        how: dict[str, Any] = {"batch_size": batch_size, "report": self.report}
        if isinstance(teacher, StandIn):
            results = teacher.targets(examples, self.identity, **how)
        else:
            results = compute_targets(teacher, examples, self.identity, memory=self.memory, **how)
        arrays = {name: np.concatenate([r[name] for r in results]) for name in self.identity.arrays}
        path = self.folder / f"{content_digest(*(e.digest for e in examples))[:32]}.safetensors"
        write_shard(path, self.identity, [(e.digest, e.count) for e in examples], arrays)
        self._open(path, self.identity)

    def read(self, example: Example) -> dict[str, np.ndarray]:
        """The stored arrays of one example, as its teacher reads it; see `compress`."""
        shard, start, end = self._places[read_by_teacher(example).digest]
        return shard.read(start, end)

    def gold(self, example: Example) -> np.ndarray:
        """The teacher's log-probabilities of the counted tokens `[N]`, at temperature 1."""
        return self.read(example)["gold_log_prob"]

    def outcomes(
        self, examples: Sequence[Example], temperature: float, rows: int
    ) -> dict[str, np.ndarray]:
        """The teacher's K + 1 outcomes for a batch of examples.

        Args:
            examples: In the batch's order.
            temperature: One of the identity's.
            rows: Rows to pad to, see `batches.collate`; padding repeats the first row, so that
                its loss is finite before its weight of 0 takes it away.

        Returns:
            `kept_ids` int32 `[rows, K]`; `teacher_log_probs` float32 `[rows, K + 1]`, at the
            temperature, the rest last; `gold_log_prob` float32 `[rows]` at temperature 1.
        """
        column = self.identity.temperatures.index(float(temperature))
        parts = [self.read(example) for example in examples]
        joined = {name: np.concatenate([p[name] for p in parts]) for name in TARGET_ARRAYS}
        order = np.zeros(rows, np.int64)
        order[: len(joined["kept_ids"])] = np.arange(len(joined["kept_ids"]))
        normalizer, rest = (joined[n][:, column, None] for n in ("log_normalizer", "log_rest"))
        kept = joined["kept_log_probs"] / np.float32(temperature) - normalizer
        return {
            "kept_ids": joined["kept_ids"][order].astype(np.int32),
            "teacher_log_probs": np.concatenate([kept, rest], axis=1)[order],
            "gold_log_prob": joined["gold_log_prob"][order],
        }

    def collate(self, examples: Sequence[Example], temperature: float) -> Batch:
        """A batch of examples with the teacher's outcomes beside each counted position."""
        batch = collate(examples)
        outcomes = self.outcomes(examples, temperature, len(batch.arrays["labels"]))
        return replace(batch, arrays={**batch.arrays, **outcomes})

    def loss(self, student: LanguageModel, config: KDConfig) -> Loss:
        """The loss of a student over batches of `collate`, for the trainer."""
        return make_distillation_loss(
            student,
            temperature=config.temperature,
            alpha=config.alpha,
            divergence=config.divergence,
            memory=config.loss_memory,
        )

    def evaluation_batch(self, examples: Sequence[Example]) -> Batch:
        """A batch at temperature 1 in which every counted token is a chunk of its own."""
        batch = self.collate(examples, 1.0)
        rows = len(batch.arrays["labels"])
        chunks = {
            "chunk_index": np.arange(rows, dtype=np.int32),
            "chunk_log_probs": batch.arrays["gold_log_prob"],
            "chunk_weights": batch.arrays["weights"],
            "best_ids": batch.arrays["kept_ids"][:, 0],
            "soft_weights": batch.arrays["weights"],
        }
        return replace(batch, arrays={**batch.arrays, **chunks})


class Targets(Protocol):
    """What a stream of batches and a run need of a teacher's targets."""

    identity: TargetIdentity

    @property
    def digest(self) -> str:
        """Content address of the targets."""

    def missing(self, examples: Sequence[Any]) -> list[Example]:
        """The examples whose targets are not there."""

    def fill(self, teacher: ModelSource, examples: Sequence[Any], *, batch_size: int) -> int:
        """Compute what is missing."""

    def collate(self, examples: Sequence[Any], temperature: float) -> Batch:
        """A batch of examples with their targets."""

    def loss(self, student: LanguageModel, config: KDConfig) -> Loss:
        """The loss of a student over batches of `collate`, for the trainer."""

    def evaluation_batch(self, examples: Sequence[Any]) -> Batch:
        """A batch for `evaluation.heldout_metrics`."""

    def read(self, example: Any) -> dict[str, np.ndarray]:
        """What is stored of a text: rows of the teacher's own tokens, see `compress`."""

    def gold(self, example: Any) -> np.ndarray:
        """The teacher's log-probabilities of its own tokens of a text."""


class TargetBatches(ExampleBatches):
    """A seeded stream of batches that carry the teacher's outcomes."""

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        cache: "Targets",
        *,
        temperature: float,
        seed: int,
    ) -> None:
        super().__init__(examples, batch_size, seed=seed)
        self.cache = cache
        self.temperature = temperature

    @property
    def digest(self) -> str:
        """Content address of the stream and of the targets in it."""
        return content_digest(super().digest, self.cache.digest, str(self.temperature))

    def collated(self, examples: Sequence[Example]) -> Batch:
        """Examples as a batch with their targets."""
        return self.cache.collate(examples, self.temperature)
