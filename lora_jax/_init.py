"""How factors start: A random, B zero, so that training starts at the base model."""

import hashlib
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def fold_in_path(key: jax.Array, path: str) -> jax.Array:
    """A key of its own for every path, the same in every process.

    ``hash()`` would differ between processes; a SHA-256 does not.
    """
    digest = hashlib.sha256(path.encode()).digest()
    for word in (digest[:4], digest[4:8]):
        key = jax.random.fold_in(key, int.from_bytes(word, "big"))
    return key


def gaussian(
    key: jax.Array, shape: Sequence[int], fan_in: int, dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """Draw ``a ~ N(0, 1/fan_in)``, so that ``x a`` has the variance of ``x``'s entries.

    The barrier keeps XLA from folding the scale into the draw, which would move the result by
    an ulp: with it, eager and jitted draws are equal to the bit.
    """
    draw = jax.lax.optimization_barrier(jax.random.normal(key, tuple(shape), jnp.float32))
    return (draw * (1 / math.sqrt(fan_in))).astype(dtype)
