"""Turn queries and keys by their positions, and attend by the platform's fastest kernel."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["NAMES", "Turns", "attend", "rotated", "turns_of", "why_not_cudnn"]

NAMES = ("auto", "cudnn", "xla")
Turns = tuple[jax.Array, jax.Array]  # sines and cosines, [batch or 1, length, 1, head_dim / 2]


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    window: int | None = None,
    name: str = "auto",
) -> jax.Array:
    """Return causal attention, ``softmax(Q K^T / sqrt(head_dim)) V``.

    cuDNN's flash attention keeps no array of length times length; XLA's forms the scores of all
    pairs. A program of this process for another platform than its GPUs' gets XLA's.

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
    xla, cudnn = (functools.partial(_attend, kind=kind, window=window) for kind in ("xla", "cudnn"))
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


def _attend(query: Any, key: Any, value: Any, *, kind: Any, window: int | None) -> jax.Array:
    sizes = window and (window - 1, 0)
    return jax.nn.dot_product_attention(
        query, key, value, is_causal=True, local_window_size=sizes, implementation=kind
    )


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
        jax.eval_shape(functools.partial(_attend, kind="cudnn", window=window), *shapes)
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
