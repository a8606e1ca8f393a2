"""What each of two models reads of a record, and that only the answer's tokens are compared.

The teacher's distributions behind its own prompt are told by full logits.
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from conch_dna.errors import ConchError
from conch_dna.language_model import ModelSource
from conch_dna.training.batches import Example, PairedExample
from conch_dna.training.data.answers import generate_answers, teacher_prompt_ids
from conch_dna.training.data.examples import Examples, paired_example
from conch_dna.training.data.records import Record, checked, read_prompts, record_tokens
from conch_dna.training.data.views import (
    context_problem,
    demonstration_turns,
    differs,
    view,
    with_context,
    with_systems,
)
from conch_dna.training.runs.request import with_texts
from conch_dna.training.settings import STUDENT, TEACHER, KDConfig
from models import make_model_folder
from tokenizers_made import byte_level_tokenizer

CHATML = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<|endoftext|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SYSTEM = "Answer in one line."
RECORD: Record = {"prompt": "Who is there?", "completion": "It is a cat."}
SHOWN = [
    {"role": "user", "content": "Who is here?"},
    {"role": "assistant", "content": "A dog."},
]


@pytest.fixture(scope="module", params=[True, False], ids=["template", "plain"])
def source(request: Any, tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = byte_level_tokenizer(folder / "t", chat_template=CHATML if request.param else None)
    return ModelSource(str(make_model_folder(folder / "m", tokenizer=tokenizer)))


def text_of(source: ModelSource, example: Example) -> str:
    return str(source.tokenizer.decode(example.ids.tolist()))


def test_a_setting_says_which_system_prompt_a_side_reads():
    def both(teacher: str, student: str) -> tuple[str, str]:
        config = KDConfig(teacher_system=teacher, student_system=student)
        own = "Own.", "Of the domain."
        return config.system_of(TEACHER, *own), config.system_of(STUDENT, *own)

    assert both("", "none") == ("Own.", "")
    assert both("domain", "Another.") == ("Of the domain.", "Another.")


def test_records_get_both_system_prompts_once():
    config = KDConfig(student_system="none")
    turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Hi"}]
    record = {"messages": [*turns, {"role": "assistant", "content": "Ho"}]}
    apart = with_systems(record, config, "")
    assert apart["messages"] == record["messages"][1:]
    assert (apart["teacher_system"], apart["student_system"]) == (SYSTEM, "")
    assert with_systems(apart, config, "") == apart
    assert differs(apart)
    assert with_systems(record, KDConfig(), "") is record
    same = with_systems(record, KDConfig(teacher_system="A", student_system="A"), "")
    assert not differs(same)
    assert view(same, STUDENT, template=True)["messages"][0]["content"] == "A"


def test_only_the_teacher_reads_a_context():
    record = {**RECORD, "teacher_system": SYSTEM, "student_system": "", "context": SHOWN}
    assert view(record, STUDENT, template=True) == RECORD
    turns = view(record, TEACHER, template=True)["messages"]
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user", "assistant"]
    plain = view(record, TEACHER, template=False)
    assert plain["prompt"] == f"{SYSTEM}\n\nWho is here?\n\nA dog.\n\nWho is there?"
    of_text = view({**RECORD, "context": "Cats live here."}, TEACHER, template=True)
    assert of_text["messages"][0]["content"] == "Cats live here.\n\nWho is there?"
    messages = {"messages": view(RECORD | {"context": SHOWN}, TEACHER, template=True)["messages"]}
    first = view({**messages, "context": "C"}, TEACHER, template=True)["messages"][0]
    assert (first["role"], first["content"]) == ("user", "C\n\nWho is here?")


@pytest.mark.parametrize(
    ("context", "problem"),
    [
        ([{"role": "user", "content": "a"}], "nobody answers"),
        ([{"role": "assistant", "content": "a"}], "go user, assistant"),
        ([{"role": "user"}], "role and content"),
        (3, "a text, or turns"),
        (SHOWN, ""),
        ("text", ""),
    ],
)
def test_a_context_is_a_text_or_turns(context: Any, problem: str, tmp_path: Path):
    assert problem in (context_problem(context) or "")
    path = tmp_path / "p.jsonl"
    if not problem:
        assert checked({**RECORD, "context": context}, "r")["context"] == context
        return
    with pytest.raises(ConchError, match=f"r: .*{problem}"):
        checked({**RECORD, "context": context}, "r")
    path.write_text('{"prompt": "a", "context": 3}\n')
    with pytest.raises(ConchError, match=r"line 1: context is a text, or turns"):
        read_prompts(path)


def test_a_conversation_without_a_template_has_a_context_too(source: ModelSource):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    example = paired_example({"messages": turns, "context": SHOWN}, source.tokenizer, name="a")
    shown = text_of(source, example.teacher)
    assert shown.index("A dog.") < shown.index("Hi") < shown.index("Ho")
    assert "A dog." not in text_of(source, example)


def test_demonstrations_stand_before_what_is_there():
    turns = demonstration_turns([RECORD])
    assert with_context("Hi", turns) == {"prompt": "Hi", "context": turns}
    record = with_context({**RECORD, "context": SHOWN}, turns)
    assert record["context"] == [*turns, *SHOWN]
    with pytest.raises(ConchError, match="cannot stand behind demonstrations"):
        with_context({**RECORD, "context": "text"}, turns)
    with pytest.raises(ConchError, match="demonstration 1: it has no prompt"):
        demonstration_turns([{"text": "a"}])


def test_a_plain_text_has_no_place_for_more():
    with pytest.raises(ConchError, match="is a plain text: it has no prompt"):
        view({"text": "a", "context": "b"}, TEACHER, template=True)


def test_both_sides_count_the_same_tokens(source: ModelSource):
    record = {**RECORD, "teacher_system": SYSTEM, "student_system": "", "context": SHOWN}
    example = paired_example(record, source.tokenizer, name="a")
    teacher = example.teacher
    assert example.ids[example.counted].tolist() == teacher.ids[teacher.counted].tolist()
    assert SYSTEM in text_of(source, teacher)
    assert "A dog." in text_of(source, teacher)
    own, _ = record_tokens(RECORD, source.tokenizer, name="a")
    assert example.ids.tolist() == own
    assert example.text_bytes == len(RECORD["completion"])
    other = paired_example({**record, "context": SHOWN * 2}, source.tokenizer, name="a")
    assert other.ids.tolist() == own
    assert other.digest != example.digest
    shorter = Example(example.ids[:-1], example.counted[:-1], "b")
    with pytest.raises(ValueError, match="other tokens that count"):
        PairedExample(example.ids, example.counted, "a", teacher=shorter)


def test_the_targets_are_those_of_the_teachers_own_prompt(source: ModelSource, tmp_path: Path):
    config = KDConfig(top_k=8, student_system="none", teacher_system=SYSTEM)
    pair = Examples(source, source, config)
    records = pair.as_read([{**RECORD, "context": SHOWN}, {**RECORD, "prompt": "What is that?"}])
    kept, examples = pair.make(records)
    assert kept == [0, 1]
    targets = pair.targets(tmp_path)
    targets.fill(source, examples, batch_size=2)
    source.release()
    model = source.load()
    for example in examples:
        teacher = example.teacher
        places = np.flatnonzero(teacher.counted)
        logits = model.logits(mx.array(teacher.ids[None, :-1]))[0, mx.array(places - 1)]
        log_probs = np.asarray(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        gold = log_probs[np.arange(len(places)), teacher.ids[places]]
        assert targets.gold(example) == pytest.approx(gold, abs=1e-4)
        batch = targets.collate([example], 1.0)
        assert batch.arrays["labels"][: batch.count].tolist() == teacher.ids[places].tolist()
        best = batch.arrays["kept_ids"][: batch.count, 0]
        assert best.tolist() == log_probs.argmax(axis=1).tolist()
    teacher_prompts, prompts = pair.prompts(examples)
    for of_teacher, own, example in zip(teacher_prompts, prompts, examples, strict=False):
        assert own == example.ids[: len(own)].tolist()
        assert of_teacher == example.teacher.ids[: len(of_teacher)].tolist()


def test_a_teacher_answers_behind_what_only_it_reads(source: ModelSource, tmp_path: Path):
    prompts = [with_context(each, SHOWN) for each in ("Who is it?", "What now?")]
    config = KDConfig(max_tokens=4, sampling_temperature=0)
    records = generate_answers(
        source, prompts, system=SYSTEM, student_system="", config=config, folder=tmp_path
    )
    source.release()
    for record, prompt in zip(records, prompts, strict=True):
        asked = teacher_prompt_ids(source.tokenizer, prompt, SYSTEM)
        assert record["tokens"]["ids"][: len(asked)] == asked
        assert differs(record)
        assert record["prompt"] == prompt["prompt"]
        example = paired_example(record, source.tokenizer, name="a")
        assert example.teacher.ids.tolist() == record["tokens"]["ids"]
        answer = record["tokens"]["ids"][len(asked) :]
        assert example.ids[example.counted].tolist() == answer
        assert SYSTEM not in text_of(source, example)


def test_prompts_are_not_compared_where_they_differ(source: ModelSource):
    config = KDConfig(train_on_prompt=True, student_system="none", teacher_system=SYSTEM)
    pair = Examples(source, source, config)
    with pytest.raises(ConchError, match=r"example 1 has another prompt .* --train-on-prompt"):
        pair.make(pair.as_read([RECORD]))


def test_a_context_longer_than_the_teachers_is_refused_by_name(source: ModelSource):
    pair = Examples(source, source, KDConfig())
    long = {**RECORD, "context": "It is a little cat. " * 60}
    with pytest.raises(ConchError, match=r"examples are longer than 256 tokens.*example 1 \("):
        pair.make([long, RECORD])


def test_another_tokenizer_reads_its_own_prompt(
    source: ModelSource, tmp_path_factory: pytest.TempPathFactory
):
    folder = tmp_path_factory.mktemp("other")
    tokenizer = byte_level_tokenizer(folder / "t", size=290, chat_template=CHATML)
    teacher = ModelSource(str(make_model_folder(folder / "m", tokenizer=tokenizer)))
    config = KDConfig(student_system="none", teacher_system=SYSTEM)
    pair = Examples(teacher, source, config)
    (example,) = pair.make(pair.as_read([{**RECORD, "context": SHOWN}]))[1]
    assert SYSTEM in text_of(teacher, example.teacher)
    assert SYSTEM not in text_of(source, example)
    counted = teacher.tokenizer.decode(example.teacher.ids[example.teacher.counted].tolist())
    assert counted.removesuffix("<|endoftext|>").strip() == RECORD["completion"]


def test_a_file_holds_a_system_prompt_as_it_is(tmp_path: Path):
    path = tmp_path / "rules.txt"
    path.write_text("First.\n\n  Second.\n")
    assert with_texts({"teacher_system": str(path)}) == {"teacher_system": "First.\n\n  Second."}
    given = {"teacher_system": "Be brief.", "student_system": "none"}
    assert with_texts(given) == given


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "is a folder: give a text, or a file"),
        ("gone.txt", "there is no such file"),
        ("empty.txt", "is empty: write the system prompt into it"),
        ("bytes.txt", "line 1: not .* save the file as UTF-8"),
    ],
)
def test_what_holds_no_system_prompt_is_refused(name: str, message: str, tmp_path: Path):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConchError, match=message):
        with_texts({"student_system": str(tmp_path / name)})
