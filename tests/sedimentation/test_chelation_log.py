import dataclasses
import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from conch_dna.checkpoints import content_digest
from conch_dna.errors import ConchError, NotWholeError
from conch_dna.sedimentation.changes import chelation_log
from conch_dna.sedimentation.changes.chelation_log import (
    EVENTS_FILE,
    ChelationLog,
    Event,
    log_files,
    read_events,
)
from conch_dna.sedimentation.stores.ledger import LEDGER


@pytest.fixture
def tmp_path(tmp_path):
    """A folder within, as the ledger lies beside the log's."""
    folder = tmp_path / "log"
    folder.mkdir()
    return folder


def log_one(log, *neighbourhood, query="what is coral", version="raw", dispersion=0.1):
    return log.append(
        query=query,
        version=version,
        student_digest="s" * 64,
        dispersion=dispersion,
        threshold=0.2,
        neighbourhood=list(neighbourhood) or ["a", 1],
    )


def test_a_line_holds_every_documented_field_and_no_text_unless_asked(tmp_path):
    log_one(ChelationLog(tmp_path), "a", 7)
    line = json.loads((tmp_path / EVENTS_FILE).read_text())
    documented = re.findall(r"^        (\w+): ", Event.__doc__, re.MULTILINE)
    names = [each.name for each in dataclasses.fields(Event)]
    assert documented == names
    assert sorted(line) == sorted([*names, "digest"])
    assert line["number"] == 1
    assert line["query"] is None
    assert line["query_digest"] == content_digest("what is coral")
    assert line["neighbourhood"] == ["a", 7]
    assert (line["dispersion"], line["threshold"], line["version"]) == (0.1, 0.2, "raw")
    assert line["time"].endswith("+00:00")
    assert line["previous"] == ""


def test_texts_are_kept_when_asked(tmp_path):
    log_one(ChelationLog(tmp_path, keep_queries=True), query="Wie groß?\nzwei Zeilen")
    assert next(read_events(tmp_path)).query == "Wie groß?\nzwei Zeilen"


def test_the_log_survives_a_restart_and_numbers_go_on(tmp_path):
    first = log_one(ChelationLog(tmp_path), "a", "b")
    again = ChelationLog(tmp_path)
    assert len(again) == 1
    assert not again.recovered
    second = log_one(again, "b")
    assert (second.number, second.previous) == (2, first.digest)
    assert list(again.events()) == [first, second]


def test_documents_are_counted_once_an_event_and_by_version(tmp_path):
    log = ChelationLog(tmp_path)
    log_one(log, "a", "b", "a")
    log_one(log, "a", "b", 1)
    log_one(log, "a", "c", version="v1")
    log_one(log, "a", "1", version="v1")
    assert log.documents_logged(at_least=1) == {"a": 4, "b": 2, 1: 1, "c": 1, "1": 1}
    assert log.documents_logged(at_least=2) == {"a": 4, "b": 2}
    assert log.documents_logged(at_least=4) == {"a": 4}
    assert log.documents_logged(at_least=5) == {}
    assert log.documents_logged(at_least=1, version="raw") == {"a": 2, "b": 2, 1: 1}
    assert log.documents_logged(at_least=1, version="v1") == {"a": 2, "c": 1, "1": 1}
    assert [event.number for event in log.events(version="v1")] == [3, 4]


def test_rotated_files_stay_part_of_the_history(tmp_path):
    log = ChelationLog(tmp_path, rotate_bytes=1200)
    for number in range(20):
        log_one(log, f"doc {number}")
        if number == 11:
            log = ChelationLog(tmp_path, rotate_bytes=1200)
    names = [path.name for path in log_files(tmp_path)]
    assert len(names) > 3
    assert names[0] == "chelation_events.000001.jsonl"
    assert names[-1] == EVENTS_FILE
    assert all(path.stat().st_size < 1200 + 600 for path in log_files(tmp_path))
    assert [event.number for event in read_events(tmp_path)] == list(range(1, 21))
    assert len(log.documents_logged(at_least=1)) == 20
    assert len(ChelationLog(tmp_path)) == 20


