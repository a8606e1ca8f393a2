"""A distillation from end to end through its API, on the embedded pair and on tiny models.

Read-only tests share one finished run. Where results are compared, a guard says that training
did change the adapter, since two untrained adapters are always equal.
"""

import gc
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from conch_dna.checkpoints import file_digest
from conch_dna.errors import ConchError, NonFiniteLossError
from conch_dna.language_model import ASSETS, ModelSource
from conch_dna.losses import LOSSES
from conch_dna.training.batches import ExampleBatches
from conch_dna.training.data.examples import Examples
from conch_dna.training.data.records import split_heldout
from conch_dna.training.distillation import DOMAIN_PROMPTS
from conch_dna.training.runs import domain_run, fit_student
from conch_dna.training.runs.html_report import write_report
from conch_dna.training.runs.report import verdict_text
from conch_dna.training.true_kd import KDConfig, KDResult, TrueKnowledgeDistiller
from models import make_model_folder

ANIMALS = ["cat", "dog", "bird", "fox", "frog", "pig", "bear", "duck", "cow", "hen", "goat", "boy"]
PROMPTS = [f"Once upon a time there was a little {animal} who" for animal in ANIMALS]
TEXTS = [
    {"text": f"{prompt} was{' very' * number} happy."} for number, prompt in enumerate(PROMPTS)
]
TINY: dict[str, Any] = {
    "num_iters": 6,
    "learning_rate": 3e-3,
    "warmup_iters": 1,
    "batch_size": 2,
    "max_tokens": 8,
    "val_fraction": 0.25,
    "steps_per_report": 2,
    "steps_per_eval": 2,
    "steps_per_save": 2,
}
CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<|endoftext|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


class Run(NamedTuple):
    """A finished run, and what it was given."""

    distiller: TrueKnowledgeDistiller
    records: list[dict[str, Any]]
    result: KDResult
    folder: Path


class Events(list[tuple[str, dict[str, Any]]]):
    """Collects what a run reports."""

    def __call__(self, event: str, row: dict[str, Any]) -> None:
        self.append((event, row))

    def messages(self, event: str) -> list[str]:
        return [row["message"] for name, row in self if name == event]

    def phases(self) -> list[str]:
        return [row["name"].partition(": ")[2] for name, row in self if name == "phase"]


def make(teacher: Any, student: Any, output: Path, **settings: Any) -> TrueKnowledgeDistiller:
    report = settings.pop("report", lambda event, row: None)
    config = KDConfig(**(TINY | {"output_dir": str(output)} | settings))
    return TrueKnowledgeDistiller(str(teacher), str(student), config, report=report)


def adapter_of(result: KDResult) -> bytes:
    return (Path(result.adapter_path) / "adapters.safetensors").read_bytes()


def tensors_of(result: KDResult) -> dict[str, mx.array]:
    loaded = mx.load(str(Path(result.adapter_path) / "adapters.safetensors"))
    assert isinstance(loaded, dict)
    return loaded


def trained(result: KDResult) -> KDResult:
    """The result, after a check that its adapter is not the one that training began with."""
    assert result.metadata["best_step"] > 0
    return result


def logits_of(model: Any, ids: list[int]) -> np.ndarray:
    return np.asarray(model(mx.array([ids]))[0].astype(mx.float32), np.float64)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The embedded pair, distilled in two calls; nobody may change its folder."""
    output = tmp_path_factory.mktemp("finished")
    settings = {"num_iters": 12, "learning_rate": 5e-4, "max_tokens": 20, "steps_per_eval": 4}
    distiller = make("embedded:teacher", "embedded:student", output, **settings)
    records = distiller.generate_training_data(PROMPTS, "stories")
    result = distiller.train_with_kd(records, "stories")
    return Run(distiller, records, trained(result), output / "stories")


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> Iterator[None]:
    """Spare the garbage collector, which every released model calls, the imported modules."""
    import mlx_lm  # noqa: F401

    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def no_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw nothing, which would take half of a tiny run's time."""
    monkeypatch.setattr(domain_run, "draw_curve", lambda path, *a, **k: path.write_bytes(b"PNG"))


