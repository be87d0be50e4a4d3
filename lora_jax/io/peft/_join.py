"""Join factors: those of parts of a weight, and those of layers that are one leaf here."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax._adapter.factors import Factors
from lora_jax._weights.axes import role_axes, role_shape
from lora_jax._weights.ranges import Range, index_of, spell
from lora_jax.io.peft._axes import Part


def joined(parts: Sequence[Part], norm: np.ndarray) -> Part:
    """Join parts of one weight into factors of all of it, whose rank is the sum of theirs.

    The columns of ``a`` stand beside each other, and ``b`` is zero where a part is not.

    Args:
        parts: disjoint parts.
        norm: the norms of the weight's columns, ``[*out]``: the magnitudes where no part is.

    Raises:
        ValueError: a part of the inputs has magnitudes.
    """
    first, letters = parts[0], parts[0].letters
    if len(parts) == 1 and not first.ranges:
        return first
    scale = _common_scale(parts)
    padded = [_padded(part) for part in parts]
    a = np.concatenate([part.a for part in padded], -1)
    b = np.concatenate([part.b * _ratio(part.scale, scale) for part in padded], letters.count("b"))
    magnitude = None
    if any(part.magnitude is not None for part in parts):
        magnitude = norm.copy()
        for part in parts:
            if any(letters[r.axis] != "o" for r in part.ranges):
                raise ValueError(
                    f"{part.key!r} has DoRA magnitudes and is a part of its inputs: PEFT has one "
                    "magnitude a column of the entire weight"
                )
            if part.magnitude is not None:
                magnitude[_index(part.ranges, letters, "o")] = part.magnitude
    return replace(first, a=a, b=b, scale=scale, magnitude=magnitude, ranges=())


def _common_scale(parts: Sequence[Part]) -> np.float32:
    """Choose a scale that the others can be a multiple of."""
    return next((part.scale for part in parts if part.scale), parts[0].scale)


def _ratio(scale: np.float32, common: np.float32) -> np.float32:
    """Return what factors are multiplied by, so that the common scale does for them."""
    return np.float32(1) if scale == common else scale / common


def _index(ranges: Sequence[Range], letters: str, role: str) -> tuple[slice, ...]:
    index = index_of(ranges, len(letters))
    return tuple(index[axis] for axis in role_axes(letters, role))


def _padded(part: Part) -> Part:
    """Pad factors with zeros to the full axes of the weight."""
    batch, inputs, outputs = (role_shape(part.letters, part.place.shape, role) for role in "bio")
    of_batch, of_in, of_out = (_index(part.ranges, part.letters, role) for role in "bio")
    a = np.zeros([*batch, *inputs, part.rank], part.a.dtype)
    b = np.zeros([*batch, part.rank, *outputs], part.b.dtype)
    a[(*of_batch, *of_in)] = part.a
    b[(*of_batch, slice(None), *of_out)] = part.b
    return replace(part, a=a, b=b)


def stacked(
    path: str, parts: Sequence[Part], layout: str, shape: tuple[int, ...]
) -> dict[str, Factors]:
    """Join the factors of the modules that are a leaf, by the keys of what they are of.

    Layers are stacked. Modules that share a factor are one entry; others have one each.

    Raises:
        ValueError: a layer lacks an expert that others have.
    """
    columns: dict[tuple[Range, ...], list[Part]] = {}
    for part in parts:
        columns.setdefault(_column(part, layout, shape), []).append(part)
    found = {
        ranges: {
            layers: _with_axes(f, own[0], layout) for layers, f in _layers(path, own, layout, shape)
        }
        for ranges, own in sorted(columns.items())
    }
    runs = dict.fromkeys(layers for own in found.values() for layers in own)
    entries: dict[str, Factors] = {}
    for layers in runs:
        same = {ranges: own[layers] for ranges, own in found.items() if layers in own}
        for ranges, f in _shared(same, layout, shape).items():
            entries[spell(path, (*layers, *ranges), len(shape))] = f
    return entries


def _column(part: Part, layout: str, shape: tuple[int, ...]) -> tuple[Range, ...]:
    """Return the part of a leaf's inputs and outputs that a module is of."""
    found = []
    for axis, at in enumerate(part.place.at):
        if layout[axis] == "b":
            continue
        start, stop = (at, at + 1) if isinstance(at, int) else at.indices(shape[axis])[:2]
        found += [Range(axis, start, stop)] if (start, stop) != (0, shape[axis]) else []
    return tuple(found)


