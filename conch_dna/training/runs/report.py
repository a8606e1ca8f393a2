"""What people look at after a run: the evaluation table, the training curve, the samples.

Knows figures and texts, not how they came about; draws and formats, decides nothing.
To show another figure: a column in `evaluation_table` or an entry in CURVES.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conch_dna.errors import number_of
from conch_dna.metrics import BETTER, FEWEST_EXAMPLES
from conch_dna.screen.presentation import add_figures, drawing, text_table
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

    table = Table(title=f"{domain}: {gap_text(evaluation)}", caption=caption_of(evaluation))
    add_figures(table, ROWS, figure_columns(evaluation), width=width)
    return table


# The rows of the evaluation table; `figure_columns` gives a figure for each.
ROWS = ("student before", "student after", "teacher")


def gap_text(evaluation: dict[str, Any]) -> str:
    """How much of the KL to the teacher training took away, in words."""
    closed = evaluation["gap_closed"]
    return "no gap to close" if closed is None else f"{closed:.1%} of the gap closed"


def caption_of(evaluation: dict[str, Any]) -> str:
    """On how many tokens the figures stand, and on which of them each."""
    before = evaluation["before"]
    caption = f"on {number_of(before['tokens'], 'held-out token')}"
    if evaluation.get("alignment", INDEX) != INDEX:
        caption += (
            f"; KL and agreement at the {before['compared_tokens']:,} that are one token of the "
            f"teacher too, chunk KL on {before['chunks']:,} chunks; the teacher's cross-entropy "
            "is of its own tokens"
        )
    return caption


def figure_columns(evaluation: dict[str, Any]) -> dict[str, tuple[str, list[float | None]]]:
    """By heading the format of a figure, and one for each of ROWS (None where not measured)."""
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
    return {
        heading: (form, [row.get(name) for row in rows])
        for heading, (name, form) in figures.items()
    }


def judged_sets(domain: str, evaluation: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The sets that a run was measured on: what was held out, and the test set if there is one.

    Returns:
        What evaluation.json says of each, by what tables and lines call it.
    """
    sets = {domain: evaluation}
    return sets | ({f"{domain}, test set": evaluation["test"]} if "test" in evaluation else {})


_OWN_WORDS = {
    "kl_nats": "KL to the teacher (nats)",
    "repetition": "repeated 4-grams",
    "distinct_2": "different pairs of tokens",
    "tokens": "tokens",
    "ended": "ended by itself",
    "valid": "valid JSON",
}


