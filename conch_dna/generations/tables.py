"""What people look at of a line: verdicts, a generation's origin, and the line as a tree.

Knows manifests and names; draws and formats, decides nothing. To show another figure: a row in
`manifest_table`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conch_dna.errors import NotWholeError
from conch_dna.generations.line import FAILED, Line
from conch_dna.generations.settings import SDFT
from conch_dna.screen.presentation import drawing, pairs_table, text_table
from conch_dna.training.runs.report import draw_losses, step_legend

if TYPE_CHECKING:
    from rich.table import Table
    from rich.tree import Tree


def verdict_table(name: str, verdicts: Sequence[dict[str, Any]]) -> "Table":
    """Every gate with its reason, the failed ones first.

    Args:
        name: Of the child.
        verdicts: As a manifest holds them.
    """
    passed = all(verdict["passed"] for verdict in verdicts)
    rows = [
        (
            verdict["gate"],
            "passed" if verdict["passed"] else "FAILED",
            str(verdict["reason"]).removeprefix(f"{verdict['gate']}: "),
        )
        for verdict in sorted(verdicts, key=lambda each: bool(each["passed"]))
    ]
    title = f"{name}: {'every gate passed' if passed else 'refused'}"
    return text_table(title, ("gate", "", "why"), rows)


@contextmanager
def _as_written(name: str) -> Iterator[None]:
    """Turns what another form of a manifest raises into one line."""
    try:
        yield
    except (AttributeError, KeyError, StopIteration, TypeError, ValueError) as error:
        raise NotWholeError(
            f"the manifest of {name} has another form than generations have: restore its folder"
        ) from error


def manifest_table(name: str, manifest: dict[str, Any]) -> "Table":
    """What a generation grew from and how it was taught."""
    with _as_written(name):
        rows: dict[str, Any] = {"created": manifest["created"]}
        if "base" in manifest:
            rows["base"] = manifest["base"]["model"]
        if "teachers" in manifest:
            request, training = manifest["evolution_request"], manifest["training_params"]
            stabilizers = manifest["stabilizers"]
            rows |= {
                "teachers": ", ".join(f"{t['path']} ({t['role']})" for t in manifest["teachers"]),
                "data": f"{request['train']} to learn, {request['heldout']} held out, "
                f"{request['recall']} earlier ones to recall",
                "loss": _loss(training),
                "steps": f"{training['num_iters']} of {training['batch_size']}, "
                f"{'every weight' if training['full'] else 'LoRA'}",
                "stabilizers": f"EMA {stabilizers['ema_decay']:g}, replay "
                f"{stabilizers['replay_share']:.0%} of {request['replay']} records, "
                f"{len(stabilizers.get('taboo_words', ()))} taboo words",
                "decision": manifest["decision"],
            }
        versions = [f"{package} {version}" for package, version in manifest["versions"].items()]
        rows["versions"] = ", ".join(versions)
    return pairs_table(name, rows)


def _loss(training: dict[str, Any]) -> str:
    at = f"at temperature {training['temperature']:g}"
    if training.get("method") != SDFT:
        shares = ("alpha", "CE"), ("beta", "KL"), ("gamma", "R")
        return f"{' + '.join(f'{training[name]:g} {word}' for name, word in shares)} {at}"
    follows = training["teacher_ema"]
    return (
        f"{training['divergence']} {at} on its own answers of at most "
        f"{training['rollout_tokens']} tokens, by its parent"
        + (f" that follows it ({follows:g} a round)" if follows < 1 else "")
        + (f", shown {shown}" if (shown := training["demonstrations"]) else "")
    )


@dataclass(frozen=True, kw_only=True)
class Node:
    """A generation or a refused child, as the tree shows it; `gates` says which of them passed."""

    name: str
    parent: str | None
    created: str
    note: str
    gates: tuple[tuple[str, bool], ...] = ()

    @property
    def failed(self) -> bool:
        """Whether it was refused."""
        return bool(FAILED.fullmatch(self.name))


def nodes_of(line: Line) -> list[Node]:
    """Every generation and refused child of a line, parents before their children."""
    nodes = []
    for name in [*line.generations(), *line.failed()]:
        manifest = line.manifest(name)
        with _as_written(name):
            verdicts = manifest.get("verdicts", [])
            reasons = [each["gate"] for each in verdicts if not each["passed"]]
            note = f"refused by {', '.join(reasons)}" if reasons else ""
            if not note and verdicts:
                gained = next(each for each in verdicts if each["gate"] == "generalize")
                note = f"generalize {gained['figures'].get('difference', 0):+.3f}"
            nodes.append(
                Node(
                    name=name,
                    parent=manifest["parent"],
                    created=manifest["created"],
                    note=note,
                    gates=tuple((str(each["gate"]), bool(each["passed"])) for each in verdicts),
                )
            )
    return nodes


def line_tree(title: str, nodes: Sequence[Node], head: str) -> "Tree":
    """A line as a tree for the terminal."""
    from rich.tree import Tree

    tree = Tree(title)
    branches: dict[str | None, Tree] = {None: tree}
    for node in nodes:
        mark = " ← HEAD" if node.name == head else ""
        text = f"{node.name}{mark}  {node.created}  {node.note}".rstrip()
        if node.parent not in branches:
            raise NotWholeError(
                f"{node.name} says that its parent is {node.parent!r}, and there is no such "
                "generation before it: its manifest was altered"
            )
        branches[node.name] = branches[node.parent].add(text)
    return tree


def draw_line(path: Path, *, title: str, nodes: Sequence[Node], head: str) -> None:
    """Draw a line as a tree, oldest above, with dates and gates; refused children are crosses.

    Args:
        path: Where to; its ending decides the format.
        title: The line's name.
        nodes: Parents before their children, as `nodes_of` gives them.
        head: The current generation.
    """
    depth: dict[str | None, int] = {None: -1}
    for node in nodes:
        depth[node.name] = depth[node.parent] + 1
    places = {node.name: (depth[node.name], -row) for row, node in enumerate(nodes)}
    texts = {node.name: _node_text(node, head) for node in nodes}
    # Inches; a letter of the small font takes about 0.085 at most.
    tree = 0.5 * (max(depth.values()) + 1)
    words = 0.085 * max(len(line) for pair in texts.values() for line in pair)
    size = (tree + max(words, 0.11 * len(title) + 2), 0.55 * len(nodes) + 0.7)
    with drawing(path, size, dpi=150, form=None) as figure:
        axes = figure.subplots()
        for node in nodes:
            x, y = places[node.name]
            if node.parent is not None:
                parent_x, parent_y = places[node.parent]
                axes.plot([parent_x, parent_x, x], [parent_y, y, y], color="0.7", zorder=1)
            marker, color = ("x", "tab:red") if node.failed else ("o", "tab:blue")
            shown = 140 if node.name == head else 60
            axes.scatter([x], [y], marker=marker, color=color, s=shown, zorder=2)
            named, judged = texts[node.name]
            where: dict[str, Any] = {
                "xytext": (12, 0),
                "textcoords": "offset points",
                "fontsize": "small",
            }
            bold = "bold" if node.name == head else "normal"
            grey = "tab:red" if node.failed else "0.3"
            axes.annotate(named, (x, y), va="bottom", weight=bold, **where)
            axes.annotate(judged, (x, y), va="top", color=grey, **where)
        axes.set_title(f"{title} (HEAD is {head})", loc="left")
        axes.set(xlim=(-0.5, 2 * size[0] - 0.5), ylim=(-len(nodes) + 0.4, 0.6))
        axes.axis("off")


def _node_text(node: Node, head: str) -> tuple[str, str]:
    """Two lines for the picture: its name and date, and what the gates said."""
    name = node.name.rsplit("-", 1)[0] if node.failed else node.name
    gates = "   ".join(f"{'✓' if passed else '✗'} {gate}" for gate, passed in node.gates)
    gained = "" if node.failed else node.note
    mark = "  ← HEAD" if node.name == head else ""
    judged = "   ".join(part for part in (gates, gained) if part)
    # Its time to the minute.
    return f"{name}{mark}  {node.created[:16].replace('T', ' ')}", judged or "the first: not judged"


def draw_learning(
    path: Path, *, history: Sequence[dict[str, Any]], title: str, best: int, teachers: int = 2
) -> None:
    """Draw a generation's losses, and by which strategy its tokens were taught, by step.

    Args:
        path: The PNG to write.
        history: The trainer's rows, with the sums `two_teachers.COUNTS`.
        title: Above the picture.
        best: The step that is kept; marked.
        teachers: How many there were; how two of them share the tokens is drawn for two only.
    """
    rows = [row for row in history if row["split"] == "train"]
    steps = [row["step"] for row in rows]
    names = {
        "blended": "both teachers" if teachers > 1 else "the teacher",
        "t1_only": "the first alone",
        "gold_fallback": "the text",
        "skipped": "skipped",
    }
    shares = {
        label: [row[name] / row["tokens"] for row in rows]
        for name, label in names.items()
        if any(row[name] for row in rows)
    }
    losses = {"loss": "combined", "kd": "KD (t² KL)", "hard": "the text's part"}
    count = len(losses) + teachers
    with drawing(path, (8, 1 + 1.9 * count)) as figure:
        panels = list(figure.subplots(count, sharex=True))
        draw_losses(panels, history, losses)
        strategies, *between = panels[len(losses) :]
        strategies.stackplot(steps, list(shares.values()), labels=list(shares), alpha=0.8)
        strategies.set(ylabel="share of tokens", ylim=(0, 1))
        for axes in between:
            for name, label in (
                ("js", "disagreement (JS)"),
                ("first_weight", "first teacher's weight"),
            ):
                axes.plot(steps, [row[name] / row["tokens"] for row in rows], label=label)
            axes.set(ylabel="mean over tokens", ylim=(0, 1.02))
        for axes in (strategies, *between):
            axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
        panels[-1].set(xlabel="optimiser step")
        step_legend(figure, panels, best)
        figure.suptitle(title)
