"""Pick a rank and a learning rate: a grid of adapters trained at once over one frozen encoder.

    python examples/sweep.py --ranks 2 4 8 16 --rates 3e-4 1e-3 3e-3 1e-2

Each setting is a member of one stack, with its own optimizer state and learning rate, and trains
as it would alone. At a quarter and at half of the steps, the half with the lower accuracy on
validation sentences is dropped. The winner is saved as an adapter and for PEFT, and then evaluated
once on the test sentences.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bert
import data
import jax
import numpy as np
import sweep_report
from finetune_sentiment import HEAD, LENGTH, encode_splits, positive, progress_bar
from rich.console import Console
from sweep_report import Trial, best_first
from sweeping import Member, make_timed_step, scores, sweep
from training import Tokens

import lora_jax
from lora_jax.io import peft, safetensors
from lora_jax.recipes.folders import check_output, write_results, written_at_once

MADE_BY = "examples/sweep.py"
STEPS, RANKS, RATES = 160, (2, 4, 8, 16), (3e-4, 1e-3, 3e-3, 1e-2)
QUICK_STEPS, QUICK_RANKS, QUICK_RATES = 8, (2, 8), (1e-3, 3e-3)


def run(args: argparse.Namespace) -> None:
    """Run the sweep, and write the winner's files."""
    begin = time.perf_counter()
    check_output(args.out, MADE_BY, args.model, args.data)
    trials = grid(args)
    members = [(trial, args.seed + k) for trial in trials for k in range(args.seeds)]
    splits = data.read(args.data) if args.data else data.movie_reviews()
    source = args.model or data.minilm()
    model, params = bert.load(source, len(splits.labels))
    tokenizer = bert.load_tokenizer(source, LENGTH)
    training, validation, test = encode_splits(splits, tokenizer, args.quick)
    apply = jax.jit(lora_jax.lora(lambda params, *x: model.apply({"params": params}, *x)))
    adapters = make_adapters(params, args.targets, members)
    print(
        f"{len(members)} adapters at once, {len(trials)} settings x {args.seeds} seeds: "
        f"{args.steps} steps, each on {args.batch_size} of {len(splits.train):,} sentences per "
        f"adapter; accuracy on {len(validation['ids']):,} others",
        flush=True,
    )
    console = Console(width=None if sys.stdout.isatty() else 100)
    alive, stacked, times = train_all(args, apply, adapters, members, training, validation, console)
    title = f"Accuracy on {len(validation['ids']):,} validation sentences"
    title += f", mean of {args.seeds} seeds" if args.seeds > 1 else ""
    console.print(sweep_report.table(trials, title))
    costs = sweep_report.cost(*times)

    # All choices are made; the labels of the test set are first used below, for one adapter.
    winner = best_first([trial for trial, _ in alive])[0]
    best = [i for i, (trial, _) in enumerate(alive) if trial is winner]
    if len(best) > 1:
        each = scores(apply, lora_jax.many.take(stacked, best), validation)
        best = [best[int(np.argmax(each))]]
    (chosen,) = lora_jax.many.unstack(lora_jax.many.take(stacked, best))
    with written_at_once(args.out) as folder:
        safetensors.save(folder / "adapter.safetensors", chosen)
        peft.save(folder / "peft", chosen, names=bert.torch_module)
        saved = safetensors.load(folder / "adapter.safetensors", params)
        (tested,) = scores(apply, lora_jax.many.stack([saved]), test)
        title = f"{len(members)} adapters at once, {args.steps} steps"
        sweep_report.draw(
            folder / "sweep.png", trials, f"{title} on {len(splits.train):,} sentences"
        )
        results = {
            "settings": vars(args),
            "trials": [trial.record() for trial in trials],
            "winner": winner.record() | {"seed": alive[best[0]][1], "test_accuracy": tested},
            "seconds": costs,
        }
        write_results(folder, MADE_BY, results)
    print(
        f"Winner: {winner}: {winner.scores[-1][1]:.3f} in validation; reloaded from its file, "
        f"{tested:.3f} on {len(test['ids']):,} test sentences"
    )
    if args.quick:
        print("--quick: too few steps for these accuracies to mean anything")
    print(f"Wrote adapter.safetensors, peft/, sweep.png and results.json to {args.out}")
    print(f"{time.perf_counter() - begin:.0f} s in all")


def make_adapters(
    params: Any, targets: str | None, members: Sequence[Member]
) -> list[lora_jax.LoraParams]:
    """Make the initial adapters; raise if an initializer changes the base, which they share."""
    adapters = []
    for trial, seed in members:
        adapter = lora_jax.lorafy(
            params,
            trial.rank,
            alpha=trial.alpha,
            init=trial.init,
            targets=targets,
            full=HEAD,
            key=jax.random.key(seed),
        )
        if any(f.residual for f in adapter.adapter.factors.values()):
            raise ValueError(
                f"--inits {trial.init}: it changes the base, which all adapters share. Expected "
                "initializers that leave the base unchanged, such as gaussian or orthogonal"
            )
        adapters.append(adapter)
    return adapters


