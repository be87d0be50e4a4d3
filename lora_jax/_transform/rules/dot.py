"""``dot_general`` with adapted weights: the low-rank path itself."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax._adapter.factors import wide
from lora_jax._transform.context import Context
from lora_jax._transform.delta import Delta
from lora_jax._transform.labelled import (
    Axis,
    Label,
    Labelled,
    Labels,
    contract,
    place,
    spread_like,
    times,
)
from lora_jax._transform.lazy import bind, force
from lora_jax._transform.lora_array import LoraArray, frozen, gains_around
from lora_jax._transform.one_hot import OneHot
from lora_jax._transform.rule import rule
from lora_jax._transform.rules.arith import scale_axes
from lora_jax._transform.rules.slice import take_range


def product_cost(
    x: Sequence[Label],
    first: Sequence[Label],
    then: Sequence[Label],
    out: Sequence[Label],
    sizes: Mapping[Any, int],
) -> int:
    """Count the multiplications of ``(x first) then``, each given by the labels of its axes."""
    middle = {lab for lab in (*x, *first) if lab in then or lab in out}
    return sum(math.prod(sizes[lab] for lab in axes) for axes in ({*x, *first}, {*middle, *then}))


def compute_dtype(x: Any, result: Any) -> Any:
    """Return the dtype that factors are cast to if they meet an operand of dtype ``x``."""
    dtype = x if jnp.issubdtype(x, jnp.inexact) else result
    # float8 has neither the range nor the digits for x a
    return jnp.bfloat16 if jnp.dtype(dtype).itemsize < 2 else dtype


def lora_dot(
    ctx: Context, x: Labelled, delta: Delta, result: Labelled, precision: Any
) -> jax.Array:
    """Add ``scale * (x a) b``, or ``scale * (x b) a`` if ``x`` meets the output axes.

    The factors are cast to the activations' dtype, both products accumulate in float32, and the
    one small array between them is scaled in float32. ``W``'s shape is never built.

    Args:
        ctx: the run; the product's cost is recorded in it.
        x: the other operand, an array or an adapted weight. An axis that meets ``W`` has the label
            of ``W``'s.
        delta: the update.
        result: ``x W``, or what has been added to it.
        precision: the precision of both products.

    Returns:
        ``result`` with the update added.
    """
    dtype, out = result.array.dtype, result.labels
    compute = compute_dtype(x.array.dtype, dtype)
    compute = wide(compute) if ctx.policy.observe else compute
    x = x if isinstance(x.array, LoraArray) else x.astype(compute)
    delta = delta.met()
    for r in delta.ranges:
        x = x.along(r.axis, partial(take_range, start=r.start, stop=r.stop))
    sizes = x.sizes | delta.a.sizes | delta.b.sizes
    cost, order = min(
        (product_cost(x.labels, first.labels, then.labels, out, sizes), i)
        for i, (first, then) in enumerate(delta.orders)
    )
    ctx.spend(delta, cost)
    first, then = delta.orders[order]
    middle = tuple(
        dict.fromkeys(lab for lab in (*x.labels, *first.labels) if lab in then.labels or lab in out)
    )

    def read(x_array: Any, factor: Labelled) -> jax.Array:
        x_ = Labelled(x_array, x.labels)
        return _contract(ctx, x_, factor, middle, precision, wide(compute)).array

    def read_array(x_array: Any, factor: jax.Array) -> jax.Array:
        return read(x_array, Labelled(factor, first.labels))

    first = first.astype(compute)
    if isinstance(x.array, LoraArray) or (order and ctx.policy.observe):
        small = read(x.array, first)
    elif isinstance(first, OneHot):  # table rows are never dropped, nor observed
        small = read(x.array, first)
    else:
        small = ctx.through(delta, read_array, x.array, first.array)
    small = delta.weighed(Labelled(small, middle), x)  # [*batch, *rows, rank]
    small, then = small.astype(compute), then.astype(compute)
    if not delta.ranges and (total := then.added_to(result, small)) is not None:
        return total
    # in float32, so that its gradient is summed over devices in float32, as the first one's is
    product = contract(small, then, out, precision=precision, dtype=wide(dtype)).astype(dtype)
    update = place(product, delta.ranges, result.sizes).array  # of size 1 where it is constant
    return result.array + spread_like(update, result.array)  # [*out]


def _contract(
    ctx: Context, x: Labelled, y: Labelled, out: Labels, precision: Any, dtype: Any
) -> Labelled:
    """Multiply as ``contract`` does, where ``x`` may itself be an adapted weight."""
    v = x.array
    if not isinstance(v, LoraArray):
        return contract(x, y, out, precision=precision, dtype=dtype)
    w = Labelled(force(v.w).astype(y.array.dtype), x.labels)
    result = contract(w, y, out, precision=precision, dtype=dtype)
    labels = {**dict(enumerate(x.labels)), Axis.RANK: Axis.RANK2}
    for delta in v.updates:
        delta = dataclasses.replace(delta.renamed(labels), key=None)
        result = Labelled(lora_dot(ctx, y, delta, result, precision), out)
    return result


def _rows(eqn, values) -> list[int]:
    """Return the operands that are rows of a table."""
    contracted = eqn.params["dimension_numbers"][0]
    pairs = zip(values, contracted, strict=True)
    return [
        side
        for side, (v, axes) in enumerate(pairs)
        if isinstance(v, LoraArray) and len(axes) and _is_rows(v, tuple(map(int, axes)), side)
    ]


@rule("dot_general", reads=_rows)
def dot_general(ctx: Context, eqn, values):
    """Compute ``x W + scale * (x a) b``, for any contraction, either side, or both."""
    contracting, batch = (  # NumPy's integers do not compare with other labels
        [tuple(map(int, axes)) for axes in pair] for pair in eqn.params["dimension_numbers"]
    )
    if not contracting[0]:
        return _multiply(eqn, values, batch)
    around = _with_gains(values, contracting, batch)
    if around is None:
        for side, v in enumerate(values):
            if isinstance(v, LoraArray) and v.is_read:  # one column is no weight to be built
                ctx.use(v, contracting[side], batch[side])
        return NotImplemented
    values, after = around
    plain = frozen(values)
    (result,) = bind(eqn, plain)
    for side, v in enumerate(values):
        if not isinstance(v, LoraArray):
            continue
        ctx.use(v, contracting[side], batch[side])
        labels, out = _labels(values, contracting, batch, side)
        # the deltas of the left weight meet all of the right one, the right one's only W
        x = Labelled(values[1] if side == 0 else plain[0], labels)
        precision = eqn.params["precision"]
        if side == 0 and isinstance(precision, tuple):
            precision = precision[::-1]
        with ctx.scope():
            for delta in v.updates:
                if isinstance(values[1 - side], LoraArray):
                    delta = dataclasses.replace(delta, key=None)  # a weight is no input to drop
                result = lora_dot(ctx, x, delta, Labelled(result, out), precision)
            for gain in after:
                result = times(Labelled(result, out), gain).array
    return [result]


def _labels(values, contracting, batch, side: int) -> tuple[Labels, Labels]:
    """Label the other operand, and the result, by the axes of the weight at ``side``."""
    meets = (*contracting[side], *batch[side])
    met = (*contracting[1 - side], *batch[1 - side])
    x: list[Label] = [("x", j) for j in range(len(values[1 - side].shape))]
    for i, j in zip(meets, met, strict=True):
        x[j] = i
    free = [i for i in range(len(values[side].shape)) if i not in meets]
    others = [lab for j, lab in enumerate(x) if j not in met]
    rest = (*free, *others) if side == 0 else (*others, *free)
    return tuple(x), (*batch[side], *rest)


def _with_gains(values, contracting, batch):
    """Multiply the plain operand by the gains that it meets; return the gains of the result, too.

    None if a gain has no exact form.
    """
    sides = [side for side in (0, 1) if isinstance(values[side], LoraArray)]
    if not any(values[side].gains() for side in sides):
        return values, []
    (side, *more) = sides
    around = gains_around(values[side], contracting[side], batch[side])
    if more or around is None:
        return None
    before, after = around
    x = Labelled(values[1 - side], _labels(values, contracting, batch, side)[0])
    for gain in before:
        x = times(x, gain)
    return [x.array if i != side else v for i, v in enumerate(values)], after


def _is_rows(v: LoraArray, contracted: Sequence[int], side: int) -> bool:
    """Return whether an operand is rows of a table, rather than a kernel with its axes permuted.

    Rows are looked up along the axis that the table reads, and then it is their features that are
    summed over. A probe does not know which axis is read: a kernel is the right operand, as a rule.
    """
    is_left = side == 0
    if not ((v.is_lookup and (is_left or v.updates)) or (v.is_vector and is_left)):
        return False
    axes = (d.axes_read if v.is_vector else d.origin.read for d in v.deltas)
    return all(
        a.isdisjoint(d.origin.behind(contracted)) for a, d in zip(axes, v.deltas, strict=True)
    )


def _multiply(eqn, values, batch):
    """Multiply a weight by a vector along some of its axes: a product that sums over nothing."""
    side = 0 if isinstance(values[0], LoraArray) else 1
    v, x = values[side], values[1 - side]
    if isinstance(x, LoraArray) or len(batch[0]) != len(x.shape):
        return NotImplemented  # an outer product has no small intermediate
    (w,) = bind(eqn, [v.w, x] if side == 0 else [x, v.w])
    order = [*batch[side], *(i for i in range(len(v.shape)) if i not in batch[side])]
    new = {old: i for i, old in enumerate(order)}
    met = dict(zip(batch[1 - side], batch[side], strict=True))
    moved = v.map(w, lambda delta: delta.moved(new, len(order)))
    return scale_axes(moved, w, Labelled(x, tuple(new[met[j]] for j in range(x.ndim))))
