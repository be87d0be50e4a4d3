"""Find out what a path holds.

Each of the formats that follow is one function.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax._adapter.params import Adapter
from lora_jax.cli._read.forms import AdapterFile, Checkpoint, update_of
from lora_jax.cli._read.peft import open_peft
from lora_jax.io import _files as files
from lora_jax.io import safetensors
from lora_jax.io.hf import _shards as shards
from lora_jax.io.peft._axes import PARAMETER_ORDER
from lora_jax.io.peft._config import CONFIG, TENSORS


def open_path(
    path: str | os.PathLike[str], order: tuple[str, ...] = PARAMETER_ORDER
) -> AdapterFile | Checkpoint:
    """Open what is at a path; ``order`` is that of parameters in modules of PEFT.

    Raises:
        OSError: there is nothing, or it cannot be read.
        ValueError: it is of no known kind, is damaged, or is an adapter of nothing.
    """
    found = _open(Path(path), order)
    if isinstance(found, AdapterFile) and not (found.updates or found.full):
        raise ValueError(
            f"{path} is an adapter without a tensor: nothing was adapted, or what it was saved "
            "from was empty. Save it again"
        )
    return found


def _open(path: Path, order: tuple[str, ...]) -> AdapterFile | Checkpoint:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.is_file():
        return _file(path)
    if any((path / name).exists() for name in (TENSORS, "adapter_model.bin")):
        return open_peft(path, order)
    if _has_model(path):  # PEFT and Trainer leave an adapter's configuration beside merged models
        return Checkpoint(path, "huggingface", shards.tensors_in(path))
    if (path / CONFIG).exists():
        return open_peft(path, order)
    if (path / "_CHECKPOINT_METADATA").exists() or (path / "config").is_dir():
        return _orbax(path)
    steps = sorted(int(p.name) for p in path.iterdir() if p.name.isdecimal() and p.is_dir())
    if steps:
        note = f"step {steps[-1]}, the last of {len(steps)}"
        return _orbax(path / str(steps[-1]), note)
    inside = sorted(p.parent.name for p in path.glob(f"*/{CONFIG}"))
    pickles = sorted(p.name for p in path.glob("*.bin"))
    if inside:
        hint = f"an adapter is in a folder within: {', '.join(inside)}"
    elif pickles:
        hint = f"{pickles[0]} is a pickle, which could run anything when it is read: convert it"
    else:
        hint = "expected a PEFT adapter, an Orbax checkpoint of lora_jax or a model's safetensors"
    is_empty = not any(path.iterdir())
    raise ValueError(f"{path} {'is empty' if is_empty else 'holds nothing known'}: {hint}")


def open_adapter(
    path: str | os.PathLike[str], order: tuple[str, ...] = PARAMETER_ORDER
) -> AdapterFile:
    """Open the adapter at a path.

    Raises:
        ValueError: there is a model.
    """
    found = open_path(path, order)
    if not isinstance(found, AdapterFile):
        raise ValueError(f"{path} is a model or a file of tensors, expected an adapter")
    return found


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open the model at a path.

    Raises:
        ValueError: there is an adapter.
    """
    if _has_model(Path(path)):  # there may be an adapter beside it
        return Checkpoint(Path(path), "huggingface", shards.tensors_in(path))
    found = open_path(path)
    if not isinstance(found, Checkpoint):
        raise ValueError(f"{path} is an adapter, expected a model")
    return found


def _has_model(path: Path) -> bool:
    return (path / shards.SINGLE).exists() or (path / shards.INDEX).exists()


def _file(path: Path) -> AdapterFile | Checkpoint:
    with path.open("rb") as file:
        if file.read(4) == b"GGUF":
            from lora_jax.io.hf._gguf import model as _gguf

            return Checkpoint(path, "gguf", _gguf.tensors_in(path))
    with files.open_tensors(path) as tensors:
        metadata, names = tensors.metadata, list(tensors)
    if "lora_jax" not in metadata:
        if any(name.startswith("base_model.model.") for name in names):
            raise ValueError(
                f"{path} holds the tensors of a PEFT adapter, which mean nothing without "
                f"{CONFIG} beside them: give the folder of both"
            )
        return Checkpoint(path, "safetensors", shards.tensors_in_file(path))
    return _native(path, "safetensors", *safetensors.read(path))


def _orbax(path: Path, note: str = "") -> AdapterFile | Checkpoint:
    from lora_jax.io.orbax._adapter import read_adapter, read_state
    from lora_jax.io.orbax._parts import config_of
    from lora_jax.io.orbax._tensors import tensors_in

    where = str(path.absolute())
    record, _ = config_of(where)
    if isinstance(record, dict) and record.get("format") == "lora_jax params":
        return Checkpoint(path, "orbax", *tensors_in(path))
    adapter = read_adapter(where, None, {}, None, finite=True)[0]
    return _native(path, "orbax", adapter, record, read_state(where), note)


def _native(
    path: Path,
    kind: str,
    adapter: Adapter,
    record: Any,
    state: Mapping[str, Any],
    note: str = "",
) -> AdapterFile:
    updates = {key: update_of(key, f) for key, f in adapter.factors.items()}
    full = {name: np.asarray(x) for name, x in adapter.full.items()}
    if any(f.residual for f in adapter.factors.values()):
        note = ", ".join([*([note] if note else []), "on what its initializer left of its base"])
    if record["base"] is None:
        base = "not recorded"
    else:
        known = len(record["base"]["content"])
        content = f"the contents of {known} of them" if known else "not their contents"
        base = f"{len(record['base']['leaves'])} leaves: names, shapes and dtypes, {content}"
    own = (adapter, record)
    return AdapterFile(path, kind, updates, full, base, own, note=note, state=state)
