"""Compile the two programs of ``serving.py``: read one prompt; add one token to every row."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import lora_jax
from lora_jax.recipes.models import llama

AXES = llama.Cache(keys=1, values=1, lengths=0)  # the axes of the batch

# The model is static: a second server of the same shapes compiles nothing. The cache, most of a
# step's memory, is updated in place.
_compiled = functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")


@_compiled
def read_prompt(lora_params, slots, ids, end, row, cache, *, model):
    """Read ``ids[1, length]`` into a row of the cache; return the token after the first ``end``."""
    empty = model.empty(1, cache.keys.shape[2])
    logits, new = with_adapters(model)(lora_params, ids, empty, lora_ids=slots)
    update = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=row, axis=1)
    # Overwrite the entire row: a NaN of the previous request would get through the mask.
    keys, values = update(cache.keys, new.keys), update(cache.values, new.values)
    return *greedy(logits[0, end - 1]), cache._replace(keys=keys, values=values)


@_compiled
def next_tokens(lora_params, slots, tokens, cache, *, model):
    """Read one token of every row; return the tokens after them."""
    logits, cache = with_adapters(model)(lora_params, tokens[:, None], cache, lora_ids=slots)
    return *greedy(logits[:, 0]), cache


def with_adapters(model: llama.Llama) -> Callable[..., Any]:
    """Return the model as a function of a batch in which each row has its own adapter."""

    def plain(params, ids, cache):
        return model.apply({"params": params}, ids, cache)

    return lora_jax.many.lora_rows(plain, in_axes=(None, 0, AXES), out_axes=(0, AXES))


def greedy(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the likeliest token and the logarithm of its probability."""
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32))
    return logprobs.argmax(-1).astype(jnp.int32), logprobs.max(-1)
