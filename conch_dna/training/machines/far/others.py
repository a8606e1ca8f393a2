"""A server of others in the place of a model: in whichever form it gives log-probabilities.

Knows OpenAI's completions and vLLM's addition to them; nothing of HTTP or students. Another form: a
branch in `_rows`, its name in `_FORMS`, and a reader in providers.py.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from conch_dna.checkpoints import content_digest, read_json, write_json
from conch_dna.errors import ConchError, EgoUnavailableError, NotWholeError, one_line
from conch_dna.training.batches import Example, first_counted
from conch_dna.training.data.outcomes import TargetIdentity
from conch_dna.training.machines.far.models import Draw, FarModel, Served, ids_of, in_order
from conch_dna.training.machines.far.providers import (
    SMALLEST_REST,
    TokenNames,
    from_answer,
    from_echo,
    from_prompt_logprobs,
    outcomes_of,
)

# Of a given text, the first that works; else of the server's own answers only.
_FORMS = ("prompt_logprobs", "echo")
OWN_ANSWERS = "own answers"
_BY_IDS = {"return_tokens_as_token_ids": True, "add_special_tokens": False}

Row = tuple[dict[int, float], float]


class Scores(FarModel):
    """By a server of others.

    Args:
        teacher: Whose server is asked.
        folder: Where log-probabilities of its own answers are kept, where it gives no others.
    """

    def __init__(self, teacher: Served, folder: Path) -> None:
        super().__init__(teacher)
        self._folder = folder
        self._form: str | None = None
        self._kept = 0
        self._takes_extras = True
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
        self._kept = max(1, identity.top_k)
        self._find_form()

    @property
    def scores_own_answers_only(self) -> bool:
        """Whether it says nothing of a given text."""
        return self._form == OWN_ANSWERS

    def _find_form(self) -> str:
        """The form in which this server gives log-probabilities; asks it once."""
        if self._form is not None:
            return self._form
        ids = self.teacher.tokenizer.encode("a b c")
        probe = Example(np.array(ids, np.int32), np.arange(len(ids)) > 0, "a probe")
        problems = []
        for form in (*_FORMS, OWN_ANSWERS):
            try:
                if form == OWN_ANSWERS:
                    self._answer(ids, max_tokens=1, temperature=0.0, seed=0, scored=True)
                else:
                    self._rows(form, probe)
            except EgoUnavailableError:
                raise
            except ConchError as error:
                problems.append(f"{form}: {one_line(error)}")
            else:
                self._form = form
                return form
        raise ConchError(
            f"{self.teacher.api.name} gives no log-probabilities ({'; '.join(problems)}): distil "
            "from a server that does, such as `conch-dna teach serve` or vLLM; or let it answer "
            "and learn its texts, as --data with --alpha 0 and a local teacher to measure by"
        )

    def _rows(self, form: str, example: Example) -> list[Row]:
        ids = example.ids.tolist()
        try:
            if form == "prompt_logprobs":
                body = {"prompt_logprobs": self._kept, "add_special_tokens": False}
                (choice,) = self.complete(ids, max_tokens=1, temperature=0, extra_body=body)
                return from_prompt_logprobs(choice.get("prompt_logprobs"), example)
            (choice,) = self._complete_by_ids(
                ids, max_tokens=1, temperature=0, echo=True, logprobs=self._kept
            )
            return from_echo(choice.get("logprobs") or {}, example, self.names)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConchError(f"it answers in another form ({one_line(error)})") from error

    @property
    def names(self) -> TokenNames:
        """Token ids by what the server calls them."""
        if self._names is None:
            self._names = TokenNames(self.teacher.tokenizer)
        return self._names

    def _complete_by_ids(self, ids: Sequence[int], **more: Any) -> list[dict[str, Any]]:
        """A completion with what vLLM adds to it, or without, where a server takes no additions."""
        if self._takes_extras:
            extras = {**_BY_IDS, "return_token_ids": True}
            try:
                return self.complete(list(ids), extra_body=extras, **more)
            except EgoUnavailableError:
                raise
            except ConchError:
                found = self.complete(list(ids), **more)
                self._takes_extras = False
                return found
        return self.complete(list(ids), **more)

    def _score(
        self, examples: Sequence[Example], identity: TargetIdentity
    ) -> list[dict[str, np.ndarray]]:
        form = self._find_form()
        return [
            outcomes_of(
                self._kept_rows(example) if form == OWN_ANSWERS else self._rows(form, example),
                top_k=identity.top_k,
                kept_below=identity.kept_below,
                name=example.name,
            )
            for example in examples
        ]

    def answers(self, prompts: Sequence[Sequence[int]], **draw: Unpack[Draw]) -> list[list[int]]:
        """As `answers.answer_batch`, with draws of the server's own."""
        scored = self._form == OWN_ANSWERS

        def ask(number: int) -> list[int]:
            digest = content_digest(*(str(part) for part in (*draw["seed"], number)))
            ids, rows = self._answer(
                prompts[number],
                max_tokens=draw["max_tokens"],
                temperature=draw["temperature"],
                seed=int(digest[:7], 16),
                scored=scored,
            )
            if scored:
                whole = [*prompts[number], *ids]
                document = {"rows": [[list(row.items()), own] for row, own in rows]}
                write_json(self._path(whole), {"first": len(prompts[number]), **document})
            return ids

        return list(in_order(ask, range(len(prompts))))

    def _answer(
        self, prompt: Sequence[int], *, max_tokens: int, temperature: float, seed: int, scored: bool
    ) -> tuple[list[int], list[Row]]:
        """An answer's tokens, its end among them, and where it is asked for what was said of each.

        That the answer ended is all that is known of its end: there the teacher counts as sure.
        """
        more = {"logprobs": self._kept} if scored else {}
        (choice,) = self._complete_by_ids(
            prompt, max_tokens=max_tokens, temperature=temperature, seed=seed, **more
        )
        tokenizer = self.teacher.tokenizer
        text = str(choice.get("text") or "")
        ids = ids_of(choice.get("token_ids"))
        rows: list[Row] = []
        if scored:
            try:
                ids, rows = from_answer(
                    choice.get("logprobs") or {},
                    tokenizer.encode(text, add_special_tokens=False),
                    self.names,
                )
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise ConchError(f"it answers in another form ({one_line(error)})") from error
        elif ids is None:
            ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids is not None
        ends = tokenizer.eos_token_ids
        if choice.get("finish_reason") == "stop" and not (ids and ids[-1] in ends):
            ids = [*ids, tokenizer.eos_token_id]
            if scored:
                rows = [*rows, self._sure_of(tokenizer.eos_token_id)]
        return ids, rows

    def _sure_of(self, token: int) -> Row:
        others = [each for each in range(self._kept) if each != token][: self._kept - 1]
        least = math.log(SMALLEST_REST)
        own = math.log1p(-SMALLEST_REST * (len(others) + 1))
        return {token: own, **dict.fromkeys(others, least)}, own

    def _path(self, ids: Sequence[int]) -> Path:
        return self._folder / f"{content_digest(np.array(ids, np.int32))[:32]}.json"

    def _kept_rows(self, example: Example) -> list[Row]:
        """What was said of an answer of its own when it was drawn."""
        try:
            found = read_json(self._path(example.ids.tolist()), needs={"first": int, "rows": list})
            if found["first"] > first_counted(example):
                raise NotWholeError("its prompt counts")
            rows = [({int(t): float(v) for t, v in row}, float(own)) for row, own in found["rows"]]
            places = np.flatnonzero(example.counted) - found["first"]
            return [rows[place] for place in places]
        except (NotWholeError, IndexError, TypeError, ValueError) as error:
            raise ConchError(
                f"{self.teacher.api.name} gives log-probabilities of its own answers only, and "
                f"{example.name} is none of those that were drawn here: give prompts instead of "
                "data, leave out --on-policy and --train-on-prompt, or start again with --overwrite"
            ) from error
