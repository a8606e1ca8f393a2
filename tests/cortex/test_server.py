"""The server over loopback with the official client, on the adapters of `servers`."""

import asyncio
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import openai
import pytest

from conch_dna.cortex.neuron import CortexSuite, create_cortex_suite
from conch_dna.cortex.options import AskOptions, ServerSettings
from conch_dna.cortex.server.serving import CortexServer, serve
from conch_dna.ego.model import EgoConfig, EgoModel
from conch_dna.errors import ConchError, EgoUnavailableError
from conch_dna.generations.data import init_line
from conch_dna.retraining.domain import line_of
from conch_dna.retraining.pipeline import TrainingPipeline
from conch_dna.training.distillation import DOMAIN_PROMPTS
from conch_dna.training.structured_answers import DOMAIN_SCHEMAS
from cortex_models import TEXTS
from servers import (
    LONG,
    OPENINGS,
    SAYS,
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
from suites import running_server


@pytest.fixture(scope="module")
def adapters(served_adapters: Path) -> Path:
    return served_adapters


@pytest.fixture(scope="module")
def alone(adapters: Path) -> Iterator[CortexSuite]:
    """What the same neurons say without a server."""
    with create_cortex_suite(adapters) as suite:
        yield suite


@pytest.fixture(scope="module")
def server(adapters: Path) -> Iterator[CortexServer]:
    with served(adapters, TEACHER, max_body_bytes=20_000) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: CortexServer) -> Iterator[openai.OpenAI]:
    with client_of(server) as client:
        yield client


# Answers


def test_a_neuron_answers_as_without_a_server(client, alone):
    done = ask(client, "owls", OPENINGS["owls"], max_tokens=40)
    answer = alone.ask("owls", OPENINGS["owls"], max_tokens=40)
    [choice] = done.choices
    assert OPENINGS["owls"] + choice.message.content == SAYS["owls"]
    assert (choice.finish_reason, choice.message.role) == ("stop", "assistant")
    assert done.model == "owls" and done.id.startswith("chatcmpl-")
    assert done.usage.prompt_tokens == answer.prompt_tokens
    assert done.usage.completion_tokens == answer.completion_tokens
    assert done.usage.total_tokens == answer.prompt_tokens + answer.completion_tokens
    told = done.conch
    assert told["confidence"] == pytest.approx(answer.confidence, rel=1e-4)
    assert (told["answered_by"], told["valid"], told["calibrated"]) == ("neuron", None, False)
    assert "not calibrated" in told["reason"]


