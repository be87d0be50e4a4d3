"""Turn queries and keys by their positions, and attend by the platform's fastest kernel."""

from lora_jax.recipes.attention.choose import NAMES, attend, attend_cached
from lora_jax.recipes.attention.cudnn import why_not_cudnn
from lora_jax.recipes.attention.positions import Turns, packed, rotated, turns_of
from lora_jax.recipes.attention.splash import by_splash, why_not_splash

__all__ = [
    "NAMES",
    "Turns",
    "attend",
    "attend_cached",
    "by_splash",
    "packed",
    "rotated",
    "turns_of",
    "why_not_cudnn",
    "why_not_splash",
]
