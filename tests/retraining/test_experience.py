"""Experience on disk: whole records are kept, damage is told, and secrets can be left out."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conch_dna.errors import ConchError, NotWholeError
from conch_dna.retraining.adapter_config import adapter_config, shape_of
from conch_dna.retraining.buffer import REDACTIONS, ExperienceBuffer, _luhn, redacted
from conch_dna.retraining.experience import Experience, experience_of, read_experiences

WRITER = """
import sys
from pathlib import Path
from conch_dna.retraining.buffer import ExperienceBuffer
from conch_dna.retraining.experience import Experience
buffer = ExperienceBuffer(Path(sys.argv[1]))
for n in range(30):
    turns = ({"role": "user", "content": f"{sys.argv[2]} asks {n}"},)
    assert buffer.add(Experience(domain="task", messages=turns, answer="x", kind="success"))
"""


def experience(number: int = 0, **changes: Any) -> Experience:
    turns = ({"role": "user", "content": f"What is {number}?"},)
    fields = {"domain": "task", "messages": turns, "answer": "it", "kind": "success", **changes}
    return Experience(**fields)


def corrected(number: int = 0, **changes: Any) -> Experience:
    return experience(number, kind="correction", better="a number", **changes)


def test_what_is_added_is_read_back_in_its_order(tmp_path: Path) -> None:
    buffer = ExperienceBuffer(tmp_path)
    wanted = [
        experience(0, confidence=0.5),
        corrected(1, problem="too short\nand wrong", answer="\u2028 ü 🦙"),
        experience(2, kind="fallback", better="two", by="ego", finish_reason="length"),
        corrected(3, domain="debug"),
    ]
    assert [buffer.add(each) for each in wanted] == [True] * 4
    assert ExperienceBuffer(tmp_path).read("task") == (wanted[:3], [])
    assert buffer.read("debug") == (wanted[3:], [])
    assert buffer.read("thinking") == ([], [])
    assert buffer.domains == ["debug", "task"]
    counts = buffer.stats()["task"]
    assert counts["bytes"] == buffer.path("task").stat().st_size
    del counts["bytes"]
    assert counts == {"success": 1, "correction": 1, "fallback": 1, "bad_lines": 0}


def test_the_same_is_kept_once_whoever_writes_it(tmp_path: Path) -> None:
    first, second = ExperienceBuffer(tmp_path), ExperienceBuffer(tmp_path)
    assert first.add(experience(1, confidence=0.1))
    # When and how sure it was make no other experience.
    assert not second.add(experience(1, confidence=0.9, time="2030-01-01"))
    assert second.add(corrected(1))
    assert not first.add(corrected(1))
    assert first.add_many([experience(2), experience(2), experience(1)]) == 1
    assert len(first.read("task")[0]) == 3


def test_several_processes_append_at_once(tmp_path: Path) -> None:
    words = [sys.executable, "-c", WRITER, str(tmp_path)]
    started = [subprocess.Popen([*words, name]) for name in ("ann", "ben", "cem")]
    assert [process.wait(timeout=120) for process in started] == [0, 0, 0]
    found, problems = ExperienceBuffer(tmp_path).read("task")
    assert problems == []
    for name in ("ann", "ben", "cem"):
        asked = [each.messages[0]["content"] for each in found]
        assert [text for text in asked if name in text] == [f"{name} asks {n}" for n in range(30)]


def test_a_half_written_line_is_told_and_harms_no_other(tmp_path: Path) -> None:
    buffer = ExperienceBuffer(tmp_path)
    buffer.add(experience(0))
    whole = buffer.path("task").read_bytes()
    buffer.path("task").write_bytes(whole + experience(1).line[:40])
    for writer in (buffer, ExperienceBuffer(tmp_path)):
        found, problems = writer.read("task")
        assert found == [experience(0, time=found[0].time)]
        assert problems == [f"{tmp_path / 'task.jsonl'}, line 2: no whole record (40 bytes)"]
    assert buffer.add(experience(2))
    assert buffer.add(experience(1)), "the half one was never kept"
    found, problems = buffer.read("task")
    assert [each.messages[0]["content"][-2] for each in found] == ["0", "2", "1"]
    assert len(problems) == 1


def test_a_last_line_that_lacks_only_its_end_counts(tmp_path: Path) -> None:
    buffer = ExperienceBuffer(tmp_path)
    buffer.add(experience(0))
    buffer.path("task").write_bytes(buffer.path("task").read_bytes() + experience(1).line[:-1])
    buffer.add(experience(2))
    assert [len(each) for each in buffer.read("task")] == [3, 0]
    assert not buffer.add(experience(1))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "no whole record"),
        ("[1]", "no whole record"),
        ('{"id": "1", "messages": 5}', "no whole record"),
        (experience().line.decode().replace("it", "that"), "altered: its id belongs to another"),
        (json.dumps({**json.loads(experience().line), "more": 1}), "unknown fields more"),
        ('{"id": "1", "messages": []}', "fields are missing"),
        (experience().line.decode().replace("success", "triumph"), "kind 'triumph' is not one of"),
    ],
)
def test_a_bad_line_is_reported_with_its_number(tmp_path: Path, line: str, problem: str) -> None:
    buffer = ExperienceBuffer(tmp_path)
    buffer.add(experience(0))
    with open(buffer.path("task"), "a", encoding="utf-8") as file:
        file.write(line.rstrip("\n") + "\n")
    buffer.add(experience(1))
    found, problems = buffer.read("task")
    assert len(found) == 2
    assert len(problems) == 1 and "line 2: " in problems[0] and problem in problems[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "ok", "by": "me"}, "kind 'ok' is not .*; by 'me' is not one of neuron, ego"),
        ({"domain": "../x"}, "becomes a folder's name"),
        ({"better": "x"}, "a success has no better answer"),
        ({"answer": ""}, "a success with an empty answer teaches nothing"),
        ({"kind": "correction"}, "a correction needs the better answer"),
        ({"kind": "fallback", "better": ""}, "a fallback needs the better answer"),
        ({"confidence": float("nan")}, "confidence nan is not between 0 and 1"),
        ({"confidence": 1.1}, "confidence 1.1"),
        ({"messages": ()}, "a tuple of at least one turn"),
        ({"messages": ({"role": "user"},)}, "is no object of a role and a content"),
        ({"messages": ({"role": "assistant", "content": "?"},)}, "end before the answer"),
        ({"answer": "\ud800"}, "half a surrogate pair"),
        ({"answer": 5}, "answer is 5, not text"),
    ],
)
def test_what_is_no_experience_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConchError, match=message):
        experience(**changes)


def test_of_many_wrong_lines_the_first_are_named(tmp_path: Path) -> None:
    file = tmp_path / "more.jsonl"
    file.write_text("{\n" * 7)
    with pytest.raises(ConchError, match=r"record 5: not JSON .*; and 2 more"):
        read_experiences(file, "task")


def test_beyond_the_bound_the_oldest_that_are_settled_go_first(tmp_path: Path) -> None:
    told: list[str] = []
    old = [corrected(n) for n in range(6)]
    buffer = ExperienceBuffer(
        tmp_path,
        max_records=10,
        settled=lambda domain: {each.id for each in old[:4]},
        report=lambda event, row: told.append(row["message"]),
    )
    other = ExperienceBuffer(tmp_path, max_records=10)
    buffer.add_many([*old, *(experience(n) for n in range(4))])
    assert not other.add(old[0])
    assert told == []
    assert buffer.add(corrected(6))
    left = buffer.read("task")[0]
    # 10 % of room, so that not every record rewrites the file.
    assert left == [*old[2:], *left[4:8], left[-1]]
    assert told == [
        "experience of task reached 10 records: dropped the oldest, 2 that were learned from and 0 "
        "successes that were not"
    ]
    # Another process sees the rewritten file.
    assert not other.add(old[2])
    assert other.add(corrected(7))
    assert len(other.read("task")[0]) == 10


def test_then_the_oldest_successes_go_and_no_correction_ever(tmp_path: Path) -> None:
    buffer = ExperienceBuffer(tmp_path, max_records=4)
    buffer.add_many([corrected(0), experience(1), experience(2), corrected(3)])
    buffer.add(corrected(4))
    assert [each.messages[0]["content"][-2] for each in buffer.read("task")[0]] == list("0234")
    buffer.add(corrected(5))
    before = buffer.path("task").read_bytes()
    with pytest.raises(ConchError, match=r"holds 4 records, .*: retrain the domain, or raise max"):
        buffer.add(corrected(6))
    assert buffer.path("task").read_bytes() == before


def test_a_bound_and_redactions_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConchError, match="max_records is 0"):
        ExperienceBuffer(tmp_path, max_records=0)
    with pytest.raises(ConchError, match="by the name shoes: use some of private_key"):
        ExperienceBuffer(tmp_path, redact=["email", "shoes"])


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConchError, match="cannot write experience to"):
        ExperienceBuffer(tmp_path / "file").add(experience())


SECRETS = {
    "private_key": "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nIBAA\n-----END RSA PRIVATE KEY-----",
    "token": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3",
    "api_key": "sk-proj-abcdefghij0123456789",
    "password": "password: hunter2",
    "email": "ann.b+c@mail.example.org",
    "card": "4111 1111 1111 1111",
    "iban": "DE89 3704 0044 0532 0130 00",
}


def test_every_redaction_has_an_example() -> None:
    assert SECRETS.keys() == REDACTIONS.keys()


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_is_replaced_and_what_is_around_it_stays(name: str) -> None:
    assert redacted(f"Take {SECRETS[name]}, or not.", [name]) == f"Take [redacted:{name}], or not."


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("AKIAIOSFODNN7EXAMPLE", "[redacted:api_key]"),
        ("ghp_0123456789abcdefghij0123", "[redacted:api_key]"),
        ("Authorization: Bearer abcdefghijklmnop1234", "Authorization: [redacted:token]"),
        ("a-eyJ0-eyJhbGciOi.eyJzdWIiOi.x", "a-[redacted:token]"),
        ("eyJ.eyJhbGciOiJ.eyJzdWIiOi.x_y-z.", "eyJ.[redacted:token]."),
        ("beyJhbGciOiJ.eyJzdWIiOi.x", None),
        ("4111111111111111, then 94111111111111111-7", "[redacted:card], then 9[redacted:card]-7"),
        ("https://ann:pass@host/x", "https://[redacted:password]@host/x"),
        ("The number 4111 1111 1111 1112 is no card.", None),
        ("An order 123456789012 of 20 pens @ 3 each", None),
        ("A risk-based task-list; the secret of youth is sleep", None),
        ("def f(x): return x.y@z", None),
    ],
)
def test_what_is_a_secret_and_what_only_looks_like_one(text: str, left: str | None) -> None:
    assert redacted(text, list(REDACTIONS)) == (text if left is None else left)


@pytest.mark.parametrize("name", REDACTIONS)
def test_redaction_takes_time_in_proportion_to_the_text(name: str) -> None:
    def seconds(piece: str, length: int) -> float:
        text = (piece * (length // len(piece) + 1))[:length]
        times = []
        for _ in range(3):
            began = time.process_time()
            redacted(text, [name])
            times.append(time.process_time() - began)
        return min(times)

    for piece in ("-eyJ", "eyJaaaaaaaa.", "-sk-", "password ", "://a:", "a@a.", "1-", "AB12", "_-"):
        # Eight times the text; quadratic time would be 64 times as much.
        assert seconds(piece, 2**18) < 24 * max(seconds(piece, 2**15), 1e-3), piece


def test_many_card_numbers_are_found_in_no_time() -> None:
    cards = [f"{4 * 10**15 + n:016d}" for n in range(150_000) if _luhn(f"{4 * 10**15 + n:016d}")]
    began = time.process_time()
    assert redacted(" ; ".join(cards), ["card"]).count("[redacted:card]") == len(cards) == 15_000
    assert time.process_time() - began < 2


def test_redaction_happens_before_anything_is_written_or_compared(tmp_path: Path) -> None:
    buffer = ExperienceBuffer(tmp_path, redact=True)
    secret = SECRETS["email"]
    turns = ({"role": "user", "content": f"Write to {secret}"},)
    each = corrected(answer=secret, problem=secret, messages=turns)
    each = replace(each, better=f"Dear {secret}")
    assert buffer.add(each) and not buffer.add(each)
    assert secret.encode() not in buffer.path("task").read_bytes()
    found = buffer.read("task")[0][0]
    assert (found.better, found.answer) == ("Dear [redacted:email]", "[redacted:email]")
    only = ExperienceBuffer(tmp_path / "other", redact=["card"])
    only.add(each)
    assert secret.encode() in only.path("task").read_bytes()


@pytest.mark.parametrize("line", ["[" * 200_000, '{"a": ' + "[" * 90 + "]" * 90 + "}", "9" * 9000])
def test_a_line_that_python_cannot_work_with_is_refused(line):
    with pytest.raises(ConchError, match="not JSON"):
        experience_of(line, "thinking")
    with pytest.raises(ConchError, match="no whole record"):
        Experience.from_line(line.encode())


@pytest.mark.parametrize(
    "document",
    [
        "[]",
        "[" * 200_000,
        '{"num_layers": 2}',
        '{"num_layers": 2, "lora_parameters": []}',
        '{"num_layers": 2, "lora_parameters": {"rank": "8", "scale": 1}}',
        '{"num_layers": null, "lora_parameters": {"rank": 8, "scale": 1}}',
    ],
)
def test_an_adapter_configuration_of_another_form_is_refused(tmp_path, document):
    (tmp_path / "adapter_config.json").write_text(document)
    with pytest.raises(NotWholeError):
        shape_of(adapter_config(tmp_path))
