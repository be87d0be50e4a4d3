"""``ragged_dot_general``: the experts of a mixture, each with its own factors."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax._adapter.factors import wide
from lora_jax._transform.context import Context
from lora_jax._transform.delta import Delta
from lora_jax._transform.labelled import Axis, Labelled, contract, times
from lora_jax._transform.lazy import bind
from lora_jax._transform.lora_array import LoraArray, gains_around
from lora_jax._transform.rule import first_looked_up, rule
from lora_jax._transform.rules.dot import compute_dtype


@rule("ragged_dot_general", reads=first_looked_up)
def ragged_dot_general(ctx: Context, eqn, values):
    """Multiply rows of ``x`` by the ``W`` of their group, or by their group's rows of ``W``."""
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
        for delta in v.updates:
            delta = delta.picked().padded(range(len(v.shape)), v.shape)
            factors = _in_order(delta, form)
            if factors is None:
                return NotImplemented  # a factor that both reads and writes
            result += by_group(ctx, form, x, v.shape, sizes, delta, factors, result)
        for gain in around[1]:
            result = _times_by_row(form, gain, sizes, result)
    return [result]


class _Form(NamedTuple):
    """The axes of a ragged dot.

    ``x`` is ``[*x_batch, *rows, *x_summed]`` and ``W`` is ``[*batch, *group, *summed, *free]``, in
    any order. The result is ``[*batch, *rows, *free]``, after the groups if they are parts of a
    summed axis.
    """

    x_summed: tuple[int, ...]
    x_batch: tuple[int, ...]
    ragged: int  # the axis of x that is in groups
    summed: tuple[int, ...]
    batch: tuple[int, ...]
    group: tuple[int, ...]  # empty if the groups are parts of a summed or batch axis
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


def _in_order(delta: Delta, form: _Form) -> tuple[Labelled, Labelled] | None:
    """Return the factor that reads, and the one that writes; None if one does both."""
    for first, then in (delta.factors, delta.factors[::-1]):
        if not _has(then, form.summed) and not _has(first, form.free):
            return first, then
    return None


def _sum_by_group(ctx, form: _Form, x, shape, sizes, delta, factors, result) -> jax.Array:
    """Compute ``scale * (x a) b`` if each group's part of a summed axis makes its own result."""
    dtype = compute_dtype(x.dtype, result.dtype)
    first = _with_axes(factors[0], (*form.batch, *form.summed), shape)
    then = _with_axes(factors[1], (*form.batch, *form.free), shape)
    summed = form.x_summed, tuple(map(first.axis, form.summed))
    batch = form.x_batch, tuple(map(first.axis, form.batch))

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

    small = ctx.through(delta, read, x.astype(dtype), first.array.astype(dtype))
    small = (small * delta.scale.astype(small.dtype)).astype(dtype)  # [group, *batch, *rows, rank]
    ctx.spend(delta, x.size * small.shape[-1] + small.size * result.shape[-1])
    rows = [("x", i) for i in range(small.ndim - 2 - len(form.batch))]
    kept = ("group", *form.batch, *rows)
    return contract(
        Labelled(small, (*kept, Axis.RANK)),
        then.astype(dtype),
        (*kept, *form.free),
        precision=form.precision,
        dtype=result.dtype,
    ).array


def _rows_by_group(ctx, form: _Form, x, shape, sizes, delta, factors, result) -> jax.Array:
    """Compute ``scale * (x a) b`` for each row, by the factors of its group."""
    dtype = compute_dtype(x.dtype, result.dtype)
    dtype = wide(dtype) if ctx.policy.observe else dtype
    first = _with_axes(factors[0], (*form.batch, *form.summed), shape)
    alone = () if _has(first, form.group) else form.group  # one of the two must be ragged
    then = _with_axes(factors[1], (*form.batch, *form.free, *alone), shape)

    def product(x, x_summed, x_batch, ragged, factor: Labelled, summed, out_dtype):
        own_summed, own_batch = (tuple(map(factor.axis, axes)) for axes in (summed, form.batch))
        dims = (x_summed, own_summed), (x_batch, own_batch)
        kind = {"precision": form.precision, "preferred_element_type": out_dtype}
        y = factor.array.astype(dtype)
        if not _has(factor, form.group):  # the same for all groups, and for all of a ragged batch
            return lax.dot_general(x, y, dims, **kind)
        own = tuple(map(factor.axis, form.group))
        numbers = lax.RaggedDotDimensionNumbers(dims, (ragged,), own)
        return lax.ragged_dot_general(x, y, sizes, numbers, **kind, **form.options)

    def read(x, array):
        own = Labelled(array, first.labels)
        return product(x, form.x_summed, form.x_batch, form.ragged, own, form.summed, wide(dtype))

    small = ctx.through(delta, read, x.astype(dtype), first.array.astype(dtype))
    small = (small * delta.scale.astype(small.dtype)).astype(dtype)  # [*batch, *rows, rank]
    rank = small.shape[-1]
    ctx.spend(delta, x.size * rank + small.size * (result.size // max(small.size // rank, 1)))
    rows = [i for i in range(x.ndim) if i not in {*form.x_summed, *form.x_batch}]
    ragged = len(form.batch) + rows.index(form.ragged) if form.group else 0
    batch = tuple(range(len(form.batch)))
    return product(small, (small.ndim - 1,), batch, ragged, then, (Axis.RANK,), result.dtype)


def _times_by_row(form: _Form, gain: Labelled, sizes, result) -> jax.Array:
    """Multiply the result, ``[*rows, *free]``, by the gain of each row's group."""
    (group,) = form.group
    labels: list[Any] = [("x", i) for i in range(result.ndim - len(form.free))]
    ragged = [i for i in range(len(labels) + len(form.x_summed)) if i not in form.x_summed]
    row = ragged.index(form.ragged)
    labels[row] = group  # a row has the gain of its group
    if group in gain.labels:
        index = jnp.arange(result.shape[row], dtype=sizes.dtype)
        groups = jnp.searchsorted(jnp.cumsum(sizes), index, side="right")
        gain = gain.along(group, lambda x, axis: jnp.take(x, groups, axis, mode="clip"))
    return times(Labelled(result, (*labels, *form.free)), gain).array


def _has(factor: Labelled, axes: Sequence[int]) -> bool:
    return not set(axes).isdisjoint(factor.labels)


def _with_axes(factor: Labelled, axes: Sequence[int], shape: Sequence[int]) -> Labelled:
    """Give a factor all of these axes, in the order of ``W``'s, and the rank last."""
    factor = factor.broadcast({i: shape[i] for i in axes if i not in factor.labels})
    labels: list[Any] = sorted(label for label in factor.labels if label != Axis.RANK)
    labels.append(Axis.RANK)
    return Labelled(factor.array.transpose([factor.axis(i) for i in labels]), tuple(labels))
