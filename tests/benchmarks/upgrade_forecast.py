"""How often what `sediment upgrade` foretells holds what then comes.

    python tests/benchmarks/upgrade_forecast.py --task FOLDER --old MODEL --new MODEL [--samples 20]

A store of a judged collection under the old model; so many forecasts, each with its own sample of
documents and of judged queries; beside them what keeping, each forecast's own bridge and embedding
all anew come to on all judged queries. Counted is how often the 95% interval holds it.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from _setting import print_setting
from rich.console import Console

from conch_dna.screen.presentation import text_table
from conch_dna.sedimentation.benchmark.collections import read_collection
from conch_dna.sedimentation.changes.collapse import sampled
from conch_dna.sedimentation.changes.heldout_queries import (
    Evidence,
    best_documents,
    rankings_of,
    teacher_agreement,
    teacher_rankings,
)
from conch_dna.sedimentation.changes.upgrades import bridge_of
from conch_dna.sedimentation.documents import embedded_texts
from conch_dna.sedimentation.engine import AntigravityEngine
from conch_dna.sedimentation.retrieval import NDCG_AT
from conch_dna.sedimentation.stores.contract import RAW

WAYS = ("keep", "bridge", "reembed")


def actual(engine: AntigravityEngine, evidence: Evidence, sample: int, seed: int) -> dict[str, Any]:
    """NDCG and agreement of each way on all judged queries, with this sample's bridge."""
    store, helper = engine.store, engine.helper
    assert helper is not None
    new = helper.get_teacher_embeddings(evidence.texts, queries=True)
    old = engine.versions.embed([RAW], evidence.texts, queries=True)[RAW]
    drawn = sampled(store, sample=sample, seed=seed, without=evidence.holds_out)
    texts = embedded_texts(drawn.payloads)
    bridge = bridge_of(drawn.vectors, helper.get_teacher_embeddings(texts), seed=seed)
    mapped = ((page.ids, bridge.apply(page.vectors)) for page in store.pages(RAW))
    rankings = {
        "keep": rankings_of(store, old, version=RAW, top_k=NDCG_AT),
        "bridge": best_documents(mapped, new, top_k=NDCG_AT),
        "reembed": teacher_rankings(store, helper, evidence.texts, top_k=NDCG_AT),
    }
    none = [""] * len(evidence.names)
    return {
        way: (
            float(evidence.evaluate(found).ndcg.mean()),
            float(teacher_agreement(found, rankings["reembed"], none).mean()),
        )
        for way, found in rankings.items()
    }


def main() -> None:
    """Foretell, measure, count."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", required=True)
    parser.add_argument("--old", required=True)
    parser.add_argument("--new", required=True)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--sample", type=int, default=500, help="documents of each")
    parser.add_argument("--questions", type=int, default=100, help="queries of each")
    parser.add_argument("--cache", type=Path, help="where the new model's vectors stay")
    parser.add_argument("--folder", type=Path, help="where the store stays; else in memory")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print_setting(f"{args.task} from {args.old} to {args.new}, {args.sample} documents each")
    collection = read_collection(args.task, split="test")
    queries = {name: collection.queries[name] for name in collection.judgements}
    evidence = Evidence.judged(queries, collection.judgements)
    rows: list[dict[str, Any]] = []
    with AntigravityEngine(
        str(args.folder or ":memory:"), args.old, "offline", args.new, teacher_cache=args.cache
    ) as engine:
        engine.ingest(collection.documents)
        engine.set_judgements(queries, collection.judgements)
        for seed in range(args.samples):
            engine.config = replace(engine.config, seed=seed)
            told = engine.forecast_upgrade(args.sample, args.questions)
            true = actual(engine, evidence, args.sample, seed)
            for way in told.ways:
                for name, outlook, came in zip(
                    ("nDCG", "agreement"), (way.ndcg, way.agreement), true[way.name], strict=True
                ):
                    held = outlook.low <= came <= outlook.high
                    rows.append(
                        {"seed": seed, "way": way.name, "figure": name, "mean": outlook.mean}
                        | {"low": outlook.low, "high": outlook.high, "came": came, "held": held}
                    )
            print(f"seed {seed}: the new model read {told.read:,} documents", flush=True)
    table = []
    for way in WAYS:
        for name in ("nDCG", "agreement"):
            some = [each for each in rows if (each["way"], each["figure"]) == (way, name)]
            errors = np.array([each["mean"] - each["came"] for each in some])
            widths = np.array([each["high"] - each["low"] for each in some])
            came = np.mean([each["came"] for each in some])
            held = sum(each["held"] for each in some)
            table.append(
                (
                    *(way, name, f"{came:.4f}", f"{errors.mean():+.4f}"),
                    *(f"{widths.mean() / 2:.4f}", f"{held} of {len(some)}"),
                )
            )
    columns = ("", "figure", "came", "foretold too high by", "half an interval", "held")
    Console(width=110).print(text_table("forecasts", columns, table))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
