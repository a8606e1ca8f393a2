"""The teacher answers prompts in batches: training data that it would itself write.

Knows a loaded language model, prompts and seeds; nothing of losses or students. Each batch of
answers is on disk as soon as it is there, so a stopped run goes on where it was.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import mlx.core as mx

from conch_dna.checkpoints import content_digest, read_json, remove_unfinished, write_json
from conch_dna.errors import NotWholeError
from conch_dna.language_model import LanguageModel, ModelSource
from conch_dna.screen.progress import Report, silent
from conch_dna.training.batches import Example, first_counted
from conch_dna.training.chats.conversations import (
    plain_prompt,
    prompt_ids,
    prompt_messages,
    require_room,
)
from conch_dna.training.cross_tokenizer.vocabulary import vocabulary_digest
from conch_dna.training.data.beginnings import SharedBeginning
from conch_dna.training.data.records import TOKENS, Record
from conch_dna.training.data.views import CONTEXT, asked_turns, context_of, prompt_text
from conch_dna.training.machines.far.models import StandIn
from conch_dna.training.settings import STUDENT, SYSTEMS, TEACHER, KDConfig

FORMAT = "answers 2"
SAMPLES = 3
SHORTEST_PROMPT = 4
OPENING_TOKENS = 12
# Tokens that are decoded anew with each new one, and those before them that they lean on.
_WINDOW = 16
_CONTEXT = 8
_UNFINISHED = "\ufffd"
# What `takes_unequal_rows` found, as long as the model is there.
_UNEQUAL_ROWS: WeakKeyDictionary[LanguageModel, bool] = WeakKeyDictionary()


def random_key(*parts: object) -> mx.array:
    """A random key that follows from some parts, such as a seed, alone."""
    return mx.random.key(int(content_digest(*map(str, parts))[:16], 16))


def make_sampler(
    temperature: float, vocabulary_size: int, key: mx.array
) -> Callable[[mx.array], mx.array]:
    """A sampler of real tokens only, from its own chain of random keys.

    Args:
        temperature: 0 takes the likeliest token.
        vocabulary_size: Rows of the head from here on are padding and never drawn.
        key: Start of the chain; the same key draws the same tokens.

    Returns:
        Log-probabilities `[B, rows]` to token ids `[B]`.
    """
    keys = [key]

    def sample(log_probs: mx.array) -> mx.array:
        log_probs = log_probs[..., :vocabulary_size].astype(mx.float32)
        if temperature == 0:
            return mx.argmax(log_probs, axis=-1)
        keys[0], now = mx.random.split(keys[0])
        return mx.random.categorical(log_probs / temperature, key=now)

    return sample


def answer_batch(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float,
    seed: Sequence[int],
    check: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """Answer prompts together, through mlx_lm's batch generator.

    Args:
        model: Loaded.
        prompts: Token ids of each prompt.
        max_tokens: Longest answer; shorter where the model's context ends.
        temperature: 0 takes the likeliest token.
        seed: Whole numbers that decide the draw.
        check: Called after each token; what it raises ends the work.

    Returns:
        Token ids of each answer; the end-of-sequence token is kept where the model gave one.
    """
    from mlx_lm.generate import BatchGenerator

    if len(prompts) > 1 and not takes_unequal_rows(model):
        return [
            answer
            for number, prompt in enumerate(prompts)
            for answer in answer_batch(
                model,
                [prompt],
                max_tokens=max_tokens,
                temperature=temperature,
                seed=(*seed, number),
                check=check,
            )
        ]
    key = random_key(*seed)
    generator = BatchGenerator(
        model.model,
        stop_tokens=[[token] for token in model.tokenizer.eos_token_ids],
        sampler=make_sampler(temperature, model.vocabulary_size, key),
        prefill_batch_size=len(prompts),
        completion_batch_size=len(prompts),
    )
    context = model.source.context_length or 2**31
    room = [min(max_tokens, context - len(prompt)) for prompt in prompts]
    shared = SharedBeginning(model.model, prompts, [len(prompt) - 1 for prompt in prompts])
    caches = [shared.cache(1) for _ in prompts] if shared.length else None
    order = generator.insert([[*prompt[shared.length :]] for prompt in prompts], room, caches)
    answers: dict[int, list[int]] = {uid: [] for uid in order}
    try:
        while responses := generator.next_generated():
            check()
            for response in responses:
                answers[response.uid].append(int(response.token))
    finally:
        generator.close()
    return [answers[uid] for uid in order]


def takes_unequal_rows(model: LanguageModel) -> bool:
    """Whether mlx_lm answers prompts of unequal length together.

    With Gemma-2's masks it does not: most numbers of rows are an error, and where there are as many
    rows as KV heads, each row gets another's mask in silence. Two and three rows cannot both be as
    many.
    """
    if model not in _UNEQUAL_ROWS:
        _UNEQUAL_ROWS[model] = all(_runs_together(model, rows) for rows in (2, 3))
    return _UNEQUAL_ROWS[model]


def _runs_together(model: LanguageModel, rows: int) -> bool:
    from mlx_lm.generate import BatchGenerator

    generator = BatchGenerator(
        model.model, max_tokens=2, prefill_batch_size=rows, completion_batch_size=rows
    )
    try:
        generator.insert([[0] * (2 + row) for row in range(rows)])
        while generator.next_generated():
            pass
    except ValueError:
        # Of shapes that cannot be broadcast.
        return False
    finally:
        generator.close()
    return True


def cached_answer_batch(
    teacher: ModelSource, folder: Path, prompts: Sequence[Sequence[int]], **draw: Any
) -> list[list[int]]:
    """`answer_batch` by a teacher that is loaded only if the folder lacks the answers.

    Args:
        teacher: The model's source.
        folder: Where answers are kept, addressed by all they depend on.
        prompts: Token ids of each prompt.
        **draw: max_tokens, temperature and seed, as `answer_batch` takes them.
    """
    shape = json.dumps([draw, [list(ids) for ids in prompts]], sort_keys=True)
    address = content_digest(FORMAT, teacher.weights_digest, teacher.tokenizer_digest, shape)
    path = folder / f"{address[:32]}.json"
    with suppress(NotWholeError):
        kept = read_json(path, needs={"answers": list, "digest": str})
        if kept["digest"] == content_digest(json.dumps(kept["answers"])):
            answers: list[list[int]] = kept["answers"]
            return answers
    model: LanguageModel | StandIn = teacher.resident()
    if isinstance(model, StandIn):
        answers = model.answers(prompts, **draw)
    else:
        answers = answer_batch(model, prompts, **draw)
    write_json(path, {"answers": answers, "digest": content_digest(json.dumps(answers))})
    return answers


def generate_answers(
    teacher: ModelSource,
    prompts: Sequence[str | Record],
    *,
    system: str,
    config: KDConfig,
    folder: Path,
    student_system: str | None = None,
    report: Report = silent,
) -> list[Record]:
    """Let the teacher answer every prompt; reuse what an earlier, equal run left.

    Args:
        teacher: The model's source; loaded only if answers are missing.
        prompts: What to answer, `config.samples_per_prompt` times each: texts, or objects with
            `prompt` and what only the teacher reads, its `context`.
        system: The teacher's system prompt; may be empty.
        config: Sampling, lengths and batch size.
        folder: Finished batches are kept here, addressed by all they depend on.
        student_system: That of the student, where it is another; None for the same.
        report: Gets ("advance", {"by", "note"}).

    Returns:
        Records in mlx-lm's `messages` form, or `prompt`/`completion` without a chat template,
        with `finish_reason` (stop or length) and the exact `tokens`.

    Raises:
        ConchError: A prompt leaves no room for an answer in the teacher's context.
    """
    once = [teacher_prompt_ids(teacher.tokenizer, prompt, system) for prompt in prompts]
    for number, ids in enumerate(once, 1):
        teacher.require_rows(ids, f"prompt {number}")
    longest = min(teacher.context_length or config.max_seq_length, config.max_seq_length)
    require_room(once, answer=config.max_tokens, longest=longest)
    wanted = [prompt for prompt in prompts for _ in range(config.samples_per_prompt)]
    encoded = [ids for ids in once for _ in range(config.samples_per_prompt)]
    size = config.generation_batch_size
    vocabulary = vocabulary_digest(teacher.tokenizer)
    remove_unfinished(folder)
    records: list[Record] = []
    tokens = 0
    for start in range(0, len(wanted), size):
        batch = encoded[start : start + size]
        answers = cached_answer_batch(
            teacher,
            folder,
            batch,
            max_tokens=config.max_tokens,
            temperature=config.sampling_temperature,
            seed=(config.seed, start),
        )
        for each, ids, answer in zip(wanted[start:], batch, answers, strict=False):
            exact = {"ids": [*ids, *answer], "prompt_length": len(ids), "vocabulary": vocabulary}
            systems = system, system if student_system is None else student_system
            record = _record(teacher.tokenizer, each, systems, ids, answer)
            records.append({**record, TOKENS: exact})
            tokens += len(answer)
        report("advance", {"by": len(batch), "note": f"{tokens:,} tokens"})
    return records


def teacher_prompt_ids(tokenizer: Any, prompt: str | Record, system: str) -> list[int]:
    """What a teacher is asked: a prompt behind its context, which the student will not read."""
    asked = asked_turns(prompt_text(prompt), context_of(prompt))
    return prompt_ids(tokenizer, asked, system)


def _record(
    tokenizer: Any,
    given: str | Record,
    systems: tuple[str, str],
    ids: Sequence[int],
    answer: list[int],
) -> Record:
    """An answer as a record, its system prompts the teacher's and the student's."""
    text, reason = answer_text(tokenizer, ids, answer)
    prompt, (system, student_system) = prompt_text(given), systems
    context = {CONTEXT: there} if (there := context_of(given)) else {}
    if context or system != student_system:
        # Each side's prompt is put together when it is read.
        apart = {SYSTEMS[TEACHER]: system, SYSTEMS[STUDENT]: student_system, **context}
        return {"prompt": prompt, "completion": text, **apart, "finish_reason": reason}
    if tokenizer.has_chat_template:
        turn = {"role": "assistant", "content": text}
        return {
            "messages": [*prompt_messages(tokenizer, prompt, system), turn],
            "finish_reason": reason,
        }
    plain = plain_prompt(prompt, system)
    return {"prompt": plain, "completion": text, "finish_reason": reason}


def answer_text(tokenizer: Any, prompt: Sequence[int], answer: list[int]) -> tuple[str, str]:
    """The text of an answer without its end token, and how it ended: stop or length."""
    stopped = bool(answer) and answer[-1] in tokenizer.eos_token_ids
    text = continuation_text(tokenizer, prompt, answer[:-1] if stopped else answer)
    return text, "stop" if stopped else "length"


def continuation_text(tokenizer: Any, prompt: Sequence[int], answer: Sequence[int]) -> str:
    """The text an answer adds to its prompt, a leading space included.

    Decoding the answer alone would lose that space with some tokenizers.
    """
    before = tokenizer.decode(list(prompt), skip_special_tokens=True)
    whole = tokenizer.decode([*prompt, *answer], skip_special_tokens=True)
    if whole.startswith(before):
        return str(whole[len(before) :])
    return str(tokenizer.decode(list(answer), skip_special_tokens=True))


def sample_prompts(examples: Sequence[Example]) -> list[list[int]]:
    """Beginnings of up to three examples, no two the same; see `openings`."""
    return [example.ids[:length].tolist() for example, length in openings(examples)]


def openings(examples: Sequence[Example], most: int = SAMPLES) -> list[tuple[Example, int]]:
    """A few examples, and how many tokens of each make its beginning; no two the same.

    They are the examples' prompts, or their first tokens where there is no prompt to speak of.
    """
    beginnings: dict[tuple[int, ...], tuple[Example, int]] = {}
    for example in examples:
        first = first_counted(example)
        length = first if first >= SHORTEST_PROMPT else min(OPENING_TOKENS, len(example.ids) - 1)
        length = max(1, length)
        beginnings[tuple(example.ids[:length].tolist())] = (example, length)
    return list(beginnings.values())[:most]


def sample_draw(config: KDConfig) -> dict[str, Any]:
    """How samples are drawn: as the training data are, with a seed of their own."""
    return {
        "max_tokens": config.max_tokens,
        "temperature": config.sampling_temperature,
        "seed": (config.seed, -1),
    }


def sample_texts(
    model: LanguageModel, prompts: Sequence[Sequence[int]], config: KDConfig
) -> list[str]:
    """What a model makes of the prompts."""
    answers = answer_batch(model, prompts, **sample_draw(config))
    return texts_of(model.tokenizer, prompts, answers)


def texts_of(
    tokenizer: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> list[str]:
    """The text that each answer adds to its prompt."""
    return [
        continuation_text(tokenizer, prompt, answer)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


class TextStream:
    """Token ids in, pieces of text out.

    A piece is kept back while its last character may still lack bytes.

    Args:
        tokenizer: As mlx_lm wraps it.
        prompt: Token ids that the answer continues.
    """

    def __init__(self, tokenizer: Any, prompt: list[int]) -> None:
        self._tokenizer = tokenizer
        self._context = list(prompt)
        self._window: list[int] = []
        self._given = ""

    def add(self, token: int) -> str:
        """The text that a token makes certain, often empty."""
        self._window.append(token)
        text = self._text()
        if text.endswith(_UNFINISHED) or not text.startswith(self._given):
            return ""
        piece = text[len(self._given) :]
        self._given = text
        if len(self._window) >= _WINDOW:
            self._context = [*self._context, *self._window][-_CONTEXT:]
            self._window, self._given = [], ""
        return piece

    def end(self) -> str:
        """What was kept back, unfinished characters included."""
        return self._text()[len(self._given) :] if self._window else ""

    def _text(self) -> str:
        return continuation_text(self._tokenizer, self._context, self._window)
