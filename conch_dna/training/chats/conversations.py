"""Conversations as a model reads them: their turns, and which tokens are an answer's.

Knows turns of text and tokenizers; nothing of files, losses or models. To take another kind of
turn: `turn_problem`, `plain_turns`, and `_holds`, which sees whether it is whole.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import numpy as np

from conch_dna.checkpoints import parse_json
from conch_dna.errors import ConchError, NotWholeError
from conch_dna.training.chats.templates import Turn, render
from conch_dna.training.cross_tokenizer.token_bytes import (
    TokenBytes,
    encode_all,
    token_bytes,
    token_spans,
)

Prompt = str | Sequence[Turn]
# Of the text before an answer: white space that a template adds, and what must be alike before it.
MOST_SPACES, LEAST_ALIKE = 4, 4
THOUGHT_BEGIN, THOUGHT_END = "<think>", "</think>"


def turn_problem(turn: Any) -> str | None:
    """What a turn of a training record lacks; None where nothing.

    A turn has a role and content: text, a list of parts of type text, or null beside tool_calls.
    """
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
        return "a turn is an object with a role and content"
    content, calls, weight = turn.get("content"), turn.get("tool_calls"), turn.get("weight", 1)
    if weight not in (0, 1):
        return f"weight of {turn['role']} is {weight!r}: use 0 or 1"
    if calls is not None and not (
        isinstance(calls, list)
        and all(
            isinstance(call, dict) and isinstance(call.get("function", {}), dict) for call in calls
        )
    ):
        return f"tool_calls of {turn['role']} is not a list of objects, each with its function"
    if isinstance(content, list):
        if all(
            isinstance(part, dict)
            and part.get("type") == "text"
            and isinstance(part.get("text"), str)
            for part in content
        ):
            return _empty_problem(turn)
        return f"content of {turn['role']} has a part that is not text; only text can be learned"
    if isinstance(content, str) or (content is None and calls):
        return _empty_problem(turn)
    return f"{turn['role']} has no content: give text, parts of type text, or tool_calls"


def _empty_problem(turn: Turn) -> str | None:
    if counts(turn) and not answer_text(turn).strip():
        return 'an assistant turn is empty, nothing could be learned: leave it out, or "weight": 0'
    return None


def plain_turns(messages: Sequence[Turn]) -> list[Turn]:
    """Turns as chat templates expect them.

    Content is text, arguments of calls are objects, system turns in front are one.

    Args:
        messages: Turns in which `turn_problem` finds nothing wrong.
    """
    turns: list[Turn] = []
    for message in messages:
        turn = {key: value for key, value in message.items() if key != "weight"}
        content = turn.get("content") or ""
        if isinstance(content, list):
            content = "".join(part["text"] for part in content)
        turn["content"] = content
        if turn.get("tool_calls"):
            turn["tool_calls"] = [_plain_call(call) for call in turn["tool_calls"]]
        else:
            turn.pop("tool_calls", None)
        if turns and turn["role"] == "system" and all(t["role"] == "system" for t in turns):
            turns[0]["content"] += f"\n\n{content}"
        else:
            turns.append(turn)
    return turns


def _plain_call(call: Turn) -> Turn:
    """A tool call whose arguments are an object, which OpenAI's API writes as text."""
    function = dict(call.get("function", call))
    if isinstance(arguments := function.get("arguments"), str):
        # What is no JSON is a text to a template too.
        with suppress(NotWholeError):
            function["arguments"] = parse_json(arguments, "arguments")
    return {**call, "function": function} if "function" in call else function


def answer_text(turn: Turn) -> str:
    """What an assistant's turn says, in the same words for every tokenizer."""
    (plain,) = plain_turns([turn])
    calls = [json.dumps(call, ensure_ascii=False) for call in plain.get("tool_calls", [])]
    return "".join([plain["content"], *calls])


def counts(turn: Turn) -> bool:
    """Whether a turn is an answer to learn from: an assistant's whose `weight` is not 0."""
    return turn["role"] == "assistant" and bool(turn.get("weight", 1))


def last_answer(messages: Sequence[Turn]) -> int:
    """Index of the last answer to learn from; -1 where there is none."""
    return max((i for i, turn in enumerate(messages) if counts(turn)), default=-1)


