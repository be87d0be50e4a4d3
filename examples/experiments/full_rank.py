"""Compare LoRA of full rank with full fine-tuning, loss by loss, on a toy and on MiniLM.

    python examples/experiments/full_rank.py --out results

Both train the same square weights (those of attention) and the same head, on the same batches, from
the same start. For ``W' = W + s a b`` with ``b = 0`` and a gradient ``G`` of ``W'``, a step of SGD
with the rate ``h`` moves ``b`` by ``-h s a^T G`` and the weight by::

    dW = -h s^2 a a^T G          full fine-tuning: dW = -h G

- The first step is that of full fine-tuning if ``s^2 a a^T = I``: ``a`` is ``c`` times an
  orthogonal matrix and ``s = 1 / c``, so ``alpha = rank / c``. That needs ``rank = in``: if a
  weight has more inputs than outputs, a rank of ``min(in, out)`` already misses directions. The
  default start, ``a ~ N(0, 1/in)`` with ``alpha = rank``, has ``a a^T = I`` on average only: each
  product is off by as much as its own norm, and so is the first step.
- ``a`` trains as well. It adds ``-h s^2 G b^T b``, and ``s b`` is about as large as the update:
  ``|dW|^2 / c^2`` relative to the first term. So the two paths are close while the update is small
  beside ``c``, and no closer: full rank makes every update reachable, and not every path equal.
- Adam divides each gradient by its size. That depends on the basis, so ``a^T G`` gives another step
  than ``G``, of the same norm. Equal losses are not expected. With ``a`` the identity and frozen,
  ``b`` is the update itself, and every optimizer takes the same path: a control for rounding.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import common
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import members
import numpy as np
import optax
import tasks
import themes
from flax.traverse_util import flatten_dict
from matplotlib.figure import Figure
from methods import HEAD, Setup
from training import Tokens, accuracy, batches, make_step, predict

import lora_jax

KERNELS = "encoder/layer_.*/(query|key|value|out)/kernel"
EARLY = 10  # steps after which the updates are compared for the first time
FACTORS = (1, 2, 4, 8)  # of the toy
# Rates of full fine-tuning: the demo's for Adam, and for SGD one that is stable.
OPTIMIZERS = {"sgd": optax.sgd(0.1), "adam": optax.adam(3e-5)}
FULL = "full fine-tuning"
LINES = "-", "--", "-.", ":"


def scaled_identity(factor: float = 1.0, orthogonal: bool = True):
    """Return an initializer: ``a`` is ``factor`` times an orthogonal matrix, or the identity."""

    def init(key: jax.Array, target: Any) -> tuple[jax.Array, jax.Array]:
        a = jnp.eye(target.inputs, target.rank)
        if orthogonal:
            a = jnp.linalg.qr(jax.random.normal(key, a.shape))[0]
        return factor * a, jnp.zeros((target.rank, target.outputs))

    return init


# The initializer of each method, and what it freezes.
METHODS: Mapping[str, tuple[Any, tuple[str, ...]]] = {
    "identity, a frozen": (scaled_identity(orthogonal=False), ("a",)),
    "orthogonal": (scaled_identity(), ()),
    "gaussian": ("gaussian", ()),  # the default: a a^T is the identity on average
}


def toy_gaps(factors: Sequence[float] = FACTORS, steps: int = 50) -> dict[float, float]:
    """Regress a matrix by SGD; return the distance of the updates, relative to the update's norm.

    Theory: the distance falls as ``1 / factor^2``.
    """
    size, rate = 16, 0.1
    x, y = (jax.random.normal(k, (64, size)) for k in jax.random.split(jax.random.key(0)))

    def loss(params):
        return jnp.square(x @ params["w"] - y).sum() / 128

    def trained(params: Any, loss: Any) -> Any:
        def step(params, _):
            grads = jax.grad(loss)(params)
            return jax.tree.map(lambda p, g: p - rate * g, params, grads), None

        return jax.lax.scan(step, params, None, steps)[0]

    params = {"w": jnp.zeros((size, size))}
    full = jax.jit(lambda: trained(params, loss)["w"])()

    @jax.jit
    def adapted(trainable, frozen):
        apply = lora_jax.lora(loss)
        return trained(trainable, lambda t: apply(lora_jax.combine(t, frozen)))

    gaps = {}
    for factor in factors:
        init, alpha = scaled_identity(factor), size / factor
        start = lora_jax.lorafy(params, size, alpha=alpha, targets=".*", init=init)
        trainable, frozen = lora_jax.split(start)
        update = lora_jax.merge(lora_jax.combine(adapted(trainable, frozen), frozen))["w"]
        gaps[factor] = gap(np.asarray(update), np.asarray(full))
    return gaps


def start(params: Any, method: str, seed: int) -> lora_jax.LoraParams:
    """Make the parameters of a method; the head is random, since zeros send no gradient back."""
    head = params["classifier"]["kernel"]
    key, of_head = jax.random.split(jax.random.key(seed))
    kernel = jax.random.normal(of_head, head.shape) / np.sqrt(len(head))
    params = params | {"classifier": params["classifier"] | {"kernel": kernel}}
    if method == FULL:
        return lora_jax.lorafy(params, targets=[], full=[KERNELS, HEAD])
    width = len(head)
    init, freeze = METHODS[method]
    return lora_jax.lorafy(
        params,
        width,
        alpha=width,
        targets=KERNELS,
        full=HEAD,
        init=init,
        freeze=freeze,
        key=key,
    )


def train(
    step: Callable[..., Any],
    tx: optax.GradientTransformation,
    lora_params: lora_jax.LoraParams,
    tokens: Tokens,
    orders: Sequence[np.ndarray],
) -> tuple[list[float], dict[int, Any], lora_jax.LoraParams]:
    """Train; return every step's loss, the merged weights after ``EARLY`` steps and at the end.

    Args:
        step: of ``training.make_step`` with ``tx``.
        tx: the optimizer.
        lora_params: the initial parameters.
        tokens: the training data.
        orders: the rows of each step's batch.
    """
    trainable, frozen = lora_jax.split(lora_params)
    opt_state = tx.init(trainable)
    losses, weights = [], {}
    for k, rows in enumerate(orders, 1):
        batch = {name: column[rows] for name, column in tokens.items()}
        trainable, opt_state, loss = step(trainable, opt_state, frozen, batch)
        losses.append(loss)
        if k in (EARLY, len(orders)):
            weights[k] = kernels(lora_jax.merge(lora_jax.combine(trainable, frozen)))
    return [float(x) for x in losses], weights, lora_jax.combine(trainable, frozen)


def kernels(params: Any) -> np.ndarray:
    """Return the weights that both methods train, but the head, as one vector."""
    flat = flatten_dict(params, sep="/")
    return np.concatenate([np.ravel(x) for path, x in flat.items() if re.fullmatch(KERNELS, path)])


def gap(update: np.ndarray, full: np.ndarray) -> float:
    """Return ``|update - full| / |full|``."""
    return float(np.linalg.norm(update - full) / np.linalg.norm(full))


def compare(
    inputs: tasks.Inputs, optimizer: str, seeds: Sequence[int], settings: Mapping[str, Any]
) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of each seed: every method beside full fine-tuning, on the same batches."""
    task = members.shorter(inputs.tasks["movie"], settings)
    steps, size = settings["steps"], settings["batch_size"]
    setup = Setup.of(inputs, task, steps)
    before, tx = kernels(setup.params), OPTIMIZERS[optimizer]
    apply = jax.jit(lora_jax.lora(setup.fn))
    step = make_step(apply, tx)
    for seed in seeds:
        rows, updates = [], {}
        orders = list(batches(len(task.train["labels"]), size, steps, seed))
        for method in (FULL, *METHODS):
            lora_params = start(setup.params, method, seed)
            losses, weights, ends = train(step, tx, lora_params, task.train, orders)
            updates[method] = {k: x - before for k, x in weights.items()}
            early, late = (gap(updates[method][k], updates[FULL][k]) for k in (EARLY, steps))
            norm = float(np.linalg.norm(updates[method][steps]) / np.linalg.norm(before))
            rows.append(
                {
                    "task": task.name,
                    "method": method,
                    "setting": optimizer,
                    "seed": seed,
                    "test_accuracy": accuracy(predict(apply, ends, task.test), task.test["labels"]),
                    "early_gap": early,
                    "final_gap": late,
                    "relative_update": norm,
                    **{f"loss_{k}": losses[k - 1] for k in shown(steps)},
                }
            )
        yield rows


