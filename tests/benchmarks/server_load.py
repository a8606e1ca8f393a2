"""The server under load: many streams of several domains over loopback, each answer compared.

    python tests/benchmarks/server_load.py [--streams 64] [--domains 4] [--seconds 60] [--json FILE]

Adapters of the embedded student, each trained to say a text of its own, are served by a process of
their own. First every prompt is asked alone; then so many clients at once ask one after the other,
greedily, with the official client. An answer that is not that of the prompt asked alone counts as
a mismatch: it would be cross-talk between requests, or rows of a batch that are not kept apart.
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
from _setting import TESTS, print_setting

from cortex_models import TEXTS, train_adapter

STUDENT = "embedded:student"
DOMAINS = {
    "owls": TEXTS["thinking"],
    "boxes": TEXTS["task"],
    "cars": TEXTS["debug"],
    "frogs": "A green frog sang in the rain. All of the fish came up to hear his song.",
    "kites": "Ann had a red kite. The wind took it high, and it came down on a big tree.",
    "bread": "Dad made bread. It was warm and soft, so the children ate all of it at once.",
}
SERVE = """
import sys
from conch_dna.cortex.neuron import create_cortex_suite
from conch_dna.cortex.options import ServerSettings
from conch_dna.cortex.server.serving import serve
with create_cortex_suite(sys.argv[1]) as suite:
    serve(suite, ServerSettings(port=0))
"""
# Words of a domain's text that a prompt begins with.
OPENINGS = (2, 3, 4, 5, 6, 8)


@dataclass
class Seen:
    """What the clients saw."""

    first_s: list[float] = field(default_factory=list)
    duration_s: list[float] = field(default_factory=list)
    characters: int = 0
    mismatches: list[str] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)


def prompts_of(domains: list[str]) -> list[tuple[str, str]]:
    """Domain and prompt, the domains taking turns."""
    return [
        (name, " ".join(DOMAINS[name].split()[:words])) for words in OPENINGS for name in domains
    ]


async def ask(client: Any, domain: str, prompt: str, tokens: int) -> tuple[str, float, float]:
    """Text, seconds to its first part, and seconds to its end."""
    began = time.perf_counter()
    first = None
    parts = []
    stream = await client.chat.completions.create(
        model=domain,
        messages=[{"role": "user", "content": prompt}],
        max_tokens=tokens,
        stream=True,
    )
    async for chunk in stream:
        if chunk.choices[0].delta.content:
            first = first or time.perf_counter() - began
            parts.append(chunk.choices[0].delta.content)
    took = time.perf_counter() - began
    return "".join(parts), first or took, took


async def load(url: str, options: argparse.Namespace) -> tuple[Seen, float]:
    """Ask each prompt alone, then many at once; gives what was seen, and for how long."""
    asked = prompts_of(list(DOMAINS)[: options.domains])
    async with openai.AsyncOpenAI(
        base_url=url,
        api_key="none",
        max_retries=0,
        timeout=120,
        http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
    ) as client:
        alone = {each: (await ask(client, *each, options.tokens))[0] for each in asked}
        print(f"  {len(set(alone.values()))} different answers to {len(asked)} prompts")
        seen = Seen()
        began = time.perf_counter()

        async def one(number: int) -> None:
            while time.perf_counter() - began < options.seconds:
                each = asked[number % len(asked)]
                number += 1
                try:
                    text, first_s, duration_s = await ask(client, *each, options.tokens)
                except openai.APIError as error:
                    seen.errors[type(error).__name__] += 1
                    continue
                seen.first_s.append(first_s)
                seen.duration_s.append(duration_s)
                seen.characters += len(text)
                if text != alone[each]:
                    seen.mismatches.append(f"{each}: {text!r}, alone {alone[each]!r}")

        await asyncio.gather(*(one(number) for number in range(options.streams)))
        return seen, time.perf_counter() - began


def figures(seen: Seen, seconds: float, options: argparse.Namespace) -> dict[str, Any]:
    """What the table and the file say."""

    def at(values: list[float], percent: int) -> float | None:
        if len(values) < 2:
            return None
        return round(statistics.quantiles(values, n=100, method="inclusive")[percent - 1], 4)

    return {
        "streams": options.streams,
        "domains": options.domains,
        "seconds": round(seconds, 2),
        "requests": len(seen.duration_s),
        "errors": dict(seen.errors),
        "mismatches": len(seen.mismatches),
        "requests_per_s": round(len(seen.duration_s) / seconds, 2),
        "characters_per_s": round(seen.characters / seconds, 1),
        "first_text_s_p50": at(seen.first_s, 50),
        "first_text_s_p99": at(seen.first_s, 99),
        "request_s_p50": at(seen.duration_s, 50),
        "request_s_p99": at(seen.duration_s, 99),
    }


def main() -> None:
    """Train, serve, ask, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--domains", type=int, default=4, choices=range(1, len(DOMAINS) + 1))
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print_setting("The server under load")
    with tempfile.TemporaryDirectory() as folder:
        for name in list(DOMAINS)[: options.domains]:
            place = Path(folder) / name / "adapters_kd"
            train_adapter(place, STUDENT, DOMAINS[name], lora_keys="all", steps=50)
        process = subprocess.Popen(
            [sys.executable, "-c", SERVE, folder],
            stderr=subprocess.PIPE,
            text=True,
            cwd=TESTS.parent,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        assert process.stderr is not None
        try:
            said = process.stderr.readline().strip()
            if " answer at " not in said:
                sys.exit(f"no server: {said}\n{process.stderr.read()}")
            seen, seconds = asyncio.run(load(said.split()[-1], options))
            process.send_signal(signal.SIGTERM)
            _, complaints = process.communicate(timeout=60)
        finally:
            process.kill()
    found = figures(seen, seconds, options)
    found["server_exit_code"] = process.returncode
    for name, value in found.items():
        print(f"  {name:<20}{value}")
    for line in [*seen.mismatches[:5], *complaints.splitlines()[:5]]:
        print(f"  {line}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
