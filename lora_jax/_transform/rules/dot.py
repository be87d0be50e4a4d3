"""``dot_general`` with adapted weights: the low-rank path itself."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax._adapter.factors import wide
from lora_jax._transform.context import Context
from lora_jax._transform.delta import Delta, N, R
from lora_jax._transform.labelled import contract, place, spread_like, times
from lora_jax._transform.lazy import bind, force
from lora_jax._transform.lora_array import LoraArray, gains_around
from lora_jax._transform.rule import rule
from lora_jax._transform.rules.arith import scale_axes
from lora_jax._transform.rules.slice import take_range


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


def compute_dtype(x: Any, result: Any) -> Any:
    """The dtype that factors are cast to where they meet an operand of dtype ``x``."""
    dtype = x if jnp.issubdtype(x, jnp.inexact) else result
    # float8 has neither the range nor the digits for x a
    return jnp.bfloat16 if jnp.dtype(dtype).itemsize < 2 else dtype


def lora_dot(
    ctx: Context,
    x: jax.Array | LoraArray,
    x_labels: Sequence[Any],
    delta: Delta,
    out: Sequence[Any],
    shape: Sequence[int],
    *,
    precision: Any,
    dtype: Any,
) -> jax.Array:
    """``scale * (x a) b``, or ``scale * (x b) a`` where ``x`` meets the output axes.

    The factors are cast to the activations' dtype, both products accumulate in float32, and the
    one small array between them is scaled in float32. ``W``'s shape is never built.

    Args:
        ctx: the run; the product's cost is recorded in it.
        x: the other operand.
        x_labels: a label an axis of ``x``; an axis that meets ``W`` has the label of ``W``'s.
        delta: the update.
        out: the labels of the result.
        shape: of the result.
        precision: of both products.
        dtype: of the result.

    Returns:
        An array with the axes ``out``; of size 1 where neither ``x`` nor the update has one.
    """
    compute = compute_dtype(x.w.dtype if isinstance(x, LoraArray) else x.dtype, dtype)
    compute = wide(compute) if ctx.observe else compute
    x = x if isinstance(x, LoraArray) else x.astype(compute)
    delta = delta if delta.router is not None else delta.picked()
    for r in delta.ranges:
        if r.axis in x_labels:
            x = take_range(x, x_labels.index(r.axis), r.start, r.stop)
    sizes = dict(zip(x_labels, x.shape, strict=True))
    for factor, labels in delta.factors:
        sizes |= dict(zip(labels, factor.shape, strict=True))
    cost, order = min(
        (product_cost(x_labels, pair[0][1], pair[1][1], out, sizes), i)
        for i, pair in enumerate((delta.factors, delta.factors[::-1]))
        if not (i and delta.router is not None)
    )
    ctx.spend(delta, cost)
    (first, first_labels), (then, then_labels) = delta.factors[:: -1 if order else 1]
    middle = [lab for lab in x_labels if lab in then_labels or lab in out]
    middle += [
        lab for lab in first_labels if lab not in x_labels and (lab in then_labels or lab in out)
    ]

    def read(x: Any, first: jax.Array) -> jax.Array:
        return _contract_lora(
            ctx, x, x_labels, first, first_labels, middle, precision, wide(compute)
        )

    first = first.astype(compute)
    if isinstance(x, LoraArray) or (order and ctx.observe):
        small = read(x, first)
    else:
        small = ctx.through(delta, read, x, first)
    if delta.router is None:
        small = small * delta.scale.astype(small.dtype)
    else:
        small = times(small, *_shares(delta, x, x_labels, middle))
    small, then = small.astype(compute), then.astype(compute)
    # in float32, so that its gradient is summed over devices in float32, as the first one's is
    product = contract(
        small, middle, then, then_labels, out, precision=precision, dtype=wide(dtype)
    ).astype(dtype)
    return place(product, out, delta.ranges, dict(zip(out, shape, strict=True)))


def _shares(
    delta: Delta, x: jax.Array | LoraArray, x_labels: Sequence[Any], middle: Sequence[Any]
) -> tuple[jax.Array, list[int]]:
    """How much of each adapter an input gets, times its scale; and its axes among ``middle``."""
    directions, labels = delta.part("router")
    # of batch axes of the weight the result may have some alone
    known = {*x_labels, *(set(delta.a_labels) & set(delta.b_labels))}
    if delta.routing is None or isinstance(x, LoraArray) or not known.issuperset(labels):
        raise delta.misrouted()
    free = [lab for lab in middle if lab != N and (lab in x_labels or lab in labels)]
    kind: Any = {"precision": lax.Precision.HIGHEST, "dtype": jnp.float32}
    x, directions = x.astype(jnp.float32), directions.astype(jnp.float32)
    found = jnp.abs(contract(x, x_labels, directions, labels, [*free, N], **kind))
    count, temperature = delta.routing
    best = lax.top_k(found, min(count, found.shape[-1]))[0]
    # an adapter that does nothing has no direction, and what has none gets nothing of it
    powers = jnp.exp((found - best[..., :1]) / temperature)
    powers = jnp.where((found >= best[..., -1:]) & (found > 0), powers, 0)
    shares = powers / jnp.maximum(powers.sum(-1, keepdims=True), jnp.finfo(powers.dtype).tiny)
    scale = jnp.broadcast_to(delta.scale.astype(shares.dtype), shares.shape)
    parts = jnp.where(shares > 0, shares * scale, 0)  # of a scale that is NaN, too
    return parts, [middle.index(label) for label in [*free, N]]


def _contract_lora(ctx, x, x_labels, y, y_labels, out, precision, dtype):
    """``contract`` where ``x`` may itself be an adapted weight, of other labels."""
    if not isinstance(x, LoraArray):
        return contract(x, x_labels, y, y_labels, out, precision=precision, dtype=dtype)
    result = contract(
        force(x.w).astype(y.dtype), x_labels, y, y_labels, out, precision=precision, dtype=dtype
    )
    for delta in x.deltas:
        delta = delta.rename(dict(enumerate(x_labels)), rank=("other", R))
        delta = dataclasses.replace(delta, key=None)
        update = lora_dot(
            ctx, y, y_labels, delta, out, result.shape, precision=precision, dtype=dtype
        )
        result += spread_like(update, result)
    return result


@rule("dot_general")
def dot_general(ctx: Context, eqn, values):
    """``x W + scale * (x a) b``, for any contraction, either side, or both."""
    contracting, batch = (  # NumPy's integers do not compare with other labels
        [tuple(map(int, axes)) for axes in pair] for pair in eqn.params["dimension_numbers"]
    )
    if not contracting[0]:
        return _multiply(eqn, values, batch)
    values = [
        ctx.read(v) if isinstance(v, LoraArray) and _is_rows(v, contracting[side], side) else v
        for side, v in enumerate(values)
    ]
    around = _with_gains(values, contracting, batch)
    if around is None:
        for side, v in enumerate(values):
            if isinstance(v, LoraArray) and v.is_read:  # one column is no weight to be built
                ctx.use(v, contracting[side], batch[side])
        return NotImplemented
    values, after = around
    plain = [v.w if isinstance(v, LoraArray) else v for v in values]
    (result,) = bind(eqn, plain)
    for side in (0, 1):
        v, x = values[side], values[1 - side]
        if not isinstance(v, LoraArray):
            continue
        ctx.use(v, contracting[side], batch[side])
        meets = (*contracting[side], *batch[side])
        met = (*contracting[1 - side], *batch[1 - side])
        x_labels: list[Any] = [("x", i) for i in range(len(x.shape))]
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
        with ctx.scope():
            for delta in v.deltas:
                if isinstance(values[1 - side], LoraArray):
                    delta = dataclasses.replace(delta, key=None)  # a weight is no input to drop
                if not delta.is_probe:
                    kind = {"precision": precision, "dtype": result.dtype}
                    update = lora_dot(ctx, x, x_labels, delta, out, result.shape, **kind)
                    result += spread_like(update, result)
            for gain, labels in after:
                result = times(result, gain, [out.index(label) for label in labels])
    return [result]


def _with_gains(values, contracting, batch):
    """The operands, the plain one times the gains it meets; and the gains of the result."""
    sides = [side for side in (0, 1) if isinstance(values[side], LoraArray)]
    if not any(values[side].gains() for side in sides):
        return values, []
    (side, *more) = sides
    around = gains_around(values[side], contracting[side], batch[side])
    if more or around is None:
        return None
    before, after = around
    met = dict(
        zip(
            (*contracting[side], *batch[side]),
            (*contracting[1 - side], *batch[1 - side]),
            strict=True,
        )
    )
    x = values[1 - side]
    for gain, labels in before:
        x = times(x, gain, [met[label] for label in labels])
    return [x if i != side else v for i, v in enumerate(values)], after


def _is_rows(v: LoraArray, contracted: Sequence[int], side: int) -> bool:
    """Whether an operand is rows of a table, rather than a kernel with its axes permuted.

    Rows are looked up along the axis that the table reads, and then it is their features that are
    summed over. A probe does not know what is read: a kernel is the right operand, as a rule.
    """
    return v.is_lookup and all(
        delta.past.read.isdisjoint(delta.past.behind(contracted))
        and (side == 0 if delta.is_probe else not delta.reads)
        for delta in v.deltas
    )


def _multiply(eqn, values, batch):
    """A product that sums over nothing: the weight by a vector along some of its axes."""
    side = 0 if isinstance(values[0], LoraArray) else 1
    v, x = values[side], values[1 - side]
    if isinstance(x, LoraArray) or len(batch[0]) != len(x.shape):
        return NotImplemented  # an outer product has no small intermediate
    (w,) = bind(eqn, [v.w, x] if side == 0 else [x, v.w])
    order = [*batch[side], *(i for i in range(len(v.shape)) if i not in batch[side])]
    new = {old: i for i, old in enumerate(order)}
    labels = [0] * len(x.shape)
    for i, j in zip(batch[side], batch[1 - side], strict=True):
        labels[j] = new[i]
    moved = v.map(w, lambda delta: delta.move(new, len(order)))
    return scale_axes(moved, w, x, labels)
