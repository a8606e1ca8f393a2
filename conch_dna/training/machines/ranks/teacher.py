"""A teacher that several processes have: each computes some of its targets, or all its share of it.

Knows a model and the processes; nothing of students. What the others do for it stands in helper.py.
"""

from collections.abc import Sequence
from typing import Any, Unpack

import numpy as np

from conch_dna.language_model import LanguageModel, ModelSource
from conch_dna.screen.progress import Report
from conch_dna.training.batches import Example, sequential_batches
from conch_dna.training.data.answers import answer_batch
from conch_dna.training.data.outcomes import TargetIdentity, compute_targets
from conch_dna.training.machines.far.models import Draw, StandIn
from conch_dna.training.machines.far.wire import asked_of
from conch_dna.training.machines.ranks.group import Ranks


class SharedTeacher(ModelSource):
    """A teacher whose targets all processes compute.

    Args:
        model_id: See `ModelSource`.
        ranks: The processes.
        memory: Megabytes for logits and what is made of them.
        is_sharded: Each process holds a share of its weights, through mlx_lm.
        **options: See `ModelSource`.
    """

    def __init__(
        self, model_id: str, ranks: Ranks, *, memory: float, is_sharded: bool, **options: Any
    ) -> None:
        super().__init__(model_id, **options)
        self.ranks = ranks
        self.memory = memory
        self.is_sharded = is_sharded
        self._kept: SharedModel | None = None

    @property
    def about(self) -> dict[str, Any]:
        """What the other processes load it by."""
        return {
            "teacher": self.model_id,
            "trust_remote_code": self.trust_remote_code,
            "is_sharded": self.is_sharded,
            "memory": self.memory,
            "digest": self.weights_digest,
        }

    def resident(self) -> Any:
        """The loaded model, of which all processes have one; a student's own that is lent."""
        if self._resident is not None:
            return self._resident
        if self._kept is None:
            self.ranks.send({"do": "load", **self.about}, {})
            model = loaded(self, is_sharded=self.is_sharded)
            kind = ShardedModel if self.is_sharded else SharedModel
            self._kept = kind(self, model, self.ranks, self.memory)
        return self._kept

    def release(self) -> None:
        """Free the memory of all of them."""
        super().release()
        if self._kept is not None:
            self.ranks.send({"do": "release"}, {})
            self._kept.release()
            self._kept = None


def loaded(source: ModelSource, *, is_sharded: bool) -> LanguageModel:
    """A teacher in memory, or this process's share of it.

    Raises:
        ConchError: It cannot be shared out, or not be loaded.
    """
    if not is_sharded:
        return source.load()
    from mlx_lm.utils import sharded_load

    with source.load_errors():
        model, _ = sharded_load(
            str(source.folder), tokenizer_config={"trust_remote_code": source.trust_remote_code}
        )
    model.eval()
    return LanguageModel(source, model)


class SharedModel(StandIn):
    """A teacher that each process has whole: a batch each, in turn.

    Args:
        source: The teacher.
        model: In this process.
        ranks: All of them.
        memory: Megabytes for logits and what is made of them.
    """

    def __init__(
        self, source: ModelSource, model: LanguageModel, ranks: Ranks, memory: float
    ) -> None:
        self.source = source
        self.model = model
        self.ranks = ranks
        self.memory = memory

    def targets(
        self,
        examples: Sequence[Example],
        identity: TargetIdentity,
        *,
        batch_size: int,
        report: Report,
    ) -> list[dict[str, np.ndarray]]:
        """As `outcomes.compute_targets`."""
        message = {
            "do": "targets",
            **asked_of(identity),
            "vocabulary_size": identity.vocabulary_size,
            "batch_size": batch_size,
        }
        self.ranks.send(message, arrays_of_examples(examples))
        with self.ranks.together():
            return self.computed(examples, identity, batch_size=batch_size, report=report)

    def computed(
        self,
        examples: Sequence[Example],
        identity: TargetIdentity,
        *,
        batch_size: int,
        report: Report,
    ) -> list[dict[str, np.ndarray]]:
        """What every process does: its own share, and the sum of all."""
        size, rank = self.ranks.size, self.ranks.rank
        dealt = sequential_batches(examples, batch_size)
        own = [int(index) for indices in dealt[rank::size] for index in indices]
        found = compute_targets(
            self.model,
            [examples[index] for index in own],
            identity,
            batch_size=batch_size,
            memory=self.memory,
            report=report,
        )
        counts = [example.count for example in examples]
        ends = np.cumsum(counts)
        whole: dict[str, np.ndarray] = {}
        for name in identity.arrays:
            kind = identity.id_type if name.endswith("_ids") else np.float32
            rows = np.zeros((int(ends[-1]), *identity.row_shape(name)), kind)
            for index, arrays in zip(own, found, strict=True):
                rows[ends[index] - counts[index] : ends[index]] = arrays[name]
            whole[name] = self.ranks.gathered(rows)
        others = sum(counts) - sum(counts[index] for index in own)
        if others:
            report("advance", {"by": others})
        return [
            {name: rows[end - count : end] for name, rows in whole.items()}
            for end, count in zip(ends, counts, strict=True)
        ]

    def answers(self, prompts: Sequence[Sequence[int]], **draw: Unpack[Draw]) -> list[list[int]]:
        """As `answers.answer_batch`, in this process."""
        return answer_batch(self.model, prompts, **draw)

    def release(self) -> None:
        """Free its memory."""
        self.model.release()


class ShardedModel(SharedModel):
    """A teacher of which each process has a share: all compute everything together."""

    def computed(
        self,
        examples: Sequence[Example],
        identity: TargetIdentity,
        *,
        batch_size: int,
        report: Report,
    ) -> list[dict[str, np.ndarray]]:
        """What every process does; all have the whole result."""
        with self.ranks.watched():
            return compute_targets(
                self.model,
                examples,
                identity,
                batch_size=batch_size,
                memory=self.memory,
                report=report,
            )

    def answers(self, prompts: Sequence[Sequence[int]], **draw: Unpack[Draw]) -> list[list[int]]:
        """As `answers.answer_batch`; all draw the same."""
        seed = [str(part) for part in draw["seed"]]
        message = {"do": "answers", "prompts": [list(ids) for ids in prompts], **draw}
        self.ranks.send({**message, "seed": seed}, {})
        with self.ranks.together(), self.ranks.watched():
            return super().answers(prompts, **draw)


def arrays_of_examples(examples: Sequence[Example]) -> dict[str, np.ndarray]:
    """Examples as arrays, see `examples_of`."""
    return {
        "ids": np.concatenate([each.ids for each in examples]).astype(np.int32),
        "counted": np.concatenate([each.counted for each in examples]).astype(np.uint8),
        "lengths": np.array([len(each.ids) for each in examples], np.int32),
    }


def examples_of(arrays: dict[str, np.ndarray]) -> list[Example]:
    """The examples that `arrays_of_examples` made arrays of."""
    ends = np.cumsum(arrays["lengths"])
    return [
        Example(arrays["ids"][e - n : e], arrays["counted"][e - n : e].astype(bool), f"text {i}")
        for i, (e, n) in enumerate(zip(ends, arrays["lengths"], strict=True), 1)
    ]