def are_turns(turns: Any) -> bool:
    """Whether something is a list of turns with role and content as text."""
    return isinstance(turns, list) and all(
        isinstance(turn, dict)
        and isinstance(turn.get("role"), str)
        and isinstance(turn.get("content"), str)
        for turn in turns
    )


def prompt_turns(prompt: Prompt, system: str) -> list[Turn]:
    """A conversation that waits for its answer, the system prompt its first turn.

    Args:
        prompt: What a user asks, or a whole conversation. Where that has a system turn of its
            own in front, the system prompt stands above its text.
        system: May be empty.

    Raises:
        ConchError: The conversation is none, does not wait for an answer, or has what is no
            character.
    """
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if not turns or not are_turns(turns) or turns[-1]["role"] in ("assistant", "system"):
        raise ConchError(
            "a prompt is a text, or messages with role and content as text, of which the last is "
            "not the assistant's or the system's: nothing else waits for an answer"
        )
    while turns and turns[0]["role"] == "system":
        system = "\n\n".join(filter(None, [system, turns.pop(0)["content"]]))
    if any(turn["role"] == "system" for turn in turns):
        raise ConchError("a prompt has a system message behind others: put it in front of them")
    try:
        "".join([system, *(turn["content"] for turn in turns)]).encode()
    except UnicodeEncodeError as error:
        raise ConchError(
            "a prompt has half a surrogate pair (\\ud800 to \\udfff), which is no character: "
            "leave it out"
        ) from error
    return [{"role": "system", "content": system}, *turns] if system else turns


def prompt_messages(tokenizer: Any, prompt: Prompt, system: str) -> list[Turn]:
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
    turns = [{"role": "system", "content": system}, {"role": "user", "content": "?"}]
    try:
        return system.strip() in render(tokenizer, turns, generation_prompt=True)
    except ConchError:
        return False


