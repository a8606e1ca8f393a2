"""A static student's folder, written whole: model2vec's own files, digests, and where it is from.

Knows model2vec's files; nothing of how a table came about.
"""

import shutil
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from conch_dna.checkpoints import provenance, write_folder
from conch_dna.errors import ConchError
from conch_dna.sedimentation.embedders.local import (
    STUDENT_FILE,
    model_digest,
    unclosed_files_allowed,
)


def with_table(student: Any, table: np.ndarray) -> Any:
    """A model2vec `StaticModel` with the tokens of another and vectors `[V, E]` of its own."""
    from model2vec import StaticModel

    config = {name: value for name, value in student.config.items() if name != "apply_pca"}
    return StaticModel(
        table,
        student.tokenizer,
        config={**config, "model_type": "model2vec", "hidden_dim": table.shape[1]},
        normalize=True,
        base_model_name=student.base_model_name,
        language=student.language,
    )


def write_static(student: Any, folder: Path, origin: Mapping[str, Any]) -> str:
    """Write a static model, look at it, then let it appear in one step.

    Args:
        student: A model2vec `StaticModel`.
        folder: Where to; a folder that stands there is replaced.
        origin: What it was made from, for its STUDENT_FILE.

    Returns:
        Its content address, the same that its embedder has.

    Raises:
        ConchError: It cannot be written, or is another when it is read again.
    """
    from model2vec import StaticModel

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".writing-") as temporary:
            saved = Path(temporary)
            with unclosed_files_allowed():
                student.save_pretrained(saved, model_name=folder.name)
                _check_saved(student, StaticModel.from_pretrained(saved))
            digest = model_digest(saved)
            document = {
                **origin,
                "dimension": int(student.dim),
                "digest": digest,
                "provenance": provenance(),
            }
            write_folder(
                folder,
                documents={STUDENT_FILE: document},
                writers={
                    path.name: partial(shutil.copyfile, path) for path in sorted(saved.iterdir())
                },
            )
    except OSError as error:
        raise ConchError(f"cannot write {folder}: {error}. Choose another folder") from error
    return digest


def _check_saved(student: Any, saved: Any) -> None:
    """A table written wrongly would still be a model, only one that knows nothing."""
    if not np.array_equal(student.embedding, saved.embedding):
        raise ConchError(
            "the student's table is another after it was written: the installed model2vec and "
            "safetensors do not fit together, take the versions of constraints.txt"
        )
