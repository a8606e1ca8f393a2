"""What a distillation would do, without doing it: examples, tokens, disk and memory.

Knows configuration, tokenizers and file sizes; loads no weights and writes nothing.
To show another figure: an entry in what `plan_domain` returns.
"""

from collections.abc import Sequence
from typing import Any

from conch_dna.errors import ConchError
from conch_dna.language_model import ModelSource
from conch_dna.training.distillation import DOMAIN_PROMPTS
from conch_dna.training.examples import Examples
from conch_dna.training.records import (
    Record,
    prompt_ids,
    require_room,
    split_heldout,
)
from conch_dna.training.settings import KDConfig, validate_domain


def plan_domain(
    teacher: ModelSource,
    student: ModelSource,
    config: KDConfig,
    domain: str,
    *,
    prompts: Sequence[str] | None = None,
    data: Sequence[Record] | None = None,
) -> dict[str, Any]:
    """Work out what `distill_domain` would do with the same arguments.

    Returns:
        `examples`, `heldout_examples`, `counted_tokens` of the teacher (or an upper bound where it
        has yet to answer: `counted_tokens_exact` tells), `longest_example`, `epochs`,
        `disk_bytes` of the soft targets, `teacher_bytes` and `student_bytes` of the weights
        (None where they are still on the hub and their size is unknown) and
        `logits_bytes` of one chunk of the loss; `alignment` and, with another tokenizer and
        given data, its `coverage`.

    Raises:
        ConchError: As the run itself would.
    """
    batches = config.num_iters * config.accumulation_steps if config.alpha > 0 else 0
    validate_domain(domain, with_own_data=prompts is not None or data is not None)
    pair = Examples(teacher, student, config)
    aligned: dict[str, Any] = {"alignment": pair.alignment}
    if data is not None:
        split = pair.split(data)
        examples = [*split.train, *split.heldout]
        count, heldout_count = len(examples), len(split.heldout)
        read = (getattr(example, "teacher", example) for example in split.read(config))
        tokens = sum({example.digest: example.count for example in read}.values())
        aligned = pair.described(examples)
        longest = max(len(example.ids) for example in examples)
    else:
        known = DOMAIN_PROMPTS.get(domain)
        if prompts is None:
            assert known is not None
            prompts = known["examples"]
        system = known["system"] if known else ""
        encoded = [prompt_ids(teacher.tokenizer, prompt, system) for prompt in prompts]
        longest = min(teacher.context_length or config.max_seq_length, config.max_seq_length)
        require_room(encoded, answer=config.max_tokens, longest=longest)
        wanted = [{"text": prompt} for prompt in prompts for _ in range(config.samples_per_prompt)]
        _, heldout = split_heldout(wanted, config.val_fraction, seed=config.seed)
        count, heldout_count = len(wanted), len(heldout)
        longest = max(len(ids) for ids in encoded) + config.max_tokens
        drawn = min(count - heldout_count, batches * config.batch_size)
        tokens = (heldout_count + drawn) * config.max_tokens
    if count - heldout_count < config.batch_size:
        raise ConchError(
            f"{count - heldout_count} training examples do not fill one batch of "
            f"{config.batch_size}: give more data or a smaller --batch-size"
        )
    # The digests are not needed for the size, so no weights have to be there.
    identity = pair.identity(with_digests=False)
    drawn = config.num_iters * config.batch_size * config.accumulation_steps
    chunk = config.head_chunk or config.batch_size * longest
    return {
        "domain": domain,
        "teacher": teacher.model_id,
        "student": student.model_id,
        "data": "given" if data is not None else "answers of the teacher",
        "examples": count,
        "heldout_examples": heldout_count,
        "counted_tokens": tokens,
        "counted_tokens_exact": data is not None,
        "longest_example": longest,
        "epochs": drawn / max(1, count - heldout_count),
        "disk_bytes": tokens * identity.bytes_per_token,
        "teacher_bytes": teacher.weight_bytes,
        "student_bytes": student.weight_bytes,
        "logits_bytes": 4 * chunk * max(teacher.token_count, student.token_count),
        **aligned,
    }
