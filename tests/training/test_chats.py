"""Which tokens of a conversation count, for every template the same way.

A table of real templates and conversations: what stands before the last answer is what a model is
asked at inference, what counts is what it should answer, and nothing is lost in silence.
"""

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chat_templates import FAMILIES, family_tokenizer
from conch_dna.errors import ConchError
from conch_dna.language_model import load_tokenizer
from conch_dna.training.batches import Example
from conch_dna.training.chats.conversations import (
    plain_turns,
    prompt_ids,
    prompt_turns,
    turn_problem,
)
from conch_dna.training.chats.templates import dated
from conch_dna.training.data.records import record_texts, tokenize_record


def turns(*texts: str, system: str = "") -> list[dict[str, Any]]:
    """A conversation of user and assistant in turn."""
    roles = ["user", "assistant"] * len(texts)
    front = [{"role": "system", "content": system}] if system else []
    return front + [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]


THOUGHT = "<think>\nIt is red.\n</think>\n\nA ball."
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {
            "id": "call00001",
            "type": "function",
            "function": {"name": "find_ball", "arguments": '{"colour": "red"}'},
        }
    ],
}
TOOLS = [{"type": "function", "function": {"name": "find_ball", "parameters": {}}}]
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "one turn": {"messages": turns("Hi", "Hello.")},
    "two turns": {"messages": turns("Hi", "Hello.", "What is it?", "A ball.")},
    "system": {"messages": turns("Hi", "Hello.", system="Be brief.")},
    "system, two turns": {
        "messages": turns("Hi", "Hello.", "What is it?", "A ball.", system="Be brief.")
    },
    "two systems": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            *turns("Hi", "Hello.", system="Be kind."),
        ]
    },
    "thought": {"messages": turns("What is it?", THOUGHT)},
    "thought, two turns": {"messages": turns("Hi", "Hello.", "What is it?", THOUGHT)},
    "thought before": {"messages": turns("What is it?", THOUGHT, "Sure?", "Yes.")},
    "tools": {
        "messages": [
            *turns("Find it."),
            CALL,
            {"role": "tool", "content": "under the bed", "tool_call_id": "call00001"},
            {"role": "assistant", "content": "It is there."},
        ],
        "tools": TOOLS,
    },
    "tool call": {"messages": [*turns("Find it."), CALL], "tools": TOOLS},
}
END = {name: family.ends[0] for name, family in FAMILIES.items()} | {"GLM-4": "<|endoftext|>"}
# What stands before an answer of a conversation without thoughts where the template adds some.
OPENING = {"Qwen3": "<think>\n\n</think>\n\n", "GLM-4": "\n<think></think>\n", "Mistral v0.3": " "}
OPENING["R1-Distill"] = "\n</think>\n\n"
WITH_TOOLS = {"Qwen3", "Mistral v0.3"}
CUTS_EARLIER = {"Qwen3", "R1-Distill", "DeepSeek-V3", "GLM-4"}
CALLED = {
    "Qwen3": '<think>\n\n</think>\n\n<tool_call>\n{"name": "find_ball", "arguments": '
    '{"colour": "red"}}\n</tool_call><|im_end|>',
    "Mistral v0.3": '[TOOL_CALLS] [{"id": "call00001", "type": "function", "function": '
    '{"name": "find_ball", "arguments": {"colour": "red"}}}]</s>',
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """The tokenizer of a family, made once."""
    folder: Path = tmp_path_factory.mktemp("families")
    made: dict[str, Any] = {}

    def of(name: str) -> Any:
        if name not in made:
            made[name] = family_tokenizer(folder / name, name)
        return made[name]

    return of


def runs(example: Example, tokenizer: Any) -> list[str]:
    """The text of every unbroken run of counted tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], example.counted, [0]])))
    return [
        tokenizer.decode(example.ids[start:end].tolist())
        for start, end in edges.reshape(-1, 2).tolist()
    ]


def expected(family: str, conversation: str) -> list[str] | str:
    """The texts that count, or a part of the refusal."""
    end, opening = END[family], OPENING.get(family, "")
    if conversation in ("tools", "tool call"):
        if family not in WITH_TOOLS:
            return "no place for tools"
        called = CALLED[family]
        if conversation == "tool call":
            return [called]
        # An earlier answer has no thoughts that a template adds to the last.
        earlier = called.replace("<think>\n\n</think>\n\n", "")
        last = "It is there."
        return [earlier, (" " if family == "Mistral v0.3" else opening) + last + end]
    if conversation == "thought before":
        if family in CUTS_EARLIER:
            return "changes or drops assistant turn 2"
        return [THOUGHT_OF.get(family, THOUGHT) + end, f"{_space(family)}Yes.{end}"]
    if conversation == "thought":
        return [_thought(family) + end]
    if conversation == "thought, two turns":
        return [_earlier(family, "Hello."), _thought(family) + end]
    if "two turns" in conversation:
        return [_earlier(family, "Hello."), f"{opening}A ball.{end}"]
    return [f"{opening}Hello.{end}"]


THOUGHT_OF = {"Mistral v0.3": f" {THOUGHT}"}


def _space(family: str) -> str:
    return " " if family == "Mistral v0.3" else ""


def _earlier(family: str, text: str) -> str:
    opening = "" if family in ("Qwen3", "R1-Distill") else OPENING.get(family, "")
    return f"{opening}{text}{'<|user|>' if family == 'GLM-4' else END[family]}"


def _thought(family: str) -> str:
    """The answer with its thought, as it goes on from what the model is asked."""
    if family == "R1-Distill":
        return THOUGHT.removeprefix("<think>\n")
    if family == "GLM-4":
        return "\n<think>It is red.</think>\nA ball."
    return THOUGHT_OF.get(family, THOUGHT)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_counts_goes_on_from_what_a_model_is_asked(tokenizers, family, conversation):
    tokenizer, record = tokenizers(family), CONVERSATIONS[conversation]
    wanted = expected(family, conversation)
    if isinstance(wanted, str):
        with pytest.raises(ConchError, match=wanted):
            tokenize_record(record, tokenizer, name="example 1")
        return
    example = tokenize_record(record, tokenizer, name="example 1")
    assert runs(example, tokenizer) == wanted
    last = int(np.flatnonzero(np.diff(example.counted.astype(int)) == 1)[-1]) + 1
    asked = plain_turns(record["messages"])[:-1]
    if "tools" in record:
        text = tokenizer.apply_chat_template(
            asked, tools=TOOLS, add_generation_prompt=True, tokenize=False
        )
        prompt = tokenizer.encode(text, add_special_tokens=False)
    else:
        prompt = prompt_ids(tokenizer, asked, "")
    assert example.ids[:last].tolist() == prompt


def test_an_answer_without_weight_does_not_count_and_may_lose_its_thoughts(tokenizers):
    first, answer, *rest = turns("What is it?", THOUGHT, "Sure?", "Yes.")
    record = {"messages": [first, {**answer, "weight": 0}, *rest]}
    for family in FAMILIES:
        example = tokenize_record(record, tokenizers(family), name="a")
        assert runs(example, tokenizers(family)) == [
            f"{OPENING.get(family, '')}Yes.{END[family]}"
        ], family
    assert record_texts(record) == ["Yes."]


@pytest.mark.parametrize(
    ("turn", "problem"),
    [
        ({"role": "user", "content": "Hi"}, None),
        ({"role": "user", "content": [{"type": "text", "text": "Hi"}]}, None),
        ({"role": "assistant", "content": None, "tool_calls": [{"function": {}}]}, None),
        ("Hi", "a turn is an object"),
        ({"role": "user"}, "user has no content"),
        ({"role": "assistant", "content": None}, "assistant has no content"),
        ({"role": "user", "content": [{"type": "image"}]}, "a part that is not text"),
        ({"role": "assistant", "content": "", "tool_calls": "f()"}, "not a list of objects"),
    ],
)
def test_the_forms_of_a_turn(turn, problem):
    found = turn_problem(turn)
    assert found is None if problem is None else problem in found


def test_parts_of_text_are_one_text(tokenizers):
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo."}]
    record = {"messages": [*turns("Hi"), {"role": "assistant", "content": parts}]}
    tokenizer = tokenizers("ChatML")
    same = tokenize_record({"messages": turns("Hi", "Hello.")}, tokenizer, name="a")
    assert tokenize_record(record, tokenizer, name="a").digest == same.digest
    assert record_texts(record) == ["Hello."]


@pytest.mark.parametrize("arguments", ["[" * 100_000, "[" * 65 + "]" * 65, "9" * 9_999, "{"])
def test_arguments_that_are_no_plain_json_stay_text(tokenizers, arguments):
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    (plain,) = plain_turns([answer])
    assert plain["tool_calls"][0]["function"]["arguments"] == arguments


def test_a_template_that_breaks_off_is_one_line(tokenizers, tmp_path):
    tokenizer = family_tokenizer(tmp_path / "broken", "ChatML")
    named = {"tool_use": "{{ messages }}", "rag": "{{ messages }}"}
    for template in ("{{ 1/0 }}", "{{ 1 + 'a' }}", "{{ messages.x.y.z }}", "{% for %}", named):
        tokenizer._tokenizer.chat_template = template
        with pytest.raises(ConchError, match="refuses a conversation of user") as error:
            tokenize_record({"messages": turns("Hi", "Hello.")}, tokenizer, name="a")
        assert "\n" not in str(error.value)
    assert "no default" in str(error.value)


def test_named_templates_without_a_default_are_one_line(tmp_path):
    family_tokenizer(tmp_path / "named", "ChatML")
    path = tmp_path / "named" / "tokenizer_config.json"
    named = [{"name": "rag", "template": "{{ messages }}"}]
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": named}))
    tokenizer = load_tokenizer(path.parent)
    with pytest.raises(ConchError, match=r"refuses a conversation of user.*no default") as error:
        prompt_ids(tokenizer, turns("Hi"), "")
    assert "\n" not in str(error.value)


def test_a_template_writes_the_day_on_which_a_run_began(tmp_path):
    tokenizer = family_tokenizer(tmp_path / "dated", "ChatML")
    tokenizer._tokenizer.chat_template = (
        "{{ 'Today: ' + strftime_now('%d %b %Y') + '\n' }}" + FAMILIES["ChatML"].template
    )
    with dated("2026-01-31"):
        ids = prompt_ids(tokenizer, "Hi", "")
        record = tokenize_record({"messages": turns("Hi", "Hello.")}, tokenizer, name="a")
    assert tokenizer.decode(ids).startswith("Today: 31 Jan 2026\n")
    assert record.ids[: len(ids)].tolist() == ids
    today = datetime.now().strftime("%Y")
    assert today in tokenizer.decode(prompt_ids(tokenizer, "Hi", ""))


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 20000000000 }}",
        "{{ 'a' * 5000000 }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    ],
)
def test_a_template_without_bounds_is_refused(tmp_path, template):
    tokenizer = family_tokenizer(tmp_path / "endless", "ChatML")
    tokenizer._tokenizer.chat_template = template
    with pytest.raises(ConchError, match="takes more than 1 s, 2 GiB or 1,000,000 characters"):
        prompt_ids(tokenizer, "Hi", "")


def test_several_system_prompts_in_front_are_one():
    prompt = [
        {"role": "system", "content": "Be brief."},
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
    ]
    assert prompt_turns(prompt, "Be good.")[0]["content"] == "Be good.\n\nBe brief.\n\nBe kind."
