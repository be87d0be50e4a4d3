"""``gather``: embedding lookups, choices of experts, permutations."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax import lax

from lora_jax._transform.context import Context
from lora_jax._transform.delta import AnyDelta
from lora_jax._transform.labelled import Labelled
from lora_jax._transform.lazy import bind, force
from lora_jax._transform.lora_array import LoraArray
from lora_jax._transform.one_hot import OneHot
from lora_jax._transform.rule import rule


@rule("gather")
def gather(ctx: Context, eqn, values):
    """Look up in each factor along the axes it has: table rows are ``a``'s rows times ``b``.

    A lookup beyond the table is filled as without an update, whose entry there is zero.
    """
    v, indices = values
    if isinstance(indices, LoraArray):
        return NotImplemented
    fill = eqn.params["fill_value"] or 0  # None: not a number
    if any(delta.gain is not None for delta in v.updates) and fill == fill != 0:
        return NotImplemented  # the filled entries have no gain
    (w,) = bind(eqn, [v.w, indices])
    if not v.deltas:
        return [force(w)]  # rows of a quantized table are activations
    numbers = _Numbers.of(eqn.params, v.shape, w.ndim)
    return [v.map(w, lambda delta: _gather_delta(eqn.params, numbers, indices, delta))]


class _Numbers(NamedTuple):
    """The axes of a gather from ``W``."""

    shape: tuple[int, ...]  # of W
    ndim: int  # of the result
    sizes: tuple[int, ...]  # of a slice of W
    indexed: tuple[int, ...]  # the axes of W that the entries of an index vector go along
    batching: dict[int, int]  # axes of W that go along with an axis of the indices
    collapsed: tuple[int, ...]  # axes of W of which one entry is taken
    offset: dict[int, int]  # the other axes of W, and those of the result
    lookup: list[int]  # the axes of the result that the indices have

    @classmethod
    def of(cls, params: Any, shape: Sequence[int], ndim: int) -> "_Numbers":
        numbers = lax.GatherDimensionNumbers(
            **{
                name: tuple(map(int, axes))
                for name, axes in params["dimension_numbers"]._asdict().items()
            }
        )
        dims = numbers.operand_batching_dims, numbers.start_indices_batching_dims
        batching = dict(zip(*dims, strict=True))
        gone = {*numbers.collapsed_slice_dims, *batching}
        left = (i for i in range(len(shape)) if i not in gone)
        return cls(
            shape=tuple(shape),
            ndim=ndim,
            sizes=params["slice_sizes"],
            indexed=numbers.start_index_map,
            batching=batching,
            collapsed=numbers.collapsed_slice_dims,
            offset=dict(zip(left, numbers.offset_dims, strict=True)),
            lookup=[i for i in range(ndim) if i not in numbers.offset_dims],
        )

    @property
    def gone(self) -> set[int]:
        """The axes of ``W`` that the result has not, as axes of slices."""
        return {*self.collapsed, *self.batching}

    @property
    def cut(self) -> list[int]:
        """The axes of ``W`` along which a slice is a part."""
        return [i for i, size in enumerate(self.sizes) if size != self.shape[i]]


def _gather_delta(params: Any, numbers: _Numbers, indices: jax.Array, delta: AnyDelta) -> AnyDelta:
    delta = delta.padded({*numbers.cut, *numbers.gone, *numbers.indexed}, numbers.shape)
    if lax.GatherScatterMode.from_any(params["mode"]) == lax.GatherScatterMode.FILL_OR_DROP:
        for i in numbers.indexed:  # a factor must have the axis, to be zero beyond it
            delta = delta.expanded(i, numbers.shape[i])
    looked = [i for i in numbers.indexed if numbers.sizes[i] == 1]  # collapsed or not
    made_of = {axis: [i] for i, axis in numbers.offset.items()}
    for k, axis in enumerate(numbers.lookup):
        made_of[axis] = [i for i, index in numbers.batching.items() if index == k] or looked
    is_pick = len(numbers.lookup) == len(numbers.batching)
    origin = delta.origin.marked("picked" if is_pick else "read", looked)
    return dataclasses.replace(
        delta.map(lambda x: _gather_factor(params, numbers, indices, x)),
        origin=origin.after(made_of, numbers.ndim),
        ranges=tuple(r._replace(axis=numbers.offset[r.axis]) for r in delta.ranges),
    )


def _gather_factor(params: Any, numbers: _Numbers, indices: jax.Array, x: Labelled) -> Labelled:
    """Gather from a factor along the axes of ``W`` that it has: ``[*lookup, *left, rank]``."""
    indexed, batching, offset = numbers.indexed, numbers.batching, numbers.offset
    lookup, cut, gone = numbers.lookup, numbers.cut, numbers.gone
    for i in cut:  # a part from the start, if no index moves it
        if i not in {*indexed, *batching}:
            x = x.cut(i, 0, numbers.sizes[i])
    columns = [k for k, i in enumerate(indexed) if i in x.labels]
    if not columns:
        new = {**offset, **{i: lookup[k] for i, k in batching.items()}}
        return Labelled(x.array, tuple(new.get(label, label) for label in x.labels))
    paired = [i for i in x.labels if i in batching]
    collapsed = [i for i in x.labels if i in numbers.collapsed]
    kept = [i for i in x.labels if i not in paired and i not in collapsed]
    if len(columns) != indices.shape[-1]:
        parts = [lax.slice_in_dim(indices, k, k + 1, axis=-1) for k in columns]
        indices = lax.concatenate(parts, dimension=indices.ndim - 1)
    if isinstance(x, OneHot) and collapsed:
        found = x.looked_up(indices, params["mode"], tuple(lookup))
        if found is not None:
            return found
    labels = (*lookup, *(offset.get(i, i) for i in kept))
    array = lax.gather(
        x.array,
        indices,
        lax.GatherDimensionNumbers(
            offset_dims=tuple(range(len(lookup), len(labels))),
            collapsed_slice_dims=tuple(sorted(map(x.axis, collapsed))),
            start_index_map=tuple(x.axis(indexed[k]) for k in columns),
            operand_batching_dims=tuple(map(x.axis, paired)),
            start_indices_batching_dims=tuple(batching[i] for i in paired),
        ),
        slice_sizes=[
            1 if i in gone else numbers.sizes[i] if i in cut else size
            for i, size in x.sizes.items()
        ],
        mode=params["mode"],
        fill_value=0,
        indices_are_sorted=params["indices_are_sorted"],
    )
    return Labelled(array, labels)
