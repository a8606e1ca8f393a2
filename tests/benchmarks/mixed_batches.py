"""Batches whose rows have different adapters against batches of one adapter.

    python tests/benchmarks/mixed_batches.py [--model FOLDER] [--adapters 8] [--streams 8 16 64]
        [--tokens 32] [--rounds 5] [--long 2000]

Each round answers as many prompts twice by the same engine: all of them asked of one adapter, and
dealt out to all. Adapters are of rank 8 on every linear layer, filled at random. Then the longest
wait between two tokens of eight streams while a prompt of --long tokens comes.
"""

import conch_dna  # noqa: F401  # isort: skip  (loads OpenBLAS before mlx)

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from _ratios import note_ratio
from _setting import print_setting, spread

from conch_dna.cortex.engine.adapter_bank import AdapterBank
from conch_dna.cortex.engine.batching import AnswerEngine, Request
from conch_dna.language_model import ModelSource
from models import random_adapter

OWN = "embedded:student"
RANK = 8
PROMPT = 16


def request(domain: str, number: int, tokens: int, length: int = PROMPT) -> Request:
    """A prompt of its own for each number."""
    ids = tuple(3 + (number * 7 + place) % 200 for place in range(length))
    return Request(domain=domain, tokens=ids, max_tokens=tokens)


def tokens_a_second(engine: AnswerEngine, requests: Sequence[Request]) -> float:
    """Of all answers together, once every prompt was read."""
    begun: set[int] = set()
    uids = {engine.submit(each) for each in requests}
    while begun < uids:
        begun |= {piece.uid for piece in engine.step()}
    count, began = 0, time.perf_counter()
    while engine.pending:
        count += len(engine.step())
    return count / (time.perf_counter() - began)


def longest_wait(engine: AnswerEngine, names: Sequence[str], long: int) -> tuple[float, float]:
    """Seconds between two tokens of eight streams: mostly, and at most while a prompt is read."""
    for number in range(8):
        engine.submit(request(names[number % len(names)], number, 10**6))
    waits, last = [], time.perf_counter()
    asked = None
    while len(waits) < 400:
        if len(waits) == 30:
            asked = engine.submit(request(names[0], 99, 1, long))
        pieces = engine.step()
        if any(piece.uid != asked for piece in pieces):
            waits.append(time.perf_counter() - last)
            last = time.perf_counter()
        if any(piece.uid == asked for piece in pieces):
            break
    engine.abandon()
    return sorted(waits[10:30])[10], max(waits[30:])


def main() -> None:
    """Print both speeds and their ratio for each number of streams, then the waits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=OWN)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--streams", type=int, nargs="+", default=[8, 16, 64])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--long", type=int, default=400, help="tokens of the long prompt")
    args = parser.parse_args()
    print_setting(f"{args.adapters} adapters of rank {RANK} on {args.model}")
    with tempfile.TemporaryDirectory() as place:
        bank = AdapterBank(ModelSource(args.model).load())
        names = [f"domain{number}" for number in range(args.adapters)]
        for seed, name in enumerate(names):
            bank.add(name, random_adapter(args.model, Path(place) / name, rank=RANK, seed=seed))
    for streams in args.streams:
        engine = AnswerEngine(bank, max_batch=streams)
        same = [request(names[0], number, args.tokens) for number in range(streams)]
        mixed = [request(names[n % len(names)], n, args.tokens) for n in range(streams)]
        tokens_a_second(engine, mixed), tokens_a_second(engine, same)
        speeds: dict[str, list[float]] = {"same": [], "mixed": []}
        for number in range(args.rounds):
            # Whoever is first, one time or the other.
            order = [("same", same), ("mixed", mixed)][:: 1 if number % 2 else -1]
            for kind, requests in order:
                speeds[kind].append(tokens_a_second(engine, requests))
        ratios = [m / s for m, s in zip(speeds["mixed"], speeds["same"], strict=True)]
        told = note_ratio(f"mixed batches, {streams} streams, {args.model}", ratios, "at least 0.9")
        print(
            f"  {streams} streams: {spread(speeds['same'], 0)} tokens a second of one adapter, "
            f"{spread(speeds['mixed'], 0)} of all; ratio {told}",
            flush=True,
        )
        engine.close()
    engine = AnswerEngine(bank)
    mostly, longest = longest_wait(engine, names, args.long)
    print(
        f"  eight streams: a token every {mostly * 1000:.0f} ms, while {args.long} tokens of a "
        f"prompt are read at most {longest * 1000:.0f} ms"
    )


if __name__ == "__main__":
    main()
