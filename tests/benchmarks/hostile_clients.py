"""Honest clients of the server, alone and beside hostile ones; its memory after many requests.

    python tests/benchmarks/hostile_clients.py [--seconds 60] [--requests 5000] [--json FILE]

Adapters of the embedded student are served by a process of their own, over loopback. So many honest
clients ask one after the other with the official client, first alone, then while another process
sends heads and bodies that never end, megabytes of prompt, doubled keys, deep JSON, headers that
are none, and streams that are left. Hostile clients are bounded in number and rate, and stop by
themselves. Then come short requests, and the server's memory before and after them.
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
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
from _setting import TESTS, print_setting
from server_load import DOMAINS, SERVE, STUDENT, ask, prompts_of

from cortex_models import train_adapter

NAMES = list(DOMAINS)[:4]
HONEST, TOKENS = 16, 24
# Of each kind: the pause behind each connection, and how many there are at most.
PAUSE_S, MOST = 0.1, 2000
CHAT = "/v1/chat/completions"
DOUBLED = "{" + ",".join(f'"k{n}": 1, "k{n}": 2' for n in range(16_000)) + "}"


def head(length: int, host: str = "localhost") -> bytes:
    """The head of a chat request."""
    return (
        f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {length}\r\nConnection: close\r\n\r\n"
    ).encode()


def whole(body: bytes, host: str = "localhost") -> bytes:
    """A whole chat request."""
    return head(len(body), host) + body


def chat(text: str, **more: Any) -> bytes:
    """The body of a chat request."""
    messages = [{"role": "user", "content": text}]
    return json.dumps({"model": NAMES[0], "messages": messages, **more}).encode()


STREAM = chat("The owl", max_tokens=200, temperature=1.0, stream=True)
# What is sent, how long the client stays, and how many of its kind there are at once.
KINDS: dict[str, tuple[bytes, float, int]] = {
    "half a head": (head(10)[:60], 30.0, 20),
    "half a body": (head(10_000) + b'{"model": ', 30.0, 20),
    "a megabyte of prompt": (whole(chat("word " * 200_000)), 5.0, 2),
    "a megabyte of one word": (whole(chat("a" * 1_000_000)), 5.0, 2),
    "doubled keys": (whole(DOUBLED.encode()), 5.0, 2),
    "deep JSON": (whole(b"[" * 500_000), 5.0, 2),
    "a megabyte of values": (whole(b'{"messages": [' + b"1," * 500_000 + b"1]}"), 5.0, 2),
    "a host that is none": (whole(b"{}", host="["), 5.0, 2),
    "a stream that is left": (whole(STREAM), 0.05, 4),
}


async def hostile(url: str, seconds: float) -> Counter[str]:
    """Do all of it for so long; gives how many connections there were of each kind."""
    parts = urlsplit(url)
    end = time.monotonic() + seconds
    counts: Counter[str] = Counter()

    async def client(kind: str, data: bytes, stay_s: float) -> None:
        while time.monotonic() < end and counts[kind] < MOST:
            counts[kind] += 1
            try:
                reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
                writer.write(data)
                async with asyncio.timeout(min(stay_s, max(0.05, end - time.monotonic()))):
                    await writer.drain()
                    while await reader.read(65536):
                        pass
            except (OSError, TimeoutError):
                pass
            finally:
                writer.transport.abort()
            await asyncio.sleep(PAUSE_S)

    await asyncio.gather(
        *(
            client(kind, data, stay_s)
            for kind, (data, stay_s, count) in KINDS.items()
            for _ in range(count)
        )
    )
    return counts


async def clients(url: str, count: int, work: Callable[[Any, int], Awaitable[None]]) -> None:
    """So many honest clients at once, each doing something by its number."""
    async with openai.AsyncOpenAI(
        base_url=url,
        api_key="none",
        max_retries=0,
        timeout=120,
        http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
    ) as client:
        await asyncio.gather(*(work(client, number) for number in range(count)))


def honest(url: str, seconds: float) -> dict[str, Any]:
    """Seconds to the end of an answer, as honest clients see it."""
    asked = prompts_of(NAMES)
    durations: list[float] = []
    errors: Counter[str] = Counter()
    end = time.monotonic() + seconds

    async def one(client: Any, number: int) -> None:
        while time.monotonic() < end:
            number += 1
            try:
                durations.append((await ask(client, *asked[number % len(asked)], TOKENS))[2])
            except openai.APIError as error:
                errors[type(error).__name__] += 1

    asyncio.run(clients(url, HONEST, one))
    quantiles = statistics.quantiles(durations, n=100, method="inclusive")
    return {
        "requests": len(durations),
        "errors": dict(errors),
        "p50_s": round(quantiles[49], 4),
        "p99_s": round(quantiles[98], 4),
    }


def megabytes(pid: int) -> float:
    """Resident memory of a process."""
    told = subprocess.check_output(["ps", "-o", "rss=", "-p", str(pid)], text=True)
    return round(int(told) / 1024, 1)


def short_requests(url: str, count: int) -> None:
    """So many requests of one token, by all honest clients together."""
    numbers = iter(range(count))

    async def one(client: Any, number: int) -> None:
        for each in numbers:
            await client.chat.completions.create(
                model=NAMES[each % len(NAMES)],
                messages=[{"role": "user", "content": f"The owl {each}"}],
                max_tokens=1,
            )

    asyncio.run(clients(url, HONEST, one))


def measured(process: "subprocess.Popen[str]", options: argparse.Namespace) -> dict[str, Any]:
    """Everything, of a server that begins."""
    assert process.stderr is not None
    line = process.stderr.readline().strip()
    if " answer at " not in line:
        sys.exit(f"no server: {line}\n{process.stderr.read()}")
    url = line.split()[-1]
    honest(url, min(5.0, options.seconds))
    figures: dict[str, Any] = {"alone": honest(url, options.seconds)}
    command = [sys.executable, __file__, "--seconds", str(options.seconds), "--hostile", url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as attackers:
        figures["beside hostile ones"] = honest(url, options.seconds)
        figures["hostile connections"] = json.loads(attackers.communicate(timeout=60)[0])
    figures["p99 beside / alone"] = round(
        figures["beside hostile ones"]["p99_s"] / figures["alone"]["p99_s"], 2
    )
    figures["memory before, MB"] = megabytes(process.pid)
    for share in (1, 2):
        short_requests(url, options.requests // 2)
        figures[f"memory after {share * options.requests // 2} requests, MB"] = megabytes(
            process.pid
        )
    return figures


def main() -> None:
    """Train, serve, ask, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--hostile", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.hostile:
        print(json.dumps(asyncio.run(hostile(options.hostile, options.seconds))))
        return
    print_setting("The server beside hostile clients")
    with tempfile.TemporaryDirectory() as folder:
        for name in NAMES:
            place = Path(folder) / name / "adapters_kd"
            train_adapter(place, STUDENT, DOMAINS[name], lora_keys="all", steps=50)
        process = subprocess.Popen(
            [sys.executable, "-c", SERVE, folder],
            stderr=subprocess.PIPE,
            text=True,
            cwd=TESTS.parent,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        try:
            figures = measured(process, options)
            process.send_signal(signal.SIGTERM)
            _, complaints = process.communicate(timeout=60)
        finally:
            process.kill()
    figures["server_exit_code"] = process.returncode
    for name, value in figures.items():
        print(f"  {name:<32}{value}")
    for line in list(dict.fromkeys(complaints.splitlines()))[:8]:
        print(f"  {line}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
