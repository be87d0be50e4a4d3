"""Take the factors out of the weight: the rest of it becomes the base."""

import jax
import jax.numpy as jnp

from lora_jax._adapter.lowrank import matmul, svd
from lora_jax._weights.target import Target


def pissa(key: jax.Array, target: Target, niter: int | None = None) -> tuple[jax.Array, ...]:
    """Train the principal part of ``W``, and freeze the rest.

    The factors hold the largest ``rank`` singular values::

        W = U S V^T
        a = U sqrt(S / scale),  b = sqrt(S / scale) V^T,  base = W - scale * a b

    Args:
        key: a PRNG key, used with ``niter`` only.
        target: the weight.
        niter: None computes all singular values. A number finds the largest by that many steps of
            subspace iteration from a random start, which is much faster and nearly as good:
            ``functools.partial(pissa, niter=4)``.

    References:
        Meng et al., PiSSA, arXiv:2404.02948.
    """
    w = target.matrix()
    parts = svd(w, target.rank, niter=niter, key=key)
    return take_out(w, target.scale, *parts.balanced(target.scale))


def take_out(w: jax.Array, scale: float, a: jax.Array, b: jax.Array) -> tuple[jax.Array, ...]:
    """Return factors and the rest of the weight: ``W - scale * a b``, in full precision."""
    return a, b, w - scale * matmul(a, b)


def olora(key: jax.Array, target: Target) -> tuple[jax.Array, ...]:
    """Take ``a`` and an orthonormal ``b`` from a QR decomposition of ``W``, and train them (OLoRA).

    ``W^T = Q R,  a = R[:rank]^T,  b = Q[:, :rank]^T,  base = W - scale * a b``.

    References:
        Büyükakyüz, OLoRA, arXiv:2406.01775.
    """
    del key
    w = target.matrix()
    q, r = jnp.linalg.qr(w.mT)
    a, b = r[..., : target.rank, :].mT, q[..., : target.rank].mT
    return take_out(w, target.scale, a, b)