@pytest.fixture
def two_domains() -> Iterator[None]:
    """Only two small domains exist."""
    original = dict(DOMAIN_PROMPTS)
    DOMAIN_PROMPTS.clear()
    DOMAIN_PROMPTS["alpha"] = {"system": "Tell a story.", "examples": PROMPTS[:8]}
    DOMAIN_PROMPTS["beta"] = {"system": "Be kind.", "examples": PROMPTS[4:]}
    yield
    DOMAIN_PROMPTS.clear()
    DOMAIN_PROMPTS.update(original)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the models whose weights are loaded, in their order."""
    names: list[str] = []
    load = ModelSource.load

    def counted(self: ModelSource, **how: Any) -> Any:
        names.append(self.model_id)
        return load(self, **how)

    monkeypatch.setattr(ModelSource, "load", counted)
    return names


class TestFinishedRun:
    def test_the_result_says_what_it_came_to(self, finished):
        result = finished.result
        assert result.domain == "stories"
        assert result.num_samples == len(PROMPTS)
        assert Path(result.adapter_path) == finished.folder / "adapters_kd"
        losses = (result.final_kd_loss, result.final_ce_loss, result.final_combined_loss)
        assert all(0 < loss < math.inf for loss in losses)
        mixed = 0.7 * result.final_kd_loss + 0.3 * result.final_ce_loss
        assert result.final_combined_loss == pytest.approx(mixed, rel=1e-5)
        assert result.training_time_seconds > 0
        assert result.timestamp[10] == "T"
        assert result.metadata["config"]["learning_rate"] == 5e-4
        assert result.metadata["versions"].keys() >= {"conch_dna", "mlx", "mlx-lm"}
        assert result.metadata["heldout_examples"] == 3

    def test_what_was_held_out_lies_with_the_adapter(self, finished):
        text = (finished.folder / "adapters_kd" / "heldout.jsonl").read_text(encoding="utf-8")
        config = finished.distiller.config
        _, heldout = split_heldout(finished.records, config.val_fraction, seed=config.seed)
        expected = [finished.records[index] for index in heldout]
        assert [json.loads(line) for line in text.splitlines()] == expected

    def test_its_losses_are_those_of_the_kept_step(self, finished):
        log = json.loads((finished.folder / "adapters_kd" / "training_log.json").read_text())
        heldout = [row for row in log if row["split"] == "heldout"]
        assert [row["step"] for row in heldout] == [0, 4, 8, 12]
        best = min(heldout, key=lambda row: row["kl"])
        assert best["step"] == finished.result.metadata["best_step"]
        assert best["kd"] == finished.result.final_kd_loss

    def test_the_figure_that_chose_the_step_is_the_one_that_is_reported(self, finished):
        log = json.loads((finished.folder / "adapters_kd" / "training_log.json").read_text())
        rows = {row["step"]: row["kl"] for row in log if row["split"] == "heldout"}
        evaluation, best = finished.result.evaluation, finished.result.metadata["best_step"]
        assert rows[0] == pytest.approx(evaluation["before"]["kl_nats"], rel=1e-5)
        assert rows[best] == pytest.approx(evaluation["after"]["kl_nats"], rel=1e-5)
        verdict = evaluation["verdict"]
        assert verdict["figure"] == "kl_nats"
        assert verdict["difference"] == pytest.approx(rows[best] - rows[0], abs=1e-5)
        assert (verdict["verdict"], verdict["interval"]) == ("not shown to be better", None)
        assert verdict["examples"] == finished.result.metadata["heldout_examples"]

    def test_the_adapter_folder_holds_everything_and_no_more(self, finished):
        names = {path.name for path in (finished.folder / "adapters_kd").iterdir()}
        assert names == {
            "adapter_config.json",
            "adapters.safetensors",
            "digests.json",
            "evaluation.json",
            "heldout.jsonl",
            "heldout_figures.json",
            "kd_result.json",
            "samples.md",
            "training_curve.png",
            "training_data.jsonl",
            "training_log.json",
        }

    def test_the_folder_keeps_no_working_files(self, finished):
        names = {path.name for path in finished.folder.iterdir()} - {"run.lock"}
        checkpoints = {f"checkpoint_{step}" for step in (8, 10, 12)}
        kept = {"adapters_kd", "answers", "run.json", "soft_targets", "training_data.jsonl"}
        assert names == kept | checkpoints
        assert not [*finished.folder.rglob(".writing-*")]

    def test_kd_result_json_is_the_result(self, finished):
        text = (finished.folder / "adapters_kd" / "kd_result.json").read_text()
        assert KDResult(**json.loads(text)) == finished.result

    def test_the_adapter_config_is_what_mlx_lm_reads_and_where_it_came_from(self, finished):
        config = json.loads((finished.folder / "adapters_kd" / "adapter_config.json").read_text())
        assert config["fine_tune_type"] == "lora"
        assert config["num_layers"] == 3
        keys = ["self_attn.q_proj", "self_attn.v_proj"]
        wanted = {"rank": 16, "scale": 10.0, "dropout": 0.0, "keys": keys}
        assert config["lora_parameters"] == wanted
        assert config["model"] == str(ASSETS.resolve() / "student"), "a name mlx_lm can open"
        assert config["conch_dna"]["student"] == "embedded:student"
        assert config["conch_dna"]["teacher"] == "embedded:teacher"

    def test_evaluation_json_has_every_figure(self, finished):
        evaluation = json.loads((finished.folder / "adapters_kd" / "evaluation.json").read_text())
        assert evaluation == finished.result.evaluation
        figures = {"kl_nats", "cross_entropy", "perplexity", "top1_agreement"}
        for name in ("before", "after", "teacher"):
            assert evaluation[name].keys() >= figures
            perplexity = math.exp(evaluation[name]["cross_entropy"])
            assert evaluation[name]["perplexity"] == pytest.approx(perplexity)
        share = 1 - evaluation["after"]["kl_nats"] / evaluation["before"]["kl_nats"]
        assert evaluation["gap_closed"] == pytest.approx(share)
        assert evaluation["teacher"]["kl_nats"] == 0
        assert evaluation["teacher"]["top1_agreement"] == 1
        assert evaluation["before"] != evaluation["after"]

    def test_its_bins_hold_every_held_out_token(self, finished):
        evaluation = finished.result.evaluation
        for name in ("by_position", "by_teacher_entropy"):
            bins = evaluation["breakdown"][name]
            assert sum(bins["count"]) == evaluation["before"]["tokens"]
            for moment in ("before", "after"):
                mean = sum(bins[moment]) / sum(bins["count"])
                assert mean == pytest.approx(evaluation[moment]["kl_nats"], rel=1e-5)
        for bins in evaluation["breakdown"]["calibration"].values():
            assert sum(bins["count"]) == evaluation["before"]["tokens"]

    def test_a_page_shows_it(self, finished, tmp_path):
        (run,) = write_report([finished.folder], tmp_path / "report.html")
        assert run.result == finished.result
        assert verdict_text(finished.result.evaluation) in (tmp_path / "report.html").read_text()

    @pytest.mark.parametrize("moment", ["before", "after", "teacher"])
    def test_the_figures_are_those_of_full_logits_in_float64(self, finished, moment):
        from mlx_lm import load

        adapter = {"adapter_path": finished.result.adapter_path} if moment == "after" else {}
        teacher, _ = load(str(ASSETS / "teacher"))
        model, _ = load(str(ASSETS / ("teacher" if moment == "teacher" else "student")), **adapter)
        _, heldout = split_heldout(finished.records, 0.25, seed=0)
        rows = []
        for record in (finished.records[index] for index in heldout):
            ids, first = record["tokens"]["ids"], record["tokens"]["prompt_length"]
            both = [logits_of(m, ids)[first - 1 : -1] for m in (teacher, model)]
            p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in both)
            kept = np.argsort(-p, axis=-1)[:, :64]
            joint = [np.take_along_axis(x, kept, axis=-1) for x in (p, q)]
            joint = [np.hstack([x, 1 - x.sum(-1, keepdims=True)]) for x in joint]
            kl = (joint[0] * np.log(joint[0] / joint[1])).sum(-1)
            dense = (p * np.log(p / q)).sum(-1)
            assert (dense - kl > -1e-9).all()
            gold = np.log(np.take_along_axis(q, np.array(ids[first:])[:, None], axis=-1))[:, 0]
            rows.append(np.stack([kl, -gold, p.argmax(-1) == q.argmax(-1)]))
        kl, cross_entropy, agreement = np.hstack(rows).mean(-1)
        figures = finished.result.evaluation[moment]
        assert figures["tokens"] == sum(row.shape[1] for row in rows)
        # The teacher's distribution is that of its targets on disk, in 7 bits.
        assert figures["kl_nats"] == pytest.approx(kl, abs=1e-4)
        assert figures["cross_entropy"] == pytest.approx(cross_entropy, abs=1e-5)
        assert figures["top1_agreement"] == pytest.approx(agreement)

    def test_the_curve_is_a_picture_with_the_losses_in_it(self, finished):
        from matplotlib.image import imread

        path = finished.folder / "adapters_kd" / "training_curve.png"
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        pixels = (imread(path)[..., :3] * 255).round().astype(int).reshape(-1, 3)
        colours = {tuple(colour) for colour in np.unique(pixels, axis=0).tolist()}
        # The first three colours of matplotlib's cycle: KL, KD, cross-entropy.
        assert {(31, 119, 180), (255, 127, 14), (44, 160, 44)} <= colours

    def test_samples_show_three_models_on_three_held_out_prompts(self, finished):
        text = (finished.folder / "adapters_kd" / "samples.md").read_text()
        sections = text.split("\n## ")[1:]
        assert len(sections) == 3
        _, heldout = split_heldout(finished.records, 0.25, seed=0)
        for section, index in zip(sections, heldout, strict=True):
            assert f"> {PROMPTS[index]}" in section
            names = ["**teacher**", "**student before**", "**student after**"]
            places = [section.index(name) for name in names]
            assert places == sorted(places)

    def test_training_data_are_in_mlx_lms_form_with_the_exact_tokens(self, finished):
        lines = (finished.folder / "adapters_kd" / "training_data.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == finished.records
        tokenizer = finished.distiller.student.tokenizer
        for prompt, record in zip(PROMPTS, finished.records, strict=True):
            assert record["prompt"] == prompt
            assert record["completion"]
            ids, length = record["tokens"]["ids"], record["tokens"]["prompt_length"]
            assert ids[:length] == tokenizer.encode(prompt)
            assert (ids[-1] == 0) == (record["finish_reason"] == "stop")

    def test_mlx_lm_opens_the_adapter_and_it_changes_the_logits(self, finished):
        from mlx_lm import load

        student = str(ASSETS / "student")
        base, tokenizer = load(student)
        adapted, _ = load(student, adapter_path=finished.result.adapter_path)
        ids = tokenizer.encode(PROMPTS[0])
        assert np.abs(logits_of(base, ids) - logits_of(adapted, ids)).max() > 1e-3

    def test_resuming_it_returns_at_once(self, finished, loads):
        events = Events()
        config = finished.distiller.config
        again = TrueKnowledgeDistiller(
            "embedded:teacher", "embedded:student", config, report=events
        )
        result = again.train_with_kd(finished.records, "stories", resume=True)
        assert result == finished.result
        assert loads == []
        assert events.messages("message") == ["stories is already finished"]

    @pytest.mark.slow
    def test_the_commands_of_mlx_lm_work_on_it(self, finished, tmp_path):
        from mlx_lm import load

        scripts, student = Path(sys.executable).parent, str(ASSETS / "student")
        adapter = finished.result.adapter_path
        common = ["--model", student, "--adapter-path", adapter]
        prompt = ["--prompt", "Once upon a time", "--max-tokens", "12"]
        done = command(str(scripts / "mlx_lm.generate"), *common, *prompt)
        text = done.split("==========")[1].strip()
        assert len(text.split()) >= 5
        command(str(scripts / "mlx_lm.fuse"), *common, "--save-path", str(tmp_path / "fused"))
        adapted, tokenizer = load(student, adapter_path=adapter)
        fused, _ = load(str(tmp_path / "fused"))
        ids = tokenizer.encode(PROMPTS[0])
        assert np.allclose(logits_of(adapted, ids), logits_of(fused, ids), atol=1e-3)


def command(*arguments: str) -> str:
    """Standard output of a command that succeeds, run without the network."""
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


class TestMemory:
    def test_the_teacher_is_gone_before_the_student_comes(self, tmp_path):
        """Peak memory is that of the larger model, not of the sum."""
        wide = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 8}
        teacher, student = (
            make_model_folder(tmp_path / name, seed=seed, **wide)
            for seed, name in enumerate(("teacher", "student"))
        )
        size = ModelSource(str(teacher)).weight_bytes
        assert size is not None
        before: dict[str, int] = {}
        base = mx.get_active_memory()
        mx.clear_cache()
        mx.reset_peak_memory()

        def report(event: str, row: dict[str, Any]) -> None:
            if event == "phase":
                before[row["name"]] = mx.get_active_memory() - base

        distiller = make(teacher, student, tmp_path, num_iters=2, report=report)
        result = distiller.distill_domain("s", prompts=PROMPTS[:6])
        assert before["s: evaluating the student"] < 0.1 * size
        assert size <= before["s: training"] < 1.3 * size
        assert before["s: evaluating the adapter"] < 0.1 * size
        assert mx.get_active_memory() - base < 0.1 * size
        assert size < result.metadata["peak_memory_bytes"] - base < 1.7 * size


@pytest.mark.usefixtures("no_curve")
class TestReuse:
    def test_other_training_settings_need_no_teacher(
        self, tiny_teacher, tiny_student, tmp_path, loads
    ):
        first = make(tiny_teacher, tiny_student, tmp_path).distill_domain("s", prompts=PROMPTS)
        first_adapter = adapter_of(trained(first))
        assert str(tiny_teacher) in loads
        loads.clear()
        other = make(tiny_teacher, tiny_student, tmp_path, learning_rate=1e-3)
        second = other.distill_domain("s", prompts=PROMPTS, overwrite=True)
        assert set(loads) == {str(tiny_student)}
        assert adapter_of(trained(second)) != first_adapter

    def test_another_temperature_computes_its_targets_but_no_answers(
        self, tiny_teacher, tiny_student, tmp_path
    ):
        """Silent failure: targets at the old temperature taken for those at the new one."""
        make(tiny_teacher, tiny_student, tmp_path).distill_domain("s", prompts=PROMPTS)
        answers = sorted((tmp_path / "s" / "answers").iterdir())
        hot = make(tiny_teacher, tiny_student, tmp_path, temperature=4.0)
        result = hot.distill_domain("s", prompts=PROMPTS, overwrite=True)
        assert sorted((tmp_path / "s" / "answers").iterdir()) == answers
        fresh = make(tiny_teacher, tiny_student, tmp_path / "fresh", temperature=4.0)
        again = fresh.distill_domain("s", prompts=PROMPTS)
        assert adapter_of(trained(result)) == adapter_of(again)

    def test_the_same_settings_give_the_same_bytes(self, tiny_teacher, tiny_student, tmp_path):
        adapters = {
            adapter_of(
                trained(
                    make(
                        tiny_teacher, tiny_student, tmp_path / name, lora_dropout=0.2, seed=seed
                    ).distill_domain("s", prompts=PROMPTS)
                )
            )
            for name, seed in (("a", 3), ("b", 3), ("c", 4))
        }
        assert len(adapters) == 2


@pytest.mark.usefixtures("no_curve")
class TestResume:
    @pytest.mark.parametrize(
        ("event", "number"),
        [
            ("advance", 2),
            ("phase", 2),
            ("phase", 3),
            ("phase", 4),
            ("heldout", 1),
            ("step", 3),
            ("checkpoint", 1),
            ("checkpoint", 2),
            ("checkpoint", 3),
            ("phase", 5),
        ],
    )
    def test_a_crash_anywhere_changes_nothing(
        self, event, number, uninterrupted, tiny_teacher, tiny_student, tmp_path
    ):
        """The random state of dropout, the optimiser's moments and the data order come back."""

        class Crash(BaseException):
            pass

        seen = 0

        def crash(name: str, row: dict[str, Any]) -> None:
            nonlocal seen
            seen += name == event
            if name == event and seen == number:
                raise Crash

        settings = RESUMED | {"report": crash}
        with pytest.raises(Crash):
            make(tiny_teacher, tiny_student, tmp_path, **settings).distill_domain(
                "s", prompts=PROMPTS
            )
        result = make(tiny_teacher, tiny_student, tmp_path, **RESUMED).distill_domain(
            "s", prompts=PROMPTS, resume=True
        )
        assert adapter_of(trained(result)) == uninterrupted
        assert result.metadata["resumed"] == ((event, number) in AFTER_FIRST_CHECKPOINT)
        assert not [*tmp_path.rglob(".writing-*")]

    def test_a_damaged_checkpoint_is_passed_over(
        self, uninterrupted, tiny_teacher, tiny_student, tmp_path
    ):
        def run(**how: Any) -> KDResult:
            distiller = make(tiny_teacher, tiny_student, tmp_path, **RESUMED, report=events)
            return distiller.distill_domain("s", prompts=PROMPTS, **how)

        events = Events()
        run()
        edit_json(tmp_path / "s" / "run.json", finished=False)
        damaged = tmp_path / "s" / "checkpoint_6" / "optimizer.safetensors"
        damaged.write_bytes(damaged.read_bytes()[:-1])
        events.clear()
        result = run(resume=True)
        (warning,) = events.messages("warning")
        assert "optimizer.safetensors was truncated or altered; trying an older" in warning
        assert [row["step"] for name, row in events if name == "resumed"] == [4]
        assert adapter_of(trained(result)) == uninterrupted

    def test_checkpoints_of_an_earlier_run_are_never_resumed(
        self, tiny_teacher, tiny_student, tmp_path
    ):
        """Silent failure: the old run's last checkpoint, of another alpha, is taken for the new's.

        The new run was stopped before its first step.
        """

        class Crash(BaseException):
            pass

        def crash(event: str, row: dict[str, Any]) -> None:
            if event == "phase" and "evaluating the student" in row["name"]:
                raise Crash

        make(tiny_teacher, tiny_student, tmp_path).distill_domain("s", prompts=PROMPTS)
        with pytest.raises(Crash):
            make(tiny_teacher, tiny_student, tmp_path, alpha=0.1, report=crash).distill_domain(
                "s", prompts=PROMPTS, overwrite=True
            )
        resumed = make(tiny_teacher, tiny_student, tmp_path, alpha=0.1).distill_domain(
            "s", prompts=PROMPTS, resume=True
        )
        clean = make(tiny_teacher, tiny_student, tmp_path / "clean", alpha=0.1)
        assert adapter_of(resumed) == adapter_of(
            trained(clean.distill_domain("s", prompts=PROMPTS))
        )

    @pytest.mark.parametrize("source", ["data", "prompts"])
    def test_other_data_are_other_settings(self, source, tiny_teacher, tiny_student, tmp_path):
        """Silent failure: the finished result of the old data is returned for the new."""
        old, new = (TEXTS, TEXTS[1:]) if source == "data" else (PROMPTS, PROMPTS[1:])
        distiller = make(tiny_teacher, tiny_student, tmp_path)
        distiller.distill_domain("s", **{source: old})
        with pytest.raises(ConchError, match=r"was made with other settings: data: was .*, now "):
            distiller.distill_domain("s", **{source: new}, resume=True)


