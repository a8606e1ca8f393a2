"""A student with fewer layers: those of a model stay that change its hidden state most.

Knows layers and their weights' names; nothing of training. Block influence is ShortGPT's (Men et
al. 2024, equation 1). Another measure of a layer: a function in place of `block_influences`.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from conch_dna.checkpoints import DIGESTS, provenance, remove_folder, write_folder
from conch_dna.errors import ConchError
from conch_dna.language_model import LanguageModel, ModelSource, named_arrays, weight_files
from conch_dna.screen.presentation import text_table
from conch_dna.screen.progress import Report, silent

if TYPE_CHECKING:
    from rich.table import Table

STUDENT_FILE = "student.json"
# Longer texts are read in windows of so many tokens.
WINDOW = 512
# Names in configurations that make a layer's kind depend on its number.
_BY_NUMBER = re.compile(r"pattern|interval|period|layer_step|layer_freq|no_rope")
_LAYER = re.compile(r"^(.*?\blayers\.)(\d+)(\..*|$)")


@dataclass(frozen=True, kw_only=True)
class Removal:
    """One layer taken out.

    Attributes:
        layer: Its number in the teacher.
        influence: Its block influence when it was measured last, from 0 to 2.
        influences: Those of all layers still there then, by their numbers in the teacher.
    """

    layer: int
    influence: float
    influences: dict[int, float]


def block_influences(model: LanguageModel, windows: Sequence[Sequence[int]]) -> list[float]:
    """Block influence of every layer, 1 − mean over tokens of cos(hidden in, hidden out).

    Args:
        model: In memory; it is left as it was.
        windows: Token ids of real texts, each read by itself.

    Returns:
        One figure for each layer, from 0 (it leaves every direction as it is) to 2.
    """
    layers = _layers(model)
    sums, count = [mx.array(0.0) for _ in layers], 0

    def watched(number: int, layer: Any) -> Any:
        def note(before: mx.array, after: mx.array) -> None:
            cosines = _cosine(before.astype(mx.float32), after.astype(mx.float32))
            sums[number] = sums[number] + cosines.sum()

        return _Watched(layer, note)

    with _with_layers(model, [watched(number, layer) for number, layer in enumerate(layers)]):
        for window in windows:
            # Only what the layers say is computed; the last state is part of it.
            model.logits(mx.array([list(window)]))
            mx.eval(sums)
            count += len(window)
    return [1 - float(np.asarray(total)) / count for total in sums]


def _cosine(first: mx.array, second: mx.array) -> mx.array:
    """Cosines along the last axis, of vectors none of which is 0."""
    return (first * second).sum(-1) / (
        mx.linalg.norm(first, axis=-1) * mx.linalg.norm(second, axis=-1)
    )


class _Watched:
    """A layer whose hidden states are looked at on their way in and out."""

    def __init__(self, layer: Any, note: Callable[[mx.array, mx.array], None]) -> None:
        self._layer, self._note = layer, note

    def __call__(self, hidden: mx.array, *rest: Any, **named: Any) -> mx.array:
        out: mx.array = self._layer(hidden, *rest, **named)
        self._note(hidden, out)
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def _layers(model: LanguageModel) -> list[Any]:
    layers = getattr(getattr(model.model, "model", None), "layers", None)
    if not isinstance(layers, list) or not layers:
        raise ConchError(
            f"{model.model_id} is not built of a list of layers that follow each other: no layer "
            "can be left out of it here"
        )
    return layers


@contextmanager
def _with_layers(model: LanguageModel, layers: Sequence[Any]) -> Iterator[None]:
    """The model with other layers in its body, for as long as this is entered."""
    own = model.model.model.layers
    model.model.model.layers = list(layers)
    try:
        yield
    finally:
        model.model.model.layers = own


def least_influential(
    model: LanguageModel,
    windows: Sequence[Sequence[int]],
    *,
    keep: int,
    report: Report = silent,
) -> list[Removal]:
    """Which layers to leave out: the least influential, measured again after each removal.

    Args:
        model: In memory; it is left as it was.
        windows: Token ids of real texts.
        keep: How many layers stay.
        report: Gets a `phase`, and `advance` for each removal.

    Raises:
        ConchError: The layers are not all of one kind, or `keep` is not below their number.
    """
    layers = _layers(model)
    require_uniform(model.source, model)
    if not 1 <= keep < len(layers):
        raise ConchError(
            f"{model.model_id} has {len(layers)} layers: keep from 1 to {len(layers) - 1} of them, "
            f"not {keep}"
        )
    if not any(len(window) for window in windows):
        raise ConchError("there is no text to measure the influence of layers on: give some")
    numbers, removals = list(range(len(layers))), []
    total = len(layers) - keep
    report("phase", {"name": "influence of layers", "total": total, "unit": "layers"})
    for _ in range(total):
        with _with_layers(model, [layers[number] for number in numbers]):
            figures = block_influences(model, windows)
        influences = dict(zip(numbers, figures, strict=True))
        least = min(numbers, key=lambda number: influences[number])
        removals.append(Removal(layer=least, influence=influences[least], influences=influences))
        numbers.remove(least)
        report("advance", {"by": 1, "note": f"layer {least}: {influences[least]:.4f}"})
    return removals


def require_uniform(source: ModelSource, model: LanguageModel) -> None:
    """Refuse a model whose layers differ: one at another place would be another layer.

    Raises:
        ConchError: A setting or the weights make layers differ.
    """
    for name, value in source.config.items():
        different = isinstance(value, list) and len({json.dumps(each) for each in value}) > 1
        by_layer = different and len(value) == source.config.get("num_hidden_layers")
        if by_layer or (_BY_NUMBER.search(name) and value not in (None, 0, 1, False, [])):
            raise ConchError(
                f"the layers of {source.model_id} differ by their number ({name} in its "
                "config.json): none can be left out of it here"
            )
    shapes = [
        (
            type(layer),
            {name: value.shape for name, value in named_arrays(layer.parameters()).items()},
        )
        for layer in _layers(model)
    ]
    if other := [number for number, each in enumerate(shapes) if each != shapes[0]]:
        raise ConchError(
            f"layer {other[0]} of {source.model_id} is not built as its first: none can be left "
            "out of it here"
        )


def windows_of(tokenizer: Any, texts: Sequence[str], *, tokens: int) -> list[list[int]]:
    """The first tokens of texts in windows of at most WINDOW, each of one text.

    Args:
        tokenizer: The model's.
        texts: As people wrote them.
        tokens: How many are taken at most.
    """
    return first_windows(map(tokenizer.encode, texts), tokens=tokens)


def first_windows(sequences: Iterable[Sequence[int]], *, tokens: int) -> list[list[int]]:
    """The same of texts that are token ids already.

    Args:
        sequences: The ids of each text.
        tokens: How many are taken at most.
    """
    windows: list[list[int]] = []
    left = tokens
    for sequence in sequences:
        ids = list(sequence[:left])
        windows += [ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW)]
        left -= len(ids)
        if not left:
            break
    return windows


def make_student(
    source: ModelSource,
    folder: Path,
    windows: Sequence[Sequence[int]],
    *,
    layers: int,
    report: Report = silent,
) -> list[Removal]:
    """Write a model without its least influential layers as a folder that mlx_lm opens.

    Args:
        source: The whole model.
        folder: Where to; it must not exist.
        windows: Token ids of real texts to measure influence on.
        layers: How many stay.
        report: See `least_influential`.

    Returns:
        What was left out, in its order; also in the folder's student.json.

    Raises:
        ConchError: The folder exists or cannot be written; the layers are not all of one kind; or
            the student says another thing, to the bit on the first window, than its teacher
            without the same layers.
    """
    if folder.exists():
        raise ConchError(f"{folder} exists: name another folder, or delete it first")
    model = source.load()
    removals = least_influential(model, windows, keep=layers, report=report)
    gone = {removal.layer for removal in removals}
    kept = [number for number in range(layers + len(removals)) if number not in gone]
    _write(source, folder, kept, removals, tokens=sum(map(len, windows)))
    same = _says_the_same(model, folder, kept, next(filter(len, windows)))
    model.release()
    if not same:
        remove_folder(folder)
        raise ConchError(
            f"the layers of {source.model_id} depend on their number: without some it says another "
            "thing when it is read again, so none can be left out of it here"
        )
    return removals


def _write(
    source: ModelSource,
    folder: Path,
    kept: Sequence[int],
    removals: Sequence[Removal],
    *,
    tokens: int,
) -> None:
    weights: dict[str, mx.array] = {}
    for path in weight_files(source.folder):
        arrays = mx.load(str(path))
        assert isinstance(arrays, dict)
        weights |= {new: each for name, each in arrays.items() if (new := _renamed(name, kept))}
    document = {
        "made_by": "block influence",
        "teacher": source.model_id,
        "teacher_digest": source.weights_digest,
        "kept_layers": list(kept),
        "removals": [asdict(removal) for removal in removals],
        "tokens": tokens,
        **provenance(),
    }
    write_folder(
        folder,
        arrays={"model.safetensors": weights},
        documents={"config.json": _config(source.config, kept), STUDENT_FILE: document},
        writers={path.name: partial(shutil.copyfile, path) for path in other_files(source.folder)},
    )


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


def other_files(folder: Path) -> list[Path]:
    """What a model's folder holds besides weights and configuration."""
    left = ("config.json", "model.safetensors.index.json", DIGESTS, STUDENT_FILE)
    suffixes = (".json", ".jinja", ".model", ".txt")
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix in suffixes and path.name not in left
    ]