def test_a_stream_is_the_same_answer_in_parts(client, alone):
    stream = ask(
        client,
        "owls",
        OPENINGS["owls"],
        {"hand_over": "never"},
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, ending, usage = list(stream)
    parts = [chunk.choices[0].delta.content for chunk in chunks]
    assert OPENINGS["owls"] + "".join(parts) == SAYS["owls"]
    assert len(parts) > 4 and chunks[0].choices[0].delta.role == "assistant"
    assert ending.choices[0].finish_reason == "stop"
    assert ending.conch["answered_by"] == "neuron"
    assert all(chunk.usage is None for chunk in (*chunks, ending))
    assert usage.choices == []
    assert usage.usage.total_tokens == usage.usage.prompt_tokens + usage.usage.completion_tokens
    assert len({chunk.id for chunk in (*chunks, ending, usage)}) == 1


def test_a_conversation_goes_on(client, alone):
    turns = [*said(TALE), {"role": "assistant", "content": " cat."}, *said("It had")]
    done = client.chat.completions.create(model="tales", messages=turns, max_tokens=20)
    answer = alone.ask("tales", turns, max_tokens=20)
    assert done.choices[0].message.content == answer.text
    assert done.choices[0].finish_reason == answer.finish_reason == "length"


def test_draws_follow_from_the_seed(client, alone):
    drawn = {"temperature": 1.0, "top_p": 0.9, "seed": 5}
    done = ask(client, "tales", TALE, {"hand_over": "never"}, max_tokens=20, **drawn)
    assert done.choices[0].message.content == alone.ask("tales", TALE, max_tokens=20, **drawn).text


def test_what_is_not_valid_is_handed_over_and_may_be_kept(client):
    ego = EgoModel(EgoConfig(model=TEACHER))
    system = DOMAIN_PROMPTS["task"]["system"]
    [held] = ego.generate_many(
        ["First, get"],
        system=system,
        max_tokens=12,
        schema=json.dumps(DOMAIN_SCHEMAS["task"]),
    )
    expected = held.text
    assert expected.startswith("{")
    before = ask(client, "task", "First, get", max_tokens=12)
    assert before.choices[0].message.content == expected
    told = before.conch
    assert (told["answered_by"], told["repaired"], told["valid"]) == ("ego", True, False)
    assert "not valid" in told["reason"] and told["problems"] and told["raw"] != expected
    own = ask(client, "task", "First, get", {"hand_over": "never"}, max_tokens=12).conch
    assert own["answered_by"] == "neuron" and own["valid"] is False
    free = ask(
        client, "task", "First, get", {"structured": False, "hand_over": "never"}, max_tokens=4
    )
    assert free.conch["valid"] is None
    asked = ask(client, "owls", TALE, {"hand_over": "always"}, max_tokens=12, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in asked)
    assert text == ego.generate(TALE, max_tokens=12)


@pytest.mark.parametrize(
    "form",
    [
        {"type": "json_object"},
        {
            "type": "json_schema",
            "json_schema": {
                "name": "choice",
                "strict": True,
                "schema": {
                    "type": "object",
                    "properties": {"sure": {"enum": ["low", "high"]}},
                    "required": ["sure"],
                    "additionalProperties": False,
                },
            },
        },
    ],
    ids=lambda form: form["type"],
)
def test_a_form_that_is_asked_for_is_kept_to(client, form):
    found = ask(client, "owls", TALE, {"hand_over": "never"}, max_tokens=200, response_format=form)
    [choice] = found.choices
    assert choice.finish_reason == "stop" and found.conch["valid"]
    assert isinstance(json.loads(choice.message.content), dict)
    assert found.conch["removed"] > 0
    wrong = {"type": "object", "required": ["a"], "properties": {"a": False}}
    form = {"type": "json_schema", "json_schema": {"name": "wrong", "schema": wrong}}
    with pytest.raises(openai.BadRequestError, match="unsatisfiable"):
        ask(client, "owls", TALE, response_format=form)


def test_ego_is_a_model_too(client):
    ego = EgoModel(EgoConfig(model=TEACHER))
    [expected] = ego.generate_many([TALE], max_tokens=12)
    done = ask(client, "ego", TALE, max_tokens=12)
    assert done.choices[0].message.content == expected.text
    assert done.choices[0].finish_reason == expected.finish_reason
    assert done.usage.completion_tokens == expected.tokens
    assert done.usage.prompt_tokens == len(ego.source.tokenizer.encode(TALE))
    assert done.conch["answered_by"] == "ego"
    parts = [
        chunk.choices[0].delta.content
        for chunk in ask(client, "ego", TALE, max_tokens=12, stream=True)
    ]
    assert "".join(part or "" for part in parts) == expected.text
    with pytest.raises(openai.BadRequestError, match="top_p is not supported by ego"):
        ask(client, "ego", TALE, top_p=0.5)
    schema = {
        "type": "object",
        "properties": {"sure": {"enum": ["low", "high"]}},
        "required": ["sure"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "choice", "schema": schema}}
    held = ask(client, "ego", TALE, response_format=form).choices[0].message.content
    assert json.loads(held)["sure"] in ("low", "high")
    parts = ask(client, "ego", TALE, response_format=form, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == held
    never = {"type": "object", "required": ["a"], "properties": {"a": False}}
    never = {"type": "json_schema", "json_schema": {"name": "never", "schema": never}}
    with pytest.raises(openai.BadRequestError, match="unsatisfiable"):
        ask(client, "ego", TALE, response_format=never, stream=True)
    handed = ask(client, "owls", TALE, {"hand_over": "always"}, response_format=form)
    assert handed.choices[0].message.content == held and handed.conch["valid"]
    with pytest.raises(openai.BadRequestError, match="the context of embedded:teacher is"):
        ask(client, "ego", "word " * 1000)


def test_models_health_and_metrics(client, server, adapters):
    names = ["boxes", "cars", "owls", "tales", "task", "ego"]
    assert [model.id for model in client.models.list()] == names
    assert client.models.retrieve("owls").owned_by == "conch_dna"
    with pytest.raises(openai.NotFoundError, match="there is no model 'memory': there is boxes"):
        client.models.retrieve("memory")
    status, _, body = raw(server, "GET", "/health")
    health = json.loads(body)
    assert (status, health["status"], health["domains"]) == (200, "ok", names[:-1])
    assert health["queue"] == {"unfinished": 0, "max": ServerSettings().max_queue}
    before = metric(server, 'conch_dna_requests_total{model="cars",status="200"}')
    handed = metric(server, "conch_dna_hand_overs_total")
    ask(client, "cars", OPENINGS["cars"], max_tokens=3)
    ask(client, "ego", TALE, max_tokens=3)
    wait_for(
        lambda: metric(server, 'conch_dna_requests_total{model="cars",status="200"}') == before + 1
    )
    assert metric(server, 'conch_dna_tokens_total{kind="completion",model="cars"}') >= 3
    assert metric(server, 'conch_dna_first_text_seconds_count{model="cars"}') >= 1
    assert metric(server, "conch_dna_hand_overs_total") == handed, "EGO was asked by its name"
    assert metric(server, "conch_dna_unfinished_requests") == 0


def test_sixteen_streams_of_three_domains_are_as_each_alone(server, alone):
    asked = [(name, f"{OPENINGS[name]}{' and' * (n % 3)}") for n in range(6) for name in SAYS][:16]
    expected = [alone.ask(name, prompt, max_tokens=40).text for name, prompt in asked]

    async def one(client: openai.AsyncOpenAI, number: int) -> str:
        await asyncio.sleep(0.01 * number)
        stream = await client.chat.completions.create(
            model=asked[number][0],
            messages=said(asked[number][1]),
            max_tokens=40,
            stream=True,
            extra_body={"conch": {"hand_over": "never"}},
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=server.url,
            api_key="none",
            http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
        ) as client:
            return await asyncio.gather(*(one(client, number) for number in range(len(asked))))

    assert asyncio.run(together()) == expected
    assert len(set(expected)) >= 3


def test_ego_answers_the_turns_that_it_can_answer(adapters):
    with create_cortex_suite(adapters, STUDENT, ego=TEACHER) as suite:
        options = AskOptions(hand_over="always", max_tokens=4)
        prompts = (TALE, "word " * 1000, "The owl")
        turns = [suite.turn("owls", prompt, options) for prompt in prompts]
        with pytest.raises(EgoUnavailableError, match="cannot answer: prompt 1 has"):
            suite.answer_by_ego(turns)
        assert [turn.answer is not None for turn in turns] == [True, False, True]
        *parts, last = suite.stream("owls", TALE, hand_over="always", max_tokens=4)
        assert "".join(part.text for part in parts) == last.answer.text == turns[0].answer.text


# Refusals


def test_the_clients_mistakes_are_told_in_one_line(client):
    with pytest.raises(openai.NotFoundError, match="no model 'memory': there is boxes") as error:
        ask(client, "memory", "a")
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="n is 0: give a whole number"):
        ask(client, "owls", "a", n=0)
    with pytest.raises(openai.BadRequestError, match="context of embedded:student ends at 512"):
        ask(client, "owls", "word " * 600, stream=True)
    with pytest.raises(openai.BadRequestError, match="the prompt is empty"):
        ask(client, "owls", "")
    with pytest.raises(openai.BadRequestError, match="of which the last is not the assistant's"):
        client.chat.completions.create(
            model="owls", messages=[{"role": "assistant", "content": "a"}]
        )


def test_what_no_client_sends_is_refused_in_the_same_shape(server):
    path = "/v1/chat/completions"
    large = {"model": "owls", "messages": said("word " * 5000)}
    huge = b" " * (17 * 20_000)
    for expected, answer in [
        (413, raw(server, "POST", path, large)),
        (413, raw(server, "POST", path, huge)),
        (415, raw(server, "POST", path, b"{}", Content_Type="text/plain")),
        (400, raw(server, "POST", path, b"{")),
        (404, raw(server, "GET", "/v1/responses")),
        (405, raw(server, "GET", path)),
        (403, raw(server, "GET", "/v1/models", Host="evil.example:80")),
        (403, raw(server, "GET", "/v1/models", Origin="https://evil.example")),
        (200, raw(server, "GET", "/v1/models", Origin="http://localhost:3000")),
    ]:
        assert answer[0] == expected
        assert ("error" in json.loads(answer[2])) == (expected != 200)


def test_a_path_or_method_that_is_none_is_told_with_those_that_are(server):
    def message(method: str, path: str) -> str:
        return json.loads(raw(server, method, path)[2])["error"]["message"]

    assert "/chat/completions: there is no such path: there is /v1/chat/completions, " in message(
        "POST", "/chat/completions"
    )
    assert message("GET", "/v1/embeddings") == "GET /v1/embeddings: use POST"


def test_a_key_is_asked_for(adapters, monkeypatch):
    monkeypatch.setenv("CONCH_DNA_TEST_KEY", "secrét")
    with served(adapters, api_key_env="CONCH_DNA_TEST_KEY") as server:
        asked = {"model": "owls", "messages": said("The owl"), "max_tokens": 3}
        for key, expected in [("", 401), ("secret", 401), ("secrét", 200)]:
            header = {"Authorization": f"Bearer {key}".encode()} if key else {}
            for method, path, body in [
                ("POST", "/v1/chat/completions", asked),
                ("GET", "/v1/models", None),
                ("GET", "/metrics", None),
                ("POST", "/admin/reload", None),
            ]:
                status, headers, _ = raw(server, method, path, body, **header)
                assert status == expected, (key, path)
                assert ("www-authenticate" in headers) == (expected == 401)
        assert raw(server, "GET", "/health")[0] == 200
    monkeypatch.setenv("CONCH_DNA_TEST_KEY", "plain")
    with served(adapters, api_key_env="CONCH_DNA_TEST_KEY") as server:
        with client_of(server, "wrong") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        with client_of(server, "plain") as client:
            assert ask(client, "owls", "The owl", max_tokens=2).choices


def test_a_taken_address_and_a_domain_called_ego_are_refused(adapters, server, tmp_path):
    taken = urlsplit(server.url).port
    with (
        pytest.raises(ConchError, match=f"cannot listen at 127.0.0.1, port {taken}"),
        served(adapters, port=taken),
    ):
        pass
    shutil.copytree(adapters / "owls", tmp_path / "ego")
    for ego in (TEACHER, None):
        with pytest.raises(ConchError, match="a domain is called 'ego'"), served(tmp_path, ego):
            pass


def test_without_ego_at_hand(adapters, tmp_path):
    with (
        served(adapters, EgoConfig(model=str(tmp_path / "gone"))) as server,
        client_of(server) as client,
    ):
        with pytest.raises(openai.InternalServerError, match="is not available") as error:
            ask(client, "ego", "a")
        assert error.value.status_code == 503
        with pytest.raises(openai.InternalServerError, match="is not available"):
            ask(client, "owls", "a", {"hand_over": "always"})
        with pytest.raises(openai.APIError, match="is not available"):
            list(ask(client, "owls", "a", {"hand_over": "always"}, stream=True))
        own = ask(client, "task", "First, get", max_tokens=4)
        assert own.conch["answered_by"] == "neuron"
        assert "not valid" in own.conch["reason"] and "not available" in own.conch["reason"]


# Time


def tale(client: openai.OpenAI) -> Iterator[str]:
    """The parts of a long answer."""
    chunks = ask(client, "tales", TALE, max_tokens=LONG, temperature=1.0, seed=3, stream=True)
    for chunk in chunks:
        if chunk.choices[0].delta.content:
            yield chunk.choices[0].delta.content


@pytest.fixture(scope="module")
def whole_tale(alone: CortexSuite) -> str:
    answer = alone.ask("tales", TALE, max_tokens=LONG, temperature=1.0, seed=3)
    assert answer.completion_tokens > 100, "long enough for what happens meanwhile"
    return answer.text


def test_a_client_that_has_gone_is_not_computed_for(adapters):
    with served(adapters, pause_s=0.01) as server, client_of(server) as client:
        stream = ask(client, "tales", TALE, max_tokens=LONG, temperature=1.0, seed=3, stream=True)
        for chunk in stream:
            if chunk.choices[0].delta.content:
                break
        stream.close()
        wait_for(lambda: metric(server, "conch_dna_engine_requests") == 0)
        wait_for(lambda: metric(server, "conch_dna_unfinished_requests") == 0)
        gone = 'conch_dna_requests_total{model="tales",status="499"}'
        assert metric(server, gone) == 1
        assert metric(server, "conch_dna_tokens_total") == 0, "it never came to its end"
        assert ask(client, "owls", "The owl", max_tokens=2).choices


def test_a_client_that_leaves_before_its_answer_is_not_computed_for(adapters):
    with served(adapters, pause_s=0.01) as server:
        parts = urlsplit(server.url)
        connection = http.client.HTTPConnection(parts.hostname, parts.port)
        asked = {"model": "tales", "messages": said(TALE), "max_tokens": LONG}
        head = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(asked), head)
        wait_for(lambda: metric(server, "conch_dna_engine_requests") == 1)
        connection.close()
        wait_for(
            lambda: metric(server, 'conch_dna_requests_total{model="tales",status="499"}') == 1
        )
        wait_for(lambda: metric(server, "conch_dna_engine_requests") == 0)
        assert metric(server, "conch_dna_tokens_total") == 0


