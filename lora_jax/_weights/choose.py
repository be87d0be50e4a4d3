"""Choose which leaves get factors, in which layers, and which leaves train fully."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, get_args

from lora_jax._weights.axes import max_rank, not_trainable
from lora_jax._weights.conventions import QUERY_VALUE, is_bias, is_head, is_table, why_not
from lora_jax._weights.layers import of_layers
from lora_jax._weights.layouts import Layouts
from lora_jax._weights.paths import nearest
from lora_jax._weights.quantized import is_quantized
from lora_jax._weights.ranges import Part, part_of, spell
from lora_jax._weights.selector import Selector, lookup, select

Bias = Literal["none", "all", "lora_only"]


class Chosen(NamedTuple):
    """A weight that a selector chose.

    Attributes:
        key: the key of its entry.
        part: the leaf, and the part of it.
        answer: the selector's answer: True, or a rank.
    """

    key: str
    part: Part
    answer: bool | int


def choose(
    leaves: Mapping[str, Any],
    targets: Selector = None,
    *,
    exclude: Selector = None,
    full: Selector = None,
    bias: Bias = "none",
    layers: Iterable[int] | None = None,
    layout: Mapping[str, str],
    others: Mapping[str, str],
    may_be_empty: bool = False,
) -> tuple[list[Chosen], list[str]]:
    """Choose the weights that get factors, and the paths of the leaves to train fully.

    ``others`` are the leaves that are no parameters, as ``paths.not_parameters`` describes them.
    """
    if bias not in get_args(Bias):
        raise ValueError(f"bias={bias!r}: expected one of {get_args(Bias)}")
    fixed = {path: reason for path, leaf in leaves.items() if (reason := not_trainable(leaf))}
    fixed |= {path: f"{what}: no parameter" for path, what in others.items()}
    if exclude is not None:
        fixed |= dict.fromkeys(select(exclude, leaves, {}, "exclude"), f"{exclude=}")
    quantized = {p: "quantized: dequantize it first" for p, x in leaves.items() if is_quantized(x)}
    fully = [] if full is None else list(select(full, leaves, fixed | quantized, "full"))
    biases = [path for path in leaves if is_bias(path) and path not in fixed]
    if bias == "all":
        fully += [path for path in _found(biases, bias, leaves) if path not in fully]

    blocked = {
        path: reason
        for path, leaf in leaves.items()
        if (reason := why_not(path, leaf)) and not lookup(layout, path, "layout", "")
    }
    if isinstance(layout, Layouts):
        blocked |= {p: w.why_not for p, w in layout.weights.items() if w.why_not and p in leaves}
    blocked |= fixed | dict.fromkeys(fully, f"trained fully, {full=}, {bias=}")
    if targets is None:
        chosen = {p: x for p, x in select_query_value(leaves).items() if p not in blocked}
    else:
        not_linear = {
            path
            for path, leaf in leaves.items()
            if is_head(path) or is_table(path, layout) or _is_vector(path, leaf, layout)
        }
        chosen = select(targets, leaves, blocked, "targets", not_linear)
    parts = {part_of(key, leaves): answer for key, answer in chosen.items()}
    if layers is not None:
        parts = of_layers(parts, layers, leaves, layout)
    if bias == "lora_only":
        modules = {part.path.rpartition("/")[0] for part in parts}
        beside = [path for path in biases if path.rpartition("/")[0] in modules]
        fully += [path for path in _found(beside, bias, leaves) if path not in fully]
    if not parts and not fully and not may_be_empty:
        raise ValueError(
            f"lorafy: nothing to train: targets={targets!r}, exclude={exclude!r}, full={full!r} "
            f"leave no leaf. Leaves: {nearest('', leaves)}"
        )
    order = {path: i for i, path in enumerate(leaves)}
    found = []
    for part in sorted(parts, key=lambda part: (order[part.path], part.ranges)):
        found.append(Chosen(spell(*part, len(leaves[part.path].shape)), part, parts[part]))
    return found, fully


def _found(biases: list[str], bias: str, leaves: Mapping[str, Any]) -> list[str]:
    if not biases:
        raise ValueError(
            f"bias={bias!r} selects nothing: no leaf named 'bias', 'b' or 'beta'"
            f"{' beside an adapted weight' if bias == 'lora_only' else ''}. Leaves: "
            f"{nearest('bias', leaves)}"
        )
    return biases


def _is_vector(path: str, leaf: Any, layout: Mapping[str, str]) -> bool:
    """Return whether a weight reads or writes one entry, as a bias stored ``[n, 1]`` does."""
    found = layout.get(path) if isinstance(layout, Layouts) else None
    return found is not None and max_rank(found, leaf.shape) == 1


def select_query_value(leaves: Mapping[str, Any]) -> dict[str, bool]:
    """Select the default targets: query and value projections, by the field's names."""
    chosen = {
        path: True
        for path, leaf in leaves.items()
        if QUERY_VALUE.intersection(path.split("/")) and why_not(path, leaf) is None
    }
    if not chosen:
        able = [p for p, leaf in leaves.items() if why_not(p, leaf) is None]
        raise ValueError(
            "targets=None adapts query and value projections, and no weight lies under a module "
            f"named {', '.join(sorted(QUERY_VALUE))}. Pass the targets: targets='all-linear', "
            f"or a regular expression over paths such as {nearest('query/kernel', able)}"
        )
    return chosen
