"""Every row of a batch by its own adapter, against each row alone by that adapter."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CASES, all_eqns, assert_close, dict_case, randomize_b, scan_case
from jax import lax

import lora_jax
from lora_jax import LoraParams

IDS = (2, 0, -1, 2, 1)


def stack_of(case, ranks=(4, 2, 4), **options):
    """Adapters of these ranks, and of scales of their own."""
    made = []
    for seed, rank in enumerate(ranks):
        key = jax.random.key(seed)
        one = lora_jax.lorafy(
            case.params, rank, alpha=3.0 + seed, targets=case.targets, key=key, **options
        )
        made.append(randomize_b(one, seed + 5))
    return made


def rows_like(x, count=5):
    return jax.random.normal(jax.random.key(9), (count, *x.shape[1:]), x.dtype)


def alone(fn, adapters, x, ids):
    """Each row by itself, merged: the oracle."""
    found = []
    for row, k in zip(x, ids, strict=True):
        params = adapters[0].base if k < 0 else lora_jax.merge(adapters[k])
        found.append(jax.jit(fn)(params, row[None]))
    return jax.tree.map(lambda *rows: jnp.concatenate(rows), *found)


@pytest.mark.parametrize("name", ["linen scan+remat", "nnx einsum", "plain dict"])
@pytest.mark.parametrize("dora", [False, True])
def test_rows_are_those_of_the_single_adapters(name, dora, standard_promotion):
    case = CASES[name]()
    adapters = stack_of(case, (4, 4, 4) if dora else (4, 2, 3), dora=dora)
    x = rows_like(case.x)
    found = jax.jit(lora_jax.lora_rows(case.fn))(
        lora_jax.stack(adapters), x, lora_ids=jnp.array(IDS)
    )
    assert_close(found, alone(case.fn, adapters, x, IDS), 1e-5)


def test_it_agrees_with_lora_and_with_the_base_to_the_last_bits():
    case = dict_case()
    adapters, x = stack_of(case), rows_like(case.x)
    found = lora_jax.lora_rows(case.fn)(lora_jax.stack(adapters), x, lora_ids=np.array(IDS))
    each = [
        lora_jax.lora(case.fn)(adapters[k], x) if k >= 0 else case.fn(case.params, x) for k in IDS
    ]
    assert_close(found, jnp.stack([y[n] for n, y in enumerate(each)]), 1e-6)


def test_other_ids_and_other_adapters_compile_nothing():
    case = scan_case()
    adapters = stack_of(case)
    stacked, x = lora_jax.stack(adapters), rows_like(case.x)
    apply = jax.jit(lora_jax.lora_rows(case.fn))
    apply(stacked, x, lora_ids=jnp.array(IDS))
    for ids in ([0, 0, 0, 0, 0], [-1] * 5, [1, 2, 1, 2, 0]):
        stacked = lora_jax.replace_at(stacked, 1, adapters[ids[0]])
        apply(stacked, x, lora_ids=jnp.array(ids))
    assert apply._cache_size() == 1


def test_rows_meet_the_weight_in_one_product_and_nothing_is_copied_from_the_stack():
    """Of 7 adapters, what is made has the size of the rows' own, a layer at a time."""
    case = scan_case()
    adapters = stack_of(case, (4,) * 7)
    x = rows_like(case.x, 2)
    apply = jax.jit(lora_jax.lora_rows(case.fn))
    args = lora_jax.stack(adapters), x
    jaxpr = jax.make_jaxpr(apply)(*args, lora_ids=jnp.array([1, 5]))
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
    adapters = stack_of(case)
    apply = jax.jit(lora_jax.lora_rows(case.fn))
    x = rows_like(case.x)
    first = apply(lora_jax.stack(adapters), x, lora_ids=jnp.array(IDS))
    broken = jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), adapters[0].adapter)
    # nobody checks this stack: not a number stands in its first place, row 1's
    bad = jax.tree.map(lambda s, a: s.at[0].set(a), lora_jax.stack(adapters).adapter, broken)
    second = apply(
        LoraParams(case.params, bad), x.at[3].set(7.0), lora_ids=jnp.array([2, 0, -1, 0, 1])
    )
    for row in (0, 2, 4):
        np.testing.assert_array_equal(first[row], second[row])
    assert np.isnan(second[1]).all()


