"""Train many adapters at once, each with its optimizer state and rate; stop the worse ones early.

This module handles no models and no files; ``sweep.py`` does.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sweep_report import Trial, best_first
from training import Tokens, accuracy, batches, make_step, predict

import lora_jax

RUNGS = (1 / 4, 1 / 2, 1)  # shares of the steps: accuracy is measured here, and losers stop

Member = tuple[Trial, int]  # the setting and the seed of one adapter of the stack


def optimizer(steps: int) -> optax.GradientTransformation:
    """Make the AdamW of ``training.train``, with the highest learning rate as data in its state."""
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, steps // 10, steps)

    def adamw(learning_rate):
        return optax.chain(optax.adamw(shape), optax.scale(learning_rate))

    return optax.inject_hyperparams(adamw)(learning_rate=1.0)


def with_rate(opt_state: Any, rate: Any) -> Any:
    """Replace the rate in a state by another one, or by one per member."""
    old = opt_state.hyperparams["learning_rate"]
    rates = {"learning_rate": jnp.asarray(rate, old.dtype)}
    return opt_state._replace(hyperparams=opt_state.hyperparams | rates)


def make_stack_step(step: Callable[..., Any], together: int):
    """Map the step of one adapter over a stack, ``together`` members at a time.

    A small ``together`` keeps the activations small; the results are the same.
    """

    def stack_step(trainable, opt_state, frozen, batch):
        def member_step(member):
            trainable, opt_state, adapter, batch = member
            return step(trainable, opt_state, lora_jax.LoraParams(frozen.base, adapter), batch)

        members = (trainable, opt_state, frozen.adapter, batch)
        size = len(batch["labels"])
        return jax.lax.map(member_step, members, batch_size=min(together, size))

    return jax.jit(stack_step, donate_argnums=(0, 1))


def sweep(
    apply: Callable[..., jax.Array],
    adapters: Sequence[lora_jax.LoraParams],
    members: Sequence[Member],
    data: Tokens,
    validation: Tokens,
    *,
    steps: int,
    batch_size: int,
    halving: bool = True,
    together: int = 4,
    on_step: Callable[[int, float, np.ndarray], None] = lambda count, seconds, losses: None,
    on_rung: Callable[[int, list[Trial], list[Trial]], None] = lambda step, trials, kept: None,
) -> tuple[list[Member], lora_jax.LoraParams]:
    """Train all adapters at once, each as ``training.train`` trains it alone.

    Args:
        apply: jitted ``lora_jax.lora`` of ``(params, ids, mask) -> logits``.
        adapters: the initial adapters, over one base.
        members: the trial of each adapter, whose ``scores`` are filled in, and its seed, which
            sets the order of its batches.
        data: the training data.
        validation: the data to measure the accuracy on, at each rung.
        steps: the number of steps.
        batch_size: the number of sentences per step for each adapter.
        halving: whether the worse half of the trials stops at each rung. The step is compiled
            again for the remaining ones.
        together: the number of adapters that the step computes at a time.
        on_step: called after every step with the number of adapters, the seconds and the losses.
        on_rung: called with the step, the trials measured there, and those that continue.

    Returns:
        The members that trained to the end, and their stack.

    Raises:
        ValueError: a batch is larger than the data, or every trial has diverged.
    """
    if batch_size > (n := len(data["labels"])):
        raise ValueError(f"--batch-size {batch_size}: there are only {n} sentences to train on")
    tx: Any = optimizer(steps)
    step = make_stack_step(make_step(apply, tx), together)
    trainable, frozen = lora_jax.split(lora_jax.many.stack(adapters))
    members = list(members)
    opt_state = with_rate(jax.vmap(tx.init)(trainable), [trial.rate for trial, _ in members])
    orders = {seed: list(batches(n, batch_size, steps, seed)) for _, seed in members}
    rungs = {max(1, round(steps * share)) for share in RUNGS}
    for k in range(steps):
        chosen = np.stack([orders[seed][k] for _, seed in members])  # [adapters, batch]
        batch = {name: column[chosen] for name, column in data.items()}
        start = time.perf_counter()
        trainable, opt_state, losses = step(trainable, opt_state, frozen, batch)
        losses = np.asarray(losses)
        on_step(len(members), time.perf_counter() - start, losses)
        if k + 1 not in rungs:
            continue
        trials = measure(apply, lora_jax.combine(trainable, frozen), members, validation, k + 1)
        keep = math.ceil(len(trials) / 2) if halving and k + 1 < steps else len(trials)
        kept = best_first(trials)[:keep]
        on_rung(k + 1, trials, kept)
        if keep < len(trials):
            best = [i for i, (trial, _) in enumerate(members) if trial in kept]
            trainable, frozen, opt_state = lora_jax.many.take((trainable, frozen, opt_state), best)
            members = [members[i] for i in best]
    return members, lora_jax.combine(trainable, frozen)


def scores(
    apply: Callable[..., jax.Array], stacked: lora_jax.LoraParams, tokens: Tokens
) -> list[float]:
    """Return the accuracy of every member of a stack; NaN if its logits are not finite."""
    out = []
    for single in lora_jax.many.unstack(stacked, trim=False):  # equal shapes: one program
        logits = predict(apply, single, tokens, batch_size=20)
        finite = bool(np.isfinite(logits).all())
        out.append(accuracy(logits, tokens["labels"]) if finite else math.nan)
    return out


def measure(
    apply: Callable[..., jax.Array],
    stacked: lora_jax.LoraParams,
    members: Sequence[Member],
    validation: Tokens,
    step: int,
) -> list[Trial]:
    """Add to every trial its mean accuracy over seeds; raise if all have diverged."""
    each: dict[Trial, list[float]] = {}
    for (trial, _), score in zip(members, scores(apply, stacked, validation), strict=True):
        each.setdefault(trial, []).append(score)
    for trial, accuracies in each.items():
        trial.scores.append((step, float(np.mean(accuracies))))
    if all(math.isnan(trial.scores[-1][1]) for trial in each):
        rates = [trial.rate for trial in each]
        raise ValueError(
            f"all {len(each)} settings have diverged after {step} steps: lower --rates, now "
            f"{min(rates):g} to {max(rates):g}"
        )
    return [*each]


def make_timed_step(
    apply: Callable[..., jax.Array],
    lora_params: lora_jax.LoraParams,
    data: Tokens,
    *,
    rate: float,
    steps: int,
    batch_size: int,
) -> Callable[[], float]:
    """Return a function that trains one adapter by a step per call and returns the seconds."""
    tx: Any = optimizer(steps)
    step = make_step(apply, tx)
    trainable, frozen = lora_jax.split(lora_params)
    state = trainable, with_rate(tx.init(trainable), rate)
    batch = {name: column[:batch_size] for name, column in data.items()}

    def timed_step() -> float:
        nonlocal state
        start = time.perf_counter()
        *state, loss = step(*state, frozen, batch)
        loss.block_until_ready()
        return time.perf_counter() - start

    return timed_step
