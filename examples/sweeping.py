"""Adapters with an optimizer's state and a rate each, trained at once; the worse ones stop early.

Nothing here knows of models or files: ``sweep.py`` brings those.
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

RUNGS = (1 / 4, 1 / 2, 1)  # of the steps: where accuracies are measured, and losers stop

Row = tuple[Trial, int]  # a setting and a seed: one row of the stack


def optimizer(steps: int) -> optax.GradientTransformation:
    """AdamW as in ``training.train``, but with the highest learning rate as data of its state."""
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, steps // 10, steps)

    def adamw(learning_rate):
        return optax.chain(optax.adamw(shape), optax.scale(learning_rate))

    return optax.inject_hyperparams(adamw)(learning_rate=1.0)


def with_rate(opt_state: Any, rate: Any) -> Any:
    """The state with another rate, or with one a row."""
    old = opt_state.hyperparams["learning_rate"]
    rates = {"learning_rate": jnp.asarray(rate, old.dtype)}
    return opt_state._replace(hyperparams=opt_state.hyperparams | rates)


def make_many(step: Callable[..., Any], together: int):
    """The step of one adapter for a stack: vmapped over ``together`` rows at a time.

    Few rows at a time keep the activations small; the results are those of all at once.
    """

    def many(trainable, opt_state, frozen, batch):
        def one(row):
            trainable, opt_state, adapter, batch = row
            return step(trainable, opt_state, lora_jax.LoraParams(frozen.base, adapter), batch)

        rows = (trainable, opt_state, frozen.adapter, batch)
        size = len(batch["labels"])
        return jax.lax.map(one, rows, batch_size=min(together, size))

    return jax.jit(many, donate_argnums=(0, 1))


def sweep(
    apply: Callable[..., jax.Array],
    adapters: Sequence[lora_jax.LoraParams],
    rows: Sequence[Row],
    data: Tokens,
    validation: Tokens,
    *,
    steps: int,
    batch_size: int,
    halving: bool = True,
    together: int = 4,
    on_step: Callable[[int, float, np.ndarray], None] = lambda count, seconds, losses: None,
    on_rung: Callable[[int, list[Trial], list[Trial]], None] = lambda step, trials, kept: None,
) -> tuple[list[Row], lora_jax.LoraParams]:
    """Train all adapters at once, each as ``training.train`` would train it with its seed.

    Args:
        apply: jitted ``lora_jax.lora`` of ``(params, ids, mask) -> logits``.
        adapters: where to start, all over one base.
        rows: of each adapter its trial, whose ``scores`` are filled in, and its seed, of the
            order of its batches.
        data: what to train on.
        validation: what to measure the accuracy on, at each rung.
        steps: how many.
        batch_size: how many sentences a step, for each adapter.
        halving: whether the worse half of the trials stops at each rung. The step is compiled
            anew for those that are left.
        together: how many adapters the step computes at a time.
        on_step: called after every step with the number of adapters, seconds and losses.
        on_rung: called with the step, the trials measured there and those of them that go on.

    Returns:
        The rows that trained to the end, and their stack.

    Raises:
        ValueError: a batch is larger than the data, or every trial has diverged.
    """
    if batch_size > (n := len(data["labels"])):
        raise ValueError(f"--batch-size {batch_size}: there are only {n} sentences to train on")
    tx: Any = optimizer(steps)
    step = make_many(make_step(apply, tx), together)
    trainable, frozen = lora_jax.split(lora_jax.many.stack(adapters))
    rows = list(rows)
    opt_state = with_rate(jax.vmap(tx.init)(trainable), [trial.rate for trial, _ in rows])
    orders = {seed: list(batches(n, batch_size, steps, seed)) for _, seed in rows}
    rungs = {max(1, round(steps * share)) for share in RUNGS}
    for k in range(steps):
        chosen = np.stack([orders[seed][k] for _, seed in rows])  # [adapters, batch]
        batch = {name: column[chosen] for name, column in data.items()}
        start = time.perf_counter()
        trainable, opt_state, losses = step(trainable, opt_state, frozen, batch)
        losses = np.asarray(losses)
        on_step(len(rows), time.perf_counter() - start, losses)
        if k + 1 not in rungs:
            continue
        trials = measure(apply, lora_jax.combine(trainable, frozen), rows, validation, k + 1)
        keep = math.ceil(len(trials) / 2) if halving and k + 1 < steps else len(trials)
        kept = best_first(trials)[:keep]
        on_rung(k + 1, trials, kept)
        if keep < len(trials):
            best = [i for i, (trial, _) in enumerate(rows) if trial in kept]
            trainable, frozen, opt_state = lora_jax.many.take((trainable, frozen, opt_state), best)
            rows = [rows[i] for i in best]
    return rows, lora_jax.combine(trainable, frozen)


def scores(
    apply: Callable[..., jax.Array], stacked: lora_jax.LoraParams, tokens: Tokens
) -> list[float]:
    """The accuracy of every row of a stack; NaN where its logits are not finite any more."""
    out = []
    for single in lora_jax.many.unstack(stacked, trim=False):  # of one shape: one program for all
        logits = predict(apply, single, tokens, batch_size=20)
        finite = bool(np.isfinite(logits).all())
        out.append(accuracy(logits, tokens["labels"]) if finite else math.nan)
    return out


def measure(
    apply: Callable[..., jax.Array],
    stacked: lora_jax.LoraParams,
    rows: Sequence[Row],
    validation: Tokens,
    step: int,
) -> list[Trial]:
    """Add to every trial its mean accuracy over seeds; raise if all have diverged."""
    each: dict[Trial, list[float]] = {}
    for (trial, _), score in zip(rows, scores(apply, stacked, validation), strict=True):
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


def one_alone(
    apply: Callable[..., jax.Array],
    lora_params: lora_jax.LoraParams,
    data: Tokens,
    *,
    rate: float,
    steps: int,
    batch_size: int,
) -> Callable[[], float]:
    """A run of one adapter, a step a call, to compare with: each returns its seconds."""
    tx: Any = optimizer(steps)
    step = make_step(apply, tx)
    trainable, frozen = lora_jax.split(lora_params)
    state = trainable, with_rate(tx.init(trainable), rate)
    batch = {name: column[:batch_size] for name, column in data.items()}

    def call() -> float:
        nonlocal state
        start = time.perf_counter()
        *state, loss = step(*state, frozen, batch)
        loss.block_until_ready()
        return time.perf_counter() - start

    return call