def shown(steps: int) -> list[int]:
    """Return the steps whose losses are kept: the first ten, then fifty spread over the run."""
    return sorted({*range(1, EARLY + 1), *np.linspace(EARLY, steps, 51).astype(int).tolist()})


def draw(theme: themes.Theme, rows: Sequence[Mapping[str, Any]], steps: int) -> Figure:
    """Draw the losses of both optimizers, their differences, and the toy's distances."""
    figure, axes = plt.subplots(2, 2, figsize=(themes.WIDTH, 6.2), layout="constrained")
    ks = shown(steps)
    styles = dict(zip((FULL, *METHODS), zip(themes.SERIES, LINES, strict=False), strict=True))
    for axis, optimizer in zip(axes[0], OPTIMIZERS, strict=True):
        for method, (color, line) in styles.items():
            own = [r for r in rows if r["setting"] == optimizer and r["method"] == method]
            mean = np.mean([[r[f"loss_{k}"] for k in ks] for r in own], axis=0)
            label = method if method == FULL else f"LoRA, {method}"
            axis.plot(ks, mean, color=color, linestyle=line, label=label, linewidth=1.6)
        axis.set(title=f"MiniLM, {_name(optimizer)}")
        axis.set(xlabel="step", ylabel="training loss, mean of seeds")
    axis = axes[1, 0]
    names = list(METHODS)
    for k, optimizer in enumerate(OPTIMIZERS):
        for i, method in enumerate(names):
            ys = _of(rows, optimizer, method, "final_gap")
            label = _name(optimizer) if i == 0 else None
            style = {"color": themes.SERIES[k + 3], "marker": "os"[k], "alpha": 0.7}
            axis.plot([i + 0.2 * k - 0.1] * len(ys), ys, linestyle="", label=label, **style)
    axis.set_xticks(range(len(names)), [m.replace(", ", ",\n") for m in names])
    axis.set(
        yscale="log",
        ylabel="|dW - dW full| / |dW full|",
        title="MiniLM, distance at the end, each seed",
    )
    axis.set_xlim(-0.5, len(names) - 0.5)
    axis.legend(loc="center right")
    gaps = toy_gaps()
    xs = np.array(list(gaps))
    axis = axes[1, 1]
    axis.loglog(xs, list(gaps.values()), "o-", color=themes.SERIES[0], label="measured")
    line = gaps[FACTORS[-1]] * (FACTORS[-1] / xs) ** 2
    axis.loglog(xs, line, ":", color=themes.SERIES[1], label="1 / c²")
    axis.set_xticks(xs, [str(x) for x in xs])
    axis.minorticks_off()
    axis.set(xlabel="c, the size of a", ylabel="distance of the updates", title="Toy, SGD")
    axis.legend()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _name(optimizer: str) -> str:
    return {"sgd": "SGD", "adam": "Adam"}[optimizer]


