"""The size-quality curve: its figures by their definition, its goals, the command's options."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from conch_dna.cli import main
from conch_dna.errors import ConchError
from conch_dna.language_model import ModelSource
from conch_dna.training.students.block_influence import cut_to, held_apart, write_student
from conch_dna.training.students.curve import distance
from conch_dna.training.students.layers import layers_of, with_layers
from conch_dna.training.students.narrow_mlps import cut_down
from conch_dna.training.students.sizes import Goal
from models import keep_layers, make_gemma2_folder, make_model_folder, memory_of

WINDOWS = [[3, 50, 7, 9, 200, 4], [8, 8, 1], [90, 2, 40, 11]]
APART = [[2, 40, 11]]


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory) -> Path:
    """A random Llama of four layers."""
    return make_model_folder(tmp_path_factory.mktemp("m") / "four", seed=3, num_hidden_layers=4)


def log_probs(folder, windows):
    """Of each token of the windows, in float64, by a model of its own."""
    model = ModelSource(str(folder)).load()
    rows = np.concatenate(
        [np.array(model.logits(mx.array([w]))[0]).astype(np.float64) for w in windows]
    )
    rows -= rows.max(-1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(-1, keepdims=True))


def divergence(first, second):
    """Mean KL, and the share of rows with the same maximum."""
    kl = (np.exp(first) * (first - second)).sum(-1).mean()
    return kl, (first.argmax(-1) == second.argmax(-1)).mean()


def file_bytes(folder):
    arrays = mx.load(str(folder / "model.safetensors"))
    return sum(each.nbytes for each in arrays.values())


@pytest.mark.parametrize("rows", [2, 1000])
def test_distance_is_its_definition(four_layers, tmp_path, rows):
    """However many rows of logits there are at a time."""
    model = ModelSource(str(four_layers)).load()
    found = distance(
        model,
        WINDOWS,
        lambda: cut_down(model, [0, 2], None),
        memory=2 * memory_of(rows, model),
    )
    cut = keep_layers(four_layers, tmp_path / "cut", [0, 2])
    wanted = divergence(log_probs(four_layers, WINDOWS), log_probs(cut, WINDOWS))
    assert found == pytest.approx(wanted, rel=1e-4)
    assert wanted[0] > 1e-3
    assert len(layers_of(model)) == 4


def test_distance_of_a_model_whose_logits_are_capped(tmp_path):
    """What comes after the head runs the model once more, which is another one by then."""
    model = ModelSource(str(make_gemma2_folder(tmp_path / "g"))).load()
    kl, agreement = distance(
        model, WINDOWS, lambda: cut_down(model, [1], None), memory=2 * memory_of(2, model)
    )
    logits = [model.logits(mx.array([window]))[0] for window in WINDOWS]
    with with_layers(model, layers_of(model)[1:]):
        others = [model.logits(mx.array([window]))[0] for window in WINDOWS]
    rows = [np.concatenate([np.array(each) for each in part]) for part in (logits, others)]
    rows = [each.astype(np.float64) for each in rows]
    rows = [each - np.log(np.exp(each).sum(-1, keepdims=True)) for each in rows]
    assert (kl, agreement) == pytest.approx(divergence(*rows), rel=1e-4)


def test_the_curve_has_a_point_for_each_removal_and_is_that_of_the_folders(four_layers, tmp_path):
    """Each point's KL, agreement and bytes are those of a folder with just these layers."""
    model = ModelSource(str(four_layers)).load()
    cut = cut_to(model, WINDOWS, Goal(layers=2))
    whole, first, second = cut.curve
    assert [point.layers for point in cut.curve] == [4, 3, 2]
    assert (whole.kl_nats, whole.top1_agreement) == (0, 1)
    assert whole.weight_bytes == file_bytes(four_layers)
    teacher = log_probs(four_layers, APART)
    for point, gone in ((first, 1), (second, 2)):
        left = [n for n in range(4) if n not in [each.layer for each in cut.removals[:gone]]]
        folder = keep_layers(four_layers, tmp_path / f"less-{gone}", left)
        kl, agreement = divergence(teacher, log_probs(folder, APART))
        assert point.kl_nats == pytest.approx(kl, rel=1e-4)
        assert point.top1_agreement == pytest.approx(agreement)
        assert point.weight_bytes == file_bytes(folder)
    write_student(model, tmp_path / "s", cut)
    document = json.loads((tmp_path / "s" / "student.json").read_text())
    assert [point["layers"] for point in document["curve"]] == [4, 3, 2]
    assert document["curve"][2]["kl_nats"] == second.kl_nats
    assert document["mlp"] is None
    assert file_bytes(tmp_path / "s") == second.weight_bytes


def test_influence_is_not_measured_on_the_text_of_the_curve(four_layers):
    model = ModelSource(str(four_layers)).load()
    other = [*WINDOWS[:2], [90, 77, 5, 300]]
    one, two = (cut_to(model, windows, Goal(layers=3)) for windows in (WINDOWS, other))
    assert held_apart(other)[1] == [[77, 5, 300]]
    assert one.removals == two.removals
    assert one.curve[1].kl_nats != two.curve[1].kl_nats


