"""Ask which weights and ranks LoRA needs, and how alpha and rank act on the learning rate.

    python examples/experiments/weights_and_ranks.py [--packed FILE.npz] [--quick]

Four questions, each a grid of adapters over MiniLM that train in stacks:

* which of query, key, value and output to adapt with a fixed number of parameters (table 5 of
  Hu et al., arXiv:2106.09685);
* which rank, for three sets of weights (table 6); in both, every cell chooses its learning rate on
  validation sentences by two other seeds;
* alpha and learning rate under Adam: is one a substitute for the other;
* rank and learning rate, for alpha / r and alpha / sqrt(r).
"""

import time
from collections.abc import Mapping, Sequence
from functools import partial

import common
import figures
import tasks
from common import CHOICE_SEEDS, SEEDS, Results
from grids import best_rate, train_missing
from methods import Build, Setup, lora
from stacks import Member, Size, Trainer, together

SETS = {
    "q": ("query",),
    "k": ("key",),
    "v": ("value",),
    "o": ("out",),
    "q,k": ("query", "key"),
    "q,v": ("query", "value"),
    "q,k,v,o": ("query", "key", "value", "out"),
}
BUDGET = {"q": 8, "k": 8, "v": 8, "o": 8, "q,k": 4, "q,v": 4, "q,k,v,o": 2}
RANKED, RANKS = ("q", "q,v", "q,k,v,o"), (1, 2, 4, 8, 64)
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
ALPHAS, ALPHA_RATES = (4, 8, 16, 32, 64), (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SCALED, SCALED_RATES = (2, 8, 32, 128), (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
GRID_SEEDS = (100, 101, 102)  # of the maps, which are of validation accuracy
NAMES = ("movie", "topics")

Runs = dict[tuple[str, str, int], Member]


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing of the experiment, and draw it."""
    args = common.parser(__doc__).parse_args(argv)
    with common.one_line("weights_and_ranks"):
        begin = time.perf_counter()
        size, names, seeds, choice = full_size(), NAMES, SEEDS, CHOICE_SEEDS
        rates, ranks, budget = RATES, RANKS, BUDGET
        if args.quick:
            size, names = Size(4, 8, 16, 50, 4, together(4)), NAMES[:1]
            seeds, choice, rates, ranks = (0, 1), (100,), (1e-3,), (1, 2)
            budget = {"q": BUDGET["q"]}
        inputs = tasks.load(names, args.packed, args.wordnet)
        settings = {"size": vars(size), "rates": rates, "seeds": seeds, "choice": choice}
        columns = ("trained_parameters", "validation_accuracy", "test_accuracy", "seconds_per_step")
        results = Results(args.out / "weights_and_ranks.csv", settings, inputs.digest, columns)
        trainer = Trainer(size)
        cells = cells_of(budget, RANKED[-1:] if args.quick else RANKED, ranks)
        for name in names:
            setup = Setup.of(inputs, size.task(inputs.tasks[name]), size.steps)
            run_cells(results, trainer, setup, cells, rates, seeds, choice)
        first = Setup.of(inputs, size.task(inputs.tasks[names[0]]), size.steps)
        run_maps(results, trainer, first, quick=args.quick)
        for name in names:
            print(table(results, name, cells, seeds))
        figures.ranks(results.rows, args.out, seeds)
        figures.maps(results.rows, args.out)
        print(f"{time.perf_counter() - begin:.0f} s; wrote {results.path} and figures beside it")
        if args.quick:
            print("--quick: too few steps for these accuracies to mean anything")


def full_size() -> Size:
    """Return the size of the experiment: fifteen members, and one that gives the shape."""
    return Size(200, 32, tasks.LENGTH, None, 16, together(16))


def build_of(weights: str, rank: int, alpha: float = 16.0, rslora: bool = False) -> Build:
    """Return LoRA on some weights of every layer."""
    targets = f"encoder/layer_.*/({'|'.join(SETS[weights])})/kernel"
    return partial(lora, targets=targets, rank=rank, alpha=alpha, rslora=rslora)


def cells_of(
    budget: Mapping[str, int], ranked: Sequence[str], ranks: Sequence[int]
) -> dict[str, Build]:
    """Return the cells of both tables by name, such as ``"q,v r=4"``."""
    pairs = [*budget.items(), *((weights, rank) for weights in ranked for rank in ranks)]
    return {f"{weights} r={rank}": build_of(weights, rank) for weights, rank in pairs}


def members_of(builds: Mapping[str, Build], rates: Sequence[float], seeds: Sequence[int]) -> Runs:
    """Return members by method, setting and seed."""
    return {
        (name, f"rate={rate:g}", seed): Member(rate, seed, build)
        for name, build in builds.items()
        for rate in rates
        for seed in seeds
    }


def run_cells(
    results: Results,
    trainer: Trainer,
    setup: Setup,
    cells: Mapping[str, Build],
    rates: Sequence[float],
    seeds: Sequence[int],
    choice: Sequence[int],
) -> None:
    """Choose the rate of every cell, then train and test the reported seeds, in mixed stacks."""
    shape = build_of("q,k,v,o", max(RANKS))
    kind = {"name": "weights and ranks", "shape": shape}
    every = members_of(cells, rates, choice)
    train_missing(results, trainer, setup, every, test=False, **kind)
    reported: Runs = {}
    for name, build in cells.items():
        rate = best_rate(results, setup.task.name, name, choice)
        reported |= members_of({name: build}, [rate], seeds)
    train_missing(results, trainer, setup, reported, test=True, **kind)


def run_maps(results: Results, trainer: Trainer, setup: Setup, *, quick: bool) -> None:
    """Measure validation accuracy over alpha and rate, and over rank and rate."""
    alphas, scaled = ALPHAS, SCALED
    rates, scaled_rates, seeds = ALPHA_RATES, SCALED_RATES, GRID_SEEDS
    if quick:
        alphas, scaled, rates, scaled_rates, seeds = (8, 32), (2, 8), (1e-3,), (1e-3,), (100,)
    builds = {f"alpha={alpha}": build_of("q,v", 8, float(alpha)) for alpha in alphas}
    runs = members_of(builds, rates, seeds)
    train_missing(results, trainer, setup, runs, name="alpha", test=False)
    builds = {
        f"alpha/{'sqrt(r)' if rslora else 'r'} r={rank}": build_of("q,v", rank, 16.0, rslora)
        for rslora in (False, True)
        for rank in scaled
    }
    runs = members_of(builds, scaled_rates, seeds)
    shape = build_of("q,v", max(scaled))
    train_missing(results, trainer, setup, runs, name="scale", test=False, shape=shape)


def table(results: Results, task: str, cells: Mapping[str, Build], seeds: Sequence[int]) -> str:
    """Format the cells: accuracy on test, trained parameters, the chosen rate."""
    out = [f"{task}: accuracy on test, mean and 95 % interval of {len(seeds)} seeds"]
    for name in cells:
        rows = [r for r in results.get(task=task, method=name) if r["test_accuracy"] is not None]
        shown = common.interval([row["test_accuracy"] for row in rows])
        rate = rows[0]["setting"]
        out.append(f"{name:12}  {rows[0]['trained_parameters']:>9,}  {shown}  {rate}")
    return "\n".join(out)


if __name__ == "__main__":
    main()
