"""A teacher's server: what it takes, what it refuses, and log-probabilities in each form."""

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import openai
import pytest
from click.testing import CliRunner

from conch_dna.ego.teaching.command import teach
from conch_dna.ego.teaching.server import TeacherServer, reached_by
from conch_dna.language_model import ModelSource
from conch_dna.training.data.answers import answer_batch
from conch_dna.training.machines.far.teacher import ServedTeacher
from suites import teaching

TEXT = "Once upon a time there was a"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONCH_DNA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def server(tiny_teacher: Path) -> Iterator[TeacherServer]:
    with teaching(str(tiny_teacher), name="tiny", max_request_tokens=4_000) as found:
        yield found


def ask(server: TeacherServer, body: Any, path: str = "/completions", **headers: str) -> Any:
    """Status and JSON of a reply."""
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} | headers
    request = urllib.request.Request(server.url + path, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.fixture(scope="module")
def exact(tiny_teacher: Path) -> tuple[list[int], np.ndarray]:
    """Token ids of the text, and log-probabilities of every token at every place."""
    import mlx.core as mx

    model = ModelSource(str(tiny_teacher)).load()
    ids = model.tokenizer.encode(TEXT)
    logits = np.asarray(model.logits(mx.array([ids])))[0].astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return ids, logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("prompt", ["text", "ids", "both"])
def test_prompt_logprobs_are_the_likeliest_and_the_own_one(server, exact, prompt):
    ids, log_probs = exact
    given = {"text": TEXT, "ids": ids, "both": [ids, ids[:4]]}[prompt]
    status, reply = ask(
        server, {"model": "tiny", "prompt": given, "max_tokens": 0, "prompt_logprobs": 5}
    )
    assert status == 200, reply
    rows = reply["choices"][0]["prompt_logprobs"]
    assert rows[0] is None and len(rows) == len(ids)
    for place in range(1, len(ids)):
        found = {int(token): each["logprob"] for token, each in rows[place].items()}
        best = np.argsort(-log_probs[place - 1])[:5].tolist()
        assert set(found) == {*best, ids[place]}
        for token, value in found.items():
            assert value == pytest.approx(log_probs[place - 1][token], abs=1e-5)


def test_echo_repeats_the_text_with_its_log_probabilities(server, exact):
    ids, log_probs = exact
    body = {"model": "tiny", "prompt": ids, "max_tokens": 2, "echo": True, "logprobs": 3}
    _, reply = ask(server, {**body, "return_tokens_as_token_ids": True, "temperature": 0})
    (choice,) = reply["choices"]
    found = choice["logprobs"]
    assert choice["text"].startswith(TEXT)
    assert found["tokens"][: len(ids)] == [f"token_id:{token}" for token in ids]
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    assert len(found["tokens"]) == len(ids) + len(choice["conch"]["ids"])
    expected = [log_probs[place - 1][ids[place]] for place in range(1, len(ids))]
    np.testing.assert_allclose(found["token_logprobs"][1 : len(ids)], expected, atol=1e-5)


def test_an_answer_is_the_local_one(server, tiny_teacher, exact):
    ids, _ = exact
    body = {"model": "tiny", "prompt": [ids, ids[:5]], "max_tokens": 7, "temperature": 1.0}
    _, reply = ask(server, {**body, "conch": {"seed": [3, 0]}})
    model = ModelSource(str(tiny_teacher)).load()
    local = answer_batch(model, [ids, ids[:5]], max_tokens=7, temperature=1.0, seed=[3, 0])
    assert [choice["conch"]["ids"] for choice in reply["choices"]] == local
    _, alone = ask(server, {**body, "logprobs": 2, "seed": 3})
    for choice in alone["choices"]:
        assert len(choice["logprobs"]["tokens"]) == len(choice["conch"]["ids"])
        assert all(value < 0 for value in choice["logprobs"]["token_logprobs"])


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"model": "other", "prompt": "a"}, 404, "there is no model 'other': there is tiny"),
        ({"model": "tiny"}, 400, "prompt: Field required"),
        ({"model": "tiny", "prompt": []}, 400, "0 prompts"),
        ({"model": "tiny", "prompt": [[]]}, 400, "has 0 tokens"),
        ({"model": "tiny", "prompt": [-1]}, 400, "give a text, a list of texts, token ids"),
        ({"model": "tiny", "prompt": [2**40]}, 400, "give a text, a list of texts, token ids"),
        ({"model": "tiny", "prompt": ["a", 5]}, 400, "give a text, a list of texts, token ids"),
        ({"model": "tiny", "prompt": [99_999]}, 400, "has token 99999"),
        ({"model": "tiny", "prompt": [5] * 300, "max_tokens": 0}, 400, "has 300 tokens"),
        ({"model": "tiny", "prompt": [5] * 256}, 400, "fills the context"),
        ({"model": "tiny", "prompt": [[5, 6]] * 300}, 400, "300 prompts: give 1 to 256"),
        ({"model": "tiny", "prompt": [[5, 6]] * 250, "max_tokens": 90}, 400, "23,000 tokens"),
        ({"model": "tiny", "prompt": "a", "stream": True}, 400, "stream: Extra inputs"),
        ({"model": "tiny", "prompt": "a", "n": 2}, 400, "n: Extra inputs"),
        ({"model": "tiny", "prompt": "a", "logprobs": 5_000}, 400, "less than or equal to 1024"),
        (b"{", 400, "the body is no JSON"),
        (b"[" * 100_000, 400, "the body is no JSON"),
    ],
)
def test_what_is_refused_is_told_in_one_line(server, body, status, message):
    found, reply = ask(server, body)
    assert found == status
    assert message in reply["error"]["message"]
    assert "\n" not in reply["error"]["message"]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({"counted": []}, "1 prompts, and 0 times what counts"),
        ({"counted": [[[0, 2]]]}, "what counts is 0 to 2"),
        ({"counted": [[[2, 9]]]}, "what counts is 2 to 9"),
        ({"counted": [[[1]]]}, "at least 2 items"),
        ({"counted": [[[1, 2, 3]]]}, "at most 2 items"),
        ({"counted": [[[1, 3]]], "temperatures": []}, "give temperatures"),
        ({"counted": [[[1, 3]]], "kept_below": 1}, "a kept_below of that or more"),
        ({"counted": [[[1, 3]]], "temperatures": [0.0]}, "temperatures"),
        ({"counted": [[[1, 3]]], "draws": 2, "temperatures": [1.0, 2.0]}, "draws need one"),
        ({"counted": [[[1, 3]]], "kept_below": 100_000}, "keep no others"),
        ({"counted": [[[1, 3]]], "top_k": 100_000}, "ask for less"),
    ],
)
def test_targets_that_cannot_be_are_refused(server, targets, message):
    whole = {"top_k": 2, "temperatures": [1.0], "kept_below": 64, "draws": 0} | targets
    body = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 0, "conch": {"targets": whole}}
    status, reply = ask(server, body)
    assert status == 400 and message in reply["error"]["message"]


