"""Updates of one weight, entry by entry, as one update; and its best factors.

Every update is made anew wherever it is read, so that only what they come to is ever kept.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax._adapter.factors import Factors
from lora_jax._adapter.lowrank import matrices, svd_lowrank
from lora_jax._jax import whole


class Rule(NamedTuple):
    """How updates become one.

    Attributes:
        density: the share of the entries that stay.
        random: whether they are drawn, and become ``1 / density`` as large; else the largest stay.
        elect: whether signs are elected, and means taken; else they are added up.
    """

    density: float
    random: bool
    elect: bool


@functools.partial(jax.jit, static_argnames="rule")
def of_arrays(updates: Sequence[jax.Array], key: jax.Array, rule: Rule) -> jax.Array:
    """Updates of one shape as one."""
    stack = jnp.stack([whole(x) for x in updates])
    return _combined(lambda k: stack[k], len(updates), key, rule)


@functools.partial(jax.jit, static_argnames=("rule", "rank", "niter"))
def of_factors(
    fs: Sequence[Factors], key: jax.Array, rule: Rule, rank: int | None, niter: int | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Updates of one weight as ``a`` and ``b``, and the share of it that they miss."""
    f, parts = fs[0], matrices(fs)
    n = f.layout.count("b")
    batch, inputs, outputs = f.a.shape[:n], f.a.shape[n:-1], f.b.shape[n + 1 :]
    layers, largest = math.prod(batch), max(f.rank for f in fs)

    def stacked(xs: list[jax.Array], axis: int) -> jax.Array:
        """Of one rank, by zeros: ``[layers, adapters, in, rank]``, or ``[..., rank, out]``."""
        short = [[(0, largest - x.shape[axis] if i == axis else 0) for i in range(3)] for x in xs]
        return jnp.stack([jnp.pad(x, pad) for x, pad in zip(xs, short, strict=True)], 1)

    a, b = stacked([a for a, _ in parts], 2), stacked([b for _, b in parts], 1)

    def one(layer: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        a, b, key = layer
        update = lambda k: jnp.matmul(a[k], b[k], precision="highest")  # noqa: E731
        x = _combined(update, len(fs), key, rule)
        return _factored(x, rank, niter, jax.random.fold_in(key, len(fs)))

    a, b, missed, total = lax.map(one, (a, b, jax.random.split(key, layers)))
    error = jnp.sqrt(missed.sum() / jnp.maximum(total.sum(), jnp.finfo(total.dtype).tiny))
    r = a.shape[-1]
    return a.reshape(*batch, *inputs, r), b.reshape(*batch, r, *outputs), error


def _combined(
    update: Callable[[Any], jax.Array], count: int, key: jax.Array, rule: Rule
) -> jax.Array:
    form = jax.eval_shape(update, 0)
    kept = max(1, round(rule.density * form.size))

    def sparse(k: Any) -> jax.Array:
        x = update(k)
        if rule.density == 1:
            return x
        if rule.random:
            keep = jax.random.bernoulli(jax.random.fold_in(key, k), rule.density, x.shape)
            return jnp.where(keep, x / rule.density, 0)
        size = abs(x)
        return jnp.where(size >= _kth_largest(size, kept), x, 0)

    zeros = jnp.zeros(form.shape, form.dtype)
    mass = lax.fori_loop(0, count, lambda k, total: total + sparse(k), zeros)
    if not rule.elect:
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
    """The ``k``-th largest of numbers that are not negative, exactly, and without sorting them.

    The bits of such floats are ordered as they are. So one bit after the other is set where ``k``
    numbers are left: a count each, which needs no memory, and no gathering over devices.
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
    """The best factors of a matrix, and the squares of what they miss and of all of it."""
    total = jnp.square(x).sum()
    if rank is None:
        one = jnp.eye(min(x.shape), dtype=x.dtype)
        a, b = (one, x) if x.shape[0] <= x.shape[1] else (x, one)
        return a, b, jnp.zeros_like(total), total
    with jax.default_matmul_precision("highest"):
        if niter is None:
            u, s, vt = jnp.linalg.svd(x, full_matrices=False)
        else:
            u, s, vt = svd_lowrank(key, x, rank, niter)
        root = jnp.sqrt(s[:rank])
        a, b = u[:, :rank] * root[None, :], root[:, None] * vt[:rank]
        return a, b, jnp.square(x - a @ b).sum(), total
