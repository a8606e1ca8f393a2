"""Hostile clients and failing models: each is refused or fails alone, others are answered."""

import json
import logging
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from urllib.parse import urlsplit

import openai
import pytest

from conch_dna.cortex.neuron import MOST_NOTES, CortexSuite, create_cortex_suite
from conch_dna.cortex.server import app
from conch_dna.cortex.server.app import AnswerEndpoint
from conch_dna.cortex.server.serving import CortexServer
from conch_dna.ego import prompts
from conch_dna.ego.model import EgoConfig, EgoModel
from conch_dna.web import connections
from servers import (
    OPENINGS,
    STUDENT,
    TALE,
    TEACHER,
    ask,
    client_of,
    metric,
    raw,
    said,
    served,
    wait_for,
)

CHAT = "/v1/chat/completions"
NO_MEMORY = "[malloc] Unable to allocate 99999999999 bytes."


@pytest.fixture(scope="module")
def says(served_adapters: Path) -> dict[str, str]:
    """What each says without a server."""
    with create_cortex_suite(served_adapters, STUDENT) as suite:
        return {name: suite.ask(name, OPENINGS[name], max_tokens=40).text for name in OPENINGS}


@pytest.fixture(scope="module")
def server(served_adapters: Path) -> Iterator[CortexServer]:
    with served(served_adapters) as server:
        yield server


def connected(server: CortexServer, data: bytes = b"") -> socket.socket:
    """A connection that has sent this much."""
    parts = urlsplit(server.url)
    connection = socket.create_connection((parts.hostname, parts.port), timeout=10)
    connection.sendall(data)
    return connection


def head(length: int) -> bytes:
    return (
        f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {length}\r\n\r\n"
    ).encode()


def rest(connection: socket.socket) -> bytes:
    """All that still comes until the server closes."""
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def is_well(server: CortexServer) -> bool:
    asked = {"model": "owls", "messages": said("The owl"), "max_tokens": 2}
    return raw(server, "POST", CHAT, asked)[0] == 200


# Heads and bodies


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/", "/nothing", CHAT])
@pytest.mark.parametrize(
    "host",
    ["[", "[::1", "x@127.0.0.1", "127.0.0.1@evil.example", "127.0.0.1/x", "127.0.0.1:x", "a b"],
)
def test_no_host_header_breaks_the_server_or_passes_for_this_machine(server, host, path, caplog):
    with caplog.at_level(logging.ERROR):
        status, headers, _ = raw(server, "GET", path, Host=host)
    assert status in (403, 404, 405) and (status == 403) == (path == "/v1/models")
    assert not caplog.records and "location" not in headers


@pytest.mark.parametrize("origin", ["http://[", "http://x@localhost", "//localhost", "null"])
def test_no_origin_passes_for_this_machine_that_is_not(server, origin):
    assert raw(server, "GET", "/v1/models", Origin=origin)[0] == 403
    assert raw(server, "GET", "/v1/models", Origin="http://[::1]:80", Host="LocalHost:1")[0] == 200


def test_half_a_head_is_not_waited_for(served_adapters):
    with served(served_adapters, head_timeout_s=0.4) as server, ExitStack() as stack:
        whole = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        began = time.monotonic()
        silent, half, second, slow = (
            stack.enter_context(connected(server, data))
            for data in (b"", b"GET /health HTTP/1.1\r\nHost: lo", whole, b"GET /")
        )
        answer = b""
        while not answer.endswith(b"}"):
            answer += second.recv(65536)
        second.sendall(whole[:9])
        for _ in range(5):
            slow.sendall(b"a")
            time.sleep(0.1)
        assert rest(silent) == rest(half) == rest(slow) == rest(second) == b""
        # By default it would be 10 s.
        assert time.monotonic() - began < 9
        assert is_well(server)


def test_half_a_body_takes_no_place_and_is_not_waited_for(served_adapters):
    with served(served_adapters, max_queue=1, body_timeout_s=0.8) as server, ExitStack() as stack:
        halves = [
            stack.enter_context(connected(server, head(1000) + b'{"model": ')) for _ in range(5)
        ]
        assert is_well(server), "they fill no queue"
        for half in halves:
            answer = rest(half)
            assert b" 408 " in answer and b"did not come in 0.8 s" in answer
        assert is_well(server)


def test_a_body_in_too_many_pieces_does_not_hold_up_others(server):
    start = head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    began = time.process_time()
    with connected(server, start) as connection:
        with suppress(ConnectionError):
            for _ in range(30):
                connection.sendall(b"1\r\n \r\n" * 10_000)
        with suppress(ConnectionError):
            answer = rest(connection)
            assert answer == b"" or answer.startswith(b"HTTP/1.1 400 ")
    assert is_well(server)
    assert time.process_time() - began < 4


