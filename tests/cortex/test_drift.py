"""Alarms of drift: as seldom false as they say, soon true, and kept beside the calibration."""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

from conch_dna.cortex.calibration.calibrating import answers_to, expectations_of, questions_of
from conch_dna.cortex.calibration.confidence import Calibration, save_calibration
from conch_dna.cortex.calibration.drift import (
    LEVEL,
    RECENT,
    Bets,
    Drift,
    Expectations,
    Outcome,
    expected_hand_overs,
    expected_mask,
)
from conch_dna.cortex.calibration.drift_file import (
    DRIFT_FILE,
    LOCK_FILE,
    MOST_WAITING,
    DriftCount,
    digest_of,
    read_drift,
)
from conch_dna.cortex.neuron import CortexSuite
from conch_dna.cortex.options import AskOptions
from conch_dna.cortex.server.serving import CortexServer
from conch_dna.errors import ConchError
from cortex_models import write_adapter
from servers import OPENINGS, STUDENT, ask, client_of, metric, raw, served, wait_for
from suites import calibration

DOMAIN = "tales"
EXPECTED = Expectations(
    hand_over=expected_hand_overs(40, 200),
    mask=expected_mask([0.01, 0.03] * 100),
    max_tokens=8,
)
GOOD, BAD = Outcome(False, 0.01), Outcome(True, 0.9)


class TestBets:
    @pytest.mark.parametrize("boundary", [0.05, 0.3, 0.9])
    @pytest.mark.parametrize("kind", ["right or wrong", "shares"])
    def test_at_the_boundary_they_are_seldom_won_at_any_time(self, boundary, kind) -> None:
        generator = np.random.default_rng(7)
        shape = (1_000, 2_000)
        if kind == "shares":
            values = generator.beta(2 * boundary, 2 * (1 - boundary), shape)
        else:
            values = (generator.random(shape) < boundary).astype(float)
        bets, most = Bets(np.full(len(values), boundary)), np.zeros(len(values))
        for column in values.T:
            bets.add(column)
            most = np.maximum(most, bets.evidence)
        for level in (0.2, 0.05):
            assert (most >= 1 / level).mean() <= level + 3 * math.sqrt(level / len(values))
        # Else the bets would be worth nothing.
        assert (most >= 5).mean() > 0.01

    def test_the_stakes_are_the_mixture_over_beginnings_and_sizes(self) -> None:
        values, boundary = [1.0, 0.0, 0.4, 1.0], 0.3
        bets = Bets(boundary)
        for value in values:
            bets.add(value)
        expected = 1 / math.log2(len(values) + 2)
        for begin in range(len(values)):
            weight = 1 / math.log2(begin + 2) - 1 / math.log2(begin + 3)
            for stake in (0.03, 0.06, 0.12, 0.25, 0.5, 0.9):
                factors = [1 + stake / boundary * (x - boundary) for x in values[begin:]]
                expected += weight * math.prod(factors) / 6
        assert float(bets.evidence) == pytest.approx(expected)


def binom_cdf(count: int, n: int, share: float) -> float:
    return math.fsum(math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(count + 1))


class TestExpected:
    @pytest.mark.parametrize("count", [0, 1, 40, 199, 200])
    def test_bounds_are_those_of_clopper_and_pearson(self, count) -> None:
        found, level = expected_hand_overs(count, 200), LEVEL / 4 / 200
        assert found.mean == count / 200
        if count < 200:
            assert binom_cdf(count, 200, found.at_most) == pytest.approx(level)
        else:
            assert found.at_most == 1
        if count:
            assert 1 - binom_cdf(count - 1, 200, found.at_least) == pytest.approx(level)
        else:
            assert found.at_least == 0

    def test_they_hold_whichever_threshold_the_answers_chose(self) -> None:
        generator, wrong, n = np.random.default_rng(0), 0, 40
        bounds = [expected_hand_overs(count, n) for count in range(n + 1)]
        low, high = (
            np.array([getattr(each, name) for each in bounds]) for name in ("at_least", "at_most")
        )
        for _ in range(4_000):
            shares = np.sort(generator.random(n))
            # Just above an answer, and just below the next one.
            wrong += bool((shares < low[1:]).any() or (shares > high[:-1]).any())
        assert wrong <= 4_000 * LEVEL / 2 + 3 * math.sqrt(4_000 * LEVEL / 2)

    def test_the_mean_under_the_mask_is_seldom_above_its_bound(self) -> None:
        generator = np.random.default_rng(1)
        above = [expected_mask(generator.beta(0.2, 9.8, 60)).at_most < 0.02 for _ in range(300)]
        assert np.mean(above) <= LEVEL / 2 + 3 * math.sqrt(LEVEL / 2 / 300)
        narrow = expected_mask([0.02] * 200)
        assert 0.02 < narrow.at_most < 0.06 and narrow.at_least == 0
        assert expected_mask([1.0]).at_most == 1


