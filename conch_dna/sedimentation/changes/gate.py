"""The gate: whether a change of the vectors may become active, by held-out queries.

What it guarantees, at its confidence for each change: answers are worse by no more than the margin
than those of raw vectors, however many changes there were, and than those before the change.
"Answers" are those to queries such as it asks. What it does not guarantee: single queries, queries
of another kind, documents that join later, and, of many changes that are worse by more, that none
passes; where the same queries judge several changes, its confidence is less than it says.

Knows figures of queries and one file, the history of its decisions; nothing of models, stores or
rankings. To decide by another measure: its figures per query, before and after, as one more entry
of what `decide` is given.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from conch_dna.checkpoints import (
    content_digest,
    parse_json,
    read_text,
    require_keys,
    write_atomically,
)
from conch_dna.errors import ConchError, NotWholeError
from conch_dna.metrics import RESAMPLES, paired_interval
from conch_dna.sedimentation.config import ChelationConfig
from conch_dna.sedimentation.stores.ledger import LEDGER, Least, acknowledge, least_of

NO_EVIDENCE = "nothing is activated on no evidence"
GATE_HISTORY = "gate_history.jsonl"
# What a decision in the history has, whatever else.
_NEEDS = {
    **dict.fromkeys(("time", "kind", "mode", "candidate", "against", "reason"), str),
    "documents": int,
    "questions": dict,
    "passed": bool,
    "figures": dict,
}


@dataclass(frozen=True, kw_only=True)
class GateDecision:
    """Whether a change may become active, and why.

    Attributes:
        passed: Whether it may.
        reason: One line with the figures; what was refused comes first.
        figures: What it was decided on, measure by measure; empty where there was no evidence.
    """

    passed: bool
    reason: str
    figures: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return asdict(self)


def decide(
    measures: Mapping[str, Sequence[Any]], config: ChelationConfig, *, against: Sequence[str]
) -> GateDecision:
    """Whether a change may become active (formulas.md 6 and 9): only if every comparison lets it.

    Each measure compares the candidate with the active version and with raw vectors, so that small
    losses cannot add up over many changes; once where the raw ones are active. A comparison lets
    it pass only if the lower bound of the paired bootstrap interval (2,000 resamples) of the mean
    difference is not below -margin. So a change within the noise of few queries is refused, and
    one that changes nothing at all passes. Judgements are one measure and need no other. Without
    them there are two, pseudo-queries and teacher agreement, or the first alone where no teacher is
    loaded.

    Args:
        measures: Name to lists of figures, one a held-out query: `[Q]` of each version of
            `against` and, last, `[Q]` of the candidate, same queries in the same order.
        config: Its `gate_margin`, `gate_confidence` and `seed` (of the resampling).
        against: The active version, and the raw vectors where they are another.

    Returns:
        With figures by the measure's name, and by `<name> against <version>` for every version
        but the first.

    Raises:
        ConchError: Lengths differ, or a figure is not finite.
    """
    if not measures:
        return GateDecision(passed=False, reason=f"no held-out queries; {NO_EVIDENCE}")
    decisions: dict[str, GateDecision] = {}
    for name, (*before, after) in measures.items():
        for number, (version, figures) in enumerate(zip(against, before, strict=True)):
            key = f"{name} against {version}" if number else name
            decisions[key] = _decide_by(name, version, figures, after, config)
    ordered = sorted(decisions.values(), key=lambda decision: decision.passed)
    return GateDecision(
        passed=all(decision.passed for decision in ordered),
        reason=" | ".join(dict.fromkeys(decision.reason for decision in ordered)),
        figures={name: decision.figures for name, decision in decisions.items()},
    )


def _decide_by(
    measure: str, against: str, before: Any, after: Any, config: ChelationConfig
) -> GateDecision:
    """The decision by one comparison alone; its figures are those of the measure."""
    own, other = (np.asarray(figures, np.float64) for figures in (after, before))
    if own.ndim != 1 or own.shape != other.shape:
        raise ConchError(
            f"the gate compares the same queries, and was given {list(other.shape)} figures before "
            f"and {list(own.shape)} after"
        )
    if not (np.isfinite(own).all() and np.isfinite(other).all()):
        raise ConchError(f"{measure} of the gate's queries holds values that are not finite")
    if len(own) < 2:
        count = f"{len(own) or 'no'} held-out quer{'y' if len(own) == 1 else 'ies'}"
        return GateDecision(
            passed=False,
            reason=f"{measure}: {count}, and an interval needs at least 2; {NO_EVIDENCE}",
        )
    margin, confidence, seed = config.gate_margin, config.gate_confidence, config.seed
    difference = float((own - other).mean())
    low, high = paired_interval(own, other, confidence=confidence, seed=seed)
    # A bound of exactly the margin passes, whatever the last bit of a float says.
    passed = low >= -margin or math.isclose(low, -margin, abs_tol=1e-9)
    figures = {
        "measure": measure,
        "against": against,
        "passed": passed,
        "before": float(other.mean()),
        "after": float(own.mean()),
        "difference": difference,
        "interval": [low, high],
        "confidence": confidence,
        "margin": margin,
        "queries": len(own),
        "resamples": RESAMPLES,
        "seed": seed,
    }
    return GateDecision(
        passed=passed,
        reason=f"{measure}: {own.mean():.4f} after {other.mean():.4f} of {against}, difference "
        f"{difference:+.4f} [{low:+.4f}, {high:+.4f}] on {len(own)} queries; the lower bound must "
        f"not be below {-margin:+.4f}",
        figures=figures,
    )


def read_history(folder: Path) -> list[dict[str, Any]]:
    """Every decision that is remembered in a folder, oldest first.

    Raises:
        NotWholeError: The file is not as it was written.
    """
    path = folder / GATE_HISTORY
    entries = []
    try:
        least = least_of(folder, GATE_HISTORY)
        lines = read_text(path).splitlines() if path.is_file() else []
        for number, line in enumerate(lines, 1):
            source = f"line {number} of {path}"
            entries.append(parse_json(line, source))
            require_keys(entries[-1], source, needs=_NEEDS)
            for name, figures in entries[-1]["figures"].items():
                # Where there was no evidence, there are no figures.
                if figures != {}:
                    require_keys(figures, f"{name} in {source}", needs={"difference": float})
                    bounds = figures.get("interval", [])
                    if not (isinstance(bounds, list) and [*map(type, bounds)] in ([], [float] * 2)):
                        raise NotWholeError(f"{name} in {source} has no interval as it should")
        digested, number, digest = False, 0, ""
        for number, (entry, digest) in enumerate(_chained(entries), 1):
            written = entry.pop("digest", None)
            digested |= written is not None
            # Those of earlier versions had none, until another was added.
            if digested and written != digest:
                raise NotWholeError(f"line {number} of {path} was altered, or one before it")
            least.require(str(path), number, digest)
        least.require(str(path), number, digest, ended=True)
    except NotWholeError as error:
        raise NotWholeError(
            f"{error}. Restore it, or move it and {LEDGER} away to begin a new history"
        ) from error
    return entries


def add_to_history(folder: Path, entry: Mapping[str, Any]) -> None:
    """Add a decision, and what it was about, with the time; durable when it returns."""
    time = datetime.now(UTC).isoformat(timespec="seconds")
    entries = [*read_history(folder), {"time": time, **entry}]
    chained = list(_chained(entries))
    lines = [json.dumps({**each, "digest": digest}) for each, digest in chained]
    write_atomically(folder / GATE_HISTORY, "".join(f"{line}\n" for line in lines))
    acknowledge(folder, GATE_HISTORY, Least(len(chained), chained[-1][1]))


def _chained(
    entries: Sequence[Mapping[str, Any]],
) -> Iterator[tuple[Any, str]]:
    """Each entry with the digest of itself and all before it."""
    digest = ""
    for entry in entries:
        inside = {name: value for name, value in entry.items() if name != "digest"}
        digest = content_digest(digest, json.dumps(inside, sort_keys=True))
        yield entry, digest
