"""What the first of several processes does besides its own work: it tells the others what to do.

Knows a run's models and settings, and the processes; nothing of folders. Something else that they
are to do: a message here, and a method of `helper.Helper`.
"""

from typing import Any

from conch_dna.errors import ConchError
from conch_dna.language_model import LanguageModel, ModelSource
from conch_dna.training.data.examples import Examples
from conch_dna.training.machines.far.teacher import teacher_source
from conch_dna.training.machines.ranks.group import Ranks, current
from conch_dna.training.machines.ranks.steps import SharedSteps
from conch_dna.training.machines.ranks.teacher import SharedTeacher
from conch_dna.training.optimizer.steps import Loss
from conch_dna.training.settings import KDConfig, TrainerSettings
from conch_dna.web.client import is_endpoint


def run_teacher(name: str, config: KDConfig, **options: Any) -> ModelSource:
    """The teacher of a run: of this process, of all processes, or behind a URL.

    Args:
        name: See `far.teacher.teacher_source`.
        config: Of the run.
        **options: See `ModelSource`.

    Raises:
        ConchError: It is to be shared out, and there is nobody to share it with; or a batch has
            fewer examples than there are processes.
    """
    ranks = current()
    if config.shard_teacher and (ranks is None or is_endpoint(name)):
        raise ConchError(
            "--shard-teacher shares a teacher out among the processes of mlx.launch, and "
            f"{'it is behind a URL' if ranks else 'there is only this one'}: leave it out"
        )
    if ranks is not None and config.batch_size < ranks.size:
        raise ConchError(
            f"a batch of {config.batch_size} cannot be dealt out to {ranks.size} processes: give "
            "a larger --batch-size"
        )
    options["trust_remote_code"] = config.trust_remote_code
    if ranks is None or is_endpoint(name):
        return teacher_source(name, tokenizer=config.teacher_tokenizer, **options)
    return SharedTeacher(
        name, ranks, memory=config.loss_memory, is_sharded=config.shard_teacher, **options
    )


def shared_steps(
    ranks: Ranks,
    student: LanguageModel,
    examples: Examples,
    loss: Loss,
    settings: TrainerSettings,
) -> SharedSteps:
    """Steps of a student that all processes take; the others load it meanwhile."""
    config = examples.config
    source = student.source
    message = {
        "do": "student",
        "student": source.model_id,
        "digest": source.weights_digest,
        "teacher": examples.teacher.model_id,
        "domain": examples.domain,
        "config": config.to_json(),
    }
    ranks.send(message, {})
    return SharedSteps(student.model, loss, settings, ranks)