def test_too_many_requests_are_told_to_come_back(adapters, whole_tale):
    with served(adapters, pause_s=0.01, max_queue=1) as server, client_of(server) as client:
        parts = tale(client)
        first = next(parts)
        with pytest.raises(
            openai.RateLimitError, match="1 answers are waited for at most"
        ) as error:
            ask(client, "owls", "The owl", max_tokens=2)
        assert error.value.response.headers["retry-after"] == "1"
        assert first + "".join(parts) == whole_tale
        assert ask(client, "owls", "The owl", max_tokens=2).choices


def test_a_request_that_takes_too_long_is_told_so(adapters):
    with (
        served(adapters, pause_s=0.01, request_timeout_s=0.5) as server,
        client_of(server) as client,
    ):
        with pytest.raises(openai.InternalServerError, match=r"longer than 0.5 s") as error:
            ask(client, "tales", TALE, max_tokens=LONG)
        assert error.value.status_code == 504
        with pytest.raises(openai.APIError, match=r"longer than 0.5 s"):
            list(tale(client))
        wait_for(lambda: metric(server, "conch_dna_engine_requests") == 0)


def test_silence_in_a_stream_is_bridged_by_comments(adapters):
    asked = {"model": "ego", "messages": said(TALE), "max_tokens": 100, "stream": True}
    with served(adapters, TEACHER, keep_alive_s=0.01) as server:
        status, headers, body = raw(server, "POST", "/v1/chat/completions", asked)
        assert status == 200 and headers["content-type"].startswith("text/event-stream")
        assert body.count(b": waiting\n\n") >= 1 and body.endswith(b"data: [DONE]\n\n")
        with client_of(server) as client:
            chunks = list(ask(client, "ego", TALE, max_tokens=100, stream=True))
            assert chunks[-1].choices[0].finish_reason in ("stop", "length")


