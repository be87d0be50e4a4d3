"""Functions with adapters, exported with a symbolic batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, drawn, randomize_b
from jax import export

import lora_jax

RNG = np.random.default_rng(0)
PARAMS = {
    "table": jnp.asarray(RNG.normal(size=(7, 4)), jnp.float32),
    "query": {"kernel": jnp.asarray(RNG.normal(size=(4, 4)), jnp.float32)},
    "layers": {"kernel": jnp.asarray(RNG.normal(size=(3, 4, 4)), jnp.float32)},
}


def rows_of(params, tokens):
    """Look up, flatten, scan over layers, and over the rows of the batch."""
    x = params["table"][tokens]
    x = (x.reshape(-1, 4) @ params["query"]["kernel"]).reshape(x.shape)
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"]["kernel"])
    return jax.lax.map(lambda row: row @ params["table"].T, x)


def products_of(params, tokens):
    return jax.nn.one_hot(tokens, 4) @ params["query"]["kernel"]


def exported(name):
    """Return a transformed function with what it takes, and its export of a symbolic batch."""
    fn = products_of if name == "lora_routed" else rows_of
    batch, length = export.symbolic_shape("n, s")
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    targets = ".*/kernel" if name == "lora_routed" else ".*"
    layout = lora_jax.layout_of(fn, PARAMS, tokens)
    made = lora_jax.lorafy(PARAMS, 2, targets=targets, layout=layout, init=drawn)
    adapters, more = randomize_b(made), {}
    if name == "lora":
        apply = lora_jax.lora(fn)
    else:
        adapters = lora_jax.many.stack([adapters, randomize_b(made, 2)])
        apply = getattr(lora_jax.many, name)(fn)
        if name == "lora_rows":
            more = {"lora_ids": jax.ShapeDtypeStruct((batch,), jnp.int32)}
        else:
            apply = functools.partial(apply, lora_router=lora_jax.many.arrow(adapters))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), adapters)
    return apply, adapters, export.export(jax.jit(apply))(shapes, tokens, **more)


@pytest.mark.parametrize("name", ["lora", "lora_rows", "lora_routed"])
def test_a_symbolic_batch_is_exported(name):
    apply, adapters, found = exported(name)
    tokens = jnp.asarray(RNG.integers(0, 4, (3, 5)), jnp.int32)
    more = {"lora_ids": jnp.asarray([1, 0, -1])} if name == "lora_rows" else {}
    assert_close(found.call(adapters, tokens, **more), apply(adapters, tokens, **more))


def test_an_exported_function_is_written_and_read():
    pytest.importorskip("flatbuffers", reason="flatbuffers, of the extra test, is not installed")
    options = {"dora": True, "rows": {"table": [1, 3]}, "full": "layers.*"}
    lora_params = lora_jax.lorafy(PARAMS, 2, targets="query.*", init=drawn, **options)
    apply = jax.jit(lora_jax.lora(products_of))
    tokens = jnp.arange(6).reshape(2, 3) % 4
    written = export.export(apply)(lora_params, tokens).serialize()
    found = export.deserialize(written)
    assert found.in_tree == jax.tree.structure(((lora_params, tokens), {}))
    assert_close(found.call(lora_params, tokens), apply(lora_params, tokens))
