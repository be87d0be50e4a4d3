"""``LoraArray``: what a weight is while ``lora(fn)`` runs: ``W`` and its low-rank deltas, apart.

Every axis of ``W`` has a label, its position. A delta's factors are arrays whose axes are
labelled: an axis of ``a`` or ``b`` belongs to the axis of ``W`` with its label, or is the rank
axis, ``R``. So a transpose of ``W`` renames labels and moves no data, and a batch axis is simply a
label that both factors have. A label that neither has is an axis along which the update is the
same. A delta may cover a part of ``W`` only, a range of some of its axes: that is what
concatenating weights, and adapting a slice of a fused one, come to.

A delta without arrays is a probe: it goes where a delta would go, and shows what becomes of the
weight it is on.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from lora_jax import _jax
from lora_jax._layout import role_axes
from lora_jax._params import Factors, wide
from lora_jax._ranges import Range

R = -1
Labels = tuple[Any, ...]


class Leaf(NamedTuple):
    """A weight among the arguments.

    Attributes:
        owner: which of the LoraParams it belongs to.
        path: where in its base.
    """

    owner: int
    path: str


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("a", "b", "scale"),
    meta_fields=(
        "a_labels",
        "b_labels",
        "leaf",
        "origins",
        "batch",
        "read",
        "summed",
        "picked",
        "ranges",
    ),
)
@dataclasses.dataclass(frozen=True, eq=False)
class Delta:
    """``scale * sum_R a b``, somewhere in ``W``.

    Attributes:
        a: the factor that reads; None in a probe, as are ``b`` and ``scale``.
        b: the factor that writes.
        scale: a 0-d array.
        a_labels: of ``a``'s axes.
        b_labels: of ``b``'s axes.
        leaf: the weight it belongs to.
        origins: for each axis of ``W``, the axes of the leaf that it is made of.
        batch: the batch axes of the leaf, as far as they are known.
        read: the axes of the leaf that a lookup has read already.
        summed: the axes of the leaf that are summed over already.
        picked: the axes of the leaf of which one entry was picked.
        ranges: the parts of ``W``'s axes it covers, of those that it does not cover whole.
    """

    a: Any
    b: Any
    scale: Any
    a_labels: Labels
    b_labels: Labels
    leaf: Leaf
    origins: tuple[tuple[int, ...], ...]
    batch: frozenset[int] = frozenset()
    read: frozenset[int] = frozenset()
    summed: frozenset[int] = frozenset()
    picked: frozenset[int] = frozenset()
    ranges: tuple[Range, ...] = ()

    @classmethod
    def of(cls, factors: Factors, leaf: Leaf, ranges: Sequence[Range] = ()) -> "Delta":
        """The delta of a weight as it enters the function."""
        batch, inputs, outputs = (role_axes(factors.layout, role) for role in "bio")
        scale = factors.scale
        if not isinstance(scale, jax.ShapeDtypeStruct):
            dtype = wide(factors.b.dtype)
            scale = jnp.asarray(scale, jnp.float32)
            scale = lax.stop_gradient(scale if scale.dtype == dtype else scale.astype(dtype))
        origins = tuple((i,) for i in range(len(factors.layout)))
        a_labels, b_labels = (*batch, *inputs, R), (*batch, R, *outputs)
        return cls(
            factors.a,
            factors.b,
            scale,
            a_labels,
            b_labels,
            leaf,
            origins,
            batch=frozenset(batch),
            ranges=tuple(ranges),
        )

    @classmethod
    def probe(cls, leaf: Leaf, ndim: int) -> "Delta":
        """A delta without arrays."""
        return cls(None, None, None, (), (), leaf, tuple((i,) for i in range(ndim)))

    @property
    def is_probe(self) -> bool:
        """Whether it has no arrays."""
        return self.a is None

    @property
    def factors(self) -> tuple[tuple[Any, Labels], tuple[Any, Labels]]:
        """``a`` and ``b``, each with its labels."""
        return (self.a, self.a_labels), (self.b, self.b_labels)

    def has(self, label: Any) -> bool:
        """Whether a factor has this axis."""
        return label in self.a_labels or label in self.b_labels

    def map(self, f: Callable[[jax.Array, Labels], tuple[jax.Array, Labels]]) -> "Delta":
        """The delta with each factor and its labels replaced by ``f`` of them."""
        if self.is_probe:
            return self
        (a, a_labels), (b, b_labels) = (f(x, labels) for x, labels in self.factors)
        return dataclasses.replace(self, a=a, b=b, a_labels=a_labels, b_labels=b_labels)

    def along(self, axis: int, f: Callable[[jax.Array, int], jax.Array]) -> "Delta":
        """The delta with ``f(factor, position)`` for each factor that has ``axis``."""
        return self.map(
            lambda x, labels: (f(x, labels.index(axis)) if axis in labels else x, labels)
        )

    def rename(self, new: Mapping[Any, Any], rank: Any = R) -> "Delta":
        """The factors and ranges under other labels, ``new[old]``; the rank axis is ``rank``."""
        new = {**new, R: rank}
        return dataclasses.replace(
            self,
            a_labels=tuple(new[label] for label in self.a_labels),
            b_labels=tuple(new[label] for label in self.b_labels),
            ranges=tuple(Range(new[r.axis], r.start, r.stop) for r in self.ranges),
        )

    def move(self, new: Mapping[int, int], ndim: int) -> "Delta":
        """The delta where axis ``i`` of ``W`` is axis ``new[i]`` of an array of ``ndim`` axes."""
        origins: list[tuple[int, ...]] = [()] * ndim
        for old, axis in new.items():
            origins[axis] = self.origins[old]
        return dataclasses.replace(self.rename(new), origins=tuple(origins))

    def range_of(self, axis: Any, size: int) -> tuple[int, int]:
        """The part of an axis that the delta covers."""
        return next(((r.start, r.stop) for r in self.ranges if r.axis == axis), (0, size))

    def with_range(self, axis: int, start: int, stop: int, size: int) -> "Delta":
        """The delta as covering ``start:stop`` of an axis of ``size``."""
        ranges = tuple(r for r in self.ranges if r.axis != axis)
        if (start, stop) != (0, size):
            ranges += (Range(int(axis), int(start), int(stop)),)
        return dataclasses.replace(self, ranges=ranges)

    def expand(self, axis: int, size: int) -> "Delta":
        """The delta with the axis in a factor, the smaller one if it was in none."""
        if self.is_probe or self.has(axis):
            return self
        small = min((self.a, self.b), key=lambda x: x.size)
        return self.map(
            lambda x, labels: (
                (lax.broadcast(x, (size,)), (axis, *labels)) if x is small else (x, labels)
            )
        )

    def whole(self, axes: Iterable[int], shape: Sequence[int]) -> "Delta":
        """The delta as covering all of these axes, zero where it covered nothing."""
        delta = self
        for r in self.ranges:
            if r.axis in axes:
                size = shape[r.axis]
                delta = delta.expand(r.axis, r.stop - r.start)
                delta = delta.along(r.axis, partial(_pad, start=r.start, size=size))
                delta = delta.with_range(r.axis, 0, size, size)
        return delta

    @property
    def is_read(self) -> bool:
        """Whether one of the factors has none of the weight's axes left for itself.

        After a lookup of rows, or a sum over inputs, ``a b`` is an activation, no longer an
        update of the weight.
        """
        if self.is_probe:
            return bool(self.read | self.summed)
        return not self.reads or not self._live(self.b_labels, self.a_labels)

    @property
    def reads(self) -> bool:
        """Whether ``a`` has an axis of the weight left for itself."""
        return self._live(self.a_labels, self.b_labels)

    def _live(self, labels: Labels, others: Labels) -> bool:
        used = self.read | self.picked
        own = set(labels) - set(others)
        return any(not used.issuperset(self.origins[label]) for label in own)

    def dense(self, shape: Sequence[int], dtype: Any) -> jax.Array:
        """``scale * a b`` as an array with ``W``'s axes: what this library exists to avoid."""
        a, b = self.a.astype(dtype), self.b.astype(dtype)
        out = tuple(range(len(shape)))
        product = contract(
            a, self.a_labels, b, self.b_labels, out, precision=lax.Precision.HIGHEST, dtype=dtype
        )
        return place(product * self.scale.astype(dtype), out, self.ranges, shape)


