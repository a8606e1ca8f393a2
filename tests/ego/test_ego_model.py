"""EGO as a local model: answers, streams, examples and scores; loaded late, refused in one line.

stories260K and the embedded teacher where text matters; tiny random models elsewhere.
"""

import json
import math
import shutil
from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest

from conch_dna.ego.model import EgoConfig, EgoModel
from conch_dna.errors import ConchError, EgoUnavailableError
from conch_dna.language_model import ModelSource
from conch_dna.training.chats.conversations import prompt_ids
from conch_dna.training.cross_tokenizer.vocabulary import vocabulary_digest
from conch_dna.training.data.answers import (
    TextStream,
    answer_batch,
    continuation_text,
    generate_answers,
    texts_of,
)
from conch_dna.training.data.records import tokenize_record
from conch_dna.training.distillation import DOMAIN_PROMPTS
from conch_dna.training.settings import DEFAULT_TEACHER, KDConfig
from models import make_model_folder

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
TURNS = [
    {"role": "user", "content": "What is a pond?"},
    {"role": "assistant", "content": "A small lake."},
    {"role": "user", "content": "Who lives there?"},
]


@pytest.fixture(scope="module")
def ego() -> Iterator[EgoModel]:
    """The embedded teacher."""
    with EgoModel(EgoConfig(model="embedded:teacher", max_tokens=16, batch_size=2)) as model:
        yield model


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EgoModel]:
    """A random model with a chat template, context 256."""
    folder = make_model_folder(tmp_path_factory.mktemp("chatty") / "model", chat_template=TEMPLATE)
    with EgoModel(EgoConfig(model=str(folder), max_tokens=12)) as model:
        yield model


# Loading


def test_nothing_is_loaded_before_it_is_needed():
    ego = EgoModel(EgoConfig(model="embedded:teacher", max_tokens=2))
    assert not ego.loaded
    assert ego.teaches == "distributions" and ego.model_id == "embedded:teacher"
    with pytest.raises(ConchError, match=r"prompt 1 has [\d,]+ tokens"):
        ego.generate("word " * 900)
    assert not ego.loaded
    pieces = ego.stream("Once")
    assert not ego.loaded
    next(pieces)
    assert ego.loaded
    pieces.close()
    ego.unload()
    assert not ego.loaded


def test_leaving_the_block_gives_the_memory_back_and_it_can_be_loaded_again():
    with EgoModel(EgoConfig(model="embedded:teacher", max_tokens=4)) as ego:
        first = ego.generate("Once upon a time")
        mx.clear_cache()
        resident = mx.get_active_memory()
    assert not ego.loaded
    assert resident - mx.get_active_memory() > 0.9 * (ego.source.weight_bytes or 0)
    assert ego.generate("Once upon a time") == first
    ego.load()
    ego.load()
    ego.unload()
    ego.unload()


def test_the_default_is_the_distillers_teacher():
    assert EgoModel().config.model == DEFAULT_TEACHER


@pytest.mark.parametrize("what", ["missing folder", "no weights", "broken weights", "embedded"])
def test_a_model_that_cannot_be_had_is_unavailable_in_one_line(what, tmp_path, tiny_teacher):
    folder = tmp_path / "model"
    name = "embedded:nobody" if what == "embedded" else str(folder)
    if "weights" in what:
        shutil.copytree(tiny_teacher, folder)
        (folder / "model.safetensors").unlink()
    if what == "broken weights":
        (folder / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    ego = EgoModel(EgoConfig(model=name))
    with pytest.raises(EgoUnavailableError, match=r"EGO .* is not available: .*") as caught:
        ego.generate("Once")
    assert name in str(caught.value) and "\n" not in str(caught.value)
    assert not ego.loaded


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": ""}, "model is empty"),
        ({"remote_model": "x"}, "remote_model is 'x' and model is no URL"),
        ({"model": "http://127.0.0.1/v1"}, "remote_model is empty"),
        ({"model": "http:///v1", "remote_model": "x"}, "URL without a host"),
        ({"model": "http://a:b/v1", "remote_model": "x"}, "URL without a host"),
        ({"max_tokens": 0}, "max_tokens is 0: it must be 1 or more"),
        ({"max_tokens": True}, "max_tokens is True"),
        ({"temperature": -0.1}, "temperature is -0.1: it must be between 0 and 10"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"timeout_s": 0}, "timeout_s is 0: it must be above 0"),
        ({"retries": -1}, "retries is -1"),
    ],
)
def test_settings_out_of_range_are_refused(values, message):
    with pytest.raises(ConchError, match=message):
        EgoConfig(**values)


