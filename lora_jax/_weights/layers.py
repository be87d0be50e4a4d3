"""Choose layers of a model: among numbered modules, and along stacked weights."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from lora_jax._weights.axes import is_array, role_axes
from lora_jax._weights.ranges import Part, Range, spell
from lora_jax._weights.selector import letters_of

_NUMBERED = re.compile(r"(?:.*_)?(\d+)")
_LAYER = re.compile(r"(?i)(.*(layer|block)s?|h)_?")  # a name that says what its number counts


class Number(NamedTuple):
    """The layer number in a path.

    Attributes:
        value: the number.
        module: the path up to it.
        name: the name without the number; the name before it if it is a number alone.
    """

    value: int
    module: str
    name: str


def of_layers(
    chosen: Mapping[Part, bool | int],
    layers: Iterable[int],
    leaves: Mapping[str, Any],
    layout: Mapping[str, str],
) -> dict[Part, bool | int]:
    """Keep the chosen weights, and the parts of stacked ones, that belong to these layers."""
    if not isinstance(layers, Iterable) or isinstance(layers, str):
        raise TypeError(f"layers={layers!r}: expected numbers, such as [{layers}] or range(4)")
    layers, numbers, stacks = list(layers), layer_numbers(leaves), {}
    for path in dict.fromkeys(part.path for part in chosen):
        letters = letters_of(path, leaves, layout)
        if "b" not in letters:
            continue
        axis, number = role_axes(letters, "b")[0], numbers.get(path)
        stack = _stack_around(path, axis, leaves)
        if number is not None and not number.module.startswith(stack):
            continue  # a stack in a layer: of experts
        if number is not None and _LAYER.fullmatch(number.name):
            raise ValueError(
                f"layers={layers!r}: {path!r} of shape {leaves[path].shape} has a number in its "
                f"path and a stack along axis {axis}, and each may be the layer's. Say which "
                f"weights by targets=: by name, or by part, as {path + _first(letters)!r}"
            )
        stacks[path] = leaves[path].shape[axis]
        numbers = {p: n for p, n in numbers.items() if not p.startswith(stack)}
    depths = stacks | _depths(numbers, [part.path for part in chosen])
    count = max(depths.values(), default=0)
    if any(k < 0 for k in layers) and len(set(depths.values())) > 1:
        shown = ", ".join(f"{n} in {part!r}" for part, n in sorted(depths.items())[:5])
        raise ValueError(
            f"layers={layers!r}: negative numbers count from the end, and the chosen weights have "
            f"several numbers of layers: {shown}. Pass numbers from 0, or targets= of one part"
        )
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
            if numbers[path].value in wanted:
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


def _depths(numbers: Mapping[str, Number], chosen: Iterable[str]) -> dict[str, int]:
    """Count the layers in each part of a model that chosen weights are in: ``encoder/layers_``."""
    parts = {path: number.module.rstrip("0123456789") for path, number in numbers.items()}
    wanted = {parts[path] for path in chosen if path in parts}
    depths: dict[str, int] = {}
    for path, number in numbers.items():
        if parts[path] in wanted:
            depths[parts[path]] = max(depths.get(parts[path], 0), number.value + 1)
    return depths


def _stack_around(path: str, axis: int, leaves: Mapping[str, Any]) -> str:
    """Return what the paths of the stack that a leaf is in begin with.

    All leaves of a stack have its axis: those of ``layers/`` beside ``layers/Dense_0/kernel``.
    """
    names, size = path.split("/"), leaves[path].shape[axis]
    for depth in range(len(names)):
        prefix = "".join(f"{name}/" for name in names[:depth])
        shapes = [x.shape for p, x in leaves.items() if p.startswith(prefix) and is_array(x)]
        if all(len(shape) > axis and shape[axis] == size for shape in shapes):
            return prefix
    return path


def _first(letters: str) -> str:
    """Return the part of a stack's first layer, as ``[0:1, :, :]``."""
    return f"[{', '.join('0:1' if letter == 'b' else ':' for letter in letters)}]"


def layer_numbers(leaves: Iterable[str]) -> dict[str, Number]:
    """Return the layer number of every path that has one: 3 in ``encoder/layers_3/attn/kernel``.

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
                stem = name[: match.start(1)]
                is_alone = len(siblings["/".join(names[:depth]), stem]) == 1
                module, before = "/".join(names[: depth + 1]), names[depth - 1] if depth else ""
                found.append((is_alone, depth, Number(int(match[1]), module, stem or before)))
        if found:
            numbers["/".join(names)] = min(found)
    alone = [is_alone for is_alone, _, _ in numbers.values()]
    return {p: x[2] for p, x in numbers.items() if not x[0] or all(alone)}
