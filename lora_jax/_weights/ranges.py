"""Parse and compare parts of weights: ``c_attn/kernel[:, 0:768]``.

A range follows the path, as in NumPy: one ``start:stop`` per axis, ``:`` for an entire axis.
Trailing axes that are not given are entire.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

_RANGED = re.compile(r"(?P<path>.*)\[(?P<ranges>[\d\s,:-]*:[\d\s,:-]*)\]")
_ANY = 2**62  # the size of an axis that is not known
_ONE = re.compile(r"\s*(-?\d+)?\s*:\s*(-?\d+)?\s*")


class Range(NamedTuple):
    """The part ``start:stop`` of an axis."""

    axis: Any
    start: int
    stop: int


class Part(NamedTuple):
    """A leaf, or a range of one: where an entry of an adapter belongs."""

    path: str
    ranges: tuple[Range, ...] = ()

    def slices(self, ndim: int) -> tuple[slice, ...]:
        """Return the index that selects the part from its leaf.

        >>> Part("c_attn/kernel", (Range(1, 0, 768),)).slices(2)
        (slice(None, None, None), slice(0, 768, None))
        """
        return index_of(self.ranges, ndim)

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the part of a leaf of this shape."""
        return part_shape(shape, self.ranges)


def split_range(text: str) -> tuple[str, str | None]:
    """Split ``"c_attn/kernel[:, 0:768]"`` into ``("c_attn/kernel", ":, 0:768")``.

    >>> split_range("layers_[01]/kernel")  # a character class, as it has no colon
    ('layers_[01]/kernel', None)
    """
    match = _RANGED.fullmatch(text)
    return (match["path"], match["ranges"]) if match else (text, None)


def resolve(ranges: str, path: str, shape: Sequence[int]) -> tuple[Range, ...]:
    """Parse the ranges, without those that cover an entire axis.

    >>> resolve(":, 0:768", "c_attn/kernel", (768, 2304))
    (Range(axis=1, start=0, stop=768),)
    """
    name, parts = f"{path}[{ranges}]", ranges.split(",")
    if len(parts) > len(shape):
        raise ValueError(f"{name!r}: {len(parts)} ranges for a weight of shape {tuple(shape)}")
    found = []
    for axis, (part, size) in enumerate(zip(parts, shape, strict=False)):
        match = _ONE.fullmatch(part)
        if not match:
            raise ValueError(f"{name!r}: {part.strip()!r} is no range such as '0:768' or ':'")
        start, stop = (
            int(m) if m else default for m, default in zip(match.groups(), (0, size), strict=True)
        )
        start, stop = (k + size if k < 0 else k for k in (start, stop))
        if not 0 <= start < stop <= size:
            raise ValueError(
                f"{name!r}: {part.strip()!r} is no part of axis {axis}, of size {size}, of a "
                f"weight of shape {tuple(shape)}"
            )
        if (start, stop) != (0, size):
            found.append(Range(axis, start, stop))
    return tuple(found)


def spell(path: str, ranges: Sequence[Range], ndim: int) -> str:
    """Spell a part of a weight in its one way: the key of its factors.

    >>> spell("c_attn/kernel", [Range(1, 0, 768)], 2)
    'c_attn/kernel[:, 0:768]'
    """
    if not ranges:
        return path
    by_axis = {r.axis: f"{r.start}:{r.stop}" for r in ranges}
    return f"{path}[{', '.join(by_axis.get(axis, ':') for axis in range(ndim))}]"


def part_shape(shape: Sequence[int], ranges: Sequence[Range]) -> tuple[int, ...]:
    """Return the shape of a part of a weight."""
    sizes = {r.axis: r.stop - r.start for r in ranges}
    return tuple(sizes.get(axis, size) for axis, size in enumerate(shape))


def index_of(ranges: Sequence[Range], ndim: int) -> tuple[slice, ...]:
    """Return the index that selects a part from an array of ``ndim`` axes."""
    bounds = {r.axis: slice(r.start, r.stop) for r in ranges}
    return tuple(bounds.get(axis, slice(None)) for axis in range(ndim))


def part_of(key: str, leaves: Mapping[str, Any] | None) -> Part:
    """Parse the key of an adapter's entry.

    Args:
        key: a path, or a path with ranges.
        leaves: the base's leaves by path; a key whose path is not among them is a path itself.
            None parses by the spelling alone.
    """
    path, ranges = split_range(key)
    if ranges is None or (leaves is not None and (key in leaves or path not in leaves)):
        return Part(key)
    shape = [_ANY] * (1 + ranges.count(",")) if leaves is None else leaves[path].shape
    return Part(path, resolve(ranges, path, shape))


def overlap(one: Sequence[Range], other: Sequence[Range]) -> bool:
    """Return whether two parts of a weight have an entry in common."""
    first = {r.axis: r for r in one}
    return all(
        r.axis not in first or max(r.start, first[r.axis].start) < min(r.stop, first[r.axis].stop)
        for r in other
    )
