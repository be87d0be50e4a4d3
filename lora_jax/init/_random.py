"""Initializers that draw: training starts at the base model, whose weights stay as they are."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax._weights.target import Target


def gaussian(key: jax.Array, target: Target) -> tuple[jax.Array, jax.Array]:
    """``a ~ N(0, 1/in)``, so that ``x a`` has the variance of ``x``'s entries; ``b = 0``.

    References:
        Hu et al., LoRA, arXiv:2106.09685, section 4.1.
    """
    return _normal(key, _a_shape(target)) * (1 / math.sqrt(target.fan_in)), _zero_b(target)


def kaiming_uniform(key: jax.Array, target: Target) -> tuple[jax.Array, jax.Array]:
    """``a ~ U(-1/sqrt(in), 1/sqrt(in))``, which loralib and PEFT draw; ``b = 0``."""
    bound = 1 / math.sqrt(target.fan_in)
    draw = lax.optimization_barrier(jax.random.uniform(key, _a_shape(target), minval=-1))
    return draw * bound, _zero_b(target)


def orthogonal(key: jax.Array, target: Target) -> tuple[jax.Array, jax.Array]:
    """Neither factor is zero, and ``a b`` is: ``a`` and ``b`` meet in orthogonal subspaces.

    With the rows of a random orthogonal ``Q[rank, rank]`` taken in turn,
    ``a = N(0, 1/100) Q[0::2]`` and ``b = Q[1::2]^T N(0, 1/100)``.

    Raises:
        ValueError: the rank is odd.

    References:
        PEFT, ``init_lora_weights="orthogonal"``.
    """
    if target.rank % 2:
        raise ValueError(
            f"init='orthogonal': rank={target.rank} of {target.path!r} is odd, and half of the "
            f"directions are a's: pass an even rank such as {target.rank + 1}"
        )
    half, (k_q, k_a, k_b) = target.rank // 2, jax.random.split(key, 3)
    q, _ = jnp.linalg.qr(_normal(k_q, (*target.batch, target.rank, target.rank)))
    a = _normal(k_a, (*target.batch, target.inputs, half)) @ q[..., 0::2, :]
    b = q[..., 1::2, :].mT @ _normal(k_b, (*target.batch, half, target.outputs))
    return a / 10, b / 10


def _a_shape(target: Target) -> tuple[int, ...]:
    return (*target.batch, target.inputs, target.rank)


def _zero_b(target: Target) -> jax.Array:
    return jnp.zeros((*target.batch, target.rank, target.outputs), jnp.float32)


def _normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A standard normal draw.

    The barrier keeps XLA from folding what follows into the draw, which would move the result by
    an ulp: with it, eager and jitted draws are equal to the bit.
    """
    return lax.optimization_barrier(jax.random.normal(key, shape, jnp.float32))
