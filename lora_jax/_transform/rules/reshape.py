"""Axes split, merged, dropped and made: a reshape of a weight is a reshape of its factors."""

from lora_jax._transform.context import Context
from lora_jax._transform.lazy import bind
from lora_jax._transform.lora_array import LoraArray
from lora_jax._transform.regroup import axis_groups
from lora_jax._transform.rule import rule


@rule("reshape", "squeeze", folds=True)
def reshape(ctx: Context, eqn, values):
    """Split and merge axes of one role; axes of size 1 come and go.

    If axes of different roles are merged, the weight remembers the shape before, for a reshape that
    takes them apart again.
    """
    v = values[0]
    (shape,) = (var.aval.shape for var in eqn.outvars)
    if eqn.params.get("dimensions") is not None and eqn.primitive.name == "reshape":
        return NotImplemented
    (w,) = bind(eqn, [v.w])
    old = v.unfolded or v.shape
    groups = axis_groups(old, shape)
    deltas = [delta.regrouped(groups, old, shape) for delta in v.deltas]
    if None in deltas:
        return [LoraArray(w, v.deltas, unfolded=old)]
    return [LoraArray(w, tuple(deltas))]


@rule("broadcast_in_dim")
def broadcast_in_dim(ctx: Context, eqn, values):
    """Give no factor the new axes: every entry along them has the same update."""
    v = values[0]
    dims, shape = eqn.params["broadcast_dimensions"], eqn.params["shape"]
    (w,) = bind(eqn, [v.w, *values[1:]])
    ones = [1] * len(shape)
    for size, dim in zip(v.shape, dims, strict=True):
        ones[int(dim)] = size
    groups = axis_groups(v.shape, ones)
    return [v.map(w, lambda delta: delta.regrouped(groups, v.shape, ones))]
