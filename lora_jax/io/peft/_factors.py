"""The factors in an adapter's files, at the places of a tree."""

import re
from math import prod

import numpy as np

from lora_jax._weights.axes import role_shape
from lora_jax.io._torch import Map, Place
from lora_jax.io.peft import _config as configs
from lora_jax.io.peft._axes import (
    EMBEDDING,
    LINEAR,
    MAGNITUDE,
    TIED,
    Part,
    from_peft,
    wrapped,
)
from lora_jax.io.peft._folder import Folder


def read_factors(folder: Folder, places: Map, order: tuple[str, ...]) -> dict[str, Part]:
    """Read the factors of every module, by the name of the module or parameter.

    Raises:
        ValueError: a module is not here, or is of another kind or shape; or the configuration
            contradicts the tensors.
    """
    parameters = _parameters(folder, places, order)
    found = {}
    for module, tensors in folder.modules.items():
        if LINEAR[0] in tensors:
            own = parameters.get(module, module)
            found[own] = _part(folder, places, module, own, LINEAR)
        if EMBEDDING[0] in tensors:
            found[module] = _part(folder, places, module, module, EMBEDDING)
    return found


def _parameters(folder: Folder, places: Map, order: tuple[str, ...]) -> dict[str, str]:
    """Find the parameters that are adapted, by the name of their wrapper."""
    targets = folder.config.get("target_parameters") or []
    known = [name for name in places.modules() if configs.matches(targets, name)]
    unknown = [t for t in targets if not any(configs.matches([t], name) for name in known)]
    if unknown:
        raise folder.error(
            f"adapts the parameters {unknown}, which are not here. Nearest: "
            f"{places.nearest(unknown[0])}"
        )
    return {wrapped(name, set(known), order): name for name in known}


def _part(folder: Folder, places: Map, module: str, own: str, names: tuple[str, str]) -> Part:
    """Read the factors that a module has, for itself or for its parameter ``own``."""
    place = places.find(own)
    if place is None:
        raise folder.error(
            f"adapts a module {own!r}, which the parameters have not. Nearest: "
            f"{places.nearest(own)}. If it has another name here, say names="
        )
    letters = places.letters(place.path)
    kind = places.kind(place.path, letters)
    is_table = names == EMBEDDING
    if is_table != (kind == "Embedding") or (own != module) != (kind == "Parameter"):
        raise folder.error(
            f"{f'{module}.{names[0]}'!r} is of another kind of module than a {kind}: say kinds="
        )
    a, b = (folder.array(f"{module}.{name}") for name in names)
    has_magnitude = folder.config.get("use_dora")
    magnitude = folder.array(f"{module}.{MAGNITUDE}") if has_magnitude else None
    if kind == "Parameter":
        a, b = _experts(folder, a, b, place, letters)
    scale = configs.scale_of(folder.config, own)
    piece = from_peft(own, a, b, magnitude, scale, place.shape, letters, kind)
    if piece.rank != (rank := configs.rank_of(folder.config, own)):
        raise folder.error(
            f"the factors of {own!r} have rank {piece.rank}, and its configuration says {rank}"
        )
    if own == module and not configs.is_target(folder.config, own):
        raise folder.error(
            f"has factors for {own!r}, which its configuration does not adapt, so that PEFT "
            f"would drop them: target_modules={folder.config.get('target_modules')!r}"
        )
    if places.is_tied(place.path):
        raise folder.error(TIED.format(verb="load", path=place.path))
    return Part(place, letters, kind, piece)


def _experts(
    folder: Folder, a: np.ndarray, b: np.ndarray, place: Place, letters: str
) -> tuple[np.ndarray, np.ndarray]:
    """Put the factors of experts as PEFT writes them now: before 0.19 it took the axes in order.

    Raises:
        ValueError: the version is not known, or the kernels are square, so that the axes cannot be
            told apart.
    """
    written = folder.config["peft_version"]
    version = re.match(r"(\d+)\.(\d+)", written)
    if version is None:
        raise folder.error(
            "adapts parameters of experts and does not say peft_version, by which their axes are "
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
    if a.ndim != 2 or (a.shape[1], b.shape[0]) != (outputs, inputs) or a.shape[0] % experts:
        return a, b  # as it is now, or from_peft says what is wrong
    rank = a.shape[0] // experts  # the factor that reads is the one that wrote
    first = a.reshape(experts, rank, outputs)
    then = b.reshape(inputs, rank, experts)
    return (
        then.transpose(2, 1, 0).reshape(experts * rank, inputs),
        first.transpose(2, 1, 0).reshape(outputs, rank * experts),
    )
