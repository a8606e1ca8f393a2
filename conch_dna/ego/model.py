"""EGO, the big teacher as a service: it answers, makes examples, scores and corrects.

Knows a local model or an API, and prompts; nothing of students, training or who asks. EGO is
loaded when it is first needed. One thread at a time may use a local model. To let EGO do something
else: a method of `EgoModel`, or a figure of a text in `TextScore`.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, Self

from conch_dna.ego.decoding import Decoding
from conch_dna.ego.drafting import Draft
from conch_dna.ego.endpoint import Endpoint
from conch_dna.ego.grammars import Grammars
from conch_dna.ego.prompts import checked_prompt
from conch_dna.ego.settings import Correction, EgoAnswer, EgoConfig, TextScore
from conch_dna.errors import ConchError, EgoUnavailableError
from conch_dna.language_model import LanguageModel, ModelSource
from conch_dna.training.batches import Example
from conch_dna.training.chats.conversations import Prompt, prompt_turns
from conch_dna.training.cross_tokenizer.token_bytes import token_bytes
from conch_dna.training.data.answers import (
    TextStream,
    answer_batch,
    answer_text,
    generate_answers,
)
from conch_dna.training.data.records import Record, tokenize_record
from conch_dna.training.distillation import DOMAIN_PROMPTS
from conch_dna.training.evaluation import token_scores
from conch_dna.training.settings import KDConfig, validate_domain

_CORRECTION = """{request}

An earlier answer to this was not good enough.

The earlier answer:
{output}

What is wrong with it:
{problem}

