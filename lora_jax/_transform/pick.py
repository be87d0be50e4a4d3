"""``Slot`` and ``Router``: which members of a stack of adapters count.

The factors of a stack have an axis ``MEMBER``. A member is picked where the factors meet their
input, not before: under a ``vmap`` over batch rows with a slot each, picking makes an array of the
factors of every row.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax._transform.labelled import Axis, Labelled, Labels, contract


@partial(jax.tree_util.register_dataclass, data_fields=("index", "step"), meta_fields=())
@dataclasses.dataclass(frozen=True, eq=False)
class Slot:
    """One member of a stack, by number: -1 is none of them; any other number gives NaN.

    Attributes:
        index: the number, a 0-d integer array.
        step: the number of the present step of a loop, if factors have an axis ``STEP``.
    """

    index: Any
    step: Any = None

    def scale(self, scales: jax.Array) -> jax.Array:
        """Pick the member's scale: 0 of none, NaN of a member that does not exist."""
        k = jnp.clip(self.index, 0, scales.shape[0] - 1)
        other = jnp.where(self.index == -1, 0.0, jnp.nan).astype(scales.dtype)
        return jnp.where(self.index == k, scales[k], other)

    def picker(self, count: int) -> Callable[[Labelled], Labelled]:
        """Return a function that picks one of ``count`` members, and the step, from an array."""
        k = jnp.clip(self.index, 0, count - 1)
        places = {Axis.MEMBER: k, Axis.STEP: self.step}

        def pick(x: Labelled) -> Labelled:
            if not places.keys() & set(x.labels):
                return x
            at = x.array.at[tuple(places.get(label, slice(None)) for label in x.labels)]
            one = at.get(mode="promise_in_bounds", wrap_negative_indices=False)
            labels = tuple(label for label in x.labels if label not in places)
            # zeros of none: whatever the member at k holds, it gets no gradient
            return Labelled(jnp.where(self.index == k, one, jnp.zeros_like(one)), labels)

        return pick

    def stepping(self, x: Labelled) -> Labelled:
        """Label axis 0 ``STEP``, for the steps of a loop; the step of the loop around is picked."""
        if Axis.STEP in x.labels:
            array = lax.dynamic_index_in_dim(x.array, self.step, x.axis(Axis.STEP), keepdims=False)
            x = Labelled(array, tuple(label for label in x.labels if label != Axis.STEP))
        return Labelled(x.array, tuple(Axis.STEP if label == 0 else label for label in x.labels))


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("directions",),
    meta_fields=("top_k", "temperature"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class Router:
    """Shares of the members of a stack, which each input chooses by a direction per member.

    Attributes:
        directions: ``v``, ``[*batch, *in, member]``.
        top_k: how many members count: those with the largest ``|x v|``, and ties with the last.
        temperature: divides ``|x v|`` before the softmax.
    """

    directions: Labelled
    top_k: int
    temperature: float

    def shares(self, x: Labelled, scales: jax.Array, out: Labels) -> Labelled:
        """Return each input's share of each member, times the member's scale.

        Args:
            x: the inputs.
            scales: ``[member]``.
            out: the labels of ``x a``, of which the result has those of ``x`` or the directions.
        """
        known = (*x.labels, *self.directions.labels)
        free = [lab for lab in out if lab != Axis.MEMBER and lab in known]
        kind: Any = {"precision": lax.Precision.HIGHEST, "dtype": jnp.float32}
        x, directions = x.astype(jnp.float32), self.directions.astype(jnp.float32)
        found = jnp.abs(contract(x, directions, [*free, Axis.MEMBER], **kind).array)
        best = lax.top_k(found, min(self.top_k, found.shape[-1]))[0]
        # a member that does nothing has no direction, and gets nothing of an input
        powers = jnp.exp((found - best[..., :1]) / self.temperature)
        powers = jnp.where((found >= best[..., -1:]) & (found > 0), powers, 0)
        shares = powers / jnp.maximum(powers.sum(-1, keepdims=True), jnp.finfo(powers.dtype).tiny)
        scale = jnp.broadcast_to(scales.astype(shares.dtype), shares.shape)
        parts = jnp.where(shares > 0, shares * scale, 0)  # a scale may be NaN
        return Labelled(parts, (*free, Axis.MEMBER))  # [*free, member]