def _layers(
    path: str, parts: Sequence[Part], layout: str, shape: tuple[int, ...]
) -> Iterator[tuple[tuple[Range, ...], Factors]]:
    """Stack the factors of layers that follow each other, with the range of these."""
    numbered = [k for k, axis in enumerate(parts[0].place.axes) if layout[axis] == "b"]
    axes = [parts[0].place.axes[k] for k in numbered]
    if not axes:
        yield (), _factors(parts, (), layout)
        return
    sizes = tuple(shape[axis] for axis in axes)
    by_number = {
        int(np.ravel_multi_index([part.place.index[k] for k in numbered], sizes)): part
        for part in parts
    }
    count = int(np.prod(sizes))
    if len(axes) > 1 and len(by_number) < count:
        raise ValueError(
            f"{path!r}: only {len(by_number)} of {count} layers and experts are adapted"
        )
    numbers = sorted(by_number)
    cuts = [i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1] + 1]
    for run in np.split(np.array(numbers), cuts):
        start, stop = int(run[0]), int(run[-1]) + 1
        is_full = (start, stop) == (0, count)
        ranges = () if is_full else (Range(axes[0], start, stop),)
        batch = sizes if is_full else (stop - start,)
        yield ranges, _factors([by_number[int(k)] for k in run], batch, layout)


def _factors(parts: Sequence[Part], batch: tuple[int, ...], layout: str) -> Factors:
    """Stack factors along ``batch``, with one rank and one scale."""
    parts = alike(parts, scale := _common_scale(parts))

    def together(arrays):
        x = np.stack(arrays)
        return x.reshape(*batch, *x.shape[1:])

    a, b = together([part.a for part in parts]), together([part.b for part in parts])
    has_magnitude = parts[0].magnitude is not None
    magnitude = together([part.magnitude for part in parts]) if has_magnitude else None
    return Factors(a, b, jnp.asarray(scale), layout, magnitude)


def _with_axes(f: Factors, part: Part, layout: str) -> Factors:
    """Give factors the axes of inputs and outputs that have one module for each entry."""
    batch, a, b, magnitude = layout.count("b"), f.a, f.b, f.magnitude
    for axis in part.place.axes:
        if layout[axis] == "i":
            a = np.expand_dims(a, batch + role_axes(layout, "i").index(axis))
        elif layout[axis] == "o":
            k = batch + role_axes(layout, "o").index(axis)
            b = np.expand_dims(b, k + 1)
            magnitude = None if magnitude is None else np.expand_dims(magnitude, k)
    return replace(f, a=a, b=b, magnitude=magnitude)


def _shared(
    found: Mapping[tuple[Range, ...], Factors], layout: str, shape: tuple[int, ...]
) -> dict[tuple[Range, ...], Factors]:
    """Make one entry of parts that are all of an axis, and have the other factor in common."""
    arrays = {ranges: _on_device(f) for ranges, f in found.items()}
    axes = {r.axis for ranges in found for r in ranges}
    if len(axes) != 1 or any(len(ranges) != 1 for ranges in found):
        return arrays
    (axis,) = axes
    parts = sorted(found.items(), key=lambda item: item[0][0].start)
    ends = [0, *(ranges[0].stop for ranges, _ in parts)]
    covers = ends[-1] == shape[axis] and ends[:-1] == [ranges[0].start for ranges, _ in parts]
    fs = [f for _, f in parts]
    reads = layout[axis] == "i"
    common = ["b" if reads else "a", "scale"] + ["magnitude"] * reads
    is_same = all(_equal(getattr(f, x), getattr(fs[0], x)) for f in fs for x in common)
    if not (covers and is_same):
        return arrays
    k = layout.count("b") + role_axes(layout, layout[axis]).index(axis)
    if reads:
        return {(): _on_device(replace(fs[0], a=np.concatenate([f.a for f in fs], k)))}
    b = np.concatenate([f.b for f in fs], k + 1)
    norms = [f.magnitude for f in fs]
    magnitude = None if norms[0] is None else np.concatenate(norms, k)
    return {(): _on_device(replace(fs[0], b=b, magnitude=magnitude))}


def _equal(one: Any, two: Any) -> bool:
    return (one is None) == (two is None) and (one is None or np.array_equal(one, two))


def _on_device(f: Factors) -> Factors:
    magnitude = None if f.magnitude is None else jnp.asarray(f.magnitude)
    return replace(f, a=jnp.asarray(f.a), b=jnp.asarray(f.b), magnitude=magnitude)


def alike(parts: Sequence[Part], scale: np.float32) -> list[Part]:
    """Give factors this scale, and the largest rank of theirs, by zeros."""
    rank = max(part.rank for part in parts)
    found = []
    for part in parts:
        more, axis = rank - part.rank, part.letters.count("b")
        a = np.pad(part.a, [(0, 0)] * (part.a.ndim - 1) + [(0, more)])
        width = [(0, more) if k == axis else (0, 0) for k in range(part.b.ndim)]
        b = np.pad(part.b * _ratio(part.scale, scale), width)
        found.append(replace(part, a=a, b=b, scale=scale))
    return found
