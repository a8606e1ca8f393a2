"""A suite of neurons on the embedded student, with the embedded teacher as EGO.

One adapter is trained to answer its domain's prompt with a valid object, one to say a text where an
object is asked for, and one belongs to a domain without a schema.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from conch_dna.cortex.calibration.confidence import save_calibration
from conch_dna.cortex.neuron import CortexSuite, create_cortex_suite
from conch_dna.cortex.tools import Tools
from conch_dna.cortex.turn import common
from conch_dna.ego.model import EgoConfig, EgoModel
from conch_dna.errors import ConchError, EgoUnavailableError
from conch_dna.generations.data import init_line
from conch_dna.retraining.domain import line_of
from conch_dna.retraining.pipeline import TrainingPipeline
from conch_dna.training.chats.conversations import plain_prompt, prompt_turns
from conch_dna.training.distillation import DOMAIN_PROMPTS
from conch_dna.training.structured_answers import DOMAIN_SCHEMAS
from cortex_models import TEXTS, train_adapter
from suites import calibration

STUDENT, TEACHER = "embedded:student", "embedded:teacher"
QUESTION = "Where is the owl?"
OBJECT = (
    '{"conclusion": "up", "reasons": ["a", "b"], "confidence": "high", "would_change": "a cat"}'
)
OPENING = "The owl"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("adapters")
    asked = plain_prompt(QUESTION, DOMAIN_PROMPTS["thinking"]["system"])
    train_adapter(
        place / "thinking" / "adapters_kd",
        STUDENT,
        OBJECT,
        prompt=asked,
        # The quickest to learn a text behind a long prompt.
        lora_keys="model.embed_tokens",
        lora_rank=32,
        learning_rate=3e-3,
        steps=50,
    )
    train_adapter(place / "task" / "adapters_kd", STUDENT, TEXTS["task"], lora_keys="all", steps=50)
    train_adapter(place / "owls" / "adapters_kd", STUDENT, TEXTS["thinking"], lora_keys="all")
    return place


@pytest.fixture(scope="module")
def alone(adapters: Path) -> Iterator[CortexSuite]:
    with create_cortex_suite(adapters) as suite:
        yield suite


@pytest.fixture(scope="module")
def ego() -> EgoModel:
    return EgoModel(EgoConfig(model=TEACHER))


@pytest.fixture
def helped(adapters: Path, ego: EgoModel) -> CortexSuite:
    return create_cortex_suite(adapters, STUDENT, ego=ego)


def test_a_neuron_answers_in_its_own_words(alone):
    answer = alone["owls"].ask(OPENING, max_tokens=40)
    assert OPENING + answer.text == TEXTS["thinking"]
    assert (answer.answered_by, answer.finish_reason, answer.valid) == ("neuron", "stop", None)
    assert 0.5 < answer.confidence <= 1 and not answer.calibrated
    assert "not calibrated" in answer.reason
    assert answer.prompt_tokens == len(alone.source.tokenizer.encode(OPENING))
    assert 0 < answer.first_token_s <= answer.seconds
    assert json.loads(json.dumps(answer.to_json()))["text"] == answer.text


def test_an_object_is_parsed_and_valid(alone):
    answer = alone["thinking"].ask(QUESTION, max_tokens=120)
    assert answer.valid, answer.problems
    assert answer.parsed == json.loads(OBJECT)
    assert not answer.repaired and answer.raw == answer.text


WANTED = {
    "type": "object",
    "properties": {"sure": {"enum": ["low", "high"]}, "count": {"type": "integer"}},
    "required": ["sure", "count"],
    "additionalProperties": False,
}


def test_a_neuron_that_knows_no_json_writes_a_valid_object(alone):
    asked = {"schema": json.dumps(WANTED), "max_tokens": 80}
    answer = alone["owls"].ask(OPENING, **asked)
    assert answer.finish_reason == "stop" and answer.valid and not answer.repaired
    assert answer.parsed.keys() == {"sure", "count"}
    assert answer.removed > 0.3 and answer.confidence < 0.5
    free = alone["owls"].ask(OPENING, constrained=False, **asked)
    assert free.repaired and free.valid is False and free.removed is None


def test_an_object_that_a_neuron_would_write_anyway_costs_nothing(alone):
    free = alone["thinking"].ask(QUESTION, max_tokens=120, constrained=False)
    held = alone["thinking"].ask(QUESTION, max_tokens=120)
    assert (held.text, held.confidence) == (free.text, pytest.approx(free.confidence))
    assert held.removed < 0.3


def test_without_structure_or_with_another_system_prompt_no_object_is_asked_for(alone):
    for options in ({"structured": False}, {"system": "Say something."}):
        answer = alone["task"].ask("First,", max_tokens=8, **options)
        assert answer.valid is None and not answer.repaired


def test_what_is_not_valid_is_asked_for_again_and_then_said(alone):
    answer = alone["task"].ask("Plan a day.", max_tokens=16)
    assert answer.repaired and answer.valid is False and answer.problems
    assert answer.answered_by == "neuron"
    assert "not valid" in answer.reason and "no EGO to hand over to" in answer.reason


def test_what_may_call_a_function_says_that_it_is_not_handed_over(helped):
    tools = Tools(functions='[{"name": "clock"}]', choice="clock")
    answer = helped["task"].ask("Plan a day.", max_tokens=4, tools=tools)
    assert answer.answered_by == "neuron" and answer.valid is False
    assert answer.reason.endswith("a question with functions is not handed over to EGO")


def test_what_is_not_valid_goes_to_ego_and_is_remembered(helped, ego, tmp_path):
    helped.pipeline = TrainingPipeline(tmp_path, STUDENT, ego=ego)
    answer = helped["task"].ask("First, get", max_tokens=16)
    turns = prompt_turns("First, get", DOMAIN_PROMPTS["task"]["system"])
    schema = json.dumps(DOMAIN_SCHEMAS["task"])
    [held] = ego.generate_many([turns], max_tokens=16, schema=schema)
    assert (answer.answered_by, answer.text) == ("ego", held.text)
    assert answer.raw and answer.raw != answer.text and answer.valid is False
    [kept], problems = helped.pipeline.buffer.read("task")
    assert not problems
    assert (kept.kind, kept.answer, kept.better) == ("fallback", answer.raw, answer.text)
    assert list(kept.messages) == [{"role": "user", "content": "First, get"}]


def test_hand_over_is_for_the_user_to_forbid_or_to_ask_for(helped, ego):
    own = helped["task"].ask("Plan a day.", max_tokens=8, hand_over="never")
    assert own.answered_by == "neuron" and own.valid is False
    asked = helped["owls"].ask(OPENING, max_tokens=8, hand_over="always")
    assert (asked.answered_by, asked.raw, asked.confidence) == ("ego", "", None)
    assert asked.text == ego.generate(OPENING, max_tokens=8)
    with pytest.raises(ConchError, match="hand_over is 'maybe': use one of auto, never, always"):
        helped["owls"].ask(OPENING, hand_over="maybe")


def test_without_ego_at_hand_the_neurons_own_answer_stands(adapters, tmp_path):
    gone = EgoConfig(model=str(tmp_path / "gone"))
    with create_cortex_suite(adapters, ego=gone) as suite:
        answer = suite["task"].ask("Plan a day.", max_tokens=8)
        assert answer.answered_by == "neuron" and answer.text == answer.raw
        assert "is not available" in answer.reason and "not valid" in answer.reason
        with pytest.raises(EgoUnavailableError, match="is not available"):
            suite["owls"].ask(OPENING, hand_over="always")
        long = suite["owls"].ask(OPENING, max_tokens=8)
        assert long.text, "the suite goes on"


@pytest.mark.parametrize(("threshold", "by"), [(0.01, "neuron"), (0.999999, "ego"), (None, "ego")])
def test_the_calibrated_threshold_decides_who_answers(helped, adapters, threshold, by):
    path = save_calibration(
        adapters, "owls", calibration(helped.bank.digest_of("owls"), threshold=threshold)
    )
    try:
        helped.reload()
        answer = helped["owls"].ask("Mom said", max_tokens=12)
        assert (answer.answered_by, answer.calibrated, answer.threshold) == (by, True, threshold)
        assert "confidence is 0." in answer.reason
    finally:
        path.unlink()


def test_a_calibration_of_another_adapter_is_left_out_and_said(alone, adapters):
    other = calibration("0" * 64, threshold=0.5)
    path = save_calibration(adapters, "owls", other)
    try:
        assert alone.reload() == []
        assert not alone["owls"].ask(OPENING, max_tokens=2).calibrated
        assert any("calibrate again" in note for note in alone.notes)
    finally:
        path.unlink()
        alone.reload()


def test_what_is_certain_streams_and_what_may_change_comes_whole(alone, helped):
    whole = alone["owls"].ask(OPENING, max_tokens=20)
    *parts, last = alone["owls"].stream(OPENING, max_tokens=20)
    assert "".join(part.text for part in parts) == whole.text == last.answer.text
    assert len(parts) > 3 and last.text == ""
    [only] = helped["owls"].stream(OPENING, max_tokens=20)
    assert only.text == only.answer.text == whole.text
    *parts, last = helped["owls"].stream(OPENING, max_tokens=8, hand_over="always")
    assert len(parts) > 3 and last.text == "" and last.answer.answered_by == "ego"
    assert "".join(part.text for part in parts) == last.answer.text
    *parts, last = alone["thinking"].stream(QUESTION, max_tokens=120)
    assert len(parts) > 3 and last.answer.valid
    assert "".join(part.text for part in parts) == last.answer.text
    [only] = alone["thinking"].stream(QUESTION, max_tokens=120, constrained=False)
    assert only.text == only.answer.text
    *parts, last = alone["thinking"].stream(QUESTION, max_tokens=5)
    assert not last.answer.valid and not last.answer.repaired
    assert "is not valid, and was shown" in last.answer.reason
    assert alone["thinking"].ask(QUESTION, max_tokens=5).repaired


def test_a_stream_that_is_left_ends_its_request(alone):
    stream = alone["owls"].stream(OPENING, max_tokens=200)
    next(stream)
    stream.close()
    assert alone.engine.pending == 0


def test_questions_of_several_domains_are_answered_as_each_alone(alone):
    asked = [
        ("owls", OPENING),
        ("task", "First, get"),
        ("thinking", QUESTION),
        ("owls", "The owl sat on a branch. She"),
    ]
    together = alone.ask_many(asked, max_tokens=60)
    for (domain, prompt), answer in zip(asked, together, strict=True):
        single = alone.ask(domain, prompt, max_tokens=60)
        assert answer.text == single.text
        assert answer.confidence == pytest.approx(single.confidence, rel=1e-4)


def test_the_system_prompt_is_computed_once(alone):
    alone.engine.prefixes.forget("thinking")
    before = alone.engine.prefixes.computed
    for question in (QUESTION, "Who sat there?", "How many stars?"):
        alone["thinking"].ask(question, max_tokens=2, hand_over="never")
    assert alone.engine.prefixes.computed == before + 1
    system = DOMAIN_PROMPTS["thinking"]["system"]
    prefix = alone.domain("thinking").prefix
    assert len(prefix) > 0.9 * len(alone.source.tokenizer.encode(system))


def test_a_chat_knows_its_earlier_turns(alone):
    chat = alone["owls"].chat(max_tokens=12)
    first = list(chat.say(OPENING))[-1].answer
    assert [turn["role"] for turn in chat.messages] == ["user", "assistant"]
    second = list(chat.say("She"))[-1].answer
    turns = [
        {"role": "user", "content": OPENING},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "She"},
    ]
    assert second.text == alone.ask("owls", turns, max_tokens=12).text
    assert second.prompt_tokens > first.prompt_tokens + first.completion_tokens - 2
    long = "word " * 600
    with pytest.raises(ConchError, match="context of embedded:student ends at 512"):
        list(chat.say(long))
    assert len(chat.messages) == 4, "the conversation is as it was"


def test_a_repair_that_does_not_fit_the_context_is_not_asked_for(alone):
    filler = "word " * 80
    answer = alone["task"].ask(filler, max_tokens=60)
    assert answer.repaired and answer.valid is False
    assert "its repair cannot be asked for" in answer.reason


def test_another_active_version_is_taken_in(adapters, tmp_path):
    place = tmp_path / "adapters"
    shutil.copytree(adapters / "owls", place / "owls")
    with create_cortex_suite(place) as suite:
        before = suite.ask("owls", "First, get", max_tokens=30).text
        assert suite.reload() == []
        line = line_of(place, "owls")
        records = [{"text": text} for text in TEXTS.values()]
        init_line(line, STUDENT, records, adapter=adapters / "task" / "adapters_kd")
        assert suite.reload() == ["owls"]
        after = suite.ask("owls", "First, get", max_tokens=30).text
        assert after.startswith(" a big red") and not before.startswith(" a big")
        assert suite.folder("owls") == line.path("G000")
        shutil.copytree(adapters / "owls", place / "new")
        assert suite.reload() == ["new"] and "new" in suite


def test_the_base_is_loaded_once_and_adapters_share_it(alone):
    assert alone.bank.base is alone.base
    assert {row["domain"] for row in alone.status()} == {"owls", "task", "thinking"}
    assert all(0 < alone.bank.bytes_of(name) < alone.bank.base_bytes for name in alone)
    assert [row["structured"] for row in alone.status() if row["domain"] == "owls"] == [False]


def test_refusals(alone, adapters, tmp_path):
    with pytest.raises(ConchError, match=r"there is no neuron 'memory' in .*: there is owls, task"):
        alone["memory"]
    with pytest.raises(ConchError, match="holds no adapter: make one with 'conch-dna distill"):
        create_cortex_suite(tmp_path)
    with pytest.raises(ConchError, match="there is no adapter of debug"):
        create_cortex_suite(adapters, domains=["debug"])
    with pytest.raises(ConchError, match="embedded:student"):
        create_cortex_suite(adapters, TEACHER)
    with pytest.raises(ConchError, match="the prompt is empty: there is nothing to answer"):
        alone.ask("owls", "")
    with pytest.raises(ConchError, match="max_tokens is 0"):
        alone.ask("owls", OPENING, max_tokens=0)
    assert alone.engine.pending == 0


def test_common_beginnings():
    assert common([1, 2, 3], [1, 2, 4]) == (1, 2)
    assert common([1, 2], [1, 2, 3]) == (1, 2)
    assert common([], [1]) == ()
