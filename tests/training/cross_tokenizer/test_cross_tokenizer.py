"""Distillation from end to end between models with different tokenizers.

Tiny random models for what every alignment has to do; a trained pair, whose students learn from a
teacher that reads characters, for what it is good for.
"""

import gc
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from conch_dna.errors import ConchError
from conch_dna.language_model import LanguageModel, ModelSource
from conch_dna.training.cross_tokenizer.alignments import ALIGNMENTS
from conch_dna.training.data.records import Record, split_heldout
from conch_dna.training.runs import domain_run
from conch_dna.training.settings import KDConfig, KDResult
from conch_dna.training.true_kd import TrueKnowledgeDistiller, plan_domain
from models import keep_layers, make_model_folder, stored_rows
from tokenizers_made import byte_level_tokenizer, character_tokenizer

ANIMALS = ["cat", "dog", "bird", "fox", "frog", "pig", "bear", "duck", "cow", "hen", "goat", "boy"]
PROMPTS = [f"Once upon a time there was a little {animal} who" for animal in ANIMALS]
RECORDS: list[Record] = [
    {"prompt": prompt, "completion": f" was{' very' * number} happy and ran to the park."}
    for number, prompt in enumerate(PROMPTS)
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
    # By this figure one of the few steps is better than none.
    "select_by": "kd",
}
FIGURES = ("bits_per_byte", "chunk_kl_nats")


class Run(NamedTuple):
    """A finished run, which weights it loaded, and what it reported."""

    result: KDResult
    loaded: list[str]
    events: list[tuple[str, dict[str, Any]]]

    @property
    def log(self) -> list[dict[str, Any]]:
        path = Path(self.result.adapter_path) / "training_log.json"
        rows: list[dict[str, Any]] = json.loads(path.read_text())
        return rows


class Pair(NamedTuple):
    """Folders of a teacher and a student whose tokenizers differ."""

    teacher: Path
    student: Path


def distil(
    pair: Pair,
    output: Path,
    report: Callable[[str, dict[str, Any]], None] = lambda event, row: None,
    *,
    how: dict[str, Any] | None = None,
    **settings: Any,
) -> KDResult:
    """A whole run of the domain `s`; `how` says with what, RECORDS if it is not given."""
    config = KDConfig(**(TINY | {"output_dir": str(output)} | settings))
    distiller = TrueKnowledgeDistiller(str(pair.teacher), str(pair.student), config, report=report)
    given = how or {"data": RECORDS}
    return distiller.distill_domain("s", overwrite="resume" not in given, **given)


