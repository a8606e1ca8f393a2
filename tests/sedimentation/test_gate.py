import io
import json
import re

import numpy as np
import pytest
from rich.console import Console

from conch_dna.errors import ConchError
from conch_dna.sedimentation.changes.gate import add_to_history, decide, read_history
from conch_dna.sedimentation.config import ChelationConfig
from conch_dna.sedimentation.results import ChangeResult, change_table, history_table

DEFAULTS = ChelationConfig()


def decided(before, after, *, seed=0, **gate):
    """The decision by one measure; settings of the gate by their names without `gate_`."""
    given = {f"gate_{name}": value for name, value in gate.items()}
    config = ChelationConfig(seed=seed, **given)
    return decide({"nDCG@10": (before, after)}, config, against=["raw"])


def bounds_oracle(difference, confidence, resamples=4000):
    """Percentiles of the means of resampled differences."""
    generator = np.random.default_rng(99)
    means = [
        difference[generator.integers(len(difference), size=len(difference))].mean()
        for _ in range(resamples)
    ]
    return np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])


def scores(mean_difference, spread, n=300, seed=0):
    """Figures before and after whose difference has exactly this mean."""
    generator = np.random.default_rng(seed)
    before = generator.uniform(0.2, 0.8, size=n)
    noise = generator.normal(size=n)
    noise = (noise - noise.mean()) / noise.std()
    return before, before + mean_difference + spread * noise


@pytest.mark.parametrize(
    ("difference", "spread", "passes"),
    [
        (0.05, 0.1, True),
        # Better on average, but not by enough to know.
        (0.001, 0.1, False),
        (-0.001, 0.01, True),
        (-0.004, 0.001, True),
        (-0.006, 0.001, False),
        (-0.05, 0.1, False),
    ],
)
def test_the_lower_bound_decides(difference, spread, passes):
    before, after = scores(difference, spread)
    decision = decided(before, after)
    figures = decision.figures["nDCG@10"]
    low, high = bounds_oracle(after - before, 0.95)
    assert (low >= -0.005) == passes
    assert decision.passed == passes
    assert figures["interval"] == pytest.approx([low, high], abs=0.1 * spread / 17 * 3)
    assert figures["difference"] == pytest.approx(difference, abs=1e-9)
    assert figures["before"] == pytest.approx(before.mean())
    assert figures["queries"] == 300
    low, high = figures["interval"]
    assert f"{difference:+.4f} [{low:+.4f}, {high:+.4f}] on 300 queries" in decision.reason


def test_a_change_of_exactly_the_margin_passes_and_a_hair_more_does_not():
    before = np.full(50, 0.3)
    assert decided(before, before - 0.005).passed
    assert not decided(before, before - 0.00501).passed
    assert decided(before, before).passed
    assert not decided(before, before - 0.005, margin=0).passed


def test_margin_and_confidence_count():
    before, after = scores(0.001, 0.1)
    assert not decided(before, after).passed
    assert decided(before, after, margin=0.02).passed
    assert decided(*scores(0.004, 0.1), confidence=0.5).passed
    assert not decided(*scores(0.004, 0.1), confidence=0.95).passed


def test_the_pairing_counts():
    """The same figures, matched with other queries, are no evidence any more."""
    before, after = scores(0.004, 0.005)
    assert decided(before, after).passed
    assert not decided(before, np.roll(after, 1)).passed


def test_the_decision_is_a_function_of_the_seed():
    before, after = scores(0.01, 0.1)
    assert decided(before, after, seed=1) == decided(before, after, seed=1)
    assert decided(before, after, seed=1) != decided(before, after, seed=2)


@pytest.mark.parametrize(("count", "words"), [(0, "no held-out queries"), (1, "1 held-out query,")])
def test_no_evidence_activates_nothing(count, words):
    decision = decided(np.zeros(count), np.ones(count))
    assert not decision.passed
    assert words in decision.reason
    assert decision.reason.endswith("nothing is activated on no evidence")
    none = decide({}, DEFAULTS, against=["raw"])
    assert (none.passed, none.reason) == (
        False,
        "no held-out queries; nothing is activated on no evidence",
    )


def test_every_measure_must_pass_and_the_refused_one_comes_first():
    good, bad = scores(0.05, 0.1), scores(-0.05, 0.1)
    given = {"nDCG@10 of pseudo-queries": good, "teacher agreement": bad}
    decision = decide(given, DEFAULTS, against=["raw"])
    assert not decision.passed
    assert decision.reason.startswith("teacher agreement: ")
    assert " | nDCG@10 of pseudo-queries: " in decision.reason
    assert decision.figures["teacher agreement"]["difference"] == pytest.approx(-0.05)
    both = decide({"nDCG@10": good, "teacher agreement": good}, DEFAULTS, against=["raw"])
    assert both.passed
    assert both.to_json()["figures"] == both.figures
    given = {"nDCG@10": good, "teacher agreement": ([], [])}
    assert not decide(given, DEFAULTS, against=["raw"]).passed


