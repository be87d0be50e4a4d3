"""Stacks of adapters: each row is the adapter on its own, in results and in training."""

import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    all_eqns,
    assert_close,
    assert_same,
    bits,
    dict_case,
    drawn,
    normal,
    randomize_b,
    scan_case,
    tolerance,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import lora_jax
from lora_jax import Adapter, Factors, LoraParams
from lora_jax._weights.paths import flatten

AXES = LoraParams(base=None, adapter=0)
SUBSETS = {  # of targets, in a model of each kind; and a leaf to train whole
    dict_case: (["w1", "layers/0/w2"], ["w1"], ["layers/0/w2"], "b1"),
    scan_case: (
        "all-linear",
        "layers/.*Attention.*/kernel",
        "layers/Dense_1/kernel",
        ".*LayerNorm_0/bias",
    ),
}


def lorafied(params, rank=8, seed=0, **options):
    return lora_jax.lorafy(params, rank, **{"key": jax.random.key(seed), "init": drawn} | options)


@functools.cache
def several(make):
    """Adapters of one base, of different ranks, alphas, targets and full leaves."""
    case = make()
    every, some, others, whole = SUBSETS[make]
    options = [
        {"rank": 3, "targets": every},
        {"rank": 1, "alpha": 3.0, "targets": some},
        {"rank": 5, "alpha": 1.0, "targets": others, "full": whole},
        {"rank": 2, "rslora": True, "targets": every},
    ]
    made = []
    for n, o in enumerate(options):
        lora_params = randomize_b(lorafied(case.params, seed=n, **o), seed=10 + n)
        full = {path: jax.device_put(shifted(x)) for path, x in lora_params.adapter.full.items()}
        adapter = dataclasses.replace(lora_params.adapter, full=full)
        made.append(LoraParams(lora_params.base, adapter))
    return case, tuple(made)


def in_one_program(adapters, rank=None):
    """A stack of many shapes, of which each would be compiled; that jit changes nothing, below."""
    make = jax.jit(
        lambda base, xs: lora_jax.many.stack([LoraParams(base, x) for x in xs], rank).adapter
    )
    base = adapters[0].base
    return LoraParams(base, make(base, [p.adapter for p in adapters]))


@functools.cache
def scanned_layers():
    return in_one_program(several(scan_case)[1], rank=7)


def shifted(x):
    return np.asarray(x) + np.float32(0.1)


def inputs(case, n):
    return np.stack([np.asarray(case.x) * np.float32(1 + 0.1 * k) for k in range(n)])


def assert_rows(fn, stacked, adapters, x, **sums):
    """Every row of a stack gives what its adapter gives alone, and what merged weights give."""
    apply = lora_jax.lora(fn)

    @jax.jit  # one program of all
    def all_of(stacked, adapters, x):
        rows = jax.vmap(apply, in_axes=(AXES, None))(stacked, x)
        alone = [(apply(p, x), fn(lora_jax.merge(p), x)) for p in adapters]
        return rows, alone

    rows, alone = jax.tree.map(np.asarray, all_of(stacked, list(adapters), x))
    for n, (single, merged) in enumerate(alone):
        assert_close(rows[n], single, **sums)
        assert_close(rows[n], merged, **sums)


def unpadded(row, like):
    """A row of gradients, in NumPy, in the shapes of ``like``; all the rest of it is zero."""
    factors = {}
    for path, f in row.factors.items():
        if path not in like.factors:
            assert not any(np.any(x) for x in jax.tree.leaves(f)), path
            continue
        r, n = like.factors[path].rank, f.layout.count("b")
        b = np.moveaxis(f.b, n, 0)
        assert not np.any(f.a[..., r:])
        assert not np.any(b[r:])
        factors[path] = dataclasses.replace(f, a=f.a[..., :r], b=np.moveaxis(b[:r], 0, n))
    return Adapter(factors, {path: row.full[path] for path in like.full})


def row(tree, n):
    return jax.tree.map(lambda x: np.asarray(x)[n], tree)


# --- results -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [dict_case, pytest.param(scan_case, marks=pytest.mark.long)])
def test_each_row_computes_what_its_adapter_does(make):
    case, adapters = several(make)
    if make is dict_case:
        stacked, depth = lora_jax.many.stack(adapters), 8
        assert stacked.base is case.params
    else:
        stacked, depth = scanned_layers(), 50
    apply = lora_jax.lora(case.fn)

    def loss(outputs):
        return (outputs**2).mean(), outputs  # a mean in which nothing cancels

    rows = lora_jax.value_and_grad(lambda p, x: loss(apply(p, x)), has_aux=True)
    alone = jax.value_and_grad(lambda w, x: loss(case.fn(w, x)), has_aux=True)

    @jax.jit  # one program, in which the weights merged of each adapter are a batch as well
    def both(stacked, adapters, x):
        merged, pulls = zip(*(jax.vjp(lora_jax.merge, p) for p in adapters), strict=True)
        weights = jax.tree.map(lambda *xs: jnp.stack(xs), *merged)
        expected, slopes = jax.vmap(alone)(weights, x)
        grads = [
            pull(jax.tree.map(lambda x, n=n: x[n], slopes))[0].adapter
            for n, pull in enumerate(pulls)
        ]
        return jax.vmap(rows, in_axes=(AXES, 0))(stacked, x), (expected, grads)

    found, expected = both(stacked, list(adapters), inputs(case, len(adapters)))
    (found, found_grads), (expected, expected_grads) = jax.tree.map(np.asarray, (found, expected))
    assert_close(found, expected, depth=depth)
    for n, grad in enumerate(expected_grads):
        factors = {k: dataclasses.replace(f, scale=None) for k, f in grad.factors.items()}
        grad = Adapter(factors, grad.full)
        assert_close(unpadded(row(found_grads, n), grad), grad, depth=depth)


