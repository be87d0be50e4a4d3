"""Look into trained adapters: common subspaces, amplification and spectra (section 7).

    python examples/experiments/subspaces.py --out results

MiniLM trains on an easy domain (movie reviews: sentences and feelings that the encoder knows) and
on a far one (ten topics of WordNet's definitions), with LoRA of three ranks and in full. The rates
are those of the demo, the same for both tasks. All numbers are means over the layers.

- ``phi(A_r8, A_r64, i, j)``: the part of the first ``i`` directions of rank 8 that lies in the
  first ``j`` of rank 64; the same between two seeds of rank 64; and for untrained Gaussian ``A``s,
  where ``max(i, j) / n`` is expected in ``n`` dimensions.
- Amplification ``|dW| / |U^T W V|``, with the directions of the update, of the weight, and random.
- The effective rank, and singular values relative to the first.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import common
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import members
import numpy as np
import tasks
import themes
from finetune_sentiment import FULL_RATE, LORA_RATE
from matplotlib.figure import Figure
from methods import HEAD, Setup

import lora_jax
from lora_jax import analysis

TASKS = {"movie": "movie reviews", "topics": "WordNet topics"}
RANKS = (4, 8, 64)
AMPLIFIED = ("rank 4", "rank 64")  # as in the paper's table 7
WEIGHTS = ("query", "value")
FULL = "full fine-tuning"
PAIRS = {"ranks": "rank 8, rank 64", "seeds": "rank 64, two seeds", "random": "random, 8 and 64"}
POINTS = (1, 2, 4, 8, 16, 32, 64)  # numbers of directions
PHI = [f"phi_{i}_{j}" for i in POINTS for j in POINTS]
NORMS = ["update", "weight", "projected", "projected_weight", "projected_random", "amplification"]
SPECTRA = ["effective_rank", *(f"s_{k}" for k in POINTS)]
CELL: Any = {"ha": "center", "va": "center", "fontsize": 7.5}
COLUMNS = [*PHI, *NORMS, *SPECTRA]

Trained = Mapping[str, Sequence[lora_jax.LoraParams]]  # by method, one for each seed


def train(
    inputs: tasks.Inputs, name: str, seeds: Sequence[int], settings: Mapping[str, Any]
) -> tuple[Trained, Trained]:
    """Train LoRA of each rank, and all weights; return these, and the untrained ones."""
    task = members.shorter(inputs.tasks[name], settings)
    setup = Setup.of(inputs, task, settings["steps"])
    apply, params = lora_jax.lora(setup.fn), setup.params
    size = {"steps": settings["steps"], "batch_size": settings["batch_size"]}
    fresh: dict[str, list[lora_jax.LoraParams]] = {}
    for rank in RANKS:
        keys = [jax.random.fold_in(jax.random.key(seed), rank) for seed in seeds]
        made = [lora_jax.lorafy(params, rank, full=HEAD, key=key) for key in keys]
        fresh[f"rank {rank}"] = made
    fresh[FULL] = [lora_jax.lorafy(params, targets=[], full=".*") for _ in seeds]
    trained = {}
    for method, each in fresh.items():
        rate = FULL_RATE if method == FULL else LORA_RATE
        data = [task.train] * len(seeds)
        trained[method] = members.train(apply, each, data, seeds, rate=rate, **size)
        print(f"{name}, {method}: trained {len(seeds)} seeds", flush=True)
    return trained, fresh


def part(x: lora_jax.LoraParams, weight: str) -> lora_jax.LoraParams:
    """Keep one kind of weight: the same shapes for each task and kind, so one program serves all.

    The keys are the numbers of the layers.
    """
    layers = {k: v[weight]["kernel"] for k, v in x.base["encoder"].items() if "layer_" in k}

    def own(entries: Mapping[str, Any]) -> dict[str, Any]:
        found = {name: entries.get(f"encoder/{name}/{weight}/kernel") for name in layers}
        return {name: x for name, x in found.items() if x is not None}

    adapter = lora_jax.Adapter(own(x.adapter.factors), own(x.adapter.full))
    return lora_jax.LoraParams(layers, adapter)


@jax.jit
def phi_of(x: lora_jax.Adapter, y: lora_jax.Adapter) -> jax.Array:
    """Return the similarities of the first directions: the mean over the layers."""
    return _mean(analysis.subspace_similarity(x, y))


def phi(x: lora_jax.LoraParams, y: lora_jax.LoraParams, weight: str) -> dict[str, float]:
    """Return the similarity of the first ``i`` and ``j`` directions, at all ``POINTS``."""
    mean = np.asarray(phi_of(part(x, weight).adapter, part(y, weight).adapter))
    return {
        f"phi_{i}_{j}": float(mean[i - 1, j - 1])
        for i in POINTS
        for j in POINTS
        if i <= mean.shape[0] and j <= mean.shape[1]
    }


@jax.jit
def norms(x: lora_jax.LoraParams, key: jax.Array) -> dict[str, jax.Array]:
    """Return the numbers of the paper's table 7, for the directions that the factors have."""
    found = analysis.amplification(x)
    weight = analysis.amplification(x, directions="weight")
    random = analysis.amplification(x, directions="random", key=key)
    return {
        "update": _mean({k: a.update for k, a in found.items()}),
        "weight": _mean({k: a.weight for k, a in found.items()}),
        "projected": _mean({k: a.projected for k, a in found.items()}),
        "projected_weight": _mean({k: a.projected for k, a in weight.items()}),
        "projected_random": _mean({k: a.projected for k, a in random.items()}),
        "amplification": _mean({k: a.factor for k, a in found.items()}),
    }


