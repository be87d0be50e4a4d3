"""Measure how similar adapters are: cosines, distances and common subspaces of their updates.

Everything is computed from the factors, and no update is built. For ``dW_k = scale_k a_k b_k``::

    <dW_1, dW_2> = scale_1 scale_2 sum((a_1^T a_2) * (b_1 b_2^T))

after the rows of each ``b`` are made orthonormal.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._adapter.factors import Entry, Rows, wide
from lora_jax._adapter.lowrank import LowRank, as_matrix, joined, matmul, svd, wide_of
from lora_jax._adapter.params import adapter_of
from lora_jax._adapter.updates import by_key, differences
from lora_jax._jax import replicated
from lora_jax._weights.numbers import check_int
from lora_jax.analysis._changes import finite_operands

Side = Literal["a", "b"]


def similarity(adapters: Iterable[Any], *, per_weight: bool = False) -> Any:
    """Return the cosines between the updates of adapters, taken as vectors.

    ::

        <dW_i, dW_j> / (|dW_i| |dW_j|),  <X, Y> = the sum of X * Y over all weights

    An adapter has a zero update at a weight that it does not adapt. An adapter whose updates
    are all zero, such as a fresh one, has cosine 0 with all adapters, itself included.

    Args:
        adapters: Adapters; or LoraParams over the very same base, whose full leaves count as
            differences from it.
        per_weight: compare every weight separately.

    Returns:
        ``[adapters, adapters]``; with ``per_weight``, a dict of one such array per weight.

    Raises:
        TypeError: the adapters have different types.
        ValueError: the adapters belong to different models, or have no sum.

    Example:
        >>> import jax, jax.numpy as jnp, lora_jax
        >>> x = lora_jax.Adapter({"w": lora_jax.Factors(jnp.eye(2), jnp.eye(2), 1.0, "io")})
        >>> y = lora_jax.Adapter({"w": lora_jax.Factors(jnp.eye(2), jnp.ones((2, 2)), 1.0, "io")})
        >>> lora_jax.analysis.similarity([x, -x, y]).round(3)
        Array([[ 1.   , -1.   ,  0.707],
               [-1.   ,  1.   , -0.707],
               [ 0.707, -0.707,  1.   ]], dtype=float32)
    """
    xs = list(adapters)
    grams = {
        key: _gram(found, len(xs))
        for key, found in by_key(finite_operands("similarity", xs)).items()
    }
    grams |= _grams_of_full(xs)
    if per_weight:
        return {key: _cosines(gram) for key, gram in grams.items()}
    none = jnp.zeros((len(xs), len(xs)))
    return _cosines(functools.reduce(jnp.add, grams.values()) if grams else none)


def distance(x: Any, y: Any) -> jax.Array:
    """Return the Frobenius norm of the difference of two updates, over all weights.

    ``|dW_x - dW_y|`` comes from QR decompositions of the factors of ``x - y``, so it is accurate
    for adapters that are nearly equal, too. ``distance(x, 0 * x)`` is the norm of ``x``.

    Args:
        x: an Adapter or a LoraParams, as in :func:`similarity`.
        y: another one of the same type.

    Returns:
        A 0-d array.

    Raises:
        TypeError: the types differ.
        ValueError: the adapters belong to different models, or have no difference.

    Example:
        >>> import jax.numpy as jnp, lora_jax
        >>> x = lora_jax.Adapter({"w": lora_jax.Factors(jnp.eye(2), jnp.eye(2), 1.0, "io")})
        >>> lora_jax.analysis.distance(3 * x, x).round(5)
        Array(2.828..., dtype=float32)
    """
    finite_operands("distance", (x, y))
    difference = x - y
    squares = [LowRank.of(f).squared_norm() for f in adapter_of(difference).factors.values()]
    squares += [jnp.square(d).sum() for d in differences(difference).values()]
    return jnp.sqrt(jnp.asarray(sum(squares)))


def subspace_similarity(
    x: Any, y: Any, *, factor: Side = "a", i: int | None = None, j: int | None = None
) -> dict[str, jax.Array]:
    """Measure how much the leading directions of two adapters have in common.

    ``U`` holds the left singular vectors of ``a``, the directions that it reads, most important
    first. For every ``i`` and ``j``::

        phi(i, j) = |U_x[:, :i]^T U_y[:, :j]|^2 / min(i, j)

    This is 1 if the smaller subspace lies in the larger one, and 0 if they are orthogonal. The
    paper compares ranks 8 and 64, and two seeds of one rank: ``x`` and ``y`` are the adapters of
    two runs. Two random subspaces of ``n`` dimensions have ``max(i, j) / n`` on average.

    Args:
        x: an Adapter or a LoraParams.
        y: another one of the same type; the ranks may differ.
        factor: ``"a"``, or ``"b"`` for the directions that are written.
        i: compare the first ``i`` directions of ``x`` only; None: every number of them.
        j: compare with the first ``j`` directions of ``y``; None: ``i``, if that is given.

    Returns:
        A dict of ``[*batch, rank of x, rank of y]`` for each weight that both adapt; smaller if a
        rank exceeds the size of the side that ``factor`` is on. Entry ``[i - 1, j - 1]`` compares
        the first ``i`` and ``j`` directions; with ``i``, only this entry, ``[*batch]``. A factor
        that has a lower rank than its shape, such as a ``b`` of zeros, has arbitrary directions
        beyond it. Table rows are left out: their ``a`` selects rows, and no direction leads.

    Raises:
        TypeError: the types differ; or ``j`` comes without ``i``.
        ValueError: ``factor`` is neither, ``i`` or ``j`` exceeds the number of directions, the
            adapters are not finite or belong to different models.

    Example:
        >>> import jax, jax.numpy as jnp, lora_jax
        >>> params = {"query": {"kernel": jnp.ones((8, 8))}}
        >>> x = lora_jax.lorafy(params, rank=2).adapter
        >>> lora_jax.analysis.subspace_similarity(x, x)["query/kernel"].round(3)
        Array([[1., 1.],
               [1., 1.]], dtype=float32)

    References:
        Hu et al., LoRA, arXiv:2106.09685, section 7.2.
    """
    if factor not in get_args(Side):
        raise ValueError(f"subspace_similarity: factor={factor!r}: expected 'a' or 'b'")
    if i is None and j is not None:
        raise TypeError(f"subspace_similarity: j={j!r} without i: pass both, or i alone for j=i")
    pair = None if i is None else (i, i if j is None else j)
    for name, number in zip("ij", pair or (), strict=False):
        check_int(number, f"subspace_similarity: {name}", 1)
    one, other = finite_operands("subspace_similarity", (x, y))
    both = {key: (f, other.factors[key]) for key, f in one.factors.items() if key in other.factors}
    found = {}
    for key, fs in both.items():
        if isinstance(fs[0], Rows):
            continue
        u, v = (_directions(f, factor) for f in fs)
        phi = _overlaps(u, v)
        found[key] = phi if pair is None else _entry(key, phi, pair)
    return found


def _overlaps(u: jax.Array, v: jax.Array) -> jax.Array:
    """Return ``|u[:, :i]^T v[:, :j]|^2 / min(i, j)`` for all ``i`` and ``j``."""
    squares = jnp.square(matmul(u.mT, v))
    i, j = np.ogrid[1 : u.shape[-1] + 1, 1 : v.shape[-1] + 1]
    phi = squares.cumsum(-2).cumsum(-1)
    least = jnp.asarray(np.minimum(i, j), phi.dtype)
    return phi / jnp.broadcast_to(least, phi.shape)


def _entry(key: str, phi: jax.Array, pair: tuple[int, int]) -> jax.Array:
    """Return ``phi(i, j)``, or raise if there are fewer directions."""
    sizes = phi.shape[-2:]
    for name, operand, number, size in zip("ij", "xy", pair, sizes, strict=True):
        if number > size:
            raise ValueError(
                f"subspace_similarity: {name}={number}: {key!r} has {size} directions in "
                f"{operand}: pass {name} from 1 to {size}"
            )
    return phi[..., pair[0] - 1, pair[1] - 1]


def _gram(found: Mapping[int, Entry], count: int) -> jax.Array:
    """Return the inner products of the updates of one weight: ``[count, count]``."""
    dtype = wide_of(found.values())
    parts = [LowRank.of(f, dtype).orthonormal() for f in found.values()]
    every = joined(parts)
    product = every.overlaps(every)  # [*batch, all ranks, all ranks]
    product = product.sum(tuple(range(product.ndim - 2)))
    whose = np.repeat(list(found), [x.rank for x in parts])
    member = jnp.asarray(whose[:, None] == np.arange(count), product.dtype)
    return matmul(matmul(member.T, product), member)


def _grams_of_full(xs: Sequence[Any]) -> dict[str, jax.Array]:
    """Return the inner products of the differences of each full leaf: ``[count, count]``."""
    moved = [differences(x) for x in xs]
    grams = {}
    for path in dict.fromkeys(path for own in moved for path in own):
        like = next(own[path] for own in moved if path in own)
        ds = [own.get(path, jnp.zeros_like(like)) for own in moved]
        grams[path] = jnp.stack([jnp.stack([(d * e).sum() for e in ds]) for d in ds])
    return grams


def _cosines(gram: jax.Array) -> jax.Array:
    """Divide inner products by norms; 0 where a norm is 0."""
    norms = jnp.sqrt(jnp.diagonal(gram))
    inverse = jnp.where(norms > 0, 1 / jnp.where(norms > 0, norms, 1), 0)
    return jnp.clip(inverse[:, None] * gram * inverse[None, :], -1, 1)


def _directions(f: Entry, factor: Side) -> jax.Array:
    """Return orthonormal columns, most important first: ``[*batch, in or out, rank]``."""
    x = replicated(getattr(f, factor))
    x = as_matrix(x.astype(wide(x.dtype)), f.layout, factor)
    return svd(x if factor == "a" else x.mT).u
