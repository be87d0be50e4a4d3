"""What a user writes first: every pair of a gradient and an optimizer trains the adapter alone."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, assert_same, normal

import lora_jax
from lora_jax._transform import whole

pytestmark = pytest.mark.usefixtures("standard_promotion")  # Optax mixes dtypes itself

PARAMS = {"query": {"kernel": normal(0, (6, 5)), "bias": jnp.ones(5)}}
X = normal(1, (7, 6))
apply = lora_jax.lora(lambda p, x: x @ p["query"]["kernel"] + p["query"]["bias"][None])


def loss(p):
    return ((apply(p, X) - 1) ** 2).mean()


def lorafy(**options):
    return lora_jax.lorafy(PARAMS, 2, bias="lora_only", **options)


def trained(tx, params, value_and_grad, extra, steps=4):
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        value, grads = value_and_grad(params)
        options = {"value": value, "grad": grads, "value_fn": loss_of(params)} if extra else {}
        updates, state = tx.update(grads, state, params, **options)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params


def loss_of(params):
    if isinstance(params, lora_jax.LoraParams):
        return loss
    _, frozen = lora_jax.split(lorafy())
    return lambda trainable: loss(lora_jax.combine(trainable, frozen))


@pytest.mark.parametrize(
    ("tx", "extra"),
    [
        (optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1, weight_decay=0.3)), False),
        (optax.lbfgs(), True),
        (optax.MultiSteps(optax.adamw(0.1), 2), False),
    ],
    ids=["adamw", "lbfgs", "multi steps"],
)
def test_all_styles_take_the_same_steps_and_nothing_frozen_moves(tx, extra):
    start = lorafy()
    trainable, frozen = lora_jax.split(start)
    alone = trained(tx, trainable, lambda t: jax.value_and_grad(loss_of(t))(t), extra)
    wanted = lora_jax.combine(alone, frozen)
    whole_tx = lora_jax.optimizer(tx)
    for value_and_grad in (jax.value_and_grad(loss), lora_jax.value_and_grad(loss)):
        found = trained(whole_tx, start, value_and_grad, extra)
        assert_same(found.base, start.base)
        assert_same(
            found.adapter.factors["query/kernel"].scale, start.adapter.factors["query/kernel"].scale
        )
        assert_close(found, wanted, depth=64)
    sizes = [
        sum(np.size(x) for x in jax.tree.leaves(t))
        for t in (whole_tx.init(start), tx.init(trainable))
    ]
    assert sizes[0] <= sizes[1] + 1  # of the frozen: at most a counter


def test_the_optimizer_takes_the_adapter_alone():
    start, tx = lorafy(), lora_jax.optimizer(optax.adamw(0.1))
    for part in (lora_jax.split(start)[0], start.adapter):
        grads = lora_jax.value_and_grad(loss)(start)[1]
        updates, _ = tx.update(grads, tx.init(part), part)
        new = optax.apply_updates(part, updates)
        assert jax.tree.structure(new) == jax.tree.structure(part)
        assert_same(new.factors["query/kernel"].scale, part.factors["query/kernel"].scale)


def test_a_base_with_keys_is_trained_by_the_adapter_alone():
    params = {**PARAMS, "rng": jax.random.key(0)}
    start = lora_jax.lorafy(params, 2)
    tx = lora_jax.optimizer(optax.sgd(0.1))
    grads = lora_jax.value_and_grad(loss)(start)[1]
    with pytest.raises(TypeError, match=r"PRNG keys.*trainable, frozen = lora_jax.split"):
        tx.update(grads, tx.init(start), start)
    trainable, _ = lora_jax.split(start)
    tx.update(grads, tx.init(trainable), trainable)


@pytest.mark.parametrize(
    "differentiate",
    [
        lambda f, p: jax.grad(f)(p),
        lambda f, p: jax.jit(jax.grad(f))(p),
        lambda f, p: jax.grad(jax.jit(f))(p),
        lambda f, p: jax.grad(jax.checkpoint(f))(p),
        lambda f, p: jax.vjp(f, p),
        lambda f, p: jax.vmap(jax.grad(lambda p, x: f(p) * x), (None, 0))(p, jnp.ones(3)),
    ],
)
def test_a_whole_tree_that_is_differentiated_warns_until_an_optimizer_is_told(
    differentiate, monkeypatch
):
    monkeypatch.setitem(whole._state, "is_told", False)
    start = lorafy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        differentiate(loss_of(trainable := lora_jax.split(start)[0]), trainable)
        lora_jax.value_and_grad(loss)(start)
        jax.jit(loss)(start)
        with pytest.raises(UserWarning, match=r"differentiated whole.*lora_jax.optimizer"):
            differentiate(loss, start)
        with pytest.raises(UserWarning, match="differentiated whole"):  # there is no scale
            differentiate(loss, lora_jax.lorafy(PARAMS, targets=[], full="query/bias"))
        lora_jax.init.input_moments(lambda p, x: x @ p["query"]["kernel"], start, X)
        lora_jax.optimizer(optax.adamw(0.1))
        differentiate(loss, start)
