"""A store in a folder with 50,000 documents of 384 dimensions: ingest, queries, and a new version.

    python tests/benchmarks/store_speed.py [--documents 50000]

Vectors are made up, so nothing is embedded; the new version is a ridge map to other vectors of the
same documents, summed, solved, applied and activated a page at a time.
"""

import conch_dna  # noqa: F401  # isort: skip  (loads OpenBLAS before mlx)

import argparse
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from _setting import print_setting, spread

from conch_dna.sedimentation.adapters.adapter import PairSums, linear_adapter
from conch_dna.sedimentation.changes.versions import Versions
from conch_dna.sedimentation.embedders.contract import unit
from conch_dna.sedimentation.stores.contract import RAW
from conch_dna.sedimentation.stores.open_store import open_store

DIMENSION, BATCH, QUERIES = 384, 1000, 500
TEXT = "a text of the usual length of an abstract " * 20


def batches(count: int) -> Iterator[tuple[list[str], np.ndarray]]:
    """Ids and unit vectors around 200 topics, the same each time."""
    random = np.random.default_rng(0)
    topics = random.normal(size=(200, DIMENSION))
    for start in range(0, count, BATCH):
        size = min(BATCH, count - start)
        rows = topics[random.integers(0, 200, size)] + random.normal(size=(size, DIMENSION))
        yield [f"document {start + n}" for n in range(size)], unit(rows)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed and memory of a store in a folder.")
    parser.add_argument("--documents", type=int, default=50_000)
    count = parser.parse_args().documents
    print_setting(f"store: {count} documents of {DIMENSION} dimensions, {len(TEXT)} bytes of text")
    print(f"  before: peak {peak_mb():.0f} MB")
    identity = {"student": "made up", "digest": "made up", "dimension": DIMENSION}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        store = open_store(folder / "vectors", identity=identity)
        seconds = 0.0
        for ids, rows in batches(count):
            payloads = [{"title": "", "text": TEXT}] * len(ids)
            began = time.perf_counter()
            store.put(ids, payloads, ids, {RAW: rows})
            seconds += time.perf_counter() - began
        print(f"  ingest: {count / seconds:.0f} a second, peak {peak_mb():.0f} MB")
        _, queries = next(batches(QUERIES))
        for exact in (True, None):
            if exact is None:
                began = time.perf_counter()
                if not store.index():
                    break
                print(f"  HNSW built in {time.perf_counter() - began:.1f} s")
            taken = []
            for row in queries:
                began = time.perf_counter()
                store.search(row[None], version=RAW, top_k=10, exact=exact)
                taken.append(1e3 * (time.perf_counter() - began))
            low, high = np.percentile(taken, [50, 99])
            print(f"  query {'exact' if exact else 'HNSW'}: p50 {low:.1f} ms, p99 {high:.1f} ms")
        versions = Versions(store, folder / "versions", DIMENSION)
        turn, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(DIMENSION, DIMENSION)))
        began = time.perf_counter()
        sums = PairSums(DIMENSION, DIMENSION)
        for page in store.pages(RAW):
            sums.add(page.vectors, page.vectors @ turn)
        adapter = linear_adapter("ridge", sums)
        fitted = time.perf_counter()
        versions.build("v0001", adapter, {"documents": "adapted"})
        written = time.perf_counter()
        versions.activate("v0001")
        done = time.perf_counter()
        parts = [fitted - began, written - fitted, done - written]
        print(
            f"  new version: fit {parts[0]:.1f} s, rewrite {parts[1]:.1f} s, activation "
            f"{parts[2]:.1f} s; peak {peak_mb():.0f} MB"
        )
        print(f"  share of vectors within 1e-5 of what was asked: {_kept(versions):.3f}")
        print(f"  pages: {spread([_page_seconds(store) for _ in range(3)])} s for all")
        store.close()


def _kept(versions: Versions) -> float:
    raw = next(versions.store.pages(RAW))
    made = versions.store.get(raw.ids, "v0001").vectors
    close: np.ndarray = np.abs(made - versions.adapter("v0001").apply(raw.vectors)).max(1) < 1e-5
    return float(close.mean())


def _page_seconds(store: object) -> float:
    began = time.perf_counter()
    for _ in store.pages(RAW):  # type: ignore[attr-defined]
        pass
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
