"""Tell an adapter's model from its files: names, shapes and axes as PyTorch has them."""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from lora_jax._weights.selector import lookup
from lora_jax.io._kinds import Kind
from lora_jax.io._places import Place
from lora_jax.io._torch import Map, as_path, module_path
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
from lora_jax.io.peft._folder import Folder
from lora_jax.io.peft._parameters import parameters_among


def own_parts(folder: Folder) -> dict[str, Part]:
    """Find the factors of every module, in the dtypes of the file, by the name of the module."""
    parameters = parameters_in(folder)
    found = {}
    for module, tensors in folder.modules.items():
        pairs = [pair for pair in (LINEAR, EMBEDDING) if pair[0] in tensors]
        for pair in pairs:
            first, second = (f"{module}.{role}" for role in pair)
            if pair[1] not in tensors:
                raise folder.error(f"has {first!r} and not {second!r}")
            own = parameters.get(module, module) if pair == LINEAR else module
            kind: Kind = "Linear" if pair == LINEAR else "Embedding"
            kind = "Parameter" if own != module else kind
            found[own] = _part(folder, own, kind, tensors[pair[0]], tensors[pair[1]], tensors)
        alone = {pair[1] for pair in (LINEAR, EMBEDDING) if pair not in pairs}
        for role in sorted(tensors.keys() & (alone if pairs else {*alone, MAGNITUDE})):
            name = f"{module}.{role}"
            raise folder.error(f"has {name!r} and not the factor that goes with it")
    return found


def parameters_in(folder: Folder) -> dict[str, str]:
    """Find the parameters that are adapted, by the name of their wrapper, as the tensors tell."""
    with_factors = (name for name, tensors in folder.modules.items() if LINEAR[0] in tensors)
    modules = {re.sub(r"(\.base_layer)*$", "", name) for name in with_factors}
    targets = folder.config.get("target_parameters") or []
    names = {f"{module}.{t.rpartition('.')[2]}" for module in modules for t in targets}
    known = configs.target_parameters(folder.config, names)
    return {wrapper: name for name, wrapper in wrappers(known, folder.order).items()}


def _part(
    folder: Folder, own: str, kind: Kind, a: np.ndarray, b: np.ndarray, tensors: Mapping[str, Any]
) -> Part:
    """Find the weight that two factors fit, and read them as its."""
    rank = configs.rank_of(folder.config, own)
    experts = len(a) // rank if kind == "Parameter" and a.ndim == 2 else 1
    fits = 1 < a.ndim == b.ndim and 0 < len(a) == b.shape[1] == rank * experts
    if not fits or (kind != "Linear" and a.ndim > 2):
        raise folder.error(
            f"the factors of {own!r} have shapes {a.shape} and {b.shape}, which do not fit each "
            f"other or rank {rank} of the configuration"
        )
    inputs, outputs = a.shape[1:], len(b)
    if kind == "Linear":
        dense: Kind = "Conv1D" if folder.config.get("fan_in_fan_out") else "Linear"
        kind = dense if len(inputs) == 1 else "Conv"
    if kind in ("Linear", "Conv"):
        shape, letters = (outputs, *inputs), "o" + "i" * len(inputs)
    else:
        batch = (experts,) if kind == "Parameter" else ()
        shape, letters = (*batch, *inputs, outputs), "b" * len(batch) + "io"
    if kind == "Parameter" and experts == 1:  # a matrix
        shape, letters = (outputs, *inputs), "oi"
    path = as_path(own) + ("" if kind == "Parameter" else "/weight")
    place, scale = Place(path, (), own, "weight", shape), configs.scale_of(folder.config, own)
    return from_peft(place, letters, kind, a, b, scale, tensors.get(MAGNITUDE))


def own_others(folder: Folder) -> dict[str, np.ndarray]:
    """Find what trains besides the factors, by the names of the model; rows are marked as such."""
    found = {}
    for name, x in folder.others.items():
        owner, _, wrapper = name.rpartition(".")[0].rpartition(".")
        is_base = wrapper == "base_layer" and not name.endswith(".bias")
        if not is_base:
            found[f"{owner}.bias" if wrapper == "base_layer" else name] = x
    for module, tensors in folder.modules.items():
        found |= {f"{module}.{BIAS}": tensors[BIAS]} if BIAS in tensors else {}
        found |= {f"{module} (rows)": tensors[ROWS]} if ROWS in tensors else {}
    return found


