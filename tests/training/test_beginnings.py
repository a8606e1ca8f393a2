"""Beginnings that texts share: computed once, and nothing else changes.

Knows tiny random models of several kinds.
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from conch_dna.language_model import LanguageModel, ModelSource
from conch_dna.screen.progress import silent
from conch_dna.training.batches import Example
from conch_dna.training.data import answers, outcomes
from conch_dna.training.data.answers import answer_batch
from conch_dna.training.data.beginnings import SHORTEST, SharedBeginning
from conch_dna.training.data.outcomes import compute_targets, target_identity
from models import EXPERTS, make_gemma2_folder, make_model_folder

BEGINNING = SHORTEST + 8


def with_beginning(tokens: int, *, count: int = 5) -> list[Example]:
    """Examples that share their first tokens, of which those behind some more count."""
    random = np.random.default_rng(3)
    shared = random.integers(0, tokens, BEGINNING)
    made = []
    for number in range(count):
        own = random.integers(0, tokens, int(random.integers(6, 20)))
        # Otherwise the next token could be shared by chance.
        own[0] = number
        ids = np.concatenate([shared, own]).astype(np.int32)
        made.append(Example(ids, np.arange(len(ids)) > BEGINNING + 2, f"example {number}"))
    return made


def read_tokens(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets how many positions the embedding was asked for, a call each."""
    seen: list[int] = []
    embedding = model.model.model.embed_tokens
    kind = type(embedding)
    plain = kind.__call__

    def counted(self: Any, ids: mx.array) -> mx.array:
        seen.append(ids.size)
        return plain(self, ids)

    monkeypatch.setattr(kind, "__call__", counted)
    return seen


@pytest.fixture(params=["llama", "experts", "gemma2"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> LanguageModel:
    if request.param == "gemma2":
        folder = make_gemma2_folder(tmp_path / "model")
    else:
        changes = EXPERTS if request.param == "experts" else {}
        folder = make_model_folder(tmp_path / "model", **changes)
    return ModelSource(str(folder)).load()


def test_targets_behind_a_shared_beginning_are_those_of_whole_texts(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = with_beginning(model.source.token_count)
    identity = target_identity(model.source, top_k=8, temperature=2.0)
    seen = read_tokens(model, monkeypatch)
    shared = compute_targets(model, examples, identity, batch_size=2, report=silent)
    with_sharing = sum(seen)
    seen.clear()
    monkeypatch.setattr(outcomes, "SharedBeginning", lambda *given: _Nothing())
    whole = compute_targets(model, examples, identity, batch_size=2, report=silent)
    assert with_sharing < 0.8 * sum(seen)
    for one, other in zip(shared, whole, strict=True):
        for name in one:
            if name != "kept_ids":
                np.testing.assert_allclose(one[name], other[name], atol=2e-5, err_msg=name)


class _Nothing:
    length = 0

    def cache(self, rows: int) -> None:
        return None


def test_answers_behind_a_shared_beginning_are_those_of_whole_prompts(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [example.ids.tolist() for example in with_beginning(model.source.token_count)]
    draw: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0, "seed": (1,)}
    shared = answer_batch(model, prompts, **draw)
    monkeypatch.setattr(answers, "SharedBeginning", lambda *given: _Nothing())
    assert answer_batch(model, prompts, **draw) == shared


def test_what_is_shared_ends_before_the_first_token_that_is_asked_for(tmp_path: Path) -> None:
    tree = ModelSource(str(make_model_folder(tmp_path / "model"))).load().model
    text = list(range(100))
    other = [*range(60), 0, 1, 2]

    def length(texts: list[list[int]], before: list[int]) -> int:
        return SharedBeginning(tree, texts, before).length

    assert length([text, text], [99, 70]) == 70
    assert length([text, other, text], [99, 62, 99]) == 60
    # Too short, or nobody to share it with.
    assert length([text, [*range(SHORTEST - 1), 0]], [99, SHORTEST - 1]) == 0
    assert length([text], [99]) == 0


def test_a_model_that_keeps_more_than_keys_and_values_shares_nothing(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model", model_type="gemma3_text", head_dim=16)
    model = ModelSource(str(folder)).load()
    text = list(range(60))
    shared = SharedBeginning(model.model, [text, text], [50, 50])
    assert (shared.length, shared.cache(2)) == (0, None)
