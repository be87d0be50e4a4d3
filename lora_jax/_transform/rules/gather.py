"""``gather``: embedding lookups, choices of experts, permutations."""

import dataclasses

import jax
from jax import lax

from lora_jax._transform.context import Context
from lora_jax._transform.delta import Delta, Labels
from lora_jax._transform.lazy import bind, force
from lora_jax._transform.lora_array import LoraArray
from lora_jax._transform.rule import rule


@rule("gather")
def gather(ctx: Context, eqn, values):
    """Rows of a table are ``a``'s rows times ``b``.

    Each factor is gathered along the axes it has. A lookup beyond the table is filled as ever;
    its update is zero.
    """
    v, indices = values
    if isinstance(indices, LoraArray):
        return NotImplemented
    fill = eqn.params["fill_value"] or 0  # None: not a number
    if any(d.gain is not None for d in v.deltas) and fill == fill != 0:
        return NotImplemented  # what is filled in has no gain
    (w,) = bind(eqn, [v.w, indices])
    if not v.deltas:
        return [force(w)]  # rows of a quantized table are activations
    sizes = eqn.params["slice_sizes"]
    numbers = lax.GatherDimensionNumbers(
        **{
            name: tuple(map(int, axes))
            for name, axes in eqn.params["dimension_numbers"]._asdict().items()
        }
    )
    batching = dict(
        zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
    )
    gone = {*numbers.collapsed_slice_dims, *batching}
    kept_axes = (i for i in range(len(v.shape)) if i not in gone)
    offset = dict(zip(kept_axes, numbers.offset_dims, strict=True))
    lookup = [i for i in range(w.ndim) if i not in numbers.offset_dims]  # axes of the indices
    looked = [i for i in numbers.start_index_map if i in gone]
    fills = lax.GatherScatterMode.from_any(eqn.params["mode"]) == lax.GatherScatterMode.FILL_OR_DROP
    cut = [i for i, size in enumerate(sizes) if size != v.shape[i]]

    def gather_factor(x: jax.Array, labels: Labels) -> tuple[jax.Array, Labels]:
        for i, size in enumerate(sizes):  # a part from the start, which no index moves
            if i in labels and i in cut and i not in {*numbers.start_index_map, *batching}:
                x = lax.slice_in_dim(x, 0, size, axis=labels.index(i))
        columns = [k for k, i in enumerate(numbers.start_index_map) if i in labels]
        if not columns:
            new = {**offset, **{i: lookup[k] for i, k in batching.items()}}
            return x, tuple(new.get(label, label) for label in labels)
        paired = [i for i in labels if i in batching]
        collapsed = [i for i in labels if i in numbers.collapsed_slice_dims]
        kept = [i for i in labels if i not in paired and i not in collapsed]
        position = labels.index
        part = indices
        if len(columns) != indices.shape[-1]:
            parts = [lax.slice_in_dim(indices, k, k + 1, axis=-1) for k in columns]
            part = lax.concatenate(parts, dimension=indices.ndim - 1)
        out_labels = (*lookup, *(offset.get(i, i) for i in kept))
        x = lax.gather(
            x,
            part,
            lax.GatherDimensionNumbers(
                offset_dims=tuple(range(len(lookup), len(out_labels))),
                collapsed_slice_dims=tuple(sorted(map(position, collapsed))),
                start_index_map=tuple(position(numbers.start_index_map[k]) for k in columns),
                operand_batching_dims=tuple(map(position, paired)),
                start_indices_batching_dims=tuple(batching[i] for i in paired),
            ),
            slice_sizes=[
                x.shape[k] if i < 0 else 1 if i in gone else sizes[i] if i in cut else x.shape[k]
                for k, i in enumerate(labels)
            ],
            mode=eqn.params["mode"],
            fill_value=0,
            indices_are_sorted=eqn.params["indices_are_sorted"],
        )
        return x, out_labels

    def gather_delta(delta: Delta) -> Delta:
        delta = delta.whole({*cut, *gone, *numbers.start_index_map}, v.shape)
        for i in numbers.start_index_map if fills else ():
            delta = delta.expand(i, v.shape[i])  # a factor must have it, to be zero beyond it
        made_of = {axis: [i] for i, axis in offset.items()}
        for k, axis in enumerate(lookup):
            made_of[axis] = [i for i, index in batching.items() if index == k] or looked
        kind = "picked" if len(lookup) == len(batching) else "read"
        taken = getattr(delta.past, kind) | delta.past.behind(looked)
        past = delta.past.after(made_of, w.ndim)._replace(**{kind: taken})
        ranges = tuple(r._replace(axis=offset[r.axis]) for r in delta.ranges)
        delta = delta.map(gather_factor)
        return dataclasses.replace(delta, past=past, ranges=ranges)

    return [v.map(w, gather_delta)]
