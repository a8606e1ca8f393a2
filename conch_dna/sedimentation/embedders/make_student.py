"""Makes a static student from a sentence-transformers teacher: a vector for each token.

Knows model2vec's distillation; nothing of stores or adapters.
To pass on another of model2vec's options: a keyword of `make_student`, and of STUDENT_FILE.
"""

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conch_dna.errors import ConchError
from conch_dna.sedimentation.embedders.local import SentenceTransformersEmbedder, open_local
from conch_dna.sedimentation.embedders.static_folder import write_static

WORD = re.compile(r"[^\W\d_]{2,}")


@dataclass(frozen=True, kw_only=True)
class StudentSummary:
    """What `make_student` wrote.

    Attributes:
        folder: Where it lies.
        digest: Content address, the same that its embedder has.
        teacher: The teacher's name.
        teacher_digest: The teacher's content address.
        dimension: D of its vectors.
        tokens: Rows of its table.
        words_found: Words of the texts that were frequent enough and more than one token.
        words_added: How many of them got a row of their own.
        seconds: How long it took.
    """

    folder: Path
    digest: str
    teacher: str
    teacher_digest: str
    dimension: int
    tokens: int
    words_found: int
    words_added: int
    seconds: float


def make_student(
    teacher_name: str,
    folder: Path | str,
    *,
    dimension: int = 256,
    vocabulary_from: Iterable[str] | None = None,
    least_count: int = 2,
    most_words: int = 20_000,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> StudentSummary:
    """Distil a static student from a teacher; its folder appears whole or not at all.

    Each token goes through the teacher's transformer alone; the vectors are reduced by principal
    components and weighted by the token's rank (Tulkens & van Dongen 2024, model2vec). The table
    is float32. The tokenizer neither pads nor truncates.

    Args:
        teacher_name: A folder or hub id of a sentence-transformers model.
        folder: Where to; a folder that stands there is replaced.
        dimension: Of the student; at most the teacher's.
        vocabulary_from: Texts whose words, where the teacher's tokenizer splits them, get a row of
            their own. Without, the vocabulary is the teacher's.
        least_count: How often such a word must occur.
        most_words: How many words at most, the most frequent first.
        device: cpu or cuda; chosen by model2vec where None (it takes no mps with torch 2.8 on).
        trust_remote_code: Let Python code that comes with the teacher run.

    Raises:
        ConchError: The teacher is not here or is none, a size is out of its range, model2vec's
            distillation is not installed, or the folder cannot be written.
    """
    start, folder = time.monotonic(), Path(folder).expanduser()
    teacher = open_local(
        teacher_name, device="cpu", batch_size=1, trust_remote_code=trust_remote_code
    )
    if not isinstance(teacher, SentenceTransformersEmbedder):
        raise ConchError(
            f"{teacher_name} is a static model already: a student is made from a "
            "sentence-transformers model"
        )
    if least_count < 1 or most_words < 0:
        raise ConchError(
            f"least_count {least_count} must be 1 or more and most_words {most_words} 0 or more"
        )
    if folder.is_file():
        raise ConchError(f"{folder} is a file: give a folder to write the student to")
    model, tokenizer, distil = _teacher_parts(teacher)
    most = int(model.config.hidden_size)
    if not 1 <= dimension <= most:
        raise ConchError(f"dimension {dimension} is not between 1 and the {most} of {teacher_name}")
    frequent = _split_words(vocabulary_from or (), tokenizer, least_count=least_count)
    words = frequent[:most_words]
    student = distil(
        model, tokenizer, vocabulary=words, device=device, pca_dims=dimension, quantize_to="float32"
    )
    if student.dim != dimension:
        raise ConchError(
            f"{teacher_name} has only {len(student.tokens)} tokens, too few to reduce to "
            f"{dimension} dimensions: choose fewer"
        )
    student.tokenizer.no_padding()
    student.tokenizer.no_truncation()
    # safetensors 0.8 scrambles what is not in C order, and scikit-learn's PCA gives Fortran order.
    student.embedding = np.ascontiguousarray(student.embedding)
    # Else it holds the path of the teacher's folder, and the digest depends on the machine.
    student.config["tokenizer_name"] = student.base_model_name = Path(teacher.name).name
    return StudentSummary(
        folder=folder,
        digest=write_static(
            student, folder, {"teacher": teacher.name, "teacher_digest": teacher.digest}
        ),
        teacher=teacher.name,
        teacher_digest=teacher.digest,
        dimension=dimension,
        tokens=len(student.tokens),
        words_found=len(frequent),
        words_added=len(words),
        seconds=time.monotonic() - start,
    )


def _teacher_parts(
    teacher: SentenceTransformersEmbedder,
) -> tuple[Any, Any, Callable[..., Any]]:
    """Its transformer, its tokenizer, and model2vec's function."""
    try:
        from model2vec.distill import distill_from_model
    except ImportError as error:
        raise ConchError(
            f"a student is made by model2vec: pip install 'model2vec[distill]' ({error})"
        ) from error
    first = teacher.model[0]
    transformer, tokenizer = getattr(first, "auto_model", None), getattr(first, "tokenizer", None)
    if transformer is None or not getattr(tokenizer, "is_fast", False):
        raise ConchError(
            f"{teacher.name} has no transformer with a fast tokenizer, of which a student could be "
            "made: choose another teacher"
        )
    return transformer, tokenizer, distill_from_model


def _split_words(texts: Iterable[str], tokenizer: Any, *, least_count: int) -> list[str]:
    """Words that the tokenizer splits, the most frequent first, equal ones by the alphabet."""
    if isinstance(texts, str):
        raise ConchError("vocabulary_from is one text: give a list of texts")
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(WORD.findall(text.lower()))
    frequent = sorted(
        (word for word, count in counts.items() if count >= least_count),
        key=lambda word: (-counts[word], word),
    )
    return [word for word in frequent if len(tokenizer.tokenize(word)) > 1]
