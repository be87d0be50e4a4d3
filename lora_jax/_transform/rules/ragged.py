"""``ragged_dot_general``: the experts of a mixture, each with its own factors."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax._adapter.factors import wide
from lora_jax._transform.context import Context
from lora_jax._transform.delta import Delta, Labels, R
from lora_jax._transform.labelled import contract, times
from lora_jax._transform.lazy import bind
from lora_jax._transform.lora_array import LoraArray, gains_around
from lora_jax._transform.rule import rule
from lora_jax._transform.rules.dot import compute_dtype

Factor = tuple[jax.Array, Labels]


@rule("ragged_dot_general", reads=(0,))
def ragged_dot_general(ctx: Context, eqn, values):
    """Rows of ``x``, in groups, each by ``W`` of its group; or by its group's rows of ``W``."""
    x, v, sizes = values[:3]
    if not isinstance(v, LoraArray) or isinstance(x, LoraArray):
        return NotImplemented
    form = _Form.of(eqn.params, len(v.shape))
    around = gains_around(v, form.summed, ())
    is_simple = not form.batch and len(form.group) == 1 and form.options["group_offset"] is None
    if around is None or around[0] or (around[1] and not is_simple):
        return NotImplemented
    (result,) = bind(eqn, [x, v.w, *values[2:]])
    ctx.use(v, form.summed, (*form.batch, *form.group))
    by_group = _sum_by_group if not form.group and form.ragged in form.x_summed else _rows_by_group
    with ctx.scope():
        for delta in v.deltas:
            if delta.is_probe:
                continue
            delta = delta.picked().whole(range(len(v.shape)), v.shape)
            factors = _in_order(delta, form)
            if factors is None:
                return NotImplemented  # a factor that both reads and writes
            result += by_group(ctx, form, x, v.shape, sizes, delta, factors, result)
        for gain, labels in around[1]:
            result = _by_row(form, gain, labels, sizes, result)
    return [result]


def _by_row(form: "_Form", gain, labels, sizes, result) -> jax.Array:
    """The result ``[*rows, *free]`` times the gain of each row's group."""
    rows = result.ndim - len(form.free)
    ragged = [i for i in range(rows + len(form.x_summed)) if i not in form.x_summed]
    row = ragged.index(form.ragged)
    where = {label: rows + i for i, label in enumerate(form.free)}
    if form.group[0] in labels:
        index = jnp.arange(result.shape[row], dtype=sizes.dtype)
        groups = jnp.searchsorted(jnp.cumsum(sizes), index, side="right")
        gain = jnp.take(gain, groups, labels.index(form.group[0]), mode="clip")
        where[form.group[0]] = row
    return times(result, gain, [where[label] for label in labels])


class _Form(NamedTuple):
    """The axes of a ragged dot: of ``x``, and of ``W`` where it does not say so."""

    x_summed: tuple[int, ...]
    x_batch: tuple[int, ...]
    ragged: int  # the axis of x that is in groups
    summed: tuple[int, ...]
    batch: tuple[int, ...]
    group: tuple[int, ...]
    free: tuple[int, ...]
    options: dict[str, Any]  # of every ragged product
    precision: Any

    @classmethod
    def of(cls, params: Any, ndim: int) -> "_Form":
        numbers = params["ragged_dot_dimension_numbers"]
        (x_summed, summed), (x_batch, batch) = numbers.dot_dimension_numbers
        (ragged,), group = numbers.lhs_ragged_dimensions, numbers.rhs_group_dimensions
        taken = {*summed, *batch, *group}
        return cls(
            x_summed=tuple(x_summed),
            x_batch=tuple(x_batch),
            ragged=ragged,
            summed=tuple(summed),
            batch=tuple(batch),
            group=tuple(group),
            free=tuple(i for i in range(ndim) if i not in taken),
            options={"group_offset": params["group_offset"]},
            precision=params["precision"],
        )


def _in_order(delta: Delta, form: _Form) -> tuple[Factor, Factor] | None:
    """The factor that reads, and the one that writes."""
    for first, then in (delta.factors, delta.factors[::-1]):
        if not _has(then, form.summed) and not _has(first, form.free):
            return first, then
    return None


