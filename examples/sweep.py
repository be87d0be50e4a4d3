"""Pick a rank and a learning rate: a grid of adapters trained at once over one frozen encoder.

    python examples/sweep.py --ranks 2 4 8 16 --rates 3e-4 1e-3 3e-3 1e-2

Every setting is a row of one stack, with an optimizer's state and a learning rate of its own, and
ends where it would have ended alone. At a quarter and at half of the steps the worse half by the
accuracy on validation sentences is dropped. The winner is saved as an adapter and for PEFT; only
then it meets the test sentences, once.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bert
import data
import jax
import jax.numpy as jnp
import numpy as np
import optax
import sweep_report
from finetune_sentiment import HEAD, LENGTH, positive, progress_bar
from folders import check_output, written_at_once
from rich.console import Console
from sweep_report import Trial, best_first
from training import Tokens, accuracy, batches, make_step, predict

import lora_jax
from lora_jax.io import peft, safetensors

MADE_BY = "examples/sweep.py"
RUNGS = (1 / 4, 1 / 2, 1)  # of the steps: where accuracies are measured, and losers stop
STEPS, RANKS, RATES = 160, (2, 4, 8, 16), (3e-4, 1e-3, 3e-3, 1e-2)
QUICK_STEPS, QUICK_RANKS, QUICK_RATES = 8, (2, 8), (1e-3, 3e-3)

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
    trainable, frozen = lora_jax.split(lora_jax.stack(adapters))
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
            trainable, frozen, opt_state = lora_jax.take((trainable, frozen, opt_state), best)
            rows = [rows[i] for i in best]
    return rows, lora_jax.combine(trainable, frozen)


def scores(
    apply: Callable[..., jax.Array], stacked: lora_jax.LoraParams, tokens: Tokens
) -> list[float]:
    """The accuracy of every row of a stack; NaN where its logits are not finite any more."""
    out = []
    for single in lora_jax.unstack(stacked, trim=False):  # of one shape: one program for all
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


def run(args: argparse.Namespace) -> None:
    """The sweep, from the data to the winner's files."""
    begin = time.perf_counter()
    check_output(args.out, MADE_BY, args.model, args.data)
    trials = grid(args)
    rows = [(trial, args.seed + k) for trial in trials for k in range(args.seeds)]
    splits = data.read(args.data) if args.data else data.movie_reviews()
    source = args.model or data.minilm()
    model, params = bert.load(source, len(splits.labels))
    tokenizer = bert.load_tokenizer(source, LENGTH)
    sizes = (None, 100, 200) if args.quick else (None, None, None)
    training, validation, test = (
        bert.encode(tokenizer, part.texts[:size]) | {"labels": part.labels[:size]}
        for part, size in zip((splits.train, splits.validation, splits.test), sizes, strict=True)
    )
    apply = jax.jit(lora_jax.lora(lambda params, *x: model.apply({"params": params}, *x)))

    def start(trial: Trial, seed: int) -> lora_jax.LoraParams:
        return lora_jax.lorafy(
            params,
            trial.rank,
            alpha=trial.alpha,
            init=trial.init,
            targets=args.targets,
            full=HEAD,
            key=jax.random.key(seed),
        )

    adapters = [start(*row) for row in rows]
    size = {"steps": args.steps, "batch_size": args.batch_size}
    print(
        f"{len(rows)} adapters at once, {len(trials)} settings x {args.seeds} seeds: {args.steps} "
        f"steps, each of {args.batch_size} of {len(splits.train):,} sentences for every adapter; "
        f"accuracy on {len(validation['ids']):,} others",
        flush=True,
    )
    seconds: dict[int, list[float]] = {}
    single: list[float] = []
    beside = one_alone(apply, start(*rows[-1]), training, rate=trials[0].rate, **size)
    console = Console(width=None if sys.stdout.isatty() else 100)
    with progress_bar(console) as progress:
        task = progress.add_task("sweep", total=args.steps, loss=math.nan)

        def on_step(count, took, losses):
            seconds.setdefault(count, []).append(took)
            if count == len(rows) and len(single) < 10:  # in turn: both meet the same load
                single.append(beside())
            progress.update(task, advance=1, loss=losses.min())

        def on_rung(step, trials, kept):
            ranked = best_first(trials)
            first, last = ranked[0], ranked[-1]
            goes_on = f"; {len(kept)} of {len(trials)} go on" if len(kept) < len(trials) else ""
            print(
                f"step {step}: {first.scores[-1][1]:.3f} ({first}) down to "
                f"{last.scores[-1][1]:.3f}{goes_on}",
                flush=True,
            )

        alive, stacked = sweep(
            apply,
            adapters,
            rows,
            training,
            validation,
            halving=not args.no_halving,
            together=args.together,
            on_step=on_step,
            on_rung=on_rung,
            **size,
        )
    title = f"Accuracy on {len(validation['ids']):,} validation sentences"
    title += f", mean of {args.seeds} seeds" if args.seeds > 1 else ""
    console.print(sweep_report.table(trials, title))
    times = sweep_report.cost(seconds, single)

    # Every choice is made; only now the test set's labels are read, for one adapter.
    winner = best_first([trial for trial, _ in alive])[0]
    mine = [i for i, (trial, _) in enumerate(alive) if trial is winner]
    if len(mine) > 1:
        each = scores(apply, lora_jax.take(stacked, mine), validation)
        mine = [mine[int(np.argmax(each))]]
    (chosen,) = lora_jax.unstack(lora_jax.take(stacked, mine))
    with written_at_once(args.out) as folder:
        safetensors.save(folder / "adapter.safetensors", chosen)
        peft.save(folder / "peft", chosen, names=bert.torch_module)
        saved = safetensors.load(folder / "adapter.safetensors", params)
        (tested,) = scores(apply, lora_jax.stack([saved]), test)
        title = (
            f"{len(rows)} adapters at once, {args.steps} steps on {len(splits.train):,} sentences"
        )
        sweep_report.draw(folder / "sweep.png", trials, title)
        results = {
            "made_by": MADE_BY,
            "settings": vars(args),
            "trials": [vars(trial) for trial in trials],
            "winner": vars(winner) | {"seed": alive[mine[0]][1], "test_accuracy": tested},
            "seconds": times,
        }
        text = json.dumps(results, indent=2, default=str)
        (folder / "results.json").write_text(f"{text}\n", "utf-8")
    print(
        f"Winner: {winner}: {winner.scores[-1][1]:.3f} in validation; as loaded again from its "
        f"file, {tested:.3f} on {len(test['ids']):,} test sentences"
    )
    if args.quick:
        print("--quick: too few steps for these accuracies to mean anything")
    print(f"Wrote adapter.safetensors, peft/, sweep.png and results.json to {args.out}")
    print(f"{time.perf_counter() - begin:.0f} s in all")


