"""Recognize models whose numbers mean something only beside other tensors: quantized ones."""

import re
from collections.abc import Mapping
from math import prod
from typing import Any

import jax.numpy as jnp

from lora_jax.io.hf._source import Source, UnknownModelError

QUANTIZATION = ("quantization_config", "compression_config")

# Tensors that hold codes if they are integers: of GPTQ, AWQ, HQQ, Quanto, compressed-tensors,
# torchao and MXFP4.
_CODES = re.compile(
    r"(.*[._])?(qweight|qzeros|W_q|weight_(packed|qdata)|proj_blocks|weight\._data)"
)
# What lies beside codes in a module: of FP8, LLM.int8, BitNet, ModelOpt, EETQ and others.
_BESIDE = re.compile(r".*(scal|absmax|zero_point|SCB).*")


def check_plain(source: Source) -> None:
    """Raise if a model is quantized.

    Raises:
        UnknownModelError: it is, or its configuration alone has a quantization.
    """
    method = _method(source.config or {})
    found = codes_in(source.tensors, is_named=method is not None)
    if found is None and method is None:
        return
    named = f" ({method})" if method else ""
    if found is None:
        raise UnknownModelError(
            f"{source.where}: its config.json has a quantization{named}, and its tensors are no "
            "codes of one. If they are plain weights, remove quantization_config from config.json; "
            "else take the folder of the model in full precision"
        )
    raise UnknownModelError(
        f"{source.where} is quantized{named}: {found}, so that its numbers are no weights. Take "
        "the folder of the model in full precision, in float32, float16 or bfloat16"
    )


def codes_in(tensors: Mapping[str, Any], *, is_named: bool = False) -> str | None:
    """Tell by which tensor a model is quantized; None if no tensor shows it.

    Integers and floating numbers of 8 bits are codes if their name tells so, or if what scales
    them lies beside them; matrices of small integers also if the configuration names a
    quantization (``is_named``).
    """
    beside: dict[str, list[str]] = {}
    for name in tensors:
        beside.setdefault(name.rpartition(".")[0], []).append(name)
    for name, x in tensors.items():
        is_integer = jnp.issubdtype(x.dtype, jnp.integer)
        if not (is_integer or is_narrow(x.dtype)):
            continue
        module, _, last = name.rpartition(".")
        if _CODES.fullmatch(name):
            return f"it holds {name!r} of {x.dtype}"
        if is_integer and len(x.shape) < 2:
            continue
        within = beside.get(name, [])  # no plain tensor has others inside
        near = [x for x in beside[module] if last == "weight" or x.startswith(f"{name}_")]
        if found := within + [other for other in near if _scales(tensors[other], other, x, name)]:
            return f"{name!r} holds {x.dtype}, beside {found[0]!r}"
        if is_named and last == "weight" and x.dtype.itemsize == 1:
            return f"{name!r} holds {x.dtype}"
    return None


def _scales(x: Any, name: str, codes: Any, of: str) -> bool:
    """Return whether a tensor scales codes, by its name and its shape: one number for some each."""
    if name == of or not _BESIDE.fullmatch(name.rpartition(".")[2]):
        return False
    shape, whole = tuple(x.shape), tuple(codes.shape)
    missing = (1,) * (len(whole) - len(shape))
    sizes = (shape + missing, missing + shape)
    return prod(shape) == 1 or any(
        len(own) == len(whole) and all(a <= b for a, b in zip(own, whole, strict=True))
        for own in sizes
    )


def is_narrow(dtype: Any) -> bool:
    """Return whether numbers are floating and of 8 bits or fewer."""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits <= 8


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration as plain weights have it."""
    return {
        key: without_quantization(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in QUANTIZATION
    }


def _method(config: Mapping[str, Any]) -> str | None:
    """Name the quantization of a configuration, or of one inside; None without one."""
    for key in QUANTIZATION:
        if value := config.get(key):
            method = value.get("quant_method") if isinstance(value, dict) else None
            return str(method or key)
    inside = (_method(value) for value in config.values() if isinstance(value, dict))
    return next(filter(None, inside), None)
