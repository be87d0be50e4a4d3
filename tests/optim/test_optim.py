"""Training: only the adapter moves; two styles, one result; what a step costs."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapters import lorafy
from flax import nnx
from flax.training.train_state import TrainState
from helpers import (
    CASES,
    all_eqns,
    assert_close,
    bits,
    dict_case,
    einsum_case,
    loss_of,
    normal,
    ones,
    randomize_b,
    scan_case,
    tolerance,
)

import lora_jax

# Optax and Flax mix dtypes themselves.
pytestmark = pytest.mark.usefixtures("standard_promotion")

TX = optax.adamw(1e-2, weight_decay=0.1)


def target_loss(case):
    target = normal(5, jax.eval_shape(case.fn, case.params, case.x).shape)
    apply = lora_jax.lora(case.fn)
    return lambda lora_params, x: ((apply(lora_params, x) - target) ** 2).mean()


def whole_step(loss, tx):
    @jax.jit
    def step(lora_params, opt_state, x):
        value, grads = jax.value_and_grad(loss)(lora_params, x)
        updates, opt_state = tx.update(grads, opt_state, lora_params)
        return optax.apply_updates(lora_params, updates), opt_state, value

    return step


def split_step(loss, tx):
    @functools.partial(jax.jit, donate_argnums=(0, 2))
    def step(trainable, frozen, opt_state, x):
        def of(trainable):
            return loss(lora_jax.combine(trainable, frozen), x)

        value, grads = jax.value_and_grad(of)(trainable)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, value

    return step


def repeated(step, count):
    """Do ``count`` steps in one program; ``step`` takes and returns the state, and a value."""
    return lambda state: jax.lax.scan(lambda state, _: step(*state), state, length=count)


@pytest.mark.parametrize(
    "make",
    [dict_case, *(pytest.param(case, marks=pytest.mark.long) for case in (scan_case, einsum_case))],
)
def test_a_hundred_steps_leave_the_base_alone_and_both_styles_agree(make):
    case, count = make(), 100
    # The gradient of a key's bias is zero but for rounding: Adam would make whole steps of that.
    full = ".*scale|.*(value|out|Dense_.)/bias|b1"
    lora_params = lorafy(case.params, 4, targets=case.targets, full=full)
    before = bits(lora_params.base)
    scales = [np.asarray(f.scale) for f in lora_params.adapter.factors.values()]
    loss, adam = target_loss(case), optax.adamw(1e-2, eps=1e-4, weight_decay=0.1)
    tx = lora_jax.optimizer(adam)
    trainable, frozen = lora_jax.split(lora_params)

    def whole_style(lora_params, opt_state):
        *state, value = whole_step(loss, tx)(lora_params, opt_state, case.x)
        return tuple(state), value

    def split_style(trainable, opt_state):
        *state, value = split_step(loss, adam)(trainable, frozen, opt_state, case.x)
        return tuple(state), value

    @jax.jit
    def run(lora_params, trainable):
        whole = repeated(whole_style, count)((lora_params, tx.init(lora_params)))
        return whole, repeated(split_style, count)((trainable, adam.init(trainable)))

    ((whole, _), values), ((trainable, _), _) = run(lora_params, trainable)
    assert values[-1] < 0.7 * values[0]
    assert bits(whole.base) == before
    assert [np.asarray(f.scale) for f in whole.adapter.factors.values()] == scales
    assert_close(lora_jax.combine(trainable, frozen).adapter, whole.adapter, depth=16 * count)
    assert bits(whole.adapter) != bits(lora_params.adapter)


def test_frozen_leaves_keep_minus_zero():
    params = {"query": jnp.asarray(-np.zeros((4, 4), np.float32))}
    params["other"] = jnp.asarray(-np.zeros(3, np.float32))
    lora_params = lorafy(params)
    tx = lora_jax.optimizer(optax.sgd(1.0))
    grads = jax.tree.map(lambda x: jnp.asarray(np.zeros(x.shape, x.dtype)), lora_params)

    def update(lora_params, grads):
        updates, _ = tx.update(grads, tx.init(lora_params), lora_params)
        return optax.apply_updates(lora_params, updates)

    for f in (update, jax.jit(update)):  # both: a compiler may take ``x + 0`` for ``x``
        assert bits(f(lora_params, grads).base) == bits(params)


def test_the_optimizer_state_is_of_the_adapter_only():
    case = scan_case()
    lora_params = lorafy(case.params, 4, targets=case.targets)
    state = jax.eval_shape(lora_jax.optimizer(optax.adam(1e-3)).init, lora_params)
    trainable = sum(x.size for x in jax.tree.leaves(lora_jax.split(lora_params)[0]))
    moments = sum(x.size for x in jax.tree.leaves(state) if x.ndim)
    assert moments == 2 * trainable


def test_decay_and_clipping_see_the_adapter_only():
    lora_params = randomize_b(lorafy({"query": 1e6 * ones(4, 4)}))
    clipped = lora_jax.optimizer(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)))
    decayed = lora_jax.optimizer(optax.add_decayed_weights(0.5))

    @jax.jit
    def both(lora_params):
        grads = jax.tree.map(jnp.ones_like, lora_params)
        return [tx.update(grads, tx.init(lora_params), lora_params)[0] for tx in (clipped, decayed)]

    updates, _ = lora_jax.split(both(lora_params)[0])
    assert_close(jnp.sqrt(sum((x**2).sum() for x in jax.tree.leaves(updates))), np.float64(1))
    updates = both(lora_params)[1]
    assert not np.any(updates.base["query"])
    assert not np.any(updates.adapter.factors["query"].scale)
    f, u = lora_params.adapter.factors["query"], updates.adapter.factors["query"]
    assert_close(u.b, 1 + 0.5 * np.asarray(f.b, np.float64))


def test_accumulation_over_steps_inside_and_outside():
    lora_params = randomize_b(lorafy({"query": ones(4, 4)}))
    grads = jax.tree.map(lambda x: ones(*x.shape), lora_params)
    inside = lora_jax.optimizer(optax.MultiSteps(optax.sgd(1.0), 2))
    outside = optax.MultiSteps(lora_jax.optimizer(optax.sgd(1.0)), 2)
    for tx in (inside, outside):

        def step(params, opt_state, tx=tx):
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        start = lora_params, tx.init(lora_params)
        (params, _), _ = jax.jit(repeated(step, 2))(start)
        f, g = lora_params.adapter.factors["query"], params.adapter.factors["query"]
        assert_close(g.b, np.asarray(f.b, np.float64) - 1)
        assert bits(params.base) == bits(lora_params.base)
        assert g.scale == f.scale


def test_gradients_of_base_and_scale_are_zeros():
    case = einsum_case()
    grads = jax.jit(jax.grad(loss_of(lora_jax.lora(case.fn))))(case.lorafy(), case.x)
    grads = jax.tree.map(np.asarray, grads)
    assert all(not np.any(g) for g in jax.tree.leaves(grads.base))
    assert all(not np.any(f.scale) for f in grads.adapter.factors.values())
    assert all(np.any(f.a) and np.any(f.b) for f in grads.adapter.factors.values())


def test_split_and_combine_are_inverse():
    lora_params = CASES["nnx dropout+batchnorm"]().lorafy(full=".*bias")
    trainable, frozen = lora_jax.split(lora_params)
    both = lora_jax.combine(trainable, frozen)
    assert jax.tree.structure(both) == jax.tree.structure(lora_params)
    pairs = zip(jax.tree.leaves(both), jax.tree.leaves(lora_params), strict=True)
    assert all(x is y for x, y in pairs)
    sizes = [len(jax.tree.leaves(t)) for t in (trainable, frozen, lora_params)]
    assert sizes[0] + sizes[1] == sizes[2]


def test_value_and_grad_agrees_with_grad_and_has_aux():
    case = dict_case()
    lora_params = case.lorafy()
    loss = loss_of(lora_jax.lora(case.fn))
    with_aux = lora_jax.value_and_grad(lambda p, x: (loss(p, x), {"aux": p.base}), has_aux=True)
    ways = lora_jax.value_and_grad(loss), jax.value_and_grad(loss), with_aux
    ours, full, aux = jax.jit(lambda *args: tuple(way(*args) for way in ways))(lora_params, case.x)
    expected = full[0], lora_jax.split(full[1])[0]
    assert_close(ours, expected, depth=64)
    assert_close((aux[0][0], aux[1]), expected, depth=64)
    assert bits(aux[0][1]) == bits({"aux": lora_params.base})


def test_an_integer_base_trains_by_value_and_grad():
    case = CASES["nnx dropout+batchnorm"]()
    lora_params = case.lorafy()
    loss = loss_of(lora_jax.lora(case.fn))
    with pytest.raises(TypeError, match="grad requires real- or complex-valued inputs"):
        jax.grad(loss)(lora_params, case.x)
    _, grads = jax.jit(lora_jax.value_and_grad(loss))(lora_params, case.x)
    assert all(np.any(f.a) and np.any(f.b) for f in grads.factors.values())


def test_a_train_state_holds_lora_params():
    case = dict_case()
    lora_params = lorafy(case.params, 4, targets=case.targets)
    state = TrainState.create(
        apply_fn=lora_jax.lora(case.fn), params=lora_params, tx=lora_jax.optimizer(TX)
    )

    @jax.jit
    def step(state, x):
        grads = jax.grad(lambda p: (state.apply_fn(p, x) ** 2).mean())(state.params)
        return state.apply_gradients(grads=grads)

    after = step(step(state, case.x), case.x)
    assert after.step == 2
    assert bits(after.params.base) == bits(lora_params.base)
    assert bits(after.params.adapter) != bits(lora_params.adapter)


def test_an_nnx_optimizer_takes_lora_params():
    case = dict_case()
    lora_params = lorafy(case.params, 4, targets=case.targets, full="b1")
    loss = loss_of(lora_jax.lora(case.fn))
    model = jax.tree.map(nnx.Param, nnx.as_pure(lora_params))
    assert isinstance(model, lora_jax.LoraParams)
    optimizer = nnx.Optimizer(model, lora_jax.optimizer(TX), wrt=nnx.Param, graph=False)

    @functools.partial(nnx.jit, graph=False)
    def step(model, optimizer, x):
        grads = nnx.grad(lambda m: loss(nnx.as_pure(m), x), graph=False)(model)
        optimizer.update(model, grads)

    tx = lora_jax.optimizer(TX)
    expected, opt_state, plain = lora_params, tx.init(lora_params), whole_step(loss, tx)
    for _ in range(2):
        step(model, optimizer, case.x)
        expected, opt_state, _ = plain(expected, opt_state, case.x)
    after = nnx.as_pure(model)
    assert bits(after.base) == bits(lora_params.base)
    assert bits(after.adapter) != bits(lora_params.adapter)
    assert_close(after, expected, depth=64)


def test_labels_of_a_tree_with_lora_params_inside():
    lora_params = lorafy({"query": ones(4, 4)})
    labels = lora_jax.labels({"encoder": lora_params, "temperature": ones()})
    assert labels["temperature"] == "lora"
    assert labels["encoder"].base == "frozen"


def test_full_rank_fits_any_update():
    w, delta = normal(0, (8, 6)), normal(1, (8, 6), std=0.3)
    lora_params = lorafy({"query": w}, 6)
    apply = lora_jax.lora(lambda p, x: x @ p["query"])
    x = jnp.asarray(np.eye(8, dtype=np.float32))

    def loss(lora_params):
        return ((apply(lora_params, x) - x @ (w + delta)) ** 2).sum()

    tx = lora_jax.optimizer(optax.adam(optax.cosine_decay_schedule(0.05, 1500)))

    def step(lora_params, opt_state):
        grads = jax.grad(loss)(lora_params)
        updates, opt_state = tx.update(grads, opt_state, lora_params)
        return (optax.apply_updates(lora_params, updates), opt_state), None

    fit = jax.jit(lambda p: repeated(step, 1500)((p, tx.init(p))))
    (lora_params, _), _ = fit(lora_params)
    learned = np.asarray(lora_jax.merge(lora_params)["query"], np.float64) - np.asarray(w)
    assert np.abs(learned - delta).max() <= tolerance(depth=1500) * np.abs(delta).max()


# --- what a step costs -------------------------------------------------------------------------


def model(layers=4, d=64, f=160):
    seeds = itertools.count()
    make = lambda *shape: normal(next(seeds), shape, std=1 / math.sqrt(shape[0]))  # noqa: E731
    return [
        {"query": make(d, d), "value": make(d, d), "up": make(d, f), "down": make(f, d)}
        for _ in range(layers)
    ]


def forward(params, x):
    for p in params:
        x = x + jnp.tanh(x @ p["query"]) * (x @ p["value"])
        x = x + jax.nn.relu(x @ p["up"]) @ p["down"]
    return x


on_cpu = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="reads costs and programs of the CPU's compiler"
)


@on_cpu
def test_the_step_costs_what_the_low_rank_products_cost():
    params, tokens = model(layers=2), 512
    x = normal(1, (tokens, 64))
    apply = lora_jax.lora(forward)

    def flops(f, *args):
        return jax.jit(f).lower(*args).compile().cost_analysis()["flops"]

    def step(trainable, opt_state, x, frozen):
        def adapted(trainable, x):
            return (apply(lora_jax.combine(trainable, frozen), x) ** 2).sum()

        grads, dx = jax.grad(adapted, argnums=(0, 1))(trainable, x)
        updates, opt_state = TX.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, dx

    floor = flops(jax.grad(lambda x: (forward(params, x) ** 2).sum()), x)
    for rank in (8, 16):
        lora_params = randomize_b(lorafy(params, rank, targets="all-linear"))
        trainable, frozen = lora_jax.split(lora_params)
        state = jax.eval_shape(TX.init, trainable)
        cost = flops(step, trainable, state, x, frozen)
        low_rank = tokens * sum(6 * rank * sum(w.shape) for w in jax.tree.leaves(params))
        assert 1.0 <= (cost - floor) / low_rank <= 1.15, rank


@on_cpu
def test_the_compiled_step_has_no_dense_update_and_no_base_gradient():
    params = model(layers=1, d=56, f=104)
    lora_params = randomize_b(lorafy(params, 8, targets="all-linear"))
    x = ones(24, 56)

    def hlo(apply):
        step = whole_step(lambda p, x: (apply(p, x) ** 2).sum(), lora_jax.optimizer(TX))
        opt_state = jax.eval_shape(lora_jax.optimizer(TX).init, lora_params)
        text = step.lower(lora_params, opt_state, x).compile().as_text()
        dots = [line for line in text.splitlines() if " dot(" in line or "dot_general" in line]
        shapes = {"f32[56,56]", "f32[56,104]", "f32[104,56]"}
        return [line for line in dots if any(s in line.split("(")[0] for s in shapes)], text

    dense, text = hlo(lora_jax.lora(forward))
    assert "dot(" in text or "matmul" in text
    assert not dense
    dense, _ = hlo(lambda p, x: forward(lora_jax.merge(p), x))
    assert dense  # the check sees what it looks for


def test_the_split_step_returns_nothing_of_the_base():
    lora_params = lorafy(model(layers=2), 8, targets="all-linear")
    trainable, frozen = lora_jax.split(lora_params)
    loss = lambda p, x: (lora_jax.lora(forward)(p, x) ** 2).sum()  # noqa: E731
    args = (trainable, frozen, jax.eval_shape(TX.init, trainable), ones(8, 64))
    analysis = split_step(loss, TX).lower(*args).compile().memory_analysis()
    adapter_bytes = sum(x.nbytes for x in jax.tree.leaves(trainable))
    assert analysis.output_size_in_bytes <= 3 * adapter_bytes + 4096
    assert analysis.alias_size_in_bytes >= 3 * adapter_bytes


def test_changing_rank_free_settings_recompiles_nothing():
    lora_params = lorafy(model(1), 4, targets="all-linear")
    other = randomize_b(lorafy(model(1), 4, targets="all-linear", alpha=3.0))
    traces = []

    @jax.jit
    def run(p, x):
        traces.append(1)
        return lora_jax.lora(forward)(p, x)

    x = ones(2, 64)
    run(lora_params, x)
    run(other, x)
    run(lora_jax.LoraParams(lora_params.base, other.adapter), x)
    assert len(traces) == 1


# --- bad input ---------------------------------------------------------------------------------


def test_wrong_kinds_raise():
    lora_params = lorafy({"query": ones(4, 4)})
    trainable, frozen = lora_jax.split(lora_params)
    with pytest.raises(TypeError, match="neither a LoraParams nor an Adapter in dict"):
        lora_jax.labels(lora_params.base)
    for f in (lora_jax.split, lora_jax.value_and_grad(lambda p: 0.0)):
        with pytest.raises(TypeError, match="expected a LoraParams"):
            f(lora_params.base)
    with pytest.raises(TypeError, match="expected an Optax transformation"):
        lora_jax.optimizer(3e-4)
    with pytest.raises(TypeError, match="combine: trainable is LoraParams"):
        lora_jax.combine(lora_params, frozen)
    with pytest.raises(TypeError, match="combine: expected a LoraParams"):
        lora_jax.combine(trainable, trainable)
    other = dataclasses.replace(trainable, factors={})
    with pytest.raises(ValueError, match=r"differ in the paths \['query'\]"):
        lora_jax.combine(other, frozen)


def test_the_jaxpr_of_a_step_stops_at_the_base():
    lora_params = randomize_b(lorafy(model(1), 4, targets="all-linear"))
    step = jax.grad(lambda p, x: lora_jax.lora(forward)(p, x).sum())
    eqns = all_eqns(jax.make_jaxpr(step)(lora_params, ones(24, 64)))
    shapes = [e.outvars[0].aval.shape for e in eqns if e.primitive.name == "dot_general"]
    assert (64, 160) not in shapes
    assert (160, 64) not in shapes