def prompt_ids(
    tokenizer: Any, prompt: Prompt, system: str, *, tools: Sequence[Turn] | None = None
) -> list[int]:
    """Token ids that a model continues with its answer.

    Through the tokenizer's chat template where it has one, which writes the tools too, see
    `render`; else plainly, the system prompt above the prompt.
    """
    if tokenizer.has_chat_template:
        turns = prompt_messages(tokenizer, prompt, system)
        text = render(tokenizer, turns, generation_prompt=True, tools=tools)
        return encode_all(tokenizer, [text])[0]
    return text_ids(tokenizer, plain_prompt(prompt, system))


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
                f"prompt {number} has {len(ids)} tokens with its system prompt and what else is "
                f"read before it; with {answer} for the answer it exceeds {longest}, the teacher's "
                "context or --max-seq-length: shorten one of them, or lower --max-tokens"
            )


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text with what the tokenizer puts in front, without an end-of-sequence behind."""
    ids = list(tokenizer.encode(text))
    ends = tokenizer.eos_token_ids
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        # The text spells its beginning itself, and the tokenizer put another one in front.
        ids = ids[1:]
    spelled = _spelled(tokenizer, text)
    while len(ids) > 1 and ids[-1] in ends and (not spelled or ids[-2] in ends):
        ids.pop()
    return ids


def _spelled(tokenizer: Any, text: str) -> bool:
    """Whether the text itself ends with an end-of-sequence token."""
    return any(end and text.endswith(end) for end in _end_tokens(tokenizer))


def _end_tokens(tokenizer: Any) -> list[str]:
    names: list[str] = tokenizer.convert_ids_to_tokens(sorted(tokenizer.eos_token_ids))
    return names


def common_prefix(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many items two sequences have in common at their beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def ended_ids(ids: list[int], tokenizer: Any) -> list[int]:
    """The ids with an end-of-sequence token behind, if the tokenizer has one."""
    if tokenizer.eos_token_id is None or ids[-1] in tokenizer.eos_token_ids:
        return ids
    return [*ids, tokenizer.eos_token_id]


def conversation_ids(
    messages: Sequence[Turn],
    tokenizer: Any,
    name: str,
    *,
    cut_off: bool,
    tools: Sequence[Turn] | None = None,
) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of a whole conversation and the span of every answer in it, its end token included.

    What stands before the last answer is what a model is asked at inference: the rendering of the
    turns before it with a generation prompt. Earlier answers are looked for in that, since many
    templates write them otherwise than when they were asked for. Where the rendering of the whole
    conversation does not go on from there, as with templates that put a system prompt into the
    last user turn or cut thoughts off, the answer itself follows, with the template's ending.

    Args:
        messages: With at least one answer; what follows the last one is left out. An assistant
            turn whose `weight` is 0 does not count.
        tokenizer: With a chat template, as mlx_lm wraps it.
        name: What messages call the conversation.
        cut_off: The last answer goes on, so that no end token follows it.
        tools: See `render`.

    Raises:
        ConchError: The template drops or changes a turn, so that it would be lost in silence.
    """
    if messages[0]["role"] == "assistant":
        raise ConchError(f"{name} begins with an assistant turn: put what it answers before it")
    if (last := last_answer(messages)) < 0:
        raise ConchError(f"{name} has no assistant turn that counts, nothing could be learned")
    weights = [turn.get("weight", 1) for turn in messages[: last + 1]]
    turns = _with_system(tokenizer, plain_turns(messages[: last + 1]))
    left_out = last + 1 - len(turns)
    weights = weights[left_out:]
    last -= left_out
    written = partial(render, tokenizer, tools=tools)
    prompt = written(turns[:last], generation_prompt=True)
    if tools and prompt == render(tokenizer, turns[:last], generation_prompt=True):
        raise ConchError(f"{name}: the chat template has no place for tools; leave them out")

    def lost(index: int) -> ConchError:
        number, role = index + 1 + left_out, turns[index]["role"]
        remedy = "write it as the template keeps it"
        if role == "assistant":
            remedy = 'give it "weight": 0 here, and a record of its own that ends with it'
        return ConchError(
            f"{name}: the chat template changes or drops {role} turn {number}, so that it would be "
            f"lost in silence: {remedy}"
        )

    ends = [end for end in _end_tokens(tokenizer) if end]
    places: list[tuple[int, int]] = []
    for index, turn in enumerate(turns[:last]):
        if turn["role"] == "assistant":
            place = _earlier_answer(turns, index, prompt, written, ends)
            if weights[index] and (place is None or not _holds(prompt[slice(*place)], turn)):
                raise lost(index)
            if weights[index] and place is not None:
                places.append(place)
        elif _squeezed(turn["content"]) not in _squeezed(prompt):
            raise lost(index)
    text, place = _last_answer(turns, prompt, written)
    if not _holds(text[slice(*place)], turns[last]):
        raise lost(last)
    return _ids_and_spans(tokenizer, text, [*places, place], cut_off=cut_off)


def _with_system(tokenizer: Any, turns: list[Turn]) -> list[Turn]:
    """Turns whose system prompt stands where the tokenizer's template has a place for it."""
    if turns[0]["role"] != "system" or _takes_system_turn(tokenizer, turns[0]["content"]):
        return turns
    if len(turns) == 1 or turns[1]["role"] != "user":
        return turns
    above = f"{turns[0]['content']}\n\n{turns[1]['content']}"
    return [{**turns[1], "content": above}, *turns[2:]]


def _squeezed(text: str) -> str:
    """A text without white space, of which templates trim some."""
    return "".join(text.split())


def _holds(text: str, turn: Turn) -> bool:
    """Whether a rendering has all that a turn says."""
    squeezed = _squeezed(text)
    thought, _, answer = turn["content"].rpartition(THOUGHT_END)
    names = [str(call.get("function", call).get("name", "")) for call in turn.get("tool_calls", [])]
    parts = [thought.replace(THOUGHT_BEGIN, ""), answer, *names]
    return all(_squeezed(part) in squeezed for part in parts)


def _probe(text: str) -> str:
    """A text that has no character in common with another."""
    return next(mark for mark in ("\u2603", "\u2604", "\u2605", "\u2606") if mark not in text)


