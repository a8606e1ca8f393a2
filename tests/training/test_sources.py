"""Where records come from: a file, a folder as mlx-lm has it, a data set of the hub, a pipe.

`datasets` is an extra: the tests of it skip where it is not there, and one needs that it is not.
"""

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conch_dna.errors import ConchError
from conch_dna.training.data.sources import Given, leak_warnings, read_given


def rows(name: str, count: int = 2) -> list[dict[str, Any]]:
    return [{"prompt": f"{name} {n}?", "completion": f"{n}."} for n in range(count)]


def lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def folder(path: Path, **sets: list[dict[str, Any]]) -> Path:
    path.mkdir(exist_ok=True)
    for name, records in sets.items():
        (path / f"{name}.jsonl").write_text(lines(records))
    return path


def read(**given: Any) -> tuple[dict[str, Any], list[str]]:
    notes: list[str] = []
    given = {name: str(v) if isinstance(v, Path) else v for name, v in given.items()}
    return read_given(Given(**given), notes.append), notes


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without `datasets`."""
    monkeypatch.setitem(sys.modules, "datasets", None)


def test_a_folder_brings_its_own_validation_and_test_set(tmp_path):
    path = folder(tmp_path / "d", train=rows("a", 3), valid=rows("b"), test=rows("c"))
    found, notes = read(data=path)
    assert found == {"data": rows("a", 3), "valid_data": rows("b"), "test_data": rows("c")}
    assert notes == []
    (path / "valid.jsonl").unlink()
    assert list(read(data=path)[0]) == ["data", "test_data"]
    found, notes = read(data=path, with_test=False)
    assert list(found) == ["data"] and notes[0].startswith("test is false")


def test_sets_of_their_own_win_over_the_folders(tmp_path):
    path = folder(tmp_path / "d", train=rows("a"), valid=rows("b"), test=rows("c"))
    other = folder(tmp_path / "e", valid=rows("v"), extra=rows("x"))
    found, _ = read(data=path, valid_data=other, test_data=other / "extra.jsonl")
    assert found == {"data": rows("a"), "valid_data": rows("v"), "test_data": rows("x")}
    prompts = tmp_path / "p.txt"
    prompts.write_text("One?\n")
    found, _ = read(prompts=prompts, test_data=path)
    assert found == {"prompts": ["One?"], "test_data": rows("c")}


def test_a_mapping_is_of_every_set(tmp_path):
    records = [{"q": "a?", "a": "b."}]
    path = folder(tmp_path / "d", train=records, valid=records)
    found, _ = read(data=path, mapping={"prompt": "q", "completion": "a"})
    assert found["data"] == found["valid_data"] == [{"prompt": "a?", "completion": "b."}]


def test_standard_input_is_read_once(monkeypatch):
    pipe = SimpleNamespace(buffer=io.BytesIO(lines(rows("a")).encode()))
    monkeypatch.setattr(sys, "stdin", pipe)
    assert read(data="-")[0] == {"data": rows("a")}
    with pytest.raises(ConchError, match="standard input is empty: give one JSON object a line"):
        read(data="-")
    pipe.buffer = io.BytesIO(b'{"text": "a"}\n{')
    with pytest.raises(ConchError, match=r"^standard input, line 2: not JSON"):
        read(data="-")
    pipe.buffer = io.BytesIO(b"One?\nTwo?\n")
    assert read(prompts="-")[0] == {"prompts": ["One?", "Two?"]}
    with pytest.raises(ConchError, match=r"standard input \(-\) can be read once"):
        read(data="-", test_data="-")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"data": "https://hub.example/d.jsonl?raw=true"},
            r"^--data https://hub\.example/d\.jsonl\?raw=true is a URL: download it first",
        ),
        ({"data": "nowhere.jsonl"}, "cannot read --data nowhere.jsonl: no such file or folder"),
        ({"data": "nowhere"}, r"no such file or folder \(a data set of the hub is OWNER/NAME\)"),
        ({"data": "data/nowhere.jsonl"}, "cannot read --data data/nowhere.jsonl: no such file"),
        ({"data": "./a/b"}, "cannot read --data ./a/b: no such file or folder"),
        ({"mapping": {"text": "a"}}, "--map and --data-split are of --data: give it"),
        ({"prompts": "p", "data_split": "train"}, "leave them out with --prompts"),
        ({"test_data": "nowhere"}, "cannot read --test-data nowhere"),
    ],
)
def test_what_is_nowhere_is_said_to_be(given, message):
    with pytest.raises(ConchError, match=message):
        read(**given)


def test_a_folder_without_its_file_says_what_it_has(tmp_path):
    path = folder(tmp_path / "d", training=rows("a"))
    with pytest.raises(ConchError, match=r"/d has no train\.jsonl \(it has training\.jsonl\)"):
        read(data=path)
    with pytest.raises(ConchError, match=r"--valid-data .*/d has no valid\.jsonl"):
        read(data=path / "training.jsonl", valid_data=path)
    with pytest.raises(ConchError, match=r"/e has no train\.jsonl \(empty\)"):
        read(data=folder(tmp_path / "e"))
    with pytest.raises(ConchError, match="test is true, but there is no test set"):
        read(data=path / "training.jsonl", with_test=True)


@pytest.mark.usefixtures("away")
def test_a_name_of_the_hub_is_said_to_be_taken_for_one():
    notes: list[str] = []
    with pytest.raises(ConchError, match=r"--data some/data needs .*: pip install 'conch-dna\["):
        read_given(Given(data="some/data"), notes.append)
    (note,) = notes
    assert note.endswith("no such file or folder, so it is taken for a data set of the hub")


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    """A folder of tables as the hub has them: two splits, other columns, nulls."""
    datasets = pytest.importorskip("datasets", reason="the extra `data` is not installed")
    path = tmp_path / "tables"
    for split, names in (("train", "abc"), ("validation", "d"), ("test", "e")):
        records = [
            {"question": f"{n}?", "answer": f"{n}.", "id": 1, "conversations": None} for n in names
        ]
        datasets.Dataset.from_list(records).to_parquet(path / f"{split}-00000.parquet")
    return path


def pairs(names: str) -> list[dict[str, str]]:
    return [{"prompt": f"{n}?", "completion": f"{n}."} for n in names]


def test_a_folder_of_tables_is_read_by_datasets(tables, tmp_path):
    found, notes = read(data=tables)
    assert found == {"data": pairs("abc"), "valid_data": pairs("d"), "test_data": pairs("e")}
    assert notes == [f"--data {tables} has no train.jsonl but tables, which `datasets` reads"]
    assert read(data=tables, data_split="train[:2]")[0] == {"data": pairs("ab")}
    assert read(data=tables, data_split="test")[0] == {"data": pairs("e")}
    assert read(data=tables, mapping={"text": "answer"})[0]["data"][0] == {"text": "a."}
    with pytest.raises(ConchError, match=r"cannot read the data set .*other"):
        read(data=tables, data_split="other")
    with pytest.raises(ConchError, match=r"tables, train, row 1: --map text=nothing"):
        read(data=tables, mapping={"text": "nothing"})


def test_a_saved_data_set_is_read_by_datasets(tables, tmp_path):
    import datasets

    datasets.load_dataset(str(tables)).save_to_disk(tmp_path / "saved")
    assert read(data=tmp_path / "saved")[0]["data"] == pairs("abc")


def test_a_data_set_that_the_hub_does_not_have_is_one_line(tables):
    with pytest.raises(ConchError, match="cannot read the data set no/such, which is no file or"):
        read(data="no/such")


def test_records_that_are_learned_and_judge_are_named():
    train = [*rows("a", 9), {"text": "Once."}, {"prompt": "", "completion": "b"}]
    assert leak_warnings(train, {"validation": rows("b"), "test": []}) == []
    other = [{"text": "Two."}, {"text": "Once."}, {"prompt": "a 3?", "completion": "Other."}]
    assert leak_warnings(train, {"validation": other}) == [
        "2 of 3 validation examples ask what training examples ask too, so that they flatter the "
        "student: 2 (training example 10), 3 (training example 4)"
    ]
    (warning,) = leak_warnings(train, {"test": rows("a", 8)})
    assert warning.endswith("5 (training example 5) and 3 more")
    assert leak_warnings(train, {"test": [{"prompt": "", "completion": "c"}]}) == []


def test_a_test_set_that_chooses_the_step_is_named_or_refused(tmp_path):
    sets = {"validation": rows("v", 3), "test": [*rows("v", 1), *rows("t")]}
    assert leak_warnings(rows("a"), sets) == [
        "1 of 3 test examples ask what validation examples ask too, so that they flatter the "
        "student: 1 (validation example 1)"
    ]
    data = folder(tmp_path, train=rows("a"), valid=rows("v", 3), test=rows("v"))
    with pytest.raises(ConchError, match="the test set is among the validation set, which chooses"):
        read(data=data)
    found, _ = read(data=data, test_data=folder(tmp_path / "t", test=sets["test"]))
    assert len(found["test_data"]) == 3
