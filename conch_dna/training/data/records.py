"""Training records: JSONL and prompt files in, tokenized examples out.

Knows mlx-lm's three record forms (`messages`, `prompt`/`completion`, `text`); other forms become
these in forms.py, and how a conversation is rendered stands in chats/.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conch_dna.checkpoints import require_plain
from conch_dna.errors import ConchError, decoded, number_of
from conch_dna.training.batches import Example
from conch_dna.training.chats.conversations import (
    answer_text,
    common_prefix,
    conversation_ids,
    counts,
    ended_ids,
    last_answer,
    plain_turns,
    prompt_messages,
    text_ids,
    turn_problem,
)
from conch_dna.training.chats.templates import Turn
from conch_dna.training.data.forms import Record as Record
from conch_dna.training.data.forms import canonical
from conch_dna.training.data.views import CONTEXT, context_problem

TOKENS = "tokens"
STANDARD_INPUT = Path("-")


def _shown(path: Path) -> str:
    return "standard input" if path == STANDARD_INPUT else str(path)


def _lines(path: Path, option: str) -> list[tuple[int, str]]:
    try:
        content = sys.stdin.buffer.read() if path == STANDARD_INPUT else path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConchError(f"cannot read {option} {path}: {reason}") from error
    text = decoded(content, f"cannot read {option} {path}")
    # Not str.splitlines, which would also cut at characters that JSON allows inside strings.
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def read_lines(path: Path, option: str) -> list[str]:
    """The lines of a text file that are not blank.

    Args:
        path: The file; see `decoded`.
        option: Which option named it, for the message.

    Raises:
        ConchError: The file cannot be read or has no such line.
    """
    lines = [line.rstrip("\r") for _, line in _lines(path, option)]
    if not lines:
        kind = "prompt" if option == "--prompts" else "text"
        raise ConchError(f"{_shown(path)} is empty: give one {kind} a line")
    return lines


# What to do with lines that are texts, or rows of a table.
_AS_RECORD = 'give a line as {"text": …} or {"prompt": …, "completion": …}'
_PLAIN = defaultdict(
    lambda: _AS_RECORD,
    {
        "--data": f"{_AS_RECORD}, or texts to answer as --prompts",
        "--prompts": "give a string or a prompt object a line, or plain texts in a .txt file",
    },
)


def _fault(error: Exception, array: bool) -> str:
    """What JSON's reader says; of one line it would call each the first."""
    if isinstance(error, json.JSONDecodeError) and not array:
        return f"{error.msg}: column {error.colno}"
    return str(error)


def _values(path: Path, option: str) -> Iterator[tuple[str, Any]]:
    """What each line of a JSONL file holds, or each item of the array in a .json file.

    Yields:
        Where it stands, for messages, and the value.
    """
    array, shown = path.suffix == ".json", _shown(path)
    lines = _lines(path, option)
    if array:
        lines = [(1, "\n".join(line for _, line in lines))] if lines else []
    for number, line in lines:
        try:
            value = json.loads(line)
            require_plain(value)
        except (ValueError, RecursionError) as error:
            where = shown if array else f"{shown}, line {number}"
            remedy = "" if array or line.lstrip()[:1] in "{[" else f"; {_PLAIN[option]}"
            raise ConchError(f"{where}: not JSON ({_fault(error, array)}){remedy}") from error
        if not array:
            yield f"{shown}, line {number}", value
        elif not isinstance(value, list):
            raise ConchError(
                f"{shown} is no array: give a list of objects, or .jsonl with one a line"
            )
        else:
            yield from ((f"{shown}, item {place}", item) for place, item in enumerate(value, 1))


