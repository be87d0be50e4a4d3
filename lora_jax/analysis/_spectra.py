"""Compute singular values of updates, and the ranks that they amount to."""

from typing import Any

import jax

from lora_jax._adapter.lowrank import Array, library
from lora_jax._weights.selector import Selector
from lora_jax.analysis._changes import changes, no_matrix


def spectra(x: Any, *, targets: Selector = ".*") -> dict[str, jax.Array]:
    """Return the singular values of every update, in descending order.

    They come from the factors. For ``dW = scale * a b``::

        a = Qa Ra,   b^T = Qb Rb,   dW = Qa (scale Ra Rb^T) Qb^T

    so that the singular values of ``dW`` are those of the small matrix in the middle.

    The update of DoRA is the merged weight less the base's, that of a full leaf its difference from
    the base: these are decomposed as matrices. For two checkpoints, pass
    ``lora_jax.algebra.extract(before, after, energy=1.0, rest="full")``.

    Args:
        x: an Adapter; or a LoraParams, which DoRA and full leaves need.
        targets: which entries, as in ``lorafy``, by their keys.

    Returns:
        A dict of ``[*batch, min(rank, in, out)]`` for each entry that is a matrix; full leaves that
        are vectors, such as biases, are left out.

    Raises:
        TypeError: ``x`` is neither, or is an Adapter whose updates depend on the base.
        ValueError: ``x`` is a stack, is not finite or belongs to a residual base; or ``targets``
            selects nothing that is a matrix.

    Example:
        >>> import jax.numpy as jnp, lora_jax
        >>> a, b = jnp.eye(3)[:, :2], jnp.array([[0.0, 4.0], [3.0, 0.0]])
        >>> x = lora_jax.Adapter({"w": lora_jax.Factors(a, b, 2.0, "io")})
        >>> lora_jax.analysis.spectra(x)["w"].round().tolist()
        [8.0, 6.0]

    References:
        Hu et al., LoRA, arXiv:2106.09685, section 7.
    """
    found = changes("spectra", x, targets, no_matrix, base=False)
    return {key: change.svd(vectors=False).s for key, change in found}


def effective_rank(x: Any, *, targets: Selector = ".*") -> dict[str, jax.Array]:
    """Measure how many directions every update uses, by the entropy of its singular values.

    ::

        exp(-sum_k p_k log p_k),   p_k = s_k / sum(s)

    It is between 1 and the rank. A zero update counts as 0.

    Args:
        x: as in :func:`spectra`.
        targets: as in :func:`spectra`.

    Returns:
        A dict of ``[*batch]``, for the entries of :func:`spectra`.

    Raises:
        TypeError: as in :func:`spectra`.
        ValueError: as in :func:`spectra`.

    Example:
        >>> import jax.numpy as jnp, lora_jax
        >>> f = lora_jax.Factors(jnp.eye(3), jnp.diag(jnp.array([1.0, 1.0, 0.0])), 1.0, "io")
        >>> lora_jax.analysis.effective_rank(lora_jax.Adapter({"w": f}))["w"].round(3)
        Array(2., dtype=float32)

    References:
        Roy and Vetterli, The effective rank: a measure of effective dimensionality, EUSIPCO 2007.
    """
    found = changes("effective_rank", x, targets, no_matrix, base=False)
    return {key: entropy_rank(change.svd(vectors=False).s) for key, change in found}


def stable_rank(x: Any, *, targets: Selector = ".*") -> dict[str, jax.Array]:
    """Measure how many directions every update uses, by its two norms.

    ::

        |dW|_F^2 / |dW|_2^2  =  sum(s^2) / max(s)^2

    It is between 1 and the rank. Small singular values count for less than in
    :func:`effective_rank`. A zero update counts as 0.

    Args:
        x: as in :func:`spectra`.
        targets: as in :func:`spectra`.

    Returns:
        A dict of ``[*batch]``, for the entries of :func:`spectra`.

    Raises:
        TypeError: as in :func:`spectra`.
        ValueError: as in :func:`spectra`.

    Example:
        >>> import jax.numpy as jnp, lora_jax
        >>> f = lora_jax.Factors(jnp.eye(2), jnp.diag(jnp.array([2.0, 1.0])), 1.0, "io")
        >>> lora_jax.analysis.stable_rank(lora_jax.Adapter({"w": f}))["w"].round(3)
        Array(1.25, dtype=float32)

    References:
        Rudelson and Vershynin, Sampling from large matrices, arXiv:math/0503442.
    """
    found = changes("stable_rank", x, targets, no_matrix, base=False)
    return {key: norm_rank(change.svd(vectors=False).s) for key, change in found}


def entropy_rank(s: Array) -> Array:
    """Return ``exp`` of the entropy of the normalized values; 0 if all are zero."""
    xp = library(s)
    total = s.sum(-1)
    p = s / _nonzero(xp, total)[..., None]
    entropy = -(p * xp.log(_nonzero(xp, p))).sum(-1)
    return xp.where(total > 0, xp.exp(entropy), xp.zeros_like(entropy))


def norm_rank(s: Array) -> Array:
    """Return ``sum(s^2) / max(s)^2``; 0 if all are zero."""
    xp = library(s)
    unit = s / _nonzero(xp, s[..., 0])[..., None]
    return xp.square(unit).sum(-1)


def _nonzero(xp: Any, x: Array) -> Array:
    return xp.where(x > 0, x, xp.ones_like(x))
