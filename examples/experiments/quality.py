"""Compare fine-tuning methods on MiniLM and three tasks: quality against trained parameters.

    python examples/experiments/quality.py [--packed FILE.npz] [--quick]

Every method chooses its learning rate from one grid, by the mean accuracy of two seeds on
validation sentences. Five other seeds then train at that rate. The test sentences are used once, by
these. All rates and seeds of a method train at once, as a stack.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import common
import figures
import numpy as np
import tasks
from common import CHOICE_SEEDS, SEEDS, Results
from grids import best_rate, train_missing
from methods import METHODS, Setup
from stacks import Member, Size, Trainer, together

NAMES = ("movie", "amazon", "topics")
RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
QUICK_METHODS = ("full fine-tuning", "BitFit", "LoRA")


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing of the experiment, and draw it."""
    parser = common.parser(__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD")
    parser.add_argument("--tasks", nargs="+", choices=NAMES, metavar="TASK")
    args = parser.parse_args(argv)
    with common.one_line("quality"):
        begin = time.perf_counter()
        names = args.tasks or (NAMES[:1] if args.quick else NAMES)
        methods = args.methods or (QUICK_METHODS if args.quick else tuple(METHODS))
        size, rates, seeds, choice = full_size(), RATES, SEEDS, CHOICE_SEEDS
        if args.quick:
            size = Size(6, 8, 16, 100, 2, together(2))
            rates, seeds, choice = (3e-5, 1e-3), (0, 1), (100,)
        inputs = tasks.load(names, args.packed, args.wordnet)
        settings = {"size": vars(size), "rates": rates, "seeds": seeds, "choice": choice}
        results = Results(args.out / "quality.csv", settings, inputs.digest)
        setups = {
            name: Setup.of(inputs, size.task(inputs.tasks[name]), size.steps) for name in names
        }
        run(results, setups, methods, size, rates, seeds, choice)
        for name in names:
            print(table(results, name, methods, seeds))
        figures.quality(results.rows, args.out / "quality", seeds)
        print(f"{time.perf_counter() - begin:.0f} s; wrote {results.path} and figures beside it")
        if args.quick:
            print("--quick: too few steps for these accuracies to mean anything")


def full_size() -> Size:
    """Return the size of the experiment."""
    width = len(RATES)
    return Size(200, 32, tasks.LENGTH, None, width, together(width))


def run(
    results: Results,
    setups: Mapping[str, Setup],
    methods: Sequence[str],
    size: Size,
    rates: Sequence[float],
    seeds: Sequence[int],
    choice: Sequence[int],
) -> None:
    """Choose every method's rate; then train and test it with the reported seeds."""
    trainer = Trainer(size)
    for name in setups:
        for method in methods:  # compile all while the first train
            if is_missing(results, name, method, rates, seeds, choice):
                trainer.prepare(method, setups[name], METHODS[method])
        for method in methods:
            every = members(method, rates, choice)
            train_missing(results, trainer, setups[name], every, name=method, test=False)
    # All choices are made; the labels of the test sentences are first used below.
    for name in setups:
        for method in methods:
            rate = best_rate(results, name, method, choice)
            every = members(method, [rate], seeds)
            train_missing(results, trainer, setups[name], every, name=method, test=True)


def is_missing(
    results: Results,
    task: str,
    method: str,
    rates: Sequence[float],
    seeds: Sequence[int],
    choice: Sequence[int],
) -> bool:
    """Return whether a method still has something to train on a task."""
    if results.missing((task, *key) for key in members(method, rates, choice)):
        return True
    reported = members(method, [best_rate(results, task, method, choice)], seeds)
    return bool(results.missing((task, *key) for key in reported))


def members(
    method: str, rates: Sequence[float], seeds: Sequence[int]
) -> dict[tuple[str, str, int], Member]:
    """Return a method's members by method, setting and seed."""
    return {
        (method, f"rate={rate:g}", seed): Member(rate, seed, METHODS[method])
        for seed in seeds
        for rate in rates
    }


def table(results: Results, task: str, methods: Sequence[str], seeds: Sequence[int]) -> str:
    """Format one task: accuracy on test, the difference to full fine-tuning, costs."""

    def reported(method):
        rows = [r for r in results.get(task=task, method=method) if r["test_accuracy"] is not None]
        return sorted((r for r in rows if r["seed"] in seeds), key=lambda row: row["seed"])

    reference = [row["test_accuracy"] for row in reported("full fine-tuning")]
    out = [f"{task}: accuracy on test, mean and 95 % interval of {len(seeds)} seeds"]
    head = ("method", "rate", "accuracy", "minus full", "on par", "trained", "ms/step", "file MB")
    rows = [head]
    for method in methods:
        own = reported(method)
        accuracies = [row["test_accuracy"] for row in own]
        is_compared = reference and method != "full fine-tuning"
        difference = common.paired(accuracies, reference) if is_compared else None
        rows.append(
            (
                method,
                _rate(own[0]) + "*" * (_rate(own[0]) in edges(results, task, method)),
                str(common.interval(accuracies)),
                str(difference or ""),
                ("yes" if common.on_par(difference) else "no") if difference else "",
                f"{own[0]['trained_parameters']:,}",
                f"{1e3 * np.median([row['seconds_per_step'] for row in own]):.2f}",
                f"{own[0]['file_bytes'] / 1e6:.2f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    out += ["  ".join(x.ljust(w) for x, w in zip(r, widths, strict=True)).rstrip() for r in rows]
    if any(row[1].endswith("*") for row in rows[1:]):
        out.append("* the lowest or highest rate of the grid: a wider one might do better")
    return "\n".join(out)


def edges(results: Results, task: str, method: str) -> set[str]:
    """Return the lowest and the highest rate that a method tried."""
    rates = sorted({_rate(row) for row in results.get(task=task, method=method)}, key=float)
    return {rates[0], rates[-1]}


def _rate(row: Mapping[str, Any]) -> str:
    return row["setting"].removeprefix("rate=")


if __name__ == "__main__":
    main()
