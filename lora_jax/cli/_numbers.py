"""Compute what the tables show of singular values and of tensors, in float64."""

from typing import Any

import jax.numpy as jnp
import numpy as np

_CHUNK = 2**22  # entries that are converted to float64 at a time


def effective_rank(s: np.ndarray) -> float:
    """Return ``exp`` of the entropy of the normalized singular values, averaged over the layers.

    A zero matrix counts as 0.

    References:
        Roy and Vetterli, The effective rank: a measure of effective dimensionality, EUSIPCO 2007.
    """
    total = s.sum(-1, keepdims=True)
    p = s / np.where(total > 0, total, 1.0)
    entropy = -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1)
    return float(np.where(total[..., 0] > 0, np.exp(entropy), 0.0).mean())


def tensor_norm(x: np.ndarray) -> float | None:
    """Return the Frobenius norm of a tensor of floats, chunk by chunk; None for other dtypes."""
    if not is_float(x.dtype):
        return None
    flat = x.reshape(-1)
    parts = (flat[k : k + _CHUNK].astype(np.float64) for k in range(0, flat.size, _CHUNK))
    return float(np.sqrt(sum(np.square(part).sum() for part in parts)))


def is_float(dtype: Any) -> bool:
    """Return whether this dtype holds real floating-point numbers."""
    return jnp.issubdtype(dtype, jnp.floating)