def _earlier_answer(
    turns: Sequence[Turn],
    index: int,
    prompt: str,
    written: Callable[..., str],
    ends: Sequence[str],
) -> tuple[int, int] | None:
    """Where in the prompt of a later answer an earlier one stands; None where it does not."""
    mark = _probe(prompt)
    probe: Turn = {"content": mark}
    calls = turns[index].get("tool_calls")
    if calls:
        other_call = {"name": mark, "arguments": {mark: mark}}
        nested = [
            {**call, "function": other_call} if "function" in call else other_call for call in calls
        ]
        probe = {"tool_calls": nested}
    others = [*turns[:-1]]
    others[index] = {**turns[index], **probe}
    changed = written(others, generation_prompt=True)
    if changed == prompt:
        return None
    start = common_prefix(prompt, changed)
    end = max(start, len(prompt) - common_prefix(prompt[::-1], changed[::-1]))
    asked = written(turns[:index], generation_prompt=True)
    if prompt.startswith(asked) and len(asked) <= start:
        start = len(asked)
    elif calls:
        return None
    if calls:
        # What closes the call belongs to it.
        closings = [place for mark in ends if (place := prompt.find(mark, end)) >= 0]
        end = min(closings, default=end)
    return start, end


def _last_answer(
    turns: Sequence[Turn], prompt: str, written: Callable[..., str]
) -> tuple[str, tuple[int, int]]:
    """The text of a conversation, and where in it the last answer stands."""
    answer = turns[-1]
    whole = written(turns, generation_prompt=False)
    mark = _probe(whole)
    plain = {key: value for key, value in answer.items() if key != "tool_calls"}
    probed = written([*turns[:-1], {**plain, "content": mark}], generation_prompt=False)
    ending = probed.rpartition(mark)[2] if mark in probed else ""
    if whole.startswith(prompt) and _holds(whole[len(prompt) :], answer):
        end = len(whole) - len(ending) if whole.endswith(ending) else len(whole)
        return whole, (len(prompt), max(len(prompt), end))
    words = answer["content"]
    if prompt.rstrip().endswith(THOUGHT_BEGIN):
        # The question itself opens a thought: the answer's own is continued, or closed at once.
        if words.lstrip().startswith(THOUGHT_BEGIN):
            words = words.lstrip().removeprefix(THOUGHT_BEGIN).lstrip("\n")
        elif THOUGHT_END not in words:
            words = f"\n{THOUGHT_END}\n\n{words}"
    text = prompt + _lead(probed.partition(mark)[0], prompt) + words
    return text + ending, (len(prompt), len(text))


def _lead(before: str, prompt: str) -> str:
    """The white space that a template puts between a question and its answer.

    Args:
        before: What it writes before an answer.
        prompt: What it writes to ask for one.
    """
    for length in range(MOST_SPACES + 1):
        space = before[len(before) - length :]
        if not space.strip() and prompt.endswith(before[: len(before) - length][-LEAST_ALIKE:]):
            return space
    return ""


@lru_cache(maxsize=4)
def _with_names(tokenizer: Any) -> TokenBytes:
    """The bytes of every token, markers by their names, as a template spells them."""
    return replace(token_bytes(tokenizer), special_ids=frozenset())


def _ids_and_spans(
    tokenizer: Any, text: str, places: Sequence[tuple[int, int]], *, cut_off: bool
) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens of a text, and of them those of some places in it with the end token behind."""
    (ids,) = encode_all(tokenizer, [text])
    table, ends_of_sequence = _with_names(tokenizer), tokenizer.eos_token_ids
    laid = token_spans(text.encode(), ids, table)
    spans = []
    for start, end in places:
        first_byte, last_byte = (len(text[:place].encode()) for place in (start, end))
        first = int(np.searchsorted(laid.ends, first_byte, side="right"))
        after = max(first, int(np.searchsorted(laid.starts, last_byte, side="left")))
        behind = after
        while behind < len(ids) and not table.pieces[ids[behind]].strip():
            behind += 1
        # A template may put more than one end behind a turn; the model stops at the first.
        ended = behind < len(ids) and ids[behind] in ends_of_sequence
        spans.append((first, behind + 1 if ended else after))
    if cut_off:
        ids = ids[:after]
        spans[-1] = (first, after)
    elif not ended:
        ids = ended_ids(ids[:after], tokenizer)
        spans[-1] = (first, len(ids))
    return ids, spans
