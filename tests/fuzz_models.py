"""What reads models, templates and CORTEX' files and requests, each given an almost valid one.

A reader accepts the input or raises a ConchError; what else it raises is a fault. For
test_fuzz.py, which has the list of them.
"""

import asyncio
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
from hypothesis import strategies as st

from chat_templates import FAMILIES
from conch_dna.checkpoints import DIGESTS
from conch_dna.cortex.answer import Answer
from conch_dna.cortex.calibration.confidence import load_calibration
from conch_dna.cortex.calibration.drift import (
    Drift,
    Expectations,
    Outcome,
    expected_hand_overs,
    expected_mask,
)
from conch_dna.cortex.calibration.drift_file import DRIFT_FILE, digest_of, read_drift
from conch_dna.cortex.engine.adapter_modules import SharedTree, read_adapter
from conch_dna.cortex.neuron import create_cortex_suite
from conch_dna.cortex.options import ServerSettings
from conch_dna.cortex.server.app import make_app
from conch_dna.cortex.server.embeddings import parse_embeddings
from conch_dna.cortex.server.jobs import Job, Part
from conch_dna.cortex.server.loop import ServerLoop
from conch_dna.cortex.server.openai_api import ChatRequest, CompletionRequest, parse_request
from conch_dna.errors import ConchError
from conch_dna.language_model import ASSETS, ModelSource, load_tokenizer
from conch_dna.loading.model_config import head_rows, read_config
from conch_dna.retraining.buffer import ExperienceBuffer
from conch_dna.retraining.experience import Experience, read_experiences
from conch_dna.training.chats.templates import render
from conch_dna.training.structured_answers import DOMAIN_SCHEMAS, parse_answer
from cortex_models import write_adapter
from fuzz_files import chat_tokenizer, folder_changes
from hostile import json_bytes, safetensors_bytes
from models import make_model_folder
from suites import calibration

# CORTEX: calibrations, experience, answers, and the server.


def read_calibration(folder: Path, content: bytes) -> None:
    path = folder / "tales" / "calibration.json"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    notes: list[str] = []
    read = load_calibration(folder, "tales", "d" * 64, report=notes.append)
    if read is None:
        # A neuron without one is asked with a warning, which must be as plain as a refusal.
        raise ConchError(*notes)
    assert 0 <= read(0.5) <= 1
    assert read.verdict and read.should_fallback(0.5) in (True, False)
    json.dumps(read.to_json(), allow_nan=False)


WATCHED = calibration(
    "d" * 64,
    threshold=0.5,
    expected=Expectations(
        hand_over=expected_hand_overs(4, 20), mask=expected_mask([0.1] * 20), max_tokens=8
    ),
)


def drift_counted() -> dict[str, Any]:
    drift = Drift(WATCHED.expected, "then")
    for number in range(9):
        drift.add(Outcome(number % 2 == 0, 0.1), "now")
    return {"calibration": digest_of(WATCHED)} | drift.to_json()


def read_counted(folder: Path, content: bytes) -> None:
    (folder / DRIFT_FILE).write_bytes(content)
    drift = read_drift(folder, WATCHED)
    if drift is None:
        return
    drift.add(Outcome(True, 1.0), "later")
    assert all(str(each) for each in drift.findings)
    json.dumps([drift.to_json(), *(each.to_json() for each in drift.findings)], allow_nan=False)


EXPERIENCE = [
    {"prompt": "Hi", "answer": "Hello."},
    {
        "messages": [{"role": "user", "content": "1 + 1?"}],
        "answer": "3",
        "better": "2",
        "problem": "wrong",
        "confidence": 0.4,
        "kind": "correction",
    },
]


def read_answers_file(folder: Path, content: bytes) -> None:
    path = folder / "answers.jsonl"
    path.write_bytes(content)
    for experience in read_experiences(path, "tales"):
        assert Experience.from_line(experience.line) == experience


def read_buffer(folder: Path, content: bytes) -> None:
    (folder / "tales.jsonl").write_bytes(content)
    buffer = ExperienceBuffer(folder, redact=True)
    _, problems = buffer.read("tales")
    new = Experience(
        domain="tales",
        kind="success",
        messages=({"role": "user", "content": "-eyJ" * 5_000},),
        answer=content[:50_000].decode("utf-8", "replace") or "x",
        time="2026-11-29T00:00:00Z",
    )
    buffer.add(new)
    if problems:
        raise ConchError(problems[0])


def experience_lines() -> list[Any]:
    read = [
        Experience(
            domain="tales",
            kind="success",
            messages=({"role": "user", "content": f"Hi {number}"},),
            answer="Hello.",
            time="2026-11-29T00:00:00Z",
        )
        for number in range(2)
    ]
    return [json.loads(each.line) for each in read]