def told_after(outcomes: list[Outcome]) -> dict[str, int | None]:
    """For each kind after how many answers the alarm came."""
    drift = Drift(EXPECTED, "then")
    for number, outcome in enumerate(outcomes, 1):
        drift.add(outcome, str(number))
    return {each.kind: int(each.drifted) if each.drifted else None for each in drift.findings}


class TestDrift:
    def drawn(self, count: int, rate: float, removed: float, seed: int = 0) -> list[Outcome]:
        generator = np.random.default_rng(seed)
        return [
            Outcome(bool(generator.random() < rate), float(removed * 2 * generator.random()))
            for _ in range(count)
        ]

    def test_what_is_as_at_calibration_is_no_drift(self) -> None:
        for seed in range(8):
            found = told_after(self.drawn(1_000, 0.2, 0.02, seed))
            assert found == {"hand_over": None, "mask": None}

    @pytest.mark.parametrize(
        ("rate", "removed", "kind"),
        [(0.7, 0.02, "hand_over"), (0.0, 0.02, "hand_over"), (0.2, 0.3, "mask")],
    )
    @pytest.mark.parametrize("calm", [0, 1_000])
    def test_what_is_other_is_found_soon_and_only_it(self, rate, removed, kind, calm) -> None:
        before = self.drawn(calm, 0.2, 0.02)
        found = told_after([*before, *self.drawn(500, rate, removed, 1)])
        assert calm < found.pop(kind) < calm + 400
        assert set(found.values()) == {None}

    def test_less_under_the_mask_is_none(self) -> None:
        assert told_after([Outcome(n % 5 == 0, 0.0) for n in range(2_000)])["mask"] is None

    def test_an_alarm_stays_and_figures_go_on(self) -> None:
        drift = Drift(EXPECTED, "then")
        for number in range(3_000):
            drift.add(BAD if number < 300 else GOOD, str(number))
        hand_over, mask = drift.findings
        assert 0 < int(hand_over.drifted) < 100 and mask.drifted
        assert (hand_over.live, hand_over.recent, hand_over.answers) == (0.1, 0.0, 3_000)
        assert str(hand_over) == (
            "10.0% of 3000 answers did not stand (0.0% in the last 100); calibration: 20.0% of 200"
        )
        assert str(mask).startswith("9.9% of probability under the schema's mask in 3000 answers")
        # Millions of won bets are still numbers, and the state does not grow.
        for _ in range(3_000):
            drift.add(BAD, "later")
        text = json.dumps(drift.to_json(), allow_nan=False)
        assert len(text) < 4_000

    def test_where_nothing_may_stand_and_without_a_schema(self) -> None:
        expected = Expectations(hand_over=expected_hand_overs(200, 200), mask=None, max_tokens=8)
        drift = Drift(expected, "then")
        assert drift.findings[0].live is None and "- of 0 answers" in str(drift.findings[0])
        for _ in range(2_000):
            drift.add(Outcome(True, None), "now")
        [only] = drift.findings
        assert (only.kind, only.drifted, only.live) == ("hand_over", "", 1.0)

    def test_it_goes_on_from_json_to_the_bit(self) -> None:
        outcomes = [*self.drawn(150, 0.2, 0.02), *self.drawn(100, 0.7, 0.3, 1)]
        whole, first = Drift(EXPECTED, "then"), Drift(EXPECTED, "then")
        for number, outcome in enumerate(outcomes):
            whole.add(outcome, str(number))
            first.add(outcome, str(number))
            first = Drift.from_json(json.loads(json.dumps(first.to_json())), EXPECTED)
        assert first.to_json() == whole.to_json() and first.findings == whole.findings
        assert len(whole.to_json()["mask"]["recent"]) == RECENT

    @pytest.mark.parametrize(
        "change",
        [
            {"answers": -1},
            {"answers": True},
            {"total": math.nan},
            {"total": 99.0},
            {"recent": []},
            {"recent": [2.0, 0.0]},
            {"above": [1.0]},
            {"above": [math.inf] * 6},
            {"above": ["1"] * 6},
            {"below": None},
            {"bet_on": 7},
            {"drifted": 3},
            {"more": 1},
        ],
    )
    def test_what_was_altered_is_refused(self, change) -> None:
        drift = Drift(EXPECTED, "then")
        drift.add(GOOD, "now")
        drift.add(BAD, "now")
        document: dict[str, Any] = drift.to_json()
        document["hand_over"] |= change
        with pytest.raises(ConchError, match="what was counted of drift cannot be read"):
            Drift.from_json(document, EXPECTED)


