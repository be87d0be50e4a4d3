"""Attention by every path: what a token sees, and what is never formed."""

import math

import jax
import jax.numpy as jnp
import pytest
from helpers import all_eqns, assert_close, normal

from lora_jax.recipes import attention

pytestmark = pytest.mark.usefixtures("standard_promotion")

LENGTH = attention.LONG + 61  # no multiple of a block


def drawn(length, dtype=jnp.float32, heads=2):
    """Return queries, keys and values with one head for two of the queries'."""
    shapes = (1, length, heads, 4), (1, length, heads // 2, 4), (1, length, heads // 2, 4)
    return [normal(k, shape, dtype) for k, shape in enumerate(shapes)]


def with_gradients(fn, *args):
    """Return ``fn(*args)``, and the gradients of a sum of it with random weights."""

    @jax.jit
    def both(*args):
        y, back = jax.vjp(fn, *args)
        return y, back(normal(9, y.shape, y.dtype))

    return both(*args)


@pytest.mark.parametrize(
    ("window", "dtype"),
    [(None, "float32"), (100, "float32"), (100, "bfloat16"), (None, "bfloat16")],
)
def test_a_long_row_attends_by_blocks_as_at_once(window, dtype):
    args = drawn(LENGTH, dtype)

    def plain(query, key, value):
        sizes = window and (window - 1, 0)
        return jax.nn.dot_product_attention(
            query, key, value, is_causal=True, local_window_size=sizes
        )

    found = with_gradients(lambda *args: attention.attend(*args, window=window, name="xla"), *args)
    assert_close(found, with_gradients(plain, *args), length=LENGTH)


@pytest.mark.parametrize("window", [None, 100])
def test_no_array_of_length_times_length_exists(window):
    length = 4096
    args = [jax.ShapeDtypeStruct((1, length, *x.shape[2:]), x.dtype) for x in drawn(1)]

    def largest(name):
        def loss(*args):
            return attention.attend(*args, window=window, name=name).sum()

        eqns = all_eqns(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(*args))
        return max(math.prod(v.aval.shape) for e in eqns for v in e.outvars)

    assert max(largest(name) for name in ("xla", "auto")) < length**2 / (16 if window else 3)
