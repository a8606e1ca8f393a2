"""What a student says by itself to held-out prompts, before and after, and what it is worth.

Knows answers as tokens and texts, and how a teacher scores them; nothing of training. To measure
something else of an answer: a key in `answer_figures`.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conch_dna.checkpoints import remove_folder
from conch_dna.errors import ConchError
from conch_dna.language_model import LanguageModel, ModelSource
from conch_dna.metrics import BETTER, NOT_SHOWN, WORSE, paired_interval
from conch_dna.training.batches import sequential_batches
from conch_dna.training.data.answers import answer_batch, answer_text
from conch_dna.training.data.examples import Examples, Split
from conch_dna.training.data.soft_targets import Targets
from conch_dna.training.evaluation import figures_on
from conch_dna.training.runs.on_policy.questions import (
    Question,
    questions_of,
    require_room_for_own,
)
from conch_dna.training.settings import KDConfig
from conch_dna.training.structured_answers import DOMAIN_SCHEMAS, parse_answer

FOLDER = "own_answers"
NGRAM = 4
# Whether more of a figure is better (1), worse (-1), or neither (0).
WANTED = {
    "kl_nats": -1,
    "repetition": -1,
    "distinct_2": 0,
    "tokens": 0,
    "ended": 1,
    "valid": 1,
}


def answers_of(
    model: LanguageModel, questions: Sequence[Question], config: KDConfig
) -> list[list[int]]:
    """A student's own answers to prompts, as the teacher's data were drawn.

    Args:
        model: With or without an adapter.
        questions: Held out.
        config: Longest answer, temperature, seed, and how many are answered at once.
    """
    answers: list[list[int]] = []
    for start in range(0, len(questions), config.generation_batch_size):
        answers += answer_batch(
            model,
            [q.ids for q in questions[start : start + config.generation_batch_size]],
            max_tokens=config.max_tokens,
            temperature=config.sampling_temperature,
            seed=(config.seed, -2, start),
        )
    return answers


def heldout_questions(config: KDConfig, split: Split, student: ModelSource) -> list[Question]:
    """The held-out prompts whose answers are measured, each once.

    Args:
        config: `own_answers` says how many at most.
        split: Of the run.
        student: For its tokenizer and its context.

    Raises:
        ConchError: One leaves no room for an answer.
    """
    if not config.own_answers:
        return []
    names = [example.name for example in split.heldout]
    questions = questions_of(split.heldout_records, names, student.tokenizer)
    questions = questions if config.own_answers < 0 else questions[: config.own_answers]
    require_room_for_own(questions, student, config, answer="max_tokens")
    return questions


def own_answers(
    examples: Examples,
    questions: Sequence[Question],
    answers: tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]],
    adapter: Path,
    folder: Path,
    *,
    domain: str,
) -> dict[str, Any]:
    """Compare a student's answers without its adapter and with it; no model is in memory before.

    Args:
        examples: Of the run; they know both models.
        questions: What was asked.
        answers: Without the adapter, and with it.
        adapter: Its folder.
        folder: Of the run, where the teacher's scores lie meanwhile.
        domain: Whose schema they should keep.

    Returns:
        See `compared`.
    """
    tokenizer = examples.student.tokenizer
    place = folder / FOLDER
    targets = examples.targets(place)
    readable = [readable_answers(examples, questions, each) for each in answers]
    scored = [example for each in readable for example in each.values()]
    targets.fill(examples.teacher, scored, batch_size=examples.config.batch_size)
    examples.teacher.release()
    rows = []
    for said, read, path in zip(answers, readable, (None, adapter), strict=True):
        student = examples.student.load(adapter_path=path)
        distances = teacher_distances(student, read, targets, examples.config)
        student.release()
        rows.append(
            [
                {
                    "kl_nats": distances.get(number, math.nan),
                    **answer_figures(question, answer, tokenizer, domain),
                }
                for number, (question, answer) in enumerate(zip(questions, said, strict=True))
            ]
        )
    remove_folder(place)
    return compared(*rows, seed=examples.config.seed)


def repetition(ids: Sequence[int], size: int = NGRAM) -> float:
    """Share of the n-grams of an answer that stood in it before; 0 where there is none.

    >>> repetition([1, 2, 1, 2, 1, 2], size=2)
    0.6
    """
    grams = [tuple(ids[place : place + size]) for place in range(len(ids) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def answer_figures(
    question: Question, answer: Sequence[int], tokenizer: Any, domain: str
) -> dict[str, float]:
    """What can be told of an answer without a teacher.

    Returns:
        `repetition` of 4-grams, `distinct_2` (the share of its pairs of tokens that are different),
        `tokens`, `ended` (1 with its end of sequence) and, for a domain with a schema, `valid`.
    """
    text, reason = answer_text(tokenizer, question.ids, list(answer))
    figures = {
        "repetition": repetition(answer),
        "distinct_2": 1 - repetition(answer, 2),
        "tokens": float(len(answer)),
        "ended": float(reason == "stop"),
    }
    if domain in DOMAIN_SCHEMAS:
        figures["valid"] = float(parse_answer(text, DOMAIN_SCHEMAS[domain]).valid)
    return figures


def readable_answers(
    examples: Examples, questions: Sequence[Question], answers: Sequence[Sequence[int]]
) -> dict[int, Any]:
    """Examples of the answers that the teacher can read, by their number.

    Args:
        examples: Of the run.
        questions: What was asked.
        answers: One for each question.
    """
    found = {}
    tokenizer = examples.student.tokenizer
    for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        try:
            [found[number]], _ = examples.of_rollouts([question.answered(tokenizer, [*answer])], 0)
        except ConchError:
            continue
    return found


def teacher_distances(
    model: LanguageModel, answers: Mapping[int, Any], targets: Targets, config: KDConfig
) -> dict[int, float]:
    """KL(teacher‖model) a token on each answer, in nats, by its number.

    Where no token of any answer can be compared it is that of chunks, a chunk.

    Args:
        model: That gave the answers.
        answers: Of `readable_answers`; their targets are there.
        targets: Of the answers.
        config: How many examples and logits exist at once.
    """
    if not answers:
        return {}
    numbers, examples = list(answers), list(answers.values())
    figures = figures_on(model, examples, targets, config)
    name = "kl_nats" if figures.metrics.kl_nats is not None else "chunk_kl_nats"
    order = np.concatenate(sequential_batches(examples, config.batch_size))
    sums, counts = figures.by_example[name]
    return {
        numbers[index]: float(total / count)
        for index, total, count in zip(order, sums, counts, strict=True)
        if count
    }


def compared(
    before: Sequence[dict[str, float]], after: Sequence[dict[str, float]], *, seed: int
) -> dict[str, Any]:
    """Both sets of figures beside each other, and how sure their difference is.

    Args:
        before: Of each prompt's answer without the adapter; NaN for what could not be told.
        after: With it.
        seed: Of the resampling.

    Returns:
        By figure `before`, `after` and `difference` (means over the prompts where both are known),
        its 95% `interval`, `prompts`, and a `verdict` for what is better when it is less or more.
    """
    rows: dict[str, Any] = {}
    for name in after[0]:
        pair = np.array(
            [[one[name], other[name]] for one, other in zip(before, after, strict=True)]
        )
        pair = pair[np.isfinite(pair).all(axis=1)]
        if not len(pair):
            continue
        low, high = paired_interval(pair[:, 1], pair[:, 0], confidence=0.95, seed=seed)
        rows[name] = {
            "before": float(pair[:, 0].mean()),
            "after": float(pair[:, 1].mean()),
            "difference": float((pair[:, 1] - pair[:, 0]).mean()),
            "interval": [low, high],
            "prompts": len(pair),
            "verdict": _verdict(WANTED[name], low, high),
        }
    return rows


def _verdict(wanted: int, low: float, high: float) -> str | None:
    if not wanted:
        return None
    gain = (low, high) if wanted > 0 else (-high, -low)
    return BETTER if gain[0] > 0 else WORSE if gain[1] < 0 else NOT_SHOWN
