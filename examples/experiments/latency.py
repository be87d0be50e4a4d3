r"""Time one forward pass: the base, LoRA merged and unmerged, and bottleneck adapters (table 1).

    python examples/experiments/latency.py --out results
    JAX_PLATFORMS=cpu python examples/experiments/latency.py --out results --shapes 1x128 4x64 \
        --rounds 10

The model is an encoder with random weights, by default of the size of GPT-2 medium without its
output head. All methods run in turns in one process, so that a clock that changes or another job
changes all of them alike. A ratio is taken within a turn; the median of the turns is reported. The
base and the merged weights share one compiled program; their ratio shows the noise.
"""

import argparse
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, lru_cache, partial
from typing import Any

import common
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import members
import numpy as np
import themes
from bert import Encoder
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from matplotlib.figure import Figure

import lora_jax

# hidden size, layers, heads; the names are those of the models with these sizes.
SIZES = {"gpt2-medium": (1024, 24, 16), "gpt2": (768, 12, 12), "minilm": (384, 6, 12)}
SHAPES = ("32x512", "16x256", "1x128")  # those of the paper
LONGEST = 1024  # positions
RANK = 4  # the paper's for GPT-2
# Houlsby's bottlenecks (H) follow attention and MLP, those of Lin et al. (L) the MLP. The paper's
# have 0.5 M parameters for the first shape and 11 M for the others, of GPT-2 medium's 355 M.
SITES = {"adapter_h": ("out", "output"), "adapter_l": ("output",)}
SMALL, LARGE = 0.5 / 355, 11 / 355
LABELS = {
    "merged": "LoRA, merged",
    "unmerged": "LoRA, unmerged",
    "adapter_h": "adapters (Houlsby)",
    "adapter_l": "adapters (Lin)",
}
METHODS = ("base", "merged", "unmerged", *SITES)
TOLERANCE = {"float32": 4e-3, "bfloat16": 2e-2}  # GPUs multiply float32 as TF32: 10 bits


def encoder(size: str) -> Encoder:
    """Make an encoder of one of ``SIZES``."""
    width, layers, heads = SIZES[size]
    return Encoder(50257, width, layers, heads, 4 * width, LONGEST, 2, 1e-5)


def random_params(model: nn.Module, key: jax.Array, dtype: Any) -> Any:
    """Draw kernels and tables from N(0, 0.02^2), as GPT-2 starts; norms are ones, biases zeros."""
    row = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(model.init, key, row, row.astype(bool))["params"]
    leaves = {}
    for i, (path, leaf) in enumerate(flatten_dict(shapes).items()):
        if path[-1] in ("kernel", "embedding"):
            x = 0.02 * jax.random.normal(jax.random.fold_in(key, i), leaf.shape)
        else:
            x = jnp.full(leaf.shape, path[-1] == "scale")
        leaves[path] = x.astype(dtype)
    return unflatten_dict(leaves)


def random_update(lora_params: Any, key: jax.Array) -> Any:
    """Replace the zeros in every ``b`` by N(0, 0.02^2), so that the update changes the output."""
    trainable, frozen = lora_jax.split(lora_params)
    leaves, structure = jax.tree.flatten(trainable)
    keys = jax.random.split(key, len(leaves))
    drawn = [
        x + 0.02 * jax.random.normal(k, x.shape, x.dtype) for x, k in zip(leaves, keys, strict=True)
    ]
    return lora_jax.combine(structure.unflatten(drawn), frozen)


