"""The two programs of ``serving.py``: read a prompt, and add a token to every row."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import lora_jax
from lora_jax.recipes.models import llama

AXES = llama.Cache(keys=1, values=1, lengths=0)  # those of the rows

# A model is static: another server of the same shapes compiles nothing. The cache, most of what a
# step has in memory, is overwritten where it is.
_compiled = functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")


@_compiled
def read_prompt(lora_params, slots, ids, end, row, cache, *, model):
    """Read ``ids[1, length]`` into a row of the cache: the token after the first ``end``."""
    empty = model.empty(1, cache.keys.shape[2])
    logits, own = by_rows(model)(lora_params, ids, empty, lora_ids=slots)
    put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=row, axis=1)
    # All of the row, so that nothing of who had it before is left: a NaN would get through.
    keys, values = put(cache.keys, own.keys), put(cache.values, own.values)
    return *greedy(logits[0, end - 1]), cache._replace(keys=keys, values=values)


@_compiled
def next_tokens(lora_params, slots, tokens, cache, *, model):
    """Read a token of each row: the one after it."""
    logits, cache = by_rows(model)(lora_params, tokens[:, None], cache, lora_ids=slots)
    return *greedy(logits[:, 0]), cache


def by_rows(model: llama.Llama) -> Callable[..., Any]:
    """The model, where each row has its own adapter."""

    def plain(params, ids, cache):
        return model.apply({"params": params}, ids, cache)

    return lora_jax.many.lora_rows(plain, in_axes=(None, 0, AXES), out_axes=(0, AXES))


def greedy(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The likeliest token, and the logarithm of its probability."""
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32))
    return logprobs.argmax(-1).astype(jnp.int32), logprobs.max(-1)