def test_what_is_said_to_be_too_long_is_not_read(server):
    with connected(server, head(10**12)) as connection:
        assert b" 413 " in connection.recv(65536)
    assert is_well(server)


def test_there_are_not_more_connections_than_there_may_be(served_adapters, monkeypatch):
    monkeypatch.setattr(connections, "_SPARE_CONNECTIONS", 1)
    with served(served_adapters, max_queue=1) as server, ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(connected(server))
        with connected(server) as third:
            assert rest(third).startswith(b"HTTP/1.1 503 ")
        stack.close()
        wait_for(lambda: is_well(server))


def test_doubled_keys_do_not_hold_up_others(server):
    doubled = "{" + ",".join(f'"k{n}": 1, "k{n}": 2' for n in range(16_000)) + "}"
    began = time.process_time()
    status, _, body = raw(server, "POST", CHAT, doubled.encode())
    assert (status, raw(server, "GET", "/health")[0]) == (400, 200)
    assert b"more than once" in body and len(body) < 2000
    assert time.process_time() - began < 2


def test_long_prompts_are_tokenised_beside_short_ones(served_adapters, monkeypatch):
    tokenise, going_on = prompts.prompt_ids, threading.Event()

    def slowly(tokenizer, turns, system, *, tools):
        if len(turns[-1]["content"]) > 100_000:
            going_on.wait(20)
        return tokenise(tokenizer, turns, system, tools=tools)

    monkeypatch.setattr(prompts, "prompt_ids", slowly)
    monkeypatch.setattr(prompts, "longest_token", lambda tokenizer: None)
    long = {"model": "owls", "messages": said("word " * 25_000)}
    with served(served_adapters) as server, ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(raw, server, "POST", CHAT, long) for _ in range(8)]
        wait_for(lambda: metric(server, "conch_dna_unfinished_requests") == 8)
        assert is_well(server), "it is answered before any of them is tokenised"
        going_on.set()
        for each in waiting:
            status, _, body = each.result()
            assert status == 400 and b"the context of embedded:student ends at 512" in body


def test_a_thread_rests_between_two_long_bodies(server):
    chat = AnswerEndpoint(server._loop, lambda request: None)
    began = time.monotonic()
    for _ in range(3):
        chat._rested(time.sleep, 0.02)
    chat.close()
    assert time.monotonic() - began >= 0.02 * (3 + 2 * app._REST)


# Failures of models


def failing(suite: CortexSuite, fails: Callable[[], bool], message: str = NO_MEMORY) -> None:
    step = suite.engine.step

    def broken_step():
        if fails():
            raise RuntimeError(message)
        return step()

    suite.engine.step = broken_step


def asked_together(server: CortexServer, names: list[str], **more) -> list[object]:
    """What each is told, or its error."""

    def one(name: str) -> object:
        with client_of(server) as client:
            try:
                stream = ask(client, name, OPENINGS[name], max_tokens=40, stream=True, **more)
                return "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            except openai.APIError as error:
                return error

    with ThreadPoolExecutor(len(names)) as pool:
        return list(pool.map(one, names))


def test_a_batch_that_fails_is_answered_one_by_one(served_adapters, says):
    lines: list[str] = []
    steps = iter(range(10**6))

    def change(suite: CortexSuite) -> None:
        engine = suite.engine
        # Streams have begun by then.
        failing(suite, lambda: next(steps) > 8 and min(engine.pending, engine.max_batch) > 1)

    names = [*says, *says]
    with served(served_adapters, pause_s=0.01, change=change, report=lines.append) as server:
        assert asked_together(server, names) == [says[name] for name in names]
        assert asked_together(server, names) == [says[name] for name in names]
        assert is_well(server)
    assert any("requests failed, each is answered alone: [malloc]" in line for line in lines)
    assert lines[-1] == "at most 1 are answered together from now on"


def test_what_fails_alone_too_fails_alone(served_adapters, says):
    lines: list[str] = []

    def change(suite: CortexSuite) -> None:
        under_way: set[int] = set()
        submit = suite.engine.submit

        def watched(request):
            uid = submit(request)
            if request.domain == "cars":
                under_way.add(uid)
            return uid

        suite.engine.submit = watched
        failing(suite, lambda: not under_way.isdisjoint(suite.engine._rows))

    with served(served_adapters, pause_s=0.01, change=change, report=lines.append) as server:
        told = asked_together(server, ["owls", "cars", "boxes", "owls"])
        assert [told[0], told[2], told[3]] == [says["owls"], says["boxes"], says["owls"]]
        assert isinstance(told[1], openai.APIError) and "Unable to allocate" in str(told[1])
        assert is_well(server)
    assert not any("together from now on" in line for line in lines), "the batch was not at fault"


