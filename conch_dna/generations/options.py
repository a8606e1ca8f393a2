"""The settings of a generation that the command line shows before anything heavy is loaded.

Knows names, defaults and words; nothing of how they are used. To make another number of
`EvolveConfig` an option: an entry in NUMBERS, from which the field takes its default.
"""

from typing import NamedTuple


class Number(NamedTuple):
    """A number of `EvolveConfig`: its default, and what it is in a help text."""

    default: float
    words: str


NUMBERS = {
    "alpha": Number(0.5, "Share of cross-entropy in the loss."),
    "beta": Number(0.5, "Share of the teachers' target."),
    "gamma": Number(0.0, "Share of the pull to the first teacher where both agree."),
    "replay_share": Number(0.1, "Of earlier data in an epoch."),
    "ema_decay": Number(0.999, "Of the averaged adapter."),
}
# Settings of a distillation for which a generation has no use, or which are its line's.
UNUSED = (
    "alpha",
    "alignment",
    "soft_weight",
    "chunk_weight",
    "chunk_scale",
    "samples_per_prompt",
    "generation_batch_size",
    "steps_per_report",
    "output_dir",
    "adapter_subdir",
    "trust_remote_code",
)
