"""Answers out of texts as models write them: what is found, what is refused, and in which words.

Expected values are the objects that the texts were made from (`json.dumps`), never the parser's.
The domains' schemas are held against the system prompts, which tell a model the same in words; a
new domain is covered as soon as it has a prompt, and a good answer of it stands in ANSWERS.
"""

import copy
import json
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from conch_dna.errors import ConchError
from conch_dna.training.distillation import DOMAIN_PROMPTS
from conch_dna.training.structured_answers import (
    DIALECT,
    DOMAIN_SCHEMAS,
    MAX_DEPTH,
    MAX_PROBLEMS,
    parse_answer,
    repair_messages,
)

ANY: dict[str, Any] = {"type": "object"}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": r"\S"},
        "level": {"enum": ["low", "high"]},
        "sizes": {
            "type": "array",
            "items": {"type": "integer", "minimum": 1, "maximum": 9},
            "minItems": 2,
            "maxItems": 3,
            "uniqueItems": True,
        },
        "parts": {
            "type": "array",
            "items": {"type": "object", "properties": {"at": {"type": ["number", "null"]}}},
        },
        "code": {"const": "x"},
    },
    "required": ["name", "level"],
    "additionalProperties": False,
}
GOOD = {"name": "Ana", "level": "low"}
TEXT = json.dumps(GOOD)

texts = st.text(st.characters(exclude_categories=["Cs"]))
leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts
values = st.recursive(
    leaves.filter(lambda leaf: leaf not in (float("inf"), float("-inf"))),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=12,
)
objects = st.dictionaries(texts, values, max_size=4)


class TestWhatIsFound:
    @pytest.mark.parametrize(
        "text",
        [
            TEXT,
            f"\n  {TEXT}\n",
            f"Here it is:\n{TEXT}\nI hope it helps.",
            f"```json\n{TEXT}\n```",
            f"```\n{json.dumps(GOOD, indent=2)}\n```",
            f"The set {{x}} and a lone }} come first. {TEXT}",
            f'<think>Perhaps {{"name": 1}}?</think>{TEXT}',
            f'Perhaps {{"name": 1}}?\n</think>\n\n{TEXT}',
            f"<think></think>```json\n{TEXT}```",
        ],
        ids=["bare", "space", "text", "fence", "indented", "braces", "think", "half", "both"],
    )
    def test_the_one_object(self, text: str) -> None:
        parsed = parse_answer(text, SCHEMA)
        assert (parsed.value, parsed.problems, parsed.valid) == (GOOD, [], True)

    @pytest.mark.parametrize("name", ["a } b", "{", 'say "}{"', "\\", "</think>", "```", "é\n😀"])
    @pytest.mark.parametrize("ascii_only", [True, False])
    def test_what_stands_in_strings_is_text(self, name: str, ascii_only: bool) -> None:
        answer = {**GOOD, "name": name}
        assert parse_answer(json.dumps(answer, ensure_ascii=ascii_only), SCHEMA).value == answer

    @given(answer=objects, before=texts, after=texts, indent=st.sampled_from([None, 2]))
    def test_any_object_between_any_texts_without_braces(self, answer, before, after, indent):
        before, after = (re.sub(r"[\[{}\]<`]", "", text) for text in (before, after))
        parsed = parse_answer(f"{before}{json.dumps(answer, indent=indent)}{after}", ANY)
        # As text, which tells 1 from 1.0 and from true.
        assert json.dumps(parsed.value) == json.dumps(answer)
        assert parsed.valid

    @given(text=st.text(alphabet='{}[]",:ab1\\ \n'))
    def test_no_text_is_too_odd(self, text):
        parsed = parse_answer(text, ANY)
        assert parsed.valid == (not parsed.problems)
        if parsed.valid:
            assert isinstance(parsed.value, dict)

    @given(answer=objects.filter(bool), data=st.data())
    def test_an_answer_that_was_cut_off_is_never_valid(self, answer, data):
        whole = json.dumps(answer)
        cut = data.draw(st.integers(1, len(whole) - 1))
        parsed = parse_answer(whole[:cut], ANY)
        assert parsed.value is None and not parsed.valid


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ("{}" * 50_000, "there are more than 1,000 JSON objects in the answer instead of one"),
        ("{x}" * 33_000, "there is no JSON object in the answer; the braces at line 1, column 1"),
        ('{"\n' * 20_000, "the object at line 1, column 1 cannot be read"),
        (json.dumps({"reasons": [*range(15_000)]}), "there are more than 1,000"),
    ],
)
def test_a_long_answer_is_read_in_no_time(answer, problem):
    begun = time.process_time()
    parsed = parse_answer(answer, DOMAIN_SCHEMAS["thinking"])
    assert time.process_time() - begun < 2
    assert any(each.startswith(problem) for each in parsed.problems)


