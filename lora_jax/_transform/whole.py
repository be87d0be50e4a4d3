"""Warn where a LoraParams is differentiated whole, and no optimizer was told what is frozen.

The gradients of the base and of ``scale`` are zeros then, and an optimizer of the whole tree moves
them all the same: weight decay shrinks every array that it sees.
"""

import warnings

import jax
import jax.numpy as jnp

_state = {"is_told": False}


def told() -> None:
    """Note that this process has an optimizer that knows what is frozen: warn no more."""
    _state["is_told"] = True


@jax.custom_jvp
def watched(scale: jax.Array) -> jax.Array:
    """Return a frozen ``scale``: its tangent is zero, and asking for it warns."""
    return scale


@watched.defjvp
def _watched_jvp(primals, tangents):
    del tangents
    if not _state["is_told"]:
        warnings.warn(
            "lora(fn): a LoraParams is differentiated whole. The gradients of its base and of "
            "scale are zeros, yet an optimizer of the whole tree may move both: weight decay does. "
            "Train the adapter alone, trainable, frozen = lora_jax.split(lora_params), with "
            "gradients by lora_jax.value_and_grad(loss)(lora_params); or wrap the optimizer: "
            "lora_jax.optimizer(optax.adamw(...))",
            UserWarning,
            stacklevel=2,
        )
    (scale,) = primals
    return scale, jnp.zeros_like(scale)