SHAPED = {"conclusion": "c", "reasons": ["a", "b"], "confidence": "low", "would_change": "d"}


def read_answer(folder: Path, content: bytes) -> None:
    text = content.decode("utf-8", "surrogateescape")
    for before in ("", "<think>{</think> Here: "):
        parsed = parse_answer(before + text, DOMAIN_SCHEMAS["thinking"])
        assert parsed.valid == (not parsed.problems)


BODY = {
    "model": "tales",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ],
    "temperature": 0.5,
    "top_p": 0.9,
    "seed": 1,
    "max_tokens": 4,
    "stream": False,
    "stop": [],
    "conch": {"hand_over": "never", "structured": False, "system": ""},
}
EMBEDDED = {
    "model": "student",
    "input": ["Hello.", "Ünder"],
    "encoding_format": "base64",
    "dimensions": 16,
    "user": "u",
    "conch": {"queries": True},
}
STREAMED = {
    **BODY,
    "stream": True,
    "stream_options": {"include_usage": True},
    "n": 2,
    "logprobs": True,
    "top_logprobs": 2,
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "clock",
                "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}},
            },
        }
    ],
    "tool_choice": "auto",
    "response_format": {
        "type": "json_schema",
        "json_schema": {"schema": {"type": "object", "properties": {"a": {"enum": [1, 2]}}}},
    },
}


def read_body(folder: Path, content: bytes) -> None:
    parse_request(content, ChatRequest).questions  # noqa: B018


def read_prompts_body(folder: Path, content: bytes) -> None:
    parse_request(content, CompletionRequest).questions  # noqa: B018


def read_texts(folder: Path, content: bytes) -> None:
    parse_embeddings(content)


PROMPTS_BODY = {
    "model": "tales",
    "prompt": ["Once", "The owl"],
    "n": 2,
    "stop": ["."],
    "logprobs": 3,
    "logit_bias": {"5": -1.5},
    "presence_penalty": 0.5,
    "top_k": 4,
    "min_p": 0.1,
    "seed": 1,
}


@functools.cache
def application(folder: Path) -> Any:
    """The server's ASGI application over a real suite, with an answer for every request."""
    write_adapter(folder / "tales" / "adapters_kd", "embedded:student")
    suite = create_cortex_suite(folder, "embedded:student")
    loop = ServerLoop(suite, ServerSettings(max_body_bytes=2**16), report=lambda line: None)
    answer = Answer(domain="tales", text="Hello.", answered_by="neuron", reason="sure")

    def put(job: Job) -> None:
        job.events.put_nowait((job.index, Part("")))
        job.events.put_nowait((job.index, answer))

    loop.put = put  # type: ignore[method-assign]
    return make_app(loop, "")[0]


PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/models",
    "/v1/models/tales",
    "/health",
    "/metrics",
)
HEADERS = {
    b"host": (b"127.0.0.1:8642", b"localhost", b"[", b"x@127.0.0.1", b"[::1]:1", b"\xff", b""),
    b"origin": (b"http://localhost", b"null", b"http://[", b"\xe9", b"a" * 60_000),
    b"content-type": (b"application/json", b"application/json; charset=x", b"text/plain", b"\xff"),
    b"content-length": (b"5", b"-1", b"9" * 5_000, "٣".encode(), b"\xb2", b"1e9", b""),
    b"authorization": (b"Bearer x", b"\xff\xfe", b"Basic", b""),
    b"x-\xff": (b"\x00",),
}


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    """An ASGI request: its head, and its body in parts, perhaps never whole."""
    path = draw(st.sampled_from((*PATHS[:1] * 4, *PATHS, "/", "//", "/v1/models/\ud800", "/\x00")))
    path += draw(st.sampled_from(("", "", "", "", "/", "é", "x" * 9_000)))
    headers = {b"host": b"127.0.0.1", b"content-type": b"application/json"}
    for _ in range(draw(st.sampled_from((0, 0, 0, 1, 2)))):
        name = draw(st.sampled_from(sorted(HEADERS)))
        headers[name] = draw(st.sampled_from(HEADERS[name]))
    method = draw(st.sampled_from(("POST", "POST", "POST", "POST", "GET", "HEAD", "PUT", "X\n")))
    return {
        "path": path,
        "method": method,
        "headers": [*headers.items(), *list(headers.items())[: draw(st.sampled_from((0, 0, 1)))]],
        "query": draw(st.sampled_from((b"", b"", b"a=%ff&&&=", b"\xff"))),
        "body": draw(json_bytes([BODY, STREAMED])),
        "parts": draw(st.sampled_from((1, 1, 3, 50))),
        "whole": draw(st.sampled_from((True, True, True, False))),
    }


