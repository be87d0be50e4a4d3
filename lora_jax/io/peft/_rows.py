"""Rows of tables that train on their own: PEFT's tensors, and the entries of an adapter of ours.

Only this file makes such entries, and takes them apart.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax._adapter.factors import Factors
from lora_jax._weights.quantized import dequantize_array, is_quantized
from lora_jax._weights.ranges import rows_of, spell_rows
from lora_jax.io._torch import Map
from lora_jax.io.peft._axes import ROWS
from lora_jax.io.peft._folder import Folder


@dataclass(frozen=True)
class TableRows:
    """The rows of one table that train.

    Attributes:
        ids: their numbers, ascending.
        change: what is added to them, ``[rows, out]``, in float32.
        size: how many rows the table has.
        layout: the layout of the table here.
    """

    ids: tuple[int, ...]
    change: np.ndarray
    size: int
    layout: str

    def entry(self, path: str) -> dict[str, Factors]:
        """Make the entry of an adapter, by its key."""
        a = np.zeros((self.size, len(self.ids)), np.float32)  # [table rows, rows]
        a[list(self.ids), range(len(self.ids))] = 1
        a, b = jnp.asarray(a), jnp.asarray(self.change)
        f = Factors(a, b, jnp.ones(()), self.layout, frozen=("a",))
        return {spell_rows(path, self.ids): f}


def read_rows(folder: Folder, places: Map) -> dict[str, TableRows]:
    """Read the rows of every table, by its path."""
    said = folder.config.get("trainable_token_indices") or {}
    modules = [name for name, tensors in folder.modules.items() if ROWS in tensors]
    for key in said if isinstance(said, dict) else [""] if said else []:
        if not any(module.endswith(key) for module in modules):
            folder.array(f"{key or '...'}.{ROWS}")
    found = {}
    for module in modules:
        place = places.find(module)
        if place is None or place.index or len(place.shape) != 2:
            raise folder.error(f"rows of {module!r} train, and there is no such table here")
        listed: Any = said
        if isinstance(said, dict):
            listed = next((v for k, v in said.items() if module.endswith(k)), None)
        ids = listed if isinstance(listed, list) else []
        name = f"{module}.{ROWS}"
        new, table = folder.array(name), places.tensor(place)
        are_rows = ids and all(type(k) is int and 0 <= k < len(table) for k in ids)
        if not are_rows or len(set(ids)) != len(ids) or new.shape != (len(ids), table.shape[1]):
            raise folder.error(
                f"{name!r} has shape {new.shape}, for a table of shape {table.shape}, and "
                f"trainable_token_indices are {listed!r:.60}"
            )
        order = sorted(range(len(ids)), key=lambda k: ids[k])
        ids = [ids[k] for k in order]
        change = (new[order] - table[ids]).astype(np.float32)
        letters = places.letters(place.path)
        found[place.path] = TableRows(tuple(ids), change, len(table), letters)
    return found


def is_rows(key: str, path: str) -> bool:
    """Whether the entry of this key is of rows of the table at ``path``."""
    return path != key and rows_of(key) is not None


def written_rows(
    key: str, f: Factors, path: str, places: Map
) -> dict[str, tuple[list[int], np.ndarray]]:
    """Write an entry as PEFT does: the numbers of the rows and the new rows, by their module."""
    ids = rows_of(key) or ()
    (place,) = places.of(path)
    table = places.leaves[path]
    table = dequantize_array(table) if is_quantized(table) else table
    index = jnp.asarray(ids)
    rows = np.asarray(table[index] if f.layout == "io" else table[:, index].T)  # [rows, out]
    new = rows.astype(np.float32) + np.float32(f.scale) * np.asarray(f.b, np.float32)
    return {place.module: (list(ids), new)}
