"""The table, the curve and the samples show the figures they are given, whole and unchanged.

Rendered as people see them: the table in a console, the curve as a PNG, the samples as Markdown.
"""

import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from conch_dna.training.runs import report
from conch_dna.training.runs.report import (
    advice,
    draw_curve,
    evaluation_table,
    heldout_kd,
    rise_of,
    samples_text,
    slice_text,
    verdict_text,
)
from conch_dna.training.settings import KDConfig, KDResult


def figures(kl: float, cross_entropy: float, perplexity: float, top1: float) -> dict[str, Any]:
    return {
        "kl_nats": kl,
        "cross_entropy": cross_entropy,
        "perplexity": perplexity,
        "top1_agreement": top1,
        "bits_per_byte": cross_entropy / 2,
        "chunk_kl_nats": kl / 2,
        "tokens": 12345,
        "compared_tokens": 678,
        "chunks": 910,
    }


EVALUATION = {
    "before": figures(0.87654, 3.14159, 23.1404, 0.4321),
    "after": figures(0.43219, 2.71828, 15.1541, 0.6789),
    "teacher": figures(0.0, 2.0, 7.389, 1.0),
    "gap_closed": 0.50694,
}


def rendered(evaluation: dict[str, Any]) -> list[str]:
    console = Console(file=io.StringIO(), width=120)
    console.print(evaluation_table("thinking", evaluation))
    return console.file.getvalue().splitlines()


def test_the_table_shows_every_figure_in_its_row():
    lines = rendered(EVALUATION)
    text = "\n".join(lines)
    assert "thinking: 50.7% of the gap closed" in text
    assert "on 12,345 held-out tokens" in text
    for heading in ("KL to teacher (nats)", "cross-entropy", "perplexity", "top-1 agreement"):
        assert heading in text
    assert "bits per byte" in text
    assert "chunk" not in text, "with one tokenizer a chunk is a token"
    rows = {
        "student before": ["0.8765", "3.1416", "23.14", "1.5708", "43.2%"],
        "student after": ["0.4322", "2.7183", "15.15", "1.3591", "67.9%"],
        "teacher": ["0.0000", "2.0000", "7.39", "1.0000", "100.0%"],
    }
    found = [line.strip("│ ") for line in lines if "%" in line and "gap" not in line]
    assert [row.split("│")[0].strip() for row in found] == list(rows)
    for row, expected in zip(found, rows.values(), strict=True):
        assert [cell.strip() for cell in row.split("│")[1:]] == expected


def test_across_tokenizers_the_table_says_what_its_figures_stand_on():
    nothing = {**EVALUATION["before"], "kl_nats": None, "top1_agreement": None}
    lines = rendered({**EVALUATION, "before": nothing, "alignment": "alm"})
    text = " ".join(" ".join(lines).split())
    assert "chunk KL (nats)" in text
    assert "KL and agreement at the 678 that are one token of the teacher too" in text
    assert "chunk KL on 910 chunks" in text
    (row,) = [line for line in lines if "student before" in line]
    cells = [cell.strip() for cell in row.strip("│ ").split("│")]
    assert cells[1:3] == ["–", "0.4383"]
    assert cells[-1] == "–"


def test_the_table_says_when_there_was_no_gap_or_it_grew():
    assert any("no gap to close" in line for line in rendered({**EVALUATION, "gap_closed": None}))
    assert any(
        "-20.0% of the gap closed" in line for line in rendered({**EVALUATION, "gap_closed": -0.2})
    )


# The curve