@pytest.mark.parametrize("what", ["submit", "check", "cancel"])
def test_a_failure_around_the_engine_is_that_of_one_request(served_adapters, what):
    def change(suite: CortexSuite) -> None:
        work = getattr(suite.engine, what)

        def broken(argument):
            if what == "cancel" or argument.domain == "cars":
                raise RuntimeError(NO_MEMORY)
            return work(argument)

        setattr(suite.engine, what, broken)

    with (
        served(served_adapters, pause_s=0.02, change=change) as server,
        client_of(server) as client,
    ):
        if what == "cancel":
            stream = ask(client, "tales", TALE, max_tokens=100, stream=True)
            next(iter(stream))
            stream.close()
            wait_for(lambda: metric(server, "conch_dna_unfinished_requests") == 0)
        else:
            with pytest.raises(openai.InternalServerError) as error:
                ask(client, "cars", OPENINGS["cars"])
            assert error.value.status_code == 500
        assert is_well(server)


def test_ego_without_memory_is_its_own_failure(served_adapters):
    fails = threading.Event()
    fails.set()
    lines: list[str] = []

    def change(suite: CortexSuite) -> None:
        answer = suite.ego.generate_many

        def broken(conversations, **options):
            if fails.is_set():
                raise MemoryError(NO_MEMORY)
            return answer(conversations, **options)

        suite.ego.generate_many = broken

    ego = EgoModel(EgoConfig(model=TEACHER))
    with (
        served(served_adapters, ego, change=change, report=lines.append) as server,
        client_of(server) as client,
    ):
        with pytest.raises(openai.InternalServerError, match=r"EGO failed .*Unable to allocate"):
            ask(client, "ego", TALE, max_tokens=4)
        with pytest.raises(openai.InternalServerError, match=r"cannot answer: .*Unable to"):
            ask(client, "owls", TALE, {"hand_over": "always"}, max_tokens=4)
        own = ask(client, "task", "First, get", max_tokens=4).conch
        assert own["answered_by"] == "neuron" and "cannot answer" in own["reason"]
        fails.clear()
        assert ask(client, "ego", TALE, max_tokens=4).conch["answered_by"] == "ego"
    assert any(line.startswith("EGO failed for 1 requests") for line in lines)


def test_what_ego_cannot_answer_together_it_answers_one_by_one(served_adapters):
    with create_cortex_suite(served_adapters, STUDENT, ego=TEACHER) as suite:
        answer = suite.ego.generate_many

        def broken(conversations, **options):
            if len(conversations) > 1:
                raise ValueError("[broadcast_shapes] Shapes (2,1,4,4) and (1,4,5,5)")
            return answer(conversations, **options)

        suite.ego.generate_many = broken
        prompts = [("owls", TALE), ("cars", "The"), ("owls", "A cat")]
        told = suite.ask_many(prompts, hand_over="always", max_tokens=4)
        alone = [suite.ego.generate(prompt, max_tokens=4) for _, prompt in prompts]
        assert [each.text for each in told] == alone


# Adapters


def test_a_folder_called_ego_does_not_take_egos_name_while_the_server_runs(
    served_adapters, tmp_path
):
    shutil.copytree(served_adapters / "owls", tmp_path / "owls")
    with served(tmp_path, TEACHER, poll_s=0) as server, client_of(server) as client:
        shutil.copytree(served_adapters / "owls", tmp_path / "ego")
        shutil.copytree(served_adapters / "cars", tmp_path / "cars")
        status, _, body = raw(server, "POST", "/admin/reload")
        assert status == 409 and b"a domain is called 'ego'" in body
        assert [model.id for model in client.models.list()] == ["owls", "cars", "ego"]
        assert ask(client, "ego", "The owl", max_tokens=4).conch["answered_by"] == "ego"


def test_adapters_that_cannot_be_read_at_all_leave_the_server_as_it_was(served_adapters):
    def change(suite: CortexSuite) -> None:
        def broken() -> list[str]:
            raise OSError("disk")

        suite.reload = broken

    with served(served_adapters, change=change) as server:
        status, _, body = raw(server, "POST", "/admin/reload")
        assert (
            status == 500 and "could not be taken in: disk" in json.loads(body)["error"]["message"]
        )
        assert is_well(server)


def test_what_is_to_be_known_is_kept_once_and_not_without_end(served_adapters):
    with create_cortex_suite(served_adapters, STUDENT, domains=["owls"]) as suite:
        suite.notes.clear()
        for number in range(3 * MOST_NOTES):
            suite._note(f"note {number // 2}")
        assert suite.notes == [f"note {number}" for number in range(MOST_NOTES)]
