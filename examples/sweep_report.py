"""Report a sweep: a table of its settings, and a heat map over rank and learning rate."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.patches import Patch, Rectangle
from rich import box
from rich.table import Table

_WINNER = "#d1495b"
_DIVERGED = "#d9d9d9"
_STYLE: Any = {"font.size": 10, "hatch.linewidth": 0.7, "legend.frameon": False}


@dataclass(eq=False)  # hashed and compared by identity
class Trial:
    """A setting and its scores.

    Attributes:
        rank: the rank of the factors.
        rate: the highest learning rate.
        alpha: the update is scaled by ``alpha / rank``.
        init: the initializer of the factors.
        scores: ``(step, validation accuracy)``, a mean over seeds; NaN if a run has diverged.
    """

    rank: int
    rate: float
    alpha: float
    init: str
    scores: list[tuple[int, float]] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """Return all fields for JSON, with null for NaN."""
        scores = [(step, None if math.isnan(x) else x) for step, x in self.scores]
        return vars(self) | {"scores": scores}

    def __str__(self) -> str:
        return f"rank {self.rank}, rate {self.rate:g}, alpha {self.alpha:g}, {self.init}"


def best_first(trials: Sequence[Trial]) -> list[Trial]:
    """Sort by the last step, then by accuracy, the best first; ties keep the given order."""

    def key(trial: Trial) -> tuple[int, float]:
        step, accuracy = trial.scores[-1]
        return -step, math.inf if math.isnan(accuracy) else -accuracy

    return sorted(trials, key=key)


def table(trials: Sequence[Trial], title: str) -> Table:
    """Make a table with one trial per row, the best first: its accuracy at each rung, its end."""
    ranked = best_first(trials)
    steps = [step for step, _ in ranked[0].scores]
    out = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
    varied = [n for n in ("alpha", "init") if len({getattr(t, n) for t in trials}) > 1]
    for name in ("rank", "rate", *varied, *(f"step {step}" for step in steps)):
        out.add_column(name, justify="left" if name == "init" else "right", no_wrap=True)
    out.add_column("", no_wrap=True)
    for trial in ranked:
        scores = [_text(accuracy) for _, accuracy in trial.scores]
        settings = [getattr(trial, name) for name in ("rank", "rate", *varied)]
        is_winner, last = trial is ranked[0], trial.scores[-1][0]
        out.add_row(
            *(x if isinstance(x, str) else f"{x:g}" for x in settings),
            *scores,
            *[""] * (len(steps) - len(scores)),
            "winner" if is_winner else f"stopped at {last}" if last < steps[-1] else "",
            style="bold" if is_winner else "",
        )
    return out


def draw(path: Path, trials: Sequence[Trial], title: str) -> None:
    """Draw each trial's last accuracy over rank and rate, one panel per alpha and initializer.

    Args:
        path: the PNG file to write.
        trials: a full grid of trials with scores.
        title: the title of the figure.
    """
    winner = best_first(trials)[0]
    ranks, rates = (sorted({getattr(t, name) for t in trials}) for name in ("rank", "rate"))
    panels = list(dict.fromkeys((t.alpha, t.init) for t in trials))
    values = [t.scores[-1][1] for t in trials]
    finite = [x for x in values if not math.isnan(x)]
    norm = Normalize(min(finite), max(max(finite), min(finite) + 1e-3))
    cmap = plt.colormaps["viridis"].with_extremes(bad=_DIVERGED)
    width = 2.0 + max(1.25 * len(rates), 2.8) * len(panels)
    height = 1.9 + max(0.85 * len(ranks), 1.5)
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(
            1, len(panels), figsize=(width, height), squeeze=False, layout="constrained"
        )
        for axis, panel in zip(axes[0], panels, strict=True):
            shown = {(t.rank, t.rate): t for t in trials if (t.alpha, t.init) == panel}
            grid = [[shown[rank, rate].scores[-1][1] for rate in rates] for rank in ranks]
            axis.imshow(np.array(grid), cmap=cmap, norm=norm, origin="lower", aspect="auto")
            for (rank, rate), trial in shown.items():
                dark = sum(cmap(norm(trial.scores[-1][1]))[:3]) < 1.35
                place = rates.index(rate), ranks.index(rank)
                _cell(axis, *place, trial, winner, "white" if dark else "black")
            axis.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
            axis.set_yticks(range(len(ranks)), [str(rank) for rank in ranks])
            for line in range(1, len(rates)):
                axis.axvline(line - 0.5, color="white", linewidth=3)
            for line in range(1, len(ranks)):
                axis.axhline(line - 0.5, color="white", linewidth=3)
            axis.tick_params(length=0)
            axis.spines[:].set_visible(False)
            axis.set_xlabel("learning rate")
            if len(panels) > 1:
                axis.set_title(f"alpha {panel[0]:g}, {panel[1]}", fontsize=10)
        axes[0, 0].set_ylabel("rank")
        bar = figure.colorbar(
            ScalarMappable(norm, cmap), ax=axes[0].tolist(), label="validation accuracy", pad=0.02
        )
        bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
        handles = [Patch(fill=False, edgecolor=_WINNER, linewidth=2.5, label="winner")]
        if any(t.scores[-1][0] < winner.scores[-1][0] for t in trials):
            label = "stopped early, at the step shown"
            handles.append(Patch(fill=False, edgecolor="#8c8c8c", hatch="////", label=label))
        if len(finite) < len(values):
            handles.append(Patch(color=_DIVERGED, label="diverged"))
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
        figure.suptitle(title, fontsize=11)
        figure.savefig(path, dpi=160)
        plt.close(figure)


def cost(seconds: Mapping[int, Sequence[float]], single: Sequence[float]) -> dict[str, Any]:
    """Print and return the median seconds per step, without compilation.

    Args:
        seconds: seconds of the steps by number of adapters; the first step compiles.
        single: seconds of the steps of one adapter, alternating with the first steps of all.
    """
    steady = {n: float(np.median(x[1:] or x)) for n, x in seconds.items()}
    compiling = sum(x[0] - steady[n] for n, x in seconds.items())
    for n, took in steady.items():
        print(f"a step of a stack of {n}: {took:.2f} s, {took / n:.3f} s per adapter")
    largest = next(iter(seconds))
    together = seconds[largest][: len(single)]
    many, one = (float(np.median(x[1:] or x)) for x in (together, single))
    share = many / largest / one
    print(
        f"one of {largest} adapters takes {share:.2f} of the time of a step alone, {one:.3f} s "
        f"(medians of {max(1, len(single) - 1)} alternating steps)"
    )
    print(f"compiling the step for {len(seconds)} sizes of the stack: {compiling:.0f} s in all")
    return {"step": steady, "one_alone": one, "share": share, "compiling": compiling}


def _cell(axis, x: int, y: int, trial: Trial, winner: Trial, color: str) -> None:
    """Write into a cell; hatch its foot if training stopped early, and frame the winner."""
    step, accuracy = trial.scores[-1]
    stopped = step < winner.scores[-1][0]
    weight = "bold" if trial is winner else "normal"
    lift = 0.22 if stopped else 0.0
    axis.text(x, y + lift, _text(accuracy), color=color, ha="center", va="center", weight=weight)
    if stopped:
        note = {"color": color, "ha": "center", "va": "center", "fontsize": 8.5}
        axis.text(x, y - 0.08, f"at step {step}", **note)
        hatch = {"edgecolor": color, "alpha": 0.5, "linewidth": 0, "hatch": "////"}
        axis.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 0.2, fill=False, **hatch))
    if trial is winner:
        frame = {"edgecolor": _WINNER, "linewidth": 3, "zorder": 3}
        axis.add_patch(Rectangle((x - 0.47, y - 0.46), 0.94, 0.92, fill=False, **frame))


def _text(accuracy: float) -> str:
    return "diverged" if math.isnan(accuracy) else f"{accuracy:.3f}"
