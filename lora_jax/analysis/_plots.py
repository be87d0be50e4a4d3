"""Draw what the functions here compute: spectra, overlaps of subspaces, changes per layer.

The colors of text, axes and background are those of Matplotlib's settings, which go together in a
light and in a dark style; the colors of lines are readable on both.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from lora_jax.analysis._layers import module_of

# Of Okabe and Ito: readable on white and on black, and to the color-blind.
_COLORS = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"
_COLUMNS = 4  # of heat maps
_MARKERS = "osD^v*"  # the next of them when the colors are used up


def plot_spectra(found: Mapping[str, Any], ax: Any = None) -> Any:
    """Draw the singular values of updates: a color per module, a line per layer.

    In a file, ``matplotlib.rc_context({"svg.fonttype": "none"})`` keeps text as text.

    Args:
        found: from :func:`spectra`.
        ax: axes of Matplotlib; None makes a figure.

    Returns:
        The Matplotlib figure. ``pyplot`` does not know it, so it need not be closed.

    Raises:
        ImportError: Matplotlib is not installed.
        ValueError: ``found`` is empty.

    Example:
        >>> import numpy as np, lora_jax
        >>> lora_jax.analysis.plot_spectra({"layer_0/q": np.array([3.0, 1.0])}).axes[0].get_xlabel()
        'index of the singular value'
    """
    modules = module_of(found)
    styles = _styles(module for module, _ in modules.values())
    is_own = ax is None
    figure, (ax,) = _axes("plot_spectra", found, ax, 1, len(styles))
    labelled: set[str] = set()
    for key, (module, _) in modules.items():
        s = np.asarray(found[key], np.float64)
        for values in s.reshape(-1, s.shape[-1]):
            positive = values[values > 0]  # zero has no place on a logarithmic axis
            label = None if module in labelled else module
            index = np.arange(1, len(positive) + 1)
            ax.plot(index, positive, label=label, alpha=0.8, **styles[module])
            labelled.add(module)
    ax.set(xlabel="index of the singular value", ylabel="singular value of ΔW (unit of the weight)")
    ax.set_yscale("log")
    _integers(ax.xaxis)
    _legend(ax, is_own=is_own)
    return figure


def plot_subspaces(found: Mapping[str, Any], ax: Any = None) -> Any:
    """Draw the overlaps of the leading directions of two adapters: a heat map per weight.

    Args:
        found: from :func:`subspace_similarity`; each entry of a batch has a map of its own.
        ax: axes of Matplotlib, for one map; None makes a figure.

    Returns:
        The Matplotlib figure.

    Raises:
        ImportError: Matplotlib is not installed.
        ValueError: ``found`` is empty, holds single pairs, or is more than one map for ``ax``.

    Example:
        >>> import numpy as np, lora_jax
        >>> figure = lora_jax.analysis.plot_subspaces({"layer_0/q": np.eye(2)})
        >>> figure.axes[0].get_title()
        'layer_0/q'
    """
    maps = dict(_maps(found))
    figure, axes = _axes("plot_subspaces", maps, ax, len(maps))
    image = None
    for n, ((title, phi), each) in enumerate(zip(maps.items(), axes, strict=True)):
        rows, columns = phi.shape
        extent = (0.5, columns + 0.5, rows + 0.5, 0.5)
        image = each.imshow(phi, vmin=0, vmax=1, cmap="viridis", extent=extent, aspect="auto")
        each.set_title(title, fontsize="small")
        if n % _COLUMNS == 0:
            each.set_ylabel("i, directions of the first")
        if n + _COLUMNS >= len(maps):  # the lowest of its column
            each.set_xlabel("j, directions of the second")
        _integers(each.xaxis)
        _integers(each.yaxis)
    bar = figure.colorbar(image, ax=axes, fraction=0.05)
    bar.set_label("φ(i, j): share in common (0 to 1)")
    return figure


def plot_change(found: Mapping[str, Any], ax: Any = None) -> Any:
    """Draw the relative changes of weights by layer: a line per module.

    The batch axis of stacked weights counts as the layers. A weight without a layer is a dashed
    line. Infinite changes, those of weights that were zero, are left out.

    Args:
        found: from :func:`change_per_layer`.
        ax: axes of Matplotlib; None makes a figure.

    Returns:
        The Matplotlib figure.

    Raises:
        ImportError: Matplotlib is not installed.
        ValueError: ``found`` is empty.

    Example:
        >>> import numpy as np, lora_jax
        >>> found = {"layer_0/q": np.array(0.1), "layer_1/q": np.array(0.2)}
        >>> lora_jax.analysis.plot_change(found).axes[0].get_xlabel()
        'layer'
    """
    modules = module_of(found)
    styles = _styles(module for module, _ in modules.values())
    is_own = ax is None
    figure, (ax,) = _axes("plot_change", found, ax, 1, len(styles))
    for module, keys in itertools.groupby(modules, lambda key: modules[key][0]):
        points: list[tuple[int, float]] = []
        for key in keys:
            values, layer = np.asarray(found[key], np.float64).reshape(-1), modules[key][1]
            if layer is None and len(values) == 1 and np.isfinite(values[0]):
                ax.axhline(values[0], color=styles[module]["color"], linestyle="--", label=module)
            else:
                start = layer if len(values) == 1 and layer is not None else 0
                points += [(start + k, v) for k, v in enumerate(values) if np.isfinite(v)]
        if points:
            ax.plot(*zip(*points, strict=True), label=module, **styles[module])
    ax.set(xlabel="layer", ylabel="|ΔW| / |W|, Frobenius norms (no unit)")
    ax.set_ylim(bottom=0)
    _integers(ax.xaxis)
    _legend(ax, is_own=is_own)
    return figure


def import_matplotlib() -> Any:
    """Import the library that draws.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import matplotlib.figure
        import matplotlib.ticker
    except ImportError as error:
        raise ImportError(
            "figures are drawn by matplotlib, which is not installed: pip install 'lora-jax[plot]'"
        ) from error
    return matplotlib


