"""Progress as plain lines where it is read later, as live bars where somebody watches.

Time is set by hand. The bars are drawn into a terminal that is only claimed to be one.
"""

import io
import re
from typing import Any

import pytest
from rich.console import Console

from conch_dna.screen import progress
from conch_dna.screen.progress import EVERY_S, Progress

TRAIN = {
    "step": 10,
    "split": "train",
    "loss": 1.23456,
    "kd": 1.5,
    "ce": 0.75,
    "tokens_per_second": 12345.6,
}
HELDOUT = {"step": 50, "split": "heldout", "loss": 2.0, "kd": 1.0, "ce": 3.0, "best_step": 50}


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    return made


@pytest.fixture
def plain(clock: Clock) -> Progress:
    made = Progress(plain=True)
    made.console = Console(file=io.StringIO(), highlight=False, width=60)
    return made


def lines(shown: Progress) -> list[str]:
    return shown.console.file.getvalue().splitlines()


def test_output_that_is_no_terminal_gets_plain_lines(capsys):
    with Progress() as shown:
        shown("phase", {"name": "thinking: the teacher answers", "total": 1200, "unit": "prompts"})
        shown("phase", {"name": "thinking: evaluating the student"})
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "thinking: the teacher answers: 1,200 prompts",
        "thinking: evaluating the student",
    ]


def test_a_training_line_has_losses_speed_and_remaining_time(plain, clock):
    plain("phase", {"name": "training", "total": 200, "unit": "steps"})
    clock.now += 20
    for step in range(1, 11):
        plain("step", {"step": step, "loss": 1.0})
    plain("train", TRAIN)
    assert lines(plain)[-1] == (
        "step 10: loss 1.2346, KD 1.5000, CE 0.7500, 12,346 tokens/s, 6:20 remaining"
    )
    assert len(lines(plain)) == 2


def test_plain_cross_entropy_has_one_loss(plain):
    plain("train", {"step": 1, "loss": 0.5, "tokens_per_second": 10.0})
    assert lines(plain) == ["step 1: loss 0.5000, 10 tokens/s"]


def test_a_heldout_line_says_when_it_is_the_best(plain):
    plain("heldout", HELDOUT)
    plain("heldout", {**HELDOUT, "step": 60})
    plain("heldout", {"step": 0, "loss": 2.5, "best_step": 0})
    assert lines(plain) == [
        "step 50: held out loss 2.0000, KD 1.0000, CE 3.0000 (best so far)",
        "step 60: held out loss 2.0000, KD 1.0000, CE 3.0000",
        "step 0: held out loss 2.5000 (best so far)",
    ]


def test_long_work_shows_a_line_every_few_seconds(plain, clock):
    plain("phase", {"name": "targets", "total": 4000, "unit": "tokens"})
    for _ in range(3):
        clock.now += EVERY_S / 2
        plain("advance", {"by": 500})
    clock.now += EVERY_S / 2
    plain("advance", {"by": 500})
    assert lines(plain) == [
        "targets: 4,000 tokens",
        "targets: 1,000 of 4,000 tokens, 200.0 tokens/s, 0:15 remaining",
        "targets: 2,000 of 4,000 tokens, 200.0 tokens/s, 0:10 remaining",
    ]


def test_work_of_unknown_size_shows_what_is_done(plain, clock):
    plain("phase", {"name": "reading", "unit": "files"})
    clock.now += EVERY_S
    plain("advance", {"by": 10})
    assert lines(plain) == ["reading", "reading: 10 files, 2.0 files/s"]


def test_a_new_phase_counts_anew(plain, clock):
    plain("phase", {"name": "one", "total": 10, "unit": "prompts"})
    plain("advance", {"by": 9})
    plain("phase", {"name": "two", "total": 10, "unit": "prompts"})
    clock.now += EVERY_S
    plain("advance", {"by": 1})
    assert lines(plain)[-1] == "two: 1 of 10 prompts, 0.2 prompts/s, 0:45 remaining"


def test_warnings_messages_and_resumed_runs_are_said(plain):
    plain("warning", {"message": "cache shard x was altered [1/2]"})
    plain("message", {"message": "thinking is already finished"})
    plain("resumed", {"step": 150, "path": "models/thinking/checkpoint_150"})
    plain("checkpoint", {"step": 150, "path": "p"})
    assert lines(plain) == [
        "warning: cache shard x was altered [1/2]",
        "thinking is already finished",
        "going on from step 150 (models/thinking/checkpoint_150)",
    ]


