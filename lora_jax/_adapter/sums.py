"""Add, subtract and scale adapters: ``0.7 * math + 0.3 * code - toxic``, exactly.

The update of a weight is ``dW = scale * a b``. A sum of updates has low rank, too::

    s1 a1 b1 + s2 a2 b2  =  [a1, a2] [s1 b1; s2 b2]

so nothing of the weight's size is formed. Ranks and scales may differ, and the ranks add up. A
concrete number multiplies the scale. A traced number, which may need a gradient, multiplies the
factor that trains. These are the operators of ``params``.
"""

from collections.abc import Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax._adapter.checks import with_adapter
from lora_jax._adapter.factors import Entry, Rows, is_concrete, wide
from lora_jax._adapter.lowrank import terms, widest
from lora_jax._adapter.params import OPERATORS, Adapter, adapter_of
from lora_jax._adapter.updates import differences, operands, plain
from lora_jax._weights.axes import is_array


def add(x: Any, y: Any) -> Any:
    """Return ``x + y``: add the updates."""
    if isinstance(y, int) and y == 0:
        return x
    if type(y) is not type(x):
        return NotImplemented
    one, other = operands("x + y", (x, y))
    factors = dict(one.factors)
    for key, f in other.factors.items():
        factors[key] = sum_of([factors[key], f]) if key in factors else f
    return with_adapter(x, Adapter(factors, sum_of_full((x, y))))


def times(x: Any, number: Any) -> Any:
    """Return ``number * x``: exact in the scale, or in a factor if the number is traced."""
    if is_array(number) and number.shape != ():
        raise ValueError(
            f"number * x: the number has shape {number.shape}, expected one number. To scale by "
            "each of several: jax.vmap(lambda number: number * x)(numbers)"
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
    full = {  # base + number * (leaf - base); exactly the leaf if the number is 1
        path: adapter.full[path] + (jnp.asarray(number, d.dtype) - 1) * d
        for path, d in differences(x).items()
    }
    return with_adapter(x, Adapter(factors, full))


def over(x: Any, number: Any) -> Any:
    """Return ``x / number``, with the inverse in at least float32."""
    if is_array(number) and not jnp.issubdtype(number.dtype, jnp.complexfloating):
        number = jnp.asarray(number, wide(number.dtype))
    return x * (1 / number)


def sum_of(fs: Sequence[Entry]) -> Entry:
    """Sum the updates of one weight; the ranks add up."""
    if isinstance(fs[0], Rows):  # all have the same rows
        return replace(fs[0], b=sum(scaled_rows(fs)), scale=jnp.ones((), jnp.float32))
    parts = terms(fs)
    is_b_frozen = all("b" in f.frozen for f in fs)  # then the scales, perhaps traced, go into a
    a = jnp.concatenate([a * s if is_b_frozen else a for a, _, s in parts], -1)
    b = [b if is_b_frozen else b * s for _, b, s in parts]
    return plain(fs, a, jnp.concatenate(b, fs[0].layout.count("b")))


def scaled_rows(fs: Sequence[Entry]) -> list[jax.Array]:
    """Return ``scale * b`` of each, in one dtype of at least float32."""
    dtype = widest(f.b.dtype for f in fs)
    return [f.b.astype(dtype) * jnp.asarray(f.scale, dtype) for f in fs]


def sum_of_full(xs: Sequence[Any]) -> dict[str, Any]:
    """Sum the full leaves: the base plus all differences from it."""
    full: dict[str, Any] = {}
    for x in xs:
        for path, d in differences(x).items():
            total, leaf = full.get(path), adapter_of(x).full[path]
            full[path] = leaf if total is None else total + d.astype(total.dtype)
    return full


OPERATORS.update(add=add, times=times, over=over)
