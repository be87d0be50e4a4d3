"""Compute checksums of arrays where they are: on any devices, spread in any way."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def checksum(x: Any) -> str:
    """Compute the dtype, the shape and 64 bits of the contents, however the array is spread.

    One changed entry always changes the checksum; arrays that differ in more entries have the same
    one in about one case of 2^64. It is no defence against forgery.
    """
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    high, low = jax.device_get(_sums(x))
    shape = ",".join(map(str, x.shape))
    return f"{x.dtype}[{shape}]:{int(high):08x}{int(low):08x}"


@jax.jit
def _sums(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sum the mixed entries, each combined with its position, for two seeds."""
    words = _words(jnp.asarray(x))
    place = functools.reduce(
        lambda total, axis: (
            total * jnp.uint32(words.shape[axis])
            + lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        ),
        range(words.ndim),
        jnp.zeros(words.shape, jnp.uint32),
    )
    high, low = (
        _mixed(words ^ _mixed(place + jnp.uint32(seed))).sum(dtype=jnp.uint32)
        for seed in (0x9E3779B9, 0x7F4A7C15)
    )
    return high, low


def _words(x: jax.Array) -> jax.Array:
    """View the bits of every entry as uint32; 64 bits become one more axis of two."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], -1)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    bits = (
        jnp.iinfo(x.dtype).bits if jnp.issubdtype(x.dtype, jnp.integer) else jnp.finfo(x.dtype).bits
    )
    if bits == 64:
        return lax.bitcast_convert_type(x, jnp.uint32)
    return lax.bitcast_convert_type(x, jnp.dtype(f"uint{bits}")).astype(jnp.uint32)


def _mixed(x: jax.Array) -> jax.Array:
    """Mix 32 bits by a bijection that carries every bit into all others (MurmurHash3's)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