def test_killed_between_rotation_and_the_first_line_of_the_next_file(tmp_path):
    last = log_one(ChelationLog(tmp_path))
    (tmp_path / EVENTS_FILE).rename(tmp_path / "chelation_events.000001.jsonl")
    log = ChelationLog(tmp_path)
    assert log_one(log).previous == last.digest
    assert len(list(read_events(tmp_path))) == 2


@pytest.mark.parametrize("share", [0.01, 0.5, 1.0])
def test_a_half_written_last_line_is_kept_aside_and_reported(share, tmp_path):
    log = ChelationLog(tmp_path)
    first = log_one(log, "a")
    ledger = (tmp_path.parent / LEDGER).read_text()
    line = log_one(log, "b").line
    (tmp_path.parent / LEDGER).write_text(ledger)
    kept = max(1, int(share * (len(line) - 1)))
    path = tmp_path / EVENTS_FILE
    os.truncate(path, path.stat().st_size - len(line) + kept)
    # A reader does not see what was never acknowledged, and moves nothing.
    assert list(read_events(tmp_path)) == [first]
    assert path.stat().st_size == len(first.line) + kept

    again = ChelationLog(tmp_path)
    assert again.recovered == [
        f"event 2 was half-written ({kept} bytes) when its process ended; kept in "
        "chelation_events.half-2"
    ]
    assert (tmp_path / "chelation_events.half-2").read_bytes() == line[:kept]
    assert path.read_bytes() == first.line
    log_one(again, "c")
    assert [event.neighbourhood for event in read_events(tmp_path)] == [["a"], ["c"]]
    assert not ChelationLog(tmp_path).recovered


