"""LoRA for any pure JAX function over a parameter pytree.

::

    lora_params = lora_jax.lorafy(params, rank=8)    # frozen base + trainable factors
    apply = lora_jax.lora(model.apply)               # the same function, over split parameters
    tx = lora_jax.optimizer(optax.adamw(3e-4))       # moves the factors only
    params = lora_jax.merge(lora_params)             # plain parameters again

More lives in modules:

* ``init``: how factors start. ``optim``: other steps of an optimizer.
* ``many``: many adapters over one base. ``algebra``: adapters from adapters.
* ``analysis``: what adapters have in common. ``quant``: quantized bases.
* ``io``: files of adapters and of models.
"""

from typing import NoReturn

from lora_jax import algebra, analysis, init, io, many, optim, quant
from lora_jax._adapter.factors import Factors, Rows
from lora_jax._adapter.params import Adapter, LoraParams
from lora_jax._adapter.shardings import shardings, state_shardings
from lora_jax._lorafy import lorafy
from lora_jax._merge import merge, switch, unmerge
from lora_jax._transform.discover import layout_of
from lora_jax._transform.lora import lora
from lora_jax._transform.report import Report, report
from lora_jax._weights.layouts import Layouts
from lora_jax.optim import combine, labels, optimizer, split, value_and_grad

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


def __getattr__(name: str) -> NoReturn:
    for module, names in _MOVED.items():
        if name in names.split():
            raise AttributeError(f"lora_jax.{name} is lora_jax.{module}.{name}")
    raise AttributeError(f"module 'lora_jax' has no attribute {name!r}")
