"""Wrap any Optax transformation so that it treats ``a`` and ``b`` differently."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora_jax._adapter.factors import Factors, wide
from lora_jax._adapter.lowrank import as_matrix
from lora_jax._adapter.params import Adapter, LoraParams
from lora_jax._weights.axes import is_array
from lora_jax._weights.paths import PyTree


def lora_plus(tx: optax.GradientTransformation, ratio: float = 16.0) -> Any:
    """Give ``b`` a learning rate that is ``ratio`` times that of ``a``.

    The final update of ``b``, after the moments, schedule and decoupled decay of ``tx``, is
    multiplied by ``ratio``. The result replaces ``tx`` anywhere: in :func:`optimizer`, or for what
    ``split`` returns.

    Args:
        tx: any Optax transformation.
        ratio: the ratio of the two learning rates.

    Returns:
        An Optax transformation.

    Raises:
        ValueError: ``ratio`` is not a positive number.

    Example:
        >>> import jax, jax.numpy as jnp, optax, lora_jax
        >>> trainable, _ = lora_jax.split(lora_jax.lorafy({"query": {"kernel": jnp.ones((3, 2))}}, 1))
        >>> tx = lora_jax.optim.lora_plus(optax.sgd(1.0), ratio=4)
        >>> grads = jax.tree.map(jnp.ones_like, trainable)
        >>> updates, _ = tx.update(grads, tx.init(trainable), trainable)
        >>> f = updates.factors["query/kernel"]
        >>> float(f.a[0, 0]), float(f.b[0, 0])
        (-1.0, -4.0)

    References:
        Hayou et al., LoRA+: Efficient Low Rank Adaptation of Large Models, arXiv:2402.12354.
    """  # noqa: E501
    if not (math.isfinite(ratio) and ratio > 0):
        raise ValueError(f"lora_plus: ratio={ratio!r}: expected a positive number")
    tx = optax.with_extra_args_support(tx)

    def update(updates, state, params=None, **extra):
        updates, state = tx.update(updates, state, params, **extra)
        return _map_entries(lambda _, f: replace(f, b=_times(f.b, ratio)), updates), state

    return optax.GradientTransformationExtraArgs(tx.init, update)


def lora_fa(
    tx: optax.GradientTransformation, lora_params: LoraParams, damping: float = 1e-8
) -> Any:
    """Replace the gradient of ``b`` by the best one for ``W`` while ``a`` is frozen (LoRA-FA).

    ``a`` never trains, so its inputs need not be kept for the backward pass. Among the updates of
    ``W`` that ``a`` allows, the one nearest to the gradient of ``W`` has::

        db = (a^T a)^-1 / scale^2 * grad_b

    Args:
        tx: any Optax transformation, which receives the new gradients.
        lora_params: from ``lorafy(..., freeze=("a",))``: the gradients are projected on its ``a``.
        damping: added to the diagonal of ``a^T a``, in units of its mean.

    Returns:
        An Optax transformation for these factors.

    Raises:
        TypeError: ``lora_params`` is not a LoraParams.
        ValueError: an ``a`` trains, or ``lora_params`` is a stack.

    Example:
        >>> import jax.numpy as jnp, optax, lora_jax
        >>> params = {"query": {"kernel": jnp.ones((3, 2))}}
        >>> lora_params = lora_jax.lorafy(params, rank=1, freeze=("a",))
        >>> tx = lora_jax.optim.lora_fa(optax.adamw(1e-3), lora_params)
        >>> state = tx.init(lora_jax.split(lora_params)[0])

    References:
        Zhang et al., LoRA-FA, arXiv:2308.03303. The projection is that of LoRA-Pro's section 3.1
        (Wang et al., arXiv:2407.18242) for a frozen ``a``, as in PEFT's ``LoraFAOptimizer``.
    """
    if not isinstance(lora_params, LoraParams):
        raise TypeError(f"lora_fa: expected a LoraParams, got {type(lora_params).__name__}")
    factors = lora_params.adapter.factors
    if trains := [path for path, f in factors.items() if "a" in f.trainable]:
        raise ValueError(
            f"lora_fa: 'a' of {trains[0]!r} trains. Build the adapter with lorafy(..., "
            "freeze=('a',))"
        )
    if stacked := [path for path, f in factors.items() if jnp.ndim(f.scale)]:
        raise ValueError(
            f"lora_fa: scale of {stacked[0]!r} has shape {jnp.shape(factors[stacked[0]].scale)}: "
            "this is a stack, expected one adapter to project on. Call lora_fa(tx, lora_params) "
            "in the step of one member, and map it: jax.vmap(step)"
        )
    tx = optax.with_extra_args_support(tx)
    inverses = {
        path: _inverse_gram(_matrix(f, "a"), damping) / jnp.square(f.scale)
        for path, f in factors.items()
    }

    def project(path, f):
        if path not in inverses:
            raise ValueError(f"lora_fa: it was made for other factors, and not for {path!r}")
        b = _matrix(f, "b")
        return replace(f, b=(inverses[path].astype(b.dtype) @ b).reshape(f.b.shape))

    def update(updates, state, params=None, **extra):
        return tx.update(_map_entries(project, updates), state, params, **extra)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def riemannian(tx: optax.GradientTransformation, damping: float = 1e-6) -> Any:
    """Make gradients independent of how ``a b`` is split into ``a`` and ``b``.

    The gradient of each factor is multiplied by the inverse Gram matrix of the other::

        da = grad_a (b b^T)^-1,    db = (a^T a)^-1 grad_b

    Args:
        tx: any Optax transformation, which receives the new gradients.
        damping: added to the diagonals of the Gram matrices, since ``b`` starts at zero.

    Returns:
        An Optax transformation, whose ``update`` needs ``params``.

    Raises:
        ValueError: ``update`` gets no ``params``, or a factor is frozen.

    Example:
        >>> import optax, lora_jax
        >>> tx = lora_jax.optimizer(lora_jax.optim.riemannian(optax.adamw(1e-3)))

    References:
        Zhang and Pilanci, Riemannian Preconditioned LoRA, arXiv:2402.02347.
    """
    tx = optax.with_extra_args_support(tx)

    def update(updates, state, params=None, **extra):
        if params is None:
            raise ValueError("riemannian: update(updates, state, params) needs params")

        def scale(path, f, here):
            if not is_array(here.a) or not is_array(here.b):
                raise ValueError(f"riemannian: a factor of {path!r} is frozen, and both are needed")
            a, b = _matrix(here, "a"), _matrix(here, "b")
            da = _matrix(f, "a") @ _inverse_gram(b.mT, damping, relative=False)
            db = _inverse_gram(a, damping, relative=False) @ _matrix(f, "b")
            new = {"a": da.astype(f.a.dtype), "b": db.astype(f.b.dtype)}
            return replace(f, **{n: x.reshape(getattr(f, n).shape) for n, x in new.items()})

        return tx.update(_map_entries(scale, updates, params), state, params, **extra)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _inverse_gram(a: jax.Array, damping: float, relative: bool = True) -> jax.Array:
    """Return ``(a^T a + damping)^-1`` for ``a`` of ``[*batch, n, r]``."""
    gram = a.mT @ a
    size = jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None] / gram.shape[-1] if relative else 1
    eye = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)
    return jnp.linalg.inv(gram + damping * size * eye)


def _matrix(f: Factors, name: str) -> jax.Array:
    """Return a factor as matrices, in at least float32."""
    x = getattr(f, name)
    return as_matrix(x.astype(wide(x.dtype)), f.layout, name)


def _times(x: Any, ratio: float) -> Any:
    return x * jnp.asarray(ratio, x.dtype) if is_array(x) else x


def _map_entries(f: Callable[..., Factors], tree: PyTree, *others: PyTree) -> PyTree:
    """Replace the factors of every adapter in ``tree`` by ``f(path, factors, *others)``."""

    def is_adapter(x):
        return isinstance(x, Adapter)

    def new(x, *others):
        if not is_adapter(x):
            return x
        entries = x.factors.items()
        factors = {path: f(path, own, *(o.factors[path] for o in others)) for path, own in entries}
        return replace(x, factors=factors)

    return jax.tree.map(new, tree, *others, is_leaf=is_adapter)
