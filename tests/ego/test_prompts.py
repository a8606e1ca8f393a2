"""Prompts that cannot fit are not tokenised, and none has a token without a row in the model."""

import random
import time
from pathlib import Path

import pytest

from conch_dna.cortex.neuron import create_cortex_suite
from conch_dna.ego import prompts
from conch_dna.ego.model import EgoConfig, EgoModel
from conch_dna.ego.prompts import checked_prompt, longest_token
from conch_dna.errors import ConchError
from conch_dna.language_model import ASSETS, ModelSource
from cortex_models import write_adapter
from models import make_model_folder
from tokenizers_made import (
    byte_level_tokenizer,
    character_tokenizer,
    tokenizer_with_marker,
    wordpiece_tokenizer,
)

MARKER = "<marker>"
ODD = [
    "a" * 500,
    " " * 5000 + "x",
    "\u2003\n\t" * 900 + "x",
    "e\u0301" * 400,
    "\u1112\u1161\u11ab" * 300,
    "\u03b1\u0313\u0300\u0345" * 300,
    "\U0001f469\u200d\U0001f52c" * 100,
    "<s></s><unk><|endoftext|>" * 50,
    "Z" + "\u0335\u0336" * 700,
    "\x00\x1f\x7f" * 200,
]


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer has a marker that its embedding has no row for."""
    place = tmp_path_factory.mktemp("models")
    tokenizer = tokenizer_with_marker(ASSETS / "student", place / "tokenizer", MARKER)
    return make_model_folder(place / "model", tokenizer=tokenizer, vocab_size=1536)


@pytest.mark.parametrize("make", [byte_level_tokenizer, character_tokenizer, None])
def test_no_text_has_fewer_tokens_than_its_bytes_say(make, tmp_path):
    folder = ASSETS / "student" if make is None else make(tmp_path / "tokenizer")
    source = ModelSource(str(make_model_folder(tmp_path / "model", tokenizer=folder)))
    longest = longest_token(source.tokenizer)
    assert longest is not None
    draw = random.Random(0)
    mixed = ["".join(draw.choices("".join(ODD) + "the cat ", k=300)) for _ in range(20)]
    for text in [*ODD, *mixed]:
        squeezed = "".join(text.split()).encode()
        assert len(source.tokenizer.encode(text)) * longest >= len(squeezed)


def test_composed_characters_are_reckoned_with(tmp_path):
    from tokenizers import Tokenizer, normalizers

    folder = byte_level_tokenizer(tmp_path / "tokenizer")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    plain = longest_token(ModelSource(str(folder)).tokenizer)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.save(str(folder / "tokenizer.json"))
    composed = ModelSource(str(folder)).tokenizer
    assert longest_token(composed) == 4 * plain
    for text in ODD:
        assert len(composed.encode(text)) * 4 * plain >= len("".join(text.split()).encode())


@pytest.mark.parametrize("change", ["words", "unknown", "strips", "replaces", "removes"])
def test_nothing_is_known_where_a_token_may_stand_for_any_length(change, tmp_path):
    from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

    if change == "words":
        folder = wordpiece_tokenizer(tmp_path / "tokenizer")
    elif change == "unknown":
        folder = character_tokenizer(tmp_path / "tokenizer", byte_fallback=False)
    else:
        folder = byte_level_tokenizer(tmp_path / "tokenizer")
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        if change == "strips":
            tokenizer.normalizer = normalizers.StripAccents()
        elif change == "replaces":
            tokenizer.normalizer = normalizers.Replace(Regex("a+"), "a")
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("b"), "removed")
        tokenizer.save(str(folder / "tokenizer.json"))
    assert longest_token(ModelSource(str(folder)).tokenizer) is None


def test_what_cannot_fit_is_refused_without_being_tokenised(monkeypatch):
    source = ModelSource("embedded:student")
    assert checked_prompt(source, said("The owl"), "the prompt")
    monkeypatch.setattr(prompts, "prompt_ids", lambda *arguments: pytest.fail("tokenised"))
    began = time.process_time()
    with pytest.raises(ConchError, match=r"it has 800,000 bytes .* ends at 512 tokens"):
        checked_prompt(source, said("word " * 200_000), "it")
    assert time.process_time() - began < 0.5


def test_what_a_template_leaves_out_does_not_count(tmp_path):
    template = "{{ messages[-1]['content'] }}"
    folder = make_model_folder(tmp_path / "model", chat_template=template)
    source = ModelSource(str(folder))
    turns = [*said("a" * 100_000), {"role": "assistant", "content": "b"}, *said("The owl")]
    assert checked_prompt(source, turns, "it") == checked_prompt(source, said("The owl"), "it")
    with pytest.raises(ConchError, match="it has 100,000 bytes"):
        checked_prompt(source, said("a" * 100_000), "it")


def test_ego_is_asked_nothing_that_it_has_no_row_for(marked):
    ego = EgoModel(EgoConfig(model=str(marked), max_tokens=4))
    message = r"1 has token 1536 \(<marker>\), but .*model has rows for 0 to 1535"
    text = f"A {MARKER} cat"
    for ask in (
        lambda: ego.generate(text),
        lambda: ego.generate_many([text]),
        lambda: ego.stream(text),
        lambda: ego.generate_distillation_example("own", text),
        lambda: ego.correct_failure("own", text, "a cat", "it is none"),
        lambda: ego.correct_failure("own", "A cat", text, "it is none"),
        lambda: ego.score([text]),
        lambda: ego.score([{"prompt": "A", "completion": text}]),
    ):
        with pytest.raises(ConchError, match=message):
            ask()
    assert not ego.loaded, "it was refused before anything was loaded"


def test_a_neuron_is_asked_nothing_that_it_has_no_row_for(marked, tmp_path):
    write_adapter(tmp_path / "own" / "adapters_kd", str(marked))
    message = r"the prompt has token 1536 \(<marker>\), but .*model has rows for 0 to 1535"
    with create_cortex_suite(tmp_path, str(marked)) as suite:
        for prompt in (f"A {MARKER}", [*said(MARKER), {"role": "user", "content": "a"}]):
            with pytest.raises(ConchError, match=message):
                suite.ask("own", prompt)
        with pytest.raises(ConchError, match=message):
            suite.ask("own", "A cat", system=f"You are {MARKER}.")
        assert suite.ask("own", "A cat", max_tokens=2).completion_tokens <= 2
