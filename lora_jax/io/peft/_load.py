"""Read an adapter that PEFT wrote."""

import os
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from lora_jax._adapter.params import LoraParams
from lora_jax._weights.paths import PyTree, flatten
from lora_jax.io import _files as files
from lora_jax.io._torch import Map, Names
from lora_jax.io.peft._axes import PARAMETER_ORDER
from lora_jax.io.peft._config import CONFIG, TENSORS
from lora_jax.io.peft._config import check as check_config
from lora_jax.io.peft._reader import Reader


def load(
    path: str | os.PathLike[str],
    params: PyTree,
    *,
    names: Names = None,
    kinds: Mapping[str, str] | None = None,
    layout: Mapping[str, str] | None = None,
    parameter_order: tuple[str, ...] = PARAMETER_ORDER,
    finite: bool = True,
) -> LoraParams:
    """Read an adapter that PEFT wrote.

    Every tensor of it must have its place in ``params``, and every module that its configuration
    adapts must have its tensors. Adapters whose initializer changed the base (PiSSA, OLoRA), which
    PEFT repeats when it loads them, come as plain LoRA of twice the rank.

    Args:
        path: of the folder.
        params: the parameters of the same model.
        names: as in :func:`save`.
        kinds: as in :func:`save`.
        layout: as in ``lorafy``.
        parameter_order: as in :func:`save`.
        finite: whether to refuse values that are not.

    Returns:
        A LoraParams of ``params``, with float32 factors. Layers that are stacked here have one
        rank, the largest of theirs: where it was less, the factors are zero.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: a file is damaged, or asks for what cannot be read exactly; tensors are
            missing, left over, or of shapes that do not fit.
    """
    if isinstance(params, LoraParams):
        raise TypeError(
            "peft.load: params is a LoraParams, expected its base, the plain parameters"
        )
    places = Map(flatten(params)[0], names, kinds, layout)
    return open_reader(path, places, parameter_order, finite=finite).read(params)


def open_reader(
    path: str | os.PathLike[str],
    places: Map,
    parameter_order: tuple[str, ...] = PARAMETER_ORDER,
    *,
    finite: bool = True,
) -> Reader:
    """The files of an adapter, checked as far as they can be alone."""
    folder = Path(path)
    config = check_config(files.read_json(config_in(folder)), str(folder / CONFIG))
    with files.open_tensors(folder / TENSORS) as file:
        tensors = dict(file)
    for name, x in tensors.items():
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{folder}: {name!r} is of type {x.dtype}, expected floating numbers")
        if finite and not np.isfinite(x.astype(np.float32)).all():
            raise ValueError(
                f"{folder}: {name!r} has values that are not finite. To load it all the same: "
                "finite=False"
            )
    return Reader(str(folder), config, tensors, places, parameter_order)


def config_in(folder: Path) -> Path:
    for name in (CONFIG, TENSORS):
        if (folder / name).exists():
            continue
        if name == TENSORS and (folder / "adapter_model.bin").exists():
            raise ValueError(
                f"{folder} holds adapter_model.bin, a pickle, which could run anything when it is "
                "read. In PEFT: PeftModel.from_pretrained(...).save_pretrained(folder) writes "
                f"{TENSORS}"
            )
        inside = [p.parent.name for p in folder.glob(f"*/{CONFIG}")] if folder.is_dir() else []
        hint = (
            f": an adapter with a name of its own is in a folder within: {inside}" if inside else ""
        )
        raise FileNotFoundError(f"{folder} holds no {name}{hint}")
    return folder / CONFIG
