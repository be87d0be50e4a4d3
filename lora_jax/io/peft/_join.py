"""Join factors: those of parts of a weight, and those of layers that are one leaf here."""

from collections.abc import Iterator, Sequence
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


def stacked(path: str, parts: Sequence[Part], leaf: Any) -> Iterator[tuple[str, Factors]]:
    """Stack the factors of one module, or those of the layers that are adapted, with their keys."""
    parts = sorted(parts, key=lambda part: part.place.index)
    letters, outer = parts[0].letters, len(parts[0].place.index)
    if not outer:
        yield path, _factors(parts, (), letters)
        return
    sizes = leaf.shape[:outer]
    by_number = {int(np.ravel_multi_index(part.place.index, sizes)): part for part in parts}
    count = int(np.prod(sizes))
    if outer > 1 and len(by_number) < count:
        raise ValueError(
            f"{path!r}: only {len(by_number)} of {count} layers and experts are adapted"
        )
    numbers = sorted(by_number)
    cuts = [i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1] + 1]
    for run in np.split(np.array(numbers), cuts):
        start, stop = int(run[0]), int(run[-1]) + 1
        is_full = (start, stop) == (0, count)
        ranges = () if is_full else (Range(0, start, stop),)
        batch = sizes if is_full else (stop - start,)
        f = _factors([by_number[int(k)] for k in run], batch, "b" * outer + letters)
        yield spell(path, ranges, len(leaf.shape)), f


def _factors(parts: Sequence[Part], batch: tuple[int, ...], layout: str) -> Factors:
    """Stack factors along ``batch``, with one rank and one scale."""
    parts = alike(parts, scale := _common_scale(parts))

    def together(arrays):
        x = np.stack(arrays)
        return jnp.asarray(x.reshape(*batch, *x.shape[1:]))

    a, b = together([part.a for part in parts]), together([part.b for part in parts])
    has_magnitude = parts[0].magnitude is not None
    magnitude = together([part.magnitude for part in parts]) if has_magnitude else None
    return Factors(a, b, jnp.asarray(scale), layout, magnitude)


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
