"""The adapters of heads that are tied to a table, where PEFT's files have the table's alone."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from lora_jax.io._torch import Map
from lora_jax.io.peft import _config as configs
from lora_jax.io.peft._axes import EMBEDDING, LINEAR, ROWS
from lora_jax.io.peft._folder import Folder


def with_heads(folder: Folder, tables: Mapping[str, str], *, always: bool = False) -> Folder:
    """Give every name of a tied table its own adapter, as PEFT does when it loads the files.

    PEFT ties new rows of a table to its heads, unless several names have other rows; and with
    ``ensure_weight_tying`` it ties everything.

    Args:
        folder: the adapter.
        tables: the module of the table, by that of each head.
        always: whether to tie everything: the adapter is of one parameter.
    """
    config, tensors = dict(folder.config), dict(folder.tensors)
    for head, table in tables.items():
        own = [name for name, to in tables.items() if to == table]
        if f"{table}.{ROWS}" in tensors and _have_same_rows(config, tensors, [table, *own]):
            ids = _rows_of(config, table)
            tensors.setdefault(f"{head}.{ROWS}", tensors[f"{table}.{ROWS}"])
            config["trainable_token_indices"] = {table: ids, **dict.fromkeys(own, ids)}
        if not (always or configs.ties_adapters(config, table)):
            continue
        if f"{table}.{EMBEDDING[0]}" in tensors:
            for role, other in zip(LINEAR, EMBEDDING[::-1], strict=True):
                tensors.setdefault(f"{head}.{role}", tensors[f"{table}.{other}"].T)
            config["target_modules"] = _also(config.get("target_modules"), head)
        if f"{table}.weight" in tensors:
            tensors.setdefault(f"{head}.weight", tensors[f"{table}.weight"])
            config["modules_to_save"] = [*config["modules_to_save"], head]
    return replace(folder, config=config, tensors=tensors)


def with_own_heads(folder: Folder, places: Map) -> Folder:
    """The same for parameters of which it is not known what is tied: as the files tell.

    Heads whose adapter is the table's, and that are not in the parameters, are the table there.
    """
    tables = {head: table for table in _tables(folder) for head in _twins(folder, table)}
    here = {head: table for head, table in tables.items() if places.find(head)}
    folder = _without(folder, list(_shared(folder, places)))
    gone = tuple(f"{head}." for head in tables.keys() - here.keys())
    tensors = {k: x for k, x in folder.tensors.items() if not (gone and k.startswith(gone))}
    found = with_heads(replace(folder, tensors=tensors), here)
    return replace(found, config={**found.config, "ensure_weight_tying": bool(gone)})


def _shared(folder: Folder, places: Map) -> Iterator[str]:
    """Find modules that are not here, and have the tensors of a table that is: a tied head's."""
    for head in (name for name in folder.named if places.find(name) is None):
        own = {
            k.removeprefix(head): x for k, x in folder.tensors.items() if k.startswith(f"{head}.")
        }
        for table in folder.named:
            place = places.find(table)
            is_table = place is not None and places.is_table(place.path)
            theirs = (folder.tensors.get(table + end) for end in own)
            pairs = zip(own.values(), theirs, strict=True)
            if is_table and all(y is not None and _equal(x, y) for x, y in pairs):
                yield head


def _without(folder: Folder, modules: list[str]) -> Folder:
    """Leave the tensors and the rows of these modules out."""
    starts = tuple(f"{module}." for module in modules)
    tensors = {k: x for k, x in folder.tensors.items() if not (starts and k.startswith(starts))}
    rows = folder.config.get("trainable_token_indices")
    if isinstance(rows, dict):
        rows = {k: x for k, x in rows.items() if not any(m.endswith(k) for m in modules)}
    config = {**folder.config, "trainable_token_indices": rows}
    return replace(folder, config=config, tensors=tensors)


def _tables(folder: Folder) -> list[str]:
    ends = (f".{EMBEDDING[0]}", ".weight")
    found = {
        name.removesuffix(end) for name in folder.tensors for end in ends if name.endswith(end)
    }
    return sorted(name for name in found if configs.ties_adapters(folder.config, name))


def _twins(folder: Folder, table: str) -> list[str]:
    """List the modules with the same adapter, turned."""
    x = folder.tensors
    pairs = [(f".{LINEAR[0]}", x.get(f"{table}.{EMBEDDING[1]}"), True)]
    pairs += [(f".{LINEAR[1]}", x.get(f"{table}.{EMBEDDING[0]}"), True)]
    pairs += [(".weight", x.get(f"{table}.weight"), False)]
    found = None
    for end, own, is_turned in pairs:
        if own is None:
            continue
        other = own.T if is_turned else own
        alike = {k.removesuffix(end) for k, y in x.items() if k.endswith(end) and _equal(y, other)}
        found = alike if found is None else found & alike
    return sorted((found or set()) - {table})


def _equal(one: np.ndarray, two: np.ndarray) -> bool:
    return one.shape == two.shape and np.array_equal(one, two)


def _have_same_rows(
    config: Mapping[str, Any], tensors: Mapping[str, Any], names: list[str]
) -> bool:
    """Return whether no two of these names list other rows, or have other tensors of them."""
    listed = [ids for name in names if (ids := _rows_of(config, name)) is not None]
    stored = [tensors[key] for name in names if (key := f"{name}.{ROWS}") in tensors]
    return all(ids == listed[0] for ids in listed) and all(_equal(x, stored[0]) for x in stored)


def _rows_of(config: Mapping[str, Any], module: str) -> Any:
    """Return the rows that are listed for a module; a list is of the table."""
    listed = config.get("trainable_token_indices")
    if not isinstance(listed, dict):
        return listed
    return next((ids for key, ids in listed.items() if module.endswith(key)), None)


def _also(targets: Any, module: str) -> Any:
    """Add a module to the targets of a configuration."""
    if isinstance(targets, str):
        return targets if targets == "all-linear" else f"(?:{targets})|{re.escape(module)}"
    return [*(targets or []), module]
