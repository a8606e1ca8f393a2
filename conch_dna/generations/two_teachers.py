"""What one or two teachers say about a batch, as one target, and the loss of a student of it.

Knows caches of soft targets and a batch of examples; nothing of the models behind them. Only one
target is laid over each token, so training costs what one teacher costs.
To add a strategy: its number in `blending.Strategy`, and its rows in `TwoTeacherTargets.collate`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from conch_dna.checkpoints import content_digest
from conch_dna.generations.blending import (
    Outcomes,
    Strategy,
    all_outcomes,
    choose,
    common_outcomes,
    confidence,
    disagreement,
    mixture,
    shares,
    weights_of,
)
from conch_dna.generations.settings import BlendSettings, EvolveConfig
from conch_dna.generations.taboo import TabooTokens
from conch_dna.language_model import LanguageModel, ModelSource
from conch_dna.losses import LOSSES, forward_kl, kept_and_rest, token_cross_entropy
from conch_dna.training.batches import Batch, Example, round_up
from conch_dna.training.cross_tokenizer.records import AlignedExample
from conch_dna.training.data.soft_targets import Targets
from conch_dna.training.head_loss import (
    Sums,
    autodiff,
    forward_kl_and_gradient,
    make_logit_loss,
    with_nothing,
)
from conch_dna.training.optimizer.steps import Loss

EXCLUDED_MULTIPLE = 16
ROWS = (
    "kept_ids",
    "teacher_log_probs",
    "first_log_probs",
    "agreement",
    "labels",
    "weights",
    "kd_weights",
    "ce_weights",
)
COUNTS = ("tokens", "blended", "t1_only", "gold_fallback", "skipped", "js", "first_weight")
"""Sums over the counted tokens of a batch, skipped ones among them, that the log shows."""


@dataclass(frozen=True, eq=False)
class TeacherCache:
    """A teacher's targets, asked for by the student's own examples.

    A teacher with another tokenizer says something where both have one token for the same text.

    Attributes:
        targets: The cache.
        aligned: The teacher's example for the digest of each of the student's; None where its
            tokenizer is the student's.
    """

    targets: Targets
    aligned: Mapping[str, AlignedExample] | None = None

    @property
    def digest(self) -> str:
        """Content address of the teacher's targets and of how they are laid."""
        own = self.targets.digest
        return own if self.aligned is None else content_digest("foreign", own)

    def examples(self, examples: Sequence[Example]) -> Sequence[Example | AlignedExample]:
        """The teacher's examples of the same texts."""
        if self.aligned is None:
            return examples
        return [self.aligned[example.digest] for example in examples]

    def collate(self, examples: Sequence[Example], temperature: float) -> Batch:
        """A batch of the student's examples with this teacher's targets."""
        return self.targets.collate(self.examples(examples), temperature)


@dataclass(frozen=True, eq=False)
class _Opinion:
    """What one teacher says of a batch's tokens, without those that nobody may teach.

    Attributes:
        soft: At the temperature of the targets.
        plain: At temperature 1, by which agreement is told.
        sure: Its confidence `[N]`.
        heard: Where it says something `[N]`.
    """

    soft: Outcomes
    plain: Outcomes
    sure: np.ndarray
    heard: np.ndarray