def test_gradients_reach_the_adapters_that_rows_have():
    case = dict_case()
    adapters, x = stack_of(case, (4, 4, 4)), rows_like(case.x)
    stacked = lora_jax.stack(adapters)

    def loss(stacked):
        return (lora_jax.lora_rows(case.fn)(stacked, x, lora_ids=jnp.array(IDS)) ** 2).sum()

    grads = jax.jit(lora_jax.value_and_grad(loss))(stacked)[1]
    for k, one in enumerate(adapters):
        rows = x[np.array(IDS) == k]
        own = lora_jax.value_and_grad(lambda p, r=rows: (lora_jax.lora(case.fn)(p, r) ** 2).sum())
        assert_close(jax.tree.map(lambda g, k=k: g[k], grads), own(one)[1], 1e-5)


def test_leaves_trained_whole_are_the_rows_own():
    case = dict_case()
    adapters = stack_of(case, (2, 2), full="b1")
    adapters = [
        dataclasses.replace(
            one, adapter=dataclasses.replace(one.adapter, full={"b1": jnp.full(40, k + 1.0)})
        )
        for k, one in enumerate(adapters)
    ]
    ids, x = (1, -1, 0), rows_like(case.x, 3)
    found = lora_jax.lora_rows(case.fn)(lora_jax.stack(adapters), x, lora_ids=jnp.array(ids))
    assert_close(found, alone(case.fn, adapters, x, ids), 1e-5)


def test_axes_of_rows_may_be_anywhere():
    """A cache stacked over layers in front, an argument that all rows share, one by name."""
    case = dict_case()
    adapters = stack_of(case)

    def fn(p, x, cache, shift, *, extra, deterministic):
        assert deterministic is True
        y = case.fn(p, x.T) + shift[None] + extra
        return {"y": y.T, "cache": cache + y[None]}

    x = rows_like(case.x)
    cache = jnp.ones((3, len(IDS), 16))
    extra = jnp.arange(5.0)[:, None]
    shift = jnp.arange(16.0)
    apply = lora_jax.lora_rows(fn, in_axes=(None, 1, 1, None), out_axes={"y": 1, "cache": 1})
    found = apply(
        lora_jax.stack(adapters),
        x.T,
        cache,
        shift,
        extra=extra,
        deterministic=True,
        lora_ids=np.array(IDS),
    )
    y = alone(case.fn, adapters, x, IDS) + shift[None] + extra
    assert_close(found, {"y": y.T, "cache": cache + y[None]}, 1e-5)


