"""What reads files of training, generations and stores, each given an almost valid one.

A reader accepts the input or raises a ConchError; what else it raises is a fault. For
test_fuzz.py, which has the list of them.
"""

import functools
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import numpy as np
from hypothesis import strategies as st

from chat_templates import family_tokenizer
from conch_dna.checkpoints import (
    DIGESTS,
    content_digest,
    file_digest,
    read_folder,
    read_json,
    verify_folder,
    write_folder,
)
from conch_dna.errors import ConchError
from conch_dna.generations.laws import read_laws, violations
from conch_dna.generations.line import Line
from conch_dna.generations.manifest import outcome_of
from conch_dna.generations.settings import EvolveConfig, requested
from conch_dna.generations.tables import line_tree, manifest_table, nodes_of
from conch_dna.language_model import ModelSource
from conch_dna.options.commands import read_yaml
from conch_dna.sedimentation.adapters.adapter import EmbeddingAdapter
from conch_dna.sedimentation.benchmark.collections import read_beir
from conch_dna.sedimentation.changes.chelation_log import EVENTS_FILE, ChelationLog
from conch_dna.sedimentation.changes.collapse import CollapseNull
from conch_dna.sedimentation.changes.gate import GATE_HISTORY, add_to_history, read_history
from conch_dna.sedimentation.config import ChelationConfig
from conch_dna.sedimentation.documents import read_document_files, read_documents
from conch_dna.sedimentation.embedders.teachers import VectorCache
from conch_dna.sedimentation.stores.edge import MANIFEST as MANIFEST_OF_STORE
from conch_dna.sedimentation.stores.ledger import LEDGER
from conch_dna.sedimentation.stores.open_store import open_store
from conch_dna.sedimentation.stores.stored_documents import to_stored
from conch_dna.training.data.records import (
    read_prompts,
    read_records,
    split_heldout,
    tokenize_records,
)
from conch_dna.training.settings import KDConfig
from hostile import (
    broken,
    json_bytes,
    json_line_bytes,
    safetensors_bytes,
    text_bytes,
    yaml_bytes,
)

# Training data, prompts, documents.

CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": "Hello.", "weight": 1},
    ]
}
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TOOLS = {
    "tools": [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}],
    "messages": [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "It is 2."},
    ],
}
RECORDS = [
    CHAT,
    TOOLS,
    {"prompt": "One day,", "completion": " a cat slept."},
    {"text": "Once upon a time"},
    {"prompt": "A", "completion": "b", "finish_reason": "length"},
]


@functools.cache
def chat_tokenizer(folder: Path) -> Any:
    return family_tokenizer(folder, "ChatML")


def read_data(folder: Path, content: bytes, name: str = "data.jsonl") -> None:
    path = folder / name
    path.write_bytes(content)
    records = read_records(path)
    # What can be read need not be of use.
    with suppress(ConchError):
        split_heldout(records, 0.1, seed=0)
    for record in records[:8]:
        with suppress(ConchError):
            tokenize_records([record], chat_tokenizer(folder / "tokenizer"))


def read_prompt_file(folder: Path, content: bytes, name: str) -> None:
    path = folder / name
    path.write_bytes(content)
    read_prompts(path)


DOCUMENTS = [
    {"id": "a", "title": "Owls", "text": "Owls hunt at night.", "payload": {"year": 1999}},
    {"_id": 7, "text": "A box.", "metadata": {"tags": ["x", "y"], "deep": {"a": [1.5, None]}}},
    {"text": "No id."},
]


def read_corpus(folder: Path, content: bytes) -> None:
    path = folder / "corpus.jsonl"
    path.write_bytes(content)
    for document in read_documents(read_document_files([str(path)])):
        to_stored(document.id, document.stored, "0" * 64)
        assert document.digest


QUERIES = [{"_id": "q1", "text": "What hunts at night?"}, {"_id": "q2", "text": "A box?"}]
CORPUS = [{"_id": "a", "title": "Owls", "text": "Owls hunt."}, {"_id": "b", "text": "A box."}]
QRELS = "query-id\tcorpus-id\tscore\nq1\ta\t1\nq2\tb\t2\nq2\ta\t0\n"


def read_judged(folder: Path, files: tuple[bytes, bytes, bytes]) -> None:
    (folder / "qrels").mkdir(exist_ok=True)
    names = ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv")
    for name, content in zip(names, files, strict=True):
        (folder / name).write_bytes(content)
    read_beir(folder)