def test_neurons_go_on_while_ego_answers(server, client):
    done: list[str] = []

    def slow() -> None:
        done.append("begun")
        with client_of(server) as own:
            ask(own, "ego", TALE, max_tokens=LONG)
        done.append("ego")

    thread = threading.Thread(target=slow)
    thread.start()
    wait_for(lambda: metric(server, "conch_dna_unfinished_requests") >= 1)
    ask(client, "owls", OPENINGS["owls"], {"hand_over": "never"}, max_tokens=2)
    done.append("neuron")
    thread.join()
    assert done == ["begun", "neuron", "ego"]


def test_hand_overs_are_remembered(adapters, tmp_path):
    for name in ("task", "owls"):
        shutil.copytree(adapters / name, tmp_path / name)
    pipeline = TrainingPipeline(tmp_path, STUDENT)

    def make() -> CortexSuite:
        return create_cortex_suite(tmp_path, STUDENT, ego=TEACHER, pipeline=pipeline)

    settings = ServerSettings(port=0)
    with (
        running_server(make, settings) as server,
        client_of(server) as client,
    ):
        text = ask(client, "task", "First, get", max_tokens=8).choices[0].message.content
        [kept], problems = pipeline.buffer.read("task")
    assert not problems and (kept.kind, kept.better) == ("fallback", text)


