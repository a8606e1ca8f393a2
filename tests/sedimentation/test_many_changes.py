"""What the gate guarantees over many changes of one store: made-up topics, whose truth is known."""

from pathlib import Path

import numpy as np
import pytest

from conch_dna.sedimentation.config import ChelationConfig
from conch_dna.sedimentation.engine import AntigravityEngine
from conch_dna.sedimentation.stores.contract import RAW
from topic_models import documents, write_models

# A teacher that knows nothing shall be there as well: what it asks for must not pass.
TURNS = (
    ("baseline", "teacher", 0.5),
    ("hybrid", "teacher", 0.3),
    ("hybrid", "nothing", 0.1),
    ("offline", "nothing", 0.05),
    ("baseline", "teacher", 0.5),
    ("offline", "teacher", 0.5),
)
CHANGES = 12
CONFIG = ChelationConfig(collapse_percentile=60.0, threshold=1, gate_queries=100)


def quality(engine: AntigravityEngine, version: str) -> float:
    """NDCG@10 of new titles; a document counts by the share of their topics that it has."""
    given = documents(300, seed=11)
    raw = engine.student.queries([each["title"] for each in given]).vectors
    vectors = engine.versions.adapter(version).apply(raw)
    hits = engine.store.search(vectors, version=version, top_k=10)
    stored = [topics_of(payload["title"]) for payload in next(engine.store.pages(RAW)).payloads]
    discounts = 1 / np.log2(np.arange(2, 12))
    figures = []
    for query, found in zip(given, hits, strict=True):
        wanted = topics_of(query["title"])
        grades = [len(wanted & topics_of(payload["title"])) for payload in found.payloads]
        best = sorted((len(wanted & each) for each in stored), reverse=True)[:10]
        figures.append(np.dot(discounts, grades) / np.dot(discounts, best))
    return float(np.mean(figures))


def topics_of(text: str) -> set[str]:
    return {word.split("word")[0] for word in text.split()}


@pytest.mark.slow
def test_many_changes_never_lose_more_than_the_margin_to_raw(tmp_path: Path) -> None:
    """Printed with -s: what became of each change, and the difference on queries it never saw."""
    models = write_models(tmp_path)
    differences, outcomes = [], []
    for number in range(CHANGES):
        mode, teacher, weight = TURNS[number % len(TURNS)]
        where, named = tmp_path / "db", models[teacher]
        with AntigravityEngine(where, models["student"], mode, named, weight, config=CONFIG) as it:
            it.ingest(documents(800))
            it.run_inferences([each["title"] for each in documents(60, seed=100 + number)])
            turn = it.run_offline_distillation if mode == "offline" else it.run_sedimentation_cycle
            result = turn()
            outcomes.append((result.activated, result.candidate))
            differences.append(quality(it, it.versions.active) - quality(it, RAW))
            print(number, mode, teacher, *outcomes[-1], result.version, f"{differences[-1]:+.4f}")
    assert min(differences) >= -CONFIG.gate_margin
    assert any(passed for passed, _ in outcomes), "a gate that lets nothing pass guarantees nothing"
    assert any(candidate and not passed for passed, candidate in outcomes)
