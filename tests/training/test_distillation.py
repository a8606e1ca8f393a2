"""Checks on the texts of DOMAIN_PROMPTS, run over every domain that it holds.

It knows nothing of how the prompts are used and judges no answer.
A new domain is covered as soon as it has an entry; a new rule is a test over DOMAINS.
"""

import ast
import inspect
import itertools
import re

import pytest

from conch_dna.training import distillation
from conch_dna.training.distillation import DOMAIN_PROMPTS

DOMAINS = sorted(DOMAIN_PROMPTS)
MIN_EXAMPLES = 24
MIN_CHARACTERS, MAX_CHARACTERS = 30, 320
MAX_WORD_OVERLAP = 0.6


def word_overlap(first: str, second: str) -> float:
    """Jaccard index of the two texts' sets of lower-case words, in [0, 1]; 1 for equal sets."""
    words = [set(re.findall(r"[\w']+", text.lower())) for text in (first, second)]
    return len(words[0] & words[1]) / len(words[0] | words[1])


def all_texts(domain: str) -> list[str]:
    return [DOMAIN_PROMPTS[domain]["system"], *DOMAIN_PROMPTS[domain]["examples"]]


def test_the_six_documented_domains_exist() -> None:
    assert {"thinking", "task", "action", "reflection", "debug", "memory"} <= set(DOMAIN_PROMPTS)


def test_the_module_imports_nothing_heavy() -> None:
    tree = ast.parse(inspect.getsource(distillation))
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert [ast.unparse(node) for node in imports] == [
        "from pathlib import Path",
        "from typing import TypedDict",
        "from conch_dna.errors import ConchError",
    ]


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_domain_can_be_a_command_line_choice_and_a_file_name(domain: str) -> None:
    assert domain.isidentifier() and domain == domain.lower()


@pytest.mark.parametrize("domain", DOMAINS)
def test_an_entry_has_a_system_prompt_and_examples_and_nothing_else(domain: str) -> None:
    assert set(DOMAIN_PROMPTS[domain]) == {"system", "examples"}


def test_system_prompts_are_distinct() -> None:
    systems = [DOMAIN_PROMPTS[domain]["system"] for domain in DOMAINS]
    assert len({system.lower() for system in systems}) == len(systems)


@pytest.mark.parametrize("domain", DOMAINS)
def test_there_are_enough_examples(domain: str) -> None:
    assert len(set(DOMAIN_PROMPTS[domain]["examples"])) >= MIN_EXAMPLES


def test_no_example_stands_twice_in_any_domain() -> None:
    examples = [text.lower() for domain in DOMAINS for text in DOMAIN_PROMPTS[domain]["examples"]]
    assert sorted(set(examples)) == sorted(examples)


@pytest.mark.parametrize("domain", DOMAINS)
def test_examples_are_neither_stubs_nor_essays(domain: str) -> None:
    examples = DOMAIN_PROMPTS[domain]["examples"]
    wrong = [text for text in examples if not MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS]
    assert not wrong


@pytest.mark.parametrize("domain", DOMAINS)
def test_texts_have_clean_white_space(domain: str) -> None:
    wrong = [text for text in all_texts(domain) if text != " ".join(text.split())]
    assert not wrong


@pytest.mark.parametrize("domain", DOMAINS)
def test_texts_begin_and_end_as_sentences_do(domain: str) -> None:
    wrong = [text for text in all_texts(domain) if not re.fullmatch(r'"?[A-Z].*[.?!]', text)]
    assert not wrong


@pytest.mark.parametrize("domain", DOMAINS)
def test_no_comma_is_missing_between_two_examples(domain: str) -> None:
    """A forgotten comma silently glues two examples into one: 'to first?Python raises ...'."""
    wrong = [text for text in all_texts(domain) if re.search(r"""[a-z0-9)"][.?!]"?[A-Z]""", text)]
    assert not wrong


@pytest.mark.parametrize("domain", DOMAINS)
def test_examples_differ_in_more_than_a_few_words(domain: str) -> None:
    pairs = itertools.combinations(DOMAIN_PROMPTS[domain]["examples"], 2)
    alike = [pair for pair in pairs if word_overlap(*pair) >= MAX_WORD_OVERLAP]
    assert not alike


def test_word_overlap_of_known_texts() -> None:
    assert word_overlap("a red kite", "A red kite!") == 1.0
    assert word_overlap("a red kite", "the blue boat") == 0.0
    assert word_overlap("a red kite", "a red boat") == 0.5
