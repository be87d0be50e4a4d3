"""Which leaves get factors, which train whole, and which layers of them."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

from lora_jax._layout import (
    Layouts,
    conventional,
    is_embedding,
    is_head,
    max_rank,
    not_trainable,
    role_axes,
    why_not,
)
from lora_jax._paths import nearest
from lora_jax._quantized import is_quantized
from lora_jax._ranges import Range, entry, spell
from lora_jax._select import Selector, lookup, select, select_query_value

Bias = Literal["none", "all", "lora_only"]
Chosen = dict[str, bool | int]

_NUMBERED = re.compile(r"(?:.*_)?(\d+)")


def choose(
    leaves: Mapping[str, Any],
    targets: Selector,
    exclude: Selector,
    full: Selector,
    bias: Bias,
    layers: Iterable[int] | None,
    layout: Mapping[str, str],
    may_be_empty: bool = False,
) -> tuple[Chosen, list[str]]:
    """The keys to adapt, with the selector's answers, and the paths to train whole."""
    if bias not in get_args(Bias):
        raise ValueError(f"bias={bias!r}: expected one of {get_args(Bias)}")
    fixed = {path: reason for path, leaf in leaves.items() if (reason := not_trainable(leaf))}
    if exclude is not None:
        fixed |= dict.fromkeys(select(exclude, leaves, {}, "exclude"), f"{exclude=}")
    quantized = {p: "quantized: dequantize it first" for p, x in leaves.items() if is_quantized(x)}
    whole = [] if full is None else list(select(full, leaves, fixed | quantized, "full"))
    biases = [path for path in leaves if is_bias(path) and path not in fixed]
    if bias == "all":
        whole += [path for path in _found(biases, bias, leaves) if path not in whole]

    blocked = {
        path: reason
        for path, leaf in leaves.items()
        if (reason := why_not(path, leaf)) and not lookup(layout, path, "layout", "")
    }
    if isinstance(layout, Layouts):
        blocked |= {p: w.why_not for p, w in layout.weights.items() if w.why_not and p in leaves}
    blocked |= fixed | dict.fromkeys(whole, f"trained whole, {full=}, {bias=}")
    if targets is None:
        chosen = {p: x for p, x in select_query_value(leaves).items() if p not in blocked}
    else:
        not_linear = {
            path
            for path, leaf in leaves.items()
            if is_head(path) or is_table(path, layout) or _is_vector(path, leaf, layout)
        }
        chosen = select(targets, leaves, blocked, "targets", not_linear)
    if layers is not None:
        chosen = _of_layers(chosen, layers, leaves, layout)
    if bias == "lora_only":
        modules = {entry(name, leaves)[0].rpartition("/")[0] for name in chosen}
        beside = [path for path in biases if path.rpartition("/")[0] in modules]
        whole += [path for path in _found(beside, bias, leaves) if path not in whole]
    if not chosen and not whole and not may_be_empty:
        raise ValueError(
            f"lorafy: nothing to train: targets={targets!r}, exclude={exclude!r}, full={full!r} "
            f"leave no leaf. Leaves: {nearest('', leaves)}"
        )
    order = {path: i for i, path in enumerate(leaves)}

    def place(name):
        path, ranges = entry(name, leaves)
        return order[path], ranges

    return {name: chosen[name] for name in sorted(chosen, key=place)}, whole


def is_bias(path: str) -> bool:
    """Whether the path names a bias."""
    return path.split("/")[-1] in ("bias", "b", "beta")


def _found(biases: list[str], bias: str, leaves: Mapping[str, Any]) -> list[str]:
    if not biases:
        raise ValueError(
            f"bias={bias!r} selects nothing: no leaf named 'bias', 'b' or 'beta'"
            f"{' beside an adapted weight' if bias == 'lora_only' else ''}. Leaves: "
            f"{nearest('bias', leaves)}"
        )
    return biases


def is_table(path: str, layout: Mapping[str, str]) -> bool:
    """Whether a weight is looked up: by what the function does, if known, or else by its name."""
    if isinstance(layout, Layouts):
        return layout.weights[path].kind == "embedding"
    return is_embedding(path)


def _is_vector(path: str, leaf: Any, layout: Mapping[str, str]) -> bool:
    """Whether a weight is known to read or write one entry, as a bias stored ``[n, 1]`` does."""
    found = layout.get(path) if isinstance(layout, Layouts) else None
    return found is not None and max_rank(found, leaf.shape) == 1


def letters_of(path: str, leaves: Mapping[str, Any], layout: Mapping[str, str]) -> str:
    """The layout of a weight: as said, or by convention."""
    return lookup(layout, path, "layout") or conventional(path, leaves[path], leaves)


def _of_layers(
    chosen: Mapping[str, bool | int],
    layers: Iterable[int],
    leaves: Mapping[str, Any],
    layout: Mapping[str, str],
) -> Chosen:
    """Those of the chosen weights, and parts of stacked ones, that are of these layers."""
    layers, numbers = list(layers), _layer_numbers(leaves)
    stacks = {
        path: leaves[path].shape[role_axes(letters, "b")[0]]
        for path in dict.fromkeys(entry(name, leaves)[0] for name in chosen)
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
    kept: Chosen = {}
    for name, answer in chosen.items():
        path, ranges = entry(name, leaves)
        if path in numbers:
            if numbers[path] in wanted:
                kept[name] = answer
        elif path in stacks:
            axis = role_axes(letters_of(path, leaves, layout), "b")[0]
            if any(r.axis == axis for r in ranges):
                raise ValueError(
                    f"layers={layers!r} and targets={name!r} both choose along axis {axis} "
                    "of the stacked weight: leave one of them out"
                )
            for start, stop in _runs([k for k in wanted if k < stacks[path]]):
                is_whole = (start, stop) == (0, stacks[path])
                part = ranges if is_whole else sorted([*ranges, Range(axis, start, stop)])
                kept[spell(path, part, len(leaves[path].shape))] = answer
    return kept


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """The numbers as ranges: ``[0, 1, 5]`` as ``[(0, 2), (5, 6)]``."""
    runs: list[tuple[int, int]] = []
    for k in numbers:
        if runs and runs[-1][1] == k:
            runs[-1] = (runs[-1][0], k + 1)
        else:
            runs.append((k, k + 1))
    return runs


def _layer_numbers(leaves: Iterable[str]) -> dict[str, int]:
    """The layer of every path that has one: of ``encoder/layers_3/attn/kernel``, 3.

    It is the first number in a path under which others stand beside it, in the modules above the
    last: ``Dense_0/kernel`` is a layer among ``Dense_1``, ``Transformer_0`` alone is none.
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
