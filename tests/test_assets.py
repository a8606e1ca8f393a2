"""The embedded pair is what its card and the README say: small, one tokenizer, one better."""

import json

import mlx.core as mx
import pytest

from conch_dna.language_model import ASSETS, ModelSource
from conch_dna.training.batches import collate, sequential_batches
from conch_dna.training.cross_tokenizer.vocabulary import SAME, compare_tokenizers
from conch_dna.training.data.records import fitting, read_prompts, tokenize_records
from conch_dna.training.head_loss import cross_entropy_sums

PAIR = ("embedded:teacher", "embedded:student")


def test_the_pair_shares_a_tokenizer_of_one_to_two_thousand_tokens():
    comparison = compare_tokenizers(*(ModelSource(name).tokenizer for name in PAIR))
    assert comparison.verdict == SAME
    assert 1000 <= comparison.teacher_tokens <= 2000


def test_the_pair_is_small_and_the_student_about_a_quarter():
    total = sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file())
    assert total <= 12_000_000
    teacher, student = (ModelSource(name).weight_bytes for name in PAIR)
    assert teacher
    assert student
    assert 0.2 <= student / teacher <= 0.3


def test_the_opening_lines_are_sixty_and_differ():
    lines = read_prompts(ASSETS / "story_openings.txt")
    assert len(lines) == len(set(lines)) == 60


def test_the_card_says_what_they_are_not():
    card = (ASSETS / "README.md").read_text(encoding="utf-8")
    assert "What they are not" in card
    for name in PAIR:
        parameters = sum(value.size for value in _weights(name).values())
        assert f"{parameters:,}" in card


def _weights(name: str) -> dict[str, mx.array]:
    loaded = mx.load(str(ModelSource(name).folder / "model.safetensors"))
    assert isinstance(loaded, dict)
    return loaded


@pytest.mark.slow
def test_the_student_is_visibly_worse_on_held_out_stories(shared_data):
    path = shared_data / "text" / "tinystories" / "heldout.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()[:40]
    losses = []
    for name in PAIR:
        model = ModelSource(name).load()
        examples = tokenize_records([json.loads(line) for line in lines], model.tokenizer)
        examples = [examples[index] for index in fitting(examples, 512, skip=True)]
        total, tokens = 0.0, 0
        for indices in sequential_batches(examples, 4):
            batch = collate([examples[index] for index in indices])
            arrays = {key: mx.array(value) for key, value in batch.arrays.items()}
            total += cross_entropy_sums(model.model, arrays)["loss"].item()
            tokens += batch.count
        losses.append(total / tokens)
    assert losses[1] - losses[0] >= 0.25