def _of(rows: Sequence[Mapping[str, Any]], optimizer: str, method: str, column: str) -> list[float]:
    return [r[column] for r in rows if (r["setting"], r["method"]) == (optimizer, method)]


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, print the distances, and draw the figure."""
    args = common.parser(__doc__).parse_args(argv)
    settings = {"steps": 200, "batch_size": 16, "length": 32, "most": None, "layers": 6, "seeds": 5}
    if args.quick:
        settings = {
            "steps": 12,
            "batch_size": 4,
            "length": 16,
            "most": 100,
            "layers": 2,
            "seeds": 2,
        }
    with common.one_line("full_rank"):
        inputs = tasks.load(["movie"], args.packed, args.wordnet)
        inputs = members.first_layers(inputs, settings["layers"])
        columns = ["test_accuracy", "early_gap", "final_gap", "relative_update"]
        columns += [f"loss_{k}" for k in shown(settings["steps"])]
        path = args.out / "full_rank.csv"
        results = common.Results(path, settings, inputs.digest, columns)
        for optimizer in OPTIMIZERS:
            seeds = common.SEEDS[: settings["seeds"]]
            keys = [("movie", m, optimizer, seed) for seed in seeds for m in (FULL, *METHODS)]
            missing = sorted({key[-1] for key in results.missing(keys)})
            for rows in compare(inputs, optimizer, missing, settings):
                members.append_missing(results, rows)
                print(f"{optimizer}, seed {rows[0]['seed']}: {len(rows)} runs", flush=True)
        report(results.rows)
        drawn = partial(draw, rows=results.rows, steps=settings["steps"])
        themes.save(path.with_suffix(".png"), drawn)


def report(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the distance of each method's update from that of full fine-tuning."""
    print("|dW - dW full| / |dW full| after 10 steps, at the end; accuracy less that of full")
    for optimizer in OPTIMIZERS:
        full = _of(rows, optimizer, FULL, "test_accuracy")
        for method in METHODS:
            columns = ("early_gap", "final_gap")
            gaps = [np.mean(_of(rows, optimizer, method, column)) for column in columns]
            better = common.paired(_of(rows, optimizer, method, "test_accuracy"), full)
            print(f"{optimizer:>5} {method:<20} {gaps[0]:.1e} {gaps[1]:.1e}   {better}")


if __name__ == "__main__":
    main()
