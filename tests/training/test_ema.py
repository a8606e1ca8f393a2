"""The average of parameters against its recurrence in float64, and its place in the one loop."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from conch_dna.errors import ConchError, Interrupted
from conch_dna.language_model import named_arrays
from conch_dna.training.optimizer.ema import EMA
from conch_dna.training.trainer import Trainer, TrainerSettings


class Point(nn.Module):
    def __init__(self, dtype: mx.Dtype = mx.float32) -> None:
        super().__init__()
        self.place = mx.zeros(2, dtype)
        self.frozen = mx.ones(3)
        self.freeze(keys=["frozen"], recurse=False)


def test_the_average_is_its_recurrence_with_a_growing_decay() -> None:
    model = Point()
    ema = EMA(model, decay=0.5)
    expected = np.zeros(2)
    random = np.random.default_rng(0)
    for n in range(1, 15):
        place = random.normal(size=2)
        model.place = mx.array(place.astype(np.float32))
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * place
        assert ema.update() == decay
        np.testing.assert_allclose(np.asarray(ema.shadow["place"]), expected, rtol=1e-5)
    assert decay == 0.5, "the warm-up is over"


def test_a_short_run_is_not_its_own_starting_point() -> None:
    """Without the warm-up, 0.999 leaves 98% of the start after 20 steps."""
    model = Point()
    ema = EMA(model, decay=0.999)
    model.place = mx.ones(2)
    for _ in range(20):
        ema.update()
    assert ema.shadow["place"][0].item() > 0.9


def test_only_trainable_parameters_are_averaged() -> None:
    assert list(EMA(Point()).shadow) == ["place"]


def test_the_shadow_goes_in_and_out_without_a_trace() -> None:
    model = Point(mx.bfloat16)
    ema = EMA(model)
    model.place = mx.array([1.0, 2.0], mx.bfloat16)
    ema.update()
    ema.apply_shadow()
    assert model.place.dtype == mx.bfloat16
    np.testing.assert_allclose(
        np.asarray(model.place.astype(mx.float32)), np.asarray(ema.shadow["place"]), rtol=1e-2
    )
    ema.restore()
    assert model.place.tolist() == [1.0, 2.0]


def test_what_would_lose_the_parameters_is_refused() -> None:
    ema = EMA(Point())
    with pytest.raises(RuntimeError, match="apply_shadow was not called"):
        ema.restore()
    ema.apply_shadow()
    with pytest.raises(RuntimeError, match="in the model already"):
        ema.apply_shadow()
    with pytest.raises(RuntimeError, match="call restore before update"):
        ema.update()


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_a_decay_that_is_none_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=f"decay is {decay:g}; it is at least 0 and below 1"):
        EMA(Point(), decay)


def test_a_model_that_is_frozen_has_no_average() -> None:
    model = Point()
    model.freeze()
    with pytest.raises(ValueError, match="no trainable parameters"):
        EMA(model)


def test_averages_of_another_model_are_refused() -> None:
    with pytest.raises(ValueError, match="of other parameters"):
        EMA(Point()).load({"place": mx.zeros(3)}, 4)


# In the trainer


def trainer_of(folder: Path, toy: Any, **settings: Any) -> tuple[Trainer, list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []

    def report(event: str, row: dict[str, Any]) -> None:
        rows.append({"event": event, **row})

    plain = {"num_iters": 12, "learning_rate": 0.1, "weight_decay": 0.0, "max_grad_norm": 1e9}
    given = TrainerSettings(**{**plain, "steps_per_eval": 3, "steps_per_save": 4, **settings})
    return Trainer(*toy, given, folder, report=report), rows


def pulled(*counts: int) -> tuple[Any, ...]:
    """A point pulled towards (1, 1), by batches of so many counted tokens."""
    from conch_dna.training.batches import Batch

    def loss(model: nn.Module, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
        return {"loss": ((model.place - 1) ** 2).sum() * arrays["count"]}

    def batch(count: int) -> Batch:
        return Batch({"count": np.array(count, np.float32)}, count, ("one",))

    class Stream:
        digest = "pulls"

        def batch(self, index: int) -> Batch:
            return batch(counts[index % len(counts)])

    return Point(), loss, Stream(), [batch(1)]


def test_the_average_is_what_is_evaluated_and_kept(tmp_path: Path) -> None:
    plain, _ = trainer_of(tmp_path / "plain", pulled(1))
    averaged, _ = trainer_of(tmp_path / "averaged", pulled(1), ema_decay=0.9)
    results = [trainer.run() for trainer in (plain, averaged)]
    assert results[0].best_loss < results[1].best_loss, "the average lags behind"
    assert averaged.ema is not None
    found = named_arrays(averaged.model.trainable_parameters())
    np.testing.assert_array_equal(
        np.asarray(found["place"]), np.asarray(averaged.ema.shadow["place"])
    )
    distance = float(((np.asarray(found["place"], np.float64) - 1) ** 2).sum())
    assert distance == pytest.approx(results[1].best_loss, rel=1e-5)


def test_training_itself_goes_on_with_the_parameters_not_their_average(tmp_path: Path) -> None:
    plain, rows = trainer_of(tmp_path / "plain", pulled(1))
    averaged, other = trainer_of(tmp_path / "averaged", pulled(1), ema_decay=0.9)
    for trainer in (plain, averaged):
        trainer.run()
    steps = [[row["loss"] for row in found if row["event"] == "step"] for found in (rows, other)]
    assert steps[0] == steps[1]


def test_an_average_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    whole, _ = trainer_of(tmp_path / "whole", pulled(1, 0), ema_decay=0.9)
    whole.run()
    halves, _ = trainer_of(tmp_path / "halves", pulled(1, 0), ema_decay=0.9)
    real = halves._save

    def stop() -> None:
        halves._stop = True
        real()

    halves._save = stop  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        halves.run()
    again, _ = trainer_of(tmp_path / "halves", pulled(1, 0), ema_decay=0.9)
    again.run(resume=True)
    assert whole.ema is not None and again.ema is not None
    assert again.ema.updates == whole.ema.updates == 6
    assert again.skipped_steps == whole.skipped_steps == 6
    for name, value in whole.ema.shadow.items():
        assert mx.array_equal(value, again.ema.shadow[name]).item()


def test_another_decay_does_not_resume(tmp_path: Path) -> None:
    trainer_of(tmp_path, pulled(1), ema_decay=0.9)[0].run()
    with pytest.raises(ConchError, match="ema_decay"):
        trainer_of(tmp_path, pulled(1), ema_decay=0.5)[0].run(resume=True)


def test_a_step_without_a_counted_token_moves_nothing(tmp_path: Path) -> None:
    """AdamW alone would go on by its momentum and shrink the weights."""
    trainer, rows = trainer_of(
        tmp_path, pulled(1, 0, 0), weight_decay=0.5, steps_per_eval=1, num_iters=6
    )
    result = trainer.run()
    assert result.skipped_steps == 4
    losses = [row["loss"] for row in rows if row["event"] == "heldout"]
    assert losses[1] == losses[2] == losses[3] != losses[4]
    assert [row["step"] for row in rows if row["event"] == "skipped"] == [2, 3, 5, 6]


def test_a_run_of_skipped_steps_only_ends_where_it_began(tmp_path: Path) -> None:
    trainer, _ = trainer_of(tmp_path, pulled(0), ema_decay=0.9)
    result = trainer.run()
    assert (result.skipped_steps, result.best_step, result.last_train) == (12, 0, {})
    assert np.asarray(named_arrays(trainer.model.trainable_parameters())["place"]).tolist() == [
        0,
        0,
    ]
