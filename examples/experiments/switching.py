"""Train four domain adapters over one base; test each on each domain, combine them, time a switch.

    python examples/experiments/switching.py --out results

The base is MiniLM with a head for sentiment that is trained on all four domains (movie and product
reviews, editorials, tweets) while the encoder is frozen. An adapter then trains on one domain, and
the head stays frozen: so adapters can be exchanged, added and routed to. Nothing is tuned:

- sum and mean of the four updates;
- TIES with the paper's density of 0.2, DARE of the mean with the density 0.5;
- Arrow: each token and weight mixes two of the four adapters, chosen by the input.

The four ways to change the task are timed in turns: to pass another adapter unmerged, to replace a
merged adapter, to merge into a base that was kept, and to copy a fine-tuned model to the device.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import common
import jax
import matplotlib.pyplot as plt
import members
import numpy as np
import tasks
import themes
from finetune_sentiment import HEAD_RATE, LORA_RATE
from latency import interleaved
from matplotlib.figure import Figure
from methods import HEAD, Setup
from training import Tokens, accuracy, nbytes, predict

import lora_jax
from lora_jax import algebra, many

DOMAINS = ("movie", "amazon", "nyt", "tweets")
RANK = 8
COMBINED = ("sum", "mean", "TIES", "DARE", "Arrow")
METHODS = ("no adapter", *DOMAINS, *COMBINED)
SWITCHES = {
    "unmerged": "pass another adapter, unmerged",
    "switch": "replace the merged adapter",
    "merge": "merge into the kept base",
    "copy": "copy a fine-tuned model",
}


def base(
    fn: Callable[..., jax.Array], params: Any, data: Mapping[str, tasks.Task], settings: Any
) -> Any:
    """Train the head on the sentences of all domains; return plain parameters."""
    every: Tokens = {
        name: np.concatenate([task.train[name] for task in data.values()])
        for name in ("ids", "mask", "labels")
    }
    start = lora_jax.lorafy(params, targets=[], full=HEAD)
    size = {"steps": settings["steps"], "batch_size": settings["batch_size"]}
    (head,) = members.train(lora_jax.lora(fn), [start], [every], [0], rate=HEAD_RATE, **size)
    return lora_jax.merge(head)


def train(
    fn: Callable[..., jax.Array],
    params: Any,
    data: Mapping[str, tasks.Task],
    seeds: Sequence[int],
    settings: Any,
) -> dict[int, dict[str, lora_jax.LoraParams]]:
    """Train an adapter for each seed and domain, all at once."""
    pairs = [(seed, domain) for seed in seeds for domain in data]
    starts = []
    for seed, domain in pairs:
        key = jax.random.fold_in(jax.random.key(seed), DOMAINS.index(domain))
        starts.append(lora_jax.lorafy(params, RANK, key=key))
    trained = members.train(
        lora_jax.lora(fn),
        starts,
        [data[domain].train for _, domain in pairs],
        [seed for seed, _ in pairs],
        rate=LORA_RATE,
        steps=settings["steps"],
        batch_size=settings["batch_size"],
    )
    found: dict[int, dict[str, lora_jax.LoraParams]] = {seed: {} for seed in seeds}
    for (seed, domain), one in zip(pairs, trained, strict=True):
        found[seed][domain] = one
    return found


def combined(each: Sequence[lora_jax.LoraParams], seed: int) -> dict[str, lora_jax.LoraParams]:
    """Combine adapters in the four ways that can be merged."""
    xs = [x.adapter for x in each]
    total, share = sum(xs[1:], start=xs[0]), 1 / len(xs)
    made = {
        "sum": total,
        "mean": share * total,
        "TIES": algebra.ties(xs, density=0.2, rank=None)[0],
        "DARE": share * algebra.dare(xs, density=0.5, rank=None, key=jax.random.key(seed))[0],
    }
    return {name: lora_jax.LoraParams(each[0].base, adapter) for name, adapter in made.items()}


def test(
    functions: tuple[Callable[..., jax.Array], Callable[..., jax.Array]],
    params: Any,
    each: Mapping[str, lora_jax.LoraParams],
    data: Mapping[str, tasks.Task],
    seed: int,
) -> list[dict[str, Any]]:
    """Return a row for each method and domain: the accuracy on the domain's test sentences.

    Args:
        functions: the model, and the routed model; both jitted.
        params: the base.
        each: the adapters of one seed by domain.
        data: the tasks.
        seed: the seed.
    """
    plain, routed = functions
    merged = {"no adapter": params}
    for name, x in {**each, **combined(list(each.values()), seed)}.items():
        merged[name] = lora_jax.merge(x)
    stacked = many.stack(list(each.values()))
    calls = {name: partial(predict, plain, own) for name, own in merged.items()}
    calls["Arrow"] = partial(predict, partial(routed, lora_router=many.arrow(stacked)), stacked)
    return [
        {
            "task": domain,
            "method": name,
            "setting": "accuracy",
            "seed": seed,
            "test_accuracy": accuracy(call(task.test), task.test["labels"]),
        }
        for name, call in calls.items()
        for domain, task in data.items()
    ]


def switches(each: Sequence[lora_jax.LoraParams]) -> dict[str, Callable[[], Any]]:
    """Return functions that change the task and wait: all but the first make plain weights."""
    one, other = each[:2]
    merged = lora_jax.merge(one)
    host = jax.tree.map(np.asarray, lora_jax.merge(other))
    own = jax.tree.map(np.asarray, other.adapter)
    calls = {
        "unmerged": lambda: lora_jax.LoraParams(one.base, jax.device_put(own)),
        "switch": lambda: lora_jax.switch(merged, one.adapter, other.adapter),
        "merge": lambda: lora_jax.merge(other),
        "copy": lambda: jax.device_put(host, may_alias=False),
    }
    return {name: _waiting(call) for name, call in calls.items()}


def _waiting(call: Callable[[], Any]) -> Callable[[], None]:
    def wait() -> None:
        jax.block_until_ready(call())

    return wait


def time_switches(
    each: Sequence[lora_jax.LoraParams], seed: int, rounds: int
) -> list[dict[str, Any]]:
    """Return a row for each way to change the task: milliseconds and bytes."""
    sizes = dict.fromkeys(SWITCHES, nbytes(each[0].adapter))
    sizes["copy"] = nbytes(lora_jax.merge(each[0]))
    seconds = interleaved(switches(each), rounds, seed)
    return [
        {
            "task": "switch",
            "method": name,
            "setting": "time",
            "seed": seed,
            "ms": 1e3 * float(np.median(x)),
            "ratio": float(np.median(x / seconds["copy"])),
            "bytes": sizes[name],
        }
        for name, x in seconds.items()
    ]


def draw(theme: themes.Theme, rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the accuracy of each method on each domain as a table of colors."""
    domains = [d for d in DOMAINS if any(r["task"] == d for r in rows)]
    means = np.array(
        [
            [np.mean([r["test_accuracy"] for r in rows if _is(r, d, m)]) for d in domains]
            for m in METHODS
        ]
    )
    figure, axis = plt.subplots(figsize=(themes.WIDTH * 0.75, 4.6), layout="constrained")
    low, high = means.min(), means.max()
    image = axis.imshow(means, cmap=theme["map"], vmin=low, vmax=high, aspect="auto")
    for (y, x), value in np.ndenumerate(means):
        color = themes.on_heat(theme, (value - low) / max(high - low, 1e-9))
        own = y - 1 == x
        weight = "bold" if own else "normal"
        axis.text(x, y, f"{value:.3f}", color=color, weight=weight, ha="center", va="center")
    axis.set_xticks(range(len(domains)), domains)
    labels = [f"adapter of {m}" if m in DOMAINS else m for m in METHODS]
    axis.set_yticks(range(len(METHODS)), labels)
    axis.grid(visible=False)
    axis.set(xlabel="tested on", title="Accuracy, mean of seeds; own domain in bold")
    figure.colorbar(image, ax=axis, shrink=0.7)
    return figure


