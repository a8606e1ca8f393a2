"""The page over finished runs: whole, self-contained, escaped, and as loud as its verdict."""

import json
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from conch_dna import cli
from conch_dna.checkpoints import write_folder
from conch_dna.errors import ConchError
from conch_dna.training.runs import domain_run, html_report, report_charts
from conch_dna.training.runs.html_report import find_runs, write_report
from conch_dna.training.runs.report import read_samples, samples_text
from conch_dna.training.runs.report_charts import MOST_POINTS, thinned
from conch_dna.training.settings import KDConfig, KDResult

HOSTILE = "<script>alert('&amp;')</script> {{ 7 * 7 }} $x_1$"


def figures(kl: float) -> dict[str, Any]:
    return {
        "kl_nats": kl,
        "chunk_kl_nats": kl / 2,
        "cross_entropy": 2 + kl,
        "perplexity": 9.0,
        "bits_per_byte": 1.5,
        "top1_agreement": 1 - kl / 4,
        "tokens": 1234,
        "compared_tokens": 1234,
        "chunks": 1234,
    }


BREAKDOWN = {
    "figure": "kl_nats",
    "by_position": {
        "first": [1, 2, 3, 5],
        "count": [4, 4, 8, 2],
        "before": [4, 8, 8, 2],
        "after": [2.0, 1, 1, 1],
    },
    "by_teacher_entropy": {"mean": [0.5, 1.5], "count": [9, 9], "before": [9, 9], "after": [1, 2]},
    "calibration": {
        name: {"confidence": [0.2, 0.8], "outcome": [0.1, 0.9], "count": [9, 9], "ece": 0.125}
        for name in ("before", "after", "teacher")
    },
}


def make_run(
    folder: Path,
    word: str = "better",
    *,
    evaluation: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    texts: tuple[str, ...] = ("the end.", "and then", "the end"),
    heldout: str = "held out",
) -> Path:
    """A finished run's folder, as `DomainRun.finish` leaves it, without its adapter."""
    low = {"better": -0.3, "worse": 0.1}.get(word, -0.1)
    verdict = {
        "figure": "kl_nats",
        "verdict": word,
        "difference": low + 0.1,
        "interval": [low, low + 0.2],
        "confidence": 0.95,
        "examples": 24,
    }
    found = {
        "before": figures(0.5),
        "after": figures(0.6 + low),
        "teacher": figures(0.0),
        "gap_closed": 0.25,
        "verdict": verdict,
        "alignment": "index",
        "breakdown": BREAKDOWN,
        **(evaluation or {}),
    }
    metadata = {
        "domain": "stories",
        "teacher": "embedded:teacher",
        "student": "embedded:student",
        "teacher_digest": "ab" * 32,
        "config": asdict(KDConfig(**(config or {}))),
        "versions": {"conch_dna": "0.1.0", "mlx": "0.32.4"},
        "best_step": 100,
        "train_examples": 40,
        "peak_memory_bytes": 2**27,
    }
    result = KDResult(
        domain="stories",
        num_samples=64,
        adapter_path=str(folder),
        final_kd_loss=0.4,
        final_ce_loss=2.0,
        final_combined_loss=0.9,
        training_time_seconds=61.0,
        timestamp="2026-11-29T10:00:00+00:00",
        evaluation={name: value for name, value in found.items() if value is not None},
        metadata=metadata,
    )
    history = [
        {"split": split, "step": step, "loss": 2.5, "kd": 0.4, "ce": 3.0}
        for step in range(0, 201, 50)
        for split in ("train", "heldout")
    ]
    labels = ("teacher", "student before", "student after")
    columns = {label: [text] for label, text in zip(labels, texts, strict=True)}
    samples = samples_text("stories", ["Once upon"], columns, draw="temperature 0.7, seed 0")
    write_folder(
        folder,
        documents={
            "kd_result.json": result.to_json(),
            "training_log.json": history,
            "samples.md": samples,
            "heldout.jsonl": heldout,
        },
    )
    return folder


