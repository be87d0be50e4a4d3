"""Compute the cross-entropy of a language model, without the logits of all tokens at once."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["chunked_loss", "summed_loss"]


def chunked_loss(
    x: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    chunk: int,
    is_table: bool,
    is_frozen: bool = False,
) -> jax.Array:
    """Return the summed cross-entropy of ``x W``, a chunk of tokens at a time.

    The logits of all tokens never exist. The backward pass makes those of each chunk again. With
    ``is_frozen`` it has no logits: the gradient in ``x`` was computed with the loss.

    Args:
        x: ``[batch, length, width]``.
        kernel: ``W[width, vocab_size]``, or a table ``[vocab_size, width]``.
        targets: ``[batch, length]``; negative ones do not count.
        chunk: the number of tokens along the length, times the batch, at once.
        is_table: whether ``kernel`` is a table.
        is_frozen: whether ``kernel`` has no gradient and no adapter.

    Raises:
        ValueError: ``kernel`` is differentiated, though it ``is_frozen``.
    """
    size = max(1, chunk // len(x))  # of the length, whose axis no mesh spreads
    short = -x.shape[1] % size
    x = jnp.pad(x, ((0, 0), (0, short), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, short)), constant_values=-1)

    def parts(y: jax.Array) -> jax.Array:
        return jnp.moveaxis(y.reshape(len(y), -1, size, *y.shape[2:]), 1, 0)

    of_parts = partial(_of_frozen, is_table) if is_frozen else partial(_of_parts, is_table, True)
    return of_parts(parts(x), kernel, parts(targets))


def _of_part(is_table: bool, x: jax.Array, kernel: jax.Array, targets: jax.Array) -> jax.Array:
    """Return the loss of ``x[batch, size, width]``."""
    w = kernel.astype(x.dtype)
    return summed_loss(x @ (w.T if is_table else w), targets)


def _of_parts(
    is_table: bool, is_trained: bool, x: jax.Array, kernel: jax.Array, targets: jax.Array
) -> jax.Array:
    """Return the loss of ``x[parts, batch, size, width]``."""
    loss = partial(_of_part, is_table)
    if is_trained:
        loss = jax.checkpoint(loss, prevent_cse=False)

    def add(total: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return total + loss(part[0], kernel, part[1]), None

    return jax.lax.scan(add, jnp.zeros((), jnp.float32), (x, targets))[0]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _of_frozen(is_table: bool, x: jax.Array, kernel: jax.Array, targets: jax.Array) -> jax.Array:
    """Return the loss of ``x[parts, batch, size, width]`` by a kernel without a gradient."""
    return _of_parts(is_table, False, x, kernel, targets)


def _forward(is_table: bool, x: Any, kernel: Any, targets: Any) -> tuple[jax.Array, jax.Array]:
    """Return the loss and its gradient in ``x``."""
    if kernel.perturbed:
        raise ValueError("is_frozen=True: the kernel is differentiated. Pass is_frozen=False")
    w = kernel.value

    def add(total: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        loss = partial(_of_part, is_table, kernel=w, targets=part[1])
        value, gradient = jax.value_and_grad(loss)(part[0])
        return total + value, gradient

    return jax.lax.scan(add, jnp.zeros((), jnp.float32), (x.value, targets.value))


def _backward(is_table: bool, gradient: jax.Array, by: jax.Array) -> tuple[Any, None, None]:
    del is_table
    return (gradient * by).astype(gradient.dtype), None, None


_of_frozen.defvjp(_forward, _backward, symbolic_zeros=True)


def summed_loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Return the cross-entropy in nats, summed over the targets that are not negative."""
    logits = logits.astype(jnp.float32)
    # Chosen by comparison, as no token is negative: a lookup would move logits between devices.
    tokens = jnp.arange(logits.shape[-1])[(None,) * targets.ndim]
    chosen = jnp.where(targets[..., None] == tokens, logits, 0.0).sum(-1)
    losses = jax.nn.logsumexp(logits, -1) - chosen
    return jnp.where(targets < 0, 0.0, losses).sum()
