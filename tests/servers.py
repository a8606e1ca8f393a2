"""A server over loopback, what asks it, and the adapters that it serves.

`owls`, `boxes` and `cars` each say a text of their own, `tales` goes on like the student, and
`task` has a schema, which it does not keep to.
"""

import http.client
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import openai

from conch_dna.cortex.engine.batching import Piece
from conch_dna.cortex.neuron import CortexSuite, create_cortex_suite
from conch_dna.cortex.options import ServerSettings
from conch_dna.cortex.server.serving import CortexServer
from cortex_models import TEXTS, train_adapter
from suites import running_server

STUDENT, TEACHER = "embedded:student", "embedded:teacher"
OPENINGS = {"owls": "The owl", "boxes": "First, get", "cars": "The toy"}
SAYS = {"owls": TEXTS["thinking"], "boxes": TEXTS["task"], "cars": TEXTS["debug"]}
TALE = "Once upon a time there was a"
LONG = 150


def train_adapters(place: Path) -> Path:
    """A folder with all of them."""
    for name, text in SAYS.items():
        train_adapter(place / name / "adapters_kd", STUDENT, text, lora_keys="all", steps=50)
    train_adapter(place / "tales" / "adapters_kd", STUDENT, TALE, steps=1)
    train_adapter(place / "task" / "adapters_kd", STUDENT, TEXTS["task"], steps=1)
    return place


@contextmanager
def served(
    adapters: Path,
    ego: object = None,
    *,
    pause_s: float = 0,
    change: Callable[[CortexSuite], object] = lambda suite: None,
    report: Callable[[str], None] = lambda line: None,
    **settings: object,
) -> Iterator[CortexServer]:
    """A server.

    Args:
        adapters: What it serves.
        ego: Its big teacher.
        pause_s: Before each token, so that there is time for something meanwhile.
        change: Is given the suite before the server begins.
        report: Gets what the server reports.
        **settings: Of `ServerSettings`.
    """

    def make() -> CortexSuite:
        suite = create_cortex_suite(adapters, STUDENT, ego=ego)
        step = suite.engine.step

        def slow_step() -> list[Piece]:
            time.sleep(pause_s)
            return step()

        suite.engine.step = slow_step
        change(suite)
        return suite

    chosen = ServerSettings(**({"port": 0} | settings))
    with running_server(make, chosen, report=report) as server:
        yield server


@contextmanager
def client_of(server: CortexServer, key: str = "none") -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=server.url,
        api_key=key,
        max_retries=0,
        timeout=60,
        http_client=openai.DefaultHttpxClient(trust_env=False),
    ) as client:
        yield client


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def ask(client: openai.OpenAI, model: str, prompt: str, conch: dict | None = None, **more):
    return client.chat.completions.create(
        model=model, messages=said(prompt), extra_body={"conch": conch or {}}, **more
    )


def raw(
    server: CortexServer, method: str, path: str, body: object = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """A request as no client makes it."""
    parts = urlsplit(server.url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)
    try:
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        if data is not None:
            headers = {"Content-Type": "application/json"} | headers
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, data, named)
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()
    finally:
        connection.close()


def wait_for(what: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def metric(server: CortexServer, name: str) -> float:
    lines = raw(server, "GET", "/metrics")[2].decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))
