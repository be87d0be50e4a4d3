"""What ``lorafy`` checks before it makes any factor."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from lora_jax._weights.axes import max_rank, not_trainable, role_shape
from lora_jax._weights.layouts import Layouts
from lora_jax._weights.ranges import overlap, spell_rows
from lora_jax._weights.selector import check_patterns, letters_of, lookup


def tables_of(
    rows: Mapping[str, Iterable[int]], leaves: Mapping[str, Any], layout: Mapping[str, str]
) -> dict[str, str]:
    """The key of the rows that train of each table, and its path."""
    check_patterns(rows, "rows", leaves)
    tables = {}
    for path, leaf in leaves.items():
        if (ids := lookup(rows, path, "rows")) is None:
            continue
        ids = sorted(int(i) for i in ids)
        letters = letters_of(path, leaves, layout) if len(leaf.shape) > 1 else ""
        if letters.count("i") != 1 or "b" in letters or not_trainable(leaf):
            raise ValueError(
                f"rows: {path!r} of shape {tuple(leaf.shape)} (layout {letters!r}) is no table of "
                "floats with one input axis"
            )
        (size,) = role_shape(letters, leaf.shape, "i")
        if not ids or len({*ids}) != len(ids) or not 0 <= ids[0] <= ids[-1] < size:
            raise ValueError(
                f"rows={{{path!r}: {ids}}}: expected different numbers from 0 to {size - 1}"
            )
        tables[spell_rows(path, ids)] = path
    return tables


def check_same_model(layout: Mapping[str, str], leaves: Mapping[str, Any]) -> None:
    """Raise if the layout was found for other parameters."""
    if not isinstance(layout, Layouts):
        return
    found = {path: weight.shape for path, weight in layout.weights.items()}
    for path in [*found, *leaves]:
        here = tuple(leaves[path].shape) if path in leaves else None
        if found.get(path) != here:
            raise ValueError(
                f"layout: it was found for another model: {path!r} has shape {found.get(path)} "
                f"there and {here} in params (None: no such leaf). Pass the same tree to "
                "lora_jax.layout_of and to lorafy"
            )


def check_distinct(parts: Mapping[str, tuple[str, Any]], leaves: Mapping[str, Any]) -> None:
    seen: dict[int, list[str]] = {}
    for name, (path, ranges) in parts.items():
        for other in seen.setdefault(id(leaves[path]), []):
            other_path, other_ranges = parts[other]
            if other_path != path:
                raise ValueError(
                    f"targets: {other_path!r} and {path!r} are one and the same array. Two "
                    "independent updates of a tied weight would untie it: "
                    f"exclude={path!r}, or copy the array"
                )
            if overlap(ranges, other_ranges):
                raise ValueError(
                    f"targets: {other!r} and {name!r} overlap: an entry of a weight has one "
                    "update. Give them disjoint ranges"
                )
        seen[id(leaves[path])].append(name)


def check_rank(rank: Any, path: str, layout: str, shape: tuple[int, ...]) -> int:
    if rank is None:
        raise ValueError(f"rank: no pattern of the mapping matches {path!r}; end with '.*'")
    if isinstance(rank, bool) or not isinstance(rank, int | np.integer):
        raise TypeError(f"rank={rank!r} for {path!r}: expected an int")
    limit = max_rank(layout, shape)
    if not 1 <= rank <= limit:
        raise ValueError(
            f"rank={rank} for {path!r} of shape {shape} (layout {layout!r}): expected 1 to "
            f"min(in, out) = {limit}, at which a LoRA can express any update"
        )
    return int(rank)


def check_alpha(alpha: Any, path: str) -> float:
    if alpha is None:
        raise ValueError(f"alpha: no pattern of the mapping matches {path!r}; end with '.*'")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float | np.integer | np.floating):
        raise TypeError(f"alpha={alpha!r} for {path!r}: expected a number")
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(
            f"alpha={alpha} for {path!r}: expected a finite number > 0, since the update is scaled "
            "by alpha / rank; to switch an adapter off, call the function on lora_params.base"
        )
    return float(alpha)
