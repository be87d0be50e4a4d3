"""Read the parameters in an Orbax checkpoint, one array at a time."""

import ast
import re
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path
from orbax.checkpoint import v1 as ocp

from lora_jax._weights.paths import PyTree, random_in
from lora_jax.io._checksum import checksum
from lora_jax.io._tensor import Tensor
from lora_jax.io.orbax._leaves import escaped, spec_of, sum_of
from lora_jax.io.orbax._parts import config_of, reading

# An entry of a path as jax.tree_util.keystr writes it: ['a'], [0], [<flat index 0>], .a
_KEY = re.compile(r"\['((?:[^'\\]|\\.)*)'\]|\[\"((?:[^\"\\]|\\.)*)\"\]|\[(?:\D*?)(\d+)>?\]|\.(\w+)")


def tensors_in(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Find the arrays of a checkpoint, by the paths that ``lorafy`` gives them.

    Returns:
        The arrays, and those among them that are no parameters, each described. Of NNX's variables
        earlier checkpoints do not tell.
    """
    where = str(path.absolute())
    record, parts = config_of(where)
    notes: Mapping[str, Any] = parts["params"]
    with reading(where, "params"):
        tree: Any = ocp.checkpointables_metadata(where).metadata["params"]
    numbers = {
        _keys(keystr(keys)): k for k, (keys, _) in enumerate(tree_flatten_with_path(tree)[0])
    }
    labels = {label: _keys(label.removeprefix("params")) for label, *_ in notes.values()}
    wrapped = any(keys[:1] == ("params",) for keys in labels.values())
    is_escaped = any("." in key for keys in labels.values() for key in keys)
    starts = Counter(keys[:-1] for keys in labels.values())
    found, others, kinds = {}, {}, {}
    for label, kind, known, *_ in notes.values():
        keys = labels[label]
        written = tuple(map(escaped, keys)) if is_escaped else keys
        if written not in numbers:
            raise ValueError(f"{where} is damaged: {label} is not in it")
        is_boxed = label.endswith("].value") and starts[keys[:-1]] == 1
        names = keys[:-1] if is_boxed else keys  # a variable of NNX, or an array with metadata
        name = "/".join(names[1:] if wrapped and keys[0] == "params" else names)
        if wrapped and keys[0] != "params":
            others[name] = f"in the collection {keys[0]!r}, not in 'params'"
        shape, dtype = spec_of(kind, known)
        read = partial(_read, where, tree, numbers[written], label, kind, known)
        found[name], kinds[name] = Tensor(shape, np.dtype(dtype), read), kind
    return found, others | random_in(kinds) | record.get("others", {})


def _read(where: str, tree: PyTree, number: int, label: str, kind: str, known: str) -> np.ndarray:
    """Read one leaf of a checkpoint, which has a number in the tree and a known checksum."""
    leaves, structure = jax.tree.flatten(tree)
    wanted: list[Any] = [ocp.PLACEHOLDER] * len(leaves)
    shape, dtype = spec_of(kind, known)
    wanted[number] = np.broadcast_to(np.zeros((), dtype), shape)
    with reading(where, "params"):
        target = jax.tree.unflatten(structure, wanted)
        found = ocp.load(where, target, checkpointable_name="params")
    x = np.asarray(jax.tree.leaves(found)[number])
    if (sum_of(x) if kind.startswith("numpy ") else checksum(x)) != known:
        raise ValueError(f"{where} is damaged: {label} is not what was written")
    return x


def _keys(label: str) -> tuple[str, ...]:
    """Split ``['a'][0].b`` into ``("a", "0", "b")``."""
    found = []
    for single, double, index, name in _KEY.findall(label):
        quote = "'" if single else '"' if double else ""
        text = single or double or index or name
        found.append(ast.literal_eval(f"{quote}{text}{quote}") if quote else text)
    return tuple(found)
