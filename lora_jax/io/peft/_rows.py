"""Read and write the table rows that train."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax._adapter.factors import Rows
from lora_jax._weights.quantized import plain_array
from lora_jax.io._torch import Map
from lora_jax.io.peft._axes import ROWS
from lora_jax.io.peft._folder import Folder


def read_rows(folder: Folder, places: Map) -> dict[str, Rows]:
    """Read the rows of every table, by its path."""
    indices = folder.config.get("trainable_token_indices") or {}
    modules = [name for name, tensors in folder.modules.items() if ROWS in tensors]
    for key in indices if isinstance(indices, dict) else [""] if indices else []:
        if not any(module.endswith(key) for module in modules):
            folder.array(f"{key or '...'}.{ROWS}")
    found = {}
    for module in modules:
        place = places.find(module)
        if place is None or place.index or len(place.shape) != 2:
            raise folder.error(f"rows of {module!r} train, and there is no such table here")
        listed: Any = indices
        if isinstance(indices, dict):
            listed = next((v for k, v in indices.items() if module.endswith(k)), None)
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
        b = jnp.asarray(change)
        found[place.path] = Rows(b, jnp.ones(()), letters, tuple(ids), len(table))
    return found


def written_rows(f: Rows, path: str, places: Map) -> tuple[str, np.ndarray]:
    """Return the module of a table, and its new rows, which PEFT writes instead of updates."""
    (place,) = places.of(path)
    table, index = plain_array(places.leaves[path]), jnp.asarray(f.ids)
    rows = np.asarray(table[index] if f.layout == "io" else table[:, index].T)  # [rows, out]
    return place.module, rows.astype(np.float32) + np.float32(f.scale) * np.asarray(f.b, np.float32)
