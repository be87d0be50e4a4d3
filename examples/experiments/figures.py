"""Draw the results of the experiments from their rows, each figure in light and in dark."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import NullFormatter
from stats import interval, paired

Row = Mapping[str, Any]

REFERENCE = "full fine-tuning"
_THEMES = {
    "light": {"ink": "#1f2328", "faint": "#d0d7de", "ground": "#ffffff", "map": "Blues"},
    "dark": {"ink": "#e6edf3", "faint": "#30363d", "ground": "#0d1117", "map": "Blues_r"},
}
# Legible on both grounds.
_FAMILIES = {
    "LoRA (large) and variants": (
        "#2f81f7",
        "o",
        ("LoRA", "LoRA + prefix", "rsLoRA", "DoRA", "PiSSA", "LoRA+", "OLoRA", "EVA"),
    ),
    "bottleneck adapters": ("#d18616", "s", ("bottleneck",)),
    "prefixes": ("#2da44e", "^", ("prefix embedding", "prefix layer")),
    "BitFit": ("#bf5af2", "D", ("BitFit",)),
    "full fine-tuning, head only": ("#8b949e", "X", (REFERENCE, "head only")),
}
_NAMED = {REFERENCE: "full", "head only": "head only", "prefix embedding": "embedding"}
_NAMES = {
    "movie": "movie reviews",
    "amazon": "Amazon reviews",
    "topics": "WordNet topics",
    "digits": "digits",
}


def quality(rows: Sequence[Row], stem: Path, seeds: Sequence[int]) -> None:
    """Draw accuracy against trained parameters, and differences to full fine-tuning."""
    in_both(stem, lambda _: _quality(rows, seeds))
    if _reported(rows, rows[0]["task"], REFERENCE, seeds):
        in_both(Path(f"{stem}_difference"), lambda theme: _differences(rows, seeds, theme))


def ranks(rows: Sequence[Row], out: Path, seeds: Sequence[int]) -> None:
    """Draw accuracy by rank and set of weights, and by set of weights at one budget."""
    in_both(out / "ranks", lambda theme: _ranks(rows, seeds, theme))


def maps(rows: Sequence[Row], out: Path) -> None:
    """Draw validation accuracy over alpha or rank, and the learning rate."""
    in_both(out / "alpha_and_rate", lambda theme: _maps(rows, theme))


def in_both(stem: Path, draw: Callable[[Mapping[str, str]], Any]) -> None:
    """Draw ``STEM-light.png`` and ``STEM-dark.png``."""
    for name, theme in _THEMES.items():
        with plt.rc_context(_style(theme)):
            figure = draw(theme)
            figure.savefig(f"{stem}-{name}.png", dpi=160)
            plt.close(figure)


def _style(theme: Mapping[str, str]) -> dict[str, Any]:
    ink, faint, ground = theme["ink"], theme["faint"], theme["ground"]
    colored = ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    grounds = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
    return (
        dict.fromkeys(colored, ink)
        | dict.fromkeys(grounds, ground)
        | {"axes.edgecolor": faint, "grid.color": faint, "axes.grid": True, "grid.linewidth": 0.6}
        | {"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}
        | {"font.size": 10, "axes.titlesize": 11, "legend.frameon": False}
    )


def _tasks(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["task"] for row in rows))


def _methods(rows: Sequence[Row]) -> list[str]:
    """Return the methods that occur, family by family."""
    found = {row["method"] for row in rows}
    return [m for _, _, each in _FAMILIES.values() for m in each if m in found]


def _reported(rows: Sequence[Row], task: str, method: str, seeds: Sequence[int]) -> list[Row]:
    """Return the rows with test accuracies, by seed."""
    own = [
        row
        for row in rows
        if (row["task"], row["method"]) == (task, method)
        and row["seed"] in seeds
        and row["test_accuracy"] is not None
    ]
    return sorted(own, key=lambda row: row["seed"])


def _test(rows: Sequence[Row], task: str, method: str, seeds: Sequence[int]) -> list[float]:
    return [row["test_accuracy"] for row in _reported(rows, task, method, seeds)]


def _quality(rows: Sequence[Row], seeds: Sequence[int]) -> Any:
    tasks = _tasks(rows)
    size = (1.5 + 3.6 * len(tasks), 4.3)
    figure, axes = plt.subplots(1, len(tasks), figsize=size, layout="constrained", squeeze=False)
    for ax, task in zip(axes[0], tasks, strict=True):
        for family, (color, marker, methods) in _FAMILIES.items():
            drawn = [m for m in methods if _reported(rows, task, m, seeds)]
            for k, method in enumerate(drawn):
                own = _reported(rows, task, method, seeds)
                mean, half = interval(_test(rows, task, method, seeds))
                # Variants of LoRA have nearly the same size: they are drawn side by side.
                spread = 1.12 ** (k - (len(drawn) - 1) / 2) if "LoRA" in family else 1
                at = own[0]["trained_parameters"] * spread
                style = {"color": color, "marker": marker, "elinewidth": 1.2, "capsize": 2}
                style["markersize"] = 9 if method == "LoRA" else 6
                label = None if k else family
                ax.errorbar(at, mean, half, linestyle="", label=label, **style)
                if method in _NAMED:
                    side = -1 if method == REFERENCE else 1
                    style = {"va": "center", "fontsize": 8.5, "textcoords": "offset points"}
                    style |= {"ha": "right" if side < 0 else "left", "xytext": (9 * side, 0)}
                    ax.annotate(_NAMED[method], (at, mean), **style)
        ax.set(xscale="log", xlabel="trained parameters", title=_NAMES.get(task, task))
        ax.margins(x=0.12)
    axes[0][0].set_ylabel(f"test accuracy, 95 % interval of {len(seeds)} seeds")
    figure.legend(
        *axes[0][0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=5 if len(tasks) > 1 else 2,
    )
    return figure


def _differences(rows: Sequence[Row], seeds: Sequence[int], theme: Mapping[str, str]) -> Any:
    tasks, methods = _tasks(rows), [m for m in _methods(rows) if m != REFERENCE]
    colors = {m: color for color, _, each in _FAMILIES.values() for m in each}
    size = (max(5.6, 2.0 + 2.7 * len(tasks)), 1.9 + 0.27 * len(methods))
    figure, axes = plt.subplots(
        1, len(tasks), figsize=size, layout="constrained", sharex=True, sharey=True, squeeze=False
    )
    for ax, task in zip(axes[0], tasks, strict=True):
        reference = _test(rows, task, REFERENCE, seeds)
        ax.axvline(0, color=theme["ink"], linewidth=1)
        ax.axvspan(-1, 1, color=theme["faint"], alpha=0.6, linewidth=0)
        for y, method in enumerate(methods):
            mean, half = paired(_test(rows, task, method, seeds), reference)
            style = {"marker": "o", "markersize": 5, "capsize": 2, "elinewidth": 1.4}
            ax.errorbar(100 * mean, y, xerr=100 * half, color=colors[method], **style)
        ax.set(ylim=(-0.6, len(methods) - 0.4))
        ax.set(xlabel="points of accuracy", title=_NAMES.get(task, task))
    axes[0][0].set_yticks(range(len(methods)), methods)
    axes[0][0].invert_yaxis()
    figure.suptitle(
        "Test accuracy minus that of full fine-tuning\n"
        f"95 % interval of {len(seeds)} pairs of seeds; gray: one point",
        fontsize=11,
    )
    return figure


_LINES = {"q": ("#d18616", "s"), "q,v": ("#2f81f7", "o"), "q,k,v,o": ("#2da44e", "^")}


def _cell(name: str) -> tuple[str, int] | None:
    """Split ``"q,v r=4"`` into weights and rank; None for the rows of maps."""
    weights, _, rank = name.partition(" r=")
    return (weights, int(rank)) if rank and not weights.startswith("alpha") else None


def _ranks(rows: Sequence[Row], seeds: Sequence[int], theme: Mapping[str, str]) -> Any:
    tasks = [t for t in _tasks(rows) if any(_cell(r["method"]) for r in rows if r["task"] == t)]
    figure, axes = plt.subplots(
        len(tasks),
        2,
        figsize=(8.6, 1.0 + 3.2 * len(tasks)),
        layout="constrained",
        squeeze=False,
        sharey="row",
    )
    cells = dict.fromkeys(row["method"] for row in rows if _cell(row["method"]))
    by_weights: dict[str, list[int]] = {}
    for name in cells:
        weights, rank = _cell(name) or ("", 0)
        by_weights.setdefault(weights, []).append(rank)
    for (left, right), task in zip(axes, tasks, strict=True):

        def shown(weights, rank, task=task):
            return interval(_test(rows, task, f"{weights} r={rank}", seeds))

        for k, (weights, (color, marker)) in enumerate(_LINES.items()):
            own = sorted(by_weights.get(weights, []))
            if len(own) < 2:
                continue
            means, halves = zip(*(shown(weights, rank) for rank in own), strict=True)
            style = {"color": color, "marker": marker, "capsize": 2, "linewidth": 1.6}
            xs = np.array(own) * 1.06 ** (k - 1)  # side by side
            left.errorbar(xs, means, halves, label=weights, **style)
        left.set_xscale("log", base=2)
        drawn = [by_weights.get(weights, []) for weights in _LINES]
        ticks = sorted({rank for own in drawn if len(own) > 1 for rank in own})
        left.set_xticks(ticks, [str(rank) for rank in ticks])
        left.xaxis.set_minor_formatter(NullFormatter())
        left.set(xlabel="rank", ylabel="test accuracy", title=_NAMES.get(task, task))
        budget = [(w, 8 // len(w.split(","))) for w in by_weights]
        budget = [(w, rank) for w, rank in budget if rank in by_weights[w]]
        for x, (weights, rank) in enumerate(budget):
            color = _LINES.get(weights, (theme["ink"], ""))[0]
            mean, half = shown(weights, rank)
            right.errorbar(x, mean, half, color=color, marker="o", capsize=2)
        right.set_xticks(range(len(budget)), [f"{w}\nr={rank}" for w, rank in budget])
        right.set(title="the same number of parameters", xlim=(-0.6, len(budget) - 0.4))
    lines = axes[0][0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=3, title="adapted weights")
    figure.suptitle(f"95 % interval of {len(seeds)} seeds", fontsize=10)
    return figure


def _maps(rows: Sequence[Row], theme: Mapping[str, str]) -> Any:
    kinds = {"alpha=": "alpha, rank 8", "alpha/r r=": "rank", "alpha/sqrt(r) r=": "rank"}
    titles = ("alpha and learning rate", "scale alpha / r", "scale alpha / sqrt(r)")
    every = [r["validation_accuracy"] for r in rows if r["method"].startswith("alpha")]
    limits = {"vmin": np.nanmin(every), "vmax": np.nanmax(every)}
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.7), layout="constrained")
    for ax, (kind, label), title in zip(axes, kinds.items(), titles, strict=True):
        scores: dict[tuple[float, float], list[float]] = {}
        for row in rows:
            if row["method"].startswith(kind):
                rate = float(row["setting"].removeprefix("rate="))
                value = float(row["method"].removeprefix(kind))
                scores.setdefault((value, rate), []).append(row["validation_accuracy"])
        values, rates = (sorted({key[i] for key in scores}) for i in (0, 1))
        grid = np.array([[np.mean(scores[v, rate]) for rate in rates] for v in values])
        image = ax.imshow(grid, cmap=theme["map"], aspect="auto", origin="lower", **limits)
        ax.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates], rotation=35, ha="right")
        ax.set_yticks(range(len(values)), [f"{v:g}" for v in values])
        ax.grid(visible=False)
        for (i, j), x in np.ndenumerate(grid):
            r, g, b, _ = image.cmap(image.norm(x))
            is_bright = 0.3 * r + 0.59 * g + 0.11 * b > 0.5
            ink = "#1f2328" if is_bright else "#ffffff"
            ax.text(j, i, f"{100 * x:.1f}", ha="center", va="center", color=ink, fontsize=8)
        ax.set(xlabel="learning rate", ylabel=label, title=title)
    figure.suptitle("Validation accuracy, %: mean of seeds", fontsize=11)
    return figure
