"""Compute means and 95 % intervals over seeds, by Student's t."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A mean and the half width of its 95 % interval; NaN for fewer than two values."""

    mean: float
    half: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.half:.3f}"


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of values and its 95 % interval: ``t * s / sqrt(n)``, ``n - 1`` degrees.

    Raises:
        ValueError: there are no values.
    """
    if not len(values):
        raise ValueError("interval: there are no values, expected one per seed")
    n = len(values)
    half = student(n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    return Interval(float(np.mean(values)), half)


def paired(values: Sequence[float], reference: Sequence[float]) -> Interval:
    """Return the interval of ``values - reference``, seed by seed.

    Raises:
        ValueError: the lengths differ.
    """
    if len(values) != len(reference):
        raise ValueError(
            f"paired: {len(values)} values and {len(reference)} of the reference, expected one "
            "pair per seed"
        )
    return interval(np.subtract(values, reference))


def on_par(difference: Interval, width: float = 0.02) -> bool:
    """Return whether an interval contains 0 and is narrower than ``width`` in all."""
    return abs(difference.mean) <= difference.half and 2 * difference.half < width


def student(degrees: int, probability: float = 0.95) -> float:
    """Return the ``t`` with ``P(|T| < t) = probability``, by bisection of the exact series."""
    if degrees < 1:
        raise ValueError(f"student: degrees={degrees}: expected at least 1, two values or more")
    low, high = 0.0, 1.0
    while _within(high, degrees) < probability:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < probability else (low, middle)
    return high


def _within(t: float, degrees: int) -> float:
    """Return ``P(|T| < t)``: Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan2(t, math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(1 + odd, degrees, 2):
        total += term
        term *= cosine**2 * k / (k + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
