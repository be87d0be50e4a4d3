"""Parts of a weight as targets: ``c_attn/kernel[:, 0:768]``.

A range follows the path, as in NumPy: one ``start:stop`` an axis, ``:`` for a whole axis, fewer
than the axes for whole ones at the end. Rows of a table follow in two pairs of brackets:
``wte/embedding[[3, 17]]``.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

_RANGED = re.compile(r"(?P<path>.*)\[(?P<ranges>[\d\s,:-]*:[\d\s,:-]*)\]")
_ROWS = re.compile(r"(?P<path>.*)\[\[(?P<rows>\d+(, \d+)*)\]\]")
_ONE = re.compile(r"\s*(-?\d+)?\s*:\s*(-?\d+)?\s*")


class Range(NamedTuple):
    """The part ``start:stop`` of an axis."""

    axis: Any
    start: int
    stop: int


def split_range(text: str) -> tuple[str, str | None]:
    """``"c_attn/kernel[:, 0:768]"`` as ``("c_attn/kernel", ":, 0:768")``.

    >>> split_range("layers_[01]/kernel")  # a character class, as it has no colon
    ('layers_[01]/kernel', None)
    """
    match = _RANGED.fullmatch(text)
    return (match["path"], match["ranges"]) if match else (text, None)


def resolve(ranges: str, path: str, shape: Sequence[int]) -> tuple[Range, ...]:
    """The ranges of the axes that are not covered whole.

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
    """The one spelling of a part of a weight: the key of its factors.

    >>> spell("c_attn/kernel", [Range(1, 0, 768)], 2)
    'c_attn/kernel[:, 0:768]'
    """
    if not ranges:
        return path
    by_axis = {r.axis: f"{r.start}:{r.stop}" for r in ranges}
    return f"{path}[{', '.join(by_axis.get(axis, ':') for axis in range(ndim))}]"


def spell_rows(path: str, rows: Sequence[int]) -> str:
    """The key of rows that train on their own: ``wte/embedding[[3, 17]]``."""
    return f"{path}[[{', '.join(map(str, rows))}]]"


def rows_of(key: str) -> tuple[int, ...] | None:
    """The rows that an entry of an adapter is of; None if it is of no rows.

    >>> rows_of("wte/embedding[[3, 17]]")
    (3, 17)
    """
    match = _ROWS.fullmatch(key)
    return tuple(map(int, match["rows"].split(", "))) if match else None


def part_shape(shape: Sequence[int], ranges: Sequence[Range]) -> tuple[int, ...]:
    """The shape of a part of a weight."""
    sizes = {r.axis: r.stop - r.start for r in ranges}
    return tuple(sizes.get(axis, size) for axis, size in enumerate(shape))


def entry(key: str, leaves: Mapping[str, Any]) -> tuple[str, tuple[Range, ...]]:
    """The path and ranges of an adapter's entry; a path that no leaf has comes back as it is."""
    rows = _ROWS.fullmatch(key)
    if key not in leaves and rows and rows["path"] in leaves:
        return rows["path"], ()
    path, ranges = split_range(key)
    if key in leaves or ranges is None or path not in leaves:
        return key, ()
    return path, resolve(ranges, path, leaves[path].shape)


def overlap(one: Sequence[Range], other: Sequence[Range]) -> bool:
    """Whether two parts of a weight have an entry in common."""
    first = {r.axis: r for r in one}
    return all(
        r.axis not in first or max(r.start, first[r.axis].start) < min(r.stop, first[r.axis].stop)
        for r in other
    )
