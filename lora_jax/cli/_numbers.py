"""Numbers of updates, exact in float64 and without ever building one: by QR of their factors."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.cli._read.forms import Update

_CHUNK = 2**22  # entries that are in float64 at a time


def singular_values(updates: Sequence[Update], signs: Sequence[float] = (1.0,)) -> np.ndarray:
    """Those of ``sum_k sign_k scale_k a_k b_k``, ``[layers, ranks]``, descending.

    With ``a = Q R`` and ``b^T = P S``, they are those of ``R S^T``, which is as small as the rank.
    """
    weighted = [(u, s * u.scale) for u, s in zip(updates, signs, strict=True)]
    a = np.concatenate([u.a.astype(np.float64) for u, _ in weighted], -1)
    b = np.concatenate([w * u.b.astype(np.float64) for u, w in weighted], 1)
    r, s = np.linalg.qr(a, mode="r"), np.linalg.qr(b.mT, mode="r")
    return np.linalg.svd(r @ s.mT, compute_uv=False)


def norm(s: np.ndarray) -> float:
    """The Frobenius norm, of all layers together."""
    return float(np.sqrt(np.square(s).sum()))


def effective_rank(s: np.ndarray) -> float:
    """``exp`` of the entropy of the normalized singular values; the mean over the layers.

    Zero of a matrix that is zero.

    References:
        Roy and Vetterli, The effective rank: a measure of effective dimensionality, EUSIPCO 2007.
    """
    total = s.sum(-1, keepdims=True)
    p = s / np.where(total > 0, total, 1.0)
    entropy = -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1)
    return float(np.where(total[..., 0] > 0, np.exp(entropy), 0.0).mean())


def inner(one: Update, other: Update) -> float:
    """The inner product of two updates: ``sum_ij dW_ij dV_ij = tr(b_w b_v^T (a_w^T a_v)^T)``."""
    of_a = one.a.astype(np.float64).mT @ other.a.astype(np.float64)
    of_b = one.b.astype(np.float64) @ other.b.astype(np.float64).mT
    return float(one.scale * other.scale * (of_a * of_b).sum())


def tensor_norm(x: np.ndarray) -> float | None:
    """The Frobenius norm of a tensor of floats, a part at a time; None of other numbers."""
    if not is_float(x.dtype):
        return None
    flat = x.reshape(-1)
    parts = (flat[k : k + _CHUNK].astype(np.float64) for k in range(0, flat.size, _CHUNK))
    return float(np.sqrt(sum(np.square(part).sum() for part in parts)))


def is_float(dtype: Any) -> bool:
    """Whether an array of this dtype is of real numbers."""
    return jnp.issubdtype(dtype, jnp.floating)
