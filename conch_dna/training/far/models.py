"""What a server says of texts, in the place of a model in memory: targets and answers.

Knows OpenAI's completions, through the official client, and what `conch-dna teach serve` adds to
them; nothing of students. Another kind of server: a class beside `Scores`.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from conch_dna.checkpoints import content_digest
from conch_dna.errors import ConchError, EgoUnavailableError, one_line
from conch_dna.progress import Report
from conch_dna.training.batches import Example, sequential_batches
from conch_dna.training.data.outcomes import TargetIdentity
from conch_dna.training.far.providers import (
    TokenNames,
    from_echo,
    from_prompt_logprobs,
    outcomes_of,
)
from conch_dna.training.far.wire import asked_of, counted_runs, unpacked
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


class FarModel:
    """What stands for a far teacher where a local one would be in memory.

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

        for indices, found in _in_order(ask, batches):
            for index, arrays in zip(indices, found, strict=True):
                results[index] = {
                    name: value.astype(identity.id_type) if name.endswith("_ids") else value
                    for name, value in arrays.items()
                }
            report("advance", {"by": sum(examples[i].count for i in indices)})
        return results

    def release(self) -> None:
        """Free the memory that it takes here."""

    def _score(
        self, examples: Sequence[Example], identity: TargetIdentity
    ) -> list[dict[str, np.ndarray]]:
        raise NotImplementedError

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        temperature: float,
        seed: Sequence[int],
    ) -> list[list[int]]:
        """As `answers.answer_batch`."""
        raise NotImplementedError

    def _complete(self, prompts: Any, **more: Any) -> list[dict[str, Any]]:
        """The choices of a completion, one of each prompt."""
        api = self.teacher.api
        with api.explained():
            answer = api.client.completions.create(
                model=self.teacher.served_name, prompt=prompts, **more
            )
            choices = plain_fields(answer).get("choices")
        count = len(prompts) if prompts and not isinstance(prompts[0], int) else 1
        if not isinstance(choices, list) or len(choices) != count:
            raise api.foreign()
        return sorted(choices, key=lambda choice: choice.get("index", 0))


def _in_order(work: Callable[[Any], Any], items: Sequence[Any]) -> Any:
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
        choices = self._complete(
            [each.ids.tolist() for each in examples],
            max_tokens=0,
            extra_body={"conch": {"targets": asked}},
        )
        return [
            unpacked(_conch(choice).get("targets"), identity.arrays, each.count, self._server)
            for choice, each in zip(choices, examples, strict=True)
        ]

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        temperature: float,
        seed: Sequence[int],
    ) -> list[list[int]]:
        """As `answers.answer_batch`, with the same draws."""
        choices = self._complete(
            [list(ids) for ids in prompts],
            max_tokens=max_tokens,
            temperature=temperature,
            extra_body={"conch": {"seed": list(seed)}},
        )
        found = [_ids(_conch(choice).get("ids")) for choice in choices]
        if None in found:
            raise self.teacher.api.foreign()
        return [ids for ids in found if ids is not None]

    @property
    def _server(self) -> str:
        return self.teacher.api.name


class Scores(FarModel):
    """By a server of others, in whichever form it gives log-probabilities of a given text."""

    def __init__(self, teacher: Served) -> None:
        super().__init__(teacher)
        self._form: str | None = None
        self._names: TokenNames | None = None

    def require(self, identity: TargetIdentity) -> None:
        """Refuse what only a server of ours gives, and a server without log-probabilities."""
        name = self.teacher.api.name
        if identity.draws:
            raise ConchError(
                f"{name} gives its likeliest tokens and draws none for training: use --targets "
                "topk, or `conch-dna teach serve` there"
            )
        if any(t != 1 for t in identity.temperatures):
            raise ConchError(
                f"{name} gives log-probabilities at temperature 1 only, from which the rest at "
                "another one does not follow: use --temperature 1, or `conch-dna teach serve` there"
            )
        self._find_form(max(1, identity.top_k))

    def _find_form(self, count: int) -> str:
        """The form in which this server scores a text; asks it once."""
        if self._form is None:
            bos = self.teacher.tokenizer.encode("a b c")
            probe = Example(np.array(bos, np.int32), np.arange(len(bos)) > 0, "a probe")
            problems = []
            for form in ("prompt_logprobs", "echo"):
                try:
                    self._rows(form, probe, count)
                except EgoUnavailableError:
                    raise
                except ConchError as error:
                    problems.append(f"{form}: {one_line(error)}")
                else:
                    self._form = form
                    return form
            raise ConchError(
                f"{self.teacher.api.name} gives no log-probabilities of a given text "
                f"({'; '.join(problems)}): distil from a server that does, such as `conch-dna "
                "teach serve` or vLLM; or let it answer and learn its texts, as --data with "
                "--alpha 0 and a local teacher to measure by"
            )
        return self._form

    def _rows(
        self, form: str, example: Example, count: int
    ) -> list[tuple[dict[int, float], float]]:
        ids = example.ids.tolist()
        try:
            if form == "prompt_logprobs":
                body = {"prompt_logprobs": count, "add_special_tokens": False}
                (choice,) = self._complete(ids, max_tokens=1, temperature=0, extra_body=body)
                return from_prompt_logprobs(choice.get("prompt_logprobs"), example)
            (choice,) = self._complete(
                ids,
                max_tokens=1,
                temperature=0,
                echo=True,
                logprobs=count,
                extra_body={"return_tokens_as_token_ids": True, "add_special_tokens": False},
            )
            if self._names is None:
                self._names = TokenNames(self.teacher.tokenizer)
            return from_echo(choice.get("logprobs") or {}, example, self._names)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConchError(f"it answers in another form ({one_line(error)})") from error

    def _score(
        self, examples: Sequence[Example], identity: TargetIdentity
    ) -> list[dict[str, np.ndarray]]:
        count = max(1, identity.top_k)
        form = self._find_form(count)
        return [
            outcomes_of(
                self._rows(form, example, count),
                top_k=identity.top_k,
                kept_below=identity.kept_below,
                name=example.name,
            )
            for example in examples
        ]

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        temperature: float,
        seed: Sequence[int],
    ) -> list[list[int]]:
        """As `answers.answer_batch`, with draws of the server's own."""
        tokenizer = self.teacher.tokenizer

        def ask(number: int) -> list[int]:
            digest = content_digest(*(str(part) for part in (*seed, number)))
            (choice,) = self._complete(
                list(prompts[number]),
                max_tokens=max_tokens,
                temperature=temperature,
                seed=int(digest[:7], 16),
                extra_body={"return_token_ids": True, "add_special_tokens": False},
            )
            if (ids := _ids(choice.get("token_ids"))) is not None:
                return ids
            text = tokenizer.encode(str(choice.get("text") or ""), add_special_tokens=False)
            ended = choice.get("finish_reason") == "stop"
            return [*text, *([tokenizer.eos_token_id] if ended else [])]

        return list(_in_order(ask, range(len(prompts))))


def _conch(choice: dict[str, Any]) -> dict[str, Any]:
    found = choice.get("conch")
    return found if isinstance(found, dict) else {}


def _ids(value: Any) -> list[int] | None:
    sound = isinstance(value, list) and all(type(each) is int and each >= 0 for each in value)
    return list(value) if sound else None