def test_the_remaining_time_of_a_resumed_run_counts_only_its_own_steps(plain, clock):
    """Step 150 of 200 was there at once; 10 steps took 20 seconds, so 40 take 80."""
    plain("phase", {"name": "training", "total": 200, "unit": "steps"})
    plain("resumed", {"step": 150, "path": "p"})
    clock.now += 20
    plain("step", {"step": 160, "loss": 1.0})
    plain("train", {**TRAIN, "step": 160})
    assert lines(plain)[-1].endswith(", 1:20 remaining")


def test_a_long_line_is_not_cut(plain):
    plain("warning", {"message": "long " * 40})
    assert len(lines(plain)) == 1


# Live bars


def terminal(shown: Progress) -> str:
    """What was written, without the codes that move the cursor and colour the text."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.console.file.getvalue())


@pytest.fixture
def live() -> Any:
    made = Progress(plain=False)
    made.console = Console(
        file=io.StringIO(), force_terminal=True, width=160, highlight=False, color_system=None
    )
    with made as shown:
        yield shown


def test_a_terminal_gets_a_bar_with_counts_rate_and_losses(live):
    live("phase", {"name": "training", "total": 200, "unit": "steps"})
    live("train", TRAIN)
    live("step", {"step": 11, "loss": 1.0})
    live._bars.refresh()
    text = terminal(live)
    assert "11/200" in text
    assert "steps/s" in text
    assert "loss 1.2346, KD 1.5000, CE 0.7500, 12,346 tokens/s" in text
    assert "step 10:" not in text
    live("heldout", HELDOUT)
    assert "step 50: held out loss 2.0000" in terminal(live)


def test_each_phase_has_its_own_bar(live):
    live("phase", {"name": "one", "total": 10, "unit": "prompts"})
    live("advance", {"by": 4, "note": "70 tokens"})
    live._bars.refresh()
    assert "4/10" in terminal(live) and "70 tokens" in terminal(live)
    live("phase", {"name": "two", "total": 5, "unit": "tokens"})
    assert [task.description for task in live._bars.tasks] == ["two"]
    assert live._bars.tasks[0].completed == 0
    live("phase", {"name": "three"})
    assert [task.total for task in live._bars.tasks] == [None]


def test_a_resumed_bar_starts_where_the_run_was(live):
    live("phase", {"name": "training", "total": 200, "unit": "steps"})
    live("resumed", {"step": 150, "path": "p"})
    assert live._bars.tasks[0].completed == 150


def test_a_failure_stops_the_bars():
    shown = Progress(plain=False)
    shown.console = Console(file=io.StringIO(), force_terminal=True)
    with pytest.raises(ZeroDivisionError), shown:
        raise ZeroDivisionError
    assert shown._bars.finished or not shown._bars.live.is_started


def test_long_silence_is_broken_in_plain_output(plain, clock):
    plain("phase", {"name": "loading"})
    clock.now += 14
    plain._say_alive()
    assert lines(plain) == ["loading"]
    clock.now += 16
    plain._say_alive()
    plain._say_alive()
    assert lines(plain) == ["loading", "loading: still at work after 0:30"]


def test_an_evaluation_before_the_first_step_is_seen(plain, clock, live):
    live("phase", {"name": "training", "total": 60, "unit": "steps"})
    live("within", {"text": "held-out batch 2 of 9"})
    live._bars.refresh()
    assert "0/60" in terminal(live) and "held-out batch 2 of 9" in terminal(live)
    plain("phase", {"name": "training", "total": 60, "unit": "steps"})
    plain("within", {"text": "held-out batch 1 of 9"})
    clock.now += EVERY_S
    plain("within", {"text": "held-out batch 2 of 9"})
    assert lines(plain)[1:] == ["training: held-out batch 2 of 9"]


def test_work_without_a_number_has_no_count_and_leaves_no_bar():
    shown = Progress(plain=False)
    shown.console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    with shown:
        shown("phase", {"name": "evaluating"})
        shown._bars.refresh()
        assert "evaluating" in terminal(shown) and "/?" not in terminal(shown)
    assert not shown._bars.tasks


def test_what_is_refused_at_once_has_no_line_before_it(plain, clock):
    plain("loading", {"name": "loading"})
    clock.now += 1
    plain._say_alive()
    assert lines(plain) == []
    clock.now += 1
    plain._say_alive()
    assert lines(plain) == ["loading: still at work after 0:02"]
