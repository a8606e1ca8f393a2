"""Targets of a teacher behind a URL against those of the same one in memory, over loopback.

    python tests/benchmarks/far_teacher.py [--model NAME] [--texts 40]

Once by `conch-dna teach serve`, once as a server of others, by `prompt_logprobs`: largest
differences, KL between both, and tokens a second.
"""

import conch_dna  # noqa: F401  # isort: skip  (loads a BLAS before mlx)

import argparse
import os
import tempfile
import time
from typing import Any

import numpy as np
from _ratios import note_ratio
from _setting import print_setting, stories

from conch_dna.language_model import ModelSource
from conch_dna.screen.progress import silent
from conch_dna.training.data.outcomes import compute_targets, target_identity
from conch_dna.training.data.records import fitting, tokenize_records
from conch_dna.training.machines.far.teacher import teacher_source
from conch_dna.training.settings import KDConfig
from suites import teaching

Targets = list[dict[str, np.ndarray]]
SERVERS: dict[str, tuple[tuple[str, ...], float]] = {
    "teach serve": ((), 2.0),
    "prompt_logprobs": (("/v1/teacher",), 1.0),
}


def differences(there: Targets, here: Targets) -> dict[str, float]:
    """The largest of each array, what share of the texts keeps the same ids, and the mean KL."""
    found: dict[str, float] = {}
    kls = []
    for far, near in zip(there, here, strict=True):
        for name in near:
            if not name.endswith("ids"):
                difference = float(np.abs(far[name].astype(np.float64) - near[name]).max())
                found[name] = max(found.get(name, 0.0), difference)
        p, q = (
            np.concatenate([each["kept_log_probs"], each["log_rest"][:, :1]], axis=1)
            for each in (near, far)
        )
        kls.append((np.exp(p) * (p - q)).sum(axis=1))
    same = [np.array_equal(a["kept_ids"], b["kept_ids"]) for a, b in zip(there, here, strict=True)]
    return {**found, "same ids": float(np.mean(same)), "KL": float(np.concatenate(kls).mean())}


def main() -> None:
    """Print a line of each kind of server."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded:teacher")
    parser.add_argument("--texts", type=int, default=40)
    args = parser.parse_args()
    print_setting(f"{args.model} over loopback")
    local = ModelSource(args.model)
    texts = tokenize_records(stories("train", args.texts), local.tokenizer)
    examples = [texts[index] for index in fitting(texts, 512, skip=True)]
    tokens = sum(example.count for example in examples)
    how: dict[str, Any] = {"batch_size": 4, "report": silent}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["CONCH_DNA_CACHE"] = cache
        for name, (lacking, temperature) in SERVERS.items():
            with teaching(args.model, without=lacking) as server:
                far = teacher_source(server.url, tokenizer=args.model if lacking else "")
                identity = target_identity(far, top_k=64, temperature=temperature)
                far.require_outcomes(identity, KDConfig())
                began = time.perf_counter()
                there = far.resident().targets(examples, identity, **how)
                served = time.perf_counter() - began
            model = local.resident()
            began = time.perf_counter()
            here = compute_targets(model, examples, identity, **how)
            alone = time.perf_counter() - began
            note_ratio(f"speed, {name} over local targets", [alone / served], "none")
            found = differences(there, here)
            shown = ", ".join(f"{key} {value:.2g}" for key, value in found.items())
            print(
                f"  {name}: {tokens:,} tokens, {tokens / served:,.0f} a second, locally "
                f"{tokens / alone:,.0f}; differences: {shown}",
                flush=True,
            )


if __name__ == "__main__":
    main()
