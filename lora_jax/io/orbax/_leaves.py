"""Name the leaves of a tree in a checkpoint, and describe them."""

import re
from collections.abc import Mapping
from typing import Any, TypeAlias
from urllib.parse import quote

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from lora_jax._weights.paths import PyTree
from lora_jax.io._checksum import checksum
from lora_jax.io._state import data_of, is_key

VALUES = ("bool", "int", "float", "str")  # kinds of leaves that the record itself contains
Leaves: TypeAlias = Mapping[str, tuple[str, Any]]  # by name in Orbax: label for errors, leaf


def by_name(arrays: Mapping[str, Any]) -> Leaves:
    """Escape names: Orbax joins keys by dots, and silently keeps one of two that are equal."""
    return {quote(name, safe="").replace(".", "%2E"): (name, x) for name, x in arrays.items()}


def by_number(tree: PyTree, part: str) -> Leaves:
    """Number the leaves of a tree."""
    leaves = tree_flatten_with_path(tree)[0]
    return {str(i): (part + keystr(path), x) for i, (path, x) in enumerate(leaves)}


def own_tree(params: PyTree, arrays: Mapping[str, Any]) -> PyTree:
    """Put arrays into the tree of ``params``, or into nested dicts if keys must be escaped."""
    paths = [
        [keystr((key,), simple=True) for key in path]
        for path, _ in tree_flatten_with_path(params)[0]
    ]
    if not any("." in key for path in paths for key in path):
        return jax.tree.unflatten(jax.tree.structure(params), arrays.values())
    tree: dict[str, Any] = {}
    for path, x in zip(paths, arrays.values(), strict=True):
        *outer, last = map(escaped, path)
        node = tree
        for key in outer:
            node = node.setdefault(key, {})
        node[last] = x
    return tree


def escaped(key: str) -> str:
    """Write a key without dots, by which Orbax joins keys."""
    return key.replace("%", "%25").replace(".", "%2E")


def kind_of(x: Any, label: str) -> str:
    """Describe a leaf: ``float32[3,2]``, ``key<fry>[]``, ``numpy int64[4]``, ``int``."""
    if isinstance(x, bool | int | float | str) and type(x).__name__ in VALUES:
        return type(x).__name__
    is_numpy = isinstance(x, np.ndarray | np.generic)
    if not is_numpy and not isinstance(x, jax.Array | jax.ShapeDtypeStruct):
        raise TypeError(f"{label} is {type(x).__name__}, expected an array, a number or a string")
    if is_numpy and (x.dtype.kind in "OSUMm" or x.dtype.names):
        raise TypeError(f"{label} is a NumPy array of {x.dtype}, expected numbers")
    is_odd = is_numpy and (x.dtype.newbyteorder("=") != x.dtype or x.dtype.itemsize > 16)
    if is_odd or str(x.dtype) == "float128":
        raise TypeError(f"{label} is of type {x.dtype!r}, which other machines read otherwise")
    return f"{'numpy ' * is_numpy}{x.dtype}[{','.join(map(str, x.shape))}]"


def shape_of(kind: str) -> tuple[int, ...]:
    """Read the shape of a leaf from its kind."""
    return tuple(map(int, re.findall(r"\d+", kind[kind.index("[") :])))


def has_entries(kind: str) -> bool:
    """Return whether Orbax writes a leaf: it does not write arrays of size zero."""
    return kind not in VALUES and 0 not in shape_of(kind)


def sum_of(x: Any) -> str:
    """Compute a checksum; that of a NumPy array is of its bytes, since JAX may lack its dtype."""
    if isinstance(x, np.ndarray):
        x = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    return checksum(x)


def stored(x: Any) -> Any:
    """Convert a leaf to the array that Orbax takes."""
    x = data_of(x)
    is_local = jax.process_count() > 1 and getattr(x, "is_fully_addressable", False)
    return np.asarray(x) if is_local or isinstance(x, np.generic) else x


def known_of(x: Any) -> list[str]:
    """Return the checksum; for a key, also the name of its generator."""
    if is_key(x):
        return [sum_of(x), str(jax.random.key_impl(x))]
    return [sum_of(np.asarray(x) if isinstance(x, np.generic) else x)]


def spec_of(kind: str, known: str) -> tuple[tuple[int, ...], Any]:
    """Return the shape and the dtype that is written; for a key, those of its data."""
    spec = kind.removeprefix("numpy ") if kind.startswith("numpy ") else known.split(":")[0]
    return shape_of(spec), jnp.dtype(spec.split("[")[0])


def labeled(notes: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Give leaves their labels instead of their names in Orbax."""
    return {notes[name][0]: x for name, x in found.items()}


def rebuilt(tree: PyTree, found: Mapping[str, Any]) -> PyTree:
    """Put leaves into the tree of the target."""
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, map(_typed, leaves, found.values()))


def _typed(target: Any, x: Any) -> Any:
    """Give a leaf the type of the target where its kind does not tell it."""
    if isinstance(target, np.generic):
        return x[()]
    if getattr(target, "weak_type", False) and not x.shape:  # as jnp.asarray(2.0), a loss scale
        return jax.device_put(jnp.asarray(x.item()), x.sharding if x.committed else None)
    return x