@pytest.fixture
def calibrated(tmp_path: Path) -> Calibration:
    found = calibration("a" * 64, threshold=0.5, expected=EXPECTED)
    save_calibration(tmp_path, DOMAIN, found)
    return found


def count_in(place: Path, found: Calibration, lines: list[str] | None = None) -> DriftCount:
    return DriftCount(place, DOMAIN, found, report=(lines if lines is not None else []).append)


def answers_of(count: DriftCount) -> int:
    return count.findings[0].answers


class TestFile:
    def test_a_restart_goes_on_and_tells_no_alarm_twice(self, calibrated, tmp_path) -> None:
        lines: list[str] = []
        first = count_in(tmp_path, calibrated, lines)
        for _ in range(30):
            first.add(BAD)
        first.save()
        assert len(lines) == 2
        mask, hand_over = lines
        assert mask.startswith(f"{DOMAIN} drifts: 90.0% of probability under the schema's mask in")
        assert hand_over.startswith(f"{DOMAIN} drifts: 100.0% of ")
        assert hand_over.endswith(
            "answers did not stand; calibration: 20.0% of 200; calibrate on prompts as they are "
            f"asked now: 'conch-dna cortex calibrate {DOMAIN} --prompts FILE --ego MODEL'"
        )
        again = count_in(tmp_path, calibrated, lines)
        assert again.findings == first.findings
        again.add(BAD)
        again.save()
        assert answers_of(again) == 31 and len(lines) == 2
        found = read_drift(tmp_path / DOMAIN, calibrated)
        assert found is not None and found.findings == again.findings

    def test_a_new_calibration_starts_anew(self, calibrated, tmp_path) -> None:
        old = count_in(tmp_path, calibrated)
        old.add(BAD)
        old.save()
        newer = calibration("a" * 64, threshold=0.6, expected=EXPECTED)
        save_calibration(tmp_path, DOMAIN, newer)
        assert read_drift(tmp_path / DOMAIN, newer) is None
        new = count_in(tmp_path, newer)
        assert answers_of(new) == 0
        new.add(GOOD)
        new.save()
        # A server that has not seen the new one yet does not write over its count.
        old.add(BAD)
        old.save()
        found = read_drift(tmp_path / DOMAIN, newer)
        assert found is not None and found.findings[0].live == 0.0

    def test_servers_on_one_folder_share_one_count(self, calibrated, tmp_path) -> None:
        lines: list[str] = []
        one, other = (count_in(tmp_path, calibrated, lines) for _ in range(2))
        alone = Drift(EXPECTED, "then")
        for _ in range(7):
            for count in (one, other):
                count.add(BAD)
                alone.add(BAD, "now")
                count.save()
        other.add(BAD)
        alone.add(BAD, "now")
        other.save()
        found = read_drift(tmp_path / DOMAIN, calibrated)
        assert found is not None
        assert found.to_json()["mask"]["above"] == alone.to_json()["mask"]["above"]
        assert answers_of(other) == 15 and answers_of(one) == 13

    def test_a_lock_that_is_held_is_not_waited_for(self, calibrated, tmp_path) -> None:
        lines: list[str] = []
        count = count_in(tmp_path, calibrated, lines)
        count.add(GOOD)
        with FileLock(tmp_path / DOMAIN / LOCK_FILE):
            count.save()
            assert not (tmp_path / DOMAIN / DRIFT_FILE).exists()
        count.save()
        assert (tmp_path / DOMAIN / DRIFT_FILE).exists() and not lines

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"calibration": 1}', '{"a": 1}'])
    def test_a_broken_file_is_told_in_a_line_and_replaced(self, text, calibrated, tmp_path) -> None:
        path, lines = tmp_path / DOMAIN / DRIFT_FILE, []
        path.write_text(text)
        with pytest.raises(ConchError, match=DRIFT_FILE):
            read_drift(tmp_path / DOMAIN, calibrated)
        count = count_in(tmp_path, calibrated, lines)
        assert len(lines) == 1 and "drift is left out" in lines[0] and DRIFT_FILE in lines[0]
        count.add(GOOD)
        count.save()
        assert len(lines) == 1
        found = read_drift(tmp_path / DOMAIN, calibrated)
        assert found is not None and found.findings == count.findings

    def test_one_of_other_fields_is_told(self, calibrated, tmp_path) -> None:
        path = tmp_path / DOMAIN / DRIFT_FILE
        path.write_text(json.dumps({"calibration": digest_of(calibrated), "since": "then"}))
        with pytest.raises(ConchError, match="other fields than it should have"):
            read_drift(tmp_path / DOMAIN, calibrated)

    def test_a_folder_that_is_gone_is_told_once_and_not_made_again(
        self, calibrated, tmp_path
    ) -> None:
        lines: list[str] = []
        count = count_in(tmp_path, calibrated, lines)
        (tmp_path / DOMAIN).rename(tmp_path / "elsewhere")
        for _ in range(3):
            count.add(GOOD)
            count.save()
        assert lines == [f"what is counted of {DOMAIN}'s drift is not kept: its folder is gone"]
        assert not (tmp_path / DOMAIN).exists()
        (tmp_path / "elsewhere").rename(tmp_path / DOMAIN)
        count.save()
        assert answers_of(count_in(tmp_path, calibrated)) == 3

    def test_what_waits_is_bounded_and_nothing_is_lost(
        self, calibrated, tmp_path, monkeypatch
    ) -> None:
        monkeypatch.setattr("conch_dna.cortex.calibration.drift_file.MOST_WAITING", 5)
        assert MOST_WAITING > 5
        count = count_in(tmp_path, calibrated)
        for _ in range(9):
            count.add(GOOD)
        count.save()
        assert answers_of(count_in(tmp_path, calibrated)) == 9


