"""DoRA: the norm of every column of ``W + scale * a b``, without ``a b``.

The adapted weight is ``m (W + scale a b) / |W + scale a b|``, where ``|.|`` is the norm over the
inputs, for each output, and passes no gradient. With ``m`` a vector along the outputs this is a
gain of the product, ``y = (m / |.|) (x W + scale (x a) b)``; it travels with the delta.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax._adapter.factors import Factors, wide
from lora_jax._adapter.norms import squared_norm
from lora_jax._transform.delta import Delta, R
from lora_jax._transform.labelled import contract
from lora_jax._transform.lazy import Lazy, force
from lora_jax._transform.origin import Leaf
from lora_jax._weights.axes import role_axes
from lora_jax._weights.ranges import Range, index_of

S = -2  # the rank axis, once more


def squared_update(w: jax.Array, f: Factors) -> tuple[jax.Array, jax.Array]:
    """``W . a b`` and ``|a b|^2`` of every column, without ``a b``: ``[*batch, *out]``."""
    batch, inputs, outputs = (list(role_axes(f.layout, role)) for role in "bio")
    axes = list(range(len(f.layout)))
    full = wide(f.b.dtype)
    dtype = w.dtype if jnp.dtype(w.dtype).itemsize > 1 else jnp.bfloat16
    kind: dict[str, Any] = {"precision": lax.Precision.HIGHEST, "dtype": full}
    a, b = (x.astype(full) for x in (f.a, f.b))
    a_labels, b_labels = [*batch, *inputs, R], [*batch, R, *outputs]
    own = kind if dtype == full else kind | {"precision": None}  # of a narrow type all is exact
    read = contract(w.astype(dtype), axes, a.astype(dtype), a_labels, [*batch, *outputs, R], **own)
    cross = contract(read, [*batch, *outputs, R], b, b_labels, [*batch, *outputs], **kind)
    gram = contract(a, a_labels, a, [*batch, *inputs, S], [*batch, R, S], **kind)
    spread = contract(gram, [*batch, R, S], b, b_labels, [*batch, S, *outputs], **kind)
    square = contract(
        spread, [*batch, S, *outputs], b, [*batch, S, *outputs], [*batch, *outputs], **kind
    )
    return cross, square


def gain(w: jax.Array, f: Factors) -> jax.Array:
    """``m / |W + scale a b| - 1``: ``[*batch, *out]``."""
    w, frozen = lax.stop_gradient(w), jax.tree.map(lax.stop_gradient, f)
    norm = squared_norm(w, f.layout) if f.norm is None else frozen.norm
    cross, square = squared_update(w, frozen)
    scale = jnp.asarray(frozen.scale, cross.dtype)
    squared = norm.astype(cross.dtype) + 2 * scale * cross + scale**2 * square
    return f.magnitude.astype(cross.dtype) / jnp.sqrt(jnp.maximum(squared, 0)) - 1


def _by_layer(w: Lazy, f: Factors) -> Any:
    """The gain of a quantized stack, of which one layer is made at a time."""
    stacks = {name: getattr(f, name) for name in ("a", "b", "magnitude", "norm")}
    stacks = {name: x for name, x in stacks.items() if x is not None}

    def one(layer):
        own = dataclasses.replace(f, **layer[1], layout=f.layout[1:])
        return gain(force(Lazy.of(layer[0])), own)

    return lax.map(one, (w.front(), stacks))


def delta_of(f: Factors, leaf: Leaf, ranges: Sequence[Range], w: Any) -> Delta:
    """The delta of a weight as it enters the function, with its gain if it has one."""
    delta = Delta.of(f, leaf, ranges)
    if f.magnitude is None:
        return delta
    index = index_of(ranges, len(f.layout) if ranges else 0)
    labels = (*role_axes(f.layout, "b"), *role_axes(f.layout, "o"))
    is_shape = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves((w, f)))
    is_stack = isinstance(w, Lazy) and f.layout[0] == "b" and not ranges and not is_shape
    if is_stack and w.front() is not None:
        return dataclasses.replace(delta, gain=_by_layer(w, f), gain_labels=labels)
    compute = functools.partial(jax.eval_shape, gain) if is_shape else gain
    w = jax.eval_shape(force, w) if is_shape else force(w)
    part = jax.eval_shape(lambda w: w[index], w) if is_shape else w[index]
    return dataclasses.replace(delta, gain=compute(part, f), gain_labels=labels)
