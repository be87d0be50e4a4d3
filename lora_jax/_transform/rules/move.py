"""Primitives that move a weight without reading it: the deltas follow by their labels."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax import _jax
from lora_jax._transform.context import Context
from lora_jax._transform.lazy import bind
from lora_jax._transform.lora_array import LoraArray, frozen
from lora_jax._transform.rule import rule


@rule("transpose")
def transpose(ctx: Context, eqn, values):
    """Rename the labels; the factors stay where they are."""
    (v,) = values
    (w,) = bind(eqn, [v.w])
    new = {int(old): i for i, old in enumerate(eqn.params["permutation"])}
    return [v.map(w, lambda delta: delta.moved(new, w.ndim))]


@rule("convert_element_type", "reduce_precision", "copy", "copy_p", "pvary", "pcast", folds=True)
def convert(ctx: Context, eqn, values):
    """Cast or copy the frozen part; the factors stay float32 masters, cast where they are used."""
    (v,) = values
    if not jnp.issubdtype(eqn.params.get("new_dtype", v.w.dtype), jnp.floating):
        return NotImplemented
    (w,) = bind(eqn, [v.w])
    return [dataclasses.replace(v, w=w)]


@rule("sharding_constraint", "device_put", "optimization_barrier", "name", folds=True)
def pass_on(ctx: Context, eqn, values):
    """Give the frozen part the place, order or name that is asked for."""
    return [
        dataclasses.replace(v, w=out) if isinstance(v, LoraArray) else out
        for v, out in zip(values, bind(eqn, frozen(values)), strict=True)
    ]


@rule("reshard")
def reshard(ctx: Context, eqn, values):
    """Reshard the frozen part; the factors follow to another mesh, not to another sharding."""
    (v,) = values
    (w,) = bind(eqn, [v.w])
    return [v.map(w, lambda delta: jax.tree.map(lambda x: _jax.to_mesh_of(eqn, x), delta))]


@rule("stop_gradient", folds=True)
def stop_gradient(ctx: Context, eqn, values):
    """Stop the gradients to the factors, too."""
    (v,) = values
    return [jax.tree.map(lax.stop_gradient, v)]