# Change and end


def swap(adapters: Path, name: str, other: str) -> None:
    """Let one domain have another's adapter, as distilling it anew would."""
    for path in (adapters / other / "adapters_kd").iterdir():
        fresh = adapters / name / "adapters_kd" / f"{path.name}.new"
        shutil.copyfile(path, fresh)
        fresh.rename(fresh.with_suffix(""))


def test_adapters_are_reloaded_while_a_stream_goes_on(adapters, whole_tale, tmp_path):
    for name in ("tales", "owls"):
        shutil.copytree(adapters / name, tmp_path / name)
    with served(tmp_path, pause_s=0.01, poll_s=0.0) as server, client_of(server) as client:
        assert json.loads(raw(server, "POST", "/admin/reload")[2])["changed"] == []
        parts = tale(client)
        first = next(parts)
        swap(tmp_path, "tales", "owls")
        status, _, body = raw(server, "POST", "/admin/reload")
        assert (status, json.loads(body)["changed"]) == (200, ["tales"])
        after = ask(client, "tales", OPENINGS["owls"], max_tokens=40)
        assert OPENINGS["owls"] + after.choices[0].message.content == SAYS["owls"]
        assert first + "".join(parts) == whole_tale, "it ends as it began"
        (tmp_path / "owls" / "adapters_kd" / "adapters.safetensors").write_bytes(b"half")
        status, _, body = raw(server, "POST", "/admin/reload")
        assert status == 409 and "owls" in json.loads(body)["error"]["message"]
        after = ask(client, "owls", OPENINGS["owls"], max_tokens=40)
        assert OPENINGS["owls"] + after.choices[0].message.content == SAYS["owls"]


