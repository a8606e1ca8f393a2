"""Teachers with another tokenizer: alignments and baselines against cross-entropy, three seeds.

    python tests/benchmarks/cross_tokenizer.py [--pair PAIR] [--kind KIND] [--steps 200]

Pairs that nobody here trained: babyllama361 (characters and bytes) into stories260K's layers 0,
2, 4 (BPE), and stories260K into babyllama105's layers 0 and 4 (characters). TinyStories cut to
240 bytes, since the BabyLlamas see 256 tokens; LoRA on all linear layers; equal steps and data.
"""

import conch_dna  # noqa: F401  # isort: skip  (loads OpenBLAS before mlx)

import argparse
import json
import tempfile
from pathlib import Path

from _baseline_alignments import BASELINES, instead_of_roots
from _setting import print_setting, shared_data, short_stories, spread

from conch_dna.training.settings import KDConfig
from conch_dna.training.true_kd import TrueKnowledgeDistiller
from models import keep_layers

SEEDS = (0, 1, 2)
PAIRS = {
    "characters-to-bpe": ("babyllama361", "stories260K", [0, 2, 4]),
    "bpe-to-characters": ("stories260K", "babyllama105", [0, 4]),
}
KINDS = {
    "cross-entropy only": {"alignment": "alm", "alpha": 0.0},
    "alm": {"alignment": "alm"},
    "auto (roots)": {"alignment": "auto"},
    **{name: {"alignment": "auto"} for name in BASELINES},
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Every alignment against cross-entropy alone.")
    parser.add_argument("--pair", action="append", choices=list(PAIRS))
    parser.add_argument("--kind", action="append", choices=list(KINDS))
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    kinds = arguments.kind or list(KINDS)
    data = shared_data()
    records = short_stories(600)
    for name in arguments.pair or PAIRS:
        teacher_name, student_name, layers = PAIRS[name]
        print_setting(
            f"{teacher_name} into layers {layers} of {student_name}: {len(records)} texts, "
            f"{arguments.steps} steps of 8, seeds {SEEDS}"
        )
        with tempfile.TemporaryDirectory() as temporary:
            teacher = data / "models" / teacher_name
            student = keep_layers(data / "models" / student_name, Path(temporary) / "s", layers)
            figures: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
            for seed in SEEDS:
                for kind in kinds:
                    config = KDConfig(
                        **KINDS[kind],
                        seed=seed,
                        temperature=1.0,
                        batch_size=8,
                        lora_keys="all",
                        learning_rate=2e-3,
                        num_iters=arguments.steps,
                        max_tokens=8,
                        # One folder for all, since the teacher's targets are the same.
                        output_dir=temporary,
                        steps_per_eval=100,
                        steps_per_save=arguments.steps,
                    )
                    distiller = TrueKnowledgeDistiller(str(teacher), str(student), config)
                    with instead_of_roots(kind if kind in BASELINES else None):
                        result = distiller.distill_domain("stories", data=records, overwrite=True)
                    before, after = result.evaluation["before"], result.evaluation["after"]
                    figures[kind].append(after)
                    print(
                        f"  seed {seed}, {kind}: bits per byte {before['bits_per_byte']:.4f} to "
                        f"{after['bits_per_byte']:.4f}, chunk KL {before['chunk_kl_nats']:.4f} to "
                        f"{after['chunk_kl_nats']:.4f}, kept step {result.metadata['best_step']}, "
                        f"{result.metadata['cache_bytes_per_token']} bytes a teacher's token",
                        flush=True,
                    )
            print(f"  teacher: {result.evaluation['teacher']['bits_per_byte']:.4f} bits per byte")
            print(f"  coverage: {json.dumps(result.metadata['coverage'])}")
            for kind, rows in figures.items():
                bits = spread([row["bits_per_byte"] for row in rows])
                print(
                    f"  {kind}: bits per byte {bits}, chunk KL "
                    f"{spread([row['chunk_kl_nats'] for row in rows])}"
                )


if __name__ == "__main__":
    main()
