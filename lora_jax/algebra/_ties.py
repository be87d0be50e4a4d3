"""Combine adapters in other ways than by sums: TIES, DARE, and magnitude pruning.

As in their papers, the entries that count are those of the updates ``dW = scale * a b``, not those
of ``a`` and ``b``. The result has no low rank: the functions return its best factors of a given
rank, and the share that these miss. They work on one weight, or one layer of a stack, at a time,
and compute its updates one after another. So the memory is that of a few arrays of its shape,
however many adapters there are.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax._adapter.checks import check_finite, with_adapter
from lora_jax._adapter.factors import Rows, is_concrete
from lora_jax._adapter.params import Adapter, LoraParams, without_adapters
from lora_jax._adapter.sums import scaled_rows
from lora_jax._adapter.updates import by_key, differences, operands, plain
from lora_jax._weights.numbers import is_int
from lora_jax._weights.paths import flatten
from lora_jax._weights.target import fold_in_path
from lora_jax.algebra._entries import Rule, of_arrays, of_factors

Errors = dict[str, jax.Array]


def ties(
    adapters: Any,
    *,
    density: float,
    rank: int | None,
    niter: int | None = None,
    key: jax.Array | None = None,
) -> tuple[Any, Errors]:
    """Combine updates by TIES: trim small entries, elect a sign, average those that agree.

    Each update ``dW_k`` of a weight keeps its ``density * size`` entries of largest magnitude.
    Then, entry by entry::

        sign = sign(sum_k dW_k),  dW = the mean of the dW_k that are not 0 and have that sign

    An entry is 0 if the trimmed updates cancel. Weights are set by arithmetic: ``ties([2 * x, y])``
    counts ``x`` twice in the vote, and ``1.5 * ties(...)[0]`` is the paper's ``lambda = 1.5``.

    Args:
        adapters: Adapters; or LoraParams over the very same base, whose full leaves are combined in
            the same way, as differences from it. A single one needs no list.
        density: the share of the entries that stay, in each weight and each layer of a stack.
        rank: the rank of the result, by the singular value decomposition. None returns all of it,
            exactly, in factors as large as the weight, one of which is the identity: to merge.
        niter: None computes all singular values. A number finds the largest by that many steps of
            subspace iteration from a random start: much faster, nearly as good, and only thin
            matrices are decomposed.
        key: a PRNG key for that random start.

    Returns:
        An adapter of the same type, with scale 1; and for each weight the share that the rank
        misses: ``|dW - a b| / |dW|`` in the Frobenius norm.

    Raises:
        TypeError: the adapters have different types.
        ValueError: an argument is out of range, or the adapters have no sum.

    Example:
        >>> import jax.numpy as jnp, lora_jax
        >>> f = lora_jax.Factors(jnp.ones((2, 1)), jnp.array([[3.0, -1.0]]), 1.0, "io")
        >>> g = lora_jax.Factors(jnp.ones((2, 1)), jnp.array([[1.0, 2.0]]), 1.0, "io")
        >>> x, y = lora_jax.Adapter({"w": f}), lora_jax.Adapter({"w": g})
        >>> z, error = lora_jax.algebra.ties([x, y], density=1.0, rank=None)
        >>> lora_jax.merge(lora_jax.LoraParams({"w": jnp.zeros((2, 2))}, z))
        {'w': Array([[2., 2.],
               [2., 2.]], dtype=float32)}

    References:
        Yadav et al., TIES-Merging, arXiv:2306.01708. Halko et al., arXiv:0909.4061.
    """
    rule = Rule(density, keep="largest", combine="elect")
    return _combine("ties", adapters, rule, rank, niter, key)


def dare(
    adapters: Any,
    *,
    density: float,
    rank: int | None,
    key: jax.Array,
    elect: bool = False,
    niter: int | None = None,
) -> tuple[Any, Errors]:
    """Drop entries of the updates at random, rescale the others, and add up.

    ::

        dW = sum_k mask_k * dW_k / density,  mask_k ~ Bernoulli(density)

    The mean over all masks is the sum of the updates.

    Args:
        adapters: as in :func:`ties`.
        density: the share of the entries that stay: one minus the paper's drop rate.
        rank: as in :func:`ties`.
        key: a PRNG key for the masks, and for ``niter``.
        elect: elect signs and take means, as :func:`ties` does, instead of adding up.
        niter: as in :func:`ties`.

    Returns:
        As :func:`ties`.

    Raises:
        TypeError: the adapters have different types, or there is no key.
        ValueError: an argument is out of range, or the adapters have no sum.

    Example:
        >>> import jax, jax.numpy as jnp, lora_jax
        >>> x = lora_jax.lorafy({"query": {"kernel": jnp.ones((3, 2))}}, rank=1).adapter
        >>> z, error = lora_jax.algebra.dare([x, x], density=0.5, rank=1, key=jax.random.key(0))
        >>> z.factors["query/kernel"].rank, float(error["query/kernel"])  # b was zero
        (1, 0.0)

    References:
        Yu et al., Language Models are Super Mario, arXiv:2311.03099.
    """
    if key is None:
        raise TypeError("dare: key=None: expected a PRNG key, such as jax.random.key(0)")
    rule = Rule(density, keep="random", combine="elect" if elect else "sum")
    return _combine("dare", adapters, rule, rank, niter, key)


def prune(
    adapters: Any,
    *,
    density: float,
    rank: int | None,
    niter: int | None = None,
    key: jax.Array | None = None,
) -> tuple[Any, Errors]:
    """Keep the entries of largest magnitude of each update, and add up.

    Args:
        adapters: as in :func:`ties`.
        density: as in :func:`ties`.
        rank: as in :func:`ties`.
        niter: as in :func:`ties`.
        key: as in :func:`ties`.

    Returns:
        As :func:`ties`.

    Raises:
        TypeError: the adapters have different types.
        ValueError: an argument is out of range, or the adapters have no sum.

    Example:
        >>> import jax.numpy as jnp, lora_jax
        >>> f = lora_jax.Factors(jnp.ones((2, 1)), jnp.array([[3.0, -1.0]]), 1.0, "io")
        >>> z, error = lora_jax.algebra.prune(lora_jax.Adapter({"w": f}), density=0.5, rank=1)
        >>> lora_jax.merge(lora_jax.LoraParams({"w": jnp.zeros((2, 2))}, z))["w"].round(5)
        Array([[3., 0.],
               [3., 0.]], dtype=float32)
    """
    rule = Rule(density, keep="largest", combine="sum")
    return _combine("prune", adapters, rule, rank, niter, key)


def _combine(verb: str, adapters: Any, rule: Rule, rank: Any, niter: Any, key: Any) -> Any:
    """Check the arguments, and combine the updates weight by weight."""
    xs = [adapters] if isinstance(adapters, Adapter | LoraParams) else list(adapters)
    each = operands(verb, xs)
    remedy = "comparisons hide NaNs, and the result would be wrong. Leave it out"
    checks = [check_finite(x, f"{verb}: operand {n}", remedy) for n, x in enumerate(each)]
    # Traced operands cannot be refused: the scales of the result are NaN.
    scales = [jnp.where(ok, 1.0, jnp.nan) for ok in checks if ok is not None]
    _check_options(verb, rule.density, rank, niter)
    rule = rule._replace(density=float(rule.density))  # a static argument
    key = jax.random.key(0) if key is None else key
    factors, errors = {}, {}
    for path, found in by_key(each).items():
        fs, own = list(found.values()), fold_in_path(key, path)
        if isinstance(fs[0], Rows):  # all are of the same rows
            b = of_arrays(scaled_rows(fs), own, rule)
            factors[path] = replace(fs[0], b=b, scale=jnp.ones((), jnp.float32))
            errors[path] = jnp.zeros((), b.dtype)
        else:
            a, b, errors[path] = of_factors(fs, own, rule, rank, niter)
            factors[path] = plain(fs, a, b)
        for scale in scales:
            factors[path] = replace(factors[path], scale=factors[path].scale * scale)
    return with_adapter(xs[0], Adapter(factors, _full(xs, key, rule))), errors


def _check_options(verb: str, density: Any, rank: Any, niter: Any) -> None:
    if not is_concrete(density):
        raise TypeError(f"{verb}: density is traced, expected a number: shapes depend on it")
    if not 0 < density <= 1:
        raise ValueError(f"{verb}: density={density}: expected a share, above 0 and up to 1")
    for name, x, least in (("rank", rank, 1), ("niter", niter, 0)):
        if x is not None and not (is_int(x) and x >= least):
            raise ValueError(f"{verb}: {name}={x!r}: expected None or an int from {least} on")


def _full(xs: list[Any], key: jax.Array, rule: Rule) -> dict[str, jax.Array]:
    """Combine the full leaves, as differences from the base."""
    moved: dict[str, list[jax.Array]] = {}
    for x in xs:
        for path, d in differences(x).items():
            moved.setdefault(path, []).append(d)
    leaves = flatten(without_adapters(xs[0]))[0] if moved else {}
    return {
        path: leaves[path].astype(ds[0].dtype) + of_arrays(ds, fold_in_path(key, path), rule)
        for path, ds in moved.items()
    }
