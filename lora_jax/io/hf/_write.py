"""Write the files of a model: its tensors, and the small files beside them."""

import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lora_jax.io._files import write_json, written_aside
from lora_jax.io._tensor import Progress, Tensor, counted
from lora_jax.io.hf import _shards as shards
from lora_jax.io.hf._quantized import without_quantization
from lora_jax.io.hf._source import CONFIG, Source


def dtype_of(own: Any, wanted: Any) -> np.dtype:
    """Choose the dtype to write: only floating tensors change theirs."""
    is_float = jnp.issubdtype(own, jnp.floating)
    return np.dtype(own) if wanted is None or not is_float else np.dtype(jnp.dtype(wanted))


def narrowed(x: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Convert an array to another dtype.

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


class Output(NamedTuple):
    """The folder to write a model to, and the user's settings for it.

    Attributes:
        folder: the folder.
        config: changes of the configuration, or None.
        dtype: the dtype of the floating tensors, or None for their own.
        shard_size: the most bytes of one file.
        overwrite: whether to replace a model.
        progress: called with the bytes written and their total, or None.
    """

    folder: str | os.PathLike[str]
    config: Mapping[str, Any] | None
    dtype: Any
    shard_size: int
    overwrite: bool
    progress: Progress


def write_model(output: Output, tensors: Mapping[str, Tensor], source: Source | None) -> None:
    """Write the tensors of a model, and the small files of its source.

    Raises:
        ValueError: ``config`` changes a configuration, and the source has none.
    """
    folder, config, dtype, shard_size, overwrite, progress = output
    changes = dict(config or {})
    before = (source.config if source else None) or {}
    if dtype is not None and before:
        key = "torch_dtype" if "torch_dtype" in before or "dtype" not in before else "dtype"
        changes = {key: str(jnp.dtype(dtype))} | changes
    if changes and source is not None and not before:
        raise ValueError(f"config={config!r}: {source.where} holds no {CONFIG} to change")
    small = source.small() if source else {}
    weights = {p.name for p in Path(folder).glob("model*.safetensors*")}
    tensors = counted(tensors, sum(x.nbytes for x in tensors.values()), progress)

    owns = {*weights, *small, CONFIG, *_folders(Path(folder), small)}

    with written_aside(folder, overwrite=overwrite, owns=owns) as aside:
        aside.mkdir()
        for name, file in small.items():
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(file, Path):
                shutil.copyfile(file, aside / name)
            else:
                (aside / name).write_text(file, encoding="utf-8")
        if changes or (before and CONFIG not in small):
            write_json(aside / CONFIG, without_quantization(before | changes))
        shards.write(aside, tensors, shard_size=shard_size, metadata={"format": "pt"})


def _folders(folder: Path, small: Collection[str]) -> set[str]:
    """Find the folders in one that is written again, that hold nothing but files of these names."""
    within = {name.partition("/")[0] for name in small if "/" in name}
    return {
        name
        for name in within
        if all(
            file.is_dir() or file.relative_to(folder).as_posix() in small
            for file in (folder / name).rglob("*")
        )
    }