def test_one_input_goes_to_all():
    case, adapters = several(dict_case)
    assert_rows(case.fn, lora_jax.many.stack(adapters), adapters, case.x)


def test_adapters_alone_stack():
    _, adapters = several(dict_case)
    alone = [p.adapter for p in adapters if not p.adapter.full]
    stacked = lora_jax.many.stack(alone)
    assert isinstance(stacked, Adapter)
    whole = lora_jax.many.stack([p for p in adapters if not p.adapter.full])
    assert_same(stacked, whole.adapter)
    assert_same(lora_jax.many.unstack(stacked), alone)


def test_tracers_and_shapes_stack_as_arrays_do():
    case, adapters = several(dict_case)
    alone = [p.adapter for p in adapters]

    def make(base, alone):
        return lora_jax.many.stack([LoraParams(base, x) for x in alone], rank=6).adapter

    expected = lora_jax.many.stack(adapters, rank=6).adapter
    assert_same(jax.jit(make)(case.params, alone), expected)
    shapes = jax.eval_shape(make, case.params, alone)
    assert (
        jax.tree.map(lambda x: (x.shape, x.dtype), shapes).factors.keys() == expected.factors.keys()
    )
    for shape, x in zip(jax.tree.leaves(shapes), jax.tree.leaves(expected), strict=True):
        assert (shape.shape, shape.dtype) == (x.shape, x.dtype)
    closed = jax.jit(
        lambda: lora_jax.many.stack(adapters, rank=6).adapter
    )()  # constants of a trace
    assert_same(closed, expected)


def test_the_layout_of_a_stack():
    case, adapters = several(scan_case)
    stacked = scanned_layers()
    for path, f in jax.tree.map(np.asarray, stacked.adapter).factors.items():
        n = f.layout.count("b")
        assert f.a.shape[: 1 + n] == f.b.shape[: 1 + n] == (4, 3)[: 1 + n]
        assert f.a.shape[-1] == f.b.shape[1 + n] == f.rank == 7
        assert f.scale.shape == (4,)
        for n, p in enumerate(adapters):
            has = p.adapter.factors.get(path)
            assert f.scale[n] == (0 if has is None else has.scale)
    for path, x in stacked.adapter.full.items():
        leaf = flatten(case.params)[0][path]
        assert x.shape == (4, *leaf.shape)
        x = np.asarray(x)
        np.testing.assert_array_equal(x[0], leaf)
        np.testing.assert_array_equal(x[2], shifted(leaf))


def test_a_base_of_low_precision_fills_in_masters():
    case = dict_case(jnp.bfloat16)
    one = lorafied(case.params, 2, targets="w1", full="b1")
    two = lorafied(case.params, 2, targets="w1")
    assert lora_jax.many.stack([two, one]).adapter.full["b1"].dtype == jnp.float32

    def narrow(p):
        cast = lambda x: jax.device_put(np.asarray(x).astype(jnp.bfloat16))  # noqa: E731
        return LoraParams(p.base, jax.tree.map(cast, p.adapter))

    assert lora_jax.many.stack([narrow(one), narrow(two)]).adapter.full["b1"].dtype == jnp.bfloat16


# Few shapes: for each, stack and unstack compile programs.
RANKS = st.sampled_from([[1, 3], [3, 1], [3, 3], [1, 1]])


@settings(max_examples=10)
@given(ranks=RANKS, seed=st.integers(0, 2**16), fresh=st.booleans())
def test_unstack_is_the_inverse(ranks, seed, fresh):
    rng = np.random.default_rng(seed)
    params = {"q": np.ones((4, 5)), "e": np.ones((2, 4, 6)), "bias": np.ones(5)}
    params = {name: jax.device_put(x.astype(np.float32)) for name, x in params.items()}
    adapters = []
    for r in ranks:
        chosen = rng.choice(["q", "e", r"e[0:1]", "bias"], rng.integers(1, 3), replace=False)
        targets = [x for x in chosen if x in "qe"]
        made = lorafied(
            params,
            r,
            seed,
            alpha=float(rng.uniform(1, 9)),
            targets=targets,
            full="bias" if "bias" in chosen or not targets else None,
            layout={"e": "bio", "q": "io"}
            if "e" in targets and "q" in targets
            else {"e": "bio"}
            if "e" in targets
            else None,
        )
        adapters.append(made if fresh else randomize_b(made, seed))
    stacked = lora_jax.many.stack(adapters, rank=4)
    filled = {path for p in adapters for path in p.adapter.full}
    for single, back in zip(adapters, lora_jax.many.unstack(stacked), strict=True):
        assert back.base is params
        assert_same(Adapter(back.adapter.factors), Adapter(single.adapter.factors))
        assert back.adapter.full.keys() == filled
        for path, x in back.adapter.full.items():
            np.testing.assert_array_equal(x, single.adapter.full.get(path, params[path]))
    loose = lora_jax.many.unstack(stacked, trim=False)
    assert_same(lora_jax.many.stack(loose), stacked)


