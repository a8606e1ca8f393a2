"""The one training loop: accumulate, clip, step, validate, checkpoint, resume.

Knows nothing of teachers, text or tokenizers: it gets a model, a loss that returns sums over
counted tokens, and a seeded stream of batches. To train something new, pass another loss.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from conch_dna.checkpoints import (
    differences,
    numbered_folders,
    read_folder,
    remove_folder,
    remove_unfinished,
    require_keys,
    write_folder,
)
from conch_dna.errors import (
    ConchError,
    EgoUnavailableError,
    Interrupted,
    NonFiniteLossError,
    NotWholeError,
)
from conch_dna.language_model import named_arrays, nan_array
from conch_dna.screen.progress import Report, first_interrupt, silent
from conch_dna.training.batches import Batch
from conch_dna.training.machines.ranks.group import RankLostError
from conch_dna.training.optimizer.ema import EMA
from conch_dna.training.optimizer.steps import (
    BatchStream,
    Loss,
    Steps,
    arrays_of,
    learning_rate_schedule,
)
from conch_dna.training.settings import (
    CHECKPOINT_PREFIX,
    MAY_CHANGE,
    TrainerSettings,
    TrainingResult,
)

ADAPTER_FILE = "adapters.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
RANDOM_FILE = "random.safetensors"
BEST_FILE = "best.safetensors"
EMA_FILE = "ema.safetensors"
STATE_FILE = "state.json"

# A held-out sum that is divided by another number than that of the counted tokens has beside it
# the sum of what divides it, under its own name and this.
COUNT = "_count"


def _state_of(documents: dict[str, Any], path: Path) -> dict[str, Any]:
    """What a checkpoint says of the loop.

    Raises:
        NotWholeError: It says nothing, or something of another form.
    """
    kinds: dict[str, Any] = dict.fromkeys(("step", "best_step", "skipped_steps"), int)
    kinds |= {"best_loss": int | float, "history": list, "unreported": dict, "identity": dict}
    kinds["extensions"] = list
    state: dict[str, Any] = documents.get(STATE_FILE, {})
    if isinstance(state, dict):
        state = {"extensions": [], **state}
    require_keys(state, path / STATE_FILE, needs=kinds)
    return state


class Trainer:
    """Trains a model's trainable parameters and leaves the best of them in it.

    Args:
        model: Its trainable parameters are trained; freeze the others beforehand.
        loss: See `Loss`.
        train_batches: See `BatchStream`.
        heldout_batches: Evaluated at step 0, every `steps_per_eval` steps and at the end.
        heldout_loss: What these are evaluated by; None for the loss itself.
        settings: See `TrainerSettings`.
        folder: Where `checkpoint_<step>` folders go.
        select_by: The held-out figure whose lowest value chooses the parameters that are kept.
        steps: How a step is computed; here, where nothing else is said.
        report: See `progress.Report`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        train_batches: BatchStream,
        heldout_batches: Sequence[Batch],
        settings: TrainerSettings,
        folder: Path,
        *,
        heldout_loss: Loss | None = None,
        select_by: str = "loss",
        steps: Steps | None = None,
        report: Report = silent,
    ) -> None:
        if not heldout_batches:
            raise ConchError("no held-out batches: the best step could not be chosen; give more")
        self.model = model
        self.heldout_loss = heldout_loss or loss
        self.train_batches = train_batches
        self.heldout_batches = heldout_batches
        self.settings = settings
        self.folder = folder
        self.select_by = select_by
        self.report = report
        self.steps = steps or Steps(model, loss, settings)
        self.optimizer = self.steps.optimizer
        self.step = 0
        self.best_step = 0
        self.best_loss = math.inf
        self.best_parameters: dict[str, mx.array] = {}
        self.history: list[dict[str, Any]] = []
        self.ema = EMA(model, settings.ema_decay) if settings.ema_decay else None
        self.skipped_steps = 0
        self.extensions: list[dict[str, Any]] = []
        self._unreported: dict[str, Any] = {"sums": {}, "tokens": 0, "seconds": 0.0}
        self._stop = False
        self._compiled_loss = self._compile_evaluation()

    def _compile_evaluation(self) -> Callable[..., dict[str, mx.array]]:
        @partial(mx.compile, inputs=[self.model.state])
        def evaluate(arrays: dict[str, mx.array]) -> dict[str, mx.array]:
            return self.heldout_loss(self.model, arrays)

        return evaluate

    def run(self, *, resume: bool = False) -> TrainingResult:
        """Train to the last step; the best parameters end up in the model.

        Args:
            resume: Go on from the newest whole checkpoint in the folder, if there is one. Another
                `num_iters` than it was made with makes the run longer or shorter.

        Raises:
            NonFiniteLossError: The loss or gradient became NaN or infinite.
            Interrupted: Ctrl-C; the state was saved first.
            ConchError: The checkpoint was made with other settings or data, or with as many steps.
        """
        started = time.perf_counter()
        remove_unfinished(self.folder)
        mx.random.seed(self.settings.seed)
        self.optimizer.init(self.model.trainable_parameters())
        if not (resume and self._restore()):
            self._remove_checkpoints(keep=0)
            self._evaluate()
        first = self.step
        self.steps.begin()
        with first_interrupt(self._request_stop):
            self._train()
        self._end()
        final = self.history[-1]
        if self.ema or self.best_step != self.settings.num_iters:
            self.model.update(tree_unflatten(list(self.best_parameters.items())))
        mx.eval(self.model.parameters())
        self.model.eval()
        return TrainingResult(
            best_step=self.best_step,
            best_loss=self.best_loss,
            final={name: value for name, value in final.items() if isinstance(value, float)},
            last_train=next((row for row in self.history[::-1] if row["split"] == "train"), {}),
            history=self.history,
            seconds=time.perf_counter() - started,
            steps_run=self.step - first,
            skipped_steps=self.skipped_steps,
            extensions=self.extensions,
        )

    def _train(self) -> None:
        settings = self.settings
        while self.step < settings.num_iters:
            began = time.perf_counter()
            try:
                sums, count, norm = self._take_step()
            except (RankLostError, EgoUnavailableError) as error:
                # Nothing has moved.
                self._save()
                raise type(error)(
                    f"{error}. The state after step {self.step} is in {self.folder}"
                ) from error
            except Interrupted:
                # Asked to stop while the step's batches were made: nothing has moved.
                self._save()
                raise self._stopped() from None
            self.step += 1
            since = self._unreported
            since["seconds"] += time.perf_counter() - began
            since["tokens"] += count
            since["gradient_norm"] = norm
            for name, value in sums.items():
                since["sums"][name] = since["sums"].get(name, 0.0) + value
            if count:
                self.report("step", {"step": self.step, "loss": sums["loss"] / count})
            last = self.step == settings.num_iters
            if self.step % settings.steps_per_report == 0:
                self._report_training()
            if self.step % settings.steps_per_eval == 0:
                self._evaluate()
            if self.step % settings.steps_per_save == 0 or last or self._stop:
                self._save()
            if self._stop and not last:
                raise self._stopped()

    def _stopped(self) -> Interrupted:
        return Interrupted(
            f"stopped after step {self.step}; its state is in {self.folder}. Add --resume to go on"
        )

    def _end(self) -> None:
        """Report and evaluate the last step, where that was not its turn.

        It is not part of the last checkpoint, so that a longer run goes on from what it would have
        been at this step.
        """
        self._report_training()
        held_out = [row for row in self.history if row["split"] == "heldout"]
        if held_out[-1]["step"] != self.step:
            self._evaluate()

    def _report_training(self) -> None:
        since = self._unreported
        if not since["tokens"]:
            return
        self._record(
            "train",
            _means(since["sums"], since["tokens"]),
            learning_rate=self.optimizer.learning_rate.item(),
            gradient_norm=since["gradient_norm"],
            tokens_per_second=since["tokens"] / since["seconds"],
            peak_memory_bytes=mx.get_peak_memory(),
        )
        self._unreported = {"sums": {}, "tokens": 0, "seconds": 0.0}

    def _take_step(self) -> tuple[dict[str, float], int, float]:
        accumulation = self.settings.accumulation_steps
        start = self.step * accumulation
        batches = [
            self.steps.batches(self.train_batches, start + micro) for micro in range(accumulation)
        ]
        parts = [part for batch in batches for part in batch]
        count = sum(part.count for part in parts)
        if not count:
            # An optimiser would still move by its momentum and decay.
            self.skipped_steps += 1
            self.report("skipped", {"step": self.step + 1})
            return {}, 0, 0.0
        found, norm = self.steps.take(batches, count)
        totals: dict[str, float] = {}
        for sums in found:
            for name, value in sums.items():
                totals[name] = totals.get(name, 0.0) + value
        if "ce" in totals:
            # Not every token of a student's own answers counts in it.
            counted = (np.sum(part.arrays.get("ce_weights", part.count)) for part in parts)
            totals[f"ce{COUNT}"] = float(sum(counted))
        if not (math.isfinite(totals["loss"]) and math.isfinite(norm)):
            saved = numbered_folders(self.folder, CHECKPOINT_PREFIX)
            raise NonFiniteLossError(
                f"the loss is {totals['loss'] / count} and the gradient norm {norm} at step "
                f"{self.step + 1} on {', '.join(n for part in parts for n in part.names)}; the "
                f"last good checkpoint is {saved[-1][1] if saved else 'none yet'}. {self._remedy()}"
            )
        if self.ema:
            self.ema.update()
        return totals, count, norm

    def _remedy(self) -> str:
        """What to do about figures that are not finite; before the first step no rate is to blame.

        `_take_step` counts a step when it is over.
        """
        if self.step > 0:
            return "Lower the learning rate, or look at these examples"
        if name := nan_array(self.model.parameters()):
            return (
                f"No step was taken yet: weight {name} of the model is NaN; use one that is whole"
            )
        return (
            "No step was taken yet, so it is not the learning rate: look at these examples, or use "
            "a model of another kind or precision"
        )

    def _evaluate(self) -> None:
        """Held-out figures per token; remembers the parameters when they are the best so far."""
        if self.ema:
            self.ema.apply_shadow()
            try:
                self._evaluate_parameters()
            finally:
                self.ema.restore()
        else:
            self._evaluate_parameters()

    def _evaluate_parameters(self) -> None:
        self.model.eval()
        totals: dict[str, float] = {}
        for number, batch in enumerate(self.heldout_batches, 1):
            text = f"held-out batch {number} of {len(self.heldout_batches)}"
            self.report("within", {"text": text})
            sums = self._compiled_loss(arrays_of(batch))
            mx.eval(sums)
            for name, value in sums.items():
                totals[name] = totals.get(name, 0.0) + float(value)
        tokens = sum(batch.count for batch in self.heldout_batches)
        means = _means(totals, tokens)
        if not all(map(math.isfinite, means.values())):
            raise NonFiniteLossError(
                f"the held-out figures at step {self.step} are {means}. {self._remedy()}"
            )
        if means[self.select_by] < self.best_loss:
            self.best_loss, self.best_step = means[self.select_by], self.step
            self.best_parameters = named_arrays(self.model.trainable_parameters())
        self._record("heldout", means, best_step=self.best_step)

    def _record(self, split: str, means: dict[str, float], **more: float | int) -> None:
        row = {"step": self.step, "split": split, **means, **more}
        self.history.append(row)
        self.report(split, row)

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be resumed."""
        return {
            **asdict(self.settings),
            "data": self.train_batches.digest,
            "select_by": self.select_by,
            "parameters": {
                name: list(value.shape)
                for name, value in named_arrays(self.model.trainable_parameters()).items()
            },
        }

    def _save(self) -> None:
        state = {
            "step": self.step,
            "next_batch": self.step * self.settings.accumulation_steps,
            "best_step": self.best_step,
            "best_loss": self.best_loss,
            "history": self.history,
            "unreported": self._unreported,
            "skipped_steps": self.skipped_steps,
            "extensions": self.extensions,
            "identity": self._identity(),
        }
        path = self.folder / f"{CHECKPOINT_PREFIX}{self.step}"
        random_state: Any = mx.random.state
        write_folder(
            path,
            arrays={
                ADAPTER_FILE: named_arrays(self.model.trainable_parameters()),
                OPTIMIZER_FILE: named_arrays(self.optimizer.state),
                RANDOM_FILE: {"state": random_state[0]},
                BEST_FILE: self.best_parameters,
                **({EMA_FILE: self.ema.shadow} if self.ema else {}),
            },
            documents={STATE_FILE: state},
        )
        self.report("checkpoint", {"step": self.step, "path": str(path)})
        self._remove_checkpoints(keep=self.settings.keep_checkpoints)

    def _remove_checkpoints(self, keep: int) -> None:
        folders = numbered_folders(self.folder, CHECKPOINT_PREFIX)
        # Newer ones than this step were damaged: they do not count as kept.
        saved = [path for step, path in folders if step <= self.step or not keep]
        for path in saved[: max(0, len(saved) - keep)]:
            remove_folder(path)

    def _restore(self) -> bool:
        for step, path in reversed(numbered_folders(self.folder, CHECKPOINT_PREFIX)):
            try:
                arrays, documents = read_folder(path)
                state = _state_of(documents, path)
            except NotWholeError as error:
                self.report("warning", {"message": f"{error}; trying an older checkpoint"})
                continue
            before, now = ({**given} for given in (state["identity"], self._identity()))
            planned, _ = ([one.pop(name, 0) for name in MAY_CHANGE] for one in (before, now))
            if changed := differences(before, now):
                raise ConchError(
                    f"{path} was made with other settings ({'; '.join(changed)}): resume with "
                    "the same ones, or choose another --output-dir"
                )
            self.extensions = [*state["extensions"], *self._extension(step, planned[0])]
            self.steps.restore(arrays[ADAPTER_FILE], arrays[OPTIMIZER_FILE])
            high, low = np.asarray(arrays[RANDOM_FILE]["state"])
            mx.random.seed(int(high) << 32 | int(low))
            self.best_parameters = arrays[BEST_FILE]
            self.step, self.best_step = step, state["best_step"]
            self.best_loss, self.history = state["best_loss"], state["history"]
            self._unreported = state["unreported"]
            self.skipped_steps = state["skipped_steps"]
            if self.ema:
                self.ema.load(arrays[EMA_FILE], step - self.skipped_steps)
            self.report("resumed", {"step": step, "path": str(path)})
            for extension in self.extensions[len(state["extensions"]) :]:
                self.report("message", {"message": extension["told"]})
            # Killed between writing the newest and removing the oldest, a run has one too many.
            self._remove_checkpoints(keep=self.settings.keep_checkpoints)
            return True
        return False

    def _extension(self, step: int, planned: int) -> list[dict[str, Any]]:
        """What is to be known of a run that was planned with another number of steps, if it was."""
        steps, constant = self.settings.num_iters, self.settings.schedule == "constant"
        if planned == steps:
            return []
        if steps <= step:
            raise ConchError(
                f"{step} steps are taken already, and --iters is {steps}: give more to go on"
            )
        told = f"the run was planned with {planned} steps and now has {steps}: "
        if constant:
            told += "its rate is constant, so that it is what a run of so many in one go would be"
        else:
            rate = float(learning_rate_schedule(self.settings)(mx.array(step)))
            told += (
                f"the cosine is laid anew over {steps} steps, with a rate of {rate:.2g} at step "
                f"{step + 1}; a run of so many in one go would be another"
            )
        return [{"step": step, "planned": planned, "num_iters": steps, "told": told}]

    def _request_stop(self) -> None:
        self._stop = True


def _means(sums: dict[str, float], tokens: int) -> dict[str, float]:
    """Sums over tokens, each by how many stand behind it; one that none does is left out."""
    counts = {name: sums.get(f"{name}{COUNT}", tokens) for name in sums if not name.endswith(COUNT)}
    return {name: sums[name] / count for name, count in counts.items() if count}
