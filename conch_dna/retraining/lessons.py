"""From experience to training records: what of it teaches, and in which form.

Knows experience and a tokenizer's chat template; nothing of files, models or generations.
To leave something else out: a reason in `lessons_of`, so that everything is told.
"""

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from conch_dna.retraining.experience import Experience, Message
from conch_dna.training.chats.conversations import prompt_messages
from conch_dna.training.data.records import Record

EXPERIENCE = "experience"
"""The key of a record that holds the ids of the experience it was made of."""


@dataclass(frozen=True, kw_only=True)
class Lessons:
    """What can be learned now.

    Attributes:
        records: To train on, in the form of `training.data.records`, with the ids of the experience
            behind each under EXPERIENCE.
        used: Those ids, all of them.
        left_out: For the id of each other new experience, why.
        problems: What is wrong with lines of the file that the experience was read from.
    """

    records: list[Record]
    used: list[str]
    left_out: dict[str, str]
    problems: list[str]


def lessons_of(
    experiences: Sequence[Experience],
    settled: Collection[str],
    tokenizer: Any,
    *,
    system: str = "",
    problems: Sequence[str] = (),
    refuse: Callable[[Experience], str] = lambda experience: "",
) -> Lessons:
    """Make records of experience that nothing was learned from yet.

    A prompt that was corrected, or handed over, is taught by the newest of these answers alone,
    and not at all if that was settled before. Successes keep the balance: at most as many records
    as there are others, the newest.

    Args:
        experiences: All of a domain, oldest first.
        settled: Ids of those that are not to be used.
        tokenizer: The student's.
        system: The domain's system prompt, for conversations without one.
        problems: What is wrong with lines of the file, to be passed on.
        refuse: Says why an experience must not be learned from; empty where it may.
    """
    refused = {each.id: why for each in experiences if (why := refuse(each))}
    left_out = {id_: why for id_, why in refused.items() if id_ not in settled}
    experiences = [each for each in experiences if each.id not in refused]
    newest_of = {_prompt(each): each for each in experiences if each.kind != "success"}
    chosen: dict[tuple[str, str, str], list[Experience]] = {}
    for each in experiences:
        if each.id in settled:
            continue
        newest = newest_of.get(_prompt(each))
        if newest is None or (each.kind != "success" and each.target == newest.target):
            key = (_prompt(each), each.target, each.finish_reason)
            chosen.setdefault(key, []).append(each)
        elif each.target == newest.target:
            left_out[each.id] = f"a {newest.kind} of the same prompt teaches the same answer"
        else:
            left_out[each.id] = f"a {newest.kind} of the same prompt says something else"
    corrections = [group for group in chosen.values() if group[0].kind != "success"]
    successes = [group for group in chosen.values() if group[0].kind == "success"]
    surplus = max(0, len(successes) - len(corrections))
    for each in chain.from_iterable(successes[:surplus]):
        left_out[each.id] = "there are more successes than corrections, and newer ones"
    records = [
        {
            **record_of(
                tokenizer,
                conversation(tokenizer, group[0].messages, system),
                group[0].target,
                group[0].finish_reason,
            ),
            EXPERIENCE: [each.id for each in group],
        }
        for group in [*corrections, *successes[surplus:]]
    ]
    return Lessons(
        records=records,
        used=[id_ for record in records for id_ in record[EXPERIENCE]],
        left_out=left_out,
        problems=list(problems),
    )


def _prompt(experience: Experience) -> str:
    return json.dumps(list(experience.messages), sort_keys=True)


def record_of(tokenizer: Any, turns: Sequence[Message], answer: str, finish_reason: str) -> Record:
    """A conversation and its answer as a training record, for a tokenizer.

    Args:
        tokenizer: Without a chat template, prompt and completion stand for the turns.
        turns: The conversation up to the answer, as the tokenizer's template takes it.
        answer: What is to be learned, or read.
        finish_reason: "length" where the answer's end is not part of it.
    """
    if tokenizer.has_chat_template:
        messages = [*turns, {"role": "assistant", "content": answer}]
        return {"messages": messages, "finish_reason": finish_reason}
    prompt = "\n\n".join(turn["content"] for turn in turns)
    return {"prompt": prompt, "completion": answer, "finish_reason": finish_reason}


def conversation(tokenizer: Any, messages: Sequence[Message], system: str) -> list[Message]:
    """A conversation as the domain's adapter is asked: with a system prompt, its own or the given.

    Where a template has no place for a system turn it stands above the first prompt.
    """
    turns = list(messages)
    if turns[0]["role"] == "system":
        system, turns = turns[0]["content"], turns[1:]
    if not (turns and tokenizer.has_chat_template and turns[0]["role"] == "user"):
        return [{"role": "system", "content": system}, *turns] if system else turns
    return [*prompt_messages(tokenizer, turns[0]["content"], system), *turns[1:]]
