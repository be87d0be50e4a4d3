"""``Labelled``: an array whose axes have labels, so that code need not know their order.

A label is the number of an axis of a weight ``W``; an :class:`Axis` that factors have and ``W`` has
not; or any other name, for an axis of the operand that meets ``W``. A transpose of ``W`` renames
labels and moves no data. A batch axis is a label that both factors have.
"""

import dataclasses
import enum
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax import _jax
from lora_jax._adapter.lowrank import pad_axis
from lora_jax._weights.ranges import Range

Label = Any  # the number of an axis of W, an Axis, or another hashable name
Labels = tuple[Label, ...]


class Axis(enum.Enum):
    """An axis of factors that the weight does not have."""

    RANK = enum.auto()
    RANK2 = enum.auto()  # the rank of a second update that meets the first
    MEMBER = enum.auto()  # the adapters of a stack
    STEP = enum.auto()  # the steps of the loop around, while none of them is picked


@partial(jax.tree_util.register_dataclass, data_fields=("array",), meta_fields=("labels",))
@dataclasses.dataclass(frozen=True, eq=False)
class Labelled:
    """An array with one label per axis.

    Attributes:
        array: an array, or what has a shape as one: a ``LoraArray``, a ``ShapeDtypeStruct``.
        labels: one per axis, all different.
    """

    array: Any
    labels: Labels

    @property
    def sizes(self) -> dict[Label, int]:
        """The size of each axis, by label."""
        return dict(zip(self.labels, self.array.shape, strict=True))

    def axis(self, label: Label) -> int:
        """Return the position of an axis."""
        return self.labels.index(label)

    def astype(self, dtype: Any) -> "Labelled":
        """Cast the array."""
        return Labelled(self.array.astype(dtype), self.labels)

    def scaled(self, number: jax.Array) -> "Labelled":
        """Multiply the array by a 0-d array, in the array's dtype."""
        return Labelled(self.array * number.astype(self.array.dtype), self.labels)

    def sum(self, labels: Sequence[Label]) -> "Labelled":
        """Sum over those of the axes ``labels`` that it has."""
        axes = [i for i, label in enumerate(self.labels) if label in labels]
        return Labelled(self.array.sum(axes), tuple(x for x in self.labels if x not in labels))

    def along(self, label: Label, f: Callable[[Any, int], Any]) -> "Labelled":
        """Replace the array by ``f(array, axis)`` if it has this axis."""
        if label not in self.labels:
            return self
        return Labelled(f(self.array, self.axis(label)), self.labels)

    def cut(self, label: Label, start: int, stop: int, stride: int = 1) -> "Labelled":
        """Take a range of an axis, if it has it."""
        return self.along(label, lambda x, i: lax.slice_in_dim(x, start, stop, stride, i))

    def cut_at(self, label: Label, start: jax.Array, size: int) -> "Labelled":
        """Take ``size`` entries of an axis, if it has it, from a number that is computed."""
        take = partial(lax.dynamic_slice_in_dim, allow_negative_indices=False)
        return self.along(label, lambda x, i: take(x, start, size, i))

    def padded(self, label: Label, start: int, size: int) -> "Labelled":
        """Place what it has at ``start`` of an axis of ``size``, if it has it; the rest is zero."""
        return self.along(label, partial(pad_axis, start=start, size=size))

    def front(self, label: Label) -> "Labelled":
        """Move an axis to the front, if it has it."""
        if label not in self.labels:
            return self
        labels = (label, *(x for x in self.labels if x != label))
        return Labelled(jnp.moveaxis(self.array, self.axis(label), 0), labels)

    def relabel(self, new: Mapping[Any, Any]) -> "Labelled":
        """Rename every label to ``new[label]``; an :class:`Axis` that is not in ``new`` stays."""
        return Labelled(self.array, self.relabelled(new))

    def relabelled(self, new: Mapping[Any, Any]) -> Labels:
        """Return the labels by their new names, as in ``relabel``."""
        return tuple(new.get(x, x) if isinstance(x, Axis) else new[x] for x in self.labels)

    def broadcast(self, sizes: Mapping[Any, int]) -> "Labelled":
        """Add axes in front, constant along each."""
        return Labelled(
            lax.broadcast(self.array, tuple(sizes.values())), (*sizes, *self.labels)
        )  # [*sizes, *labels]

    def aligned(self, labels: Sequence[Label]) -> jax.Array:
        """Return the array with the axes ``labels``, of size 1 where it has none."""
        order = [self.axis(label) for label in labels if label in self.labels]
        x = self.array.transpose(order) if order != sorted(order) else self.array
        return lax.expand_dims(x, [i for i, lab in enumerate(labels) if lab not in self.labels])

    def met_by(self, x: "Labelled", out: Sequence[Label], dtype: Any) -> "Labelled | None":
        """Return the product with ``x`` if it has a form without ``dot_general``."""
        del x, out, dtype

    def added_to(self, result: "Labelled", x: "Labelled") -> "jax.Array | None":
        """Return ``result`` plus the product with ``x`` if there is a form without the product."""
        del result, x


