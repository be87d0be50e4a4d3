"""``dot_general`` with adapted weights: the low-rank path itself."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import _jax
from lora_jax._params import wide
from lora_jax._transform._rules import Context, rule
from lora_jax._transform._value import Delta, LoraArray, R, contract


def product_cost(
    x: Sequence[Any],
    first: Sequence[Any],
    then: Sequence[Any],
    out: Sequence[Any],
    sizes: Mapping[Any, int],
) -> int:
    """Multiplications of ``(x first) then``, each given by the labels of its axes."""
    middle = {lab for lab in (*x, *first) if lab in then or lab in out}
    return sum(math.prod(sizes[lab] for lab in axes) for axes in ({*x, *first}, {*middle, *then}))


def lora_dot(
    x: jax.Array | LoraArray,
    x_labels: Sequence[Any],
    delta: Delta,
    out: Sequence[Any],
    *,
    precision: Any,
    dtype: Any,
) -> jax.Array:
    """``scale * (x a) b``, or ``scale * (x b) a`` where ``x`` meets the output axes.

    The factors are cast to the activations' dtype, both products accumulate in float32, and the
    one small array between them is scaled in float32. ``W``'s shape is never built.

    Args:
        x: the other operand.
        x_labels: a label an axis of ``x``; an axis that meets ``W`` has the label of ``W``'s.
        delta: the update.
        out: the labels of the result.
        precision: of both products.
        dtype: of the result.

    Returns:
        An array with the axes ``out``; of size 1 where neither ``x`` nor the update has one.
    """
    x_type = x.w.dtype if isinstance(x, LoraArray) else x.dtype
    compute = x_type if jnp.issubdtype(x_type, jnp.inexact) else dtype
    if jnp.dtype(compute).itemsize < 2:  # float8 has neither the range nor the digits for x a
        compute = jnp.bfloat16
    x = x if isinstance(x, LoraArray) else x.astype(compute)
    sizes = dict(zip(x_labels, x.shape, strict=True))
    factors = [(delta.a, delta.a_labels), (delta.b, delta.b_labels)]
    for factor, labels in factors:
        sizes |= dict(zip(labels, factor.shape, strict=True))
    factors.sort(
        key=lambda f: product_cost(
            x_labels, f[1], delta.b_labels if f[0] is delta.a else delta.a_labels, out, sizes
        )
    )
    (first, first_labels), (then, then_labels) = factors
    middle = [lab for lab in x_labels if lab in then_labels or lab in out]
    middle += [
        lab for lab in first_labels if lab not in x_labels and (lab in then_labels or lab in out)
    ]
    small = _contract_lora(
        x, x_labels, first.astype(compute), first_labels, middle, precision, wide(compute)
    )
    small = (small * delta.scale.astype(small.dtype)).astype(compute)
    then = then.astype(compute)
    return contract(small, middle, then, then_labels, out, precision=precision, dtype=dtype)


def _contract_lora(x, x_labels, y, y_labels, out, precision, dtype):
    """``contract`` where ``x`` may itself be an adapted weight, of other labels."""
    if not isinstance(x, LoraArray):
        return contract(x, x_labels, y, y_labels, out, precision=precision, dtype=dtype)
    result = contract(
        x.w.astype(y.dtype), x_labels, y, y_labels, out, precision=precision, dtype=dtype
    )
    for delta in x.deltas:
        delta = delta.relabel(dict(enumerate(x_labels)), rank=("other", R))
        result += lora_dot(y, y_labels, delta, out, precision=precision, dtype=dtype)
    return result


@rule("dot_general")
def dot_general(ctx: Context, eqn, values):
    """``x W + scale * (x a) b``, for any contraction, either side, or both."""
    contracting, batch = eqn.params["dimension_numbers"]
    if not contracting[0]:
        return NotImplemented  # an outer or elementwise product has no small intermediate
    plain = [v.w if isinstance(v, LoraArray) else v for v in values]
    (result,) = _jax.bind(eqn, plain)
    for side in (0, 1):
        v, x = values[side], values[1 - side]
        if not isinstance(v, LoraArray):
            continue
        ctx.use(v, contracting[side], batch[side])
        meets = (*contracting[side], *batch[side])
        met = (*contracting[1 - side], *batch[1 - side])
        x_labels = [("x", i) for i in range(len(x.shape))]
        for i, j in zip(meets, met, strict=True):
            x_labels[j] = i
        free = [
            [i for i in range(len(v.shape)) if i not in meets],
            [lab for j, lab in enumerate(x_labels) if j not in met],
        ]
        out = [*batch[side], *free[side], *free[1 - side]]
        precision = eqn.params["precision"]
        if side == 0 and isinstance(precision, tuple):
            precision = precision[::-1]
        if side == 1:  # the left weight's deltas have met the right weight's already
            x = plain[0]
        with jax.named_scope(f"{_jax.name_stack(eqn)}/lora".lstrip("/")):
            for delta in v.deltas:
                result += lora_dot(x, x_labels, delta, out, precision=precision, dtype=result.dtype)
    return [result]
