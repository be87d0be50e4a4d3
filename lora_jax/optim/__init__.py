"""Optimizers of factors, around any Optax transformation.

* :func:`optimizer`, :func:`labels`: move what trains, and nothing else.
* :func:`split`, :func:`combine`, :func:`value_and_grad`: gradients of what trains alone.
* :func:`lora_plus`, :func:`lora_fa`, :func:`riemannian`: other steps.
"""

from lora_jax.optim._optimizers import lora_fa, lora_plus, riemannian
from lora_jax.optim._split import combine, labels, optimizer, split, value_and_grad

__all__ = [
    "combine",
    "labels",
    "lora_fa",
    "lora_plus",
    "optimizer",
    "riemannian",
    "split",
    "value_and_grad",
]