def test_unstack_under_jit_does_not_look_at_values():
    _, adapters = several(dict_case)
    stacked = lora_jax.many.stack([p.adapter for p in adapters[:2]])
    rows = jax.jit(lambda x: lora_jax.many.unstack(x, trim=False))(stacked)
    assert_same(rows, lora_jax.many.unstack(stacked, trim=False))
    inside = jax.jit(lambda: lora_jax.many.unstack(stacked))()  # of a constant the values are known
    assert_same(inside, lora_jax.many.unstack(stacked))
    with pytest.raises(ValueError, match=r"unstack: the stack is traced.*trim=False"):
        jax.jit(lora_jax.many.unstack)(stacked)


@pytest.mark.devices(8)
def test_a_stack_is_sharded_along_its_adapters_or_its_weights():
    case, adapters = several(dict_case)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("n", "t"))
    stacked = lora_jax.many.stack(adapters)
    apply = jax.jit(jax.vmap(lora_jax.lora(case.fn), in_axes=(AXES, None)))
    expected = apply(stacked, case.x)
    spread = jax.device_put(stacked.adapter, NamedSharding(mesh, PartitionSpec("n")))
    assert_close(apply(LoraParams(stacked.base, spread), case.x), expected)
    # By value: a row that comes from other devices is a sum of theirs, and -0.0 + 0 is 0.
    rows = lora_jax.many.unstack(spread)
    for single, p in zip(rows, adapters, strict=True):
        assert_close(Adapter(single.factors), Adapter(p.adapter.factors))
    again = jax.jit(lambda stacked, x: lora_jax.many.replace_at(stacked, 2, x))(spread, rows[0])
    for n, expected in enumerate((0, 1, 0, 3)):
        assert_close(row(again, n), row(stacked.adapter, expected))


# --- training ----------------------------------------------------------------------------------

N, STEPS = 5, 6
RATES = np.linspace(1e-3, 2e-2, N)


def transformation():
    return optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3, weight_decay=0.1)


def step_of(case, tx):
    apply = lora_jax.lora(case.fn)

    def step(trainable, frozen, opt_state, x, y):
        def loss(lora_params):
            return ((apply(lora_params, x) - y) ** 2).mean()

        value, grads = lora_jax.value_and_grad(loss)(lora_jax.combine(trainable, frozen))
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, value

    return step


def with_rates(opt_state, rates):
    return opt_state._replace(hyperparams=opt_state.hyperparams | {"learning_rate": rates})


def batches():
    """Inputs and outputs ``[run, step, row, number]``."""
    rng = np.random.default_rng(0)
    return rng.standard_normal((N, STEPS, 6, 24)), np.tanh(rng.standard_normal((N, STEPS, 6, 16)))


def sweep():
    case, every = dict_case(jnp.float64), ["w1", "layers/0/w2"]
    runs = [
        lorafied(case.params, 1 + n, n, alpha=2.0 + n, targets=every[: 1 + n % 2]) for n in range(N)
    ]
    return case, [wide(p) for p in runs]


def wide(p):
    """The factors in float64: the initializer draws float32."""
    draw = lambda name, x: jax.device_put(np.asarray(x, np.float64)) if name in "ab" else x  # noqa: E731
    return LoraParams(p.base, Adapter({key: f.map(draw) for key, f in p.adapter.factors.items()}))


@functools.cache
def separate_runs():
    """Of each run its trained half and its losses, in NumPy; one program of all."""
    case, runs = sweep()
    tx = transformation()
    step = step_of(case, tx)

    def alone(lora_params, rate, data):
        trainable, frozen = lora_jax.split(lora_params)

        def one(carry, batch):
            trainable, opt_state, value = step(carry[0], frozen, carry[1], *batch)
            return (trainable, opt_state), value

        start = trainable, with_rates(tx.init(trainable), rate)
        (trainable, _), values = jax.lax.scan(one, start, data)
        return trainable, values

    @jax.jit
    def every(runs, rates, data):
        row = lambda n: (rates[n], jax.tree.map(lambda x: x[n], data))  # noqa: E731
        return [alone(p, *row(n)) for n, p in enumerate(runs)]

    return jax.tree.map(np.asarray, every(runs, RATES, batches()))


def together(case, runs):
    tx = transformation()
    step = jax.jit(jax.vmap(step_of(case, tx), in_axes=(0, AXES, 0, 0, 0)))
    trainable, frozen = lora_jax.split(in_one_program(runs))
    opt_state = jax.jit(jax.vmap(tx.init))(trainable)
    return step, trainable, frozen, with_rates(opt_state, jnp.asarray(RATES))


@pytest.mark.usefixtures("standard_promotion", "in_float64")
def test_a_stack_trains_as_each_adapter_does_alone():
    case, runs = sweep()
    step, trainable, frozen, opt_state = together(case, runs)
    before = jax.tree.map(np.asarray, trainable)
    x, y = batches()
    values = []
    for k in range(STEPS):
        trainable, opt_state, value = step(trainable, frozen, opt_state, x[:, k], y[:, k])
        values.append(np.asarray(value))
    assert step._cache_size() == 1
    values = np.stack(values, 1)
    for n, (expected, expected_values) in enumerate(separate_runs()):
        assert_close(values[n], expected_values)
        assert_close(unpadded(row(trainable, n), expected), expected)  # padding: zero
        moved = unpadded(row(before, n), expected).factors["w1"].b - expected.factors["w1"].b
        assert np.abs(moved).max() > 1e-3


