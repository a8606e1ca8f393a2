"""Static embedding models of made-up topics: a teacher tells them apart, a student hardly does.

Real model2vec models with tables made here, so that what an adapter can learn is known: the
student's vectors are the teacher's in fewer dimensions, bent by a direction that all words share.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from conch_dna.sedimentation.embedders.local import unclosed_files_allowed

TOPICS, WORDS_EACH = 24, 12
DIMENSION, STUDENT_DIMENSION = 24, 20
WORDS = [f"topic{topic}word{number}" for topic in range(TOPICS) for number in range(WORDS_EACH)]


def write_static(folder: Path, table: np.ndarray, *, more: Sequence[str] = ()) -> Path:
    """A model2vec model with one row for each of WORDS, and ones for more of them."""
    from model2vec import StaticModel
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: number for number, word in enumerate(["[UNK]", *WORDS, *more])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    none, ones = (
        fill((count, table.shape[1])) for fill, count in ((np.zeros, 1), (np.ones, len(more)))
    )
    rows = np.concatenate([none, table, ones]).astype(np.float32)
    with unclosed_files_allowed():
        StaticModel(rows, tokenizer, normalize=True).save_pretrained(str(folder))
    return folder


def tables(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The teacher's table `[W, 24]` and the student's `[W, 20]`."""
    random = np.random.default_rng(seed)
    topic = np.repeat(np.eye(TOPICS), WORDS_EACH, axis=0)
    teacher = topic + 0.15 * random.normal(size=(len(WORDS), DIMENSION))
    mixing = random.normal(size=(DIMENSION, STUDENT_DIMENSION)) / np.sqrt(DIMENSION)
    shared = 0.6 * random.normal(size=STUDENT_DIMENSION) / np.sqrt(STUDENT_DIMENSION)
    noise = np.array([1.0] * 4 + [0.0] * (STUDENT_DIMENSION - 4))
    student = (
        teacher @ mixing + shared + noise * random.normal(size=(len(WORDS), STUDENT_DIMENSION))
    )
    return teacher, student


def write_models(folder: Path) -> dict[str, str]:
    """Folders of a student, a teacher that knows the topics, and one that knows nothing."""
    teacher, student = tables()
    nothing = np.random.default_rng(9).normal(size=teacher.shape)
    return {
        "student": str(write_static(folder / "student", student)),
        "teacher": str(write_static(folder / "teacher", teacher)),
        "nothing": str(write_static(folder / "nothing", nothing)),
    }


def documents(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Documents whose titles and texts are of the same two topics, with other words."""
    random = np.random.default_rng(seed)
    found = []
    for number in range(count):
        topics = random.choice(TOPICS, 2, replace=False)
        words = [WORDS[t * WORDS_EACH + w] for t in topics for w in range(WORDS_EACH)]
        random.shuffle(words)
        title, text = " ".join(words[:6]), " ".join(words[6:18])
        found.append({"id": f"d{number}", "title": title, "text": text})
    return found
