"""Attend by cuDNN's flash attention, on NVIDIA's GPUs."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.recipes.attention.xla import at_once


def by_cudnn(query: Any, key: Any, value: Any, segments: Any, *, window: Any) -> jax.Array:
    """Return :func:`attend` by cuDNN, without segments."""
    del segments
    return at_once(query, key, value, kind="cudnn", window=window)


def one_by_cudnn(query: Any, keys: Any, values: Any, positions: Any) -> jax.Array:
    """Return :func:`attend_cached` of one token a row by cuDNN, without a window."""
    # both lengths from the positions: jax.vmap of JAX's kernel has no rule for one of them alone
    seen = jnp.minimum(positions[:, 0] + 1, keys.shape[1]).astype(jnp.int32)
    lengths: Any = {"query_seq_lengths": jnp.minimum(seen, 1), "key_value_seq_lengths": seen}
    return jax.nn.dot_product_attention(query, keys, values, **lengths, implementation="cudnn")


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
        jax.eval_shape(functools.partial(by_cudnn, window=window), *shapes, None)
    except Exception as error:  # JAX raises several types
        return f"{str(error).partition(chr(10))[0]}."
    return None
