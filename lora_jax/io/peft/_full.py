"""Full leaves, as PEFT writes them: modules to save, and biases."""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax._adapter.factors import wide
from lora_jax.io._kinds import from_torch, torch_shape
from lora_jax.io._places import Place
from lora_jax.io._torch import Map
from lora_jax.io.peft import _config as configs
from lora_jax.io.peft._axes import BIAS, LINEAR, ROWS, Part
from lora_jax.io.peft._folder import COUNT, Folder
from lora_jax.io.peft._own import is_new_head, outside
from lora_jax.io.peft._vocabulary import UNLOADED, tokens_of

_LABELS = (
    "If it has another number of labels, merge into a base with as many: from_pretrained(base, "
    "num_labels={n}, ignore_mismatched_sizes=True).save_pretrained(folder) in transformers"
)
STATISTICS = ("running_mean", "running_var")


def _trained(
    places: Map, saved: Collection[str], bias: str, adapted: Collection[str]
) -> dict[str, Place]:
    """List the tensors that PEFT writes of modules to save, and of biases that train."""
    found = {}
    for module in places.all_modules():
        suffixes, inner = (), ""
        if configs.is_saved(saved, module):
            suffixes = ("weight", "bias")
        elif bias == "all" or (bias != "none" and module in adapted):
            suffixes, inner = ("bias",), ".base_layer" if module in adapted else ""
        for suffix in suffixes:
            if place := places.find(module, suffix):
                is_bare = not places.is_module(place.path)  # a parameter or a statistic of one
                found[module if is_bare else f"{module}{inner}.{suffix}"] = place
    return found


def read_full(folder: Folder, places: Map, adapted: Collection[str]) -> dict[str, Any]:
    """Read the leaves that train entirely, by path; ``adapted`` are the modules with factors."""
    config = folder.config
    wanted = _trained(places, config.get("modules_to_save") or (), config["bias"], adapted)
    if config["bias"] == "all":
        beyond = outside(folder, places)
        wanted = {
            _beside_rows(folder, name, place): place
            for name, place in wanted.items()
            if place.module not in beyond
        }
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, place in sorted(wanted.items()):
        x = _array(folder, places, name, place)
        folder.check_tied(places, place)
        own = from_torch(x, place.shape, *places.form(place))
        parts.setdefault(place.path, {})[place.module] = own
    for name in sorted(folder.others.keys() - wanted.keys()):
        _check_base_s(folder, places, name, adapted, wanted)
    if config.get("lora_bias"):
        for place, x in _sums_of_biases(folder, places):
            parts.setdefault(place.path, {})[place.module] = x
    return {path: _filled(places, path, found) for path, found in parts.items()}


def _beside_rows(folder: Folder, name: str, place: Place) -> str:
    """Return the name of a bias, which has the wrapper's in it where rows train as well."""
    wrapped = f"{place.module}.token_adapter.base_layer.{place.suffix}"
    return wrapped if wrapped in folder.tensors and name not in folder.tensors else name


def _array(folder: Folder, places: Map, name: str, place: Place) -> np.ndarray:
    x, expected = folder.array(name), torch_shape(place.shape, *places.form(place))
    if x.shape != expected and (place.shape or x.size != 1):
        is_head = is_new_head(place.module) and x.shape[1:] == expected[1:]
        more = f". {_LABELS.format(n=len(x))}" if is_head else ""
        raise folder.error(f"{name!r} has shape {x.shape}, expected {expected}{more}")
    return x


