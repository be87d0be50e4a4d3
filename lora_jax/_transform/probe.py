"""``Follower``: what goes with a weight through the function; ``Probe``: one without arrays.

A follower knows which weight it belongs to, what has become of that weight's axes, and which part
of the array ``W``, that the function made of the weight, it covers. A ``Probe`` shows what a
function does with a weight; a ``Delta`` is an update of one. Rules call the same methods of both.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Self

import jax

from lora_jax._transform.origin import Groups, Leaf, Mark, Origin
from lora_jax._weights.ranges import Range


@dataclasses.dataclass(frozen=True, eq=False)
class Follower:
    """A place in ``W``.

    Attributes:
        origin: the weight, and what has become of its axes.
        ranges: the parts of ``W``'s axes it covers; other axes are covered entirely.
    """

    origin: Origin
    ranges: tuple[Range, ...]

    @property
    def leaf(self) -> Leaf:
        """The weight it belongs to."""
        return self.origin.leaf

    def marked(self, mark: Mark, axes: Iterable[int]) -> Self:
        """Note that these axes of ``W`` were read, summed or picked from."""
        return dataclasses.replace(self, origin=self.origin.marked(mark, axes))

    def range_of(self, axis: Any, size: int) -> tuple[int, int]:
        """Return the start and the stop of the part of an axis that it covers."""
        return next(((r.start, r.stop) for r in self.ranges if r.axis == axis), (0, size))

    def with_range(self, axis: int, start: int, stop: int, size: int) -> Self:
        """Cover ``start:stop`` of an axis of ``size``."""
        ranges = tuple(r for r in self.ranges if r.axis != axis)
        if (start, stop) != (0, size):
            ranges += (Range(int(axis), int(start), int(stop)),)
        return dataclasses.replace(self, ranges=ranges)

    def padded(self, axes: Iterable[int], shape: Sequence[int]) -> Self:
        """Cover all of these axes: the update is zero where there was none."""
        new = self
        for r in self.ranges:
            if r.axis in axes:
                size = shape[r.axis]
                new = new._pad(r, size).with_range(r.axis, 0, size, size)
        return new

    def _pad(self, r: Range, size: int) -> Self:
        """Pad the arrays, if there are any, from a range to an axis of ``size``."""
        return self

    def renamed(self, new: Mapping[Any, Any]) -> Self:
        """Call axis ``i`` of ``W`` ``new[i]``."""
        ranges = tuple(r._replace(axis=new[r.axis]) for r in self.ranges)
        return dataclasses.replace(self, ranges=ranges)

    def moved(self, new: Mapping[int, int], ndim: int) -> Self:
        """Follow ``W`` to an array of ``ndim`` axes: axis ``i`` becomes axis ``new[i]``."""
        origin = self.origin.after({axis: (old,) for old, axis in new.items()}, ndim)
        return dataclasses.replace(self.renamed(new), origin=origin)

    def stacked(self) -> Self:
        """Follow ``W`` to the stack of it over the steps of a loop."""
        ndim = len(self.origin.axes)
        return self.moved({i: i + 1 for i in range(ndim)}, ndim + 1)

    def _after_reshape(self, groups: Groups, ndim: int) -> Self:
        """Follow ``W`` through a reshape; ranges are of axes that it keeps."""
        kept = {old[0]: new[0] for old, new in groups if len(old) == len(new) == 1}
        ranges = tuple(r._replace(axis=kept[r.axis]) for r in self.ranges)
        return dataclasses.replace(self, origin=self.origin.regrouped(groups, ndim), ranges=ranges)


@partial(jax.tree_util.register_dataclass, data_fields=(), meta_fields=("origin", "ranges"))
@dataclasses.dataclass(frozen=True, eq=False)
class Probe(Follower):
    """Stand where an update of the weight would go, and show what the function does with it."""

    parts = ()

    @classmethod
    def of(cls, leaf: Leaf, ndim: int) -> "Probe":
        """Return the probe of a weight of ``ndim`` axes as it enters the function."""
        return cls(Origin.of(leaf, ndim), ())

    @property
    def is_read(self) -> bool:
        """Return whether some of the weight's axes were looked up or summed over."""
        return bool(self.origin.read | self.origin.summed)

    @property
    def is_lookup(self) -> bool:
        """Return whether it was looked up, and one axis at most has axes of the weight left."""
        return bool(self.origin.read) and self._left(self.origin.read) <= 1

    @property
    def is_vector(self) -> bool:
        """Return whether it is one row of a table, a sum of rows, or the vector of one layer."""
        return bool(self.axes_read) and self._left(self.axes_read) <= 1

    def _left(self, gone: frozenset[int]) -> int:
        return sum(not gone.issuperset(group) for group in self.origin.axes)

    @property
    def axes_read(self) -> frozenset[int]:
        """The axes of the leaf that were read; those that were picked from if no other was."""
        return self.origin.read | self.origin.summed or self.origin.picked

    def regrouped(self, groups: Groups, old: Sequence[int], new: Sequence[int]) -> "Probe | None":
        """Follow ``W`` through a reshape; None if it merges axes: their roles may differ."""
        if any(len(olds) > 1 for olds, _ in groups):
            return None
        split = [olds[0] for olds, news in groups if len(news) > 1]
        return self.padded(split, old)._after_reshape(groups, len(new))

    def merged(self, groups: Groups, ndim: int) -> "Probe":
        """Follow ``W`` through a reshape that merges axes."""
        return Probe(self.origin.regrouped(groups, ndim), ())

    def summed(self, axes: Sequence[int], shape: Sequence[int]) -> "Probe":
        """Sum over axes, which ``W`` has still."""
        return self.padded(axes, shape)

    def _unchanged(self, *_: Any) -> "Probe":
        """Return itself: there are no arrays to change."""
        return self

    def stacked(self) -> "Probe":
        """Follow ``W`` to the stack of it over a loop's steps; a row from each step is a lookup."""
        origin = self.origin
        if self.is_vector and not self.is_read:
            origin = origin._replace(read=origin.picked, picked=frozenset())
        return super(Probe, dataclasses.replace(self, origin=origin)).stacked()

    map = along = expanded = scaled = times = picked = unscaled = leading = at_step = _unchanged