def beir_files() -> st.SearchStrategy[tuple[bytes, bytes, bytes]]:
    rows = [
        b"".join(json.dumps(row).encode() + b"\n" for row in each) for each in (CORPUS, QUERIES)
    ]
    return st.one_of(
        st.tuples(json_line_bytes(CORPUS), st.just(rows[1]), st.just(QRELS.encode())),
        st.tuples(st.just(rows[0]), json_line_bytes(QUERIES), st.just(QRELS.encode())),
        st.tuples(st.just(rows[0]), st.just(rows[1]), text_bytes([QRELS])),
    )


# Settings.

KD = {"iters": 20, "learning-rate": 1e-3, "alpha": 0.5, "lora_keys": "all", "top_k": 8}
STORE = {"top_k": 5, "gate_margin": 0.005, "seed": 3, "collapse_percentile": 5}
EVOLVE = {
    "evolution_request": {"line": "tales", "data": "sums.jsonl"},
    "teachers": [{"role": "parent", "path": "embedded:teacher"}],
    "training_params": {"iters": 10, "alpha": 0.5, "blend": {"strategy": "confidence"}},
    "stabilizers": {"ema_decay": 0.9, "taboo_words": ["bad"], "taboo_ids": [1, 2]},
    "evaluation": {"answers": 8},
    "gates": {"generalize_margin": 0.01},
    "laws": [{"name": "short", "max_words": 80}],
}


def read_settings(folder: Path, content: bytes) -> None:
    path = folder / "settings.yaml"
    path.write_bytes(content)
    values = read_yaml(path)
    problems = []
    for read in (
        lambda values: KDConfig.from_json(values, source="settings.yaml"),
        lambda values: ChelationConfig.from_json(values, source="settings.yaml"),
        lambda values: EvolveConfig.from_manifest(values, source="settings.yaml"),
        lambda values: requested(values, "settings.yaml", line=None, data=None),
    ):
        try:
            read(dict(values))
        except ConchError as error:
            problems.append(error)
    if len(problems) == 4:
        raise problems[-1]


LAWS = [
    {"name": "short", "max_words": 80},
    {"name": "no links", "forbid": "https?://\\S+"},
    {"name": "ends", "require": "(\\.|!)$"},
    {"name": "nested", "forbid": "(a+)+$"},
    {"name": "json", "valid_json": True},
    {"name": "long", "max_characters": 1_000},
]
PATTERNS = ("(a|aa)+$", "(?:" * 500 + ")" * 500, "a{1000}{1000}", "((((a*)*)*)*)*b", "\\p{L}+", "[")
ANSWERS = ["a" * 50_000 + "!", "-eyJ" * 20_000, '{"a": ' * 15_000, "\ud800 half", "", "Fine.\n"]


@st.composite
def laws_and_texts(draw: st.DrawFn) -> tuple[bytes, str]:
    laws = [*LAWS, {"name": "drawn", "forbid": draw(st.sampled_from(PATTERNS))}]
    return draw(yaml_bytes([laws])), draw(st.sampled_from(ANSWERS))


def keep_laws(folder: Path, given_: tuple[bytes, str]) -> None:
    content, answer = given_
    path = folder / "laws.yaml"
    path.write_bytes(content)
    violations(read_laws(path), [answer, answer[:100]])


# What runs and lines wrote.

RUN = {"identity": {"teacher": "a", "num_iters": 4}, "begun": "2026-11-29", "finished": False}


def read_run(folder: Path, content: bytes) -> None:
    from conch_dna.training.runs.domain_run import DomainRun

    source = embedded_source()
    config = KDConfig(output_dir=str(folder))
    run = DomainRun(source, source, config, "s", lambda event, facts: None)
    (run.folder / "checkpoint-4").mkdir(parents=True, exist_ok=True)
    (run.folder / "run.json").write_bytes(content)
    run.begin(["a"], resume=True, overwrite=False)


@functools.cache
def embedded_source() -> ModelSource:
    return ModelSource("embedded:student")


