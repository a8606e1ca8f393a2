"""Embeddings over loopback with the official client, of a student that sedimentation made."""

import base64
import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openai
import pytest

from conch_dna.cortex.server.embeddings import (
    EmbeddingRequest,
    EmbeddingThread,
    open_student,
    parse_embeddings,
)
from conch_dna.cortex.server.serving import CortexServer
from conch_dna.errors import ConchError
from conch_dna.sedimentation.adapters.adapter import PairSums, linear_adapter
from conch_dna.sedimentation.adapters.export import export_sentence_transformer
from conch_dna.sedimentation.embedders.local import LocalEmbedder
from conch_dna.sedimentation.embedders.make_student import make_student
from conch_dna.sedimentation.embedders.open_embedder import open_embedder
from conch_dna.web.door import ApiError
from servers import ask, client_of, metric, raw, served, wait_for
from tiny_embedders import make_tiny_teacher, tiny_texts

TEXTS = [*tiny_texts(5), "baba"]
DIMENSION = 16
PATH = "/v1/embeddings"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer with a prompt for queries, which reads 64 tokens."""
    prompts = {"query": "query : ", "document": ""}
    return make_tiny_teacher(tmp_path_factory.mktemp("models") / "bert", prompts=prompts)


@pytest.fixture(scope="module")
def student(teacher: Path) -> Path:
    """A static student of it, as `make-student` leaves it."""
    return make_student(
        str(teacher), teacher.parent / "student", dimension=DIMENSION, device="cpu"
    ).folder


@pytest.fixture(scope="module")
def server(served_adapters: Path, student: Path) -> Iterator[CortexServer]:
    with served(served_adapters, embeddings=str(student)) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: CortexServer) -> Iterator[openai.OpenAI]:
    with client_of(server) as client:
        yield client


def vectors(reply) -> np.ndarray:
    return np.array([each.embedding for each in reply.data])


# Embeddings


@pytest.mark.parametrize("encoding", [None, "float", "base64"])
def test_embeddings_are_those_of_sedimentation(client, student, encoding):
    form = {} if encoding is None else {"encoding_format": encoding}
    reply = client.embeddings.create(model="student", input=TEXTS, user="u", **form)
    expected = open_embedder(str(student)).documents(TEXTS).all_vectors()
    found = vectors(reply)
    if encoding == "base64":
        rows = [base64.b64decode(each.embedding) for each in reply.data]
        found = np.array([np.frombuffer(row, "<f4") for row in rows])
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert [each.index for each in reply.data] == list(range(len(TEXTS)))
    assert (reply.object, reply.data[0].object, reply.model) == ("list", "embedding", "student")
    # A word of the vocabulary is a token.
    words = sum(len(text.split()) for text in TEXTS)
    assert (reply.usage.prompt_tokens, reply.usage.total_tokens) == (words, words)


def test_one_text_is_a_list_of_one(client):
    one = client.embeddings.create(model="student", input="baba", dimensions=DIMENSION)
    np.testing.assert_array_equal(
        vectors(one), vectors(client.embeddings.create(model="student", input=["baba"]))
    )


def test_as_many_texts_as_may_be_come_in_their_order(client, student):
    texts = [" ".join(tiny_texts(1, seed=n, length=1 + n % 40)) for n in range(2048)]
    found = vectors(client.embeddings.create(model="student", input=texts))
    expected = open_embedder(str(student)).documents(texts).all_vectors()
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0)


def test_a_learned_adapter_is_served_as_it_was_exported(served_adapters, student, tmp_path):
    embedder = open_embedder(str(student))
    raw_vectors = embedder.documents(tiny_texts(200)).all_vectors()
    turned = np.roll(raw_vectors, 3, axis=1)
    adapter = linear_adapter("procrustes", PairSums.of(raw_vectors, turned))
    export_sentence_transformer(embedder.model, adapter, tmp_path / "papers")
    expected = adapter.apply(embedder.documents(TEXTS).all_vectors())
    with (
        served(served_adapters, embeddings=str(tmp_path / "papers")) as server,
        client_of(server) as client,
    ):
        reply = client.embeddings.create(model="papers", input=TEXTS)
        long = client.embeddings.create(model="papers", input="baba " * 5000)
    np.testing.assert_allclose(vectors(reply), expected, atol=1e-6, rtol=0)
    assert reply.usage.prompt_tokens == sum(len(text.split()) for text in TEXTS)
    assert long.usage.prompt_tokens == 5000


def test_a_transformer_has_prompts_and_an_end(served_adapters, teacher):
    embedder = open_embedder(str(teacher))
    with (
        served(served_adapters, embeddings=str(teacher)) as server,
        client_of(server) as client,
    ):
        for queries in (False, True):
            reply = client.embeddings.create(
                model="bert", input=TEXTS, extra_body={"conch": {"queries": queries}}
            )
            expected = embedder.embed(TEXTS, queries=queries).all_vectors()
            np.testing.assert_allclose(vectors(reply), expected, atol=1e-6, rtol=0)
            # [CLS], [SEP], and the prompt "query : ".
            words = sum(len(text.split()) for text in TEXTS)
            assert reply.usage.prompt_tokens == words + (4 if queries else 2) * len(TEXTS)
        assert client.embeddings.create(model="bert", input="baba " * 62).usage.prompt_tokens == 64
        refusal = (
            r"input\[1\] has 65 tokens, and 1 more texts are too long: bert reads 64 of a text"
        )
        with pytest.raises(openai.BadRequestError, match=refusal) as refused:
            client.embeddings.create(model="bert", input=["a", "baba " * 63, "baba " * 99])
        assert (refused.value.param, refused.value.code) == ("input", "context_length_exceeded")


# Refusals


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"input": ""}, r"input\[0\]: it is empty or only white space, leave it out"),
        ({"input": ["baba", " \n"]}, r"input\[1\]: it is empty"),
        ({"input": []}, "input is an empty list: give a text or more"),
        ({"input": None}, "input is missing: give a text or a list of texts"),
        ({"input": 5}, "input is 5: give a text or a list of texts"),
        ({"input": ["baba", {}]}, r"input\[1\] is {}: give a text or a list of texts"),
        ({"input": [15339, 1917]}, "input holds token ids, .*: send texts"),
        ({"input": [[15339], [1917]]}, "input holds token ids, .*: send texts"),
        ({"input": ["a"] * 2049}, "input has 2,049 texts: send at most 2,048 at once"),
        ({"encoding_format": "int8"}, "encoding_format is 'int8': give float or base64"),
        ({"dimensions": 8}, "dimensions is 8: the embeddings of student have 16, leave it out"),
        ({"dimensions": 0}, "dimensions is 0: give a whole number, 1 or more"),
        ({"conch": {"hand_over": "never"}}, "conch.hand_over is not supported .* with queries"),
        ({"conch": {"queries": 1}}, "conch.queries is 1: give true or false"),
        ({"model": ""}, "model is '': give the name of the model"),
        ({"input": "☃"}, r"input\[0\]: student knows no part of it"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(server, more, message):
    status, _, body = raw(server, "POST", PATH, {"model": "student", "input": "baba"} | more)
    error = json.loads(body)["error"]
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert error["param"].startswith(next(iter(more)))
    assert re.match(message, error["message"]) and "\n" not in error["message"]


def test_fields_that_are_not_known_are_kept_by_their_names():
    asked = {"model": "student", "input": "baba", "input_type": "query", "truncate": True}
    assert parse_embeddings(json.dumps(asked).encode()).ignored == ["input_type", "truncate"]


def test_models_are_told_apart(client, server):
    assert [model.id for model in client.models.list()][-1] == "student"
    assert client.models.retrieve("student").id == "student"
    assert json.loads(raw(server, "GET", "/health")[2])["embeddings"] == "student"
    with pytest.raises(openai.NotFoundError, match="'owls' makes no embeddings here: student"):
        client.embeddings.create(model="owls", input="baba")
    with pytest.raises(openai.NotFoundError, match="student makes embeddings and no answers"):
        ask(client, "student", "baba")


def test_the_door_is_the_same(server, served_adapters, student, monkeypatch):
    asked = {"model": "student", "input": "baba"}
    assert raw(server, "POST", PATH, asked, Host="evil.example")[0] == 403
    assert raw(server, "POST", PATH, b"{}", Content_Type="text/plain")[0] == 415
    assert raw(server, "GET", PATH)[0] == 405
    monkeypatch.setenv("CONCH_DNA_TEST_KEY", "secret")
    with served(
        served_adapters,
        embeddings=str(student),
        api_key_env="CONCH_DNA_TEST_KEY",
        max_body_bytes=1000,
    ) as server:
        for key, status in (("wrong", 401), ("secret", 200)):
            header = {"Authorization": f"Bearer {key}"}
            assert raw(server, "POST", PATH, asked, **header)[0] == status
        header = {"Authorization": "Bearer secret"}
        assert raw(server, "POST", PATH, {**asked, "input": "baba " * 500}, **header)[0] == 413


def test_without_a_model_the_option_is_named(served_adapters):
    with (
        served(served_adapters) as server,
        client_of(server) as client,
        pytest.raises(openai.NotFoundError, match="start serve with --embeddings FOLDER"),
    ):
        client.embeddings.create(model="student", input="baba")


@pytest.mark.parametrize("name", ["owls", "ego"])
def test_the_name_of_a_domain_or_ego_is_refused(served_adapters, student, tmp_path, name):
    shutil.copytree(student, tmp_path / name)
    with (
        pytest.raises(ConchError, match=f"the folder of embeddings is called '{name}'"),
        served(served_adapters, embeddings=str(tmp_path / name)),
    ):
        pass


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(ConchError, match=r"there is no folder .*nothing"):
        open_student(str(tmp_path / "nothing"))
    with pytest.raises(ConchError, match=r"no modules\.json"):
        open_student(str(tmp_path))
    (tmp_path / "vectors").mkdir()
    (tmp_path / "vectors" / "manifest.json").write_text("{}")
    with pytest.raises(ConchError, match=r"is a store: .*sediment export"):
        open_student(str(tmp_path))


# Turns


class SlowSteps:
    """An embedder whose batches wait until they may go on."""

    def __init__(self, embedder: LocalEmbedder, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[list[str]] = []
        self.go = threading.Semaphore(0)
        embed = type(embedder)._encode

        def slow(embedder: LocalEmbedder, texts: list[str], *, queries: bool):
            self.batches.append(texts)
            assert self.go.acquire(timeout=60)
            return embed(embedder, texts, queries=queries)

        monkeypatch.setattr(type(embedder), "_encode", slow)

    def release(self) -> None:
        for _ in range(1000):
            self.go.release()


@pytest.fixture
def slow(student: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowSteps]:
    steps = SlowSteps(open_student(str(student)), monkeypatch)
    yield steps
    steps.release()


MANY = tiny_texts(500)


def test_a_long_request_lets_a_short_one_in_after_a_batch(client, slow):
    with ThreadPoolExecutor(2) as pool:
        long = pool.submit(client.embeddings.create, model="student", input=MANY)
        wait_for(lambda: len(slow.batches) == 1)
        short = pool.submit(client.embeddings.create, model="student", input="baba")
        time.sleep(0.3)
        # The batch under way, and then the other's.
        for _ in range(2):
            slow.go.release()
        assert len(short.result(timeout=30).data) == 1
        assert slow.batches[1] == ["baba"] and not long.done()
        slow.release()
        assert len(long.result(timeout=30).data) == len(MANY)


def test_neurons_answer_meanwhile(client, slow):
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.embeddings.create, model="student", input="baba")
        wait_for(lambda: len(slow.batches) == 1)
        assert ask(client, "owls", "The owl", max_tokens=3).choices
        assert not waiting.done()
        slow.release()
        assert waiting.result(timeout=30).data


def test_a_client_that_has_gone_is_not_computed_for(server, slow):
    before = metric(server, 'conch_dna_requests_total{model="student",status="499"}')
    with client_of(server) as client, pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).embeddings.create(model="student", input=MANY)
    wait_for(
        lambda: (
            metric(server, 'conch_dna_requests_total{model="student",status="499"}') == before + 1
        )
    )
    slow.release()
    time.sleep(0.3)
    assert len(slow.batches) == 1


def test_a_request_that_takes_too_long_is_told_so_and_not_computed(served_adapters, student, slow):
    with (
        served(served_adapters, embeddings=str(student), request_timeout_s=0.5) as server,
        client_of(server) as client,
    ):
        with pytest.raises(openai.InternalServerError, match=r"longer than 0\.5 s") as error:
            client.embeddings.create(model="student", input=MANY)
        assert error.value.status_code == 504
        slow.release()
        time.sleep(0.3)
        assert len(slow.batches) == 1


def test_embeddings_have_places_in_the_queue(served_adapters, student, slow):
    with (
        served(served_adapters, embeddings=str(student), max_queue=1) as server,
        client_of(server) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        waiting = pool.submit(client.embeddings.create, model="student", input="baba")
        wait_for(lambda: len(slow.batches) == 1)
        for refused in (
            lambda: client.embeddings.create(model="student", input="baba"),
            lambda: ask(client, "owls", "The owl", max_tokens=3),
        ):
            with pytest.raises(openai.RateLimitError, match="1 answers are waited for at most"):
                refused()
        slow.release()
        assert waiting.result(timeout=30).data
        assert client.embeddings.create(model="student", input="baba").data


def test_they_are_counted(client, server):
    name = 'conch_dna_requests_total{model="student",status="200"}'
    read = 'conch_dna_tokens_total{kind="prompt",model="student"}'
    before, tokens = metric(server, name), metric(server, read)
    reply = client.embeddings.create(model="student", input=TEXTS)
    wait_for(lambda: metric(server, name) == before + 1)
    assert metric(server, read) == tokens + reply.usage.prompt_tokens
    assert metric(server, 'conch_dna_request_seconds_count{model="student"}') >= 1


def test_a_stop_without_grace_tells_those_who_wait(served_adapters, student, slow):
    with (
        ThreadPoolExecutor(1) as pool,
        served(served_adapters, embeddings=str(student), grace_s=0) as server,
        client_of(server) as client,
    ):
        waiting = pool.submit(client.embeddings.create, model="student", input=MANY)
        wait_for(lambda: len(slow.batches) == 1)
        server.stop()
        time.sleep(0.2)
        slow.go.release()
        with pytest.raises(openai.InternalServerError, match="stopping") as error:
            waiting.result(timeout=30)
        assert error.value.status_code == 503


def test_what_comes_after_the_end_is_told_so(student):
    ended = EmbeddingThread(open_student(str(student)), taken=[], failed=print, report=print)
    ended.start()
    assert ended.stop(wait_s=20)
    with pytest.raises(ApiError, match="stopping"):
        ended.put(EmbeddingRequest(model="student", input=["a"]))


def test_a_stop_with_grace_waits_for_them(served_adapters, student, slow):
    with (
        ThreadPoolExecutor(1) as pool,
        served(served_adapters, embeddings=str(student)) as server,
        client_of(server) as client,
    ):
        waiting = pool.submit(client.embeddings.create, model="student", input=MANY)
        wait_for(lambda: len(slow.batches) == 1)
        server.stop()
        slow.release()
        assert len(waiting.result(timeout=30).data) == len(MANY)


def test_a_failure_is_that_of_one_request(served_adapters, student, monkeypatch):
    embedder = open_student(str(student))
    encode = type(embedder)._encode

    def failing(embedder: LocalEmbedder, texts: list[str], *, queries: bool):
        if "baba" in texts:
            raise MemoryError("no room")
        return encode(embedder, texts, queries=queries)

    monkeypatch.setattr(type(embedder), "_encode", failing)
    told: list[str] = []
    with (
        served(served_adapters, embeddings=str(student), report=told.append) as server,
        client_of(server) as client,
    ):
        with pytest.raises(openai.InternalServerError, match=r"the embeddings failed .*no room"):
            client.embeddings.create(model="student", input="baba")
        assert client.embeddings.create(model="student", input="cece").data
    assert any("a request to student failed" in line for line in told)