def test_lookups_tied_heads_and_convolutions():
    keys = jax.random.split(jax.random.key(3), 3)
    params = {
        "embed": {"embedding": jax.random.normal(keys[0], (11, 8))},
        "conv": {"kernel": 0.3 * jax.random.normal(keys[1], (3, 8, 8))},
    }

    def fn(p, ids):
        x = p["embed"]["embedding"][ids]
        x = lax.conv_general_dilated(
            x, p["conv"]["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )
        return x @ p["embed"]["embedding"].T

    ids = jax.random.randint(keys[2], (4, 5), 0, 11)
    layout = lora_jax.layout_of(fn, params, ids)
    adapters = [
        randomize_b(lora_jax.lorafy(params, 2, targets=".*", layout=layout), seed)
        for seed in range(3)
    ]
    which = (2, -1, 1, 2)
    found = lora_jax.lora_rows(fn)(lora_jax.stack(adapters), ids, lora_ids=jnp.array(which))
    assert_close(found, alone(fn, adapters, ids, which), 1e-5)


def test_quantized_bases(standard_promotion):
    case = dict_case()
    plain = stack_of(case)
    base = lora_jax.quantize(case.params, "int8", targets=".*")
    adapters = [LoraParams(base, one.adapter) for one in plain]
    x = rows_like(case.x)
    found = lora_jax.lora_rows(case.fn)(lora_jax.stack(adapters), x, lora_ids=jnp.array(IDS))
    exact = [LoraParams(lora_jax.dequantize(base), one.adapter) for one in plain]
    assert_close(found, alone(case.fn, exact, x, IDS), 1e-5)


def test_ids_that_are_not_there_are_told_or_not_a_number():
    case = dict_case()
    stacked, x = lora_jax.stack(stack_of(case)), rows_like(case.x, 3)
    apply = lora_jax.lora_rows(case.fn)
    for wrong in (3, -2):
        with pytest.raises(IndexError, match=f"lora_ids has {wrong}, expected -1.* to 2"):
            apply(stacked, x, lora_ids=np.array([0, wrong, -1]))
        found = jax.jit(apply)(stacked, x, lora_ids=jnp.array([0, wrong, -1]))
        assert np.isnan(found[1]).all()
        assert np.isfinite(found[np.array([0, 2])]).all()


def test_of_leaves_trained_whole_those_that_are_not_there_are_not_a_number():
    case = dict_case()
    stacked, x = lora_jax.stack(stack_of(case, (2, 2), full="b1")), rows_like(case.x, 2)
    found = jax.jit(lora_jax.lora_rows(case.fn))(stacked, x, lora_ids=jnp.array([2, 1]))
    assert np.isnan(found[0]).all()
    assert np.isfinite(found[1]).all()


def test_what_cannot_be_rows_is_refused():
    case = dict_case()
    adapters = stack_of(case)
    stacked, x, ids = lora_jax.stack(adapters), rows_like(case.x), jnp.array(IDS)
    apply = lora_jax.lora_rows(case.fn)
    with pytest.raises(TypeError, match="lora_rows: expected a function, got int 3"):
        lora_jax.lora_rows(3)
    with pytest.raises(ValueError, match="on_materialize='no'"):
        lora_jax.lora_rows(case.fn, on_materialize="no")
    with pytest.raises(ValueError, match="lora_rows: the function has an argument 'lora_ids'"):
        lora_jax.lora_rows(lambda p, lora_ids: p)
    with pytest.raises(ValueError, match=r"expected a stack of adapters.*'w1': none"):
        apply(adapters[0], x, lora_ids=ids)
    mixed = dict(stacked.adapter.factors)
    mixed["w1"] = jax.tree.map(lambda a: a[:2], mixed["w1"])
    with pytest.raises(ValueError, match=r"one number of them in front. They have .*'w1': 2"):
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
        lora_jax.lora_rows(case.fn, in_axes=(None, 2))(stacked, x, lora_ids=ids)
    with pytest.raises(ValueError, match="in_axes has 3 entries for 2 arguments"):
        lora_jax.lora_rows(case.fn, in_axes=(None, 0, 0))(stacked, x, lora_ids=ids)
    with pytest.raises(ValueError, match=r"an array of shape \(\), which has no axis 0 of size 1"):
        lora_jax.lora_rows(lambda p, x: case.fn(p, x).sum())(stacked, x, lora_ids=ids)
    with pytest.raises(ValueError, match=r"no LoraParams among the arguments. Pass a stack"):
        apply(case.params, x, lora_ids=ids)
    with pytest.raises(ValueError, match=r"the adapter has an entry for .*no such leaf"):
        apply(LoraParams({"other": x}, stacked.adapter), x, lora_ids=ids)


def test_a_stack_without_rows_is_told_what_to_do():
    case = dict_case()
    with pytest.raises(ValueError, match=r"lora_jax\.lora_rows"):
        lora_jax.lora(case.fn)(lora_jax.stack(stack_of(case)), case.x)


def test_under_remat_and_inner_jit():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for k in range(2):
                x = jnp.tanh(nn.remat(nn.Dense)(8, name=f"query{k}")(x))
            return x

    model = Net()
    x = jax.random.normal(jax.random.key(1), (3, 8))
    params = model.init(jax.random.key(0), x)["params"]

    @jax.jit
    def fn(p, x):
        return model.apply({"params": p}, x)

    adapters = [
        randomize_b(lora_jax.lorafy(params, 2, targets=".*kernel"), seed) for seed in range(2)
    ]
    found = lora_jax.lora_rows(fn)(lora_jax.stack(adapters), x, lora_ids=jnp.array([1, -1, 0]))
    assert_close(found, alone(fn, adapters, x, (1, -1, 0)), 1e-5)


def small(count=3, **options):
    """A dense layer and random adapters of it."""
    params = {"w": jax.random.normal(jax.random.key(9), (4, 3)), "b": jnp.array([0.1, 0.2, 0.3])}
    options = {"targets": "w", "layout": {"w": "io"}, **options}
    made = [
        randomize_b(lora_jax.lorafy(params, 2, key=jax.random.key(k), **options), k + 20)
        for k in range(count)
    ]
    return lambda p, x: x @ p["w"] + p["b"][None], made


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "uint32", "int32"])
def test_ids_of_any_integers(dtype):
    fn, made = small()
    stacked = lora_jax.take(lora_jax.stack(made), np.arange(300) % 3)
    apply, x = lora_jax.lora_rows(fn), jnp.ones((2, 4))
    expected = apply(stacked, x, lora_ids=np.array([100, 2], np.int32))
    ids = np.array([100, 2], dtype)
    assert_close(apply(stacked, x, lora_ids=ids), expected, 1e-6)
    traced = jax.jit(apply)
    assert_close(traced(stacked, x, lora_ids=ids), expected, 1e-6)
    few = lora_jax.take(stacked, np.arange(3, dtype=dtype))
    outside = traced(few, x, lora_ids=np.array([np.iinfo(dtype).max, 2], dtype))
    assert jnp.isnan(outside[0]).all()
    assert_close(outside[1], expected[1], 1e-6)


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
    stacked = lora_jax.stack(made)
    broken = jax.tree.map(lambda x: x.at[0].set(jnp.nan), stacked.adapter)
    x, ids = jax.random.normal(jax.random.key(1), (2, 4)), jnp.array([1, -1])

    def loss(adapter, x):
        return lora_jax.lora_rows(fn)(LoraParams(stacked.base, adapter), x, lora_ids=ids).sum()

    found = jax.jit(jax.grad(loss, (0, 1)))(broken, x)
    expected = jax.grad(loss, (0, 1))(stacked.adapter, x)
    assert_close(found[1], expected[1], 1e-6)
    for some, wanted in zip(*map(jax.tree.leaves, (found[0], expected[0])), strict=True):
        assert_close(some[1:], wanted[1:], 1e-6)


