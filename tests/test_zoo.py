"""Published models of other packages: lorafy, report, train, merge, end to end."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, error, loss_of, randomize_b
from zoo import ZOO

import lora_jax

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]
INTEGER_OUTPUT = {"gpt2_generate"}
STOPPED = {"whisper": ["model/encoder/embed_positions/embedding"]}  # by the model's stop_gradient


@functools.cache
def layout_of(name):
    fn, params, args = ZOO[name]()
    return lora_jax.layout_of(fn, params, *args)


def adapted(name):
    """The model, with an adapter of its linear weights and lookup tables, B random."""
    fn, params, args = ZOO[name]()
    layout = layout_of(name)
    tables = [re.escape(p) for p, weight in layout.weights.items() if weight.kind == "embedding"]
    targets = ["all-linear", *tables]
    lora_params = lora_jax.lorafy(params, 2, targets=targets, layout=layout)
    report = lora_jax.report(fn, lora_params, *args)
    assert (report.materialized, report.unused) == ((), ())
    return fn, randomize_b(lora_params), args


@pytest.mark.parametrize("name", [name for name in ZOO if name not in INTEGER_OUTPUT])
def test_train_and_merge(name, standard_promotion):
    fn, lora_params, args = adapted(name)
    trainable, frozen = lora_jax.split(lora_params)
    tx = optax.adam(1e-3)

    @jax.jit
    def step(trainable, frozen, opt_state, *args):
        def loss(lora_params):
            outputs = lora_jax.lora(fn)(lora_params, *args)
            return loss_of(lambda outputs: outputs)(outputs), outputs

        lora_params = lora_jax.combine(trainable, frozen)
        (value, outputs), grads = lora_jax.value_and_grad(loss, has_aux=True)(lora_params)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, value, outputs

    now, opt_state, losses = trainable, tx.init(trainable), []
    for _ in range(3):
        now, opt_state, value, _ = step(now, frozen, opt_state, *args)
        losses.append(float(value))
    _, _, value, outputs = step(now, frozen, opt_state, *args)
    losses.append(float(value))
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
    before = trainable.factors
    moved = {
        p: (f.a != before[p].a).any() & (f.b != before[p].b).any() for p, f in now.factors.items()
    }
    assert [path for path in moved if not moved[path]] == STOPPED.get(name, [])

    plain = jax.jit(fn)
    expected = plain(lora_jax.merge(lora_jax.combine(now, frozen)), *args)
    assert_close(outputs, expected, depth=64)  # the deepest model passes through about that many
    assert error(plain(frozen.base, *args), expected) > 1e-3


@pytest.mark.parametrize("name", sorted(INTEGER_OUTPUT))
def test_generated_tokens_are_the_merged_models(name, standard_promotion):
    fn, lora_params, args = adapted(name)
    tokens = jax.jit(lora_jax.lora(fn))(lora_params, *args)
    plain = jax.jit(fn)
    assert jnp.issubdtype(tokens.dtype, jnp.integer)
    assert (tokens == plain(lora_jax.merge(lora_params), *args)).all()
    assert (tokens != plain(lora_params.base, *args)).any()


def test_the_zoo_has_every_kind_of_weight(standard_promotion):
    kinds = {weight.kind for name in ZOO for weight in layout_of(name).weights.values()}
    assert kinds == {None, "dot", "conv", "embedding", "ragged"}
    assert len(ZOO) >= 8
