"""A line on disk: promotion, refusal, return, killed at every step, and altered afterwards."""

import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from conch_dna.checkpoints import DIGESTS, file_digest, write_folder
from conch_dna.errors import ConchError, FolderInUseError, NotWholeError
from conch_dna.generations.line import MANIFEST_FILE, Line, folder_digest
from conch_dna.generations.manifest import METRICS_FILE, outcome_of


def candidate(line: Line, parent: str | None, note: str = "") -> Path:
    parents = [parent, *line.ancestors(parent)][:2] if parent else []
    manifest = {
        "parent": parent,
        "note": note,
        "digests": {"parents": {name: folder_digest(line.folder / name) for name in parents}},
    }
    write_folder(line.candidate, documents={MANIFEST_FILE: manifest, "weights.txt": note})
    return line.candidate


def line_of(folder: Path, generations: int = 3) -> Line:
    line = Line(folder, "tales")
    line.promote(candidate(line, None), event="init")
    for number in range(1, generations):
        line.promote(candidate(line, line.head, f"child {number}"))
    return line


def test_a_line_grows_and_head_names_the_newest(tmp_path: Path) -> None:
    line = line_of(tmp_path)
    assert line.generations() == ["G000", "G001", "G002"]
    assert line.head == "G002"
    assert line.ancestors("G002") == ["G001", "G000"]
    assert line.ancestors("G000") == []
    assert [entry.event for entry in line.log()] == ["init", "promoted", "promoted"]
    assert line.problems() == []
    assert not line.candidate.exists()


def test_a_refused_child_is_kept_and_head_stays(tmp_path: Path) -> None:
    line = line_of(tmp_path)
    first = line.archive(candidate(line, "G002", "first"))
    second = line.archive(candidate(line, "G002", "second"))
    assert re.fullmatch(r"FAILED-G003-\d{8}T\d{6}\.\d+Z", first)
    assert line.failed() == [first, second]
    assert line.manifest(first)["note"] == "first"
    assert (line.head, line.next_name) == ("G002", "G003")
    assert line.problems() == []


def test_a_return_deletes_nothing_and_no_number_is_used_twice(tmp_path: Path) -> None:
    line = line_of(tmp_path)
    assert line.rollback() == "G001"
    assert line.generations() == ["G000", "G001", "G002"]
    assert line.promote(candidate(line, line.head)) == "G003"
    assert line.ancestors("G003") == ["G001", "G000"]
    assert line.rollback("G000") == line.head == "G000"
    assert [entry.event for entry in line.log()][-3:] == ["rollback", "promoted", "rollback"]
    assert line.problems() == []


def test_a_return_goes_to_an_ancestor_only(tmp_path: Path) -> None:
    line = line_of(tmp_path)
    line.rollback()
    with pytest.raises(ConchError, match="G002 is no ancestor of G001; its ancestors are G000"):
        line.rollback("G002")
    line.rollback()
    with pytest.raises(ConchError, match="G000 is the first generation of 'tales'"):
        line.rollback()


def test_more_than_a_thousand_generations_stay_in_order(tmp_path: Path) -> None:
    line = line_of(tmp_path, 1)
    for number in (2, 10, 999, 1000):
        (line.folder / f"G{number:03d}").mkdir()
    assert line.generations() == ["G000", "G002", "G010", "G999", "G1000"]
    assert line.next_name == "G1001"


@pytest.mark.parametrize("name", ["../up", "", "a/b", "x" * 65, "naïve", "."])
def test_a_name_that_is_no_plain_one_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConchError, match="becomes a folder's name"):
        Line(tmp_path, name)


def test_a_line_that_is_not_there_says_how_to_make_one(tmp_path: Path) -> None:
    line = Line(tmp_path, "none")
    assert not line.exists and line.generations() == []
    with pytest.raises(ConchError, match=r"no line 'none' in .*generations init"):
        _ = line.head


def test_a_generation_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(ConchError, match="no generation 'G007'; it has G000, G001"):
        line_of(tmp_path, 2).path("G007")


def test_a_candidate_that_is_not_whole_is_not_promoted(tmp_path: Path) -> None:
    line = line_of(tmp_path)
    (candidate(line, "G002") / "weights.txt").write_text("other")
    for change in (line.promote, line.archive):
        with pytest.raises(NotWholeError, match=r"weights.txt was truncated or altered"):
            change(line.candidate)
    assert line.head == "G002"


def test_a_candidate_of_an_older_line_is_not_promoted(tmp_path: Path) -> None:
    line = line_of(tmp_path)
    old = candidate(line, "G002")
    kept = old.rename(line.folder / "CANDIDATE-G001")
    with pytest.raises(ConchError, match="is not the next generation G003"):
        line.promote(kept)


class Killed(BaseException):
    """As far as files go, what a kill is: nothing after it is done."""


