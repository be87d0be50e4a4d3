"""Linear arithmetic on weights: multiples, sums, and sums over axes."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax import lax

from lora_jax._transform.context import Context
from lora_jax._transform.delta import Delta
from lora_jax._transform.lazy import bind
from lora_jax._transform.lora_array import LoraArray
from lora_jax._transform.regroup import axis_groups, regroup
from lora_jax._transform.rule import rule


def exact(w: jax.Array, deltas: Iterable[Delta | None]) -> Any:
    """The output of a rule, unless one of the deltas has no exact form."""
    found = tuple(deltas)
    kept = tuple(delta for delta in found if delta is not None)
    return [LoraArray(w, kept)] if len(kept) == len(found) else NotImplemented


@rule("neg", folds=True)
def neg(ctx: Context, eqn, values):
    """The scale changes its sign."""
    (v,) = values
    (w,) = bind(eqn, [v.w])
    return [v.map(w, lambda delta: _scaled(delta, lambda scale: -scale))]


def _scaled(delta: Delta, f) -> Delta:
    return delta if delta.is_probe else dataclasses.replace(delta, scale=f(delta.scale))


@rule("mul", "div", folds=True)
def mul(ctx: Context, eqn, values):
    """A multiple by a number, or by a vector along axes that one factor has."""
    divides = eqn.primitive.name == "div"
    if all(isinstance(v, LoraArray) for v in values):
        values = _one_whole(ctx, values)
    if values is None or (divides and isinstance(values[1], LoraArray)):
        return NotImplemented
    v, x = values if isinstance(values[0], LoraArray) else values[::-1]
    (w,) = bind(eqn, [u.w if u is v else u for u in values])
    x = ctx.unbroadcast(eqn.invars[1 if v is values[0] else 0], x)
    f = lambda y, x: y / x if divides else y * x  # noqa: E731
    if x.size == 1:
        number = x.reshape(())
        return [v.map(w, lambda d: _scaled(d, lambda scale: f(scale, number.astype(scale.dtype))))]
    if v.unfolded is not None:
        return NotImplemented
    return scale_axes(v, w, x, range(x.ndim), f)


def _one_whole(ctx: Context, values: list[Any]) -> list[Any] | None:
    """Of two weights, the wider one as it is and the other whole; None if that says nothing."""

    def width(v: LoraArray) -> int:
        return sum(n != 1 and any(d.past.axes[i] for d in v.deltas) for i, n in enumerate(v.shape))

    left, right = values
    if left.is_read or right.is_read or left.unfolded or right.unfolded:
        return None
    if width(left) == width(right):
        return None
    why = "multiplies another adapted weight, entry by entry"
    if width(left) > width(right):
        return [left, ctx.materialize(right, why)]
    return [ctx.materialize(left, why), right]


def scale_axes(v: LoraArray, w: jax.Array, x: jax.Array, labels: Sequence[int], f=lax.mul) -> Any:
    """``w``, which is ``v.w`` times ``x`` of these axes of it, with the deltas times ``x``.

    ``x`` goes into a factor that has all of its axes, or of whose axes ``v`` has none.
    """
    long = [(i, label) for i, label in enumerate(labels) if x.shape[i] != 1]
    x = x.reshape([x.shape[i] for i, _ in long])
    axes = [label for _, label in long]

    def scale_delta(delta: Delta) -> Delta | None:
        if delta.is_probe:
            return delta
        delta = delta.picked()  # of a stack the others are none of ``x``'s business
        foreign = [axis for axis in axes if not delta.has(axis)]
        candidates = [
            name
            for name, (_, own) in zip("ab", delta.factors, strict=True)
            if all(axis in own or axis in foreign for axis in axes)
        ]
        if not candidates:
            return None
        name = min(candidates, key=lambda name: getattr(delta, name).size)
        part = x
        for i, axis in enumerate(axes):
            part = lax.slice_in_dim(part, *delta.range_of(axis, w.shape[axis]), axis=i)
        factor, own = getattr(delta, name), getattr(delta, f"{name}_labels")
        new = (*(axis for axis in foreign), *own)
        order = sorted(range(len(axes)), key=lambda i: new.index(axes[i]))
        part = part.transpose(order).astype(factor.dtype)
        part = lax.expand_dims(part, [i for i, label in enumerate(new) if label not in axes])
        factor = f(lax.expand_dims(factor, range(len(foreign))), part)
        return dataclasses.replace(delta, **{name: factor, f"{name}_labels": new})

    return exact(w, map(scale_delta, v.deltas))


@rule("add", "sub", "add_any")
def add(ctx: Context, eqn, values):
    """The sum of two weights has the deltas of both."""
    plain = [v.w if isinstance(v, LoraArray) else v for v in values]
    (w,) = bind(eqn, plain)
    deltas: list[Delta] = []
    for i, v in enumerate(values):
        if isinstance(v, LoraArray):
            is_alone = not isinstance(values[1 - i], LoraArray)
            if is_alone and (not v.deltas or v.is_lookup or not _fills(v, w.shape)):
                return NotImplemented  # added to activations, it is not a weight any more
            if any(delta.gain is not None for delta in v.deltas):
                return NotImplemented  # of one summand only
            sign = -1 if i == 1 and eqn.primitive.name == "sub" else 1
            for delta in v.deltas:
                delta = _scaled(delta, lambda scale, sign=sign: sign * scale)
                if v.shape != w.shape:  # the same along an axis of size 1
                    delta = regroup(delta, v.shape, v.shape, axis_groups(v.shape, v.shape))
                deltas.append(delta)
    return [LoraArray(w, tuple(deltas))]


def _fills(v: LoraArray, shape: Sequence[int]) -> bool:
    return all(d.past.axes[i] for d in v.deltas for i, size in enumerate(shape) if size != 1)


@rule("reduce_sum", reads=(0,))
def reduce_sum(ctx: Context, eqn, values):
    """A sum over an axis that one factor has, or none, is a sum over that factor."""
    (v,) = values
    (w,) = bind(eqn, [v.w])
    axes = eqn.params["axes"]
    kept = [i for i in range(len(v.shape)) if i not in axes]
    new = {old: i for i, old in enumerate(kept)}

    def sum_delta(delta: Delta) -> Delta | None:
        past = delta.past._replace(summed=delta.past.summed | delta.past.behind(axes))
        delta = dataclasses.replace(delta, past=past)
        for axis in axes:
            if axis in delta.a_labels and axis in delta.b_labels:
                return None
            first, last = delta.range_of(axis, v.shape[axis])
            is_part = (first, last) != (0, v.shape[axis])
            if delta.gain is not None and (is_part or axis in delta.gain_labels):
                return None
            if not delta.has(axis):
                delta = _scaled(delta, lambda scale, n=last - first: n * scale)
            delta = delta.with_range(axis, 0, v.shape[axis], v.shape[axis])
        delta = delta.map(
            lambda x, labels: (
                x.sum([i for i, label in enumerate(labels) if label in axes]),
                tuple(label for label in labels if label not in axes),
            )
        )
        return delta.move(new, len(kept))

    return exact(w, map(sum_delta, v.deltas))
