"""Turn queries and keys by their positions, and attend by the platform's fastest kernel."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

__all__ = ["NAMES", "Turns", "attend", "rotated", "turns_of", "why_not_cudnn"]

NAMES = ("auto", "cudnn", "xla")
Turns = tuple[jax.Array, jax.Array]  # sines and cosines, [batch or 1, length, 1, head_dim / 2]
LONG = 1024  # rows longer than this attend by blocks
BLOCK = 512  # how many queries attend at once


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    window: int | None = None,
    name: str = "auto",
) -> jax.Array:
    """Return causal attention, ``softmax(Q K^T / sqrt(head_dim)) V``.

    No array of length times length exists for long rows: cuDNN's flash attention keeps none, and
    XLA's forms the scores of a block of queries at a time, also in the backward pass. A program of
    this process for another platform than its GPUs' gets XLA's.

    Args:
        query: ``[batch, length, heads, head_dim]``.
        key: the same, with a divisor of the number of heads.
        value: as ``key``.
        window: how many tokens each one sees, itself among them; None for all before it.
        name: ``"auto"`` takes cuDNN's where it can; ``"cudnn"`` and ``"xla"`` are those.

    Raises:
        ValueError: ``name`` is another, or cuDNN cannot.
    """
    if name not in NAMES:
        raise ValueError(f"attention={name!r}: expected one of {NAMES}")
    xla, cudnn = (functools.partial(kernel, window=window) for kernel in (_by_xla, _by_cudnn))
    if name == "xla":
        return xla(query, key, value)
    reason = why_not_cudnn(query.shape, key.shape, query.dtype, window)
    if name == "cudnn":
        if reason:
            raise ValueError(f"attention='cudnn': {reason} Pass 'auto', or 'xla'")
        return cudnn(query, key, value)
    if reason:
        return xla(query, key, value)
    # checkpointed: what the backward pass needs is the union over the platforms
    return jax.lax.platform_dependent(query, key, value, cuda=cudnn, default=jax.checkpoint(xla))


def _by_cudnn(query: Any, key: Any, value: Any, *, window: int | None) -> jax.Array:
    return _at_once(query, key, value, kind="cudnn", window=window)


def _by_xla(query: Any, key: Any, value: Any, *, window: int | None) -> jax.Array:
    if query.shape[1] <= LONG:
        return _at_once(query, key, value, kind="xla", window=window)
    positions = jnp.arange(query.shape[1])[None]
    return _by_blocks(query, key, value, positions, window)


def _at_once(query: Any, key: Any, value: Any, *, kind: Any, window: int | None) -> jax.Array:
    sizes = window and (window - 1, 0)
    return jax.nn.dot_product_attention(
        query, key, value, is_causal=True, local_window_size=sizes, implementation=kind
    )


def _by_blocks(query: Any, key: Any, value: Any, positions: Any, window: int | None) -> jax.Array:
    """Attend from a block of queries at a time, which the backward pass computes again.

    Args:
        query: ``[batch, length, heads, head_dim]``.
        key: ``[batch, size, key_value_heads, head_dim]``, from position 0 on.
        value: as ``key``.
        positions: those of the queries, consecutive, ``[batch or 1, length]``.
        window: as in :func:`attend`.
    """
    length, size = query.shape[1], key.shape[1]
    seen = size
    if window and len(positions) == 1 and not _is_explicit(key):
        seen = min(size, BLOCK + window - 1)
    # in float32, in which the gradients of all blocks are summed
    wide = [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (key, value)]

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def attend_from(block: tuple[jax.Array, jax.Array]) -> jax.Array:
        q, at = block
        start = jnp.clip(at[0, 0] + 1 - (window or 0), 0, size - seen)
        k, v = (jax.lax.dynamic_slice_in_dim(x, start, seen, 1) if seen < size else x for x in wide)
        mask = _visible(at, start + jnp.arange(seen), window)
        k, v = k.astype(key.dtype), v.astype(value.dtype)
        return jax.nn.dot_product_attention(q, k, v, mask=mask)

    y = jax.lax.map(attend_from, (_blocks(query), _blocks(positions)))
    y = jnp.moveaxis(y, 0, 1)  # [batch, blocks, block, heads, head_dim]
    return y.reshape(len(query), -1, *query.shape[2:])[:, :length]


def _is_explicit(x: jax.Array) -> bool:
    """Return whether the type of ``x`` has axes of a mesh, which JAX's slices have no rules for."""
    return AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types


def _blocks(x: jax.Array) -> jax.Array:
    """Split the length: ``[batch, length, ...]`` to ``[blocks, batch, block, ...]``."""
    short = -x.shape[1] % BLOCK
    x = jnp.pad(x, ((0, 0), (0, short), *[(0, 0)] * (x.ndim - 2)))
    return jnp.moveaxis(x.reshape(len(x), -1, BLOCK, *x.shape[2:]), 1, 0)


def _visible(queries: jax.Array, keys: jax.Array, window: int | None) -> jax.Array:
    """Return which ``keys[size]`` each query may see: ``[batch or 1, 1, length, size]``."""
    queries, keys = queries[:, None, :, None], keys[None, None, None]
    seen = keys <= queries
    return seen & (keys > queries - window) if window else seen


@functools.lru_cache(maxsize=64)
def why_not_cudnn(
    query: tuple[int, ...], key: tuple[int, ...], dtype: Any, window: int | None = None
) -> str | None:
    """Return why this process has no cuDNN attention for these shapes; None if it has."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 and float16, and these are {jnp.dtype(dtype)}."
    try:
        if not jax.local_devices(backend="cuda"):
            return "this process has no CUDA GPU."
        shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape in (query, key, key)]
        jax.eval_shape(functools.partial(_by_cudnn, window=window), *shapes)
    except Exception as error:  # JAX raises several types
        return f"{str(error).partition(chr(10))[0]}."
    return None


def turns_of(positions: jax.Array, head_dim: int, theta: float) -> Turns:
    """Return the rotary turns of ``positions[batch or 1, length]``."""
    half = head_dim // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies[None, None, None]
    return jnp.sin(angles), jnp.cos(angles)


def rotated(x: jax.Array, turns: Turns) -> jax.Array:
    """Turn ``x[batch, length, heads, head_dim]``, in the half-split layout."""
    sin, cos = turns
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