def test_all_wrong_settings_are_named_at_once():
    with pytest.raises(ConchError, match=r"max_tokens is 0.*; seed is -1.*; retries is -2"):
        EgoConfig(max_tokens=0, seed=-1, retries=-2)


@pytest.mark.parametrize(
    "values",
    [
        {"api_key_env": "sk-secret-17"},
        {"model": "https://me:sk-secret-17@host/v1", "remote_model": "x"},
        {"model": "https://host/v1?key=sk-secret-17", "remote_model": "x"},
    ],
)
def test_a_key_in_the_wrong_place_is_refused_and_not_shown(values):
    with pytest.raises(ConchError) as caught:
        EgoConfig(**values)
    assert "secret" not in str(caught.value) and "api_key_env" in str(caught.value)


# Answers


def test_many_prompts_are_answered_in_order_as_each_alone(ego):
    """Five prompts of different lengths in batches of two."""
    together = ego.generate_many(OPENINGS)
    assert [answer.text for answer in together] == [ego.generate(text) for text in OPENINGS]
    prompts = [ego.source.tokenizer.encode(text) for text in OPENINGS]
    alone = answer_batch(ego.source.resident(), prompts, max_tokens=16, temperature=0, seed=(9,))
    assert [a.text for a in together] == texts_of(ego.source.tokenizer, prompts, alone)
    assert [answer.tokens for answer in together] == [len(answer) for answer in alone]
    assert len({answer.text for answer in together}) == 5


def test_a_real_teacher_keeps_the_space_before_its_answer(shared_data):
    """SentencePiece drops it where the answer is decoded alone."""
    with EgoModel(EgoConfig(model=str(shared_data / "models/stories260K"), max_tokens=12)) as ego:
        text = ego.generate("Once upon a time, there was a little girl")
        assert text.startswith(" named")
        assert "".join(ego.stream("Once upon a time, there was a little girl")) == text


def test_an_answer_says_whether_it_ended(ego, tmp_path):
    folder = make_model_folder(tmp_path / "restless", eos_token_id=list(range(0, 1536, 2)))
    restless = EgoModel(EgoConfig(model=str(folder), temperature=1.0, max_tokens=2))
    found = restless.generate_many([f"word {number}" for number in range(30)])
    assert {answer.finish_reason for answer in found} == {"stop", "length"}
    assert all(answer.tokens == 2 for answer in found if answer.finish_reason == "length")
    assert ego.generate_many(["Once"], max_tokens=1)[0].finish_reason == "length"


def test_draws_are_those_of_the_seed(ego):
    first = ego.generate("Once", temperature=1.0, seed=3)
    assert ego.generate("Once", temperature=1.0, seed=3) == first
    assert ego.generate("Once", temperature=1.0, seed=4) != first
    same = ego.generate_many(["Once"] * 4, temperature=1.0)
    assert len({answer.text for answer in same}) > 1


def test_a_call_may_change_only_what_is_in_range(ego):
    with pytest.raises(ConchError, match="temperature is 11"):
        ego.generate("Once", temperature=11)
    with pytest.raises(ConchError, match="max_tokens is 0"):
        ego.stream("Once", max_tokens=0)
    assert ego.config.max_tokens == 16


def test_a_conversation_goes_through_the_chat_template(chatty):
    tokenizer = chatty.source.tokenizer
    text = (
        "[system] Be brief.\n[user] What is a pond?\n[assistant] A small lake.\n"
        "[user] Who lives there?\n[assistant] "
    )
    assert tokenizer.decode(prompt_ids(tokenizer, TURNS, "Be brief.")) == text
    own = [{"role": "system", "content": "Be brief."}, *TURNS]
    assert prompt_ids(tokenizer, own, "") == prompt_ids(tokenizer, TURNS, "Be brief.")
    assert chatty.generate(own) == chatty.generate(TURNS, system="Be brief.")
    assert chatty.generate(own) != chatty.generate(TURNS)
    assert chatty.generate([TURNS[0]]) == chatty.generate(TURNS[0]["content"])
    assert tokenizer.decode(prompt_ids(tokenizer, own, "Stay calm.")).startswith(
        "[system] Stay calm.\n\nBe brief.\n[user] What"
    )


