"""Records as people have them: Alpaca, ShareGPT, questions, fields of any name, and what is none.

To take another form: a line in FORMS, and its mixture with another in MIXED.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from chat_templates import family_tokenizer
from conch_dna.errors import ConchError
from conch_dna.training.data.forms import canonical, parse_mapping
from conch_dna.training.data.records import read_records, tokenize_record

QUESTION = {"role": "user", "content": "Hi?"}
ANSWER = {"role": "assistant", "content": "Yes."}
PAIR = {"prompt": "Hi?", "completion": "Yes."}
TALK = {"messages": [QUESTION, ANSWER]}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
RULE = {"role": "system", "content": "Be brief."}
CALL = {"name": "look", "arguments": {"at": "it"}}
HUMAN, GPT = {"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yes."}

FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "text": ({"text": "Once."}, {"text": "Once."}),
    "completion": ({**PAIR, "id": 1}, {**PAIR, "id": 1}),
    "response": ({"prompt": "Hi?", "response": "Yes.", "id": 1}, PAIR),
    "question": ({"question": "Hi?", "answer": "Yes."}, PAIR),
    "alpaca": ({"instruction": "Hi?", "input": "", "output": "Yes."}, PAIR),
    "alpaca with input": (
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"prompt": "Add.\n\n1 and 2", "completion": "3"},
    ),
    "alpaca without input": ({"instruction": "Hi?", "input": None, "output": "Yes."}, PAIR),
    "system": ({**PAIR, "system": "Be brief."}, {"messages": [RULE, QUESTION, ANSWER]}),
    "tools of a completion": ({**PAIR, "tools": TOOLS}, {**TALK, "tools": TOOLS}),
    "tools as text": ({**TALK, "tools": json.dumps(TOOLS)}, {**TALK, "tools": TOOLS}),
    "no tools": ({**TALK, "tools": None}, TALK),
    "sharegpt": ({"conversations": [HUMAN, GPT], "system": None}, TALK),
    "sharegpt with roles": ({"conversations": [QUESTION, ANSWER]}, TALK),
    "sharegpt in messages": ({"messages": [HUMAN, GPT]}, TALK),
    "sharegpt with a system": (
        {"conversations": [HUMAN, GPT], "system": "Be brief."},
        {"messages": [RULE, QUESTION, ANSWER]},
    ),
    "sharegpt with a call": (
        {
            "conversations": [
                HUMAN,
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "seen"},
                {**GPT, "weight": 0},
            ],
            "tools": json.dumps(TOOLS),
        },
        {
            "messages": [
                QUESTION,
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"type": "function", "function": CALL}],
                },
                {"role": "tool", "content": "seen"},
                {**ANSWER, "weight": 0},
            ],
            "tools": TOOLS,
        },
    ),
    "a null field of another form": ({**TALK, "text": None}, TALK),
}


def written(folder: Path, *records: Any) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", FORMS)
def test_every_form_becomes_one_of_three(name, tmp_path):
    given, expected = FORMS[name]
    assert read_records(written(tmp_path, given)) == [expected]
    assert canonical(expected, "line 1") == expected


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "two forms": ({**PAIR, "text": "a"}, "is of 2 forms, prompt and completion; text: leave one"),
    "two answers": ({**PAIR, "response": "b"}, "prompt and completion; prompt and response"),
    "messages and text": ({**TALK, "text": "a"}, "--map messages=messages"),
    "half of each": ({"prompt": "a", "output": "b"}, "it has prompt, output; .*--map"),
    "other names": (
        {"frage": "a", "antwort": "b"},
        "it has frage, antwort; other .* with --map",
    ),
    "no text": ({"instruction": "a", "output": 3}, "output is not text"),
    "input of numbers": ({"instruction": "a", "input": 3, "output": "b"}, "input is not text"),
    "earlier turns": (
        {"instruction": "a", "output": "b", "history": [["c", "d"]]},
        "history is not understood: write the turns as messages",
    ),
    "no answer": ({"question": "a", "answer": ""}, "completion is empty"),
    "no list": ({"conversations": "a"}, "conversations is a list of objects with from and value"),
    "a stranger": ({"conversations": [{"from": "cat", "value": "a"}]}, "turn 1 is from 'cat': use"),
    "no value": ({"conversations": [{"from": "gpt"}]}, "turn 1: value is not text"),
    "both": ({"conversations": [{**GPT, "role": "user"}]}, "turn 1 has from and role: leave"),
    "a broken call": (
        {"conversations": [{"from": "function_call", "value": "{"}]},
        "turn 1: value of a function_call cannot be read",
    ),
    "broken tools": ({**TALK, "tools": "["}, "tools cannot be read"),
    "tools of words": ({**TALK, "tools": ["look"]}, "tools is no list of objects"),
    "a system of numbers": ({**PAIR, "system": 3}, "system is not text"),
    "an empty answer among others": (
        {"messages": [QUESTION, {**ANSWER, "content": ""}, QUESTION, ANSWER]},
        'turn 2 of messages: an assistant turn is empty, .* "weight": 0',
    ),
    "an answer of empty parts": (
        {"messages": [QUESTION, {**ANSWER, "content": []}]},
        "turn 2 of messages: an assistant turn is empty",
    ),
    "half a weight": (
        {"messages": [QUESTION, {**ANSWER, "weight": 0.5}]},
        "weight of assistant is",
    ),
    "nothing of weight": ({"messages": [QUESTION, {**ANSWER, "weight": 0}]}, "no assistant turn"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_mixed_or_ambiguous_is_refused_with_its_line(name, tmp_path):
    record, message = REFUSED[name]
    with pytest.raises(ConchError, match=rf"data\.jsonl, line 2: .*{message}"):
        read_records(written(tmp_path, PAIR, record))


def test_fields_of_any_name_are_mapped_and_others_left(tmp_path):
    records = [{"q": "Hi?", "a": "Yes.", "text": "other"}, {"q": "Hi?", "a": "Yes.", "n": 3}]
    mapping = parse_mapping(["prompt=q", "completion=a"])
    assert read_records(written(tmp_path, *records), mapping=mapping) == [PAIR, PAIR]
    alpaca = parse_mapping(["instruction=q", "output=a", "input=n"])
    assert read_records(written(tmp_path, records[0]), mapping=alpaca) == [PAIR]
    ambiguous = {**TALK, "text": "a"}
    chosen = parse_mapping(["messages=messages"])
    assert read_records(written(tmp_path, ambiguous), mapping=chosen) == [TALK]
    with pytest.raises(ConchError, match=r"line 2: --map prompt=q, but the record has only text"):
        read_records(written(tmp_path, records[0], {"text": "b"}), mapping=mapping)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["prompt"], r"--map is 'prompt': use KEY=FIELD, where KEY is one of messages, prompt"),
        (["prompt="], "--map is 'prompt='"),
        (["frage=q"], "--map is 'frage=q'"),
        (["prompt=a", "prompt=b"], "--map gives prompt twice, a and b"),
        (["prompt=a"], "--map gives prompt, which is no form: give the fields of one"),
        (["text=a", "messages=b"], "which is 2 forms, messages; text"),
    ],
)
def test_a_mapping_that_makes_no_record_is_refused(pairs, message):
    with pytest.raises(ConchError, match=message):
        parse_mapping(pairs)


def test_an_answer_without_weight_at_the_end_does_not_count(tmp_path):
    """It was trained on, while its bytes were not counted."""
    tokenizer = family_tokenizer(tmp_path / "tokenizer", "ChatML")
    turns = [QUESTION, ANSWER, {**QUESTION, "content": "And?"}, {**ANSWER, "content": "No."}]
    whole = tokenize_record({"messages": turns[:2]}, tokenizer, name="a")
    turns[3]["weight"] = 0
    last = tokenize_record({"messages": turns}, tokenizer, name="a")
    assert last.ids.tolist() == whole.ids.tolist() and last.text_bytes == whole.text_bytes
