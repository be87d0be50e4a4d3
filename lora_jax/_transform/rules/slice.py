"""Parts of weights, and weights put together of parts: ranges of their axes."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax._transform.context import Context
from lora_jax._transform.delta import AnyDelta
from lora_jax._transform.lazy import bind, moved
from lora_jax._transform.lora_array import LoraArray, adapted, frozen
from lora_jax._transform.rule import rule


def take_range(v: Any, axis: int, start: int, stop: int, stride: int = 1) -> Any:
    """Return ``v[..., start:stop:stride, ...]`` of an array or an adapted weight."""
    if (start, stop, stride) == (0, v.shape[axis], 1):
        return v
    if not isinstance(v, LoraArray):
        return lax.slice_in_dim(v, start, stop, stride, axis)
    w = moved(v.w, lambda x: lax.slice_in_dim(x, start, stop, stride, axis))
    deltas = (_take_range(d, v.shape, axis, start, stop, stride) for d in v.deltas)
    return adapted(w, deltas)


def _take_range(
    delta: AnyDelta, shape: Sequence[int], axis: int, start: int, stop: int, stride: int
) -> AnyDelta | None:
    """Take a range of ``W``, of this shape; None if the delta has no entry there."""
    if stride != 1:
        delta = delta.padded([axis], shape)
    first, last = delta.range_of(axis, shape[axis])
    begin, end = max(first, start), min(last, stop)
    if begin >= end:
        return None
    size = len(range(start, stop, stride))
    delta = delta.map(lambda x: x.cut(axis, begin - first, end - first, stride))
    end = end if stride == 1 else begin + size
    return _picked(delta.with_range(axis, begin - start, end - start, size), axis, shape, size)


def _picked(delta: AnyDelta, axis: int, shape: Sequence[int], size: int) -> AnyDelta:
    """Note that an entry was picked, if ``size`` is 1 and ``shape[axis]`` is not."""
    return delta if size != 1 or shape[axis] == 1 else delta.marked("picked", [axis])


@rule("slice")
def slice_(ctx: Context, eqn, values):
    """Slice each factor along the axes it has."""
    (v,) = values
    starts, stops = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or [1] * len(starts)
    for axis, bounds in enumerate(zip(starts, stops, strides, strict=True)):
        v = take_range(v, axis, *bounds)
    return [v]


@rule("split")
def split(ctx: Context, eqn, values):
    """Take a fused weight apart."""
    (v,) = values
    stops = np.cumsum(eqn.params["sizes"]).tolist()
    axis, starts = eqn.params["axis"], [0, *stops[:-1]]
    return [take_range(v, axis, *bounds) for bounds in zip(starts, stops, strict=True)]


@rule("dynamic_slice")
def dynamic_slice(ctx: Context, eqn, values):
    """Slice each factor along the axes it has, at the same indices."""
    v, *starts = values
    if any(isinstance(start, LoraArray) for start in starts):
        return NotImplemented
    (w,) = bind(eqn, [v.w, *starts])
    sizes = eqn.params["slice_sizes"]
    cut = [i for i, size in enumerate(sizes) if size != v.shape[i]]

    def slice_delta(delta: AnyDelta) -> AnyDelta:
        delta = delta.padded(cut, v.shape)
        for i in cut:
            delta = delta.map(lambda x, i=i: x.cut_at(i, starts[i], sizes[i]))
            delta = _picked(delta, i, v.shape, sizes[i])
        return delta

    return [v.map(w, slice_delta)]


@rule("concatenate")
def concatenate(ctx: Context, eqn, values):
    """Put weights together: the update of each covers a range of the result."""
    (w,) = bind(eqn, frozen(values))
    axis, start = eqn.params["dimension"], 0
    deltas: list[AnyDelta] = []
    for v in values:
        if isinstance(v, LoraArray):
            for delta in v.deltas:
                first, last = delta.range_of(axis, v.shape[axis])
                deltas.append(delta.with_range(axis, start + first, start + last, w.shape[axis]))
        start += v.shape[axis]
    return [LoraArray(w, tuple(deltas))]


@rule("stack")
def stack(ctx: Context, eqn, values):
    """Stack weights along a new axis: the update of each covers one entry of it."""
    (w,) = bind(eqn, frozen(values))
    axis = eqn.params["axis"] % w.ndim
    new = {i: i + (i >= axis) for i in range(w.ndim - 1)}
    deltas = [
        delta.moved(new, w.ndim).with_range(axis, k, k + 1, len(values))
        for k, v in enumerate(values)
        if isinstance(v, LoraArray)
        for delta in v.deltas
    ]
    return [LoraArray(w, tuple(deltas))]


@rule("pad")
def pad(ctx: Context, eqn, values):
    """Pad a weight: the update covers a range of the result."""
    v, value = values
    if not isinstance(v, LoraArray):
        return NotImplemented
    (w,) = bind(eqn, [v.w, value])
    config = [tuple(map(int, c)) for c in eqn.params["padding_config"]]

    def pad_delta(delta: AnyDelta) -> AnyDelta | None:
        for axis, (low, high, interior) in enumerate(config):
            size = v.shape[axis]
            if interior:
                delta = delta.padded([axis], v.shape).expanded(axis, size)
                spread = partial(_spread, interior=interior)
                delta, size = delta.along(axis, spread), size + (size - 1) * interior
            first, last = delta.range_of(axis, size)
            shape = [size if i == axis else n for i, n in enumerate(w.shape)]
            cut = _take_range(delta, shape, axis, max(-low, 0), size - max(-high, 0), 1)
            if cut is None:
                return None
            first, last = cut.range_of(axis, size - max(-low, 0) - max(-high, 0))
            low = max(low, 0)
            delta = cut.with_range(axis, first + low, last + low, w.shape[axis])
        return delta

    return [adapted(w, map(pad_delta, v.deltas))]


def _spread(x: jax.Array, axis: int, interior: int) -> jax.Array:
    config = [(0, 0, interior if i == axis else 0) for i in range(x.ndim)]
    return lax.pad(x, jnp.zeros((), x.dtype), config)


@rule("rev")
def rev(ctx: Context, eqn, values):
    """Reverse each factor along the axes it has."""
    (v,) = values
    (w,) = bind(eqn, [v.w])

    def reverse(delta: AnyDelta) -> AnyDelta:
        for axis in eqn.params["dimensions"]:
            size = v.shape[axis]
            first, last = delta.range_of(axis, size)
            delta = delta.along(axis, lambda x, i: lax.rev(x, (i,)))
            delta = delta.with_range(axis, size - last, size - first, size)
        return delta

    return [v.map(w, reverse)]


@rule("tile")
def tile(ctx: Context, eqn, values):
    """Tile each factor along the axes it has."""
    (v,) = values
    (w,) = bind(eqn, [v.w])

    def repeat(delta: AnyDelta) -> AnyDelta:
        for axis, times in enumerate(eqn.params["reps"]):
            if times != 1:
                delta = delta.padded([axis], v.shape)
                delta = delta.along(
                    axis, lambda x, i, n=times: lax.concatenate([x] * n, dimension=i)
                )
        return delta

    return [v.map(w, repeat)]
