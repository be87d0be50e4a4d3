"""What ``serve_many.py`` says of itself: that its tokens are right, and what it compiled."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from serving import Completion

import lora_jax
from lora_jax.recipes.models import llama

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.5}  # of a logit: what rounding alone may come to


def check(
    model: llama.Llama, bank: lora_jax.many.AdapterBank, base: Any, done: Sequence[Completion]
) -> str:
    """Compare with what each adapter gives alone, by ``lora_jax.lora``, without a cache.

    All tokens are read at once: if each is the likeliest after those before it, then token by
    token the same ones had come out.

    Returns:
        A line that says so.

    Raises:
        ValueError: a token is another one, by more than rounding.
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
        logits = np.asarray(logits, np.float64)[
            0, len(prompt) - 1 :
        ]  # [tokens or more, vocabulary]
        for k, (row, token) in enumerate(zip(logits, one.tokens, strict=False)):
            likeliest, gap = int(row.argmax()), float(row.max() - row[token])
            if not gap <= TOLERANCE[model.dtype.name]:
                raise ValueError(
                    f"--check: new token {k} of request {one.number} is {token}, and alone "
                    f"{name or 'the base'} gives {likeliest}, likelier by {gap:.2g}"
                )
            logprob = row[token] - row.max() - np.log(np.exp(row - row.max()).sum())
            worst = max(worst, abs(logprob - one.logprobs[k]))
            tokens, ties = tokens + 1, ties + (likeliest != token)
    rest = f" but for {ties} that are as likely, to rounding" if ties else ""
    return (
        f"checked       {len(done)} requests, {tokens} tokens: equal to those of each adapter "
        f"alone{rest}; logprobs within {worst:.1g}"
    )


def plain_of(model: llama.Llama) -> Any:
    """The model as a function of parameters and ids."""
    return lambda params, ids: model.apply({"params": params}, ids)


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """What XLA compiles meanwhile, on any thread."""
    seen: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(kwargs.get("fun_name", event))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