def read_records(
    path: Path, *, mapping: Mapping[str, str] | None = None, option: str = "--data"
) -> list[Record]:
    """Read training records of any form that `forms` knows: JSONL, or a .json file with an array.

    Args:
        path: The file, or `-` for standard input.
        mapping: Of `forms.parse_mapping`.
        option: Which option named it, for the message.

    Returns:
        Records as `messages`, `prompt` and `completion`, or `text`.

    Raises:
        ConchError: The file cannot be read, is empty, or a line is not a record; names the line.
    """
    records = [checked(value, where, mapping) for where, value in _values(path, option)]
    if not records:
        raise ConchError(f"{_shown(path)} is empty: give one JSON object a line")
    return records


def checked(value: Any, where: str, mapping: Mapping[str, str] | None = None) -> Record:
    """A record from which something can be learned, in one of mlx-lm's three forms.

    Args:
        value: What a file holds; see `forms.canonical`.
        where: What messages call it.
        mapping: Of `forms.parse_mapping`.

    Raises:
        ConchError: It is no record, or nothing could be learned from it.
    """
    record = canonical(value, where, mapping)
    _check_record(record, where)
    if record.get(CONTEXT) and (problem := context_problem(record[CONTEXT])):
        raise ConchError(f"{where}: {problem}")
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ConchError(
            f"{where}: half a surrogate pair (\\ud800 to \\udfff) is no character"
        ) from error
    return record


def _check_record(record: Record, where: str) -> None:
    # Of an answer that a model ended at once there is its end to learn, which its tokens have.
    answered = isinstance(record.get(TOKENS), dict)
    if "messages" in record:
        turns = record["messages"]
        for number, turn in enumerate(turns, 1):
            if answered and turn == {"role": "assistant", "content": ""}:
                continue
            if problem := turn_problem(turn):
                raise ConchError(f"{where}: turn {number} of messages: {problem}")
        if not any(map(counts, turns)):
            raise ConchError(f"{where}: messages has no assistant turn, nothing could be learned")
        return
    names = ("prompt", "completion") if "completion" in record else ("text",)
    for name in names:
        if not isinstance(record[name], str):
            raise ConchError(f"{where}: {name} is not text")
    if not record[names[-1]] and not answered:
        raise ConchError(f"{where}: {names[-1]} is empty, nothing could be learned")


def json_lines(rows: Sequence[Any]) -> str:
    """JSON objects as the text of a file, one a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_prompts(path: Path) -> list[str | Record]:
    """Read prompts: a text file with one a line, or strings or `prompt` objects as JSON.

    In a .jsonl file each line is one, in a .json file each item of an array. An object may have a
    `context` that only the teacher reads, and then stays one.

    Raises:
        ConchError: The file cannot be read, is empty, or a JSONL line has no prompt.
    """
    prompts: list[str | Record] = []
    if path.suffix not in (".json", ".jsonl"):
        return list(read_lines(path, "--prompts"))
    for where, value in _values(path, "--prompts"):
        prompt = value.get("prompt") if isinstance(value, dict) else value
        if not isinstance(prompt, str) or not prompt:
            raise ConchError(f"{where}: no prompt; give a string or a prompt object")
        context = value.get(CONTEXT) if isinstance(value, dict) else None
        if context and (problem := context_problem(context)):
            raise ConchError(f"{where}: {problem}")
        prompts.append({"prompt": prompt, CONTEXT: context} if context else prompt)
    if not prompts:
        raise ConchError(f"{_shown(path)} is empty: give one prompt a line")
    return prompts


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
        tools = record.get("tools")
        return conversation_ids(record["messages"], tokenizer, name, cut_off=cut_off, tools=tools)
    if "completion" in record and tokenizer.has_chat_template:
        turns = [
            *prompt_messages(tokenizer, record["prompt"], ""),
            {"role": "assistant", "content": record["completion"]},
        ]
        return conversation_ids(turns, tokenizer, name, cut_off=cut_off)
    if "completion" in record:
        ids = text_ids(tokenizer, record["prompt"] + record["completion"])
        # Where a token straddles the border, it belongs to the completion.
        start = common_prefix(text_ids(tokenizer, record["prompt"]), ids)
        if not cut_off:
            ids = ended_ids(ids, tokenizer)
        return ids, [(start, len(ids))]
    ids = ended_ids(text_ids(tokenizer, record["text"]), tokenizer)
    return ids, [(0, len(ids))]


def record_texts(record: Record) -> list[str]:
    """The texts of a record's answers; see `record_tokens`."""
    if "messages" in record:
        return [answer_text(turn) for turn in record["messages"] if counts(turn)]
    return [str(record["completion"] if "completion" in record else record["text"])]