def train_all(
    args: argparse.Namespace,
    apply: Callable[..., jax.Array],
    adapters: Sequence[lora_jax.LoraParams],
    members: Sequence[Member],
    training: Tokens,
    validation: Tokens,
    console: Console,
) -> tuple[list[Member], lora_jax.LoraParams, tuple[dict[int, list[float]], list[float]]]:
    """Run the sweep with a progress bar, and time some steps of one adapter beside it.

    Returns:
        The members that trained to the end, their stack, and the arguments of
        ``sweep_report.cost``.
    """
    size = {"steps": args.steps, "batch_size": args.batch_size}
    (single,) = make_adapters(adapters[0].base, args.targets, members[-1:])
    timed_step = make_timed_step(apply, single, training, rate=members[0][0].rate, **size)
    seconds: dict[int, list[float]] = {}
    alone: list[float] = []
    with progress_bar(console) as progress:
        task = progress.add_task("sweep", total=args.steps, loss=math.nan)

        def on_step(count, took, losses):
            seconds.setdefault(count, []).append(took)
            if count == len(members) and len(alone) < 10:  # alternate: both meet the same load
                alone.append(timed_step())
            progress.update(task, advance=1, loss=losses.min())

        alive, stacked = sweep(
            apply,
            adapters,
            members,
            training,
            validation,
            halving=not args.no_halving,
            together=args.together,
            on_step=on_step,
            on_rung=print_rung,
            **size,
        )
    return alive, stacked, (seconds, alone)


def print_rung(step: int, trials: Sequence[Trial], kept: Sequence[Trial]) -> None:
    """Print the best and the worst accuracy at a step, and how many trials continue."""
    ranked = best_first(trials)
    first, last = ranked[0], ranked[-1]
    rest = f"; {len(kept)} of {len(trials)} continue" if len(kept) < len(trials) else ""
    print(
        f"step {step}: {first.scores[-1][1]:.3f} ({first}) down to {last.scores[-1][1]:.3f}{rest}",
        flush=True,
    )


def grid(args: argparse.Namespace) -> list[Trial]:
    """Return all settings, smaller ranks first so that they win ties; fill in defaults of args."""
    args.steps = args.steps or (QUICK_STEPS if args.quick else STEPS)
    args.ranks = args.ranks or list(QUICK_RANKS if args.quick else RANKS)
    args.rates = args.rates or list(QUICK_RATES if args.quick else RATES)
    if not 0 <= args.seed <= 2**31 - args.seeds:
        raise ValueError(f"--seed {args.seed}: expected 0 to {2**31 - args.seeds}")
    for name in ("ranks", "rates", "alphas", "inits"):
        values = getattr(args, name)
        if twice := [x for i, x in enumerate(values) if x in values[:i]]:
            raise ValueError(f"--{name}: {twice[0]} occurs twice; pass each value once")
    return [
        Trial(rank, rate, alpha, init)
        for rank in sorted(args.ranks)
        for rate in sorted(args.rates)
        for alpha in args.alphas
        for init in args.inits
    ]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--ranks", type=int, nargs="+", help=f"default: {' '.join(map(str, RANKS))}")
    add("--rates", type=positive(float), nargs="+", help=f"default: {' '.join(map(str, RATES))}")
    add("--alphas", "--alpha", type=float, nargs="+", default=[16.0])
    add(
        "--inits",
        nargs="+",
        default=["gaussian"],
        help="initializers that leave the base unchanged",
    )
    add("--seed", type=int, default=0, help="seed of the factors and of the order of batches")
    add("--seeds", type=positive(int), default=1, help="seeds per setting: the best mean wins")
    add("--targets", help="a regular expression over paths, or all-linear; default: query, value")
    add("--steps", type=positive(int), help=f"default: {STEPS}")
    add("--batch-size", type=positive(int), default=16)
    add("--no-halving", action="store_true", help="train every setting to the end")
    add("--together", type=positive(int), default=4, help="adapters computed at a time")
    add(
        "--data",
        type=Path,
        help="a .csv or .jsonl file with text and label; default: movie reviews",
    )
    add("--model", type=Path, help="a folder with a BERT encoder; default: all-MiniLM-L6-v2")
    add("--out", type=Path, default=Path("runs", "sweep"))
    add("--quick", action="store_true", help="2 x 2 settings, a few steps, about a minute")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run, and report errors that the user can fix as one message."""
    args = parse_args(argv)
    try:
        run(args)
    except (OSError, TypeError, ValueError, NotImplementedError) as error:
        raise SystemExit(f"sweep: {' '.join(str(error).splitlines())}") from error


if __name__ == "__main__":
    main()
