"""KD against cross-entropy alone on a pair that nobody here trained: three seeds of each.

Teacher stories260K, student the same model with layers 0, 2 and 4 kept, TinyStories training
text, LoRA on all linear layers, equal steps and tokens. The one difference is alpha: 0.7 or 0.
"""

import conch_dna  # noqa: F401  # isort: skip  (loads OpenBLAS before mlx)

import tempfile
from pathlib import Path

from _setting import print_setting, shared_data, spread, stories

from conch_dna.training.settings import KDConfig
from conch_dna.training.true_kd import TrueKnowledgeDistiller
from models import keep_layers

SEEDS = (0, 1, 2)
STEPS = 200


def main() -> None:
    data = shared_data()
    print_setting(f"stories260K into its layers 0, 2, 4: {STEPS} steps, seeds {SEEDS}")
    records = stories("train", 600)
    kinds = {"KD (alpha 0.7)": 0.7, "cross-entropy only (alpha 0)": 0.0}
    figures: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as temporary:
        teacher = data / "models" / "stories260K"
        student = keep_layers(teacher, Path(temporary) / "student", [0, 2, 4])
        for seed in SEEDS:
            for kind, alpha in kinds.items():
                config = KDConfig(
                    alpha=alpha,
                    seed=seed,
                    lora_keys="all",
                    learning_rate=2e-3,
                    num_iters=STEPS,
                    max_seq_length=352,
                    too_long="skip",
                    # One folder for all, since the soft targets are the same.
                    output_dir=temporary,
                    steps_per_save=STEPS,
                )
                distiller = TrueKnowledgeDistiller(str(teacher), str(student), config)
                result = distiller.distill_domain("stories", data=records, overwrite=True)
                before, after = result.evaluation["before"], result.evaluation["after"]
                figures[kind].append(after)
                print(
                    f"  seed {seed}, {kind}: KL {before['kl_nats']:.4f} to "
                    f"{after['kl_nats']:.4f}, cross-entropy {before['cross_entropy']:.4f} to "
                    f"{after['cross_entropy']:.4f}, kept step {result.metadata['best_step']}",
                    flush=True,
                )
    for kind, rows in figures.items():
        print(f"  {kind}: held-out KL {spread([row['kl_nats'] for row in rows])}")
        print(f"    held-out cross-entropy {spread([row['cross_entropy'] for row in rows])}")


if __name__ == "__main__":
    main()