def test_places_are_told_by_line_and_column():
    problems = parse_answer('one\n\ntwo {"a" 1}\n {"b" 1}', ANY).problems
    assert [re.findall(r"at (line \d+, column \d+)", each) for each in problems] == [
        ["line 3, column 5", "line 3, column 10"],
        ["line 4, column 2", "line 4, column 7"],
    ]


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("", "there is no JSON object in the answer"),
            ("null", "there is no JSON object"),
            ('"{\\"name\\": 1}"', "there is no JSON object"),
            ("{'name': 'Ana'}", r"no JSON object in the answer; the braces at line 1, column 1"),
            ("<think>{}", "it ends within its <think> part"),
            (TEXT + TEXT, "there are 2 JSON objects in the answer instead of one"),
            (f"[{TEXT}]", "line 1, column 2 stands in a list"),
            (TEXT[:-1], "line 1, column 1 cannot be read: it ends before its last brace is closed"),
            (TEXT[:12], "it ends before its last brace is closed"),
            ('{"name": "Ana",}', r"line 1, column 1 cannot be read: .*, at line 1, column 1[56]$"),
            (
                'Or:\n{"name": "a\nb"}',
                r"line 2, column 1 cannot be read: .*, at line 2, column 12$",
            ),
            ('{"a": 1, "b": 2, "a": 1}', 'the key "a" stands in it more than once'),
            ('{"a": {"b": 1, "b": 1}}', 'the key "b" stands in it more than once'),
            (
                "{" + ",".join(f'"{n}": 1, "{n}": 2' for n in range(10)) + "}",
                'the key "0", "1", "2", "3", "4", "5", "6", "7" and 2 more stands',
            ),
            ('{"a": NaN}', "NaN is no JSON number"),
            ('{"a": [-Infinity]}', "-Infinity is no JSON number"),
            ('{"a": 1e999}', "the number 1e999 is too large"),
            ('{"a": ' + "9" * 5000 + "}", "a whole number that is too long"),
            ('{"a": "\\ud83d"}', "half of a surrogate pair"),
            ('{"a":' * 100 + "1" + "}" * 100, f"nested more than {MAX_DEPTH} deep"),
            ('{"a":[' * 100_000, f"nested more than {MAX_DEPTH} deep"),
        ],
    )
    def test_in_words(self, text: str, words: str) -> None:
        parsed = parse_answer(text, ANY)
        assert not parsed.valid and len(parsed.problems) == 1
        assert re.search(words, parsed.problems[0])

    @pytest.mark.parametrize("text", ['{"name": "a", } {"level": "low"}', '{"x": {"name": "a"}'])
    def test_a_broken_object_is_not_passed_over_for_another(self, text: str) -> None:
        parsed = parse_answer(text, ANY)
        assert not parsed.valid and "cannot be read" in parsed.problems[0]

    def test_an_object_within_other_braces_is_no_answer_of_its_own(self) -> None:
        assert parse_answer(f"{{answer: {TEXT}}}", SCHEMA).value is None


