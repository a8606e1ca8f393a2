"""What each of two models reads of a record: the teacher may read more than the student.

Knows records, their system prompts and contexts; no tokens, no models. To let the teacher read
something else besides: a key in `EXTRAS`, and its place in `view`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from conch_dna.errors import ConchError
from conch_dna.training.chats.conversations import are_turns
from conch_dna.training.chats.templates import Turn
from conch_dna.training.data.forms import Record
from conch_dna.training.settings import SYSTEMS, TEACHER, KDConfig

# What only the teacher reads: a text, which stands above the first prompt, or turns before it.
CONTEXT = "context"
# As demonstrations: each record's own answer.
OWN_ANSWER = "answer"
# As a teacher's name: the student itself.
SELF = "self"
# Beside a record whose turns have no system prompt, those of both sides.
EXTRAS = (CONTEXT, *SYSTEMS.values())


def taught_by(teacher: str, student: str) -> str:
    """The model that teaches: the student itself, which then reads more, where it is called self.

    >>> taught_by("self", "embedded:student")
    'embedded:student'
    """
    return student if teacher == SELF else teacher


def context_problem(context: Any) -> str | None:
    """What is wrong with a record's context; None where nothing is."""
    if isinstance(context, str):
        return None
    if not are_turns(context):
        return "context is a text, or turns with role and content as text"
    roles = [turn["role"] for turn in context]
    if any(role != ("user", "assistant")[place % 2] for place, role in enumerate(roles)):
        return "turns of context go user, assistant, user, assistant"
    return "context ends with a user's turn that nobody answers" if len(roles) % 2 else None


def demonstration_turns(records: Sequence[Mapping[str, Any]], source: str = "") -> list[Turn]:
    """Records as turns that come before a prompt.

    Args:
        records: Demonstrations.
        source: Where they come from, for the message.

    Raises:
        ConchError: One is a plain text, no conversation of two sides, or reads more than its
            turns, which nobody would see.
    """
    where = f"{source}: " if source else ""
    turns: list[Turn] = []
    for number, record in enumerate(records, 1):
        if "completion" in record:
            own = [
                {"role": "user", "content": record["prompt"]},
                {"role": "assistant", "content": record["completion"]},
            ]
        else:
            own = list(record.get("messages", []))
        unseen = [name for name in EXTRAS if record.get(name)]
        if unseen or (own and own[0]["role"] == "system"):
            what = unseen[0] if unseen else "a system prompt"
            raise ConchError(
                f"{where}demonstration {number} has {what}, which would not be shown: give it as "
                "--teacher-system, or leave it out"
            )
        if not own or (problem := context_problem(own)):
            why = problem if own else "it has no prompt"
            raise ConchError(f"{where}demonstration {number}: {why}; give prompt and completion")
        turns += own
    return turns


def with_own_answer(record: Record) -> Record:
    """A record whose context shows its own last answer, as an example of one.

    As in self-distillation from demonstrations (arXiv 2601.19897): the teacher is to answer in its
    own words having seen it.

    Raises:
        ConchError: It has a context, or is a plain text.
    """
    if record.get(CONTEXT):
        raise ConchError("a record has a context already: leave out --demonstrations answer")
    if "messages" in record:
        answer = _text(next(t for t in record["messages"][::-1] if t["role"] == "assistant"))
    elif "completion" in record:
        answer = record["completion"]
    else:
        raise ConchError("a plain text has no answer to show: give prompt and completion")
    shown = f"This is an example of a good answer:\n\n{answer}\n\nAnswer in your own words."
    return {**record, CONTEXT: shown}


def with_context(record: str | Record, turns: Sequence[Turn]) -> Record:
    """A record or prompt whose context begins with some turns.

    Raises:
        ConchError: It has a text as its context.
    """
    record = {"prompt": record} if isinstance(record, str) else record
    if not turns:
        return record
    own = record.get(CONTEXT) or []
    if isinstance(own, str) and own:
        raise ConchError(
            "a record has a text as its context, which cannot stand behind demonstrations: give "
            "turns, or leave one of them"
        )
    return {**record, CONTEXT: [*turns, *own]}


