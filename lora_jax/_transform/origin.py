"""``Origin``: which weight an update is of, and what has become of that weight's axes since."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class Leaf(NamedTuple):
    """A weight among the arguments.

    Attributes:
        owner: which of the LoraParams it belongs to.
        path: where in its base.
    """

    owner: int
    path: str


class Origin(NamedTuple):
    """What a delta is of, and how it came to be what it is.

    Attributes:
        leaf: the weight it belongs to.
        axes: for each axis of ``W``, the axes of the leaf that it is made of.
        batch: the batch axes of the leaf, as far as they are known.
        read: the axes of the leaf that a lookup has read already.
        summed: the axes of the leaf that are summed over already.
        picked: the axes of the leaf of which one entry was picked.
    """

    leaf: Leaf
    axes: tuple[tuple[int, ...], ...]
    batch: frozenset[int] = frozenset()
    read: frozenset[int] = frozenset()
    summed: frozenset[int] = frozenset()
    picked: frozenset[int] = frozenset()

    @classmethod
    def of(cls, leaf: Leaf, ndim: int, batch: Iterable[int] = ()) -> "Origin":
        """The past of a weight as it enters the function."""
        return cls(leaf, tuple((i,) for i in range(ndim)), frozenset(batch))

    def behind(self, axes: Iterable[int]) -> frozenset[int]:
        """The axes of the leaf that these axes of ``W`` are made of."""
        return frozenset(k for i in axes for k in self.axes[i])

    def after(self, made_of: Mapping[int, Iterable[int]], ndim: int) -> "Origin":
        """The past of an array of ``ndim`` axes, of which axis ``j`` is made of ``made_of[j]``."""
        axes = (tuple(k for i in made_of.get(j, ()) for k in self.axes[i]) for j in range(ndim))
        return self._replace(axes=tuple(map(_unique, axes)))

    def regrouped(self, groups: Any, ndim: int) -> "Origin":
        """The past after a reshape that pairs axes so: see ``axis_groups``."""
        return self.after({j: old for old, new in groups for j in new}, ndim)


def _unique(axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(axes))
