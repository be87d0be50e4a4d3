"""Number the tokens of rows, packed ones too, and turn queries and keys by these positions."""

import jax
import jax.numpy as jnp

Turns = tuple[jax.Array, jax.Array]  # sines and cosines, [batch or 1, length, 1, head_dim / 2]


def check_segments(segments: jax.Array, shape: tuple[int, ...]) -> None:
    """Raise if ``segments`` are not integers of this shape."""
    if segments.shape != shape or not jnp.issubdtype(segments.dtype, jnp.integer):
        raise ValueError(
            f"segments: {segments.dtype}{list(segments.shape)}, expected integers of shape "
            f"{list(shape)}. Pass a number for each token, or None"
        )


def packed(segments: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Return the positions of packed tokens, and segments that number the texts of each row.

    Args:
        segments: integers ``[batch, length]``; each run of one number is a text, whose positions
            begin at 0.
        shape: that of the tokens.

    Raises:
        ValueError: ``segments`` are not integers of this shape.
    """
    check_segments(segments, shape)
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
