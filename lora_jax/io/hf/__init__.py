"""Models as Hugging Face lays them out: load, save, and merge adapters without loading the model.

A model is a folder with ``config.json`` and safetensors files in PyTorch's names and axes. GGUF
files can be read as well.
"""

from lora_jax.io.hf._families import FAMILIES, Family
from lora_jax.io.hf._load import load
from lora_jax.io.hf._merge import merge
from lora_jax.io.hf._rotary import rotary_halves, rotary_pairs
from lora_jax.io.hf._save import save
from lora_jax.io.hf._source import Source, open_source

__all__ = [
    "FAMILIES",
    "Family",
    "Source",
    "load",
    "merge",
    "open_source",
    "rotary_halves",
    "rotary_pairs",
    "save",
]
