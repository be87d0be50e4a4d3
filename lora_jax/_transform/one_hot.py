"""``OneHot``: the factor ``a`` of trained table rows, which picks them and is not built.

A lookup compares its indices with the rows' numbers. A product picks entries of what it meets, or
adds entries to the base's product in place: on an H200 the loss of 8,192 tokens over 128,512 words
took 16.0 ms with 128 trained rows, 15.8 without, and 20.3 by a matrix of ones, which also took 2 GB
of memory. Whatever else happens to it, the matrix is built.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax import _jax
from lora_jax._adapter.factors import Rows
from lora_jax._transform.labelled import Axis, Label, Labelled, Labels

SMALL = 1024  # entries of a matrix that a program may hold as a constant


@partial(
    jax.tree_util.register_dataclass,
    data_fields=(),
    meta_fields=("labels", "ids", "size", "dtype"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class OneHot(Labelled):
    """A matrix that is 1 where the entry of the axis of ``W`` is ``ids[k]``, and k that of RANK.

    Attributes:
        labels: RANK, and an axis of ``W``.
        ids: entries of that axis, ascending; one outside of it picks nothing.
        size: the size of that axis.
        dtype: the dtype of the ones.
    """

    array: ClassVar[Any] = property(lambda self: self._built())  # pyright: ignore

    labels: Labels
    ids: tuple[int, ...]
    size: int
    dtype: Any

    @classmethod
    def of(cls, rows: Rows, axis: int) -> "OneHot":
        """Return ``a`` of some rows of a table along ``axis``."""
        return cls((axis, Axis.RANK), rows.ids, rows.vocabulary, rows.b.dtype)

    def _built(self) -> jax.Array:
        """Build the matrix: by the program, as a large constant does not belong into one."""
        rank = self.axis(Axis.RANK)
        ids = self._ids(np.int32, rank, 1 - rank)
        first, last = self.ids[0], self.ids[-1]
        if self._is_small(last - first + 1):  # the part with ones
            near = np.expand_dims(np.arange(first, last + 1), rank) == ids
            config = [(0, 0, 0), (0, 0, 0)]
            config[1 - rank] = (first, self.size - 1 - last, 0)  # negative ones cut
            return lax.pad(near.astype(self.dtype), np.zeros((), self.dtype), config)
        numbers = lax.broadcasted_iota(np.int32, tuple(self.sizes.values()), 1 - rank)
        return lax.eq(numbers, ids).astype(self.dtype)

    def _is_small(self, size: int) -> bool:
        return size * len(self.ids) <= SMALL

    def _ids(self, dtype: Any, before: int, after: int = 0) -> np.ndarray:
        return np.array(self.ids, dtype).reshape([1] * before + [-1] + [1] * after)

    @property
    def sizes(self) -> dict[Label, int]:
        """The size of each axis, by label."""
        return {x: len(self.ids) if x == Axis.RANK else self.size for x in self.labels}

    def astype(self, dtype: Any) -> "OneHot":
        """Cast the ones."""
        return dataclasses.replace(self, dtype=jnp.dtype(dtype))

    def relabel(self, new: Mapping[Any, Any]) -> "OneHot":
        """Rename the axes."""
        return dataclasses.replace(self, labels=self.relabelled(new))

    def cut(self, label: Label, start: int, stop: int, stride: int = 1) -> Labelled:
        """Take a range of the axis of ``W``: its entries get other numbers."""
        if label not in self.labels or label == Axis.RANK or stride != 1:
            return super().cut(label, start, stop, stride)
        return self._moved(-start, stop - start)

    def padded(self, label: Label, start: int, size: int) -> Labelled:
        """Place the axis of ``W`` in a longer one."""
        if label not in self.labels or label == Axis.RANK:
            return super().padded(label, start, size)
        return self._moved(start, size)

    def _moved(self, by: int, size: int) -> "OneHot":
        return dataclasses.replace(self, ids=tuple(i + by for i in self.ids), size=size)

    def cut_at(self, label: Label, start: jax.Array, size: int) -> Labelled:
        """Take ``size`` entries of the axis of ``W``: few are compared with the rows' numbers."""
        mine = label in self.labels and label != Axis.RANK
        if not (mine and self._is_small(size) and self._fit(start.dtype, size)):
            return super().cut_at(label, start, size)
        rank = self.axis(Axis.RANK)
        starts = self._ids(start.dtype, rank, 1 - rank) - np.expand_dims(np.arange(size), rank)
        first, last = self._bounds(start.dtype, self.size - size)
        start = lax.clamp(first, start, last)
        found = lax.eq(lax.expand_dims(start, (0, 1)), starts.astype(start.dtype))
        return Labelled(found.astype(self.dtype), self.labels)

    def _fit(self, dtype: Any, below: int = 0) -> bool:
        """Return whether a dtype holds the rows' numbers, and those less ``below``."""
        limits = jnp.iinfo(dtype)
        return limits.min <= self.ids[0] - below and self.ids[-1] <= limits.max

    @staticmethod
    def _bounds(dtype: Any, last: int) -> np.ndarray:
        return np.array([0, min(last, jnp.iinfo(dtype).max)], dtype)

    @property
    def _is_partial(self) -> bool:
        """Return whether some rows are outside of the axis."""
        return self.ids[0] < 0 or self.ids[-1] >= self.size

    def looked_up(self, indices: jax.Array, mode: Any, labels: Labels) -> Labelled | None:
        """Return its rows at ``indices``, ``[*lookup, 1]``; None if this has no short form.

        No row beyond the table has a 1. With ``mode`` CLIP, it is the first or the last.
        """
        modes = lax.GatherScatterMode
        mode = modes.from_any(mode)
        exact = mode != modes.FILL_OR_DROP or not self._is_partial
        if mode == modes.ONE_HOT or not (exact and self._fit(indices.dtype)):
            return None
        if mode == modes.CLIP and (self.ids[0] <= 0 or self.ids[-1] >= self.size - 1):
            first, last = self._bounds(indices.dtype, self.size - 1)
            indices = lax.clamp(first, indices, last)
        found = lax.eq(indices, self._ids(indices.dtype, indices.ndim - 1))
        return Labelled(found.astype(self.dtype), (*labels, Axis.RANK))  # [*lookup, rank]

    def met_by(self, x: Labelled, out: Sequence[Label], dtype: Any) -> Labelled | None:
        """Multiply ``x`` by it, exactly: pick entries of ``x``, or place them among zeros.

        None if that is not what the product does, or on a mesh of Explicit axes.
        """
        old, new = self._turns(x, out)
        if new is None:
            return None
        if alone := [label for label in x.labels if label not in (old, *out)]:
            x = x.sum(alone)
        f = self._placed if old == Axis.RANK else self._picked
        array = f(x.array, x.axis(old)).astype(dtype)
        y = Labelled(array, tuple(new if label == old else label for label in x.labels))
        return Labelled(y.aligned(out), tuple(out))

    def added_to(self, result: Labelled, x: Labelled) -> jax.Array | None:
        """Add its product with ``x``, in place if it can; None where ``met_by`` gives None."""
        old, new = self._turns(x, result.labels)
        if old != Axis.RANK or {*x.labels, new} != {*result.labels, old}:
            return None
        if _jax.explicit_spec(result.array) is not None:
            return None
        order = [old if label == new else label for label in result.labels]
        part = x.aligned(order).astype(result.array.dtype)
        return self._placed(part, result.axis(new), result.array)

    def _turns(self, x: Labelled, out: Sequence[Label]) -> tuple[Label, Label]:
        """Return the axis of ``x`` that a product sums over, and the one in its place; or None."""
        old = [label for label in self.labels if label in x.labels and label not in out]
        new = [label for label in self.labels if label in out and label not in x.labels]
        if (
            self._is_partial
            or len(old) != 1
            or len(new) != 1
            or _jax.explicit_spec(x.array) is not None
        ):
            return None, None
        return old[0], new[0]

    def _picked(self, x: jax.Array, axis: int) -> jax.Array:
        """Pick the entries of an axis."""
        others = tuple(i for i in range(x.ndim) if i != axis)
        return lax.gather(
            x,
            self._ids(np.int32, 0, 1),
            lax.GatherDimensionNumbers(others, (axis,), (axis,)),
            slice_sizes=[1 if i == axis else size for i, size in enumerate(x.shape)],
            unique_indices=True,
            indices_are_sorted=True,
            mode="promise_in_bounds",
        )

    def _placed(self, x: jax.Array, axis: int, total: jax.Array | None = None) -> jax.Array:
        """Add ``x`` to the entries of an axis of ``total``, or of zeros."""
        if total is None:
            total = jnp.zeros((*x.shape[:axis], self.size, *x.shape[axis + 1 :]), x.dtype)
        others = tuple(i for i in range(x.ndim) if i != axis)
        return lax.scatter_add(
            total,
            self._ids(np.int32, 0, 1),
            x,
            lax.ScatterDimensionNumbers(others, (axis,), (axis,)),
            unique_indices=True,
            indices_are_sorted=True,
            mode="promise_in_bounds",
        )
