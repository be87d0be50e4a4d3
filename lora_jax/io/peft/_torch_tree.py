"""Find the layouts of PyTorch's own tensors, as an adapter's files tell them."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_jax._weights.layouts import Layouts, Weight
from lora_jax.io import _files as files
from lora_jax.io._torch import module_path
from lora_jax.io.peft._axes import EMBEDDING, PARAMETER_ORDER, PREFIX, TOKENS, wrapped
from lora_jax.io.peft._config import CONFIG, TENSORS, is_target_parameter
from lora_jax.io.peft._config import check as check_config
from lora_jax.io.peft._load import config_in


def forms_of(
    path: str | os.PathLike[str], leaves: Mapping[str, Any], *, is_conv1d: bool
) -> tuple[Layouts, dict[str, str]]:
    """The layouts and kinds of PyTorch's own tensors, by paths, as an adapter's files tell them."""
    folder = Path(path)
    config = check_config(files.read_json(config_in(folder)), str(folder / CONFIG))
    with files.open_tensors(folder / TENSORS) as file:
        shapes = {name.removeprefix(PREFIX): shape for name, shape in file.shapes.items()}
    marks = (f".{EMBEDDING[0]}", f".{TOKENS}")
    tables = {name.removesuffix(mark) for name in shapes for mark in marks if name.endswith(mark)}
    modules = {module_path(own)[0].replace("/", ".") for own in leaves}
    parameters = {name for name in modules if is_target_parameter(config, name)}
    weights, kinds = {}, {".*/(c_attn|c_proj|c_fc|q_attn)/weight": "Conv1D"} if is_conv1d else {}
    for own, leaf in leaves.items():
        module, letters, kind = module_path(own)[0].replace("/", "."), None, "dot"
        if module in tables:
            letters, kind = "io", "embedding"
        elif module in parameters and len(leaf.shape) == 3:
            wrapper = wrapped(module, parameters, PARAMETER_ORDER)
            letters, kind = _letters_of_experts(module, leaf.shape, wrapper, shapes), "ragged"
        elif len(leaf.shape) == 2:
            letters = "io" if any(re.fullmatch(k, own) for k in kinds) else "oi"
        elif len(leaf.shape) > 2:
            letters, kind = "o" + "i" * (len(leaf.shape) - 1), "conv"
        weights[own] = Weight(tuple(leaf.shape), leaf.dtype, letters, kind, (), None)
    return Layouts(weights), kinds


def _letters_of_experts(
    name: str, shape: tuple[int, ...], wrapper: str, shapes: Mapping[str, Any]
) -> str:
    """Which of the two axes is read: that which ``lora_A`` has."""
    of_a, of_b = (shapes.get(f"{wrapper}.lora_{factor}.weight", ()) for factor in "AB")
    fits = [
        letters
        for letters, (inputs, outputs) in (("boi", shape[:0:-1]), ("bio", shape[1:]))
        if (of_a[1:], of_b[:1]) == ((inputs,), (outputs,))
    ]
    if len(fits) != 1:
        raise ValueError(
            f"the parameter {name!r} of shape {shape} is square, or its factors do not fit it: "
            "which of its axes is read cannot be told. Load the adapter with peft.load and layout="
        )
    return fits[0]
