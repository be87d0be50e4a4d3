"""Combine the updates of one weight entry by entry, and factor the result.

Every update is computed again wherever it is read, so that only their combination is kept.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax._adapter.factors import Factors
from lora_jax._adapter.lowrank import LowRank, matmul, pad_axis, svd, wide_of
from lora_jax._jax import replicated
from lora_jax._weights.axes import factor_shapes


class Rule(NamedTuple):
    """Describe how several updates become one.

    Attributes:
        density: the share of the entries that stay.
        keep: ``"largest"``, by magnitude; or ``"random"``, where those that are drawn become
            ``1 / density`` as large.
        combine: ``"sum"``; or ``"elect"``: the sign of the sum, and the mean of those that have it.
    """

    density: float
    keep: Literal["largest", "random"]
    combine: Literal["sum", "elect"]


@functools.partial(jax.jit, static_argnames="rule")
def of_arrays(updates: Sequence[jax.Array], key: jax.Array, rule: Rule) -> jax.Array:
    """Combine updates of one shape."""
    stack = jnp.stack([replicated(x) for x in updates])
    return _combined(lambda k: stack[k], len(updates), key, rule)


@functools.partial(jax.jit, static_argnames=("rule", "rank", "niter"))
def of_factors(
    fs: Sequence[Factors], key: jax.Array, rule: Rule, rank: int | None, niter: int | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Combine the updates of one weight: ``a`` and ``b``, and the share that they miss."""
    f, dtype, largest = fs[0], wide_of(fs), max(f.rank for f in fs)
    updates = [LowRank.of(f, dtype).folded() for f in fs]
    n = f.layout.count("b")
    layers = math.prod(f.a.shape[:n])

    def stacked(xs: list[jax.Array], axis: int) -> jax.Array:
        """Pad to one rank: ``[layers, adapters, in, rank]``, or ``[..., rank, out]``."""
        stack = jnp.stack([pad_axis(x, n + axis, 0, largest) for x in xs], n)
        return stack.reshape(layers, *stack.shape[n:])

    def one(layer: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        a, b, key = layer
        x = _combined(lambda k: matmul(a[k], b[k]), len(fs), key, rule)
        return _factored(x, rank, niter, jax.random.fold_in(key, len(fs)))

    a, b = stacked([x.a for x in updates], 1), stacked([x.b for x in updates], 0)
    a, b, missed, total = lax.map(one, (a, b, jax.random.split(key, layers)))
    error = jnp.sqrt(missed.sum() / jnp.maximum(total.sum(), jnp.finfo(total.dtype).tiny))
    a_shape, b_shape = factor_shapes(f.layout, f.weight_shape, a.shape[-1])
    return a.reshape(a_shape), b.reshape(b_shape), error


def _combined(
    update: Callable[[Any], jax.Array], count: int, key: jax.Array, rule: Rule
) -> jax.Array:
    """Combine ``update(0)``, ..., ``update(count - 1)``, arrays of one shape."""
    form = jax.eval_shape(update, 0)
    kept = max(1, round(rule.density * form.size))

    def sparse(k: Any) -> jax.Array:
        x = update(k)
        if rule.density == 1:
            return x
        if rule.keep == "random":
            keep = jax.random.bernoulli(jax.random.fold_in(key, k), rule.density, x.shape)
            return jnp.where(keep, x / rule.density, 0)
        size = abs(x)
        return jnp.where(size >= _kth_largest(size, kept), x, 0)

    zeros = jnp.zeros(form.shape, form.dtype)
    mass = lax.fori_loop(0, count, lambda k, total: total + sparse(k), zeros)
    if rule.combine == "sum":
        return mass

    def agree(k: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        total, voters = carry
        x = sparse(k)
        agrees = (jnp.sign(x) == jnp.sign(mass)) & (x != 0)
        return total + jnp.where(agrees, x, 0), voters + agrees.astype(jnp.int32)

    voters = jnp.zeros(form.shape, jnp.int32)
    total, voters = lax.fori_loop(0, count, agree, (zeros, voters))
    return total / jnp.maximum(voters, 1).astype(total.dtype)


def _kth_largest(x: jax.Array, k: int) -> jax.Array:
    """Find the ``k``-th largest of numbers that are not negative, exactly and without sorting.

    The bits of such floats, read as integers, have the same order. From the highest on, each bit is
    set if ``k`` numbers are then left. Each needs one count: no memory, and no gathering over
    devices.
    """
    bits = 8 * x.dtype.itemsize
    kind = jnp.dtype(f"uint{bits}")
    as_int = lax.bitcast_convert_type(x, kind)

    def set_bit(i: Any, found: jax.Array) -> jax.Array:
        more = found | (jnp.ones((), kind) << (bits - 2 - i).astype(kind))
        return jnp.where((as_int >= more).sum(dtype=jnp.int32) >= k, more, found)

    found = lax.fori_loop(0, bits - 1, set_bit, jnp.zeros((), kind))
    return lax.bitcast_convert_type(found, x.dtype)


def _factored(
    x: jax.Array, rank: int | None, niter: int | None, key: jax.Array
) -> tuple[jax.Array, ...]:
    """Find the best factors of a matrix, the square of what they miss, and that of all of it."""
    total = jnp.square(x).sum()
    if rank is None:
        one = jnp.eye(min(x.shape), dtype=x.dtype)
        a, b = (one, x) if x.shape[0] <= x.shape[1] else (x, one)
        return a, b, jnp.zeros_like(total), total
    with jax.default_matmul_precision("highest"):
        a, b = svd(x, rank, niter=niter, key=key).balanced()
        return a, b, jnp.square(x - a @ b).sum(), total