def test_what_was_acknowledged_before_a_kill_is_there(tmp_path):
    code = """
import sys
from pathlib import Path
from conch_dna.sedimentation.changes.chelation_log import ChelationLog
log = ChelationLog(Path(sys.argv[1]), rotate_bytes=20_000)
while True:
    event = log.append(query="q", version="raw", student_digest="s", dispersion=0.1,
                       threshold=0.2, neighbourhood=[f"document {n}" for n in range(300)])
    print(event.number, flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    with process:
        acknowledged = [process.stdout.readline() for _ in range(40)]
        process.send_signal(signal.SIGKILL)
        acknowledged += process.stdout.readlines()
    last = int(acknowledged[-1])
    assert len(log_files(tmp_path)) > 2
    log = ChelationLog(tmp_path)
    # A line may be whole on disk whose number was not printed yet.
    assert last <= len(log) <= last + 1
    counts = log.documents_logged(at_least=last)
    assert counts == {f"document {number}": len(log) for number in range(300)}


def change_figure(lines):
    return [lines[0].replace(b"0.1", b"0.9"), *lines[1:]]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_figure, "line 1 was altered"),
        (lambda lines: [lines[0], *lines[2:]], "line 2 is event 3 and does not follow event 1"),
        (lambda lines: [lines[1], lines[0], lines[2]], "line 1 is event 2"),
        (lambda lines: [lines[0], b"\x00" * 20 + b"\n", lines[2]], "line 2 is no event"),
        (lambda lines: [lines[0], b"[1]\n", lines[2]], "line 2 is no event"),
        (
            lambda lines: [lines[0], lines[1], lines[2].replace(b"raw", b"war")],
            "line 3 was altered",
        ),
    ],
)
def test_damage_is_found(damage, message, tmp_path):
    log = ChelationLog(tmp_path)
    for _ in range(3):
        log_one(log)
    path = tmp_path / EVENTS_FILE
    path.write_bytes(b"".join(damage(path.read_bytes().splitlines(keepends=True))))
    with pytest.raises(NotWholeError, match=message):
        ChelationLog(tmp_path)
    with pytest.raises(NotWholeError, match=message):
        log.documents_logged(at_least=1)


def test_a_missing_file_of_the_history_is_found(tmp_path):
    log = ChelationLog(tmp_path, rotate_bytes=1)
    for _ in range(4):
        log_one(log)
    (tmp_path / "chelation_events.000002.jsonl").unlink()
    with pytest.raises(NotWholeError, match="is event 3 and does not follow event 1: lines or a"):
        ChelationLog(tmp_path)


def test_a_missing_end_is_found_and_one_too_many_is_none(tmp_path):
    log = ChelationLog(tmp_path)
    log_one(log)
    ledger = (tmp_path.parent / LEDGER).read_text()
    log_one(log)
    lines = (tmp_path / EVENTS_FILE).read_bytes().splitlines(keepends=True)
    (tmp_path / EVENTS_FILE).write_bytes(lines[0])
    with pytest.raises(NotWholeError, match="1 entries, but 2 were acknowledged: the end is miss"):
        ChelationLog(tmp_path)
    # Killed between the line and its entry in the ledger: what more there is counts from now on.
    (tmp_path / EVENTS_FILE).write_bytes(b"".join(lines))
    (tmp_path.parent / LEDGER).write_text(ledger)
    assert len(list(read_events(tmp_path))) == 2 and len(ChelationLog(tmp_path)) == 2
    (tmp_path / EVENTS_FILE).unlink()
    with pytest.raises(NotWholeError, match="0 entries, but 2 were acknowledged"):
        list(read_events(tmp_path))
    (tmp_path.parent / LEDGER).write_text(ledger.replace('"count": 1', '"count": 0'))
    with pytest.raises(NotWholeError, match=r"ledger.json was altered.*Restore"):
        ChelationLog(tmp_path)


def test_what_the_ledger_cannot_count_is_not_logged(tmp_path, monkeypatch):
    log = ChelationLog(tmp_path)
    first = log_one(log)

    def full(*_):
        raise ConchError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(chelation_log, "acknowledge", full)
        with pytest.raises(ConchError, match="the disk is full"):
            log_one(log)
    assert (tmp_path / EVENTS_FILE).read_bytes() == first.line
    assert log_one(log).number == 2 and len(ChelationLog(tmp_path)) == 2


def test_a_full_disk_leaves_the_log_as_it_was(tmp_path):
    """A limit on the size of files stands for it: the write stops in the middle of the line."""
    log = ChelationLog(tmp_path)
    first = log_one(log)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(first.line) + 100, hard))
    try:
        with pytest.raises(ConchError, match=r"cannot write the chelation log .* disk space"):
            log_one(log)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / EVENTS_FILE).read_bytes() == first.line
    assert log_one(log).number == 2
    assert len(ChelationLog(tmp_path)) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dispersion": float("nan")}, "dispersion nan and threshold 0.2 must be finite"),
        ({"neighbourhood": []}, "without documents"),
    ],
)
def test_what_is_no_event_is_refused(change, message, tmp_path):
    log = ChelationLog(tmp_path)
    event = {
        "query": "q",
        "version": "raw",
        "student_digest": "s",
        "dispersion": 0.1,
        "threshold": 0.2,
        "neighbourhood": ["a"],
    }
    with pytest.raises(ConchError, match=message):
        log.append(**{**event, **change})
    assert not (tmp_path / EVENTS_FILE).exists()


def test_settings_out_of_range_and_a_folder_that_cannot_be_made(tmp_path):
    with pytest.raises(ConchError, match="rotate_bytes is 0"):
        ChelationLog(tmp_path, rotate_bytes=0)
    with pytest.raises(ConchError, match="threshold 0 must be 1 event or more"):
        ChelationLog(tmp_path).documents_logged(at_least=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConchError, match="cannot write the chelation log"):
        ChelationLog(Path(tmp_path / "file" / "log"))
