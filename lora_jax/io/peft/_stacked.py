"""Layers that are modules of their own in PyTorch, as the one leaf that they are here."""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax._adapter.factors import Factors
from lora_jax._weights.ranges import Range, spell
from lora_jax.io.peft._axes import Part, Piece, common_scale, ratio


def stacked(path: str, parts: list[Part], leaf: Any) -> Iterator[tuple[str, Factors]]:
    """Stack the factors of one module, or those of the layers that are adapted, with their keys.

    Raises:
        ValueError: some experts of some layers are adapted, which are no one range.
    """
    parts = sorted(parts, key=lambda part: part.place.index)
    place, letters, *_ = parts[0]
    outer = len(place.index)
    if not outer:
        yield path, _factors([part.piece for part in parts], (), letters)
        return
    sizes = leaf.shape[:outer]
    by_number = {int(np.ravel_multi_index(p.place.index, sizes)): p.piece for p in parts}
    count = int(np.prod(sizes))
    if outer > 1 and len(by_number) < count:
        raise ValueError(
            f"{path!r}: only {len(by_number)} of {count} layers and experts are adapted"
        )
    numbers = sorted(by_number)
    cuts = [i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1] + 1]
    for run in np.split(np.array(numbers), cuts):
        start, stop = int(run[0]), int(run[-1]) + 1
        is_full = (start, stop) == (0, count)
        ranges = () if is_full else (Range(0, start, stop),)
        batch = sizes if is_full else (stop - start,)
        f = _factors([by_number[int(k)] for k in run], batch, "b" * outer + letters)
        yield spell(path, ranges, len(leaf.shape)), f


def _factors(pieces: list[Piece], batch: tuple[int, ...], layout: str) -> Factors:
    """Stack factors along ``batch``, with one rank and one scale."""
    rank, scale = max(piece.rank for piece in pieces), common_scale(pieces)
    inner = layout.count("b") - len(batch)
    a, b = [], []
    for piece in pieces:
        more = rank - piece.rank
        width = [(0, 0)] * (piece.a.ndim - 1) + [(0, more)]
        a.append(np.pad(piece.a, width))
        width = [(0, more) if k == inner else (0, 0) for k in range(piece.b.ndim)]
        b.append(np.pad(piece.b * ratio(piece.scale, scale), width))
    magnitudes = [piece.magnitude for piece in pieces]

    def together(arrays):
        x = np.stack(arrays)
        return jnp.asarray(x.reshape(*batch, *x.shape[1:]))

    return Factors(
        together(a),
        together(b),
        jnp.asarray(scale),
        layout,
        None if magnitudes[0] is None else together(magnitudes),
    )
