"""What people look at after a run: the evaluation table, the training curve, the samples.

Knows figures and texts, not how they came about; draws and formats, decides nothing.
To show another figure: a column in `evaluation_table` or a line in `draw_curve`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conch_dna.errors import counted
from conch_dna.metrics import BETTER, FEWEST_EXAMPLES
from conch_dna.presentation import add_figures, drawing, text_table
from conch_dna.training.cross_tokenizer.alignments import INDEX
from conch_dna.training.cross_tokenizer.token_bytes import KINDS

if TYPE_CHECKING:
    from rich.table import Table

    from conch_dna.training.cross_tokenizer.vocabulary import TokenizerComparison
    from conch_dna.training.settings import KDConfig, KDResult


def evaluation_table(
    domain: str, evaluation: dict[str, Any], *, width: int | None = None
) -> "Table":
    """The before/after table of one domain, for a rich console.

    Args:
        domain: Its name.
        evaluation: The content of evaluation.json.
        width: Of the console: where headings in one line do not fit, each word gets its own.
    """
    from rich.table import Table

    closed = evaluation["gap_closed"]
    share = "no gap to close" if closed is None else f"{closed:.1%} of the gap closed"
    before = evaluation["before"]
    caption = f"on {counted(before['tokens'], 'held-out token')}"
    if evaluation.get("alignment", INDEX) != INDEX:
        caption += (
            f"; KL and agreement at the {before['compared_tokens']:,} that are one token of the "
            f"teacher too, chunk KL on {before['chunks']:,} chunks; the teacher's cross-entropy "
            "is of its own tokens"
        )
    figures = {
        "KL to teacher (nats)": ("kl_nats", ".4f"),
        "chunk KL (nats)": ("chunk_kl_nats", ".4f"),
        "cross-entropy": ("cross_entropy", ".4f"),
        "perplexity": ("perplexity", ".2f"),
        "bits per byte": ("bits_per_byte", ".4f"),
        "top-1 agreement": ("top1_agreement", ".1%"),
    }
    if evaluation.get("alignment", INDEX) == INDEX:
        # With one tokenizer a chunk is a token, whose full KL says more.
        del figures["chunk KL (nats)"]
    else:
        # The perplexities of two tokenizers cannot be compared.
        del figures["perplexity"]
    rows = [evaluation[name] for name in ("before", "after", "teacher")]
    columns = {
        heading: (form, [row.get(name) for row in rows])
        for heading, (name, form) in figures.items()
    }
    table = Table(title=f"{domain}: {share}", caption=caption)
    add_figures(table, ("student before", "student after", "teacher"), columns, width=width)
    return table


# How the figures of a verdict are called, and their unit.
_FIGURE_WORDS = {
    "kl_nats": ("KL to the teacher", "nats a token"),
    "chunk_kl_nats": ("chunk KL to the teacher", "nats a chunk"),
    "cross_entropy": ("cross-entropy", "nats a token"),
}


def verdict_text(evaluation: dict[str, Any]) -> str:
    """One line: whether the student became better, by what, and how sure that is."""
    found = evaluation["verdict"]
    name, unit = _FIGURE_WORDS[found["figure"]]
    before, after = (evaluation[row][found["figure"]] for row in ("before", "after"))
    if found["interval"] is None:
        examples = counted(found["examples"], "held-out example")
        sure = f"on {examples}, and an interval needs {FEWEST_EXAMPLES}"
    else:
        low, high = found["interval"]
        sure = (
            f"{found['confidence']:.0%} interval {low:+.4f} to {high:+.4f}, "
            f"{counted(found['examples'], 'held-out example')}"
        )
    word = found["verdict"] if found["verdict"] == BETTER else found["verdict"].upper()
    return (
        f"the student is {word}: {name} {before:.4f} before, {after:.4f} after, "
        f"{found['difference']:+.4f} {unit} ({sure})"
    )


def advice(result: "KDResult", config: "KDConfig") -> str:
    """What to try where a student did not become better, in one line."""
    metadata, found = result.metadata, result.evaluation["verdict"]
    times = config.examples_read / max(1, metadata["train_examples"])
    data = f"{counted(metadata['train_examples'], 'example')}, each read {times:.1f} times"
    slower = f"a lower --learning-rate than {config.learning_rate:g}"
    longer = f"more --iters than {config.num_iters}"
    if found["interval"] is None:
        tries = ["more data", f"a higher --val-fraction than {config.val_fraction:g}"]
    elif times < 1:
        tries = [f"{longer} ({data})"]
    elif metadata["best_step"] == config.num_iters and found["difference"] < 0:
        # Nothing was overdone: the last step was the best.
        tries = [longer, f"more data ({data})"]
    else:
        tries = [f"more data ({data})", slower, f"fewer --iters than {config.num_iters}"]
    before, after = (result.evaluation[row]["cross_entropy"] for row in ("before", "after"))
    if found["figure"] != "cross_entropy" and found["difference"] >= 0 and 0 < config.alpha < 1:
        tries.insert(0, f"a higher --alpha than {config.alpha:g}")
        if after < before:
            tries[0] += (
                f" (cross-entropy fell from {before:.4f} to {after:.4f}: the texts pull away from "
                "the teacher; if they are what matters, --select-by cross_entropy)"
            )
    unmoved = (
        "the kept step is 0, so the adapter changes nothing; " if not metadata["best_step"] else ""
    )
    return f"{unmoved}try {', or '.join(tries)}"


def comparison_table(
    teacher: str, student: str, comparison: "TokenizerComparison", rows: dict[str, str]
) -> "Table":
    """The table of `conch-dna vocab`.

    Args:
        teacher: What the user called it.
        student: What the user called the other one.
        comparison: What `vocabulary.compare_tokenizers` found.
        rows: Further lines over both columns.
    """

    def number(count: int | None) -> str:
        return "unknown" if count is None else f"{count:,}"

    c = comparison
    shared = c.shared_tokens
    lines = {
        "written as": (KINDS[c.teacher_kind], KINDS[c.student_kind]),
        "tokens": (number(c.teacher_tokens), number(c.student_tokens)),
        "rows of the head": (number(c.teacher_rows), number(c.student_rows)),
        "shared tokens": tuple(
            f"{shared:,} ({shared / max(1, count):.1%})"
            for count in (c.teacher_tokens, c.student_tokens)
        ),
        "with the same id": (number(c.same_ids),) * 2,
        "such as": (" ".join(c.shared_examples),) * 2,
        "only here": (" ".join(c.teacher_examples), " ".join(c.student_examples)),
        **{f"id {index}": (first, second) for index, first, second in c.id_examples},
        **{name: (text, "") for name, text in rows.items()},
    }
    return text_table(
        f"the tokenizers are {c.verdict}",
        ("", teacher, student),
        [(name, *cells) for name, cells in lines.items()],
    )


def draw_curve(path: Path, history: Sequence[dict[str, Any]], *, title: str, best: int) -> None:
    """Draw training and held-out losses by step into a PNG.

    Args:
        path: The file to write.
        history: The trainer's rows.
        title: Above the picture.
        best: The step whose adapter is kept; marked.
    """
    with drawing(path, (8, 4.5)) as figure:
        axes = figure.subplots()
        draw_losses(axes, history, {"loss": "combined", "kd": "KD (t² KL)", "ce": "cross-entropy"})
        axes.axvline(best, color="grey", linewidth=0.8, label=f"kept: step {best}")
        axes.set(xlabel="optimiser step", title=title)
        axes.legend(fontsize="small")


def draw_losses(axes: Any, history: Sequence[dict[str, Any]], names: Mapping[str, str]) -> None:
    """Draw some of the trainer's figures by step, those in training and those held out.

    Args:
        axes: matplotlib's.
        history: The trainer's rows.
        names: Figures, in nats per token, and what they are called.
    """
    for (name, label), colour in zip(names.items(), ("C0", "C1", "C2"), strict=False):
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
    axes.set(ylabel="nats per token")
    axes.grid(alpha=0.3)


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
