"""The student's own model as its teacher: as it was before training, or as it follows the student.

Knows a student in training and its trained values; nothing of answers or batches. Its weights are
in memory once: to teach, they get other trained values for a while.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from conch_dna.checkpoints import content_digest, numbered_folders, read_json, save_arrays
from conch_dna.errors import ConchError, NotWholeError
from conch_dna.language_model import LanguageModel, ModelSource, named_arrays
from conch_dna.training.settings import CHECKPOINT_PREFIX, KDConfig

VALUES_FILE = "teacher.safetensors"
ROUND_FILE = "round.json"


def remedy(folder: Path) -> str:
    """What to do where what a round began with is lost.

    Args:
        folder: Of the round, in the folder of rounds in that of the run.
    """
    step: int | None = None
    with suppress(NotWholeError):
        step = read_json(folder / ROUND_FILE, needs={"step": int})["step"]
    later = [
        path.name
        for number, path in numbered_folders(folder.parent.parent, CHECKPOINT_PREFIX)
        if step is not None and number > step
    ]
    if not later:
        return "start again with --overwrite"
    return f"remove {', '.join(later)} and go on with --resume, or start again with --overwrite"


def require_own(teacher: ModelSource, student: ModelSource, config: KDConfig) -> None:
    """Refuse a teacher that is to follow its student and is another model.

    Args:
        teacher: Its weights need not be here.
        student: The same.
        config: `teacher_ema`.

    Raises:
        ConchError: It is.
    """
    if config.teacher_ema == 1 or teacher.model_id == student.model_id:
        return
    if teacher.weights_digest != student.weights_digest:
        raise ConchError(
            f"teacher_ema is {config.teacher_ema:g}, but {teacher.model_id} is another model than "
            "the student and cannot follow it: use --teacher self, or leave out --teacher-ema"
        )


class OwnTeacher:
    """What a student's trained values are when it teaches itself.

    Args:
        student: Before its training.
        decay: Share of the teacher's values that stays when it follows the student, at the
            beginning of each round; 1 for a teacher that does not follow.
    """

    def __init__(self, student: LanguageModel, decay: float) -> None:
        self.student = student
        self.decay = decay
        self._first = named_arrays(student.model.trainable_parameters())
        self._values = self._first

    def follow(self, folder: Path, before: Path | None) -> None:
        """Take a step towards what the student is now, where the teacher follows it.

        Args:
            folder: Of the round that begins, which keeps the values.
            before: Of the round before; None for the first.

        Raises:
            ConchError: The values of the round before are not there, or not whole.
        """
        if self.decay == 1:
            return
        old = self._read(before) if before else self._first
        now = named_arrays(self.student.model.trainable_parameters())
        self._values = {
            name: self.decay * old[name] + (1 - self.decay) * value for name, value in now.items()
        }
        mx.eval(self._values)
        save_arrays(folder / VALUES_FILE, self._values, {"digest": _digest(self._values)})

    def recall(self, folder: Path) -> None:
        """Be what it was in a round that has begun before.

        Raises:
            ConchError: The values are not there, or not whole.
        """
        if self.decay < 1:
            self._values = self._read(folder)

    def _read(self, folder: Path) -> dict[str, mx.array]:
        path = folder / VALUES_FILE
        try:
            loaded: Any = mx.load(str(path), return_metadata=True)
            values, metadata = cast(tuple[dict[str, mx.array], dict[str, str]], loaded)
            whole = metadata["digest"] == _digest(values) and values.keys() == self._first.keys()
        except (OSError, RuntimeError, ValueError, KeyError):
            whole = False
        if not whole:
            raise ConchError(
                f"{path} is not whole, and the round cannot be scored without it: {remedy(folder)}"
            )
        return values

    @contextmanager
    def speaking(self) -> Iterator[LanguageModel]:
        """The student's model with the teacher's values; it has its own again afterwards."""
        model = self.student.model
        own = named_arrays(model.trainable_parameters())
        model.update(tree_unflatten(list(self._values.items())))
        model.eval()
        try:
            yield self.student
        finally:
            model.update(tree_unflatten(list(own.items())))


def _digest(values: dict[str, mx.array]) -> str:
    parts = (np.array(values[name], copy=False).tobytes() for name in sorted(values))
    return content_digest(*sorted(values), *parts)