TALE = "Once upon a time there was a"


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CortexSuite]:
    place = tmp_path_factory.mktemp("adapters")
    for name in (DOMAIN, "task"):
        write_adapter(place / name / "adapters_kd", STUDENT, strength=0.0)
    with CortexSuite(place, STUDENT) as suite:
        yield suite


class TestSuite:
    """What of the answers of real neurons counts, and as what."""

    def calibrated(self, suite, domain: str, threshold: float, *, mask: bool = False) -> None:
        expected = EXPECTED if mask else replace(EXPECTED, mask=None)
        digest = suite.bank.digest_of(domain)
        found = calibration(digest, threshold=threshold, expected=expected)
        save_calibration(suite.adapters_dir, domain, found)
        suite.take_calibration(domain)

    def outcome(self, suite, domain: str, prompt: Any = TALE, **options: Any) -> Outcome | None:
        turn = suite.turn(domain, prompt, AskOptions(**options))
        for _ in suite._driven([turn]):
            pass
        assert turn.answer is not None
        return turn.outcome

    def test_answers_of_the_calibrated_kind_count_whatever_their_length(self, suite) -> None:
        self.calibrated(suite, DOMAIN, 0.0)
        for length in (8, 9, 40):
            assert self.outcome(suite, DOMAIN, max_tokens=length, seed=3) == (False, None)
        # With 8 tokens it is so sure; what it says after them does not change that.
        sure = suite.ask(DOMAIN, TALE, max_tokens=8).confidence
        for threshold, handed_over in ((sure - 1e-6, False), (sure + 1e-6, True)):
            self.calibrated(suite, DOMAIN, threshold)
            for length in (8, 40):
                found = self.outcome(suite, DOMAIN, max_tokens=length)
                assert found == (handed_over, None)

    @pytest.mark.parametrize(
        "options",
        [
            {"max_tokens": 7},
            {"temperature": 0.5},
            {"hand_over": "never"},
            {"system": "Be kind."},
            {"structured": False},
            {"constrained": False},
            {"schema": '{"type": "object"}'},
            {"prompt": [{"role": "system", "content": "Hm."}, {"role": "user", "content": TALE}]},
        ],
    )
    def test_others_do_not(self, suite, options) -> None:
        self.calibrated(suite, DOMAIN, 0.0)
        assert self.outcome(suite, DOMAIN, **{"max_tokens": 8, **options}) is None

    def test_a_schema_counts_at_the_first_answer_and_its_mask(self, suite) -> None:
        self.calibrated(suite, "task", 0.0, mask=True)
        found = self.outcome(suite, "task", max_tokens=8)
        assert found is not None and found.handed_over, "8 tokens end no object"
        pieces = [
            piece.removed
            for group in suite.engine.run(
                [suite.turn("task", TALE, AskOptions(max_tokens=8)).request]
            )
            for piece in group
        ]
        assert found.removed == pytest.approx(np.mean(pieces), rel=1e-3) and found.removed > 0

    def test_without_expectations_nothing_is_watched(self, suite) -> None:
        digest = suite.bank.digest_of(DOMAIN)
        save_calibration(suite.adapters_dir, DOMAIN, calibration(digest, threshold=0.0))
        suite.take_calibration(DOMAIN)
        assert self.outcome(suite, DOMAIN, max_tokens=8) is None

    def test_calibration_keeps_what_it_saw(self, suite) -> None:
        questions, _ = questions_of(suite, "task", ["A", "B"], max_tokens=4, structured=True)
        answers = answers_to(suite, questions)
        assert all(each.removed is not None and each.removed > 0 for each in answers)
        found = calibration("a", threshold=0.0)
        schema = suite.domain("task").schema
        expected = expectations_of(found, answers, schema, max_tokens=4)
        assert expected.hand_over == expected_hand_overs(2, 2), "cut, so that none is valid"
        assert expected.mask == expected_mask([each.removed for each in answers])
        assert expected.max_tokens == 4
        own = [{"role": "system", "content": "Hm."}, {"role": "user", "content": "A"}]
        questions, _ = questions_of(suite, DOMAIN, [own, "A", "B"], max_tokens=4)
        answers = answers_to(suite, questions)
        least = min(each.confidence for each in answers[1:])
        found = calibration("a", threshold=least + 1e-9)
        expected = expectations_of(found, answers, None, max_tokens=4)
        assert expected.hand_over == expected_hand_overs(1, 2) and expected.mask is None
        assert expectations_of(found, answers[:1], None, max_tokens=4) is None


