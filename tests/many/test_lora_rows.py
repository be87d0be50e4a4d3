"""Every row of a batch by its own adapter, against each row alone by that adapter."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import jit_rows, rows_like
from helpers import (
    CASES,
    all_eqns,
    assert_close,
    dict_case,
    drawn,
    normal,
    randomize_b,
    scan_case,
    stack_by_numpy,
    tolerance,
)
from jax import lax

import lora_jax
from lora_jax import LoraParams

IDS = (2, 0, -1, 2, 1)


def stack_of(case, ranks=(4, 2, 4), **options):
    """Adapters of these ranks, and of scales of their own."""
    made = []
    for seed, rank in enumerate(ranks):
        own = {"alpha": 3.0 + seed, "key": jax.random.key(seed), "init": drawn}
        one = lora_jax.lorafy(case.params, rank, targets=case.targets, **own, **options)
        made.append(randomize_b(one, seed + 5))
    return made


def alone(fn, adapters, x, ids):
    """Each row by itself, merged: the oracle, inside of jit."""
    weights = [*map(lora_jax.merge, adapters), adapters[0].base]  # the last is that of id -1
    each = jax.tree.map(lambda *xs: jnp.stack([xs[k] for k in ids]), *weights)
    found = jax.vmap(lambda p, row: fn(p, row[None]))(each, x)
    return jax.tree.map(lambda y: y[:, 0], found)


def both_ways(fn, adapters, x, ids, exact=None):
    """Rows of a stack, and the oracle, by one program."""

    @jax.jit
    def both(stacked, adapters, x, which):
        found = lora_jax.many.lora_rows(fn)(stacked, x, lora_ids=which)
        return found, alone(fn, adapters, x, ids)

    return both(stack_by_numpy(adapters), exact or adapters, x, np.array(ids, np.int32))


@pytest.mark.parametrize(
    ("name", "dora"),
    [
        ("linen scan+remat", False),
        pytest.param("linen scan+remat", True, marks=pytest.mark.long),
        pytest.param("nnx einsum", False, marks=pytest.mark.long),
        ("nnx einsum", True),
        ("plain dict", False),
        ("plain dict", True),
    ],
)
def test_rows_are_those_of_the_single_adapters(name, dora, standard_promotion):
    case = CASES[name]()
    adapters = stack_of(case, (4, 4, 4) if dora else (4, 2, 3), dora=dora)
    x = rows_like(case.x)
    depth = 8 if name == "plain dict" else 26  # three layers of eight sums
    assert_close(*both_ways(case.fn, adapters, x, IDS), depth=2 * depth if dora else depth)


def test_it_agrees_with_lora_and_with_the_base_to_the_last_bits():
    case = dict_case()
    adapters, x = stack_of(case), rows_like(case.x)
    stacked, one = lora_jax.many.stack(adapters), lora_jax.lora(case.fn)

    @jax.jit
    def both(stacked, adapters, x):
        each = [one(adapters[k], x) if k >= 0 else case.fn(stacked.base, x) for k in IDS]
        found = lora_jax.many.lora_rows(case.fn)(stacked, x, lora_ids=np.array(IDS))
        return found, jnp.stack([y[n] for n, y in enumerate(each)])

    assert_close(*both(stacked, adapters, x))


def test_other_ids_and_other_adapters_compile_nothing():
    case = scan_case()
    adapters = stack_of(case)
    apply, x = jit_rows(case.fn), rows_like(case.x)
    apply(stack_by_numpy(adapters), x, lora_ids=np.array(IDS))
    ready = apply._cache_size()
    for ids in ([0, 0, 0, 0, 0], [-1] * 5, [1, 2, 1, 2, 0]):
        others = [adapters[0], adapters[ids[0]], adapters[2]]
        apply(stack_by_numpy(others), x, lora_ids=np.array(ids))
    assert apply._cache_size() == ready


def test_rows_meet_the_weight_in_one_product_and_nothing_is_copied_from_the_stack():
    """Of 7 adapters, what is made has the size of the rows' own, a layer at a time."""
    case = scan_case()
    x = rows_like(case.x, 2)
    apply = jax.jit(lora_jax.many.lora_rows(case.fn))

    def of_seven(params):
        return lora_jax.many.stack([lora_jax.lorafy(params, 4, targets=case.targets)] * 7)

    stacked = jax.eval_shape(of_seven, case.params)  # nothing is computed
    jaxpr = jax.make_jaxpr(apply)(stacked, x, lora_ids=np.array([1, 5]))
    for eqn in all_eqns(jaxpr):
        for y in (v.aval for v in eqn.outvars):
            assert not (y.ndim > 2 and y.shape[0] == 7), eqn  # of a whole stack
        if eqn.primitive.name == "dot_general":
            _, (_, batch) = eqn.params["dimension_numbers"]
            w = eqn.invars[1].aval
            if not batch and w.ndim == 2 and min(w.shape) > 4:  # a weight of the base
                assert eqn.invars[0].aval.shape[0] == 2


