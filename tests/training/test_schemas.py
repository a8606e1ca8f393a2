"""DOMAIN_SCHEMAS against the system prompts, which tell a model the same in words.

A new domain is covered as soon as it has a prompt; a good answer of it stands in ANSWERS.
"""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from conch_dna.training.distillation import DOMAIN_PROMPTS
from conch_dna.training.schemas import DIALECT, DOMAIN_SCHEMAS
from conch_dna.training.structured_answers import parse_answer

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
