"""Documents are taken as users have them, and refused by their number."""

import json
from pathlib import Path
from typing import Any

import pytest

from conch_dna.errors import ConchError
from conch_dna.sedimentation.documents import (
    Document,
    count_lines,
    embedded_text,
    read_document_files,
    read_documents,
)


def test_texts_and_mappings_become_documents() -> None:
    given = [
        "only a text",
        {"_id": "7", "title": "A title", "text": "and a text"},
        {"id": 7, "text": "", "title": "a title alone", "payload": {"year": 1999}},
    ]
    plain, beir, titled = read_documents(given)
    assert (plain.text, plain.title, plain.embedded) == ("only a text", "", "only a text")
    assert (beir.id, beir.embedded) == ("7", "A title and a text")
    assert (titled.id, titled.embedded) == (7, "a title alone")
    assert titled.stored == {"year": 1999, "title": "a title alone", "text": ""}
    assert embedded_text(beir.stored) == beir.embedded


def test_a_text_has_the_same_id_wherever_it_stands() -> None:
    first, again, other = read_documents(["one", "one", "two"])
    assert first.id == again.id != other.id


def test_nothing_is_read_before_it_is_asked_for() -> None:
    taken: list[int] = []

    def endless() -> Any:
        number = 0
        while True:
            taken.append(number)
            yield f"text {number}"
            number += 1

    documents = read_documents(endless())
    assert [next(documents).text for _ in range(3)] == ["text 0", "text 1", "text 2"]
    assert len(taken) == 3


def test_the_digest_is_of_text_title_and_payload() -> None:
    document = Document("a", "text", "title", {"year": 1})
    assert document.digest == Document("b", "text", "title", {"year": 1}).digest
    changed = [
        Document("a", "text!", "title", {"year": 1}),
        Document("a", "text", "title!", {"year": 1}),
        Document("a", "text", "title", {"year": 2}),
        Document("a", "texttitle", "", {"year": 1}),
    ]
    assert document.digest not in {each.digest for each in changed}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["fine", 3], r"document 2 is a int: give a text, or a mapping"),
        (["  \n "], r"document 1 has no text: leave it out"),
        ([{"id": "a"}], r"document 1 has no text"),
        ([{"text": "x", "body": "y"}], r"document 1 has unknown fields body: put them into"),
        ([{"text": "x", "id": 1.5}], r"document 1 has the id 1.5: use a text or a whole number"),
        ([{"text": "x", "id": True}], r"document 1 has the id True"),
        ([{"text": "x", "id": ""}], r"document 1 has the id ''"),
        ([{"text": "x", "payload": {"title": "y"}}], r"without the fields title and text"),
        ("one text", r"documents are given as a list or another iterable"),
    ],
)
def test_what_is_no_document_is_named(given: Any, message: str) -> None:
    with pytest.raises(ConchError, match=message):
        list(read_documents(given))


def test_lines_of_files_are_counted_and_read(tmp_path: Path) -> None:
    texts, rows = tmp_path / "texts.txt", tmp_path / "rows.jsonl"
    texts.write_bytes("\ufeffone\r\n\ntwo".encode())
    rows.write_text('{"text": "a", "title": null, "metadata": {"year": 1}}\n')
    paths = [str(texts), str(rows)]
    assert (count_lines(paths), count_lines([*paths, "-"])) == (4, 0)
    *plain, row = read_document_files(paths)
    assert plain == ["one", "two"]
    assert (row["payload"], embedded_text(row)) == ({"year": 1}, "a")


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    missing = str(tmp_path / "no.txt")
    for read in (count_lines, lambda paths: list(read_document_files(paths))):
        with pytest.raises(ConchError, match=r"cannot read .*no\.txt: No such file"):
            read([missing])
    with pytest.raises(ConchError, match="format 'xml' is not known: use one of auto, jsonl, li"):
        read_document_files([missing], form="xml")


@pytest.mark.parametrize("form", ["auto", "jsonl"])
@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_in_a_json_file_is_its_items(
    form: str, indent: int | None, tmp_path: Path
) -> None:
    path = tmp_path / "rows.json"
    rows = [{"text": "a", "metadata": {"year": 1}}, "b", {"id": 3, "text": "[c]"}]
    path.write_text(f"\n{json.dumps(rows, indent=indent)}\n")
    found = [(each.id, each.text) for each in read_documents(read_document_files([str(path)]))]
    assert [text for _, text in found] == ["a", "b", "[c]"] and found[2][0] == 3
    assert count_lines([str(path)]) == 0
    assert next(iter(read_document_files([str(path)], form="lines"))).startswith("[")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"text": "a"}, 3]', r"a\.json, item 2 is no JSON object"),
        ("a.json", '[{"text": "a"},\n', r"a\.json is not JSON: "),
        ("a.txt", '[{"text": "a"}]', r"a\.txt begins like a JSON array: name it \.json, give JSON"),
        ("a", '[\n  {"text": "a"}\n]', r"begins like a JSON array"),
        ("a.txt", '["a", "b"]', r"begins like a JSON array"),
        ("a.jsonl", "[1] a", r"a\.jsonl, line 1 is not JSON"),
        ("a.jsonl", '["a"]', r"begins like a JSON array"),
    ],
)
def test_an_array_is_no_list_of_texts(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConchError, match=message):
        list(read_document_files([str(tmp_path / name)]))


def test_a_text_may_begin_with_a_bracket(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("[1] the first note\n[x] done\n")
    assert len(list(read_document_files([str(tmp_path / "notes.txt")]))) == 2
