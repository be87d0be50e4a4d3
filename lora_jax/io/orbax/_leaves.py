"""Leaves of a tree as a checkpoint has them: what they are called, and what is noted of them."""

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

VALUES = ("bool", "int", "float", "str")  # kinds of leaves that the record itself holds
Leaves: TypeAlias = Mapping[str, tuple[str, Any]]  # by name; with what they are called in errors


def by_name(arrays: Mapping[str, Any]) -> Leaves:
    """Leaves by escaped names: Orbax joins keys by dots, and of two alike silently keeps one."""
    return {quote(name, safe="").replace(".", "%2E"): (name, x) for name, x in arrays.items()}


def by_number(tree: PyTree, part: str) -> Leaves:
    leaves = tree_flatten_with_path(tree)[0]
    return {str(i): (part + keystr(path), x) for i, (path, x) in enumerate(leaves)}


def own_tree(params: PyTree, arrays: Mapping[str, Any]) -> PyTree:
    """The arrays in the tree of ``params``; in nested dicts if keys must be escaped."""
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
    """What a leaf is: ``float32[3,2]``, ``key<fry>[]``, ``numpy int64[4]``, ``int``."""
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
    return tuple(map(int, re.findall(r"\d+", kind[kind.index("[") :])))


def has_entries(kind: str) -> bool:
    """Whether Orbax is to write it: it has no arrays of size zero."""
    return kind not in VALUES and 0 not in shape_of(kind)


def is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def sum_of(x: Any) -> str:
    """A checksum; of NumPy's arrays that of their bytes, since JAX may not hold their type."""
    if isinstance(x, np.ndarray):
        x = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    return checksum(x)


def stored(x: Any) -> Any:
    """The array as Orbax takes it."""
    x = jax.random.key_data(x) if is_key(x) else x
    is_local = jax.process_count() > 1 and getattr(x, "is_fully_addressable", False)
    return np.asarray(x) if is_local or isinstance(x, np.generic) else x


def known_of(x: Any) -> list[str]:
    """The checksum, and of a key its kind of generator."""
    if is_key(x):
        return [sum_of(x), str(jax.random.key_impl(x))]
    return [sum_of(np.asarray(x) if isinstance(x, np.generic) else x)]


def spec_of(kind: str, known: str) -> tuple[tuple[int, ...], Any]:
    """Shape and dtype of what is written: of a key, its data."""
    spec = kind.removeprefix("numpy ") if kind.startswith("numpy ") else known.split(":")[0]
    return shape_of(spec), jnp.dtype(spec.split("[")[0])


def labeled(notes: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    return {notes[name][0]: x for name, x in found.items()}


def rebuilt(tree: PyTree, found: Mapping[str, Any]) -> PyTree:
    """The leaves in the tree of the target."""
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, map(_typed, leaves, found.values()))


def _typed(target: Any, x: Any) -> Any:
    """A leaf as the target has it, where its kind does not say it."""
    if isinstance(target, np.generic):
        return x[()]
    if getattr(target, "weak_type", False) and not x.shape:  # as jnp.asarray(2.0), a loss scale
        return jax.device_put(jnp.asarray(x.item()), x.sharding if x.committed else None)
    return x