def with_answer(record: Record, answer: str) -> Record:
    """A record with another text in place of its last answer, behind which nothing follows."""
    if "messages" not in record:
        return {**record, "completion" if "completion" in record else "text": answer}
    turns = record["messages"][: last_answer(record["messages"])]
    return {**record, "messages": [*turns, {"role": "assistant", "content": answer}]}


def counted_bytes(record: Record, *, train_on_prompt: bool) -> int:
    """UTF-8 bytes of the text whose tokens count: of the answers, or of the prompts too."""
    texts = record_texts(record)
    if train_on_prompt and "messages" in record:
        turns = record["messages"]
        last = last_answer(turns)
        texts = [answer_text(turn) for turn in turns[: last + 1]]
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


def _without_template(record: Record, name: str) -> Record:
    """A conversation with one answer as prompt and completion, its turns a blank line apart."""
    turns = plain_turns(record["messages"])
    answers = [turn for turn in record["messages"] if counts(turn)]
    if any("tool_calls" in turn for turn in turns) or "tools" in record:
        raise ConchError(
            f"{name} calls tools, but the tokenizer has no chat template that could write them"
        )
    if len(answers) > 1 or turns[-1]["role"] != "assistant" or len(turns) < 2:
        raise ConchError(
            f"{name} has messages, but the tokenizer has no chat template, and without one only "
            "a prompt with a single answer at its end has a plain form: give prompt and "
            "completion, or text"
        )
    prompt = "\n\n".join([*(turn["content"] for turn in turns[:-1]), ""])
    plain = {key: value for key, value in record.items() if key != "messages"}
    return {**plain, "prompt": prompt, "completion": turns[-1]["content"]}


def tokenize_records(
    records: Sequence[Record],
    tokenizer: Any,
    *,
    names: Sequence[str] | None = None,
    train_on_prompt: bool = False,
    vocabulary: str = "",
) -> list[Example]:
    """Tokenize records, in their order; see `tokenize_record`.

    Args:
        records: In one of the three forms.
        tokenizer: The student's.
        names: What messages call them; "example 1" and so on by default.
        train_on_prompt: See `tokenize_record`.
        vocabulary: See `tokenize_record`.
    """
    return [
        tokenize_record(
            record, tokenizer, name=name, train_on_prompt=train_on_prompt, vocabulary=vocabulary
        )
        for record, name in zip(records, names or numbered(records), strict=True)
    ]


def numbered(records: Sequence[Record], noun: str = "example") -> list[str]:
    """What messages call records: by their number, counted from 1."""
    return [f"{noun} {number}" for number in range(1, len(records) + 1)]


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
        groups.setdefault(question_of(record), []).append(index)
    if len(groups) < 2:
        raise ConchError(
            f"{number_of(len(records), 'example')} with "
            f"{number_of(len(groups), 'different prompt')} cannot be split into training and "
            "held-out data: give at least two"
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


def turns_before_answer(record: Record) -> list[Turn]:
    """The turns of a conversation before its first answer."""
    turns: list[Turn] = record["messages"]
    first = next(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
    return turns[:first]


def question_of(record: Record) -> str:
    """What a record asks, or its whole text: records with the same belong together."""
    if "messages" in record:
        return json.dumps(turns_before_answer(record), sort_keys=True)
    return str(record["prompt"] if "completion" in record else record["text"])
