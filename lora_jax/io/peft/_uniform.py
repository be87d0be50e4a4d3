"""One rank and one scale for all modules, for readers that know no others.

SGLang and llama.cpp read ``r`` and ``lora_alpha`` alone: with ``rank_pattern``, ``alpha_pattern``
or ``use_rslora`` they load an adapter, and scale it wrong.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from lora_jax.io.peft import _config as configs
from lora_jax.io.peft._axes import BIAS, PREFIX, Part, to_peft
from lora_jax.io.peft._config import REDONE
from lora_jax.io.peft._folder import Folder
from lora_jax.io.peft._join import alike
from lora_jax.io.peft._own import own_parts, parameters_in


def uniform(modules: Mapping[str, Part]) -> dict[str, Part]:
    """Give all modules the largest rank, by zeros, and scale 1: ``b`` has theirs."""
    found = alike(list(modules.values()), np.float32(1))
    pairs = zip(modules.items(), found, strict=True)
    return {name: replace(part, b=_narrowed(part.b, old.b)) for (name, old), part in pairs}


def _narrowed(b: np.ndarray, old: np.ndarray) -> np.ndarray:
    """Return ``b`` in the dtype that it had, unless that would round it."""
    narrow = b.astype(old.dtype)
    return narrow if np.array_equal(narrow.astype(b.dtype), b) else b


def uniform_files(folder: Folder) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Make an adapter's tensors and its configuration uniform; all else stays as it is.

    Raises:
        ValueError: its initializer changed the base by its rank and scale.
    """
    if (init := folder.config["init_lora_weights"]) in REDONE:
        raise folder.error(
            f"init_lora_weights={init!r}: PEFT repeats it when it loads the adapter, with the rank "
            "and the scale that it had. Make it a plain LoRA first, by peft.load and peft.save here"
        )
    parts = own_parts(folder)
    tensors = dict(folder.tensors)
    wrapper = {name: module for module, name in parameters_in(folder).items()}
    found = uniform(parts)
    for name, part in found.items():
        module = wrapper.get(name, name)
        tensors |= {f"{module}.{role}": x for role, x in to_peft(part).items()}
        if (bias := tensors.get(f"{module}.{BIAS}")) is not None:
            tensors[f"{module}.{BIAS}"] = _narrowed(bias * parts[name].scale, bias)
    rank = max((part.rank for part in found.values()), default=folder.config["r"])
    config = {key: x for key, x in folder.config.items() if x != ""} | configs.one_scale(rank)
    return {PREFIX + name: x for name, x in tensors.items()}, config
