"""An adapter of PEFT's in the neutral form: its tensors say all but what its base is like."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_jax.cli._read.forms import AdapterFile, Update, natural
from lora_jax.io._torch import Map
from lora_jax.io.peft import _config as configs
from lora_jax.io.peft._axes import EMBEDDING, MAGNITUDE, PARAMETER_ORDER, TOKENS, wrapped
from lora_jax.io.peft._load import open_reader


def open_peft(path: Path) -> AdapterFile:
    """The adapter in a folder of PEFT's, without the model that it is for.

    Raises:
        OSError: a file cannot be read.
        ValueError: it is damaged, or cannot be read exactly.
    """
    reader = open_reader(path, Map({}))
    config, left = reader.config, dict(reader.left)
    parameters = _parameters(config, left)
    updates = {}
    for name in sorted(left, key=natural):
        for suffix in (".lora_A.weight", f".{EMBEDDING[0]}"):
            if not name.endswith(suffix):
                continue
            module = name.removesuffix(suffix)
            is_table = suffix != ".lora_A.weight"
            second = f"{module}.{EMBEDDING[1] if is_table else 'lora_B.weight'}"
            if second not in left:
                raise reader.bad(f"has {name!r} and not {second!r}")
            a, b = left.pop(name), left.pop(second)
            magnitude = left.pop(f"{module}.{MAGNITUDE}", None)
            own = module if is_table else parameters.get(module, module)
            update = _of_module(own, a, b, magnitude, config, is_table, own in parameters.values())
            if update is None:
                raise reader.bad(
                    f"the factors of {own!r} have shapes {a.shape} and {b.shape}, which do not fit "
                    f"each other or rank {configs.rank_of(config, own)} of the configuration"
                )
            updates[own] = update
    whole = {}
    for name in sorted(left, key=natural):
        if name.endswith((".lora_B.weight", f".{EMBEDDING[1]}", f".{MAGNITUDE}")):
            raise reader.bad(f"has {name!r} and not the factor that goes with it")
        owner, _, wrapper = name.rpartition(".")[0].rpartition(".")
        is_copy = wrapper in ("original_module", "modules_to_save")
        is_base = wrapper == "base_layer" and not name.endswith(".bias")
        if not is_copy and not is_base:
            shown = f"{owner}.bias" if wrapper == "base_layer" else name
            shown = f"{name.removesuffix(f'.{TOKENS}')} (rows)" if TOKENS in name else shown
            whole[shown] = left[name]
    base = config.get("base_model_name_or_path") or "not recorded"
    init = config["init_lora_weights"]
    note = f"on what {init} leaves of its base" if init in configs.REDONE else ""
    return AdapterFile(path, "peft", updates, whole, str(base), config=config, note=note)


def _parameters(config: Mapping[str, Any], left: Mapping[str, Any]) -> dict[str, str]:
    """The parameters that are adapted, by the name of their wrapper, as the tensors tell."""
    found = {}
    mark = ".lora_A.weight"
    modules = {re.sub(r"(\.base_layer)*$", "", n.removesuffix(mark)) for n in left if mark in n}
    targets = config.get("target_parameters") or []
    for module in modules:
        own = {f"{module}.{target.rpartition('.')[2]}" for target in targets}
        own = {name for name in own if configs.matches(targets, name)}
        found |= {wrapped(name, own, PARAMETER_ORDER): name for name in own}
    return found


def _of_module(
    own: str, a: Any, b: Any, magnitude: Any, config: Any, is_table: bool, is_parameter: bool
) -> Update | None:
    """PEFT's factors in the neutral form; None if they do not fit."""
    rank = configs.rank_of(config, own)
    batch: tuple[int, ...] = ()
    size = a.size + b.size + (0 if magnitude is None else magnitude.size)
    if is_parameter:
        batch = (a.shape[0] // rank,)
        if a.shape[0] != batch[0] * rank or b.ndim != 2 or b.shape[1] != a.shape[0]:
            return None
        a = a.reshape(*batch, rank, -1).transpose(0, 2, 1)
        b = b.reshape(-1, rank, *batch).transpose(2, 1, 0)
        kind = "Parameter"
    else:
        if a.ndim < 2 or b.ndim != a.ndim or a.shape[0] != rank or b.shape[1] != rank:
            return None
        kind = "Embedding" if is_table else "Conv" if a.ndim > 2 else "Linear"
        a, b = a.reshape(1, rank, -1).transpose(0, 2, 1), b.reshape(1, -1, rank).transpose(0, 2, 1)
    scale = configs.scale_of(config, own)
    alpha = float(scale) * (rank**0.5 if config.get("use_rslora") else rank)
    return Update(own, kind, a, b, float(scale), alpha, batch, magnitude, size)
