"""Compare several training runs: a table, and their learning curves."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
import numpy as np
from rich import box
from rich.table import Table
from training import Run, nbytes

_COLORS = ("#8c8c8c", "#d1495b", "#30638e", "#edae49", "#00798c")
_STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def measure(method: str, runs: Sequence[Run], accuracies: Sequence[float]) -> dict[str, Any]:
    """Summarize one method over its seeds: accuracy and cost, a row of the table."""
    base, adapter = runs[0].lora_params
    factors = sum(f.a.size + f.b.size for f in adapter.factors.values())
    trained = factors + sum(leaf.size for leaf in adapter.full.values())
    total = factors + sum(leaf.size for leaf in jax.tree.leaves(base))
    n = len(accuracies)
    return {
        "method": method,
        "accuracy": float(np.mean(accuracies)),
        "standard_error": float(np.std(accuracies, ddof=1)) / math.sqrt(n) if n > 1 else None,
        "accuracies": list(accuracies),
        "trained_parameters": trained,
        "trained_percent": 100 * trained / total,
        "optimizer_bytes": runs[0].optimizer_bytes,
        "checkpoint_bytes": nbytes(adapter),
        "seconds_per_step": float(np.median([run.seconds_per_step for run in runs])),
    }


def table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """Format the rows from :func:`measure` as a table for the terminal."""
    out = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,  # to fit 80 columns
    )
    out.add_column("\nmethod", no_wrap=True)
    for name in (
        "\naccuracy",
        "trained\nparameters",
        "\n%",
        "optimizer\nMB",
        "saved\nMB",
        "\ns/step",
    ):
        out.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        error = row["standard_error"]
        out.add_row(
            row["method"],
            f"{row['accuracy']:.3f}" + ("" if error is None else f" ± {error:.3f}"),
            f"{row['trained_parameters']:,}",
            f"{row['trained_percent']:.3g}",
            f"{row['optimizer_bytes'] / 1e6:.2f}",
            f"{row['checkpoint_bytes'] / 1e6:.2f}",
            f"{row['seconds_per_step']:.3f}",
        )
    return out


def draw_curves(path: Path, runs: Mapping[str, Sequence[Run]], title: str) -> None:
    """Draw training loss and validation accuracy by step: the mean and the range over seeds.

    Args:
        path: the PNG file to write.
        runs: the runs of each method, one per seed.
        title: the title of the figure.
    """
    with plt.rc_context(_STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4.0), layout="constrained")
        for color, (name, seeds) in zip(_COLORS, runs.items(), strict=False):
            losses = np.array([_running_mean(run.losses) for run in seeds])
            _line(left, np.arange(1, losses.shape[1] + 1), losses, color, name)
            steps = [step for step, _ in seeds[0].validation]
            accuracies = np.array([[value for _, value in run.validation] for run in seeds])
            _line(right, steps, accuracies, color, name, marker="o", markersize=3.5)
        left.set(xlabel="step", ylabel="training loss, running mean")
        right.set(xlabel="step", ylabel="validation accuracy")
        figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=9)
        figure.suptitle(title)
        figure.savefig(path, dpi=160)
        plt.close(figure)


def _line(axes, x, ys, color, label, **style):
    axes.plot(x, ys.mean(0), color=color, label=label, linewidth=1.8, **style)
    if len(ys) > 1:
        axes.fill_between(x, ys.min(0), ys.max(0), color=color, alpha=0.15, linewidth=0)


def _running_mean(losses: Sequence[float]) -> np.ndarray:
    """Return at every step the mean of the losses up to it, over a tenth of the run."""
    window = max(1, len(losses) // 10)
    total = np.cumsum([0.0, *losses])
    ends = np.arange(1, len(losses) + 1)
    starts = np.maximum(ends - window, 0)
    return (total[ends] - total[starts]) / (ends - starts)
