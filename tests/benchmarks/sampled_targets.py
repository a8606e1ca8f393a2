"""Targets of a few tokens: kept with their rest, drawn, or kept and renormalised.

    python tests/benchmarks/sampled_targets.py [--steps 300] [--seeds 3] [--kinds KIND ...]
        [--output FOLDER]

stories260K teaches its own layers 0, 2 and 4. All runs see the same batches; what differs is what
they are told of the teacher at each position. Measured: KL over all tokens on held-out stories.
What is finished is not done again.
"""

import conch_dna  # noqa: F401  # isort: skip  (loads a BLAS before mlx)

import argparse
import itertools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from _setting import print_setting, shared_data, spread, stories
from cache_error import dense_kl
from rich.console import Console

from conch_dna.checkpoints import read_json, write_json
from conch_dna.language_model import ModelSource
from conch_dna.screen.presentation import text_table
from conch_dna.training.data.records import fitting, tokenize_records
from conch_dna.training.data.soft_targets import SoftTargetCache
from conch_dna.training.settings import KDConfig
from conch_dna.training.true_kd import TrueKnowledgeDistiller
from models import keep_layers

KINDS: dict[str, dict[str, Any]] = {
    "all tokens": {"top_k": 512},
    "64 kept and the rest": {"top_k": 64},
    "16 kept and the rest": {"top_k": 16},
    "16 drawn": {"targets": "sampled", "target_draws": 16},
    "64 drawn": {"targets": "sampled", "target_draws": 64},
    "16 kept, renormalised": {"top_k": 16},
}
SETTINGS: dict[str, Any] = {
    "alpha": 1.0,
    "lora_keys": "all",
    "learning_rate": 3e-3,
    "batch_size": 8,
    "max_seq_length": 512,
    "too_long": "skip",
    "target_bits": 32,
    "val_fraction": 0.05,
    "steps_per_eval": 100,
    "steps_per_save": 100,
    "select_by": "loss",
}


@contextmanager
def renormalised() -> Iterator[None]:
    """Meanwhile what is not kept has no probability, as other programs store it."""
    real = SoftTargetCache.outcomes

    def without_rest(self: SoftTargetCache, *given: Any) -> dict[str, np.ndarray]:
        found = real(self, *given)
        kept = found["teacher_log_probs"][:, :-1]
        whole = np.logaddexp.reduce(kept, axis=1, keepdims=True)
        none = np.full_like(whole, -np.inf)
        return {**found, "teacher_log_probs": np.concatenate([kept - whole, none], axis=1)}

    with patch.object(SoftTargetCache, "outcomes", without_rest):
        yield


def main() -> None:
    """Do what is not finished, and show all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--output", type=Path, default=Path("models/sampled_targets"))
    args = parser.parse_args()
    print_setting(f"Targets of a few tokens: {args.steps} steps of {SETTINGS['batch_size']}")
    data = shared_data()
    with tempfile.TemporaryDirectory() as temporary:
        story = data / "models" / "stories260K"
        student = keep_layers(story, Path(temporary) / "student", [0, 2, 4])
        teacher = ModelSource(str(story))
        heldout = tokenize_records(stories("heldout", 60), teacher.tokenizer)
        heldout = [heldout[index] for index in fitting(heldout, 512, skip=True)]
        found: dict[str, list[float]] = {kind: [] for kind in args.kinds}
        for seed, kind in itertools.product(range(args.seeds), found):
            name = f"{kind.replace(' ', '-').replace(',', '')}-{seed}"
            path = args.output / f"{name}.json"
            if not path.is_file():
                config = KDConfig(
                    **SETTINGS,
                    **KINDS[kind],
                    num_iters=args.steps,
                    seed=seed,
                    output_dir=str(args.output / name),
                )
                distiller = TrueKnowledgeDistiller(str(story), str(student), config)
                told = renormalised() if "renormalised" in kind else patch.dict({}, {})
                with told:
                    result = distiller.distill_domain(
                        "s", data=stories("train", 600), overwrite=True
                    )
                trained = ModelSource(str(student)).load(adapter_path=Path(result.adapter_path))
                write_json(path, {"kl": dense_kl(teacher.resident(), trained, heldout)})
            found[kind].append(read_json(path, needs={"kl": float})["kl"])
            print(f"  seed {seed}, {kind}: KL {found[kind][-1]:.4f}", flush=True)
        bare = dense_kl(teacher.resident(), ModelSource(str(student)).load(), heldout)
    base = found[args.kinds[0]]
    rows = [
        (
            kind,
            spread(values, 4),
            spread([100 * (v - b) / b for v, b in zip(values, base, strict=True)], 1),
        )
        for kind, values in found.items()
    ]
    rows.insert(0, ("before", f"{bare:.4f}", ""))
    columns = ("targets", "held-out KL, nats", f"more than {args.kinds[0]}, %")
    Console(width=110).print(text_table("Targets of a few tokens", columns, rows))


if __name__ == "__main__":
    main()
