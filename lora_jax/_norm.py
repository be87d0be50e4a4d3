"""The norms of a weight's columns, which DoRA trains apart from their directions."""

import jax
import jax.numpy as jnp

from lora_jax._layout import role_axes
from lora_jax._params import wide


def squared_norm(w: jax.Array, layout: str) -> jax.Array:
    """``|W|^2`` of every column: ``[*batch, *out]``, in at least float32."""
    x = w.astype(wide(w.dtype))
    kept = [*role_axes(layout, "b"), *role_axes(layout, "o")]
    squares = jnp.square(x).sum(role_axes(layout, "i"))
    left = [i for i in range(len(layout)) if i in kept]
    return squares.transpose([left.index(i) for i in kept])
