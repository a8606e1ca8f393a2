"""A student's folder: arrays and configuration of its teacher's that stay, written and read again.

Knows files and names in them; nothing of why a part stays. To leave out another kind of part: in
`student_arrays` and in `_config`.
"""

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from conch_dna.checkpoints import write_folder
from conch_dna.errors import ConchError
from conch_dna.language_model import LanguageModel, ModelSource, weight_files
from conch_dna.screen.progress import silent
from conch_dna.training.students.narrow_mlps import cut_down, narrowed

STUDENT_FILE = "student.json"
# Beside a fused model, what was measured of it.
FUSED_FILE = "fused.json"
# By how much a logit may differ when the student is read again; narrower products may be added up
# in another order.
TOLERANCE = 1e-4
_LAYER = re.compile(r"^(.*?\blayers\.)(\d+)(\..*|$)")


def require_free(path: Path) -> None:
    """Refuse a place that is taken, or where none can be, before anything is computed.

    Raises:
        ConchError: It is.
    """
    if path.exists() or not path.name:
        raise ConchError(f"{path} is there: name another, or delete it first")
    above = next(each for each in path.absolute().parents if each.exists())
    if not above.is_dir():
        raise ConchError(f"{path} cannot be made, since {above} is a file: name another place")


def file_arrays(source: ModelSource) -> dict[str, mx.array]:
    """What the files of a model hold, by name; nothing is read yet."""
    found: dict[str, mx.array] = {}
    for path in weight_files(source.folder):
        arrays = mx.load(str(path))
        assert isinstance(arrays, dict)
        found |= arrays
    return found


def student_arrays(
    arrays: Mapping[str, mx.array], kept: Sequence[int], neurons: Mapping[int, mx.array] | None
) -> dict[str, mx.array]:
    """What the files of a student hold; nothing is read yet.

    Args:
        arrays: The teacher's, of `file_arrays`.
        kept: Layers that stay, ascending.
        neurons: Of each of them those that stay; None for all.
    """
    return {
        new: narrowed(name, each, neurons) if neurons else each
        for name, each in arrays.items()
        if (new := _renamed(name, kept))
    }


def write_files(
    source: ModelSource,
    folder: Path,
    arrays: Mapping[str, mx.array],
    document: Mapping[str, Any],
    *,
    kept: Sequence[int],
    width: int | None,
    beside: Sequence[Path],
    look: Callable[[Path], None],
) -> None:
    """Write a folder that mlx_lm opens.

    Args:
        source: The teacher.
        folder: Where to.
        arrays: Of `student_arrays`.
        document: For student.json.
        kept: Layers that stay.
        width: Neurons of each MLP; None for the teacher's.
        beside: Files of the teacher that are copied.
        look: See `write_folder`.
    """
    config = _config(source.config, kept)
    write_folder(
        folder,
        arrays={"model.safetensors": arrays},
        documents={
            "config.json": config if width is None else {**config, "intermediate_size": width},
            STUDENT_FILE: document,
        },
        writers={path.name: partial(shutil.copyfile, path) for path in beside},
        look=look,
    )


def says_the_same(
    teacher: LanguageModel,
    folder: Path,
    kept: Sequence[int],
    neurons: Mapping[int, mx.array] | None,
    window: Sequence[int],
) -> bool:
    """Whether a folder's model says what its teacher says with these layers and neurons alone.

    To the bit where no MLP was narrowed, else within TOLERANCE.
    """
    ids = mx.array([list(window)])
    with cut_down(teacher, kept, neurons):
        expected = teacher.logits(ids)
        mx.eval(expected)
    student = ModelSource(
        str(folder), trust_remote_code=teacher.source.trust_remote_code, report=silent
    ).load()
    logits = student.logits(ids)
    if neurons is None:
        same = mx.array_equal(logits, expected)
    else:
        same = mx.allclose(logits, expected, rtol=TOLERANCE, atol=TOLERANCE)
    found = bool(same)
    student.release()
    return found


def _renamed(name: str, kept: Sequence[int]) -> str | None:
    """A weight's name in a student with some layers; None where its layer is gone."""
    if not (match := _LAYER.match(name)):
        return name
    before, number, rest = match.groups()
    return f"{before}{kept.index(int(number))}{rest}" if int(number) in kept else None


def _config(config: dict[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """A model's configuration with fewer layers."""
    count = config["num_hidden_layers"]
    cut = {
        name: [value[number] for number in kept]
        for name, value in config.items()
        if isinstance(value, list) and len(value) == count
    }
    quantization = {
        part: {new: value for name, value in config[part].items() if (new := _renamed(name, kept))}
        for part in ("quantization", "quantization_config")
        if isinstance(config.get(part), dict)
    }
    return {**config, **cut, **quantization, "num_hidden_layers": len(kept)}