def ask_server(folder: Path, request: dict[str, Any]) -> None:
    """A request gets a reply that is JSON (or Prometheus' text, or events), and no 500."""
    sent: list[dict[str, Any]] = []
    body, size = request["body"], -(-len(request["body"]) // request["parts"]) or 1
    parts = [body[at : at + size] for at in range(0, len(body), size)] or [b""]
    messages = [
        {"type": "http.request", "body": part, "more_body": number < len(parts)}
        for number, part in enumerate(parts, 1)
    ]
    if not request["whole"]:
        messages[-1] = {"type": "http.disconnect"}

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop(0)
        # Until the server is done.
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "scheme": "http",
        "path": request["path"],
        "method": request["method"],
        "headers": request["headers"],
        "raw_path": request["path"].encode("utf-8", "replace"),
        "query_string": request["query"],
        "root_path": "",
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8642),
        "extensions": {},
    }
    asyncio.run(application(folder)(scope, receive, send))
    if not sent:
        assert not request["whole"], "a whole request got no reply"
        raise ConchError("the client had gone")
    status = sent[0]["status"]
    reply = b"".join(message.get("body", b"") for message in sent[1:])
    assert status < 500, (status, reply)
    if status >= 400 and request["method"] != "HEAD":
        raise ConchError(json.loads(reply)["error"]["message"])


# Chat templates: bounded by a trial in a process of its own, and by what jinja lets them do.

TEMPLATES = [
    *(family.template for family in FAMILIES.values()),
    *("{{ 1/0 }}", "{{ 'a' * 20000000000 }}", "{{ 1 + 'a' }}", "{{ messages.x.y.z }}"),
    *("{% for a in range(10**9) %}{{ a }}{% endfor %}", "{{ ''.__class__.__mro__ }}"),
    *("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ '%*d' | format(10**9, 1) }}"),
    *("{% include 'x' %}", "{{ messages | tojson(indent=10**8) }}", "{{ raise_exception(1) }}"),
    *("{% set x = cycler(*range(10**8)) %}", "{{ 9 ** 9 ** 9 }}", "{{ '\\ud800' }}", "{" * 50_000),
    *("{{ strftime_now('%Y' * 9000) }}", "{% if " + "(" * 9_000, "{{ [0] * 10**9 }}"),
    *("{% for a in messages %}{% continue %}{% endfor %}", "{{ messages.clear() }}", "{% break %}"),
]


def render_it(folder: Path, content: bytes) -> None:
    template = content.decode("utf-8", "replace")
    tokenizer = chat_tokenizer(folder / "tokenizer")
    tokenizer.chat_template = template
    render(tokenizer, CHAT_TURNS, generation_prompt=True)


CHAT_TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]

# Model folders.

CONFIG = json.loads((ASSETS / "student" / "config.json").read_text())
TOKENIZER_CONFIG = json.loads((ASSETS / "student" / "tokenizer_config.json").read_text())


def read_model_config(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    config = read_config(folder)
    head_rows(config)
    source = ModelSource(str(folder))
    assert source.context_length is None or source.context_length >= 0


def tiny_model(folder: Path) -> Path:
    place = folder / "model"
    if not place.is_dir():
        make_model_folder(place, seed=0, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    return place


def load_tokenizer_of(folder: Path, content: bytes) -> None:
    place = tiny_model(folder)
    (place / "tokenizer_config.json").write_bytes(content)
    load_tokenizer(place).encode("Once upon a time")


def load_model(folder: Path, change: tuple[str, bytes]) -> None:
    """Configuration or weights of a whole model are altered, then it answers one token."""
    place = tiny_model(folder)
    copy = folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(place, copy)
    (copy / change[0]).write_bytes(change[1])
    source = ModelSource(str(copy))
    model = source.load()
    mx.eval(model.model.parameters())


@st.composite
def model_changes(draw: st.DrawFn) -> tuple[str, bytes]:
    small = {**CONFIG, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}
    small.pop("head_dim")
    if draw(st.booleans()):
        return "config.json", draw(json_bytes([small]))
    return "model.safetensors", draw(safetensors_bytes())


@functools.cache
def adapted_base() -> tuple[Any, Any]:
    base = ModelSource("embedded:student").load()
    return base, SharedTree(base)


def make_lora(folder: Path) -> None:
    write_adapter(folder, "embedded:student", lora_layers=1, lora_rank=2)


def read_lora(folder: Path, change: tuple[str, bytes]) -> None:
    base, shared = adapted_base()
    place, copy = folder / "adapter", folder / "copy"
    if not place.is_dir():
        make_lora(place)
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(place, copy)
    (copy / change[0]).write_bytes(change[1])
    (copy / DIGESTS).unlink(missing_ok=True)
    read_adapter(copy, base, shared)


def adapter_changes() -> st.SearchStrategy[tuple[str, bytes]]:
    return folder_changes(make_lora, "adapter_config.json", "adapters.safetensors")
