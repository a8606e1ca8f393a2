"""What the student is asked for its own answers, and these answers as records.

Knows records and the student's tokenizer; no models. To ask by another kind of record: a branch in
`question_of_record`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from conch_dna.errors import ConchError
from conch_dna.language_model import ModelSource
from conch_dna.training.chats.conversations import last_answer
from conch_dna.training.cross_tokenizer.vocabulary import vocabulary_digest
from conch_dna.training.data.answers import OPENING_TOKENS, answer_text
from conch_dna.training.data.records import TOKENS, Record, record_tokens
from conch_dna.training.data.views import EXTRAS, view
from conch_dna.training.settings import STUDENT, KDConfig


@dataclass(frozen=True, eq=False)
class Question:
    """A prompt that waits for the student's own answer.

    Attributes:
        record: What was asked, with all that only the teacher reads, and without an answer.
        ids: The student's tokens of the prompt.
        name: What messages call it.
    """

    record: Record
    ids: list[int]
    name: str

    def answered(self, tokenizer: Any, answer: list[int]) -> Record:
        """The question with an answer, and the exact tokens of both.

        Args:
            tokenizer: The student's.
            answer: Its token ids, the end of sequence among them where there is one.
        """
        text, reason = answer_text(tokenizer, self.ids, answer)
        exact = {
            "ids": [*self.ids, *answer],
            "prompt_length": len(self.ids),
            "vocabulary": vocabulary_digest(tokenizer),
        }
        how = {"finish_reason": reason, TOKENS: exact}
        if "messages" in self.record:
            turns = [*self.record["messages"], {"role": "assistant", "content": text}]
            return {**self.record, "messages": turns, **how}
        if "text" in self.record:
            return {"text": self.record["text"] + text, **how}
        return {**self.record, "completion": text, **how}


def question_of_record(record: Record, tokenizer: Any, name: str) -> Question:
    """What the last answer of a record answers, or a text's first tokens.

    Args:
        record: In one of mlx-lm's forms.
        tokenizer: The student's.
        name: What messages call it.

    Raises:
        ConchError: See `records.record_tokens`.
    """
    left_out = (TOKENS, "finish_reason")
    bare = {key: value for key, value in record.items() if key not in left_out}
    read = view(bare, STUDENT, template=tokenizer.has_chat_template, name=name)
    ids, spans = record_tokens(read, tokenizer, name=name)
    if "text" in bare:
        ids = ids[: max(1, min(OPENING_TOKENS, len(ids) - 1))]
        opening = tokenizer.decode(ids, skip_special_tokens=True)
        return Question({"text": opening}, ids, name)
    ids = ids[: spans[-1][0]]
    if "messages" not in bare:
        return Question({k: v for k, v in bare.items() if k != "completion"}, ids, name)
    turns = bare["messages"][: last_answer(bare["messages"])]
    # Only the answer that is to come counts.
    turns = [{**t, "weight": 0} if t["role"] == "assistant" else t for t in turns]
    kept = {key: bare[key] for key in ("tools", *EXTRAS) if key in bare}
    return Question({"messages": turns, **kept}, ids, name)


def questions_of(records: Sequence[Record], names: Sequence[str], tokenizer: Any) -> list[Question]:
    """The questions of records, each once; with another context or system prompt it is another.

    Args:
        records: In mlx-lm's forms.
        names: What messages call them.
        tokenizer: The student's.
    """
    found: dict[str, Question] = {}
    for record, name in zip(records, names, strict=True):
        question = question_of_record(record, tokenizer, name)
        found.setdefault(json.dumps([question.ids, question.record], sort_keys=True), question)
    return list(found.values())


def require_room_for_own(
    questions: Sequence[Question],
    student: ModelSource,
    config: KDConfig,
    *,
    answer: str = "rollout_tokens",
) -> None:
    """Refuse prompts that leave too little room for the student's own answers.

    Args:
        questions: To be asked.
        student: For its context.
        config: Longest example, and longest answer.
        answer: The setting that says the latter.

    Raises:
        ConchError: One does; it is named.
    """
    longest = min(student.context_length or config.max_seq_length, config.max_seq_length)
    most = getattr(config, answer)
    for question in questions:
        if len(question.ids) + most > longest:
            raise ConchError(
                f"the prompt of {question.name} has {len(question.ids)} tokens; with {most} for "
                f"the student's own answer it exceeds {longest}, the student's context or "
                f"--max-seq-length: shorten it, or lower --{answer.replace('_', '-')}"
            )
