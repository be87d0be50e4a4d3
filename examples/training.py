"""Train an adapter: the base is an input of the step, and never an output."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np
import optax

import lora_jax

Tokens = Mapping[str, np.ndarray]  # "ids" and "mask" [n, length], "labels" [n]


@dataclass
class Run:
    """The result of a training run.

    Attributes:
        lora_params: the trained parameters.
        losses: the loss of every step.
        validation: pairs ``(step, accuracy)``.
        seconds_per_step: the median, without compilation and evaluation.
        optimizer_bytes: the size of the optimizer's state.
    """

    lora_params: lora_jax.LoraParams
    losses: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    seconds_per_step: float = 0.0
    optimizer_bytes: int = 0


def make_step(apply: Callable[..., jax.Array], tx: optax.GradientTransformation):
    """Make the step ``(trainable, opt_state, frozen, batch) -> (trainable, opt_state, loss)``.

    Args:
        apply: ``lora_jax.lora`` of ``(params, ids, mask) -> logits``.
        tx: any Optax optimizer; its only parameters are those of the adapter.
    """

    def loss_fn(lora_params, batch):
        logits = apply(lora_params, batch["ids"], batch["mask"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(trainable, opt_state, frozen, batch):
        lora_params = lora_jax.combine(trainable, frozen)
        loss, grads = lora_jax.value_and_grad(loss_fn)(lora_params, batch)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, loss

    return step


def train(
    apply: Callable[..., jax.Array],
    lora_params: lora_jax.LoraParams,
    data: Tokens,
    validation: Tokens,
    *,
    learning_rate: float,
    steps: int,
    batch_size: int,
    seed: int,
    on_step: Callable[[float], None] = lambda loss: None,
) -> Run:
    """Train with AdamW: warm up over a tenth of the steps, then decay by a cosine.

    Args:
        apply: jitted ``lora_jax.lora`` of ``(params, ids, mask) -> logits``.
        lora_params: the initial parameters. The adapter is donated; the base is not.
        data: the training data, in shuffled epochs; a partial batch is skipped.
        validation: the data to measure the accuracy on, eight times.
        learning_rate: the highest learning rate.
        steps: the number of steps.
        batch_size: the number of sentences per step.
        seed: sets the order of the batches.
        on_step: called after every step with its loss.

    Raises:
        ValueError: a batch is larger than the data, or a loss is not finite.
    """
    if batch_size > len(data["labels"]):
        raise ValueError(
            f"batch_size={batch_size}: there are only {len(data['labels'])} sentences to train on"
        )
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 10, steps)
    tx = optax.adamw(schedule)
    step = make_step(apply, tx)
    trainable, frozen = lora_jax.split(lora_params)
    opt_state = tx.init(trainable)
    run = Run(lora_params, optimizer_bytes=nbytes(opt_state))
    seconds = []
    for i, rows in enumerate(batches(len(data["labels"]), batch_size, steps, seed)):
        batch = {name: column[rows] for name, column in data.items()}
        start = time.perf_counter()
        trainable, opt_state, loss = step(trainable, opt_state, frozen, batch)
        run.losses.append(float(loss))
        seconds.append(time.perf_counter() - start)
        if not math.isfinite(run.losses[-1]):
            raise ValueError(
                f"the loss is {run.losses[-1]} after {i + 1} steps: lower the learning rate, "
                f"now {learning_rate:g}"
            )
        on_step(run.losses[-1])
        if (i + 1) % math.ceil(steps / 8) == 0 or i + 1 == steps:
            logits = predict(apply, lora_jax.combine(trainable, frozen), validation)
            run.validation.append((i + 1, accuracy(logits, validation["labels"])))
    run.lora_params = lora_jax.combine(trainable, frozen)
    run.seconds_per_step = float(np.median(seconds[1:] or seconds))  # the first step compiles
    return run


def predict(
    apply: Callable[..., jax.Array], params: Any, tokens: Tokens, batch_size: int = 100
) -> np.ndarray:
    """Compute the logits ``[n, labels]`` of all sentences in batches of one shape."""
    n = len(tokens["ids"])
    logits = []
    for start in range(0, n, batch_size):
        rows = np.arange(start, start + batch_size) % n  # pad the last batch with the first rows
        logits.append(np.asarray(apply(params, tokens["ids"][rows], tokens["mask"][rows])))
    return np.concatenate(logits)[:n]


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of sentences whose largest logit is that of the label."""
    return float((logits.argmax(-1) == labels).mean())


def nbytes(tree: Any) -> int:
    """Return the bytes of all arrays in a tree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def batches(n: int, batch_size: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    """Yield the indices of each step's batch; each epoch has a new random order."""
    rng = np.random.default_rng(seed)
    per_epoch = n // batch_size
    for i in range(steps):
        if i % per_epoch == 0:
            order = rng.permutation(n)
        yield order[i % per_epoch * batch_size :][:batch_size]
