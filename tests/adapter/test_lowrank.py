"""Low-rank linear algebra: against updates that are built, in float64 and by NumPy alone."""

import numpy as np
import pytest

from lora_jax._adapter.lowrank import SVD, LowRank, as_matrix, joined, svd

SHAPES = [  # batch, in, rank, out
    ((), 9, 3, 7),
    ((2,), 5, 4, 8),
    ((2, 3), 6, 1, 4),
    ((), 3, 5, 6),  # a rank above the inputs,
    ((2,), 6, 5, 3),  # the outputs,
    ((), 2, 7, 3),  # and both
]
SCALES = [None, 0.5, -2.0]


def drawn(shape, scale=None, seed=0, rank=None):
    batch, inputs, own, outputs = shape
    rng, rank = np.random.default_rng(seed), rank or own
    return LowRank(
        rng.normal(size=(*batch, inputs, rank)), rng.normal(size=(*batch, rank, outputs)), scale
    )


def built(x):
    return (1 if x.scale is None else x.scale) * (x.a @ x.b)


def same(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("layout", "a", "b", "as_a", "as_b"),
    [
        ("io", (6, 2), (2, 8), (6, 2), (2, 8)),
        ("oi", (7, 3), (3, 5), (7, 3), (3, 5)),
        ("ioo", (6, 2), (2, 2, 4), (6, 2), (2, 8)),
        ("iio", (3, 4, 2), (2, 6), (12, 2), (2, 6)),
        ("obib", (5, 4, 3, 2), (5, 4, 2, 7), (5, 4, 3, 2), (5, 4, 2, 7)),
        ("biio", (0, 3, 4, 2), (0, 2, 6), (0, 12, 2), (0, 2, 6)),  # no layers
    ],
)
def test_factors_are_flattened_role_by_role(layout, a, b, as_a, as_b):
    assert as_matrix(np.zeros(a), layout, "a").shape == as_a
    assert as_matrix(np.zeros(b), layout, "b").shape == as_b


def test_flattened_axes_keep_their_order():
    x = np.arange(24.0).reshape(2, 3, 4)
    same(as_matrix(x, "bio", "a"), x)
    same(as_matrix(x, "iio", "a"), x.reshape(6, 4))
    same(as_matrix(x, "ioo", "b"), x.reshape(2, 12))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", SHAPES)
def test_one_call_gives_values_and_vectors_of_both_sides(shape, scale):
    x = drawn(shape, scale)
    k = min(shape[1:])
    u, s, vt = x.svd()
    same(s[..., :k], np.linalg.svd(built(x), compute_uv=False)[..., :k])
    same(u[..., :k] * s[..., None, :k] @ vt[..., :k, :], built(x))
    for vectors in (u[..., :k], vt[..., :k, :].mT):
        same(vectors.mT @ vectors, np.broadcast_to(np.eye(k), (*shape[0], k, k)))
    first = x.svd(1)
    same(first.s, s[..., :1])
    same(first.u, u[..., :1])
    same(first.vt, vt[..., :1, :])


def test_a_side_that_nobody_asks_for_is_none():
    x = drawn(SHAPES[1])
    whole, left, right, none = (
        x.svd(2, left=left, right=right)
        for left, right in ((True, True), (True, False), (False, True), (False, False))
    )
    for found in (left, right, none):
        same(found.s, whole.s)
    same(left.u, whole.u)
    same(right.vt, whole.vt)
    assert left.vt is right.u is none.u is none.vt is None


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", SHAPES)
def test_norms_inner_products_and_sums_are_those_of_the_products(shape, scale):
    x, y = drawn(shape, scale), drawn(shape, 3.0, seed=1, rank=2)
    same(x.norm(), np.linalg.norm(built(x)))
    same(x.squared_norm(), (built(x) ** 2).sum())
    same(x.inner(y), (built(x) * built(y)).sum())
    same(y.inner(x), (built(x) * built(y)).sum())
    same(built(joined([x, y, x])), 2 * built(x) + built(y))
    same(built(y - x), built(y) - built(x))
    assert (y - x).rank == 2 + x.rank
    assert (x - x).norm() < 1e-12 * x.norm()
    same(built(x.folded()), built(x))
    assert x.folded().scale is None
    one, other = (np.einsum("...ni,...im->...inm", z.a, z.folded().b) for z in (x, y))
    same(x.overlaps(y), np.einsum("...inm,...jnm->...ij", one, other))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_b_become_orthonormal(shape, scale):
    x = drawn(shape, scale)
    flat = x.orthonormal()
    same(built(flat), built(x))
    same(flat.b @ flat.b.mT, np.broadcast_to(np.eye(flat.rank), (*shape[0], flat.rank, flat.rank)))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", SHAPES)
def test_truncation_is_the_nearest_product_and_keeps_the_scale(shape, scale):
    x, rank = drawn(shape, scale), min(2, *shape[1:])
    small = x.truncated(rank)
    assert small.rank == rank
    assert small.scale is x.scale
    s = np.linalg.svd(built(x), compute_uv=False)
    same(np.linalg.norm(built(x) - built(small)), np.sqrt((s[..., rank:] ** 2).sum()))
    same(small.a.mT @ small.a, small.b @ small.b.mT)  # split evenly


def test_truncation_at_scale_zero_keeps_the_factors_apart_from_it():
    x = drawn(SHAPES[0])
    same(x._replace(scale=0.0).truncated(2).a, x.truncated(2).a)


@pytest.mark.parametrize("scale", [None, 4.0])
def test_balanced_factors_have_the_product_of_the_decomposition(scale):
    w = np.random.default_rng(0).normal(size=(2, 5, 4))
    parts = svd(w)
    a, b = parts.balanced(scale)
    same(built(LowRank(a, b, scale)), w)
    same(a.mT @ a, b @ b.mT)
    a, b = svd(w, 3).balanced(scale)
    assert (a.shape, b.shape) == ((2, 5, 3), (2, 3, 4))


@pytest.mark.parametrize(
    ("energy", "rank"), [(0.1, 1), (0.25, 1), (0.26, 2), (0.75, 3), (0.76, 4), (1.0, 4)]
)
def test_the_rank_of_an_energy_is_the_largest_of_all_layers(energy, rank):
    s = np.array([[1.0, 1, 1, 1], [5, 0, 0, 0], [0, 0, 0, 0]])
    parts = SVD(np.zeros((3, 5, 4)), s, np.zeros((3, 4, 6)))
    assert parts.rank_of(energy) == rank
    assert parts.truncated(energy=energy).s.shape == (3, rank)
    assert parts.truncated(1, energy).s.shape == (3, 1)  # a rank that is given comes first
    assert parts.truncated() is parts