@pytest.mark.parametrize("change", ["init", "promote", "archive", "rollback"])
@pytest.mark.parametrize("moment", range(6))
def test_killed_at_any_moment_head_is_the_old_or_the_new_one(
    change: str, moment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rename is a moment: the folder's, HEAD's and the log's."""
    line = Line(tmp_path, "fresh") if change == "init" else line_of(tmp_path)
    changes: dict[str, tuple[Callable[[], Any], set[str]]] = {
        "init": (lambda: line.promote(line.candidate, event="init"), {"G000"}),
        "promote": (lambda: line.promote(line.candidate), {"G002", "G003"}),
        "archive": (lambda: line.archive(line.candidate), {"G002"}),
        "rollback": (line.rollback, {"G001", "G002"}),
    }
    if change != "rollback":
        candidate(line, None if change == "init" else "G002")
    left = moment

    def stop(real: Callable[..., None]) -> Callable[..., None]:
        def moved(*arguments: Any) -> None:
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            real(*arguments)
            if left == 0:
                raise Killed

        return moved

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", stop(os.rename))
        patched.setattr(os, "replace", stop(os.replace))
        with suppress(Killed):
            changes[change][0]()
    if line.exists:
        assert line.head in changes[change][1]
    line.recover()
    assert not line.exists or line.problems() == []
    if line.candidate.is_dir() and change != "rollback":
        changes[change][0]()
    elif change == "rollback" and line.head == "G002":
        line.rollback()
    final = {"init": "G000", "promote": "G003", "archive": "G002", "rollback": "G001"}
    assert line.head == final[change]
    assert len(line.failed()) == (change == "archive")
    assert line.problems() == []
    assert line.recover() == []


def altered(line: Line, name: str) -> None:
    (line.folder / name / "weights.txt").write_text("altered")


def forged(line: Line, name: str) -> None:
    """With digests that fit again, as someone who knows the format would."""
    parent = line.manifest(name)["parent"]
    manifest = {"parent": parent, "note": "forged", "digests": {"parents": {}}}
    write_folder(line.folder / name, documents={MANIFEST_FILE: manifest, "weights.txt": "forged"})


def rewritten(line: Line) -> None:
    path = line.folder / "log.jsonl"
    entries = [json.loads(text) for text in path.read_text().splitlines()]
    entries[1]["time"] = "2001-01-01T00:00:00+00:00"
    path.write_text("".join(json.dumps(e, sort_keys=True) + "\n" for e in entries))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda line: altered(line, "G001"), ["G001 is not whole: weights.txt was truncated"]),
        (
            lambda line: forged(line, "G001"),
            ["G001 is another than when it entered the log", "G002 grew from another G001"],
        ),
        (
            lambda line: (line.folder / "G000" / "x").write_text(""),
            ["G000 is not whole: x was added"],
        ),
        (rewritten, ["log.jsonl line 3 does not follow"]),
        (lambda line: (line.folder / "HEAD").write_text("G001\n"), ["HEAD names G001, the log's"]),
        (lambda line: (line.folder / "HEAD").write_text("G009\n"), ["names 'G009', which is no"]),
        (lambda line: (line.folder / "log.jsonl").write_text("{"), ["line 1 is no entry"]),
    ],
)
def test_what_was_altered_afterwards_is_reported(
    change: Callable[[Line], Any], expected: list[str], tmp_path: Path
) -> None:
    line = line_of(tmp_path)
    change(line)
    found = line.problems()
    for text in expected:
        assert any(text in problem for problem in found), found


def test_an_ancestor_that_is_gone_is_reported(tmp_path: Path) -> None:
    line = line_of(tmp_path)
    (line.folder / "G000").rename(tmp_path / "elsewhere")
    found = line.problems()
    assert "G000 is in the log and gone" in found
    assert "G001 grew from G000, which is gone" in found


def test_two_processes_do_not_change_a_line_at_once(tmp_path: Path) -> None:
    line = line_of(tmp_path)
    with line.lock(), pytest.raises(FolderInUseError, match="in use by process"), line.lock():
        pass


def rewrite(folder: Path, name: str, content: str) -> None:
    """Alter a file of a whole folder, and its digest with it."""
    (folder / name).write_text(content)
    digests = json.loads((folder / DIGESTS).read_text())
    (folder / DIGESTS).write_text(json.dumps({**digests, name: file_digest(folder / name)}))


@pytest.mark.parametrize(
    "content",
    [
        "null",
        "[]",
        "{}",
        "[" * 200_000,
        '{"digests": [], "parent": 1}',
        '{"digests": {"parents": 1}}',
    ],
)
def test_a_manifest_of_another_form_is_no_whole_one(tmp_path: Path, content: str) -> None:
    line = line_of(tmp_path)
    rewrite(line.path("G001"), MANIFEST_FILE, content)
    with pytest.raises(NotWholeError):
        line.ancestors("G002")
    assert line.problems()


def test_a_first_generation_without_a_base_is_no_whole_one(tmp_path: Path) -> None:
    with pytest.raises(NotWholeError, match=r"the base in .* is no JSON object"):
        line_of(tmp_path).base("G002")


@pytest.mark.parametrize("row", ["null", "[]", "7", "[" * 200_000, '{"event": 1}'])
def test_a_log_of_another_form_is_no_whole_one(tmp_path: Path, row: str) -> None:
    line = line_of(tmp_path)
    with open(line.folder / "log.jsonl", "a", encoding="utf-8") as file:
        file.write(row + "\n")
    with pytest.raises(NotWholeError, match="line 4 is no entry"):
        line.log()
    assert line.problems()


def test_head_and_log_that_are_no_text_are_named(tmp_path: Path) -> None:
    line = line_of(tmp_path)
    (line.folder / "log.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(NotWholeError, match="cannot be read"):
        line.log()
    (line.folder / "HEAD").write_bytes(b"\xff\xfe")
    with pytest.raises(ConchError, match="there is no line"):
        _ = line.head


@pytest.mark.parametrize(
    ("manifest", "metrics"),
    [
        ({"decision": "promoted"}, {}),
        ({"decision": "promoted", "verdicts": [7]}, {}),
        ({"decision": "promoted", "verdicts": [{"no": 1}]}, {}),
        ({"decision": "promoted", "verdicts": []}, []),
    ],
)
def test_an_outcome_of_another_form_is_no_whole_one(
    tmp_path: Path, manifest: dict[str, Any], metrics: Any
) -> None:
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(manifest))
    (tmp_path / METRICS_FILE).write_text(json.dumps(metrics))
    with pytest.raises(NotWholeError):
        outcome_of(tmp_path)
