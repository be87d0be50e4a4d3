"""Factors as matrices: in one dtype, of one rank, and the nearest product of a rank."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax._adapter.factors import Entry, Rows, wide
from lora_jax._jax import whole


def terms(fs: Sequence[Entry]) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
    """``a``, ``b`` and ``scale`` of each, in one dtype, of at least float32."""
    dtype = widest(x.dtype for f in fs for x in (f.a, f.b))
    return [(f.a.astype(dtype), f.b.astype(dtype), jnp.asarray(f.scale, dtype)) for f in fs]


def widest(dtypes: Iterable[Any]) -> Any:
    """Return the widest of the dtypes, which is at least float32."""
    return max(map(wide, dtypes), key=lambda d: jnp.dtype(d).itemsize)


def matrices(fs: Sequence[Entry]) -> list[tuple[jax.Array, jax.Array]]:
    """``a`` and ``scale * b`` of each: ``[layers, in, rank]`` and ``[layers, rank, out]``."""
    n = fs[0].layout.count("b")
    layers = math.prod(fs[0].a.shape[:n])
    return [
        (whole(a).reshape(layers, -1, a.shape[-1]), whole(b * s).reshape(layers, b.shape[n], -1))
        for a, b, s in terms(fs)
    ]


def svd_lowrank(
    key: jax.Array, w: jax.Array, rank: int, niter: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The largest singular values by subspace iteration (Halko et al., arXiv:0909.4061)."""
    size = min(rank + 6, *w.shape[-2:])
    q = w @ jax.random.normal(key, (*w.shape[:-2], w.shape[-1], size), w.dtype)
    q, _ = jnp.linalg.qr(q)
    for _ in range(niter):
        q, _ = jnp.linalg.qr(w.mT @ q)
        q, _ = jnp.linalg.qr(w @ q)
    u, s, vt = jnp.linalg.svd(q.mT @ w, full_matrices=False)
    return q @ u, s, vt


def padded(f: Entry, rank: int) -> Entry:
    """Pad factors to a larger rank, with zeros in both; rows have a rank of their own."""
    if f.rank == rank or isinstance(f, Rows):
        return f
    a, b = jnp.asarray(f.a), jnp.asarray(f.b)
    return replace(
        f, a=pad_axis(a, a.ndim - 1, 0, rank), b=pad_axis(b, f.layout.count("b"), 0, rank)
    )


def pad_axis(x: jax.Array, axis: int, start: int, size: int) -> jax.Array:
    """``x`` as the part of an axis of ``size`` that begins at ``start``; the rest is zero."""
    config = [(0, 0, 0)] * x.ndim
    config[axis] = (start, size - start - x.shape[axis], 0)
    return lax.pad(x, jnp.zeros((), x.dtype), config)
