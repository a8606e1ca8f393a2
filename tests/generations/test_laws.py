"""Laws as users write them, what breaks them, and what is no law."""

import time
from pathlib import Path

import pytest

from conch_dna.errors import ConchError
from conch_dna.generations.laws import KINDS, Law, read_laws, violations

FILE = """
- {name: no sorry, forbid: "(?i)\\\\bsorry\\\\b"}
- {name: ends, require: "[.!?0-9]$"}
- {name: short, max_words: 5}
- {name: shorter, max_characters: 20}
- {name: parses, valid_json: true}
"""
KEEPS = {
    "forbid": (r"\bcat", "concatenate", "a cat"),
    "require": ("[.]$", "Done.", "Done"),
    "max_words": (2, "two words", "two words more"),
    "max_characters": (4, "four", "fours"),
    "valid_json": (True, '{"a": [1]}', "{'a': 1}"),
}


def written(folder: Path, content: str) -> Path:
    path = folder / "laws.yaml"
    path.write_text(content, encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_tells_what_keeps_it_from_what_breaks_it(kind: str) -> None:
    value, good, bad = KEEPS[kind]
    law = Law(name="law", kind=kind, value=value)
    assert law.keeps(good) and not law.keeps(bad)


def test_laws_are_read_and_every_broken_one_is_found(tmp_path: Path) -> None:
    laws = read_laws(written(tmp_path, FILE))
    assert [law.name for law in laws] == ["no sorry", "ends", "short", "shorter", "parses"]
    found = violations(laws, ["12", "I am Sorry, I cannot help you"])
    assert [(v.law, v.answer) for v in found] == [
        ("no sorry", 1),
        ("ends", 1),
        ("short", 1),
        ("shorter", 1),
        ("parses", 1),
    ]


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|aa)+$", "(.*)*$", "^(([a-z])+.)+[A-Z]([a-z])+$"])
def test_no_pattern_takes_longer_than_in_proportion_to_the_answer(pattern: str) -> None:
    law = Law(name="law", kind="forbid", value=pattern)
    law.keeps("a")

    def seconds(length: int) -> float:
        times = []
        for _ in range(3):
            began = time.process_time()
            law.keeps("a" * length + "!")
            times.append(time.process_time() - began)
        return min(times)

    assert seconds(41) < 1
    # Eight times the text; quadratic time would be 64 times as much.
    assert seconds(2**18) < 24 * max(seconds(2**15), 1e-3)


def test_patterns_mean_what_they_mean_in_python() -> None:
    assert Law(name="ends", kind="require", value="[.]$").keeps("Done.\n")
    assert Law(name="letters", kind="require", value=r"(?i)ÄH\pL+").keeps("ähnlich")
    assert Law(name="half", kind="forbid", value="a.c").keeps("ab\ud800")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "hold no list"),
        ("name: x", "hold no list"),
        ("- [", "is not YAML"),
        ("- {forbid: x}", "law 1 has no name"),
        ("- {name: a}", "has nothing beside its name; it needs one of forbid"),
        ("- {name: a, forbids: x}", "has forbids beside its name"),
        ("- {name: a, forbid: x, require: y}", "has forbid, require beside"),
        ("- {name: a, forbid: '('}", "is no regular expression"),
        ("- {name: a, forbid: '(?=b)a'}", r"invalid perl operator: \(\?=; patterns are RE2's"),
        ("- {name: a, forbid: '(?<!b)a'}", "without look-around and back-references"),
        ("- {name: a, forbid: '(a)\\1'}", "invalid escape sequence: .* without look-around"),
        ("- {name: a, forbid: 'a{5000}'}", "invalid repetition size"),
        ('- {name: a, forbid: "\\\\bähnlich"}', r"write \(\^\|\\PL\) and"),
        ("- {name: a, max_words: many}", "max_words is 'many', not a whole number"),
        ("- {name: a, max_words: -1}", "max_words is -1, not a whole number"),
        ("- {name: a, max_words: true}", "max_words is True, not a whole number"),
        ("- {name: a, valid_json: false}", "valid_json is False, not true"),
        ("- {name: a, max_words: 1}\n- {name: a, max_words: 2}", "'a' is used twice"),
        ("- {name: a}\n- 7", "law 1 .*; law 2 has no name"),
    ],
)
def test_what_is_no_law_is_named_with_all_that_is_wrong(
    content: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConchError, match=message):
        read_laws(written(tmp_path, content))


def test_what_is_nested_without_end_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConchError, match="is not YAML") as refused:
        read_laws(written(tmp_path, "[" * 5000))
    assert "\n" not in str(refused.value)
    aliases = ["- &a0 [x, x]", *(f"- &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 25))]
    with pytest.raises(ConchError, match=r"it has an alias \(\*\)") as refused:
        read_laws(written(tmp_path, "\n".join([*aliases, "- {name: a, forbid: *a24}"])))
    assert len(str(refused.value)) < 1_000
    assert not Law(name="json", kind="valid_json", value=True).keeps("[" * 100_000)


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConchError, match="cannot be read: No such file"):
        read_laws(tmp_path / "none.yaml")
