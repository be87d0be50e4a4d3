"""Save and load: ``safetensors``, ``orbax`` and ``peft`` for adapters, ``hf`` for models.

Each module has ``save`` and ``load``, and is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_jax.io import hf, orbax, peft, safetensors

__all__ = ["hf", "orbax", "peft", "safetensors"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
