"""Dropout of what adapters read: some entries are zero, and the others larger."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax._transform.delta import AnyDelta, Delta
from lora_jax._transform.labelled import Axis, Labelled, spread_like
from lora_jax._transform.lora_array import LoraArray


@dataclasses.dataclass
class Dropout:
    """The dropout of one run, at deltas that have a key.

    Attributes:
        share: the share of entries to drop.
        draws: how many keys have been derived from the deltas' keys.
    """

    share: float
    draws: int = 0

    def product(
        self, key: jax.Array, product: Callable[..., jax.Array], x: jax.Array, factor: jax.Array
    ) -> jax.Array:
        """Return ``product(drop(x), factor)``."""
        # checkpointed: neither what is dropped is kept, nor what is left
        run = jax.checkpoint(lambda x, factor, key: product(self._drop(key, x), factor))
        return run(x, factor, self._derived(key))

    def rows(self, delta: AnyDelta) -> AnyDelta:
        """Drop entire rows of ``a``, if the delta has a key and ``a`` is what a lookup has read."""
        if not isinstance(delta, Delta) or delta.key is None or not delta.origin.read:
            return delta
        a, key = delta.a, self._derived(delta.key)
        array = self._drop(key, a.array, along=(a.axis(Axis.RANK),))
        return dataclasses.replace(delta, a=Labelled(array, a.labels))

    def again(self, values: list[Any], step: Any = None) -> list[Any]:
        """Return the values for another run of a body, or for a step: with keys of its own."""
        if not self.share:
            return values
        if step is None:
            self.draws += 1
            step = self.draws
        return [_with_keys(v, step) if isinstance(v, LoraArray) else v for v in values]

    def _derived(self, key: jax.Array) -> jax.Array:
        self.draws += 1
        return jax.random.fold_in(key, self.draws)

    def _drop(self, key: jax.Array, x: jax.Array, along: Sequence[int] = ()) -> jax.Array:
        """Drop entries of ``x``, all together along some axes, and scale up the others."""
        shape = [1 if i in along else n for i, n in enumerate(x.shape)]
        keep = spread_like(jax.random.bernoulli(key, 1 - self.share, shape), x)
        return x * (keep.astype(x.dtype) * jnp.asarray(1 / (1 - self.share), x.dtype))


def _with_keys(v: LoraArray, number: Any) -> LoraArray:
    """Derive the keys of a weight's deltas by a number."""

    def derive(delta: AnyDelta) -> AnyDelta:
        if not isinstance(delta, Delta) or delta.key is None:
            return delta
        return dataclasses.replace(delta, key=jax.random.fold_in(delta.key, number))

    return v.map(v.w, derive)