def adapter_of(result: KDResult) -> bytes:
    return (Path(result.adapter_path) / "adapters.safetensors").read_bytes()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Characters without bytes, so that a random teacher answers with text, teach small BPE."""
    folder = tmp_path_factory.mktemp("pair")
    letters = character_tokenizer(folder / "letters", byte_fallback=False)
    bpe = byte_level_tokenizer(folder / "bpe")
    teacher = make_model_folder(folder / "teacher", tokenizer=letters, seed=1)
    student = make_model_folder(folder / "student", tokenizer=bpe, seed=2, hidden_size=32)
    return Pair(teacher, student)


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    """Draw no curves, and spare the garbage collector the imported modules."""
    import mlx_lm  # noqa: F401

    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(domain_run, "draw_curve", lambda path, *a, **k: path.write_bytes(b"PNG"))
        yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def runs(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """A run with given records for every alignment, one after the other in one domain's folder.

    Nobody may change its folders.
    """
    output = tmp_path_factory.mktemp("runs")
    finished: dict[str, Run] = {}
    load = ModelSource.load
    for alignment in ALIGNMENTS:
        loaded: list[str] = []
        events: list[tuple[str, dict[str, Any]]] = []

        def counted(self: ModelSource, _names: list[str] = loaded, **how: Any) -> LanguageModel:
            _names.append(self.model_id)
            return load(self, **how)

        def report(event: str, row: dict[str, Any], _events: Any = events) -> None:
            _events.append((event, row))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ModelSource, "load", counted)
            result = distil(
                pair, output, report, alignment=alignment, adapter_subdir=f"adapter_{alignment}"
            )
        finished[alignment] = Run(result, loaded, events)
    return finished


every_alignment = pytest.mark.parametrize("alignment", ALIGNMENTS)


@every_alignment
def test_mlx_lm_opens_the_adapter_and_it_changes_the_logits(
    alignment: str, runs: dict[str, Run], pair: Pair
) -> None:
    from mlx_lm import load

    base, tokenizer = load(str(pair.student))
    adapted, _ = load(str(pair.student), adapter_path=runs[alignment].result.adapter_path)
    ids = mx.array([tokenizer.encode(PROMPTS[0])])
    assert runs[alignment].result.metadata["best_step"] > 0
    assert not mx.allclose(base(ids), adapted(ids), atol=1e-3)


@every_alignment
def test_every_alignment_brings_its_own_loss_down(alignment: str, runs: dict[str, Run]) -> None:
    heldout = [row for row in runs[alignment].log if row["split"] == "heldout"]
    best = min(row["kd"] for row in heldout)
    assert 0 < best < heldout[0]["kd"]
    assert best == runs[alignment].result.final_kd_loss
    parts = heldout[0]
    assert parts["kd"] == pytest.approx(parts["soft"] + parts["chunks"])
    assert (parts["soft"] > 0) == (alignment == "roots")
    assert (parts["chunks"] > 0) == (alignment == "alm")


@every_alignment
def test_the_evaluation_has_figures_that_compare_between_tokenizers(
    alignment: str, runs: dict[str, Run]
) -> None:
    result = runs[alignment].result
    path = Path(result.adapter_path) / "evaluation.json"
    evaluation = json.loads(path.read_text())
    assert evaluation == result.evaluation
    assert evaluation["alignment"] == alignment
    for moment in ("before", "after", "teacher"):
        assert all(math.isfinite(evaluation[moment][name]) for name in FIGURES)
    assert evaluation["teacher"]["chunk_kl_nats"] == 0
    assert evaluation["before"]["chunk_kl_nats"] > 0
    assert evaluation["before"] != evaluation["after"]
    # Before any training the figures are the student's alone, whatever the alignment.
    other = runs["roots"].result.evaluation
    for name in FIGURES:
        assert evaluation["before"][name] == pytest.approx(other["before"][name], rel=1e-6)
        assert evaluation["teacher"][name] == pytest.approx(other["teacher"][name], rel=1e-6)


def test_bits_per_byte_are_those_of_full_logits_over_the_answers_bytes(
    runs: dict[str, Run], pair: Pair
) -> None:
    """Both models' log-probabilities of the same text, each over its own tokens, in float64."""
    from mlx_lm import load

    _, heldout = split_heldout(RECORDS, TINY["val_fraction"], seed=0)
    result = runs["roots"].result
    after = {"adapter_path": result.adapter_path}
    for moment, folder, how in (
        ("before", pair.student, {}),
        ("after", pair.student, after),
        ("teacher", pair.teacher, {}),
    ):
        model, tokenizer = load(str(folder), **how)
        nats = bytes_ = 0.0
        for record in (RECORDS[index] for index in heldout):
            first = len(tokenizer.encode(record["prompt"]))
            ids = tokenizer.encode(record["prompt"] + record["completion"])
            ids.append(tokenizer.eos_token_id)
            logits = np.asarray(model(mx.array([ids]))[0], np.float64)
            log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            nats -= sum(log_probs[place - 1, ids[place]] for place in range(first, len(ids)))
            bytes_ += len(record["completion"].encode())
        bits = nats / math.log(2) / bytes_
        assert result.evaluation[moment]["bits_per_byte"] == pytest.approx(bits, rel=1e-5)


@every_alignment
def test_the_result_says_how_the_tokenizers_were_brought_together(
    alignment: str, runs: dict[str, Run]
) -> None:
    run = runs[alignment]
    metadata = json.loads((Path(run.result.adapter_path) / "kd_result.json").read_text())[
        "metadata"
    ]
    assert metadata["alignment"] == alignment
    shares = metadata["coverage"]
    assert shares.keys() == {"one_to_one", "in_chunks", "uncovered"}
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["uncovered"] == 0
    message = next(row["message"] for event, row in run.events if event == "message")
    assert message.startswith(f"the tokenizers differ, alignment {alignment}: ")
    assert f"{shares['one_to_one']:.1%} of the student's tokens are one token" in message