class Page(HTMLParser):
    """What a browser makes of a page: its tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def page_of(*folders: Path, output: Path) -> Page:
    write_report(folders, output)
    return Page(output.read_text(encoding="utf-8"))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without pictures, which take most of the time."""
    monkeypatch.setattr(report_charts, "svg_text", lambda *_: "<svg></svg>")


def test_the_names_of_files_are_those_of_a_run():
    assert html_report.RESULT == domain_run.RESULT_FILE
    assert html_report.HELDOUT == domain_run.HELDOUT_FILE


def test_one_run_has_all_its_parts(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "stories" / "adapters_kd"), output=tmp_path / "a.html")
    for part in (
        "stories: better the student is better: KL to the teacher 0.5000 before, 0.3000 after",
        "95% interval -0.3000 to -0.1000, 24 held-out examples",
        "stories: 25.0% of the gap closed; on 1,234 held-out tokens",
        "KL to teacher (nats)",
        "KL by the token's place in the answer",
        "3–4 8 1.0000 0.1250",
        "KL by how unsure the teacher was",
        "before 0.125, after 0.125, teacher 0.125",
        "Drawn with temperature 0.7, seed 0.",
        "Once upon teacher the end. student before and then student after the end",
        "kept step 100 of 200",
        "learning_rate 0.0001",
    ):
        assert part in page.text, part
    assert page.tags.count("svg") == 4
    assert "What differs" not in page.text


def test_the_page_needs_nothing_else_and_runs_nothing(tmp_path: Path) -> None:
    output = tmp_path / "a.html"
    page = page_of(make_run(tmp_path / "a"), output=output)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "a"} & set(page.tags)
    references = [value for name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert all(value and value.startswith("#") for value in references)
    text = output.read_text()
    assert "://" not in text and "@import" not in text
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    assert "prefers-color-scheme: dark" in text and "@media print" in text
    assert "#010203" not in text and "currentColor" in text
    assert len(text) < 300_000


@pytest.mark.usefixtures("undrawn")
def test_every_text_is_shown_as_it_is(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", texts=(HOSTILE, "</pre><h1>x", "ok"))
    metadata = json.loads((run / "kd_result.json").read_text())
    metadata["metadata"]["student"] = metadata["metadata"]["config"]["lora_keys"] = HOSTILE
    write_folder(
        run,
        documents={
            "kd_result.json": metadata,
            **{n: json.loads((run / n).read_text()) for n in ("training_log.json",)},
            "samples.md": (run / "samples.md").read_text(),
        },
    )
    page = page_of(run, make_run(tmp_path / "b"), output=tmp_path / "a.html")
    assert "script" not in page.tags and page.tags.count("h1") == 1
    assert page.text.count(HOSTILE) == 5, "sample, fact, setting and two that differ"
    assert "</pre><h1>x" in page.text


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("word", "tone"), [("better", "good"), ("worse", "bad"), ("not shown to be better", "unsure")]
)
def test_a_bad_result_is_as_loud_as_an_error(word: str, tone: str, tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "a", word), output=tmp_path / "a.html")
    assert ("class", f"verdict {tone}") in page.attributes
    assert (("role", "alert") in page.attributes) == (word != "better")
    shown = word if word == "better" else word.upper()
    assert f"stories: {shown} the student is {shown}:" in page.text
    assert page.text.startswith(f"stories: {shown}"), "the title too"
    assert ("try " in page.text) == (word != "better")


