"""Recognize models whose numbers mean something only beside other tensors: quantized ones."""

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from lora_jax.io.hf._source import Source, UnknownModelError

QUANTIZATION = ("quantization_config", "compression_config")

# What lies beside codes, or holds them: of FP8, LLM.int8, bitsandbytes, GPTQ, AWQ, HQQ, Quanto,
# compressed-tensors, ModelOpt, torchao, MXFP4, and of single files with scaled FP8.
_BESIDE = re.compile(
    r"(.*[._])?(scale_inv|weight_scales?|weight_scale_2|weight_global_scale|scale_weight|scaled_fp8"
    r"|weight_(packed|zero_point|g_idx|qdata)|SCB|qweight|qzeros|g_idx|W_q|proj_blocks"
    r"|weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*|_data|_scale))"
)


def check_plain(source: Source) -> None:
    """Raise if a model is quantized.

    Raises:
        UnknownModelError: it is, or its configuration alone has a quantization.
    """
    method = _method(source.config or {})
    found = codes_in(source.tensors)
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


def codes_in(tensors: Mapping[str, Any]) -> str | None:
    """Tell by which tensor a model is quantized; None if no tensor shows it."""
    for name in tensors:
        if _BESIDE.fullmatch(name):
            return f"it holds {name!r}"
    beside: dict[str, list[str]] = {}
    for name in tensors:
        beside.setdefault(name.rpartition(".")[0], []).append(name)
    for name, x in tensors.items():
        module, _, last = name.rpartition(".")
        if last == "weight" and len(x.shape) > 1 and jnp.issubdtype(x.dtype, jnp.integer):
            return f"{name!r} holds {x.dtype}"
        if is_narrow(x.dtype):
            others = [*beside.get(name, ()), *beside[module]] if last == "weight" else []
            others += [other for other in beside[module] if other.startswith(f"{name}_")]
            for other in others:
                if other != name and not other.endswith("bias"):
                    return f"{name!r} holds {x.dtype}, beside {other!r}"
    return None


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