def _says_the_same(
    teacher: LanguageModel, folder: Path, kept: Sequence[int], window: Sequence[int]
) -> bool:
    """Whether a folder's model says what a teacher says without the same layers, to the bit."""
    ids = mx.array([list(window)])
    layers = _layers(teacher)
    with _with_layers(teacher, [layers[number] for number in kept]):
        expected = teacher.logits(ids)
        mx.eval(expected)
    student = ModelSource(str(folder), report=silent).load()
    same = bool(mx.array_equal(student.logits(ids), expected))
    student.release()
    return same


def removals_table(removals: Sequence[Removal], name: str) -> "Table":
    """Which layers were left out, and the influence of each at first and when it went.

    Args:
        removals: In their order.
        name: The teacher's.
    """
    first = removals[0].influences
    went = {removal.layer: (order, removal) for order, removal in enumerate(removals, 1)}
    rows = [
        (number, f"{figure:.4f}", *(_gone(*went[number]) if number in went else ("", "")))
        for number, figure in first.items()
    ]
    columns = ("layer", "block influence", "when it went", "left out")
    return text_table(f"{name}: layers", columns, rows, numbers=columns)


def _gone(order: int, removal: Removal) -> tuple[str, str]:
    return f"{removal.influence:.4f}", f"{order}."