def bottlenecks(params: Any, sites: Sequence[str], share: float, key: jax.Array) -> Any:
    """Draw two matrices and two biases for each module named in ``sites``.

    The matrices have a ``share`` of the model's number of parameters, rounded up to a width.
    """
    flat = flatten_dict(params)
    trained = share * sum(leaf.size for leaf in flat.values())
    places = [path[:-1] for path in flat if path[-1] == "kernel" and path[-2] in sites]
    size = flat[*places[0], "kernel"].shape[-1]
    width = -int(-trained // (len(places) * 2 * size))
    dtype = flat[*places[0], "kernel"].dtype
    drawn = {}
    for place, k in zip(places, jax.random.split(key, len(places)), strict=True):
        down, up = 0.02 * jax.random.normal(k, (2, size, width), dtype)
        zeros = jnp.zeros(width, dtype), jnp.zeros(size, dtype)
        drawn["/".join(place)] = {"down": down, "up": up.T, "biases": zeros}
    return drawn


def with_bottlenecks(apply: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``gelu(y down) up`` to the output of each module that has a bottleneck."""

    def apply_with(params, adapters, *inputs):
        def intercept(call, args, kwargs, context):
            y = call(*args, **kwargs)
            own = adapters.get("/".join(context.module.path))
            if own is None or context.method_name != "__call__":
                return y
            first, second = own["biases"]
            return y + nn.gelu(y @ own["down"] + first) @ own["up"] + second

        with nn.intercept_methods(intercept):
            return apply(params, *inputs)

    return apply_with


@cache
def programs(model: nn.Module) -> dict[str, Callable[..., jax.Array]]:
    """Return the jitted function of each method; weights are arguments, never constants."""

    def apply(params, ids, mask):
        return model.apply({"params": params}, ids, mask)

    plain, bottled = jax.jit(apply), jax.jit(with_bottlenecks(apply))
    unmerged = jax.jit(lora_jax.lora(apply))
    return {"base": plain, "merged": plain, "unmerged": unmerged} | dict.fromkeys(SITES, bottled)


@lru_cache(maxsize=1)
def adapted(model: nn.Module, dtype: str, seed: int) -> tuple[lora_jax.LoraParams, Any]:
    """Draw a base with an adapter that changes it; return both unmerged, and merged."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 0), 3)
    params = random_params(model, keys[0], dtype)
    fresh = lora_jax.lorafy(params, RANK, alpha=RANK, key=keys[1], dtype=dtype)
    lora_params = random_update(fresh, keys[2])
    return lora_params, lora_jax.merge(lora_params)


def weights(model: nn.Module, shape: str, dtype: str, seed: int) -> dict[str, tuple[Any, ...]]:
    """Draw the weights that each method's function takes before the inputs."""
    lora_params, merged = adapted(model, dtype, seed)
    params = lora_params.base
    found = {"base": (params,), "merged": (merged,), "unmerged": (lora_params,)}
    share = SMALL if shape == SHAPES[0] else LARGE
    for i, (name, sites) in enumerate(SITES.items(), 1):
        key = jax.random.fold_in(jax.random.key(seed), i)
        found[name] = params, bottlenecks(params, sites, share, key)
    return found


def inputs(shape: str, seed: int) -> tuple[jax.Array, jax.Array]:
    """Draw token ids ``[batch, length]`` and a mask of ones."""
    size = tuple(map(int, shape.split("x")))
    ids = np.random.default_rng(seed).integers(0, 50257, size, np.int32)
    return jnp.asarray(ids), jnp.ones(size, bool)


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    seed: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, np.ndarray]:
    """Call all functions in turns, and return each one's seconds, ``[rounds]``.

    A round calls every function once. The order of the first round is random and moves by one place
    in each round, so that each function is as often first as last, and a drift of the clock adds
    the same to all.

    Args:
        calls: functions without arguments, which return once their work is done.
        rounds: the number of rounds; one round before them is not timed.
        seed: sets the order.
        clock: the time in seconds.
    """
    names = list(np.random.default_rng(seed).permutation(list(calls)))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for i in range(rounds):
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            start = clock()
            calls[name]()
            seconds[name].append(clock() - start)
    return {name: np.array(x) for name, x in seconds.items()}


def median_interval(x: np.ndarray) -> tuple[float, float, float]:
    """Return the median and its 95 % interval by order statistics: no distribution is assumed.

    The ranks ``n/2 -+ 1.96 sqrt(n)/2`` bound the median, whatever the distribution; few values give
    the smallest and the largest.
    """
    x, n = np.sort(x), len(x)
    half = 1.96 * np.sqrt(n) / 2
    low, high = int(max(np.floor(n / 2 - half), 0)), int(min(np.ceil(n / 2 + half), n - 1))
    return float(np.median(x)), float(x[low]), float(x[high])


def check_equal(outputs: Mapping[str, np.ndarray], dtype: str) -> float:
    """Return the largest difference of merged and unmerged outputs, relative to the largest output.

    Raises:
        AssertionError: they differ by more than rounding, or the update changes nothing.
    """
    base, merged, unmerged = (outputs[k].astype(float) for k in ("base", "merged", "unmerged"))
    size = np.abs(merged).max()
    difference = float(np.abs(merged - unmerged).max() / size)
    moved = float(np.abs(merged - base).max() / size)
    if not difference < TOLERANCE[dtype] < moved:
        raise AssertionError(
            f"merged and unmerged outputs differ by {difference:.1e}, and the update moves the "
            f"output by {moved:.1e}; expected {TOLERANCE[dtype]:.0e} between these"
        )
    return difference


def measure(shape: str, seed: int, size: str, dtype: str, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of one shape and seed, a row for each method."""
    model = encoder(size)
    functions, own, x = programs(model), weights(model, shape, dtype, seed), inputs(shape, seed)
    calls = {
        name: partial(lambda name: jax.block_until_ready(functions[name](*own[name], *x)), name)
        for name in METHODS
    }
    difference = check_equal({name: np.asarray(call()) for name, call in calls.items()}, dtype)
    seconds = interleaved(calls, rounds, seed)
    for name in METHODS:
        median, low, high = median_interval(1e3 * seconds[name])
        yield {
            "task": size,
            "method": name,
            "setting": shape,
            "seed": seed,
            "ms": median,
            "ms_low": low,
            "ms_high": high,
            "ratio": float(np.median(seconds[name] / seconds["base"])),
            "merged_difference": difference,
        }


def report(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print milliseconds, and the change against the base with its interval over the seeds."""
    for shape in dict.fromkeys(row["setting"] for row in rows):
        print(f"{shape}: ms, and % above the base, mean and 95 % interval over seeds")
        for name in METHODS:
            own = [r for r in rows if (r["setting"], r["method"]) == (shape, name)]
            above = common.interval([100 * (r["ratio"] - 1) for r in own])
            ms = common.interval([r["ms"] for r in own])
            print(f"  {name:<10} {ms.mean:9.2f}  {above.mean:+6.1f} ± {above.half:.1f}")


def draw(theme: themes.Theme, rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Draw the change against the base: a group of points for each shape."""
    shapes = list(dict.fromkeys(row["setting"] for row in rows))
    figure, axis = plt.subplots(figsize=(themes.WIDTH, 3.6), layout="constrained")
    for k, name in enumerate(METHODS[1:]):
        each = [
            [100 * (r["ratio"] - 1) for r in rows if (r["setting"], r["method"]) == (shape, name)]
            for shape in shapes
        ]
        own = [common.interval(x) for x in each]
        axis.errorbar(
            np.arange(len(shapes)) + 0.15 * (k - 1.5),
            [x.mean for x in own],
            [x.half for x in own],
            color=themes.SERIES[k],
            fmt="osD^"[k],
            capsize=3,
            label=LABELS[name],
        )
    axis.axhline(0, color=theme["ink"], linewidth=1)
    axis.set_xticks(range(len(shapes)), [f"{x.replace('x', ' x ')} tokens" for x in shapes])
    axis.set(xlim=(-0.5, len(shapes) - 0.5), ylabel="% above the base", title=title)
    figure.legend(loc="outside lower center", ncols=4)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Time what is missing, print a table and draw the figure."""
    parser = common.parser(__doc__)
    parser.add_argument("--size", choices=SIZES, help="default: gpt2-medium; --quick: minilm")
    parser.add_argument("--shapes", nargs="+", type=shape_of, help=f"default: {' '.join(SHAPES)}")
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32", help="of all weights")
    parser.add_argument("--rounds", type=int, help="default: 30; --quick: 8")
    args = parser.parse_args(argv)
    size = args.size or ("minilm" if args.quick else "gpt2-medium")
    shapes = args.shapes or (["2x32", "1x32"] if args.quick else SHAPES)
    rounds = args.rounds or (8 if args.quick else 30)
    platform = jax.devices()[0].platform
    with common.one_line("latency"):
        if rounds < 1:
            raise ValueError(f"--rounds {rounds}: expected at least 1")
        settings = {"size": size, "dtype": args.dtype, "rounds": rounds, "quick": args.quick}
        columns = ("ms", "ms_low", "ms_high", "ratio", "merged_difference")
        path = args.out / f"latency_{platform}.csv"
        results = common.Results(path, settings, {"weights": "random and not rounded"}, columns)
        seeds = common.SEEDS[:2] if args.quick else common.SEEDS
        for seed in seeds:  # outside: its weights are drawn once
            for shape in shapes:
                if results.missing([(size, name, shape, seed) for name in METHODS]):
                    rows = measure(shape, seed, size, args.dtype, rounds)
                    members.append_missing(results, rows)
        report(results.rows)
        title = f"{size}, {args.dtype}, {jax.devices()[0].device_kind}"
        themes.save(path.with_suffix(".png"), partial(draw, rows=results.rows, title=title))


def shape_of(text: str) -> str:
    """Check a shape of the command line, ``batch x length``."""
    if not re.fullmatch("[1-9][0-9]*x[1-9][0-9]*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected BATCHxLENGTH, such as 16x256")
    if int(text.split("x")[1]) > LONGEST:
        raise argparse.ArgumentTypeError(f"{text!r}: the model has {LONGEST} positions")
    return text


if __name__ == "__main__":
    main()
