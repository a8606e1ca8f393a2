"""A student with fewer layers: influence by its definition, and a folder that is what it says."""

import itertools
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from mlx_lm.utils import load

from conch_dna.cli import main
from conch_dna.errors import ConchError
from conch_dna.language_model import ModelSource
from conch_dna.training.students.block_influence import (
    block_influences,
    held_apart,
    least_influential,
    make_student,
    windows_of,
)
from conch_dna.training.students.layers import require_uniform
from models import make_gemma2_folder, make_model_folder

WINDOWS = [[3, 50, 7, 9, 200, 4], [8, 8, 1], [90, 2, 40, 11]]


@pytest.fixture(scope="module")
def five_layers(tmp_path_factory) -> Path:
    """A random Llama of five layers, of which layer 3 does nearly nothing."""
    folder = make_model_folder(tmp_path_factory.mktemp("m") / "five", seed=4, num_hidden_layers=5)
    weights = mx.load(str(folder / "model.safetensors"))
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        weights[f"model.layers.3.{name}.weight"] *= 0.01
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    return folder


def states(model, window, layers):
    """Hidden states before, between and after layers, taken by hand."""
    from mlx_lm.models.base import create_attention_mask

    body = model.model.model
    hidden = body.embed_tokens(mx.array([window]))
    mask = create_attention_mask(hidden, None)
    found = [hidden]
    for number in layers:
        hidden = body.layers[number](hidden, mask, None)
        found.append(hidden)
    return [np.array(each, np.float64)[0] for each in found]


def influence(model, layers):
    """1 - mean cosine over all tokens of all windows, in float64."""
    cosines = [[] for _ in layers]
    for window in WINDOWS:
        found = states(model, window, layers)
        for place, (a, b) in enumerate(itertools.pairwise(found)):
            norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
            cosines[place] += list((a * b).sum(-1) / norms)
    return [1 - np.mean(each) for each in cosines]


def test_influence_is_its_definition(five_layers):
    model = ModelSource(str(five_layers)).load()
    before = model.logits(mx.array([[1, 2, 3]]))
    figures = block_influences(model, WINDOWS)
    np.testing.assert_allclose(figures, influence(model, range(5)), atol=1e-5)
    assert int(np.argmin(figures)) == 3
    assert mx.array_equal(before, model.logits(mx.array([[1, 2, 3]])))


def test_it_is_measured_again_after_each_removal(five_layers):
    model = ModelSource(str(five_layers)).load()
    first, second = itertools.islice(least_influential(model, WINDOWS), 2)
    assert first.layer == 3
    left = [number for number in range(5) if number != 3]
    figures = dict(zip(left, influence(model, left), strict=True))
    assert second.layer == min(figures, key=figures.get)
    for number, figure in second.influences.items():
        assert figure == pytest.approx(figures[number], abs=1e-5)


def test_the_folder_says_what_the_teacher_says_without_these_layers(five_layers, tmp_path):
    cut = make_student(ModelSource(str(five_layers)), tmp_path / "s", WINDOWS, layers=3)
    document = json.loads((tmp_path / "s" / "student.json").read_text())
    kept = document["kept_layers"]
    assert sorted([*kept, *(each.layer for each in cut.removals)]) == [0, 1, 2, 3, 4]
    assert (document["tokens"], document["curve_tokens"]) == (10, 3)
    model, tokenizer = load(str(tmp_path / "s"))
    teacher = ModelSource(str(five_layers)).load()
    assert len(model.layers) == 3
    assert tokenizer.encode("Once") == teacher.tokenizer.encode("Once")
    teacher.model.model.layers = [teacher.model.model.layers[number] for number in kept]
    ids = mx.array([[5, 6, 7]])
    assert mx.array_equal(model(ids), teacher.model(ids))


