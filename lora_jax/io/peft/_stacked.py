"""Layers that are modules of their own in PyTorch as the one leaf that they are here."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax._adapter.factors import Factors
from lora_jax._weights.ranges import Range, spell
from lora_jax.io._torch import Place
from lora_jax.io.peft._axes import Piece, common_scale, ratio


def stacked(path: str, parts: list[tuple[Place, str, Piece]], leaf: Any):
    """The factors of a leaf, and their keys: of one module, or of the layers that are adapted."""
    parts = sorted(parts, key=lambda part: part[0].index)
    place, letters, _ = parts[0]
    outer = len(place.index)
    if not outer:
        yield path, _factors([piece for *_, piece in parts], (), letters)
        return
    sizes = leaf.shape[:outer]
    by_number = {int(np.ravel_multi_index(p.index, sizes)): piece for p, _, piece in parts}
    count = int(np.prod(sizes))
    if outer > 1 and len(by_number) < count:
        raise ValueError(
            f"{path!r}: only {len(by_number)} of {count} layers and experts are adapted"
        )
    numbers = sorted(by_number)
    cuts = [i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1] + 1]
    for run in np.split(np.array(numbers), cuts):
        start, stop = int(run[0]), int(run[-1]) + 1
        whole = (start, stop) == (0, count)
        ranges = () if whole else (Range(0, start, stop),)
        batch = sizes if whole else (stop - start,)
        f = _factors([by_number[int(k)] for k in run], batch, "b" * outer + letters)
        yield spell(path, ranges, len(leaf.shape)), f


def _factors(pieces: list[Piece], batch: tuple[int, ...], layout: str) -> Factors:
    """Factors of one rank and one scale, stacked along ``batch``."""
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