RESUMED: dict[str, Any] = {"lora_dropout": 0.3, "accumulation_steps": 2, "generation_batch_size": 4}
AFTER_FIRST_CHECKPOINT = {
    ("step", 3),
    ("checkpoint", 1),
    ("checkpoint", 2),
    ("checkpoint", 3),
    ("phase", 5),
}


@pytest.fixture(scope="module")
def uninterrupted(
    tiny_teacher: Path, tiny_student: Path, tmp_path_factory: pytest.TempPathFactory
) -> bytes:
    """The adapter of a run with the settings RESUMED that was never stopped."""
    distiller = make(tiny_teacher, tiny_student, tmp_path_factory.mktemp("clean"), **RESUMED)
    return adapter_of(trained(distiller.distill_domain("s", prompts=PROMPTS)))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def data_altered(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(bytes(content))


def entries_altered(path: Path) -> None:
    """Give an example the rows of another: the header still parses, the data are untouched."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    entries = json.loads(header["__metadata__"]["entries"])
    first, last = entries[0], entries[-1]
    assert first[2] - first[1] == last[2] - last[1]
    first[1:], last[1:] = last[1:], first[1:]
    header["__metadata__"]["entries"] = json.dumps(entries)
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    assert len(text) == length
    path.write_bytes(content[:8] + text + content[8 + length :])


@pytest.mark.usefixtures("no_curve")
class TestCacheOnDisk:
    @pytest.mark.parametrize("damage", [truncated, data_altered, entries_altered])
    def test_a_damaged_shard_is_computed_again_with_a_warning(
        self, damage: Callable[[Path], None], tiny_teacher, tiny_student, tmp_path
    ):
        events = Events()
        distiller = make(tiny_teacher, tiny_student, tmp_path, report=events)
        result = distiller.distill_domain("s", prompts=PROMPTS)
        (shard,) = (tmp_path / "s" / "soft_targets").rglob("*.safetensors")
        whole = shard.read_bytes()
        damage(shard)
        events.clear()
        again = distiller.distill_domain("s", prompts=PROMPTS, overwrite=True)
        (warning,) = events.messages("warning")
        assert str(shard) in warning
        assert warning.endswith("its targets are computed again")
        assert shard.read_bytes() == whole
        assert adapter_of(trained(again)) == adapter_of(result)


@pytest.mark.usefixtures("no_curve")
class TestDomains:
    def test_no_domain_depends_on_the_others(
        self, two_domains, tiny_teacher, tiny_student, tmp_path
    ):
        """Silent failure: LoRA layers are carried from one domain into the next."""

        def run(folder: str, *domains: str) -> dict[str, bytes]:
            distiller = make(tiny_teacher, tiny_student, tmp_path / folder)
            results = distiller.distill_all(domains)["results"]
            return {name: adapter_of(trained(results[name])) for name in domains}

        together = run("together", "alpha", "beta")
        assert run("turned", "beta", "alpha") == together
        assert run("alone", "beta")["beta"] == together["beta"]
        assert together["alpha"] != together["beta"]

    def test_the_teacher_works_for_all_of_them_first(
        self, two_domains, tiny_teacher, tiny_student, tmp_path, loads
    ):
        events = Events()
        make(tiny_teacher, tiny_student, tmp_path, report=events).distill_all()
        assert loads == [str(tiny_teacher)] + 4 * [str(tiny_student)]
        names = [row["name"] for event, row in events if event == "phase"]
        order = [names.index(f"{name}: training") for name in ("alpha", "beta")]
        assert names.index("beta: the teacher's targets") < min(order)

    def test_one_that_fails_does_not_stop_the_others(
        self, two_domains, tiny_teacher, tiny_student, tmp_path, monkeypatch
    ):
        monkeypatch.setitem(DOMAIN_PROMPTS["alpha"], "system", "very " * 300)
        events = Events()
        distiller = make(tiny_teacher, tiny_student, tmp_path, report=events)
        summary = distiller.distill_all()
        assert list(summary["results"]) == ["beta"]
        reason = summary["failures"]["alpha"]
        assert reason.startswith("prompt 1 has ")
        assert events.messages("warning") == [f"domain alpha failed: {reason}"]
        written = json.loads((tmp_path / "kd_summary.json").read_text())
        assert written["failures"] == {"alpha": reason}
        assert written["results"] == {"beta": summary["results"]["beta"].to_json()}
        assert (written["teacher"], written["student"]) == (str(tiny_teacher), str(tiny_student))

    def test_one_that_fails_in_training_does_not_either(
        self, two_domains, tiny_teacher, tiny_student, tmp_path
    ):
        """Its folder stays locked by nobody, and the teacher is not needed again."""
        phases: list[str] = []

        def fail(event: str, row: dict[str, Any]) -> None:
            if event == "phase":
                phases.append(row["name"])
            if event == "step" and phases[-1] == "alpha: training":
                raise NonFiniteLossError("the loss is nan at step 1")

        broken = make(tiny_teacher, tiny_student, tmp_path, report=fail)
        outcome = broken.distill_all()
        assert outcome["failures"] == {"alpha": "the loss is nan at step 1"}
        assert list(outcome["results"]) == ["beta"]
        again = make(tiny_teacher, tiny_student, tmp_path).distill_all(resume=True)
        assert set(again["results"]) == {"alpha", "beta"}
        assert again["results"]["beta"] == outcome["results"]["beta"]

    def test_resuming_goes_on_with_what_is_left(
        self, two_domains, tiny_teacher, tiny_student, tmp_path, loads
    ):
        distiller = make(tiny_teacher, tiny_student, tmp_path)
        first = distiller.distill_all(["alpha"])["results"]["alpha"]
        loads.clear()
        results = distiller.distill_all(resume=True)["results"]
        assert results["alpha"] == first
        assert loads == [str(tiny_teacher)] + 2 * [str(tiny_student)]

    def test_unknown_ones_are_refused_before_anything_runs(
        self, tiny_teacher, tiny_student, tmp_path
    ):
        with pytest.raises(ConchError, match=r"domain 'cooking' is unknown: use one of thinking"):
            make(tiny_teacher, tiny_student, tmp_path).distill_all(["thinking", "cooking"])
        assert not [*tmp_path.iterdir()]


@pytest.mark.usefixtures("no_curve")
class TestData:
    def test_prompt_and_completion(self, tiny_teacher, tiny_student, tmp_path):
        data = [{"prompt": prompt, "completion": " ran home."} for prompt in PROMPTS]
        distiller = make(tiny_teacher, tiny_student, tmp_path)
        result = distiller.train_with_kd(data, "s")
        tokenizer = distiller.student.tokenizer
        ending = len(tokenizer.encode(" ran home.")) + 1
        tokens = result.metadata["train_tokens"] + result.metadata["heldout_tokens"]
        assert tokens == ending * len(PROMPTS)
        assert result.metadata["finish_reasons"] == {"given": len(PROMPTS)}

    def test_text(self, tiny_teacher, tiny_student, tmp_path, loads):
        distiller = make(tiny_teacher, tiny_student, tmp_path)
        result = distiller.train_with_kd(TEXTS, "s")
        tokenizer = distiller.student.tokenizer
        # The first token has no prediction, and the end of the text has one.
        wanted = sum(len(tokenizer.encode(record["text"])) for record in TEXTS)
        assert result.metadata["train_tokens"] + result.metadata["heldout_tokens"] == wanted
        assert result.num_samples == len(TEXTS)

    def test_messages_of_which_every_assistant_turn_counts(self, chat_pair, tmp_path):
        turns = [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hi"},
            {"role": "user", "content": "Who are you?"},
            {"role": "assistant", "content": "A cat"},
        ]
        data = [{"messages": [{**turns[0], "content": prompt}, *turns[1:]]} for prompt in PROMPTS]
        distiller = make(*chat_pair, tmp_path)
        result = distiller.train_with_kd(data, "s")
        encode = distiller.student.tokenizer.encode
        ends = [
            len(encode(f"assistant: {text}")) - len(encode("assistant:"))
            for text in ("Hi", "A cat")
        ]
        per_record = sum(ends) + 2
        tokens = result.metadata["train_tokens"] + result.metadata["heldout_tokens"]
        assert tokens == per_record * len(PROMPTS)

    def test_messages_need_a_chat_template(self, tiny_teacher, tiny_student, tmp_path):
        turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}] * 2
        with pytest.raises(ConchError, match=r"no chat template, .* give prompt and completion"):
            make(tiny_teacher, tiny_student, tmp_path).train_with_kd([{"messages": turns}], "s")

    def test_examples_that_are_too_long_are_left_out_on_request(
        self, tiny_teacher, tiny_student, tmp_path
    ):
        events = Events()
        data = [*TEXTS, {"text": "word " * 300}]
        distiller = make(tiny_teacher, tiny_student, tmp_path, too_long="skip", report=events)
        assert distiller.train_with_kd(data, "s").num_samples == len(TEXTS)
        (warning,) = events.messages("warning")
        assert warning == f"1 of {len(data)} examples exceed 256 tokens: left out"

    def test_prompts_count_when_asked_for(self, tiny_teacher, tiny_student, tmp_path):
        data = [{"prompt": prompt, "completion": " ran home."} for prompt in PROMPTS]
        results = [
            make(tiny_teacher, tiny_student, tmp_path / str(asked), train_on_prompt=asked)
            .train_with_kd(data, "s")
            .metadata["heldout_tokens"]
            for asked in (False, True)
        ]
        assert results[0] < results[1]

    def test_several_samples_of_a_prompt_differ_and_stay_on_one_side(
        self, tiny_teacher, tiny_student, tmp_path
    ):
        distiller = make(tiny_teacher, tiny_student, tmp_path, samples_per_prompt=2)
        records = distiller.generate_training_data(PROMPTS[:6], "s")
        assert [record["prompt"] for record in records] == [p for p in PROMPTS[:6] for _ in "12"]
        assert all(
            first["tokens"] != second["tokens"]
            for first, second in zip(records[::2], records[1::2], strict=True)
        )
        _, heldout = split_heldout(records, 0.25, seed=0)
        assert {index // 2 for index in heldout} == {index // 2 for index in heldout[::2]}
        assert len(heldout) % 2 == 0


@pytest.fixture(scope="module")
def chat_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Tiny models whose tokenizer has a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    teacher = make_model_folder(
        folder / "teacher", seed=1, chat_template=CHAT, max_position_embeddings=512
    )
    student = make_model_folder(
        folder / "student",
        seed=2,
        chat_template=CHAT,
        hidden_size=32,
        max_position_embeddings=512,
    )
    return teacher, student


def test_the_domains_system_prompt_goes_through_the_chat_template(chat_pair, tmp_path):
    distiller = make(*chat_pair, tmp_path)
    records = distiller.generate_training_data(["Why is the sky blue?"], "thinking")
    (record,) = records
    roles = [turn["role"] for turn in record["messages"]]
    assert roles == ["system", "user", "assistant"]
    system = DOMAIN_PROMPTS["thinking"]["system"]
    assert record["messages"][0]["content"] == system
    assert record["messages"][1]["content"] == "Why is the sky blue?"
    ids = record["tokens"]["ids"][: record["tokens"]["prompt_length"]]
    text = distiller.student.tokenizer.decode(ids)
    assert text == f"system: {system}\nuser: Why is the sky blue?\nassistant: "


def test_without_a_chat_template_the_system_prompt_stands_above(
    tiny_teacher, tiny_student, tmp_path, two_domains
):
    (record,) = make(tiny_teacher, tiny_student, tmp_path).generate_training_data(["Hi"], "beta")
    assert record["prompt"] == "Be kind.\n\nHi"


@pytest.mark.usefixtures("no_curve")
class TestSettings:
    @pytest.mark.parametrize("divergence", sorted(LOSSES))
    def test_every_divergence_trains(self, divergence, tiny_teacher, tiny_student, tmp_path):
        settings = {"divergence": divergence, "alpha": 1.0}
        distiller = make(tiny_teacher, tiny_student, tmp_path, **settings)
        result = trained(distiller.distill_domain("s", prompts=PROMPTS))
        path = Path(result.adapter_path) / "training_log.json"
        heldout = [row["kd"] for row in json.loads(path.read_text()) if row["split"] == "heldout"]
        assert 0 < result.final_kd_loss < heldout[0]

    def test_the_adapter_of_the_step_with_the_best_kd_loss_is_kept(
        self, tiny_teacher, tiny_student, tmp_path
    ):
        settings = {
            "select_by": "kd",
            "alpha": 0.3,
            "num_iters": 12,
            "steps_per_eval": 6,
            "steps_per_save": 6,
        }
        distiller = make(tiny_teacher, tiny_student, tmp_path, **settings)
        result = distiller.distill_domain("s", prompts=PROMPTS)
        log = json.loads((Path(result.adapter_path) / "training_log.json").read_text())
        heldout = [row for row in log if row["split"] == "heldout"]
        best = {name: min(heldout, key=lambda row, n=name: row[n]) for name in ("kd", "loss")}
        assert (best["kd"]["step"], best["loss"]["step"]) == (6, 12)
        assert result.metadata["best_step"] == 6
        assert result.final_kd_loss == best["kd"]["kd"]
        saved = mx.load(str(tmp_path / "s" / "checkpoint_6" / "adapters.safetensors"))
        assert isinstance(saved, dict)
        kept = tensors_of(result)
        assert saved.keys() == kept.keys()
        assert all(mx.array_equal(saved[name], value) for name, value in kept.items())

    @pytest.mark.parametrize(("alpha", "other"), [(0.0, "final_ce_loss"), (1.0, "final_kd_loss")])
    def test_alpha_chooses_the_loss(self, alpha, other, finished, tmp_path):
        settings = {"alpha": alpha, "learning_rate": 5e-4}
        distiller = make("embedded:teacher", "embedded:student", tmp_path, **settings)
        result = trained(distiller.train_with_kd(finished.records, "s"))
        assert result.final_combined_loss == pytest.approx(getattr(result, other), rel=1e-6)
        # The step that is kept is the best by what the run is judged by.
        path = Path(result.adapter_path) / "training_log.json"
        heldout = [row for row in json.loads(path.read_text()) if row["split"] == "heldout"]
        best = min(heldout, key=lambda row: row["ce" if alpha == 0 else "kl"])
        assert best["step"] == result.metadata["best_step"]
        figure = "cross_entropy" if alpha == 0 else "kl_nats"
        assert result.evaluation["verdict"]["figure"] == figure

    def test_dora(self, tiny_teacher, tiny_student, tmp_path):
        from mlx_lm import load

        distiller = make(tiny_teacher, tiny_student, tmp_path, dora=True)
        result = trained(distiller.distill_domain("s", prompts=PROMPTS))
        path = Path(result.adapter_path)
        config = json.loads((path / "adapter_config.json").read_text())
        assert config["fine_tune_type"] == "dora"
        tensors = tensors_of(result)
        assert {name.rsplit(".", 1)[-1] for name in tensors} == {"lora_a", "lora_b", "m"}
        model, _ = load(str(tiny_student), adapter_path=str(path))
        loaded = dict(tree_flatten(model.parameters()))
        assert all(mx.array_equal(loaded[name], value) for name, value in tensors.items())

    def test_all_linear_layers_of_the_last_one(self, tiny_teacher, tiny_student, tmp_path):
        settings = {"lora_keys": "all", "lora_layers": 1, "lora_rank": 2}
        distiller = make(tiny_teacher, tiny_student, tmp_path, **settings)
        tensors = tensors_of(distiller.distill_domain("s", prompts=PROMPTS))
        attention = [f"self_attn.{name}_proj" for name in "qkvo"]
        mlp = [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
        assert tensors.keys() == {
            f"model.layers.1.{name}.lora_{side}" for name in attention + mlp for side in "ab"
        }
        assert tensors["model.layers.1.mlp.up_proj.lora_a"].shape == (32, 2)

    def test_gradient_checkpointing_changes_no_result(self, tiny_teacher, tiny_student, tmp_path):
        results = [
            trained(
                make(
                    tiny_teacher, tiny_student, tmp_path / str(asked), grad_checkpoint=asked
                ).distill_domain("s", prompts=PROMPTS)
            )
            for asked in (False, True)
        ]
        plain, recomputed = map(tensors_of, results)
        assert plain.keys() == recomputed.keys()
        for name, value in plain.items():
            assert mx.allclose(value, recomputed[name], atol=1e-5), name

    def test_accumulated_batches_are_one_large_batch(self, tmp_path):
        """Tokens are weighted over all batches of a step: never a mean of means."""
        data = TEXTS[:5]
        results = [
            trained(
                make(
                    "embedded:teacher",
                    "embedded:student",
                    tmp_path / str(steps),
                    batch_size=4 // steps,
                    accumulation_steps=steps,
                    learning_rate=5e-4,
                ).train_with_kd(data, "s")
            )
            for steps in (1, 2, 4)
        ]
        assert {result.metadata["train_examples"] for result in results} == {4}
        whole, *parts = map(tensors_of, results)
        for tensors in parts:
            for name, value in whole.items():
                assert mx.allclose(value, tensors[name], atol=1e-5), name

    def test_a_quantised_pair(self, tmp_path):
        sizes = {"hidden_size": 64, "quantize": True}
        teacher, student = (
            make_model_folder(tmp_path / name, seed=seed, **sizes)
            for seed, name in enumerate(("teacher", "student"), 1)
        )
        result = make(teacher, student, tmp_path).distill_domain("s", prompts=PROMPTS)
        assert result.evaluation["after"] != trained(result).evaluation["before"]

    def test_the_base_model_stays_as_it_was(
        self, tiny_teacher, tiny_student, tmp_path, monkeypatch
    ):
        """Silent failure: the base is not frozen, trains along, and is not in the adapter."""
        before: dict[str, mx.array] = {}
        after: dict[str, mx.array] = {}

        class Watched(fit_student.Trainer):
            def run(self, **how: Any) -> Any:
                before.update(tree_flatten(self.model.parameters()))
                outcome = super().run(**how)
                after.update(tree_flatten(self.model.parameters()))
                return outcome

        monkeypatch.setattr(fit_student, "Trainer", Watched)
        digest = file_digest(tiny_student / "model.safetensors")
        trained(make(tiny_teacher, tiny_student, tmp_path).distill_domain("s", prompts=PROMPTS))
        changed = {name for name in before if not mx.array_equal(before[name], after[name])}
        assert {name.rsplit(".", 1)[-1] for name in changed} == {"lora_a", "lora_b"}
        assert len(changed) == 2 * 2 * 2
        assert len(before) == len(after) > len(changed)
        assert file_digest(tiny_student / "model.safetensors") == digest

    def test_a_student_that_is_its_own_teacher_has_no_gap(self, tiny_student, tmp_path):
        """Cross-entropy reported as KL would not be 0 here."""
        twin = shutil.copytree(tiny_student, tmp_path / "twin")
        distiller = make(
            tiny_student,
            twin,
            tmp_path,
            num_iters=1,
            learning_rate=1e-12,
            force=True,
            target_bits=32,
        )
        result = distiller.distill_domain("s", prompts=PROMPTS)
        assert abs(result.evaluation["before"]["kl_nats"]) < 1e-6
        assert abs(result.final_kd_loss) < 1e-6
        assert result.evaluation["before"]["top1_agreement"] == 1
        before, teacher = (
            result.evaluation[name]["cross_entropy"] for name in ("before", "teacher")
        )
        assert before == pytest.approx(teacher, abs=1e-5)


def test_given_data_are_kept_with_the_adapter_that_learned_them(
    tiny_teacher, tiny_student, tmp_path, no_curve
):
    rows = [{"prompt": f"One {n}", "completion": f" is {n} cats."} for n in range(12)]
    make(tiny_teacher, tiny_student, tmp_path).distill_domain("own", data=rows)
    kept = tmp_path / "own" / "adapters_kd" / "training_data.jsonl"
    assert [json.loads(line) for line in kept.read_text().splitlines()] == rows
    with pytest.raises(ConchError, match="cannot be split"):
        make(tiny_teacher, tiny_student, tmp_path).distill_domain(
            "own", data=rows[:1], overwrite=True
        )
    assert len(kept.read_text().splitlines()) == 12, "the adapter that lies there learned these"


@pytest.mark.parametrize(("alpha", "batches"), [(0.7, 2), (0.0, 0)])
def test_the_teacher_works_only_for_what_is_read(
    tiny_teacher, tiny_student, tmp_path, no_curve, alpha, batches
):
    """Of 9 training examples two steps of two read at most four; cross-entropy reads none."""
    run = make(tiny_teacher, tiny_student, tmp_path, alpha=alpha, num_iters=2)
    result = run.distill_domain("own", data=TEXTS)
    examples = Examples(run.teacher, run.student, run.config)
    split = examples.split(TEXTS)
    stream = ExampleBatches(split.train, run.config.batch_size, seed=run.config.seed)
    read = {id(split.train[i]) for batch in range(batches) for i in stream.indices(batch)}
    absent = examples.targets(tmp_path / "own" / "soft_targets").missing(
        [*split.train, *split.heldout]
    )
    expected = [example.digest for example in split.train if id(example) not in read]
    assert [example.digest for example in absent] == expected
    assert 0 < len(expected) <= len(split.train)
    assert result.final_kd_loss > 0, "what is held out is compared with the teacher all the same"


@pytest.mark.parametrize(
    "content",
    ["", "null", "[]", '{"finished": true}', '{"identity": [], "finished": 1}', "[" * 200_000],
)
def test_a_run_file_of_another_form_does_not_stop_a_new_run(
    tiny_teacher, tiny_student, tmp_path, no_curve, content
):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "run.json").write_text(content)
    run = make(tiny_teacher, tiny_student, tmp_path, num_iters=1)
    result = run.distill_domain("own", data=TEXTS, resume=True)
    assert Path(result.adapter_path).is_dir()


def test_a_resumed_run_keeps_the_day_on_which_it_began(
    tiny_teacher, tiny_student, tmp_path, no_curve
):
    run = make(tiny_teacher, tiny_student, tmp_path, num_iters=2, steps_per_save=1)
    run.distill_domain("own", data=TEXTS)
    file = tmp_path / "own" / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "begun": "2026-01-31"}))
    shutil.rmtree(tmp_path / "own" / "adapters_kd")
    run.distill_domain("own", data=TEXTS, resume=True)
    assert json.loads(file.read_text())["begun"] == "2026-01-31"
