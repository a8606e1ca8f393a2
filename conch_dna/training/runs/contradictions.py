"""Settings of a run that cannot be together, each sound by itself.

Knows values by their names; to add a pair: a line in `_pairs`.
"""

from collections.abc import Iterator
from typing import Any

from conch_dna.training.runs.on_policy.shares import own_answer_problems


def contradictions(config: Any) -> list[str]:
    """What of a `KDConfig` whose values are within their ranges is not possible together."""
    return [*_pairs(config), *own_answer_problems(config)]


def _pairs(config: Any) -> Iterator[str]:
    if config.samples_per_prompt > 1 and config.sampling_temperature == 0:
        yield (
            f"samples_per_prompt is {config.samples_per_prompt} with sampling_temperature 0: "
            "all answers would be the same; raise the temperature"
        )
    if config.soft_weight == 0 and config.chunk_weight == 0:
        yield (
            "soft_weight and chunk_weight are both 0: a teacher with another tokenizer would "
            "teach nothing; raise one, or use alpha 0 for fine-tuning"
        )
    if config.full and config.dora:
        yield "full and dora are both true: choose one of them"
    if config.targets == "sampled" and config.divergence != "forward_kl":
        yield (
            f"targets is sampled with divergence {config.divergence}: of tokens drawn from the "
            "teacher only the forward KL can be told; choose topk, or forward_kl"
        )
