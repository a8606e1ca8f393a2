from types import SimpleNamespace

import numpy as np
import pytest

from conch_dna.errors import ConchError
from conch_dna.sedimentation.changes.collapse import (
    CollapseNull,
    dispersions,
    homeostatic_targets,
    noise_centres,
    sampled,
)
from conch_dna.sedimentation.config import ChelationConfig


def unit64(rows):
    rows = np.asarray(rows, np.float64)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def dispersion(vectors):
    return float(dispersions(np.asarray(vectors)[None])[0])


def null_of(store, **given):
    """The null of a store's raw vectors; settings by short names."""
    names = {"k": "top_k", "percentile": "collapse_percentile", "sample": "collapse_sample"}
    config = ChelationConfig(**{names.get(name, name): value for name, value in given.items()})
    return CollapseNull.fit(store, config, version="raw")


def random_unit(seed, *shape):
    return unit64(np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


class ExactStore:
    """The reading half of a vector store, by brute force; its pages come in any order."""

    def __init__(self, ids, vectors):
        self.ids, self.vectors = list(ids), vectors

    def count(self, version="raw"):
        return len(self.ids)

    def pages(self, version="raw", *, size=7):
        for first in range(0, len(self.ids), size):
            yield SimpleNamespace(ids=self.ids[first : first + size])

    def get(self, ids, version="raw"):
        places = [self.ids.index(each) for each in ids]
        return SimpleNamespace(ids=[self.ids[p] for p in places], vectors=self.vectors[places])

    def search(self, queries, *, version, top_k, where=None, exact=None):
        order = np.argsort(-(queries @ self.vectors.T), axis=1, kind="stable")[:, :top_k]
        return [SimpleNamespace(ids=[self.ids[p] for p in row]) for row in order]


def corpus(n=120, d=16):
    """Half of the documents crowd around one point."""
    rows = random_unit(0, n, d).astype(np.float64)
    rows[: n // 2] = rows[0] + 0.05 * rows[: n // 2]
    return unit64(rows).astype(np.float32)


def null_oracle(vectors, numbers, k):
    values = []
    for number in numbers:
        rows = vectors.astype(np.float64)
        similarity = rows @ rows[number]
        similarity[number] = -np.inf
        near = unit64(rows[np.argsort(-similarity)[:k]])
        values.append(np.mean([1 - a @ b for a in near for b in near]))
    return np.array(values)


def test_dispersion_is_the_mean_of_one_minus_cosine_over_all_pairs():
    table = random_unit(0, 5, 7, 12)
    expected = [np.mean([1 - a @ b for a in unit64(q) for b in unit64(q)]) for q in table]
    np.testing.assert_allclose(dispersions(table), expected, atol=1e-12)
    assert dispersion(table[2]) == dispersions(table)[2]


@pytest.mark.parametrize("k", [2, 5, 10])
@pytest.mark.parametrize("d", [16, 384])
def test_dispersion_of_orthogonal_and_equal_vectors_does_not_depend_on_dimension(k, d):
    assert dispersion(np.eye(d)[:k]) == pytest.approx(1 - 1 / k, abs=1e-12)
    assert dispersion(np.repeat(random_unit(0, 1, d), k, axis=0)) == pytest.approx(0, abs=1e-12)


def test_lengths_and_rotations_do_not_matter():
    rows = random_unit(1, 6, 9).astype(np.float64)
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(9, 9)))[0]
    stretched = rows * np.arange(1, 7)[:, None]
    assert dispersion(stretched @ rotation) == pytest.approx(dispersion(rows), abs=1e-12)


@pytest.mark.parametrize("percentile", [5.0, 40.0])
def test_null_is_a_percentile_of_neighbourhoods_without_their_own_document(percentile):
    vectors = corpus()
    store = ExactStore(range(len(vectors)), vectors)
    null = null_of(store, k=4, percentile=percentile, sample=200, seed=3)
    values = null_oracle(vectors, range(len(vectors)), 4)
    assert null.threshold == pytest.approx(np.percentile(values, percentile), abs=1e-6)
    assert (null.k, null.sample, null.seed, null.version) == (4, len(vectors), 3, "raw")
    assert null.lowest == pytest.approx(values.min(), abs=1e-6)
    assert null.median == pytest.approx(np.median(values), abs=1e-6)
    assert null.highest == pytest.approx(values.max(), abs=1e-6)
    below = sum(null.is_collapsed(value) for value in values)
    assert below == pytest.approx(percentile / 100 * len(values), abs=1)


def test_the_sample_is_decided_by_ids_and_seed_and_not_by_the_order_of_the_store():
    vectors = corpus()
    names = [f"doc {number}" for number in range(len(vectors))]
    order = np.random.default_rng(1).permutation(len(vectors))
    straight = ExactStore(names, vectors)
    mixed = ExactStore([names[number] for number in order], vectors[order])

    def null(store, seed):
        return null_of(store, k=4, percentile=30, sample=20, seed=seed)

    assert null(straight, 0).threshold == pytest.approx(null(mixed, 0).threshold, abs=1e-9)
    assert null(straight, 0).values_digest != null(straight, 1).values_digest
    chosen = [names.index(each) for each in sampled(straight, sample=20, seed=0).ids]
    expected = np.percentile(null_oracle(vectors, chosen, 4), 30)
    assert null(straight, 0).threshold == pytest.approx(expected, abs=1e-6)


