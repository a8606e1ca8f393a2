"""An API that lies about an answer's end: what is read of it is bounded in bytes and in time."""

import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import closing, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from conch_dna.errors import EgoUnavailableError
from conch_dna.web.client import ApiClient, Remedies

TOO_MANY = "x sends an answer of more than 50,000 bytes: ask for less at once"


class Endless(ThreadingHTTPServer):
    """Sends the same again and again, for so long that a test would fail."""

    daemon_threads = True
    kind, chunk, packed = "application/json", b"", False


class Handler(BaseHTTPRequestHandler):
    """Of such a server."""

    server: Endless

    def do_POST(self) -> None:
        """Answer whatever is asked."""
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", self.server.kind)
        if self.server.packed:
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        packer, end = zlib.compressobj(wbits=31), time.monotonic() + 20
        with suppress(OSError):
            while time.monotonic() < end:
                data = self.server.chunk
                if self.server.packed:
                    data = packer.compress(data) + packer.flush(zlib.Z_SYNC_FLUSH)
                self.wfile.write(data)
                time.sleep(0.01)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[Endless]:
    with Endless(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("kind", "chunk", "packed", "message"),
    [
        ("application/json", b" " * 10_000, False, TOO_MANY),
        ("application/json", b" " * 10_000, True, TOO_MANY),
        ("text/event-stream", b"data: " + b"x" * 10_000, False, TOO_MANY),
        (
            "application/json",
            b" ",
            False,
            r"x sent \d+ bytes of an answer in \d s: check the serve",
        ),
    ],
)
def test_an_answer_without_end_is_left(server, monkeypatch, kind, chunk, packed, message):
    """Silent failure: the memory fills until the process is killed, or it waits forever."""
    monkeypatch.setattr("conch_dna.web.client.MOST_BYTES", 50_000)
    server.kind, server.chunk, server.packed = kind, chunk, packed
    api = ApiClient(
        f"http://127.0.0.1:{server.server_port}/v1",
        name="x",
        key_env="",
        timeout_s=0.5,
        retries=2,
        remedies=Remedies(),
    )
    stream = kind == "text/event-stream"
    with closing(api), pytest.raises(EgoUnavailableError, match=message), api.explained():
        for _ in api.client.completions.create(model="m", prompt="", stream=stream):
            pass
