"""``linear_in_factors``: add up factors, which is not the sum of the updates."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp

from lora_jax._adapter.checks import with_adapter
from lora_jax._adapter.factors import Rows
from lora_jax._adapter.lowrank import terms
from lora_jax._adapter.params import Adapter, adapter_of
from lora_jax._adapter.sums import sum_of, sum_of_full
from lora_jax._adapter.updates import by_key, operands, plain


def linear_in_factors(adapters: Iterable[Any], weights: Sequence[Any] | None = None) -> Any:
    """Add up the factors, not the updates: the rank stays, and the result is not the sum.

    For weights ``c_k`` and scales ``s_k``::

        a = sum_k c_k sqrt|s_k| a_k,  b = sum_k c_k sign(s_k) sqrt|s_k| b_k,  scale = 1

    So ``a b`` contains every product of one adapter's ``a`` and another's ``b``. PEFT calls this a
    linear combination. It is useful if the factors belong together: the mean of the checkpoints
    of one run, or of adapters that share a frozen ``a``. The sum of any adapters is
    ``c * x + d * y``, and ``lora_jax.algebra.resize`` finds the nearest adapter of a lower rank.

    Args:
        adapters: Adapters; or LoraParams over the very same base, whose full leaves are added up as
            differences from it.
        weights: one number per adapter; None: the mean. PEFT's ``linear`` takes their square roots.

    Returns:
        An adapter of the same type. A weight that some adapters do not have gets the factors of
        those that do.

    Raises:
        TypeError: the adapters have different types.
        ValueError: the ranks differ, or the adapters have no sum.

    Example:
        >>> import jax.numpy as jnp, lora_jax
        >>> x = lora_jax.lorafy({"query": {"kernel": jnp.ones((3, 2))}}, rank=1).adapter
        >>> lora_jax.algebra.linear_in_factors([x, x]).factors["query/kernel"].rank
        1
    """
    adapters = list(adapters)
    each = operands("linear_in_factors", adapters)
    weights = [1 / len(adapters)] * len(adapters) if weights is None else weights
    if len(weights) != len(adapters):
        raise ValueError(
            f"linear_in_factors: {len(weights)} weights for {len(adapters)} adapters: expected one "
            "per adapter"
        )
    weighted = [c * x for c, x in zip(weights, adapters, strict=True)]
    factors = {}
    for key, found in by_key(each).items():
        fs = list(found.values())
        if isinstance(fs[0], Rows):
            factors[key] = sum_of([adapter_of(weighted[k]).factors[key] for k in found])
            continue
        if len({f.rank for f in fs}) > 1:
            raise ValueError(
                f"linear_in_factors: {key!r} has the ranks {[f.rank for f in fs]}, expected equal "
                "ones. x + y adds up updates of any ranks; lora_jax.algebra.resize makes ranks "
                "equal"
            )
        parts = [
            (jnp.asarray(weights[k], a.dtype), a, b, s)
            for k, (a, b, s) in zip(found, terms(fs), strict=True)
        ]
        a = sum(c * jnp.sqrt(abs(s)) * a for c, a, _, s in parts)
        b = sum(c * jnp.sign(s) * jnp.sqrt(abs(s)) * b for c, _, b, s in parts)
        factors[key] = plain(fs, a, b)
    return with_adapter(adapters[0], Adapter(factors, sum_of_full(weighted)))