def test_a_change_is_compared_with_the_active_version_and_with_raw():
    """Two losses within the margin are a loss beyond it, which a comparison with one would miss."""
    raw = np.full(50, 0.5)
    active, candidate = raw - 0.004, raw - 0.008
    assert decide({"nDCG@10": (active, candidate)}, DEFAULTS, against=["v0001"]).passed
    decision = decide({"nDCG@10": (active, raw, candidate)}, DEFAULTS, against=["v0001", "raw"])
    assert not decision.passed
    assert set(decision.figures) == {"nDCG@10", "nDCG@10 against raw"}
    found = {name: each["difference"] for name, each in decision.figures.items()}
    expected = {"nDCG@10": -0.004, "nDCG@10 against raw": -0.008}
    assert found == pytest.approx(expected)
    assert [each["against"] for each in decision.figures.values()] == ["v0001", "raw"]
    assert decision.reason.startswith("nDCG@10: 0.4920 after 0.5000 of raw, difference -0.0080")
    assert " | nDCG@10: 0.4920 after 0.4960 of v0001" in decision.reason
    worse = {"nDCG@10": (raw, raw - 0.1, raw - 0.01)}
    assert not decide(worse, DEFAULTS, against=["v0001", "raw"]).passed, "raw alone is not enough"


def entry(name):
    """A decision as the engine remembers it."""
    about = {"kind": "cycle", "mode": "baseline", "against": "raw", "documents": 3, "questions": {}}
    return {"candidate": name, **about, **decide({}, DEFAULTS, against=["raw"]).to_json()}


def test_the_history_keeps_decisions_in_their_order(tmp_path):
    assert read_history(tmp_path) == []
    for name in ("v0001", "v0002"):
        add_to_history(tmp_path, entry(name))
    history = read_history(tmp_path)
    assert [entry["candidate"] for entry in history] == ["v0001", "v0002"]
    assert all(entry["time"].endswith("+00:00") and not entry["passed"] for entry in history)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", "line 2 of .*gate_history.jsonl is no JSON object"),
        ('{"candidate": "v0002"}', "has no time, kind, mode, against, reason, documents"),
        ("[" * 100_000, "line 2 of .* cannot be read"),
        (json.dumps({**entry("v"), "time": "", "figures": {"x": {}, "y": 3}}), "y in line 2 of"),
    ],
)
def test_a_history_of_another_form_is_refused_in_one_line(line, message, tmp_path):
    add_to_history(tmp_path, entry("v0001"))
    with open(tmp_path / "gate_history.jsonl", "a") as file:
        file.write(f"{line}\n")
    with pytest.raises(ConchError, match=message) as caught:
        read_history(tmp_path)
    assert "move it and ledger.json away to begin a new history" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: decided([0.1, 0.2], [0.1]), r"given \[2\] figures before and \[1\] after"),
        (lambda: decided([0.1, np.nan], [0.1, 0.2]), "nDCG@10 of the gate's .* not finite"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ConchError, match=message):
        make()


def test_the_tables_of_changes_fit_80_columns_and_say_which_measure_failed():
    draws = np.random.default_rng(0).normal(size=(2, 200)) / 50
    raw = np.full(200, 0.5)
    measures = {
        "nDCG@10": ([raw, raw + 0.001], raw + 0.1 + draws[0]),
        "teacher agreement": ([raw, raw], raw - 0.1 + draws[1]),
    }
    figures = {name: [*before, after] for name, (before, after) in measures.items()}
    decision = decide(figures, ChelationConfig(), against=["v0001", "raw"])
    result = ChangeResult(
        kind="distillation",
        mode="offline",
        activated=False,
        version="v0001",
        candidate="v0002",
        reason=decision.reason,
        figures=decision.figures,
    )
    change = {"kind": "distillation", "mode": "offline", "candidate": "v0002", "against": "v0001"}
    entries = [{**change, **decision.to_json(), "time": "2026-11-29T10:00"}]
    shown = {}
    for name, table in (("change", change_table(result)), ("history", history_table(entries))):
        console = Console(width=80, file=io.StringIO())
        console.print(table)
        shown[name] = console.file.getvalue()
        assert max(map(len, shown[name].splitlines())) <= 80
    first, second, third, fourth = re.findall(r"(passed|REFUSED)", shown["change"])
    assert (first, second, third, fourth) == ("passed", "passed", "REFUSED", "REFUSED")
    assert "0.5000 → 0.6" in shown["change"] and "-0.1" in shown["change"]
    assert len(re.findall(r"[-+]0\.\d{4} \[[-+]0\.\d{4}, [-+]0\.\d{4}\]", shown["change"])) == 4
    flat = re.sub(r"[│\s]+", " ", shown["history"])
    assert "[" in flat and flat.count("REFUSED") == 3
