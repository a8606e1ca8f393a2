"""Conversations as a model reads them: through its tokenizer's chat template, or plainly.

Knows turns of text, tokenizers and their templates; nothing of files, losses or models. To take
another kind of turn: `are_turns`, and `conversation_ids`, which finds the tokens of an answer.
"""

from collections.abc import Sequence
from typing import Any

from conch_dna.errors import ConchError

Prompt = str | Sequence[dict[str, str]]


def are_turns(turns: Any) -> bool:
    """Whether something is a list of turns with role and content as text."""
    return isinstance(turns, list) and all(
        isinstance(turn, dict)
        and isinstance(turn.get("role"), str)
        and isinstance(turn.get("content"), str)
        for turn in turns
    )


def prompt_turns(prompt: Prompt, system: str) -> list[dict[str, str]]:
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
    if turns[0]["role"] == "system":
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
                f"prompt {number} has {len(ids)} tokens with its system prompt; with {answer} for "
                f"the answer it exceeds {longest}, the teacher's context or --max-seq-length: "
                "shorten it, or lower --max-tokens"
            )


def text_ids(tokenizer: Any, text: str) -> list[int]:
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


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids two sequences have in common at their beginning."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))


def ended_ids(ids: list[int], tokenizer: Any) -> list[int]:
    """The ids with an end-of-sequence token behind, if the tokenizer has one."""
    if tokenizer.eos_token_id is None or ids[-1] in tokenizer.eos_token_ids:
        return ids
    return [*ids, tokenizer.eos_token_id]


def conversation_ids(
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
        start = common_prefix(before, ids)
        unasked = _template(tokenizer, messages[:index], generation_prompt=False)
        after = _template(tokenizer, messages[: index + 1], generation_prompt=False)
        end = common_prefix(after, ids)
        # The text as the tokenizer gives it back, which may compose or lose characters.
        content = tokenizer.encode(turn["content"], add_special_tokens=False)
        tail = _squeezed(tokenizer, content)[-20:]
        # A template may put more than one end behind a turn; the model stops at the first.
        ends = [i + 1 for i in range(start, end) if ids[i] in tokenizer.eos_token_ids]
        end = next((e for e in ends if tail in _squeezed(tokenizer, ids[start:e])), end)
        if start < common_prefix(unasked, ids) or tail not in _squeezed(tokenizer, ids[start:end]):
            raise ConchError(
                f"{name}: the chat template changes or drops assistant turn {index + 1}, so the "
                "tokens that count cannot be told; give prompt and completion instead"
            )
        if index == last and cut_off:
            end -= end in ends
            ids = ids[:end]
        elif index == last and not ends:
            ids = ended_ids(ids[:end], tokenizer)
            end = len(ids)
        spans.append((start, end))
    return ids, spans


def _squeezed(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of ids without white space, which not every tokenizer gives back exactly."""
    return "".join(tokenizer.decode(list(ids)).split())