VERDICT = {
    "gate": "generalize",
    "passed": True,
    "reason": "generalize: better",
    "figures": {"difference": 0.1},
}
MANIFEST = {
    "format": 1,
    "line": "tales",
    "generation": "G001",
    "parent": "G000",
    "grandparent": None,
    "teachers": [{"role": "parent", "path": "G000"}],
    "evolution_request": {"train": 1, "heldout": 1, "recall": 1, "replay": 1},
    "training_params": {
        "alpha": 0.5,
        "beta": 0.5,
        "gamma": 0.0,
        "temperature": 2.0,
        "num_iters": 2,
        "batch_size": 2,
        "full": False,
    },
    "stabilizers": {"ema_decay": 0.9, "replay_share": 0.1, "taboo_words": []},
    "verdicts": [VERDICT],
    "decision": "promoted",
    "digests": {"parents": {"G000": "0" * 64}},
    "base": {"model": "embedded:student", "weights": "1", "tokenizer": "2"},
    "versions": {"conch_dna": "1"},
    "created": "2026-11-29T00:00:00Z",
    "seed": 0,
}
METRICS = {"scores": {"child": {"a": 1.0}, "parent": {"a": 1.0}}}
ENTRY = {
    "event": "init",
    "folder": "G000",
    "head": "G000",
    "folder_digest": "0" * 64,
    "time": "2026-11-29T00:00:00Z",
    "previous": "",
}
LINE_FILES = ("G001/manifest.json", "G001/metrics.json", "G001/digests.json", "log.jsonl", "HEAD")


def line_changes() -> st.SearchStrategy[tuple[str, bytes]]:
    strategies = (
        json_bytes([MANIFEST]),
        json_bytes([METRICS]),
        json_bytes([{"manifest.json": "0" * 64, "metrics.json": "0" * 64}]),
        json_line_bytes([ENTRY]),
        text_bytes(["G001\n", "G000\n", "../G001", "G" + "9" * 5_000]),
    )
    # The manifest has most that can be wrong.
    pairs = [
        st.tuples(st.just(name), inputs)
        for name, inputs in zip(LINE_FILES, strategies, strict=True)
    ]
    return st.one_of(pairs[0], *pairs)


def read_line(folder: Path, change: tuple[str, bytes]) -> None:
    """The digests are right, as of a line of another version, or by a careful attacker."""
    line = Line(folder, "tales")
    if not line.folder.is_dir():
        first = {**MANIFEST, "generation": "G000", "parent": None, "digests": {"parents": {}}}
        write_folder(line.folder / "G000", documents={"manifest.json": first})
        documents = {"manifest.json": MANIFEST, "metrics.json": METRICS}
        write_folder(line.folder / "G001", documents=documents)
    (line.folder / "HEAD").write_text("G001\n")
    (line.folder / "log.jsonl").write_text(json.dumps(ENTRY) + "\n")
    generation = line.folder / "G001"
    (generation / "manifest.json").write_text(json.dumps(MANIFEST))
    (generation / "metrics.json").write_text(json.dumps(METRICS))
    name, content = change
    if name != "G001/digests.json":
        (line.folder / name).write_bytes(content)
        seal(generation)
    else:
        (line.folder / name).write_bytes(content)
    line.problems()
    line.log()
    head = line.head
    line_tree("tales", nodes_of(line), head)
    outcome_of(generation)
    manifest = line.manifest(head)
    manifest_table(head, manifest)
    line.base(head)


def seal(folder: Path) -> None:
    """Write the digests of a folder as its files are now."""
    files = [path for path in sorted(folder.iterdir()) if path.name != DIGESTS]
    (folder / DIGESTS).write_text(json.dumps({path.name: file_digest(path) for path in files}))


def read_checkpoint(folder: Path, given_: tuple[str, bytes]) -> None:
    path = folder / "checkpoint-1"
    shutil.rmtree(path, ignore_errors=True)
    arrays = {"state.safetensors": {"a": mx.zeros((4,)), "b": mx.ones((2, 2))}}
    write_folder(path, arrays=arrays, documents={"state.json": RUN})
    name, content = given_
    (path / name).write_bytes(content)
    if name != DIGESTS:
        seal(path)
    verify_folder(path)
    read_folder(path)


def checkpoint_changes() -> st.SearchStrategy[tuple[str, bytes]]:
    return st.one_of(
        st.tuples(st.just("state.safetensors"), safetensors_bytes()),
        st.tuples(st.just("state.json"), json_bytes([RUN])),
        st.tuples(st.just(DIGESTS), json_bytes([{"state.json": "0" * 64}])),
    )


# What stores wrote.

STORE_MANIFEST = {
    "format": 1,
    "identity": {"student": "s", "digest": "0" * 64, "dimension": 4},
    "versions": {"active": "raw", "previous": None, "kept": {}, "building": {}},
}
NULL = {
    "percentile": 5.0,
    "threshold": 0.1,
    "k": 3,
    "sample": 9,
    "seed": 0,
    "version": "raw",
    "lowest": 0.1,
    "median": 0.2,
    "highest": 0.3,
    "values_digest": "0" * 64,
}


