"""What two teachers' caches say together about a batch, and the loss of a student of both.

Knows two caches of soft targets and a batch of examples; nothing of the models behind them. Only
one target is laid over each token, so training costs what one teacher costs.
To add a strategy: its number in `blending.Strategy`, and its rows in `TwoTeacherTargets.collate`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from conch_dna.digests import content_digest
from conch_dna.errors import ConchError
from conch_dna.generations.blending import (
    CONFIDENCES,
    Strategy,
    all_outcomes,
    blend,
    choose,
    common_outcomes,
    confidence,
    disagreement,
    shares,
    weights_of,
)
from conch_dna.generations.taboo import TabooTokens
from conch_dna.language_model import LanguageModel, ModelSource
from conch_dna.losses import LOSSES, forward_kl, kept_and_rest, token_cross_entropy
from conch_dna.training.batches import Batch, Example, round_up
from conch_dna.training.head_loss import (
    Sums,
    autodiff,
    forward_kl_and_gradient,
    make_logit_loss,
    with_nothing,
)
from conch_dna.training.soft_targets import Targets
from conch_dna.training.trainer import Loss

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


@dataclass(frozen=True, kw_only=True)
class BlendSettings:
    """How two teachers become one target.

    Attributes:
        js_threshold: Below it the teachers agree, and both teach; between 0 and 1.
        confidence_threshold: Above it the first teacher teaches alone; between 0 and 1.
        gold_weight: Weight of a token that only the text teaches.
        method: See `blending.confidence`.
        gated: Whether disagreement counts; without it every token is blended.
        first_share: The first teacher's share of every blend, between 0 and 1; None for one in
            proportion to confidence.
    """

    js_threshold: float = 0.1
    confidence_threshold: float = 0.8
    gold_weight: float = 0.5
    method: str = "top1"
    gated: bool = True
    first_share: float | None = None

    def __post_init__(self) -> None:
        limits = {
            "js_threshold": self.js_threshold,
            "confidence_threshold": self.confidence_threshold,
            "gold_weight": self.gold_weight,
            "first_share": 0.0 if self.first_share is None else self.first_share,
        }
        problems = [
            f"{name} {value:g} is not between 0 and 1"
            for name, value in limits.items()
            if not 0 <= value <= 1
        ]
        if self.method not in CONFIDENCES:
            problems.append(f"method {self.method!r} is not one of {', '.join(CONFIDENCES)}")
        if problems:
            raise ConchError("; ".join(problems))


class TwoTeacherTargets:
    """The targets of a student of two teachers, from a cache of each.

    Args:
        first: The parent's.
        second: The grandparent's; None where there is none, and the parent teaches alone.
        student: For its number of tokens.
        settings: See `BlendSettings`.
        taboo: What neither teacher may teach; None for nothing.
    """

    def __init__(
        self,
        first: Targets,
        second: Targets | None,
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
        plain = self.first.collate(examples, 1.0).arrays
        real = batch.arrays["weights"] > 0
        told = _told(batch)
        excluded, spelled = self._excluded(examples, len(real))
        gold = real & ~spelled
        own = self._without(batch.arrays, excluded)
        own_plain = self._without(plain, excluded)
        sure = self._confidence(*own_plain)
        strategy = np.full(len(real), Strategy.BLENDED.value)
        js, first_weight = np.zeros(len(real)), np.ones(len(real))
        kept_ids, target = own
        first_log_probs = target
        if self.second:
            second = self.second.collate(examples, temperature)
            other = self._without(second.arrays, excluded)
            other_plain = self._without(self.second.collate(examples, 1.0).arrays, excluded)
            js = _numpy(disagreement(*_arrays(*all_outcomes(own_plain, other_plain, self.nothing))))
            first_weight = self._first_weight(sure, self._confidence(*other_plain))
            common_ids, one, two = common_outcomes(own, other, self.nothing)
            blended = _numpy(blend(*_arrays(one, two, first_weight)))
            if self.settings.gated:
                distance, certainty = _arrays(js, sure)
                strategy = _numpy(
                    choose(
                        distance,
                        certainty,
                        mx.array(gold),
                        js_threshold=self.settings.js_threshold,
                        confidence_threshold=self.settings.confidence_threshold,
                    )
                )
            # Where the second says nothing, the first teaches alone.
            heard = _told(second)
            strategy = np.where(heard, strategy, Strategy.T1_ONLY.value)
            js, first_weight = np.where(heard, js, 0.0), np.where(heard, first_weight, 1.0)
            both = (strategy == Strategy.BLENDED)[:, None]
            kept_ids = np.where(both, common_ids, kept_ids)
            first_log_probs = np.where(both, one, target)
            target = np.where(both, blended, target)
        # Where nothing that may be taught is left, the text teaches, if it may.
        empty = ~np.isfinite(target.max(axis=-1)) | ~told
        fallback = np.where(gold, Strategy.GOLD_FALLBACK.value, Strategy.SKIP.value)
        strategy = np.where(empty, fallback, strategy)
        # A part of a taboo word is taught by nobody.
        strategy = np.where(real & spelled, Strategy.SKIP.value, strategy)
        strategy = np.where(real, strategy, Strategy.SKIP.value)
        # A row that is not compared has all its mass in the rest, on both sides.
        compared = (strategy == Strategy.BLENDED) | (strategy == Strategy.T1_ONLY)
        nowhere = np.full(target.shape[-1], -np.inf, np.float32)
        nowhere[-1] = 0
        arrays = {
            **batch.arrays,
            "kept_ids": np.where(compared[:, None], kept_ids, self.nothing).astype(np.int32),
            "teacher_log_probs": np.where(compared[:, None], target, nowhere).astype(np.float32),
            "first_log_probs": np.where(compared[:, None], first_log_probs, nowhere).astype(
                np.float32
            ),
            "agreement": (1 - js).astype(np.float32),
            "strategy": strategy.astype(np.int32),
            **self._weights(strategy),
            **_counts(strategy[real], js[real], first_weight[real]),
        }
        if self.taboo:
            arrays["excluded_ids"] = excluded
        taught = int((strategy != Strategy.SKIP).sum())
        return replace(batch, arrays=arrays, count=taught)

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

    def _confidence(self, ids: np.ndarray, log_probs: np.ndarray) -> np.ndarray:
        rest = max(1, self.nothing - ids.shape[1])
        (logs,) = _arrays(log_probs)
        return _numpy(confidence(logs, self.settings.method, rest_tokens=rest))

    def _excluded(self, examples: Sequence[Example], rows: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that no teacher may teach `[N, M]`, and whether a label spells taboo `[N]`."""
        spelled = np.zeros(rows, bool)
        if not self.taboo:
            return np.full((rows, 0), self.nothing, np.int32), spelled
        found: list[np.ndarray] = []
        marks = []
        for example in examples:
            excluded = self.taboo.excluded(example.ids.tolist())
            found += [excluded[at] for at in np.flatnonzero(example.counted)]
            marks.append(self.taboo.spelled(example.ids.tolist())[example.counted])
        width = round_up(max([1, *(len(tokens) for tokens in found)]), EXCLUDED_MULTIPLE)
        laid = np.full((rows, width), self.nothing, np.int32)
        for row, tokens in enumerate(found):
            laid[row, : len(tokens)] = tokens
        spelled[: len(found)] = np.concatenate(marks)
        return laid, spelled

    def _without(
        self, arrays: dict[str, np.ndarray], excluded: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
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


def _told(batch: Batch) -> np.ndarray:
    """Where a teacher says something `[N]`: everywhere, if its tokenizer is the student's."""
    everywhere = np.ones(len(batch.arrays["labels"]), np.float32)
    return np.asarray(batch.arrays.get("soft_weights", everywhere) > 0)


def _arrays(*values: np.ndarray) -> tuple[mx.array, ...]:
    return tuple(mx.array(value.astype(np.float32)) for value in values)


def _numpy(value: mx.array) -> np.ndarray:
    return np.asarray(value)


def _counts(strategy: np.ndarray, js: np.ndarray, first: np.ndarray) -> dict[str, np.ndarray]:
    """The sums of COUNTS, in their order."""
    values = [
        len(strategy),
        *((strategy == kind).sum() for kind in Strategy),
        js.sum(),
        first.sum(),
    ]
    named = zip(COUNTS, values, strict=True)
    return {f"sum_{name}": np.array(value, np.float32) for name, value in named}


def two_teacher_sums(
    logits: mx.array,
    targets: Sums,
    *,
    temperature: float,
    beta: float,
    gamma: float,
    divergence: str,
    nothing: int,
) -> Sums:
    """`hard + beta t² D(p̄‖q) + gamma R`, summed over tokens; differentiable.

    `R = (1 - JS) KL(p₁‖q)` at temperature t, over the outcomes of the token's target.

    Args:
        logits: Student's `[n, V]` over the real tokens.
        targets: See `TwoTeacherTargets.collate`; `ce_weights` are those of `hard`, the
            cross-entropy.
        temperature: t.
        beta: Share of the target.
        gamma: Share of the regularizer.
        divergence: A key of LOSSES.
        nothing: The id that stands for no token.

    Returns:
        `loss`, `kd` (with its t²), `hard` and `regularizer`: sums in nats.
    """
    extended = with_nothing(logits.astype(mx.float32), nothing)
    compared = extended
    if "excluded_ids" in targets:
        # Excluded on both sides: a rest with them in it would teach them.
        compared = mx.put_along_axis(extended, targets["excluded_ids"], mx.array(-mx.inf), axis=-1)
    student = kept_and_rest(compared, targets["kept_ids"], temperature)
    weights = targets["kd_weights"]
    divergences = LOSSES[divergence](targets["teacher_log_probs"], student)
    kd = temperature**2 * (divergences * weights).sum()
    stay = forward_kl(targets["first_log_probs"], student) * targets["agreement"]
    regularizer = (stay * weights).sum()
    hard = (token_cross_entropy(logits, targets["labels"]) * targets["ce_weights"]).sum()
    loss = hard + beta * kd + gamma * regularizer
    return {"loss": loss, "kd": kd, "hard": hard, "regularizer": regularizer}


def make_two_teacher_loss(
    student: LanguageModel,
    *,
    temperature: float = 2.0,
    alpha: float = 0.1,
    beta: float = 0.9,
    gamma: float = 0.0,
    divergence: str = "forward_kl",
    with_taboo: bool = False,
    chunk: int = 1024,
) -> Loss:
    """The loss over batches of `TwoTeacherTargets`, for the trainer.

    `hard` is `alpha CE` of every taught token, and `beta CE` more where the text alone teaches:
    there the text's token is the target, at temperature 1.

    Args:
        student: Loaded model, adapter attached.
        temperature: t of the targets.
        alpha: Share of cross-entropy.
        beta: Share of the target.
        gamma: Share of the regularizer, see `two_teacher_sums`.
        divergence: A key of LOSSES.
        with_taboo: Whether the batches name excluded tokens.
        chunk: Tokens whose logits exist at once; 0 takes all.

    Returns:
        `loss(model, arrays)` with the sums of `two_teacher_sums` and COUNTS.
    """
    nothing = student.source.token_count
    sums_of = partial(
        two_teacher_sums,
        temperature=temperature,
        beta=beta,
        gamma=gamma,
        divergence=divergence,
        nothing=nothing,
    )

    def closed(logits: mx.array, targets: Sums) -> tuple[Sums, mx.array]:
        extended = with_nothing(logits.astype(mx.float32), nothing)
        sums, gradient = forward_kl_and_gradient(
            extended, targets, temperature=temperature, alpha=beta, hard=1.0
        )
        named = {"loss": sums["loss"], "kd": sums["kd"], "hard": sums["ce"]}
        return named, gradient[:, : logits.shape[-1]]

    plain = divergence == "forward_kl" and gamma == 0 and not with_taboo
    names = [*ROWS, *(["excluded_ids"] if with_taboo else [])]
    loss = make_logit_loss(
        student, names, sums_of, closed if plain else autodiff(sums_of), chunk=chunk
    )

    def with_counts(model: nn.Module, arrays: Sums) -> Sums:
        hard = alpha * arrays["ce_weights"] + beta * arrays["gold_weights"]
        sums = loss(model, {**arrays, "ce_weights": hard})
        return {**sums, **{name: arrays[f"sum_{name}"] for name in COUNTS}}

    return with_counts
