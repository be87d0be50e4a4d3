"""Tell which leaves of a tree are in a model's files, where some are no parameters."""

import warnings
from collections.abc import Mapping
from typing import Any

from lora_jax._weights.axes import is_array
from lora_jax._weights.paths import RANDOM
from lora_jax.io._torch import Map, as_name, module_path
from lora_jax.io.hf._families import Family
from lora_jax.io.hf._source import Source

_HOW = r"{r'(.*)/mean': r'\1.running_mean', r'(.*)/var': r'\1.running_var', '.*': r'\g<0>'}"


def in_files(
    leaves: Mapping[str, Any],
    others: Mapping[str, str],
    family: Family,
    source: Source | None,
    verb: str,
    *,
    stacklevel: int,
) -> dict[str, Any]:
    """Return the leaves that a model's files contain: parameters, and what has a name there.

    PRNG keys and their counters have none. Other leaves that are no parameters, such as running
    statistics, have one if ``names`` gives it, or if the source has a tensor of their path. A
    warning names those without. ``others`` are as ``paths.not_parameters`` describes them.
    """
    others = {path: what for path, what in others.items() if is_array(leaves[path])}
    random = {path for path, what in others.items() if what in RANDOM}
    own = Map({}, family.names)
    stored = source.tensors if source else {}
    named = {
        path
        for path in others.keys() - random
        if as_name(path) in stored
        or (family.names is not None and own.named(module_path(path)[0]) is not None)
    }
    if lost := {path: what for path, what in others.items() if path not in {*named, *random}}:
        shown = ", ".join(f"{path} ({what})" for path, what in list(lost.items())[:8])
        more = f" and {len(lost) - 8} more" if len(lost) > 8 else ""
        warnings.warn(
            f"{verb}: these leaves are no parameters and have no name in the model's files, so "
            f"that the files are without them: {shown}{more}. To give them names, such as those of "
            f"PyTorch's BatchNorm: names={_HOW}",
            stacklevel=stacklevel,
        )
    return {path: x for path, x in leaves.items() if path not in others or path in named}
