"""Compute the norms of a weight's columns, which DoRA trains apart from their directions."""

import dataclasses

import jax
import jax.numpy as jnp

from lora_jax._adapter.factors import wide
from lora_jax._adapter.params import LoraParams, without_adapters
from lora_jax._weights.axes import role_axes
from lora_jax._weights.paths import flatten
from lora_jax._weights.quantized import plain_array
from lora_jax._weights.ranges import part_of


def squared_norm(w: jax.Array, layout: str) -> jax.Array:
    """Return ``|W|^2`` of every column: ``[*batch, *out]``, in at least float32."""
    x = w.astype(wide(w.dtype))
    kept = [*role_axes(layout, "b"), *role_axes(layout, "o")]
    squares = jnp.square(x).sum(role_axes(layout, "i"))
    left = [i for i in range(len(layout)) if i in kept]
    return squares.transpose([left.index(i) for i in kept])


def with_norms(lora_params: LoraParams) -> LoraParams:
    """Fill in the norms of this base's columns wherever there is a magnitude."""
    leaves, adapter = flatten(without_adapters(lora_params))[0], lora_params.adapter
    factors = dict(adapter.factors)
    for key, f in factors.items():
        if f.magnitude is not None:
            part = part_of(key, leaves)
            w = plain_array(leaves[part.path])[part.slices(len(f.layout))]
            factors[key] = dataclasses.replace(f, norm=squared_norm(w, f.layout))
    return dataclasses.replace(lora_params, adapter=dataclasses.replace(adapter, factors=factors))
