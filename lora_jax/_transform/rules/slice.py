"""Parts of weights, and weights put together from parts: ranges of their axes."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax._transform.context import Context
from lora_jax._transform.delta import Delta
from lora_jax._transform.lazy import bind, moved
from lora_jax._transform.lora_array import LoraArray, adapted
from lora_jax._transform.rule import rule


def take_range(v: Any, axis: int, start: int, stop: int, stride: int = 1) -> Any:
    """``v[..., start:stop:stride, ...]`` of an array or an adapted weight."""
    if (start, stop, stride) == (0, v.shape[axis], 1):
        return v
    if not isinstance(v, LoraArray):
        return lax.slice_in_dim(v, start, stop, stride, axis)
    w = moved(v.w, lambda x: lax.slice_in_dim(x, start, stop, stride, axis))
    deltas = (_take_range(d, v.shape, axis, start, stop, stride) for d in v.deltas)
    return adapted(w, deltas)


def _take_range(
    delta: Delta, shape: Sequence[int], axis: int, start: int, stop: int, stride: int
) -> Delta | None:
    if stride != 1:
        delta = delta.whole([axis], shape)
    first, last = delta.range_of(axis, shape[axis])
    begin, end = max(first, start), min(last, stop)
    if begin >= end:
        return None  # the part is not adapted
    size = len(range(start, stop, stride))
    delta = delta.along(
        axis, lambda x, i: lax.slice_in_dim(x, begin - first, end - first, stride, i)
    )
    end = end if stride == 1 else begin + size
    return _picked(delta.with_range(axis, begin - start, end - start, size), axis, shape, size)


def _picked(delta: Delta, axis: int, shape: Sequence[int], size: int) -> Delta:
    if size != 1 or shape[axis] == 1:
        return delta
    picked = delta.past.picked | delta.past.behind([axis])
    return dataclasses.replace(delta, past=delta.past._replace(picked=picked))


@rule("slice")
def slice_(ctx: Context, eqn, values):
    """Each factor is sliced along the axes it has."""
    (v,) = values
    starts, stops = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or [1] * len(starts)
    for axis, bounds in enumerate(zip(starts, stops, strides, strict=True)):
        v = take_range(v, axis, *bounds)
    return [v]


@rule("split")
def split(ctx: Context, eqn, values):
    """A fused weight taken apart."""
    (v,) = values
    stops = np.cumsum(eqn.params["sizes"]).tolist()
    axis, starts = eqn.params["axis"], [0, *stops[:-1]]
    return [take_range(v, axis, *bounds) for bounds in zip(starts, stops, strict=True)]


@rule("dynamic_slice")
def dynamic_slice(ctx: Context, eqn, values):
    """Each factor is sliced along the axes it has, at the same indices."""
    v, *starts = values
    if any(isinstance(start, LoraArray) for start in starts):
        return NotImplemented
    (w,) = bind(eqn, [v.w, *starts])
    sizes = eqn.params["slice_sizes"]
    cut = [i for i, size in enumerate(sizes) if size != v.shape[i]]

    def slice_delta(delta: Delta) -> Delta:
        delta = delta.whole(cut, v.shape)
        for i in cut:
            delta = delta.along(
                i, lambda x, k, i=i: lax.dynamic_slice_in_dim(x, starts[i], sizes[i], k)
            )
            delta = _picked(delta, i, v.shape, sizes[i])
        return delta

    return [v.map(w, slice_delta)]


@rule("concatenate")
def concatenate(ctx: Context, eqn, values):
    """A weight put together: each part's update covers a range of the whole."""
    (w,) = bind(eqn, [v.w if isinstance(v, LoraArray) else v for v in values])
    axis, start = eqn.params["dimension"], 0
    deltas: list[Delta] = []
    for v in values:
        if isinstance(v, LoraArray):
            for delta in v.deltas:
                first, last = delta.range_of(axis, v.shape[axis])
                deltas.append(delta.with_range(axis, start + first, start + last, w.shape[axis]))
        start += v.shape[axis]
    return [LoraArray(w, tuple(deltas))]


@rule("stack")
def stack(ctx: Context, eqn, values):
    """Weights along a new axis: each one's update covers one entry of it."""
    (w,) = bind(eqn, [v.w if isinstance(v, LoraArray) else v for v in values])
    axis = eqn.params["axis"] % w.ndim
    new = {i: i + (i >= axis) for i in range(w.ndim - 1)}
    deltas = [
        delta.move(new, w.ndim).with_range(axis, k, k + 1, len(values))
        for k, v in enumerate(values)
        if isinstance(v, LoraArray)
        for delta in v.deltas
    ]
    return [LoraArray(w, tuple(deltas))]


@rule("pad")
def pad(ctx: Context, eqn, values):
    """The update covers a range of the padded weight."""
    v, value = values
    if not isinstance(v, LoraArray):
        return NotImplemented
    (w,) = bind(eqn, [v.w, value])
    config = [tuple(map(int, c)) for c in eqn.params["padding_config"]]

    def pad_delta(delta: Delta) -> Delta | None:
        for axis, (low, high, interior) in enumerate(config):
            size = v.shape[axis]
            if interior:
                delta = delta.whole([axis], v.shape).expand(axis, size)
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
    """Each factor is reversed along the axes it has."""
    (v,) = values
    (w,) = bind(eqn, [v.w])

    def reverse(delta: Delta) -> Delta:
        for axis in eqn.params["dimensions"]:
            size = v.shape[axis]
            first, last = delta.range_of(axis, size)
            delta = delta.along(axis, lambda x, i: lax.rev(x, (i,)))
            delta = delta.with_range(axis, size - last, size - first, size)
        return delta

    return [v.map(w, reverse)]


@rule("tile")
def tile(ctx: Context, eqn, values):
    """Each factor is tiled along the axes it has."""
    (v,) = values
    (w,) = bind(eqn, [v.w])

    def repeat(delta: Delta) -> Delta:
        for axis, times in enumerate(eqn.params["reps"]):
            if times != 1:
                delta = delta.whole([axis], v.shape)
                delta = delta.along(
                    axis, lambda x, i, n=times: lax.concatenate([x] * n, dimension=i)
                )
        return delta

    return [v.map(w, repeat)]
