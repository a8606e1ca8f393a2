"""What people look at after a run: the evaluation table, the training curve, the samples.

Knows figures and texts, not how they came about; draws and formats, decides nothing.
To show another figure: a column in `evaluation_table` or a line in `draw_curve`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


def evaluation_table(domain: str, evaluation: dict[str, Any]) -> "Table":
    """The before/after table of one domain, for a rich console.

    Args:
        domain: Its name.
        evaluation: The content of evaluation.json.
    """
    from rich.table import Table

    closed = evaluation["gap_closed"]
    share = "no gap to close" if closed is None else f"{closed:.1%} of the gap closed"
    tokens = evaluation["before"]["tokens"]
    table = Table(title=f"{domain}: {share}", caption=f"on {tokens:,} held-out tokens")
    table.add_column("")
    for name in ("KL to teacher (nats)", "cross-entropy", "perplexity", "top-1 agreement"):
        table.add_column(name, justify="right")
    rows = {
        "student before": evaluation["before"],
        "student after": evaluation["after"],
        "teacher": evaluation["teacher"],
    }
    for label, figures in rows.items():
        table.add_row(
            label,
            f"{figures['kl_nats']:.4f}",
            f"{figures['cross_entropy']:.4f}",
            f"{figures['perplexity']:.2f}",
            f"{figures['top1_agreement']:.1%}",
        )
    return table


def draw_curve(path: Path, history: Sequence[dict[str, Any]], *, title: str, best: int) -> None:
    """Draw training and held-out losses by step into a PNG.

    Args:
        path: The file to write.
        history: The trainer's rows.
        title: Above the picture.
        best: The step whose adapter is kept; marked.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = {"loss": "combined", "kd": "KD (t² KL)", "ce": "cross-entropy"}
    for (name, label), colour in zip(names.items(), ("C0", "C1", "C2"), strict=True):
        for split, style in (("train", ":"), ("heldout", "-")):
            rows = [row for row in history if row["split"] == split and name in row]
            axes.plot(
                [row["step"] for row in rows],
                [row[name] for row in rows],
                style,
                color=colour,
                marker="." if split == "heldout" else None,
                label=f"{label}, {'held out' if split == 'heldout' else 'training'}",
            )
    axes.axvline(best, color="grey", linewidth=0.8, label=f"kept: step {best}")
    axes.set(xlabel="optimiser step", ylabel="nats per token", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, format="png")


def samples_text(
    domain: str, prompts: Sequence[str], columns: Mapping[str, Sequence[str]], *, draw: str
) -> str:
    """samples.md: what each model makes of a few held-out prompts.

    Args:
        domain: Its name.
        prompts: As text.
        columns: Model's label to its continuations.
        draw: How they were drawn, in words.
    """
    lines = [f"# {domain}: continuations of held-out prompts", "", f"Drawn with {draw}.", ""]
    for number, prompt in enumerate(prompts):
        lines += [f"## {number + 1}", "", _quoted(prompt), ""]
        for label, texts in columns.items():
            lines += [f"**{label}**", "", _quoted(texts[number]), ""]
    return "\n".join(lines)


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.strip().splitlines() or ["(nothing)"])
