"""LoRA for any pure JAX function over a parameter pytree.

::

    lora_params = lora_jax.lorafy(params, rank=8)    # frozen base + trainable factors
    apply = lora_jax.lora(model.apply)               # the same function, over split parameters
    tx = lora_jax.optimizer(optax.adamw(3e-4))       # moves the factors only
    params = lora_jax.merge(lora_params)             # plain parameters again

More lives in modules:

* ``init``: how factors start. ``optim``: other steps of an optimizer.
* ``many``: many adapters over one base. ``algebra``: adapters from adapters.
* ``analysis``: what adapters have in common, and do to weights. ``quant``: quantized bases.
* ``io``: files of adapters and of models.
"""

# ruff: noqa: F403, F405
import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or "jax" in sys.modules:
    from lora_jax._api import *
# else when a name is first used: `lora-jax --help` does without

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "Factors",
    "Layouts",
    "LoraParams",
    "Report",
    "Rows",
    "algebra",
    "analysis",
    "combine",
    "init",
    "io",
    "labels",
    "layout_of",
    "lora",
    "lorafy",
    "many",
    "merge",
    "optim",
    "optimizer",
    "quant",
    "report",
    "shardings",
    "split",
    "state_shardings",
    "switch",
    "unmerge",
    "value_and_grad",
]

_MOVED = {
    "many": "AdapterBank arrow lora_routed lora_rows replace_at stack take unstack",
    "algebra": "dare extract linear_in_factors prune resize ties to_plain",
    "analysis": "distance similarity subspace_similarity",
    "optim": "lora_fa lora_plus riemannian",
    "quant": "dequantize quantization_error quantize",
    "init": "input_moments",
}


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("lora_jax._api"), name)
    for module, names in _MOVED.items():
        if name in names.split():
            raise AttributeError(f"lora_jax.{name} is lora_jax.{module}.{name}")
    raise AttributeError(f"module 'lora_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
