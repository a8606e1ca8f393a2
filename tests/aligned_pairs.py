"""A few texts as the targets of a teacher with another tokenizer, and what it says in float64."""

from pathlib import Path

import mlx.core as mx
import numpy as np

from conch_dna.language_model import ModelSource
from conch_dna.training.cross_tokenizer.records import AlignedExample, RecordAligner
from conch_dna.training.cross_tokenizer.targets import AlignedTargets
from conch_dna.training.data.examples import KINDS
from conch_dna.training.data.outcomes import target_identity
from conch_dna.training.data.soft_targets import SoftTargetCache

TEXTS = [
    {"prompt": "Once upon a time", "completion": " there was a little cat who was very happy."},
    {"prompt": "The dog", "completion": " ran to the park. It saw a big red ball!"},
    {"text": "Tom and Sue went home because it was late."},
]
TEMPERATURE = 2.0
Pair = tuple[ModelSource, ModelSource]


def aligned_targets(
    pair: Pair, folder: Path, kind: type[AlignedTargets] | str, top_k: int = 16
) -> tuple[list[AlignedExample], AlignedTargets]:
    """TEXTS as examples of a teacher and a student, and its targets, computed into a folder."""
    kind = KINDS[kind] if isinstance(kind, str) else kind
    aligner = RecordAligner(*pair)
    examples = [aligner.align(record, f"example {n}") for n, record in enumerate(TEXTS, 1)]
    kept = top_k if kind.keeps_outcomes else 0
    identity = target_identity(pair[0], top_k=kept, temperature=TEMPERATURE)
    targets = kind(SoftTargetCache(folder, identity), *pair)
    targets.fill(pair[0], examples, batch_size=2)
    return examples, targets


def teacher_log_probs(teacher: ModelSource, ids: np.ndarray, temperature: float) -> np.ndarray:
    """float64 `[T - 1, V]`: what the teacher says about the token behind each."""
    logits = np.asarray(teacher.resident().logits(mx.array(ids)[None]), np.float64)[0, :-1]
    scaled = logits / temperature
    shifted = scaled - scaled.max(-1, keepdims=True)
    log_probs: np.ndarray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return log_probs