def test_who_has_no_key_is_not_answered(tiny_teacher, monkeypatch):
    monkeypatch.setenv("CONCH_DNA_KEY", "secret")
    with teaching(str(tiny_teacher), api_key_env="CONCH_DNA_KEY") as guarded:
        for path, body in (("/completions", {}), ("/models", None), ("/teacher", None)):
            assert ask(guarded, body, path)[0] == 401
            assert ask(guarded, body, path, Authorization="Bearer wrong")[0] == 401
        teacher = ServedTeacher(guarded.url)
        assert teacher.weights_digest == ModelSource(str(tiny_teacher)).weights_digest
        monkeypatch.setenv("CONCH_DNA_KEY", "wrong")
        with pytest.raises(Exception, match="check the key in CONCH_DNA_KEY"):
            ServedTeacher(guarded.url)


def test_web_pages_of_other_sites_are_not_answered(server):
    body = {"model": "tiny", "prompt": "a"}
    assert ask(server, body, Origin="http://evil.example")[0] == 403
    assert ask(server, body, Host="evil.example")[0] == 403


def test_the_official_client_reads_it(server):
    client = openai.OpenAI(base_url=server.url, api_key="none")
    assert [each.id for each in client.models.list()] == ["tiny"]
    reply = client.completions.create(
        model="tiny", prompt=TEXT, max_tokens=3, logprobs=2, temperature=0
    )
    assert len(reply.choices[0].logprobs.tokens) == reply.usage.completion_tokens
    with urllib.request.urlopen(server.url.removesuffix("/v1") + "/health", timeout=60) as health:
        assert json.load(health)["status"] == "ok"


def test_a_request_that_fails_ends_no_server(server, monkeypatch):
    def broken(*arguments: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(server._completions, "answer", broken)
        status, reply = ask(server, {"model": "tiny", "prompt": "a"})
        assert status == 500 and "out of memory" in reply["error"]["message"]
    assert ask(server, {"model": "tiny", "prompt": "a", "max_tokens": 1})[0] == 200


def test_who_leaves_keeps_nobody_waiting(tiny_teacher):
    """An answer that nobody waits for is given up; a body that breaks off is none."""
    with teaching(str(tiny_teacher), name="tiny") as server:
        parts = urlsplit(server.url)
        body = json.dumps({"model": "tiny", "prompt": [[5, 6]] * 200, "max_tokens": 250}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json"
        for sent in (body, body[:9]):
            with socket.create_connection((parts.hostname, parts.port)) as connection:
                length = b"\r\nContent-Length: %d\r\n\r\n" % len(body)
                connection.sendall(head + length + sent)
                time.sleep(0.5)
        done = threading.Event()
        real = server._completions.answer

        def answered(*arguments: Any) -> Any:
            done.set()
            return real(*arguments)

        server._completions.answer = answered
        assert ask(server, {"model": "tiny", "prompt": "a", "max_tokens": 1})[0] == 200
        assert done.is_set()


def test_what_was_done_is_said(tiny_teacher):
    lines: list[str] = []
    with teaching(str(tiny_teacher), name="tiny", report=lines.append) as server:
        ask(server, {"model": "tiny", "prompt": "a", "max_tokens": 2})
        ask(server, {"model": "other", "prompt": "a"})
    assert "tiny teaches at" in lines[0] and lines[-1] == "stopped"
    assert any(line.startswith("2 requests, ") for line in lines[1:-1])


def test_the_address_for_others_names_this_machine():
    assert reached_by("http://127.0.0.1:80/v1") == "http://127.0.0.1:80/v1"
    assert reached_by("http://0.0.0.0:80/v1") == f"http://{socket.gethostname()}:80/v1"


def test_others_reach_it_only_with_a_key():
    found = CliRunner().invoke(teach, ["serve", "embedded:teacher", "--host", "0.0.0.0"])
    assert found.exit_code == 2 and "name a variable with a key" in found.stderr
