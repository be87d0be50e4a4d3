"""Read and write the table rows that train."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax._adapter.factors import Rows
from lora_jax._weights.axes import role_shape
from lora_jax.io._places import Place
from lora_jax.io._torch import Map
from lora_jax.io.peft._axes import ROWS
from lora_jax.io.peft._folder import Folder
from lora_jax.io.peft._vocabulary import resized


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
        letters = _tokens_read(places, place) if place else ""
        is_whole = place is not None and len(places.of(place.path)) == 1
        if place is None or not is_whole or letters.count("i") != 1:
            raise folder.error(f"rows of {module!r} train, and there is no such table here")
        listed: Any = indices
        if isinstance(indices, dict):
            listed = next((v for k, v in indices.items() if module.endswith(k)), None)
        ids = listed if isinstance(listed, list) else []
        name = f"{module}.{ROWS}"
        new, table = folder.array(name), places.tensor(place)
        if new.shape == (len(ids), table.shape[1]) and max(ids, default=0) >= len(table):
            raise resized(folder, name, max(ids) + 1, len(table))
        are_rows = ids and all(type(k) is int and k >= 0 for k in ids)
        if not are_rows or len(set(ids)) != len(ids) or new.shape != (len(ids), table.shape[1]):
            raise folder.error(
                f"{name!r} has shape {new.shape}, for a table of shape {table.shape}, and "
                f"trainable_token_indices are {listed!r:.60}"
            )
        order = sorted(range(len(ids)), key=lambda k: ids[k])
        ids = [ids[k] for k in order]
        change = (new[order] - table[ids]).astype(np.float32)
        b = jnp.asarray(change.reshape(len(ids), *role_shape(letters, place.shape, "o")))
        found[place.path] = Rows(b, jnp.ones(()), letters, tuple(ids), len(table))
    return found


def _tokens_read(places: Map, place: Place) -> str:
    """Return the letters by which the tokens are the input: an output head's are its outputs.

    PyTorch has the tokens in front in both, and :class:`Rows` have them where ``i`` is.
    """
    letters, kind = places.form(place)
    return letters.translate(str.maketrans("io", "oi")) if kind == "Linear" else letters


def written_rows(f: Rows, path: str, places: Map) -> tuple[str, np.ndarray]:
    """Return the module of a table, and its new rows, which PEFT writes instead of updates."""
    place, *others = places.of(path)
    if others:
        raise ValueError(
            f"peft.save: rows of {path!r} train, and names= makes it {1 + len(others)} modules "
            f"there, such as {place.module!r}: PEFT trains rows of one table. Give it one name, or "
            "merge instead"
        )
    if f.layout != (letters := _tokens_read(places, place)):
        raise ValueError(
            f"peft.save: the rows of {path!r} are of its axis {f.layout.index('i')}, and PEFT has "
            f"rows of tokens, which are its axis {letters.index('i')}: choose them by "
            f"lorafy(..., rows=..., layout={{{path!r}: {letters!r}}}), a layout for lorafy alone. "
            f"If it is a table, pass kinds={{{path!r}: 'Embedding'}}"
        )
    rows = places.tensor(place)[list(f.ids)]
    b = np.asarray(f.b, np.float32).reshape(rows.shape)
    return place.module, rows + np.float32(f.scale) * b
