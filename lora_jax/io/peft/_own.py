"""What an adapter's files tell of its model: names, shapes and axes as PyTorch has them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_jax.io._torch import Kind, as_name, module_path
from lora_jax.io.peft import _config as configs
from lora_jax.io.peft._axes import (
    BIAS,
    EMBEDDING,
    LINEAR,
    MAGNITUDE,
    PARAMETER_ORDER,
    ROWS,
    Piece,
    from_peft,
    wrapped,
)
from lora_jax.io.peft._folder import Folder


@dataclass(frozen=True)
class Module:
    """A module that is adapted, or a parameter of one.

    Attributes:
        shape: the shape of its weight in PyTorch.
        letters: the layout of that.
        kind: the kind of the module.
        piece: its factors, in the dtypes of the file.
    """

    shape: tuple[int, ...]
    letters: str
    kind: Kind
    piece: Piece


def own_modules(folder: Folder) -> dict[str, Module]:
    """Find the modules that have factors, by name.

    Raises:
        ValueError: a factor is missing, or two do not fit each other or their rank.
    """
    parameters = _parameters(folder)
    found = {}
    for module, tensors in folder.modules.items():
        pairs = [pair for pair in (LINEAR, EMBEDDING) if pair[0] in tensors]
        for first, second in pairs:
            names = f"{module}.{first}", f"{module}.{second}"
            if second not in tensors:
                raise folder.error(f"has {names[0]!r} and not {names[1]!r}")
            own = parameters.get(module, module) if first == LINEAR[0] else module
            kind: Kind = "Embedding" if first == EMBEDDING[0] else "Linear"
            kind = "Parameter" if own != module else kind
            found[own] = _module(folder, own, kind, tensors[first], tensors[second], tensors)
        seconds = {second for first, second in (LINEAR, EMBEDDING) if first not in tensors}
        seconds |= set() if pairs else {MAGNITUDE}
        for alone in sorted(f"{module}.{role}" for role in seconds & tensors.keys()):
            raise folder.error(f"has {alone!r} and not the factor that goes with it")
    return found


def _parameters(folder: Folder) -> dict[str, str]:
    """Find the parameters that are adapted, by the name of their wrapper, as the tensors tell."""
    found = {}
    targets = folder.config.get("target_parameters") or []
    modules = (name for name, tensors in folder.modules.items() if LINEAR[0] in tensors)
    for module in {re.sub(r"(\.base_layer)*$", "", name) for name in modules}:
        own = {f"{module}.{target.rpartition('.')[2]}" for target in targets}
        own = {name for name in own if configs.matches(targets, name)}
        found |= {wrapped(name, own, PARAMETER_ORDER): name for name in own}
    return found


def _module(
    folder: Folder, own: str, kind: Kind, a: np.ndarray, b: np.ndarray, tensors: Mapping[str, Any]
) -> Module:
    rank = configs.rank_of(folder.config, own)
    experts = len(a) // rank if kind == "Parameter" and a.ndim == 2 else 1
    fits = min(a.ndim, b.ndim) > 1 and 0 < len(a) == b.shape[1] == rank * experts
    if not fits or a.ndim != b.ndim or (kind != "Linear" and a.ndim > 2):
        raise folder.error(
            f"the factors of {own!r} have shapes {a.shape} and {b.shape}, which do not fit each "
            f"other or rank {rank} of the configuration"
        )
    if a.ndim > 2:
        kind, shape, letters = "Conv", (len(b), *a.shape[1:]), "o" + "i" * (a.ndim - 1)
    elif kind == "Linear" and folder.config.get("fan_in_fan_out") is not True:
        shape, letters = (len(b), a.shape[1]), "oi"
    elif kind == "Parameter":
        shape, letters = (experts, a.shape[1], len(b)), "bio"
    else:
        kind = "Conv1D" if kind == "Linear" else kind
        shape, letters = (a.shape[1], len(b)), "io"
    scale = configs.scale_of(folder.config, own)
    piece = from_peft(own, a, b, tensors.get(MAGNITUDE), scale, shape, letters, kind)
    return Module(shape, letters, kind, piece)


def own_others(folder: Folder) -> dict[str, np.ndarray]:
    """Find what trains besides the factors, by the names of the model; rows are marked as such."""
    found = {}
    for name, x in folder.others.items():
        owner, _, wrapper = name.rpartition(".")[0].rpartition(".")
        is_base = wrapper == "base_layer" and not name.endswith(".bias")
        if wrapper not in ("original_module", "modules_to_save") and not is_base:
            found[f"{owner}.bias" if wrapper == "base_layer" else name] = x
    for module, tensors in folder.modules.items():
        found |= {f"{module}.{BIAS}": tensors[BIAS]} if BIAS in tensors else {}
        found |= {f"{module} (rows)": tensors[ROWS]} if ROWS in tensors else {}
    return found


def forms_in(folder: Folder, leaves: Mapping[str, Any]) -> dict[str, tuple[str, Kind]]:
    """Find the letters and the kinds of a model's tensors that the adapter's files tell.

    Args:
        folder: the adapter.
        leaves: the tensors by path.

    Raises:
        ValueError: the factors of experts do not tell which axis is read.
    """
    modules = {path: as_name(module_path(path)[0]) for path in leaves}
    is_parameter = configs.is_target_parameter
    parameters = {name for name in modules.values() if is_parameter(folder.config, name)}
    found: dict[str, tuple[str, Kind]] = {}
    for path, leaf in leaves.items():
        name = modules[path]
        if folder.modules.get(name, {}).keys() & {EMBEDDING[0], ROWS}:
            found[path] = "io", "Embedding"
        elif name in parameters and len(leaf.shape) == 3:
            wrapper = wrapped(name, parameters, PARAMETER_ORDER)
            tensors = folder.modules.get(wrapper, {})
            found[path] = _letters_of_experts(name, leaf.shape, tensors), "Parameter"
    return found


def _letters_of_experts(name: str, shape: tuple[int, ...], tensors: Mapping[str, Any]) -> str:
    """Tell which of the two axes is read: that which ``lora_A`` has."""
    of_a, of_b = (tensors[role].shape if role in tensors else () for role in LINEAR)
    fits = [
        letters
        for letters, (inputs, outputs) in (("boi", shape[:0:-1]), ("bio", shape[1:]))
        if (of_a[1:], of_b[:1]) == ((inputs,), (outputs,))
    ]
    if len(fits) != 1:
        raise ValueError(
            f"the parameter {name!r} of shape {shape} is square, or its factors do not fit it: "
            "which of its axes is read cannot be told. Load the adapter with peft.load and layout="
        )
    return fits[0]
