"""Adapters at other ranks: against the truncated SVD in float64, and without ``a b``."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    CASES,
    all_eqns,
    assert_close,
    dict_case,
    drawn,
    normal,
    randomize_b,
    scan_case,
    tolerance,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_jax


def one(layout, shape, rank, seed=0, dtype=jnp.float32, scale=0.7):
    """A random adapter of one weight."""
    rng = np.random.default_rng(seed)
    sizes = {role: [n for n, x in zip(shape, layout, strict=True) if x == role] for role in "bio"}
    a = rng.normal(size=(*sizes["b"], *sizes["i"], rank))
    b = rng.normal(size=(*sizes["b"], rank, *sizes["o"]))
    a, b = jax.device_put((a.astype(dtype), b.astype(dtype)))
    return lora_jax.Adapter({"w": lora_jax.Factors(a, b, jnp.float32(scale), layout)})


def product(adapter):
    """``a b`` as ``[batch, in, out]`` in float64."""
    f, n = adapter.factors["w"], adapter.factors["w"].layout.count("b")
    a, b = np.asarray(f.a, np.float64), np.asarray(f.b, np.float64)
    count = math.prod(a.shape[:n])
    return a.reshape(count, -1, f.rank) @ b.reshape(count, f.rank, -1)


@settings(max_examples=12)
@given(
    layout=st.sampled_from(["io", "oi", "ioo", "iio", "bio", "bbio", "oib", "iiio"]),
    sizes=st.lists(st.integers(2, 5), min_size=4, max_size=4),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_shrinking_is_the_nearest_matrix_of_that_rank_and_growing_the_same_one(
    layout, sizes, seed, data
):
    shape = sizes[: len(layout)]
    limit = min(
        math.prod(n for n, x in zip(shape, layout, strict=True) if x == role) for role in "io"
    )
    rank = data.draw(st.integers(1, 7))  # perhaps more than the weight's
    new = data.draw(st.integers(1, limit))
    adapter = one(layout, shape, rank, seed)
    small = jax.jit(lambda x: lora_jax.algebra.resize(x, new))(
        adapter
    )  # eager: a program an operation
    f = small.factors["w"]
    assert f.rank == new
    assert f.scale == adapter.factors["w"].scale
    before, after = product(adapter), product(small)
    s = np.linalg.svd(before, compute_uv=False)
    missing = np.linalg.norm((before - after).reshape(len(s), -1), axis=-1)
    expected = np.sqrt((s[:, new:] ** 2).sum(-1)) if new < rank else 0 * missing
    # two QRs, their product, its SVD, two products; a side of a weight has at most 5³ entries
    allowed = tolerance(length=125, depth=6) * s.max()
    np.testing.assert_allclose(missing, expected, atol=allowed)
    if new < rank:  # the singular values are split evenly
        a = np.asarray(f.a, np.float64).reshape(len(s), -1, new)
        b = np.asarray(f.b, np.float64).reshape(len(s), new, -1)
        for gram in (a.mT @ a, b @ b.mT):
            expected = np.zeros_like(gram)
            count = min(new, s.shape[-1])
            for k in range(count):
                expected[:, k, k] = s[:, k]
            np.testing.assert_allclose(gram, expected, atol=allowed)


def test_growing_keeps_what_it_has():
    case = dict_case()
    lora_params = case.lorafy(3)
    apply = jax.jit(lora_jax.lora(case.fn))
    expected = apply(lora_params, case.x)
    for key in (None, jax.random.key(3)):
        large = lora_jax.algebra.resize(lora_params, 5, key=key)
        assert large.base is lora_params.base
        assert_close(apply(large, case.x), expected)
        for path, f in large.adapter.factors.items():
            assert f.scale is lora_params.adapter.factors[path].scale
            check_grown(f, lora_params.adapter.factors[path], is_drawn=key is not None)


def check_grown(f, old, is_drawn):
    """Every bit of an update stays, and new columns of ``a`` are drawn, or zero; ``b`` is zero."""
    n = f.layout.count("b")
    a, b, old_b = np.asarray(f.a), *(np.moveaxis(np.asarray(x.b), n, 0) for x in (f, old))
    assert f.rank == 5
    np.testing.assert_array_equal(a[..., :3], old.a)
    np.testing.assert_array_equal(b[:3], old_b)
    assert not b[3:].any()
    assert bool(a[..., 3:].any()) == is_drawn


FEW = {  # one weight of each layout: growing draws for each, which compiles
    "linen scan+remat": [".*query/kernel", ".*out/kernel", "layers/Dense_0/kernel", "Dense_0.*"],
    "nnx einsum": ["blocks/0/(q_proj|o_proj|down)/kernel"],
    "nnx dropout+batchnorm": "all-linear",
    "plain dict": "all-linear",
}


@pytest.mark.parametrize("name", CASES)
def test_growing_leaves_every_bit_of_the_update_and_with_a_key_it_trains(name):
    case = CASES[name]()
    lora_params = case.lorafy(3, targets=FEW[name])
    apply = lora_jax.lora(case.fn)

    @jax.jit
    @functools.partial(lora_jax.value_and_grad, has_aux=True)
    def slopes(lora_params, x):
        outputs = apply(lora_params, x)
        return jnp.sum(first(outputs) ** 2), outputs

    @jax.jit
    def grow(lora_params):
        return [
            lora_jax.algebra.resize(lora_params, 5, key=key) for key in (None, jax.random.key(3))
        ]

    expected = None
    for large, is_drawn in zip(grow(lora_params), (False, True), strict=True):
        (_, outputs), grads = jax.tree.map(np.asarray, slopes(large, case.x))
        expected = outputs if expected is None else expected
        assert_close(outputs, expected, depth=26)  # at most three layers of eight sums
        for path, f in large.adapter.factors.items():
            check_grown(f, lora_params.adapter.factors[path], is_drawn)
            assert f.scale == lora_params.adapter.factors[path].scale
            grad = grads.factors[path]
            new = np.moveaxis(grad.b, f.layout.count("b"), 0)[3:]
            assert bool(new.any()) == is_drawn
            assert not grad.a[..., 3:].any()


def first(outputs):
    return outputs[0] if isinstance(outputs, tuple) else outputs


def test_new_columns_are_drawn_as_lorafy_draws():
    params = {"w": jnp.zeros((400, 300)), "embedding": jnp.zeros((300, 200))}
    lora_params = lora_jax.lorafy(params, 1, targets=".*", layout={".*": "io"}, init=drawn)
    large = lora_jax.algebra.resize(lora_params, 101, key=jax.random.key(0))
    w, table = (np.asarray(large.adapter.factors[x].a)[:, 1:] for x in ("w", "embedding"))
    np.testing.assert_allclose(w.std(), 1 / 20, rtol=0.02)
    np.testing.assert_allclose(table.std(), 1, rtol=0.02)
    fresh = lora_jax.lorafy(params, 100, targets=".*", layout={".*": "io"})
    np.testing.assert_array_equal(w, fresh.adapter.factors["w"].a)  # of the same key
    np.testing.assert_array_equal(table, fresh.adapter.factors["embedding"].a)


@pytest.mark.parametrize("make", [dict_case, scan_case])
def test_a_small_adapter_hidden_in_a_large_one_is_found(make):
    case = make()
    lora_params = case.lorafy(2)
    mix = np.linalg.qr(np.random.default_rng(1).standard_normal((5, 5)))[0]

    def hidden(f):
        """The factors beside columns that are zero in one of the two, mixed; in float64."""
        n, rng = f.layout.count("b"), np.random.default_rng(2)
        a, b = np.asarray(f.a, np.float64), np.moveaxis(np.asarray(f.b, np.float64), n, 0)
        a = np.concatenate([a, rng.standard_normal((*a.shape[:-1], 3))], -1)
        b = np.concatenate([b, np.zeros((3, *b.shape[1:]))])
        a, b = np.tensordot(a, mix.T, 1), np.moveaxis(np.tensordot(mix, b, 1), 0, n)
        return dataclasses.replace(f, a=a.astype(np.float32), b=b.astype(np.float32))

    adapter = lora_params.adapter
    large = lora_jax.Adapter({path: hidden(f) for path, f in adapter.factors.items()})

    @jax.jit
    def both(large, lora_params):
        small = dataclasses.replace(lora_params, adapter=lora_jax.algebra.resize(large, 2))
        return lora_jax.merge(small), lora_jax.merge(lora_params)

    assert_close(*both(large, lora_params))


def test_no_array_of_the_weights_shape_is_built():
    adapter = one("bio", (3, 64, 48), 6)
    jaxpr = jax.make_jaxpr(lambda x: lora_jax.algebra.resize(x, 4))(adapter)
    sizes = [v.aval.size for eqn in all_eqns(jaxpr) for v in eqn.outvars if hasattr(v.aval, "size")]
    assert max(sizes) == 3 * 64 * 6
    dots = [e for e in all_eqns(jaxpr) if e.primitive.name == "dot_general"]
    assert len(dots) >= 3
    assert all(str(e.params["precision"]).count("HIGHEST") == 2 for e in dots)


def test_low_precision_factors_are_truncated_in_float32():
    adapter = one("io", (40, 30), 6, dtype=jnp.bfloat16)
    f = lora_jax.algebra.resize(adapter, 4).factors["w"]
    assert f.a.dtype == f.b.dtype == jnp.bfloat16
    wide = jax.device_put(jax.tree.map(lambda x: np.asarray(x, np.float32), adapter))
    expected = lora_jax.algebra.resize(wide, 4).factors["w"]
    np.testing.assert_array_equal(f.a, np.asarray(expected.a).astype(jnp.bfloat16))
    np.testing.assert_array_equal(f.b, np.asarray(expected.b).astype(jnp.bfloat16))


def test_factors_of_different_dtypes_keep_theirs():
    f = one("io", (8, 6), 4).factors["w"]
    mixed = dataclasses.replace(f, a=f.a.astype(jnp.bfloat16))
    small = lora_jax.algebra.resize(lora_jax.Adapter({"w": mixed}), 2).factors["w"]
    assert (small.a.dtype, small.b.dtype) == (jnp.bfloat16, jnp.float32)


def test_what_else_an_adapter_has_stays():
    table = {"embedding": jnp.ones((9, 6)), "q": normal(0, (6, 6))}
    lora_params = randomize_b(
        lora_jax.lorafy(
            table,
            4,
            targets="q",
            rows={"embedding": [1, 3, 7]},
            dora=True,
            freeze=("a",),
            init=drawn,
        )
    )
    small = lora_jax.algebra.resize(lora_params, 2)
    f, old = small.adapter.factors["q"], lora_params.adapter.factors["q"]
    assert (f.magnitude, f.norm, f.frozen) == (old.magnitude, old.norm, ("a",))
    assert (f.rank, f.layout) == (2, "io")
    name = "embedding"
    assert small.adapter.factors[name] is lora_params.adapter.factors[name]
    assert lora_jax.algebra.resize(lora_params, 4).adapter.factors["q"] is old
    full = lora_jax.lorafy(table, 2, targets="q", full="embedding", init="pissa")
    small = lora_jax.algebra.resize(full, 1)
    assert small.adapter.full["embedding"] is full.adapter.full["embedding"]
    assert small.adapter.factors["q"].residual


def test_ranks_go_by_pattern():
    case = dict_case()
    small = jax.jit(lambda x: lora_jax.algebra.resize(x, {"w1": 2, ".*": 3}))(case.lorafy(4))
    assert {path: f.rank for path, f in small.adapter.factors.items()} == {
        "w1": 2,
        "layers/0/w2": 3,
    }
    parts = {"w": jnp.ones((6, 8))}
    lora_params = lora_jax.lorafy(parts, 3, targets=["w[:, 0:4]", "w[:, 4:8]"], init=drawn)
    small = lora_jax.algebra.resize(lora_params.adapter, {"w": 2})
    assert [f.rank for f in small.factors.values()] == [2, 2]


def test_misuse_is_explained():
    lora_params = dict_case().lorafy(4)

    def refused(error, message, rank=2, x=lora_params, **options):
        with pytest.raises(error, match=message):
            lora_jax.algebra.resize(x, rank, **options)

    refused(TypeError, r"resize: adapter is dict, expected a LoraParams", x={})
    refused(TypeError, r"resize: rank=2\.0 for 'layers/0/w2': expected an int", 2.0)
    refused(TypeError, r"resize: rank=True for 'layers/0/w2'", True)
    for rank in (0, 17):
        refused(
            ValueError,
            rf"rank={rank} for 'layers/0/w2' of shape \(40, 16\).*= 16",
            {"w1": 2, ".*": rank},
        )
    refused(ValueError, r"no pattern of the mapping matches 'layers/0/w2'", {"w1": 2})
    refused(ValueError, r"rank=\{'x': \.\.\.\} matches none", {"x": 2, ".*": 1})
    many = lora_jax.many.stack([lora_params])
    refused(ValueError, r"resize: adapter is a stack: .*unstack", x=many)
    refused(ValueError, r"resize: adapter is a stack: .*unstack", x=many.adapter)
    refused(TypeError, r"lora_jax\.combine", x=lora_jax.split(lora_params)[0])
    f = lora_params.adapter.factors["w1"]
    a = np.array(f.a)
    a[0, 0] = np.inf
    bad = lora_jax.Adapter({"w1": dataclasses.replace(f, a=jax.device_put(a))})
    refused(ValueError, r"resize: adapter has NaNs or infinities in a of 'w1'", x=bad)
