"""Whatever is read from outside is accepted, or refused in one line: never a traceback, never long.

Hypothesis changes valid files (see hostile.py) and gives them to the functions that read them, in
this process. `make test-slow` prints how many were tried and the slowest answer. To add a file: a
reader in fuzz_files.py or fuzz_models.py, and its line in TARGETS.
"""

import math
import os
import resource
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import fuzz_files as files
import fuzz_models as models
from conch_dna.errors import ConchError
from hostile import json_bytes, json_line_bytes, text_bytes, yaml_bytes
from suites import calibration

SECONDS = 2.0
# Python's own memory for what is being read, hypothesis and all.
MEMORY = 700 * 2**20

settings.register_profile(
    "fuzz",
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)


@dataclass
class Tally:
    """What became of the inputs of one target."""

    seconds: float
    outcomes: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    taken: float = 0.0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """One input: its reader accepts it or raises a ConchError of one line."""
        begun = processor_seconds()
        try:
            yield
            self.outcomes["accepted"] += 1
        except ConchError as error:
            text = str(error)
            assert text.strip(), "a refusal says nothing"
            assert len(text.splitlines()) == 1, f"a refusal has several lines: {text!r:.300}"
            assert text.isprintable(), f"a refusal holds control characters: {text!r:.300}"
            assert len(text) <= 4_000, f"a refusal has {len(text)} characters: {text:.300}"
            self.outcomes["refused"] += 1
        finally:
            self.taken = processor_seconds() - begun

    def in_time(self) -> bool:
        """Whether the last input was read fast enough; the slowest counts for the figure."""
        if self.taken <= self.seconds:
            self.slowest = max(self.slowest, self.taken)
        return self.taken <= self.seconds


def processor_seconds() -> float:
    """What this process and those it waited for have used; a busy machine adds nothing."""
    return sum(os.times()[:4])


def most_memory() -> int:
    """The most that this process has had, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass(frozen=True)
class Target:
    """Something that is read from outside.

    Attributes:
        name: For people.
        inputs: Strategy of hostile ones.
        read: Is given a folder, and an input.
        count: How many to try.
        seconds: Most processor time of one.
    """

    name: str
    inputs: st.SearchStrategy[Any]
    read: Callable[[Path, Any], object]
    count: int = 1_000
    seconds: float = SECONDS


CALIBRATION = calibration("d" * 64, threshold=0.5).to_json()


def prompts_in(name: str) -> Callable[[Path, bytes], None]:
    return partial(files.read_prompt_file, name=name)


PROMPTS = [{"prompt": "Tell me."}, "A text", {"prompt": "Ünder", "id": 1}]

TARGETS = [
    Target("data.jsonl", json_line_bytes(files.RECORDS), files.read_data),
    Target("data.json", json_bytes([files.RECORDS]), partial(files.read_data, name="data.json")),
    Target("prompts.jsonl", json_line_bytes(PROMPTS), prompts_in("p.jsonl")),
    Target("prompts.json", json_bytes([PROMPTS]), prompts_in("p.json"), 500),
    Target(
        "prompts.txt",
        text_bytes(["One day\nÜber\n\n", "\n \n", ""]),
        prompts_in("p.txt"),
        500,
    ),
    Target("documents", json_line_bytes(files.DOCUMENTS), files.read_corpus),
    Target("BEIR folder", files.beir_files(), files.read_judged),
    Target(
        "settings.yaml",
        yaml_bytes([files.KD, files.STORE, files.EVOLVE]),
        files.read_settings,
        1_200,
    ),
    Target("laws.yaml and answers", files.laws_and_texts(), files.keep_laws),
    Target("run.json", json_bytes([files.RUN]), files.read_run, 700),
    Target("line of generations", files.line_changes(), files.read_line, 1_500),
    Target("checkpoint", files.checkpoint_changes(), files.read_checkpoint, 700),
    Target("store manifest", json_bytes([files.STORE_MANIFEST]), files.read_store, 500),
    Target("store null", json_bytes([{"null": files.NULL, "documents": 9}]), files.read_null),
    Target("store adapter", files.store_adapter_changes(), files.read_adapter_of_store, 500),
    Target("cached vectors", files.vector_shards(), files.read_vectors),
    Target("chelation log", files.log_bytes(), files.read_log),
    Target("gate history", json_line_bytes([files.DECISION]), files.read_gate_history, 700),
    Target(
        "calibration.json",
        json_bytes([CALIBRATION, models.WATCHED.to_json()]),
        models.read_calibration,
    ),
    Target("drift.json", json_bytes([models.drift_counted()]), models.read_counted),
    Target("answers.jsonl", json_line_bytes(models.EXPERIENCE), models.read_answers_file),
    Target("experience", json_line_bytes(models.experience_lines()), models.read_buffer),
    Target("structured answers", json_bytes([models.SHAPED]), models.read_answer),
    Target("HTTP bodies", json_bytes([models.BODY, models.STREAMED]), models.read_body, 2_000),
    Target("HTTP bodies with texts", json_bytes([models.EMBEDDED]), models.read_texts),
    Target("HTTP prompts", json_bytes([models.PROMPTS_BODY]), models.read_prompts_body),
    Target("HTTP requests", models.requests(), models.ask_server, 1_500),
    Target("config.json", json_bytes([models.CONFIG]), models.read_model_config),
    Target(
        "tokenizer_config.json",
        json_bytes([models.TOKENIZER_CONFIG]),
        models.load_tokenizer_of,
        300,
    ),
    Target("model folder", models.model_changes(), models.load_model, 400),
    Target("adapter folder", models.adapter_changes(), models.read_lora, 500),
    Target("chat template", text_bytes(models.TEMPLATES), models.render_it, 150),
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Generating overly large repr")
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_hostile_input_is_accepted_or_refused_in_one_line(target, tmp_path, record_property):
    fuzz = settings.get_profile("fuzz")

    def try_out(count, seconds):
        tally = Tally(seconds)

        @settings(fuzz, max_examples=count)
        @given(target.inputs)
        def read(content):
            # What took long is read once more: a shared processor may have been slow.
            for _ in range(2):
                with tally.counted():
                    target.read(tmp_path, content)
                if tally.in_time():
                    return
            raise AssertionError(f"an answer took {tally.taken:.1f} s")

        read()
        return tally

    # What is imported and loaded first is no part of an answer.
    try_out(2, math.inf)
    before = most_memory()
    tally = try_out(target.count, target.seconds)
    record_property("fuzz", {"name": target.name, "slowest": tally.slowest, **tally.outcomes})
    assert most_memory() - before < MEMORY
