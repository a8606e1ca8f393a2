"""Pairs of tiny random models with different tokenizers."""

from pathlib import Path

import pytest

from aligned_pairs import Pair
from conch_dna.language_model import ModelSource
from models import make_model_folder
from tokenizers_made import character_tokenizer


@pytest.fixture(scope="package")
def characters(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """A model that reads characters."""
    folder = tmp_path_factory.mktemp("characters")
    tokenizer = character_tokenizer(folder / "tokenizer")
    return ModelSource(str(make_model_folder(folder / "model", seed=5, tokenizer=tokenizer)))


@pytest.fixture(scope="package", params=["characters teach BPE", "BPE teaches characters"])
def pair(request: pytest.FixtureRequest, characters: ModelSource, tiny_teacher: Path) -> Pair:
    """A teacher and a student, in both directions."""
    bpe = ModelSource(str(tiny_teacher))
    return (characters, bpe) if request.param == "characters teach BPE" else (bpe, characters)