def history(*, kd: bool) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for step in range(0, 30, 10):
        parts = {"kd": 2.0 - step / 50, "ce": 3.0} if kd else {}
        rows.append({"split": "heldout", "step": step, "loss": 2.5 - step / 100, **parts})
        rows.append(
            {"split": "train", "step": step + 5, "loss": 2.4, "gradient_norm": 9.0, **parts}
        )
    return rows


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that were saved."""
    from matplotlib.figure import Figure

    saved: list[Any] = []
    save = Figure.savefig

    def spy(self: Figure, *args: Any, **kwargs: Any) -> None:
        saved.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", spy)
    return saved


def test_the_curve_holds_every_loss_of_both_splits_on_axes_of_its_own(tmp_path, drawn):
    """On shared axes a cross-entropy of 3 nats presses a KD loss of 0.2 flat."""
    path = tmp_path / "training_curve.png"
    draw_curve(path, history(kd=True), title="thinking: losses", best=20)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    panels = {axes.get_title(): axes for axes in drawn[0].axes}
    assert list(panels) == ["KD (t² KL)", "cross-entropy", "combined"]
    lines = {line.get_label(): line for axes in drawn[0].axes for line in axes.get_lines()}
    held = lines["KD (t² KL), held out"]
    assert list(held.get_xdata()) == [0, 10, 20]
    assert list(held.get_ydata()) == pytest.approx([2.0, 1.8, 1.6])
    assert list(lines["combined, training"].get_xdata()) == [5, 15, 25]
    assert list(lines["combined, held out"].get_ydata()) == pytest.approx([2.5, 2.4, 2.3])
    assert list(lines["cross-entropy, training"].get_ydata()) == [3.0] * 3
    assert drawn[0].get_suptitle() == "thinking: losses"
    for axes in panels.values():
        assert axes.get_xlabel() == "optimiser step" and axes.get_ylabel() == "nats per token"
        assert list(axes.get_lines()[-1].get_xdata()) == [20, 20]
    low, high = panels["KD (t² KL)"].get_ylim()
    assert high - low < 1


def test_no_legend_covers_a_curve_and_steps_are_whole(tmp_path, drawn):
    short = [{"split": "heldout", "step": step, "loss": 2 - step / 9} for step in range(6)]
    draw_curve(tmp_path / "a.png", short, title="a", best=5)
    draw_curve(tmp_path / "b.png", history(kd=True), title="b", best=5)
    for figure in drawn:
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()][-1] == "kept: step 5"
        for axes in figure.axes:
            assert axes.get_legend() is None
            assert not legend.get_window_extent().overlaps(axes.get_tightbbox())
            assert all(step == int(step) for step in axes.get_xticks())


def test_no_panel_is_empty_or_there_twice(tmp_path, drawn):
    """With alpha 1 the combined loss is the KD loss; the KL stands where it chose the step."""
    rows = [{**row, "loss": row["kd"]} for row in history(kd=True)]
    draw_curve(tmp_path / "a.png", rows, title="a", best=0)
    held = [{**row, "kl": 0.5} if row["split"] == "heldout" else row for row in history(kd=True)]
    draw_curve(tmp_path / "b.png", held, title="b", best=0)
    titles = [[axes.get_title() for axes in figure.axes] for figure in drawn]
    assert titles[0] == ["KD (t² KL)", "cross-entropy"]
    assert titles[1] == ["KL to the teacher", "KD (t² KL)", "cross-entropy", "combined"]


def test_a_figure_that_was_not_measured_is_no_fault(tmp_path):
    """Cross-entropy alone has no KD rows; a run that broke off early may have none at all."""
    draw_curve(tmp_path / "a.png", history(kd=False), title="a", best=0)
    draw_curve(tmp_path / "b.png", [], title="b", best=0)
    for name in ("a.png", "b.png"):
        assert (tmp_path / name).stat().st_size > 1000


def test_drawing_leaves_no_figure_open_and_takes_any_file_name(tmp_path):
    from matplotlib import pyplot

    path = tmp_path / ".writing-1-curve"
    draw_curve(path, history(kd=True), title="a", best=0)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert pyplot.get_fignums() == []


# The samples


def test_samples_quote_each_prompt_and_every_models_text():
    text = samples_text(
        "stories",
        ["Once upon a time", "The dog"],
        {
            "teacher": [" there was\n\na bird.", " ran."],
            "student before": ["", "   "],
            "student after": [" was.", "# not a heading"],
        },
        draw="temperature 0.7, seed 3",
    )
    lines = text.splitlines()
    assert lines[0] == "# stories: continuations of held-out prompts"
    assert "Drawn with temperature 0.7, seed 3." in lines
    assert [line for line in lines if line.startswith("## ")] == ["## 1", "## 2"]
    first, second = text.split("## 2")
    assert "> Once upon a time\n" in first and "> The dog\n" in second
    assert "**teacher**\n\n> there was\n>\n> a bird.\n" in first
    assert "**student before**\n\n> (nothing)\n" in first
    assert "**student before**\n\n> (nothing)\n" in second
    assert "> # not a heading" in second
    order = [first.index(f"**{name}**") for name in ("teacher", "student before", "student after")]
    assert order == sorted(order)


def test_a_text_of_another_number_than_the_prompts_is_a_fault():
    with pytest.raises(IndexError):
        samples_text("a", ["one", "two"], {"teacher": ["only one"]}, draw="")


def test_the_module_imports_nothing_slow_by_itself():
    source = Path(report.__file__).read_text()
    top = source.split("def ")[0]
    assert "matplotlib" not in top


def judged(word: str, interval: list[float] | None = None, **more: Any) -> dict[str, Any]:
    verdict = {
        "figure": "kl_nats",
        "verdict": word,
        "difference": 0.0123,
        "interval": interval,
        "confidence": 0.95,
        "examples": 24,
        **more,
    }
    return {**EVALUATION, "verdict": verdict}


def test_a_verdict_is_one_line_and_bad_ones_are_loud():
    assert verdict_text(judged("worse", [0.001, 0.02])) == (
        "the student is WORSE: KL to the teacher 0.8765 before, 0.4322 after, +0.0123 nats a token "
        "(95% interval +0.0010 to +0.0200, 24 held-out examples)"
    )
    assert "student is NOT SHOWN TO BE BETTER:" in verdict_text(
        judged("not shown to be better", [-0.1, 0.1], figure="cross_entropy")
    )
    rose = judged("better", [-0.3, -0.2])
    rose["after"] = {**rose["after"], "cross_entropy": 3.5}
    assert verdict_text(rose).endswith(
        "); but the cross-entropy of the texts rose from 3.1416 to 3.5000"
    )
    assert "but" not in verdict_text(judged("better", [-0.3, -0.2]))
    few = verdict_text(judged("not shown to be better", examples=2))
    assert few.endswith("(on 2 held-out examples, and an interval needs 6)")


@pytest.mark.parametrize(
    ("best_step", "interval", "said"),
    [
        (
            50,
            [-0.1, 0.1],
            "or more data (40 examples, each read 10.0 times), or a lower --learning-rate "
            "than 0.001, or fewer --iters than 100",
        ),
        (0, [0, 0], "the kept step is 0, so the adapter changes nothing; try a higher --alpha "),
        (
            100,
            [-0.1, 0.1],
            "than 0.7 (cross-entropy fell from 3.1416 to 2.7183: the texts ",
        ),
        (50, None, "or more data, or a higher --val-fraction than 0.1"),
    ],
)
def test_advice_follows_from_what_happened(best_step, interval, said):
    result = KDResult(
        domain="s",
        num_samples=44,
        adapter_path="a",
        final_kd_loss=1.0,
        final_ce_loss=1.0,
        final_combined_loss=1.0,
        training_time_seconds=1.0,
        timestamp="",
        evaluation=judged("not shown to be better", interval),
        metadata={"train_examples": 40, "best_step": best_step},
    )
    config = KDConfig(num_iters=100, batch_size=4, learning_rate=1e-3)
    text = advice(result, config)
    assert said in text
    if interval is not None:
        result.evaluation["verdict"]["difference"] = -0.01
        if best_step == 100:
            assert advice(result, config).startswith("try more --iters than 100, or more data (40")
        short = replace(config, num_iters=5)
        assert "try more --iters than 5 (40 examples, each read 0.5 times)" in advice(result, short)


def test_where_only_the_kd_loss_at_its_temperature_fell_the_temperature_is_the_advice():
    history = [
        {"split": "heldout", "step": step, "kd": kd}
        for step, kd in ((0, 0.8), (20, 0.6), (40, 0.7))
    ]
    assert heldout_kd(history) == [0.8, 0.6]
    assert heldout_kd([]) is None
    result = SimpleNamespace(
        evaluation=judged("worse", [0.01, 0.02]),
        metadata={"train_examples": 40, "best_step": 40, "heldout_kd": [0.8, 0.6]},
    )
    said = (
        "try --temperature 1 (at temperature 2 the KD loss fell from 0.8000 to 0.6000, and the KL "
        "is taken at 1), or "
    )
    config = KDConfig(num_iters=40, batch_size=4)
    assert advice(result, config).startswith(said)  # type: ignore[arg-type]
    for other in (replace(config, temperature=1.0), replace(config, alpha=0.0)):
        assert "--temperature" not in advice(result, other)  # type: ignore[arg-type]
    result.metadata["heldout_kd"] = [0.8, 0.8]
    assert "--temperature" not in advice(result, config)  # type: ignore[arg-type]


def risen(**last: float) -> list[dict[str, Any]]:
    first = {"split": "heldout", "step": 0, "kl": 0.72, "kd": 0.72, "ce": 3.0, "loss": 1.4}
    return [first, {**first, "step": 20, **last}]


def test_where_the_rate_blew_a_run_up_a_lower_one_is_the_advice():
    rise = rise_of(risen(kl=3.74, kd=3.7, ce=6.0, loss=4.4))
    assert rise == "held-out KL to the teacher rose from 0.7200 to 3.7400"
    assert rise_of(risen(kl=0.9, ce=2.0, loss=1.0)) == "", "the texts pull away from the teacher"
    assert rise_of(risen(kl=0.5, kd=0.5, ce=2.9, loss=1.2)) == rise_of([]) == ""
    trained = [{"split": "train", "step": n, "loss": 2.0 + n / 5} for n in range(3)]
    assert rise_of(trained) == "training loss rose from 2.0000 to 2.4000"
    result = SimpleNamespace(
        evaluation=judged("not shown to be better", [0, 0], difference=0),
        metadata={"train_examples": 40, "best_step": 0, "rise": rise},
    )
    config = KDConfig(num_iters=20, learning_rate=0.1, batch_size=4)
    assert advice(result, config) == (  # type: ignore[arg-type]
        "the kept step is 0, so the adapter changes nothing; try a lower --learning-rate than 0.1 "
        f"({rise})"
    )


def test_the_part_that_lost_most_is_one_line_and_a_loss_is_loud():
    found: dict[str, Any] = {
        "by": "length",
        "slice": "4 to 9 tokens",
        "difference": 0.0123,
        "interval": [0.001, 0.02],
        "confidence": 0.99,
        "examples": 8,
        "worst": ["example 3", "example 1"],
        "lost": True,
    }
    evaluation = {"verdict": {"figure": "kl_nats"}, "slice": found}
    assert slice_text(evaluation) == (
        "a part of it became WORSE: length 4 to 9 tokens, +0.0123 nats a token (99.0% interval "
        "+0.0010 to +0.0200, 8 examples, such as example 3, example 1)"
    )
    found["lost"] = False
    assert slice_text(evaluation).startswith("no part is shown to have lost; nearest to it length")
    assert slice_text({**evaluation, "slice": None}) == slice_text({}) == ""