@pytest.mark.usefixtures("undrawn")
def test_a_run_of_before_says_what_it_does_not_hold(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", evaluation={"breakdown": None, "verdict": None})
    page = page_of(run, output=tmp_path / "a.html")
    assert "did not store figures by token" in page.text
    assert "this run is older than verdicts" in page.text
    assert ("class", "verdict unsure") in page.attributes


@pytest.mark.usefixtures("undrawn")
def test_a_test_set_is_judged_beside_what_was_held_out(tmp_path: Path) -> None:
    one = make_run(tmp_path / "one", "worse")
    test = json.loads((one / "kd_result.json").read_text())["evaluation"]
    two = make_run(tmp_path / "two", evaluation={"test": test})
    for page in (
        page_of(two, output=tmp_path / "a.html"),
        page_of(two, one, output=tmp_path / "a.html"),
    ):
        assert page.text.startswith("stories: better; stories, test set: WORSE")
        assert "stories, test set: WORSE the student is WORSE: KL to the teacher" in page.text
        assert "stories, test set: 25.0% of the gap closed" in page.text
    assert "run 1: stories, test set: WORSE" in page.text and "run 2: stories: WORSE" in page.text


@pytest.mark.usefixtures("undrawn")
def test_what_was_not_compared_is_said(tmp_path: Path) -> None:
    chunks = {**BREAKDOWN, "figure": "chunk_kl_nats", "by_teacher_entropy": None}
    chunks["calibration"] = {k: v for k, v in BREAKDOWN["calibration"].items() if k != "teacher"}
    run = make_run(tmp_path / "a", evaluation={"breakdown": chunks, "alignment": "alm"})
    page = page_of(run, output=tmp_path / "a.html")
    assert "of chunks, since no token can be compared" in page.text
    assert "KL by the teacher's entropy is not known" in page.text
    assert "chunk KL (nats)" in page.text


@pytest.mark.usefixtures("undrawn")
def test_several_runs_show_what_differs_and_whether_they_compare(tmp_path: Path) -> None:
    one = make_run(tmp_path / "1" / "stories" / "adapters_kd")
    other = {"learning_rate": 1e-3, "output_dir": "2"}
    two = make_run(tmp_path / "2" / "stories" / "adapters_kd", "worse", config=other)
    output = tmp_path / "both.html"
    page = page_of(tmp_path / "1", two.parent, one, output=output)
    assert page.tags.count("svg") == 1 + 2 * 4
    assert page.text.startswith("stories: better; stories: WORSE")
    assert "run 1: stories: better" in page.text and "run 2: stories: WORSE" in page.text
    assert page.tags.count("article") == 2, "a run given twice is shown once"
    differs = page.text.split("What differs between these runs")[1].split("run 1: stories")[0]
    assert "learning_rate 0.0001 0.001" in differs
    assert "num_iters" not in differs and "Do not compare" not in page.text
    make_run(two, "worse", config=other, heldout="other texts")
    page = page_of(one, two, output=output)
    assert "Do not compare these figures with each other:" in page.text
    assert "judged by different held-out texts" in page.text


def test_runs_are_found_by_every_folder_above_them(tmp_path: Path) -> None:
    one = make_run(tmp_path / "stories" / "adapters_kd")
    two = make_run(tmp_path / "runs" / "slow" / "stories" / "adapters_kd")
    make_run(tmp_path / "stories" / ".writing-1-adapters_kd")
    assert find_runs(one) == find_runs(one.parent) == [one]
    assert find_runs(tmp_path / "runs") == [two]
    assert find_runs(tmp_path) == [two, one]


@pytest.mark.usefixtures("undrawn")
def test_what_cannot_be_seen_is_shown_as_an_escape(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "a", texts=("a\x1b[31m red \u202e gpj", "\x00\ttab \u2066", "größe 🦜")
    )
    page = page_of(run, output=tmp_path / "a.html")
    assert r"a\x1b[31m red \u202e gpj" in page.text
    assert "\\x00 tab \\u2066" in page.text and "größe 🦜" in page.text
    assert not set("\x00\x1b\u202e\u2066") & set((tmp_path / "a.html").read_text())


@pytest.mark.usefixtures("undrawn")
def test_a_run_that_is_begun_again_is_said_to_be_unfinished(tmp_path: Path) -> None:
    run = make_run(tmp_path / "s" / "adapters_kd")
    for state, said in (({"finished": False, "adapter": run.name}, 1), ({"finished": True}, 0)):
        (run.parent / "run.json").write_text(json.dumps(state))
        done = CliRunner().invoke(cli.main, ["report", str(run)])
        assert done.stderr.count("warning: a run in") == said
        page = (run.parent / "report.html").read_text()
        assert page.count("is not finished: these figures are of the adapter") == said


@pytest.mark.usefixtures("undrawn")
def test_a_run_without_one_of_its_files_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    (run / "heldout.jsonl").unlink()
    with pytest.raises(ConchError, match=r"is not whole: heldout\.jsonl is missing"):
        write_report([run], tmp_path / "a.html")


@pytest.mark.usefixtures("undrawn")
def test_long_logs_and_texts_are_cut_and_say_so(tmp_path: Path) -> None:
    rows = [{"split": "train", "step": step, "loss": 1.0} for step in range(2000)]
    kept, every = thinned([*rows, {"split": "heldout", "step": 7, "loss": 2}], 1001)
    steps = [row["step"] for row in kept]
    assert every == 5 and len(steps) <= MOST_POINTS + 3
    assert {0, 5, 7, 1001, 1999} <= set(steps)
    run = make_run(tmp_path / "a", texts=("long " * 2000, "a", "b"))
    page = page_of(run, output=tmp_path / "a.html")
    assert "… (cut here: all 9,999 letters are in samples.md)" in page.text


def test_samples_are_read_as_they_were_written():
    columns = {
        "teacher": [" there was\n\n# a bird.\n**student after**", "x"],
        "student before": ["", "> quoted"],
        "student after": ["## 3", "y"],
    }
    draw, samples = read_samples(samples_text("s", ["Once\nupon", "The"], columns, draw="seed 3"))
    assert draw == "Drawn with seed 3."
    assert samples == [
        {
            "prompt": "Once\nupon",
            "teacher": "there was\n\n# a bird.\n**student after**",
            "student before": "(nothing)",
            "student after": "## 3",
        },
        {"prompt": "The", "teacher": "x", "student before": "> quoted", "student after": "y"},
    ]


@pytest.mark.usefixtures("undrawn")
def test_what_cannot_be_reported_is_one_line(tmp_path: Path, monkeypatch) -> None:
    run = make_run(tmp_path / "a" / "adapters_kd")
    with pytest.raises(ConchError, match="is no folder"):
        find_runs(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConchError, match="holds no finished run"):
        find_runs(tmp_path / "empty")
    with pytest.raises(ConchError, match=r"must end in \.html"):
        write_report([run], tmp_path / "a.txt")
    with pytest.raises(ConchError, match="only whole without other files"):
        write_report([run], run / "a.html")
    monkeypatch.setattr(html_report, "MOST_RUNS", 0)
    with pytest.raises(ConchError, match="a page holds 0"):
        write_report([run], tmp_path / "a.html")
    monkeypatch.undo()
    strange = json.loads((run / "kd_result.json").read_text())
    del strange["evaluation"]["before"]
    make_run(run)
    (run / "kd_result.json").write_text(json.dumps(strange))
    with pytest.raises(ConchError, match=r"kd_result\.json was truncated or altered"):
        write_report([run], tmp_path / "a.html")
    write_folder(
        run, documents={"kd_result.json": strange, "training_log.json": [], "samples.md": ""}
    )
    with pytest.raises(ConchError, match="has another form than finished runs have"):
        write_report([run], tmp_path / "a.html")
    assert not (tmp_path / "a.html").exists()


@pytest.mark.usefixtures("undrawn")
def test_the_command_says_the_verdict_and_where_the_page_is(tmp_path: Path) -> None:
    run = make_run(tmp_path / "stories" / "adapters_kd", "worse")
    for folder in (run, run.parent):
        done = CliRunner().invoke(cli.main, ["report", str(folder)])
        assert done.exit_code == 0, done.output
        assert "the student is WORSE: KL to the teacher 0.5000 before" in done.output
        page = run.parent / "report.html"
        assert f"written: {page}" in done.output
        page.unlink()
    done = CliRunner().invoke(cli.main, ["report", str(tmp_path / "no"), "--output", "a.html"])
    assert done.exit_code == 2 and done.output.count("\n") == 1


@pytest.mark.usefixtures("undrawn")
def test_a_config_of_another_version_gets_no_advice(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", "worse")
    found = html_report.read_run(run)
    found.result.metadata["config"]["gone_option"] = 3
    page = Page(html_report.html_page([replace(found)]))
    assert "gone_option 3" in page.text and "try " not in page.text
