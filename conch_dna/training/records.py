"""Training records: JSONL and prompt files in, tokenized examples out.

Knows mlx-lm's three record forms (`messages`, `prompt`/`completion`, `text`), chat templates and
which tokens of a conversation count. To add a form: a branch in `tokenize_record` and its test.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conch_dna.errors import ConchError
from conch_dna.training.batches import Example

Record = dict[str, Any]
Prompt = str | Sequence[dict[str, str]]
TOKENS = "tokens"


def _lines(path: Path, option: str) -> list[tuple[int, str]]:
    try:
        # -sig: a byte-order mark in front is no part of the first line.
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConchError(f"cannot read {option} {path}: {error}") from error
    # Not str.splitlines, which would also cut at characters that JSON allows inside strings.
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def read_lines(path: Path, option: str) -> list[str]:
    """The lines of a text file that are not blank.

    Args:
        path: The file, UTF-8.
        option: Which option named it, for the message.

    Raises:
        ConchError: The file cannot be read or has no such line.
    """
    lines = [line.rstrip("\r") for _, line in _lines(path, option)]
    if not lines:
        raise ConchError(f"{path} is empty: give one text a line")
    return lines


def read_records(path: Path) -> list[Record]:
    """Read a JSONL file of training records.

    Raises:
        ConchError: The file cannot be read, is empty, or a line is not a record; names the line.
    """
    records = []
    for number, line in _lines(path, "--data"):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ConchError(f"{path}, line {number}: not JSON ({error})") from error
        _check_record(record, f"{path}, line {number}")
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ConchError(
                f"{path}, line {number}: half a surrogate pair (\\ud800 to \\udfff) is no character"
            ) from error
        records.append(record)
    if not records:
        raise ConchError(f"{path} is empty: give one JSON object a line")
    return records


def _check_record(record: Any, where: str) -> None:
    forms = "messages, prompt and completion, or text"
    if not isinstance(record, dict):
        raise ConchError(f"{where}: a record is a JSON object with {forms}")
    if "messages" in record:
        turns = record["messages"]
        if not _are_turns(turns):
            raise ConchError(f"{where}: messages is a list of objects with role and content")
        if not any(turn["role"] == "assistant" for turn in turns):
            raise ConchError(f"{where}: messages has no assistant turn, nothing could be learned")
        return
    names = ("prompt", "completion") if "completion" in record else ("text",)
    for name in names:
        if name not in record:
            raise ConchError(f"{where}: a record needs {forms}; it has {', '.join(record)}")
        if not isinstance(record[name], str):
            raise ConchError(f"{where}: {name} is not text")
    if not record[names[-1]]:
        raise ConchError(f"{where}: {names[-1]} is empty, nothing could be learned")


def _are_turns(turns: Any) -> bool:
    return isinstance(turns, list) and all(
        isinstance(turn, dict)
        and isinstance(turn.get("role"), str)
        and isinstance(turn.get("content"), str)
        for turn in turns
    )


def json_lines(rows: Sequence[Any]) -> str:
    """JSON objects as the text of a file, one a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_prompts(path: Path) -> list[str]:
    """Read prompts: a text file with one a line, or JSONL of strings or `prompt` objects.

    Raises:
        ConchError: The file cannot be read, is empty, or a JSONL line has no prompt.
    """
    prompts = []
    for number, line in _lines(path, "--prompts"):
        if path.suffix != ".jsonl":
            prompts.append(line.rstrip("\r"))
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ConchError(f"{path}, line {number}: not JSON ({error})") from error
        prompt = value.get("prompt") if isinstance(value, dict) else value
        if not isinstance(prompt, str) or not prompt:
            raise ConchError(f"{path}, line {number}: no prompt; give a string or a prompt object")
        prompts.append(prompt)
    if not prompts:
        raise ConchError(f"{path} is empty: give one prompt a line")
    return prompts


def prompt_turns(prompt: Prompt, system: str) -> list[dict[str, str]]:
    """A conversation that waits for its answer, the system prompt its first turn.

    Args:
        prompt: What a user asks, or a whole conversation. Where that has a system turn of its
            own in front, the system prompt stands above its text.
        system: May be empty.

    Raises:
        ConchError: The conversation is none, or does not wait for an answer.
    """
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if not turns or not _are_turns(turns) or turns[-1]["role"] in ("assistant", "system"):
        raise ConchError(
            "a prompt is a text, or messages with role and content as text, of which the last is "
            "not the assistant's or the system's: nothing else waits for an answer"
        )
    if turns[0]["role"] == "system":
        system = "\n\n".join(filter(None, [system, turns.pop(0)["content"]]))
    if any(turn["role"] == "system" for turn in turns):
        raise ConchError("a prompt has a system message behind others: put it in front of them")
    return [{"role": "system", "content": system}, *turns] if system else turns