def test_a_quantized_teacher_gives_a_quantized_student(tmp_path):
    folder = make_model_folder(tmp_path / "t", seed=1, num_hidden_layers=3, quantize=True)
    config = json.loads((folder / "config.json").read_text())
    config["quantization"]["model.layers.2.mlp.up_proj"] = {"group_size": 32, "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    make_student(ModelSource(str(folder)), tmp_path / "s", WINDOWS, layers=2)
    made = json.loads((tmp_path / "s" / "config.json").read_text())
    kept = json.loads((tmp_path / "s" / "student.json").read_text())["kept_layers"]
    wanted = {f"model.layers.{kept.index(2)}.mlp.up_proj"} if 2 in kept else set()
    assert {name for name in made["quantization"] if "layers" in name} == wanted
    names = mx.load(str(tmp_path / "s" / "model.safetensors"))
    assert "model.layers.1.mlp.up_proj.scales" in names
    assert not any("layers.2" in name for name in names)


def test_what_cannot_be_made_is_refused(five_layers, tmp_path):
    source = ModelSource(str(five_layers))
    for layers in (0, 5, 9):
        with pytest.raises(
            ConchError, match=f"has 5 layers: keep from 1 to 4 of them, not {layers}"
        ):
            make_student(source, tmp_path / "s", WINDOWS, layers=layers)
    with pytest.raises(ConchError, match="no text of two tokens or more"):
        make_student(source, tmp_path / "s", [[]], layers=2)
    (tmp_path / "s").mkdir()
    with pytest.raises(ConchError, match="is there: name another"):
        make_student(source, tmp_path / "s", WINDOWS, layers=2)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"sliding_window_pattern": 6}, "sliding_window_pattern"),
        ({"full_attention_interval": 4}, "full_attention_interval"),
    ],
)
def test_layers_that_differ_by_their_number_are_refused(tmp_path, changes, name):
    folder = make_model_folder(tmp_path / "m", sliding_window=8, **changes)
    model = ModelSource(str(folder)).load()
    with pytest.raises(ConchError, match=rf"differ by their number \({name} in its config"):
        require_uniform(model.source, model)


def test_layers_of_other_shapes_are_refused(five_layers):
    model = ModelSource(str(five_layers)).load()
    model.model.model.layers[2].mlp.up_proj.weight = mx.zeros((10, 64))
    with pytest.raises(ConchError, match=r"layer 2 of .* is not built as its first"):
        require_uniform(model.source, model)


def test_another_uniform_kind_of_model_can_be_taken(tmp_path):
    """Gemma-2 in mlx_lm: every layer alike, norms before and behind, soft-capped logits."""
    folder = make_gemma2_folder(tmp_path / "g")
    make_student(ModelSource(str(folder)), tmp_path / "s", WINDOWS, layers=1)
    assert len(ModelSource(str(tmp_path / "s")).load().model.layers) == 1


def test_windows_are_of_one_text_each_and_so_many_tokens(tiny_teacher):
    tokenizer = ModelSource(str(tiny_teacher)).tokenizer
    texts = ["Once upon a time there was a cat. " * 200, "The end."]
    windows = windows_of(tokenizer, texts, tokens=10**6)
    assert [i for window in windows[:-1] for i in window] == tokenizer.encode(texts[0])
    assert max(map(len, windows)) == 512
    assert windows[-1] == tokenizer.encode("The end.")
    assert sum(map(len, windows_of(tokenizer, texts, tokens=700))) == 700


def test_what_the_curve_is_measured_on_is_the_end_of_the_text():
    assert held_apart(WINDOWS) == ([[3, 50, 7, 9, 200, 4], [8, 8, 1], [90]], [[2, 40, 11]])
    assert held_apart([list(range(8))]) == ([[0, 1, 2, 3, 4, 5]], [[6, 7]])
    assert held_apart([[], [1, 2]]) == ([[1]], [[2]])


def test_the_command(five_layers, tmp_path):
    (tmp_path / "texts.txt").write_text("Once upon a time.\nThe dog ran home.\n")
    arguments = ["student", "make", str(five_layers), str(tmp_path / "s"), "--layers", "4"]
    done = CliRunner().invoke(main, [*arguments, "--text", str(tmp_path / "texts.txt")])
    assert done.exit_code == 0, done.output
    assert "(4 of 5 layers, 0." in done.output
    assert "block influence" in done.output
    again = CliRunner().invoke(main, [*arguments, "--text", str(tmp_path / "texts.txt")])
    assert again.exit_code == 2
    assert "is there: name another" in again.output
