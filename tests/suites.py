"""A domain distilled in seconds, an API that answers what it is told, a server in a thread."""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from conch_dna.cortex.calibration.confidence import Calibration
from conch_dna.cortex.calibration.drift import Expectations
from conch_dna.cortex.neuron import CortexSuite
from conch_dna.cortex.options import ServerSettings
from conch_dna.cortex.server.serving import CortexServer
from conch_dna.ego.teaching.server import TeacherServer
from conch_dna.ego.teaching.settings import TeacherSettings
from conch_dna.language_model import ModelSource
from conch_dna.training.settings import KDConfig
from conch_dna.training.true_kd import TrueKnowledgeDistiller

STUDENT, TEACHER = "embedded:student", "embedded:teacher"
NAMES = ("Tom", "Sue", "Ben", "Mia", "Sam", "Lily", "Max", "Anna")
THINGS = ("ball", "cat", "hat", "dog", "car", "cup", "box", "bird")


def calibration(
    adapter_digest: str, *, threshold: float | None, expected: Expectations | None = None
) -> Calibration:
    """A calibration that leaves confidences as they are."""
    return Calibration(
        method="temperature",
        threshold=threshold,
        max_risk=0.1,
        coverage=0.5,
        risk=0.1,
        ece_before=0.2,
        ece_after=0.1,
        n_fit=20,
        n_held=20,
        seed=0,
        adapter_digest=adapter_digest,
        ego=TEACHER,
        expected=expected,
    )


def tales(count: int = 64) -> list[dict[str, str]]:
    """Records of little stories, no two of the same prompt."""
    pairs = [(name, thing) for name in NAMES for thing in THINGS]
    return [
        {
            "prompt": f"One day, {name} saw a big {thing}.",
            "completion": f" {name} was happy and took the {thing} to the park.",
        }
        for name, thing in pairs[:count]
    ]


def distil(adapters: Path, domain: str, records: list[dict[str, Any]], **changes: Any) -> KDConfig:
    """Distil a domain from records, half of which are held out."""
    config = KDConfig(
        **{
            "num_iters": 12,
            "select_by": "kd",
            "learning_rate": 2e-3,
            "warmup_iters": 2,
            "batch_size": 4,
            "lora_keys": "all",
            "lora_rank": 4,
            "max_tokens": 8,
            "steps_per_eval": 12,
            "steps_per_save": 12,
            "val_fraction": 0.5,
            "output_dir": str(adapters),
            **changes,
        }
    )
    TrueKnowledgeDistiller(TEACHER, STUDENT, config).distill_domain(domain, data=records)
    return config


@contextmanager
def answering(said: Callable[[list[dict[str, str]]], str]) -> Iterator[str]:
    """The URL of a chat API whose answers are a function of the messages."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = said(body["messages"])
            if body.get("stream"):
                self._stream(text)
                return
            message = {"role": "assistant", "content": text}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
            document = {"id": "1", "object": "chat.completion", "created": 1, "model": "m"}
            data = json.dumps({**document, "choices": [choice], "usage": usage}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _stream(self, text: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            for delta, reason in (({"content": text}, None), ({}, "stop")):
                part = {"index": 0, "delta": delta, "finish_reason": reason}
                chunk = {"id": "1", "object": "chat.completion.chunk", "choices": [part]}
                self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
            self.wfile.write(b"data: [DONE]\n\n")

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        # A batch of EGO's comes at once, and a busy machine takes them slowly.
        request_queue_size = 128

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def running_server(
    make_suite: Callable[[], CortexSuite],
    settings: ServerSettings = ServerSettings(port=0),  # noqa: B008
    *,
    report: Callable[[str], None] = lambda line: None,
) -> Iterator[CortexServer]:
    """A server in a thread of its own, which makes the suite, owns it and closes it."""

    def work(ready: Callable[[CortexServer], None]) -> None:
        with make_suite() as suite:
            server = CortexServer(suite, settings, report=report)
            ready(server)
            server.run()

    with in_a_thread(work) as server:
        yield server


@contextmanager
def teaching(
    model: str,
    *,
    name: str = "",
    without: Sequence[str] = (),
    report: Callable[[str], None] = lambda line: None,
    **settings: Any,
) -> Iterator[TeacherServer]:
    """A teacher's server in a thread of its own.

    Args:
        model: The teacher.
        name: What the API calls it.
        without: Addresses that it lacks, as a server of others does.
        report: Gets what the server reports.
        **settings: Of `TeacherSettings`.
    """

    def work(ready: Callable[[TeacherServer], None]) -> None:
        chosen = TeacherSettings(**({"port": 0} | settings))
        server = TeacherServer(ModelSource(model), chosen, name=name, report=report)
        router = server._connections.config.app.router
        router.routes = [route for route in router.routes if route.path not in without]
        ready(server)
        server.run()

    with in_a_thread(work) as server:
        yield server


@contextmanager
def in_a_thread(work: Callable[[Callable[[Any], None]], None]) -> Iterator[Any]:
    """Run a server in a thread of its own, in which it is made; `work` says when it is."""
    started = threading.Event()
    made: list[Any] = []
    failed: list[BaseException] = []

    def ready(server: Any) -> None:
        made.append(server)
        started.set()

    def guarded() -> None:
        try:
            work(ready)
        except BaseException as error:  # noqa: BLE001  (raised where the server was asked for)
            failed.append(error)
        finally:
            started.set()

    thread = threading.Thread(target=guarded, name="models")
    thread.start()
    started.wait()
    try:
        if made:
            yield made[0]
    finally:
        if made:
            made[0].stop()
        thread.join()
        if failed:
            raise failed[0]
