"""Memory and time of what is as wide as the vocabulary: losses, targets, classes of tokens.

    python tests/benchmarks/big_vocabulary.py [--model FOLDER] [--tokens 2048] [--only NAME ...]

Random hidden states and heads, float32. Peaks are of MLX's own count, beside what was there before.
With a model also: what its targets take beside its bare forward pass over the same texts.
"""

import conch_dna  # noqa: F401  # isort: skip  (loads a BLAS before mlx)

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from _ratios import note_ratio
from _setting import print_setting, stories
from rich.console import Console

from conch_dna.language_model import ModelSource
from conch_dna.loading.output_head import LOGIT_ARRAYS, rows_at_once
from conch_dna.losses import LOSSES
from conch_dna.screen.presentation import text_table
from conch_dna.screen.progress import silent
from conch_dna.training.batches import collate, sequential_batches
from conch_dna.training.cross_tokenizer.loss import ARRAYS, class_sum
from conch_dna.training.data.outcomes import compress, compute_targets, target_identity
from conch_dna.training.data.records import fitting, tokenize_records
from conch_dna.training.head_loss import (
    autodiff,
    chunked_loss,
    distillation_sums,
    forward_kl_and_gradient,
)
from conch_dna.training.settings import LOSS_MEMORY

WIDTH, KEPT, BIG, SMALL = 896, 64, 151_936, 32_000
OPTIONS: dict[str, Any] = {"temperature": 2.0, "alpha": 0.7}


class Head:
    """A head of so many tokens, hidden states of some positions, and their targets."""

    def __init__(self, vocabulary: int, tokens: int) -> None:
        mx.random.seed(0)
        self.vocabulary, self.tokens = vocabulary, tokens
        self.weight = mx.random.normal((vocabulary, WIDTH)) * 0.05
        self.hidden = mx.random.normal((tokens, WIDTH))
        kept = mx.argsort(mx.random.normal((tokens, 4 * KEPT)), axis=-1)[:, :KEPT] * 7 + 3
        teacher = mx.random.normal((tokens, KEPT + 1))
        self.targets = {
            "kept_ids": kept.astype(mx.int32),
            "teacher_log_probs": teacher - mx.logsumexp(teacher, axis=-1, keepdims=True),
            "labels": mx.random.randint(0, vocabulary, (tokens,)),
            "weights": mx.ones(tokens),
        }
        mx.eval(self.weight, self.hidden, self.targets)

    def __call__(self, states: mx.array) -> mx.array:
        return states @ self.weight.T

    def loss(self, divergence: str, chunk: int) -> Callable[[], Any]:
        """Loss and gradient by the hidden states."""
        sums_of = partial(distillation_sums, divergence=divergence, **OPTIONS)
        closed = partial(forward_kl_and_gradient, **OPTIONS)
        rule = closed if divergence == "forward_kl" else autodiff(sums_of)

        def total(states: mx.array) -> mx.array:
            return chunked_loss(self, states, self.targets, rule, chunk).sums["loss"]

        return lambda: mx.value_and_grad(total)(self.hidden)

    def classes(self) -> Callable[[], Any]:
        """The same for classes of tokens, a third of which are roots."""
        random = np.random.default_rng(0)
        third = self.vocabulary // 3
        roots = random.integers(-1, third, self.vocabulary)
        roots[:third] = np.arange(third)
        none = mx.full((self.tokens, KEPT), self.vocabulary, dtype=mx.int32)
        rows = {
            **self.targets,
            "soft_weights": mx.ones(self.tokens),
            "inner_known": mx.zeros(self.tokens),
            "inner_log_probs": mx.full((self.tokens, 8), -mx.inf),
            "inner_blank": mx.zeros((self.tokens, 4)),
            "outcome_places": mx.full((self.tokens, 8), 4, dtype=mx.int32),
            "inner_tokens": none,
            "inner_outcomes": mx.full((self.tokens, KEPT), 8, dtype=mx.int32),
            "inner_places": mx.full((self.tokens, KEPT), 4, dtype=mx.int32),
            "over_own": none[:, 0],
            "over_tokens": none,
            "over_columns": mx.full((self.tokens, KEPT), KEPT, dtype=mx.int32),
        }
        mx.eval(rows)
        how: dict[str, Any] = {"divergence": "forward_kl", "nothing": self.vocabulary}
        rule = autodiff(lambda x, own: {"loss": class_sum(x, own, roots=roots, **how)})
        chunk = rows_at_once(LOSS_MEMORY, self.vocabulary, ARRAYS)

        def total(states: mx.array) -> mx.array:
            more: dict[str, Any] = {"with_gold": True, "before": 1}
            found = chunked_loss(self, states, rows, rule, chunk, **more)
            return found.sums["loss"] - found.gold.sum()

        return lambda: mx.value_and_grad(total)(self.hidden)

    def stored(self, chunk: int) -> Callable[[], Any]:
        """What of a teacher's logits is stored, a chunk at a time."""

        def all_chunks() -> list[Any]:
            found = []
            for start in range(0, self.tokens, chunk):
                part = slice(start, start + chunk)
                labels = self.targets["labels"][part]
                logits = self(self.hidden[part])
                found.append(compress(logits, labels, top_k=KEPT, temperatures=(1.0, 2.0)))
                mx.eval(found[-1])
            return found

        return all_chunks