def test_more_sampled_than_queries_at_once_gives_the_same(monkeypatch):
    store = ExactStore(range(120), corpus())
    whole = null_of(store, k=4, sample=120)
    monkeypatch.setattr("conch_dna.sedimentation.changes.collapse.QUERIES_AT_ONCE", 7)
    assert null_of(store, k=4, sample=120).values_digest == (whole.values_digest)


def test_a_sample_tells_a_number_from_its_text_and_leaves_out_what_is_named():
    store = ExactStore([1, "1", 2, "2"], random_unit(0, 4, 3))
    found = sampled(store, sample=9, seed=0)
    assert len(found.ids) == 4 and set(found.ids) == {1, "1", 2, "2"}
    np.testing.assert_array_equal(found.vectors, store.get(found.ids).vectors)
    left = sampled(store, sample=9, seed=0, without=lambda each: each in (1, "2"))
    assert set(left.ids) == {"1", 2}
    many = ExactStore(range(100), random_unit(0, 100, 3))
    assert len(sampled(many, sample=9, seed=0).ids) == 9


def test_null_survives_json():
    null = null_of(ExactStore(range(120), corpus()), k=4, seed=1)
    assert CollapseNull.from_json(null.to_json(), source="null.json") == null
    document = {**null.to_json(), "extra": 1}
    del document["seed"]
    with pytest.raises(ConchError, match=r"null\.json is no collapse null.*differs in extra, seed"):
        CollapseNull.from_json(document, source="null.json")


def test_noise_centre_is_the_mean_over_events_of_the_mean_of_members():
    vectors = dict(zip("abcd", random_unit(0, 4, 6), strict=True))
    events = [["a", "b"], ["b", "c", "d"], ["a", "b"]]
    exact = {name: row.astype(np.float64) for name, row in vectors.items()}
    pair = (exact["a"] + exact["b"]) / 2
    three = (exact["b"] + exact["c"] + exact["d"]) / 3
    found = noise_centres(events, ["b", "a"], vectors)
    np.testing.assert_allclose(found, [(2 * pair + three) / 3, pair], atol=1e-7)


def test_homeostatic_target_is_the_formula_and_moves_away():
    rows, centres = random_unit(0, 8, 5), np.random.default_rng(1).normal(size=(8, 5)) * 0.3
    targets = homeostatic_targets(rows, centres, push=0.1)
    exact = rows.astype(np.float64)
    expected = unit64(exact + 0.1 * unit64(exact - centres))
    np.testing.assert_allclose(targets, expected, atol=1e-6)
    assert targets.dtype == np.float32
    assert (np.linalg.norm(targets - centres, axis=1) > np.linalg.norm(exact - centres, axis=1))[
        np.linalg.norm(centres, axis=1) < 0.9
    ].all()


def test_pushing_a_crowd_apart_raises_its_dispersion():
    crowd = unit64(random_unit(0, 1, 16) + 0.05 * random_unit(1, 10, 16)).astype(np.float32)
    vectors = dict(enumerate(crowd))
    targets = homeostatic_targets(crowd, noise_centres([range(10)], range(10), vectors))
    assert dispersion(targets) > 2 * dispersion(crowd)


def test_a_row_on_its_centre_has_no_target():
    rows = random_unit(0, 3, 5)
    centres = np.zeros((3, 5))
    centres[1] = rows[1]
    targets = homeostatic_targets(rows, centres)
    assert np.isnan(targets).all(axis=1).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dispersion(np.ones(3)), r"shape \[1, 3\]: give \[Q, k, D\]"),
        (lambda: dispersion(np.ones((0, 3))), "at least one vector each"),
        (lambda: dispersion([[0.0, 0.0]]), "neighbourhoods are all zero"),
        (lambda: dispersion([[np.nan, 0.0]]), "not finite"),
        (
            lambda: null_of(ExactStore([1, 2, 3], random_unit(0, 3, 4))),
            "on 3 documents: a neighbourhood of 10 needs at least 11",
        ),
        (lambda: noise_centres([["a", "b"]], ["a"], {"a": np.ones(2)}), "no vector of 'b'"),
        (lambda: noise_centres([["a"]], ["c"], {"a": np.ones(2)}), "'c' is in no logged"),
        (lambda: homeostatic_targets(np.ones((2, 3)), np.ones((1, 3))), "one centre is needed"),
        (lambda: homeostatic_targets(np.ones((1, 3)), np.zeros((1, 3)), push=0), "push 0 must be"),
        (
            lambda: homeostatic_targets(np.ones((1, 3)), np.full((1, 3), np.nan)),
            "noise centres hold values that are not finite",
        ),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ConchError, match=message):
        make()


def test_a_store_that_finds_too_few_is_named():
    class Short(ExactStore):
        def search(self, queries, **options):
            return [
                SimpleNamespace(ids=hits.ids[:2]) for hits in super().search(queries, **options)
            ]

    with pytest.raises(ConchError, match=r"fewer than 4 neighbours of .* among 120 documents"):
        null_of(Short(range(120), corpus()), k=4)
