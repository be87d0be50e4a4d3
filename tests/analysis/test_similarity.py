"""Cosines, distances and common subspaces of adapters: against dense updates in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import BASE, LAYOUT, dense, split
from helpers import tolerance

import lora_jax
from lora_jax import Adapter, Factors

X = split(1, 2, alpha=4)
Y = split(2, 3, targets=["dense", "stack", "query"], alpha=5, rslora=True)
Z = split(3, {"dense": 1, ".*": 2}, targets=["dense", "experts"], alpha=7)


def vector(x, key=None):
    """The update of all weights, or of one, as one vector."""
    found = dense(x)
    keys = [*LAYOUT, "bias", "norm"] if key is None else [key]
    shape = lambda key: np.shape(BASE[key])  # noqa: E731
    return np.concatenate([np.reshape(found.get(k, np.zeros(shape(k))), -1) for k in keys])


def cosines(xs, key=None):
    vectors = np.stack([vector(x, key) for x in xs])
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.where(norms > 0, norms, 1)
    return unit @ unit.T


def test_similarities_are_cosines_of_updates():
    xs = [X, Y, Z, -2 * X, X + 3 * Y]
    expected = cosines(xs)
    assert expected[0, 3] == pytest.approx(-1, rel=tolerance())  # of factors in float32
    assert 0.1 < abs(expected[0, 4]) < 0.9

    @jax.jit
    def all_of(base, adapters):
        given = [lora_jax.LoraParams(base, x) for x in adapters]
        return lora_jax.analysis.similarity(given), lora_jax.analysis.similarity(adapters)

    for actual in map(np.asarray, all_of(BASE, [x.adapter for x in xs])):
        np.testing.assert_allclose(actual, expected, atol=tolerance())
        assert np.abs(actual).max() <= 1


def test_similarities_of_each_weight():
    xs = [X, Y, Z]
    jitted = jax.jit(lambda xs: lora_jax.analysis.similarity(xs, per_weight=True))
    found = jax.tree.map(np.asarray, jitted([x.adapter for x in xs]))
    assert found.keys() == LAYOUT.keys()
    for key, actual in found.items():
        np.testing.assert_allclose(actual, cosines(xs, key), atol=tolerance())
    assert found["experts"][1, 1] == 0  # does not adapt them
    assert found["experts"][0, 1] == 0


def test_leaves_trained_whole_count():
    x = split(1, full=["bias", "norm"], targets=["dense"])
    y = split(2, full="bias", targets=["query"])
    xs = [x, y, 2 * x]
    np.testing.assert_allclose(lora_jax.analysis.similarity(xs), cosines(xs), atol=tolerance())
    found = lora_jax.analysis.similarity(xs, per_weight=True)
    np.testing.assert_allclose(found["bias"], cosines(xs, "bias"), atol=tolerance())
    gap = np.linalg.norm(vector(x) - vector(y))
    assert float(lora_jax.analysis.distance(x, y)) == pytest.approx(gap, rel=tolerance())


def test_what_is_zero_is_like_nothing():
    fresh = lora_jax.lorafy(BASE, 2, targets="dense")
    actual = np.asarray(lora_jax.analysis.similarity([fresh, X]))
    assert not actual[0].any()
    assert not actual[:, 0].any()
    assert actual[1, 1] == pytest.approx(1, rel=tolerance())
    empty = lora_jax.LoraParams(BASE, Adapter({}))
    assert np.array_equal(lora_jax.analysis.similarity([empty, empty]), np.zeros((2, 2)))
    assert lora_jax.analysis.distance(empty, empty) == 0


def test_distances_are_norms_of_differences():
    pairs = [(X, Y), (Y, Z), (X.adapter, Z.adapter), (X, 0 * X)]
    near = 1.001 * X  # of a gram matrix the difference would be lost in rounding

    @jax.jit
    def distances(base, pairs):  # bases that are one array stay one
        same = lambda x: lora_jax.LoraParams(base, x.adapter) if hasattr(x, "adapter") else x  # noqa: E731
        return [lora_jax.analysis.distance(*map(same, pair)) for pair in pairs]

    found = [float(x) for x in distances(BASE, [*pairs, (X, X), (X, near)])]
    for (x, y), actual in zip(pairs, found, strict=False):
        assert actual == pytest.approx(np.linalg.norm(vector(x) - vector(y)), rel=tolerance())
    norm = np.linalg.norm(vector(X))
    assert found[-2] < tolerance() * norm
    assert found[-1] == pytest.approx(1e-3 * norm, rel=1e-2)


def test_parts_apart_are_orthogonal():
    base = {"w": jnp.zeros((6, 8))}
    left = split(1, 2, base, ["w[:, 0:3]"], layout=None)
    right = split(2, 3, base, ["w[:, 3:8]"], layout=None)
    np.testing.assert_allclose(
        lora_jax.analysis.similarity([left, right]), np.eye(2), atol=tolerance()
    )


@pytest.mark.parametrize("factor", ["a", "b"])
def test_subspaces_are_compared_as_in_the_paper(factor):
    compare = jax.jit(lambda x, y: lora_jax.analysis.subspace_similarity(x, y, factor=factor))
    found = jax.tree.map(np.asarray, compare(X.adapter, Y.adapter))
    assert found.keys() == Y.adapter.factors.keys()
    for key, phi in found.items():
        batch = 3 if key == "stack" else 1
        sides = []
        for x in (X, Y):
            f = x.adapter.factors[key]
            m = np.asarray(getattr(f, factor), np.float64)
            m = m.reshape(batch, -1, f.rank) if factor == "a" else m.reshape(batch, f.rank, -1).mT
            sides.append(np.linalg.svd(m, full_matrices=False)[0])
        u, v = sides
        assert phi.shape == ((3,) if key == "stack" else ()) + (2, 3)
        for i in range(2):
            for j in range(3):
                product = u[..., : i + 1].mT @ v[..., : j + 1]
                want = (product**2).sum((-2, -1)) / (min(i, j) + 1)
                np.testing.assert_allclose(phi[..., i, j].reshape(-1), want, atol=tolerance())
    x = split(1, 2, targets=["dense"], alpha=4)
    same = lora_jax.analysis.subspace_similarity(x, -3 * x, factor=factor)["dense"]
    np.testing.assert_allclose(np.diagonal(same), 1, atol=tolerance())


def test_orthogonal_subspaces_have_nothing_in_common():
    one, other = np.eye(6, dtype="float32")[:, :2], np.eye(6, dtype="float32")[:, 3:]
    x, y = (
        Adapter({"w": Factors(jnp.asarray(a), jnp.ones((a.shape[1], 2)), 1.0, "io")})
        for a in (one, other)
    )
    assert not lora_jax.analysis.subspace_similarity(x, y)["w"].any()


def test_misuse_is_explained():
    with pytest.raises(ValueError, match="similarity: there are no adapters"):
        lora_jax.analysis.similarity([])
    with pytest.raises(TypeError, match="similarity: Adapters and LoraParams together"):
        lora_jax.analysis.similarity([X, X.adapter])
    with pytest.raises(TypeError, match="distance: operand 1 is int"):
        lora_jax.analysis.distance(X, 0)
    with pytest.raises(ValueError, match="factor='c': expected 'a' or 'b'"):
        lora_jax.analysis.subspace_similarity(X, Y, factor="c")
    with pytest.raises(ValueError, match="subspace_similarity: 'dense' has a DoRA magnitude"):
        lora_jax.analysis.subspace_similarity(X, split(1, targets=["dense"], dora=True))


@pytest.mark.parametrize("step", [1e-2, 1e-3, 1e-4])
def test_steps_of_one_run_are_compared_as_they_are(step):
    rng = np.random.default_rng(0)
    draw = lambda shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    points = [split(5, 4, targets=["dense", "stack"]).adapter]
    for _ in range(2):
        moved = jax.tree.map(
            lambda v: jax.device_put(np.asarray(v) + np.float32(step) * draw(v.shape)), points[-1]
        )
        points.append(moved)
    one, other = points[1] - points[0], points[2] - points[1]
    deltas = [np.concatenate([np.ravel(dense(p)[k]) for k in ("dense", "stack")]) for p in points]
    u, v = deltas[1] - deltas[0], deltas[2] - deltas[1]
    expected = u @ v / np.linalg.norm(u) / np.linalg.norm(v)
    found = lora_jax.analysis.similarity([one, other])
    np.testing.assert_allclose(found, [[1, expected], [expected, 1]], atol=tolerance() / step)


def test_one_pair_of_directions_and_what_is_beyond_the_rank():
    compare = lora_jax.analysis.subspace_similarity
    every = compare(X, Y, factor="b")
    for pair in ({"i": 2}, {"i": 2, "j": 2}):
        for key, one in compare(X, Y, factor="b", **pair).items():
            np.testing.assert_array_equal(one, every[key][..., 1, 1])
    with pytest.raises(ValueError, match=r"i=3: '\w+' has 2 directions in x: pass i from 1 to 2"):
        compare(X, Y, i=3)
    with pytest.raises(ValueError, match=r"j=4: '\w+' has 3 directions in y: pass j from 1 to 3"):
        compare(X, Y, i=1, j=4)
    with pytest.raises(ValueError, match="subspace_similarity: i=0: expected at least 1"):
        compare(X, Y, i=0)
    with pytest.raises(TypeError, match="j=2 without i: pass both, or i alone"):
        compare(X, Y, j=2)


def test_table_rows_have_no_leading_directions():
    rows = lora_jax.Rows(jnp.ones((2, 3)), 1.0, "io", (0, 4), 6)
    x = Adapter({"embed": rows, "w": Factors(jnp.eye(3), jnp.eye(3), 1.0, "io")})
    assert lora_jax.analysis.subspace_similarity(x, x).keys() == {"w"}
