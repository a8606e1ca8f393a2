"""Finished runs are kept: what may replace one, runs beside each other, and runs made longer.

On tiny models; what an adapter is compared with is a run that was never stopped or extended.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conch_dna.checkpoints import verify_folder
from conch_dna.cortex.calibration.heldout import heldout_records
from conch_dna.errors import ConchError
from conch_dna.retraining.domain import active_adapter, known_domains
from conch_dna.training.runs import domain_run
from conch_dna.training.settings import KDConfig, KDResult, get_kd_adapter_path
from conch_dna.training.true_kd import TrueKnowledgeDistiller

ANIMALS = ["cat", "dog", "bird", "fox", "frog", "pig", "bear", "duck", "cow", "hen", "goat", "boy"]
TEXTS = [
    {"text": f"Once there was a little {animal} who was{' very' * number} happy."}
    for number, animal in enumerate(ANIMALS)
]
OTHERS = [{"text": f"The {animal} ran home, and so did {animal} two."} for animal in ANIMALS]
TINY: dict[str, Any] = {
    "num_iters": 4,
    "learning_rate": 3e-3,
    "warmup_iters": 1,
    "batch_size": 2,
    "val_fraction": 0.25,
    "steps_per_report": 2,
    "steps_per_eval": 3,
    "steps_per_save": 2,
    "lora_dropout": 0.2,
}
Distil = Callable[..., KDResult]


class Crash(BaseException):
    """Stops a run as a kill would."""


def crash_at(event: str, number: int) -> Callable[[str, dict[str, Any]], None]:
    seen = 0

    def report(name: str, row: dict[str, Any]) -> None:
        nonlocal seen
        seen += name == event
        if name == event and seen == number:
            raise Crash

    return report


@pytest.fixture
def distil(
    tiny_teacher: Path, tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Distil:
    """Distils the domain `s`; `how` goes to `distill_domain`."""
    monkeypatch.setattr(domain_run, "draw_curve", lambda path, *a, **k: path.write_bytes(b"PNG"))

    def run(
        data: list[dict[str, Any]] = TEXTS,
        report: Any = lambda event, row: None,
        how: dict[str, Any] | None = None,
        **settings: Any,
    ) -> KDResult:
        config = KDConfig(**{**TINY, "output_dir": str(tmp_path), **settings})
        distiller = TrueKnowledgeDistiller(
            str(tiny_teacher), str(tiny_student), config, report=report
        )
        return distiller.distill_domain("s", data=data, **(how or {}))

    return run


def adapter_of(result: KDResult) -> bytes:
    return (Path(result.adapter_path) / "adapters.safetensors").read_bytes()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def run_file(tmp_path: Path) -> dict[str, Any]:
    return dict(json.loads((tmp_path / "s" / "run.json").read_text()))


class TestNothingOverwritten:
    def test_a_finished_run_stays_unless_it_is_to_be_replaced(self, distil, tmp_path):
        first = distil()
        before = contents(tmp_path / "s")
        with pytest.raises(ConchError, match=r"learning_rate: was 0\.003, now 0\.001") as caught:
            distil(learning_rate=1e-3)
        message = str(caught.value)
        assert message.startswith(f"{tmp_path}/s holds a finished run with other settings (")
        for remedy in ("--overwrite to replace it", "--run NAME to keep both", "--output-dir"):
            assert remedy in message
        assert "--resume" not in message
        with pytest.raises(ConchError, match=r"with other settings \(data: was "):
            distil(OTHERS)
        with pytest.raises(ConchError, match="the same settings: add --resume to see its result"):
            distil()
        with pytest.raises(ConchError, match=r"was 4, now 6.* --resume to go on from step 4, --ov"):
            distil(num_iters=6)
        with pytest.raises(ConchError, match="holds a finished run"):
            distil(adapter_subdir="second", learning_rate=1e-3)
        assert contents(tmp_path / "s") == before
        second = distil(learning_rate=1e-3, how={"overwrite": True})
        assert adapter_of(second) != adapter_of(first) or second.evaluation != first.evaluation

    @pytest.mark.slow
    def test_a_stopped_replacement_leaves_the_old_adapter_with_its_data(self, distil, tmp_path):
        """Silent failure: an adapter lies beside data that it never saw."""
        distil()
        adapter = tmp_path / "s" / "adapters_kd"
        before = contents(adapter)
        new: dict[str, Any] = {"data": OTHERS, "learning_rate": 1e-3}
        for event, number in (("phase", 1), ("checkpoint", 2), ("phase", 3)):
            with pytest.raises(Crash):
                distil(**new, report=crash_at(event, number), how={"overwrite": True})
            verify_folder(adapter)
            assert contents(adapter) == before
        kept = [json.loads(line) for line in before["training_data.jsonl"].decode().splitlines()]
        assert kept == TEXTS
        with pytest.raises(ConchError, match="holds an unfinished run and an adapter with other"):
            distil(learning_rate=5e-4)
        resumed = distil(**new, how={"resume": True})
        fresh = distil(**new, output_dir=str(tmp_path / "fresh"))
        assert adapter_of(resumed) == adapter_of(fresh)

    def test_an_adapter_that_nothing_is_known_of_stays(self, distil, tmp_path):
        distil()
        (tmp_path / "s" / "run.json").write_text("[]")
        with pytest.raises(ConchError, match=r"holds an adapter and no readable run\.json"):
            distil()

    def test_a_failure_is_written_down(self, distil, tmp_path):
        with pytest.raises(ConchError, match="longer than 3 tokens"):
            distil(max_seq_length=3)
        assert "longer than 3 tokens" in run_file(tmp_path)["failed"]
        distil()
        assert "failed" not in run_file(tmp_path)


class TestNamedRuns:
    def test_they_lie_beside_each_other_and_share_the_teachers_work(self, distil, tmp_path):
        plain = distil()
        before = contents(tmp_path / "s" / "adapters_kd")
        phases: list[str] = []
        named = distil(
            learning_rate=1e-3,
            run="slow.1",
            report=lambda event, row: phases.append(row["name"]) if event == "phase" else None,
        )
        assert not [name for name in phases if "targets" in name], "they are in the cache"
        folder = tmp_path / "runs" / "slow.1"
        assert Path(named.adapter_path) == folder / "s" / "adapters_kd"
        config = KDConfig(output_dir=str(tmp_path), run="slow.1")
        assert get_kd_adapter_path("s", config) == Path(named.adapter_path)
        assert {path.name for path in (folder / "s").iterdir()} == {
            *("adapters_kd", "checkpoint_2", "checkpoint_4", "run.json", "run.lock")
        }
        assert contents(tmp_path / "s" / "adapters_kd") == before
        assert adapter_of(plain) != adapter_of(named)
        with pytest.raises(ConchError, match="holds a finished run"):
            distil(learning_rate=1e-4, run="slow.1")

    def test_a_name_does_not_change_what_is_computed(self, distil, tmp_path):
        named = distil(run="a")
        assert adapter_of(distil()) == adapter_of(named)

    def test_cortex_and_calibration_find_them_by_their_folder(self, distil, tmp_path):
        distil(val_fraction=0.5)
        distil(run="other")
        folder = tmp_path / "runs" / "other"
        assert known_domains(folder) == known_domains(tmp_path) == ["s"]
        assert active_adapter(folder, "s") == folder / "s" / "adapters_kd"
        assert [len(heldout_records(each, "s")) for each in (tmp_path, folder)] == [6, 3]

    @pytest.mark.parametrize(
        "name", ["..", "a/b", ".x", "answers", "Run.JSON", "checkpoint_1", "é", "a" * 65, "a b"]
    )
    def test_a_name_is_a_plain_one_that_is_not_taken(self, name):
        with pytest.raises(ConchError, match=r"run is .*use one plain folder name"):
            KDConfig(run=name)

    @pytest.mark.parametrize("domain", ["runs", "Runs"])
    def test_no_domain_is_called_like_their_folder(self, domain):
        config = KDConfig(output_dir="nowhere")
        distiller = TrueKnowledgeDistiller("embedded:teacher", "embedded:student", config)
        with pytest.raises(ConchError, match="that is the folder of named runs"):
            distiller.distill_domain(domain, data=TEXTS)


class TestLongerRuns:
    @pytest.mark.slow
    @pytest.mark.parametrize("stopped", [False, True])
    def test_at_a_constant_rate_it_is_the_longer_run_to_the_bit(self, distil, tmp_path, stopped):
        """4 steps of 2 read 8 of 9 examples, so that further targets are computed later."""
        constant: dict[str, Any] = {"schedule": "constant", "num_iters": 4}
        if stopped:
            with pytest.raises(Crash):
                distil(**constant, report=crash_at("checkpoint", 1))
        else:
            distil(**constant)
        longer = {**constant, "num_iters": 9}
        messages: list[str] = []
        extended = distil(
            **longer,
            how={"resume": True},
            report=lambda event, row: messages.append(row.get("message", "")),
        )
        (extension,) = extended.metadata["extensions"]
        assert (extension["planned"], extension["num_iters"]) == (4, 9)
        assert extension["step"] == (2 if stopped else 4)
        assert extension["told"] in messages
        # With the same targets: computed in other batches, products may be rounded otherwise.
        cache = tmp_path / "s" / "soft_targets"
        shutil.copytree(cache, tmp_path / "fresh" / "s" / cache.name)
        fresh = distil(**longer, output_dir=str(tmp_path / "fresh"))
        last = [each / "s" / "checkpoint_9" for each in (tmp_path, tmp_path / "fresh")]
        for name in ("adapters", "optimizer", "random", "best"):
            one, other = ((path / f"{name}.safetensors").read_bytes() for path in last)
            assert one == other, name
        assert adapter_of(extended) == adapter_of(fresh)
        assert extended.evaluation == fresh.evaluation
        assert fresh.metadata["extensions"] == []
        # And it is finished now.
        assert distil(**longer, how={"resume": True}) == extended

    def test_a_cosine_is_said_to_be_laid_anew(self, distil):
        distil()
        (extension,) = distil(num_iters=8, how={"resume": True}).metadata["extensions"]
        assert "the cosine is laid anew over 8 steps" in extension["told"]

    def test_what_else_differs_is_refused_as_before(self, distil):
        distil()
        with pytest.raises(ConchError, match=r"other settings: learning_rate: was 0\.003, now 1"):
            distil(num_iters=8, learning_rate=1.0, how={"resume": True})
        with pytest.raises(ConchError, match="has taken 4 steps already, and --iters is 3"):
            distil(num_iters=3, how={"resume": True})

    def test_without_a_checkpoint_nothing_goes_on(self, distil, tmp_path):
        distil()
        for path in (tmp_path / "s").glob("checkpoint_*"):
            shutil.rmtree(path)
        with pytest.raises(ConchError, match="no checkpoint to go on from: add --overwrite to tr"):
            distil(num_iters=8, how={"resume": True})

    def test_the_finished_adapter_stays_until_the_longer_run_ends(self, distil, tmp_path):
        distil()
        before = contents(tmp_path / "s" / "adapters_kd")
        with pytest.raises(Crash):
            distil(num_iters=8, how={"resume": True}, report=crash_at("checkpoint", 1))
        assert contents(tmp_path / "s" / "adapters_kd") == before
