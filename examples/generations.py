"""A model line grows by two generations, offline: the first is promoted, the second refused.

Runs on the embedded student in a minute or two on a CPU: python examples/generations.py [FOLDER].
To try it on texts of your own: replace the three functions that make them.
"""

import os
import random
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from conch_dna.generations.data import init_line
from conch_dna.generations.evolve import TeacherStudentTrainer
from conch_dna.generations.line import Line
from conch_dna.generations.settings import EvolveConfig, GateSettings
from conch_dna.generations.tables import line_tree, nodes_of
from conch_dna.screen.presentation import print_tables
from conch_dna.screen.progress import Progress
from conch_dna.training.settings import KDConfig

NAMES = ("Tom", "Sue", "Ben", "Mia", "Sam", "Lily", "Max", "Anna")
THINGS = ("ball", "cat", "hat", "dog", "car", "cup")
STEPS = 40


def tales() -> list[dict[str, str]]:
    """What the line begins with."""
    found = []
    for name in NAMES:
        for thing in THINGS:
            text = f" went out. {name} had a little {thing} and took the {thing} to the park."
            found.append({"prompt": f"Once upon a time, {name}", "completion": text})
    return found


def sums() -> list[dict[str, str]]:
    """What the first generation learns: a pattern that the line does not know."""
    found = []
    for name in NAMES:
        for number, thing in enumerate(THINGS, 2):
            text = f" {name} sells {number} {thing}s. Answer: {name} sold {number} {thing}s in all."
            found.append({"prompt": f"Question {number}:", "completion": text})
    return found


def noise() -> list[dict[str, str]]:
    """What the second one is given: the tales with their letters mixed, which cost what it knew."""
    draw = random.Random(0)
    found = []
    for record in tales():
        letters = list(record["completion"])
        draw.shuffle(letters)
        found.append({"prompt": record["prompt"], "completion": " " + "".join(letters).strip()})
    return found


def settings() -> EvolveConfig:
    """How each generation learns and is judged."""
    training = KDConfig(
        num_iters=STEPS,
        learning_rate=3e-3,
        warmup_iters=2,
        batch_size=8,
        lora_keys="all",
        lora_rank=8,
        val_fraction=0.2,
        max_tokens=12,
        steps_per_eval=20,
        steps_per_save=STEPS,
    )
    # A few short answers say little of tone.
    gates = GateSettings(max_tone_drift=0.5)
    return EvolveConfig(training=training, gates=gates, answers=4, ema_decay=0.9, replay_share=0.3)


def main() -> int:
    """Begin a line, let it evolve twice, and show what became of it."""
    with tempfile.TemporaryDirectory() as temporary, Progress() as progress:
        line = Line(Path(sys.argv[1] if len(sys.argv) > 1 else temporary), "tales")
        config = settings()
        init_line(line, "embedded:student", tales(), config=config)
        trainer = TeacherStudentTrainer(config, progress)
        for what, records in {"sums": sums(), "noise": noise()}.items():
            outcome = trainer.train(line, records)
            print(f"{what}: {outcome.name} is {'promoted' if outcome.promoted else 'refused'}")
            for verdict in outcome.verdicts:
                print(f"  {'passed' if verdict.passed else 'FAILED'}: {verdict.reason}")
        print_tables(line_tree("the line", nodes_of(line), line.head))
    return 0


if __name__ == "__main__":
    sys.exit(main())
