"""Orbax checkpoints of an adapter, of a training run, and of plain parameters.

The adapter, the optimizer's state and the extra state are separate checkpointables: each is read
without the others and without the base, which is never written. Orbax does not notice changed bits;
the record beside them, in JSON, has a checksum of every array and a SHA-256 of itself.
"""

from lora_jax.io.orbax._adapter import load, save
from lora_jax.io.orbax._checkpointer import Checkpointer, Restored
from lora_jax.io.orbax._params import load_params, save_params

__all__ = ["Checkpointer", "Restored", "load", "load_params", "save", "save_params"]