def test_a_new_head_is_noticed(adapters, tmp_path, tmp_path_factory):
    shutil.copytree(adapters / "owls", tmp_path / "owls")
    lines: list[str] = []
    with (
        running_server(
            lambda: create_cortex_suite(tmp_path, STUDENT),
            ServerSettings(port=0, poll_s=0.05),
            report=lines.append,
        ) as server,
        client_of(server) as client,
    ):
        records = [{"text": text} for text in TEXTS.values()]
        line = line_of(tmp_path, "owls")
        init_line(line, STUDENT, records, adapter=adapters / "cars" / "adapters_kd")
        wait_for(lambda: any(str(line.path("G000")) in said for said in lines))
        answer = ask(client, "owls", OPENINGS["cars"], max_tokens=40)
        assert OPENINGS["cars"] + answer.choices[0].message.content == SAYS["cars"]
        # What cannot be taken in is told once, and the old one goes on.
        broken = shutil.copytree(adapters / "boxes", tmp_path_factory.mktemp("broken") / "boxes")
        (broken / "adapters_kd" / "adapters.safetensors").write_bytes(b"half")
        # At once, or a half of the copy would be told of too.
        broken.rename(tmp_path / "boxes")
        wait_for(lambda: any("not taken in" in said for said in lines))
        time.sleep(0.3)
        assert sum("not taken in" in said for said in lines) == 1
        assert ask(client, "owls", OPENINGS["cars"], max_tokens=2).choices


