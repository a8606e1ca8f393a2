"""A student as its own teacher: only where what it then reads more of is shown to help.

Whether it helps is planted: the figures of a student, and what a teacher gave each answer.
"""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from conch_dna.errors import ConchError
from conch_dna.training.batches import Example, PairedExample
from conch_dna.training.data.sources import Given, read_given
from conch_dna.training.data.views import OWN_ANSWER, taught_by, with_own_answer
from conch_dna.training.runs.privilege import require_help
from conch_dna.training.settings import KDConfig
from conch_dna.training.true_kd import TrueKnowledgeDistiller
from models import QUICK, make_model_folder

COUNT = 4
RECORDS = [
    {"prompt": f"Who saw {n}?", "completion": f" It was number {n}.", "context": "Read this."}
    for n in range(12)
]


def example(number: int, *, apart: bool = True) -> Example:
    ids = np.arange(number + 3, number + 3 + COUNT + 2, dtype=np.int32)
    counted = np.array([False, False] + [True] * COUNT)
    plain = Example(ids, counted, f"example {number}")
    return PairedExample(ids, counted, plain.name, teacher=plain) if apart else plain


def judged(
    gain: float, *, examples: int = 12, apart: bool = True, force: bool = False
) -> list[tuple[str, str]]:
    """What is said where the teacher's cross-entropy a token is lower by `gain`, give or take."""
    random = np.random.default_rng(0)
    heldout = [example(number, apart=apart) for number in range(examples)]
    own = 3 + random.normal(scale=0.1, size=examples)
    informed = own - gain + random.normal(scale=0.05, size=examples)
    gold = {e.name: np.full(COUNT, -each) for e, each in zip(heldout, informed, strict=True)}
    targets: Any = SimpleNamespace(gold=lambda each: gold[each.name])
    counts = np.full(examples, float(COUNT))
    before: Any = SimpleNamespace(by_example={"cross_entropy": np.array([own * COUNT, counts])})
    said: list[tuple[str, str]] = []
    require_help(
        heldout,
        targets,
        before,
        KDConfig(force=force),
        lambda event, row: said.append((event, row["message"])),
    )
    return said


@pytest.mark.parametrize("gain", [0.0, -0.5])
def test_what_does_not_help_is_refused_with_its_figures(gain: float):
    with pytest.raises(ConchError, match=r"not shown to help: cross-entropy .* --force$"):
        judged(gain)
    assert judged(gain, force=True)[0][0] == "message"


def test_what_helps_is_said():
    [(event, text)] = judged(0.5)
    assert event == "message"
    before, after = map(float, re.findall(r"\d\.\d{4}", text))
    assert before - after == pytest.approx(0.5, abs=0.05)


def test_too_few_examples_are_warned_of():
    [(event, text)] = judged(0.5, examples=3)
    assert event == "warning"
    assert "3 held-out examples, too few to tell" in text


def test_where_both_read_the_same_nothing_is_asked():
    assert judged(0.0, apart=False) == []


def test_a_student_called_self_teaches():
    assert taught_by("self", "a") == "a"
    assert taught_by("b", "a") == "b"


@pytest.mark.parametrize("force", [False, True])
def test_a_run_asks_before_it_trains(force: bool, tmp_path: Path):
    """This random model finds the answers less likely behind the context."""
    student = str(make_model_folder(tmp_path / "student", seed=1))
    config = KDConfig(
        **{**QUICK, "val_fraction": 0.5}, output_dir=str(tmp_path / "out"), force=force
    )
    distiller = TrueKnowledgeDistiller("self", student, config)
    if force:
        result = distiller.distill_domain("own", data=RECORDS)
        assert result.metadata["teacher"] == student
        return
    with pytest.raises(ConchError, match="the teacher is the student itself"):
        distiller.distill_domain("own", data=RECORDS)
    assert not (tmp_path / "out" / "own" / "adapters_kd").exists()


class TestOwnAnswer:
    def test_it_stands_before_the_prompt(self):
        record = with_own_answer({"prompt": "Who?", "completion": "Me."})
        assert "\n\nMe.\n\n" in record["context"]
        turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "You."}]
        assert "You." in with_own_answer({"messages": turns})["context"]

    def test_what_has_none_is_refused(self):
        with pytest.raises(ConchError, match="a plain text has no answer"):
            with_own_answer({"text": "a"})
        with pytest.raises(ConchError, match="has a context already"):
            with_own_answer(RECORDS[0])

    def test_it_is_asked_for_by_name(self, tmp_path: Path):
        path = tmp_path / "data.jsonl"
        path.write_text('{"prompt": "Who?", "completion": "Me."}\n')
        given = Given(data=str(path), demonstrations=OWN_ANSWER)
        (record,) = read_given(given, print)["data"]
        assert "Me." in record["context"]
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("Who?\n")
        with pytest.raises(ConchError, match="give --data"):
            read_given(Given(prompts=str(prompts), demonstrations=OWN_ANSWER), print)