def test_a_row_comes_to_the_same_bits_whatever_the_others_are():
    case = scan_case()
    apply = jit_rows(case.fn)
    stacked, x = stack_by_numpy(stack_of(case)), np.array(rows_like(case.x))
    first = np.asarray(apply(stacked, x, lora_ids=np.array(IDS)))

    def spoilt(x):
        x = np.array(x)
        x[0] = np.nan
        return x

    # nobody checks this stack: not a number stands in its first place, row 1's
    bad = jax.tree.map(spoilt, stacked.adapter)
    x[3] = 7.0
    ids = np.array([2, 0, -1, 0, 1])
    second = np.asarray(apply(LoraParams(case.params, bad), x, lora_ids=ids))
    for row in (0, 2, 4):
        np.testing.assert_array_equal(first[row], second[row])
    assert np.isnan(second[1]).all()


def test_gradients_reach_the_adapters_that_rows_have():
    case = dict_case()
    adapters, x = stack_of(case, (4, 4, 4)), rows_like(case.x)
    stacked = lora_jax.many.stack(adapters)
    one = lora_jax.lora(case.fn)

    @jax.jit
    def both(stacked, adapters, x):
        def loss(stacked):
            return (lora_jax.many.lora_rows(case.fn)(stacked, x, lora_ids=np.array(IDS)) ** 2).sum()

        own = []
        for k, adapter in enumerate(adapters):
            rows = x[np.flatnonzero(np.array(IDS) == k)]
            own.append(lora_jax.value_and_grad(lambda p, r=rows: (one(p, r) ** 2).sum())(adapter))
        return lora_jax.value_and_grad(loss)(stacked)[1], [grads for _, grads in own]

    grads, own = jax.tree.map(np.asarray, both(stacked, adapters, x))
    for k, expected in enumerate(own):
        assert_close(jax.tree.map(lambda g, k=k: g[k], grads), expected)


def test_leaves_trained_whole_are_the_rows_own():
    case = dict_case()
    adapters = stack_of(case, (2, 2), full="b1")
    adapters = [
        dataclasses.replace(
            one,
            adapter=dataclasses.replace(one.adapter, full={"b1": np.full(40, k + 1.0, np.float32)}),
        )
        for k, one in enumerate(adapters)
    ]
    ids, x = (1, -1, 0), rows_like(case.x, 3)
    assert_close(*both_ways(case.fn, adapters, x, ids))


def test_axes_of_rows_may_be_anywhere():
    """A cache stacked over layers in front, an argument that all rows share, one by name."""
    case = dict_case()
    adapters = stack_of(case)

    def fn(p, x, cache, shift, *, extra, deterministic):
        assert deterministic is True
        y = case.fn(p, x.T) + shift[None] + extra
        return {"y": y.T, "cache": cache + y[None]}

    x, cache = rows_like(case.x), normal(4, (3, len(IDS), 16))
    extra, shift = (np.arange(n, dtype=np.float32) for n in (5, 16))
    apply = lora_jax.many.lora_rows(fn, in_axes=(None, 1, 1, None), out_axes={"y": 1, "cache": 1})
    options = {"extra": extra[:, None], "deterministic": True, "lora_ids": np.array(IDS)}

    @jax.jit
    def both(stacked, adapters, x, cache):
        found = apply(stacked, x.T, cache, shift, **options)
        y = alone(case.fn, adapters, x, IDS) + shift[None] + extra[:, None]
        return found, {"y": y.T, "cache": cache + y[None]}

    assert_close(*both(lora_jax.many.stack(adapters), adapters, x, cache))