def own_answers_rows(evaluation: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """What became of the student's own answers, a row for each figure; none where not measured."""
    rows = []
    for name, found in evaluation.get("own_answers", {}).items():
        form = {"kl_nats": ".4f", "tokens": ".1f"}.get(name, ".1%")
        low, high = found["interval"]
        numbers = (found["before"], found["after"])
        signed = f"{found['difference']:+{form}} [{low:+{form}}, {high:+{form}}]"
        word = found["verdict"] or ""
        rows.append((_OWN_WORDS[name], *(f"{n:{form}}" for n in numbers), signed, word))
    return rows


OWN_COLUMNS = ("its own answers", "before", "after", "change, 95%", "verdict")


def own_answers_table(title: str, evaluation: Mapping[str, Any]) -> "Table | None":
    """The same as a table; None where nothing was measured."""
    if not (rows := own_answers_rows(evaluation)):
        return None
    prompts = max(found["prompts"] for found in evaluation["own_answers"].values())
    title = f"{title}: its own answers to {number_of(prompts, 'held-out prompt')}"
    return text_table(title, OWN_COLUMNS, rows)


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
        sure = (
            f"on {number_of(found['examples'], 'held-out example')}, and an interval needs "
            f"{FEWEST_EXAMPLES}"
        )
    else:
        low, high = found["interval"]
        sure = (
            f"{found['confidence']:.0%} interval {low:+.4f} to {high:+.4f}, "
            f"{number_of(found['examples'], 'held-out example')}"
        )
    word = found["verdict"] if found["verdict"] == BETTER else found["verdict"].upper()
    first, last = (evaluation[row]["cross_entropy"] for row in ("before", "after"))
    but = ""
    if word == BETTER and last > first:
        but = f"; but the cross-entropy of the texts rose from {first:.4f} to {last:.4f}"
    return (
        f"the student is {word}: {name} {before:.4f} before, {after:.4f} after, "
        f"{found['difference']:+.4f} {unit} ({sure}){but}"
    )


def slice_text(evaluation: Mapping[str, Any]) -> str:
    """One line: the part of the held-out data that lost most; empty where there are no parts."""
    if not (found := evaluation.get("slice")):
        return ""
    unit = _FIGURE_WORDS[evaluation["verdict"]["figure"]][1]
    low, high = found["interval"]
    change = f"{found['difference']:+.4f} {unit} ({found['confidence']:.1%} interval "
    change += f"{low:+.4f} to {high:+.4f}, {number_of(found['examples'], 'example')}, such as "
    change += f"{', '.join(found['worst'])})"
    part = f"{found['by']} {found['slice']}"
    if found["lost"]:
        return f"a part of it became WORSE: {part}, {change}"
    return f"no part is shown to have lost; nearest to it {part}, {change}"


def advice(result: "KDResult", config: "KDConfig") -> str:
    """What to try where a student did not become better, in one line."""
    metadata, found = result.metadata, result.evaluation["verdict"]
    times = config.examples_read / max(1, metadata["train_examples"])
    data = f"{number_of(metadata['train_examples'], 'example')}, each read {times:.1f} times"
    slower = f"a lower --learning-rate than {config.learning_rate:g}"
    longer = f"more --iters than {config.num_iters}"
    if found["interval"] is None:
        tries = ["more data", f"a higher --val-fraction than {config.val_fraction:g}"]
        tries = ["more --valid-data"] if metadata.get("own_heldout") else tries
    elif times < 1 and not config.on_policy:
        tries = [f"{longer} ({data})"]
    elif metadata["best_step"] == config.num_iters and found["difference"] < 0:
        # Nothing was overdone: the last step was the best.
        tries = [longer, f"more data ({data})"]
    else:
        tries = [f"more data ({data})", slower, f"fewer --iters than {config.num_iters}"]
    before, after = (result.evaluation[row]["cross_entropy"] for row in ("before", "after"))
    rise = metadata.get("rise")
    if rise:
        # What blew up is mended by neither more steps nor another mixture of losses.
        few = tries if found["interval"] is None else []
        overdone = [f"fewer --iters than {config.num_iters}", *(few or [f"more data ({data})"])]
        tries = [f"{slower} ({rise})", *(overdone if metadata["best_step"] else few)]
    elif found["figure"] != "cross_entropy" and found["difference"] >= 0 and 0 < config.alpha < 1:
        tries.insert(0, f"a higher --alpha than {config.alpha:g}")
        if after < before:
            tries[0] += (
                f" (cross-entropy fell from {before:.4f} to {after:.4f}: the texts pull away from "
                "the teacher; if they are what matters, --select-by cross_entropy)"
            )
    if not rise and found["figure"] == "kl_nats" and found["difference"] >= 0:
        first, lowest = metadata.get("heldout_kd") or (0.0, 0.0)
        if config.alpha and config.temperature != 1 and lowest < first:
            tries.insert(
                0,
                f"--temperature 1 (at temperature {config.temperature:g} the KD loss fell from "
                f"{first:.4f} to {lowest:.4f}, and the KL is taken at 1)",
            )
    unmoved = (
        "the kept step is 0, so the adapter changes nothing; " if not metadata["best_step"] else ""
    )
    return f"{unmoved}try {', or '.join(tries)}"


def rise_of(history: Sequence[Mapping[str, Any]]) -> str:
    """What rose although training lowers it, in words; empty where nothing did.

    A KL that rises while the cross-entropy falls is none: the texts pull away from the teacher.

    Args:
        history: The trainer's rows.
    """
    for split, words in (("heldout", "held-out"), ("train", "training")):
        rows = [row for row in history if row["split"] == split]
        if len(rows) < 2:
            continue
        first, last = rows[0], rows[-1]
        # Training rows are of different batches.
        limit = 1.0 if split == "heldout" else 1.1
        risen = [n for n in CURVES if n in first and n in last and last[n] > limit * first[n]]
        if risen and all(n in risen for n in ("ce", "loss") if n in first):
            name = risen[0]
            label = "loss" if name == "loss" else CURVES[name]
            return f"{words} {label} rose from {first[name]:.4f} to {last[name]:.4f}"
    return ""


def heldout_kd(history: Sequence[Mapping[str, Any]]) -> list[float] | None:
    """The held-out KD loss of a run before its first step, and its lowest; None without any."""
    values = [row["kd"] for row in history if row["split"] == "heldout" and "kd" in row]
    return [values[0], min(values)] if values else None


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


# The figures of the trainer's rows that are drawn, and what they are called.
CURVES = {
    "kl": "KL to the teacher",
    "kd": "KD (t² KL)",
    "ce": "cross-entropy",
    "loss": "combined",
}


def draw_curve(path: Path, history: Sequence[dict[str, Any]], *, title: str, best: int) -> None:
    """Draw training and held-out losses by step into a PNG, each on axes of its own.

    Args:
        path: The file to write.
        history: The trainer's rows.
        title: Above the picture.
        best: The step whose adapter is kept; marked.
    """
    with drawing(path, curves_size(history)) as figure:
        draw_curves(figure, history, best=best)
        figure.suptitle(title)


def curves_of(history: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The figures that were measured and what they are called; a loss that is the KD loss once."""
    names = {name: label for name, label in CURVES.items() if any(name in row for row in history)}
    if all(row.get("loss") in (row.get("kd"), row.get("ce")) for row in history) and len(names) > 1:
        del names["loss"]
    return names


def curves_size(history: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Width and height in inches of what `draw_curves` draws."""
    rows, columns = _grid(len(curves_of(history)))
    return 2 + 3.3 * columns, 0.9 + 2.5 * rows


def _grid(panels: int) -> tuple[int, int]:
    """Rows and columns in which no place is empty."""
    return (1, panels or 1) if panels != 4 else (2, 2)


def draw_curves(figure: Any, history: Sequence[dict[str, Any]], *, best: int) -> None:
    """Draw training and held-out losses by step, each on axes of its own.

    Args:
        figure: matplotlib's, of `curves_size`.
        history: The trainer's rows.
        best: The step whose adapter is kept; marked.
    """
    names = curves_of(history)
    panels = list(figure.subplots(*_grid(len(names)), squeeze=False).ravel())
    draw_losses(panels, history, names)
    if not names:
        panels[0].text(0.5, 0.5, "no step was measured", ha="center", va="center")
        panels[0].axis("off")
        return
    for axes in panels:
        axes.set(xlabel="optimiser step")
    step_legend(figure, panels, best)


def step_legend(figure: Any, panels: Sequence[Any], best: int) -> None:
    """Mark the step that is kept, and say below all panels how lines of `draw_losses` are read."""
    from matplotlib.lines import Line2D

    for axes in panels:
        kept = axes.axvline(best, color="grey", linewidth=0.8, label=f"kept: step {best}")
    lines = [
        Line2D([], [], color="grey", marker=".", label="held out"),
        Line2D([], [], color="grey", linestyle=":", label="training"),
        kept,
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=3, fontsize="small")


def draw_losses(
    panels: Sequence[Any], history: Sequence[dict[str, Any]], names: Mapping[str, str]
) -> None:
    """Draw some of the trainer's figures by step, those in training and those held out.

    Args:
        panels: matplotlib's axes, one for each figure: on shared ones a large figure would
            press a small one flat.
        history: The trainer's rows.
        names: Figures, in nats per token, and what they are called.
    """
    for number, (axes, (name, label)) in enumerate(zip(panels, names.items(), strict=False)):
        for split, style in (("train", ":"), ("heldout", "-")):
            rows = [row for row in history if row["split"] == split and name in row]
            axes.plot(
                [row["step"] for row in rows],
                [row[name] for row in rows],
                style,
                color=f"C{number}",
                marker="." if split == "heldout" or len(rows) == 1 else None,
                label=f"{label}, {'held out' if split == 'heldout' else 'training'}",
            )
        axes.set_title(label, fontsize="medium")
        axes.set(ylabel="nats per token")
        axes.locator_params(axis="x", integer=True)
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


def read_samples(text: str) -> tuple[str, list[dict[str, str]]]:
    """What `samples_text` wrote: how they were drawn, and each prompt with every model's text.

    Args:
        text: Of samples.md.

    Returns:
        The line that says how they were drawn, and for each sample its texts by label, the prompt
        under `prompt`.
    """
    draw, label = "", ""
    samples: list[dict[str, str]] = []
    for line in text.splitlines():
        # Whatever a model wrote stands behind a quotation mark, so nothing else is taken for it.
        if line.startswith(">"):
            quoted = line[2:]
            samples[-1][label] = (
                f"{samples[-1][label]}\n{quoted}" if label in samples[-1] else quoted
            )
        elif line.startswith("## "):
            samples.append({})
            label = "prompt"
        elif line.startswith("**"):
            label = line.strip("*")
        elif line.startswith("Drawn with"):
            draw = line
    return draw, samples


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.strip().splitlines() or ["(nothing)"])
