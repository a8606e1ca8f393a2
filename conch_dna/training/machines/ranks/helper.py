"""What the processes besides the first do: wait for messages, and compute what they ask for.

Knows models, settings and messages; nothing of folders of runs, in which only the first writes. To
have something else done: a method of `Helper` with the message's name.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from conch_dna.errors import ConchError
from conch_dna.language_model import LanguageModel, ModelSource
from conch_dna.screen.progress import silent
from conch_dna.training.adapters import checkpoint_layers, make_trainable
from conch_dna.training.data.examples import Examples
from conch_dna.training.data.outcomes import TargetIdentity
from conch_dna.training.head_loss import make_cross_entropy_loss
from conch_dna.training.machines.far.teacher import teacher_source
from conch_dna.training.machines.ranks.group import Ranks
from conch_dna.training.machines.ranks.steps import SharedSteps
from conch_dna.training.machines.ranks.teacher import ShardedModel, SharedModel, examples_of, loaded
from conch_dna.training.settings import KDConfig, trainer_settings


class Helper:
    """A process that helps the first one.

    Args:
        ranks: All of them.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._teacher: SharedModel | None = None
        # With their digests, which take as long as reading the weights.
        self._sources: dict[str, ModelSource] = {}
        self._student: LanguageModel | None = None
        self._steps: SharedSteps | None = None

    def run(self) -> None:
        """Do what is asked until the first one ends.

        Raises:
            RankLostError: It, or another, is gone.
            ConchError: What is asked cannot be done here.
        """
        while True:
            message, arrays = self.ranks.receive()
            if message["do"] == "end":
                return
            getattr(self, message.pop("do"))(message, arrays)

    def load(self, message: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """Load the teacher, or this process's share of it."""
        source = ModelSource(
            message["teacher"], trust_remote_code=message["trust_remote_code"], report=silent
        )
        self._require_same(source, message["digest"])
        self._sources[message["teacher"]] = source
        kind = ShardedModel if message["is_sharded"] else SharedModel
        model = loaded(source, is_sharded=message["is_sharded"])
        self._teacher = kind(source, model, self.ranks, message["memory"])

    def release(self, message: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """Free the teacher's memory."""
        if self._teacher is not None:
            self._teacher.release()
            self._teacher = None

    def targets(self, message: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """Compute a share of a teacher's targets."""
        assert self._teacher is not None
        size = message.pop("batch_size")
        identity = TargetIdentity(
            teacher="",
            tokenizer="",
            **{**message, "temperatures": tuple(message["temperatures"])},
        )
        self._teacher.computed(examples_of(arrays), identity, batch_size=size, report=silent)

    def answers(self, message: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """Answer prompts together."""
        assert self._teacher is not None
        SharedModel.answers(self._teacher, **message)

    def student(self, message: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """Load the student, and make trainable of it what the first trains."""
        config = KDConfig(**message["config"])
        trust = config.trust_remote_code
        source = ModelSource(message["student"], trust_remote_code=trust, report=silent)
        self._require_same(source, message["digest"])
        self._student = student = source.load()
        make_trainable(student, config)
        if config.grad_checkpoint:
            checkpoint_layers(student.model)
        loss = make_cross_entropy_loss(student, memory=config.loss_memory)
        if config.alpha:
            name = message["teacher"]
            teacher = self._sources.get(name) or teacher_source(
                name, tokenizer=config.teacher_tokenizer, trust_remote_code=trust
            )
            examples = Examples(teacher, source, config, domain=message["domain"])
            with tempfile.TemporaryDirectory() as nothing:
                loss = examples.targets(Path(nothing)).loss(student, config)
        self._steps = SharedSteps(student.model, loss, trainer_settings(config), self.ranks)

    def begin(self, message: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """Take the parameters and moments with which training begins or goes on."""
        assert self._steps is not None
        self._steps.begin_as(arrays)

    def step(self, message: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """Take a step."""
        assert self._steps is not None
        self._steps.help(message, arrays)

    def trained(self, message: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """Free the student's memory."""
        self._steps = None
        if self._student is not None:
            self._student.release()
            self._student = None

    def _require_same(self, source: ModelSource, digest: str) -> None:
        if source.weights_digest != digest:
            raise ConchError(
                f"{source.model_id} has other weights here than where the first process is: copy "
                "one of them to the other machine"
            )
