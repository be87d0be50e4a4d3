"""``resize``: change the rank of an adapter."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from lora_jax import _jax
from lora_jax._adapter.checks import check_finite, check_single, with_adapter
from lora_jax._adapter.factors import Factors
from lora_jax._adapter.lowrank import LowRank, padded
from lora_jax._adapter.params import Adapter, LoraParams
from lora_jax._weights.axes import factor_shapes, max_rank, role_shape
from lora_jax._weights.conventions import is_table
from lora_jax._weights.numbers import is_int
from lora_jax._weights.ranges import Part, split_range
from lora_jax._weights.selector import check_patterns, lookup
from lora_jax._weights.target import Target, fold_in_path
from lora_jax.init._random import gaussian

Lora = TypeVar("Lora", LoraParams, Adapter)


def resize(adapter: Lora, rank: int | Mapping[str, int], *, key: jax.Array | None = None) -> Lora:
    """Change the rank of an adapter; ``scale`` stays.

    A larger rank does not change the function: the new rows of ``b`` are zero. A smaller rank keeps
    the largest singular values, for each batch entry (layer, expert) separately::

        a = Qa Ra,   b^T = Qb Rb,   Ra Rb^T = U S V^T
        a' = Qa U sqrt(S),   b' = sqrt(S) V^T Qb^T

    No matrix of that rank is nearer to ``a b`` in the Frobenius norm. ``a b`` itself is never
    built: the products and the SVD have the size of the factors, in at least float32.

    Frozen factors change, too, and so does DoRA's direction; its magnitude stays. If ``a b`` has a
    lower rank than ``rank``, as in a fresh adapter, the rest of both factors is zero and stays zero
    in training. The state of an optimizer has the old shapes: make a new one.

    Args:
        adapter: a LoraParams or an Adapter.
        rank: from 1 to ``min(in, out)``; or ``{pattern: rank}``, where the first pattern that
            matches a path counts. A current rank above ``min(in, out)``, which a sum may have,
            shrinks at least to that. Table rows that train on their own keep their rank.
        key: a PRNG key: :func:`lorafy` draws the new columns of ``a`` from it, by the names of
            weights, and the new directions train. None: the columns are zero, as in :func:`stack`,
            and never train.

    Returns:
        The argument with new factors.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a rank is out of range, ``adapter`` is a stack or does not fit its base, or
            it is not finite.

    Example:
        >>> import jax, jax.numpy as jnp, lora_jax
        >>> params = {"query": {"kernel": jax.random.normal(jax.random.key(0), (6, 4))}}
        >>> adapter = lora_jax.lorafy(params, rank=4, init="pissa").adapter
        >>> smaller = lora_jax.algebra.resize(adapter, 2).factors["query/kernel"]
        >>> smaller.a.shape, smaller.b.shape
        ((6, 2), (2, 4))
        >>> f = adapter.factors["query/kernel"]  # PiSSA starts from singular vectors
        >>> bool(jnp.allclose(smaller.a @ smaller.b, f.a[:, :2] @ f.b[:2], atol=1e-5))
        True

    References:
        Eckart and Young, The approximation of one matrix by another of lower rank, 1936.
    """
    single = check_single(adapter, "resize: adapter")
    able = {name: f for name, f in single.factors.items() if isinstance(f, Factors)}
    check_patterns(rank, "rank", {split_range(name)[0] for name in able})
    ranks = {name: _rank_of(rank, name, f) for name, f in able.items()}
    check_finite(single, "resize: adapter", "NaNs have no singular values")
    factors = dict(single.factors)
    for name, r in ranks.items():
        f = able[name]
        if r < f.rank:
            factors[name] = _shrunk(f, r)
        elif r > f.rank:
            factors[name] = padded(f, r) if key is None else _grown(name, f, r, key)
    return with_adapter(adapter, Adapter(factors, single.full))


def _rank_of(rank: Any, name: str, f: Factors) -> int:
    """Look up the new rank of a weight and check it."""
    r = lookup(rank, split_range(name)[0], "rank")
    if r is None:
        raise ValueError(f"rank: no pattern of the mapping matches {name!r}; end with '.*'")
    if not is_int(r):
        raise TypeError(f"resize: rank={r!r} for {name!r}: expected an int")
    shape = f.weight_shape
    limit = max_rank(f.layout, shape)
    r = min(r, limit) if r < f.rank else r  # no update of this shape has more
    if not 1 <= r <= limit:
        raise ValueError(
            f"resize: rank={r} for {name!r} of shape {shape} (layout {f.layout!r}): expected 1 to "
            f"min(in, out) = {limit}, at which a LoRA can express any update"
        )
    return int(r)


def _shrunk(f: Factors, rank: int) -> Factors:
    """Keep the ``rank`` largest singular values of ``a b``."""
    new = LowRank.of(f).truncated(rank)
    a_shape, b_shape = factor_shapes(f.layout, f.weight_shape, rank)
    a, b = new.a.reshape(a_shape), new.b.reshape(b_shape)
    return replace(f, a=a.astype(f.a.dtype), b=b.astype(f.b.dtype))


def _grown(name: str, f: Factors, rank: int, key: jax.Array) -> Factors:
    """Add columns of ``a``, drawn as ``lorafy`` draws them, and zero rows of ``b``."""
    shape, extra = f.weight_shape, rank - f.rank
    fan_in = 1 if is_table(name, {}) else math.prod(role_shape(f.layout, shape, "i"))
    leaf = jax.ShapeDtypeStruct(shape, f.a.dtype)
    a, _ = gaussian(
        fold_in_path(key, name), Target(name, leaf, Part(name), f.layout, extra, 1.0, fan_in)
    )
    a = a.reshape(factor_shapes(f.layout, shape, extra)[0]).astype(f.a.dtype)
    old = jnp.asarray(f.a)
    if (spec := _jax.explicit_spec(old)) is not None:
        a = jax.device_put(a, _jax.explicit_sharding(old, spec))
    return replace(padded(f, rank), a=jnp.concatenate([old, a], -1))
