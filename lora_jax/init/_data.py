"""Make initializers from data: from what the weights read, or from one gradient.

Each function takes the statistics and returns an initializer.
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._adapter.factors import is_concrete
from lora_jax._adapter.lowrank import SVD, svd
from lora_jax._weights.paths import PyTree, flatten, nearest
from lora_jax._weights.target import Initializer, Target
from lora_jax.init._svd import take_out

Moments = Mapping[str, jax.Array]


def eva(moments: Moments) -> Initializer:
    """Let ``a`` read the directions in which the inputs vary most; ``b = 0`` (EVA).

    ``a`` holds the first ``rank`` eigenvectors of ``sum x x^T``: the principal components of the
    inputs, without centering.

    Args:
        moments: from :func:`lora_jax.init.input_moments`.

    References:
        Paischer et al., Explained Variance Adaptation, arXiv:2410.07170.
    """

    def init(key: jax.Array, target: Target) -> tuple[jax.Array, jax.Array]:
        del key
        _, vectors = jnp.linalg.eigh(_of(moments, target, "eva"))  # in ascending order
        a = vectors[..., ::-1][..., : target.rank]
        return a, jnp.zeros((*target.batch, target.rank, target.outputs), jnp.float32)

    init.__name__ = "eva"
    return init


def eva_ranks(moments: Moments, rank: int = 8, rho: float = 2.0) -> dict[str, int]:
    """Choose a rank per weight by the variance of its inputs; the mean is ``rank`` (EVA).

    The candidates are the leading ``rho * rank`` components of each weight's inputs. Those with the
    largest share of their weight's variance are chosen: ``rank`` times the number of weights.

    Args:
        moments: from :func:`lora_jax.init.input_moments`.
        rank: the mean rank.
        rho: the largest rank is ``rho * rank``; 1 gives every weight ``rank``.

    Returns:
        ``{path: rank}`` without the weights that get none, for
        ``lorafy(params, targets=lambda path, leaf: ranks.get(path, 0), init=eva(moments))``.

    Raises:
        ValueError: ``rho`` is less than 1.

    References:
        Paischer et al., Explained Variance Adaptation, arXiv:2410.07170.
    """
    if rho < 1:
        raise ValueError(f"eva_ranks: rho={rho!r}: expected at least 1")
    shares = []
    for path, moment in moments.items():
        values = np.maximum(np.linalg.eigvalsh(np.asarray(moment, np.float64))[..., ::-1], 0)
        ratio = values / np.maximum(values.sum(-1, keepdims=True), np.finfo(float).tiny)
        ratio = ratio.reshape(-1, ratio.shape[-1]).mean(0)  # a stack has one rank for all layers
        shares += [(share, path) for share in ratio[: int(rank * rho)]]
    best = sorted(shares, key=lambda pair: -pair[0])[: rank * len(moments)]
    chosen = [path for _, path in best]
    return {path: chosen.count(path) for path in moments if path in chosen}


def corda(
    moments: Moments, mode: Literal["ipm", "kpm"] = "ipm", damping: float = 0.01
) -> Initializer:
    """Split ``W`` by an SVD weighted with input moments, and train one part (CorDA).

    ``"ipm"`` (instruction previewed) trains the ``rank`` largest parts, ``"kpm"`` (knowledge
    preserved) the smallest::

        C = sum x x^T,  C W = U S V^T
        a = C^-1 U sqrt(S / scale),  b = sqrt(S / scale) V^T,  base = W - scale * a b

    Args:
        moments: from :func:`lora_jax.init.input_moments`.
        mode: which parts train.
        damping: added to the diagonal of ``C``, in units of its mean.

    Raises:
        ValueError: ``mode`` is neither of the two.

    References:
        Yang et al., CorDA, arXiv:2406.05223.
    """
    if mode not in ("ipm", "kpm"):
        raise ValueError(f"corda: mode={mode!r}: expected 'ipm' or 'kpm'")

    def init(key: jax.Array, target: Target) -> tuple[jax.Array, ...]:
        del key
        c = _of(moments, target, "corda")
        n = c.shape[-1]
        c = c * (n / jnp.trace(c, axis1=-2, axis2=-1))[..., None, None]
        c = c + damping * jnp.broadcast_to(jnp.eye(n), c.shape)
        w = target.matrix()
        u, s, vt = svd(c @ w)
        part = slice(target.rank) if mode == "ipm" else slice(s.shape[-1] - target.rank, None)
        u = jnp.linalg.solve(c, u[..., part])
        a, b = SVD(u, s[..., part], vt[..., part, :]).balanced(target.scale)
        return take_out(w, target.scale, a, b)

    init.__name__ = "corda"
    return init


def lora_ga(grads: PyTree, gamma: float = 16.0) -> Initializer:
    """Start from a gradient, so that the first step is near full fine-tuning's (LoRA-GA).

    The factors come from one gradient ``G`` of the weight::

        G = U S V^T,  c = out^(1/4) / sqrt(gamma)
        a = c U[:, :rank],  b = c V[:, rank:2 rank]^T,  base = W - scale * a b

    Args:
        grads: gradients of the base from ``jax.grad``: a tree with the paths of ``params``.
        gamma: a larger value makes the factors smaller.

    References:
        Wang et al., LoRA-GA: Low-Rank Adaptation with Gradient Approximation, arXiv:2407.05000.
    """
    by_path = flatten(grads)[0]

    def init(key: jax.Array, target: Target) -> tuple[jax.Array, ...]:
        del key
        path = target.part.path
        if path not in by_path or by_path[path].shape != target.leaf.shape:
            shape = getattr(by_path.get(path), "shape", None)
            raise ValueError(
                f"lora_ga: grads has shape {shape} at {path!r}, and the weight has shape "
                f"{target.leaf.shape}. Nearest paths: {nearest(path, by_path)}"
            )
        r = target.rank
        if 2 * r > min(target.inputs, target.outputs):
            raise ValueError(
                f"lora_ga: rank={r} of {target.path!r} needs {2 * r} singular vectors, and its "
                f"gradient is only {target.inputs} by {target.outputs}"
            )
        gradient = target.as_matrix(by_path[path][target.index])
        u, _, vt = svd(gradient)
        c = target.outputs**0.25 / gamma**0.5
        a, b = c * u[..., :r], c * vt[..., r : 2 * r, :]
        return take_out(target.matrix(), target.scale, a, b)

    init.__name__ = "lora_ga"
    return init


def _of(moments: Moments, target: Target, name: str) -> Any:
    """Look up the moments of what one weight reads."""
    expected = (*target.batch, target.inputs, target.inputs)
    if target.path not in moments or moments[target.path].shape != expected:
        shape = getattr(moments.get(target.path), "shape", None)
        raise ValueError(
            f"{name}: moments has shape {shape} at {target.path!r}, expected {expected}. Call "
            "lora_jax.init.input_moments with the same targets and layouts. Nearest paths: "
            f"{nearest(target.path, moments)}"
        )
    with jax.ensure_compile_time_eval():  # inside a trace, too
        is_zero = is_concrete(moments[target.path]) and not jnp.any(moments[target.path])
    if is_zero:
        raise ValueError(
            f"{name}: the moments of {target.path!r} are zero: it read nothing, or is used only "
            "for lookups. Leave it out of the targets"
        )
    return moments[target.path]
