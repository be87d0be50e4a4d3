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
from lora_jax._transform.delta import Delta
from lora_jax._transform.labelled import Axis, Labelled, contract
from lora_jax._transform.lazy import Lazy, force
from lora_jax._transform.origin import Leaf
from lora_jax._weights.axes import role_axes
from lora_jax._weights.ranges import Range, index_of


def squared_update(w: jax.Array, f: Factors) -> tuple[jax.Array, jax.Array]:
    """Compute ``W . a b`` and ``|a b|^2`` of every column, without ``a b``: ``[*batch, *out]``."""
    batch, inputs, outputs = (role_axes(f.layout, role) for role in "bio")
    columns = (*batch, *outputs)
    full = wide(f.b.dtype)
    dtype = w.dtype if jnp.dtype(w.dtype).itemsize > 1 else jnp.bfloat16
    kind: dict[str, Any] = {"precision": lax.Precision.HIGHEST, "dtype": full}
    a = Labelled(f.a.astype(full), (*batch, *inputs, Axis.RANK))
    b = Labelled(f.b.astype(full), (*batch, Axis.RANK, *outputs))
    own = (
        kind if dtype == full else kind | {"precision": None}
    )  # products of a narrow type are exact
    weight = Labelled(w.astype(dtype), tuple(range(len(f.layout))))
    read = contract(weight, a.astype(dtype), (*columns, Axis.RANK), **own)
    cross = contract(read, b, columns, **kind)
    other = Labelled(a.array, (*batch, *inputs, Axis.RANK2))
    gram = contract(a, other, (*batch, Axis.RANK, Axis.RANK2), **kind)
    spread = contract(gram, b, (*batch, Axis.RANK2, *outputs), **kind)
    square = contract(spread, Labelled(b.array, spread.labels), columns, **kind)
    return cross.array, square.array


def gain(w: jax.Array, f: Factors) -> jax.Array:
    """Compute ``m / |W + scale a b| - 1``: ``[*batch, *out]``."""
    w, frozen = lax.stop_gradient(w), jax.tree.map(lax.stop_gradient, f)
    norm = squared_norm(w, f.layout) if f.norm is None else frozen.norm
    cross, square = squared_update(w, frozen)
    scale = jnp.asarray(frozen.scale, cross.dtype)
    squared = norm.astype(cross.dtype) + 2 * scale * cross + scale**2 * square
    return f.magnitude.astype(cross.dtype) / jnp.sqrt(jnp.maximum(squared, 0)) - 1


def _by_layer(w: Lazy, f: Factors) -> Any:
    """Compute the gain of a quantized stack, one layer of which is built at a time."""
    stacks = {name: x for name, x in f.arrays().items() if name != "scale"}

    def one(layer):
        own = dataclasses.replace(f, **layer[1], layout=f.layout[1:])
        return gain(force(Lazy.of(layer[0])), own)

    return lax.map(one, (w.front(), stacks))


def delta_of(
    f: Factors, leaf: Leaf, ranges: Sequence[Range], w: Any, freeze: Any = lax.stop_gradient
) -> Delta:
    """Return the delta of a weight as it enters the function, with its gain if it has one."""
    delta = Delta.of(f, leaf, ranges, freeze)
    if f.magnitude is None:
        return delta
    labels = (*role_axes(f.layout, "b"), *role_axes(f.layout, "o"))
    return dataclasses.replace(delta, gain=Labelled(_gain_of(f, ranges, w), labels))


def _gain_of(f: Factors, ranges: Sequence[Range], w: Any) -> Any:
    """Compute the gain of a part of ``w``, or its shape if some array is a shape."""
    index = index_of(ranges, len(f.layout) if ranges else 0)
    is_shape = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves((w, f)))
    is_stack = isinstance(w, Lazy) and f.layout[0] == "b" and not ranges and not is_shape
    if is_stack and w.front() is not None:
        return _by_layer(w, f)
    compute = functools.partial(jax.eval_shape, gain) if is_shape else gain
    w = jax.eval_shape(force, w) if is_shape else force(w)
    part = jax.eval_shape(lambda w: w[index], w) if is_shape else w[index]
    return compute(part, f)
