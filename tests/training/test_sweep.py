"""Sweeps: which runs there are, one cache for all, the same bits as single runs, the choice.

Tiny random models; `select_by` the KD loss, by which their few steps are better than none.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from conch_dna.checkpoints import verify_folder
from conch_dna.cli import main
from conch_dna.errors import ConchError, Interrupted
from conch_dna.language_model import ModelSource
from conch_dna.metrics import verdict
from conch_dna.training.data.soft_targets import SoftTargetCache
from conch_dna.training.evaluation import figures_on
from conch_dna.training.runs import domain_run
from conch_dna.training.settings import KDConfig
from conch_dna.training.sweeps.grid import SWEEPABLE, grid_runs
from conch_dna.training.sweeps.report import choice_text, draw_sweep, sweep_table
from conch_dna.training.sweeps.sweep import Sweep, plan_sweep
from conch_dna.training.trainer import Trainer
from conch_dna.training.true_kd import TrueKnowledgeDistiller, plan_domain
from models import ANIMALS, QUICK

PROMPTS = [
    f"Once upon a time there was a little {name} who" for name in [*ANIMALS, *"abcdefghijkl"]
]
TEST = [{"text": f"One day a {animal} and a man went home."} for animal in ANIMALS]
SWEPT = {"temperature": (1.0, 4.0), "lora_rank": (2, 4)}


def made(pair: tuple[Path, Path], output: Path, **changes: Any) -> Sweep:
    values = {**QUICK, "output_dir": str(output), **changes}
    shared, runs = grid_runs("s", values, most=32)
    teacher, student = (ModelSource(str(path)) for path in pair)
    return Sweep(teacher, student, shared, runs, "s")


@pytest.fixture(scope="module")
def pair(tiny_teacher, tiny_student) -> tuple[Path, Path]:
    return tiny_teacher, tiny_student


@pytest.fixture(scope="module", autouse=True)
def _no_curve():
    """Draw no curves, which would take half of a tiny run's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(domain_run, "draw_curve", lambda path, *a, **k: path.write_bytes(b"PNG"))
        yield


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that are loaded, in order."""
    found: list[str] = []
    load = ModelSource.load

    def counted(self: ModelSource, **how: Any) -> Any:
        found.append(self.model_id)
        return load(self, **how)

    monkeypatch.setattr(ModelSource, "load", counted)
    return found


@pytest.fixture(scope="module")
def swept(pair, tmp_path_factory) -> tuple[Sweep, dict[str, Any]]:
    """A finished sweep of four with test data; nobody may change its folder."""
    sweep = made(pair, tmp_path_factory.mktemp("sweep"), **SWEPT)
    return sweep, sweep.run(prompts=PROMPTS, test_data=TEST)


class TestGrid:
    def test_every_combination_is_a_run_the_last_field_changing_fastest(self):
        values = {"alpha": (0.5, 1.0), "temperature": [1, 2.5], "lora_rank": (8,)}
        shared, runs = grid_runs("s", values, most=4)
        assert [run.name for run in runs] == [
            "temperature-1_alpha-0.5",
            "temperature-1_alpha-1",
            "temperature-2.5_alpha-0.5",
            "temperature-2.5_alpha-1",
        ]
        assert {run.config.lora_rank for run in runs} == {8}
        assert len({run.config.output_dir for run in runs} | {shared.output_dir}) == 5

    def test_close_values_have_names_of_their_own(self):
        _, runs = grid_runs("s", {"learning_rate": (1e-4, 1.00000001e-4)}, most=4)
        assert len({run.name for run in runs}) == 2

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"alpha": (0.5,)}, "nothing is swept"),
            ({}, "nothing is swept"),
            ({"alpha": (0.5, 0.50)}, "alpha has 0.5 twice"),
            ({"alpha": (0.5, 1), "run": "a"}, "a sweep names its runs itself"),
            ({"alpha": []}, "alpha has no value"),
            ({"alpha": (0.5, 2.0)}, "alpha is 2.0: it must be between 0 and 1"),
            (
                {"seed": (0, 1)},
                "seed has 2 values, and runs that differ in it are measured on other",
            ),
            ({"top_k": (8, 64)}, "top_k has 2 values, and .* by other figures"),
            ({"lora_rank": (4, 8), "full": True}, "lora-rank changes nothing with --full"),
            ({"temperature": (1, 2), "alpha": 0.0}, "temperature changes nothing with alpha 0"),
            ({"steps_per_save": (1, 2)}, "steps_per_save has 2 values, and .* equal adapters"),
            ({"lora_keys": ["q", "v"]}, "lora_keys has 2 values, and only numbers and choices"),
            ({"alpha": (0.1, 0.2, 0.3), "lora_rank": (1, 2)}, "6 runs, more than --max-runs 5"),
        ],
    )
    def test_what_cannot_be_swept_is_refused(self, values, message):
        with pytest.raises(ConchError, match=message):
            grid_runs("s", values, most=5)

    def test_what_changes_nothing_in_a_run_is_none_of_its_settings(self):
        _, runs = grid_runs("s", {"alpha": (0.0, 0.7), "temperature": (1.0, 4.0)}, most=3)
        assert {run.name for run in runs} == {
            "alpha-0",
            "temperature-1_alpha-0.7",
            "temperature-4_alpha-0.7",
        }
        by_kd = {"alpha": (0.0, 0.7), "temperature": (1.0, 4.0), "select_by": "kd"}
        assert len(grid_runs("s", by_kd, most=4)[1]) == 4
        # auto is kl, or cross_entropy without KD.
        chosen = {"alpha": (0.0, 0.7), "select_by": ("auto", "kl", "cross_entropy")}
        assert len(grid_runs("s", chosen, most=4)[1]) == 4

    def test_numbers_and_choices_can_be_swept(self):
        assert {"temperature", "divergence", "learning_rate", "num_iters"} <= set(SWEEPABLE)
        assert not {"output_dir", "dora", "lora_keys", "seed"} & set(SWEEPABLE)


@pytest.mark.slow
class TestFinished:
    def test_a_run_is_bit_for_bit_the_single_one(self, swept, pair, tmp_path):
        _, document = swept
        for row in (document["runs"][0], document["runs"][-1]):
            config = KDConfig(**{**QUICK, **row["settings"], "output_dir": str(tmp_path)})
            single = TrueKnowledgeDistiller(*map(str, pair), config)
            result = single.distill_domain("s", prompts=PROMPTS, overwrite=True)
            assert result.metadata["best_step"] > 0
            ours, theirs = Path(row["adapter"]), Path(result.adapter_path)
            verify_folder(ours)
            for name in ("adapters.safetensors", "evaluation.json", "heldout_figures.json"):
                assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
            logs = [json.loads((p / "training_log.json").read_text()) for p in (ours, theirs)]
            for log in logs:
                for line in log:
                    line.pop("tokens_per_second", None)
                    line.pop("peak_memory_bytes", None)
            assert logs[0] == logs[1]

    def test_the_teacher_is_loaded_once(self, pair, tmp_path, loads):
        made(pair, tmp_path, alpha=(0.5, 1.0)).run(prompts=PROMPTS, test_data=TEST)
        assert loads.count(str(pair[0])) == 1
        assert loads[0] == str(pair[0])

    def test_one_cache_holds_every_temperature(self, swept):
        sweep, _ = swept
        (folder,) = (sweep.folder / "shared" / "s" / "soft_targets").iterdir()
        assert not [*sweep.folder.glob("temperature*/s/soft_targets")]
        assert not [*sweep.folder.glob("temperature*/s/answers")]
        (identity,) = {path.parent.name for path in folder.glob("*.safetensors")}
        assert identity == folder.name

    def test_the_best_comes_first_with_paired_intervals_of_the_others(self, swept):
        _, document = swept
        rows = document["runs"]
        assert len(rows) == 4
        figures = [row["after"][document["figure"]] for row in rows]
        assert figures == sorted(figures)
        assert document["best"] == rows[0]["name"]
        files = [Path(row["adapter"]) / "heldout_figures.json" for row in rows]
        pairs = [np.array(json.loads(file.read_text())["kl_nats"]) for file in files]
        # The difference of the means, which needs no bootstrap.
        difference = (pairs[3][0].sum() - pairs[0][0].sum()) / pairs[0][1].sum()
        found = rows[3]["against_best"]
        assert found["difference"] == pytest.approx(difference)
        assert found["difference"] == pytest.approx(figures[3] - figures[0], abs=1e-6)
        low, high = found["interval"]
        assert low <= difference <= high
        assert found["examples"] == document["heldout_examples"] == 6

    def test_the_table_and_the_words(self, swept):
        _, document = swept
        table = sweep_table(document)
        assert table.row_count == 5
        text = " ".join(choice_text(document))
        assert "the best of 4 is temperature" in text
        assert "the best of 4 on the examples that chose it is optimistic" in text
        assert "on 12 test examples the student is" in text
        unconfirmed = " ".join(choice_text({**document, "confirmed": []}))
        assert "--test-data FILE" in unconfirmed
        alone = " ".join(choice_text({**document, "runs": document["runs"][:1]}))
        assert "the one finished run is temperature" in alone
        assert "optimistic" not in alone
        rows = [document["runs"][0], {**document["runs"][1], "settings": {"lora_rank": 2}}]
        assert sweep_table({**document, "runs": rows}).row_count == 3

    def test_the_picture_has_a_row_for_each_run(self, swept, tmp_path):
        sweep, document = swept
        assert (sweep.folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
        for runs in (1, 4):
            draw_sweep(tmp_path / "p.png", {**document, "runs": document["runs"][:runs]})

    def test_the_choice_is_measured_on_the_test_data(self, swept, pair):
        sweep, document = swept
        (done,) = document["confirmed"]
        assert done["run"] == document["best"]
        assert done["examples"] == 12
        student = ModelSource(str(pair[1])).load(adapter_path=Path(document["runs"][0]["adapter"]))
        shared = domain_run.DomainRun(
            sweep.teacher, sweep.student, sweep.shared, "s", lambda event, row: None
        )
        _, examples = shared.examples.make(TEST)
        targets = shared.examples.targets(
            sweep.folder / "shared" / "s" / "soft_targets", also_at=(1.0, 4.0)
        )
        assert not targets.missing(examples)
        measured = figures_on(student, examples, targets, sweep.shared)
        assert done["after"] == measured.metrics.to_json()
        assert verdict(measured.by_example["kl_nats"], measured.by_example["kl_nats"])


@pytest.mark.slow
class TestAgain:
    def test_a_sweep_is_not_begun_over_another(self, pair, tmp_path):
        sweep = made(pair, tmp_path, alpha=(0.5, 1.0))
        sweep.run(prompts=PROMPTS)
        with pytest.raises(ConchError, match="holds a sweep: add --resume"):
            sweep.run(prompts=PROMPTS)

    def test_finished_runs_are_skipped_and_new_ones_added(self, pair, tmp_path, loads, monkeypatch):
        first = made(pair, tmp_path, alpha=(0.5, 1.0)).run(prompts=PROMPTS, test_data=TEST)
        trained: list[str] = []
        run = Trainer.run
        monkeypatch.setattr(
            Trainer,
            "run",
            lambda self, **k: (trained.append(self.folder.parent.name), run(self, **k))[1],
        )
        wider = made(pair, tmp_path, alpha=(0.5, 0.7, 1.0))
        models = (wider.teacher, wider.student)
        plan = plan_domain(*models, wider.runs[0].config, "s", prompts=PROMPTS)
        planned = plan_sweep(models, wider.runs, "s", plan["workload"])
        assert (planned["finished"], planned["steps"]) == (2, 4)
        assert planned["seconds"] > 0
        second = wider.run(prompts=PROMPTS, resume=True, test_data=TEST)
        assert trained == ["alpha-0.7"]
        assert {row["name"] for row in first["runs"]} < {row["name"] for row in second["runs"]}
        loads.clear()
        third = wider.run(prompts=PROMPTS, resume=True, test_data=TEST)
        assert not loads
        assert third["runs"] == second["runs"]
        # The test data are asked once for each choice.
        assert third["confirmed"] == second["confirmed"]

    def test_an_interrupted_run_goes_on_to_the_same_bytes(self, pair, tmp_path, monkeypatch):
        whole = made(pair, tmp_path / "whole", alpha=(0.5, 1.0)).run(prompts=PROMPTS)
        sweep = made(pair, tmp_path / "cut", alpha=(0.5, 1.0))

        def stop(event: str, row: dict[str, Any]) -> None:
            if event == "checkpoint" and row["step"] == 2 and (sweep.folder / "alpha-1").exists():
                raise Interrupted("stopped")

        sweep.report = stop
        with pytest.raises(Interrupted):
            sweep.run(prompts=PROMPTS)
        resumed: list[int] = []
        sweep.report = lambda event, row: (
            resumed.append(row["step"]) if event == "resumed" else None
        )
        document = sweep.run(prompts=PROMPTS, resume=True)
        assert resumed == [2]
        for ours, theirs in zip(document["runs"], whole["runs"], strict=True):
            assert ours["name"] == theirs["name"]
            adapters = [Path(row["adapter"]) / "adapters.safetensors" for row in (ours, theirs)]
            assert adapters[0].read_bytes() == adapters[1].read_bytes()

    def test_other_settings_for_the_same_run_are_refused(self, pair, tmp_path):
        made(pair, tmp_path, alpha=(0.5, 1.0)).run(prompts=PROMPTS)
        other = made(pair, tmp_path, alpha=(0.5, 1.0), learning_rate=1e-3)
        with pytest.raises(ConchError, match=r"was made with other settings: learning_rate: was"):
            other.run(prompts=PROMPTS, resume=True)
        document = other.run(prompts=PROMPTS, overwrite=True)
        assert len(document["runs"]) == 2

    def test_a_run_that_fails_does_not_stop_the_others(self, pair, tmp_path):
        sweep = made(pair, tmp_path, learning_rate=(1e-3, 1e30), max_grad_norm=1e30)
        document = sweep.run(prompts=PROMPTS)
        assert [row["settings"]["learning_rate"] for row in document["runs"]] == [1e-3]
        assert list(document["failures"]) == ["learning_rate-1e+30"]

    def test_nothing_of_a_finished_sweep_is_lost_by_another(self, pair, tmp_path):
        sweep = made(pair, tmp_path, alpha=(0.5, 1.0))
        sweep.run(prompts=PROMPTS)
        kept = (sweep.folder / "sweep.json").read_text()
        others: list[tuple[dict[str, Any], str]] = [
            ({"alpha": (0.5, 0.7), "num_iters": 2}, "has taken 4 steps already|no checkpoint"),
            ({"alpha": (0.7, 0.9), "learning_rate": 1e-3}, "learning_rate: was 0.003, now 0.001"),
            ({"temperature": (1.0, 4.0)}, "a sweep of --alpha, and this one is of --temperature"),
        ]
        for changes, message in others:
            with pytest.raises(ConchError, match=message):
                made(pair, tmp_path, **changes).run(prompts=PROMPTS, resume=True)
            with pytest.raises(ConchError, match=message):
                made(pair, tmp_path, **changes).require_possible(
                    prompts=PROMPTS, resume=True, weights=False
                )
            assert (sweep.folder / "sweep.json").read_text() == kept
        said: list[str] = []
        more = made(pair, tmp_path, alpha=(0.7, 1.0))
        more.report = lambda event, row: said.append(row.get("message", ""))
        document = more.run(prompts=PROMPTS, resume=True)
        assert {row["name"] for row in document["runs"]} == {"alpha-0.5", "alpha-0.7", "alpha-1"}
        assert [text for text in said if "finished" in text] == ["2 runs already finished"]


class TestRefused:
    @pytest.mark.parametrize("overwrite", [False, True])
    def test_a_refused_sweep_leaves_nothing_in_the_way(self, overwrite, pair, tmp_path):
        records = [{"text": f"{prompt} ran."} for prompt in PROMPTS]
        sweep = made(pair, tmp_path, alpha=(0.5, 1.0))
        (sweep.folder / "alpha-9" / "s").mkdir(parents=True)
        (sweep.folder / "alpha-9" / "s" / "run.json").write_text("{}")
        if not overwrite:
            (sweep.folder / "alpha-9" / "s" / "run.json").unlink()
        with pytest.raises(ConchError, match="test examples are among the others too"):
            sweep.run(data=records, test_data=records[:2], overwrite=overwrite)
        assert not (sweep.folder / "sweep.json").exists()
        assert (sweep.folder / "alpha-9" / "s" / "run.json").exists() == overwrite
        sweep.require_possible(data=records, test_data=TEST, overwrite=overwrite)

    def test_test_data_that_are_learned_from(self, pair, tmp_path):
        records = [{"text": f"{prompt} ran."} for prompt in PROMPTS]
        with pytest.raises(ConchError, match="2 of 3 test examples are among the others too"):
            made(pair, tmp_path, alpha=(0.5, 1.0)).run(
                data=records, test_data=[*records[:2], TEST[0]]
            )

    def test_values_that_change_nothing(self, pair, tmp_path):
        sweep = made(pair, tmp_path, chunk_weight=(0.5, 1.0))
        with pytest.raises(ConchError, match="chunk_weight changes nothing with one tokenizer"):
            sweep.run(prompts=PROMPTS)

    def test_layers_that_are_not_there_before_the_teacher_works(self, pair, tmp_path, loads):
        with pytest.raises(ConchError, match="lora_layers is 50"):
            made(pair, tmp_path, lora_layers=(1, 50)).run(prompts=PROMPTS)
        assert not loads


class TestCommand:
    def options(self, pair: tuple[Path, Path], output: Path, *more: str) -> list[str]:
        (output / "p.txt").write_text("\n".join(PROMPTS))
        values = {**QUICK, "teacher": pair[0], "student": pair[1], "prompts": output / "p.txt"}
        values["output_dir"] = output
        given = [part for n, v in values.items() for part in (f"--{n.replace('_', '-')}", str(v))]
        return ["sweep", "--domain", "s", *given, *more]

    @pytest.mark.slow
    def test_prints_table_choice_and_files(self, pair, tmp_path):
        done = CliRunner().invoke(
            main, self.options(pair, tmp_path, "--alpha", "0.5,1"), catch_exceptions=False
        )
        assert done.exit_code == 0
        assert "2 runs, 0 of them finished: 8 steps left" in done.stderr
        assert "s: 2 runs" in done.stdout
        assert "the best of 2 is alpha" in done.stdout
        assert "sweep.png" in done.stdout

    @pytest.mark.slow
    def test_takes_a_folder_of_data_as_distill_does(self, pair, tmp_path):
        (tmp_path / "data").mkdir()
        texts = [f"{prompt} ran away and was happy." for prompt in PROMPTS]
        parts = {"train": texts[:16], "valid": texts[16:], "test": [each["text"] for each in TEST]}
        for name, part in parts.items():
            lines = "\n".join(json.dumps({"text": text}) for text in part)
            (tmp_path / "data" / f"{name}.jsonl").write_text(lines)
        options = self.options(pair, tmp_path, "--alpha", "0.5,1", "--data", str(tmp_path / "data"))
        at = options.index("--prompts")
        done = CliRunner().invoke(main, options[:at] + options[at + 2 :], catch_exceptions=False)
        assert done.exit_code == 0
        assert "on 12 test examples the student is" in done.stdout
        document = json.loads((tmp_path / "s-sweep" / "sweep.json").read_text())
        assert document["heldout_examples"] == 8

    def test_a_dry_run_does_nothing(self, pair, tmp_path, loads):
        done = CliRunner().invoke(
            main, self.options(pair, tmp_path, "--temperature", "1,2", "--dry-run")
        )
        assert done.exit_code == 0, done.stderr
        assert "temperature 2" in done.stdout
        assert re.search(r"2 runs, 0 .* 8 steps left, about [0-9.]+ minutes", done.stderr)
        assert not loads
        assert not (tmp_path / "s-sweep").exists()

    def test_lists_in_a_settings_file(self, pair, tmp_path):
        (tmp_path / "c.yaml").write_text("alpha: [0.5, 1]\niters: 4\n")
        options = self.options(pair, tmp_path, "--config", str(tmp_path / "c.yaml"), "--dry-run")
        done = CliRunner().invoke(main, options)
        assert done.exit_code == 0, done.stderr
        assert "2 runs" in done.stderr

    def test_a_dry_run_refuses_what_the_run_would(self, pair, tmp_path):
        texts = [{"text": f"{prompt} ran away."} for prompt in PROMPTS]
        for name, part in {"d": texts, "t": texts[:2]}.items():
            (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
        options = self.options(pair, tmp_path, "--alpha", "0.5,1", "--dry-run")
        at = options.index("--prompts")
        options[at : at + 2] = ["--data", str(tmp_path / "d.jsonl")]
        refusals = {
            "2 of 2 test examples are among": ["--test-data", str(tmp_path / "t.jsonl")],
            "18 training examples cannot fill one batch of 30": ["--batch-size", "2,30"],
        }
        for message, more in refusals.items():
            done = CliRunner().invoke(main, [*options, *more])
            assert done.exit_code == 2, done.output
            assert message in done.stderr
        (tmp_path / "s-sweep").mkdir()
        (tmp_path / "s-sweep" / "sweep.json").write_text('{"runs": []}')
        assert "holds a sweep" in CliRunner().invoke(main, options).stderr

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            (["--alpha", "0.5,x"], "'x' is not a valid float"),
            (["--seed", "1,2"], "'1,2' is not a valid integer"),
            ([], "nothing is swept"),
            (["--alpha", "0.5,1", "--resume", "--overwrite"], "give either --resume"),
        ],
    )
    def test_mistakes_are_one_line(self, more, message, pair, tmp_path):
        done = CliRunner().invoke(main, self.options(pair, tmp_path, *more))
        assert done.exit_code == 2
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_targets_at_several_temperatures_are_those_at_each(pair, tmp_path):
    """Silent failure: targets at one temperature told from those at another are not exact."""
    from conch_dna.training.data.examples import Examples

    teacher, student = (ModelSource(str(path)) for path in pair)
    one = Examples(teacher, student, KDConfig(temperature=3.0, top_k=8))
    _, examples = one.make([{"text": prompt} for prompt in PROMPTS])
    alone, shared = one.targets(tmp_path / "a"), one.targets(tmp_path / "b", also_at=(0.5, 7.0))
    for targets in (alone, shared):
        assert isinstance(targets, SoftTargetCache)
        targets.fill(teacher, examples, batch_size=4)
    assert shared.identity.temperatures == (0.5, 1.0, 3.0, 7.0)
    for temperature in (1.0, 3.0):
        for name, value in alone.outcomes(examples, temperature, 512).items():
            found = shared.outcomes(examples, temperature, 512)[name]
            np.testing.assert_array_equal(found, value)
    outcomes = shared.outcomes(examples, 7.0, 512)["teacher_log_probs"]
    np.testing.assert_allclose(np.exp(outcomes).sum(axis=1), 1, atol=1e-5)