def _is(row: Mapping[str, Any], domain: str, method: str) -> bool:
    return row["task"] == domain and row["method"] == method


def report(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the accuracy of every method on every domain, and the times."""
    print("accuracy on test sentences, mean and 95 % interval over seeds")
    for method in METHODS:
        each = [
            common.interval([r["test_accuracy"] for r in rows if _is(r, d, method)])
            for d in DOMAINS
        ]
        print(
            f"  {method:<12} {'   '.join(f'{d} {x}' for d, x in zip(DOMAINS, each, strict=True))}"
        )
    for name, label in SWITCHES.items():
        own = [r for r in rows if _is(r, "switch", name)]
        ms, size = common.interval([r["ms"] for r in own]), own[0]["bytes"]
        print(f"  {label:<32} {ms} ms, {size / 1e6:.2f} MB")


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing, print the tables and draw the figure."""
    args = common.parser(__doc__).parse_args(argv)
    settings = {"steps": 200, "batch_size": 16, "length": 32, "most": None, "layers": 6}
    settings["rounds"], seeds = 20, common.SEEDS
    if args.quick:
        settings = {"steps": 8, "batch_size": 4, "length": 16, "most": 100, "layers": 1}
        settings["rounds"], seeds = 4, seeds[:2]
    with common.one_line("switching"):
        inputs = members.first_layers(
            tasks.load(DOMAINS, args.packed, args.wordnet), settings["layers"]
        )
        path = args.out / "switching.csv"
        columns = ("test_accuracy", "ms", "ratio", "bytes")
        results = common.Results(path, settings, inputs.digest, columns)
        keys = [(d, m, "accuracy", s) for d in DOMAINS for m in METHODS for s in seeds]
        keys += [("switch", name, "time", s) for name in SWITCHES for s in seeds]
        if missing := sorted({key[-1] for key in results.missing(keys)}):
            run(results, inputs, missing, settings)
        report(results.rows)
        themes.save(path.with_suffix(".png"), partial(draw, rows=results.rows))


def run(
    results: common.Results,
    inputs: tasks.Inputs,
    seeds: Sequence[int],
    settings: Mapping[str, Any],
) -> None:
    """Train, test and time the given seeds, and write the rows of each."""
    data = {name: members.shorter(inputs.tasks[name], settings) for name in DOMAINS}
    setup = Setup.of(inputs, data[DOMAINS[0]], settings["steps"])  # all have two classes

    def fn(params: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
        return setup.fn(params, ids, mask)

    params = base(fn, setup.params, data, settings)
    functions = jax.jit(fn), jax.jit(many.lora_routed(fn))
    none = dict.fromkeys(("test_accuracy", "ms", "ratio", "bytes"))
    for seed, each in train(fn, params, data, seeds, settings).items():
        rows = test(functions, params, each, data, seed)
        rows += time_switches(list(each.values()), seed, settings["rounds"])
        members.append_missing(results, [none | row for row in rows])
        print(f"seed {seed}: {len(rows)} rows", flush=True)


if __name__ == "__main__":
    main()
