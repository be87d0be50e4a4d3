"""Adapters that PEFT ties: with ``ensure_weight_tying`` a table's is written for the head, too."""

import re
from dataclasses import replace

import numpy as np

from lora_jax.io._torch import Map
from lora_jax.io.peft import _config as configs
from lora_jax.io.peft._axes import EMBEDDING, LINEAR
from lora_jax.io.peft._folder import Folder


def untied(folder: Folder, places: Map) -> Folder:
    """Give each copy of a tied module's tensors a target of its own, or drop it.

    The configuration lists one of two tied modules, the table. If the other is no leaf here, the
    table is both, and its adapter all there is.
    """
    if not folder.config.get("ensure_weight_tying"):
        return folder
    config, tensors = dict(folder.config), dict(folder.tensors)
    adapted, saved = _adapted_twice(folder), _saved_twice(folder)
    config["ensure_weight_tying"] = bool(adapted or saved)  # of some models PEFT ties nothing
    for module in [*adapted, *saved]:
        if places.find(module) is None:
            own = f"{module}."
            tensors = {name: x for name, x in tensors.items() if not name.startswith(own)}
        elif module in saved:
            config["modules_to_save"] = [*config["modules_to_save"], module]
        elif isinstance(targets := config.get("target_modules", []), str):
            config["target_modules"] = f"({targets})|{re.escape(module)}"
        else:
            config["target_modules"] = [*targets, module]
    return replace(folder, config=config, tensors=tensors)


def _adapted_twice(folder: Folder) -> list[str]:
    """List the heads, not targets themselves, whose factors are a table's, transposed."""
    tables = [found for found in folder.modules.values() if found.keys() >= {*EMBEDDING}]
    return [
        module
        for module, found in folder.modules.items()
        if found.keys() >= {*LINEAR}
        and not configs.is_target(folder.config, module)
        and any(
            np.array_equal(found[LINEAR[0]], table[EMBEDDING[1]].T)
            and np.array_equal(found[LINEAR[1]], table[EMBEDDING[0]].T)
            for table in tables
        )
    ]


def _saved_twice(folder: Folder) -> list[str]:
    """List the modules, not saved by the configuration, whose weight is that of a saved one."""
    saved = folder.config.get("modules_to_save") or ()
    ends = ".base_layer.weight", ".original_module.weight"
    weights = {
        name.removesuffix(".weight"): x
        for name, x in folder.others.items()
        if name.endswith(".weight") and not name.endswith(ends)
    }
    known = [x for module, x in weights.items() if configs.is_saved(saved, module)]
    return [
        module
        for module, x in weights.items()
        if not configs.is_saved(saved, module) and any(np.array_equal(x, one) for one in known)
    ]
