"""A student with fewer layers: those of a model stay that change its hidden state most.

Knows layers and their weights' names; nothing of training. Block influence is ShortGPT's (Men et
al. 2024, equation 1). Another measure of a layer: a function in place of `block_influences`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from conch_dna.checkpoints import DIGESTS, provenance
from conch_dna.errors import ConchError
from conch_dna.language_model import LanguageModel, ModelSource
from conch_dna.screen.presentation import text_table
from conch_dna.screen.progress import Report, silent
from conch_dna.training.students.curve import CurvePoint, distance
from conch_dna.training.students.layers import layers_of, require_uniform, with_layers
from conch_dna.training.students.narrow_mlps import (
    Width,
    cut_down,
    heaviest,
    neuron_weights,
    width_of,
)
from conch_dna.training.students.sizes import Goal, most_removals, too_small
from conch_dna.training.students.student_folder import (
    FUSED_FILE,
    STUDENT_FILE,
    file_arrays,
    require_free,
    says_the_same,
    student_arrays,
    write_files,
)

if TYPE_CHECKING:
    from rich.table import Table

# Longer texts are read in windows of so many tokens.
WINDOW = 512
# Share of the tokens, the last ones, that no part is measured on.
HELD_APART = 0.25


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
    layers = layers_of(model)
    sums, count = [mx.array(0.0) for _ in layers], 0

    def watched(number: int, layer: Any) -> Any:
        def note(before: mx.array, after: mx.array) -> None:
            cosines = _cosine(before.astype(mx.float32), after.astype(mx.float32))
            sums[number] = sums[number] + cosines.sum()

        return _Watched(layer, note)

    with with_layers(model, [watched(number, layer) for number, layer in enumerate(layers)]):
        for window in windows:
            # Only what the layers say is computed; the last state is part of it.
            model.model(mx.array([list(window)]))
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


def least_influential(model: LanguageModel, windows: Sequence[Sequence[int]]) -> Iterator[Removal]:
    """Layers in the order in which they go, the least influential of those that are left first.

    Influence is measured again after each.

    Args:
        model: In memory; it is left as it was.
        windows: Token ids of real texts.

    Yields:
        All layers but one.
    """
    layers = layers_of(model)
    numbers = list(range(len(layers)))
    while len(numbers) > 1:
        with with_layers(model, [layers[number] for number in numbers]):
            figures = block_influences(model, windows)
        influences = dict(zip(numbers, figures, strict=True))
        least = min(numbers, key=lambda number: influences[number])
        numbers.remove(least)
        yield Removal(layer=least, influence=influences[least], influences=influences)


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


def held_apart(
    windows: Sequence[Sequence[int]],
) -> tuple[list[Sequence[int]], list[Sequence[int]]]:
    """Windows to measure parts of a model on, and the last ones, to judge what is left of it by.

    Args:
        windows: In their order; one may be cut in two.

    Returns:
        The first, and of all tokens the last HELD_APART.

    Raises:
        ConchError: They have fewer than two tokens.
    """
    total = sum(map(len, windows))
    if total < 2:
        raise ConchError(
            "no text of two tokens or more is there to measure the influence of layers on: give "
            "longer ones"
        )
    left = total - max(1, int(HELD_APART * total))
    first: list[Sequence[int]] = []
    last: list[Sequence[int]] = []
    for window in filter(len, windows):
        for part, into in ((window[:left], first), (window[left:], last)):
            if part:
                into.append(part)
        left = max(0, left - len(window))
    return first, last


@dataclass(frozen=True, kw_only=True, eq=False)
class Cut:
    """What of a teacher stays in a student, how that was found, and what it costs.

    Attributes:
        kept: Layers that stay, by their numbers in the teacher, ascending.
        neurons: Of each of them the neurons of its MLP that stay; None for all.
        width: How many these are; None for all.
        removals: What was left out, in its order.
        curve: The teacher, and what was left of it after each removal.
        measured: Windows on which that was found out.
        apart: Windows that the curve stands on.
    """

    kept: list[int]
    neurons: dict[int, mx.array] | None
    width: Width | None
    removals: list[Removal]
    curve: list[CurvePoint]
    measured: list[Sequence[int]]
    apart: list[Sequence[int]]


def cut_to(
    model: LanguageModel,
    windows: Sequence[Sequence[int]],
    goal: Goal,
    *,
    mlp: float | None = None,
    report: Report = silent,
) -> Cut:
    """Find out what to leave out of a model: layers until it is small enough, then neurons.

    Args:
        model: In memory; it is left as it was.
        windows: Token ids of real texts; see `held_apart`.
        goal: How small; what narrower MLPs save counts.
        mlp: Share of each MLP's neurons that stays; None for all.
        report: Gets a `phase`, and `advance` for each removal.

    Raises:
        ConchError: The layers are not all of one kind, the goal cannot be reached, the MLPs cannot
            be narrowed, or there is no text.
    """
    require_uniform(model.source, model)
    measured, apart = held_apart(windows)
    arrays, name = file_arrays(model.source), model.model_id
    count = len(layers_of(model))
    width = None if mlp is None else width_of(model, arrays, mlp)
    # Any so many of them, to tell what they take before it is known which stay.
    some = dict.fromkeys(range(count), mx.arange(width.neurons)) if width else None

    def bytes_of(kept: Sequence[int], neurons: dict[int, mx.array] | None = some) -> int:
        return sum(each.nbytes for each in student_arrays(arrays, kept, neurons).values())

    kept, removals = list(range(count)), []
    whole = bytes_of(kept, None)
    total = most_removals(goal, name, count, bytes_of, whole=whole, is_narrower=bool(width))
    curve = [CurvePoint(layers=count, weight_bytes=whole, kl_nats=0.0, top1_agreement=1.0)]

    def judge(neurons: dict[int, mx.array] | None) -> None:
        kl, agreement = distance(model, apart, partial(cut_down, model, kept, neurons))
        curve.append(
            CurvePoint(
                layers=len(kept),
                neurons=width.neurons if width and neurons else None,
                weight_bytes=bytes_of(kept, neurons),
                kl_nats=kl,
                top1_agreement=agreement,
            )
        )

    report("phase", {"name": "influence of layers", "total": total, "unit": "layers"})
    going = least_influential(model, measured)
    while not goal.is_reached(len(kept), bytes_of(kept), whole):
        if not (removal := next(going, None)):
            raise too_small(goal, name, bytes_of(kept), whole)
        removals.append(removal)
        kept.remove(removal.layer)
        judge(None)
        note = f"layer {removal.layer}: {removal.influence:.4f}"
        report("advance", {"by": 1, "note": note})
    neurons = None
    if width:
        report("phase", {"name": "neurons of MLPs", "total": 0, "unit": ""})
        with cut_down(model, kept, None):
            weights = neuron_weights(model, measured)
        neurons = {
            number: heaviest(each, width.neurons)
            for number, each in zip(kept, weights, strict=True)
        }
        judge(neurons)
    return Cut(
        kept=kept,
        neurons=neurons,
        width=width,
        removals=removals,
        curve=curve,
        measured=measured,
        apart=apart,
    )


def write_student(model: LanguageModel, folder: Path, cut: Cut) -> None:
    """Write what stays of a model as a folder that mlx_lm opens, and read it again.

    Args:
        model: The teacher, in memory.
        folder: Where to; it must not exist.
        cut: What stays.

    Raises:
        ConchError: The folder exists or cannot be written; or the student, on the first window,
            says another thing than what was measured.
    """
    require_free(folder)
    source = model.source
    document = {
        "made_by": "block influence",
        "teacher": source.model_id,
        "teacher_digest": source.weights_digest,
        "kept_layers": cut.kept,
        "removals": [asdict(removal) for removal in cut.removals],
        "mlp": asdict(cut.width) if cut.width else None,
        "curve": [asdict(point) for point in cut.curve],
        "tokens": sum(map(len, cut.measured)),
        "curve_tokens": sum(map(len, cut.apart)),
        **provenance(),
    }

    def look(written: Path) -> None:
        if not says_the_same(model, written, cut.kept, cut.neurons, cut.measured[0]):
            raise ConchError(
                f"{source.model_id} says another thing when it is read again without these parts, "
                "as where layers depend on their number: none can be left out of it here"
            )

    write_files(
        source,
        folder,
        student_arrays(file_arrays(source), cut.kept, cut.neurons),
        document,
        kept=cut.kept,
        width=cut.width.neurons if cut.width else None,
        beside=other_files(source.folder),
        look=look,
    )


def make_student(
    source: ModelSource,
    folder: Path,
    windows: Sequence[Sequence[int]],
    *,
    layers: int,
    report: Report = silent,
) -> Cut:
    """Write a model without its least influential layers as a folder that mlx_lm opens.

    Args:
        source: The whole model.
        folder: Where to; it must not exist.
        windows: Token ids of real texts; see `held_apart`.
        layers: How many stay.
        report: See `cut_to`.

    Returns:
        What was left out; also in the folder's student.json.

    Raises:
        ConchError: See `cut_to` and `write_student`.
    """
    require_free(folder)
    model = source.load()
    cut = cut_to(model, windows, Goal(layers=layers), report=report)
    write_student(model, folder, cut)
    model.release()
    return cut


def other_files(folder: Path) -> list[Path]:
    """What a model's folder holds besides weights and configuration."""
    left = ("config.json", "model.safetensors.index.json", DIGESTS, STUDENT_FILE, FUSED_FILE)
    suffixes = (".json", ".jinja", ".model", ".txt")
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix in suffixes and path.name not in left
    ]


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
