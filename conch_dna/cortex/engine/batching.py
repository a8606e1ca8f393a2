"""Requests for several domains answered together, joining and leaving at any token.

Knows an adapter bank, token ids and mlx_lm's batch generator; nothing of text, schemas, confidence
or servers. Another way to share a batch: a kind of `_Lane`, chosen in `AnswerEngine._lane`; another
way to draw tokens: a field of `DrawOptions`, and a branch in `make_request_sampler`.
"""

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from conch_dna.cortex.engine.adapter_bank import AdapterBank
from conch_dna.cortex.engine.drawing import make_request_sampler
from conch_dna.cortex.engine.prefixes import PrefixCaches
from conch_dna.cortex.engine.routing import RoutedModel, RowCache
from conch_dna.cortex.options import MAX_BATCH, DrawOptions
from conch_dna.ego.grammars import Grammars, HeldSampler
from conch_dna.errors import ConchError
from conch_dna.training.data.answers import make_sampler, takes_unequal_rows

PREFILL_ROWS = 8
# So many tokens of prompts are read between two tokens of those who are answered, which then take
# a few times as long; all at once where nobody is.
PREFILL_TOKENS, PREFILL_ALONE = 64, 2048
MAX_PREFIX_BYTES = 256 * 2**20


@dataclass(frozen=True, kw_only=True)
class Request(DrawOptions):
    """A prompt to answer.

    Attributes:
        domain: The adapter's name in the bank; None for the base without one.
        tokens: Ids of the whole prompt.
        prefix: A beginning of `tokens` that other requests of the domain have too, such as its
            system prompt; it is computed once.
        form: What the answer is held to, see `Grammars.matcher`; None for a free one.
        top_logprobs: How many of the likeliest tokens each piece tells.

    Raises:
        ConchError: A value is out of its range, or the prefix is no beginning of the tokens.
    """

    domain: str | None
    tokens: tuple[int, ...]
    prefix: tuple[int, ...] = ()
    form: str | None = None
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tokens:
            raise ConchError("the prompt has no tokens: there is nothing to answer")
        if tuple(self.tokens[: len(self.prefix)]) != tuple(self.prefix):
            raise ConchError("the prefix is not the beginning of the prompt's tokens")


@dataclass(frozen=True)
class Piece:
    """One token of an answer.

    Attributes:
        uid: The request's number.
        token: Its id; the token that stops an answer comes too.
        log_prob: Its log-probability in nats, at temperature 1 and over the real tokens, whatever
            a form allows and a penalty takes.
        finish_reason: None until the last token; then "stop" or, where max_tokens or the
            context ends, "length".
        removed: The share of probability that the request's form did not allow; None without.
        top: The likeliest tokens with their log-probabilities, as many as were asked for, the
            likeliest first.
    """

    uid: int
    token: int
    log_prob: float
    finish_reason: Literal["stop", "length"] | None
    removed: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@contextmanager
def interrupt_held_back() -> Iterator[None]:
    """Let Ctrl-C take effect at the end of the block, not inside it.

    Outside of the main thread, which alone hears Ctrl-C, it does nothing.
    """
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield
        return
    interrupts: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: interrupts.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if interrupts:
            previous(*interrupts[0])


