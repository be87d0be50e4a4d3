"""``LoraArray``: a weight while ``lora(fn)`` runs, ``W`` and its low-rank deltas, apart."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax._adapter.factors import wide
from lora_jax._transform.delta import Delta, Labels
from lora_jax._transform.labelled import aligned, spread_like
from lora_jax._transform.lazy import Lazy, force
from lora_jax._transform.origin import Leaf


@partial(jax.tree_util.register_dataclass, data_fields=("w", "deltas"), meta_fields=("unfolded",))
@dataclasses.dataclass(frozen=True, eq=False)
class LoraArray:
    """A weight ``w`` with its deltas, at some point of its way through the function.

    Attributes:
        w: the frozen part, an array or a ``Lazy``.
        deltas: what is added to it.
        unfolded: None; or, where a reshape has merged axes of different roles, the shape that
            the deltas' labels are of. ``w`` is that shape reshaped.
    """

    w: Any
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

    def keyed(self, count: Any) -> "LoraArray":
        """The weight with other keys, by number."""

        def fold(delta: Delta) -> Delta:
            if delta.key is None:
                return delta
            return dataclasses.replace(delta, key=jax.random.fold_in(delta.key, count))

        return self.map(self.w, fold)

    @property
    def has_keys(self) -> bool:
        """Whether some of what it reads is dropped."""
        return any(delta.key is not None for delta in self.deltas)

    @property
    def has_slots(self) -> bool:
        """Whether some of its deltas are of stacks."""
        return any(delta.slot is not None for delta in self.deltas)

    @property
    def is_read(self) -> bool:
        """Whether all of its deltas are read, so that it is an activation."""
        return all(delta.is_read for delta in self.deltas)

    @property
    def is_lookup(self) -> bool:
        """Whether it is what a lookup has read: rows, not a choice of kernels."""
        return (
            bool(self.deltas)
            and self.is_read
            and all(
                delta.past.read
                and (
                    sum(not delta.past.read.issuperset(group) for group in delta.past.axes) <= 1
                    if delta.is_probe
                    else not delta.reads
                )
                for delta in self.deltas
            )
        )

    def dense(self) -> jax.Array:
        """``W`` plus its deltas, summed in at least float32, rounded once to ``W``'s dtype."""
        dtype = wide(self.w.dtype)
        total = force(self.w).astype(dtype)
        shape = self.unfolded or self.shape
        for delta in self.deltas:
            if not delta.is_probe:
                update = jnp.broadcast_to(delta.dense(shape, dtype), shape).reshape(self.shape)
                total += spread_like(update, total)
        for gain, labels in self.gains():
            gain = jnp.broadcast_to(aligned(gain, labels, range(len(shape))), shape)
            total *= spread_like(gain.reshape(self.shape), total).astype(dtype)
        return total.astype(self.w.dtype)

    def gains(self) -> list[tuple[jax.Array, Labels]]:
        """What it is multiplied by, and along which axes."""
        shape = self.unfolded or self.shape
        return [gain for delta in self.deltas if (gain := delta.gains(shape)) is not None]


def gains_around(
    v: LoraArray, summed: Sequence[int], matched: Sequence[int]
) -> tuple[list[tuple[jax.Array, Labels]], list[tuple[jax.Array, Labels]]] | None:
    """The gains that go onto the other operand of a product, and those that go onto the result.

    None where one is along axes that are summed over and others that are not.
    """
    before, after = [], []
    for gain, labels in v.gains():
        if not set(labels).intersection(summed):
            after.append((gain, labels))
        elif set(labels).issubset([*summed, *matched]):
            before.append((gain, labels))
        else:
            return None
    return before, after


def renamed(v: Any, names: Mapping[Leaf, Leaf]) -> Any:
    """A value as of other weights."""
    if not isinstance(v, LoraArray):
        return v

    def rename(delta: Delta) -> Delta:
        return dataclasses.replace(delta, past=delta.past._replace(leaf=names[delta.leaf]))

    return v.map(v.w, rename)


def adapted(w: jax.Array, deltas: Iterable[Delta | None]) -> Any:
    """A weight with those of the deltas that are left; itself if none is and it is an array."""
    deltas = tuple(delta for delta in deltas if delta is not None)
    return LoraArray(w, deltas) if deltas or isinstance(w, Lazy) else w