class TestAgainstASchema:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"name": 1}, '"name" must be a text, and is a whole number'),
            ({"name": None}, '"name" must be a text, and is null'),
            ({"name": " "}, '"name" is blank'),
            ({"level": "Low"}, '"level" must be one of "low", "high", and is "Low"'),
            ({"sizes": [1]}, '"sizes" needs at least 2 items, and has 1'),
            ({"sizes": [1, 2, 3, 4]}, '"sizes" may have at most 3 items, and has 4'),
            ({"sizes": [2, 2]}, '"sizes" holds the same item more than once'),
            ({"sizes": [0, 2]}, 'item 1 of "sizes" must be at least 1, and is 0'),
            ({"sizes": [2, 10]}, 'item 2 of "sizes" must be at most 9, and is 10'),
            ({"sizes": [2, True]}, 'item 2 of "sizes" must be a whole number, and is true'),
            ({"sizes": [2, 1.5]}, 'item 2 of "sizes" must be a whole number, and is a number'),
            ({"sizes": "2, 3"}, '"sizes" must be a list, and is a text'),
            (
                {"parts": [{}, {"at": []}]},
                '"at" in item 2 of "parts" must be a number or null, and is a list',
            ),
            ({"parts": [[]]}, 'item 1 of "parts" must be an object, and is a list'),
            ({"size": 1, "n": 2}, 'the object must not have "size", "n"'),
            ({"code": "y"}, "\"code\": 'x' was expected"),
        ],
    )
    def test_each_problem_in_words(self, change: dict[str, Any], words: str) -> None:
        parsed = parse_answer(json.dumps({**GOOD, **change}), SCHEMA)
        assert parsed.problems == [words]
        assert parsed.value == {**GOOD, **change} and not parsed.valid

    def test_every_problem_is_told_once(self) -> None:
        parsed = parse_answer('{"sizes": [0], "more": 1}', SCHEMA)
        assert sorted(parsed.problems) == [
            '"sizes" needs at least 2 items, and has 1',
            'item 1 of "sizes" must be at least 1, and is 0',
            'the object lacks "name", "level"',
            'the object must not have "more"',
        ]

    @pytest.mark.parametrize("text", [TEXT, "no object"])
    @pytest.mark.parametrize(
        ("schema", "words"),
        [
            ({"type": "text"}, r"schema is not valid at \$\.type: .*; correct the schema"),
            ({"properties": 3}, r"schema is not valid at \$\.properties"),
        ],
    )
    def test_a_wrong_schema_is_the_users_mistake(
        self, schema: dict[str, Any], words: str, text: str
    ) -> None:
        with pytest.raises(ConchError, match=words):
            parse_answer(text, schema)

    def test_a_schema_holds_all_that_it_refers_to(self) -> None:
        with pytest.raises(ConchError, match=r"refers to '/\$defs/none', which it does not hold"):
            parse_answer(TEXT, {"$ref": "#/$defs/none"})
        inner = {"$defs": {"some": {"required": ["more"]}}, "$ref": "#/$defs/some"}
        assert parse_answer(TEXT, inner).problems == ['the object lacks "more"']

    def test_nothing_is_fetched_for_a_schema(self) -> None:
        asked: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, *args: object) -> None:
                """Nothing: the test prints no requests."""

        with HTTPServer(("127.0.0.1", 0), Handler) as server:
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            try:
                with pytest.raises(ConchError, match=r"some\.json', which it does not hold"):
                    parse_answer(TEXT, {"$ref": f"http://127.0.0.1:{server.server_port}/some.json"})
            finally:
                server.shutdown()
                thread.join()
        assert not asked

    def test_an_older_dialect_is_taken_at_its_word(self) -> None:
        schema = {
            "$schema": "http://json-schema.org/draft-04/schema#",
            "properties": {"a": {"minimum": 1, "exclusiveMinimum": True}},
        }
        assert not parse_answer('{"a": 1}', schema).valid
        assert parse_answer('{"a": 2}', schema).valid


