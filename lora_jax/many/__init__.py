"""Many adapters over one base: stacks, an adapter per batch row, mixtures, and a bank of slots.

* :func:`stack`, :func:`unstack`, :func:`take`, :func:`replace_at`: several adapters as one.
* :func:`lora_rows`: an adapter per batch row.
* :func:`lora_routed`, :func:`arrow`: a mixture of adapters per token.
* :class:`AdapterBank`: more adapters than fit on the device.
"""

from lora_jax.many._arrow import arrow
from lora_jax.many._bank import AdapterBank
from lora_jax.many._routed import lora_routed
from lora_jax.many._rows import lora_rows
from lora_jax.many._stack import stack
from lora_jax.many._take import replace_at, take
from lora_jax.many._unstack import unstack

__all__ = [
    "AdapterBank",
    "arrow",
    "lora_routed",
    "lora_rows",
    "replace_at",
    "stack",
    "take",
    "unstack",
]