@jax.jit
def spectrum(x: lora_jax.LoraParams) -> dict[str, jax.Array]:
    """Return the effective rank, and singular values relative to the first."""
    relative = _mean({k: s / s[0] for k, s in analysis.spectra(x).items()})
    values = {f"s_{k}": relative[k - 1] for k in POINTS if k <= len(relative)}
    return {"effective_rank": _mean(analysis.effective_rank(x))} | values


def _mean(layers: Mapping[str, jax.Array]) -> jax.Array:
    return jnp.mean(jnp.stack(list(layers.values())), 0)


def rows(name: str, seeds: Sequence[int], trained: Trained, fresh: Trained) -> list[dict[str, Any]]:
    """Measure everything for every seed and weight; numbers that a row does not have are None."""
    few, many = "rank 8", "rank 64"
    measured = []
    for n, seed in enumerate(seeds):
        after = (n + 1) % len(seeds)  # the other seed of a pair
        for weight in WEIGHTS:
            row = {"task": name, "setting": weight, "seed": seed, **dict.fromkeys(COLUMNS)}
            pairs = {
                "ranks": (trained[few][n], trained[many][n]),
                "seeds": (trained[many][n], trained[many][after]),
                "random": (fresh[few][n], fresh[many][n]),
            }
            measured += [row | {"method": k} | phi(*pair, weight) for k, pair in pairs.items()]
            for method, each in trained.items():
                own = spectrum(part(each[n], weight))
                if method in AMPLIFIED:
                    own |= norms(part(each[n], weight), jax.random.key(seed))
                numbers = {k: float(v) for k, v in own.items()}
                measured.append(row | {"method": method} | numbers)
    return measured


def draw_phi(theme: themes.Theme, measured: Sequence[Mapping[str, Any]], name: str) -> Figure:
    """Draw the similarities as heat maps: a row for each weight, a column for each pair."""
    size = (themes.WIDTH, 5.4)
    figure, axes = plt.subplots(2, 3, figsize=size, layout="constrained", sharex="col")
    image = None
    for line, weight in zip(axes, WEIGHTS, strict=True):
        for axis, (pair, title) in zip(line, PAIRS.items(), strict=True):
            own = [r for r in measured if (r["method"], r["setting"]) == (pair, weight)]
            heights = [i for i in POINTS if own[0][f"phi_{i}_{i}"] is not None]
            grid = np.mean([[[r[f"phi_{i}_{j}"] for j in POINTS] for i in heights] for r in own], 0)
            image = axis.imshow(grid, vmin=0, vmax=1, cmap=theme["map"], aspect="auto")
            for (y, x), value in np.ndenumerate(grid):
                color = themes.on_heat(theme, value)
                axis.text(x, y, f"{value:.2f}".removeprefix("0"), color=color, **CELL)
            axis.set_xticks(range(len(POINTS)), map(str, POINTS))
            axis.set_yticks(range(len(heights)), map(str, heights))
            axis.grid(visible=False)
            axis.set(title=f"{weight}: {title}", xlabel="j", ylabel="i")
    figure.colorbar(image, ax=axes, label="phi(i, j), mean of seeds and layers", shrink=0.7)
    figure.suptitle(f"MiniLM on {TASKS[name]}")
    return figure


