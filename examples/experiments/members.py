"""Train adapters as a stack, each on its own sentences, and return them."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tasks
from results import KEYS, Results
from stacks import together
from sweeping import make_stack_step, optimizer, with_rate
from training import Tokens, batches, make_step

import lora_jax


def first_layers(inputs: tasks.Inputs, layers: int) -> tasks.Inputs:
    """Keep the first layers of the encoder: a smaller model that compiles faster."""
    own = {k for k in inputs.params if not k.startswith("layer_")}
    params = {k: inputs.params[k] for k in (*own, *(f"layer_{i}" for i in range(layers)))}
    encoder = inputs.encoder.clone(num_hidden_layers=layers)
    return dataclasses.replace(inputs, encoder=encoder, params=params)


def shorter(task: tasks.Task, settings: Mapping[str, Any]) -> tasks.Task:
    """Cut the sentences of a task to ``length`` tokens, and each split to at most ``most``."""
    cut = {
        split: tasks.cut(getattr(task, split), settings["length"], settings["most"])
        for split in ("train", "validation", "test")
    }
    return dataclasses.replace(task, **cut)


def append_missing(results: Results, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append those rows that are not in the results yet."""
    results.append(r for r in rows if results.missing([tuple(r[name] for name in KEYS)]))


def train(
    apply: Callable[..., jax.Array],
    members: Sequence[lora_jax.LoraParams],
    data: Sequence[Tokens],
    seeds: Sequence[int],
    *,
    rate: float,
    steps: int,
    batch_size: int,
) -> list[lora_jax.LoraParams]:
    """Train all members at once, by AdamW with a warm-up and a cosine decay.

    Args:
        apply: ``lora_jax.lora`` of ``(params, ids, mask) -> logits``.
        members: the initial parameters, over one base.
        data: the training data of each member.
        seeds: sets the order of each member's batches.
        rate: the highest learning rate.
        steps: the number of steps.
        batch_size: the number of sentences in each member's batch.

    Raises:
        ValueError: a loss is not finite.
    """
    tx: Any = optimizer(steps)
    step = make_stack_step(make_step(apply, tx), together(len(members)))
    trainable, frozen = lora_jax.split(lora_jax.many.stack(members))
    opt_state = with_rate(jax.vmap(tx.init)(trainable), [rate] * len(members))
    orders = [
        batches(len(tokens["labels"]), batch_size, steps, seed)
        for tokens, seed in zip(data, seeds, strict=True)
    ]
    losses = jnp.zeros(len(members))
    for chosen in zip(*orders, strict=True):
        rows = [{k: x[own] for k, x in d.items()} for d, own in zip(data, chosen, strict=True)]
        batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        trainable, opt_state, losses = step(trainable, opt_state, frozen, batch)
    if not np.isfinite(losses).all():
        raise ValueError(f"a loss is {np.asarray(losses)}: lower the rate, now {rate:g}")
    return lora_jax.many.unstack(lora_jax.combine(trainable, frozen), trim=False)