@pytest.mark.usefixtures("standard_promotion", "in_float64")
def test_rows_that_are_kept_go_on_as_they_would_have():
    case, runs = sweep()
    step, trainable, frozen, opt_state = together(case, runs)
    data, rows, value = batches(), np.arange(N), np.zeros(N)
    for k in range(STEPS):
        if k in (2, 4):  # successive halving: of 5 runs 3, then 2
            best = np.argsort(value)[: (len(rows) + 1) // 2]
            dropped = row((trainable, opt_state), best)
            trainable, frozen, opt_state = lora_jax.many.take((trainable, frozen, opt_state), best)
            assert_same((trainable, opt_state), dropped)
            rows = rows[best]
        x, y = (each[rows, k] for each in data)
        trainable, opt_state, value = step(trainable, frozen, opt_state, x, y)
    assert frozen.base is case.params
    assert len(rows) == 2
    for i, n in enumerate(rows):
        expected, values = separate_runs()[n]
        assert_close(np.asarray(value)[i], values[-1])
        assert_close(unpadded(row(trainable, i), expected), expected)


# --- what it costs -----------------------------------------------------------------------------


def test_a_weight_of_the_base_meets_all_inputs_in_one_product():
    case, adapters = several(dict_case)
    adapters = adapters[:2] + adapters[3:]
    stacked, n, rows = lora_jax.many.stack(adapters), 3, 7
    x = normal(0, (n, rows, 24))
    apply = jax.vmap(lora_jax.lora(case.fn), in_axes=(AXES, 0))
    weights = {"w1": (24, 40), "layers/0/w2": (40, 16)}
    eqns = list(all_eqns(jax.make_jaxpr(apply)(stacked, x)))
    shapes = [v.aval.shape for e in eqns for v in e.outvars if hasattr(v.aval, "shape")]
    for shape in weights.values():
        assert (n, *shape) not in shapes
        dots = [
            e
            for e in eqns
            if e.primitive.name == "dot_general" and shape in [v.aval.shape for v in e.invars]
        ]
        assert len(dots) == 1
        assert dots[0].outvars[0].aval.size == n * rows * shape[1]
    if jax.default_backend() != "cpu":
        return  # others call libraries for products, and count otherwise
    compiled = jax.jit(apply).lower(stacked, x).compile()
    text = compiled.as_text()
    shape_of = dict(re.findall(r"(%[\w.-]+) = \w+\[([\d,]*)\]", text))
    products = [
        (shape_of[out], [shape_of[x] for x in re.findall(r"%[\w.-]+", operands)])
        for out, operands in re.findall(r"(%[\w.-]+) = \S+ dot\(([^)]*)\)", text)
    ]
    for i, o in weights.values():
        wide = [out for out, operands in products if f"{i},{o}" in operands]
        assert len(wide) == 1  # of all adapters' inputs
        assert math.prod(map(int, wide[0].split(","))) == n * rows * o
        assert f"f32[{n},{i},{o}]" not in text

    def flops(fn, *args):
        return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]

    base = flops(case.fn, case.params, x.reshape(-1, 24))
    extra = 0
    for path, (i, o) in weights.items():
        r = stacked.adapter.factors[path].rank
        extra += n * rows * (2 * r * (i + o) + r + o)  # two products, the scale, the sum
    assert 0.9 * extra <= compiled.cost_analysis()["flops"] - base <= extra


def test_scanned_layers_of_a_stack_have_no_copy_of_the_base():
    case, adapters = several(scan_case)
    stacked = scanned_layers()
    x = inputs(case, 4)
    apply = jax.vmap(lora_jax.lora(case.fn), in_axes=(AXES, 0))

    def merged(adapters, x):
        weights = jax.tree.map(lambda *xs: jnp.stack(xs), *map(lora_jax.merge, adapters))
        return jax.vmap(case.fn)(weights, x)

    both = jax.jit(lambda stacked, adapters, x: (apply(stacked, x), merged(adapters, x)))
    assert_close(*both(stacked, list(adapters), x), depth=26)  # three layers of eight sums, and two
    shapes = {
        v.aval.shape
        for e in all_eqns(jax.make_jaxpr(apply)(stacked, x))
        for v in e.outvars
        if hasattr(v.aval, "shape")
    }
    for leaf in jax.tree.leaves(case.params):
        if leaf.ndim > 2:
            assert (4, *leaf.shape) not in shapes
            assert (4, *leaf.shape[1:]) not in shapes
            assert (leaf.shape[0], 4, *leaf.shape[1:]) not in shapes


# --- one row for another -----------------------------------------------------------------------


def test_a_row_is_replaced_without_compiling_anything():
    case, adapters = several(dict_case)
    adapters = [*adapters[:2], adapters[3]]
    stacked = lora_jax.many.stack(adapters, rank=6)
    new = case.lorafy(4, alpha=5.0, key=jax.random.key(99), init=drawn)
    traces = []

    @jax.jit
    def run(p, x):
        traces.append(1)
        return jax.vmap(lora_jax.lora(case.fn), in_axes=(AXES, None))(p, x)

    before = np.asarray(run(stacked, case.x))
    expected = jax.jit(lora_jax.lora(case.fn))(new, case.x)
    put = jax.jit(lambda *args: lora_jax.many.replace_at(*args))  # its cache is this test's own
    for i in range(3):
        adapter = put(stacked.adapter, jnp.int32(i), new.adapter)
        assert_same(adapter, lora_jax.many.replace_at(stacked, i, new).adapter)
        assert_same(adapter, lora_jax.many.replace_at(stacked, np.int64(i), new.adapter).adapter)
        after = np.asarray(run(LoraParams(case.params, adapter), case.x))
        assert_close(after[i], expected)
        others = [n for n in range(3) if n != i]
        assert bits(after[others]) == bits(before[others])
        swapped = [new if n == i else p for n, p in enumerate(adapters)]
        assert_same(adapter, lora_jax.many.stack(swapped, rank=6).adapter)
    assert put._cache_size() == 1
    assert len(traces) == 1