def prompt_messages(tokenizer: Any, prompt: Prompt, system: str) -> list[dict[str, str]]:
    """A conversation that waits for its answer, for a tokenizer with a chat template.

    The system prompt is a turn of its own, or stands above the prompt where the template has no
    place for such a turn (Gemma's refuses it, others drop it).
    """
    turns = prompt_turns(prompt, system)
    if turns[0]["role"] != "system" or _takes_system_turn(tokenizer, turns[0]["content"]):
        return turns
    above = f"{turns[0]['content']}\n\n{turns[1]['content']}"
    return [{**turns[1], "content": above}, *turns[2:]]


def _takes_system_turn(tokenizer: Any, system: str) -> bool:
    from jinja2 import TemplateError

    turns = [{"role": "system", "content": system}, {"role": "user", "content": "?"}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except TemplateError:
        return False
    return system.strip() in text


def prompt_ids(tokenizer: Any, prompt: Prompt, system: str) -> list[int]:
    """Token ids that a model continues with its answer.

    Through the tokenizer's chat template where it has one; else plainly, the system prompt above
    the prompt.
    """
    if tokenizer.has_chat_template:
        return _template(
            tokenizer, prompt_messages(tokenizer, prompt, system), generation_prompt=True
        )
    return _encode(tokenizer, plain_prompt(prompt, system))


def plain_prompt(prompt: Prompt, system: str) -> str:
    """The prompt for a model without a chat template: its turns, a blank line apart."""
    return "\n\n".join(turn["content"] for turn in prompt_turns(prompt, system))


def require_room(prompts: Sequence[Sequence[int]], *, answer: int, longest: int) -> None:
    """Refuse prompts that leave too little room for their answers.

    Args:
        prompts: Token ids of each, system prompt included.
        answer: Most tokens of an answer.
        longest: Most tokens of both together.

    Raises:
        ConchError: A prompt is too long; names the first.
    """
    for number, ids in enumerate(prompts, 1):
        if len(ids) + answer > longest:
            raise ConchError(
                f"prompt {number} has {len(ids)} tokens with its system prompt; with {answer} for "
                f"the answer it exceeds {longest}, the teacher's context or --max-seq-length: "
                "shorten it, or lower --max-tokens"
            )


def _encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text with what the tokenizer puts in front, without an end-of-sequence behind."""
    ids = list(tokenizer.encode(text))
    ends = tokenizer.eos_token_ids
    spelled = _spelled(tokenizer, text)
    while len(ids) > 1 and ids[-1] in ends and (not spelled or ids[-2] in ends):
        ids.pop()
    return ids


def _spelled(tokenizer: Any, text: str) -> bool:
    """Whether the text itself ends with an end-of-sequence token."""
    ends = tokenizer.convert_ids_to_tokens(sorted(tokenizer.eos_token_ids))
    return any(end and text.endswith(end) for end in ends)


def _template(
    tokenizer: Any, messages: Sequence[dict[str, str]], *, generation_prompt: bool
) -> list[int]:
    from jinja2 import TemplateError

    try:
        ids = tokenizer.apply_chat_template(list(messages), add_generation_prompt=generation_prompt)
    except TemplateError as error:
        roles = ", ".join(turn["role"] for turn in messages)
        raise ConchError(
            f"the tokenizer's chat template refuses a conversation of {roles}: {error}"
        ) from error
    return [int(token) for token in ids]


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))


def record_tokens(
    record: Record, tokenizer: Any, *, name: str, vocabulary: str = ""
) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a record, and the ranges of them that its answers take.

    An answer is a completion or an assistant turn, with the end-of-sequence token after it; a
    plain text is one answer. See `tokenize_record`.

    Returns:
        Ids, and for every text of `record_texts` its first token and one after its last.
    """
    exact = record.get(TOKENS)
    cut_off = record.get("finish_reason") == "length"
    if vocabulary and isinstance(exact, dict) and exact.get("vocabulary") == vocabulary:
        ids = list(exact["ids"])
        return ids, [(exact["prompt_length"], len(ids))]
    if "messages" in record and not tokenizer.has_chat_template:
        record = _without_template(record, name)
    if "messages" in record:
        return _conversation(record["messages"], tokenizer, name, cut_off=cut_off)
    if "completion" in record and tokenizer.has_chat_template:
        turns = [
            *prompt_messages(tokenizer, record["prompt"], ""),
            {"role": "assistant", "content": record["completion"]},
        ]
        return _conversation(turns, tokenizer, name, cut_off=cut_off)
    if "completion" in record:
        ids = _encode(tokenizer, record["prompt"] + record["completion"])
        # Where a token straddles the border, it belongs to the completion.
        start = _common_prefix(_encode(tokenizer, record["prompt"]), ids)
        if not cut_off:
            ids = _ended(ids, tokenizer)
        return ids, [(start, len(ids))]
    ids = _ended(_encode(tokenizer, record["text"]), tokenizer)
    return ids, [(0, len(ids))]


def record_texts(record: Record) -> list[str]:
    """The texts of a record's answers; see `record_tokens`."""
    if "messages" in record:
        return [turn["content"] for turn in record["messages"] if turn["role"] == "assistant"]
    return [str(record["completion"] if "completion" in record else record["text"])]


def counted_bytes(record: Record, *, train_on_prompt: bool) -> int:
    """UTF-8 bytes of the text whose tokens count: of the answers, or of the prompts too."""
    texts = record_texts(record)
    if train_on_prompt and "messages" in record:
        turns = record["messages"]
        last = max(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
        texts = [turn["content"] for turn in turns[: last + 1]]
    elif train_on_prompt and "completion" in record:
        texts = [record["prompt"], *texts]
    return sum(len(text.encode()) for text in texts)


def plain_text(record: Record, *tokenizers: Any) -> str | None:
    """The whole text of a record that no chat template is put around; None where one is."""
    if "messages" in record and not any(t.has_chat_template for t in tokenizers):
        record = _without_template(record, "")
    if "completion" in record and not any(t.has_chat_template for t in tokenizers):
        return str(record["prompt"] + record["completion"])
    return str(record["text"]) if "text" in record else None


def tokenize_record(
    record: Record,
    tokenizer: Any,
    *,
    name: str,
    train_on_prompt: bool = False,
    vocabulary: str = "",
) -> Example:
    """Tokenize a record and mark which tokens count.

    Completions count, and the end-of-sequence token after them; so does every assistant turn of
    a conversation, not only the last. Prompts do not, unless asked for. A plain text counts
    wholly.

    Args:
        record: In one of the three forms, or a teacher's answer with its exact `tokens`.
        tokenizer: The student's, as mlx_lm wraps it.
        name: What messages call the record.
        train_on_prompt: Prompt tokens count too.
        vocabulary: Exact `tokens` are used only when they are ids of this vocabulary digest.

    Raises:
        ConchError: The chat template does not keep an assistant turn apart, or nothing counts.
    """
    ids, spans = record_tokens(record, tokenizer, name=name, vocabulary=vocabulary)
    counted = np.zeros(len(ids), bool)
    for start, end in [(0, len(ids))] if train_on_prompt else spans:
        counted[start:end] = True
    counted[0] = False
    if not counted.any():
        raise ConchError(f"{name}: no token counts, nothing could be learned")
    text_bytes = counted_bytes(record, train_on_prompt=train_on_prompt)
    return Example(np.asarray(ids, np.int32), counted, name, text_bytes)


def _ended(ids: list[int], tokenizer: Any) -> list[int]:
    """The ids with an end-of-sequence token behind, if the tokenizer has one."""
    if tokenizer.eos_token_id is None or ids[-1] in tokenizer.eos_token_ids:
        return ids
    return [*ids, tokenizer.eos_token_id]


def _without_template(record: Record, name: str) -> Record:
    """A conversation with one answer as prompt and completion, its turns a blank line apart."""
    turns = record["messages"]
    answers = [turn for turn in turns if turn["role"] == "assistant"]
    if len(answers) > 1 or turns[-1]["role"] != "assistant" or len(turns) < 2:
        raise ConchError(
            f"{name} has messages, but the tokenizer has no chat template, and without one only "
            "a prompt with a single answer at its end has a plain form: give prompt and "
            "completion, or text"
        )
    prompt = "\n\n".join([*(turn["content"] for turn in turns[:-1]), ""])
    plain = {key: value for key, value in record.items() if key != "messages"}
    return {**plain, "prompt": prompt, "completion": turns[-1]["content"]}


def _conversation(
    messages: Sequence[dict[str, str]], tokenizer: Any, name: str, *, cut_off: bool
) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of a whole conversation and the span of every assistant turn, its end token included.

    A last turn that was cut off has no end token.
    """
    if messages[0]["role"] == "assistant":
        raise ConchError(f"{name} begins with an assistant turn: put what it answers before it")
    last = max(i for i, turn in enumerate(messages) if turn["role"] == "assistant")
    messages = messages[: last + 1]
    ids = _template(tokenizer, messages, generation_prompt=False)
    spans = []
    for index, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        before = _template(tokenizer, messages[:index], generation_prompt=True)
        start = _common_prefix(before, ids)
        unasked = _template(tokenizer, messages[:index], generation_prompt=False)
        after = _template(tokenizer, messages[: index + 1], generation_prompt=False)
        end = _common_prefix(after, ids)
        # The text as the tokenizer gives it back, which may compose or lose characters.
        content = tokenizer.encode(turn["content"], add_special_tokens=False)
        tail = _squeezed(tokenizer, content)[-20:]
        # A template may put more than one end behind a turn; the model stops at the first.
        ends = [i + 1 for i in range(start, end) if ids[i] in tokenizer.eos_token_ids]
        end = next((e for e in ends if tail in _squeezed(tokenizer, ids[start:e])), end)
        if start < _common_prefix(unasked, ids) or tail not in _squeezed(tokenizer, ids[start:end]):
            raise ConchError(
                f"{name}: the chat template changes or drops assistant turn {index + 1}, so the "
                "tokens that count cannot be told; give prompt and completion instead"
            )
        if index == last and cut_off:
            end -= end in ends
            ids = ids[:end]
        elif index == last and not ends:
            ids = _ended(ids[:end], tokenizer)
            end = len(ids)
        spans.append((start, end))
    return ids, spans


def _squeezed(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of ids without white space, which not every tokenizer gives back exactly."""
    return "".join(tokenizer.decode(list(ids)).split())


def tokenize_records(
    records: Sequence[Record],
    tokenizer: Any,
    *,
    train_on_prompt: bool = False,
    vocabulary: str = "",
) -> list[Example]:
    """Tokenize records, in their order; see `tokenize_record`."""
    return [
        tokenize_record(
            record,
            tokenizer,
            name=f"example {number}",
            train_on_prompt=train_on_prompt,
            vocabulary=vocabulary,
        )
        for number, record in enumerate(records, 1)
    ]


def fitting(examples: Sequence[Example], longest: int, *, skip: bool = False) -> list[int]:
    """Indices of the examples that are not too long.

    Args:
        examples: Tokenized.
        longest: Most tokens an example may have.
        skip: Leave out those that are longer instead of refusing them.

    Raises:
        ConchError: Some are too long and not to be left out, or all are.
    """
    long = [example for example in examples if len(example.ids) > longest]
    if long and (not skip or len(long) == len(examples)):
        shown = ", ".join(f"{example.name} ({len(example.ids)})" for example in long[:5])
        more = f" and {len(long) - 5} more" if len(long) > 5 else ""
        raise ConchError(
            f"{len(long)} of {len(examples)} examples are longer than {longest} tokens, the "
            f"context of the models or --max-seq-length: {shown}{more}. Shorten or split them, "
            "or leave them out with --too-long skip; they are never cut in silence"
        )
    return [index for index, example in enumerate(examples) if len(example.ids) <= longest]


def split_heldout(
    records: Sequence[Record], fraction: float, *, seed: int
) -> tuple[list[int], list[int]]:
    """Choose the held-out examples: a seeded share, at least one, never one prompt on both sides.

    Returns:
        Indices of the training and of the held-out records, ascending.

    Raises:
        ConchError: There are fewer than two different prompts.
    """
    groups: dict[str, list[int]] = {}
    for index, record in enumerate(records):
        groups.setdefault(_prompt_key(record), []).append(index)
    if len(groups) < 2:
        raise ConchError(
            f"{len(records)} examples with {len(groups)} different prompts cannot be split into "
            "training and held-out data: give at least two"
        )
    keys = list(groups)
    wanted = max(1, round(fraction * len(records)))
    heldout: list[int] = []
    for position in np.random.default_rng(seed).permutation(len(keys)):
        heldout.extend(groups[keys[position]])
        if len(heldout) >= wanted:
            break
    if len(heldout) == len(records):
        heldout = heldout[: -len(groups[keys[position]])] or groups[keys[0]]
    chosen = set(heldout)
    return [i for i in range(len(records)) if i not in chosen], sorted(chosen)


def _prompt_key(record: Record) -> str:
    if "messages" in record:
        turns = record["messages"]
        first = next(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
        return json.dumps(turns[:first], sort_keys=True)
    return str(record["prompt"] if "completion" in record else record["text"])
