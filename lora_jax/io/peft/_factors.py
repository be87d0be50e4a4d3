"""The factors of modules: at the places of a tree, and in PEFT's files."""

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np

from lora_jax._adapter.factors import Factors
from lora_jax._weights.axes import role_axes
from lora_jax._weights.paths import nearest
from lora_jax._weights.ranges import Range
from lora_jax.io._places import Place
from lora_jax.io._record import to_host
from lora_jax.io._torch import Map
from lora_jax.io.peft import _config as configs
from lora_jax.io.peft._axes import (
    BIAS,
    EMBEDDING,
    LINEAR,
    MAGNITUDE,
    ROWS,
    Part,
    from_peft,
)
from lora_jax.io.peft._config import CONFIG
from lora_jax.io.peft._folder import Folder
from lora_jax.io.peft._own import outside
from lora_jax.io.peft._parameters import find_parameter, parameters_among


def read_factors(folder: Folder, places: Map) -> dict[str, Part]:
    """Read the factors of every module, by the name of the module or parameter."""
    targets = folder.config.get("target_parameters") or []
    known = parameters_among(folder, places.modules())
    if unknown := [t for t in targets if not any(configs.matches([t], name) for name in known)]:
        raise folder.error(
            f"adapts the parameters {unknown}, which are not here. Nearest: "
            f"{places.nearest(unknown[0])}"
        )
    parameters = {wrapper: name for name, wrapper in known.items()}
    found = {}
    for module, tensors in folder.modules.items():
        if LINEAR[0] in tensors:
            part = _read_part(folder, places, module, parameters.get(module, module), LINEAR)
            found[part.place.module] = part
        if EMBEDDING[0] in tensors:
            found[module] = _read_part(folder, places, module, module, EMBEDDING)
    return found


def _read_part(folder: Folder, places: Map, module: str, own: str, names: tuple[str, str]) -> Part:
    """Read the factors that a module has, for itself or for its parameter ``own``."""
    is_parameter = own != module
    config = folder.config
    place = find_parameter(places, own) if is_parameter else places.find(own)
    attention = own.removesuffix(".base_layer.out_proj")
    if place is None and f"{attention}.base_layer.out_proj" in folder.modules:
        raise folder.error(
            f"adapts {attention!r}, an nn.MultiheadAttention, whose factors are of several weights "
            "and cannot be read here. Merge them in PEFT: model.merge_and_unload()"
        )
    if place is None:
        raise folder.error(
            f"adapts a module {own!r}, which the parameters have not. Nearest: "
            f"{places.nearest(own)}. If it has another name here, pass names="
        )
    letters = places.letters(place.path)
    kind = places.kind(place.path, letters)
    fits = (names == EMBEDDING) == (kind == "Embedding") and kind != "Parameter"
    if not (kind != "Conv" if is_parameter else fits):
        name = f"{module}.{names[0]}"
        raise folder.error(f"{name!r} is of another kind of module than a {kind}: pass kinds=")
    a, b = (folder.array(f"{module}.{name}") for name in names)
    magnitude = folder.array(f"{module}.{MAGNITUDE}") if config.get("use_dora") else None
    if is_parameter and (init := config["init_lora_weights"]) in configs.REDONE:
        raise folder.error(
            f"init_lora_weights={init!r} of the parameter {own!r} cannot be repeated. Save it in "
            "PEFT with path_initial_model_for_weight_conversion, which makes it a plain LoRA"
        )
    if is_parameter and kind != "Parameter":
        kind = "Linear"  # also of a table
    part = from_peft(place, letters, kind, a, b, configs.scale_of(config, own), magnitude)
    if part.rank != (rank := configs.rank_of(config, own)):
        raise folder.error(
            f"the factors of {own!r} have rank {part.rank}, and its configuration has {rank}"
        )
    if not is_parameter and not configs.is_target(config, own):
        raise folder.error(
            f"has factors for {own!r}, which its configuration does not adapt, so that PEFT "
            f"would drop them: target_modules={config.get('target_modules')!r}. If they are to "
            f"count, add {own!r} to target_modules in {CONFIG}; if not, remove the tensors"
        )
    folder.check_tied(places, place)
    return part


