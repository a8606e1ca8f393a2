"""Completions with log-probabilities, as OpenAI's API, vLLM and a far student ask for them.

Knows requests as JSON and a loaded model; nothing of HTTP or threads. To support another parameter:
a field of `CompletionRequest`.
"""

import math
import secrets
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from conch_dna.language_model import LanguageModel
from conch_dna.screen.progress import silent
from conch_dna.training.batches import Example
from conch_dna.training.data.answers import answer_batch, answer_text
from conch_dna.training.data.outcomes import TargetIdentity, compute_targets
from conch_dna.training.machines.far.wire import example_of, packed
from conch_dna.web.door import ApiError, json_object

# Token ids and runs of a request.
MOST_VALUES = 400_000
MOST_PROMPTS = 256
# Log-probabilities of a position; a target may keep more.
MOST_LOGPROBS = 1_024
# Numbers that a reply may hold.
MOST_NUMBERS = 8_000_000
MOST_PROBLEMS = 8
# Of clients, for the provider's own records.
_IGNORED = ("user", "metadata", "store")
# What may be said, and changes nothing at this value.
_NEUTRAL: dict[str, Any] = {
    "n": 1,
    "best_of": 1,
    "stream": False,
    "top_p": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logit_bias": {},
    "suffix": "",
    "stop": [],
}


Token = Annotated[int, Field(ge=0, lt=2**31)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class _Targets(_Strict):
    """Soft targets of the prompts, see `wire.asked_of`."""

    top_k: int = Field(ge=0, lt=2**20)
    temperatures: list[float] = Field(max_length=64)
    kept_below: int = Field(ge=1, lt=2**31)
    draws: int = Field(default=0, ge=0, lt=2**16)
    counted: list[list[Annotated[list[Token], Field(min_length=2, max_length=2)]]]


class _Conch(_Strict):
    targets: _Targets | None = None
    seed: list[int] | None = Field(default=None, max_length=8)


class CompletionRequest(_Strict):
    """A completion that was asked for, in the API's own fields and vLLM's."""

    model: str
    prompt: str | list[str] | list[Token] | list[list[Token]]
    max_tokens: int = Field(default=16, ge=0, lt=2**31)
    temperature: float = Field(default=1.0, ge=0, le=10)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)
    add_special_tokens: bool = True
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    conch: _Conch = _Conch()

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """Each of them."""
        given: Any = self.prompt
        return [given] if isinstance(given, str) or (given and type(given[0]) is int) else given


def parse_completion(body: bytes) -> CompletionRequest:
    """Read a request.

    Raises:
        ApiError: It is no JSON object, or something of it is not supported or out of its range.
    """
    fields = {
        name: value
        for name, value in json_object(body, most_values=MOST_VALUES).items()
        if value is not None
        and name not in _IGNORED
        and not (name in _NEUTRAL and value == _NEUTRAL[name])
    }
    try:
        return CompletionRequest.model_validate(fields)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        told = [
            f"{'.'.join(map(str, each['loc']))}: {each['msg']}"
            for each in found
            if each["loc"][0] != "prompt" or each["type"] == "missing"
        ]
        if len(told) < len(found):
            told.append("prompt: give a text, a list of texts, token ids or a list of such lists")
        more = f"; and {len(told) - MOST_PROBLEMS} more" if len(told) > MOST_PROBLEMS else ""
        raise ApiError(400, "; ".join(told[:MOST_PROBLEMS]) + more) from None


