"""Initialize factors: functions ``(key, target) -> (a, b)`` for ``lorafy(params, init=...)``.

``a`` is ``[*batch, in, rank]`` and ``b`` is ``[*batch, rank, out]``. An initializer whose product
is not zero returns a third array: the weight minus the update. ``lorafy`` puts it into the base, so
the adapted model starts as the original one. Where the base is spread over devices, initializers
are traced: what they compute must be of JAX, and of their arguments.
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