@partial(jax.tree_util.register_dataclass, data_fields=("w", "deltas"), meta_fields=("unfolded",))
@dataclasses.dataclass(frozen=True, eq=False)
class LoraArray:
    """A weight ``w`` with its deltas, at some point of its way through the function.

    Attributes:
        w: the frozen part.
        deltas: what is added to it.
        unfolded: None; or, where a reshape has merged axes of different roles, the shape that
            the deltas' labels are of. ``w`` is that shape reshaped.
    """

    w: jax.Array
    deltas: tuple[Delta, ...]
    unfolded: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return self.w.shape

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        """The weights it is made of."""
        return tuple(dict.fromkeys(delta.leaf for delta in self.deltas))

    def map(self, w: jax.Array, f: Callable[[Delta], Delta]) -> "LoraArray":
        """The weight ``w`` with each delta replaced by ``f`` of it."""
        return dataclasses.replace(self, w=w, deltas=tuple(f(delta) for delta in self.deltas))

    @property
    def is_read(self) -> bool:
        """Whether all of its deltas are read, so that it is an activation."""
        return self.unfolded is None and all(delta.is_read for delta in self.deltas)

    @property
    def is_lookup(self) -> bool:
        """Whether it is what a lookup has read: rows, not a choice of kernels."""
        return self.is_read and all(
            delta.read
            and (
                sum(not delta.read.issuperset(group) for group in delta.origins) <= 1
                if delta.is_probe
                else not delta.reads
            )
            for delta in self.deltas
        )

    def dense(self) -> jax.Array:
        """``W`` plus its deltas, summed in at least float32, rounded once to ``W``'s dtype."""
        dtype = wide(self.w.dtype)
        total = self.w.astype(dtype)
        shape = self.unfolded or self.shape
        for delta in self.deltas:
            if not delta.is_probe:
                update = jnp.broadcast_to(delta.dense(shape, dtype), shape).reshape(self.shape)
                total += spread_like(update, total)
        return total.astype(self.w.dtype)


