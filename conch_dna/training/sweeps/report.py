"""What people look at of a sweep: its table, its choice in words, its picture.

Knows what sweep.json holds, not how it came about. To show another figure: a column in
`sweep_table`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from conch_dna.metrics import WORSE
from conch_dna.screen.presentation import drawing, text_table
from conch_dna.training.runs.report import verdict_text
from conch_dna.training.sweeps.grid import settings_text, value_text

if TYPE_CHECKING:
    from rich.table import Table

_FIGURES = {
    "kl_nats": "KL to teacher",
    "chunk_kl_nats": "chunk KL",
    "cross_entropy": "cross-entropy",
}
_SHORT = {"kl_nats": "KL", "chunk_kl_nats": "chunk KL", "cross_entropy": "CE"}
_UNITS = {
    "kl_nats": "nats per token",
    "chunk_kl_nats": "nats per chunk",
    "cross_entropy": "nats per token",
}


def sweep_table(document: dict[str, Any]) -> "Table":
    """Every run of a sweep, the best first, and how far it is from that one.

    Args:
        document: What sweep.json holds.
    """
    figures = dict.fromkeys([document["figure"], "cross_entropy"])
    runs = document["runs"]
    # What changes nothing in a run is none of its settings.
    swept = list(dict.fromkeys(name for run in runs for name in run["settings"]))
    names = [name.replace("_", "-") for name in swept]
    names += [_SHORT[name] for name in figures] + ["step", "above best", "95% interval"]
    before = [f"{document['before'][name]:.4f}" for name in figures]
    rows = [["before", *[""] * (len(swept) - 1), *before, "", "", ""]]
    for number, run in enumerate(runs):
        rows.append(
            [
                *(value_text(run["settings"].get(name, "–")) for name in swept),
                *(f"{run['after'][name]:.4f}" for name in figures),
                str(run["best_step"]),
                *(_distance(run["against_best"]) if number else ("the best", "")),
            ]
        )
    table = text_table(f"{document['domain']}: {len(runs)} runs", names, rows, numbers=names)
    table.caption = (
        f"{_FIGURES[document['figure']]} on {document['heldout_examples']} held-out examples; worse"
        " than the best is shown where the interval lies above 0"
    )
    return table


def _distance(found: dict[str, Any]) -> tuple[str, str]:
    low, high = found["interval"] or (None, None)
    interval = "too few" if low is None else f"{low:+.4f}, {high:+.4f}"
    return f"{found['difference']:+.4f}", interval


def choice_text(document: dict[str, Any]) -> list[str]:
    """What the sweep chose, how sure that is, and what the test data say of it, in sentences.

    Args:
        document: What sweep.json holds.
    """
    domain, best, count = document["domain"], document["runs"][0], len(document["runs"])
    found = {"before": document["before"], **best}
    lines = [
        f"{domain}: {f'the best of {count}' if count > 1 else 'the one finished run'} is "
        f"{settings_text(best['settings'])}",
        f"on held-out examples {verdict_text(found)}",
    ]
    near = sum(run["against_best"]["verdict"] != WORSE for run in document["runs"][1:])
    if near:
        verb = "is" if near == 1 else "are"
        lines.append(f"{near} of the other {count - 1} runs {verb} not shown to be worse than it")
    optimistic = (
        f"the best of {count} on the examples that chose it is optimistic: each run's figure has "
        "its luck, and the luckiest is taken"
        if count > 1
        else "one run alone was not compared with others"
    )
    confirmed = [done for done in document["confirmed"] if done["run"] == best["name"]]
    if not confirmed:
        ask = "--test-data FILE measures it once on examples that chose nothing"
        return [*lines, f"{optimistic}; {ask}"]
    done = confirmed[-1]
    lines.append(f"{optimistic}; on {done['examples']} test examples {verdict_text(done)}")
    earlier = {
        each["run"] for each in document["confirmed"] if each["test_data"] == done["test_data"]
    }
    if len(earlier) > 1:
        lines.append(
            f"these test data have judged {len(earlier) - 1} other choices before: take new ones"
        )
    return lines


def draw_sweep(path: Path, document: dict[str, Any]) -> None:
    """Draw every run's figure as a point, with the interval of its distance from the best.

    Args:
        path: The PNG to write.
        document: What sweep.json holds.
    """
    figure, runs = document["figure"], document["runs"]
    best = runs[0]["after"][figure]
    labels = [settings_text(run["settings"]) for run in runs]
    with drawing(path, (8, 1.6 + 0.34 * len(runs))) as picture:
        axes = picture.subplots()
        for row, run in enumerate(runs):
            found, value = run["against_best"], run["after"][figure]
            worse = found["verdict"] == WORSE
            colour = "C0" if row == 0 else "grey" if worse else "C1"
            if row and found["interval"]:
                axes.plot([best + bound for bound in found["interval"]], [row] * 2, color=colour)
            axes.plot(value, row, "o" if row else "D", color=colour)
        axes.axvline(best, color="C0", linewidth=0.8, linestyle="--")
        axes.set_yticks(range(len(runs)), labels)
        axes.invert_yaxis()
        axes.set(xlabel=f"held-out {_FIGURES[figure]}, {_UNITS[figure]}")
        axes.grid(alpha=0.3, axis="x")
        # Of the whole picture, since long names of runs leave the axes little room.
        picture.suptitle(
            f"{document['domain']}: {len(runs)} runs, each with the 95% interval of its way above "
            f"the best\n(student before: {document['before'][figure]:.4f})",
            fontsize="medium",
        )
        handles = [
            axes.plot([], [], marker, color=colour, label=label)[0]
            for marker, colour, label in (
                ("D", "C0", "lowest"),
                ("o-", "C1", "not shown to be worse"),
                ("o-", "grey", "worse"),
            )
        ]
        picture.legend(handles=handles, loc="outside lower center", ncols=3, fontsize="small")