def forms_in(
    folder: Folder,
    leaves: Mapping[str, Any],
    names: Mapping[str, str],
    layout: Mapping[str, str],
    lone: Callable[[str], str | None],
) -> dict[str, tuple[str, Kind]]:
    """Find the letters and the kinds of a model's tensors that an adapter's files tell, by path.

    Parameters get the letters by which ``lora_A`` reads the input.

    Args:
        folder: the adapter.
        leaves: the tensors of the model by path.
        names: the names of the modules in the adapter, by their paths.
        layout: the letters of square experts, by pattern of their paths.
        lone: returns the letters of square experts at a path that have none beside them.
    """
    modules = {path: names[module_path(path, leaves)[0]] for path in leaves}
    nested = parameters_among(folder, list(dict.fromkeys(modules.values())))
    found: dict[str, tuple[str, Kind]] = {}
    experts: dict[str, dict[str, list[str]]] = {}
    for path, leaf in leaves.items():
        name = modules[path]
        parameter = next((x for x in (name, f"{name}.weight") if x in nested), None)
        if folder.modules.get(name, {}).keys() & {EMBEDDING[0], ROWS}:
            found[path] = "io", "Embedding"
        elif parameter is not None and len(leaf.shape) == 2 and not path.endswith("/bias"):
            found[path] = "oi", "Linear"
        elif parameter is not None and len(leaf.shape) == 3:
            experts.setdefault(parameter.rpartition(".")[0], {})[path] = _letters_of_experts(
                leaf.shape, folder.modules.get(nested[parameter], {})
            )
    for beside in experts.values():
        told = {fits[0] for fits in beside.values() if len(fits) == 1}
        for path, fits in beside.items():
            # One module's parameters are all read along one axis: those that are not square tell.
            fits = [x for x in fits if told == {x}] or fits
            what = f"the parameter {modules[path]!r} of shape {tuple(leaves[path].shape)}"
            given = lookup(layout, path, "layout")
            if not fits:
                raise folder.error(f"its factors do not fit {what}: it is another model's")
            if given is not None and given not in fits:
                raise folder.error(
                    f"layout={{{path!r}: {given!r}}}: the factors of {what} have "
                    f"{' or '.join(fits)}"
                )
            letters = fits[0] if len(fits) == 1 else given or lone(path)
            if letters is None:
                raise folder.error(
                    f"{what} is square, and neither another one of its module nor the model_type "
                    f"tells which of its axes lora_A has: pass layout={{{path!r}: 'bio'}} if it "
                    "has the second, as that of gpt-oss trained in transformers 5, or 'boi' if it "
                    "has the last, as in earlier versions"
                )
            found[path] = letters, "Parameter"
    return found


def _letters_of_experts(shape: tuple[int, ...], tensors: Mapping[str, Any]) -> list[str]:
    """List which of the two axes may be read: that which ``lora_A`` has, or both of a square."""
    of_a, of_b = (tensors[role].shape if role in tensors else () for role in LINEAR)
    return [
        letters
        for letters, (inputs, outputs) in (("boi", shape[:0:-1]), ("bio", shape[1:]))
        if (of_a[1:], of_b[:1]) == ((inputs,), (outputs,))
    ]


_POOLER = r"(.+\.)?pooler(\..+)?"  # which models have by the class of their head
_HEAD = re.compile(
    rf"(score|classifier|qa_outputs|classification_head|pre_classifier)(\..+)?|{_POOLER}"
)


def is_new_head(module: str) -> bool:
    """Return whether a module is a head, by its name, or a pooler that models may lack."""
    return _HEAD.fullmatch(module) is not None


def own_heads(folder: Folder, names: Collection[str]) -> dict[str, np.ndarray]:
    """Find the tensors of a saved head, by its name, or pooler that none of these names is of."""
    saved = folder.config.get("modules_to_save") or ()
    return {
        name: x
        for name, x in folder.others.items()
        if name not in names
        and is_new_head(module := name.rpartition(".")[0])
        and configs.is_saved(saved, module)
    }


def outside(folder: Folder, places: Map) -> set[str]:
    """Find the modules that the adapter's model has not: a head or pooler, a decoder.

    Heads and decoders are below another root than all that trains, saved modules apart.
    """
    found = {m: places.find(m) or places.find(m, "bias") for m in places.all_modules()}
    roots = {m: place.path.split("/")[:-2][:1] for m, place in found.items() if place}
    saved = folder.config.get("modules_to_save") or ()
    named = roots.keys() & set(folder.named)
    own = [roots[m] for m in named if not configs.is_saved(saved, m)]
    is_one = bool(own) and own[0] != [] and all(root == own[0] for root in own)
    return {
        m
        for m in roots.keys() - named
        if (is_one and roots[m] != own[0]) or re.fullmatch(_POOLER, m)
    }
