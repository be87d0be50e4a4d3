"""Compare the completions of ``serve_many.py`` with those of each adapter alone."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from serving import Completion

import lora_jax
from lora_jax.recipes.models import llama

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.5}  # largest rounding error of a logit


def check(
    model: llama.Llama, bank: lora_jax.many.AdapterBank, base: Any, done: Sequence[Completion]
) -> str:
    """Compare tokens and logprobs with those of ``lora_jax.lora`` without a cache.

    One call reads all tokens of a completion: if each is the likeliest after those before it, then
    decoding token by token gives the same ones.

    Returns:
        A line with the result.

    Raises:
        ValueError: a token differs, by more than rounding.
    """
    plain = plain_of(model)
    alone, adapted = jax.jit(plain), jax.jit(lora_jax.lora(plain))
    size = max(len(one.request.prompt) + len(one.tokens) for one in done)
    tokens, ties, worst = 0, 0, 0.0
    for one in done:
        prompt, name, _ = one.request
        ids = np.zeros((1, size), np.int32)
        ids[0, : len(prompt) + len(one.tokens)] = [*prompt, *one.tokens]
        logits = alone(base, ids) if name is None else adapted(bank[name], ids)
        logits = np.asarray(logits[0], np.float64)[len(prompt) - 1 :]  # [>= tokens, vocabulary]
        for k, (x, token) in enumerate(zip(logits, one.tokens, strict=False)):
            likeliest, gap = int(x.argmax()), float(x.max() - x[token])
            if not gap <= TOLERANCE[model.dtype.name]:
                raise ValueError(
                    f"--check: new token {k} of request {one.number} is {token}, but "
                    f"{name or 'the base'} alone gives {likeliest}, whose logit is larger by "
                    f"{gap:.2g}"
                )
            logprob = x[token] - x.max() - np.log(np.exp(x - x.max()).sum())
            worst = max(worst, abs(logprob - one.logprobs[k]))
            tokens, ties = tokens + 1, ties + (likeliest != token)
    rest = f", except {ties} ties within rounding" if ties else ""
    return (
        f"checked       {len(done)} requests, {tokens} tokens: equal to those of each adapter "
        f"alone{rest}; logprobs within {worst:.1g}"
    )


def plain_of(model: llama.Llama) -> Any:
    """Return the model as a function of parameters and ids."""
    return lambda params, ids: model.apply({"params": params}, ids)