def draw_spectra(theme: themes.Theme, measured: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw singular values relative to the first, for both tasks: LoRA of rank 64, and full."""
    figure, axes = plt.subplots(
        1, 2, figsize=(themes.WIDTH, 3.6), layout="constrained", sharey=True
    )
    for axis, weight in zip(axes, WEIGHTS, strict=True):
        for k, (task, label) in enumerate(TASKS.items()):
            for method, line in (("rank 64", "-"), (FULL, "--")):
                wanted = (task, method, weight)
                own = [r for r in measured if _where(r) == wanted]
                each = np.array([[r[f"s_{i}"] for i in POINTS] for r in own])
                rank = np.mean([r["effective_rank"] for r in own])
                style = {"color": themes.SERIES[k], "marker": ".", "linestyle": line}
                name = f"{label}, {method}: {rank:.0f}"
                axis.plot(POINTS, each.mean(0), label=name, **style)
        axis.set_xscale("log", base=2)
        axis.set_xticks(POINTS, map(str, POINTS))
        axis.set(title=weight, xlabel="k", yscale="log")
        axis.legend(title="effective rank", loc="lower left", fontsize=8, title_fontsize=8)
    axes[0].set_ylabel("singular value k / first")
    return figure


def _where(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["task"], row["method"], row["setting"]


def report(measured: Sequence[Mapping[str, Any]]) -> None:
    """Print phi(1, 1), table 7 and the effective ranks."""

    def show(name: str, method: str, weight: str, column: str) -> str:
        own = [r[column] for r in measured if _where(r) == (name, method, weight)]
        return str(common.interval(own))

    for name in TASKS:
        for weight in WEIGHTS:
            print(f"{name}, {weight}")
            for pair, title in PAIRS.items():
                print(f"  phi(1, 1) of {title}: {show(name, pair, weight, 'phi_1_1')}")
            for method in AMPLIFIED:
                each = [f"{c} {show(name, method, weight, c)}" for c in NORMS]
                print(f"  {method}: {', '.join(each)}")
            for method in (f"rank {RANKS[-1]}", FULL):
                print(f"  effective rank, {method}: {show(name, method, weight, 'effective_rank')}")


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing, print the numbers and draw the figures."""
    args = common.parser(__doc__).parse_args(argv)
    settings = {"steps": 400, "batch_size": 16, "length": 32, "most": None, "layers": 6}
    seeds = common.SEEDS
    if args.quick:
        settings = {"steps": 8, "batch_size": 4, "length": 16, "most": 100, "layers": 1}
        seeds = seeds[:2]
    with common.one_line("subspaces"):
        inputs = members.first_layers(
            tasks.load(TASKS, args.packed, args.wordnet), settings["layers"]
        )
        path = args.out / "subspaces.csv"
        results = common.Results(path, settings | {"seeds": seeds}, inputs.digest, COLUMNS)
        for name in TASKS:
            methods = (*PAIRS, *(f"rank {rank}" for rank in RANKS), FULL)
            keys = [(name, *rest) for rest in itertools.product(methods, WEIGHTS, seeds)]
            if results.missing(keys):
                measured = rows(name, seeds, *train(inputs, name, seeds, settings))
                members.append_missing(results, measured)
        report(results.rows)
        for name in TASKS:
            own: Callable[..., Figure] = partial(
                draw_phi, measured=results.get(task=name), name=name
            )
            themes.save(args.out / f"subspaces_{name}.png", own)
        spectra = partial(draw_spectra, measured=results.rows)
        themes.save(args.out / "subspaces_spectra.png", spectra)


if __name__ == "__main__":
    main()
