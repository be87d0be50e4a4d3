"""Plan what ``lorafy`` adapts, and check all of it before any factor is made."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from lora_jax._weights.axes import max_rank, not_trainable, role_shape
from lora_jax._weights.choose import Bias, Chosen, choose
from lora_jax._weights.conventions import is_table
from lora_jax._weights.layouts import Layouts
from lora_jax._weights.numbers import check_positive, is_int
from lora_jax._weights.ranges import Part, overlap
from lora_jax._weights.selector import Selector, check_patterns, letters_of, lookup
from lora_jax._weights.target import Target


class Table(NamedTuple):
    """A table with trainable rows: its layout, and the ids of the rows."""

    layout: str
    ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that trains.

    Attributes:
        targets: the weights that get factors.
        tables: the tables with trainable rows, by path.
        full: the paths of the leaves that train fully.
    """

    targets: tuple[Target, ...]
    tables: dict[str, Table]
    full: tuple[str, ...]

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of all leaves in the plan, each once."""
        targets = (target.part.path for target in self.targets)
        return tuple(dict.fromkeys([*targets, *self.tables, *self.full]))


def make_plan(
    leaves: Mapping[str, Any],
    rank: int | Mapping[str, int],
    alpha: float | Mapping[str, float],
    *,
    rslora: bool = False,
    targets: Selector = None,
    exclude: Selector = None,
    layers: Iterable[int] | None = None,
    full: Selector = None,
    bias: Bias = "none",
    rows: Mapping[str, Iterable[int]] | None = None,
    layout: Mapping[str, str] | None = None,
    others: Mapping[str, str] | None = None,
) -> Plan:
    """Choose what trains, with the arguments of :func:`lora_jax.lorafy`, and check all of it.

    ``others`` are the leaves that are no parameters, as ``paths.not_parameters`` describes them.

    Raises:
        ValueError: an argument selects nothing, is out of range, or contradicts another.
        TypeError: an argument is of the wrong kind.
    """
    layout = {} if layout is None else layout
    if not isinstance(layout, Mapping):
        raise TypeError(
            f"layout={layout!r}: expected a mapping such as {{'.*/kernel': 'io'}}, or what "
            "lora_jax.layout_of returned"
        )
    check_same_model(layout, leaves)
    check_patterns(layout, "layout", leaves)
    others = others or {}
    tables = _tables(rows or {}, leaves, layout, others)
    chosen, fully = choose(
        leaves,
        targets,
        exclude=exclude,
        full=full,
        bias=bias,
        layers=layers,
        layout=layout,
        others=others,
        may_be_empty=bool(tables),
    )
    paths = {weight.part.path for weight in chosen}
    check_patterns(rank, "rank", paths)
    check_patterns(alpha, "alpha", paths)
    parts = {weight.key: weight.part for weight in chosen}
    parts |= {f"rows of {path}": Part(path) for path in tables}
    _check_distinct(parts, leaves)
    found = tuple(_target(weight, leaves, rank, alpha, rslora, layout) for weight in chosen)
    return Plan(found, tables, tuple(fully))


def _target(
    weight: Chosen,
    leaves: Mapping[str, Any],
    rank: Any,
    alpha: Any,
    rslora: bool,
    layout: Mapping[str, str],
) -> Target:
    """Look up the settings of one weight, and check them."""
    key, part, answer = weight
    leaf, letters = leaves[part.path], letters_of(part.path, leaves, layout)
    shape = part.shape(leaf.shape)
    r = lookup(rank, part.path, "rank") if answer is True else answer
    if r is None:
        raise _none("rank", rank, key)
    r = check_rank(r, key, letters, shape)
    wanted = lookup(alpha, part.path, "alpha")
    if wanted is None:
        raise _none("alpha", alpha, key)
    why = (
        ", since the update is scaled by alpha / rank; to switch an adapter off, call the function "
        "on lora_params.base"
    )
    scale = check_positive(wanted, "alpha", f" for {key!r}", why) / (math.sqrt(r) if rslora else r)
    fan_in = 1 if is_table(part.path, layout) else math.prod(role_shape(letters, shape, "i"))
    return Target(key, leaf, part, letters, r, scale, fan_in)


def _tables(
    rows: Mapping[str, Iterable[int]],
    leaves: Mapping[str, Any],
    layout: Mapping[str, str],
    others: Mapping[str, str],
) -> dict[str, Table]:
    """Find the tables with trainable rows, by path."""
    check_patterns(rows, "rows", leaves)
    tables = {}
    for path, leaf in leaves.items():
        if (ids := lookup(rows, path, "rows")) is None:
            continue
        ids = sorted(int(i) for i in ids)
        if path in others:
            raise ValueError(f"rows: {path!r} is {others[path]}: no parameter, so no row trains")
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
        tables[path] = Table(letters, tuple(ids))
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


def _check_distinct(parts: Mapping[str, Part], leaves: Mapping[str, Any]) -> None:
    """Raise if two entries update one array, or overlapping parts of a leaf."""
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


def _none(name: str, value: Any, key: str) -> Exception:
    """Return the error of a weight that a rank or an alpha says nothing of."""
    if isinstance(value, Mapping):
        return ValueError(f"{name}: no pattern of the mapping matches {key!r}; end with '.*'")
    default = " Leave it out for the default, 16" if name == "alpha" else ""
    return TypeError(f"{name}={value!r} for {key!r}: expected a number.{default}")


def check_rank(rank: Any, path: str, layout: str, shape: tuple[int, ...]) -> int:
    """Return the rank of one weight as an int, or raise."""
    if not is_int(rank):
        raise TypeError(f"rank={rank!r} for {path!r}: expected an int")
    limit = max_rank(layout, shape)
    if not 1 <= rank <= limit:
        raise ValueError(
            f"rank={rank} for {path!r} of shape {shape} (layout {layout!r}): expected 1 to "
            f"min(in, out) = {limit}, at which a LoRA can express any update. Give it a rank of "
            f"its own, rank={{{path!r}: {limit}, '.*': {rank}}}; train it fully, full={path!r}; or "
            f"leave it out, exclude={path!r}"
        )
    return int(rank)
