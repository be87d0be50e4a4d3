"""Adapters as PEFT writes and reads them: a folder with a configuration and a safetensors file.

Only this package knows PEFT's names and axes.
"""

from lora_jax.io.peft._axes import PARAMETER_ORDER
from lora_jax.io.peft._config import CONFIG, TENSORS
from lora_jax.io.peft._load import load
from lora_jax.io.peft._save import save

__all__ = ["CONFIG", "PARAMETER_ORDER", "TENSORS", "load", "save"]
