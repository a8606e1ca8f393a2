"""A teacher behind a URL says what a local one does, and a run that it teaches can be resumed."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conch_dna.ego.teaching.completions import parse_completion
from conch_dna.errors import ConchError, EgoUnavailableError
from conch_dna.language_model import ModelSource
from conch_dna.screen.progress import silent
from conch_dna.training.batches import Example
from conch_dna.training.data.outcomes import TargetIdentity, compute_targets, target_identity
from conch_dna.training.machines.far.providers import (
    TokenNames,
    from_answer,
    from_echo,
    outcomes_of,
)
from conch_dna.training.machines.far.teacher import ServedTeacher, teacher_source
from conch_dna.training.machines.far.wire import counted_runs, example_of, packed, unpacked
from conch_dna.training.settings import KDConfig
from conch_dna.training.true_kd import TrueKnowledgeDistiller
from conch_dna.web.door import ApiError
from models import ANIMALS, QUICK, random_examples
from suites import teaching
from watching import Said

OTHERS = ("/v1/teacher",)
RECORDS = [
    {"prompt": f"The {animal}", "completion": f" saw a red {thing} and ran."}
    for animal in ANIMALS
    for thing in ("ball", "bug")
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONCH_DNA_CACHE", str(tmp_path / "cache"))


def largest_difference(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> float:
    """Between arrays of the same names, whose ids are the same."""
    largest = 0.0
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            if name.endswith("_ids"):
                np.testing.assert_array_equal(one[name], other[name])
            else:
                largest = max(largest, float(np.abs(one[name] - other[name]).max()))
    return largest


@pytest.mark.parametrize("draws", [0, 5])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_targets_are_those_of_a_local_teacher(tiny_teacher, batch_size, draws):
    local = ModelSource(str(tiny_teacher))
    examples = random_examples(8, local.vocabulary_size)
    with teaching(str(tiny_teacher)) as server:
        far = ServedTeacher(server.url)
        identity = target_identity(far, top_k=7, temperature=2.0)
        assert identity == target_identity(local, top_k=7, temperature=2.0)
        if draws:
            from dataclasses import replace

            identity = replace(identity, top_k=0, temperatures=(2.0,), draws=draws)
        how = {"batch_size": batch_size, "report": silent}
        there = far.resident().targets(examples, identity, **how)
    here = compute_targets(local.load(), examples, identity, **how)
    assert largest_difference(there, here) < 1e-5
    assert all(a[n].dtype == b[n].dtype for a, b in zip(there, here, strict=True) for n in a)


@contextmanager
def refusing(*names: str) -> Iterator[None]:
    """Makes servers refuse these parameters of a completion, as other servers do."""

    def without(body: bytes) -> Any:
        fields = json.loads(body)
        if refused := [name for name in names if fields.get(name)]:
            raise ApiError(400, f"unknown parameter {refused[0]}")
        return parse_completion(body)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("conch_dna.ego.teaching.server.parse_completion", without)
        yield


@pytest.mark.parametrize(
    ("refused", "top_k"),
    [((), 7), (("prompt_logprobs",), 7), (("prompt_logprobs", "return_token_ids"), 0)],
    ids=["prompt_logprobs", "echo", "echo by texts"],
)
def test_targets_of_a_server_of_others(tiny_teacher, refused, top_k):
    """One that has `echo` only gives log-probabilities by the tokens' ids or texts.

    Of texts some are those of several tokens, so only the text's own tokens are compared.
    """
    local = ModelSource(str(tiny_teacher))
    examples = random_examples(5, local.vocabulary_size)
    with refusing(*refused), teaching(str(tiny_teacher), without=OTHERS) as server:
        far = teacher_source(server.url, tokenizer=str(tiny_teacher))
        assert far.weights_digest != local.weights_digest
        identity = target_identity(far, top_k=top_k, temperature=1.0)
        far.require_outcomes(identity, KDConfig())
        there = far.resident().targets(examples, identity, batch_size=2, report=silent)
    here = compute_targets(local.load(), examples, identity, batch_size=2, report=silent)
    assert largest_difference(there, here) < 1e-4


def test_a_server_that_scores_its_own_answers_only(tmp_path):
    """A run learns from them; what it did not say itself it cannot be asked for."""
    settings = {**QUICK, "temperature": 1.0, "top_k": 8, "output_dir": str(tmp_path / "run")}
    prompts = [record["prompt"] for record in RECORDS]
    with (
        refusing("prompt_logprobs", "echo"),
        teaching("embedded:teacher", without=OTHERS) as server,
    ):

        def distiller(**more: Any) -> TrueKnowledgeDistiller:
            tokenizer = {"teacher_tokenizer": "embedded:teacher"}
            config = KDConfig(**{**settings, **tokenizer, **more})
            return TrueKnowledgeDistiller(server.url, "embedded:student", config)

        with pytest.raises(ConchError, match="none of a student's: leave out --on-policy"):
            distiller(on_policy=0.5).distill_domain("owls", prompts=prompts)
        with pytest.raises(ConchError, match="is none of those that were drawn here"):
            distiller().distill_domain("owls", data=RECORDS)
        run = distiller(run="own")
        result = run.distill_domain("owls", prompts=prompts)
        far = run.teacher.resident()
        ids = [1, 2, 3]
        (answer,) = far.answers([ids], max_tokens=4, temperature=1.0, seed=(5,))
        whole = np.array([*ids, *answer], np.int32)
        example = Example(whole, np.arange(len(whole)) >= 3, "an answer")
        identity = target_identity(run.teacher, top_k=8, temperature=1.0)
        (there,) = far.targets([example], identity, batch_size=1, report=silent)
    assert result.evaluation["teacher"]["kl_nats"] == 0
    local = ModelSource("embedded:teacher").load()
    (here,) = compute_targets(local, [example], identity, batch_size=1, report=silent)
    np.testing.assert_array_equal(there["kept_ids"], here["kept_ids"])
    np.testing.assert_allclose(there["kept_log_probs"], here["kept_log_probs"], atol=1e-3)
    np.testing.assert_allclose(there["log_rest"], here["log_rest"], atol=1e-3)


def test_an_answer_s_tokens_are_found_by_name_or_by_the_tokenizer(tiny_teacher):
    tokenizer = ModelSource(str(tiny_teacher)).tokenizer
    names, ids = TokenNames(tokenizer), tokenizer.encode("Once upon a time")
    fields: dict[str, Any] = {
        "tokens": ["no token is called so"] * len(ids),
        "top_logprobs": [{}] * len(ids),
        "token_logprobs": [-1.0] * len(ids),
    }
    found, rows = from_answer(fields, ids, names)
    assert found == ids and rows == [({token: -1.0}, -1.0) for token in ids]
    with pytest.raises(ConchError, match="give the server's own by --teacher-tokenizer"):
        from_answer(fields, ids[1:-1], names)
    with pytest.raises(ConchError, match="without log-probabilities"):
        from_answer({**fields, "tokens": []}, ids, names)


def test_what_a_server_of_others_cannot_give_is_refused(tiny_teacher, monkeypatch):
    with teaching(str(tiny_teacher), without=OTHERS) as server:
        far = teacher_source(server.url, tokenizer=str(tiny_teacher))
        with pytest.raises(ConchError, match="use --temperature 1, or `conch-dna teach serve`"):
            far.require_outcomes(target_identity(far, top_k=7, temperature=2.0), KDConfig())
        with pytest.raises(ConchError, match="is none: leave it out"):
            teacher_source("embedded:teacher", tokenizer=str(tiny_teacher))
        with pytest.raises(ConchError, match="name one of them behind the address"):
            teacher_source(f"{server.url}#other", tokenizer=str(tiny_teacher))
    with teaching(str(tiny_teacher), without=(*OTHERS, "/v1/completions")) as server:
        far = teacher_source(server.url, tokenizer=str(tiny_teacher))
        with pytest.raises(ConchError, match=r"is not there|gives no log-probabilities"):
            far.require_outcomes(target_identity(far, top_k=7, temperature=1.0), KDConfig())
    monkeypatch.setattr("conch_dna.training.machines.far.teacher.RETRIES", 0)
    with pytest.raises(EgoUnavailableError, match="cannot be reached"):
        ServedTeacher("http://127.0.0.1:9/v1")
    for url in ("http://", "http://user:secret@host/v1", "http://host/v1?key=secret"):
        with pytest.raises(ConchError, match="a user, a password or a query") as refused:
            ServedTeacher(url)
        assert "secret" not in str(refused.value)


def test_a_key_does_not_travel_unencrypted(monkeypatch):
    monkeypatch.setenv("CONCH_DNA_KEY", "secret")
    with pytest.raises(ConchError, match="would go unencrypted"):
        ServedTeacher("http://10.0.0.9:8643/v1")


def test_a_run_goes_on_when_the_server_is_back(tiny_teacher, tmp_path, monkeypatch):
    """It stops with one line where the server dies, and ends as one that was taught locally."""
    monkeypatch.setattr("conch_dna.training.machines.far.teacher.RETRIES", 0)
    monkeypatch.setattr("conch_dna.training.data.soft_targets.SHARD_POSITIONS", 16)
    settings = {**QUICK, "temperature": 2.0, "on_policy": 0.5, "rollout_tokens": 6, "rollouts": 4}
    student = "embedded:student"

    def run(teacher: str, place: str, **more: Any) -> dict[str, Any]:
        config = KDConfig(**{**settings, "output_dir": str(tmp_path / place)})
        distiller = TrueKnowledgeDistiller(teacher, student, config, report=more.pop("on", silent))
        result = distiller.distill_domain("owls", data=RECORDS, **more)
        assert result.metadata["teacher_digest"] == distiller.teacher.weights_digest
        return result.evaluation

    with teaching("embedded:teacher") as first:

        def dies(event: str, row: dict[str, Any]) -> None:
            if event == "advance" and "by" in row:
                first.stop()

        with pytest.raises(ConchError, match=r"cannot be reached|is stopping|busy or broken"):
            run(first.url, "far", on=dies)
    shards = list((tmp_path / "far" / "owls").glob("soft_targets/*/*.safetensors"))
    with teaching("embedded:teacher") as second:
        assert second.url != first.url
        far = run(second.url, "far", resume=True)
    assert shards and all(shard.is_file() for shard in shards)
    here = run("embedded:teacher", "local")
    for name in ("before", "after", "teacher"):
        for figure, value in far[name].items():
            assert value == pytest.approx(here[name][figure], abs=2e-3), (name, figure)


def test_a_run_goes_on_without_the_server_where_all_was_said(tmp_path):
    """By the address alone, and with the same teacher in memory, to the same adapter."""
    settings = {**QUICK, "output_dir": str(tmp_path)}

    def run(teacher: str, steps: int, **more: Any) -> Any:
        config = KDConfig(**{**settings, "num_iters": steps, "schedule": "constant"})
        said = Said()
        distiller = TrueKnowledgeDistiller(teacher, "embedded:student", config, report=said)
        return distiller.distill_domain("owls", data=RECORDS, **more), said

    with teaching("embedded:teacher") as server:
        url = server.url
        first, _ = run(url, 2)
    assert first.metadata["teacher"] == "served: embedded:teacher"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("conch_dna.training.machines.far.teacher.RETRIES", 0)
        again, said = run(url, 2, resume=True)
    assert any("going on with what it said before" in line for line in said)
    assert again.final_combined_loss == first.final_combined_loss
    longer, said = run("embedded:teacher", 4, resume=True)
    assert longer.metadata["teacher"] == "embedded:teacher"
    assert not any("other settings" in line for line in said)


@pytest.mark.slow
def test_a_killed_server_costs_no_more_than_time(tmp_path):
    """Processes: the server is killed while it computes targets, and the run goes on with another.

    The adapter has the same bytes as that of a run whose server lived.
    """
    command = [sys.executable, "-m", "conch_dna"]
    data = tmp_path / "data.jsonl"
    many = [
        {**record, "completion": f"{record['completion']} It had {number} legs and a hat. " * 16}
        for number in range(8)
        for record in RECORDS
    ]
    data.write_text("\n".join(map(json.dumps, many)), encoding="utf-8")

    @contextmanager
    def server() -> Iterator[tuple[Any, str]]:
        asked = [*command, "teach", "serve", "embedded:teacher", "--port", "0"]
        with subprocess.Popen(asked, stderr=subprocess.PIPE, text=True) as process:
            try:
                line = process.stderr.readline()
                yield process, line.split()[-1]
            finally:
                process.kill()

    def run(url: str, place: str, *more: str, **options: Any) -> Any:
        asked = [*command, "distill", "--domain", "owls", "--data", str(data), "--teacher", url]
        asked += ["--student", "embedded:student", "--iters", "22", "--val-fraction", "0.02"]
        asked += ["--output-dir", str(tmp_path / place), *more]
        return subprocess.Popen(asked, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    with server() as (process, url), run(url, "killed") as first:
        made: list[Path] = []
        while not made and first.poll() is None:
            made = list((tmp_path / "killed" / "owls").glob("soft_targets/*/*.safetensors"))
            time.sleep(0.1)
        process.kill()
        rest, told = first.communicate(timeout=300)
        assert first.returncode == 2, rest + told
        (error,) = [line for line in told.splitlines() if line.startswith("error:")]
        assert "cannot be reached" in error
    with server() as (_, url):
        for place, more in (("killed", ["--resume"]), ("whole", [])):
            with run(url, place, *more) as again:
                rest, told = again.communicate(timeout=300)
                assert again.returncode == 0, rest + told
    adapters = [
        (tmp_path / place / "owls" / "adapters_kd" / "adapters.safetensors").read_bytes()
        for place in ("killed", "whole")
    ]
    assert adapters[0] == adapters[1]


def test_arrays_that_are_not_what_was_asked_for_are_refused():
    identity = TargetIdentity(
        teacher="", tokenizer="", vocabulary_size=9, kept_below=8, top_k=2, temperatures=(1.0,)
    )
    arrays = {
        "kept_ids": np.array([[1, 2], [3, 7]], np.uint16),
        "kept_log_probs": np.log(np.array([[0.4, 0.4], [0.5, 0.5]], np.float32)),
        "log_normalizer": np.zeros((2, 1), np.float32),
        "log_rest": np.array([[np.log(0.2)], [-np.inf]], np.float32),
        "gold_log_prob": np.full(2, -3, np.float32),
    }
    whole = packed(arrays)
    for name, array in unpacked(whole, identity, 2, "s").items():
        np.testing.assert_array_equal(array, arrays[name])
    broken: list[Any] = [None, {}, [], whole | {"gold_log_prob": 1}]
    for change in ({"type": "float64"}, {"shape": [3]}, {"data": "AAA"}, {"data": "é"}):
        broken.append(whole | {"gold_log_prob": whole["gold_log_prob"] | change})
    for name, value in (
        ("kept_ids", np.array([[1, 2], [3, 8]], np.uint16)),
        ("kept_log_probs", np.array([[-1, np.nan], [-1, -1]], np.float32)),
        ("kept_log_probs", np.zeros((2, 3), np.float32)),
        ("log_normalizer", np.full((2, 1), np.inf, np.float32)),
        ("log_rest", np.full((2, 1), np.nan, np.float32)),
        ("gold_log_prob", np.ones(2, np.float32)),
        # Each possible by itself, and together no distribution.
        ("kept_ids", np.array([[1, 1], [3, 7]], np.uint16)),
        ("kept_log_probs", np.zeros((2, 2), np.float32)),
        ("kept_log_probs", np.full((2, 2), -20, np.float32)),
        ("log_normalizer", np.full((2, 1), -1e30, np.float32)),
        ("log_rest", np.zeros((2, 1), np.float32)),
    ):
        broken.append(whole | packed({name: value}))
    for fields in broken:
        with pytest.raises(ConchError, match="s sent targets that are not what was asked for"):
            unpacked(fields, identity, 2, "s")


def about(**changes: Any) -> bytes:
    """What a server of `teach serve` says of itself, with lies."""
    whole = {"format": 1, "model": "m", "weights_digest": "0" * 64, "files": {}}
    return json.dumps(whole | changes, ensure_ascii=False).encode()


LIES = {
    "a page": b"<html>",
    "a list": b"[1, 2]",
    "nothing": b"null",
    "depth": b"[" * 200_000,
    "a form": about(format="x" * 1_000),
    "no digest": about(weights_digest="x"),
    "letters": about(files={"config.json": "é"}),
    "a path": about(files={"../x": "AAAA"}),
    "no tokenizer": about(),
    "a broken one": about(files={"config.json": "e30=", "tokenizer.json": "e30="}),
}


@pytest.mark.parametrize("kind", ["application/json", "text/html"])
@pytest.mark.parametrize("lie", LIES)
def test_a_server_that_answers_nonsense_is_one_line(lie, kind):
    body = LIES[lie]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            with pytest.raises(ConchError) as refused:
                ServedTeacher(f"http://127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()
            thread.join()
    assert "127.0.0.1" in str(refused.value) and "\n" not in str(refused.value)
    assert len(str(refused.value)) < 700


def test_what_its_own_server_needs_not_is_refused(tiny_teacher):
    with teaching(str(tiny_teacher), name="tiny") as server:
        assert ServedTeacher(f"{server.url}#tiny").served_name == "tiny"
        for wrong in ({"url": f"{server.url}#other"}, {"tokenizer": "embedded:teacher"}):
            with pytest.raises(ConchError, match="serves tiny with its own tokenizer: leave out"):
                ServedTeacher(**{"url": server.url, **wrong})


@pytest.mark.parametrize("key", ["geheim\nxx", "geh\xe9im", "two words"])
def test_a_key_that_cannot_be_sent_is_not_shown(monkeypatch, key):
    monkeypatch.setenv("CONCH_DNA_KEY", key)
    with pytest.raises(ConchError, match="another character that cannot be sent") as refused:
        ServedTeacher("http://127.0.0.1:9/v1")
    assert key[:3] not in str(refused.value)


def test_what_counts_is_told_in_runs():
    example = Example(np.arange(7, dtype=np.int32), np.array([0, 1, 1, 0, 0, 1, 1], bool), "x")
    again = example_of(example.ids.tolist(), counted_runs(example), "x")
    assert counted_runs(example) == [[1, 3], [5, 7]] and again.digest == example.digest


def test_the_rest_is_what_the_others_leave():
    rows = [({4: np.log(0.5), 2: np.log(0.25), 9: np.log(0.01)}, np.log(0.25))]
    found = outcomes_of(rows, top_k=2, kept_below=8, name="x")
    assert found["kept_ids"].tolist() == [[4, 2]]
    np.testing.assert_allclose(np.exp(found["log_rest"]), [[0.25]], rtol=1e-6)
    # Rounded up until nothing is left: as little as float32 tells, and a sum of 1.
    rows = [({0: np.log(0.75), 1: np.log(0.2500002)}, -0.1)]
    found = outcomes_of(rows, top_k=2, kept_below=8, name="x")
    total = np.exp(found["kept_log_probs"].astype(np.float64)).sum() + np.exp(found["log_rest"])
    assert total == pytest.approx(1, abs=1e-6) and np.isfinite(found["log_rest"]).all()
    for row, own in (
        ({0: 5.0, 1: -1.0}, -1.0),
        ({0: -0.1, 1: -0.1}, -0.1),
        ({0: np.nan, 1: -1.0}, -1.0),
        ({0: -0.5, 1: -np.inf}, -0.5),
        ({0: -0.5, 1: -2.0}, np.nan),
        ({0: -0.5, 1: -2.0}, 90.0),
    ):
        with pytest.raises(ConchError, match="x: the server's log-probabilities are no distrib"):
            outcomes_of([(row, own)], top_k=2, kept_below=8, name="x")
    with pytest.raises(ConchError, match="lower --top-k to 1 or less"):
        outcomes_of([({0: -0.1, 9: -3.0}, -0.1)], top_k=2, kept_below=8, name="x")


def test_a_name_of_several_tokens_names_none(tiny_teacher):
    tokenizer = ModelSource(str(tiny_teacher)).tokenizer
    names = TokenNames(tokenizer)
    ids = tokenizer.encode("Once upon a time")
    assert names.id_of("token_id:17") == 17 and names.id_of("no token is called so") is None
    assert [names.id_of(tokenizer.convert_ids_to_tokens([i])[0]) for i in ids] == ids
    example = Example(np.array([5, 6], np.int32), np.array([False, True]), "x")
    rows = {"top_logprobs": [None, {"\ufffd": -1.0}], "token_logprobs": [None, -2.0]}
    assert from_echo(rows, example, names) == [({6: -2.0}, -2.0)]
    with pytest.raises(ConchError, match="reads it in other tokens"):
        from_echo({"top_logprobs": [None], "token_logprobs": [None]}, example, names)
