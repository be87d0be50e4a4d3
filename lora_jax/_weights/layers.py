"""Choose layers of a model: among numbered modules, and along stacked weights."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lora_jax._weights.axes import role_axes
from lora_jax._weights.ranges import Part, Range, spell
from lora_jax._weights.selector import letters_of

_NUMBERED = re.compile(r"(?:.*_)?(\d+)")


def of_layers(
    chosen: Mapping[Part, bool | int],
    layers: Iterable[int],
    leaves: Mapping[str, Any],
    layout: Mapping[str, str],
) -> dict[Part, bool | int]:
    """Keep the chosen weights, and the parts of stacked ones, that belong to these layers."""
    layers, numbers = list(layers), _layer_numbers(leaves)
    stacks = {
        path: leaves[path].shape[role_axes(letters, "b")[0]]
        for path in dict.fromkeys(part.path for part in chosen)
        if path not in numbers and "b" in (letters := letters_of(path, leaves, layout))
    }
    sizes = [1 + max(numbers[path] for path in numbers)] if numbers else []
    count = max([*sizes, *stacks.values()], default=0)
    wanted = sorted({k + count if k < 0 else k for k in layers})
    if not wanted or not all(0 <= k < count for k in wanted):
        raise ValueError(
            f"layers={layers!r}: expected numbers of layers, and the chosen weights have "
            f"{count}, by the numbers in their paths or the layer axis of stacked ones"
        )
    kept: dict[Part, bool | int] = {}
    for part, answer in chosen.items():
        path, ranges = part
        if path in numbers:
            if numbers[path] in wanted:
                kept[part] = answer
        elif path in stacks:
            axis = role_axes(letters_of(path, leaves, layout), "b")[0]
            if any(r.axis == axis for r in ranges):
                raise ValueError(
                    f"layers={layers!r} and targets={spell(*part, len(leaves[path].shape))!r} "
                    f"both choose along axis {axis} of the stacked weight: leave one of them out"
                )
            for start, stop in _runs([k for k in wanted if k < stacks[path]]):
                is_all = (start, stop) == (0, stacks[path])
                own = ranges if is_all else tuple(sorted([*ranges, Range(axis, start, stop)]))
                kept[Part(path, own)] = answer
    return kept


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """Turn numbers into ranges: ``[0, 1, 5]`` becomes ``[(0, 2), (5, 6)]``."""
    runs: list[tuple[int, int]] = []
    for k in numbers:
        if runs and runs[-1][1] == k:
            runs[-1] = (runs[-1][0], k + 1)
        else:
            runs.append((k, k + 1))
    return runs


def _layer_numbers(leaves: Iterable[str]) -> dict[str, int]:
    """Return the layer number of every path that has one: 3 for ``encoder/layers_3/attn/kernel``.

    It is the first number in the path, without its last name, that has siblings:
    ``Dense_0/kernel`` is a layer beside ``Dense_1``; ``Transformer_0`` alone is none.
    """
    siblings: dict[tuple[str, str], set[str]] = {}
    split = [path.split("/") for path in leaves]
    for names in split:
        for depth, name in enumerate(names[:-1]):
            if match := _NUMBERED.fullmatch(name):
                stem = name[: match.start(1)]
                siblings.setdefault(("/".join(names[:depth]), stem), set()).add(name)
    numbers = {}
    for names in split:
        found = []
        for depth, name in enumerate(names[:-1]):
            if match := _NUMBERED.fullmatch(name):
                beside = siblings["/".join(names[:depth]), name[: match.start(1)]]
                found.append((len(beside) == 1, depth, int(match[1])))
        if found:
            numbers["/".join(names)] = min(found)[2]
    return numbers
