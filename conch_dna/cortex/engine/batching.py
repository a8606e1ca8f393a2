"""Requests for several domains answered together, joining and leaving at any token.

Knows an adapter bank, token ids and mlx_lm's batch generator; nothing of text, schemas, confidence
or servers. Another way to share a batch: a kind of `_Lane`, chosen in `AnswerEngine._lane`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from conch_dna.cortex.engine.adapter_bank import AdapterBank
from conch_dna.cortex.engine.prefixes import PrefixCaches
from conch_dna.cortex.engine.request import Piece, Request, make_request_sampler
from conch_dna.cortex.engine.routing import RoutedModel, RowCache
from conch_dna.errors import ConchError
from conch_dna.training.answers import make_sampler

MAX_BATCH = 32
PREFILL_ROWS = 8
MAX_PREFIX_BYTES = 256 * 2**20


@dataclass(eq=False)
class _Lane:
    """A batch generator and the requests in it.

    Attributes:
        names: The adapters whose rows it takes, besides none.
        version: The bank's, when it was made.
        model: What it runs.
        generator: mlx_lm's.
        uids: The engine's number of each unfinished request, by the generator's.
    """

    names: tuple[str | None, ...]
    version: int
    model: RoutedModel
    generator: Any
    uids: dict[int, int] = field(default_factory=dict)


class AnswerEngine:
    """Continuous batching over the domains of a bank; call `step` until nothing is `pending`.

    Where all adapters of the bank are plain LoRA and the model keeps the rows of a batch apart,
    requests of all domains run in one batch; else there is a batch for each domain, and they are
    stepped in turn. A request goes on with the adapter that its domain had when it came, whatever
    happens to the bank. `activate` of the bank is neither used nor disturbed. All calls from one
    thread.

    Args:
        bank: Adapters and base.
        max_batch: Most rows of one batch; more requests wait.
        max_prefix_bytes: Most memory of prompt caches of shared beginnings.

    Attributes:
        prefixes: What is kept of shared beginnings.

    Raises:
        ConchError: mlx_lm cannot batch this kind of model, or a number is out of its range.
    """

    def __init__(
        self,
        bank: AdapterBank,
        *,
        max_batch: int = MAX_BATCH,
        max_prefix_bytes: int = MAX_PREFIX_BYTES,
    ) -> None:
        from mlx_lm.models.cache import make_prompt_cache

        if max_batch < 1:
            raise ConchError(f"max_batch is {max_batch}: use 1 or more")
        cannot = {
            type(entry).__name__
            for entry in make_prompt_cache(bank.tree(None))
            if not hasattr(entry, "merge")
        }
        if cannot:
            raise ConchError(
                f"mlx_lm cannot batch {bank.base.model_id}, whose prompt cache is made of "
                f"{', '.join(sorted(cannot))}: use another model"
            )
        self.bank = bank
        self.max_batch = max_batch
        self.prefixes = PrefixCaches(max_prefix_bytes)
        self._lanes: list[_Lane] = []
        self._where: dict[int, tuple[_Lane, int]] = {}
        self._next_uid = 0
        self._shares: tuple[int, bool] | None = None
        self._greedy = make_sampler(0.0, bank.vocabulary_size, mx.random.key(0))

    @property
    def pending(self) -> int:
        """Requests that are not finished."""
        return len(self._where)

    @property
    def shares_batches(self) -> bool:
        """Whether rows of one batch can have any of the bank's adapters as it is now."""
        bank = self.bank
        if self._shares is None or self._shares[0] != bank.version:
            shares = bank.can_share_batch(bank.names)
            # One adapter is enough to see what the model does with its rows.
            if shares and bank.names:
                shares = RoutedModel(bank, bank.names[:1]).routes()
            self._shares = (bank.version, shares)
        return self._shares[1]

    def submit(self, request: Request) -> int:
        """Queue a request.

        Returns:
            Its number, which its pieces carry.

        Raises:
            ConchError: See `check`; nothing is queued then.
        """
        room = self.check(request)
        lane = self._lane(request.domain)
        row = (
            lane.names.index(request.domain)
            if request.domain is not None
            else lane.model.no_adapter
        )
        # At least one token is left to be asked with.
        prefix = request.prefix[: len(request.tokens) - 1]
        greedy = request.temperature == 0
        [inner] = lane.generator.insert(
            [list(request.tokens[len(prefix) :])],
            [room],
            caches=[self._cache(request.domain, lane.model, row, prefix)],
            all_tokens=[list(prefix)],
            samplers=[
                self._greedy if greedy else make_request_sampler(request, self.bank.vocabulary_size)
            ],
        )
        uid = self._next_uid
        self._next_uid += 1
        lane.uids[inner] = uid
        self._where[uid] = (lane, inner)
        return uid

    def check(self, request: Request) -> int:
        """Refuse a request that the model cannot answer.

        Returns:
            Most tokens of its answer: its max_tokens, or what the context leaves.

        Raises:
            ConchError: There is no such domain, the prompt fills the context, or it has tokens
                that the model has not.
        """
        if request.domain is not None:
            self.bank.get(request.domain)
        rows = self.bank.vocabulary_size
        if wrong := [token for token in request.tokens if not 0 <= token < rows]:
            raise ConchError(
                f"the prompt has the token {wrong[0]}, but {self.bank.base.model_id} has tokens 0 "
                f"to {rows - 1}: encode it with that model's tokenizer"
            )
        context = self.bank.base.source.context_length
        if context is None:
            return request.max_tokens
        if len(request.tokens) >= context:
            raise ConchError(
                f"the prompt has {len(request.tokens)} tokens, and the context of "
                f"{self.bank.base.model_id} ends at {context}: shorten it"
            )
        return min(request.max_tokens, context - len(request.tokens))

    def cancel(self, uid: int) -> None:
        """Forget a request; nothing happens if it is finished already."""
        if uid not in self._where:
            return
        lane, inner = self._where.pop(uid)
        del lane.uids[inner]
        with mx.stream(lane.generator.stream):
            lane.generator.remove([inner])
        self._drop_idle()

    def step(self) -> list[Piece]:
        """One token more for every row under way; some prompts may be read first.

        Returns:
            The pieces; none where only prompts were read.
        """
        pieces: list[Piece] = []
        for lane in self._lanes:
            if lane.uids:
                _, responses = lane.generator.next()
                pieces += self._pieces(lane, responses)
        self._drop_idle()
        return pieces

    def run(self, requests: Sequence[Request]) -> list[list[Piece]]:
        """Answer requests; the engine must have none under way.

        Returns:
            The pieces of each.

        Raises:
            ConchError: One of them is refused; none is answered then.
            ValueError: Other requests are under way, whose pieces would be lost.
        """
        if self._where:
            raise ValueError(f"{self.pending} requests are under way: step until they are done")
        for request in requests:
            self.check(request)
        answers: dict[int, list[Piece]] = {}
        try:
            for request in requests:
                answers[self.submit(request)] = []
            while self.pending:
                for piece in self.step():
                    answers[piece.uid].append(piece)
        finally:
            for uid in answers:
                self.cancel(uid)
        return list(answers.values())

    def forget_prefixes(self, domain: str | None) -> None:
        """Drop a domain's kept beginnings; requests under way are not disturbed.

        Those of an adapter that was replaced are never used again in any case.
        """
        self.prefixes.forget(domain)

    def close(self) -> None:
        """Forget all requests and free what they hold."""
        for uid in list(self._where):
            self.cancel(uid)
        for lane in self._lanes:
            lane.generator.close()
        self._lanes = []

    def __enter__(self) -> "AnswerEngine":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _cache(
        self, domain: str | None, model: RoutedModel, row: int, prefix: Sequence[int]
    ) -> list[Any]:
        from mlx_lm.models.cache import make_prompt_cache

        tree = model.tree(row)
        own = self.prefixes.get(domain, tree, prefix) if prefix else make_prompt_cache(tree)
        return [*own, RowCache([row])]

    def _lane(self, domain: str | None) -> _Lane:
        """The generator that takes a domain's new requests."""
        names = tuple(self.bank.names) if self.shares_batches else (domain,)
        self._drop_idle()
        for lane in self._lanes:
            if lane.names == names and lane.version == self.bank.version:
                return lane
        lane = self._new_lane(names)
        self._lanes.append(lane)
        return lane

    def _new_lane(self, names: tuple[str | None, ...]) -> _Lane:
        from mlx_lm.generate import BatchGenerator

        model = RoutedModel(self.bank, names)
        generator = BatchGenerator(
            model,
            stop_tokens=[[token] for token in self.bank.base.tokenizer.eos_token_ids],
            sampler=self._greedy,
            completion_batch_size=self.max_batch,
            prefill_batch_size=min(PREFILL_ROWS, self.max_batch),
        )
        return _Lane(names, self.bank.version, model, generator)

    def _drop_idle(self) -> None:
        """Close the generators of earlier adapters that have nothing left to do."""
        for lane in [lane for lane in self._lanes if lane.version != self.bank.version]:
            if not lane.uids:
                lane.generator.close()
                self._lanes.remove(lane)

    def _pieces(self, lane: _Lane, responses: Sequence[Any]) -> list[Piece]:
        if not responses:
            return []
        # One transfer for the whole batch.
        said = mx.stack([response.logprobs[response.token] for response in responses])
        pieces = []
        for response, log_prob in zip(responses, np.asarray(said), strict=True):
            uid = lane.uids[response.uid]
            pieces.append(Piece(uid, int(response.token), float(log_prob), response.finish_reason))
            if response.finish_reason is not None:
                del lane.uids[response.uid]
                del self._where[uid]
        return pieces