class TwoTeacherTargets:
    """The targets of a student of two teachers, from a cache of each.

    Args:
        first: The parent's.
        second: The grandparent's; None where there is none, and the parent teaches alone.
        student: For its number of tokens.
        settings: How two become one.
        taboo: What neither teacher may teach; None for nothing.
    """

    def __init__(
        self,
        first: TeacherCache,
        second: TeacherCache | None,
        student: ModelSource,
        settings: BlendSettings,
        taboo: TabooTokens | None = None,
    ) -> None:
        self.first = first
        self.second = second
        self.settings = settings
        self.taboo = taboo or None
        self.nothing = student.token_count

    @property
    def digest(self) -> str:
        """Content address of both caches and of how they are put together."""
        taboo = [*map(repr, self.taboo.spellings), *map(str, self.taboo.ids)] if self.taboo else []
        return content_digest(
            self.first.digest,
            self.second.digest if self.second else "",
            repr(asdict(self.settings)),
            *taboo,
        )

    def collate(self, examples: Sequence[Example], temperature: float) -> Batch:
        """A batch of examples with one target for each token.

        Returns:
            Besides `batches.collate`, with weights of 0 for skipped tokens, which do not count:
            `kept_ids` int32 `[N, K]` (the student's number of tokens stands for none) and
            `teacher_log_probs` `[N, K + 1]` of the target; `first_log_probs` `[N, K + 1]`, the
            first teacher's, and `agreement` `[N]`, 1 - JS; `strategy` int32 `[N]`; `kd_weights`
            and `ce_weights` `[N]`; `gold_weights` `[N]`, where the text alone teaches; the sums
            COUNTS; and with taboo words `excluded_ids` `[N, M]`.
        """
        batch = self.first.collate(examples, temperature)
        real = batch.arrays["weights"] > 0
        excluded, spelled = self._excluded(examples, len(real))
        gold = real & ~spelled
        own = self._opinion(self.first, batch, examples, excluded)
        kept_ids, target = own.soft
        first_log_probs = target
        strategy = np.full(len(real), Strategy.BLENDED.value)
        js, first_weight = np.zeros(len(real)), np.ones(len(real))
        if self.second:
            other = self._opinion(
                self.second, self.second.collate(examples, temperature), examples, excluded
            )
            js = _numpy(disagreement(*_arrays(*all_outcomes(own.plain, other.plain, self.nothing))))
            first_weight = self._first_weight(own.sure, other.sure)
            common_ids, one, two = common_outcomes(own.soft, other.soft, self.nothing)
            blended = _numpy(mixture(*_arrays(one, two, first_weight)))
            if self.settings.gated:
                strategy = self._strategy(js, own.sure, gold)
            # Where the second says nothing, the first teaches alone.
            strategy = np.where(other.heard, strategy, Strategy.T1_ONLY.value)
            js = np.where(other.heard, js, 0.0)
            first_weight = np.where(other.heard, first_weight, 1.0)
            both = (strategy == Strategy.BLENDED)[:, None]
            kept_ids = np.where(both, common_ids, kept_ids)
            first_log_probs = np.where(both, one, target)
            target = np.where(both, blended, target)
        # Where nothing that may be taught is left, the text teaches, if it may.
        empty = ~np.isfinite(target.max(axis=-1)) | ~own.heard
        fallback = np.where(gold, Strategy.GOLD_FALLBACK.value, Strategy.SKIP.value)
        strategy = np.where(empty, fallback, strategy)
        # A part of a taboo word is taught by nobody.
        strategy = np.where(gold, strategy, Strategy.SKIP.value)
        # A row that is not compared has all its mass in the rest, on both sides.
        compared = np.isin(strategy, (Strategy.BLENDED, Strategy.T1_ONLY))[:, None]
        nowhere = np.full(target.shape[-1], -np.inf, np.float32)
        nowhere[-1] = 0
        arrays = {
            **batch.arrays,
            "kept_ids": np.where(compared, kept_ids, self.nothing).astype(np.int32),
            "teacher_log_probs": np.where(compared, target, nowhere).astype(np.float32),
            "first_log_probs": np.where(compared, first_log_probs, nowhere).astype(np.float32),
            "agreement": (1 - js).astype(np.float32),
            "strategy": strategy.astype(np.int32),
            **self._weights(strategy),
            **_counts(strategy[real], js[real], first_weight[real]),
        }
        if self.taboo:
            arrays["excluded_ids"] = excluded
        return replace(batch, arrays=arrays, count=int((strategy != Strategy.SKIP).sum()))

    def _opinion(
        self,
        teacher: TeacherCache,
        batch: Batch,
        examples: Sequence[Example],
        excluded: np.ndarray,
    ) -> _Opinion:
        plain = self._without(teacher.collate(examples, 1.0).arrays, excluded)
        ids, log_probs = plain
        (logs,) = _arrays(log_probs)
        rest_tokens = max(1, self.nothing - ids.shape[1])
        everywhere = np.ones(len(ids), np.float32)
        return _Opinion(
            soft=self._without(batch.arrays, excluded),
            plain=plain,
            sure=_numpy(confidence(logs, self.settings.method, rest_tokens=rest_tokens)),
            heard=np.asarray(batch.arrays.get("soft_weights", everywhere) > 0),
        )

    def _strategy(self, js: np.ndarray, sure: np.ndarray, gold: np.ndarray) -> np.ndarray:
        distance, certainty = _arrays(js, sure)
        strategy = choose(
            distance,
            certainty,
            mx.array(gold),
            js_threshold=self.settings.js_threshold,
            confidence_threshold=self.settings.confidence_threshold,
        )
        return _numpy(strategy)

    def _weights(self, strategy: np.ndarray) -> dict[str, np.ndarray]:
        """Weights of each token, of its divergence, and of its cross-entropy.

        Where the text alone teaches, its cross-entropy stands in for the divergence as well; that
        part comes apart in `gold_weights`, so that shares of both stay the caller's.
        """
        weight = _numpy(weights_of(mx.array(strategy), self.settings.gold_weight))
        by_text = strategy == Strategy.GOLD_FALLBACK
        parts = {
            "weights": (strategy != Strategy.SKIP),
            "kd_weights": np.where(by_text, 0.0, weight),
            "ce_weights": weight,
            "gold_weights": np.where(by_text, weight, 0.0),
        }
        return {name: value.astype(np.float32) for name, value in parts.items()}

    def _first_weight(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        if self.settings.first_share is not None:
            return np.full(len(first), self.settings.first_share)
        return _numpy(shares(*_arrays(first, second))[0])

    def _excluded(self, examples: Sequence[Example], rows: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that no teacher may teach `[N, M]`, and whether a label spells taboo `[N]`."""
        spelled = np.zeros(rows, bool)
        if not self.taboo:
            return np.full((rows, 0), self.nothing, np.int32), spelled
        banned: list[np.ndarray] = []
        for example in examples:
            ids, start = example.ids.tolist(), len(banned)
            by_place = self.taboo.excluded(ids)
            banned += [by_place[place] for place in np.flatnonzero(example.counted)]
            spelled[start : len(banned)] = self.taboo.spelled(ids)[example.counted]
        width = round_up(max([1, *map(len, banned)]), EXCLUDED_MULTIPLE)
        excluded = np.full((rows, width), self.nothing, np.int32)
        for row, tokens in enumerate(banned):
            excluded[row, : len(tokens)] = tokens
        return excluded, spelled

    def _without(self, arrays: dict[str, np.ndarray], excluded: np.ndarray) -> Outcomes:
        """A teacher's outcomes without the excluded tokens, the others scaled up."""
        ids, log_probs = arrays["kept_ids"].astype(np.int64), arrays["teacher_log_probs"]
        if not excluded.shape[1]:
            return ids, log_probs
        out = (ids[:, :, None] == excluded[:, None, :]).any(axis=-1)
        kept = np.where(out, -np.inf, log_probs[:, :-1])
        left = np.concatenate([kept, log_probs[:, -1:]], axis=1)
        total = np.logaddexp.reduce(left, axis=1, keepdims=True)
        with np.errstate(invalid="ignore"):
            scaled = np.where(np.isfinite(total), left - total, -np.inf)
        return np.where(out, self.nothing, ids), scaled


def _arrays(*values: np.ndarray) -> tuple[mx.array, ...]:
    return tuple(mx.array(value.astype(np.float32)) for value in values)


def _numpy(value: mx.array) -> np.ndarray:
    return np.asarray(value)


def _counts(strategy: np.ndarray, js: np.ndarray, first: np.ndarray) -> dict[str, np.ndarray]:
    """The sums of COUNTS, in their order."""
    by_strategy = [(strategy == kind).sum() for kind in Strategy]
    named = zip(COUNTS, [len(strategy), *by_strategy, js.sum(), first.sum()], strict=True)
    return {f"sum_{name}": np.array(value, np.float32) for name, value in named}


def two_teacher_sums(logits: mx.array, targets: Sums, config: EvolveConfig, nothing: int) -> Sums:
    """`hard + beta t² D(p̄‖q) + gamma R`, summed over tokens; differentiable.

    `R = (1 - JS) KL(p₁‖q)` at temperature t, over the outcomes of the token's target.

    Args:
        logits: Student's `[n, V]` over the real tokens.
        targets: A batch of `TwoTeacherTargets`, whose `ce_weights` are those of `hard`, the
            cross-entropy.
        config: beta, gamma, temperature and divergence.
        nothing: The id that stands for no token.

    Returns:
        `loss`, `kd` (with its t²), `hard` and `regularizer`: sums in nats.
    """
    temperature = config.training.temperature
    compared = with_nothing(logits.astype(mx.float32), nothing)
    if "excluded_ids" in targets:
        # Excluded on both sides: a rest with them in it would teach them.
        compared = mx.put_along_axis(compared, targets["excluded_ids"], mx.array(-mx.inf), axis=-1)
    student = kept_and_rest(compared, targets["kept_ids"], temperature)
    weights = targets["kd_weights"]
    divergences = LOSSES[config.training.divergence](targets["teacher_log_probs"], student)
    kd = temperature**2 * (divergences * weights).sum()
    stay = forward_kl(targets["first_log_probs"], student) * targets["agreement"]
    regularizer = (stay * weights).sum()
    hard = (token_cross_entropy(logits, targets["labels"]) * targets["ce_weights"]).sum()
    loss = hard + config.beta * kd + config.gamma * regularizer
    return {"loss": loss, "kd": kd, "hard": hard, "regularizer": regularizer}


def make_two_teacher_loss(
    student: LanguageModel, config: EvolveConfig, *, with_taboo: bool = False
) -> Loss:
    """The loss over batches of `TwoTeacherTargets`, for the trainer.

    `hard` is `alpha CE` of every taught token, and `beta CE` more where the text alone teaches:
    there the text's token is the target, at temperature 1.

    Args:
        student: Loaded model, adapter attached.
        config: Shares of the parts, temperature, divergence and chunk of the loss.
        with_taboo: Whether the batches name excluded tokens.

    Returns:
        `loss(model, arrays)` with the sums of `two_teacher_sums` and COUNTS.
    """
    nothing = student.source.token_count
    sums_of = partial(two_teacher_sums, config=config, nothing=nothing)

    def closed(logits: mx.array, targets: Sums) -> tuple[Sums, mx.array]:
        sums, gradient = forward_kl_and_gradient(
            with_nothing(logits.astype(mx.float32), nothing),
            targets,
            temperature=config.training.temperature,
            alpha=config.beta,
            hard=1.0,
        )
        named = {"loss": sums["loss"], "kd": sums["kd"], "hard": sums["ce"]}
        return named, gradient[:, : logits.shape[-1]]

    plain = config.training.divergence == "forward_kl" and config.gamma == 0 and not with_taboo
    names = [*ROWS, *(["excluded_ids"] if with_taboo else [])]
    rule = closed if plain else autodiff(sums_of)
    loss = make_logit_loss(student, names, sums_of, rule, memory=config.training.loss_memory)

    def with_counts(model: nn.Module, arrays: Sums) -> Sums:
        hard = config.alpha * arrays["ce_weights"] + config.beta * arrays["gold_weights"]
        sums = loss(model, {**arrays, "ce_weights": hard})
        return {**sums, **{name: arrays[f"sum_{name}"] for name in COUNTS}}

    return with_counts
