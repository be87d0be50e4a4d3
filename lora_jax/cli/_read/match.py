"""Find the weight of an adapter's entry among a model's tensors."""

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np

from lora_jax._weights.paths import nearest
from lora_jax._weights.ranges import Range, index_of, part_shape, split_range
from lora_jax._weights.ranges import part_of as parse
from lora_jax.io._torch import as_name, as_path

_ENDINGS = ("weight", "kernel", "embedding")


def canonical(path: str) -> str:
    """Return the name of an entry's module, whatever the file calls it.

    >>> canonical("model/layers/0/q_proj/kernel"), canonical("model.layers.0.q_proj")
    ('model.layers.0.q_proj', 'model.layers.0.q_proj')
    """
    name = as_name(path)
    module, _, last = name.rpartition(".")
    return module if module and last in _ENDINGS else name


def names_of(path: str) -> list[str]:
    """List what the tensor of an entry may be called, the likeliest first."""
    bare = split_range(path)[0]
    module = canonical(bare)
    names = [bare, *(f"{module}.{ending}" for ending in _ENDINGS)]
    return [bare, *(spell(name) for name in names for spell in (as_name, as_path))]


def find(path: str, tensors: Mapping[str, Any], where: Any) -> tuple[str, tuple[Range, ...]]:
    """Find the tensor that an entry is of: its name, and the part that is adapted.

    Raises:
        ValueError: there is none.
    """
    name = next((name for name in names_of(path) if name in tensors), None)
    if name is None:
        raise ValueError(
            f"{where} has no tensor for {path!r}: the adapter is another model's. Nearest: "
            f"{nearest(path, tensors)}"
        )
    own = split_range(path)[1]
    if own is None:
        return name, ()
    return name, parse(f"{name}[{own}]", tensors).ranges


def part_of(path: str, tensors: Mapping[str, Any], shape: tuple[int, ...], where: Any) -> Any:
    """Read the part of a tensor that an entry is of, which has as many numbers as ``shape``.

    Raises:
        ValueError: it has another number of them.
    """
    name, ranges = find(path, tensors, where)
    found = part_shape(tensors[name].shape, ranges)
    if prod(found) != prod(shape):
        raise ValueError(
            f"{where}: {name!r} has shape {tuple(found)}, and the adapter's {path!r} is of one of "
            f"shape {shape}: it is another model's"
        )
    x = np.asarray(tensors[name].read())
    return x[index_of(ranges, x.ndim)]
