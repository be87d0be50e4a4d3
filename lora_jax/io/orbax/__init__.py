"""Orbax checkpoints: an adapter alone, training as it goes on, merged parameters.

The adapter, the optimizer's state and whatever else training needs are checkpointables of their
own: each is read without the others and without the base, which is never written. Orbax loads a
changed bit as it is; the record beside them, in JSON, has a checksum of every array and a SHA-256
of itself.
"""

from lora_jax.io.orbax._adapter import load, save
from lora_jax.io.orbax._checkpointer import Checkpointer, Restored
from lora_jax.io.orbax._params import load_params, save_params

__all__ = ["Checkpointer", "Restored", "load", "load_params", "save", "save_params"]