def test_what_a_new_row_lacks_is_filled_in():
    case, adapters = several(dict_case)
    stacked, new = lora_jax.many.stack(adapters), case.lorafy(2, targets="w1")
    expected = row(lora_jax.many.stack([new, *adapters]).adapter, 0)
    for x in (new, new.adapter):
        again = lora_jax.many.replace_at(stacked, 2, x).adapter
        assert_same(row(again, 2), expected)
        for n in (0, 1, 3):
            assert_same(row(again, n), row(stacked.adapter, n))


def test_a_traced_row_out_of_range_writes_nothing():
    _, adapters = several(dict_case)
    stacked = lora_jax.many.stack([p.adapter for p in (*adapters[:2], adapters[3])])
    put = jax.jit(lora_jax.many.replace_at)
    for i in (*map(np.int32, (3, -1, 255, 2**31 - 1, -(2**31))), np.uint8(255)):
        assert bits(put(stacked, i, adapters[0].adapter)) == bits(stacked), repr(i)


def test_taking_rows():
    _, adapters = several(dict_case)
    stacked = lora_jax.many.stack(adapters)
    some = lora_jax.many.take(stacked, [3, 1, 1])
    assert some.base is stacked.base
    assert_same(some.adapter, row(stacked.adapter, np.array([3, 1, 1])))
    traced = jax.jit(lora_jax.many.take)
    assert_same(traced(stacked.adapter, jnp.array([3, 1])), row(stacked.adapter, np.array([3, 1])))
    count = traced({"x": jnp.ones((2, 3)), "n": jnp.zeros(2, jnp.int32)}, jnp.array([1, 2, -1]))
    np.testing.assert_array_equal(np.isnan(count["x"]).all(1), [False, True, True])
    assert count["n"].tolist() == [0, -(2**31), -(2**31)]


# --- values that are not finite ----------------------------------------------------------------


def test_an_adapter_that_is_not_finite():
    case, adapters = several(dict_case)
    stacked = lora_jax.many.stack([adapters[0], adapters[1], adapters[3]])
    traced = jax.jit(
        lambda base, xs: lora_jax.many.stack([LoraParams(base, x) for x in xs]).adapter
    )
    put = jax.jit(lora_jax.many.replace_at)
    apply = jax.jit(jax.vmap(lora_jax.lora(case.fn), in_axes=(AXES, None)))
    good = np.asarray(apply(stacked, case.x))
    for field, bad in itertools.product(("a", "b", "scale"), (np.nan, np.inf, -np.inf)):
        broken, at = spoilt(adapters[1], "w1", field, bad), (field, bad)
        message = rf"adapters\[1\] has NaNs or infinities in {field} of 'w1'.*0 \* NaN"
        with pytest.raises(ValueError, match=message):
            lora_jax.many.stack([adapters[0], broken])
        with pytest.raises(ValueError, match=rf"adapter has NaNs or infinities in {field} of 'w1'"):
            lora_jax.many.replace_at(stacked, 1, broken)
        singles = [adapters[0].adapter, broken.adapter, adapters[3].adapter]
        made = traced(case.params, singles)
        for adapter in (made, put(stacked.adapter, jnp.int32(1), broken.adapter)):
            for f in jax.tree.map(np.asarray, adapter).factors.values():
                assert np.isnan(f.scale[1]), at
                assert not np.any(f.a[1]), at
                assert not np.any(f.b[1]), at
                assert np.isfinite(np.concatenate([f.a.ravel(), f.b.ravel()])).all(), at
            outputs = np.asarray(apply(LoraParams(case.params, adapter), case.x))
            assert np.isnan(outputs[1]).all(), at
            assert bits(outputs[::2]) == bits(good[::2]), at
            # it is not taken for padding
            assert len(lora_jax.many.unstack(adapter)[1].factors) == 2, at


def spoilt(lora_params, path, field, value):
    f = lora_params.adapter.factors[path]
    x = np.array(getattr(f, field))
    x[(0,) * x.ndim] = value
    f = dataclasses.replace(f, **{field: jax.device_put(x)})
    adapter = dataclasses.replace(
        lora_params.adapter, factors=lora_params.adapter.factors | {path: f}
    )
    return dataclasses.replace(lora_params, adapter=adapter)


def test_a_leaf_trained_whole_that_is_not_finite():
    case, adapters = several(dict_case)
    full = {"b1": jnp.full(40, jnp.nan)}
    broken = LoraParams(case.params, dataclasses.replace(adapters[2].adapter, full=full))
    with pytest.raises(ValueError, match=r"adapters\[0\] has NaNs or infinities in full of 'b1'"):
        lora_jax.many.stack([broken])


# --- DoRA, parts, rows, residuals --------------------------------------------------------------


def dora(params, **options):
    lora_params = randomize_b(lorafied(params, dora=True, **options))
    factors = {
        path: dataclasses.replace(f, magnitude=f.magnitude * 1.1)
        for path, f in lora_params.adapter.factors.items()
    }
    return LoraParams(lora_params.base, Adapter(factors))


