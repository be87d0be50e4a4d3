"""Compute the cross-entropy of a language model, without the logits of all tokens at once."""

from functools import partial

import jax
import jax.numpy as jnp

__all__ = ["chunked_loss", "summed_loss"]


def chunked_loss(
    x: jax.Array, kernel: jax.Array, targets: jax.Array, chunk: int, is_table: bool
) -> jax.Array:
    """Return the summed cross-entropy of ``x W``, a chunk of tokens at a time.

    The backward pass makes the logits of a chunk again: those of all tokens never exist.

    Args:
        x: ``[batch, length, width]``.
        kernel: ``W[width, vocab_size]``, or a table ``[vocab_size, width]``.
        targets: ``[batch, length]``; negative ones do not count.
        chunk: the number of tokens along the length, times the batch, at once.
        is_table: whether ``kernel`` is a table.
    """
    size = max(1, chunk // len(x))  # of the length, whose axis no mesh spreads
    short = -x.shape[1] % size
    x = jnp.pad(x, ((0, 0), (0, short), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, short)), constant_values=-1)

    @partial(jax.checkpoint, prevent_cse=False)
    def add(total: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        x, targets = part  # [batch, size, width], [batch, size]
        w = kernel.astype(x.dtype)
        return total + summed_loss(x @ (w.T if is_table else w), targets), None

    def parts(y: jax.Array) -> jax.Array:
        return jnp.moveaxis(y.reshape(len(y), -1, size, *y.shape[2:]), 1, 0)

    return jax.lax.scan(add, jnp.zeros((), jnp.float32), (parts(x), parts(targets)))[0]


def summed_loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Return the cross-entropy in nats, summed over the targets that are not negative."""
    logits = logits.astype(jnp.float32)
    # Chosen by comparison, as no token is negative: a lookup would move logits between devices.
    tokens = jnp.arange(logits.shape[-1])[(None,) * targets.ndim]
    chosen = jnp.where(targets[..., None] == tokens, logits, 0.0).sum(-1)
    losses = jax.nn.logsumexp(logits, -1) - chosen
    return jnp.where(targets < 0, 0.0, losses).sum()