def grid(args: argparse.Namespace) -> list[Trial]:
    """All settings, the smaller ranks first, which so win at a tie; fills in the defaults."""
    args.steps = args.steps or (QUICK_STEPS if args.quick else STEPS)
    args.ranks = args.ranks or list(QUICK_RANKS if args.quick else RANKS)
    args.rates = args.rates or list(QUICK_RATES if args.quick else RATES)
    for name in ("ranks", "rates", "alphas", "inits"):
        values = getattr(args, name)
        if twice := [x for i, x in enumerate(values) if x in values[:i]]:
            raise ValueError(f"--{name}: {twice[0]} is there twice; pass each value once")
    return [
        Trial(rank, rate, alpha, init)
        for rank in sorted(args.ranks)
        for rate in sorted(args.rates)
        for alpha in args.alphas
        for init in args.inits
    ]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--ranks", type=int, nargs="+", help=f"default: {' '.join(map(str, RANKS))}")
    add("--rates", type=positive(float), nargs="+", help=f"default: {' '.join(map(str, RATES))}")
    add("--alphas", "--alpha", type=float, nargs="+", default=[16.0])
    add("--inits", nargs="+", default=["gaussian"], help="those that leave the base as it is")
    add("--seed", type=int, default=0, help="of the factors and of the order of the batches")
    add("--seeds", type=positive(int), default=1, help="how many of each setting: their mean wins")
    add("--targets", help="a regular expression over paths, or all-linear; default: query, value")
    add("--steps", type=positive(int), help=f"default: {STEPS}")
    add("--batch-size", type=positive(int), default=16)
    add("--no-halving", action="store_true", help="train every setting to the end")
    add("--together", type=positive(int), default=4, help="adapters a step computes at a time")
    add("--data", type=Path, help="a .csv or .jsonl with text and label; default: movie reviews")
    add("--model", type=Path, help="a folder with a BERT encoder; default: all-MiniLM-L6-v2")
    add("--out", type=Path, default=Path("runs", "sweep"))
    add("--quick", action="store_true", help="2 x 2 settings and a few steps, in about a minute")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run, and turn errors that a user can mend into one message."""
    args = parse_args(argv)
    try:
        run(args)
    except (OSError, TypeError, ValueError, NotImplementedError) as error:
        raise SystemExit(f"sweep: {' '.join(str(error).splitlines())}") from error


if __name__ == "__main__":
    main()