class Completions:
    """Answers of a model.

    Args:
        model: Loaded.
        name: What the API calls it.
        memory: Megabytes for logits and what is made of them.
        most_tokens: Tokens of a request's prompts, and of its answers.
    """

    def __init__(self, model: LanguageModel, name: str, *, memory: float, most_tokens: int) -> None:
        self.model = model
        self.name = name
        self._memory = memory
        self._most_tokens = most_tokens

    def answer(
        self, asked: CompletionRequest, check: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        """The reply to a request, as JSON can hold it.

        Args:
            asked: The request.
            check: Called after each token; what it raises ends the work.

        Raises:
            ApiError: Another model is asked for, or more than this one takes.
            ConchError: The model cannot read it.
        """
        if asked.model != self.name:
            raise ApiError(
                404,
                f"there is no model {asked.model!r}: there is {self.name}",
                param="model",
                code="model_not_found",
            )
        texts = self._ids_of(asked)
        seeds, wanted = asked.conch.seed, asked.conch.targets
        if seeds is None:
            seeds = [secrets.randbelow(2**32) if asked.seed is None else asked.seed]
        answers: list[list[int]] = [[] for _ in texts]
        if asked.max_tokens:
            answers = answer_batch(
                self.model,
                texts,
                max_tokens=asked.max_tokens,
                temperature=asked.temperature,
                seed=seeds,
                check=check,
            )
        choices = [
            self._choice(number, ids, answer, asked)
            for number, (ids, answer) in enumerate(zip(texts, answers, strict=True))
        ]
        if wanted is not None:
            for choice, arrays in zip(choices, self._targets(texts, wanted), strict=True):
                choice["conch"]["targets"] = packed(arrays)
        prompt_tokens, tokens = sum(map(len, texts)), sum(map(len, answers))
        return {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.name,
            "choices": choices,
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": tokens,
                "total_tokens": prompt_tokens + tokens,
            },
        }

    def _ids_of(self, asked: CompletionRequest) -> list[list[int]]:
        prompts = asked.prompts
        if not prompts or len(prompts) > MOST_PROMPTS:
            raise ApiError(400, f"{len(prompts)} prompts: give 1 to {MOST_PROMPTS}")
        texts, source = list[list[int]](), self.model.source
        for number, prompt in enumerate(prompts, 1):
            ids = prompt
            if isinstance(prompt, str):
                ids = source.tokenizer.encode(prompt, add_special_tokens=asked.add_special_tokens)
            texts.append(list(ids))  # type: ignore[arg-type]
            longest = source.context_length or 2**31
            if not ids or len(ids) > longest:
                raise ApiError(
                    400, f"prompt {number} has {len(ids):,} tokens: give 1 to {longest:,}"
                )
            if asked.max_tokens and len(ids) >= longest:
                raise ApiError(
                    400, f"prompt {number} fills the context of {longest:,} tokens: shorten it"
                )
            source.require_rows(texts[-1], f"prompt {number}")
        total = sum(map(len, texts)) + len(texts) * asked.max_tokens
        if total > self._most_tokens:
            raise ApiError(
                400,
                f"prompts and answers may have {total:,} tokens together, and a request "
                f"{self._most_tokens:,}: ask for less at once, or raise --max-request-tokens of "
                "the server",
            )
        top = max(asked.logprobs or 0, asked.prompt_logprobs or 0)
        if targets := asked.conch.targets:
            top = max(top, targets.top_k, targets.draws)
        if total * top > MOST_NUMBERS or top > source.vocabulary_size:
            raise ApiError(
                400,
                f"{top} log-probabilities of up to {total:,} tokens: the reply may hold "
                f"{MOST_NUMBERS:,}, and the model has {source.vocabulary_size:,} tokens; ask for "
                "less",
            )
        return texts

    def _targets(self, texts: list[list[int]], wanted: _Targets) -> list[dict[str, np.ndarray]]:
        if len(wanted.counted) != len(texts):
            raise ApiError(
                400, f"{len(texts)} prompts, and {len(wanted.counted)} times what counts"
            )
        examples = [
            example_of(ids, runs, f"prompt {number}")
            for number, (ids, runs) in enumerate(zip(texts, wanted.counted, strict=True), 1)
        ]
        if wanted.top_k and not (wanted.temperatures and wanted.top_k <= wanted.kept_below):
            raise ApiError(
                400, f"top_k is {wanted.top_k}: give temperatures, and a kept_below of that or more"
            )
        if wanted.draws and len(wanted.temperatures) != 1:
            raise ApiError(400, "draws need one temperature")
        sound = [math.isfinite(t) and 1e-3 <= t <= 1e3 for t in wanted.temperatures]
        if not all(sound):
            raise ApiError(
                400, f"temperatures are {wanted.temperatures}: give such of 0.001 to 1000"
            )
        size = self.model.source.vocabulary_size
        if wanted.kept_below > size:
            raise ApiError(400, f"the model has {size:,} tokens: keep no others")
        temperatures = tuple(wanted.temperatures) if wanted.top_k or wanted.draws else ()
        return self._computed(
            examples,
            top_k=wanted.top_k,
            temperatures=temperatures,
            kept_below=wanted.kept_below,
            draws=wanted.draws,
        )

    def _computed(self, examples: Sequence[Example], **asked: Any) -> list[dict[str, np.ndarray]]:
        size = self.model.source.vocabulary_size
        fields = {"kept_below": size, "vocabulary_size": size, **asked}
        return compute_targets(
            self.model,
            examples,
            TargetIdentity(teacher="", tokenizer="", **fields),
            batch_size=len(examples),
            memory=self._memory,
            report=silent,
        )

    def _choice(
        self, number: int, ids: list[int], answer: list[int], asked: CompletionRequest
    ) -> dict[str, Any]:
        tokenizer = self.model.tokenizer
        text, reason = answer_text(tokenizer, ids, answer)
        echoed = tokenizer.decode(ids) if asked.echo else ""
        choice: dict[str, Any] = {
            "index": number,
            "text": echoed + text,
            "finish_reason": reason,
            "logprobs": None,
            "conch": {"ids": answer},
        }
        if asked.return_token_ids:
            choice["token_ids"] = answer
        if asked.prompt_logprobs is not None:
            choice["prompt_logprobs"] = [
                None if row is None else {str(token): {"logprob": value} for token, value in row}
                for row, _ in self._scored(ids, 1, asked.prompt_logprobs)
            ]
        if asked.logprobs is not None:
            whole, first = [*ids, *answer], 0 if asked.echo else len(ids)
            rows = self._scored(whole, max(1, first), asked.logprobs)[first:]

            def name(token: int) -> str:
                by_id = asked.return_tokens_as_token_ids
                return f"token_id:{token}" if by_id else str(tokenizer.decode([token]))

            choice["logprobs"] = {
                "tokens": [name(token) for token in whole[first:]],
                "token_logprobs": [own for _, own in rows],
                "top_logprobs": [
                    None if row is None else {name(token): value for token, value in row}
                    for row, _ in rows
                ],
            }
        return choice

    def _scored(
        self, ids: list[int], first: int, top: int
    ) -> list[tuple[list[tuple[int, float]] | None, float | None]]:
        """Of each token from `first` on the likeliest ones, itself among them, and its own."""
        found: list[tuple[list[tuple[int, float]] | None, float | None]] = [(None, None)] * len(ids)
        if len(ids) <= first:
            return found
        example = example_of(ids, [[first, len(ids)]], "the text")
        (arrays,) = self._computed([example], top_k=max(1, top), temperatures=(1.0,))
        for place in range(first, len(ids)):
            row = place - first
            own = float(arrays["gold_log_prob"][row])
            kept = zip(
                arrays["kept_ids"][row, :top].tolist(),
                arrays["kept_log_probs"][row, :top].tolist(),
                strict=True,
            )
            pairs = dict(kept) | {ids[place]: own}
            found[place] = (list(pairs.items()), own)
        return found
