"""GGUF files as models: what is read is what was written, and what is not whole is refused.

The files are written by tests/gguf_files.py, from the specification; oracles are its NumPy values.
"""

import json
import random
import struct
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from conch_dna.cli import main
from conch_dna.errors import ConchError
from conch_dna.language_model import ModelSource, load_tokenizer, resolve_model
from conch_dna.loading.gguf_file import read_gguf
from conch_dna.loading.gguf_model import model_folder
from conch_dna.training.cli import name_for_mlx_lm
from gguf_files import llama_parts, write_gguf
from models import ASSETS, make_model_folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCH_DNA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A random Llama whose rows can be quantized in blocks of 32."""
    return make_model_folder(tmp_path_factory.mktemp("llama") / "model", seed=3)


def logits(model: str | Path) -> np.ndarray:
    loaded = ModelSource(str(model)).load()
    return np.array(loaded.logits(mx.array([[5, 9, 100, 3, 77, 41]])))


def written(folder: Path, path: Path, kind: str = "F32", **changes: object) -> Path:
    """A model folder as a GGUF file, with other metadata; None takes a key away."""
    metadata, tensors = llama_parts(folder, kind)
    changed = {name.replace("__", "."): value for name, value in changes.items()}
    whole = {**metadata, **changed}
    write_gguf(path, {k: v for k, v in whole.items() if v is not None}, tensors)
    return path


# What is read


def test_a_file_says_what_its_folder_says(llama, tmp_path):
    path = written(llama, tmp_path / "a.gguf")
    np.testing.assert_array_equal(logits(path), logits(llama))
    source = ModelSource(str(path))
    assert source.config["model_type"] == "llama"
    assert source.context_length == 256
    text = "Once upon a time, don't 123!\n  <|endoftext|>ü"
    assert source.tokenizer.encode(text) == load_tokenizer(llama).encode(text)
    assert source.tokenizer.eos_token_ids == load_tokenizer(llama).eos_token_ids


@pytest.mark.parametrize("kind", ["F16", "Q4_0", "Q4_1", "Q8_0"])
def test_each_kind_of_weights_stands_for_what_the_specification_says(llama, tmp_path, kind):
    """The oracle is a float32 file of the values that NumPy reads out of the blocks."""
    metadata, tensors = llama_parts(llama, kind, embedding_kind="Q8_0")
    meant = write_gguf(tmp_path / "a.gguf", metadata, tensors)
    dense = {name: ("F32", values.astype(np.float32)) for name, values in meant.items()}
    write_gguf(tmp_path / "b.gguf", metadata, dense)
    np.testing.assert_allclose(
        logits(tmp_path / "a.gguf"), logits(tmp_path / "b.gguf"), rtol=1e-4, atol=2e-4
    )
    assert np.abs(logits(tmp_path / "a.gguf") - logits(llama)).max() > 1e-4


def test_an_own_head_is_taken(tmp_path):
    folder = make_model_folder(tmp_path / "model", tie_word_embeddings=False)
    path = written(folder, tmp_path / "a.gguf")
    np.testing.assert_array_equal(logits(path), logits(folder))


def test_sentence_pieces_follow_from_their_scores(shared_data, tmp_path):
    folder = shared_data / "models" / "stories260K"
    path = written(folder, tmp_path / "a.gguf")
    np.testing.assert_array_equal(logits(path), logits(folder))
    mine, theirs = ModelSource(str(path)).tokenizer, load_tokenizer(folder)
    for text in ("Once upon a time", " two  spaces ", "ünï 🙂", "<s>Once</s>", "a\nb"):
        assert mine.encode(text) == theirs.encode(text)
        assert mine.decode(mine.encode(text)) == theirs.decode(theirs.encode(text))


def test_a_chat_template_comes_along(llama, tmp_path):
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    path = written(llama, tmp_path / "a.gguf", tokenizer__chat_template=template)
    tokenizer = ModelSource(str(path)).tokenizer
    assert tokenizer.chat_template == template


def test_it_is_made_once_and_again_where_it_was_altered(llama, tmp_path):
    path = written(llama, tmp_path / "a.gguf")
    folder = resolve_model(str(path))
    digest = ModelSource(str(path)).weights_digest
    weights = folder / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert model_folder(path) == folder
    assert weights.stat().st_mtime_ns == before
    weights.write_bytes(weights.read_bytes()[:-1])
    assert ModelSource(str(path)).weights_digest == digest
    other = written(llama, tmp_path / "b.gguf", llama__context_length=128)
    assert ModelSource(str(other)).weights_digest != digest


def test_positions_that_are_stretched_linearly(llama, tmp_path):
    path = written(
        llama, tmp_path / "a.gguf", llama__rope__scaling__type="linear",
        llama__rope__scaling__factor=2.0,
    )  # fmt: skip
    assert ModelSource(str(path)).config["rope_scaling"] == {"type": "linear", "factor": 2.0}


def test_mlx_lm_is_told_the_folder_not_the_file(llama, tmp_path):
    path = written(llama, tmp_path / "a.gguf")
    folder = resolve_model(str(path))
    assert name_for_mlx_lm(str(path), folder) == str(folder)
    assert name_for_mlx_lm(str(llama), llama) == str(llama)
    assert name_for_mlx_lm("organisation/name", folder) == "organisation/name"
    assert name_for_mlx_lm("embedded:student", folder) == str(folder)


def test_both_models_of_a_dry_run_can_be_files(llama, tmp_path):
    path = written(llama, tmp_path / "a.gguf", "Q8_0")
    data = tmp_path / "data.jsonl"
    lines = [{"prompt": f"{n} cats", "completion": " ran home."} for n in range(12)]
    data.write_text("\n".join(map(json.dumps, lines)))
    arguments = ["distill", "--domain", "own", "--teacher", str(path), "--student", str(path)]
    arguments += ["--data", str(data), "--dry-run", "--force"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert "a.gguf" in done.output
    for option, message in (("--full", "cannot be trained in full"), ("--dora", None)):
        done = CliRunner().invoke(main, [*arguments, option])
        assert (done.exit_code == 2) == (message is not None), done.output
        assert message is None or message in done.output


# What is refused

REFUSED = {
    "another architecture": ({"general__architecture": "qwen3moe"}, "architecture 'qwen3moe'"),
    "no architecture": ({"general__architecture": None}, "does not say general.architecture"),
    "no sizes": ({"llama__block_count": None}, "does not say llama.block_count"),
    "size as text": ({"llama__block_count": "2"}, "block_count is of another type"),
    "huge": ({"llama__block_count": 10**7}, "block_count is 10,000,000, not from 1 to 1,000"),
    "none": ({"llama__attention__head_count": 0}, "head_count is 0, not from 1"),
    "too many layers": ({"llama__block_count": 3}, "has no blk.2.attn_q.weight"),
    "too few layers": ({"llama__block_count": 1}, "has blk.1.attn_k.weight, which"),
    "other width": ({"llama__embedding_length": 32}, "has the shape"),
    "no heads": ({"llama__attention__head_count": 7}, "has the shape"),
    "an epsilon of NaN": (
        {"llama__attention__layer_norm_rms_epsilon": float("nan")},
        "epsilon is nan, not above 0",
    ),
    "half a turn": ({"llama__rope__dimension_count": 8}, "turns 8 of a head's 16"),
    "yarn": ({"llama__rope__scaling__type": "yarn"}, "stretches positions by 'yarn'"),
    "no tokens": ({"tokenizer__ggml__tokens": None}, "does not say tokenizer.ggml.tokens"),
    "another split": ({"tokenizer__ggml__pre": "tekken"}, "the way of 'tekken'"),
    "another tokenizer": ({"tokenizer__ggml__model": "t5"}, "of the kind 't5'"),
    "a wrong merge": ({"tokenizer__ggml__merges": ["no merge"]}, "a merge is not of two"),
    "an odd end": ({"tokenizer__ggml__eos_token_id": 10**6}, "eos_token_id is 1000000"),
    "odd types": ({"tokenizer__ggml__token_type": np.ones(3, np.int32)}, "token_type for each"),
    "doubled tokens": ({"tokenizer__ggml__tokens": ["a", "a"]}, "have the same text"),
    "odd alignment": ({"general__alignment": 0}, "general.alignment is 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_llama_cannot_be_is_refused_in_one_line(llama, tmp_path, name):
    changes, message = REFUSED[name]
    path = written(llama, tmp_path / "a.gguf", **changes)
    with pytest.raises(ConchError, match=message) as caught:
        ModelSource(str(path))
    assert str(caught.value).isprintable()
    assert not list((tmp_path / "cache").glob("gguf/*"))


def test_weights_that_mlx_cannot_read_are_named(llama, tmp_path):
    metadata, tensors = llama_parts(llama)
    write_gguf(tmp_path / "a.gguf", metadata, tensors)
    data = (tmp_path / "a.gguf").read_bytes()
    name = b"blk.0.attn_q.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8
    (tmp_path / "a.gguf").write_bytes(data[:at] + struct.pack("<I", 13) + data[at + 4 :])
    with pytest.raises(ConchError, match="kind Q5_K, which mlx cannot read: take a file in"):
        ModelSource(str(tmp_path / "a.gguf"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot read .*empty"),
        (b"GGU", "does not begin with GGUF"),
        (b"GGML" + bytes(64), "does not begin with GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1, not 2 or 3"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "counts .* tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "counts .* keys"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63), "a name of"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 8) + b"x", "ends too soon"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 8, 2**62), "in one array"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 8, 2**20), "ends too soon"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 9, 2), "array of the type 9"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"a", 99), "unknown type 99"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 1, 0, 1, b"a", 2**31), "dimensions"),
        (b"GGUF" + struct.pack("<IQQQ1sIQQIQ", 3, 1, 0, 1, b"a", 2, 2**40, 2**40, 0, 0), "shape"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"a", 1, 32, 0, 2**40), "does not lie"),
    ],
)
def test_hostile_beginnings(tmp_path, content, message):
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(ConchError, match=message):
        read_gguf(tmp_path / "a.gguf")


def test_no_cut_and_no_altered_byte_brings_it_down(llama, tmp_path):
    """Silent failure: mlx reads wherever an offset points, and the process ends."""
    whole = written(llama, tmp_path / "a.gguf").read_bytes()
    path, draw = tmp_path / "b.gguf", random.Random(0)
    weights = whole.index(b"blk.0") + 4096
    refused = 0
    for number in range(120):
        data = bytearray(whole)
        if number % 2:
            del data[draw.randrange(len(data)) :]
        else:
            # Among the lengths and types of the beginning, and among the tensors' places.
            start = draw.choice([draw.randrange(400), weights - draw.randrange(4000)])
            value = draw.choice([b"\xff" * 8, bytes(8), draw.randbytes(4)])
            data[start : start + len(value)] = value
        path.write_bytes(data)
        try:
            read_gguf(path)
        except ConchError:
            refused += 1
    assert refused >= 60


def test_a_folder_that_ends_in_gguf_and_a_missing_file(tmp_path):
    (tmp_path / "a.gguf").mkdir()
    with pytest.raises(ConchError, match=r"no config\.json"):
        resolve_model(str(tmp_path / "a.gguf"))
    with pytest.raises(ConchError, match="does not exist"):
        resolve_model(str(tmp_path / "b.gguf"))


def test_the_embedded_model_can_be_such_a_file(tmp_path):
    path = written(ASSETS / "student", tmp_path / "student.gguf")
    config = json.loads((ASSETS / "student" / "config.json").read_text())
    assert ModelSource(str(path)).config["head_dim"] == config["head_dim"]
    np.testing.assert_array_equal(logits(path), logits(ASSETS / "student"))