@pytest.mark.parametrize("dora", [False, True])
def test_a_row_that_is_masked_gives_no_gradient_whatever_its_id(dora):
    fn, made = small(dora=dora, full="b")
    stacked = lora_jax.stack(made)

    @jax.jit
    def loss(adapter, ids):
        y = lora_jax.lora_rows(fn)(
            LoraParams(stacked.base, adapter), jnp.ones((2, 4)), lora_ids=ids
        )
        return jnp.where(jnp.array([[True], [False]]), y, 0).sum()

    found = jax.grad(loss)(stacked.adapter, jnp.array([0, 3]))
    assert_close(found, jax.grad(loss)(stacked.adapter, jnp.array([0, -1])), 1e-6)


def test_rows_of_no_adapter_are_the_base_whatever_precision_others_train_in():
    fn, made = small(full="b")
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), made[0].adapter.full)
    one = LoraParams(made[0].base, dataclasses.replace(made[0].adapter, full=narrow))
    x = jax.random.normal(jax.random.key(1), (1, 4))
    found = lora_jax.lora_rows(fn)(lora_jax.stack([one]), x, lora_ids=[-1])
    assert jnp.array_equal(found, fn(one.base, x))


def test_a_stack_may_be_in_the_hosts_memory():
    fn, made = small(full="b")
    stacked = lora_jax.stack(made)
    apply, x = lora_jax.lora_rows(fn), jnp.ones((2, 4))
    there = LoraParams(stacked.base, jax.device_get(stacked.adapter))
    assert_close(apply(there, x, lora_ids=[2, 0]), apply(stacked, x, lora_ids=[2, 0]), 1e-6)


def test_axes_may_be_those_of_vmap():
    fn, made = small()
    stacked, x = lora_jax.stack(made), jnp.ones((2, 4))
    axes = (LoraParams(base=None, adapter=0), 0)
    found = lora_jax.lora_rows(fn, in_axes=axes)(stacked, x, lora_ids=[1, 0])
    assert_close(found, lora_jax.lora_rows(fn)(stacked, x, lora_ids=[1, 0]), 1e-6)
    shared = lora_jax.lora_rows(lambda p, x, *, t: t * fn(p, x))
    with pytest.raises(ValueError, match=r"'t'.* pass that by position"):
        shared(stacked, x, lora_ids=[1, 0], t=jnp.float32(1))
