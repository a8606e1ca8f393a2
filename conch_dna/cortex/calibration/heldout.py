"""What a domain held out of its training, and the questions in it.

Knows folders of adapters, their lines and records; runs no model. To take prompts of another form
of record: a branch in `prompt_of`.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from conch_dna.errors import ConchError

# A distillation and a generation write what they held out under the same name.
from conch_dna.generations.data import DATA_FILE, HELDOUT_FILE, earlier_records
from conch_dna.generations.line import Line
from conch_dna.retraining.domain import distillation_folder, line_of
from conch_dna.training.chats.conversations import Prompt, plain_turns
from conch_dna.training.data.answers import openings
from conch_dna.training.data.records import (
    Record,
    question_of,
    read_records,
    tokenize_record,
    turns_before_answer,
)

T = TypeVar("T")


def heldout_records(adapters_dir: Path, domain: str) -> list[Record]:
    """The records that no version of a domain's active adapter was trained on.

    Of a line those that its current generation and the ones before it held out, else those that
    the distillation did.

    Args:
        adapters_dir: The folder of all domains.
        domain: One that has an adapter.

    Raises:
        ConchError: Its distillation did not keep them.
    """
    line = line_of(adapters_dir, domain)
    if line.exists:
        return _of_line(line)
    path = distillation_folder(adapters_dir, domain) / HELDOUT_FILE
    if not path.is_file():
        raise ConchError(
            f"what {domain} held out is not known, since there is no {path}: distil it again, or "
            "give data that it was not trained on (--data FILE)"
        )
    return read_records(path)


def _of_line(line: Line) -> list[Record]:
    versions = [line.head, *line.ancestors(line.head)]
    learned = {
        question_of(record)
        for records in earlier_records(line, versions, DATA_FILE).values()
        for record in records
    }
    # What one version held out another may have learned, where it was recorded once more.
    return [
        record
        for records in earlier_records(line, versions, HELDOUT_FILE).values()
        for record in records
        if question_of(record) not in learned
    ]


def prompt_of(record: Record, tokenizer: Any, system: str) -> Prompt | None:
    """What a user would ask to get a record's first answer.

    The domain's system prompt is left out, since whoever asks the neuron puts it in front again.
    A text without a prompt is asked by its opening.

    Args:
        record: In one of the three forms.
        tokenizer: The student's, which cuts openings.
        system: The domain's system prompt; may be empty.

    Returns:
        A text, or a conversation; None where there is nothing to ask.
    """
    above = f"{system}\n\n" if system else ""
    if "messages" in record:
        turns = [
            {"role": turn["role"], "content": turn["content"]}
            for turn in plain_turns(turns_before_answer(record))
        ]
        if turns and turns[0] == {"role": "system", "content": system}:
            turns = turns[1:]
        elif turns and turns[0]["role"] != "system":
            turns[0]["content"] = turns[0]["content"].removeprefix(above)
        return turns if turns and turns[-1]["role"] not in ("assistant", "system") else None
    if "completion" in record:
        prompt = str(record["prompt"]).removeprefix(above)
        if prompt.strip():
            return prompt
        record = {"text": prompt + record["completion"]}
    example = tokenize_record({"text": record["text"]}, tokenizer, name="a held-out text")
    [(_, length)] = openings([example])
    opening = tokenizer.decode(example.ids[:length].tolist(), skip_special_tokens=True)
    return opening if opening.strip() else None


def chosen(items: Iterable[T], most: int, *, seed: int) -> list[T]:
    """At most that many of some items, drawn by a seed, in their order."""
    items = list(items)
    drawn = np.random.default_rng(seed).permutation(len(items))[:most]
    return [items[index] for index in sorted(drawn)]


def heldout_prompts(
    records: Iterable[Record], tokenizer: Any, system: str, *, most: int, seed: int
) -> list[Prompt]:
    """Some of the prompts of records, no two the same.

    Args:
        records: Held out.
        tokenizer: The student's.
        system: The domain's system prompt.
        most: How many at most.
        seed: Of the draw.
    """
    prompts: dict[str, Prompt] = {}
    for record in records:
        if (prompt := prompt_of(record, tokenizer, system)) is not None:
            prompts.setdefault(json.dumps(prompt, sort_keys=True), prompt)
    return chosen(prompts.values(), most, seed=seed)
