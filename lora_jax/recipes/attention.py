"""Attend causally, by the fastest kernel of the platform that the program is compiled for."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["NAMES", "attend", "why_not_cudnn"]

NAMES = ("auto", "cudnn", "xla")


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
