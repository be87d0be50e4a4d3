"""Attend by XLA: short rows at once, long ones from a block of queries at a time."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

LONG = 1024  # rows longer than this attend by blocks
BLOCK = 512  # how many queries attend at once


def by_xla(query: Any, key: Any, value: Any, segments: Any, *, window: Any) -> jax.Array:
    """Return :func:`attend` by XLA."""
    if segments is None and query.shape[1] <= LONG:
        return at_once(query, key, value, kind="xla", window=window)
    positions = jnp.arange(query.shape[1])[None]
    return by_mask(query, key, value, positions, window, segments)


def at_once(query: Any, key: Any, value: Any, *, kind: Any, window: int | None) -> jax.Array:
    """Return :func:`attend` without segments, by an implementation of JAX, of all at once."""
    sizes = window and (window - 1, 0)
    return jax.nn.dot_product_attention(
        query, key, value, is_causal=True, local_window_size=sizes, implementation=kind
    )


def by_mask(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    positions: jax.Array,
    window: int | None,
    segments: jax.Array | None = None,
) -> jax.Array:
    """Attend by XLA, from a block of queries at a time if there are many.

    The backward pass computes each block again.

    Args:
        query: ``[batch, length, heads, head_dim]``.
        key: ``[batch, size, key_value_heads, head_dim]``, from position 0 on.
        value: as ``key``.
        positions: those of the queries, consecutive, ``[batch or 1, length]``.
        window: as in :func:`attend`.
        segments: as in :func:`attend`, of as many queries as keys.
    """
    length, size = query.shape[1], key.shape[1]
    if length <= LONG:
        mask = _visible(positions, jnp.arange(size), window, segments, segments)
        return jax.nn.dot_product_attention(query, key, value, mask=mask)
    seen = size
    if window and len(positions) == 1 and not is_explicit(key):
        seen = min(size, BLOCK + window - 1)
    # in float32, in which the gradients of all blocks are summed
    wide = [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (key, value)]

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def attend_from(block: Any) -> jax.Array:
        q, at, of_queries = block
        start = jnp.clip(at[0, 0] + 1 - (window or 0), 0, size - seen)

        def part(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, start, seen, 1) if seen < size else x

        k, v, of_keys = jax.tree.map(part, (*wide, segments))
        mask = _visible(at, start + jnp.arange(seen), window, of_queries, of_keys)
        k, v = k.astype(key.dtype), v.astype(value.dtype)
        return jax.nn.dot_product_attention(q, k, v, mask=mask)

    y = jax.lax.map(attend_from, jax.tree.map(_blocks, (query, positions, segments)))
    y = jnp.moveaxis(y, 0, 1)  # [batch, blocks, block, heads, head_dim]
    return y.reshape(len(query), -1, *query.shape[2:])[:, :length]


def is_explicit(x: jax.Array) -> bool:
    """Return whether the type of ``x`` has axes of a mesh, which JAX's slices have no rules for."""
    return AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types


def _blocks(x: jax.Array) -> jax.Array:
    """Split the length: ``[batch, length, ...]`` to ``[blocks, batch, block, ...]``."""
    short = -x.shape[1] % BLOCK
    x = jnp.pad(x, ((0, 0), (0, short), *[(0, 0)] * (x.ndim - 2)))
    return jnp.moveaxis(x.reshape(len(x), -1, BLOCK, *x.shape[2:]), 1, 0)


def _visible(
    queries: jax.Array, keys: jax.Array, window: int | None, of_queries: Any, of_keys: Any
) -> jax.Array:
    """Return which ``keys[size]`` each query may see: ``[batch or 1, 1, length, size]``."""
    queries, keys = queries[:, None, :, None], keys[None, None, None]
    seen = keys <= queries
    if window:
        seen &= keys > queries - window
    if of_queries is None:
        return seen
    return seen & (of_queries[:, None, :, None] == of_keys[:, None, None])
