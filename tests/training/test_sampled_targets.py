"""Targets drawn from the teacher: right on average, the same in every batch, and a whole run."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import oracle
from conch_dna.errors import ConchError
from conch_dna.language_model import ModelSource
from conch_dna.training.data.outcomes import compute_targets, drawn, shares_drawn, target_identity
from conch_dna.training.data.sampled_targets import drawn_identity
from conch_dna.training.head_loss import forward_kl_and_gradient
from conch_dna.training.settings import KDConfig
from conch_dna.training.trainer import Trainer
from conch_dna.training.true_kd import TrueKnowledgeDistiller
from models import ANIMALS, QUICK, make_model_folder, random_examples, stored_rows
from watching import stopped

RECORDS = [
    {"prompt": f"The {animal}", "completion": f" saw a red {thing} and ran."}
    for animal in ANIMALS
    for thing in ("ball", "bug")
]
SETTINGS: dict[str, Any] = {**QUICK, "targets": "sampled", "target_draws": 6, "select_by": "kl"}


def test_the_loss_and_its_gradient_are_right_on_average() -> None:
    """Of 40,000 draws of 4 tokens; 5 standard errors of what they spread."""
    random = np.random.default_rng(0)
    count, tokens, t = 40_000, 12, 2.0
    teacher = random.normal(0, 2, tokens)
    student = random.normal(0, 2, tokens)
    uniform = random.random((count, 4))
    rows = mx.array(np.tile(teacher, (count, 1)).astype(np.float32))
    labels = mx.zeros(count, mx.int32)
    found = drawn(rows, labels, uniform, temperature=t)
    ids, log_shares = shares_drawn(found["drawn_ids"])
    targets = {
        "kept_ids": mx.array(ids.astype(np.int32)),
        "teacher_log_probs": mx.array(log_shares),
        "labels": labels,
        "weights": mx.ones(count),
    }
    logits = mx.array(np.tile(student, (count, 1)).astype(np.float32))
    _, gradient = forward_kl_and_gradient(logits, targets, temperature=t, alpha=1.0)
    p, q = oracle.softmax(teacher[None], t)[0], oracle.softmax(student[None], t)[0]
    each = np.asarray(gradient, np.float64)
    errors = each.std(0) / np.sqrt(count)
    assert (np.abs(each.mean(0) - t * (q - p)) < 5 * errors).all()
    shares = np.exp(log_shares[:, :-1].astype(np.float64))
    cross_entropy = -(shares * np.log(q)[ids]).sum(1)
    error = cross_entropy.std() / np.sqrt(count)
    assert abs(cross_entropy.mean() + (p * np.log(q)).sum()) < 5 * error
    expected = oracle.log_softmax(teacher[None])[0, 0]
    np.testing.assert_allclose(found["gold_log_prob"], expected, rtol=1e-5)


def test_what_was_drawn_several_times_is_one_outcome() -> None:
    ids, log_shares = shares_drawn(np.array([[3, 3, 3, 900], [0, 1, 2, 3], [7, 7, 7, 7]]))
    assert all(len(set(row)) == 4 for row in ids.tolist())
    shares = np.exp(log_shares)
    assert {i: s for i, s in zip(ids[0], shares[0], strict=False) if s} == {3: 0.75, 900: 0.25}
    np.testing.assert_array_equal(shares[1], [0.25] * 4 + [0])
    assert ids[2, 0] == 7 and shares[2].tolist() == [1, 0, 0, 0, 0]
    assert (ids[2, 1:] < 8).all()


def test_an_example_draws_the_same_in_every_batch(tiny_teacher: Path) -> None:
    source = ModelSource(str(tiny_teacher))
    kept = target_identity(source, top_k=8, temperature=2.0)
    config = KDConfig(targets="sampled", target_draws=5)
    identity = drawn_identity(kept, config, by_index=True)
    assert identity.digest != kept.digest and identity.temperatures == (2.0,)
    examples = random_examples(5, source.token_count)
    results = [
        compute_targets(
            source.resident(), chosen, identity, batch_size=size, report=lambda event, row: None
        )
        for chosen, size in ((examples, 1), (examples[::-1], 3))
    ]
    for one, other in zip(results[0], results[1][::-1], strict=True):
        assert one.keys() == {"drawn_ids", "gold_log_prob"}
        # The teacher's own rounding may move the end of a token's share past a number.
        assert (one["drawn_ids"] == other["drawn_ids"]).mean() > 0.98
    assert not np.array_equal(results[0][0]["drawn_ids"][:8], results[0][1]["drawn_ids"][:8])


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("pair")
    names = [str(make_model_folder(folder / str(seed), seed=seed)) for seed in range(2)]
    return names[0], names[1]


def distil(pair: tuple[str, str], output: Path, **changes: Any) -> Any:
    config = KDConfig(**{**SETTINGS, "output_dir": str(output), **changes})
    resume = (output / "s").exists()
    return TrueKnowledgeDistiller(*pair, config).distill_domain("s", data=RECORDS, resume=resume)


def test_a_run_learns_from_what_was_drawn(pair: tuple[str, str], tmp_path: Path) -> None:
    result = distil(pair, tmp_path / "sampled", num_iters=20)
    other = distil(pair, tmp_path / "topk", num_iters=20, targets="topk")
    figures, expected = (each.evaluation for each in (result, other))
    # Measured by the same figure: what is held out has the likeliest tokens and the rest.
    assert figures["before"] == expected["before"]
    assert figures["after"]["kl_nats"] < 0.97 * figures["before"]["kl_nats"]
    folders = [*(tmp_path / "sampled" / "s" / "soft_targets").iterdir()]
    counts = sorted(map(stored_rows, folders))
    assert len(folders) == 2 and counts[0] < counts[1]
    assert sum(counts) == stored_rows(tmp_path / "topk" / "s" / "soft_targets")


def test_what_is_held_out_is_measured_alike_even_if_it_is_trained_on(
    pair: tuple[str, str], tmp_path: Path
) -> None:
    figures = []
    for targets in ("sampled", "topk"):
        config = KDConfig(**{**SETTINGS, "targets": targets, "output_dir": str(tmp_path / targets)})
        distiller = TrueKnowledgeDistiller(*pair, config)
        distiller.distill_domain("s", data=RECORDS, valid_data=RECORDS[:8])
        rows = json.loads((tmp_path / targets / "s/adapters_kd/training_log.json").read_text())
        assert rows[0]["split"] == "heldout" and rows[0]["step"] == 0
        figures.append({name: rows[0][name] for name in ("kd", "kl", "ce")})
    assert figures[0] == figures[1]


def test_a_stopped_run_ends_alike(pair: tuple[str, str], tmp_path: Path) -> None:
    whole = distil(pair, tmp_path / "whole")
    with stopped(Trainer, "_take_step", call=4):
        distil(pair, tmp_path / "parts")
    parts = distil(pair, tmp_path / "parts")
    contents = [
        (Path(each.adapter_path) / "adapters.safetensors").read_bytes() for each in (whole, parts)
    ]
    assert contents[0] == contents[1]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"divergence": "jsd"}, "only the forward KL can be told"),
        ({"target_draws": 1024}, "more than half of .* tokens: lower --target-draws"),
    ],
)
def test_what_cannot_be_is_refused(
    pair: tuple[str, str], tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConchError, match=reason):
        distil(pair, tmp_path, **changes)


def test_a_student_without_all_tokens_is_refused(pair: tuple[str, str], tmp_path: Path) -> None:
    rows = ModelSource(pair[0]).token_count - 20
    narrow = str(make_model_folder(tmp_path / "narrow", vocab_size=rows))
    with pytest.raises(ConchError, match=r"not all of the teacher's tokens.*--targets topk"):
        distil((pair[0], narrow), tmp_path / "out")
