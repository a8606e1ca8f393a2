"""What a distillation would do, without doing it: examples, tokens, disk and memory.

Knows configuration, tokenizers and file sizes; loads no weights and writes nothing.
To show another figure: an entry in what `plan_domain` returns.
"""

from collections.abc import Sequence
from typing import Any

from conch_dna.errors import ConchError
from conch_dna.language_model import ModelSource
from conch_dna.training.distillation import DOMAIN_PROMPTS
from conch_dna.training.records import (
    Record,
    fitting,
    prompt_ids,
    require_room,
    split_heldout,
    tokenize_records,
)
from conch_dna.training.settings import KDConfig, validate_domain
from conch_dna.training.soft_targets import target_identity
from conch_dna.training.vocabulary import (
    require_same_tokenizer,
    vocabulary_digest,
    vocabulary_table,
)


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
        `examples`, `heldout_examples`, `counted_tokens` (a number, or an upper bound where the
        teacher has yet to answer: `counted_tokens_exact` tells), `longest_example`, `epochs`,
        `disk_bytes` of the soft targets, `teacher_bytes` and `student_bytes` of the weights
        (None where they are still on the hub and their size is unknown) and
        `logits_bytes` of one chunk of the loss.

    Raises:
        ConchError: As the run itself would.
    """
    validate_domain(domain, with_own_data=prompts is not None or data is not None)
    require_same_tokenizer(
        vocabulary_table(teacher.tokenizer),
        vocabulary_table(student.tokenizer),
        teacher=teacher.model_id,
        student=student.model_id,
    )
    if data is not None:
        examples = tokenize_records(
            data,
            student.tokenizer,
            train_on_prompt=config.train_on_prompt,
            vocabulary=vocabulary_digest(student.tokenizer),
        )
        contexts = [c for c in (teacher.context_length, student.context_length) if c]
        kept = fitting(
            examples,
            min([config.max_seq_length, *contexts]),
            skip=config.too_long == "skip",
        )
        examples, data = [examples[i] for i in kept], [data[i] for i in kept]
        _, heldout = split_heldout(data, config.val_fraction, seed=config.seed)
        count, heldout_count = len(examples), len(heldout)
        tokens = sum(example.count for example in examples)
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
        tokens = count * config.max_tokens
    if count - heldout_count < config.batch_size:
        raise ConchError(
            f"{count - heldout_count} training examples do not fill one batch of "
            f"{config.batch_size}: give more data or a smaller --batch-size"
        )
    # The digests are not needed for the size, so no weights have to be there.
    identity = target_identity(
        teacher, top_k=config.top_k, temperature=config.temperature, with_digests=False
    )
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
        "logits_bytes": 4 * chunk * teacher.token_count,
    }