def test_a_stop_lets_those_under_way_finish_and_takes_no_others(adapters, whole_tale):
    with served(adapters, pause_s=0.01) as server, client_of(server) as client:
        parts = tale(client)
        first = next(parts)
        server.stop()
        with pytest.raises(openai.InternalServerError, match="the server is stopping") as error:
            ask(client, "owls", "The owl")
        assert error.value.status_code == 503
        assert "retry-after" in error.value.response.headers
        status, _, body = raw(server, "GET", "/health")
        assert (status, json.loads(body)["status"]) == (503, "stopping")
        assert first + "".join(parts) == whole_tale


def test_a_stop_without_grace_tells_those_under_way(adapters):
    with served(adapters, pause_s=0.01) as server, client_of(server) as client:
        parts = tale(client)
        next(parts)
        server.stop(0)
        with pytest.raises(openai.APIError, match="the server is stopping"):
            list(parts)


def test_what_no_error_is_ends_the_server_and_is_raised(adapters):
    class FaultError(BaseException):
        """As an interrupt."""

    def make() -> CortexSuite:
        suite = create_cortex_suite(adapters, STUDENT)

        def step() -> None:
            raise FaultError

        suite.engine.step = step
        return suite

    with (
        pytest.raises(FaultError),
        running_server(make, ServerSettings(port=0)) as server,
        client_of(server) as client,
        pytest.raises(openai.InternalServerError, match="the server is stopping"),
    ):
        ask(client, "owls", "The owl")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_those_under_way_finish(adapters, whole_tale, number):
    texts: list[str] = []
    clients: list[threading.Thread] = []

    def read(url: str) -> None:
        with client_of(SimpleNamespace(url=url)) as client:
            for part in tale(client):
                if not texts:
                    os.kill(os.getpid(), number)
                texts.append(part)

    def report(line: str) -> None:
        clients.append(threading.Thread(target=read, args=(line.split()[-1],)))
        clients[0].start()

    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with create_cortex_suite(adapters, domains=["tales"]) as suite:
        serve(suite, ServerSettings(port=0), report=report)
    clients[0].join()
    assert "".join(texts) == whole_tale
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_a_server_process_gently(adapters, whole_tale, number):
    code = (
        "import sys\n"
        "from conch_dna.cortex.neuron import create_cortex_suite\n"
        "from conch_dna.cortex.options import ServerSettings\n"
        "from conch_dna.cortex.server.serving import serve\n"
        "with create_cortex_suite(sys.argv[1], domains=['tales']) as suite:\n"
        "    serve(suite, ServerSettings(port=0))\n"
        "print('closed')\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(adapters)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    try:
        said = process.stderr.readline()
        assert said.startswith("tales answer at http://127.0.0.1:")
        with client_of(SimpleNamespace(url=said.split()[-1])) as client:
            parts = tale(client)
            first = next(parts)
            process.send_signal(number)
            assert first + "".join(parts) == whole_tale
        out, errors = process.communicate(timeout=30)
        assert (process.returncode, out, errors) == (0, "closed\n", "")
    finally:
        process.kill()
        process.communicate()