def axis_groups(
    old: Sequence[int], new: Sequence[int]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The finest pairing of axes of two shapes under a row-major reshape, without axes of size 1.

    >>> axis_groups((6, 4, 1), (2, 3, 1, 4))
    [((0,), (0, 1)), ((1,), (3,))]
    """
    olds = [i for i, size in enumerate(old) if size != 1]
    news = [j for j, size in enumerate(new) if size != 1]
    groups = []
    while olds or news:
        left, right = [olds.pop(0)], [news.pop(0)]
        while (a := prod(old[i] for i in left)) != (b := prod(new[j] for j in right)):
            (left.append(olds.pop(0)) if a < b else right.append(news.pop(0)))
        groups.append((tuple(left), tuple(right)))
    return groups


def regrouped_origins(delta: Delta, groups: Any, ndim: int) -> tuple[tuple[int, ...], ...]:
    """The origins of an array's axes after a reshape that pairs axes so."""
    origins: list[tuple[int, ...]] = [()] * ndim
    for old, new in groups:
        for j in new:
            origins[j] = tuple(dict.fromkeys(k for i in old for k in delta.origins[i]))
    return tuple(origins)


def settle(v: Any) -> Any:
    """A probed weight whose axes stay merged; any other value as it is."""
    if not isinstance(v, LoraArray) or v.unfolded is None:
        return v
    if not all(delta.is_probe for delta in v.deltas):
        return v
    groups = axis_groups(v.unfolded, v.shape)

    def merged(delta: Delta) -> Delta:
        origins = regrouped_origins(delta, groups, len(v.shape))
        return dataclasses.replace(delta, origins=origins, ranges=())

    return LoraArray(v.w, tuple(map(merged, v.deltas)))


def renamed(v: Any, names: Mapping[Leaf, Leaf]) -> Any:
    """A value as of other weights."""
    if not isinstance(v, LoraArray):
        return v
    return v.map(v.w, lambda delta: dataclasses.replace(delta, leaf=names[delta.leaf]))


def adapted(w: jax.Array, deltas: Iterable[Delta | None]) -> Any:
    """A weight with those of the deltas that are left; itself if none is."""
    deltas = tuple(delta for delta in deltas if delta is not None)
    return LoraArray(w, deltas) if deltas else w


def place(x: jax.Array, labels: Sequence[Any], ranges: Iterable[Range], sizes: Any) -> jax.Array:
    """``x``, which covers these ranges of its labelled axes, as a part of zeros."""
    for r in ranges:
        if r.axis in labels:
            axis = labels.index(r.axis)
            if x.shape[axis] == 1 != r.stop - r.start:  # the same all along the range
                full = (*x.shape[:axis], r.stop - r.start, *x.shape[axis + 1 :])
                x = jnp.broadcast_to(x, full)
            x = _pad(x, axis, r.start, sizes[r.axis])
    return x


def _pad(x: jax.Array, axis: int, start: int, size: int) -> jax.Array:
    config = [(0, 0, 0)] * x.ndim
    config[axis] = (start, size - start - x.shape[axis], 0)
    return lax.pad(x, jnp.zeros((), x.dtype), config)


def contract(
    x: jax.Array,
    x_labels: Sequence[Any],
    y: jax.Array,
    y_labels: Sequence[Any],
    out: Sequence[Any],
    *,
    precision: Any,
    dtype: Any,
) -> jax.Array:
    """An einsum over labels as one ``dot_general``: sums over every label not in ``out``.

    A label of ``out`` that neither operand has becomes an axis of size 1.
    """
    x, x_labels = _sum_alone(x, x_labels, (*y_labels, *out))
    y, y_labels = _sum_alone(y, y_labels, (*x_labels, *out))
    shared = [lab for lab in x_labels if lab in y_labels]
    batch = [lab for lab in shared if lab in out]
    summed = [lab for lab in shared if lab not in out]
    contracting = [x_labels.index(lab) for lab in summed], [y_labels.index(lab) for lab in summed]
    batching = [x_labels.index(lab) for lab in batch], [y_labels.index(lab) for lab in batch]
    labels = batch + [lab for lab in (*x_labels, *y_labels) if lab not in shared]
    y, out_spec = _explicit(x, x_labels, y, y_labels, labels)
    result = lax.dot_general(
        x,
        y,
        (contracting, batching),
        precision=precision,
        preferred_element_type=dtype,
        out_sharding=out_spec,
    )
    missing = [i for i, lab in enumerate(out) if lab not in labels]
    order = [labels.index(lab) for lab in out if lab in labels]
    if order != sorted(order):
        result = lax.transpose(result, order)
    return lax.expand_dims(result, missing) if missing else result


def _explicit(x: jax.Array, x_labels, y: jax.Array, y_labels, out) -> tuple[jax.Array, Any]:
    """On a mesh of Explicit axes: ``y`` spread as ``x`` is, and how their product is spread."""
    x_spec, y_spec = _jax.explicit_spec(x), _jax.explicit_spec(y)
    if x_spec is None or y_spec is None:
        return y, None
    of_x = dict(zip(x_labels, x_spec, strict=True))
    taken = {name for spec in x_spec for name in _names(spec)}
    wanted = [
        of_x[lab] if lab in of_x else None if taken.intersection(_names(spec)) else spec
        for lab, spec in zip(y_labels, y_spec, strict=True)
    ]
    y = y if wanted == y_spec else _jax.reshard(y, wanted)
    by_label = dict(zip(y_labels, wanted, strict=True)) | of_x
    return y, PartitionSpec(*(by_label[lab] for lab in out))


def _names(spec: Any) -> tuple[str, ...]:
    return spec if isinstance(spec, tuple) else () if spec is None else (spec,)


def spread_like(x: jax.Array, y: jax.Array) -> jax.Array:
    """``x``, which may be of size 1 along some axes, spread over an Explicit mesh as ``y`` is."""
    spec = _jax.explicit_spec(y)
    if spec is None:
        return x
    return _jax.reshard(x, [s if n != 1 else None for s, n in zip(spec, x.shape, strict=True)])


def _sum_alone(x: jax.Array, labels: Sequence[Any], wanted: Sequence[Any]):
    """Sum over the axes whose label nobody wants."""
    alone = [i for i, lab in enumerate(labels) if lab not in wanted]
    return (x.sum(alone), [lab for lab in labels if lab in wanted]) if alone else (x, labels)