@pytest.mark.parametrize("keep_norms", [True, False])
def test_dora_beside_adapters_without_its_targets(keep_norms):
    case = dict_case()
    one = dora(case.params, rank=3, targets=["w1", "layers/0/w2"])
    two = dora(case.params, rank=2, targets="w1")

    def without(p):
        factors = {k: dataclasses.replace(f, norm=None) for k, f in p.adapter.factors.items()}
        return LoraParams(p.base, Adapter(factors))

    if not keep_norms:
        one, two = without(one), without(two)
    stacked = lora_jax.many.stack([one, two])
    f = stacked.adapter.factors["layers/0/w2"]
    norms = np.linalg.norm(np.asarray(case.params["layers"][0]["w2"], np.float64), axis=0)
    np.testing.assert_allclose(np.asarray(f.magnitude)[1], norms, rtol=tolerance(length=40))
    assert (f.norm is not None) == keep_norms
    assert_rows(case.fn, stacked, (one, two), case.x)
    back = lora_jax.many.unstack(stacked)
    assert_same(back[0].adapter, one.adapter)
    assert ("layers/0/w2" in back[1].adapter.factors) != keep_norms
    again = lora_jax.many.replace_at(stacked, 0, two)
    assert_same(row(again.adapter, 0), row(stacked.adapter, 1))
    with pytest.raises(ValueError, match=r"adapters\[1\] has no factors of 'layers/0/w2'.*DoRA"):
        lora_jax.many.stack([one.adapter, two.adapter])
    if keep_norms:
        mixed = lora_jax.many.stack([without(one), one])  # where one has them, all do
        assert_close(mixed.adapter, lora_jax.many.stack([one, one]).adapter)
        pair = lora_jax.many.stack([one.adapter, one.adapter])
        assert_same(pair, lora_jax.many.stack([one, one]).adapter)
        mixed = lora_jax.many.stack([without(one).adapter, one.adapter])
        assert mixed.factors["w1"].norm is None  # it is found at every call
        with pytest.raises(ValueError, match=r"adapter has no norms .* at '.*', as the stack has"):
            lora_jax.many.replace_at(pair, 0, without(one).adapter)
        magnitude = np.array(f.magnitude)
        magnitude[1, 0] *= 2
        trained = dataclasses.replace(f, magnitude=jax.device_put(magnitude))
        trained = Adapter(stacked.adapter.factors | {"layers/0/w2": trained})
        assert "layers/0/w2" in lora_jax.many.unstack(trained)[1].factors


def test_parts_and_rows_of_weights():
    params = {"c": normal(0, (6, 9)), "embedding": jnp.ones((8, 6))}

    def fn(p, x):
        return p["embedding"][x] @ p["c"]

    one = lorafied(params, 3, targets="c[:, 0:3]", rows={"embedding": [1, 2, 5]})
    two = lorafied(params, 1, targets=["c[:, 0:3]", "c[:, 6:9]"])
    adapters = [randomize_b(p, n) for n, p in enumerate((one, two))]
    stacked = lora_jax.many.stack(adapters, rank=4)
    ranks = {path: f.rank for path, f in stacked.adapter.factors.items()}
    assert ranks == {"c[:, 0:3]": 4, "c[:, 6:9]": 4, "embedding": 3}
    assert_rows(fn, stacked, adapters, jnp.arange(8))
    assert_same([p.adapter for p in lora_jax.many.unstack(stacked)], [p.adapter for p in adapters])
    assert_same(lora_jax.many.stack([p.adapter for p in adapters], rank=4), stacked.adapter)


def test_residual_adapters_of_one_base():
    case = dict_case()
    start = lora_jax.lorafy(case.params, 3, targets="w1", init="pissa")
    other = LoraParams(start.base, jax.tree.map(lambda x: x * 1.1, start.adapter))
    plain = randomize_b(lorafied(start.base, 2, targets="layers/0/w2"))
    adapters = (start, other, plain)
    assert_rows(case.fn, lora_jax.many.stack(adapters), adapters, case.x)
    with pytest.raises(ValueError, match=r"'w1' is not one array\. One is residual.*to_plain"):
        lora_jax.many.stack([start, lora_jax.lorafy(case.params, 3, targets="w1")])
    with pytest.raises(ValueError, match=r"adapters\[1\] has no factors of 'w1'.*residual"):
        lora_jax.many.stack([start.adapter, plain.adapter])
    with pytest.raises(ValueError, match=r"residual is False here and True there.*to_plain"):
        lora_jax.many.stack([start.adapter, lora_jax.lorafy(case.params, 3, targets="w1").adapter])
    with pytest.raises(ValueError, match=r"the stack are over different bases.*to_plain"):
        lora_jax.many.replace_at(lora_jax.many.stack([case.lorafy(3)]), 0, start)


def test_a_quantized_base_is_one_base():
    case = dict_case()
    base = lora_jax.quant.quantize(case.params, "int8", targets="w1")
    one, two = lorafied(base, 2, targets="w1"), dora(base, rank=3, targets="w1")
    again = LoraParams(jax.tree.map(lambda x: x, base), one.adapter)  # other boxes, same arrays
    assert lora_jax.many.stack([one, again]).adapter.factors["w1"].a.shape == (2, 24, 2)
    three = dora(base, rank=1, targets="layers/0/w2")
    stacked = lora_jax.many.stack([two, three])
    apply = lora_jax.lora(case.fn)
    outputs, alone = jax.jit(
        lambda stacked, adapters, x: (
            jax.vmap(apply, in_axes=(AXES, None))(stacked, x),
            [apply(p, x) for p in adapters],
        )
    )(stacked, [two, three], case.x)
    for found, expected in zip(np.asarray(outputs), alone, strict=True):
        assert_close(found, expected)


# --- bad input ---------------------------------------------------------------------------------


