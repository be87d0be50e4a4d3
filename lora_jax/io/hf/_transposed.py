"""Tell the dense layers that are stored [in, out], as GPT-2's are, from those stored [out, in].

The shapes of biases and of an adapter's factors tell it of a weight that is not square. A square
one is like the others of its stack, or as its model is known to be, or as the adapter says.
"""

import re
from collections.abc import Mapping
from typing import Any

from lora_jax.io._torch import as_name
from lora_jax.io.hf._families import CONV1D, CONV1D_MODELS, FAMILIES
from lora_jax.io.peft._axes import LINEAR
from lora_jax.io.peft._folder import Folder


def transposed(
    leaves: Mapping[str, Any],
    config: Mapping[str, Any] | None,
    adapter: Folder | None,
    modules: Mapping[str, str] | None = None,
) -> dict[str, bool | None]:
    """Tell which dense weights are stored transposed, by path; None if that is not known.

    Args:
        leaves: the tensors of the model by path.
        config: the configuration of the model, or None.
        adapter: an adapter of it, or None.
        modules: the adapter's names of the modules by their paths; None: the paths with dots.
    """
    dense = {p: x.shape for p, x in leaves.items() if p.endswith("/weight") and len(x.shape) == 2}
    factors = {
        path: adapter.modules.get((modules or {}).get(module, as_name(module)), {})
        for path, module in ((path, path.removesuffix("/weight")) for path in dense)
        if adapter is not None
    }
    shown = {
        path: _shown(path, shape, leaves, factors.get(path, {})) for path, shape in dense.items()
    }
    known: dict[tuple[str, bool], set[bool]] = {}  # of each stack, those of the usual names apart
    for path, value in shown.items():
        if value is not None:
            known.setdefault(_stack(path), set()).add(value)
    says = adapter is not None and bool(adapter.config.get("fan_in_fan_out"))

    def found(path: str) -> bool | None:
        is_usual, alike = _stack(path)[1], known.get(_stack(path), set())
        if (value := shown[path]) is not None:
            return value
        if len(alike) == 1 and (is_usual or says):
            return alike == {True}
        kind = _model_type(path, config)
        if is_usual:
            return kind in CONV1D_MODELS or says or (None if config is None else False)
        return None if says and kind not in {*FAMILIES, *CONV1D_MODELS} else False

    return {path: found(path) for path in dense}


def _shown(
    path: str, shape: tuple[int, ...], leaves: Mapping[str, Any], factors: Mapping[str, Any]
) -> bool | None:
    """Tell by the bias or the factors whether a weight is transposed; None if neither does."""
    if shape[0] == shape[1]:
        return None
    module = path.removesuffix("/weight")
    bias = leaves.get(f"{module}/bias")
    if bias is not None and len(bias.shape) == 1 and bias.shape[0] in shape:
        return bias.shape[0] == shape[1]
    a, b = (factors[role].shape if role in factors else () for role in LINEAR)
    sizes = (*a[1:], *b[:1])
    return sizes == shape if sizes in (shape, shape[::-1]) else None


def _stack(path: str) -> tuple[str, bool]:
    """Name the stack of layers that a weight is in; and whether transposed ones have its name."""
    numbered = re.match(r".*?/\d+(?=/)", f"/{path}")
    stack = numbered[0].rpartition("/")[0] if numbered else path.rpartition("/")[0]
    return stack, re.fullmatch(CONV1D, path) is not None


def _model_type(path: str, config: Mapping[str, Any] | None) -> str | None:
    """Return the type of the model that a weight is in, or of the model inside that it is in."""
    for part in path.split("/"):
        inside = [value for key, value in (config or {}).items() if key in (part, f"{part}_config")]
        if inside and isinstance(inside[0], dict) and "model_type" in inside[0]:
            return str(inside[0]["model_type"])
    types = [str(value) for value in _types(config or {})]
    usual = (kind for kind in types[1:] if kind in CONV1D_MODELS)
    return next(usual, types[0] if types else None)


def _types(config: Mapping[str, Any]) -> list[Any]:
    """List the types of a model and of those inside it."""
    own = [config["model_type"]] if "model_type" in config else [None]
    inside = (_types(value) for value in config.values() if isinstance(value, dict))
    return own + [kind for found in inside for kind in found if kind is not None]