def check_factors(folder: Folder, places: Map, adapted: Collection[str]) -> None:
    """Raise unless every tensor beside factors belongs to some, and every target has some."""
    for module, tensors in folder.modules.items():
        pairs = [pair for pair in (LINEAR, EMBEDDING) if pair[0] in tensors]
        used = {ROWS, *(name for pair in pairs for name in pair)}
        used |= {MAGNITUDE} if pairs and folder.config.get("use_dora") else set()
        used |= {BIAS} if LINEAR in pairs and folder.config.get("lora_bias") else set()
        for role in sorted(tensors.keys() - used):
            raise folder.left_over(f"{module}.{role}", places)
    targets, saved = (folder.config.get(x) for x in ("target_modules", "modules_to_save"))
    if targets in (None, "all-linear"):
        return
    beyond = outside(folder, places)
    for name in places.modules():
        place = places.find(name)
        if name in beyond and configs.name_others(targets, name, adapted):
            continue
        is_weight = place is not None and len(place.shape) > 1 and not configs.is_saved(saved, name)
        if is_weight and name not in adapted and configs.is_target(folder.config, name):
            raise folder.error(
                f"its configuration adapts {name!r}, and the tensors of its factors are missing. "
                f"If the model it was trained on has no such module, set exclude_modules in "
                f"{CONFIG}: {[name]}, or a regular expression of all such modules"
            )
    if places.all_named or not isinstance(targets, list):
        return  # a name of no module here is of none there
    known = [*places.modules(), *adapted]
    if unmet := [t for t in targets if not any(configs.matches([t], x) for x in known)]:
        unnamed = next(path for path, found in places.places.items() if found is None)
        raise folder.error(
            f"adapts the modules {unmet}; it has no tensors of them, and whether they are here is "
            f"not known, since {unnamed!r} and others have no name there: name all by names=. If "
            f"the model has no such modules, remove these from target_modules in {CONFIG}. "
            f"Nearest: {nearest(unmet[0], places.modules())}"
        )


def written_factors(
    key: str, f: Factors, path: str, ranges: tuple[Range, ...], places: Map
) -> Iterator[Part]:
    """Take factors apart by the modules that they are of.

    A module of some outputs has all of ``a``, and one of some inputs all of ``b``.
    """
    letters = places.within(path, f.layout)
    kind = places.kind(path, letters)
    if kind == "Parameter" and f.magnitude is not None:
        raise ValueError(f"peft.save: {key!r} has DoRA magnitudes: PEFT has none of parameters")
    arrays = to_host({"a": f.a, "b": f.b})
    magnitude = None if f.magnitude is None else np.asarray(f.magnitude)
    for place in places.of(path):
        if (found := _common(place, ranges, places.leaves[path].shape)) is None:
            continue
        at, inner = found
        b, i, o = ([at[axis] for axis in role_axes(f.layout, role)] for role in "bio")
        is_divided = any(
            f.layout[axis] == "i" and x != slice(None) for axis, x in enumerate(place.at)
        )
        if is_divided and magnitude is not None:
            raise ValueError(
                f"peft.save: {key!r} has DoRA magnitudes, of columns that {place.module!r} has a "
                "part of: PEFT has one magnitude a column of a module's entire weight"
            )
        norms = None if magnitude is None else magnitude[(*b, *o)]
        one, two = arrays["a"][(*b, *i)], arrays["b"][(*b, slice(None), *o)]
        yield Part(place, letters, kind, key, one, two, np.float32(f.scale), norms, inner)


def _common(
    place: Place, ranges: tuple[Range, ...], shape: tuple[int, ...]
) -> tuple[list[Any], tuple[Range, ...]] | None:
    """Intersect a place with the ranges of an adapter's entry.

    Returns:
        The index of both in the entry, axis by axis, and the ranges of both in the place; None if
        they have nothing in common.
    """
    own = {r.axis: r for r in ranges}
    at: list[Any] = []
    inner = []
    for axis, (there, size) in enumerate(zip(place.at, shape, strict=True)):
        start, stop = own[axis][1:] if axis in own else (0, size)
        if isinstance(there, int):
            if not start <= there < stop:
                return None
            at.append(there - start)
            continue
        first, last = there.start or 0, size if there.stop is None else there.stop
        low, high = max(first, start), min(last, stop)
        if low >= high:
            return None
        at.append(slice(low - start, high - start))
        if (low, high) != (first, last):
            left = axis - sum(x < axis for x in place.axes)
            inner.append(Range(left, low - first, high - first))
    return at, tuple(inner)
