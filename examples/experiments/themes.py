"""Draw figures of one width and one set of colors, in light and in dark."""

from collections.abc import Callable, Mapping
from pathlib import Path

import figures
import matplotlib
from matplotlib.figure import Figure

Theme = Mapping[str, str]  # "ink", "faint", "ground" and the color map "map"

WIDTH = 8.0  # inches: 1,280 pixels, for a page of 640 to 800 points
SERIES = ("#2f81f7", "#e5534b", "#2da44e", "#d18616", "#bf5af2", "#8b949e")  # legible on both


def save(path: Path, draw: Callable[[Theme], Figure]) -> None:
    """Write the figure twice, with ``-light`` and ``-dark`` before the suffix of ``path``."""
    figures.in_both(path.with_suffix(""), draw)


def on_heat(theme: Theme, value: float) -> str:
    """Return black or white, whichever is readable on a value from 0 to 1 of the color map."""
    red, green, blue, _ = matplotlib.colormaps[theme["map"]](value)
    return "#000000" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.55 else "#ffffff"