def test_lookups_tied_heads_and_convolutions():
    params = {
        "embed": {"embedding": normal(0, (11, 8))},
        "conv": {"kernel": normal(1, (3, 8, 8), std=0.3)},
    }

    def fn(p, ids):
        x = p["embed"]["embedding"][ids]
        x = lax.conv_general_dilated(
            x, p["conv"]["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )
        return x @ p["embed"]["embedding"].T

    ids = np.random.default_rng(2).integers(0, 11, (4, 5), np.int32)
    layout = lora_jax.layout_of(fn, params, ids)
    options = {"targets": ".*", "layout": layout, "init": drawn}
    adapters = [
        randomize_b(lora_jax.lorafy(params, 2, key=jax.random.key(seed), **options), seed)
        for seed in range(3)
    ]
    assert_close(*both_ways(fn, adapters, ids, (2, -1, 1, 2)))


def test_quantized_bases(standard_promotion):
    case = dict_case()
    plain = stack_of(case)
    base = lora_jax.quant.quantize(case.params, "int8", targets=".*")
    adapters = [LoraParams(base, one.adapter) for one in plain]
    whole = jax.jit(lora_jax.quant.dequantize)(base)
    exact = [LoraParams(whole, one.adapter) for one in plain]
    assert_close(*both_ways(case.fn, adapters, rows_like(case.x), IDS, exact))


def test_ids_that_are_not_there_are_told_or_not_a_number():
    case = dict_case()
    stacked, x = lora_jax.many.stack(stack_of(case)), rows_like(case.x, 3)
    apply = lora_jax.many.lora_rows(case.fn)
    traced = jax.jit(apply)
    for wrong in (3, -2):
        with pytest.raises(IndexError, match=f"lora_ids has {wrong}, expected -1.* to 2"):
            apply(stacked, x, lora_ids=np.array([0, wrong, -1]))
        found = np.asarray(traced(stacked, x, lora_ids=np.array([0, wrong, -1])))
        assert np.isnan(found[1]).all()
        assert np.isfinite(found[np.array([0, 2])]).all()


def test_of_leaves_trained_whole_those_that_are_not_there_are_not_a_number():
    case = dict_case()
    stacked, x = lora_jax.many.stack(stack_of(case, (2, 2), full="b1")), rows_like(case.x, 2)
    found = np.asarray(
        jax.jit(lora_jax.many.lora_rows(case.fn))(stacked, x, lora_ids=np.array([2, 1]))
    )
    assert np.isnan(found[0]).all()
    assert np.isfinite(found[1]).all()


def test_what_cannot_be_rows_is_refused():
    case = dict_case()
    adapters = stack_of(case)
    stacked, x, ids = lora_jax.many.stack(adapters), rows_like(case.x), jnp.array(IDS)
    apply = lora_jax.many.lora_rows(case.fn)
    with pytest.raises(TypeError, match="lora_rows: expected a function, got int 3"):
        lora_jax.many.lora_rows(3)
    with pytest.raises(ValueError, match="on_materialize='no'"):
        lora_jax.many.lora_rows(case.fn, on_materialize="no")
    with pytest.raises(ValueError, match="lora_rows: the function has an argument 'lora_ids'"):
        lora_jax.many.lora_rows(lambda p, lora_ids: p)
    with pytest.raises(ValueError, match=r"expected a stack of adapters.*'w1': none"):
        apply(adapters[0], x, lora_ids=ids)
    mixed = dict(stacked.adapter.factors)
    mixed["w1"] = jax.tree.map(lambda a: np.asarray(a)[:2], mixed["w1"])
    with pytest.raises(ValueError, match=r"one number of adapters in front. They have .*'w1': 2"):
        apply(LoraParams(case.params, lora_jax.Adapter(mixed)), x, lora_ids=ids)
    with pytest.raises(TypeError, match="adapter is int, expected an Adapter"):
        apply(LoraParams(case.params, 0), x, lora_ids=ids)
    with pytest.raises(TypeError, match=r"dtype float32 and shape \(5,\), expected integers"):
        apply(stacked, x, lora_ids=jnp.ones(5))
    with pytest.raises(TypeError, match=r"shape \(\), expected integers"):
        apply(stacked, x, lora_ids=1)
    with pytest.raises(
        ValueError, match=r"\[1\] has shape \(5, 24\), expected 4 rows along axis 0"
    ):
        apply(stacked, x, lora_ids=ids[:4])
    with pytest.raises(ValueError, match=r"expected 5 rows along axis 2"):
        lora_jax.many.lora_rows(case.fn, in_axes=(None, 2))(stacked, x, lora_ids=ids)
    with pytest.raises(ValueError, match="in_axes has 3 entries for 2 arguments"):
        lora_jax.many.lora_rows(case.fn, in_axes=(None, 0, 0))(stacked, x, lora_ids=ids)
    summed = lora_jax.many.lora_rows(lambda p, x: case.fn(p, x).sum())
    with pytest.raises(ValueError, match=r"an array of shape \(\), which has no axis 0 of size 1"):
        jax.eval_shape(lambda x: summed(stacked, x, lora_ids=ids), x)
    with pytest.raises(ValueError, match=r"no LoraParams among the arguments. Pass a stack"):
        apply(case.params, x, lora_ids=ids)
    with pytest.raises(ValueError, match=r"the adapter has an entry for .*no such leaf"):
        apply(LoraParams({"other": x}, stacked.adapter), x, lora_ids=ids)


def test_a_stack_without_rows_is_told_what_to_do():
    case = dict_case()
    with pytest.raises(ValueError, match=r"lora_jax\.many\.lora_rows"):
        lora_jax.lora(case.fn)(lora_jax.many.stack(stack_of(case)), case.x)


def test_under_remat_and_inner_jit():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for k in range(2):
                x = jnp.tanh(nn.remat(nn.Dense)(8, name=f"query{k}")(x))
            return x

    model = Net()
    x = normal(1, (3, 8))
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]

    @jax.jit
    def fn(p, x):
        return model.apply({"params": p}, x)

    options = {"targets": ".*kernel", "init": drawn}
    adapters = [
        randomize_b(lora_jax.lorafy(params, 2, key=jax.random.key(seed), **options), seed)
        for seed in range(2)
    ]
    assert_close(*both_ways(fn, adapters, x, (1, -1, 0)))


def small(count=3, **options):
    """A dense layer and random adapters of it."""
    params = {"w": normal(9, (4, 3)), "b": normal(8, (3,))}
    options = {"targets": "w", "layout": {"w": "io"}, "init": drawn, **options}
    made = [
        randomize_b(lora_jax.lorafy(params, 2, key=jax.random.key(k), **options), k + 20)
        for k in range(count)
    ]
    return lambda p, x: x @ p["w"] + p["b"][None], made


def test_ids_of_any_integers():
    fn, made = small()
    stacked = stack_by_numpy(made * 100)
    apply, x = lora_jax.many.lora_rows(fn), jnp.ones((2, 4))
    few = stack_by_numpy(made)
    expected = np.asarray(apply(stacked, x, lora_ids=np.array([100, 2], np.int32)))

    allowed = tolerance() * np.abs(expected).max()
    same = functools.partial(np.testing.assert_allclose, rtol=0, atol=allowed)

    @jax.jit
    def traced(ids, outside):
        return apply(stacked, x, lora_ids=ids), apply(few, x, lora_ids=outside)

    for dtype in ("int8", "uint8", "int16", "uint16", "uint32", "int32"):
        ids, outside = np.array([[100, 2], [np.iinfo(dtype).max, 2]], dtype)
        found, beyond = map(np.asarray, traced(ids, outside))
        same(found, expected, err_msg=dtype)
        if np.dtype(dtype).itemsize == 1:  # too narrow for the number of rows
            same(apply(stacked, x, lora_ids=ids), expected, err_msg=dtype)
        assert np.isnan(beyond[0]).all(), dtype
        same(beyond[1], expected[1], err_msg=dtype)
    rows = lora_jax.many.take(few, np.array([2, 0], np.uint8)).adapter.factors["w"].scale
    assert rows.tolist() == [few.adapter.factors["w"].scale[k] for k in (2, 0)]


@pytest.mark.parametrize(
    "fn",
    [
        lambda p, x: x @ (p["w"] * jax.nn.sigmoid(x[0])[:, None]),
        lambda p, x: x @ (p["w"] * jax.nn.sigmoid(x.mean())),
        lambda p, x: x @ (p["w"] / (1 + abs(x).mean())),
        lambda p, x: x @ (p["w"] * p["b"][None]),
        lambda p, x: x @ p["w"] + p["b"][None],
    ],
    ids=["a vector", "a number", "a quotient", "a leaf trained whole", "nothing"],
)
def test_gradients_of_a_row_have_nothing_of_a_broken_adapter_of_others(fn):
    _, made = small(full="b")
    stacked = lora_jax.many.stack(made)
    x, ids = normal(1, (2, 4)), np.array([1, -1])

    def spoilt(x):
        x = np.array(x)
        x[0] = np.nan
        return x

    def loss(adapter, x):
        return lora_jax.many.lora_rows(fn)(LoraParams(stacked.base, adapter), x, lora_ids=ids).sum()

    slopes = jax.jit(jax.grad(loss, (0, 1)))
    adapters = jax.tree.map(spoilt, stacked.adapter), stacked.adapter
    found, expected = (jax.tree.map(np.asarray, slopes(adapter, x)) for adapter in adapters)
    assert_close(found[1], expected[1])
    for some, wanted in zip(*map(jax.tree.leaves, (found[0], expected[0])), strict=True):
        assert_close(some[1:], wanted[1:])


@pytest.mark.parametrize("dora", [False, True])
def test_a_row_that_is_masked_gives_no_gradient_whatever_its_id(dora):
    fn, made = small(dora=dora, full="b")
    stacked = lora_jax.many.stack(made)

    @jax.jit
    @jax.grad
    def slopes(adapter, ids):
        y = lora_jax.many.lora_rows(fn)(
            LoraParams(stacked.base, adapter), jnp.ones((2, 4)), lora_ids=ids
        )
        return jnp.where(jnp.array([[True], [False]]), y, 0).sum()

    found = slopes(stacked.adapter, np.array([0, 3]))
    assert_close(found, slopes(stacked.adapter, np.array([0, -1])))


def test_rows_of_no_adapter_are_the_base_whatever_precision_others_train_in():
    fn, made = small(full="b")
    full = {path: np.asarray(x).astype(jnp.bfloat16) for path, x in made[0].adapter.full.items()}
    one = LoraParams(made[0].base, dataclasses.replace(made[0].adapter, full=full))
    x = normal(1, (1, 4))
    found = jit_rows(fn)(stack_by_numpy([one]), x, lora_ids=np.array([-1]))
    assert_close(found, fn(one.base, x))  # and not to the bfloat16 of others


def test_a_stack_may_be_in_the_hosts_memory():
    fn, made = small(full="b")
    stacked = lora_jax.many.stack(made)
    apply, x = lora_jax.many.lora_rows(fn), jnp.ones((2, 4))
    there = LoraParams(stacked.base, jax.device_get(stacked.adapter))
    assert_close(apply(there, x, lora_ids=[2, 0]), apply(stacked, x, lora_ids=[2, 0]))


def test_axes_may_be_those_of_vmap():
    fn, made = small()
    stacked, x = lora_jax.many.stack(made), jnp.ones((2, 4))
    axes = (LoraParams(base=None, adapter=0), 0)
    found = lora_jax.many.lora_rows(fn, in_axes=axes)(stacked, x, lora_ids=[1, 0])
    assert_close(found, lora_jax.many.lora_rows(fn)(stacked, x, lora_ids=[1, 0]))
    shared = lora_jax.many.lora_rows(lambda p, x, *, t: t * fn(p, x))
    with pytest.raises(ValueError, match=r"'t'.* pass those by position"):
        shared(stacked, x, lora_ids=[1, 0], t=jnp.float32(1))
