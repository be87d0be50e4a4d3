"""Optimizers that know a from b."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, randomize_b

import lora_jax

PARAMS = {
    "w": jax.random.normal(jax.random.key(0), (8, 6)) / 3,
    "heads": jax.random.normal(jax.random.key(1), (6, 2, 4)) / 3,
    "experts": jax.random.normal(jax.random.key(2), (3, 8, 4)) / 3,
    "bias": jnp.ones(4),
}
LAYOUT = {"w": "io", "heads": "ioo", "experts": "bio"}
X = jax.random.normal(jax.random.key(9), (5, 8))
pytestmark = pytest.mark.usefixtures("standard_promotion")


def fn(p, x):
    h = jnp.tanh(x @ p["w"])
    h = jnp.einsum("bi,inh->bnh", h, p["heads"]).reshape(5, 8)
    return jnp.einsum("bi,eio->beo", jnp.tanh(h), p["experts"]) + p["bias"]


def adapted(**options):
    return randomize_b(
        lora_jax.lorafy(PARAMS, 2, targets=".*", layout=LAYOUT, full="bias", **options)
    )


def loss(lora_params):
    return ((lora_jax.lora(fn)(lora_params, X) - 1) ** 2).mean()


def both_styles(tx, lora_params, steps=3):
    """Train by ``optimizer`` and by ``split``; they must agree."""
    trainable, frozen = lora_jax.split(lora_params)
    state = tx.init(trainable)

    @jax.jit
    def step(trainable, state):
        _, grads = lora_jax.value_and_grad(loss)(lora_jax.combine(trainable, frozen))
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state

    whole, outer = lora_params, lora_jax.optimizer(tx)
    outer_state = outer.init(whole)

    @jax.jit
    def outer_step(whole, state):
        updates, state = outer.update(jax.grad(loss)(whole), state, whole)
        return optax.apply_updates(whole, updates), state

    for _ in range(steps):
        trainable, state = step(trainable, state)
        whole, outer_state = outer_step(whole, outer_state)
    assert_close(trainable, lora_jax.split(whole)[0], 1e-5)
    return lora_jax.combine(trainable, frozen)


def update_of(tx, lora_params):
    """One update and its gradient, by path."""
    trainable, frozen = lora_jax.split(lora_params)
    _, grads = lora_jax.value_and_grad(loss)(lora_jax.combine(trainable, frozen))
    return tx.update(grads, tx.init(trainable), trainable)[0], grads


def test_lora_plus_multiplies_the_rate_of_b_alone():
    lora_params = adapted()
    inner = optax.adamw(optax.linear_schedule(1e-2, 0, 10), weight_decay=0.1)
    plain, _ = update_of(inner, lora_params)
    plus, _ = update_of(lora_jax.lora_plus(inner, ratio=8), lora_params)
    for path, f in plus.factors.items():
        assert_close(f.a, plain.factors[path].a, 1e-6)
        assert_close(f.b, 8 * plain.factors[path].b, 1e-6)
    assert_close(plus.full, plain.full, 1e-6)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda p: lora_jax.lora_plus(optax.adamw(1e-2), 4),
        lambda p: lora_jax.riemannian(optax.sgd(1e-2)),
        lambda p: lora_jax.lora_plus(lora_jax.riemannian(optax.adamw(1e-3)), 4),
        lambda p: optax.chain(optax.clip_by_global_norm(1.0), lora_jax.lora_plus(optax.sgd(1e-3))),
    ],
)
def test_they_train_in_both_styles(make, dora):
    start = adapted(dora=dora)
    assert loss(both_styles(make(start), start, steps=20)) < loss(start)


def test_lora_fa_trains_in_both_styles_and_a_stays():
    start = adapted(freeze=("a",))
    end = both_styles(lora_jax.lora_fa(optax.sgd(0.1), start), start, steps=20)
    assert loss(end) < loss(start)
    for path, f in end.adapter.factors.items():
        assert (f.a == start.adapter.factors[path].a).all()


def matrices(path, f):
    n = f.layout.count("b")
    a = np.asarray(f.a, np.float64).reshape(*f.a.shape[:n], -1, f.rank)
    return a, np.asarray(f.b, np.float64).reshape(*f.b.shape[:n], f.rank, -1)


def test_lora_fa_steps_as_near_to_the_full_gradient_as_a_allows():
    lora_params = adapted(freeze=("a",))
    updates, grads = update_of(lora_jax.lora_fa(optax.sgd(1.0), lora_params), lora_params)
    merged = lora_jax.merge(lora_params)
    whole = jax.grad(lambda p: ((fn(p, X) - 1) ** 2).mean())(merged)
    for path, f in lora_params.adapter.factors.items():
        scale = float(f.scale)
        a, _ = matrices(path, f)
        target = np.asarray(whole[path], np.float64).reshape(*a.shape[:-1], -1)
        db = -np.asarray(updates.factors[path].b, np.float64).reshape(*a.shape[:-2], f.rank, -1)
        nearest = np.linalg.pinv(a) @ target / scale
        np.testing.assert_allclose(db, nearest, rtol=2e-3, atol=2e-5)
        assert updates.factors[path].a is None
        assert grads.factors[path].a is None


def test_riemannian_steps_do_not_depend_on_the_split():
    """``(a c, b / c)`` is the same weight: the step in ``a b`` is the same, too."""
    lora_params = adapted()
    c = jnp.array([[3.0, 1.0], [0.5, 2.0]])

    def other(f):
        n = f.layout.count("b")
        shape = (*f.b.shape[:n], f.rank, -1)
        return dataclasses.replace(
            f, a=f.a @ c, b=(jnp.linalg.inv(c) @ f.b.reshape(shape)).reshape(f.b.shape)
        )

    adapter = lora_params.adapter
    factors = {path: other(f) for path, f in adapter.factors.items()}
    twin = dataclasses.replace(lora_params, adapter=dataclasses.replace(adapter, factors=factors))
    tx, small = lora_jax.riemannian(optax.sgd(1.0), damping=0.0), 1e-2
    steps = []
    for params in (lora_params, twin):
        updates, _ = update_of(tx, params)
        steps.append({})
        for path, f in params.adapter.factors.items():
            (a, b), (da, db) = matrices(path, f), matrices(path, _like(f, updates.factors[path]))
            steps[-1][path] = (a + small * da) @ (b + small * db) - a @ b - small**2 * da @ db
    for path in factors:
        np.testing.assert_allclose(steps[0][path], steps[1][path], rtol=1e-2, atol=1e-6)


def _like(f, update):
    return dataclasses.replace(f, a=update.a, b=update.b)


def test_it_wraps_transformations_that_take_more_arguments():
    lora_params = adapted()
    trainable, _ = lora_jax.split(lora_params)
    tx = lora_jax.lora_plus(optax.contrib.reduce_on_plateau())
    grads = jax.tree.map(jnp.ones_like, trainable)
    tx.update(grads, tx.init(trainable), trainable, value=1.0)


def test_what_they_refuse():
    lora_params = adapted()
    for ratio in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="expected a positive number"):
            lora_jax.lora_plus(optax.sgd(1.0), ratio)
    with pytest.raises(ValueError, match=r"'a' of 'experts' trains.*freeze=\('a',\)"):
        lora_jax.lora_fa(optax.sgd(1.0), lora_params)
    with pytest.raises(TypeError, match="lora_fa: expected a LoraParams, got dict"):
        lora_jax.lora_fa(optax.sgd(1.0), {})
    frozen = adapted(freeze=("a",))
    tx = lora_jax.lora_fa(optax.sgd(1.0), frozen)
    other = lora_jax.lorafy({"v": PARAMS["w"]}, 2, targets="v", freeze=("a",))
    trainable, _ = lora_jax.split(other)
    with pytest.raises(ValueError, match="made for other factors, and not for 'v'"):
        tx.update(trainable, tx.init(trainable), trainable)
    trainable, _ = lora_jax.split(frozen)
    tx = lora_jax.riemannian(optax.sgd(1.0))
    with pytest.raises(ValueError, match="needs params"):
        tx.update(trainable, tx.init(trainable))
    with pytest.raises(ValueError, match="a factor of 'experts' is frozen"):
        tx.update(trainable, tx.init(trainable), trainable)


def test_lora_fa_of_a_stack_is_refused():
    params = {"query": {"kernel": jnp.ones((3, 2))}}
    one = lora_jax.lorafy(params, 2, freeze=("a",))
    with pytest.raises(ValueError, match=r"this is a stack, .*jax\.vmap\(step\)"):
        lora_jax.lora_fa(optax.sgd(1.0), lora_jax.stack([one, one]))
