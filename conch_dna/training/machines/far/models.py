"""What a server says of texts, in the place of a model in memory: targets and answers.

Knows OpenAI's completions, through the official client, and what `conch-dna teach serve` adds to
them; nothing of students. Servers of others stand in others.py.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypedDict, Unpack

import numpy as np

from conch_dna.screen.progress import Report
from conch_dna.training.batches import Example, sequential_batches
from conch_dna.training.data.outcomes import TargetIdentity
from conch_dna.training.machines.far.wire import asked_of, counted_runs, unpacked
from conch_dna.web.client import ApiClient, plain_fields

# Requests under way at once.
AT_ONCE = 4


class Served(Protocol):
    """A teacher behind a server, see `teacher.ServedTeacher`."""

    api: ApiClient

    @property
    def served_name(self) -> str:
        """What the server calls it."""

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer, as mlx_lm wraps it."""


class Draw(TypedDict):
    """How answers are drawn, see `answers.answer_batch`."""

    max_tokens: int
    temperature: float
    seed: Sequence[int]


class StandIn(ABC):
    """What stands for a teacher where a `LanguageModel` of this process would be."""

    @abstractmethod
    def targets(
        self,
        examples: Sequence[Example],
        identity: TargetIdentity,
        *,
        batch_size: int,
        report: Report,
    ) -> list[dict[str, np.ndarray]]:
        """As `outcomes.compute_targets`."""

    @abstractmethod
    def answers(self, prompts: Sequence[Sequence[int]], **draw: Unpack[Draw]) -> list[list[int]]:
        """As `answers.answer_batch`."""


class FarModel(StandIn):
    """A teacher behind a server.

    Args:
        teacher: Whose server is asked.
    """

    def __init__(self, teacher: Served) -> None:
        self.teacher = teacher

    def require(self, identity: TargetIdentity) -> None:
        """Refuse targets that the server cannot give.

        Raises:
            ConchError: It cannot.
        """

    def targets(
        self,
        examples: Sequence[Example],
        identity: TargetIdentity,
        *,
        batch_size: int,
        report: Report,
    ) -> list[dict[str, np.ndarray]]:
        """As `outcomes.compute_targets`; some batches are under way at once."""
        results: list[dict[str, np.ndarray]] = [{} for _ in examples]
        batches = sequential_batches(examples, batch_size)

        def ask(indices: np.ndarray) -> tuple[np.ndarray, list[dict[str, np.ndarray]]]:
            return indices, self._score([examples[i] for i in indices], identity)

        for indices, found in in_order(ask, batches):
            for index, arrays in zip(indices, found, strict=True):
                results[index] = {
                    name: value.astype(identity.id_type) if name.endswith("_ids") else value
                    for name, value in arrays.items()
                }
            report("advance", {"by": sum(examples[i].count for i in indices)})
        return results

    @abstractmethod
    def _score(
        self, examples: Sequence[Example], identity: TargetIdentity
    ) -> list[dict[str, np.ndarray]]:
        """The targets of a batch."""

    def complete(self, prompts: Any, **more: Any) -> list[dict[str, Any]]:
        """The choices of a completion, one of each prompt."""
        api = self.teacher.api
        with api.explained():
            answer = api.client.completions.create(
                model=self.teacher.served_name, prompt=prompts, **more
            )
            choices = plain_fields(answer).get("choices")
        count = len(prompts) if prompts and not isinstance(prompts[0], int) else 1
        by_index = {
            choice.get("index"): choice
            for choice in (choices if isinstance(choices, list) else ())
            if isinstance(choice, dict)
        }
        if by_index.keys() != set(range(count)):
            raise api.foreign()
        return [by_index[index] for index in range(count)]


def in_order(work: Callable[[Any], Any], items: Sequence[Any]) -> Any:
    """What a function makes of items, several at once, in their order."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        waiting = [pool.submit(work, item) for item in items]
        try:
            for future in waiting:
                yield future.result()
        finally:
            # After a failure or Ctrl-C, what has not begun is not asked for.
            for future in waiting:
                future.cancel()


class OwnScores(FarModel):
    """By a server of `conch-dna teach serve`: what a local teacher would give."""

    def _score(
        self, examples: Sequence[Example], identity: TargetIdentity
    ) -> list[dict[str, np.ndarray]]:
        asked = {**asked_of(identity), "counted": [counted_runs(each) for each in examples]}
        choices = self.complete(
            [each.ids.tolist() for each in examples],
            max_tokens=0,
            extra_body={"conch": {"targets": asked}},
        )
        return [
            unpacked(_conch(choice).get("targets"), identity, each.count, self._server)
            for choice, each in zip(choices, examples, strict=True)
        ]

    def answers(self, prompts: Sequence[Sequence[int]], **draw: Unpack[Draw]) -> list[list[int]]:
        """As `answers.answer_batch`, with the same draws."""
        choices = self.complete(
            [list(ids) for ids in prompts],
            max_tokens=draw["max_tokens"],
            temperature=draw["temperature"],
            extra_body={"conch": {"seed": list(draw["seed"])}},
        )
        found = [ids_of(_conch(choice).get("ids")) for choice in choices]
        if None in found:
            raise self.teacher.api.foreign()
        return [ids for ids in found if ids is not None]

    @property
    def _server(self) -> str:
        return self.teacher.api.name


def _conch(choice: dict[str, Any]) -> dict[str, Any]:
    found = choice.get("conch")
    return found if isinstance(found, dict) else {}


def ids_of(value: Any) -> list[int] | None:
    """A list of token ids; None for anything else."""
    sound = isinstance(value, list) and all(type(each) is int and each >= 0 for each in value)
    return list(value) if sound else None
