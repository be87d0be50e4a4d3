"""The files of a model: its tensors, and the small ones beside them."""

import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.io import _shards as shards
from lora_jax.io._files import read_json, write_json, written_aside


def dtype_of(own: Any, wanted: Any) -> np.dtype:
    """The dtype to write: only floating numbers change theirs."""
    is_float = jnp.issubdtype(own, jnp.floating)
    return np.dtype(own) if wanted is None or not is_float else np.dtype(jnp.dtype(wanted))


def narrowed(x: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """In another dtype.

    Raises:
        ValueError: finite numbers would be infinite there.
    """
    if x.dtype == dtype:
        return x
    with np.errstate(over="ignore"):
        new = x.astype(dtype)
    lost = np.isfinite(x.astype(np.float32)) & ~np.isfinite(new.astype(np.float32))
    if count := int(lost.sum()):
        largest = np.abs(x.astype(np.float32)[lost]).max()
        raise ValueError(
            f"{name!r}: {count} numbers of up to {largest:g} are too large for {dtype}: write "
            "bfloat16 or float32"
        )
    return new


def write(
    folder: str | os.PathLike[str],
    specs: Mapping[str, shards.Spec],
    make: Callable[[str], np.ndarray],
    source: str | os.PathLike[str] | None,
    dtype: Any,
    shard_size: int,
    overwrite: bool,
) -> None:
    """The tensors, and the small files of the source."""
    small = _small_files(Path(source)) if source is not None else []
    weights = {p.name for p in Path(folder).glob("model*.safetensors*")}
    owns = weights | {p.name for p in small} | {"config.json"}
    with written_aside(folder, overwrite=overwrite, owns=owns) as partial:
        partial.mkdir()
        for file in small:
            shutil.copyfile(file, partial / file.name)
        if dtype is not None and (partial / "config.json").exists():
            _say_dtype(partial / "config.json", str(jnp.dtype(dtype)))
        shards.write(partial, specs, make, shard_size=shard_size, metadata={"format": "pt"})


def _small_files(source: Path) -> list[Path]:
    """What lies beside the weights, of a model or its tokenizer."""
    weights = re.compile(r".*\.(safetensors|bin|pt|pth|h5|msgpack|onnx|gguf|ot)|.*\.index\.json")
    files = (p for p in sorted(source.iterdir()) if p.is_file() and not p.name.startswith("."))
    return [p for p in files if not weights.fullmatch(p.name)]


def _say_dtype(path: Path, dtype: str) -> None:
    config = read_json(path)
    key = "torch_dtype" if "torch_dtype" in config or "dtype" not in config else "dtype"
    write_json(path, config | {key: dtype})
