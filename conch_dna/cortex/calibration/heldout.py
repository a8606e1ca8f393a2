"""What a domain held out of its training, and the questions in it.

Knows folders of adapters, their lines and records; runs no model. To take prompts of another form
of record: a branch in `prompt_of`.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from conch_dna.digests import content_digest
from conch_dna.errors import ConchError
from conch_dna.generations.data import DATA_FILE, HELDOUT_FILE, earlier_records
from conch_dna.generations.line import Line
from conch_dna.language_model import ModelSource
from conch_dna.retraining.domain import Retraining, line_of
from conch_dna.training.answers import openings
from conch_dna.training.chats.conversations import Prompt
from conch_dna.training.domain_run import DATA_FILE as TRAINING_DATA
from conch_dna.training.domain_run import RESULT_FILE
from conch_dna.training.examples import Examples
from conch_dna.training.records import Record, read_records, split_heldout, tokenize_record

T = TypeVar("T")
WITHOUT = "give prompts that no version was trained on"


def heldout_records(
    adapters_dir: Path,
    domain: str,
    student: ModelSource,
    *,
    data: Sequence[Record] | None = None,
) -> list[Record]:
    """The records that no version of a domain's active adapter was trained on.

    Of a line those that its current generation and the ones before it held out; else the held-out
    part of the distillation's data, found by the same split and proved by its digest.

    Args:
        adapters_dir: The folder of all domains.
        domain: One that has an adapter.
        student: The base of the adapter.
        data: What the domain was distilled from, where its folder does not keep it.

    Raises:
        ConchError: They cannot be told, or the data are other ones.
    """
    line = line_of(adapters_dir, domain)
    if line.exists:
        return _of_line(line)
    retraining = Retraining(adapters_dir, domain, lambda: student)
    path = adapters_dir / domain / TRAINING_DATA
    if data is None:
        if not path.is_file():
            raise ConchError(
                f"what {domain} held out is not known: {path} is not there, where earlier versions "
                "left it out after a distillation from data of your own; give these data, or "
                f"{WITHOUT}"
            )
        data = read_records(path)
    told = _metadata(retraining.distilled / RESULT_FILE)
    config = retraining.distilled_with
    teacher = ModelSource(str(told["teacher"]), weights=False)
    kept, examples = Examples(teacher, student, config).make(data)
    records = [data[index] for index in kept]
    train, heldout = split_heldout(records, config.val_fraction, seed=config.seed)
    if content_digest(*(examples[index].digest for index in train)) != told["data_digest"]:
        raise ConchError(
            f"these {len(data)} records are not what {domain} was distilled from, so that it "
            f"cannot be told what it held out: give the data of its distillation, or {WITHOUT}"
        )
    return [records[index] for index in heldout]


def _metadata(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["metadata"]
        _ = found["teacher"], found["data_digest"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConchError(
            f"{path} does not say what the adapter was trained on, so that it cannot be told what "
            f"was held out: distil it again, or {WITHOUT}"
        ) from error
    return found


def _of_line(line: Line) -> list[Record]:
    chain = [line.head, *line.ancestors(line.head)]
    learned = {
        _asked(record)
        for records in earlier_records(line, chain, DATA_FILE).values()
        for record in records
    }
    # What one version held out another may have learned, where it was recorded once more.
    return [
        record
        for records in earlier_records(line, chain, HELDOUT_FILE).values()
        for record in records
        if _asked(record) not in learned
    ]


def _asked(record: Record) -> str:
    """What a record asks, or its whole text, so that two of the same prompt are told."""
    if "messages" in record:
        return json.dumps(_before_answer(record["messages"]), sort_keys=True)
    return str(record["prompt"] if "completion" in record else record["text"])


def _before_answer(turns: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    first = next(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns[:first]]


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
        turns = _before_answer(record["messages"])
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
    """Some of the prompts of records, no two the same; see `prompt_of`.

    Args:
        records: Held out.
        tokenizer: The student's.
        system: The domain's system prompt.
        most: How many at most.
        seed: Of the draw.
    """
    found: dict[str, Prompt] = {}
    for record in records:
        if (prompt := prompt_of(record, tokenizer, system)) is not None:
            found.setdefault(json.dumps(prompt, sort_keys=True), prompt)
    return chosen(found.values(), most, seed=seed)
