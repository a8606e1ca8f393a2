"""What is written down of a generation: what it was asked, taught, judged and made by.

Knows settings, verdicts and a line's folders; decides nothing. To record another fact: a field
here; fields are added and never change their meaning, since older generations keep their own.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from conch_dna.checkpoints import content_digest, read_json
from conch_dna.errors import NotWholeError
from conch_dna.generations.data import GenerationData
from conch_dna.generations.line import MANIFEST_FILE, Line, folder_digest
from conch_dna.generations.promotion import GateVerdict
from conch_dna.generations.settings import EvolveConfig
from conch_dna.generations.train_child import Teacher

METRICS_FILE = "metrics.json"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a generation came to.

    Attributes:
        name: Its folder, `G011` or `FAILED-G011-<time>`.
        promoted: Whether HEAD names it now.
        verdicts: What every gate said.
        metrics: Figures of child and parent.
    """

    name: str
    promoted: bool
    verdicts: list[GateVerdict]
    metrics: dict[str, Any]


def outcome_of(path: Path) -> Outcome:
    """What a judged generation came to, from its folder.

    Raises:
        NotWholeError: Its manifest or metrics have another form.
    """
    manifest = read_json(path / MANIFEST_FILE, needs={"decision": str, "verdicts": list})
    try:
        verdicts = [GateVerdict(**verdict) for verdict in manifest["verdicts"]]
    except TypeError as error:
        raise NotWholeError(f"{path / MANIFEST_FILE} has other verdicts than gates give") from error
    return Outcome(
        name=path.name,
        promoted=manifest["decision"] == "promoted",
        verdicts=verdicts,
        metrics=read_json(path / METRICS_FILE, needs={}),
    )


def settings_digest(config: EvolveConfig) -> str:
    """Content address of all settings of a generation."""
    return content_digest(json.dumps(config.to_json(), sort_keys=True))


def models_of(teachers: Sequence[Teacher]) -> dict[str, str]:
    """Content addresses of the teachers that are no generation of the line."""
    return {each.path: each.source.weights_digest for each in teachers if not each.of_line}


def make_manifest(
    line: Line,
    parents: tuple[str, str | None],
    teachers: Sequence[Teacher],
    config: EvolveConfig,
    data: GenerationData,
    verdicts: Sequence[GateVerdict],
    *,
    request: dict[str, Any],
) -> dict[str, Any]:
    """The manifest of a line's next generation.

    Args:
        line: As it is before the child enters it.
        parents: Parent and, if it teaches or taught, grandparent.
        teachers: Who taught.
        config: What it was trained and judged with.
        data: What it learned from.
        verdicts: What the gates said.
        request: What must be the same for the same generation, the digest of the new records, as
            `data`, among it.
    """
    failed = [verdict for verdict in verdicts if not verdict.passed]
    return line.next_manifest(
        parents,
        seed=config.training.seed,
        evolution_request={
            "line": line.name,
            "records": len(data.train) + len(data.heldout),
            "train": len(data.train),
            "heldout": len(data.heldout),
            "recall": len(data.recall),
            "replay": len(data.replay),
        },
        teachers=[{"role": each.role, "path": each.path} for each in teachers],
        **config.to_manifest(),
        verdicts=[asdict(verdict) for verdict in verdicts],
        decision="failed" if failed else "promoted",
        reasons=[verdict.reason for verdict in failed],
        digests={
            "parents": {name: folder_digest(line.path(name)) for name in parents if name},
            "models": models_of(teachers),
            "data": request["data"],
            "settings": settings_digest(config),
            "request": content_digest(json.dumps(request)),
        },
    )
