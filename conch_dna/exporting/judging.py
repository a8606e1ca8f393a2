"""Whether a fused model still says what its adapter said, and what it comes to in a table.

Knows figures on held-out texts and answers to held-out prompts; nothing of how a model was made.
Another figure: a key of `Judgement.to_json`, and its column in `fuse_table`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from conch_dna.errors import number_of
from conch_dna.language_model import LanguageModel
from conch_dna.metrics import FEWEST_EXAMPLES, paired_interval
from conch_dna.screen.presentation import bytes_text, text_table
from conch_dna.screen.progress import Report
from conch_dna.training.data.examples import Split
from conch_dna.training.data.soft_targets import Targets
from conch_dna.training.evaluation import HeldoutFigures, figures_on, named_slice, slices_of
from conch_dna.training.runs.on_policy.own_answers import answer_figures, answers_of
from conch_dna.training.runs.on_policy.questions import Question
from conch_dna.training.settings import KDConfig

if TYPE_CHECKING:
    from rich.table import Table


def warn_of_few(split: Split, domain: str, report: Report) -> None:
    """Say where so few texts are held out that no interval can be made of them."""
    if (held := len(split.heldout)) < FEWEST_EXAMPLES:
        message = (
            f"{number_of(held, 'held-out text')} of {domain} cannot show what is lost, it takes "
            f"{FEWEST_EXAMPLES}"
        )
        report("warning", {"message": message})


@dataclass(frozen=True, eq=False)
class Judgement:
    """What a model makes of held-out texts and prompts.

    Attributes:
        name: What the table calls it.
        figures: On the texts; of an adapter itself None.
        valid: Of each prompt whether its answer keeps the domain's schema; empty where none was
            asked.
        nbytes: Of its weights.
        part: The part of the texts that it is farthest from the adapter on; see `worst_slice`.
    """

    name: str
    figures: HeldoutFigures | None
    valid: list[float] = field(default_factory=list)
    nbytes: int = 0
    part: dict[str, Any] | None = None

    @property
    def kl(self) -> float:
        """KL(adapter‖model), nats a token; 0 of the adapter itself."""
        return (self.figures.metrics.kl_nats or 0.0) if self.figures else 0.0

    def to_json(self) -> dict[str, Any]:
        """The figures as a JSON object."""
        sums = self.figures.by_example["kl_nats"] if self.figures else np.zeros((2, 0))
        each = sums[0] / np.maximum(1, sums[1])
        metrics = self.figures.metrics if self.figures else None
        return {
            "name": self.name,
            "kl_nats": self.kl,
            "kl_interval": list(_interval(each)) if len(each) else None,
            "top1_agreement": metrics.top1_agreement if metrics else 1.0,
            "cross_entropy": metrics.cross_entropy if metrics else None,
            "valid": sum(self.valid) / len(self.valid) if self.valid else None,
            "prompts": len(self.valid),
            "bytes": self.nbytes,
            "slice": self.part,
        }


def _interval(each: np.ndarray) -> tuple[float, float]:
    return paired_interval(each, np.zeros_like(each), confidence=0.95, seed=0)


def judged(
    name: str,
    model: LanguageModel,
    split: Split,
    targets: Targets,
    questions: Sequence[Question],
    config: KDConfig,
    domain: str,
    *,
    nbytes: int,
) -> Judgement:
    """Measure a model beside the adapter whose targets these are.

    Args:
        name: What the table calls it.
        model: In memory.
        split: What is held out of it; its targets are there.
        targets: The adapter's.
        questions: Held-out prompts whose answers should keep a schema.
        config: How both are read.
        domain: Whose schema.
        nbytes: Of the model's weights.
    """
    figures = figures_on(model, split.heldout, targets, config)
    after = figures.by_example["kl_nats"]
    slices = slices_of(split.heldout, split.heldout_records, figures, config.batch_size)
    # Of the adapter itself nothing is lost.
    part = named_slice(after * [[0.0], [1.0]], after, slices, seed=config.seed)
    valid = valid_answers(model, questions, config, domain)
    return Judgement(name, figures, valid, nbytes, part)


def valid_answers(
    model: LanguageModel, questions: Sequence[Question], config: KDConfig, domain: str
) -> list[float]:
    """Of each prompt whether a model's answer keeps the domain's schema, 1 or 0."""
    said = answers_of(model, questions, config)
    return [
        answer_figures(question, answer, model.tokenizer, domain)["valid"]
        for question, answer in zip(questions, said, strict=True)
    ]


def kept_share(base: Judgement, fused: Judgement) -> float | None:
    """How much is left of what the adapter changed: 1 − KL to the fused model / KL to the base.

    Returns:
        1 where nothing was lost, 0 or less where the base is as near; None where the adapter
        changes nothing.
    """
    return 1 - fused.kl / base.kl if base.kl > 0 else None


def refusal(base: Judgement, fused: Judgement, max_kl: float) -> str:
    """Why a fused model is not taken; empty where it is.

    Args:
        base: The model without the adapter.
        fused: The model that is to be taken.
        max_kl: Most nats a token between adapter and fused model; 0 for that to the base.
    """
    limit = max_kl or base.kl
    if fused.kl <= limit and (max_kl or fused.kl < base.kl or not base.kl):
        return ""
    than = f"{limit:.4f} are asked for (--max-kl)"
    if not max_kl:
        than = (
            f"the model without the adapter is {base.kl:.4f} from it, so that nothing of the "
            "adapter would be left"
        )
    return f"the fused model is {fused.kl:.4f} nats a token from its adapter, and {than}"


def part_text(found: Judgement) -> str:
    """One line: the part of the texts that lost most; empty where there are no parts."""
    if not (part := found.part):
        return ""
    low, high = part["interval"]
    return (
        f"most is lost of {part['by']} {part['slice']}: {part['difference']:.4f} nats a token "
        f"({part['confidence']:.1%} interval {low:.4f} to {high:.4f}, "
        f"{number_of(part['examples'], 'example')}, such as {', '.join(part['worst'])})"
    )


def fuse_table(title: str, rows: Sequence[Judgement]) -> "Table":
    """Models beside each other."""
    columns = ("", "KL to the adapter", "95% interval", "top-1 agreement", "valid JSON", "weights")
    cells = []
    for row in rows:
        found = row.to_json()
        interval = found["kl_interval"]
        valid = f"{round(sum(row.valid))} of {len(row.valid)}" if row.valid else "–"
        cells.append(
            (
                row.name,
                f"{row.kl:z.4f}",
                f"{interval[0]:z.4f} to {interval[1]:z.4f}" if interval else "–",
                f"{found['top1_agreement']:.1%}",
                valid,
                bytes_text(row.nbytes),
            )
        )
    return text_table(title, columns, cells, numbers=columns[1:])
