"""The commands of CORTEX on trained adapters of the embedded student, with its teacher as EGO.

What the commands call is tested elsewhere; here is what they take, print and refuse.
"""

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from conch_dna.cli import main
from conch_dna.cortex.calibration.confidence import save_calibration
from conch_dna.cortex.calibration.drift import (
    Expectations,
    Outcome,
    expected_hand_overs,
    expected_mask,
)
from conch_dna.cortex.calibration.drift_file import DRIFT_FILE, DriftCount
from conch_dna.cortex.calibration.settings import CalibrationSettings
from conch_dna.cortex.cli import cortex
from conch_dna.cortex.commands.terminal import visible
from conch_dna.cortex.engine.batching import interrupt_held_back
from conch_dna.cortex.neuron import create_cortex_suite
from conch_dna.cortex.options import ServerSettings
from conch_dna.retraining.buffer import ExperienceBuffer
from cortex_models import TEXTS, train_adapter, write_adapter
from suites import calibration

ROOT = Path(__file__).resolve().parents[2]
STUDENT, TEACHER = "embedded:student", "embedded:teacher"
EGO = ("--ego", TEACHER)
OPENING = "The owl"
ANSWER = TEXTS["thinking"].removeprefix(OPENING)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters that nobody may change: of an opening, of a domain with a schema, of nothing."""
    place = tmp_path_factory.mktemp("adapters")
    train_adapter(place / "owls" / "adapters_kd", STUDENT, TEXTS["thinking"], lora_keys="all")
    train_adapter(place / "task" / "adapters_kd", STUDENT, TEXTS["task"], lora_keys="all")
    write_adapter(place / "babble" / "adapters_kd", STUDENT, strength=0.0)
    return place


@pytest.fixture
def adapters(made: Path, tmp_path: Path) -> Path:
    """The same in a folder where something may be recorded."""
    place = tmp_path / "adapters"
    place.mkdir()
    for folder in made.iterdir():
        (place / folder.name).symlink_to(folder)
    return place


def run(*arguments: str, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(main, ["cortex", *arguments], input=stdin)


def done(*arguments: str, stdin: str | bytes | None = None) -> Result:
    result = run(*arguments, stdin=stdin)
    assert result.exit_code == 0, result.output
    return result


def refused(*arguments: str, stdin: str | bytes | None = None) -> str:
    """The one line that is all that a command prints."""
    result = run(*arguments, stdin=stdin)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def at(place: Path) -> tuple[str, str]:
    return "--adapters", str(place)


def kept(place: Path, domain: str) -> list[Any]:
    experiences, problems = ExperienceBuffer(place / "experience").read(domain)
    assert not problems
    return experiences


# ask


def test_an_answer_goes_out_and_who_gave_it_beside_it(adapters: Path) -> None:
    result = done("ask", "owls", OPENING, *at(adapters))
    assert result.stdout == f"{ANSWER}\n"
    assert re.fullmatch(
        r"owls: the neuron's confidence is not calibrated, so its answer stands · "
        r"confidence 0\.\d{3}, not calibrated · \d+ tokens in \d+\.\d s\n",
        result.stderr,
    )


def test_a_question_comes_from_standard_input_and_the_answer_as_json(
    adapters: Path, tmp_path: Path
) -> None:
    file = tmp_path / "answer.json"
    options = ("--max-tokens", "3", "--json", str(file))
    result = done("ask", "owls", "-", *options, *at(adapters), stdin=f"{OPENING}\n")
    document = json.loads(file.read_text())
    assert ANSWER.startswith(document["text"]) and document["completion_tokens"] == 3
    assert result.stdout == f"{document['text']}\n"
    assert "cut off, since --max-tokens or the context was reached" in result.stderr


def test_what_is_not_valid_goes_to_ego_and_is_remembered_on_request(adapters: Path) -> None:
    asked = ("ask", "task", "First, get", "--max-tokens", "16", *EGO, *at(adapters))
    assert run(*asked, "--no-remember").exit_code == 1
    assert not (adapters / "experience").exists()
    result = run(*asked)
    assert "EGO: the neuron's answer is not valid" in result.stderr
    # EGO's is not either.
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: the answer does not keep to the schema of task: ")
    assert result.exit_code == 1
    [experience] = kept(adapters, "task")
    assert (experience.kind, experience.by) == ("fallback", "ego")
    assert experience.better == result.stdout.removesuffix("\n")
    own = done(*asked, "--hand-over", "never", "--no-structured")
    assert own.stderr.startswith("task: ") and own.stdout != result.stdout


def test_who_drafted_is_told_beside_the_answer(adapters: Path, tmp_path: Path) -> None:
    asked = ("ask", "owls", "First, get", "--max-tokens", "8", *EGO, "--hand-over", "always")
    alone = done(*asked, "--draft", "none", *at(adapters))
    figures = tmp_path / "answer.json"
    for draft, told in (("auto", "owls"), ("task", "task"), ("embedded:student", None)):
        result = done(*asked, "--draft", draft, "--json", str(figures), *at(adapters))
        name = told or draft
        assert result.stdout == alone.stdout and f"{name} drafted, " in result.stderr
        answer = json.loads(figures.read_text())
        assert answer["draft"] == name and answer["acceptance"] >= 1
    assert "drafted" not in alone.stderr


def test_secrets_are_not_recorded_where_that_is_asked_for(adapters: Path) -> None:
    question = "First, write to tom@example.org"
    run("ask", "task", question, "--max-tokens", "4", *EGO, "--redact", *at(adapters))
    [experience] = kept(adapters, "task")
    assert "tom@" not in json.dumps(experience.messages)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("nope", "Hi"), "there is no adapter of nope in "),
        (("owls", ""), "the prompt is empty: there is nothing to answer"),
        (("owls", "-"), "standard input is empty: there is nothing to answer"),
        (("owls", "Hi", "--max-tokens", "0"), "max_tokens is 0: it must be 1 or more"),
        (("owls", "Hi", "--top-p", "2"), "top_p is 2.0: it must be above 0 and at most 1"),
        (("owls", "Hi", "--ego-name", "x"), "--ego-name and --ego-key-env go with --ego URL"),
        (("owls", "Hi", "--draft", "owls"), "--draft and --draft-tokens go with --ego MODEL"),
        (("owls", "Hi", *EGO, "--draft-tokens", "99"), "draft_tokens is 99: it must be at least 1"),
        (("owls", "Hi", *EGO, "--draft", "nobody"), "the draft is nobody, and neurons are "),
        (("owls", "Hi", "--ego", "http://127.0.0.1:9/v1"), "calls the model, by --ego-name"),
        (("owls", "Hi", "--hand-over", "always"), "always asks EGO, and there is none: give --ego"),
        (("owls", "word " * 600), "context of embedded:student ends at 512"),
        (("owls", "Hi", "--student", TEACHER), "was made for embedded:student"),
        (("owls", "Hi \ud800"), "half a surrogate pair"),
        (("owls", "Hi", "--system", "\ud800"), "half a surrogate pair"),
    ],
)
def test_refused_in_one_line(arguments: tuple[str, ...], expected: str, adapters: Path) -> None:
    assert expected in refused("ask", *arguments, *at(adapters))


def test_a_choice_that_is_none_is_refused_with_the_choices(adapters: Path) -> None:
    result = run("ask", "owls", "Hi", "--hand-over", "maybe", *at(adapters))
    assert result.exit_code == 2 and result.stdout == ""
    assert "'maybe' is not one of 'auto', 'never', 'always'" in result.stderr


def test_standard_input_that_is_no_text(adapters: Path) -> None:
    message = refused("ask", "owls", "-", *at(adapters), stdin=b"\xff\xfe")
    assert message.startswith("standard input is not UTF-8")


def test_no_adapters(tmp_path: Path) -> None:
    for command in (["status"], ["chat"]):
        assert "holds no adapter: make one with" in refused(*command, *at(tmp_path))


# chat


def test_a_chat_is_answered_line_by_line(adapters: Path) -> None:
    lines = f"{OPENING}\n\n/domain task\n/domains\n/nope\n/domain\n/system Be kind.\n/system own\n"
    lines += "/reset\n/help\n/quit\nnever asked\n"
    result = done("chat", "owls", "--max-tokens", "40", *at(adapters), stdin=lines)
    assert result.stdout == f"{ANSWER}\n"
    for told in (
        "owls is not calibrated",
        "task answers from here on; it knows what was said",
        "* task: JSON, not calibrated, ",
        "  owls: text, not calibrated, ",
        "error: there is no /nope: /help shows the commands",
        "error: name one of babble, owls, task: /domain NAME",
        "\nBe kind.\n",
        "the domain's own: You turn a goal into a plan",
        "a new conversation",
        "/better TEXT       record what should have been said",
    ):
        assert told in result.stderr, told


def test_a_chat_knows_its_earlier_turns_and_ends_with_the_input(adapters: Path) -> None:
    first, second = "The", "She counted"
    result = done(
        "chat", "babble", "--max-tokens", "6", *at(adapters), stdin=f"{first}\n{second}\n"
    )
    with create_cortex_suite(adapters, domains=["babble"]) as suite:
        chat = suite["babble"].chat(max_tokens=6)
        said = [list(chat.say(text))[-1].answer.text for text in (first, second)]
        alone = suite.ask("babble", second, max_tokens=6).text
    assert result.stdout == "".join(f"{text}\n" for text in said)
    assert said[1] != alone


def test_verdicts_of_a_chat_are_recorded(adapters: Path) -> None:
    lines = f"/good\n/bad x\n{OPENING}\n/good\n/good\n/bad\n/bad too short\n/better It flew.\nAnd\n"
    result = done("chat", "owls", "--max-tokens", "4", *at(adapters), stdin=lines)
    good, better = kept(adapters, "owls")
    assert (good.kind, better.kind) == ("success", "correction")
    assert good.answer == better.answer and ANSWER.startswith(good.answer)
    assert (better.better, better.problem) == ("It flew.", "too short")
    assert better.finish_reason == "stop" and good.finish_reason == "length"
    for told in (
        "error: there is no answer yet: ask something first",
        "recorded as a good answer of owls; 0 new corrections",
        "that is recorded already",
        "error: say what is wrong with the answer: /bad PROBLEM",
        "error: there is no EGO to correct the answer: say yourself",
        "recorded as a correction of owls; 1 new corrections and hand-overs, fewer than 50",
    ):
        assert told in result.stderr, told


def test_ego_corrects_and_answers_in_a_chat(adapters: Path) -> None:
    lines = f"{OPENING}\n/bad too short\n/ego\n"
    options = ("--max-tokens", "8", "--no-structured", *EGO, *at(adapters))
    result = done("chat", "owls", *options, stdin=lines)
    own, _, rest = result.stdout.partition("\n")
    [experience] = kept(adapters, "owls")
    assert experience.kind == "correction" and rest.startswith(f"{experience.better}\n")
    ego = rest.removeprefix(f"{experience.better}\n").removesuffix("\n")
    assert experience.answer == own and ANSWER.startswith(own)
    assert result.stderr.splitlines()[-1].startswith("EGO: EGO was asked for")
    assert ego and ego != own
    alone = done("chat", "owls", *at(adapters), stdin=f"{OPENING}\n/ego\n")
    assert "error: there is no EGO to ask: start the chat with --ego MODEL" in alone.stderr


def test_without_ego_at_hand_a_chat_goes_on(adapters: Path, tmp_path: Path) -> None:
    gone = ("--ego", str(tmp_path / "gone"))
    lines = f"{OPENING}\n/ego\n/bad no\n{OPENING}\n"
    result = done("chat", "owls", "--max-tokens", "2", *gone, *at(adapters), stdin=lines)
    assert len(result.stdout.splitlines()) == 2
    assert result.stderr.count("is not available") == 2


def test_a_line_that_is_no_text_does_not_end_a_chat(adapters: Path) -> None:
    lines = b"\xff\n" + OPENING.encode() + b"\n//quit\n"
    result = done("chat", "owls", "--max-tokens", "2", *at(adapters), stdin=lines)
    assert "error: a line of standard input is not UTF-8" in result.stderr
    assert len(result.stdout.splitlines()) == 2


def test_a_chat_survives_a_prompt_that_is_too_long(adapters: Path) -> None:
    lines = f"{'word ' * 600}\n{OPENING}\n"
    result = done("chat", "owls", *at(adapters), stdin=lines)
    assert "context of embedded:student ends at 512" in result.stderr
    assert result.stdout == f"{ANSWER}\n"


def test_what_steers_a_terminal_is_left_out() -> None:
    assert visible("a\x1b[31mb\x07\tc\nd\x9b\r") == "a[31mb\tc\nd"


COMMAND = [sys.executable, "-m", "conch_dna", "cortex"]


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_and_not_the_chat(adapters: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "chat", "babble", "--max-tokens", "480", *at(adapters)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin and process.stdout
    process.stdin.write(b"Once upon a time\n")
    process.stdin.flush()
    begun = process.stdout.read(8)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    rest, told = process.communicate(b"/domain owls\n" + OPENING.encode() + b"\n", timeout=120)
    assert process.returncode == 0, told
    assert b"stopped; the conversation is as it was before the question" in told
    *broken, answer = (begun + rest).decode().rstrip("\n").split("\n")
    assert answer == ANSWER, "the broken answer is no part of the conversation"
    assert len("".join(broken)) < 1200


@pytest.mark.slow
def test_ctrl_c_ends_an_ask(adapters: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "ask", "babble", "Once upon a time", "--max-tokens", "480", *at(adapters)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout
    process.stdout.read(8)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert (process.returncode, told.decode()) == (130, "stopped\n")


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_chat_in_a_terminal(adapters: Path) -> None:
    own, other = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, "chat", "owls", *at(adapters)],
        stdin=other,
        stdout=other,
        stderr=other,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(other)
    seen = ""

    def until(text: str) -> None:
        nonlocal seen
        while text not in seen:
            seen += os.read(own, 4096).decode(errors="replace")
        seen = seen.partition(text)[2]

    try:
        until("owls answers; /help shows the commands")
        until("owls> ")
        # The line editor completes a command.
        os.write(own, b"/doma\t\n")
        until("name one of babble, owls, task")
        until("owls> ")
        # Between its prompt and its waiting the line editor would notice it with the next key.
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        until("/quit or the end of input (Ctrl-D) ends the chat")
        until("owls> ")
        os.write(own, f"{OPENING}\n".encode())
        until("its answer stands")
        until("owls> ")
        os.write(own, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(own)


def test_ctrl_c_is_held_back_for_the_time_of_a_step() -> None:
    passed = []

    def step() -> None:
        with interrupt_held_back():
            signal.raise_signal(signal.SIGINT)
            passed.append("the rest of the step")

    with pytest.raises(KeyboardInterrupt):
        step()
    assert passed
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# status


def test_status_shows_every_neuron_and_loads_no_model(
    adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from conch_dna.language_model import ModelSource

    with create_cortex_suite(adapters, domains=["owls"]) as suite:
        digest = suite.bank.digest_of("owls")
    (adapters / "owls").unlink()
    (adapters / "owls").mkdir()
    source = (adapters / "task").resolve().parent / "owls" / "adapters_kd"
    (adapters / "owls" / "adapters_kd").symlink_to(source)
    save_calibration(adapters, "owls", calibration(digest, threshold=0.625))
    done("record", "owls", "--prompt", "?", "--answer", "a", "--better", "b", *at(adapters))
    ExperienceBuffer(adapters / "experience").path("gone").write_text("no record\n")

    def looked_for(*arguments: Any, **more: Any) -> None:
        raise AssertionError("a status needs no model")

    monkeypatch.setattr(ModelSource, "__init__", looked_for)
    file = tmp_path / "status.json"
    result = done("status", "--min-new", "1", "--json", str(file), *at(adapters))
    rows = {row["domain"]: row for row in json.loads(file.read_text())["neurons"]}
    assert set(rows) == {"babble", "owls", "task"}
    owls = rows["owls"]
    assert (owls["version"], owls["structured"], owls["retrain"]) == (None, False, True)
    assert owls["digest"] == digest and owls["experience"]["lessons"] == 1
    assert owls["calibration"]["threshold"] == 0.625 and rows["task"]["calibration"] is None
    for text in ("distilled", "owls/adapters_kd", "0.625", "JSON", "yes: 1 new"):
        assert text in result.stdout, text
    assert "there is experience of gone and no adapter" in result.stderr
    assert "gone.jsonl, line 1: no whole record" in result.stderr
    assert "task is not calibrated" in result.stderr


def test_status_shows_drift_and_what_keeps_it_from_being_seen(
    adapters: Path, tmp_path: Path
) -> None:
    with create_cortex_suite(adapters) as suite:
        digests = {name: suite.bank.digest_of(name) for name in suite.domains}
    for name in digests:
        source = (adapters / name).resolve()
        (adapters / name).unlink()
        (adapters / name).mkdir()
        (adapters / name / "adapters_kd").symlink_to(source / "adapters_kd")
    masses = expected_mask([0.01] * 200)
    watched = Expectations(hand_over=expected_hand_overs(40, 200), mask=masses, max_tokens=8)
    for name, expected in {"owls": watched, "task": watched, "babble": None}.items():
        found = calibration(digests[name], threshold=0.5, expected=expected)
        save_calibration(adapters, name, found)
        if name == "owls":
            owls = DriftCount(adapters, name, found, report=lambda line: None)
    result = done("status", *at(adapters))
    assert "babble's calibration does not say what to expect of live answers" in result.stderr
    assert "drifts" not in result.stderr
    table = re.sub(r"[\s│]+", " ", result.stdout)
    assert "owls hand-overs 20% - - 0 - no" in table and "babble hand-overs" not in table
    for _ in range(50):
        owls.add(Outcome(True, 0.01))
    owls.save()
    (adapters / "task" / DRIFT_FILE).write_text("{")
    file = tmp_path / "status.json"
    result = done("status", "--json", str(file), *at(adapters))
    table = re.sub(r"[\s│]+", " ", result.stdout)
    day = r"\d{4}-\d\d-\d\d"
    assert re.search(rf"owls hand-overs 20% 100% 100% 50 {day} {day}", table)
    assert re.search(rf"owls mask 1% 1% 1% 50 {day} no", table)
    assert "task hand-overs" not in table
    [line] = [line for line in result.stderr.splitlines() if "drifts" in line]
    assert line.startswith("owls drifts since 2")
    assert "100.0% of 50 answers did not stand; calibration: 20.0% of 200; calibrate on" in line
    assert "what was counted of task's drift is left out" in result.stderr
    rows = {row["domain"]: row for row in json.loads(file.read_text())["neurons"]}
    assert rows["babble"]["drift"] is None and rows["task"]["drift"] is None
    drift = rows["owls"]["drift"]
    assert (drift["hand_over"]["answers"], drift["hand_over"]["live"]) == (50, 1.0)
    assert drift["hand_over"]["drifted"] and not drift["mask"]["drifted"] and drift["since"]
    assert drift["mask"]["expected"]["at_most"] == pytest.approx(masses.at_most)


# record


def test_answers_are_recorded_one_by_one_and_from_a_file(adapters: Path, tmp_path: Path) -> None:
    one = ("--prompt", "Plan.", "--answer", "Pack.")
    result = done("record", "task", *one, *at(adapters))
    assert result.stdout == (
        "task: 1 recorded, 0 known already; 0 new corrections and hand-overs, fewer than 50\n"
    )
    result = done("record", "task", *one, "--better", "Sort.", "--problem", "short", *at(adapters))
    rows = [
        {"prompt": "Plan.", "answer": "Pack."},
        {"messages": [{"role": "user", "content": "Go."}], "answer": "a", "better": "b"},
        {"prompt": "?", "answer": "a", "better": "b", "kind": "fallback", "by": "ego"},
    ]
    file = tmp_path / "more.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = done("record", "task", "--from", str(file), *at(adapters))
    assert result.stdout.startswith("task: 2 recorded, 1 known already; 3 new corrections")
    kinds = [each.kind for each in kept(adapters, "task")]
    assert kinds == ["success", "correction", "correction", "fallback"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "record 2: not JSON ("),
        ("[1]", "record 2: not a JSON object with prompt and answer"),
        ('{"prompt": "a"}', "record 2: it has no answer"),
        ('{"answer": "a"}', "record 2: give either prompt or messages"),
        ('{"prompt": "a", "answer": "b", "beter": "c"}', "it names unknown settings: beter"),
        ('{"prompt": "a", "answer": 1}', "answer is 1, not text"),
        ('{"prompt": 1, "answer": "b"}', "is no object of a role and a content"),
        ('{"messages": 7, "answer": "b"}', "messages is 7, not a list of turns"),
        ('{"prompt": "a", "answer": ""}', "a success with an empty answer teaches nothing"),
        ('{"prompt": "a", "answer": "b", "better": ""}', "needs the better answer as text"),
    ],
)
def test_a_file_with_a_wrong_line_records_nothing(
    line: str, expected: str, adapters: Path, tmp_path: Path
) -> None:
    file = tmp_path / "more.jsonl"
    file.write_text(f'{{"prompt": "a", "answer": "b"}}\n{line}\n')
    message = refused("record", "task", "--from", str(file), *at(adapters))
    assert expected in message and message.endswith("Nothing was recorded")
    assert not kept(adapters, "task")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "give --prompt and --answer, or --from FILE"),
        (("--prompt", "a"), "give --prompt and --answer, or --from FILE"),
        (("--from", "x", "--prompt", "a"), "give --prompt and --answer, or --from FILE"),
        (("--prompt", "a", "--answer", "b", "--problem", "c"), "--problem goes with --better"),
        (("--from", "nowhere.jsonl"), "cannot read --from nowhere.jsonl"),
    ],
)
def test_records_that_are_refused(
    arguments: tuple[str, ...], expected: str, adapters: Path
) -> None:
    assert expected in refused("record", "task", *arguments, *at(adapters))


def test_nothing_is_recorded_of_a_neuron_that_is_not_there(adapters: Path) -> None:
    message = refused("record", "tsk", "--prompt", "a", "--answer", "b", *at(adapters))
    assert message.startswith("there is no adapter of tsk in ")
    assert not (adapters / "experience").exists()


# retrain and rollback

DISTILLATION = """
num_iters: 6
learning_rate: 3e-3
warmup_iters: 1
batch_size: 4
lora_keys: all
lora_rank: 4
max_tokens: 8
steps_per_eval: 3
steps_per_save: 3
val_fraction: 0.25
"""
OPEN_GATES = "gates: {generalize_gain: -1.0, recall_margin: 1.0, max_tone_drift: 1.0}\n"
QUICK = "training_params: {iters: 3}\nevaluation: {answers: 2}\n"


@pytest.mark.slow
def test_a_neuron_learns_what_was_recorded_and_goes_back(tmp_path: Path) -> None:
    """From its distillation with own data on, all by commands."""
    place, data = tmp_path / "adapters", tmp_path / "old.jsonl"
    rows = [{"prompt": f"Once {n}", "completion": f" there were {n} cats."} for n in range(16)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.yaml").write_text(DISTILLATION)
    options = ["--config", str(tmp_path / "run.yaml"), "--output-dir", str(place)]
    options += ["--domain", "tales", "--data", str(data)]
    options += ["--teacher", TEACHER, "--student", STUDENT]
    result = CliRunner().invoke(main, ["distill", *options])
    assert result.exit_code == 0, result.output
    assert refused("retrain", "tales", *at(place)).startswith("there is nothing new to learn")
    assert "tales was never retrained" in refused("rollback", "tales", *at(place))
    new = tmp_path / "new.jsonl"
    rows = [
        {"prompt": f"Sum {n}", "answer": "?", "better": f" It is {n} balls."} for n in range(16)
    ]
    new.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done("record", "tales", "--from", str(new), *at(place))
    config, file = tmp_path / "retraining.yaml", tmp_path / "result.json"
    config.write_text(f"{QUICK}gates: {{generalize_gain: 1.0}}\n")
    given = ("--config", str(config), "--json", str(file), *at(place))
    result = run("retrain", "tales", *given)
    assert result.exit_code == 1, result.output
    assert "FAILED" in result.stdout and "answers by G000; the new version is in" in result.stdout
    assert json.loads(file.read_text())["promoted"] is False
    config.write_text(QUICK + OPEN_GATES)
    assert "there is nothing new to learn" in run("retrain", "tales", *given).stderr
    result = done("retrain", "tales", "--with-refused", *EGO, *given)
    document = json.loads(file.read_text())
    assert document["version"] == "G001" and document["experiences"] == 16
    assert document["taught_by"].endswith("the distributions of EGO, embedded:teacher")
    assert "tales learned from 16 experiences and answers by G001" in result.stdout
    manifest = json.loads((Path(document["path"]) / "manifest.json").read_text())
    training = manifest["training_params"]
    # Of the file, and of the distillation where it says nothing.
    assert (training["num_iters"], training["batch_size"], training["lora_rank"]) == (3, 4, 4)
    assert "G001" in done("status", *at(place)).stdout
    assert done("ask", "tales", "Sum 3", "--max-tokens", "2", *at(place)).stdout
    result = done("rollback", "tales", *at(place))
    assert result.stdout == "tales answered by G001 and answers by G000\n"


def test_resume_or_overwrite(adapters: Path) -> None:
    message = refused("retrain", "task", "--resume", "--overwrite", *at(adapters))
    assert message == "give either --resume to go on or --overwrite to start again"


@pytest.mark.slow
def test_the_example_goes_from_distillation_to_a_retrained_version(tmp_path: Path) -> None:
    script = ROOT / "examples" / "cortex.py"
    found = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "adapters")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=500,
    )
    assert found.returncode == 0, found.stderr
    assert "retrain answers? yes: 36 new corrections" in found.stdout
    assert "G001: active" in found.stdout
    assert "answers, by G001: It is a" in found.stdout
    assert "rollback: G000 is active again" in found.stdout


# calibrate and serve


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "give either a domain or --all"),
        (("task", "--all"), "give either a domain or --all"),
        (("task",), "a neuron is calibrated on its agreement with EGO: give --ego MODEL"),
        (("--all", *EGO, "--prompts", "x"), "--prompts and --data go with one domain"),
        (("task", *EGO, "--prompts", "nowhere.txt"), "cannot read --prompts nowhere.txt"),
    ],
)
def test_calibrations_that_are_refused(
    arguments: tuple[str, ...], expected: str, adapters: Path
) -> None:
    assert expected in refused("calibrate", *arguments, *at(adapters))


@pytest.mark.slow
def test_a_neuron_is_calibrated(adapters: Path, tmp_path: Path) -> None:
    prompts, file = tmp_path / "prompts.txt", tmp_path / "found.json"
    animals = ("cat", "dog", "owl", "fox", "hen", "cow")
    prompts.write_text(
        "".join(f"The {size} {each}\n" for each in animals for size in ("big", "wet", "old", "red"))
    )
    (adapters / "babble").unlink()
    write_adapter(adapters / "babble" / "adapters_kd", STUDENT, strength=0.0)
    options = ("--max-tokens", "6", "--max-risk", "1", *EGO, *at(adapters))
    result = done("calibrate", "babble", "--prompts", str(prompts), "--json", str(file), *options)
    document = json.loads(file.read_text())["calibrations"]["babble"]
    assert document["n_fit"] + document["n_held"] == 24 and document["max_risk"] == 1
    assert f"{document['ece_before']:.3f}" in result.stdout
    assert (adapters / "babble" / "risk_coverage.png").is_file()
    assert "isotonic, from" in " ".join(done("status", *at(adapters)).stdout.split())
    assert "bare" not in done("ask", "babble", "The cat", *at(adapters)).stderr
    result = run("calibrate", "--all", *options)
    assert result.exit_code == 1
    assert "error: task: " in result.stderr


def stated(command: click.Command) -> dict[str, str]:
    """The defaults that a command's help states."""
    return {
        each.name: match[1]
        for each in command.params
        if each.name and (match := re.search(r"\[default: ([^\]]+)\]$", each.help or ""))
    }


def test_calibrations_defaults_are_those_that_its_help_states() -> None:
    defaults = stated(cortex.commands["calibrate"])
    for each in fields(CalibrationSettings):
        assert defaults[each.name].split(";")[0] == str(each.default), each.name


def test_the_servers_defaults_are_those_that_its_help_states() -> None:
    defaults = stated(cortex.commands["serve"])
    for each in fields(ServerSettings):
        assert defaults[each.name].split(";")[0] == (str(each.default) or "none"), each.name


@pytest.mark.slow
def test_the_server_answers_and_stops(adapters: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [*COMMAND, "serve", "--port", str(port), *at(adapters)], stderr=subprocess.PIPE, text=True
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(1200):
            try:
                with urllib.request.urlopen(f"{address}/v1/models", timeout=30) as found:
                    models = json.load(found)["data"]
                break
            except OSError:
                assert process.poll() is None, process.stderr
                time.sleep(0.1)
        assert {model["id"] for model in models} == {"babble", "owls", "task"}
        body = {"model": "owls", "messages": [{"role": "user", "content": OPENING}]}
        request = urllib.request.Request(
            f"{address}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as found:
            answer = json.load(found)
        assert answer["choices"][0]["message"]["content"] == ANSWER
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 0
