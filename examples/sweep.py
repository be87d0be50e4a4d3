"""Pick a rank and a learning rate: a grid of adapters trained at once over one frozen encoder.

    python examples/sweep.py --ranks 2 4 8 16 --rates 3e-4 1e-3 3e-3 1e-2

Every setting is a row of one stack, with an optimizer's state and a learning rate of its own, and
ends where it would have ended alone. At a quarter and at half of the steps the worse half by the
accuracy on validation sentences is dropped. The winner is saved as an adapter and for PEFT; only
then it meets the test sentences, once.
"""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import bert
import data
import jax
import numpy as np
import sweep_report
from finetune_sentiment import HEAD, LENGTH, positive, progress_bar
from rich.console import Console
from sweep_report import Trial, best_first
from sweeping import one_alone, scores, sweep

import lora_jax
from lora_jax.io import peft, safetensors
from lora_jax.recipes.folders import check_output, write_results, written_at_once

MADE_BY = "examples/sweep.py"
STEPS, RANKS, RATES = 160, (2, 4, 8, 16), (3e-4, 1e-3, 3e-3, 1e-2)
QUICK_STEPS, QUICK_RANKS, QUICK_RATES = 8, (2, 8), (1e-3, 3e-3)


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
    for (trial, _), one in zip(rows, adapters, strict=True):
        if any(f.residual for f in one.adapter.factors.values()):
            raise ValueError(
                f"--inits {trial.init}: leaves another base behind, and all are to share one. "
                "Expected those that leave it as it is, such as gaussian or orthogonal"
            )
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
        each = scores(apply, lora_jax.many.take(stacked, mine), validation)
        mine = [mine[int(np.argmax(each))]]
    (chosen,) = lora_jax.many.unstack(lora_jax.many.take(stacked, mine))
    with written_at_once(args.out) as folder:
        safetensors.save(folder / "adapter.safetensors", chosen)
        peft.save(folder / "peft", chosen, names=bert.torch_module)
        saved = safetensors.load(folder / "adapter.safetensors", params)
        (tested,) = scores(apply, lora_jax.many.stack([saved]), test)
        title = (
            f"{len(rows)} adapters at once, {args.steps} steps on {len(splits.train):,} sentences"
        )
        sweep_report.draw(folder / "sweep.png", trials, title)
        results = {
            "settings": vars(args),
            "trials": [trial.record() for trial in trials],
            "winner": winner.record() | {"seed": alive[mine[0]][1], "test_accuracy": tested},
            "seconds": times,
        }
        write_results(folder, MADE_BY, results)
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
    if not 0 <= args.seed <= 2**31 - args.seeds:
        raise ValueError(f"--seed {args.seed}: expected 0 to {2**31 - args.seeds}")
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