def test_misuse_of_stack_is_explained():
    case, adapters = several(dict_case)
    one, _, whole, _ = adapters

    def refused(error, message, *xs, **options):
        with pytest.raises(error, match=message):
            lora_jax.many.stack(*xs, **options)

    refused(TypeError, r"adapters is LoraParams, expected a sequence", one)
    refused(TypeError, r"adapters is int, expected a sequence", 3)
    refused(ValueError, r"there are no adapters", [])
    refused(TypeError, r"adapters\[1\] is int, expected a LoraParams", [one, 3])
    refused(TypeError, r"adapters\[0\] is LoraParams and adapters\[1\] Adapter", [one, one.adapter])
    refused(TypeError, r"rank=2\.0: expected an int", [one], rank=2.0)
    refused(TypeError, r"rank=True: expected an int", [one], rank=True)
    refused(ValueError, r"rank=2, and adapters\[0\] has rank 3 at '.*': .*resize", [one], rank=2)
    many = lora_jax.many.stack([one, one])
    refused(ValueError, r"adapters\[1\] is a stack: scale of '.*' has shape \(2,\)", [one, many])
    refused(TypeError, r"lora_jax\.combine", [lora_jax.split(one)[0]])
    copy = LoraParams(jax.tree.map(jnp.copy, case.params), one.adapter)
    refused(
        ValueError, r"adapters\[0\] and adapters\[1\] are over .*: 'b1' is not one", [one, copy]
    )
    more = LoraParams(case.params | {"extra": jnp.ones(2)}, one.adapter)
    refused(ValueError, r"different bases: they differ in \['extra'\]", [one, more])
    tupled = LoraParams(case.params | {"layers": tuple(case.params["layers"])}, one.adapter)
    refused(ValueError, r"different bases: they differ in their containers", [one, tupled])
    with pytest.raises(ValueError, match=r"under jit let the base be one argument"):
        jax.jit(lora_jax.many.stack)([one, one])
    refused(
        ValueError,
        r"adapters\[0\] does not train 'b1' fully.*Pass LoraParams",
        [one.adapter, whole.adapter],
    )


def changed(lora_params, path, **fields):
    f = dataclasses.replace(lora_params.adapter.factors[path], **fields)
    return Adapter({path: f})


def test_what_differs_is_named():
    params = {"w": jnp.ones((4, 4)), "v": jnp.ones((4, 6))}
    one = lorafied(params, 2, targets="w")

    def refused(message, *adapters):
        with pytest.raises(ValueError, match=message):
            lora_jax.many.stack([one.adapter, *adapters])

    refused(
        r"adapters\[1\] and adapters\[0\] differ at 'w': layout is 'oi' here and 'io' .*layout=",
        changed(one, "w", layout="oi"),
    )
    refused(r"frozen is \('a',\) here and \(\) there; .*freeze=", changed(one, "w", frozen=("a",)))
    f = one.adapter.factors["w"]
    half = {"a": f.a.astype(jnp.bfloat16)}
    refused(
        r"the dtype of a is 'bfloat16' here and 'float32' there.*dataclasses.replace",
        changed(one, "w", **half),
    )
    refused(
        r"the weight's shape is \(6, 4\) here and \(4, 4\) there.*different models",
        changed(one, "w", a=jnp.ones((6, 2))),
    )
    double = lorafied(params, 2, targets="w", dora=True).adapter
    refused(r"whether there is a magnitude is True here and False there", double)
    refused(r"do not fit its weight of shape \(\)", changed(one, "w", a=jnp.ones((3, 4, 2))))
    part = lorafied(params, 2, targets="w[0:2]")
    refused(
        r"adapters\[0\] trains 'w' and adapters\[1\] 'w\[0:2, :\]', and these overlap", part.adapter
    )
    whole = lorafied(params, 2, targets="v", full="w")
    refused(
        r"adapters\[0\] trains 'w' and adapters\[1\] all of 'w', and these overlap", whole.adapter
    )
    with pytest.raises(ValueError, match=r"trains 'w' and adapters\[1\] 'w\[0:2, :\]'.*overlap"):
        lora_jax.many.stack([one, part])
    tables = {"embedding": jnp.ones((8, 4))}
    ids = [lorafied(tables, targets=[], rows={"embedding": x}) for x in ([1], [2])]
    for xs in (ids, [p.adapter for p in ids]):
        with pytest.raises(
            ValueError, match=r"trains rows \[1\] of 'embedding' and adapters\[1\] rows \[2\] of"
        ):
            lora_jax.many.stack(xs)

    def with_full(x):
        return Adapter(one.adapter.factors, {"v": x})

    first = with_full(jnp.ones((4, 6)))
    for x, message in (
        (jnp.ones((4, 5)), r"differ at 'v': its shape is \(4, 5\) here and \(4, 6\) there"),
        (jnp.ones((4, 6), jnp.bfloat16), r"differ at 'v': its dtype is bfloat16 here and float32"),
    ):
        with pytest.raises(ValueError, match=message):
            lora_jax.many.stack([first, with_full(x)])
    narrow = LoraParams(params, with_full(jnp.ones((4, 6), jnp.bfloat16)))
    with pytest.raises(
        ValueError, match=r"adapters\[1\] does not train 'v' fully, .*bfloat16, and"
    ):
        lora_jax.many.stack([narrow, one])


