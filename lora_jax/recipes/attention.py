"""Turn queries and keys by their positions, and attend by the platform's fastest kernel."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

__all__ = [
    "NAMES",
    "Turns",
    "attend",
    "attend_cached",
    "packed",
    "rotated",
    "turns_of",
    "why_not_cudnn",
]

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
    segments: jax.Array | None = None,
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
        segments: integers ``[batch, length]``; a token sees none with another number in its row.
        name: ``"auto"`` takes cuDNN's where it can; ``"cudnn"`` and ``"xla"`` are those.

    Raises:
        ValueError: ``name`` is another, or cuDNN cannot.
    """
    if name not in NAMES:
        raise ValueError(f"attention={name!r}: expected one of {NAMES}")
    if segments is not None:
        _check(segments, query.shape[:2])
    args = query, key, value, segments
    xla, cudnn = (functools.partial(kernel, window=window) for kernel in (_by_xla, _by_cudnn))
    if name == "xla":
        return xla(*args)
    reason = why_not_cudnn(query.shape, key.shape, query.dtype, window, segments is not None)
    if name == "cudnn":
        if reason:
            raise ValueError(f"attention='cudnn': {reason} Pass 'auto', or 'xla'")
        return cudnn(*args)
    if reason:
        return xla(*args)
    # checkpointed: what the backward pass needs is the union over the platforms
    return jax.lax.platform_dependent(*args, cuda=cudnn, default=jax.checkpoint(xla))


def attend_cached(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    positions: jax.Array,
    *,
    window: int | None = None,
    name: str = "auto",
) -> jax.Array:
    """Return the attention of tokens to a cache that contains them and those before them.

    One token a row attends by cuDNN where it can, unless ``name`` is ``"xla"``; all else by XLA,
    many tokens in blocks, as in :func:`attend`.

    Args:
        query: ``[batch, length, heads, head_dim]``.
        keys: ``[batch, size, key_value_heads, head_dim]``, from position 0 on.
        values: as ``keys``.
        positions: those of the queries, consecutive in each row, ``[batch, length]``.
        window: as in :func:`attend`.
        name: as in :func:`attend`.
    """
    size = keys.shape[1]
    xla = functools.partial(_by_mask, window=window)
    is_one = query.shape[1] == 1 and (window is None or window >= size)
    if name == "xla" or not is_one or why_not_cudnn(query.shape, keys.shape, query.dtype):
        return xla(query, keys, values, positions)

    def cudnn(query: Any, keys: Any, values: Any, positions: Any) -> jax.Array:
        seen = jnp.minimum(positions[:, 0] + 1, size).astype(jnp.int32)
        return jax.nn.dot_product_attention(
            query, keys, values, key_value_seq_lengths=seen, implementation="cudnn"
        )

    args = query, keys, values, positions
    return jax.lax.platform_dependent(*args, cuda=cudnn, default=jax.checkpoint(xla))


def _check(segments: jax.Array, shape: tuple[int, ...]) -> None:
    if segments.shape != shape or not jnp.issubdtype(segments.dtype, jnp.integer):
        raise ValueError(
            f"segments: {segments.dtype}{list(segments.shape)}, expected integers of shape "
            f"{list(shape)}. Pass a number for each token, or None"
        )


def _by_cudnn(query: Any, key: Any, value: Any, segments: None, *, window: Any) -> jax.Array:
    del segments
    return _at_once(query, key, value, kind="cudnn", window=window)


def _by_xla(query: Any, key: Any, value: Any, segments: Any, *, window: Any) -> jax.Array:
    if segments is None and query.shape[1] <= LONG:
        return _at_once(query, key, value, kind="xla", window=window)
    positions = jnp.arange(query.shape[1])[None]
    return _by_mask(query, key, value, positions, window, segments)


def _at_once(query: Any, key: Any, value: Any, *, kind: Any, window: int | None) -> jax.Array:
    sizes = window and (window - 1, 0)
    return jax.nn.dot_product_attention(
        query, key, value, is_causal=True, local_window_size=sizes, implementation=kind
    )


def _by_mask(
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
    if window and len(positions) == 1 and not _is_explicit(key):
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


def _is_explicit(x: jax.Array) -> bool:
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


@functools.lru_cache(maxsize=64)
def why_not_cudnn(
    query: tuple[int, ...],
    key: tuple[int, ...],
    dtype: Any,
    window: int | None = None,
    is_packed: bool = False,
) -> str | None:
    """Return why this process has no cuDNN attention for these shapes; None if it has.

    ``is_packed`` says that there are segments.
    """
    if is_packed:
        return "JAX's interface to it takes no segments."
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 and float16, and these are {jnp.dtype(dtype)}."
    try:
        if not jax.local_devices(backend="cuda"):
            return "this process has no CUDA GPU."
        shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape in (query, key, key)]
        jax.eval_shape(functools.partial(_by_cudnn, window=window), *shapes, None)
    except Exception as error:  # JAX raises several types
        return f"{str(error).partition(chr(10))[0]}."
    return None


def packed(segments: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Return the positions of packed tokens, and segments that number the texts of each row.

    Args:
        segments: integers ``[batch, length]``; each run of one number is a text, whose positions
            begin at 0.
        shape: that of the tokens.

    Raises:
        ValueError: ``segments`` are not integers of this shape.
    """
    _check(segments, shape)
    index = jnp.arange(segments.shape[1])[None]
    is_first = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    starts = jax.lax.cummax(jnp.where(is_first, index, 0), axis=1)
    return index - starts, starts


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
