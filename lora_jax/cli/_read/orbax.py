"""Parameters in an Orbax checkpoint, one array at a time."""

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path
from orbax.checkpoint import v1 as ocp

from lora_jax.io._checksum import checksum
from lora_jax.io.orbax._files import config_of, reading
from lora_jax.io.orbax._leaves import spec_of, sum_of

# An entry of a path as jax.tree_util.keystr writes it: ['a'], [0], [<flat index 0>], .a
_KEY = re.compile(r"\['((?:[^'\\]|\\.)*)'\]|\[\"((?:[^\"\\]|\\.)*)\"\]|\[(?:\D*?)(\d+)>?\]|\.(\w+)")


@dataclass(frozen=True)
class Stored:
    """An array of a checkpoint.

    Attributes:
        where: the checkpoint.
        shape: of the array.
        dtype: of the array.
        is_numpy: whether it was written as one of NumPy's, whose checksum is of bytes.
        known: its checksum.
        label: what it is called in errors.
        place: its place among the leaves of ``tree``.
        tree: of what the checkpoint holds, of arrays' metadata.
    """

    where: str
    shape: tuple[int, ...]
    dtype: np.dtype
    is_numpy: bool
    known: str
    label: str
    place: int
    tree: Any

    @property
    def size(self) -> int:
        """In bytes."""
        return prod(self.shape) * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        """For NumPy."""
        return self.read() if dtype is None else self.read().astype(dtype)

    def read(self) -> np.ndarray:
        """The array, which is the one that was written.

        Raises:
            ValueError: it is not.
        """
        leaves, structure = jax.tree.flatten(self.tree)
        wanted: list[Any] = [ocp.PLACEHOLDER] * len(leaves)
        wanted[self.place] = np.broadcast_to(np.zeros((), self.dtype), self.shape)
        with reading(self.where, "params"):
            target = jax.tree.unflatten(structure, wanted)
            found = ocp.load(self.where, target, checkpointable_name="params")
        x = np.asarray(jax.tree.leaves(found)[self.place])
        if (sum_of(x) if self.is_numpy else checksum(x)) != self.known:
            raise ValueError(f"{self.where} is damaged: {self.label} is not what was written")
        return x


def tensors_in(path: Path) -> dict[str, Stored]:
    """The arrays by the paths that ``lorafy`` gives them."""
    where = str(path.absolute())
    notes: Mapping[str, Any] = config_of(where)[1]["params"]
    with reading(where, "params"):
        tree: Any = ocp.checkpointables_metadata(where).metadata["params"]
    places = {_keys(keystr(keys)): k for k, (keys, _) in enumerate(tree_flatten_with_path(tree)[0])}
    labels = {label: _keys(label.removeprefix("params")) for label, *_ in notes.values()}
    wrapped = any(keys[:1] == ("params",) for keys in labels.values())
    is_escaped = any("." in key for keys in labels.values() for key in keys)
    found = {}
    for label, kind, known, *_ in notes.values():
        keys = labels[label]
        written = tuple(_escaped(key) for key in keys) if is_escaped else keys
        if written not in places:
            raise ValueError(f"{where} is damaged: {label} is not in it")
        name = "/".join(keys[1:] if wrapped and keys[:1] == ("params",) else keys)
        shape, dtype = spec_of(kind, known)
        is_numpy = kind.startswith("numpy ")
        place = places[written]
        found[name] = Stored(where, shape, np.dtype(dtype), is_numpy, known, label, place, tree)
    return found


def _keys(label: str) -> tuple[str, ...]:
    """``['a'][0].b`` as ``("a", "0", "b")``."""
    found = []
    for single, double, index, name in _KEY.findall(label):
        quote = "'" if single else '"' if double else ""
        text = single or double or index or name
        found.append(ast.literal_eval(f"{quote}{text}{quote}") if quote else text)
    return tuple(found)


def _escaped(key: str) -> str:
    return key.replace("%", "%25").replace(".", "%2E")
