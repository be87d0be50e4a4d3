"""The factors of modules: at the places of a tree, and in PEFT's files."""

import re
from collections.abc import Collection, Iterator
from math import prod

import numpy as np

from lora_jax._adapter.factors import Factors
from lora_jax._weights.axes import role_shape
from lora_jax._weights.paths import nearest
from lora_jax._weights.ranges import Range, index_of
from lora_jax.io._record import to_host
from lora_jax.io._torch import Map, Place
from lora_jax.io.peft import _config as configs
from lora_jax.io.peft._axes import (
    BIAS,
    EMBEDDING,
    LINEAR,
    MAGNITUDE,
    ROWS,
    Part,
    from_peft,
    wrappers,
)
from lora_jax.io.peft._config import CONFIG
from lora_jax.io.peft._folder import Folder


def read_factors(folder: Folder, places: Map, order: tuple[str, ...]) -> dict[str, Part]:
    """Read the factors of every module, by the name of the module or parameter."""
    targets = folder.config.get("target_parameters") or []
    known = configs.target_parameters(folder.config, places.modules())
    if unknown := [t for t in targets if not any(configs.matches([t], name) for name in known)]:
        raise folder.error(
            f"adapts the parameters {unknown}, which are not here. Nearest: "
            f"{places.nearest(unknown[0])}"
        )
    parameters = {wrapper: name for name, wrapper in wrappers(known, order).items()}
    found = {}
    for module, tensors in folder.modules.items():
        if LINEAR[0] in tensors:
            own = parameters.get(module, module)
            found[own] = _read_part(folder, places, module, own, LINEAR)
        if EMBEDDING[0] in tensors:
            found[module] = _read_part(folder, places, module, module, EMBEDDING)
    return found


def _read_part(folder: Folder, places: Map, module: str, own: str, names: tuple[str, str]) -> Part:
    """Read the factors that a module has, for itself or for its parameter ``own``."""
    config, place = folder.config, places.find(own)
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
    if (names == EMBEDDING) != (kind == "Embedding") or (own != module) != (kind == "Parameter"):
        name = f"{module}.{names[0]}"
        raise folder.error(f"{name!r} is of another kind of module than a {kind}: pass kinds=")
    a, b = (folder.array(f"{module}.{name}") for name in names)
    magnitude = folder.array(f"{module}.{MAGNITUDE}") if config.get("use_dora") else None
    if kind == "Parameter":
        a, b = _experts(folder, a, b, place, letters)
    part = from_peft(place, letters, kind, a, b, configs.scale_of(config, own), magnitude)
    if part.rank != (rank := configs.rank_of(config, own)):
        raise folder.error(
            f"the factors of {own!r} have rank {part.rank}, and its configuration has {rank}"
        )
    if own == module and not configs.is_target(config, own):
        raise folder.error(
            f"has factors for {own!r}, which its configuration does not adapt, so that PEFT "
            f"would drop them: target_modules={config.get('target_modules')!r}"
        )
    folder.check_tied(places, place)
    return part


def _experts(
    folder: Folder, a: np.ndarray, b: np.ndarray, place: Place, letters: str
) -> tuple[np.ndarray, np.ndarray]:
    """Put the factors of experts as PEFT writes them now: before 0.19 it took the axes in order."""
    written = folder.config["peft_version"]
    version = re.match(r"(\d+)\.(\d+)", written)
    if version is None:
        raise folder.error(
            "adapts parameters of experts and does not give peft_version, by which their axes are "
            "told apart"
        )
    if (int(version[1]), int(version[2])) >= (0, 19):
        return a, b
    inputs, outputs = (prod(role_shape(letters, place.shape, r)) for r in "io")
    experts = place.shape[letters.index("b")]
    if inputs == outputs:
        raise folder.error(
            f"was written by PEFT {written}, which took the axes of parameters in order, and "
            f"{place.module!r} is square: which axis is which cannot be told. Load and save it "
            "with PEFT 0.19 or later"
        )
    fits = a.ndim == b.ndim == 2 and (a.shape[1], b.shape[0]) == (outputs, inputs)
    if not fits or a.shape[0] % experts:
        return a, b  # as it is now, or from_peft says what is wrong
    rank = a.shape[0] // experts  # the factor that reads is the one that wrote
    first = a.reshape(experts, rank, outputs)
    then = b.reshape(inputs, rank, experts)
    return (
        then.transpose(2, 1, 0).reshape(experts * rank, inputs),
        first.transpose(2, 1, 0).reshape(outputs, rank * experts),
    )


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
    for name in places.modules():
        place = places.find(name)
        is_weight = place is not None and len(place.shape) > 1 and not configs.is_saved(saved, name)
        if is_weight and name not in adapted and configs.is_target(folder.config, name):
            raise folder.error(
                f"its configuration adapts {name!r}, and the tensors of its factors are missing"
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
    """Take factors apart by the modules that they are of."""
    letters = places.within(path, f.layout)
    kind = places.kind(path, letters)
    if kind == "Parameter" and f.magnitude is not None:
        raise ValueError(f"peft.save: {key!r} has DoRA magnitudes: PEFT has none of parameters")
    arrays = to_host({"a": f.a, "b": f.b})
    magnitude = None if f.magnitude is None else np.asarray(f.magnitude)
    found = places.of(path)
    outer = len(found[0].index)
    bounds = index_of(ranges, outer)
    inner = tuple(r._replace(axis=r.axis - outer) for r in ranges if r.axis >= outer)
    for place in found:
        pairs = list(zip(place.index, bounds, strict=True))
        if all((s.start or 0) <= k < (s.stop or k + 1) for k, s in pairs):
            at = tuple(k - (s.start or 0) for k, s in pairs)
            own = None if magnitude is None else magnitude[at]
            a, b, scale = arrays["a"][at], arrays["b"][at], np.float32(f.scale)
            yield Part(place, letters, kind, key, a, b, scale, own, inner)
