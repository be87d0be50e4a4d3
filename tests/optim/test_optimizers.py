"""Optimizers that know a from b."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, drawn, normal, randomize_b
from jax import lax

import lora_jax

PARAMS = {
    "w": normal(0, (8, 6), std=1 / 3),
    "heads": normal(1, (6, 2, 4), std=1 / 3),
    "experts": normal(2, (3, 8, 4), std=1 / 3),
    "bias": normal(3, (4,)),
}
LAYOUT = {"w": "io", "heads": "ioo", "experts": "bio"}
X = normal(9, (5, 8))
pytestmark = pytest.mark.usefixtures("standard_promotion")


def fn(p, x):
    h = jnp.tanh(x @ p["w"])
    h = jnp.einsum("bi,inh->bnh", h, p["heads"]).reshape(5, 8)
    return jnp.einsum("bi,eio->beo", jnp.tanh(h), p["experts"]) + p["bias"]


def adapted(**options):
    options = {"targets": ".*", "layout": LAYOUT, "full": "bias", "init": drawn} | options
    return randomize_b(lora_jax.lorafy(PARAMS, 2, **options))


def loss(lora_params):
    return ((lora_jax.lora(fn)(lora_params, X) - 1) ** 2).mean()


def both_styles(tx, lora_params, steps):
    """Train by ``optimizer`` and by ``split``: the results, and the losses before and after."""
    trainable, frozen = lora_jax.split(lora_params)
    outer = lora_jax.optimizer(tx)

    def step(state, _):
        trainable, state = state
        _, grads = lora_jax.value_and_grad(loss)(lora_jax.combine(trainable, frozen))
        updates, state = tx.update(grads, state, trainable)
        return (optax.apply_updates(trainable, updates), state), None

    def outer_step(state, _):
        whole, state = state
        updates, state = outer.update(jax.grad(loss)(whole), state, whole)
        return (optax.apply_updates(whole, updates), state), None

    (split, _), _ = lax.scan(step, (trainable, tx.init(trainable)), length=steps)
    start = lora_params, outer.init(lora_params)
    (whole, _), _ = lax.scan(outer_step, start, length=steps)
    return lora_jax.combine(split, frozen), whole, loss(lora_params), loss(whole)


def update_of(tx, lora_params):
    """One update and its gradient, by path."""
    trainable, frozen = lora_jax.split(lora_params)
    _, grads = lora_jax.value_and_grad(loss)(lora_jax.combine(trainable, frozen))
    return tx.update(grads, tx.init(trainable), trainable)[0], grads


def test_lora_plus_multiplies_the_rate_of_b_alone():
    inner = optax.adamw(optax.linear_schedule(1e-2, 0, 10), weight_decay=0.1)
    txs = inner, lora_jax.optim.lora_plus(inner, ratio=8)
    (plain, _), (plus, _) = jax.jit(lambda p: [update_of(tx, p) for tx in txs])(adapted())
    for path, f in plus.factors.items():
        assert_close(f.a, plain.factors[path].a)
        assert_close(f.b, 8 * np.asarray(plain.factors[path].b, np.float64))
    assert_close(plus.full, plain.full)


def adam(rate):
    """With an epsilon above the rounding of gradients, which Adam would make whole steps of."""
    return optax.adamw(rate, eps=1e-4)


TXS = {
    "LoRA+": lora_jax.optim.lora_plus(adam(1e-2), 4),
    "Riemannian": lora_jax.optim.riemannian(optax.sgd(1e-2)),
    "both": lora_jax.optim.lora_plus(lora_jax.optim.riemannian(adam(1e-3)), 4),
    "chained": optax.chain(
        optax.clip_by_global_norm(1.0), lora_jax.optim.lora_plus(optax.sgd(1e-3))
    ),
}


@pytest.mark.parametrize("dora", [True, pytest.param(False, marks=pytest.mark.long)])
def test_they_train_in_both_styles(dora):
    steps, start = 10, adapted(dora=dora)
    train = jax.jit(lambda p: {name: both_styles(tx, p, steps) for name, tx in TXS.items()})
    for name, (split, whole, before, after) in train(start).items():
        assert after < before, name
        assert_close({name: split}, {name: whole}, depth=16 * steps)


def test_lora_fa_trains_in_both_styles_and_a_stays():
    steps, start = 10, adapted(freeze=("a",))
    tx = lora_jax.optim.lora_fa(optax.sgd(0.1), start)
    split, whole, before, after = jax.jit(lambda p: both_styles(tx, p, steps))(start)
    assert after < before
    assert_close(split, whole, depth=16 * steps)
    for path, f in split.adapter.factors.items():
        assert np.array_equal(f.a, start.adapter.factors[path].a)


def matrices(path, f):
    n = f.layout.count("b")
    a = np.asarray(f.a, np.float64).reshape(*f.a.shape[:n], -1, f.rank)
    return a, np.asarray(f.b, np.float64).reshape(*f.b.shape[:n], f.rank, -1)


def test_lora_fa_steps_as_near_to_the_full_gradient_as_a_allows():
    lora_params = adapted(freeze=("a",))
    tx = lora_jax.optim.lora_fa(optax.sgd(1.0), lora_params)

    @jax.jit
    def both(lora_params):
        def plain(p):
            return ((fn(p, X) - 1) ** 2).mean()

        return *update_of(tx, lora_params), jax.grad(plain)(lora_jax.merge(lora_params))

    updates, grads, whole = both(lora_params)
    for path, f in lora_params.adapter.factors.items():
        scale = float(f.scale)
        a, _ = matrices(path, f)
        target = np.asarray(whole[path], np.float64).reshape(*a.shape[:-1], -1)
        db = -np.asarray(updates.factors[path].b, np.float64).reshape(*a.shape[:-2], f.rank, -1)
        nearest = np.linalg.pinv(a) @ target / scale
        assert_close(db, nearest, dtype=jnp.float32)
        assert updates.factors[path].a is None
        assert grads.factors[path].a is None


def test_riemannian_steps_do_not_depend_on_the_split():
    """``(a c, b / c)`` is the same weight: the step in ``a b`` is the same, too."""
    lora_params = adapted()
    c = np.array([[3.0, 1.0], [0.5, 2.0]])

    def other(f):
        n = f.layout.count("b")
        shape = (*f.b.shape[:n], f.rank, -1)
        a, b = np.asarray(f.a) @ c, np.linalg.inv(c) @ np.asarray(f.b).reshape(shape)
        return dataclasses.replace(
            f, a=jnp.asarray(a, f.a.dtype), b=jnp.asarray(b.reshape(f.b.shape), f.b.dtype)
        )

    adapter = lora_params.adapter
    factors = {path: other(f) for path, f in adapter.factors.items()}
    twin = dataclasses.replace(lora_params, adapter=dataclasses.replace(adapter, factors=factors))
    tx, small = lora_jax.optim.riemannian(optax.sgd(1.0), damping=0.0), 1e-2
    steps, update = [], jax.jit(lambda p: update_of(tx, p)[0])
    for params in (lora_params, twin):
        updates = update(params)
        steps.append({})
        for path, f in params.adapter.factors.items():
            (a, b), (da, db) = matrices(path, f), matrices(path, _like(f, updates.factors[path]))
            steps[-1][path] = (a + small * da) @ (b + small * db) - a @ b - small**2 * da @ db
    for path in factors:
        assert_close(steps[0][path], steps[1][path], dtype=jnp.float32, depth=16)


def _like(f, update):
    return dataclasses.replace(f, a=update.a, b=update.b)


def test_it_wraps_transformations_that_take_more_arguments():
    lora_params = adapted()
    trainable, _ = lora_jax.split(lora_params)
    tx = lora_jax.optim.lora_plus(optax.contrib.reduce_on_plateau())
    grads = jax.tree.map(lambda x: jnp.asarray(np.ones(x.shape, x.dtype)), trainable)
    update = jax.jit(lambda grads: tx.update(grads, tx.init(trainable), trainable, value=1.0))
    updates, _ = update(grads)
    a, b = (np.asarray(x) for x in (updates.factors["w"].a, updates.factors["w"].b))
    assert (b == 16 * a[0, 0]).all()


def test_what_they_refuse():
    lora_params = adapted()
    for ratio in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="expected a positive number"):
            lora_jax.optim.lora_plus(optax.sgd(1.0), ratio)
    with pytest.raises(ValueError, match=r"'a' of 'experts' trains.*freeze=\('a',\)"):
        lora_jax.optim.lora_fa(optax.sgd(1.0), lora_params)
    with pytest.raises(TypeError, match="lora_fa: expected a LoraParams, got dict"):
        lora_jax.optim.lora_fa(optax.sgd(1.0), {})
    frozen = adapted(freeze=("a",))
    tx = lora_jax.optim.lora_fa(optax.sgd(1.0), frozen)
    other = lora_jax.lorafy({"v": PARAMS["w"]}, 2, targets="v", freeze=("a",))
    trainable, _ = lora_jax.split(other)
    with pytest.raises(ValueError, match="made for other factors, and not for 'v'"):
        tx.update(trainable, tx.init(trainable), trainable)
    trainable, _ = lora_jax.split(frozen)
    tx = lora_jax.optim.riemannian(optax.sgd(1.0))
    with pytest.raises(ValueError, match="needs params"):
        tx.update(trainable, tx.init(trainable))
    with pytest.raises(ValueError, match="a factor of 'experts' is frozen"):
        tx.update(trainable, tx.init(trainable), trainable)


def test_lora_fa_of_a_stack_is_refused():
    params = {"query": {"kernel": jnp.ones((3, 2))}}
    one = lora_jax.lorafy(params, 2, freeze=("a",))
    with pytest.raises(ValueError, match=r"this is a stack, .*jax\.vmap\(step\)"):
        lora_jax.optim.lora_fa(optax.sgd(1.0), lora_jax.many.stack([one, one]))