def _axes(
    verb: str, found: Mapping[str, Any], ax: Any, count: int, lines: int = 0
) -> tuple[Any, list[Any]]:
    """Return the figure and ``count`` axes: the given ones, or new ones above a legend."""
    matplotlib = import_matplotlib()
    if not found:
        raise ValueError(f"{verb}: found is empty: there is nothing to draw")
    if ax is not None:
        if count > 1:
            raise ValueError(
                f"{verb}: ax is for one map, and found has {count}: pass {{key: found[key]}}, or "
                "no ax"
            )
        return ax.figure, [ax]
    columns = min(count, _COLUMNS)
    rows = -(-count // columns)
    size = (6.4, 4 + 0.2 * lines) if count == 1 else (2.5 * columns + 1, 2.4 * rows)
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def _maps(found: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Iterate over the maps, by title: one for each entry of a batch."""
    for key, phi in found.items():
        phi = np.asarray(phi, np.float64)
        if phi.ndim < 2:
            raise ValueError(
                f"plot_subspaces: found[{key!r}] has shape {phi.shape}, expected [*batch, i, j]: "
                "call subspace_similarity without i and j"
            )
        for index in np.ndindex(phi.shape[:-2]):
            yield key + (f" {list(index)}" if index else ""), phi[index]


def _styles(modules: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Choose a color and a marker for each module."""
    pairs = itertools.cycle(itertools.product(_MARKERS, _COLORS))
    return {
        module: {"color": color, "marker": marker, "markersize": 3, "linewidth": 1}
        for module, (marker, color) in zip(dict.fromkeys(modules), pairs, strict=False)
    }


def _legend(ax: Any, *, is_own: bool) -> None:
    """Put the names of the modules below the axes of an own figure, where they hide no line."""
    if is_own:
        ax.figure.legend(loc="outside lower center", fontsize="small", frameon=False)
    else:
        ax.legend(fontsize="small")


def _integers(axis: Any) -> None:
    ticker = import_matplotlib().ticker
    axis.set_major_locator(ticker.MaxNLocator(integer=True))
