"""``LoraArray``: a weight ``W`` and its updates, apart, while ``lora(fn)`` runs."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax._adapter.factors import wide
from lora_jax._transform.delta import AnyDelta, Delta
from lora_jax._transform.labelled import Labelled, spread_like
from lora_jax._transform.lazy import Lazy, force
from lora_jax._transform.origin import Leaf
from lora_jax._transform.pick import Slot
from lora_jax._transform.probe import Probe
from lora_jax._transform.regroup import axis_groups


@partial(jax.tree_util.register_dataclass, data_fields=("w", "deltas"), meta_fields=("unfolded",))
@dataclasses.dataclass(frozen=True, eq=False)
class LoraArray:
    """A weight ``w`` with its deltas, at some point of its way through the function.

    Attributes:
        w: the frozen part, an array or a ``Lazy``.
        deltas: the updates that are added to it, or probes.
        unfolded: the shape whose axes the deltas' labels name, after a reshape that merged axes of
            different roles: ``w`` is an array of that shape, reshaped. None otherwise.
    """

    w: Any
    deltas: tuple[AnyDelta, ...]
    unfolded: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return self.w.shape

    @property
    def dtype(self) -> Any:
        """The dtype of the weight."""
        return self.w.dtype

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        """The weights it is made of."""
        return tuple(dict.fromkeys(delta.leaf for delta in self.deltas))

    @property
    def updates(self) -> tuple[Delta, ...]:
        """Its deltas that have arrays: all but the probes."""
        return tuple(delta for delta in self.deltas if isinstance(delta, Delta))

    def map(self, w: Any, f: Callable[[Any], Any]) -> "LoraArray":
        """Replace the weight by ``w``, and each delta by ``f`` of it."""
        return dataclasses.replace(self, w=w, deltas=tuple(map(f, self.deltas)))

    @property
    def has_keys(self) -> bool:
        """Return whether some of what it reads is dropped."""
        return any(delta.key is not None for delta in self.updates)

    @property
    def has_slots(self) -> bool:
        """Return whether some of its deltas are stacks of which one member is to be picked."""
        return any(isinstance(delta.pick, Slot) for delta in self.updates)

    @property
    def is_read(self) -> bool:
        """Return whether all of its deltas are read, so that it is an activation."""
        return all(delta.is_read for delta in self.deltas)

    @property
    def is_lookup(self) -> bool:
        """Return whether it is what a lookup has read: rows of a table, not a choice of kernels."""
        return bool(self.deltas) and self.is_read and all(delta.is_lookup for delta in self.deltas)

    @property
    def is_vector(self) -> bool:
        """Return whether it is probed, and may be one row of a table, or the vector of a layer."""
        return bool(self.deltas) and all(
            isinstance(delta, Probe) and delta.is_vector for delta in self.deltas
        )

    def settled(self) -> "LoraArray":
        """Let a probed weight's merged axes stay merged; any other weight is returned as it is."""
        if self.unfolded is None or self.updates:
            return self
        groups = axis_groups(self.unfolded, self.shape)
        probes = (delta for delta in self.deltas if isinstance(delta, Probe))
        return LoraArray(self.w, tuple(d.merged(groups, len(self.shape)) for d in probes))

    def dense(self) -> jax.Array:
        """Add up ``W`` and its deltas, in at least float32, rounded once to ``W``'s dtype."""
        dtype = wide(self.w.dtype)
        total = force(self.w).astype(dtype)
        shape = self.unfolded or self.shape
        for delta in self.updates:
            total = delta.added_to(total, shape)
        for gain in self.gains():
            factor = jnp.broadcast_to(gain.aligned(range(len(shape))), shape)
            total *= spread_like(factor.reshape(self.shape), total).astype(dtype)
        return total.astype(self.w.dtype)

    def gains(self) -> list[Labelled]:
        """Return what it is multiplied by."""
        shape = self.unfolded or self.shape
        return [gain for delta in self.updates if (gain := delta.gains(shape)) is not None]


def frozen(values: Iterable[Any]) -> list[Any]:
    """Return the values with the frozen part of each weight."""
    return [v.w if isinstance(v, LoraArray) else v for v in values]


def gains_around(
    v: LoraArray, summed: Sequence[int], matched: Sequence[int]
) -> tuple[list[Labelled], list[Labelled]] | None:
    """Split the gains of a product: those of the other operand, and those of the result.

    None if a gain is along axes that are summed over and others that are neither summed nor
    matched.
    """
    before, after = [], []
    for gain in v.gains():
        if not set(gain.labels).intersection(summed):
            after.append(gain)
        elif set(gain.labels).issubset([*summed, *matched]):
            before.append(gain)
        else:
            return None
    return before, after


def with_leaves(v: Any, new: Mapping[Leaf, Leaf]) -> Any:
    """Let a value belong to the weights ``new[leaf]``."""
    if not isinstance(v, LoraArray):
        return v

    def rename(delta: AnyDelta) -> AnyDelta:
        return dataclasses.replace(delta, origin=delta.origin._replace(leaf=new[delta.leaf]))

    return v.map(v.w, rename)


def adapted(w: Any, deltas: Iterable[AnyDelta | None]) -> Any:
    """Return a weight with the deltas that are not None; an array without any as it is."""
    kept = tuple(delta for delta in deltas if delta is not None)
    return LoraArray(w, kept) if kept or isinstance(w, Lazy) else w
