"""Lines of generations for tests: their data, their settings, and copies of a grown one.

A line of the embedded student learns; one of a tiny random model is for what happens when.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from conch_dna.generations.line import Line
from conch_dna.generations.settings import EvolveConfig, GateSettings
from conch_dna.training.settings import KDConfig

NAMES = ("Tom", "Sue", "Ben", "Mia", "Sam", "Lily", "Max", "Anna")
THINGS = ("ball", "cat", "hat", "dog", "car", "cup")
PLACES = ("park", "house", "garden", "shop")


def stories(seed: int, count: int = 40) -> list[dict[str, str]]:
    """Little stories of one pattern, such as the model knows."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        name, thing, place = (str(random.choice(x)) for x in (NAMES, THINGS, PLACES))
        text = f"{name} had a little {thing}. {name} took the {thing} to the {place}."
        found.append({"prompt": f"Once upon a time, {name}", "completion": f" went out. {text}"})
    return found


def sums(seed: int, count: int = 40) -> list[dict[str, str]]:
    """A pattern that it does not know."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        name, thing = (str(random.choice(x)) for x in (NAMES, THINGS))
        number = int(random.integers(2, 9))
        text = f" {name} sells {number} {thing}s. Answer: {name} sold {number} {thing}s in all."
        found.append({"prompt": f"Question {number}:", "completion": text})
    return found


def garbage(seed: int, count: int = 40) -> list[dict[str, str]]:
    """The old pattern with all its words in another order each time: there is nothing to learn."""
    random = np.random.default_rng(seed)
    found = []
    for record in stories(seed, count):
        words = record["completion"].split()
        random.shuffle(words)
        letters = ["".join(random.permutation(list(word))) for word in words]
        found.append({"prompt": record["prompt"], "completion": " " + " ".join(letters)})
    return found


def config_of(**changes: Any) -> EvolveConfig:
    training = {
        "num_iters": 40,
        "learning_rate": 3e-3,
        "warmup_iters": 2,
        "batch_size": 8,
        "lora_keys": "all",
        "lora_rank": 8,
        "max_tokens": 12,
        "steps_per_eval": 20,
        "steps_per_save": 20,
        "steps_per_report": 10,
        "val_fraction": 0.2,
        **changes.pop("training", {}),
    }
    # A few tokens of samples of different topics say nothing of tone.
    gates = {"max_tone_drift": 0.5, **changes.pop("gates", {})}
    return EvolveConfig(
        training=KDConfig(**training),
        gates=GateSettings(**gates),
        **{"answers": 4, "ema_decay": 0.9, "replay_share": 0.3, **changes},
    )


def quick_config(**changes: Any) -> EvolveConfig:
    """Four steps on few examples, after which every gate passes."""
    training = {
        "num_iters": 4,
        "batch_size": 4,
        "max_tokens": 4,
        "steps_per_eval": 2,
        "steps_per_save": 2,
        **changes.pop("training", {}),
    }
    gates = {"generalize_gain": -1.0, "recall_margin": 1.0, "max_tone_drift": 2.0}
    gates |= changes.pop("gates", {})
    return config_of(training=training, gates=gates, **{"answers": 2, **changes})


def copied(line: Line, folder: Path) -> Line:
    """The same line in another folder of lines."""
    shutil.copytree(line.folder, folder / line.name)
    return Line(folder, line.name)