@dataclass(eq=False)
class _Lane:
    """A batch generator and the requests in it.

    Attributes:
        version: The bank's, when it was made.
        model: What it runs, for the rows of its `names`.
        generator: mlx_lm's.
        uids: The engine's number of each unfinished request, by the generator's.
        answered: How many of them got a token in the last step.
    """

    version: int
    model: RoutedModel
    generator: Any
    uids: dict[int, int] = field(default_factory=dict)
    answered: int = 0

    def next(self) -> list[Any]:
        """A token more of those who are answered, and a part of the prompts that are read."""
        reading = min(max(1, len(self.uids) - self.answered), PREFILL_ROWS)
        part = max(8, PREFILL_TOKENS // reading)
        self.generator.prefill_step_size = part if self.answered else PREFILL_ALONE
        _, responses = self.generator.next()
        self.answered = len(responses)
        return list(responses)


@dataclass(eq=False)
class _Row:
    """A request that is not finished.

    Attributes:
        lane: Where it is.
        inner: Its number there.
        held: Draws its tokens, where they are held to a form.
        top: How many of the likeliest tokens it wants to know.
    """

    lane: _Lane
    inner: int
    held: HeldSampler | None
    top: int


class AnswerEngine:
    """Continuous batching over the domains of a bank; call `step` until nothing is `pending`.

    Where all adapters of the bank are plain LoRA and the model keeps the rows of a batch apart,
    requests of all domains run in one batch; else there is a batch for each domain, and they are
    stepped in turn. A request goes on with the adapter that its domain had when it came, whatever
    happens to the bank. `activate` of the bank is neither used nor disturbed. All calls from one
    thread; Ctrl-C takes effect between two steps, since one broken off would leave it of no use.

    Args:
        bank: Adapters and base.
        max_batch: Most rows of one batch; more requests wait. Models that cannot have prompts of
            unequal length in one batch answer one after the other.
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
        self._rows: dict[int, _Row] = {}
        self._grammars = Grammars(bank.base.tokenizer)
        self._next_uid = 0
        self._shares: tuple[int, bool] | None = None
        self._greedy = make_sampler(0.0, bank.vocabulary_size, mx.random.key(0))

    @property
    def pending(self) -> int:
        """Requests that are not finished."""
        return len(self._rows)

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
            ConchError: The model cannot answer it, see `check`; nothing is queued then.
        """
        room = self.check(request)
        lane = self._lane(request.domain)
        row = lane.model.names.index(request.domain)
        # At least one token is left to be asked with.
        prefix = request.prefix[: len(request.tokens) - 1]
        cache = self.prefixes.get(request.domain, lane.model.trees[row], prefix)
        sampler = self._greedy
        if not request.is_greedy:
            sampler = make_request_sampler(request, self.bank.vocabulary_size)
        held = None
        if request.form is not None:
            matcher = self._grammars.matcher(request.form)
            sampler = held = HeldSampler(matcher, sampler, self._grammars.ends)
        [inner] = lane.generator.insert(
            [list(request.tokens[len(prefix) :])],
            [room],
            caches=[[*cache, RowCache([row])]],
            all_tokens=[list(prefix)],
            samplers=[sampler],
        )
        uid = self._next_uid
        self._next_uid += 1
        lane.uids[inner] = uid
        self._rows[uid] = _Row(lane, inner, held, request.top_logprobs)
        return uid

    def check(self, request: Request) -> int:
        """Refuse a request that the model cannot answer.

        Returns:
            Most tokens of its answer: its max_tokens, or what the context leaves.

        Raises:
            ConchError: There is no such domain, the prompt fills the context, or it has tokens
                that the model has not; or its form is refused, see `Grammars.matcher`.
        """
        if request.form is not None:
            self._grammars.matcher(request.form)
        if request.domain is not None:
            self.bank.get(request.domain)
        rows = self.bank.vocabulary_size
        if unknown := [token for token, _ in request.logit_bias if not 0 <= token < rows]:
            raise ConchError(f"logit_bias has the token {unknown[0]}: give tokens 0 to {rows - 1}")
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
        if uid not in self._rows:
            return
        row = self._rows.pop(uid)
        del row.lane.uids[row.inner]
        with mx.stream(row.lane.generator.stream):
            row.lane.generator.remove([row.inner])
        self._drop_idle()

    @interrupt_held_back()
    def step(self) -> list[Piece]:
        """One token more for every row under way; some prompts may be read first.

        Returns:
            The pieces; none where only prompts were read.
        """
        pieces: list[Piece] = []
        for lane in self._lanes:
            if lane.uids:
                pieces += self._pieces(lane, lane.next())
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
        if self._rows:
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

    def abandon(self) -> None:
        """Forget all requests after a failure, and whatever it may have left broken."""
        lanes, self._lanes, self._rows = self._lanes, [], {}
        for owner in (*self.bank.names, None):
            self.prefixes.forget(owner)
        for lane in lanes:
            with suppress(RuntimeError, ValueError):
                lane.generator.close()
        mx.clear_cache()

    def close(self) -> None:
        """Forget all requests and free what they hold."""
        for uid in list(self._rows):
            self.cancel(uid)
        for lane in self._lanes:
            lane.generator.close()
        self._lanes = []

    def _lane(self, domain: str | None) -> _Lane:
        """The generator that takes a domain's new requests."""
        from mlx_lm.generate import BatchGenerator

        names = self.bank.names if self.shares_batches else [domain]
        self._drop_idle()
        for lane in self._lanes:
            if lane.model.names == (*names, None) and lane.version == self.bank.version:
                return lane
        model = RoutedModel(self.bank, names)
        rows = self.max_batch if takes_unequal_rows(self.bank.base) else 1
        generator = BatchGenerator(
            model,
            stop_tokens=[[token] for token in self.bank.base.tokenizer.eos_token_ids],
            sampler=self._greedy,
            completion_batch_size=rows,
            prefill_batch_size=min(PREFILL_ROWS, rows),
        )
        self._lanes.append(_Lane(self.bank.version, model, generator))
        return self._lanes[-1]

    def _drop_idle(self) -> None:
        """Close the generators of earlier adapters that have nothing left to do."""
        for lane in [lane for lane in self._lanes if lane.version != self.bank.version]:
            if not lane.uids:
                lane.generator.close()
                self._lanes.remove(lane)

    def _pieces(self, lane: _Lane, responses: Sequence[Any]) -> list[Piece]:
        if not responses:
            return []
        uids = [lane.uids[response.uid] for response in responses]
        rows = [self._rows[uid] for uid in uids]
        # One transfer for the whole batch.
        figures = mx.stack(
            [response.logprobs[response.token] for response in responses]
            + [row.held.removed.popleft() for row in rows if row.held is not None]
        )
        log_probs, removed = np.split(np.asarray(figures), [len(uids)])
        shares = iter(removed.tolist())
        pieces = []
        for uid, row, response, log_prob in zip(uids, rows, responses, log_probs, strict=True):
            share = next(shares) if row.held is not None else None
            token, reason = int(response.token), response.finish_reason
            top = _likeliest(response.logprobs, row.top) if row.top else ()
            pieces.append(Piece(uid, token, float(log_prob), reason, share, top))
            if reason is not None:
                del lane.uids[response.uid]
                del self._rows[uid]
        return pieces


def _likeliest(log_probs: mx.array, count: int) -> tuple[tuple[int, float], ...]:
    """So many tokens of `[tokens]` with their log-probabilities, the likeliest first."""
    found = np.asarray(log_probs)
    # To sort a whole vocabulary for every token of every row takes longer than the model.
    least = np.partition(found, -count)[-count] if count < len(found) else -np.inf
    candidates = np.flatnonzero(found >= least)
    best = candidates[np.argsort(-found[candidates], kind="stable")[:count]]
    return tuple((int(token), float(found[token])) for token in best)
