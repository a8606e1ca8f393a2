"""EGO behind an HTTP API: what is sent, what becomes of answers, and every way it can fail.

A small server that speaks the API on demand, and mlx_lm's own server with the embedded teacher.
"""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from conch_dna.ego.model import EgoConfig, EgoModel
from conch_dna.ego.settings import EgoAnswer
from conch_dna.errors import ConchError, EgoUnavailableError
from conch_dna.training.distillation import DOMAIN_PROMPTS

KEY = "sk-a-secret-that-nobody-may-see"
ASSETS = Path(__file__).parents[2] / "conch_dna" / "assets"
Reply = tuple[int, Any] | Callable[[BaseHTTPRequestHandler], None]


def completion(text: str | None, reason: str = "stop") -> tuple[int, Any]:
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": reason,
    }
    usage = {"prompt_tokens": 3, "completion_tokens": 7, "total_tokens": 10}
    return 200, {
        "id": "1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [choice],
        "usage": usage,
    }


def error(status: int, message: str) -> tuple[int, Any]:
    return status, {"error": {"message": message, "type": "x", "code": None}}


def pieces(
    *texts: str, ends: bool = True, delay_s: float = 0.0, usage: dict[str, int] | None = None
) -> Reply:
    """A stream of server-sent events, which breaks off where it does not end."""

    def send(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.end_headers()
        for text in texts:
            part = {"index": 0, "delta": {"content": text}, "finish_reason": None}
            _event(handler, {"id": "1", "object": "chat.completion.chunk", "choices": [part]})
            time.sleep(delay_s)
        if ends:
            last = {"index": 0, "delta": {}, "finish_reason": "stop"}
            _event(handler, {"id": "1", "object": "chat.completion.chunk", "choices": [last]})
            end = {"id": "1", "object": "chat.completion.chunk", "choices": [], "usage": usage}
            _event(handler, end)
            handler.wfile.write(b"data: [DONE]\n\n")

    return send


def _event(handler: BaseHTTPRequestHandler, value: Any) -> None:
    handler.wfile.write(b"data: " + json.dumps(value).encode() + b"\n\n")
    handler.wfile.flush()


class Api:
    """Answers with the replies it is given, the last one again and again.

    Attributes:
        url: Base URL.
        seen: Body and headers of every request.
        under_way: Most requests at one time.
        left: Whether a client has left in the middle of an answer.
    """

    def __init__(self) -> None:
        self.replies: list[Reply | Callable[[dict[str, Any]], Reply]] = [completion("Yes.")]
        self.echo = False
        self.seen: list[tuple[dict[str, Any], dict[str, str]]] = []
        self.lock = threading.Lock()
        self.now = self.under_way = 0
        self.wait_s = 0.0
        self.left = threading.Event()
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with api.lock:
                    api.seen.append((body, {k.lower(): v for k, v in self.headers.items()}))
                    api.now += 1
                    api.under_way = max(api.under_way, api.now)
                    reply = api.replies.pop(0) if len(api.replies) > 1 else api.replies[0]
                time.sleep(api.wait_s)
                with api.lock:
                    api.now -= 1
                if api.echo:
                    said = body["messages"][-1]["content"]
                    reply = completion(f"{said} {body['seed']}")
                if not isinstance(reply, tuple):
                    try:
                        reply(self)
                    except OSError:
                        api.left.set()
                    return
                status, value = reply
                data = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@pytest.fixture
def api() -> Iterator[Api]:
    api = Api()
    thread = threading.Thread(target=api.server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield api
    api.server.shutdown()
    thread.join()
    api.server.server_close()


@pytest.fixture
def ego(api: Api, monkeypatch: pytest.MonkeyPatch) -> Iterator[EgoModel]:
    monkeypatch.setenv("EGO_KEY", KEY)
    config = EgoConfig(
        model=api.url, remote_model="big", api_key_env="EGO_KEY", retries=0, timeout_s=5
    )
    with EgoModel(config) as model:
        yield model


def test_a_request_says_all_that_shapes_the_answer(api, ego):
    assert not ego.loaded and ego.teaches == "text" and ego.model_id == f"big at {api.url}"
    answer = ego.generate("Why?", system="Be brief.", max_tokens=9, temperature=0.5, seed=4)
    assert answer == "Yes." and ego.loaded
    body, headers = api.seen[0]
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why?"},
    ]
    del body["messages"]
    assert body == {
        "model": "big",
        "max_tokens": 9,
        "temperature": 0.5,
        "seed": 4,
        "stream": False,
    }
    assert headers["authorization"] == f"Bearer {KEY}"
    ego.unload()
    assert not ego.loaded and ego.generate("Why?") == "Yes."


def test_an_answer_has_its_reason_and_its_tokens(api, ego):
    api.replies = [completion("Yes", "length"), (200, {**completion("No.")[1], "usage": None})]
    first, second = (ego.generate_many(["Why?"])[0] for _ in range(2))
    assert (first.text, first.finish_reason, first.tokens) == ("Yes", "length", 7)
    assert (second.text, second.finish_reason, second.tokens) == ("No.", "stop", None)


def test_many_are_asked_at_once_and_answered_in_order(api, ego):
    api.echo, api.wait_s = True, 0.2
    prompts = [f"word {number}" for number in range(9)]
    many = EgoModel(EgoConfig(model=api.url, remote_model="big", batch_size=3, seed=10**9))
    with many:
        found = many.generate_many(prompts)
    seeds = [10**9, *range(8)]
    assert [a.text for a in found] == [f"{p} {s}" for p, s in zip(prompts, seeds, strict=True)]
    assert api.under_way == 3
    assert ego.generate_many([]) == []


def test_after_a_failure_no_further_prompt_is_asked(api, ego):
    api.replies = [error(401, "no")]
    with (
        EgoModel(
            EgoConfig(model=api.url, remote_model="big", batch_size=1, api_key_env="")
        ) as model,
        pytest.raises(EgoUnavailableError, match="refuses access"),
    ):
        model.generate_many(["Why?"] * 50)
    assert len(api.seen) < 5


def test_a_stream_comes_piece_by_piece(api, ego):
    api.replies = [pieces("One", " two", " three.", delay_s=0.3)]
    times = []
    texts = []
    for text in ego.stream("Count."):
        texts.append(text)
        times.append(time.monotonic())
    assert texts == ["One", " two", " three."]
    assert times[-1] - times[0] > 0.1
    assert api.seen[0][0]["stream"] is True


def test_a_stream_says_its_tokens_where_the_server_counts_them(api, ego):
    counted = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
    api.replies = [
        pieces("One", " two", usage=counted),
        error(400, "stream_options is not known here"),
        pieces("Three."),
    ]
    for expected in (EgoAnswer("One two", "stop", 5), EgoAnswer("Three.", "stop", None)):
        stream, texts, whole = ego.stream("Count."), [], None
        while whole is None:
            try:
                texts.append(next(stream))
            except StopIteration as end:
                whole = end.value
        assert whole == expected and "".join(texts) == expected.text
    asked = [body.get("stream_options") for body, _ in api.seen]
    assert asked == [{"include_usage": True}] * 2 + [None]


SCHEMA = '{"type": "object", "properties": {"yes": {"type": "boolean"}}}'


def test_a_schema_is_asked_for_where_the_server_takes_it(api, ego):
    api.replies = [completion('{"yes": true}')]
    [answer] = ego.generate_many(["Why?"], schema=SCHEMA)
    assert answer.text == '{"yes": true}'
    form = api.seen[0][0]["response_format"]
    assert form["json_schema"]["schema"] == json.loads(SCHEMA)
    # One schema that is refused is no reason to ask for no other.
    invalid = error(400, "Invalid schema for response_format 'answer': 'required' is missing")
    api.replies = [invalid, completion("A."), completion('{"yes": false}')]
    assert [ego.generate_many(["Why?"], schema=SCHEMA)[0].text for _ in range(2)] == [
        "A.",
        '{"yes": false}',
    ]
    assert ["response_format" in body for body, *_ in api.seen[1:]] == [True, False, True]
    api.replies = [error(400, "unknown field response_format"), completion("A."), completion("B.")]
    assert [ego.generate_many(["Why?"], schema=SCHEMA)[0].text for _ in range(2)] == ["A.", "B."]
    assert ["response_format" in body for body, *_ in api.seen[4:]] == [True, False, False]


def test_a_stream_may_be_left(api, ego):
    api.replies = [pieces(*["word "] * 2000, delay_s=0.02), completion("Yes.")]
    stream = ego.stream("Talk.")
    assert next(stream) == "word "
    stream.close()
    assert ego.generate("Why?") == "Yes."
    # Told that it is enough, it hangs up and says what there was.
    assert api.left.wait(30)
    api.left.clear()
    api.replies = [pieces(*["word "] * 2000, delay_s=0.02)]
    stream = ego.stream("Talk.")
    next(stream)
    with pytest.raises(StopIteration) as ended:
        stream.send(True)
    assert ended.value.value == EgoAnswer("word ", "length", None)
    assert api.left.wait(30)


def test_a_stream_that_breaks_off_is_told(api, ego):
    api.replies = [pieces("One", " two", ends=False)]
    got = []
    with pytest.raises(EgoUnavailableError, match="broke off its answer"):
        got.extend(ego.stream("Count."))

    def half(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        part = {"index": 0, "delta": {"content": "One"}, "finish_reason": None}
        _event(handler, {"choices": [part]})

    api.replies = [half]
    with pytest.raises(EgoUnavailableError, match="cannot be reached"):
        list(ego.stream("Count."))


def test_a_busy_server_is_asked_again(api):
    api.replies = [error(503, "loading"), error(429, "slow down"), completion("Yes.")]
    config = EgoConfig(model=api.url, remote_model="big", retries=2)
    with EgoModel(config) as model:
        assert model.generate("Why?") == "Yes."
    assert len(api.seen) == 3


def test_a_server_that_wants_the_newer_limit_gets_it(api, ego):
    message = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
    api.replies = [error(400, message), completion("Yes."), completion("No.")]
    assert ego.generate("Why?", max_tokens=5) == "Yes."
    assert ego.generate("Why?", max_tokens=6) == "No."
    limits = [{name: body[name] for name in body if name.startswith("max")} for body, _ in api.seen]
    assert limits == [
        {"max_tokens": 5},
        {"max_completion_tokens": 5},
        {"max_completion_tokens": 6},
    ]


@pytest.mark.parametrize(
    ("reply", "kind", "message"),
    [
        (error(401, f"bad key {KEY}"), EgoUnavailableError, "refuses access .*key in EGO_KEY"),
        (error(403, "no"), EgoUnavailableError, "refuses access"),
        (error(404, "no model big"), EgoUnavailableError, "no model big.*check remote_model"),
        (error(429, "slow down"), EgoUnavailableError, "busy or broken .*slow down.*after 1 tries"),
        (error(500, "oops"), EgoUnavailableError, "busy or broken .*oops"),
        (error(400, "context is 4096 tokens"), ConchError, "refuses the request .*4096 tokens"),
        (error(413, "too big"), ConchError, "refuses the request .*too big"),
        ((200, b"<html>Welcome</html>"), EgoUnavailableError, "OpenAI-compatible API"),
        ((200, {"hello": 1}), EgoUnavailableError, "OpenAI-compatible API"),
        ((200, []), EgoUnavailableError, "OpenAI-compatible API"),
        ((200, {"choices": []}), EgoUnavailableError, "OpenAI-compatible API"),
        (completion(None, "content_filter"), ConchError, "no whole answer .*content_filter"),
        (completion(None, "tool_calls"), ConchError, "no whole answer .*tool_calls"),
    ],
)
def test_every_refusal_is_one_line_without_the_key(api, ego, reply, kind, message):
    api.replies = [reply]
    with pytest.raises(ConchError, match=message) as caught:
        ego.generate("Why?")
    assert type(caught.value) is kind
    assert KEY not in str(caught.value) and "\n" not in str(caught.value)
    assert api.url in str(caught.value)


def test_a_stream_of_something_else_is_refused(api, ego):
    api.replies = [(200, b"<html>Welcome</html>")]
    with pytest.raises(EgoUnavailableError, match=r"broke off|OpenAI-compatible"):
        list(ego.stream("Why?"))
    api.replies = [error(400, "context is 4096 tokens")]
    with pytest.raises(ConchError, match="refuses the request"):
        list(ego.stream("Why?"))


def test_a_server_that_is_not_there_or_says_nothing_is_unavailable(api):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = EgoConfig(model=f"http://127.0.0.1:{port}/v1", remote_model="big", retries=1)
    with (
        EgoModel(config) as model,
        pytest.raises(EgoUnavailableError, match=r"cannot be reached .*check the address"),
    ):
        model.generate("Why?")
    api.wait_s = 1.0
    slow = EgoConfig(model=api.url, remote_model="big", retries=0, timeout_s=0.2)
    with (
        EgoModel(slow) as model,
        pytest.raises(EgoUnavailableError, match=r"gave nothing for 0\.2 s, 1 times"),
    ):
        model.generate("Why?")


def test_no_proxy_is_asked_for_this_machine(api, ego, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    assert ego.generate("Why?") == "Yes."


def test_a_key_does_not_travel_unencrypted(monkeypatch):
    monkeypatch.setenv("EGO_KEY", KEY)
    far = EgoConfig(model="http://example.com/v1", remote_model="big", api_key_env="EGO_KEY")
    with pytest.raises(ConchError, match="unencrypted") as caught:
        EgoModel(far).load()
    assert KEY not in str(caught.value)
    for fine in (
        {"model": "https://example.com/v1"},
        {"model": "http://example.com/v1", "api_key_env": ""},
        {"model": "http://localhost:1/v1"},
        {"model": "http://[::1]:1/v1"},
    ):
        values = {"remote_model": "big", "api_key_env": "EGO_KEY", **fine}
        with EgoModel(EgoConfig(**values)) as model:
            model.load()
            assert model.loaded
            assert KEY not in repr(model.config)


def test_without_a_key_none_is_sent(api, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    config = EgoConfig(model=api.url, remote_model="big", api_key_env="")
    with EgoModel(config) as model:
        model.generate("Why?")
    assert KEY not in str(api.seen)


def test_an_example_is_a_conversation_without_tokens(api, ego):
    example = ego.generate_distillation_example("thinking", "Why does ice float?")
    assert example == {
        "messages": [
            {"role": "system", "content": DOMAIN_PROMPTS["thinking"]["system"]},
            {"role": "user", "content": "Why does ice float?"},
            {"role": "assistant", "content": "Yes."},
        ],
        "finish_reason": "stop",
    }
    assert api.seen[0][0]["messages"] == example["messages"][:2]


def test_a_correction_shows_the_failed_answer_and_its_problem(api, ego):
    api.replies = [completion("It is light.")]
    found = ego.correct_failure("thinking", "Why {braces}?", "Magic {0}.", "No reason given.")
    assert found.text == "It is light." and found.finish_reason == "stop"
    messages = api.seen[0][0]["messages"]
    assert [turn["role"] for turn in messages] == ["system", "user"]
    for part in ("Why {braces}?", "Magic {0}.", "No reason given."):
        assert part in messages[1]["content"]
    turns = [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Why?"},
    ]
    ego.correct_failure("thinking", turns, "", "Empty.")
    messages = api.seen[1][0]["messages"]
    assert messages[1:3] == turns[:2] and "(nothing)" in messages[3]["content"]
    api.replies = [completion(" ")]
    with pytest.raises(ConchError, match="gave an empty correction"):
        ego.correct_failure("thinking", "Why?", "So.", "No reason.")


def test_what_an_api_cannot_give_is_refused_by_name(api, ego):
    with pytest.raises(ConchError, match=r"neither tokens nor distributions: name a local model"):
        ego.score(["Once"])
    with pytest.raises(ConchError, match="neither tokens nor distributions"):
        _ = ego.source
    with pytest.raises(ConchError, match="a prompt is a text, or messages"):
        ego.generate([])
    with pytest.raises(ConchError, match="half a surrogate pair"):
        ego.generate("\ud800")
    assert not api.seen


@pytest.mark.slow
def test_mlx_lms_own_server_answers_as_its_model_does(tmp_path):
    """The same greedy answer as from the model in this process, whole and streamed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlx_lm.server", "--model", str(ASSETS / "teacher")]
    log = (tmp_path / "log").open("w")
    server = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        stdout=log,
        stderr=log,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", server)
        url = f"http://127.0.0.1:{port}/v1"
        config = EgoConfig(model=url, remote_model=str(ASSETS / "teacher"), max_tokens=12)
        with EgoModel(config) as ego, EgoModel(EgoConfig(model="embedded:teacher")) as local:
            answers = ego.generate_many(["Once upon a time", "The dog"])
            # What this server makes of a conversation without a chat template.
            prompts = ["USER: Once upon a time\nASSISTANT:", "USER: The dog\nASSISTANT:"]
            expected = local.generate_many(prompts, max_tokens=12)
            assert [a.text.strip() for a in answers] == [a.text.strip() for a in expected]
            assert [a.finish_reason for a in answers] == [a.finish_reason for a in expected]
            assert "".join(ego.stream("The dog")) == answers[1].text
    finally:
        server.terminate()
        server.wait(30)
        log.close()


def _wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        assert server.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the server did not start within a minute")