def _check_base_s(
    folder: Folder, places: Map, name: str, adapted: Collection[str], wanted: Collection[str]
) -> None:
    """Raise unless a tensor that does not train is the base's own, rounded as that is."""
    module, _, suffix = name.rpartition(".")
    owner = re.sub(r"(\.token_adapter)?\.base_layer$", "", module)
    if (place := places.find(owner, suffix)) is None:
        if suffix == COUNT:
            return  # which changes nothing here
        if suffix in STATISTICS:
            raise folder.error(
                f"{name!r} is a statistic of BatchNorm, which the parameters do not have: put the "
                f"statistics beside them in the tree, and name them in names=, as {name!r}"
            )
        raise folder.left_over(name, places)
    has_wrapper = owner != module and (owner in adapted or f"{owner}.{ROWS}" in folder.tensors)
    is_table = suffix == "weight" and (has_wrapper or tokens_of(places, place) is not None)
    theirs = folder.array(name) if is_table else _array(folder, places, name, place)
    if _is_copy(theirs, places.tensor(place), places.leaves[place.path].dtype):
        return
    twin = next(
        (x for x in wanted if np.array_equal(folder.tensors[x], folder.tensors[name])), None
    )
    if is_table and twin is not None:
        raise folder.error(
            f"{name!r} trains as {twin!r} does, to which it was tied, and its configuration does "
            f"not list it, so that PEFT would drop it. If it is to count, add {owner!r} to "
            f"modules_to_save in {configs.CONFIG}; if not, remove the tensor"
        )
    if is_table:
        raise folder.error(
            f"brings a weight of {owner!r} that is not the one in params, nor that rounded: rows "
            "were added to it or trained, or it is another model's. Put it into params first, or "
            f"let PEFT do so: {UNLOADED}"
        )
    raise folder.left_over(name, places)


def _is_copy(theirs: np.ndarray, own: np.ndarray, dtype: Any) -> bool:
    """Return whether a tensor is the base's, although one of the two may be rounded."""
    with np.errstate(over="ignore"):  # no float16, then
        rounded = [own.astype(x).astype(np.float32) for x in (dtype, jnp.bfloat16, jnp.float16)]
        there = theirs.astype(dtype).astype(np.float32)
    return np.array_equal(there, own) or any(np.array_equal(theirs, x) for x in rounded)


def _sums_of_biases(folder: Folder, places: Map) -> Iterator[tuple[Place, np.ndarray]]:
    """Add the biases that PEFT trains beside its factors to the model's own."""
    for module in [module for module, tensors in folder.modules.items() if LINEAR[0] in tensors]:
        name, place = f"{module}.{BIAS}", places.find(module, "bias")
        bias = folder.array(name)
        if place is None:
            raise folder.error(
                f"{name!r} adds to a bias of {module!r}, which has none here (lora_bias=True): "
                "PEFT, too, can run this beside the model and not merge it. Train without lora_bias"
            )
        if folder.config["bias"] != "none":
            raise folder.error(f"{name!r} adds to a bias of {module!r}, which trains as well")
        update = configs.scale_of(folder.config, module) * bias
        own = places.array(place).astype(np.float32)
        yield place, own + update.reshape(own.shape)


def _filled(places: Map, path: str, parts: Mapping[str, np.ndarray]) -> Any:
    """Make a leaf of these parts by module, and of the base's for the others."""
    arrays = {
        place.module: parts[place.module] if place.module in parts else places.array(place)
        for place in places.of(path)
    }
    return jnp.asarray(places.assembled(path, arrays), wide(places.leaves[path].dtype))


def written_full(
    full: Mapping[str, Any], places: Map, modules: Mapping[str, Part]
) -> tuple[list[str], str, dict[str, np.ndarray]]:
    """Write full leaves: the modules to save, whose biases train besides, and all tensors."""
    for path in full:
        places.of(path)
        if not places.is_module(path):
            raise ValueError(
                f"peft.save: {path!r} trains fully, and is no weight or bias of a module by its "
                "name: PEFT saves entire modules. If it is the weight of one, pass "
                f"kinds={{{path!r}: 'Linear'}}"
            )
    found = [place for path in full for place in places.of(path)]
    trained = [place.module for place in found if place.suffix == "weight"]
    # PEFT saves every module whose name ends so, and all of each: what did not train is the base's.
    saved = {name for name in places.all_modules() if configs.is_saved(trained, name)}
    if both := sorted(saved & modules.keys()):
        raise ValueError(
            f"peft.save: the module {both[0]!r} would train fully and have factors as well: it is "
            f"one of {trained}, or its name ends like theirs"
        )
    alone = {place.module for place in found if place.suffix == "bias"} - saved
    bias = "none" if not alone else "lora_only" if alone <= modules.keys() else "all"
    tensors = {
        name: places.tensor(place, full if place.path in full else None)
        for name, place in _trained(places, trained, bias, modules).items()
    }
    return sorted(trained), bias, tensors
