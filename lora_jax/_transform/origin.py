"""``Origin``: the weight that an update belongs to, and what has become of that weight's axes."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, Self

Groups = Sequence[tuple[tuple[int, ...], tuple[int, ...]]]  # (axes before, axes after) a reshape
Mark = Literal["read", "summed", "picked"]


class Leaf(NamedTuple):
    """A weight among the arguments.

    Attributes:
        owner: the position of its LoraParams among the arguments.
        path: its path in the base.
    """

    owner: int
    path: str


class Origin(NamedTuple):
    """A leaf, and its axes behind the axes of the array ``W`` that the function made of it.

    Attributes:
        leaf: the weight that ``W`` was made of.
        axes: for each axis of ``W``, the axes of the leaf that it is made of.
        batch: the batch axes of the leaf, as far as they are known.
        read: the axes of the leaf that a lookup has read.
        summed: the axes of the leaf that were summed over.
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
        """Return the origin of a weight as it enters the function."""
        return cls(leaf, tuple((i,) for i in range(ndim)), frozenset(batch))

    def behind(self, axes: Iterable[int]) -> frozenset[int]:
        """Return the axes of the leaf that these axes of ``W`` are made of."""
        return frozenset(k for i in axes for k in self.axes[i])

    def marked(self, mark: Mark, axes: Iterable[int]) -> Self:
        """Add the axes of the leaf behind ``axes`` to those that are ``mark``."""
        return self._replace(**{mark: getattr(self, mark) | self.behind(axes)})

    def after(self, made_of: Mapping[int, Iterable[int]], ndim: int) -> "Origin":
        """Follow ``W`` to an array of ``ndim`` axes, whose axis ``j`` is made of ``made_of[j]``."""
        axes = (tuple(k for i in made_of.get(j, ()) for k in self.axes[i]) for j in range(ndim))
        return self._replace(axes=tuple(map(_unique, axes)))

    def regrouped(self, groups: Groups, ndim: int) -> "Origin":
        """Follow ``W`` through a reshape that pairs axes as ``axis_groups`` does."""
        return self.after({j: old for old, new in groups for j in new}, ndim)


def _unique(axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(axes))
