"""Compute with low-rank updates as pairs of matrices, in NumPy or in JAX.

In reading order:

* ``as_matrix``, ``terms``: a factor as a matrix; several factors in one dtype.
* ``LowRank``: ``scale * a b``, its singular values and vectors, norm, inner products and sums.
* ``SVD`` and ``svd``: the singular value decomposition, and the factors that it gives.
* ``padded``, ``pad_axis``: factors at a larger rank, an array on a longer axis.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax._adapter.factors import Entry, Factors, wide
from lora_jax._jax import replicated

Array: TypeAlias = Any  # of JAX or of NumPy


def as_matrix(x: Array, layout: str, factor: str) -> Array:
    """Flatten the axes that factor ``"a"`` reads, or those that ``"b"`` writes, into one."""
    n = layout.count("b")
    batch = x.shape[:n]
    if factor == "a":
        return x.reshape(*batch, math.prod(x.shape[n:-1]), x.shape[-1])  # [*batch, in, rank]
    return x.reshape(*batch, x.shape[n], math.prod(x.shape[n + 1 :]))  # [*batch, rank, out]


def wide_of(fs: Iterable[Entry]) -> Any:
    """Return the widest dtype of these factors, at least float32."""
    return widest(x.dtype for f in fs for x in (f.a, f.b))


def widest(dtypes: Iterable[Any]) -> Any:
    """Return the widest of the dtypes, at least float32."""
    return max(map(wide, dtypes), key=lambda dtype: jnp.dtype(dtype).itemsize)


def terms(fs: Sequence[Entry]) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
    """Return ``a``, ``b`` and ``scale`` of each, all in one dtype, at least float32."""
    dtype = wide_of(fs)
    return [(f.a.astype(dtype), f.b.astype(dtype), jnp.asarray(f.scale, dtype)) for f in fs]


class LowRank(NamedTuple):
    """The update ``scale * a b`` of a weight: one matrix per batch entry, which is never built.

    The QR decompositions of both factors leave a core that is as small as the rank::

        a = Qa Ra,   b^T = Qb Rb,   a b = Qa (Ra Rb^T) Qb^T

    Arrays of NumPy are computed by NumPy, all others by JAX.

    Attributes:
        a: ``[*batch, in, rank]``.
        b: ``[*batch, rank, out]``.
        scale: a number; None is 1.
    """

    a: Array
    b: Array
    scale: Any = None

    @classmethod
    def of(cls, f: Entry, dtype: Any = None) -> "LowRank":
        """Read factors as matrices of JAX, replicated, in ``dtype`` or at least float32."""
        dtype = wide_of([f]) if dtype is None else dtype
        a, b = (replicated(jnp.asarray(x, dtype)) for x in (f.a, f.b))
        return cls(as_matrix(a, f.layout, "a"), as_matrix(b, f.layout, "b"), f.scale)

    @property
    def rank(self) -> int:
        """The number of terms: the size of the axis that the factors share."""
        return self.a.shape[-1]

    def svd(self, rank: int | None = None, *, left: bool = True, right: bool = True) -> "SVD":
        """Find the largest ``rank`` singular values, and the vectors of the sides asked for."""
        qa, core, qb = self._core(left, right)
        if not (left or right):
            s = library(core).linalg.svd(core, compute_uv=False)
            return SVD(None, s[..., :rank], None)
        u, s, vt = svd(core, rank)
        return SVD(matmul(qa, u) if left else None, s, matmul(vt, qb.mT) if right else None)

    def truncated(self, rank: int) -> "LowRank":
        """Find the nearest product of a smaller rank, evenly split; ``scale`` stays."""
        qa, core, qb = self._replace(scale=None)._core(left=True, right=True)
        a, b = svd(core, rank).balanced()
        return LowRank(matmul(qa, a), matmul(b, qb.mT), self.scale)

    def squared_norm(self) -> Array:
        """Return the squared Frobenius norm, summed over the batch."""
        _, core, _ = self._core(left=False, right=False)
        return library(core).square(core).sum()

    def norm(self) -> Array:
        """Return the Frobenius norm of all matrices together."""
        return library(self.a).sqrt(self.squared_norm())

    def overlaps(self, other: "LowRank") -> Array:
        """Return the inner products of all terms: ``[*batch, rank, rank of the other]``.

        ``<s a b, t c d> = s t sum((a^T c) * (b d^T))``, where entry ``[i, j]`` belongs to the
        terms ``a[:, i] b[i]`` and ``c[:, j] d[j]``.
        """
        products = matmul(self.a.mT, other.a) * matmul(self.b, other.b.mT)
        return _times(_times(products, self.scale), other.scale)

    def inner(self, other: "LowRank") -> Array:
        """Return the inner product ``<x, y>``: the sum of ``x * y`` over all entries."""
        return self.overlaps(other).sum()

    def orthonormal(self) -> "LowRank":
        """Return the same update with orthonormal rows in ``b``.

        Terms that cancel within ``a b``, as in the difference of two checkpoints, then do so before
        anything is squared.
        """
        qa, core, qb = self._core(left=True, right=True)
        return LowRank(matmul(qa, core), qb.mT)

    def folded(self) -> "LowRank":
        """Return the same update with the scale in ``b``."""
        return LowRank(self.a, _times(self.b, self.scale))

    def __sub__(self, other: "LowRank") -> "LowRank":
        return joined([self, other._replace(scale=-1 if other.scale is None else -other.scale)])

    def _core(self, left: bool, right: bool) -> tuple[Array, Array, Array]:
        """Return ``Qa``, ``scale * Ra Rb^T`` and ``Qb``; a ``Q`` that is not asked for is None."""
        (qa, ra), (qb, rb) = _qr(self.a, left), _qr(self.b.mT, right)
        return qa, _times(matmul(ra, rb.mT), self.scale), qb


def joined(xs: Sequence[LowRank]) -> LowRank:
    """Add updates up: ``[a1, a2] [s1 b1; s2 b2]``, whose rank is the sum of the ranks."""
    xs = [x.folded() for x in xs]
    concatenate = library(xs[0].a).concatenate
    return LowRank(concatenate([x.a for x in xs], -1), concatenate([x.b for x in xs], -2))


class SVD(NamedTuple):
    """Singular values and vectors of a matrix for each batch entry, in descending order.

    Attributes:
        u: ``[*batch, in, k]``, the left singular vectors, which read; or None.
        s: ``[*batch, k]``.
        vt: ``[*batch, k, out]``, the right singular vectors, which write; or None.
    """

    u: Array
    s: Array
    vt: Array

    def truncated(self, rank: int | None = None, energy: float | None = None) -> "SVD":
        """Keep the largest: ``rank`` of them, or as few as have this share of the energy."""
        if rank is None and energy is not None:
            rank = self.rank_of(energy)
        if rank is None:
            return self
        return SVD(self.u[..., :rank], self.s[..., :rank], self.vt[..., :rank, :])

    def rank_of(self, energy: float) -> int:
        """Return the smallest rank that keeps this share of the squares, in every matrix."""
        squares = np.square(np.asarray(self.s, np.float64))  # [*batch, k]
        total = squares.sum(-1, keepdims=True)
        shares = squares.cumsum(-1) / np.maximum(total, 1e-300)
        short = (shares < energy) & (total > 0)
        return min(1 + int(short.sum(-1).max()), squares.shape[-1])

    def balanced(self, scale: Any = None) -> tuple[Array, Array]:
        """Split evenly: ``a = U sqrt(S / scale)``, ``b = sqrt(S / scale) V^T``; None is 1."""
        root = library(self.s).sqrt(self.s if scale is None else self.s / scale)
        return self.u * root[..., None, :], root[..., :, None] * self.vt


def svd(w: Array, rank: int | None = None, *, niter: int | None = None, key: Any = None) -> SVD:
    """Decompose matrices, ``[*batch, in, out]``, and keep the largest ``rank``; None: all.

    Args:
        w: the matrices.
        rank: how many singular values to keep.
        niter: None for an exact decomposition; or the steps of a subspace iteration, which needs
            a rank.
        key: a PRNG key for the start of the iteration.

    References:
        Halko et al., arXiv:0909.4061.
    """
    if niter is None:
        return SVD(*library(w).linalg.svd(w, full_matrices=False)).truncated(rank)
    assert rank is not None, "a subspace iteration needs a rank"
    size = min(rank + 6, *w.shape[-2:])
    q = w @ jax.random.normal(key, (*w.shape[:-2], w.shape[-1], size), w.dtype)
    q, _ = jnp.linalg.qr(q)
    for _ in range(niter):
        q, _ = jnp.linalg.qr(w.mT @ q)
        q, _ = jnp.linalg.qr(w @ q)  # [*batch, in, size]
    u, s, vt = jnp.linalg.svd(q.mT @ w, full_matrices=False)
    return SVD(q @ u, s, vt).truncated(rank)


def matmul(x: Array, y: Array) -> Array:
    """Multiply matrices in full precision, whatever the device's default."""
    return x @ y if library(x) is np else jnp.matmul(x, y, precision="highest")


def padded(f: Factors, rank: int) -> Factors:
    """Raise the rank of factors: the new columns of ``a`` and rows of ``b`` are zero."""
    if f.rank == rank:
        return f
    a, b = jnp.asarray(f.a), jnp.asarray(f.b)
    return replace(
        f, a=pad_axis(a, a.ndim - 1, 0, rank), b=pad_axis(b, f.layout.count("b"), 0, rank)
    )


def pad_axis(x: jax.Array, axis: int, start: int, size: int) -> jax.Array:
    """Place ``x`` at ``start`` on an axis of ``size``; the rest is zero."""
    config = [(0, 0, 0)] * x.ndim
    config[axis] = (start, size - start - x.shape[axis], 0)
    return lax.pad(x, np.zeros((), x.dtype), config)


def library(x: Array) -> Any:
    return np if isinstance(x, np.ndarray | np.generic) else jnp


def _times(x: Array, scale: Any) -> Array:
    return x if scale is None else x * library(x).asarray(scale, x.dtype)


def _qr(x: Array, is_full: bool) -> tuple[Array, Array]:
    """Return ``Q`` and ``R``, or None and ``R``."""
    qr = library(x).linalg.qr
    return qr(x) if is_full else (None, qr(x, mode="r"))