def read_store(folder: Path, content: bytes) -> None:
    place = folder / "store"
    if not place.is_dir():
        identity = STORE_MANIFEST["identity"]
        with open_store(place, identity=identity) as store:
            vectors = np.eye(4, dtype=np.float32)[:2]
            store.put(["a", 1], [{"text": "x"}, {"text": "y"}], ["0" * 64] * 2, {"raw": vectors})
    shutil.rmtree(folder / "copy", ignore_errors=True)
    shutil.copytree(place, folder / "copy")
    (folder / "copy" / MANIFEST_OF_STORE).write_bytes(content)
    with open_store(folder / "copy") as store:
        store.count("raw")
        store.versions()


def read_null(folder: Path, content: bytes) -> None:
    path = folder / "null-raw.json"
    path.write_bytes(content)
    document = read_json(path, needs={"null": dict, "documents": int})
    CollapseNull.from_json(document["null"], source=str(path)).is_collapsed(0.1)


def make_store_adapter(path: Path) -> None:
    EmbeddingAdapter.identity(4).save(path, {"documents": "adapted"})


def read_adapter_of_store(folder: Path, change: tuple[str, bytes]) -> None:
    path = folder / "v0001"
    shutil.rmtree(path, ignore_errors=True)
    make_store_adapter(path)
    name, content = change
    (path / name).write_bytes(content)
    seal(path)
    EmbeddingAdapter.load(path).apply(np.eye(4, dtype=np.float32))


def log_content() -> bytes:
    """A log as it is written."""
    with TemporaryDirectory() as folder:
        log = ChelationLog(Path(folder) / "log")
        for number in range(3):
            log.append(
                query=f"q{number}",
                version="raw",
                student_digest="0" * 64,
                dispersion=0.1,
                threshold=0.2,
                neighbourhood=["a", number],
            )
        return log.path.read_bytes()


LOG = log_content()
EVENTS = [json.loads(line) for line in LOG.splitlines()]


def read_log(folder: Path, content: bytes) -> None:
    place = folder / "log"
    shutil.rmtree(place, ignore_errors=True)
    (folder / LEDGER).unlink(missing_ok=True)
    place.mkdir()
    (place / EVENTS_FILE).write_bytes(content)
    ChelationLog(place).documents_logged(at_least=1)


DECISION = {
    "time": "2026-11-29T00:00:00+00:00",
    "candidate": "v0001",
    "passed": True,
    "reason": "better",
    "figures": {"ndcg": {"before": 0.1}},
    "activated": True,
}


def read_gate_history(folder: Path, content: bytes) -> None:
    (folder / LEDGER).unlink(missing_ok=True)
    (folder / GATE_HISTORY).write_bytes(content)
    if read_history(folder):
        add_to_history(folder, {"candidate": "v0002"})


VECTORS = {"keys": np.zeros((2, 32), np.uint8), "vectors": np.eye(2, dtype=np.float32)}


@st.composite
def vector_shards(draw: st.DrawFn) -> bytes:
    from safetensors.numpy import save

    return draw(st.one_of(broken(save(VECTORS)), safetensors_bytes()))


def read_vectors(folder: Path, content: bytes) -> None:
    """The name is right, as of a shard that another program wrote."""
    digest = "0" * 64
    cache = folder / digest[:32]
    for path in cache.glob("*"):
        path.unlink()
    cache.mkdir(exist_ok=True)
    (cache / f"vectors-{content_digest(content)[:32]}.safetensors").write_bytes(content)
    VectorCache(folder, digest).find([bytes(32)])


def folder_changes(
    made: Callable[[Path], object], document: str, arrays: str
) -> st.SearchStrategy[tuple[str, bytes]]:
    """A file's name, and what is almost what it has in a folder that is made when first needed."""

    def changes() -> st.SearchStrategy[tuple[str, bytes]]:
        with TemporaryDirectory() as folder:
            made(place := Path(folder) / "made")
            value = json.loads((place / document).read_text())
            content = (place / arrays).read_bytes()
        return st.one_of(
            st.tuples(st.just(document), json_bytes([value])),
            st.tuples(st.just(arrays), st.one_of(broken(content), safetensors_bytes())),
        )

    return st.deferred(changes)


def store_adapter_changes() -> st.SearchStrategy[tuple[str, bytes]]:
    return folder_changes(make_store_adapter, "adapter.json", "adapter.safetensors")


def log_bytes() -> st.SearchStrategy[bytes]:
    return st.one_of(broken(LOG), json_line_bytes(EVENTS), json_bytes(EVENTS))