def test_each_alignment_keeps_only_what_it_needs_of_the_teacher(
    runs: dict[str, Run], pair: Pair
) -> None:
    """Each asks the teacher, loads it once, and stores likelihoods or distributions."""
    teacher, student = str(pair.teacher), str(pair.student)
    for alignment, run in runs.items():
        assert run.loaded == [teacher, student, student], alignment
    sizes = {name: run.result.metadata["cache_bytes_per_token"] for name, run in runs.items()}
    assert sizes == {"alm": 4, "roots": 64 * (7 + 5) // 8 + 2 * 4 + 8}
    folders = {
        p.parent for p in Path(runs["alm"].result.adapter_path).parent.rglob("*.safetensors")
    }
    assert sum(folder.parent.name == "soft_targets" for folder in folders) == 2


def test_alignments_are_no_names_for_the_same_thing(runs: dict[str, Run]) -> None:
    assert len({adapter_of(run.result) for run in runs.values()}) == len(ALIGNMENTS)


def test_a_second_run_computes_nothing_and_gives_the_same_bytes(
    runs: dict[str, Run], pair: Pair, tmp_path: Path
) -> None:
    phases: list[str] = []

    def report(event: str, row: dict[str, Any]) -> None:
        if event == "phase":
            phases.append(row["name"])

    first = distil(pair, tmp_path, report, alignment="auto")
    assert first.metadata["alignment"] == first.evaluation["alignment"] == "roots"
    assert adapter_of(first) == adapter_of(runs["roots"].result)
    assert "s: the teacher's targets" in phases
    phases.clear()
    again = distil(pair, tmp_path, report, alignment="auto")
    assert adapter_of(again) == adapter_of(first)
    assert phases == ["s: evaluating the student", "s: training", "s: evaluating the adapter"]


@every_alignment
def test_the_teachers_own_answers_teach_too(alignment: str, pair: Pair, tmp_path: Path) -> None:
    from mlx_lm import load

    how = {"prompts": PROMPTS}
    result = distil(pair, tmp_path, alignment=alignment, num_iters=4, how=how)
    assert result.metadata["best_step"] > 0
    assert result.metadata["alignment"] == alignment
    assert result.num_samples == len(PROMPTS)
    assert result.metadata["finish_reasons"].keys() <= {"stop", "length"}
    evaluation = result.evaluation
    for moment in ("before", "after", "teacher"):
        assert all(math.isfinite(evaluation[moment][name]) for name in FIGURES)
    # The teacher knows best what it wrote itself.
    assert evaluation["teacher"]["bits_per_byte"] > 0
    model, _ = load(str(pair.student), adapter_path=result.adapter_path)
    adapter = mx.load(str(Path(result.adapter_path) / "adapters.safetensors"))
    assert isinstance(adapter, dict)
    loaded = dict(tree_flatten(model.parameters()))
    assert all(mx.array_equal(loaded[name], value) for name, value in adapter.items())


def test_the_teachers_exact_tokens_are_what_it_is_asked_about(pair: Pair, tmp_path: Path) -> None:
    """Tokenized again, an answer with <unk> in it would be another one."""
    # Nine examples are trained on, and three held out: all targets are read.
    distil(pair, tmp_path, how={"prompts": PROMPTS}, num_iters=3, batch_size=3)
    lines = (tmp_path / "s" / "adapters_kd" / "training_data.jsonl").read_text().splitlines()
    answered = [json.loads(line)["tokens"] for line in lines]
    tokens = sum(len(each["ids"]) - each["prompt_length"] for each in answered)
    assert stored_rows(tmp_path / "s" / "soft_targets") == tokens


def test_samples_show_three_models_on_the_same_prompts(runs: dict[str, Run]) -> None:
    text = (Path(runs["roots"].result.adapter_path) / "samples.md").read_text()
    sections = text.split("\n## ")[1:]
    assert len(sections) == 3
    for section in sections:
        assert any(f"> {prompt}" in section for prompt in PROMPTS)
        assert all(f"**{name}**" in section for name in ("teacher", "student before"))


RESUMED: dict[str, Any] = {"lora_dropout": 0.3, "accumulation_steps": 2}


@pytest.fixture(scope="module")
def uninterrupted(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The adapter of a run with the settings RESUMED that was never stopped."""
    result = distil(pair, tmp_path_factory.mktemp("clean"), **RESUMED)
    assert result.metadata["best_step"] > 0
    return adapter_of(result)


@pytest.mark.parametrize(
    ("event", "number"),
    [
        ("step", 3),
        *(
            pytest.param(*place, marks=pytest.mark.slow)
            for place in (("phase", 2), ("phase", 3), ("checkpoint", 2), ("phase", 4))
        ),
    ],
)
def test_a_crash_anywhere_changes_nothing(
    event: str, number: int, uninterrupted: bytes, pair: Pair, tmp_path: Path
) -> None:
    class Crash(BaseException):
        pass

    seen = 0

    def crash(name: str, row: dict[str, Any]) -> None:
        nonlocal seen
        seen += name == event
        if name == event and seen == number:
            raise Crash

    with pytest.raises(Crash):
        distil(pair, tmp_path, crash, **RESUMED)
    how = {"data": RECORDS, "resume": True}
    result = distil(pair, tmp_path, **RESUMED, how=how)
    assert adapter_of(result) == uninterrupted
    assert result.metadata["resumed"] == (event in ("step", "checkpoint") or number == 4)


def test_another_alignment_is_another_setting(pair: Pair, tmp_path: Path) -> None:
    """Silent failure: the finished result of one alignment is returned for another."""
    distil(pair, tmp_path, alignment="roots", num_iters=1)
    with pytest.raises(ConchError, match=r"other settings: alignment: was 'roots', now 'alm'"):
        distil(pair, tmp_path, alignment="alm", num_iters=1, how={"data": RECORDS, "resume": True})


# The plan


def test_a_dry_run_counts_what_the_run_counts(pair: Pair, tmp_path: Path) -> None:
    lost = {"prompt": "Once upon a cat", "completion": "猫", "finish_reason": "length"}
    long = {"text": "They played with the red ball. " * 9}
    data = [*RECORDS, lost, long]
    settings = TINY | {"too_long": "skip", "target_bits": 32, "output_dir": str(tmp_path)}
    teacher, student = (ModelSource(str(folder)) for folder in pair)
    planned = plan_domain(teacher, student, KDConfig(**settings), "s", data=data)
    assert not (tmp_path / "s").exists()
    chosen: dict[str, Any] = {"too_long": "skip", "target_bits": 32}
    done = distil(pair, tmp_path, **chosen, how={"data": data}).metadata
    assert planned["examples"] == done["train_examples"] + done["heldout_examples"] == len(RECORDS)
    assert planned["heldout_examples"] == done["heldout_examples"]
    assert planned["alignment"] == done["alignment"] == "roots"
    assert planned["coverage"] == done["coverage"]
    assert planned["counted_tokens_exact"] is True
    assert planned["counted_tokens"] == stored_rows(tmp_path / "s" / "soft_targets")
    tokens = done["train_tokens"] + done["heldout_tokens"]
    assert planned["counted_tokens"] > tokens, "the teacher's tokens, not the student's"
    (shard,) = (tmp_path / "s" / "soft_targets").rglob("*.safetensors")
    header = 8 + int.from_bytes(shard.read_bytes()[:8], "little")
    assert planned["disk_bytes"] == shard.stat().st_size - header


def test_a_dry_run_bounds_answers_to_come(pair: Pair, tmp_path: Path) -> None:
    teacher, student = (ModelSource(str(folder)) for folder in pair)
    config = KDConfig(**TINY, output_dir=str(tmp_path))
    planned = plan_domain(teacher, student, config, "s", prompts=PROMPTS)
    assert planned["alignment"] == "roots"
    assert planned["counted_tokens_exact"] is False
    done = distil(pair, tmp_path, num_iters=1, how={"prompts": PROMPTS}).metadata
    assert planned["examples"] == done["train_examples"] + done["heldout_examples"]
    assert planned["heldout_examples"] == done["heldout_examples"]
    assert planned["counted_tokens"] >= stored_rows(tmp_path / "s" / "soft_targets")


# Models of other kinds


def test_one_tokenizer_needs_no_alignment(
    tiny_teacher: Path, tiny_student: Path, tmp_path: Path
) -> None:
    """A named one comes to the same bytes as none."""
    same = Pair(tiny_teacher, tiny_student)
    auto, named = (
        distil(same, tmp_path / name, alignment=name, num_iters=3) for name in ("auto", "alm")
    )
    assert auto.metadata["alignment"] == named.metadata["alignment"] == "index"
    assert adapter_of(auto) == adapter_of(named)


def make_capped_folder(folder: Path, tokenizer: Path) -> Path:
    """Write a random Gemma 2, which caps its logits behind the head."""
    from mlx_lm.models.gemma2 import Model, ModelArgs

    make_model_folder(folder, tokenizer=tokenizer)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "gemma2", "num_hidden_layers": 2, "head_dim": 16}
    config |= {"final_logit_softcapping": 0.5, "attn_logit_softcapping": 50.0}
    # With fewer, mlx_lm 0.32 cannot answer several prompts at once.
    config |= {"num_key_value_heads": 4}
    mx.random.seed(3)
    model = Model(ModelArgs.from_dict(config))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("capped", ["teacher", "student"])
def test_a_model_that_caps_its_logits(capped: str, pair: Pair, tmp_path: Path) -> None:
    """What comes after its head counts, on either side."""
    other = make_capped_folder(tmp_path / "capped", getattr(pair, capped))
    head = ModelSource(str(other)).load().output_head
    assert head is not None and not head.is_last
    models = pair._replace(**{capped: other})
    result = distil(models, tmp_path / "out", num_iters=4)
    assert result.metadata["best_step"] > 0
    # The loss and the evaluation come to the capped logits by ways of their own.
    rows = json.loads((Path(result.adapter_path) / "training_log.json").read_text())
    (first,) = [row for row in rows if row["split"] == "heldout" and row["step"] == 0]
    assert first["ce"] == pytest.approx(result.evaluation["before"]["cross_entropy"], rel=1e-5)
    assert all(math.isfinite(result.evaluation["after"][name]) for name in FIGURES)


@pytest.mark.parametrize("tied", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_student_whose_head_is_trained(tied: bool, pair: Pair, tmp_path: Path) -> None:
    key = "model.embed_tokens" if tied else "lm_head"
    student = make_model_folder(
        tmp_path / "student", tokenizer=pair.student, seed=2, tie_word_embeddings=tied
    )
    models = pair._replace(student=student)
    result = distil(models, tmp_path / "out", num_iters=4, lora_keys=f"all,{key}")
    assert result.metadata["best_step"] > 0
    adapter = mx.load(str(Path(result.adapter_path) / "adapters.safetensors"))
    assert isinstance(adapter, dict)
    assert mx.any(adapter[f"{key}.lora_b"] != 0)


# Learning


def short_stories(shared_data: Path, count: int) -> list[Record]:
    """Beginnings of stories of at most 240 bytes, three words of each as the prompt."""
    found: list[Record] = []
    with open(shared_data / "text" / "tinystories" / "train.jsonl", encoding="utf-8") as lines:
        while len(found) < count:
            text = " ".join(json.loads(next(lines))["text"].split())[:240].rsplit(" ", 1)[0]
            if 150 < len(text.encode()) <= 240:
                words = text.split(" ")
                prompt, rest = " ".join(words[:3]), " " + " ".join(words[3:])
                found.append({"prompt": prompt, "completion": rest, "finish_reason": "length"})
    return found


@pytest.mark.slow
def test_a_teacher_that_reads_characters_teaches_a_student_that_reads_bpe(
    shared_data: Path, tmp_path: Path
) -> None:
    """A few steps of a trained pair that nobody here made."""
    models = shared_data / "models"
    student = keep_layers(models / "stories260K", tmp_path / "student", [0, 2, 4])
    result = distil(
        Pair(models / "babyllama361", student),
        tmp_path / "out",
        how={"data": short_stories(shared_data, 46)},
        num_iters=30,
        batch_size=4,
        temperature=1.0,
        lora_keys="all",
        val_fraction=0.13,
        steps_per_eval=30,
        steps_per_save=30,
    )
    before, after, teacher = (result.evaluation[k] for k in ("before", "after", "teacher"))
    assert result.metadata["alignment"] == "roots"
    assert result.metadata["coverage"]["uncovered"] < 0.02
    assert result.metadata["best_step"] == 30
    assert teacher["bits_per_byte"] < before["bits_per_byte"]
    assert after["bits_per_byte"] < 0.8 * before["bits_per_byte"]
    assert after["chunk_kl_nats"] < 0.8 * before["chunk_kl_nats"]
    assert after["kl_nats"] < before["kl_nats"]