def measured(work: Callable[[], Any]) -> tuple[float, float]:
    """Peak in megabytes beside what was there, and seconds."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    began = time.perf_counter()
    mx.eval(work())
    return (mx.get_peak_memory() - before) / 1e6, time.perf_counter() - began


def peaks(tokens: int) -> list[tuple[str, ...]]:
    """Rows of what takes which memory at the big vocabulary."""
    head = Head(BIG, tokens)
    chunk = rows_at_once(LOSS_MEMORY, BIG, LOGIT_ARRAYS)
    works = {f"loss, {name}": head.loss(name, chunk) for name in sorted(LOSSES)}
    works |= {"loss, roots": head.classes(), "targets": head.stored(chunk)}
    found = []
    for name, work in works.items():
        peak, seconds = measured(work)
        found.append((name, f"{peak:.0f}", f"{1e3 * seconds / tokens:.1f}"))
        print("  ", *found[-1], sep="  ", flush=True)
    return found


def ratios(tokens: int, pairs: int) -> list[tuple[str, ...]]:
    """Time in chunks over time all at once, at a vocabulary where both are possible."""
    head = Head(SMALL, tokens)
    chunk = rows_at_once(LOSS_MEMORY, SMALL, LOGIT_ARRAYS)
    found = []
    for name in ("forward_kl", "jsd"):
        both = [
            [measured(head.loss(name, size))[1] for size in (chunk, 0)] for _ in range(pairs + 1)
        ]
        # The first is warm-up.
        values = [chunked / whole for chunked, whole in both[1:]]
        told = note_ratio(f"time, {name} in chunks over all at once", values, "at most 1.1")
        found.append((name, told))
        print("  ", *found[-1], sep="  ", flush=True)
    return found


def target_ratio(folder: str, texts: int, pairs: int) -> str:
    """Time of a model's targets over that of its logits, over the same batches."""
    source = ModelSource(folder)
    model = source.resident()
    examples = tokenize_records(stories("heldout", texts), source.tokenizer)
    examples = [examples[index] for index in fitting(examples, 512, skip=True)]
    identity = target_identity(source, top_k=KEPT, temperature=2.0)
    batches = [
        collate([examples[i] for i in indices]).arrays
        for indices in sequential_batches(examples, 4)
    ]

    def bare() -> None:
        for arrays in batches:
            mx.eval(model.logits(mx.array(arrays["inputs"])))

    def targets() -> None:
        compute_targets(model, examples, identity, batch_size=4, report=silent)

    both = []
    for _ in range(pairs + 1):
        seconds = []
        for work in (targets, bare):
            began = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - began)
        both.append(seconds)
        print("  ", f"{both[-1][0]:.1f} s and {both[-1][1]:.1f} s", flush=True)
    values = [one / other for one, other in both[1:]]
    return note_ratio("time, targets over the bare forward pass", values, "at most 1.25")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a real model, for the time of its targets")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=["peaks", "ratios", "targets"])
    args = parser.parse_args()
    print_setting(f"{args.tokens:,} tokens, {WIDTH} wide, {LOSS_MEMORY:g} MB for logits")
    console = Console(width=100)
    if "peaks" in args.only:
        columns = ("", "peak, MB", "ms a token")
        console.print(text_table(f"{BIG:,} tokens in the head", columns, peaks(args.tokens)))
    if "ratios" in args.only:
        rows = ratios(args.tokens, args.pairs)
        columns = ("", "in chunks over all at once")
        console.print(text_table(f"Time at {SMALL:,} tokens in the head", columns, rows))
    if "targets" in args.only and args.model:
        ratio = target_ratio(args.model, args.texts, args.pairs)
        print(f"targets over the bare forward pass: {ratio}")


if __name__ == "__main__":
    main()
