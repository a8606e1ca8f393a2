"""The table of TRUE_KD_README.md: which pairs of models fit into which Mac, computed.

From the models' configurations, as their authors published them, in mlx-community's 4-bit form. No
Mac is needed, and none was: on a Mac MLX has kernels of its own for norms, rotary embeddings and
attention, and the plain operations of the CPU are counted here.
`python tests/benchmarks/mac_memory.py` prints it; tests/training/test_memory_estimate.py compares.
"""

import conch_dna  # noqa: F401  # isort: skip  (loads OpenBLAS before mlx)

import json
import tempfile
from pathlib import Path
from typing import Any

from conch_dna.language_model import ModelSource
from conch_dna.training.fit.memory_estimate import estimate_run
from conch_dna.training.fit.workload import Workload
from conch_dna.training.settings import KDConfig

MACS_GB = (8, 16, 32, 64)
# Metal's recommended working set is about two thirds of up to 32 GB, and three quarters of more.
SHARE = {8: 2 / 3, 16: 2 / 3, 32: 2 / 3, 64: 3 / 4}
# hidden size, layers, intermediate size, heads, KV heads, rows of the head, tied
QWEN = {
    "0.5B": (896, 24, 4864, 14, 2, 151936, True),
    "3B": (2048, 36, 11008, 16, 2, 151936, True),
    "7B": (3584, 28, 18944, 28, 4, 152064, False),
    "14B": (5120, 48, 13824, 40, 8, 152064, False),
    "32B": (5120, 64, 27648, 40, 8, 152064, False),
}
PAIRS = (("3B", "0.5B"), ("7B", "3B"), ("14B", "7B"), ("32B", "7B"))
LENGTHS = (512, 2048)
NAMES = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")
NAMES += ("num_key_value_heads", "vocab_size", "tie_word_embeddings")
PROMPT = 128


class Described(ModelSource):
    """A model of which there is only a configuration."""

    def __init__(self, name: str, folder: Path) -> None:
        self.model_id = f"Qwen2.5-{name}"
        self.trust_remote_code = False
        self.adapter = None
        self.folder = folder
        self._resident = None
        # All tokens of the head count, of which the last few hundred are padding.
        self.token_count = QWEN[name][5]
        config: dict[str, Any] = {
            "model_type": "qwen2",
            **dict(zip(NAMES, QWEN[name], strict=True)),
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "max_position_embeddings": 32768,
            "torch_dtype": "bfloat16",
            "quantization": {"group_size": 64, "bits": 4},
        }
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))


def work(length: int, batch_size: int) -> Workload:
    """Batches of the longest examples only, whose prompts are short."""
    counted = batch_size * (length - PROMPT)
    return Workload(
        longest=length,
        teacher_longest=length,
        counted=counted,
        teacher_counted=counted,
        mean_share=1.0,
        examples=100,
        heldout=10,
        prompts=100,
        longest_prompt=PROMPT,
    )


def peaks(teacher: str, student: str, length: int, **settings: Any) -> dict[str, float]:
    """Gigabytes of each phase."""
    config = KDConfig(max_tokens=min(256, length - PROMPT), **settings)
    with tempfile.TemporaryDirectory() as folder:
        models = [
            Described(name, Path(folder) / role)
            for role, name in (("teacher", teacher), ("student", student))
        ]
        estimate = estimate_run(models[0], models[1], config, work(length, config.batch_size))
    assert not estimate.unknown, estimate.unknown
    return {name: (peak or 0) / 1e9 for name, peak in estimate.phases.items()}


def row(teacher: str, student: str, length: int, **settings: Any) -> str:
    """A line of the table: peaks of the phases, and the Macs into which they fit."""
    found = peaks(teacher, student, length, **settings)
    answers, targets = found["the teacher answers"], found["the teacher's targets"]
    highest = max(found.values())
    fits = [gb for gb in MACS_GB if highest <= 0.8 * SHARE[gb] * 1e9 * gb / 1e9]
    tight = [gb for gb in MACS_GB if highest <= SHARE[gb] * gb and gb not in fits]
    words = [f"{gb} GB tight" for gb in tight] + ([f"{fits[0]} GB"] if fits else [])
    options = "--grad-checkpoint --batch-size 1" if settings else "default"
    training = f"{found['training']:.1f}"
    where = ", then ".join(words) or "none of them"
    return (
        f"| {teacher} → {student} | {length} | {options} | {answers:.1f} | {targets:.1f} | "
        f"{training} | {where} |"
    )


def table() -> list[str]:
    """The lines of the table without its head."""
    usual = [row(*pair, length) for pair in PAIRS for length in LENGTHS]
    small = {"grad_checkpoint": True, "batch_size": 1}
    return usual + [row(*pair, length, **small) for pair in PAIRS[:2] for length in LENGTHS]


if __name__ == "__main__":
    print("\n".join(table()))