def test_a_size_keeps_as_many_layers_as_fit(four_layers):
    model = ModelSource(str(four_layers)).load()
    points = cut_to(model, WINDOWS, Goal(layers=1)).curve
    whole, three, two, one = (point.weight_bytes for point in points)
    for goal, layers in (
        (Goal(budget_mb=three / 1e6), 3),
        (Goal(budget_mb=(three - 1) / 1e6), 2),
        (Goal(budget_mb=one / 1e6), 1),
        (Goal(size=(two + 1) / whole), 2),
        (Goal(size=(two - 1) / whole), 1),
    ):
        cut = cut_to(model, WINDOWS, goal)
        assert len(cut.kept) == cut.curve[-1].layers == layers
        assert len(cut.removals) == 4 - layers


def test_a_size_that_no_student_has_is_refused_before_anything_is_measured(four_layers):
    model = ModelSource(str(four_layers)).load()
    points = cut_to(model, WINDOWS, Goal(layers=1)).curve
    whole, one = points[0].weight_bytes / 1e6, points[-1].weight_bytes / 1e6
    least = np.ceil(one * 10) / 10

    def heard(event, row):
        pytest.fail(f"it began: {row}")

    with pytest.raises(ConchError, match=rf"takes {one:.2f} MB, .* 0\.1 .*give at least {least:g}"):
        cut_to(model, WINDOWS, Goal(budget_mb=0.1), report=heard)
    with pytest.raises(ConchError, match=r"--size 0\.01 allows .* give at least 0\.\d+$"):
        cut_to(model, WINDOWS, Goal(size=0.01), report=heard)
    with pytest.raises(ConchError, match=rf"{whole:.1f} MB, which --budget-mb 50 holds with all"):
        cut_to(model, WINDOWS, Goal(budget_mb=50), report=heard)


def test_layers_of_unequal_bytes_are_counted_as_they_are(tmp_path):
    """A quantised model of which one layer is in other bits than the others."""
    from mlx_lm.utils import load_model, quantize_model, save_config

    folder = make_model_folder(tmp_path / "t", seed=5, num_hidden_layers=3)
    config = json.loads((folder / "config.json").read_text())
    model, _ = load_model(folder)
    sizes = {"group_size": 32, "bits": 4}
    model, config = quantize_model(
        *(model, config, 32, 4),
        quant_predicate=lambda path, _: {"group_size": 32, "bits": 8} if ".1." in path else sizes,
    )
    from mlx.utils import tree_flatten

    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    save_config(config, folder / "config.json")
    loaded = ModelSource(str(folder)).load()
    cut = cut_to(loaded, WINDOWS, Goal(layers=1))
    whole, two, one = (point.weight_bytes for point in cut.curve)
    went = [each.layer for each in cut.removals]
    assert whole == file_bytes(folder)
    assert (whole - two > two - one) == (went[0] == 1)
    again = cut_to(loaded, WINDOWS, Goal(budget_mb=two / 1e6))
    assert len(again.kept) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "not by nothing: give one"),
        (["--layers", "2", "--size", "0.5"], "not by --layers and --size: give one"),
        (["--size", "0.5", "--budget-mb", "3"], "not by --size and --budget-mb: give one"),
        (["--size", "1"], "--size is 1: give a share between 0 and 1"),
        (["--size", "nan"], "--size is nan: give a share"),
        (["--budget-mb", "inf"], "--budget-mb is inf: give a number above 0, such as 900"),
        (["--budget-mb", "-2"], "--budget-mb is -2: give a number above 0"),
        (["--layers", "2", "--mlp", "1.5"], "--mlp is 1.5: give a share between 0 and 1"),
        (["--layers", "2", "--mlp", "nan"], "--mlp is nan: give a share between 0 and 1"),
    ],
)
def test_goals_that_are_none_are_refused_in_one_line(four_layers, tmp_path, given, message):
    (tmp_path / "texts.txt").write_text("Once upon a time there was a dog.\n")
    arguments = ["student", "make", str(four_layers), str(tmp_path / "s"), *given]
    done = CliRunner().invoke(main, [*arguments, "--text", str(tmp_path / "texts.txt")])
    assert done.exit_code == 2
    error = [line for line in done.output.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert message in error[0]
    assert not (tmp_path / "s").exists()


def test_the_curve_alone_writes_nothing(four_layers, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "texts.txt").write_text("Once upon a time there was a dog.\nThe dog ran home.\n")
    arguments = ["student", "make", str(four_layers), str(tmp_path / "s"), "--size", "0.9"]
    arguments += ["--text", str(tmp_path / "texts.txt"), "--curve-only"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert "top-1 agreement" in done.output
    assert "student:" not in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["texts.txt"]


def test_the_curve_is_shown_before_anything_is_written(four_layers, tmp_path, monkeypatch):
    from conch_dna.training.students import block_influence

    def full(*rest, **named):
        raise ConchError("the disk is full")

    monkeypatch.setattr(block_influence, "write_files", full)
    (tmp_path / "texts.txt").write_text("Once upon a time there was a dog.\nThe dog ran home.\n")
    arguments = ["student", "make", str(four_layers), str(tmp_path / "s"), "--layers", "3"]
    done = CliRunner().invoke(main, [*arguments, "--text", str(tmp_path / "texts.txt")])
    assert done.exit_code == 2
    assert done.output.index("top-1 agreement") < done.output.index("the disk is full")
