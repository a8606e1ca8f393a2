"""One answer of a local model, token by token: plainly, with a draft, or held to a form.

Knows a model, token ids and whoever drafts; nothing of text, prompts or who asks. Another way to
decode: a branch in `Decoding.__init__`.
"""

from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from conch_dna.ego.drafting import Draft, drafted_tokens, unfit
from conch_dna.ego.grammars import HeldSampler
from conch_dna.ego.settings import EgoConfig
from conch_dna.language_model import LanguageModel
from conch_dna.training.data.answers import make_sampler, random_key

if TYPE_CHECKING:
    from llguidance import LLMatcher


class Decoding:
    """An answer of a local model token by token, with a draft where there is a fitting one.

    Args:
        model: Whose answer it is.
        ids: The prompt.
        config: How it is drawn.
        draft: Who drafts; nobody where None.
        check: Called after each token; what it raises ends the work.
        matcher: What the answer is held to, at its beginning; then nobody drafts.

    Attributes:
        tokens: What has come, the end-of-sequence token included.
        told: Of the draft, as `EgoAnswer` says it.
    """

    def __init__(
        self,
        model: LanguageModel,
        ids: list[int],
        config: EgoConfig,
        draft: Draft | None,
        check: Callable[[], None],
        matcher: "LLMatcher | None" = None,
    ) -> None:
        self.tokens: list[int] = []
        self.told: dict[str, Any] = {}
        self._check = check
        self._ends = model.tokenizer.eos_token_ids
        context = model.source.context_length or 2**31
        most = min(config.max_tokens, context - len(ids))
        drafts = draft if matcher is None else None
        why = unfit(model, drafts, len(ids) + most) if drafts else ""
        if why:
            self.told["undrafted"] = why
        if drafts is None or why:
            self._steps = _plain_tokens(model, ids, most, config, matcher)
        else:
            self.told |= {"draft": drafts.name, "steps": 0}
            self._steps = drafted_tokens(
                model,
                drafts,
                ids,
                max_tokens=most,
                temperature=config.temperature,
                seed=config.seed,
            )

    def __iter__(self) -> Iterator[int]:
        before = False
        try:
            for token, drafted in self._steps:
                self._check()
                if "steps" in self.told and not before:
                    # The first of those that came of one step.
                    self.told["steps"] += 1
                before = drafted
                self.tokens.append(token)
                yield token
                if token in self._ends:
                    return
        finally:
            self._steps.close()


def _plain_tokens(
    model: LanguageModel,
    ids: list[int],
    most: int,
    config: EgoConfig,
    matcher: "LLMatcher | None",
) -> Generator[tuple[int, bool], None, None]:
    """Tokens one by one, drawn as `answer_batch` draws for the first batch."""
    from mlx_lm.generate import generate_step

    key = random_key(config.seed, 0)
    sampler = make_sampler(config.temperature, model.vocabulary_size, key)
    if matcher is not None:
        sampler = HeldSampler(matcher, sampler, model.tokenizer.eos_token_ids)
    steps = generate_step(mx.array(ids), model.model, max_tokens=most, sampler=sampler)
    try:
        for token, _ in steps:
            yield int(token), False
    finally:
        steps.close()
