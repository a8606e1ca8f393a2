"""The teacher's answers: the same in a batch as alone, seeded, ended, resumable, with their spaces.

stories260K answers where the text matters; a tiny random model where only tokens do.
"""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from conch_dna.errors import ConchError
from conch_dna.language_model import LanguageModel, ModelSource
from conch_dna.training.batches import Example
from conch_dna.training.cross_tokenizer.vocabulary import vocabulary_digest
from conch_dna.training.data import answers
from conch_dna.training.data.answers import (
    answer_batch,
    cached_answer_batch,
    continuation_text,
    generate_answers,
    make_sampler,
    sample_draw,
    sample_prompts,
    sample_texts,
    takes_unequal_rows,
    texts_of,
)
from conch_dna.training.data.records import tokenize_record
from conch_dna.training.settings import KDConfig
from models import make_gemma2_folder, make_model_folder

OPENINGS = [
    "Once upon a time, there was a little girl named Lily.",
    "Tom and his dog went to the",
    "The",
    "One day a bird saw a big red ball in the park and said:",
    "Sara liked to bake. She",
]
TEMPLATE = (
    "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)


@pytest.fixture(scope="session")
def stories(shared_data: Path) -> ModelSource:
    return ModelSource(str(shared_data / "models" / "stories260K"))


@pytest.fixture(scope="session")
def random_teacher(tiny_teacher: Path) -> LanguageModel:
    return ModelSource(str(tiny_teacher)).load()


@pytest.fixture
def restless(tmp_path: Path) -> ModelSource:
    """A random teacher for which every second token of the vocabulary ends the text."""
    folder = make_model_folder(
        tmp_path / "restless", eos_token_id=list(range(0, 1536, 2)), hidden_size=32
    )
    return ModelSource(str(folder))


def config_of(**changes: Any) -> KDConfig:
    return KDConfig(**{"max_tokens": 12, "generation_batch_size": 2, "seed": 1, **changes})


# The sampler


def test_greedy_takes_the_likeliest_real_token():
    sample = make_sampler(0, 4, mx.random.key(0))
    log_probs = mx.array([[-1.0, -3.0, -0.5, -2.0, 9.0], [-1.0, -3.0, -4.0, -2.0, 9.0]])
    assert sample(log_probs).tolist() == [2, 0]


def test_draws_follow_the_tempered_distribution_and_never_padding():
    logits = np.array([2.0, 1.0, 0.0, -1.0])
    expected = np.exp(logits / 0.7) / np.exp(logits / 0.7).sum()
    log_probs = mx.array(np.tile([*logits, 50.0, 50.0], (20_000, 1)), mx.float32)
    drawn = make_sampler(0.7, 4, mx.random.key(5))(log_probs)
    counts = np.bincount(np.array(drawn), minlength=6) / 20_000
    np.testing.assert_allclose(counts[:4], expected, atol=0.015)
    assert counts[4:].tolist() == [0, 0]


def test_one_key_is_one_chain_of_draws_whatever_the_global_state():
    log_probs = mx.zeros((64, 100))

    def chain(seed: int, state: int) -> list[list[int]]:
        mx.random.seed(state)
        sample = make_sampler(1.0, 100, mx.random.key(seed))
        return [sample(log_probs).tolist() for _ in range(3)]

    first = chain(1, 7)
    assert chain(1, 8) == first
    assert chain(2, 7) != first
    assert len({str(step) for step in first}) == 3


# Answers to token ids


def test_a_batch_answers_as_each_prompt_alone(stories):
    """Greedy, of different lengths, so padding must not be seen."""
    model = stories.resident()
    prompts = [stories.tokenizer.encode(text) for text in OPENINGS]
    assert len({len(prompt) for prompt in prompts}) == len(prompts)
    draw = {"max_tokens": 24, "temperature": 0, "seed": (0,)}
    together = answer_batch(model, prompts, **draw)
    alone = [answer_batch(model, [prompt], **draw)[0] for prompt in prompts]
    assert texts_of(stories.tokenizer, prompts, together) == texts_of(
        stories.tokenizer, prompts, alone
    )
    assert all(len(answer) == 24 for answer in together)
    ids = list(prompts[1])
    for _ in range(6):
        ids.append(int(mx.argmax(model.logits(mx.array([ids]))[0, -1])))
    assert together[1][:6] == ids[len(prompts[1]) :]


def test_draws_are_those_of_the_seed(random_teacher):
    prompts = [[5, 6, 7], [9, 8]]

    def draw(*seed: int) -> list[list[int]]:
        mx.random.seed(sum(seed))
        return answer_batch(random_teacher, prompts, max_tokens=8, temperature=1.0, seed=seed)

    first = draw(1, 0)
    assert draw(1, 0) == first
    assert draw(2, 0) != first and draw(1, 1) != first and draw(10) != draw(1, 0)
    assert first[0] != first[1]


def test_the_end_is_kept_and_nothing_follows_it(restless):
    prompts = [[1, 3, 5 + 2 * i] for i in range(12)]
    found = answer_batch(restless.load(), prompts, max_tokens=6, temperature=1.0, seed=(0,))
    ends = restless.tokenizer.eos_token_ids
    assert len(ends) == 768
    for answer in found:
        assert 1 <= len(answer) <= 6
        assert not any(token in ends for token in answer[:-1])
        assert answer[-1] in ends or len(answer) == 6
    lengths = Counter(map(len, found))
    assert lengths[1] and len(lengths) > 2


def test_rows_of_a_padded_head_are_never_drawn(tmp_path, tiny_teacher):
    real = ModelSource(str(tiny_teacher)).token_count
    folder = make_model_folder(tmp_path / "padded", vocab_size=real + 2000)
    weights = mx.load(str(folder / "model.safetensors"))
    rows = mx.arange(real + 2000)[:, None] >= real
    embedding = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = mx.where(rows, 30 * embedding, embedding)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    model = ModelSource(str(folder)).load()
    best = mx.argmax(model.model(mx.array([[4, 5, 6]]))[0, -1]).item()
    assert best >= real
    for temperature in (0, 1.0):
        found = answer_batch(
            model, [[4, 5, 6]] * 4, max_tokens=8, temperature=temperature, seed=(0,)
        )
        assert all(0 <= token < real for answer in found for token in answer)


def test_answers_end_where_the_context_does(random_teacher):
    assert random_teacher.source.context_length == 256
    prompts = [[7] * 250, [7] * 255, [7] * 3]
    found = answer_batch(random_teacher, prompts, max_tokens=10, temperature=0, seed=(0,))
    ends = random_teacher.tokenizer.eos_token_ids
    for answer, room in zip(found, (6, 1, 10), strict=True):
        assert len(answer) == room or answer[-1] in ends


# Kept answers


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts each real draw had."""
    calls: list[int] = []
    draw = answers.answer_batch

    def counting(model: LanguageModel, prompts: Any, **arguments: Any) -> list[list[int]]:
        calls.append(len(prompts))
        return draw(model, prompts, **arguments)

    monkeypatch.setattr(answers, "answer_batch", counting)
    return calls


def generate(source: ModelSource, folder: Path, **more: Any) -> list[dict[str, Any]]:
    config = more.pop("config", config_of())
    prompts = more.pop("prompts", OPENINGS)
    return generate_answers(
        source, prompts, system=more.pop("system", ""), config=config, folder=folder, **more
    )


def test_a_second_equal_run_draws_nothing_and_does_not_load_the_teacher(
    tmp_path, tiny_teacher, counted, monkeypatch
):
    source = ModelSource(str(tiny_teacher))
    first = generate(source, tmp_path)
    assert counted == [2, 2, 1]
    fresh = ModelSource(str(tiny_teacher))

    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr(fresh, "load", load)
    assert generate(fresh, tmp_path) == first
    assert counted == [2, 2, 1]


@pytest.mark.parametrize(
    "changes",
    [
        {"config": config_of(seed=2)},
        {"config": config_of(max_tokens=11)},
        {"config": config_of(sampling_temperature=0.9)},
        {"system": "Be brief."},
    ],
)
def test_whatever_answers_depend_on_makes_them_new(tmp_path, tiny_teacher, counted, changes):
    source = ModelSource(str(tiny_teacher))
    generate(source, tmp_path)
    generate(source, tmp_path, **changes)
    assert counted == [2, 2, 1] * 2


def test_another_teacher_answers_anew(tmp_path, tiny_teacher, tiny_student, counted):
    draw = {"max_tokens": 3, "temperature": 0, "seed": (0,)}
    for folder in (tiny_teacher, tiny_student, tiny_teacher):
        cached_answer_batch(ModelSource(str(folder)), tmp_path, [[1, 2]], **draw)
    assert counted == [1, 1]


def test_a_stopped_run_goes_on_with_what_is_missing(tmp_path, tiny_teacher, counted, monkeypatch):
    expected = generate(ModelSource(str(tiny_teacher)), tmp_path / "whole")
    counted.clear()
    draw = answers.answer_batch

    def stop(*args: Any, **kwargs: Any) -> list[list[int]]:
        if len(counted) == 2:
            raise KeyboardInterrupt
        return draw(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(answers, "answer_batch", stop)
        with pytest.raises(KeyboardInterrupt):
            generate(ModelSource(str(tiny_teacher)), tmp_path / "run")
    assert counted == [2, 2]
    assert generate(ModelSource(str(tiny_teacher)), tmp_path / "run") == expected
    assert counted == [2, 2, 1]


@pytest.mark.parametrize(
    "text",
    [
        *("[[1, 2", "", "{}", "[]", "3", "[" * 200_000),
        '{"answers": [[1], [9249]], "digest": "00"}',
        '{"answers": [[1], [2]]}',
    ],
)
def test_a_damaged_file_of_answers_is_drawn_again(tmp_path, tiny_teacher, counted, text):
    source = ModelSource(str(tiny_teacher))
    draw = {"max_tokens": 3, "temperature": 0, "seed": (0,)}
    first = cached_answer_batch(source, tmp_path, [[1, 2], [3]], **draw)
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text())["answers"] == first
    file.write_text(text)
    assert cached_answer_batch(source, tmp_path, [[1, 2], [3]], **draw) == first
    assert counted == [2, 2]
    assert json.loads(file.read_text())["answers"] == first


# Records


def test_records_without_a_template_are_prompts_and_completions(tmp_path, stories):
    records = generate(stories, tmp_path)
    assert [record["prompt"] for record in records] == OPENINGS
    for record in records:
        assert set(record) == {"prompt", "completion", "finish_reason", "tokens"}
        assert record["finish_reason"] in ("stop", "length")
        ids, length = record["tokens"]["ids"], record["tokens"]["prompt_length"]
        assert ids[:length] == stories.tokenizer.encode(record["prompt"])
        assert record["tokens"]["vocabulary"] == vocabulary_digest(stories.tokenizer)
        example = tokenize_record(
            record, stories.tokenizer, name="a", vocabulary=vocabulary_digest(stories.tokenizer)
        )
        assert example.ids.tolist() == ids
        assert np.flatnonzero(example.counted).tolist() == list(range(length, len(ids)))


def test_what_a_killed_process_was_writing_is_removed(tmp_path, stories):
    left = tmp_path / ".writing-1-0123.json"
    left.write_text("{")
    generate(stories, tmp_path, prompts=["Once"], config=config_of(sampling_temperature=0))
    assert not left.exists()


def test_the_space_before_an_answers_first_word_is_kept(tmp_path, stories):
    """A SentencePiece-like decoder drops it when it sees the answer alone."""
    (record,) = generate(
        stories,
        tmp_path,
        prompts=["Once upon a time, there was a little"],
        config=config_of(sampling_temperature=0),
    )
    assert record["completion"].startswith(" ")
    alone = stories.tokenizer.decode(record["tokens"]["ids"][record["tokens"]["prompt_length"] :])
    assert not alone.startswith(" ")
    whole = stories.tokenizer.decode(record["tokens"]["ids"], skip_special_tokens=True)
    assert record["prompt"] + record["completion"] == whole


@pytest.mark.parametrize("text", ["Once upon a time there was a dog.", "Hello\n\nthere,  you"])
def test_prompt_and_continuation_make_the_text_at_every_cut(stories, tiny_teacher, text):
    for tokenizer in (stories.tokenizer, ModelSource(str(tiny_teacher)).tokenizer):
        ids = tokenizer.encode(text)
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        for cut in range(1, len(ids)):
            before = tokenizer.decode(ids[:cut], skip_special_tokens=True)
            assert before + continuation_text(tokenizer, ids[:cut], ids[cut:]) == whole


def test_a_stopped_answers_text_has_no_end_token_and_a_cut_off_one_says_so(tmp_path, restless):
    config = config_of(max_tokens=4, sampling_temperature=1.0, generation_batch_size=16)
    prompts = [f"Tell me of number {i}" for i in range(16)]
    records = generate(restless, tmp_path, prompts=prompts, config=config)
    ends = restless.tokenizer.eos_token_ids
    for record in records:
        ids, length = record["tokens"]["ids"], record["tokens"]["prompt_length"]
        answer = ids[length:]
        assert record["finish_reason"] == ("stop" if answer[-1] in ends else "length")
        body = answer[:-1] if answer[-1] in ends else answer
        assert record["completion"] == continuation_text(restless.tokenizer, ids[:length], body)
    assert Counter(record["finish_reason"] for record in records)["stop"] > 4
    long = [r for r in records if r["finish_reason"] == "length"]
    assert all(len(r["tokens"]["ids"]) - r["tokens"]["prompt_length"] == 4 for r in long)


def test_records_with_a_template_are_conversations(tmp_path):
    folder = make_model_folder(tmp_path / "chat", chat_template=TEMPLATE)
    source = ModelSource(str(folder))
    records = generate(source, tmp_path / "kept", prompts=["Why?", "How?"], system="Be brief.")
    for record, prompt in zip(records, ["Why?", "How?"], strict=True):
        system, user, assistant = record["messages"]
        assert system == {"role": "system", "content": "Be brief."}
        assert user == {"role": "user", "content": prompt}
        assert assistant["role"] == "assistant"
        ids, length = record["tokens"]["ids"], record["tokens"]["prompt_length"]
        assert source.tokenizer.decode(ids[:length]) == (
            f"[system] Be brief.\n[user] {prompt}\n[assistant] "
        )
        answer = source.tokenizer.decode(ids[length:], skip_special_tokens=True)
        assert assistant["content"] == answer
    assert json.loads(json.dumps(records)) == records


def test_a_system_prompt_stands_above_the_prompt_without_a_template(tmp_path, tiny_teacher):
    records = generate(
        ModelSource(str(tiny_teacher)), tmp_path, prompts=["Why?"], system="Be brief."
    )
    assert records[0]["prompt"] == "Be brief.\n\nWhy?"


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_several_answers_to_a_prompt_stand_together_and_differ(tmp_path, tiny_teacher, batch_size):
    config = config_of(
        samples_per_prompt=3, sampling_temperature=1.0, generation_batch_size=batch_size
    )
    records = generate(
        ModelSource(str(tiny_teacher)), tmp_path, prompts=["One", "Two"], config=config
    )
    assert [record["prompt"] for record in records] == ["One"] * 3 + ["Two"] * 3
    assert len({str(record["tokens"]["ids"]) for record in records}) == 6


def test_progress_counts_prompts_and_tokens(tmp_path, tiny_teacher):
    events: list[tuple[str, dict[str, Any]]] = []
    records = generate(
        ModelSource(str(tiny_teacher)), tmp_path, report=lambda *event: events.append(event)
    )
    assert [event for event, _ in events] == ["advance"] * 3
    assert [row["by"] for _, row in events] == [2, 2, 1]
    tokens = sum(len(r["tokens"]["ids"]) - r["tokens"]["prompt_length"] for r in records)
    assert events[-1][1]["note"] == f"{tokens} tokens"


@pytest.mark.parametrize(("longest", "expected"), [(256, 256), (40, 40), (9999, 256)])
def test_a_prompt_without_room_for_its_answer_is_named(
    tmp_path, tiny_teacher, counted, longest, expected
):
    source = ModelSource(str(tiny_teacher))
    prompts = ["Why?", "The dog ran to the park. " * 60, "How?"]
    length = len(source.tokenizer.encode(prompts[1]))
    config = config_of(max_seq_length=longest, samples_per_prompt=2)
    with pytest.raises(ConchError) as caught:
        generate(source, tmp_path, prompts=prompts, config=config)
    message = str(caught.value)
    assert f"prompt 2 has {length} tokens" in message
    assert f"with 12 for the answer it exceeds {expected}" in message
    assert "--max-tokens" in message
    assert counted == []


def test_a_prompt_that_just_fits_is_answered(tmp_path, tiny_teacher):
    source = ModelSource(str(tiny_teacher))
    fits = next(
        text for n in range(300) if len(source.tokenizer.encode(text := "a" + " b" * n)) == 256 - 12
    )
    (record,) = generate(source, tmp_path, prompts=[fits])
    assert len(record["tokens"]["ids"]) <= 256
    with pytest.raises(ConchError, match="prompt 1 has 245 tokens"):
        generate(source, tmp_path, prompts=[fits + " b"])


# Samples of held-out prompts


def example(length: int, prompt: int) -> Example:
    counted = np.arange(length) >= prompt
    return Example(np.arange(length, dtype=np.int32) + 3, counted, "example")


@pytest.mark.parametrize(
    ("length", "prompt", "expected"),
    [(20, 6, 6), (20, 4, 4), (20, 3, 12), (20, 1, 12), (8, 1, 7), (2, 1, 1)],
)
def test_samples_begin_with_the_prompt_or_with_an_opening(length, prompt, expected):
    (ids,) = sample_prompts([example(length, prompt)])
    assert ids == list(range(3, 3 + expected))
    assert all(isinstance(token, int) for token in ids)


def test_three_different_samples_are_enough():
    assert len(sample_prompts([example(20, prompt) for prompt in (4, 5, 6, 7, 8)])) == 3
    assert len(sample_prompts([example(20, prompt) for prompt in (6, 6, 6, 5)])) == 2


def test_samples_are_drawn_apart_from_the_training_data(random_teacher: LanguageModel):
    config = config_of(max_tokens=6)
    assert sample_draw(config) == {"max_tokens": 6, "temperature": 0.7, "seed": (1, -1)}
    prompts = [[5, 6, 7], [8, 9]]
    draw: Callable[..., Any] = lambda: sample_texts(random_teacher, prompts, config)  # noqa: E731
    texts = draw()
    assert texts == draw() and len(texts) == 2
    assert texts == texts_of(
        random_teacher.tokenizer,
        prompts,
        answer_batch(random_teacher, prompts, max_tokens=6, temperature=0.7, seed=(1, -1)),
    )


@pytest.mark.parametrize("rows", [2, 3])
def test_a_model_whose_masks_are_not_made_for_unequal_rows_answers_one_by_one(tmp_path, rows):
    """With as many rows as KV heads, two, the answers together would be wrong in silence."""
    model = ModelSource(str(make_gemma2_folder(tmp_path / "gemma2"))).load()
    prompts = [[7, 8, 9, 300, 400, 500, 600, 700], [20], [5, 6, 1000]][:rows]
    draw = {"max_tokens": 8, "temperature": 0.0, "seed": (0,)}
    assert answer_batch(model, prompts, **draw) == [
        answer_batch(model, [prompt], **draw)[0] for prompt in prompts
    ]
    assert not takes_unequal_rows(model)
    assert takes_unequal_rows(ModelSource("embedded:student").load())