Write the answer that should have been given: the whole of it, in the form that was asked for, \
without a word about the earlier one."""


class EgoModel:
    """The big teacher.

    A local model teaches by its distributions. An API gives text alone, so it teaches by text,
    and `score` and exact tokens are not to be had from it.

    Args:
        config: Which teacher, and how it answers; `EgoConfig()` by default. Nothing is loaded.
    """

    def __init__(self, config: EgoConfig | None = None) -> None:
        self.config = config or EgoConfig()
        self._endpoint: Endpoint | None = None
        self._model: LanguageModel | None = None

    @property
    def model_id(self) -> str:
        """What files and messages call EGO."""
        return self.config.name

    @property
    def teaches(self) -> Literal["distributions", "text"]:
        """What a student can learn from."""
        return "text" if self.config.is_endpoint else "distributions"

    @property
    def loaded(self) -> bool:
        """Whether the model is in memory, or the connection to the API is made."""
        return self._endpoint is not None or self._model is not None

    @cached_property
    def source(self) -> ModelSource:
        """The local model's folder and tokenizer, which need no weights in memory.

        Raises:
            EgoUnavailableError: It is not here and cannot be had.
            ConchError: EGO is an API.
        """
        if self.config.is_endpoint:
            raise ConchError(
                f"{self.model_id} is an API, which gives neither tokens nor distributions: name a "
                "local model or a hub id"
            )
        try:
            return ModelSource(self.config.model, trust_remote_code=self.config.trust_remote_code)
        except ConchError as error:
            raise self._unavailable(error) from error

    def load(self) -> None:
        """Load the weights, or make ready to ask the API, which is not asked yet.

        Raises:
            EgoUnavailableError: The model cannot be had or loaded.
            ConchError: The key of the API would travel unencrypted to another machine.
        """
        if self.config.is_endpoint:
            self._endpoint = self._endpoint or Endpoint(self.config)
            return
        source = self.source
        try:
            self._model = source.resident()
        except ConchError as error:
            raise self._unavailable(error) from error

    def unload(self) -> None:
        """Give the weights' memory back, or close the connections."""
        if self._endpoint is not None:
            self._endpoint.close()
            self._endpoint = None
        if self._model is not None:
            self._model = None
            self.source.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.unload()

    def generate(
        self,
        prompt: Prompt,
        *,
        system: str = "",
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
    ) -> str:
        """The answer to one prompt; arguments and errors are those of `generate_many`."""
        answers = self.generate_many(
            [prompt], system=system, max_tokens=max_tokens, temperature=temperature, seed=seed
        )
        return answers[0].text

    def generate_many(
        self,
        prompts: Sequence[Prompt],
        *,
        system: str = "",
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        draft: Draft | None = None,
        check: Callable[[], None] = lambda: None,
        schema: str | None = None,
    ) -> list[EgoAnswer]:
        """Answer prompts, `config.batch_size` at once.

        Args:
            prompts: Each a text, or a conversation of messages with role and content.
            system: System prompt of all; may be empty.
            max_tokens: Longest answer; shorter where the context ends. The configuration's where
                it is None, like the next two.
            temperature: 0 takes the likeliest token.
            seed: Of the draw, which also depends on which prompts share a batch, and on whether
                one is drafted.
            draft: Who drafts the answer of a local model to a single prompt, where it can; several
                are answered together instead.
            check: Called after each token of a local model; what it raises ends the work.
            schema: A JSON schema as JSON text. A local model can say nothing else, one answer after
                the other and without a draft; an API is asked for it, where it knows how.

        Returns:
            The answers in the order of the prompts.

        Raises:
            EgoUnavailableError: EGO cannot be loaded or reached.
            ConchError: A prompt is none or too long, or a value out of range; nothing was asked.
        """
        if isinstance(prompts, str):
            raise ConchError("generate_many takes several prompts: put the one in a list")
        config = self._drawn(max_tokens, temperature, seed)
        conversations = [prompt_turns(prompt, system) for prompt in prompts]
        if config.is_endpoint:
            return self._remote().answers(conversations, config, schema)
        encoded = self._encoded(conversations)
        if schema is not None or (draft is not None and len(encoded) == 1):
            return [
                self._decoded(ids, self._decoding(ids, config, draft, check, schema))
                for ids in encoded
            ]
        answers: list[EgoAnswer] = []
        for start in range(0, len(encoded), config.batch_size):
            batch = encoded[start : start + config.batch_size]
            drawn = answer_batch(
                self._local(),
                batch,
                max_tokens=config.max_tokens,
                temperature=config.temperature,
                seed=(config.seed, start),
                check=check,
            )
            answers += [self._answer(ids, new) for ids, new in zip(batch, drawn, strict=True)]
        return answers

    def _decoded(self, ids: list[int], decoding: Decoding) -> EgoAnswer:
        for _ in decoding:
            pass
        return self._answer(ids, decoding.tokens, decoding)

    def _decoding(
        self,
        ids: list[int],
        config: EgoConfig,
        draft: Draft | None,
        check: Callable[[], None],
        schema: str | None,
    ) -> Decoding:
        matcher = self._grammars.matcher(schema) if schema is not None else None
        return Decoding(self._local(), ids, config, draft, check, matcher)

    def check_schema(self, schema: str) -> None:
        """Refuse a schema to which a local model cannot keep; from any thread.

        Raises:
            EgoUnavailableError: EGO is not here.
            ConchError: It is one, see `Grammars.matcher`.
        """
        if not self.config.is_endpoint:
            self._grammars.matcher(schema)

    @cached_property
    def _grammars(self) -> Grammars:
        return Grammars(self.source.tokenizer)

    def stream(
        self,
        prompt: Prompt,
        *,
        system: str = "",
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        draft: Draft | None = None,
        check: Callable[[], None] = lambda: None,
        schema: str | None = None,
    ) -> Generator[str, bool | None, EgoAnswer]:
        """Pieces of the text that `generate_many` gives for one prompt, as they come.

        Arguments and errors are those of `generate_many`. Arguments are checked at once, and the
        model is loaded with the first piece. Sent True, it ends there.

        Returns:
            The answer as far as it came.
        """
        config = self._drawn(max_tokens, temperature, seed)
        turns = prompt_turns(prompt, system)
        if config.is_endpoint:
            return self._remote().stream(turns, config, schema)
        [ids] = self._encoded([turns])
        if schema is not None:
            self.check_schema(schema)
        return self._local_stream(ids, partial(self._decoding, ids, config, draft, check, schema))

    def _local_stream(
        self, ids: list[int], begin: Callable[[], Decoding]
    ) -> Generator[str, bool | None, EgoAnswer]:
        decoding, tokenizer = begin(), self.source.tokenizer
        text, enough = TextStream(tokenizer, ids), None
        for token in decoding:
            if token not in tokenizer.eos_token_ids and (piece := text.add(token)):
                enough = yield piece
            if enough:
                break
        if not enough and (rest := text.end()):
            yield rest
        return self._answer(ids, decoding.tokens, decoding)

    def generate_distillation_example(self, domain: str, prompt: str) -> Record:
        """A training record with EGO's answer to a prompt of a domain.

        It has the exact `tokens` of a local model, as `answers.generate_answers` leaves them.

        Args:
            domain: One of DOMAIN_PROMPTS, or a new name, which has no system prompt.
            prompt: What a user asks.

        Raises:
            EgoUnavailableError: EGO cannot be loaded or reached.
            ConchError: The name is not a plain one, or the prompt too long.
        """
        from tempfile import TemporaryDirectory

        system = _system(domain)
        turns = prompt_turns(prompt, system)
        if self.config.is_endpoint:
            answer = self._remote().answer(turns, self.config)
            turn = {"role": "assistant", "content": answer.text}
            return {"messages": [*turns, turn], "finish_reason": answer.finish_reason}
        ids = self._encoded([turns])[0]
        config = KDConfig(
            max_tokens=min(self.config.max_tokens, self._context - len(ids)),
            max_seq_length=self._context,
            sampling_temperature=self.config.temperature,
            seed=self.config.seed,
        )
        self._local()
        with TemporaryDirectory(prefix="conch_dna_ego_") as folder:
            records = generate_answers(
                self.source, [prompt], system=system, config=config, folder=Path(folder)
            )
        return records[0]

    def correct_failure(self, domain: str, input: Prompt, output: str, problem: str) -> Correction:
        """A better answer than one that failed.

        Args:
            domain: Whose answer failed, for its system prompt.
            input: What was asked.
            output: The answer that failed; may be empty.
            problem: What was wrong with it, in words.

        Raises:
            EgoUnavailableError: EGO cannot be loaded or reached.
            ConchError: No problem is named, or EGO has nothing to say.
        """
        if not problem.strip():
            raise ConchError("a correction needs its problem: say what is wrong with the answer")
        *earlier, last = prompt_turns(input, "")
        request = _CORRECTION.format(
            request=last["content"], output=output.strip() or "(nothing)", problem=problem.strip()
        )
        answer = self.generate_many(
            [[*earlier, {**last, "content": request}]], system=_system(domain)
        )[0]
        if not answer.text.strip():
            raise ConchError(
                f"EGO {self.model_id} gave an empty correction: raise max_tokens, or say more of "
                "the problem"
            )
        return Correction(answer.text, problem, domain, input, answer.finish_reason)

    def score(self, texts: Sequence[str | Record]) -> list[TextScore]:
        """Log-probability of every token of texts, at temperature 1.

        Args:
            texts: Plain texts, or records, of which only the answers' tokens count.

        Returns:
            Scores in the order of the texts.

        Raises:
            EgoUnavailableError: The model cannot be loaded.
            ConchError: EGO is an API, a text is empty or longer than the context, or the tokenizer
                does not list its tokens.
        """
        if isinstance(texts, str):
            raise ConchError("score takes several texts: put the one in a list")
        examples = [self._example(text, number) for number, text in enumerate(texts, 1)]
        self._require_room([example.ids for example in examples], "text", answer=0)
        if not examples:
            return []
        model = self._local()
        pieces = token_bytes(model.tokenizer).texts
        text_scores = []
        scores = token_scores(model, examples, batch_size=self.config.batch_size)
        for example, score in zip(examples, scores, strict=True):
            ids = example.ids[example.counted].tolist()
            text_scores.append(
                TextScore(
                    token_ids=tuple(ids),
                    log_probs=tuple(score.log_probs.tolist()),
                    pieces=tuple(pieces[token] for token in ids),
                    text_bytes=example.text_bytes,
                )
            )
        return text_scores

    def _example(self, text: str | Record, number: int) -> Example:
        record: Record = {"text": text} if isinstance(text, str) else text
        if not record.get("text", "-"):
            raise ConchError(f"text {number} is empty: there is nothing to score")
        example = tokenize_record(record, self.source.tokenizer, name=f"text {number}")
        self.source.require_rows(example.ids.tolist(), f"text {number}")
        return example

    def _drawn(
        self, max_tokens: int | None, temperature: float | None, seed: int | None
    ) -> EgoConfig:
        """The configuration with what a call gives instead."""
        draw: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        return replace(self.config, **{n: value for n, value in draw.items() if value is not None})

    def _unavailable(self, error: ConchError) -> EgoUnavailableError:
        return EgoUnavailableError(f"EGO {self.model_id} is not available: {error}")

    @property
    def _context(self) -> int:
        return self.source.context_length or 2**31

    def _local(self) -> LanguageModel:
        if self._model is None:
            self.load()
        assert self._model is not None
        return self._model

    def _remote(self) -> Endpoint:
        if self._endpoint is None:
            self.load()
        assert self._endpoint is not None
        return self._endpoint

    def _encoded(self, conversations: Sequence[list[dict[str, str]]]) -> list[list[int]]:
        encoded = [
            checked_prompt(self.source, turns, f"prompt {number}")
            for number, turns in enumerate(conversations, 1)
        ]
        self._require_room(encoded, "prompt", answer=1)
        return encoded

    def _require_room(self, texts: Sequence[Any], what: str, *, answer: int) -> None:
        for number, ids in enumerate(texts, 1):
            if not len(ids):
                raise ConchError(f"{what} {number} is empty: there is nothing to go on from")
            if len(ids) + answer > self._context:
                room = " and one more for an answer" if answer else ""
                raise ConchError(
                    f"{what} {number} has {len(ids):,} tokens{room}, and the context of "
                    f"{self.model_id} is {self._context:,}: shorten it"
                )

    def _answer(
        self, prompt: Sequence[int], answer: list[int], decoding: Decoding | None = None
    ) -> EgoAnswer:
        text, reason = answer_text(self.source.tokenizer, prompt, answer)
        told = decoding.told if decoding is not None else {}
        return EgoAnswer(text, reason, len(answer), **told)


def _system(domain: str) -> str:
    validate_domain(domain, with_own_data=True)
    known = DOMAIN_PROMPTS.get(domain)
    return known["system"] if known else ""
