"""What the gate said of every change, in a file of JSON lines.

Knows verdicts and one file; nothing of what was judged.
"""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from conch_dna.checkpoints import write_atomically
from conch_dna.sedimentation.changes.gate import Verdict

GATE_HISTORY = "gate_history.jsonl"


def read_history(folder: Path) -> list[dict[str, Any]]:
    """Every judgement in a folder, oldest first."""
    path = folder / GATE_HISTORY
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def remember(
    folder: Path,
    verdict: Verdict,
    *,
    kind: str,
    mode: str,
    candidate: str,
    against: str,
    documents: int,
) -> None:
    """Add a judgement; durable when it returns.

    Args:
        folder: Where the file lies.
        verdict: What the gate said.
        kind: "cycle" or "distillation".
        mode: The training mode.
        candidate: The version that was judged.
        against: The one that was active.
        documents: How many the store held; with more of them the figures would be others.
    """
    entry = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "kind": kind,
        "mode": mode,
        "candidate": candidate,
        "against": against,
        "documents": documents,
        **verdict.to_json(),
    }
    lines = [json.dumps(each) for each in [*read_history(folder), entry]]
    write_atomically(folder / GATE_HISTORY, "".join(f"{line}\n" for line in lines))
