"""Arithmetic of adapters, TIES, DARE and pruning: against dense updates in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import BASE, LAYOUT, SHAPES, dense, split
from helpers import all_eqns, assert_close, tolerance
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_jax
from lora_jax import Adapter, LoraParams
from lora_jax.algebra._entries import Rule, of_factors


def assert_updates(actual, expected, times=1):
    """The updates of an adapter are those; where it has none, they are zero.

    Roundings count beside 1 at least, as terms of that size may cancel; ``times`` as much where
    something magnifies them, as singular vectors do by the gaps between singular values.
    """
    actual = dense(actual)
    assert actual.keys() <= expected.keys()
    for key, e in expected.items():
        gap = np.abs(actual.get(key, 0.0) - e).max()
        assert gap <= times * tolerance() * (np.abs(e).max() + 1), (key, gap)


def weighted(*pairs):
    """``sum_k c_k dW_k``."""
    total = {}
    for c, x in pairs:
        for key, d in dense(x).items():
            total[key] = total.get(key, 0.0) + c * d
    return total


# Ranks, scales and targets of their own; rsLoRA's scale is alpha / sqrt(rank).
X = split(1, 2, targets=[name for name in SHAPES if name != "conv"], alpha=4)
Y = split(2, 3, targets=[name for name in SHAPES if name != "one"], alpha=5, rslora=True)
Z = split(3, {"dense": 1, ".*": 2}, alpha={"dense": 0.5, ".*": 7})


def test_sums_are_sums_of_updates():
    x, y, z = X.adapter, Y.adapter, Z.adapter
    result = 0.7 * x + 0.3 * y - z
    assert_updates(result, weighted((0.7, X), (0.3, Y), (-1, Z)))
    ranks = {key: f.rank for key, f in result.factors.items()}
    assert ranks == dict.fromkeys(SHAPES, 7) | {"dense": 6, "conv": 5, "one": 4}
    assert all(f.scale.shape == () and f.layout == LAYOUT[key] for key, f in result.factors.items())


def test_merged_sums_are_merges_of_sums():
    merged = lora_jax.merge(X - 2 * Y)
    expected = weighted((1, X), (-2, Y))
    for key, d in expected.items():
        want = np.asarray(BASE[key], np.float64) + d
        assert_close(merged[key], want)


@pytest.mark.parametrize("number", [0.5, -3, np.float32(1.5), np.int64(2), jnp.float32(0.1), True])
def test_numbers_go_into_the_scale(number):
    for result in (number * X.adapter, X.adapter * number):
        assert_updates(result, weighted((float(number), X)))
        for key, f in result.factors.items():
            assert f.a is X.adapter.factors[key].a
            assert f.b is X.adapter.factors[key].b
            assert f.scale.shape == ()
    assert_updates(X.adapter / 4, weighted((0.25, X)))


def test_negation_is_undone_exactly():
    negative = -X.adapter
    back = -negative
    for key, f in X.adapter.factors.items():
        assert negative.factors[key].scale == -f.scale
        assert back.factors[key].scale == f.scale
        assert back.factors[key].b is f.b


def test_sum_starts_from_nothing():
    assert_updates(sum([X.adapter, Y.adapter, Z.adapter]), weighted((1, X), (1, Y), (1, Z)))
    assert_updates(sum([X, Y]), weighted((1, X), (1, Y)))
    assert X.adapter + 0 is X.adapter
    assert_updates(X.adapter - 0, weighted((1, X)))


def test_what_only_one_adapts_keeps_its_arrays():
    result = X.adapter + Y.adapter
    assert result.factors["conv"] is Y.adapter.factors["conv"]
    assert result.factors["one"] is X.adapter.factors["one"]


numbers = st.floats(-3, 3, width=32)


@settings(max_examples=8)
@given(numbers, numbers)
def test_the_algebra_holds(c, d):
    x, y, z = X.adapter, Y.adapter, Z.adapter
    assert_updates((x + y) - y, dense(x) | {"conv": np.zeros(SHAPES["conv"][0])})
    assert_updates(c * (x + y), weighted((c, x), (c, y)))
    assert_updates(c * x + c * y, weighted((c, x), (c, y)))
    assert_updates((c + d) * x, weighted((c, x), (d, x)))
    assert_updates(c * (d * x), weighted((c * d, x)))
    assert_updates((x + y) + z, dense(x + (y + z)))
    assert_updates(y + x, dense(x + y))


def test_sums_work_under_jit_and_grad():
    x, y = X.adapter, Y.adapter
    result = jax.jit(lambda x, y, c: c * x - y / 2)(x, y, jnp.float32(0.3))
    assert_updates(result, weighted((0.3, X), (-0.5, Y)))

    def loss(c):
        merged = lora_jax.merge(LoraParams(BASE, c[0] * x + c[1] * y))
        return merged["dense"].sum()

    slopes = jax.jit(jax.grad(loss))(np.array([0.2, 0.4], np.float32))
    assert_sums(slopes, [dense(X)["dense"], dense(Y)["dense"]])


def assert_sums(actual, terms):
    """Sums in which much may cancel, to the rounding of their terms."""
    for found, each in zip(np.asarray(actual), terms, strict=True):
        assert abs(found - each.sum()) <= tolerance() * np.abs(each).sum()


@pytest.mark.parametrize("freeze", [(), ("a",), ("b",)])
def test_numbers_have_gradients_wherever_their_weights_are(freeze):
    x = split(1, targets=["dense", "one"], freeze=freeze).adapter
    y = split(2, 3, targets=["one", "conv"], freeze=freeze).adapter
    ways = {
        "lora": lora_jax.lora(
            lambda p: (jnp.ones((1, 6)) @ p["dense"]).sum() + (jnp.ones((1, 4)) @ p["one"]).sum()
        ),
        "merge": lambda p: sum(lora_jax.merge(p)[k].sum() for k in ("dense", "one", "conv")),
    }
    for how, fn in ways.items():
        loss = lambda c, fn=fn: fn(LoraParams(BASE, c[0] * x + c[1] * y / 2))  # noqa: E731
        slopes = jax.jit(jax.grad(loss))(np.array([0.2, 0.0], np.float32))
        keys = ("dense", "one") if how == "lora" else ("dense", "one", "conv")
        terms = [
            np.concatenate([dense(z)[k].ravel() for k in keys if k in z.factors]) for z in (x, y)
        ]
        assert_sums(slopes, [terms[0], terms[1] / 2])


def test_numbers_of_any_kind():
    x = split(1, targets=["dense"], alpha=1).adapter
    for third in (3, 3.0, np.float16(3), jnp.bfloat16(3), jnp.int32(3), np.int8(3)):
        assert_updates(x / third, weighted((1 / 3, x)))
    for i in (1j, np.complex64(1j), jnp.complex64(1j)):
        for wrong in (lambda i=i: i * x, lambda i=i: x * i, lambda i=i: x / i):
            with pytest.raises(TypeError):
                wrong()
    for scale in (2, np.int32(2), jnp.int32(2)):
        f = dataclasses.replace(x.factors["dense"], scale=scale)
        y = Adapter({"dense": f})
        assert_updates(0.5 * y, weighted((0.5, y)))


def test_a_share_is_any_number_and_dare_wants_a_key():
    x = split(1, targets=["dense"]).adapter
    found = [lora_jax.algebra.prune(x, density=d, rank=2)[0] for d in (0.5, jnp.float32(0.5))]
    assert_updates(found[1], dense(found[0]), 0)
    with pytest.raises(TypeError, match="prune: density is traced"):
        jax.jit(lambda d: lora_jax.algebra.prune(x, density=d, rank=2)[0])(0.5)
    with pytest.raises(TypeError, match="dare: key=None: expected a PRNG key"):
        lora_jax.algebra.dare([x], density=0.5, rank=2, key=None)  # pyright: ignore


def spoilt(x):
    x = np.array(x)
    x[(0,) * x.ndim] = np.nan
    return jax.device_put(x)


@pytest.mark.parametrize("method", [lora_jax.algebra.ties, lora_jax.algebra.prune])
def test_what_is_not_finite_is_refused_or_stays_so(method):
    x, y = (split(k, targets=["dense"]).adapter for k in (1, 2))
    bad = jax.tree.map(spoilt, x)
    with pytest.raises(ValueError, match=r"operand 1 has NaNs or infinities in a of 'dense'"):
        method([y, bad], density=0.5, rank=2)
    found = jax.jit(lambda *xs: method(list(xs), density=0.5, rank=2)[0])(y, bad)
    assert np.isnan(lora_jax.merge(LoraParams(BASE, found))["dense"]).all()


def test_narrow_factors_add_up_in_float32():
    x = split(1, targets=["dense"], dtype=jnp.bfloat16)
    y = split(2, 3, targets=["dense"], alpha=5)
    for result, pairs in (
        (x.adapter + x.adapter, ((2, x),)),
        (x.adapter + y.adapter, ((1, x), (1, y))),
    ):
        f = result.factors["dense"]
        assert f.a.dtype == f.b.dtype == jnp.float32
        assert_updates(result, weighted(*pairs))


def test_no_array_of_the_weight_is_formed():
    base = {"w": jnp.zeros((30, 40))}
    x, y = split(1, 2, base, ["w"], layout=None), split(2, 3, base, ["w"], layout=None)

    def everything(x, y):
        z = 0.5 * x - y
        return (
            z,
            lora_jax.algebra.linear_in_factors([x, x]),
            lora_jax.analysis.similarity([x, y, z]),
            lora_jax.analysis.distance(x, y),
        )

    sizes = [
        out.aval.size
        for eqn in all_eqns(jax.make_jaxpr(everything)(x.adapter, y.adapter))
        for out in eqn.outvars
    ]
    assert max(sizes) < 30 * 40


def test_leaves_trained_whole_add_up_as_differences():
    x = split(1, full=["bias", "norm"])
    y = split(2, full="bias")
    result = 0.5 * x - 3 * y
    assert result.base is BASE
    assert_updates(result, weighted((0.5, x), (-3, y)))
    assert result.adapter.full["norm"].dtype == jnp.float32
    assert (x + Y).adapter.full["bias"] is x.adapter.full["bias"]
    assert (Y + x).adapter.full["bias"] is x.adapter.full["bias"]
    assert np.array_equal((1 * x).adapter.full["bias"], x.adapter.full["bias"])


def test_parts_of_weights_add_up():
    base = {"w": jnp.zeros((6, 8)), "table": jnp.zeros((9, 4))}
    left = split(1, 2, base, ["w[:, 0:3]"], layout=None)
    right = split(2, 3, base, ["w[:, 3:8]"], layout=None)
    result = left + 2 * right
    assert list(result.adapter.factors) == ["w[:, 0:3]", "w[:, 3:8]"]
    assert_updates(result, weighted((1, left), (2, right)))
    assert_updates(left + left, weighted((2, left)))
    overlapping = split(3, 2, base, ["w[:, 2:5]"], layout=None)
    whole = split(3, 2, base, ["w"], layout=None)
    for other in (overlapping, whole):
        for x, y in ((left, other), (left.adapter, other.adapter), (other.adapter, left.adapter)):
            with pytest.raises(ValueError, match=r"x \+ y: .* 'w.*' and .* 'w.*overlap.*extract"):
                x + y


def test_rows_of_tables_stay_rows():
    base = {"embedding": jnp.zeros((9, 4))}

    def rows(seed, *ids):
        return split(seed, base=base, targets=[], layout=None, rows={"embedding": ids})

    x, y = rows(1, 2, 5), rows(2, 2, 5)
    for result, c, d in (
        (x - 3 * y, 1, -3),
        (lora_jax.algebra.linear_in_factors([x, y], [0.2, 2]), 0.2, 2),
        (lora_jax.algebra.prune([x, y], density=1.0, rank=1)[0], 1, 1),
    ):
        f = result.adapter.factors["embedding"]
        assert f.rank == 2
        assert f.ids == (2, 5)
        assert_updates(result, weighted((c, x), (d, y)))
    with pytest.raises(
        ValueError,
        match=r"rows \[2, 6\] of 'embedding', and adapters of one table must train the same rows",
    ):
        x + rows(3, 2, 6)


def test_frozen_is_what_is_frozen_in_both():
    x, y = split(1, freeze=("a",)), split(2, freeze=("a",))
    assert (x + y).adapter.factors["dense"].frozen == ("a",)
    assert (x + Y).adapter.factors["dense"].frozen == ()
    assert (-x).adapter.factors["dense"].frozen == ("a",)


def test_linear_in_factors_is_what_it_says():
    x, y = split(1, 2, alpha=4), split(2, 2, alpha=6)
    mean = jax.jit(lambda x, y: lora_jax.algebra.linear_in_factors([x, -1 * y, x], [0.5, 2, -3]))
    result = mean(x.adapter, y.adapter)
    for key, f in result.factors.items():
        fs = [x.adapter.factors[key], y.adapter.factors[key]]
        roots = [np.sqrt(float(f.scale)) for f in fs]
        (a, b), (c, d) = ([np.asarray(y, np.float64) for y in (f.a, f.b)] for f in fs)
        assert_close(f.a, -2.5 * roots[0] * a + 2 * roots[1] * c)
        assert_close(f.b, -2.5 * roots[0] * b - 2 * roots[1] * d)
        assert f.scale == 1


def test_linear_in_factors_is_a_mean_of_one_and_of_shared_a():
    x = split(1, 2, alpha=4)
    assert_updates(lora_jax.algebra.linear_in_factors([x, x, x]), weighted((1, x)))
    factors = {
        key: dataclasses.replace(f, b=jax.device_put(np.float32(-2) * np.asarray(f.b)))
        for key, f in x.adapter.factors.items()
    }
    y = LoraParams(BASE, Adapter(factors))
    assert_updates(
        lora_jax.algebra.linear_in_factors([x, y], [0.3, 0.7]), weighted((0.3, x), (0.7, y))
    )


def test_linear_in_factors_of_leaves_trained_whole():
    x, y = split(1, full="bias"), split(2, targets=["dense"])
    result = lora_jax.algebra.linear_in_factors([x, y])
    gap = np.asarray(x.adapter.full["bias"]) - np.asarray(BASE["bias"])
    expected = np.asarray(BASE["bias"]) + gap / 2
    assert_close(np.asarray(result.adapter.full["bias"]), expected)


# --- TIES, DARE, pruning -----------------------------------------------------------------------


# Fewer shapes: of each, a program is compiled.
FEW = ("dense", "stack", "experts")


def only(x, *names):
    """The adapter of these weights alone."""
    return LoraParams(BASE, Adapter({key: x.adapter.factors[key] for key in names}))


P, Q, R = only(X, *FEW), only(Y, *FEW[:2]), only(Z, *FEW[1:])


def layers(d, letters):
    """``[layers, entries]``."""
    axes = [i for i, c in enumerate(letters) if c == "b"]
    d = np.moveaxis(d, axes, range(len(axes)))
    return d.reshape(int(np.prod(d.shape[: len(axes)])), -1), d.shape, axes


def unlayered(x, shape, axes):
    return np.moveaxis(x.reshape(shape), range(len(axes)), axes)


def trimmed(d, letters, density):
    flat, shape, axes = layers(d, letters)
    kept = max(1, round(density * flat.shape[-1]))
    least = np.sort(np.abs(flat), -1)[:, -kept, None]
    return unlayered(np.where(np.abs(flat) >= least, flat, 0), shape, axes)


def elected(ds):
    sign = np.sign(sum(ds))
    agree = [(np.sign(d) == sign) & (d != 0) for d in ds]
    return sum(d * k for d, k in zip(ds, agree, strict=True)) / np.maximum(sum(agree), 1)


def letters_of(key):
    return LAYOUT.get(key, "io")


def oracle(xs, density, elect):
    found = {}
    for key in dict.fromkeys(key for x in xs for key in dense(x)):
        ds = [trimmed(dense(x)[key], letters_of(key), density) for x in xs if key in dense(x)]
        found[key] = elected(ds) if elect else sum(ds)
    return found


def best(d, letters, rank):
    """The best update of a rank, in float64, and what it misses of it all."""
    batch, inputs, outputs = ([i for i, c in enumerate(letters) if c == r] for r in "bio")
    order = [*batch, *inputs, *outputs]
    moved = d.transpose(order)
    ins = int(np.prod([d.shape[i] for i in inputs]))
    layers = int(np.prod([d.shape[i] for i in batch], initial=1))
    u, s, vt = np.linalg.svd(moved.reshape(layers, ins, -1), full_matrices=False)
    low = (u[..., :rank] * s[:, None, :rank]) @ vt[:, :rank]
    error = np.sqrt((s[:, rank:] ** 2).sum() / (s**2).sum())
    return low.reshape(moved.shape).transpose(np.argsort(order)), error


@pytest.mark.parametrize("density", [0.2, pytest.param(0.6, marks=pytest.mark.long), 1.0])
@pytest.mark.parametrize("verb", ["ties", "prune"])
def test_ties_and_pruning_are_exact_at_full_rank(verb, density):
    xs = [P.adapter, -2 * Q.adapter, R.adapter / 3]
    result, error = getattr(lora_jax.algebra, verb)(xs, density=density, rank=None)
    assert_updates(result, oracle(xs, density, verb == "ties"))
    assert error.keys() == result.factors.keys()
    assert not any(error.values())


@pytest.mark.parametrize(
    ("rank", "niter"),
    [
        (1, None),
        pytest.param(1, 6, marks=pytest.mark.long),
        pytest.param(3, None, marks=pytest.mark.long),
        (3, 6),
    ],
)
def test_the_factors_are_the_best_of_their_rank(rank, niter):
    xs = [P, 0.5 * Q, R]
    result, error = lora_jax.algebra.ties(xs, density=0.4, rank=rank, niter=niter)
    assert isinstance(result, LoraParams)
    exact = oracle(xs, 0.4, True)
    want = {key: best(d, letters_of(key), rank) for key, d in exact.items()}
    assert_updates(result, {key: low for key, (low, _) in want.items()}, 100 if niter else 10)
    for key, (_, missed) in want.items():
        assert float(error[key]) == pytest.approx(missed, abs=10 * tolerance())
        f = result.adapter.factors[key]
        assert f.rank == rank
        assert f.scale == 1
    assert max(map(float, error.values())) > 0.1


def test_a_rank_above_the_weights_is_the_weights():
    x = only(P, "dense", "stack")
    result, error = lora_jax.algebra.prune(x.adapter, density=0.5, rank=100)
    assert_updates(result, oracle([x], 0.5, False))
    assert result.factors["dense"].rank == 6
    assert max(map(float, error.values())) < 10 * tolerance()


def test_leaves_trained_whole_go_through_ties():
    x, y = (
        split(1, targets=["dense"], full="bias"),
        split(2, targets=["dense"], full=["bias", "norm"]),
    )
    result, error = lora_jax.algebra.ties([x, -1 * y], density=0.5, rank=2)
    exact = oracle([x, -1 * y], 0.5, True)
    got = dense(result)
    for path in ("bias", "norm"):
        # in bfloat16 a leaf is as exact as that
        dtype, largest = BASE[path].dtype, np.abs(exact[path]).max() + 1
        allowed = tolerance(jnp.float32 if path == "bias" else dtype, length=4)
        np.testing.assert_allclose(got[path], exact[path], atol=allowed * largest)
        assert path not in error


def test_ties_is_odd_and_cancels_to_zero():
    xs = [P.adapter, -2 * Q.adapter, R.adapter / 3]  # programs of the tests above
    options = {"density": 0.2, "rank": None}
    there, back = (lora_jax.algebra.ties(ys, **options)[0] for ys in (xs, [-x for x in xs]))
    assert_updates(back, weighted((-1, there)))
    x = only(P, "dense", "stack").adapter
    assert not any(d.any() for d in dense(lora_jax.algebra.ties([x, -x], **options)[0]).values())


def test_dare_drops_and_enlarges():
    key = jax.random.key(5)
    options = {"density": 0.4, "rank": None, "key": key}
    alone = [lora_jax.algebra.dare(x, **options)[0] for x in (P.adapter, R.adapter)]
    share = []
    for x, result in zip((P, R), alone, strict=True):
        for name, d in dense(result).items():
            whole = dense(x)[name]
            kept = d != 0
            atol = tolerance() * np.abs(whole).max() / 0.4
            np.testing.assert_allclose(d[kept], whole[kept] / 0.4, atol=atol)
            share.append(kept.reshape(-1))
    share = np.concatenate(share)
    assert abs(share.mean() - 0.4) < 4 * np.sqrt(0.24 / share.size)
    whole = dense(P)["dense"]
    large = np.abs(whole) > 0.1 * np.abs(whole).max()  # of which roundings are a small part
    twice = [only(P, "dense").adapter] * 2
    for elect in (False, True):
        both = lora_jax.algebra.dare(twice, **options, elect=elect)[0]
        again = lora_jax.algebra.dare(twice, **options, elect=elect)[0]
        assert_updates(both, dense(again), 0)
        ratios = np.unique((dense(both)["dense"][large] / whole[large]).round(3) + 0.0)
        # each has a mask of its own: none, one or both; a mean of agreeing ones is one of them
        assert list(ratios) == ([0, 2.5] if elect else [0, 2.5, 5])
    other = lora_jax.algebra.dare(P.adapter, density=0.4, rank=None, key=jax.random.key(6))[0]
    assert not np.array_equal(dense(other)["dense"] == 0, dense(alone[0])["dense"] == 0)


def test_dare_is_right_in_the_mean():
    base = {"w": jnp.zeros((4, 5))}
    x = split(1, 2, base, ["w"], layout=None)
    draw = jax.jit(
        jax.vmap(lambda k: lora_jax.algebra.dare(x.adapter, density=0.5, rank=None, key=k)[0])
    )
    found = draw(jax.random.split(jax.random.key(0), 4000)).factors["w"]
    mean = np.einsum("nir,nro->io", found.a, found.b) / 4000
    exact = dense(x)["w"]
    assert np.abs(mean - exact).max() < 5 * np.abs(exact).max() / np.sqrt(4000)


def test_layers_of_a_stack_are_drawn_apart():
    x = only(P, "stack").adapter
    found = lora_jax.algebra.dare(x, density=0.5, rank=None, key=jax.random.key(0))[0]
    masks = dense(found)["stack"] != 0
    assert not np.array_equal(masks[0], masks[1])


def test_ties_works_under_jit():
    xs = [only(x, "dense", "stack").adapter for x in (P, Q)]
    one = jax.jit(lambda xs: lora_jax.algebra.ties(xs, density=0.3, rank=2))(xs)
    other = lora_jax.algebra.ties(xs, density=0.3, rank=2)
    assert_updates(one[0], dense(other[0]), 10)
    for key, error in other[1].items():
        assert float(one[1][key]) == pytest.approx(float(error), abs=10 * tolerance())


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="memory as a CPU's XLA plans it")
@pytest.mark.parametrize(("keep", "arrays"), [("largest", 6.5), ("random", 10.5)])
def test_memory_does_not_grow_with_the_number_of_adapters(keep, arrays):
    rows, columns = 512, 1024

    def temporary(count):
        form = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
        fs = [lora_jax.Factors(form(rows, 4), form(4, columns), form(), "io")] * count
        args = (fs, jax.random.key(0), Rule(0.2, keep, "elect"), 4, 2)
        return of_factors.lower(*args).compile().memory_analysis().temp_size_in_bytes

    one = 4 * rows * columns
    few, many = temporary(2), temporary(5)
    assert few < many < arrays * one
    assert many - few < one / 4


@pytest.mark.devices(8)
@pytest.mark.parametrize("kind", [pytest.param("Auto", marks=pytest.mark.long), "Explicit"])
def test_sharded_adapters_combine(kind):
    kinds = (getattr(jax.sharding.AxisType, kind),)
    mesh = jax.make_mesh((8,), ("x",), axis_types=kinds)
    spread, everywhere = (
        jax.sharding.NamedSharding(mesh, spec)
        for spec in (jax.sharding.PartitionSpec("x"), jax.sharding.PartitionSpec())
    )
    base = {"w": jnp.zeros((16, 24)), "v": jnp.ones((16, 2))}
    there = {name: jax.device_put(x, spread) for name, x in base.items()}
    xs = [split(k, k, base, ["w"], layout=None, full="v") for k in (2, 3)]

    def placed(x):
        f = x.adapter.factors["w"]
        f = f.map(lambda name, y: jax.device_put(y, spread if name == "a" else everywhere))
        return LoraParams(there, Adapter({"w": f}, jax.device_put(x.adapter.full, spread)))

    with jax.set_mesh(mesh):
        ys = [placed(x) for x in xs]
        total = ys[0] - ys[1]
        assert total.adapter.factors["w"].a.sharding.is_equivalent_to(spread, 2)
        assert total.adapter.full["v"].sharding.is_equivalent_to(spread, 2)
        assert_updates(total, weighted((1, xs[0]), (-1, xs[1])))
        found = together(there, [y.adapter for y in ys])
        grown = found["grown"]
        merged = jax.device_put(lora_jax.merge(grown), spread)
        extracted = lora_jax.algebra.extract(
            there, merged, 2, targets="w", layout={"w": "io"}, rest="full"
        )
    gap = weighted((1, xs[0]), (-1, xs[1]))
    assert_updates(found["small"], gap | {"w": best(gap["w"], "io", 3)[0]}, 10)
    assert_updates(grown, dense(xs[0]))
    assert_updates(extracted, dense(xs[0]), 10)
    exact = oracle(xs, 0.3, True)
    exact["w"], _ = best(exact["w"], "io", 3)
    assert_updates(found["ties"], exact, 10)
    assert_updates(found["nearly"], exact, 1000)
    vectors = [np.concatenate([dense(x)[key].ravel() for key in ("w", "v")]) for x in xs]
    norms = [np.linalg.norm(x) for x in vectors]
    cosine = vectors[0] @ vectors[1] / norms[0] / norms[1]
    expected = [[1, cosine], [cosine, 1]]
    np.testing.assert_allclose(found["cosines"], expected, atol=tolerance())
    expected = np.linalg.norm(vectors[0] - vectors[1])
    np.testing.assert_allclose(found["distance"], expected, rtol=tolerance())
    sides = [np.asarray(x.adapter.factors["w"].a, np.float64) for x in xs]
    u, v = (np.linalg.svd(a, full_matrices=False)[0] for a in sides)
    common = ((u.T @ v) ** 2).cumsum(0).cumsum(1)
    expected = common / (1 + np.minimum.outer(np.arange(2), np.arange(3)))
    np.testing.assert_allclose(found["subspaces"], expected, atol=tolerance())


@jax.jit  # one program of all
def together(base, adapters):
    """What combines two adapters of ``w``, and what changes one."""
    xs = [LoraParams(base, x) for x in adapters]
    return {
        "ties": lora_jax.algebra.ties(xs, density=0.3, rank=3)[0],
        "nearly": lora_jax.algebra.ties(xs, density=0.3, rank=3, niter=6)[0],
        "cosines": lora_jax.analysis.similarity(xs),
        "distance": lora_jax.analysis.distance(*xs),
        "subspaces": lora_jax.analysis.subspace_similarity(*xs)["w"],
        "small": lora_jax.algebra.resize(xs[0] - xs[1], 3),
        "grown": lora_jax.algebra.resize(xs[0], 6, key=jax.random.key(0)),
    }


# --- bad input ---------------------------------------------------------------------------------


def test_operands_that_have_no_sum_are_explained():
    x = X.adapter

    def refused(error, message, f, *args):
        with pytest.raises(error, match=message):
            f(*args)

    plus = lambda x, y: x + y  # noqa: E731
    refused(TypeError, "unsupported operand", plus, x, 3)
    refused(TypeError, "unsupported operand", plus, x, X)
    refused(TypeError, "unsupported operand", lambda: x * x)
    refused(TypeError, "unsupported operand", lambda: x * None)
    refused(
        ValueError, r"number \* x: the number has shape \(2,\).*jax.vmap", lambda: jnp.ones(2) * x
    )
    full = split(1, full="bias")
    refused(ValueError, r"number \* x: 'bias' is a full leaf.*LoraParams", lambda: 2 * full.adapter)
    refused(ValueError, r"x \+ y: 'bias' is a full leaf", plus, x, full.adapter)
    dora = split(1, targets=["dense"], dora=True)
    refused(
        ValueError, r"'dense' has a DoRA magnitude.*lora_jax.algebra.extract", lambda: 0.5 * dora
    )
    refused(ValueError, r"x \+ y: 'dense' has a DoRA", plus, x, dora.adapter)
    pissa = lora_jax.lorafy(BASE, 2, init="pissa", targets="dense")
    refused(ValueError, r"'dense' belongs to what its init.*to_plain", plus, pissa, pissa)
    copied = split(1, base=jax.device_put(jax.tree.map(np.array, BASE)))
    refused(ValueError, r"different bases.*LoraParams\(x.base, y.adapter\)", plus, X, copied)
    refused(
        ValueError,
        r"different bases",
        plus,
        X,
        split(1, base={"dense": BASE["dense"]}, targets=["dense"], layout=None),
    )
    stacked = lora_jax.many.stack([x, x])
    refused(ValueError, r"scale of 'dense' has shape \(2,\).*unstack", plus, stacked, stacked)
    half = lora_jax.split(X)[0]
    refused(TypeError, r"\.scale is NoneType.*lora_jax.combine", lambda: 2 * half)
    other = split(1, 2, {"dense": jnp.zeros((7, 8))}, ["dense"], layout=None).adapter
    refused(
        ValueError,
        r"'dense' has shape \(6, 8\) \(layout 'io'\) in one and \(7, 8\)",
        plus,
        x,
        other,
    )
    turned = split(1, 2, BASE, ["dense"], layout={"dense": "oi"}).adapter
    refused(ValueError, r"\(layout 'io'\) in one and \(6, 8\) \(layout 'oi'\)", plus, x, turned)
    whole = split(1, targets=["dense"], full="one")
    refused(
        ValueError, r"0 trains 'one' and operand 1 all of 'one', and these overlap", plus, X, whole
    )
    means = lora_jax.algebra.linear_in_factors
    refused(ValueError, r"'dense' has the ranks \[2, 3\], expected equal", means, [x, Y.adapter])
    refused(ValueError, r"1 weights for 2 adapters", means, [x, x], [1])
    refused(ValueError, r"linear_in_factors: there are no adapters", means, [])
    refused(TypeError, r"Adapters and LoraParams together", means, [x, X])
    refused(TypeError, r"linear_in_factors: operand 0 is dict", means, [{}])


def test_arguments_out_of_range_are_explained():
    def refused(message, **options):
        with pytest.raises(ValueError, match=message):
            lora_jax.algebra.ties([X.adapter], **{"density": 0.5, "rank": 2, **options})

    refused(r"ties: density=0: expected a share", density=0)
    refused(r"density=1\.5: expected a share", density=1.5)
    refused(r"rank=0: expected None or an int from 1 on", rank=0)
    refused(r"rank=2\.0: expected None or an int", rank=2.0)
    refused(r"niter=-1: expected None or an int from 0 on", niter=-1)
    refused(r"rank=True: expected", rank=True)
    with pytest.raises(ValueError, match="dare: there are no adapters"):
        lora_jax.algebra.dare([], density=0.5, rank=2, key=jax.random.key(0))
