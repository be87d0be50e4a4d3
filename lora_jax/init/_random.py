"""Draw factors at random: training starts at the base model, whose weights stay unchanged."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax._weights.target import Target


def gaussian(key: jax.Array, target: Target) -> tuple[jax.Array, jax.Array]:
    """Draw ``a ~ N(0, 1/in)``, so that ``x a`` has the variance of ``x``'s entries; ``b = 0``.

    References:
        Hu et al., LoRA, arXiv:2106.09685, section 4.1.
    """
    return _normal(key, _a_shape(target)) * (1 / math.sqrt(target.fan_in)), _zero_b(target)


def kaiming_uniform(key: jax.Array, target: Target) -> tuple[jax.Array, jax.Array]:
    """Draw ``a ~ U(-1/sqrt(in), 1/sqrt(in))``, as loralib and PEFT do; ``b = 0``."""
    bound = 1 / math.sqrt(target.fan_in)
    draw = lax.optimization_barrier(jax.random.uniform(key, _a_shape(target), minval=-1))
    return draw * bound, _zero_b(target)


def orthogonal(key: jax.Array, target: Target) -> tuple[jax.Array, jax.Array]:
    """Draw nonzero ``a`` and ``b`` with ``a b = 0``, so that both train from the first step.

    The rows of a random orthogonal ``Q[rank, rank]`` alternate between the factors:
    ``a = N(0, 1/100) Q[0::2]`` and ``b = Q[1::2]^T N(0, 1/100)``.

    Raises:
        ValueError: the rank is odd.

    References:
        PEFT, ``init_lora_weights="orthogonal"``.
    """
    if target.rank % 2:
        raise ValueError(
            f"init='orthogonal': rank={target.rank} of {target.path!r} is odd, and each factor "
            f"takes half of the directions: pass an even rank such as {target.rank + 1}"
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
    """Draw from the standard normal distribution.

    The barrier keeps XLA from fusing later operations into the draw, which would change the result
    by an ulp. With it, eager and jitted draws are equal to the bit.
    """
    return lax.optimization_barrier(jax.random.normal(key, shape, jnp.float32))
