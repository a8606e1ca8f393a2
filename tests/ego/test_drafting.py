"""Drafted answers of EGO: its own tokens, drawn from its own distribution, whoever drafts.

The embedded pair where acceptance matters; tiny random models elsewhere.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from scipy.stats import chi2

from conch_dna.ego.drafting import Draft, _Draw, drafted_tokens, other_vocabulary
from conch_dna.ego.model import EgoConfig, EgoModel
from conch_dna.ego.prompts import checked_prompt
from conch_dna.ego.settings import EgoAnswer
from conch_dna.language_model import LanguageModel, ModelSource
from conch_dna.training.chats.conversations import prompt_turns
from models import make_model_folder
from tokenizers_made import byte_level_tokenizer

OPENINGS = [
    "Once upon a time, there was a little girl named Lily.",
    "Tom and his dog went to the",
    "The",
    "One day a bird saw a big red ball in the park and said:",
    "Sara liked to bake. She",
]
TINY = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32}
GEMMA = {
    "model_type": "gemma3_text",
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 32,
    "sliding_window_pattern": 2,
}
MAMBA = {
    "model_type": "mamba",
    "state_size": 8,
    "conv_kernel": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "time_step_rank": 8,
}


def draft_of(model: str | Path, *, tokens: int = 4, name: str = "small") -> Draft:
    source = ModelSource(str(model))
    return Draft(name, source, source.load().model, tokens)


def disturb(model: nn.Module, size: float = 1.0) -> None:
    """Let a model often say something else than before."""
    norm = model.model.norm
    norm.weight = norm.weight + size * mx.random.normal(norm.weight.shape, key=mx.random.key(1))
    mx.eval(norm.weight)


def answer(ego: EgoModel, prompt: str, draft: Draft | None, **how: object) -> EgoAnswer:
    [found] = ego.generate_many([prompt], draft=draft, **how)
    return found


def streamed(ego: EgoModel, prompt: str, draft: Draft | None, **how: object):
    """The pieces of a streamed answer, and the whole."""
    pieces, parts = ego.stream(prompt, draft=draft, **how), []
    while True:
        try:
            parts.append(next(pieces))
        except StopIteration as end:
            return parts, end.value


@pytest.fixture(scope="module")
def ego() -> Iterator[EgoModel]:
    with EgoModel(EgoConfig(model="embedded:teacher", max_tokens=16)) as model:
        yield model


@pytest.fixture(scope="module")
def student() -> Draft:
    return draft_of("embedded:student")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Draft:
    """Random, so that hardly a token of it is accepted."""
    return draft_of(make_model_folder(tmp_path_factory.mktemp("random") / "m"), name="random")


# Greedy


@pytest.mark.parametrize("tokens", [1, 4, 8])
def test_greedy_answers_are_the_same_token_for_token(ego, student, tokens):
    draft = replace(student, tokens=tokens)
    for prompt in OPENINGS:
        own = answer(ego, prompt, None)
        drafted = answer(ego, prompt, draft)
        assert (drafted.text, drafted.tokens) == (own.text, own.tokens)
        assert drafted.finish_reason == own.finish_reason
        assert (own.draft, own.steps, own.undrafted) == ("", None, "")
        assert (drafted.draft, drafted.undrafted) == ("small", "")
        assert drafted.tokens / (tokens + 1) <= drafted.steps <= drafted.tokens


def test_who_says_the_same_is_always_accepted_and_a_stranger_hardly_ever(ego, stranger):
    itself = draft_of("embedded:teacher", tokens=3)
    for prompt in OPENINGS[:3]:
        found = answer(ego, prompt, itself, max_tokens=13)
        assert found.steps == math.ceil(found.tokens / 4)
        other = answer(ego, prompt, stranger, max_tokens=13)
        assert other.text == found.text and other.steps >= 0.8 * other.tokens


def test_a_drafted_stream_is_the_same_answer(ego, student):
    for prompt in OPENINGS[:2]:
        for how in ({}, {"temperature": 1.0, "seed": 3}):
            whole = answer(ego, prompt, student, **how)
            parts, told = streamed(ego, prompt, student, **how)
            assert "".join(parts) == whole.text and told == whole
            assert len(parts) > 3


def test_an_answer_ends_at_its_end_token_drafted_or_not(tmp_path):
    apart = TINY | {"tie_word_embeddings": False}
    folder = make_model_folder(tmp_path / "m", **apart)
    text = "Once upon a"
    with EgoModel(EgoConfig(model=str(folder), max_tokens=40)) as plain:
        prompt = checked_prompt(plain.source, prompt_turns(text, ""), "the prompt")
        said = drafted_tokens(
            plain._local(), draft_of(folder), prompt, max_tokens=40, temperature=0, seed=0
        )
        ids = [token for token, _ in said]
    # What it says as the sixth token ends an answer from now on.
    end = ids[5]
    first = ids.index(end)
    folder = make_model_folder(tmp_path / "ends", eos_token_id=end, **apart)
    with EgoModel(EgoConfig(model=str(folder), max_tokens=40)) as ego:
        own, drafted = (answer(ego, text, each) for each in (None, draft_of(folder, tokens=8)))
    assert (own.finish_reason, own.tokens) == ("stop", first + 1)
    assert (drafted.text, drafted.tokens, drafted.finish_reason) == (own.text, first + 1, "stop")


def test_rows_of_padding_are_neither_drafted_nor_said(tmp_path):
    size = ModelSource("embedded:student").token_count
    padded = make_model_folder(tmp_path / "padded", vocab_size=size + 64, **TINY)
    other = make_model_folder(tmp_path / "other", vocab_size=size + 7, seed=1, **TINY)
    with EgoModel(EgoConfig(model=str(padded), max_tokens=30, temperature=5.0)) as ego:
        for each in (padded, other):
            found = [
                t
                for t, _ in drafted_tokens(
                    ego._local(), draft_of(each), [1, 2, 3], max_tokens=200, temperature=5.0, seed=0
                )
            ]
            assert len(found) == 200 and max(found) < size
        own, drafted = (
            answer(ego, "The cat", each, temperature=0.0) for each in (None, draft_of(other))
        )
    assert drafted.text == own.text and drafted.draft == "small"


def test_several_prompts_are_answered_together_and_not_drafted(ego, student):
    found = ego.generate_many(OPENINGS[:2], draft=student)
    assert [(each.draft, each.steps) for each in found] == [("", None)] * 2


def test_an_answer_is_broken_off_at_the_next_token(ego, student):
    class Left(Exception):
        pass

    for draft in (student, None):
        calls = []

        def check(calls: list[int] = calls) -> None:
            calls.append(0)
            if len(calls) == 3:
                raise Left

        with pytest.raises(Left):
            ego.generate_many(["Once"], draft=draft, check=check)
        assert len(calls) == 3
    assert answer(ego, "Once", student).text == answer(ego, "Once", None).text


# Drawn at random


def test_a_drawn_answer_follows_from_the_seed_whoever_drafts(ego, student, stranger):
    itself = draft_of("embedded:teacher", tokens=2)
    how = {"temperature": 0.8, "max_tokens": 16}
    for seed in range(2):
        texts = {
            answer(ego, OPENINGS[0], d, seed=seed, **how).text
            for d in (student, stranger, itself, replace(student, tokens=1))
        }
        assert len(texts) == 1
    assert len({answer(ego, OPENINGS[0], student, seed=s, **how).text for s in range(3)}) == 3
    # Of one model with one noise, every token is accepted.
    found = answer(ego, OPENINGS[0], itself, seed=1, **how)
    assert found.steps == math.ceil(found.tokens / 3)


def likely(counts: dict[object, int], expected: dict[object, float], draws: int) -> float:
    """The probability of as large a chi-square of counts, rare outcomes in one."""
    kept = {key: p for key, p in expected.items() if p * draws >= 8}
    seen = [counts.get(key, 0) for key in kept]
    wanted = [p * draws for p in kept.values()]
    seen.append(draws - sum(seen))
    wanted.append(draws - sum(wanted))
    assert len(kept) >= 5
    statistic = sum((s - w) ** 2 / w for s, w in zip(seen, wanted, strict=True))
    return float(chi2.sf(statistic, len(kept)))


def test_a_draw_takes_each_token_as_often_as_its_probability():
    logits = mx.random.normal((1, 24), key=mx.random.key(3)) * 1.5
    expected = np.exp(np.array(logits[0], dtype=np.float64) / 0.7)
    expected /= expected.sum()
    counts: dict[object, int] = {}
    draws = 3000
    for seed in range(draws):
        draw = _Draw(24, 0.7, seed)
        draw.end = 9
        token = int(draw(logits)[0])
        counts[token] = counts.get(token, 0) + 1
    assert likely(counts, dict(enumerate(expected)), draws) > 0.001


@pytest.mark.slow
def test_drafted_answers_are_drawn_from_egos_distribution(tmp_path):
    """First and second tokens together, with a draft that is often wrong and one often right."""
    folder = make_model_folder(tmp_path / "m", **TINY | {"tie_word_embeddings": False})
    model, near = (ModelSource(str(folder)).load() for _ in range(2))
    for each in (model, near):
        # Surer, so that there are outcomes often enough to be counted.
        each.model.lm_head.weight = each.model.lm_head.weight * 6
    prompt, draws, temperature = [7, 8, 9], 1200, 1.0
    disturb(near.model, 0.4)
    draft = Draft("near", near.source, near.model, 2)
    pairs: dict[object, int] = {}
    accepted = 0
    for seed in range(draws):
        said = list(
            drafted_tokens(model, draft, prompt, max_tokens=2, temperature=temperature, seed=seed)
        )
        accepted += said[0][1]
        pair = tuple(token for token, _ in said)
        pairs[pair] = pairs.get(pair, 0) + 1
    assert 0.2 * draws < accepted < 0.9 * draws
    assert likely(pairs, two_tokens(model, prompt, temperature), draws) > 0.001


def two_tokens(model: LanguageModel, prompt: list[int], temperature: float) -> dict[object, float]:
    """Probability of each of the likelier two tokens that a model says next."""

    def next_one(ids: list[int]) -> np.ndarray:
        logits = np.array(model.logits(mx.array([ids]))[0, -1], dtype=np.float64) / temperature
        weights = np.exp(logits - logits.max())
        return weights / weights.sum()

    first = next_one(prompt)
    return {
        (int(one), int(two)): float(first[one] * rest[two])
        for one in np.argsort(-first)[:40]
        for rest in [next_one([*prompt, int(one)])]
        for two in np.argsort(-rest)[:40]
    }


# Who cannot draft


def test_a_draft_of_another_tokenizer_is_not_used_and_that_is_told(ego, tmp_path):
    letters = byte_level_tokenizer(tmp_path / "tokens")
    other = draft_of(make_model_folder(tmp_path / "m", tokenizer=letters, **TINY))
    found = answer(ego, "Once", other)
    assert found.undrafted == f"{other.source.model_id} has not the tokens of embedded:teacher"
    assert (found.text, found.draft, found.steps) == (answer(ego, "Once", None).text, "", None)
    parts, told = streamed(ego, "Once", other)
    assert "".join(parts) == found.text and told == found


def test_a_draft_with_too_few_rows_is_none(ego, tmp_path):
    folder = make_model_folder(tmp_path / "m", vocab_size=1500, **TINY)
    why = other_vocabulary(ego.source, ModelSource(str(folder)))
    assert why == f"{folder} has rows for 1,500 tokens and embedded:teacher says 1,536"


def test_a_draft_with_a_shorter_context_helps_as_long_as_both_fit(ego, tmp_path):
    short = draft_of(make_model_folder(tmp_path / "m", max_position_embeddings=32, **TINY))
    assert answer(ego, "Once", short, max_tokens=8).draft == "small"
    found = answer(ego, "Once", short, max_tokens=40)
    assert "longer than the context of" in found.undrafted and "32 tokens" in found.undrafted
    assert found.text == answer(ego, "Once", None, max_tokens=40).text


@pytest.mark.parametrize("which", ["ego", "draft"])
def test_a_window_is_drafted_for_until_it_is_full_and_a_state_never(which, tmp_path):
    plain = make_model_folder(tmp_path / "plain", **TINY)
    for kind, fits in ((GEMMA, True), (MAMBA, False)):
        folder = make_model_folder(tmp_path / kind["model_type"], seed=3, **kind)
        big, small = (folder, plain) if which == "ego" else (plain, folder)
        draft = draft_of(small, tokens=3)
        with EgoModel(EgoConfig(model=str(big), max_tokens=24)) as ego:
            for longest in (12, 60):
                own = answer(ego, "Once upon", None, max_tokens=longest)
                found = answer(ego, "Once upon", draft, max_tokens=longest)
                assert found.text == own.text
                used = fits and longest == 12
                assert bool(found.draft) is used
                if not used:
                    assert found.undrafted.startswith(f"{folder} remembers a window or a state")


def test_a_window_takes_back_what_is_refused(tmp_path):
    """Some drafts are right and some wrong, so that tokens are taken out of the ring."""
    folder = make_model_folder(tmp_path / "m", **GEMMA | {"sliding_window": 64})
    draft = draft_of(folder, tokens=5)
    with EgoModel(EgoConfig(model=str(folder), max_tokens=40, temperature=1.0)) as ego:
        model = ego._local()
        ids = [11, 12, 13]
        said = drafted_tokens(model, draft, ids, max_tokens=40, temperature=1.0, seed=2)
        expected = [token for token, _ in said]
        noisy = make_model_folder(tmp_path / "n", **GEMMA | {"sliding_window": 64})
        other = draft_of(noisy, tokens=5)
        disturb(other.model)
        found = list(drafted_tokens(model, other, ids, max_tokens=40, temperature=1.0, seed=2))
    assert [token for token, _ in found] == expected
    assert 0 < sum(drafted for _, drafted in found) < 30
