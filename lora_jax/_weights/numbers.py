"""Check numbers that users pass."""

import math
from typing import Any

import numpy as np


def is_int(x: Any) -> bool:
    """Return whether ``x`` is an integer of Python or NumPy; a bool is none."""
    return isinstance(x, int | np.integer) and not isinstance(x, bool)


def check_int(x: Any, name: str, least: int) -> int:
    """Return ``x`` as an int, or raise; ``name`` begins the messages.

    Raises:
        TypeError: it is no integer.
        ValueError: it is below ``least``.
    """
    if not is_int(x):
        raise TypeError(f"{name}={x!r}: expected an int")
    if x < least:
        raise ValueError(f"{name}={x}: expected at least {least}")
    return int(x)


def check_positive(x: Any, name: str, where: str = "", why: str = "") -> float:
    """Return ``x`` as a float, or raise unless it is a finite number above zero.

    Raises:
        TypeError: it is no number.
        ValueError: it is zero, negative or not finite.
    """
    if not (is_int(x) or isinstance(x, float | np.floating)):
        raise TypeError(f"{name}={x!r}{where}: expected a number")
    if not (math.isfinite(x) and x > 0):
        raise ValueError(f"{name}={x}{where}: expected a finite number > 0{why}")
    return float(x)