def contract(
    x: Labelled, y: Labelled, out: Sequence[Label], *, precision: Any, dtype: Any
) -> Labelled:
    """Multiply as an einsum does, by one ``dot_general``: sum over every label not in ``out``.

    A label of ``out`` that neither operand has becomes an axis of size 1.
    """
    for one, other in ((x, y), (y, x)):
        if (found := one.met_by(other, out, dtype)) is not None:
            return found
    x = _sum_alone(x, (*y.labels, *out))
    y = _sum_alone(y, (*x.labels, *out))
    shared = [lab for lab in x.labels if lab in y.labels]
    batch = [lab for lab in shared if lab in out]
    summed = [lab for lab in shared if lab not in out]
    labels = batch + [lab for lab in (*x.labels, *y.labels) if lab not in shared]
    x, y, out_sharding = _explicit(x, y, labels)
    result = lax.dot_general(
        x.array,
        y.array,
        (_positions(summed, x, y), _positions(batch, x, y)),
        precision=precision,
        preferred_element_type=dtype,
        out_sharding=out_sharding,
    )  # [*batch, *rest of x, *rest of y]
    missing = [i for i, lab in enumerate(out) if lab not in labels]
    order = [labels.index(lab) for lab in out if lab in labels]
    if order != sorted(order):
        result = lax.transpose(result, order)
    return Labelled(lax.expand_dims(result, missing) if missing else result, tuple(out))


def _positions(labels: Sequence[Label], x: Labelled, y: Labelled) -> tuple[list[int], list[int]]:
    return [x.axis(label) for label in labels], [y.axis(label) for label in labels]


def _sum_alone(x: Labelled, wanted: Sequence[Label]) -> Labelled:
    """Sum over the axes that nobody wants."""
    alone = [label for label in x.labels if label not in wanted]
    return x.sum(alone) if alone else x


def _explicit(x: Labelled, y: Labelled, out: Sequence[Label]) -> tuple[Labelled, Labelled, Any]:
    """Shard ``y`` as ``x`` is, on a mesh of Explicit axes; and give the sharding of the product.

    If only one of them is on such a mesh, the other follows it.
    """
    x_spec, y_spec = _jax.explicit_spec(x.array), _jax.explicit_spec(y.array)
    if x_spec is None:
        if y_spec is None:
            return x, y, None
        y, x, sharding = _explicit(y, x, out)
        return x, y, sharding
    y_spec = [None] * y.array.ndim if y_spec is None else y_spec
    of_x = dict(zip(x.labels, x_spec, strict=True))
    taken = {name for spec in x_spec for name in _names(spec)}
    wanted = [
        of_x[lab] if lab in of_x else None if taken.intersection(_names(spec)) else spec
        for lab, spec in zip(y.labels, y_spec, strict=True)
    ]
    if wanted != y_spec:
        sharding = _jax.explicit_sharding(x.array, wanted)
        y = Labelled(jax.sharding.reshard(y.array, sharding), y.labels)
    by_label = dict(zip(y.labels, wanted, strict=True)) | of_x
    return x, y, _jax.explicit_sharding(x.array, [by_label[lab] for lab in out])


def _names(spec: Any) -> tuple[str, ...]:
    return spec if isinstance(spec, tuple) else () if spec is None else (spec,)


def spread_like(x: jax.Array, y: jax.Array) -> jax.Array:
    """Shard ``x`` as ``y`` on a mesh of Explicit axes; ``x`` may be of size 1 along some axes."""
    spec = _jax.explicit_spec(y)
    if spec is None:
        return x
    spec = [s if n != 1 else None for s, n in zip(spec, x.shape, strict=True)]
    return jax.sharding.reshard(x, _jax.explicit_sharding(y, spec))  # x may be on no mesh yet


def times(x: Labelled, gain: Labelled) -> Labelled:
    """Multiply ``x`` by ``gain`` in the wider dtype, and round to the dtype of ``x``.

    An ``x`` of integers takes the dtype of ``gain``.
    """
    y = x.array if jnp.issubdtype(x.array.dtype, jnp.inexact) else x.array.astype(gain.array.dtype)
    factor = spread_like(gain.aligned(x.labels), y)
    if y.dtype == factor.dtype:
        return Labelled(y * factor, x.labels)
    # checkpointed, or the wider y would be kept for the gradient of the gain
    product = jax.checkpoint(lambda y, gain: (y.astype(gain.dtype) * gain).astype(y.dtype))
    return Labelled(product(y, factor), x.labels)


def place(x: Labelled, ranges: Iterable[Range], sizes: Any) -> Labelled:
    """Fill up with zeros: ``x`` covers ``ranges`` of axes of ``sizes[label]``."""
    for r in ranges:
        if r.axis in x.labels:
            axis, y = x.axis(r.axis), x.array
            if y.shape[axis] == 1 != r.stop - r.start:  # constant along the range
                y = jnp.broadcast_to(y, (*y.shape[:axis], r.stop - r.start, *y.shape[axis + 1 :]))
            x = Labelled(pad_axis(y, axis, r.start, sizes[r.axis]), x.labels)
    return x
