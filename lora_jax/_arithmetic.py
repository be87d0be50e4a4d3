"""Arithmetic of adapters: ``0.7 * math + 0.3 * code - toxic`` adds up their updates, exactly.

The update of a weight is ``dW = scale * a b``. A sum of updates is again one of low rank::

    s1 a1 b1 + s2 a2 b2  =  [a1, a2] [s1 b1; s2 b2]

so nothing of the weight's size is formed, ranks and scales may differ, and the ranks add up. A
number goes into the scale; one that is traced, which may want a gradient, where there is one: into
the factor that trains. The operators of ``_params`` come here.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import jax.numpy as jnp

from lora_jax._layout import is_array
from lora_jax._params import Adapter, Factors, is_concrete, wide
from lora_jax._ranges import rows_of
from lora_jax._updates import adapter_of, by_key, differences, like, operands, plain, terms


def add(x: Any, y: Any) -> Any:
    """``x + y``: the sum of the updates."""
    if isinstance(y, int) and y == 0:
        return x
    if type(y) is not type(x):
        return NotImplemented
    one, other = operands("x + y", (x, y))
    factors = dict(one.factors)
    for key, f in other.factors.items():
        factors[key] = _sum(key, [factors[key], f]) if key in factors else f
    return like(x, Adapter(factors, _sum_of_full((x, y))))


def times(x: Any, number: Any) -> Any:
    """``number * x``: of the scale, free and exact; of a factor where the number is traced."""
    if is_array(number) and number.shape != ():
        raise ValueError(
            f"number * x: the number has shape {number.shape}, expected one number. For an adapter "
            "by each of them: jax.vmap(lambda number: number * x)(numbers)"
        )
    if is_array(number) and jnp.issubdtype(number.dtype, jnp.complexfloating):
        return NotImplemented
    if not is_array(number) and not isinstance(number, Real):
        return NotImplemented
    (adapter,) = operands("number * x", (x,))
    factors = {}
    for key, f in adapter.factors.items():
        trains = "" if is_concrete(number) else next(filter(f.trainable.__contains__, "ba"), "")
        if trains:
            factor = jnp.asarray(getattr(f, trains))
            factors[key] = replace(f, **{trains: factor * jnp.asarray(number, factor.dtype)})
            continue
        scale = jnp.asarray(f.scale, wide(jnp.result_type(f.scale)))
        factors[key] = replace(f, scale=scale * jnp.asarray(number, scale.dtype))
    full = {  # base + number (leaf - base), and the leaf itself where the number is 1
        path: adapter.full[path] + (jnp.asarray(number, d.dtype) - 1) * d
        for path, d in differences(x).items()
    }
    return like(x, Adapter(factors, full))


def over(x: Any, number: Any) -> Any:
    """``x / number``, whose inverse is of at least float32."""
    if is_array(number) and not jnp.issubdtype(number.dtype, jnp.complexfloating):
        number = jnp.asarray(number, wide(number.dtype))
    return x * (1 / number)


def linear_in_factors(adapters: Iterable[Any], weights: Sequence[Any] | None = None) -> Any:
    """Add up the factors, not the updates: of unchanged rank, and not the sum.

    With the weights ``c_k`` and the scales ``s_k``::

        a = sum_k c_k sqrt|s_k| a_k,  b = sum_k c_k sign(s_k) sqrt|s_k| b_k,  scale = 1

    So ``a b`` has every product of one adapter's ``a`` with another's ``b`` in it: what others call
    a linear combination. It means something where the factors belong together: the mean of the
    checkpoints of one run, or of adapters that share a frozen ``a``. The sum of any adapters is
    ``c * x + d * y``, and the nearest to it of some rank ``lora_jax.resize`` of that.

    Args:
        adapters: Adapters, or LoraParams of the very same base, whose leaves trained whole are
            added up as what they differ from it.
        weights: a number each; None: the mean. PEFT's ``linear`` takes their square roots.

    Returns:
        One of the same kind. Of a weight that some do not adapt, the others' factors.

    Raises:
        TypeError: the adapters are not of one kind.
        ValueError: the ranks differ, or the adapters have no sum.

    Example:
        >>> import jax.numpy as jnp, lora_jax
        >>> x = lora_jax.lorafy({"query": {"kernel": jnp.ones((3, 2))}}, rank=1).adapter
        >>> lora_jax.linear_in_factors([x, x]).factors["query/kernel"].rank
        1
    """
    adapters = list(adapters)
    each = operands("linear_in_factors", adapters)
    weights = [1 / len(adapters)] * len(adapters) if weights is None else weights
    if len(weights) != len(adapters):
        raise ValueError(
            f"linear_in_factors: {len(weights)} weights for {len(adapters)} adapters: expected one "
            "each"
        )
    weighted = [c * x for c, x in zip(weights, adapters, strict=True)]
    factors = {}
    for key, found in by_key(each).items():
        fs = list(found.values())
        if rows_of(key) is not None:
            factors[key] = _sum(key, [adapter_of(weighted[k]).factors[key] for k in found])
            continue
        if len({f.rank for f in fs}) > 1:
            raise ValueError(
                f"linear_in_factors: {key!r} has the ranks {[f.rank for f in fs]}, expected equal "
                "ones. x + y adds up updates of any ranks; lora_jax.resize makes ranks equal"
            )
        parts = [
            (jnp.asarray(weights[k], a.dtype), a, b, s)
            for k, (a, b, s) in zip(found, terms(fs), strict=True)
        ]
        a = sum(c * jnp.sqrt(abs(s)) * a for c, a, _, s in parts)
        b = sum(c * jnp.sign(s) * jnp.sqrt(abs(s)) * b for c, _, b, s in parts)
        factors[key] = plain(fs, a, b)
    return like(adapters[0], Adapter(factors, _sum_of_full(weighted)))


def _sum(key: str, fs: Sequence[Factors]) -> Factors:
    parts = terms(fs)
    if rows_of(key) is not None:  # all have the same a, which picks the rows
        return plain(fs, parts[0][0], sum(b * s for _, b, s in parts))
    is_b_frozen = all("b" in f.frozen for f in fs)  # then the scales, perhaps traced, are a's
    a = jnp.concatenate([a * s if is_b_frozen else a for a, _, s in parts], -1)
    b = [b if is_b_frozen else b * s for _, b, s in parts]
    return plain(fs, a, jnp.concatenate(b, fs[0].layout.count("b")))


def _sum_of_full(xs: Sequence[Any]) -> dict[str, Any]:
    """The leaves trained whole: the base's plus all that they differ from it."""
    full: dict[str, Any] = {}
    for x in xs:
        for path, d in differences(x).items():
            total, leaf = full.get(path), adapter_of(x).full[path]
            full[path] = leaf if total is None else total + d.astype(total.dtype)
    return full