class TestRepair:
    MESSAGES = ({"role": "system", "content": "Think."}, {"role": "user", "content": "Why?"})

    def test_one_message_names_every_problem_and_the_schema(self) -> None:
        schema = DOMAIN_SCHEMAS["thinking"]
        raw = '{"conclusion": "Because.", "confidence": "sure"}'
        problems = parse_answer(raw, schema).problems
        messages = repair_messages(self.MESSAGES, raw, problems, schema)
        assert messages[:2] == list(self.MESSAGES) and len(messages) == 4
        assert messages[2] == {"role": "assistant", "content": raw}
        request = messages[3]["content"]
        assert messages[3]["role"] == "user" and problems
        assert all(problem in request for problem in problems)
        wanted = json.loads(request[request.index('{"type"') :])
        assert wanted == {key: value for key, value in schema.items() if key != "$schema"}

    def test_of_many_problems_the_number_is_told(self) -> None:
        problems = [f"problem {number}." for number in range(MAX_PROBLEMS + 3)]
        request = repair_messages(self.MESSAGES, "{", problems, ANY)[-1]["content"]
        assert [problem in request for problem in problems] == [True] * MAX_PROBLEMS + [False] * 3
        assert "- and 3 more\n" in request
        request = repair_messages(self.MESSAGES, "{", problems[:MAX_PROBLEMS], ANY)[-1]["content"]
        assert problems[MAX_PROBLEMS - 1] in request and "more\n" not in request

    def test_the_conversation_that_was_given_stays_as_it_is(self) -> None:
        given_messages = [dict(message) for message in self.MESSAGES]
        repair_messages(given_messages, "x", ["y"], ANY)[0]["content"] = "changed"
        assert given_messages == list(self.MESSAGES)

    def test_without_a_problem_there_is_nothing_to_repair(self) -> None:
        with pytest.raises(ValueError, match="nothing to repair"):
            repair_messages(self.MESSAGES, TEXT, [], SCHEMA)


# The domains' schemas

DOMAINS = sorted(DOMAIN_PROMPTS)

ANSWERS: dict[str, list[dict[str, Any]]] = {
    "thinking": [
        {
            "conclusion": "Yes, with ten minutes to spare.",
            "reasons": ["210 km at 84 km/h take 2.5 hours.", "With the stop it is 12:25."],
            "confidence": "high",
            "would_change": "A delay of more than five minutes.",
        }
    ],
    "task": [
        {
            "steps": [
                {"do": "List the components.", "depends_on": []},
                {"do": "Name the colours.", "depends_on": [1]},
                {"do": "Replace them.", "depends_on": [1, 2]},
            ],
            "done_when": "No component holds a colour.",
        }
    ],
    "action": [
        {
            "action": "create_reminder",
            "arguments": {"text": "call the dentist", "time": "09:00"},
            "why": "Everything is known.",
            "if_it_fails": "Ask for another time.",
        },
        {
            "action": "do_nothing",
            "arguments": {},
            "why": "It is warm enough.",
            "if_it_fails": "Tell the family.",
        },
    ],
    "reflection": [
        {
            "what_happened": "Rereading left little.",
            "keep": "An early start.",
            "change": ["Answer old questions instead."],
            "check": "The next mock exam.",
        }
    ],
    "debug": [
        {
            "cause": "The name is local because it is assigned to.",
            "verify": "A print before it fails alike.",
            "fix": ["Return the new value."],
            "otherwise": "A shadowed name.",
        }
    ],
    "memory": [
        {"remember": ["Vegetarian since January."], "skip": ["The mood passes."], "answer": None},
        {"remember": [], "skip": [], "answer": "unknown"},
    ],
}


