"""The pictures of a run's HTML page: curves, KL by what a token is like, calibration.

Knows evaluation.json's figures and matplotlib; nothing of pages. To add a picture: a function here
that gives an SVG element, and its place in report.html.jinja.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from conch_dna.screen.presentation import svg_text
from conch_dna.training.runs.report import curves_size, draw_curves

# Points of a line; more cannot be told apart, and would make the page big.
MOST_POINTS = 400
_SIZE = (3.7, 3.1)
_COLOURS = {"before": "grey", "after": "C0", "teacher": "C2"}
_NAMES = {"before": "student before", "after": "student after", "teacher": "teacher"}


def thinned(history: Sequence[dict[str, Any]], best: int) -> tuple[list[dict[str, Any]], int]:
    """So much of a training log as can be drawn, and which part of it that is.

    Returns:
        Every n-th row of each split, the last one and that of the kept step; and n.
    """
    splits = [[r for r in history if r["split"] == name] for name in ("train", "heldout")]
    every = max(1, -(-max(map(len, splits)) // MOST_POINTS))
    kept = [
        row
        for rows in splits
        for number, row in enumerate(rows)
        if number % every == 0 or row is rows[-1] or row["step"] == best
    ]
    return kept, every


def curves(history: Sequence[dict[str, Any]], *, best: int) -> str:
    """Training and held-out losses by step, each on axes of its own."""
    return svg_text(curves_size(history), lambda figure: draw_curves(figure, history, best=best))


def position_labels(first: Sequence[int]) -> list[str]:
    """What a bin of places holds, by the first place of each: 1, 2, 3–4, 5–8.

    >>> position_labels([1, 2, 3, 5])
    ['1', '2', '3–4', '5–8']
    """
    # Bin b ends at a power of two, and begins one behind half of it.
    return [str(n) if n < 3 else f"{n}–{2 * (n - 1)}" for n in first]


def by_position(bins: Mapping[str, Any]) -> str:
    """KL by a token's place in the answer."""
    places = range(len(bins["first"]))

    def draw(figure: Any) -> None:
        axes = _means(figure, bins, places, "place of the token in the answer, from")
        axes.set_xticks(places, bins["first"])

    return svg_text(_SIZE, draw)


def by_entropy(bins: Mapping[str, Any]) -> str:
    """KL by how unsure the teacher was of the token."""

    def draw(figure: Any) -> None:
        _means(figure, bins, bins["mean"], "the teacher's entropy, nats")

    return svg_text(_SIZE, draw)


def _means(figure: Any, bins: Mapping[str, Any], places: Sequence[float], label: str) -> Any:
    axes = figure.subplots()
    for name in ("before", "after"):
        means = [total / count for total, count in zip(bins[name], bins["count"], strict=True)]
        axes.plot(places, means, "o-", color=_COLOURS[name], label=_NAMES[name], markersize=4)
    axes.set(xlabel=label, ylabel="KL to the teacher, nats", ylim=(0, None))
    _finish(figure, axes)
    return axes


def calibration(found: Mapping[str, Mapping[str, Any]]) -> str:
    """How often the likeliest token is the text's own, for how sure a model is of it."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle="--")
        for name, bins in found.items():
            style = {"color": _COLOURS[name], "label": _NAMES[name], "markersize": 4}
            axes.plot(bins["confidence"], bins["outcome"], "o-", **style)
        axes.set(xlabel="probability of the likeliest token", ylabel="share that is the text's own")
        axes.set(xlim=(0, 1), ylim=(0, 1))
        _finish(figure, axes)

    return svg_text(_SIZE, draw)


def differences(verdicts: Mapping[str, Mapping[str, Any] | None]) -> str:
    """How far a figure moved in each run, with its interval; left of 0 is better."""
    colours = {"better": "C2", "worse": "C3"}

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.axvline(0, color="grey", linewidth=0.8, linestyle="--")
        for place, found in enumerate(verdicts.values()):
            if found is None:
                continue
            colour = colours.get(found["verdict"], "C1")
            if found["interval"]:
                axes.plot(found["interval"], [place, place], color=colour)
            axes.plot([found["difference"]], [place], "o", color=colour)
        axes.set_yticks(range(len(verdicts)), list(verdicts))
        axes.set(ylim=(len(verdicts) - 0.5, -0.5), xlabel="after less before, with its interval")
        axes.grid(alpha=0.3)

    return svg_text((7, 1 + 0.35 * len(verdicts)), draw)


def _finish(figure: Any, axes: Any) -> None:
    axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize="small")