def test_a_server_tells_drift_once_and_keeps_it(served_adapters: Path, tmp_path: Path) -> None:
    adapters = tmp_path / "adapters"
    shutil.copytree(served_adapters / "owls", adapters / "owls")
    with CortexSuite(adapters, STUDENT, domains=["owls"]) as suite:
        digest = suite.bank.digest_of("owls")
    expected = Expectations(hand_over=expected_hand_overs(5, 200), mask=None, max_tokens=3)
    found = calibration(digest, threshold=1.0, expected=expected)
    save_calibration(adapters, "owls", found)
    lines: list[str] = []

    def figure(server: CortexServer, name: str) -> float:
        return metric(server, f'conch_dna_{name}{{kind="hand_over",model="owls"}}')

    with served(adapters, report=lines.append) as server, client_of(server) as client:
        assert figure(server, "drift_answers") == figure(server, "drift") == 0
        assert figure(server, "drift_share_expected") == 0.025
        for _ in range(20):
            ask(client, "owls", OPENINGS["owls"], max_tokens=3)
        # Asked otherwise than calibrated, and an API's own model: neither counts.
        ask(client, "owls", OPENINGS["owls"], {"hand_over": "never"}, max_tokens=3)
        ask(client, "owls", OPENINGS["owls"], max_tokens=2)
        wait_for(lambda: figure(server, "drift_answers") == 20)
        assert figure(server, "drift") == figure(server, "drift_share") == 1
        assert figure(server, "drift_share_recent") == 1
    told = [line for line in lines if "drifts" in line]
    assert len(told) == 1 and told[0].startswith("owls drifts: 100.0% of ")
    with served(adapters, report=lines.append) as server, client_of(server) as client:
        assert figure(server, "drift_answers") == 20 and figure(server, "drift") == 1
        newer = calibration(digest, threshold=0.01, expected=expected)
        save_calibration(adapters, "owls", newer)
        assert raw(server, "POST", "/admin/reload")[0] == 200
        assert figure(server, "drift_answers") == figure(server, "drift") == 0
        ask(client, "owls", OPENINGS["owls"], max_tokens=3)
        wait_for(lambda: figure(server, "drift_answers") == 1)
        assert figure(server, "drift_share") == 0
    assert len([line for line in lines if "drifts" in line]) == 1
    kept = read_drift(adapters / "owls", newer)
    assert kept is not None and kept.findings[0].answers == 1


def test_expectations_come_back_from_json() -> None:
    assert Expectations.from_json(json.loads(json.dumps(asdict(EXPECTED)))) == EXPECTED
