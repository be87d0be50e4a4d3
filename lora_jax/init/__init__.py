"""How factors start: functions ``(key, target) -> (a, b)``, for ``lorafy(params, init=...)``.

``a`` is ``[*batch, in, rank]`` and ``b`` ``[*batch, rank, out]``. One whose product is not zero
returns, as a third, what is left of the weight: ``lorafy`` puts that into the base, so that the
adapted model starts as the model that was given.
"""

from lora_jax._weights.target import Initializer, Target
from lora_jax.init._data import corda, eva, eva_ranks, lora_ga
from lora_jax.init._loftq import loftq
from lora_jax.init._moments import input_moments
from lora_jax.init._random import gaussian, kaiming_uniform, orthogonal
from lora_jax.init._svd import olora, pissa

__all__ = [
    "Initializer",
    "Target",
    "corda",
    "eva",
    "eva_ranks",
    "gaussian",
    "input_moments",
    "kaiming_uniform",
    "loftq",
    "lora_ga",
    "olora",
    "orthogonal",
    "pissa",
]
