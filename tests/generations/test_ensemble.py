"""Generations that answer together: the blend in float64, the caches, and what they share."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import oracle
from conch_dna.errors import ConchError
from conch_dna.generations.ensemble import (
    blend_log_probs,
    ensemble_answer,
    ensemble_inference,
    load_generations,
)
from conch_dna.language_model import LanguageModel, ModelSource, named_arrays
from conch_dna.training.adapters import adapter_tensors, attach_lora, save_adapter
from conch_dna.training.data.answers import answer_batch
from conch_dna.training.settings import KDConfig
from models import make_model_folder

IDS = [3, 70, 200, 15, 9]


def adapter(base: ModelSource, folder: Path, seed: int) -> Path:
    """A LoRA adapter that changes what the model says."""
    model = base.load()
    config = attach_lora(model, KDConfig(lora_rank=4, seed=seed, lora_keys="all"))
    mx.random.seed(seed)
    tensors = {
        name: value + 0.2 * mx.random.normal(value.shape)
        for name, value in adapter_tensors(model.model).items()
    }
    save_adapter(folder, tensors, config)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> list[LanguageModel]:
    folder = tmp_path_factory.mktemp("adapters")
    base = ModelSource(str(tiny_teacher))
    paths = [adapter(base, folder / str(seed), seed) for seed in (1, 2)]
    return load_generations(base, [None, *paths])


def probabilities(model: LanguageModel) -> np.ndarray:
    return oracle.softmax(np.asarray(model.logits(mx.array([IDS]))[0], np.float64))


@pytest.mark.parametrize("weights", [None, [1, 1, 1], [0.2, 0.5, 0.3], [0, 2, 6]])
def test_together_they_say_the_weighted_mean(
    weights: list[float] | None, models: list[LanguageModel]
) -> None:
    p = np.stack([probabilities(model) for model in models])
    if weights is None:
        shares = p.max(-1) / p.max(-1).sum(0)
    else:
        shares = np.repeat(np.array(weights)[:, None] / sum(weights), len(IDS), axis=1)
    expected = (shares[..., None] * p).sum(0)
    got = ensemble_inference(mx.array(IDS), models, weights)
    np.testing.assert_allclose(np.exp(np.asarray(got)), expected, rtol=1e-4, atol=1e-8)
    rows = ensemble_inference(mx.array([IDS, IDS]), models, weights)
    np.testing.assert_allclose(np.asarray(rows[1]), np.asarray(got), rtol=1e-4, atol=1e-4)


def test_one_model_alone_says_what_it_says(models: list[LanguageModel]) -> None:
    got = ensemble_inference(mx.array(IDS), models[1:2])
    np.testing.assert_allclose(np.exp(np.asarray(got)), probabilities(models[1]), rtol=1e-4)


def test_generations_of_one_base_share_its_arrays(models: list[LanguageModel]) -> None:
    """Not only equal: the same memory, so three generations cost one base and two adapters."""
    base = named_arrays(models[0].model.parameters())
    for model in models[1:]:
        found = named_arrays(model.model.parameters())
        wrapped = {name.replace(".linear.", "."): value for name, value in found.items()}
        for name, value in base.items():
            assert wrapped[name] is value or np.shares_memory(
                np.array(wrapped[name], copy=False), np.array(value, copy=False)
            )
        assert adapter_tensors(model.model)


def test_a_generation_costs_its_adapter_only(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "big", hidden_size=256, intermediate_size=1024)
    base = ModelSource(str(folder))
    path = adapter(base, tmp_path / "adapter", 3)
    pristine = base.load()
    mx.eval(pristine.model.parameters())
    mx.clear_cache()
    before = mx.get_active_memory()
    second = base.load(adapter_path=path, share=pristine)
    mx.eval(second.model.parameters())
    mx.clear_cache()
    added = mx.get_active_memory() - before
    own = sum(value.nbytes for value in adapter_tensors(second.model).values())
    assert own <= added < 1.2 * own + 100_000
    assert base.weight_bytes is not None and added < base.weight_bytes / 4


def test_with_caches_the_answer_is_that_of_the_whole_text_each_time(
    models: list[LanguageModel],
) -> None:
    answer = ensemble_answer(IDS, models, max_tokens=8)
    text = list(IDS)
    for token in answer:
        said = ensemble_inference(mx.array(text), models)[-1]
        assert int(mx.argmax(said).item()) == token
        text.append(token)


def test_one_model_answers_as_it_does_alone(models: list[LanguageModel]) -> None:
    (alone,) = answer_batch(models[2], [IDS], max_tokens=8, temperature=0.0, seed=(0,))
    assert ensemble_answer(IDS, models[2:], max_tokens=8) == alone


def test_a_draw_is_its_seeds(models: list[LanguageModel]) -> None:
    drawn = [
        ensemble_answer(IDS, models, max_tokens=12, temperature=1.5, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_an_answer_ends_with_the_context(models: list[LanguageModel]) -> None:
    context = models[0].source.context_length
    assert context == 256
    assert len(ensemble_answer([5] * 253, models, max_tokens=50)) <= 3
    with pytest.raises(ConchError, match="a prompt of 256 tokens leaves no room"):
        ensemble_answer([5] * 256, models, max_tokens=50)
    with pytest.raises(ConchError, match="a prompt of 0 tokens"):
        ensemble_answer([], models, max_tokens=50)


def test_models_with_other_tokens_do_not_answer_together(
    models: list[LanguageModel], tmp_path: Path
) -> None:
    from tokenizers_made import character_tokenizer

    tokenizer = character_tokenizer(tmp_path / "tokenizer")
    other = ModelSource(str(make_model_folder(tmp_path / "other", tokenizer=tokenizer))).load()
    with pytest.raises(ConchError, match="do not share a tokenizer"):
        ensemble_inference(mx.array(IDS), [models[0], other])
    with pytest.raises(ConchError, match="at least one model"):
        ensemble_inference(mx.array(IDS), [])


@pytest.mark.parametrize("weights", [[1.0], [0.0, 0.0], [2.0, -1.0]])
def test_weights_that_do_not_fit_are_refused(weights: list[float]) -> None:
    both = [mx.zeros((1, 2))] * 2
    with pytest.raises(ConchError, match="do not fit 2 models"):
        blend_log_probs(both, weights)
