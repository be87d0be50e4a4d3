"""Compute what the tables show of singular values and of tensors, in float64."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.analysis._spectra import entropy_rank

_CHUNK = 2**22  # entries that are converted to float64 at a time


def effective_rank(s: np.ndarray) -> float:
    """Return :func:`lora_jax.analysis.effective_rank`, averaged over the layers."""
    return float(entropy_rank(s).mean())


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