def prompt_text(prompt: str | Record) -> str:
    """What a prompt asks, whether or not it has a context."""
    return prompt if isinstance(prompt, str) else str(prompt["prompt"])


def context_of(prompt: str | Record) -> Any:
    """What only the teacher reads before a prompt; empty for nothing."""
    return "" if isinstance(prompt, str) else prompt.get(CONTEXT) or ""


def with_systems(record: Record, config: KDConfig, domain: str) -> Record:
    """A record with the system prompts that the settings say, each side its own.

    One that has them already stays as it is.

    Args:
        record: In one of mlx-lm's forms.
        config: Of the run.
        domain: The domain's system prompt; may be empty.
    """
    if not (config.teacher_system or config.student_system) or SYSTEMS[TEACHER] in record:
        return record
    turns = record.get("messages", [])
    first = next((n for n, turn in enumerate(turns) if turn["role"] != "system"), 0)
    own = "\n\n".join(_text(turn) for turn in turns[:first])
    bare = {**record, "messages": turns[first:]} if first else dict(record)
    return {**bare, **{name: config.system_of(side, own, domain) for side, name in SYSTEMS.items()}}


def _text(turn: Turn) -> str:
    content = turn.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def differs(record: Mapping[str, Any]) -> bool:
    """Whether the teacher reads something else of a record than the student."""
    systems = [record.get(name, "") for name in SYSTEMS.values()]
    return bool(record.get(CONTEXT)) or systems[0] != systems[1]


def asked_turns(prompt: str, context: str | Sequence[Turn]) -> list[Turn]:
    """What a teacher is asked: a prompt behind its context."""
    if isinstance(context, str):
        return [{"role": "user", "content": f"{context}\n\n{prompt}" if context else prompt}]
    return [*context, {"role": "user", "content": prompt}]


def view(record: Record, side: str, *, template: bool, name: str = "a record") -> Record:
    """A record as one side reads it, without what stands beside it for the other.

    Args:
        record: In one of mlx-lm's forms, with or without extras.
        side: `settings.TEACHER` or `STUDENT`.
        template: Whether the side's tokenizer has a chat template.
        name: What messages call it.

    Raises:
        ConchError: A plain text has no prompt before which more could stand.
    """
    plain = {name: value for name, value in record.items() if name not in EXTRAS}
    system = record.get(SYSTEMS[side], "")
    context = record.get(CONTEXT) or "" if side == TEACHER else ""
    if not isinstance(context, str):
        # What is shown is not learned.
        context = [{**turn, "weight": 0} for turn in context]
    if not (system or context):
        return plain
    if "text" in record:
        raise ConchError(
            f"{name} is a plain text: it has no prompt before which a system prompt or a context "
            "could stand; give prompt and completion, or messages"
        )
    if "messages" in plain:
        turns = plain.pop("messages")
        first = next((n for n, turn in enumerate(turns) if turn["role"] != "system"), 0)
        own, turns = turns[:first], turns[first:]
        return {**plain, "messages": [*_turn("system", system), *own, *_behind(context, turns)]}
    if template:
        answer = {"role": "assistant", "content": plain.pop("completion")}
        asked = asked_turns(plain.pop("prompt"), context)
        return {**plain, "messages": [*_turn("system", system), *asked, answer]}
    before = [turn["content"] for turn in asked_turns(plain["prompt"], context)]
    return {**plain, "prompt": "\n\n".join([*([system] if system else []), *before])}


def _turn(role: str, content: str) -> list[Turn]:
    return [{"role": role, "content": content}] if content else []


def _behind(context: str | Sequence[Turn], turns: Sequence[Turn]) -> list[Turn]:
    """The turns of a conversation behind a context."""
    if not isinstance(context, str):
        return [*context, *turns]
    if not context:
        return list(turns)
    first = {**turns[0], "content": f"{context}\n\n{_text(turns[0])}"}
    return [first, *turns[1:]]
