"""The full leaves in an adapter's files, at the places of a tree: whole modules, and biases."""

from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax._adapter.factors import wide
from lora_jax.io._torch import Map, Place, from_torch, torch_shape
from lora_jax.io.peft import _config as configs
from lora_jax.io.peft._axes import BIAS, PREFIX, TIED
from lora_jax.io.peft._folder import Folder

_Parts = dict[str, dict[tuple[int, ...], np.ndarray]]  # by path, and by the index within the leaf


def read_full(folder: Folder, places: Map, adapted: Collection[str]) -> dict[str, Any]:
    """Read the leaves that train entirely, by path.

    Args:
        folder: the adapter.
        places: those of the parameters.
        adapted: the modules that have factors.

    Raises:
        ValueError: a tensor has no place, another shape, or is a copy of another base's.
    """
    own = _trained(folder, places, adapted)
    return {
        path: _filled(places, path, parts)
        for found in (own, _sums_of_biases(folder, places))
        for path, parts in found.items()
    }


def _trained(folder: Folder, places: Map, adapted: Collection[str]) -> _Parts:
    """Read whole modules and the biases that train."""
    parts: _Parts = {}
    for name in sorted(folder.others.keys() - _copies(folder)):
        module, _, suffix = name.rpartition(".")
        owner = module.removesuffix(".base_layer")
        place = places.find(owner, suffix)
        if place is None:
            raise left_over(folder, places, name)
        x, (letters, kind) = folder.array(name), places.form(place)
        if owner in adapted and owner != module and suffix == "weight":
            _check_table(folder, places, x, place)
            continue
        if x.shape != (expected := torch_shape(place.shape, letters, kind)):
            raise folder.error(f"{name!r} has shape {x.shape}, expected {expected}")
        saved = folder.config.get("modules_to_save")
        if not configs.is_saved(saved, owner) and not _is_bias(folder, name, adapted):
            if not _is_the_base_s(places, x, place):
                raise left_over(folder, places, name)
            continue  # PEFT saved it beside
        if places.is_tied(place.path):
            raise folder.error(TIED.format(verb="load", path=place.path))
        part = from_torch(x, place.shape, letters, kind)
        parts.setdefault(place.path, {})[place.index] = part
    return parts


def _is_bias(folder: Folder, name: str, adapted: Collection[str]) -> bool:
    """Whether PEFT trains this tensor as a bias; those of adapted modules are within."""
    module, _, suffix = name.rpartition(".")
    owner = module.removesuffix(".base_layer")
    if suffix != "bias" or folder.config["bias"] == "none":
        return False
    is_adapted = owner in adapted
    return (owner != module) == is_adapted and (is_adapted or folder.config["bias"] == "all")


def _copies(folder: Folder) -> set[str]:
    """Find biases to leave: with ``bias="all"`` PEFT saves those of whole modules three times.

    Raises:
        ValueError: two of the three differ.
    """
    found = set()
    for name, x in folder.others.items() if folder.config["bias"] == "all" else ():
        owner, _, wrapper = name.removesuffix(".bias").rpartition(".")
        if wrapper not in ("original_module", "modules_to_save") or not name.endswith(".bias"):
            continue
        if (first := folder.tensors.get(f"{owner}.bias")) is not None:
            found.add(name)
            if wrapper == "modules_to_save" and (x != first).any():
                raise folder.error(f"has two different biases for {owner!r}")
    return found


def _check_table(folder: Folder, places: Map, x: np.ndarray, place: Place) -> None:
    """Raise unless the table that PEFT saves beside its factors is the one that we have."""
    if not _is_the_base_s(places, x, place):
        raise folder.error(
            f"brings a weight of {place.module!r} that is not the one in params: its rows were "
            "added to or trained. Put it into params first"
        )


def _is_the_base_s(places: Map, theirs: np.ndarray, place: Place) -> bool:
    """Whether a tensor is the base's own, rounded as that is."""
    ours = places.tensor(place)
    dtype = places.leaves[place.path].dtype
    return theirs.shape == ours.shape and np.array_equal(
        theirs.astype(dtype).astype(np.float32), ours
    )


def left_over(folder: Folder, places: Map, name: str) -> ValueError:
    """Make the error for a tensor without a place."""
    return folder.error(
        f"the tensor {PREFIX + name!r} has no place here: its configuration does not speak of it, "
        f"or the parameters have no such module. Nearest: {places.nearest(name.rpartition('.')[0])}"
    )


def _sums_of_biases(folder: Folder, places: Map) -> _Parts:
    """Add the biases that PEFT trains beside its factors to the model's own."""
    parts: _Parts = {}
    names = [module for module, tensors in folder.modules.items() if BIAS in tensors]
    for module in names if folder.config.get("lora_bias") else ():
        place = places.find(module, "bias")
        if place is None or folder.config["bias"] != "none":
            raise folder.error(
                f"{f'{module}.{BIAS}'!r} adds to a bias of {module!r}, which is not here or trains "
                "as well"
            )
        update = configs.scale_of(folder.config, module) * folder.array(f"{module}.{BIAS}")
        own = places.array(place).astype(np.float32)
        parts.setdefault(place.path, {})[place.index] = own + update.reshape(own.shape)
    return parts


def _filled(places: Map, path: str, parts: Mapping[tuple[int, ...], np.ndarray]) -> Any:
    """Stack a leaf of these parts, and the base's where there is none."""
    stack = [
        parts[place.index] if place.index in parts else places.array(place)
        for place in places.of(path)
    ]
    leaf = places.leaves[path]
    return jnp.asarray(np.stack(stack).reshape(leaf.shape), wide(leaf.dtype))
