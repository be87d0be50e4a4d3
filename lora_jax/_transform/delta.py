"""``Delta``: an update ``scale * a b``, apart from its weight ``W``, while ``lora(fn)`` runs.

Every axis of ``W`` has a label, its position. A delta's factors are arrays whose axes are
labelled: an axis of ``a`` or ``b`` belongs to the axis of ``W`` with its label, or is the rank
axis, ``R``. So a transpose of ``W`` renames labels and moves no data, and a batch axis is simply a
label that both factors have. A label that neither has is an axis along which the update is the
same. A delta may cover a part of ``W`` only, a range of some of its axes: that is what
concatenating weights, and adapting a slice of a fused one, come to.

The factors may be those of a stack of adapters, with an axis ``N`` for them, of which ``slot`` says
the one that counts. It is picked where the delta meets its input, not before: under a ``vmap`` over
rows with a slot each, picking makes an array of every row's factors.

A delta without arrays is a probe: it goes where a delta would go, and shows what becomes of the
weight it is on.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax._adapter.factors import Factors, wide
from lora_jax._adapter.lowrank import pad_axis
from lora_jax._transform.labelled import contract, place
from lora_jax._transform.origin import Leaf, Origin
from lora_jax._weights.axes import role_axes
from lora_jax._weights.ranges import Range

R = -1
N = -3  # the adapters of a stack
M = -4  # the steps of the loop that the delta is in, where it has not been picked from yet
Labels = tuple[Any, ...]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("a", "b", "scale", "gain", "key", "slot", "step", "router"),
    meta_fields=(
        *("a_labels", "b_labels", "past", "ranges", "gain_labels", "router_labels", "routing"),
    ),
)
@dataclasses.dataclass(frozen=True, eq=False)
class Delta:
    """``scale * sum_R a b``, somewhere in ``W``; then ``1 + gain`` times what is there.

    Attributes:
        a: the factor that reads; None in a probe, as are ``b`` and ``scale``.
        b: the factor that writes.
        scale: a 0-d array.
        a_labels: of ``a``'s axes.
        b_labels: of ``b``'s axes.
        past: the weight it belongs to, and what became of it.
        ranges: the parts of ``W``'s axes it covers, of those that it does not cover whole.
        gain: None; or what ``W`` and the update, where it is, are multiplied by, less one.
        gain_labels: of ``gain``'s axes.
        key: None; or the PRNG key that what it reads is dropped by.
        slot: None; or which of the adapters along ``N`` counts; ``scale`` is that one's.
        step: None; or which of the entries along ``M`` counts.
        router: None; or directions of the inputs, one for each adapter along ``N``.
        router_labels: of ``router``'s axes.
        routing: how many of the adapters count at most, those whose directions an input has most
            of; and what it has of them is divided by, before the softmax that says how much.
    """

    a: Any
    b: Any
    scale: Any
    a_labels: Labels
    b_labels: Labels
    past: Origin
    ranges: tuple[Range, ...] = ()
    gain: Any = None
    gain_labels: Labels = ()
    key: Any = None
    slot: Any = None
    step: Any = None
    router: Any = None
    router_labels: Labels = ()
    routing: tuple[int, float] | None = None

    @classmethod
    def of(cls, factors: Factors, leaf: Leaf, ranges: Sequence[Range] = ()) -> "Delta":
        """The delta of a weight as it enters the function, without its gain."""
        batch, inputs, outputs = (role_axes(factors.layout, role) for role in "bio")
        scale = factors.scale
        if not isinstance(scale, jax.ShapeDtypeStruct):
            dtype = wide(factors.b.dtype)
            scale = jnp.asarray(scale, jnp.float32)
            scale = lax.stop_gradient(scale if scale.dtype == dtype else scale.astype(dtype))
        past = Origin.of(leaf, len(factors.layout), batch)
        a_labels, b_labels = (*batch, *inputs, R), (*batch, R, *outputs)
        return cls(factors.a, factors.b, scale, a_labels, b_labels, past, tuple(ranges))

    @classmethod
    def probe(cls, leaf: Leaf, ndim: int) -> "Delta":
        """A delta without arrays."""
        return cls(None, None, None, (), (), Origin.of(leaf, ndim))

    def of_slot(self, slot: Any) -> "Delta":
        """The delta of a stack, of whose adapters one counts.

        -1 is none of them: its ``scale`` is 0. Of another that is not there it is NaN.
        """
        k = jnp.clip(slot, 0, self.scale.shape[0] - 1)
        other = jnp.where(slot == -1, 0.0, jnp.nan).astype(self.scale.dtype)
        return dataclasses.replace(
            self, slot=slot, scale=jnp.where(slot == k, self.scale[k], other)
        )

    def picked(self) -> "Delta":
        """The delta of the adapter that counts.

        Raises:
            NotImplementedError: inputs are to choose, and there are none.
        """
        if self.router is not None:
            raise self.misrouted()
        if self.slot is None:
            return self
        k = jnp.clip(self.slot, 0, self.a.shape[self.a_labels.index(N)] - 1)

        def pick(x: jax.Array, labels: Labels) -> tuple[jax.Array, Labels]:
            places = {N: k, M: self.step}
            at = x.at[tuple(places.get(label, slice(None)) for label in labels)]
            one = at.get(mode="promise_in_bounds", wrap_negative_indices=False)
            # of none, zeros: whatever the one at k holds, and it gets no gradient
            return jnp.where(self.slot == k, one, jnp.zeros_like(one)), _without(labels, N, M)

        return dataclasses.replace(self.map(pick), slot=None, step=None)

    def misrouted(self) -> NotImplementedError:
        """The error of a weight that no input meets."""
        return NotImplementedError(
            f"lora_routed: the weight {self.leaf.path!r} is used otherwise than by a product with "
            "inputs, which choose the adapters. Leave it out of them: lorafy(..., "
            f"exclude={self.leaf.path!r})"
        )

    def stepping(self) -> "Delta":
        """The delta of a stack where the first axis of ``W`` is one of steps, for ``step`` to say.

        Its factors stay where they are: moved, they would be copied, with all that is not picked.
        """
        delta = self
        if delta.step is not None:  # that of the loop around
            delta = delta.along(M, lambda x, i: lax.dynamic_index_in_dim(x, self.step, i, False))
            delta = delta.map(lambda x, labels: (x, _without(labels, M)))
        return delta.map(lambda x, labels: (x, tuple(M if lab == 0 else lab for lab in labels)))

    @property
    def leaf(self) -> Leaf:
        """The weight it belongs to."""
        return self.past.leaf

    @property
    def is_probe(self) -> bool:
        """Whether it has no arrays."""
        return self.a is None

    @property
    def factors(self) -> tuple[tuple[Any, Labels], tuple[Any, Labels]]:
        """``a`` and ``b``, each with its labels."""
        return self.part("a"), self.part("b")

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of what has labels."""
        return tuple(x for x in ("a", "b", "gain", "router") if getattr(self, x) is not None)

    def part(self, name: str) -> tuple[Any, Labels]:
        """An array by its name, with its labels."""
        return getattr(self, name), getattr(self, f"{name}_labels")

    def has(self, label: Any) -> bool:
        """Whether a factor has this axis."""
        return label in self.a_labels or label in self.b_labels

    def map(self, f: Callable[[jax.Array, Labels], tuple[jax.Array, Labels]]) -> "Delta":
        """The delta with each factor, and the gain, and its labels replaced by ``f`` of them."""
        if self.is_probe:
            return self
        parts = {name: f(*self.part(name)) for name in self.parts}
        new = {name: x for name, (x, _) in parts.items()}
        return dataclasses.replace(
            self, **new, **{f"{name}_labels": labels for name, (_, labels) in parts.items()}
        )

    def along(self, axis: int, f: Callable[[jax.Array, int], jax.Array]) -> "Delta":
        """The delta with ``f(factor, position)`` for each factor that has ``axis``."""
        return self.map(
            lambda x, labels: (f(x, labels.index(axis)) if axis in labels else x, labels)
        )

    def rename(self, new: Mapping[Any, Any], rank: Any = R) -> "Delta":
        """The factors and ranges under other labels, ``new[old]``; the rank axis is ``rank``."""
        new = {**new, R: rank, N: N, M: M}
        return dataclasses.replace(
            self,
            **{
                f"{name}_labels": tuple(new[label] for label in self.part(name)[1])
                for name in self.parts
            },
            ranges=tuple(Range(new[r.axis], r.start, r.stop) for r in self.ranges),
        )

    def move(self, new: Mapping[int, int], ndim: int) -> "Delta":
        """The delta where axis ``i`` of ``W`` is axis ``new[i]`` of an array of ``ndim`` axes."""
        past = self.past.after({axis: (old,) for old, axis in new.items()}, ndim)
        return dataclasses.replace(self.rename(new), past=past)

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
                delta = delta.expand(r.axis, r.stop - r.start)._expand_gain(r)
                delta = delta.along(r.axis, partial(pad_axis, start=r.start, size=size))
                delta = delta.with_range(r.axis, 0, size, size)
        return delta

    def _expand_gain(self, r: Range) -> "Delta":
        """The delta whose gain has the axis that a range is of, if there is a gain."""
        if self.gain is None or r.axis in self.gain_labels:
            return self
        gain = lax.broadcast(self.gain, (r.stop - r.start,))
        return dataclasses.replace(self, gain=gain, gain_labels=(r.axis, *self.gain_labels))

    def gains(self, shape: Sequence[int]) -> tuple[jax.Array, Labels] | None:
        """``1 + gain`` and its labels, 1 where the delta is not; None without."""
        if self.gain is None:
            return None
        delta = self.picked()
        for r in self.ranges:
            delta = delta._expand_gain(r)
        return 1 + place(delta.gain, delta.gain_labels, self.ranges, shape), delta.gain_labels

    @property
    def is_read(self) -> bool:
        """Whether one of the factors has none of the weight's axes left for itself.

        After a lookup of rows, or a sum over inputs, ``a b`` is an activation, no longer an
        update of the weight.
        """
        if self.is_probe:
            return bool(self.past.read | self.past.summed)
        return not self.reads or not self._live(self.b_labels, self.a_labels)

    @property
    def reads(self) -> bool:
        """Whether ``a`` has an axis of the weight left for itself."""
        return self._live(self.a_labels, self.b_labels)

    def _live(self, labels: Labels, others: Labels) -> bool:
        used = self.past.read | self.past.picked
        own = set(labels) - set(others)
        return any(not used.issuperset(self.past.axes[label]) for label in own)

    def dense(self, shape: Sequence[int], dtype: Any) -> jax.Array:
        """``scale * a b`` as an array with ``W``'s axes: what this library exists to avoid."""
        one = self.picked()
        a, b, out = one.a.astype(dtype), one.b.astype(dtype), tuple(range(len(shape)))
        kind: dict[str, Any] = {"precision": lax.Precision.HIGHEST, "dtype": dtype}
        product = contract(a, one.a_labels, b, one.b_labels, out, **kind)
        return place(product * one.scale.astype(dtype), out, self.ranges, shape)


def _without(labels: Labels, *gone: int) -> Labels:
    return tuple(label for label in labels if label not in gone)