def test_a_system_turn_stands_above_the_first_where_the_template_has_no_place(tmp_path):
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    folder = make_model_folder(tmp_path / "model", chat_template=refusing + TEMPLATE)
    tokenizer = ModelSource(str(folder)).tokenizer
    assert tokenizer.decode(prompt_ids(tokenizer, TURNS, "Be brief.")).startswith(
        "[user] Be brief.\n\nWhat is a pond?\n[assistant] A small lake.\n[user] Who"
    )


def test_without_a_template_turns_stand_a_blank_line_apart(ego):
    tokenizer = ego.source.tokenizer
    text = "Be brief.\n\nWhat is a pond?\n\nA small lake.\n\nWho lives there?"
    assert prompt_ids(tokenizer, TURNS, "Be brief.") == tokenizer.encode(text)
    assert ego.generate(TURNS, system="Be brief.") == ego.generate(text)
    assert ego.generate([TURNS[0]]) == ego.generate(TURNS[0]["content"])


@pytest.mark.parametrize(
    "prompt",
    [
        [],
        TURNS[:2],
        [{"role": "system", "content": "Be brief."}],
        [{"role": "user"}],
        [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        ["Hi"],
        [TURNS[0], {"role": "system", "content": "Now be brief."}, TURNS[2]],
    ],
)
def test_what_waits_for_no_answer_is_refused(ego, prompt):
    with pytest.raises(
        ConchError, match=r"^a prompt (is a text, or messages|has a system message)"
    ):
        ego.generate(prompt)


def test_prompts_that_cannot_be_tokens_are_refused(ego):
    with pytest.raises(ConchError, match="half a surrogate pair"):
        ego.generate("half \ud800")
    with pytest.raises(ConchError, match="prompt 2 is empty"):
        ego.generate_many(["Once", ""])
    with pytest.raises(ConchError, match="put the one in a list"):
        ego.generate_many("Once")
    assert ego.generate_many([]) == []


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(chatty):
    """The random model's context is 256: 255 tokens leave room for one more."""
    tokenizer = chatty.source.tokenizer
    words = "ball " * 300
    lengths = {n: len(prompt_ids(tokenizer, words[:n], "")) for n in range(900, 1500)}
    fits = max(n for n, length in lengths.items() if length == 255)
    full = max(n for n, length in lengths.items() if length == 256)
    answer = chatty.generate_many([words[:fits]])[0]
    assert answer.tokens == 1
    for ask in (chatty.generate, chatty.stream):
        with pytest.raises(ConchError, match=r"prompt 1 has 256 tokens .* is 256: shorten it"):
            ask(words[:full])
    assert len("".join(chatty.stream(words[:fits]))) == len(answer.text)


# Streams


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stream_is_the_answer_in_pieces(ego, chatty, temperature):
    """The random model's answers have broken characters in them."""
    broken = 0
    for model in (ego, chatty):
        for seed, prompt in enumerate(OPENINGS[:2]):
            draw = {"temperature": temperature, "seed": seed, "max_tokens": 40}
            whole = model.generate(prompt, **draw)
            pieces = list(model.stream(prompt, **draw))
            assert "".join(pieces) == whole
            assert all(pieces) and len(pieces) > 5
            broken += "\ufffd" in whole
    assert broken if temperature else True


def test_a_character_of_several_tokens_comes_whole(ego):
    tokenizer = ego.source.tokenizer
    prompt = tokenizer.encode("Once")
    ids = tokenizer.encode(" ein Käse für 5 € 🧀 und 漢字 " * 6, add_special_tokens=False)
    assert len(ids) > 60
    stream = TextStream(tokenizer, prompt)
    pieces = [stream.add(token) for token in ids]
    assert "".join(pieces) + stream.end() == continuation_text(tokenizer, prompt, ids)
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces.count("") > 10


def test_an_unfinished_character_is_given_at_the_end(ego):
    tokenizer = ego.source.tokenizer
    ids = tokenizer.encode("a🧀", add_special_tokens=False)[:-1]
    stream = TextStream(tokenizer, [5])
    assert "".join(stream.add(token) for token in ids) == "a"
    assert stream.end().startswith("\ufffd")
    assert TextStream(tokenizer, [5]).end() == ""


# Training examples


def test_an_example_is_what_the_distiller_would_make_of_the_prompt(ego, chatty, tmp_path):
    for model, domain in ((ego, "tales"), (chatty, "tales")):
        found = model.generate_distillation_example(domain, OPENINGS[0])
        config = KDConfig(max_tokens=model.config.max_tokens, sampling_temperature=0.0)
        draw = {"system": "", "config": config, "folder": tmp_path}
        assert found == generate_answers(model.source, [OPENINGS[0]], **draw)[0]
        assert found["tokens"]["vocabulary"] == vocabulary_digest(model.source.tokenizer)
        assert found["finish_reason"] in ("stop", "length")
    assert found["messages"][0] == {"role": "user", "content": OPENINGS[0]}
    plain = ego.generate_distillation_example("tales", OPENINGS[0])
    assert plain["completion"] == ego.generate(OPENINGS[0])


def test_a_known_domain_asks_with_its_system_prompt(ego):
    example = ego.generate_distillation_example("thinking", "Why does ice float?")
    assert example["prompt"] == f"{DOMAIN_PROMPTS['thinking']['system']}\n\nWhy does ice float?"
    tokens = tokenize_record(
        example,
        ego.source.tokenizer,
        name="example",
        vocabulary=vocabulary_digest(ego.source.tokenizer),
    )
    assert tokens.count == 16
    with pytest.raises(ConchError, match="becomes a folder's name"):
        ego.generate_distillation_example("../thinking", "Why?")


def test_an_example_ends_where_the_context_does(chatty):
    words = "ball " * 45
    used = len(prompt_ids(chatty.source.tokenizer, words, ""))
    assert used < 256 - 12
    long = EgoModel(EgoConfig(model=chatty.config.model, max_tokens=5000))
    with long:
        example = long.generate_distillation_example("tales", words)
        assert len(example["tokens"]["ids"]) <= 256
        with pytest.raises(ConchError, match=r"context of .* is 256"):
            long.generate_distillation_example("tales", "ball " * 300)


# Corrections


def test_a_correction_is_told_what_was_wrong():
    ego = EgoModel(EgoConfig(model="embedded:teacher", temperature=1.0, max_tokens=40))
    problem = "It names no animal."
    found = ego.correct_failure("tales", TURNS[2]["content"], "Nobody.", problem)
    request = (
        "Who lives there?\n\nAn earlier answer to this was not good enough.\n\n"
        "The earlier answer:\nNobody.\n\nWhat is wrong with it:\nIt names no animal.\n\n"
        "Write the answer that should have been given: the whole of it, in the form that was "
        "asked for, without a word about the earlier one."
    )
    assert found.text == ego.generate(request)
    assert (found.problem, found.domain, found.prompt) == (problem, "tales", "Who lives there?")
    assert found.finish_reason in ("stop", "length")
    other = ego.correct_failure("tales", TURNS[2]["content"], "Nobody.", "It is rude.")
    assert other.text != found.text


def test_a_correction_of_nothing_or_for_no_reason_is_refused(chatty, tmp_path):
    with pytest.raises(ConchError, match="say what is wrong"):
        chatty.correct_failure("tales", "Why?", "So.", " \n")
    silent = make_model_folder(tmp_path / "silent", eos_token_id=list(range(1536)))
    with pytest.raises(ConchError, match="gave an empty correction"):
        EgoModel(EgoConfig(model=str(silent))).correct_failure("tales", "Why?", "", "Empty.")


# Scores


def oracle(ego: EgoModel, ids: list[int]) -> np.ndarray:
    """Log-probabilities of all but the first token, float64 softmax over the real tokens."""
    model = ego.source.resident()
    logits = np.array(model.model(mx.array([ids[:-1]]))[0], np.float64)[:, : ego.source.token_count]
    logits -= logits.max(axis=-1, keepdims=True)
    log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return log_probs[np.arange(len(ids) - 1), ids[1:]]


def test_scores_are_the_log_probabilities_of_each_token(ego, shared_data):
    stories = EgoModel(EgoConfig(model=str(shared_data / "models/stories260K"), batch_size=3))
    for model in (ego, stories):
        tokenizer = model.source.tokenizer
        scores = model.score(OPENINGS)
        for text, score in zip(OPENINGS, scores, strict=True):
            ids = [*tokenizer.encode(text), tokenizer.eos_token_id]
            expected = oracle(model, ids)
            assert list(score.token_ids) == ids[1:]
            np.testing.assert_allclose(score.log_probs, expected, atol=2e-4)
            assert score.nats == pytest.approx(expected.sum(), abs=2e-3)
            bits = -expected.sum() / np.log(2) / len(text.encode())
            assert score.bits_per_byte == pytest.approx(bits, rel=1e-4)
    stories.unload()


def test_pieces_are_the_bytes_of_the_text(ego):
    text = "Ein Käse für 5 €."
    score = ego.score([text])[0]
    first = ego.source.tokenizer.encode(text)[0]
    assert first not in score.token_ids[:1]
    assert text.encode().endswith(b"".join(score.pieces))
    assert score.pieces[-1] == b"" and score.text_bytes == len(text.encode())


def test_only_a_records_answer_counts(chatty):
    record = {"messages": [TURNS[0], {"role": "assistant", "content": "Ducks do."}]}
    score = chatty.score([record, "Ducks do."])[0]
    assert b"".join(score.pieces).strip() == b"Ducks do."
    ids = tokenize_record(record, chatty.source.tokenizer, name="a").ids.tolist()
    expected = oracle(chatty, ids)[-len(score.token_ids) :]
    np.testing.assert_allclose(score.log_probs, expected, atol=2e-4)


def test_rows_of_a_padded_head_take_no_probability(tmp_path, tiny_teacher):
    real = ModelSource(str(tiny_teacher)).token_count
    folder = make_model_folder(tmp_path / "padded", vocab_size=real + 500)
    weights = mx.load(str(folder / "model.safetensors"))
    rows = mx.arange(real + 500)[:, None] >= real
    embedding = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = mx.where(rows, 30 * embedding, embedding)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    ego = EgoModel(EgoConfig(model=str(folder)))
    score = ego.score(["The dog"])[0]
    ids = [*ego.source.tokenizer.encode("The dog"), ego.source.tokenizer.eos_token_id]
    np.testing.assert_allclose(score.log_probs, oracle(ego, ids), atol=2e-4)


def test_texts_that_cannot_be_scored_are_refused(ego, chatty):
    with pytest.raises(ConchError, match="text 2 is empty"):
        ego.score(["Once", ""])
    with pytest.raises(ConchError, match=r"text 1 has [\d,]+ tokens, and the context .* is 256"):
        chatty.score(["ball " * 400])
    with pytest.raises(ConchError, match="put the one in a list"):
        ego.score("Once")
    assert ego.score([]) == []


def test_a_trained_model_gives_a_real_story_more_than_a_random_one(ego, tiny_teacher, shared_data):
    path = shared_data / "text" / "tinystories" / "heldout.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()[:4]
    texts = [json.loads(line)["text"][:300] for line in lines]
    random = EgoModel(EgoConfig(model=str(tiny_teacher)))
    trained = np.mean([score.bits_per_byte for score in ego.score(texts)])
    assert trained < 1.6 < np.mean([score.bits_per_byte for score in random.score(texts)])


def test_an_answer_is_held_to_a_schema():
    schema = {
        "type": "object",
        "properties": {"sure": {"enum": ["low", "high"]}},
        "required": ["sure"],
        "additionalProperties": False,
    }
    ego = EgoModel(EgoConfig(model="embedded:teacher"))
    prompts = ["Once upon a time", "The owl"]
    answers = ego.generate_many(prompts, max_tokens=40, schema=json.dumps(schema))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert json.loads(answer.text)["sure"] in ("low", "high")
        assert answer.finish_reason == "stop"
        pieces = ego.stream(prompt, max_tokens=40, schema=json.dumps(schema))
        assert "".join(pieces) == answer.text
    with pytest.raises(ConchError, match="nsatisfiable"):
        ego.stream(
            "Why?", schema='{"type": "object", "required": ["a"], "properties": {"a": false}}'
        )