def test_misuse_of_the_other_three_is_explained():
    case, adapters = several(dict_case)
    stacked = lora_jax.many.stack([adapters[0], adapters[1]])
    one = adapters[1]

    def refused(error, message, f, *args, **options):
        with pytest.raises(error, match=message):
            f(*args, **options)

    for f, rest in ((lora_jax.many.unstack, ()), (lora_jax.many.replace_at, (0, one))):
        name = f.__name__
        refused(TypeError, rf"{name}: stacked is dict, expected what", f, {}, *rest)
        refused(
            ValueError,
            rf"{name}: this is no stack: scale of 'layers/0/w2' is of shape \(\)",
            f,
            adapters[0],
            *rest,
        )
        half = lora_jax.split(stacked)[0]
        refused(ValueError, rf"{name}: this is no stack: .* is None.*combine", f, half, *rest)
        uneven = Adapter(stacked.adapter.factors, {"b1": jnp.ones((3, 40))})
        refused(ValueError, rf"{name}: .*leading axes \[\(2,\), \(3,\)\]", f, uneven, *rest)
        refused(
            ValueError,
            rf"{name}: .*leading axes \[\(\)\]",
            f,
            Adapter({}, {"b1": jnp.ones(())}),
            *rest,
        )
        refused(ValueError, rf"{name}: .*leading axes \[\]", f, Adapter({}), *rest)
        refused(
            ValueError,
            r"the base has no such leaf",
            f,
            LoraParams({"x": jnp.ones(3)}, stacked.adapter),
            *rest,
        )

    for i in (2, -1, np.int32(7), jnp.int32(-3)):
        refused(
            IndexError,
            rf"i={int(i)}: the stack has members 0 to 1",
            lora_jax.many.replace_at,
            stacked,
            i,
            one,
        )
    for i in (1.0, True, None, jnp.arange(2), jnp.float32(1)):
        refused(TypeError, r"i=.*: expected an integer", lora_jax.many.replace_at, stacked, i, one)
    replace_at = functools.partial(lora_jax.many.replace_at, stacked, 0)
    refused(TypeError, r"adapter is int, expected a LoraParams", replace_at, 3)
    refused(ValueError, r"adapter is a stack", replace_at, stacked)
    refused(
        ValueError,
        r"rank 5 at '.*', and the stack 3: .*resize\(adapter, 3\).*rank=5",
        replace_at,
        case.lorafy(5, targets="w1"),
    )
    whole = case.lorafy(2, full="b1")
    refused(
        ValueError, r"nothing in full for b1, which the adapter has\. Make a new", replace_at, whole
    )
    few = lora_jax.many.stack([one])
    refused(
        ValueError,
        r"nothing in factors for layers/0/w2, which",
        lora_jax.many.replace_at,
        few,
        0,
        adapters[0],
    )
    refused(
        TypeError,
        r"the stack is an Adapter and adapter a LoraParams",
        lora_jax.many.replace_at,
        stacked.adapter,
        0,
        one,
    )
    fulls = lora_jax.many.stack([whole]).adapter
    refused(
        ValueError,
        r"does not train 'b1' fully, as the stack does",
        lora_jax.many.replace_at,
        fulls,
        0,
        case.lorafy(2).adapter,
    )
    other = changed(case.lorafy(2), "w1", frozen=("a",))
    refused(ValueError, r"adapter and the stack differ at 'w1': frozen", replace_at, other)
    copy = LoraParams(jax.tree.map(jnp.copy, case.params), one.adapter)
    refused(ValueError, r"adapter and the stack are over different bases", replace_at, copy)

    take = lora_jax.many.take
    refused(IndexError, r"index 2 is out of range: the members are 0 to 1", take, stacked, [0, 2])
    refused(IndexError, r"index -1 is out of range", take, stacked, jnp.array([-1]))
    refused(
        TypeError,
        r"dtype bool, expected integers; for a mask, pass numpy\.flatnonzero",
        take,
        stacked,
        [True, False],
    )
    refused(ValueError, r"indices have shape \(\), expected a vector", take, stacked, 1)
    refused(
        ValueError,
        r"is a scalar, and has no axis of members.*vmap\(tx\.init\)",
        take,
        (stacked, {"count": jnp.ones(())}),
        [0],
    )
    refused(
        ValueError,
        r"leaves with equally many members, got \{2: .*, 3: .*\}",
        take,
        (stacked, jnp.ones(3)),
        [0],
    )
    refused(ValueError, r"leaves with equally many members, got no leaves", take, {}, [0])


def test_a_stack_is_not_merged():
    _, adapters = several(dict_case)
    stacked = lora_jax.many.stack(adapters)
    with pytest.raises(ValueError, match=r"a stack of adapters.*lora_jax\.many\.unstack"):
        lora_jax.merge(stacked)
    merged = [lora_jax.merge(p) for p in lora_jax.many.unstack(stacked)]
    assert_same(merged, [lora_jax.merge(p) for p in adapters])
    assert math.prod(stacked.adapter.factors["w1"].scale.shape) == 4


def test_rows_may_be_few_and_indices_narrow_but_not_none():
    adapter = lora_jax.many.stack(several(dict_case)[1]).adapter
    stacked = Adapter({"w1": adapter.factors["w1"]})
    many = lora_jax.many.take(stacked, np.zeros(200, int))
    assert_same(lora_jax.many.take(many, np.array([5], np.int8)), lora_jax.many.take(stacked, [0]))
    with pytest.raises(
        ValueError, match="take: indices are empty, and a stack has at least one member"
    ):
        lora_jax.many.take(stacked, np.zeros(0, int))


def test_a_scale_that_is_an_integer_becomes_a_float():
    for scale in (2, np.int32(2), jnp.int32(2)):
        made = [
            Adapter({"w": Factors(jnp.ones((6, 2)), jnp.ones((2, 8)), s, "io")})
            for s in (scale, 0.5)
        ]
        assert lora_jax.many.stack(made).factors["w"].scale.tolist() == [2.0, 0.5], repr(scale)
