"""Whole models as Hugging Face lays them out: in, out, and merged without loading them.

A folder with ``config.json`` and safetensors files in PyTorch's names and axes, or to read from, a
GGUF file.
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
