"""Linear arithmetic on weights: multiples, sums, and sums over axes."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax import lax

from lora_jax._transform.context import Context
from lora_jax._transform.delta import AnyDelta
from lora_jax._transform.labelled import Labelled
from lora_jax._transform.lazy import bind
from lora_jax._transform.lora_array import LoraArray, frozen
from lora_jax._transform.regroup import axis_groups
from lora_jax._transform.rule import first_looked_up, looked_up, rule


def exact(w: jax.Array, deltas: Iterable[AnyDelta | None]) -> Any:
    """Return the output of a rule, unless one of the deltas is None: it has no exact form."""
    found = tuple(deltas)
    kept = tuple(delta for delta in found if delta is not None)
    return [LoraArray(w, kept)] if len(kept) == len(found) else NotImplemented


@rule("neg", folds=True)
def neg(ctx: Context, eqn, values):
    """Change the sign of the scale."""
    (v,) = values
    (w,) = bind(eqn, [v.w])
    return [v.map(w, lambda delta: delta.scaled(lambda scale: -scale))]


@rule("mul", "div", folds=True)
def mul(ctx: Context, eqn, values):
    """Multiply the scale by a number, or a factor by a vector along axes that it has."""
    divides = eqn.primitive.name == "div"
    if all(isinstance(v, LoraArray) for v in values):
        values = _with_narrow_built(ctx, values)
    if values is None or (divides and isinstance(values[1], LoraArray)):
        return NotImplemented
    v, x = values if isinstance(values[0], LoraArray) else values[::-1]
    (w,) = bind(eqn, [u.w if u is v else u for u in values])
    x = ctx.unbroadcast(eqn.invars[1 if v is values[0] else 0], x)
    f = lambda y, x: y / x if divides else y * x  # noqa: E731
    if x.size == 1:
        number = x.reshape(())
        return [v.map(w, lambda d: d.scaled(lambda scale: f(scale, number.astype(scale.dtype))))]
    if v.unfolded is not None:
        return NotImplemented
    return scale_axes(v, w, Labelled(x, tuple(range(x.ndim))), f)


def _with_narrow_built(ctx: Context, values: list[Any]) -> list[Any] | None:
    """Build the narrower one of two weights; return None if neither is narrower."""

    def width(v: LoraArray) -> int:
        return sum(
            n != 1 and any(d.origin.axes[i] for d in v.deltas) for i, n in enumerate(v.shape)
        )

    left, right = values
    if left.is_read or right.is_read or left.unfolded or right.unfolded:
        return None
    if width(left) == width(right):
        return None
    why = "multiplies another adapted weight, entry by entry"
    if width(left) > width(right):
        return [left, ctx.materialize(right, why)]
    return [ctx.materialize(left, why), right]


def scale_axes(v: LoraArray, w: jax.Array, x: Labelled, f=lax.mul) -> Any:
    """Return ``w``, which is ``f(v.w, x)``, with a factor of each delta multiplied by ``x``.

    ``x`` has axes of ``w``, or size 1 along them.
    """
    axes = tuple(label for label, size in x.sizes.items() if size != 1)
    x = Labelled(x.array.reshape([x.sizes[label] for label in axes]), axes)
    return exact(w, (delta.times(x, w.shape, f) for delta in v.deltas))


@rule("add", "sub", "add_any", reads=looked_up)
def add(ctx: Context, eqn, values):
    """Give the sum of two weights the deltas of both.

    A number that was read off a weight, as in ``W - W.mean()``, is an update of all entries: plain,
    it would have the gradient of the base.
    """
    if any(isinstance(v, LoraArray) and len(v.shape) < eqn.outvars[0].aval.ndim for v in values):
        return NotImplemented
    (w,) = bind(eqn, frozen(values))
    deltas: list[AnyDelta | None] = []
    for i, v in enumerate(values):
        if isinstance(v, LoraArray):
            is_alone = not isinstance(values[1 - i], LoraArray)
            if is_alone and (not v.deltas or not _fills(v, w.shape)):
                return NotImplemented  # added to activations, it is not a weight any more
            if any(delta.gain is not None for delta in v.updates):
                return NotImplemented  # the gain is of one summand only
            sign = -1 if i == 1 and eqn.primitive.name == "sub" else 1
            for delta in v.deltas:
                signed = delta.scaled(lambda scale, sign=sign: sign * scale)
                if v.shape != w.shape:  # constant along its axes of size 1
                    signed = signed.regrouped(axis_groups(v.shape, v.shape), v.shape, v.shape)
                deltas.append(signed)
    return exact(w, deltas)


def _fills(v: LoraArray, shape: Sequence[int]) -> bool:
    return all(d.origin.axes[i] for d in v.deltas for i, size in enumerate(shape) if size != 1)


@rule("reduce_sum", reads=first_looked_up)
def reduce_sum(ctx: Context, eqn, values):
    """Sum over an axis of one factor in that factor; an axis of neither multiplies the scale."""
    (v,) = values
    (w,) = bind(eqn, [v.w])
    axes = eqn.params["axes"]
    kept = [i for i in range(len(v.shape)) if i not in axes]
    new = {old: i for i, old in enumerate(kept)}

    def sum_delta(delta: AnyDelta) -> AnyDelta | None:
        found = delta.marked("summed", axes).summed(axes, v.shape)
        return None if found is None else found.moved(new, len(kept))

    return exact(w, map(sum_delta, v.deltas))