def _sum_by_group(ctx, form: _Form, x, shape, sizes, delta, factors, result) -> jax.Array:
    """``scale * (x a) b`` where each group's part of the summed axis makes a result of its own."""
    dtype = compute_dtype(x.dtype, result.dtype)
    first, labels = _with_axes(factors[0], (*form.batch, *form.summed), shape)
    then, then_labels = _with_axes(factors[1], (*form.batch, *form.free), shape)
    summed = form.x_summed, tuple(map(labels.index, form.summed))
    batch = form.x_batch, tuple(map(labels.index, form.batch))

    def read(x, first):
        return lax.ragged_dot_general(
            x,
            first,
            sizes,
            lax.RaggedDotDimensionNumbers((summed, batch), (form.ragged,), ()),
            precision=form.precision,
            preferred_element_type=wide(dtype),
            **form.options,
        )

    small = ctx.through(
        delta, read, x.astype(dtype), first.astype(dtype)
    )  # [group, *batch, ..., r]
    small = (small * delta.scale.astype(small.dtype)).astype(dtype)
    ctx.spend(delta, x.size * small.shape[-1] + small.size * result.shape[-1])
    rows = [("x", i) for i in range(small.ndim - 2 - len(form.batch))]
    kept = ["group", *form.batch, *rows]
    return contract(
        small,
        [*kept, R],
        then.astype(dtype),
        then_labels,
        [*kept, *form.free],
        precision=form.precision,
        dtype=result.dtype,
    )


def _rows_by_group(ctx, form: _Form, x, shape, sizes, delta, factors, result) -> jax.Array:
    """``scale * (x a) b`` for each row, by the factors of its group."""
    dtype = compute_dtype(x.dtype, result.dtype)
    dtype = wide(dtype) if ctx.observe else dtype
    first = _with_axes(factors[0], (*form.batch, *form.summed), shape)
    alone = () if _has(first, form.group) else form.group  # one of the two must be ragged
    then = _with_axes(factors[1], (*form.batch, *form.free, *alone), shape)

    def product(x, x_summed, x_batch, ragged, factor, summed, out_dtype):
        y, labels = factor
        own_summed, own_batch = (tuple(map(labels.index, axes)) for axes in (summed, form.batch))
        dims = (x_summed, own_summed), (x_batch, own_batch)
        kind = {"precision": form.precision, "preferred_element_type": out_dtype}
        if not _has(factor, form.group):  # the same for all; a ragged batch axis is computed whole
            return lax.dot_general(x, y.astype(dtype), dims, **kind)
        own = tuple(map(labels.index, form.group))
        numbers = lax.RaggedDotDimensionNumbers(dims, (ragged,), own)
        return lax.ragged_dot_general(x, y.astype(dtype), sizes, numbers, **kind, **form.options)

    y, labels = first

    def read(x, y):
        first = y, labels
        return product(x, form.x_summed, form.x_batch, form.ragged, first, form.summed, wide(dtype))

    small = ctx.through(delta, read, x.astype(dtype), y.astype(dtype))
    small = (small * delta.scale.astype(small.dtype)).astype(dtype)  # [*batch, *rows, r]
    rank = small.shape[-1]
    ctx.spend(delta, x.size * rank + small.size * (result.size // max(small.size // rank, 1)))
    rows = [i for i in range(x.ndim) if i not in {*form.x_summed, *form.x_batch}]
    ragged = len(form.batch) + rows.index(form.ragged) if form.group else 0
    batch = tuple(range(len(form.batch)))
    return product(small, (small.ndim - 1,), batch, ragged, then, (R,), result.dtype)


def _has(factor: Factor, axes: Sequence[int]) -> bool:
    return not set(axes).isdisjoint(factor[1])


def _with_axes(factor: Factor, axes: Sequence[int], shape: Sequence[int]) -> Factor:
    """A factor with all of these axes, in the order of ``W``'s, and the rank axis last."""
    x, labels = factor
    missing = [i for i in axes if i not in labels]
    x, labels = lax.broadcast(x, [shape[i] for i in missing]), (*missing, *labels)
    order = sorted(range(len(labels)), key=lambda k: (labels[k] == R, labels[k]))
    return x.transpose(order), tuple(labels[k] for k in order)
