"""Find singular vectors of an adapted weight that the base does not have, and scale them down."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax._adapter.factors import Factors, is_concrete
from lora_jax._adapter.lowrank import SVD, matmul, svd
from lora_jax._adapter.params import Adapter, LoraParams
from lora_jax._adapter.sums import sum_of
from lora_jax._adapter.updates import check_linear
from lora_jax._weights.axes import factor_shapes
from lora_jax._weights.numbers import check_int
from lora_jax._weights.selector import Selector
from lora_jax.analysis._changes import Change, changes, check_values, no_map

Side = Literal["a", "b"]


class Intruders(NamedTuple):
    """The leading singular vectors of one weight ``W + dW``, compared with those of ``W``.

    Attributes:
        values: the singular values, ``[*batch, k]``, descending.
        cosines: the largest ``|cosine|`` of each vector with any of ``W``, ``[*batch, k]``.
        found: whether each is an intruder, ``[*batch, k]``.
    """

    values: jax.Array
    cosines: jax.Array
    found: jax.Array

    @property
    def number(self) -> jax.Array:
        """The number of intruders, ``[*batch]``."""
        return self.found.sum(-1)


def intruder_dimensions(
    x: Any, *, k: int = 10, eps: float = 0.5, factor: Side = "b", targets: Selector = ".*"
) -> dict[str, Intruders]:
    """Find the leading singular vectors of adapted weights that resemble none of the base's.

    ``u'_j`` is a singular vector of ``W + dW``, and an intruder if ::

        max_i |cos(u'_j, u_i)| < eps    for all singular vectors u_i of W,   j <= k

    The weights are decomposed exactly, one at a time, which takes most of the time: ``targets``
    selects some.

    Args:
        x: a LoraParams.
        k: how many leading vectors to look at; all ``min(in, out)`` if there are fewer.
        eps: below which cosine a vector is an intruder, above 0 and below 1.
        factor: ``"b"`` compares the vectors of the outputs, which the paper calls left singular
            vectors of ``W[out, in]``; ``"a"`` those of the inputs.
        targets: which entries, as in :func:`spectra`.

    Returns:
        A dict of :class:`Intruders` for each entry that is a linear map.

    Raises:
        TypeError: ``x`` is no LoraParams.
        ValueError: an argument is out of range; a weight is not finite; or as in :func:`spectra`.

    Example:
        >>> import jax.numpy as jnp, lora_jax
        >>> base = {"w": jnp.diag(jnp.array([3.0, 2.0, 1.0]))}
        >>> b = jnp.full((1, 3), 9.0)
        >>> adapter = lora_jax.Adapter({"w": lora_jax.Factors(b.T, b, 1.0, "io")})
        >>> x = lora_jax.LoraParams(base, adapter)
        >>> lora_jax.analysis.intruder_dimensions(x, k=2, eps=0.7)["w"].found
        Array([ True, False], dtype=bool)

    References:
        Shuttleworth et al., LoRA vs Full Fine-tuning: An Illusion of Equivalence,
        arXiv:2410.21228.
    """
    _check("intruder_dimensions", k, eps, factor)
    return {
        key: _intruders("intruder_dimensions", key, change, k, eps, factor)[1]
        for key, change in changes("intruder_dimensions", x, targets, no_map, base=True)
    }


def reduce_intruders(
    x: LoraParams,
    *,
    scale: float,
    k: int = 10,
    eps: float = 0.5,
    factor: Side = "b",
    targets: Selector = ".*",
) -> LoraParams:
    """Scale the intruder dimensions of adapted weights down.

    For the intruders ``j`` among the leading ``k`` singular triplets ``u_j, s_j, v_j`` of
    ``W + dW``::

        dW' = dW - (1 - scale) sum_j s_j u_j v_j^T

    so that ``W + dW'`` has the singular value ``scale * s_j`` in their place, and all others as
    before. The new factors are ``[a, u_j]`` and ``[scale_of_dW * b; (scale - 1) s_j v_j^T]``, with
    scale 1. So their rank is that of ``dW`` plus the number of intruders, at most ``k`` more; where
    batch entries have different numbers, the others' terms are zero.

    Entries without intruders, entries that ``targets`` leaves out, full leaves and table rows stay
    as they are. ``lora_jax.algebra.resize`` returns to the former rank, nearly. The function reads
    values, so it does not run under ``jit``.

    Args:
        x: a LoraParams.
        scale: the share that stays: 0 removes intruders, 1 changes nothing.
        k: as in :func:`intruder_dimensions`.
        eps: as in :func:`intruder_dimensions`.
        factor: as in :func:`intruder_dimensions`.
        targets: as in :func:`intruder_dimensions`.

    Returns:
        A LoraParams over the same base.

    Raises:
        TypeError: as in :func:`intruder_dimensions`; or ``x`` is traced.
        ValueError: as in :func:`intruder_dimensions`; ``scale`` is not from 0 to 1; or an entry has
            DoRA, whose update has no low rank.

    Example:
        >>> import jax.numpy as jnp, lora_jax
        >>> base = {"w": jnp.diag(jnp.array([3.0, 2.0, 1.0]))}
        >>> b = jnp.full((1, 3), 9.0)
        >>> adapter = lora_jax.Adapter({"w": lora_jax.Factors(b.T, b, 1.0, "io")})
        >>> x = lora_jax.LoraParams(base, adapter)
        >>> y = lora_jax.analysis.reduce_intruders(x, scale=0, k=2, eps=0.7)
        >>> y.adapter.factors["w"].rank
        2
        >>> [jnp.linalg.norm(lora_jax.merge(z)["w"], 2).round() for z in (x, y)]
        [Array(245., dtype=float32), Array(3., dtype=float32)]

    References:
        Shuttleworth et al., arXiv:2410.21228.
    """
    verb = "reduce_intruders"
    _check(verb, k, eps, factor)
    if not 0 <= scale <= 1:
        raise ValueError(f"{verb}: scale={scale}: expected a share, from 0 to 1")
    factors = {}
    for key, change in changes(verb, x, targets, _no_factors, base=True):
        f = x.adapter.factors[key]
        assert isinstance(f, Factors)
        check_linear(verb, key, f)
        parts, intruders = _intruders(verb, key, change, k, eps, factor)
        if not is_concrete(intruders.found):
            raise TypeError(
                f"{verb}: x is traced, and the new rank depends on its values: call it outside of "
                "jit"
            )
        factors[key] = _reduced(f, parts, np.asarray(intruders.found), scale)
    return replace(x, adapter=Adapter({**x.adapter.factors, **factors}, x.adapter.full))


def _check(verb: str, k: Any, eps: Any, factor: str) -> None:
    check_int(k, f"{verb}: k", 1)
    if not 0 < eps < 1:
        raise ValueError(f"{verb}: eps={eps}: expected a cosine, above 0 and below 1")
    if factor not in get_args(Side):
        raise ValueError(f"{verb}: factor={factor!r}: expected 'a' or 'b'")


def _no_factors(key: str, f: Any) -> str | None:
    """Return why an entry has no factors to change."""
    return no_map(key, f) if isinstance(f, Factors) or no_map(key, f) else "a full leaf"


def _intruders(
    verb: str, key: str, change: Change, k: int, eps: float, factor: Side
) -> tuple[SVD, Intruders]:
    """Decompose a weight before and after, one matrix at a time."""
    check_values(
        f"{verb}: the weight of {key!r} in the base is not finite{{where}}: leave it out by "
        "targets=",
        ~jnp.isfinite(change.weight).all((-2, -1)),
    )

    def one(xs: tuple[jax.Array, ...]) -> tuple[SVD, jax.Array]:
        w, *moved = xs
        old, new = svd(w), svd(w + (matmul(*moved) if len(moved) == 2 else moved[0]), k)
        products = matmul(new.u.mT, old.u) if factor == "a" else matmul(new.vt, old.vt.mT)
        return new, jnp.minimum(abs(products).max(-1), 1)

    update = change.update and change.update.folded()
    arrays = (change.dense,) if update is None else (update.a, update.b)
    new, cosines = _each(one, change.weight, *arrays)
    return new, Intruders(new.s, cosines, cosines < eps)


def _each(one: Callable[..., Any], *arrays: jax.Array) -> Any:
    """Call a function of matrices for each batch entry, one after another."""
    batch = arrays[0].shape[:-2]
    flat = tuple(x.reshape(math.prod(batch), *x.shape[-2:]) for x in arrays)
    return jax.tree.map(lambda y: y.reshape(*batch, *y.shape[1:]), lax.map(one, flat))


def _reduced(f: Factors, parts: SVD, found: np.ndarray, scale: float) -> Factors:
    """Add the terms that take a share of the intruders away."""
    columns = np.flatnonzero(found.reshape(-1, found.shape[-1]).any(0))
    if not columns.size:
        return f
    share = jnp.asarray((scale - 1) * found[..., columns], parts.s.dtype) * parts.s[..., columns]
    a_shape, b_shape = factor_shapes(f.layout, f.weight_shape, columns.size)
    a, b = parts.u[..., columns], share[..., :, None] * parts.vt[..., columns, :]
    more = replace(f, a=a.reshape(a_shape), b=b.reshape(b_shape), scale=jnp.ones((), b.dtype))
    total = sum_of([f, more])
    assert isinstance(total, Factors)
    return total
