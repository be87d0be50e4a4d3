"""``Delta``: an update ``scale * a b`` of a weight ``W``, apart from it, while ``lora(fn)`` runs.

The factors are :class:`Labelled`: each axis is an axis of ``W``, or the rank, or one that a stack
of adapters adds. Along a label that neither factor has, the update is constant. A delta may cover
ranges of some axes only, as after concatenating weights, or for an adapted slice of a fused one.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax._adapter.factors import Entry, Rows, wide
from lora_jax._transform.labelled import Axis, Labelled, contract, place, spread_like, times
from lora_jax._transform.one_hot import OneHot
from lora_jax._transform.origin import Groups, Leaf, Origin
from lora_jax._transform.pick import Router, Slot
from lora_jax._transform.probe import Follower, Probe
from lora_jax._transform.regroup import joined, regroup
from lora_jax._weights.axes import role_axes
from lora_jax._weights.ranges import Range


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("a", "b", "scale", "gain", "key", "pick"),
    meta_fields=("origin", "ranges"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class Delta(Follower):
    """``scale * sum_RANK a b`` in ``ranges`` of ``W``; then ``1 + gain`` times what is there.

    Attributes:
        origin, ranges: its place in ``W``: see :class:`Follower`.
        a: the factor that reads, ``[*batch, *in, RANK]`` as it enters the function.
        b: the factor that writes, ``[*batch, RANK, *out]``.
        scale: a 0-d array; ``[MEMBER]`` with a router.
        gain: ``[*batch, *out]``; None is 0.
        key: a PRNG key for the dropout of what it reads; None drops nothing.
        pick: which members of a stack count; None without a stack.
    """

    a: Labelled
    b: Labelled
    scale: Any
    gain: Labelled | None = None
    key: Any = None
    pick: Slot | Router | None = None

    @classmethod
    def of(
        cls, factors: Entry, leaf: Leaf, ranges: Sequence[Range], freeze: Any = lax.stop_gradient
    ) -> "Delta":
        """Return the delta of a weight as it enters the function, without its gain."""
        batch, inputs, outputs = (role_axes(factors.layout, role) for role in "bio")
        if not isinstance(scale := factors.scale, jax.ShapeDtypeStruct):
            dtype, scale = wide(factors.b.dtype), jnp.asarray(scale, jnp.float32)
            scale = freeze(scale if scale.dtype == dtype else scale.astype(dtype))
        if isinstance(factors, Rows):
            a: Labelled = OneHot.of(factors, *inputs)
        else:
            a = Labelled(factors.a, (*batch, *inputs, Axis.RANK))
        b = Labelled(factors.b, (*batch, Axis.RANK, *outputs))
        return cls(Origin.of(leaf, len(factors.layout), batch), tuple(ranges), a, b, scale)

    @property
    def factors(self) -> tuple[Labelled, Labelled]:
        """``a`` and ``b``."""
        return self.a, self.b

    @property
    def parts(self) -> tuple[Labelled, ...]:
        """All arrays with labels."""
        gain = () if self.gain is None else (self.gain,)
        directions = (self.pick.directions,) if isinstance(self.pick, Router) else ()
        return (self.a, self.b, *gain, *directions)

    @property
    def rank(self) -> int:
        """The size of the axis that the product of the factors sums over."""
        return self.b.sizes[Axis.RANK]

    def has(self, label: Any) -> bool:
        """Return whether a factor has this axis."""
        return label in self.a.labels or label in self.b.labels

    def map(self, f: Callable[[Labelled], Labelled]) -> "Delta":
        """Replace each factor by ``f`` of it, and the gain and a router's directions, if any."""
        a, b = f(self.a), f(self.b)
        gain = None if self.gain is None else f(self.gain)
        pick = self.pick
        if isinstance(pick, Router):
            pick = dataclasses.replace(pick, directions=f(pick.directions))
        return dataclasses.replace(self, a=a, b=b, gain=gain, pick=pick)

    def along(self, axis: int, f: Callable[[jax.Array, int], jax.Array]) -> "Delta":
        """Replace each array that has ``axis`` by ``f(array, position)``."""
        return self.map(lambda x: x.along(axis, f))

    def renamed(self, new: Mapping[Any, Any]) -> "Delta":
        """Call axis ``i`` of ``W`` ``new[i]``."""
        return super().renamed(new).map(lambda x: x.relabel(new))

    # Which axes are read

    @property
    def is_read(self) -> bool:
        """Return whether a factor has no axis of the weight left for itself.

        After a lookup, or a sum over inputs, ``a b`` is an activation, no update of the weight.
        """
        return not self.reads or not self._is_live(self.b, self.a)

    @property
    def is_lookup(self) -> bool:
        """Return whether a lookup has read it, so that ``a`` has rows of inputs."""
        return bool(self.origin.read) and not self.reads

    @property
    def reads(self) -> bool:
        """Return whether ``a`` has an axis of the weight left for itself."""
        return self._is_live(self.a, self.b)

    def _is_live(self, x: Labelled, other: Labelled) -> bool:
        used = self.origin.read | self.origin.picked
        return any(not used.issuperset(self.origin.axes[axis]) for axis in _own(x, other))

    @property
    def axes_read(self) -> frozenset[int]:
        """The axes of the leaf that were looked up, summed over or picked from; no batch axes."""
        origin = self.origin
        read = (origin.read | origin.summed | origin.picked) - origin.batch
        if self.reads:
            return read
        # rows of a table; some of their columns may have been picked
        return read - origin.behind(_own(self.b, self.a))

    # Axes that come, go and change

    def expanded(self, axis: int, size: int) -> "Delta":
        """Give the smaller factor the axis, constant along it, if neither has it."""
        if self.has(axis):
            return self
        small = min(self.factors, key=lambda x: x.array.size)
        return self.map(lambda x: x.broadcast({axis: size}) if x is small else x)

    def _pad(self, r: Range, size: int) -> "Delta":
        new = self.expanded(r.axis, r.stop - r.start)
        if new.gain is not None:
            new = dataclasses.replace(new, gain=_along_range(new.gain, r))
        return new.map(lambda x: x.padded(r.axis, r.start, size))

    def regrouped(self, groups: Groups, old: Sequence[int], new: Sequence[int]) -> "Delta | None":
        """Follow ``W`` through a reshape; None if it merges axes of ``a`` with axes of ``b``."""
        delta = self
        for olds, news in groups:
            if len(olds) == len(news) == 1:
                continue
            for r in delta.ranges:  # the factor with the axes beside a range gets that axis, too
                if r.axis in olds and not delta.has(r.axis):
                    a, b = (joined(x, r.axis, olds, r.stop - r.start) for x in delta.factors)
                    delta = dataclasses.replace(delta, a=a, b=b)
            delta = delta.padded(olds, old)
            owners = {tuple(i in x.labels for x in delta.factors) for i in olds}
            if len(owners - {(False, False)}) > 1:
                return None
            for i in olds:
                delta = delta.map(partial(joined, axis=i, group=olds, size=old[i]))
        delta = delta.map(lambda x: regroup(x, groups, new))
        return delta._after_reshape(groups, len(new))

    # Sums and products

    def scaled(self, f: Callable[[jax.Array], jax.Array]) -> "Delta":
        """Replace the scale by ``f`` of it."""
        return dataclasses.replace(self, scale=f(self.scale))

    def times(
        self, x: Labelled, shape: Sequence[int], f: Callable[[Any, Any], jax.Array]
    ) -> "Delta | None":
        """Multiply a factor by ``x``, or divide, as ``f`` does; None if no factor can take it.

        The factor has all axes of ``x``, but for those that neither factor has.
        """
        delta = self.picked()  # x is no business of other members
        foreign = [axis for axis in x.labels if not delta.has(axis)]
        fit = [
            name
            for name, factor in zip("ab", delta.factors, strict=True)
            if all(axis in factor.labels or axis in foreign for axis in x.labels)
        ]
        if not fit:
            return None
        name = min(fit, key=lambda name: getattr(delta, name).array.size)
        factor: Labelled = getattr(delta, name)
        for axis in x.labels:
            first, last = delta.range_of(axis, shape[axis])
            x = x.cut(axis, first, last)
        labels = (*foreign, *factor.labels)
        order = sorted(x.labels, key=labels.index)
        part = x.array.transpose([x.axis(axis) for axis in order]).astype(factor.array.dtype)
        part = lax.expand_dims(part, [i for i, axis in enumerate(labels) if axis not in order])
        product = f(lax.expand_dims(factor.array, range(len(foreign))), part)
        return dataclasses.replace(delta, **{name: Labelled(product, labels)})

    def summed(self, axes: Sequence[int], shape: Sequence[int]) -> "Delta | None":
        """Sum over axes, which ``W`` has still; None if both factors have one, or the gain has."""
        delta = self
        for axis in axes:
            size = shape[axis]
            if axis in delta.a.labels and axis in delta.b.labels:
                return None
            first, last = delta.range_of(axis, size)
            if delta.gain is not None and (last - first < size or axis in delta.gain.labels):
                return None
            if not delta.has(axis):
                delta = delta.scaled(lambda scale, n=last - first: n * scale)
            delta = delta.with_range(axis, 0, size, size)
        return delta.map(lambda x: x.sum(axes))

    def gains(self, shape: Sequence[int]) -> Labelled | None:
        """Return ``1 + gain``, and 1 outside of the ranges; None without a gain."""
        if self.gain is None:
            return None
        gain: Any = self.picked().gain
        for r in self.ranges:
            gain = _along_range(gain, r)
        gain = place(gain, self.ranges, shape)
        return Labelled(1 + gain.array, gain.labels)

    def dense(self, shape: Sequence[int], dtype: Any) -> jax.Array:
        """Return ``scale * a b`` with ``W``'s axes, of size 1 where neither factor has one.

        This is what the library exists to avoid.
        """
        one = self.picked()
        a, b, out = one.a.astype(dtype), one.b.astype(dtype), tuple(range(len(shape)))
        product = contract(a, b, out, precision=lax.Precision.HIGHEST, dtype=dtype)
        return place(product.scaled(one.scale), self.ranges, shape).array

    def added_to(self, total: jax.Array, shape: Sequence[int]) -> jax.Array:
        """Add :meth:`dense` to ``total``, which is ``W``, perhaps with some axes merged."""
        one, w = self.picked(), Labelled(total, tuple(range(total.ndim)))
        if isinstance(one.a, OneHot) and not one.ranges and total.shape == tuple(shape):
            b = one.b.astype(total.dtype)
            if (found := one.a.added_to(w, b.scaled(one.scale))) is not None:
                return found
        update = jnp.broadcast_to(one.dense(shape, total.dtype), shape).reshape(total.shape)
        return total + spread_like(update, total)

    # Stacks of adapters

    def picked(self) -> "Delta":
        """Pick the member of a stack that counts.

        Raises:
            NotImplementedError: inputs choose the members, and there are none.
        """
        if isinstance(self.pick, Router):
            raise self.misrouted()
        if self.pick is None:
            return self
        pick = self.pick.picker(self.b.sizes[Axis.MEMBER])
        return dataclasses.replace(self.map(pick), pick=None)

    def misrouted(self) -> NotImplementedError:
        """Return the error of a weight that no input meets."""
        return NotImplementedError(
            f"lora_routed: the weight {self.leaf.path!r} is used otherwise than by a product with "
            "inputs, which choose the adapters. Leave it out of them: lorafy(..., "
            f"exclude={self.leaf.path!r})"
        )

    @property
    def _is_routed(self) -> bool:
        return isinstance(self.pick, Router)

    def met(self) -> "Delta":
        """Pick the member of a stack, unless the input that meets the delta chooses."""
        return self if self._is_routed else self.picked()

    @property
    def orders(self) -> tuple[tuple[Labelled, Labelled], ...]:
        """The orders in which an input may meet the factors: ``a`` first if it chooses members."""
        return ((self.a, self.b),) if self._is_routed else ((self.a, self.b), (self.b, self.a))

    def weighed(self, small: Labelled, x: Labelled) -> Labelled:
        """Multiply ``small``, the product of ``x`` with a factor, by the scale.

        A router's shares of the members, which depend on ``x``, are in it.

        Raises:
            NotImplementedError: ``x`` is no input that could choose the members.
        """
        if not isinstance(self.pick, Router):
            return small.scaled(self.scale)
        # the product may have batch axes of the weight that x has not
        known = {*x.labels, *(set(self.a.labels) & set(self.b.labels))}
        if not isinstance(x.array, jax.Array) or not known.issuperset(self.pick.directions.labels):
            raise self.misrouted()
        return times(small, self.pick.shares(x, self.scale, small.labels))

    # Steps of a loop

    def leading(self) -> "Delta":
        """Put axis 0 of ``W`` in front, in each array that has it.

        A stack's arrays stay where they are, and the axis is ``STEP``: moved, they would be copied,
        with all the members that are not picked.
        """
        if isinstance(self.pick, Slot):
            return self.map(self.pick.stepping)
        return self.map(lambda x: x.front(0))

    def at_step(self, step: Any) -> "Delta":
        """Note which step counts, for a stack's arrays with an axis ``STEP``."""
        if not isinstance(self.pick, Slot):
            return self
        return dataclasses.replace(self, pick=dataclasses.replace(self.pick, step=step))

    def unscaled(self) -> "Delta":
        """Multiply ``b`` by the scale, which is None then: each step of a loop may have its own."""
        return dataclasses.replace(self, b=self.b.scaled(self.scale), scale=None)

    def stacked(self) -> "Delta":
        """Follow an unscaled ``W`` to the stack of it over the steps of a loop.

        The arrays have been stacked along their first axis.
        """
        delta = super().stacked().map(lambda x: Labelled(x.array, (0, *x.labels)))
        key = None if self.key is None else self.key[0]
        return dataclasses.replace(delta, scale=jnp.ones((), jnp.float32), key=key)


def _own(x: Labelled, other: Labelled) -> list[Any]:
    """Return the axes of ``W`` that ``x`` has and ``other`` has not."""
    return [lab for lab in x.labels if lab not in other.labels and not isinstance(lab, Axis)]


def _along_range(x: Labelled, r: Range) -> Labelled:
    """Give ``x`` the axis of a range, constant along it."""
    return x if r.axis in x.labels else x.broadcast({r.axis: r.stop - r.start})


AnyDelta = Delta | Probe