def property_names(schema: dict[str, Any]) -> Iterator[str]:
    """Every key that an answer may have, at whatever depth."""
    for name, inner in schema.get("properties", {}).items():
        yield name
        yield from property_names(inner)
    if "items" in schema:
        yield from property_names(schema["items"])


def inner_objects(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if "properties" in schema:
        yield schema
    for inner in [*schema.get("properties", {}).values(), schema.get("items", {})]:
        yield from inner_objects(inner) if inner else ()


def test_every_domain_has_a_schema_and_every_schema_a_domain() -> None:
    assert set(DOMAIN_SCHEMAS) == set(DOMAIN_PROMPTS) == set(ANSWERS)


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_schema_is_valid_itself(domain: str) -> None:
    assert DOMAIN_SCHEMAS[domain]["$schema"] == DIALECT == Draft202012Validator.META_SCHEMA["$id"]
    Draft202012Validator.check_schema(DOMAIN_SCHEMAS[domain])


@pytest.mark.parametrize("domain", DOMAINS)
def test_objects_have_exactly_the_keys_that_are_named(domain: str) -> None:
    found = list(inner_objects(DOMAIN_SCHEMAS[domain]))
    assert found
    for schema in found:
        assert schema["type"] == "object" and schema["additionalProperties"] is False
        assert schema["required"] == list(schema["properties"])


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_system_prompt_states_every_key(domain: str) -> None:
    system = DOMAIN_PROMPTS[domain]["system"]
    assert "one JSON object" in system
    assert not [
        name for name in property_names(DOMAIN_SCHEMAS[domain]) if f'"{name}"' not in system
    ]


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_system_prompt_shows_one_object_that_the_schema_accepts(domain: str) -> None:
    parsed = parse_answer(DOMAIN_PROMPTS[domain]["system"], DOMAIN_SCHEMAS[domain])
    assert parsed.problems == []
    assert parsed.value is not None and list(parsed.value) == DOMAIN_SCHEMAS[domain]["required"]


@pytest.mark.parametrize("domain", DOMAINS)
def test_choices_stand_in_the_system_prompt(domain: str) -> None:
    for schema in DOMAIN_SCHEMAS[domain]["properties"].values():
        for choice in schema.get("enum", ()):
            assert choice in DOMAIN_PROMPTS[domain]["system"]


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_good_answer_is_valid_and_no_part_of_it_may_be_missing(domain: str) -> None:
    validator = Draft202012Validator(DOMAIN_SCHEMAS[domain])
    for answer in ANSWERS[domain]:
        assert validator.is_valid(answer)
        for key in answer:
            less = {name: value for name, value in answer.items() if name != key}
            assert not validator.is_valid(less)
            assert not validator.is_valid({**answer, key: 7})
            assert not validator.is_valid({**answer, key: "  "})
        assert not validator.is_valid({**answer, "more": "x"})


@pytest.mark.parametrize(
    ("domain", "key", "value"),
    [
        ("thinking", "confidence", "sure"),
        ("thinking", "reasons", ["Only one."]),
        ("thinking", "reasons", ["Six."] * 6),
        ("task", "steps", []),
        ("reflection", "change", []),
        ("reflection", "change", ["a", "b", "c", "d"]),
        ("debug", "fix", []),
        ("action", "arguments", ["text"]),
        ("memory", "remember", None),
    ],
)
def test_what_the_prompt_rules_out_is_not_valid(domain: str, key: str, value: object) -> None:
    assert not Draft202012Validator(DOMAIN_SCHEMAS[domain]).is_valid(
        {**ANSWERS[domain][0], key: value}
    )


@pytest.mark.parametrize("needs", [[0], [8], [1, 1], ["1"], None])
def test_a_step_depends_on_the_numbers_of_other_steps(needs: object) -> None:
    answer = copy.deepcopy(ANSWERS["task"][0])
    answer["steps"][1]["depends_on"] = needs
    assert not Draft202012Validator(DOMAIN_SCHEMAS["task"]).is_valid(answer)
