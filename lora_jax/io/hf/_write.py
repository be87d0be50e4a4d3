"""The files of a model: its tensors, and the small ones beside them."""

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np

from lora_jax.io._files import write_json, written_aside
from lora_jax.io._tensor import Tensor
from lora_jax.io.hf import _shards as shards
from lora_jax.io.hf._source import CONFIG, Source

Progress: TypeAlias = Callable[[int, int], None] | None


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
    tensors: Mapping[str, Tensor],
    *,
    source: Source | None,
    config: Mapping[str, Any] | None,
    dtype: Any,
    shard_size: int,
    overwrite: bool,
    progress: Progress,
) -> None:
    """The tensors, and the small files of the source.

    Raises:
        ValueError: ``config`` changes a configuration that is not there.
    """
    changes = dict(config or {})
    said = (source.config if source else None) or {}
    if dtype is not None and said:
        key = "torch_dtype" if "torch_dtype" in said or "dtype" not in said else "dtype"
        changes = {key: str(jnp.dtype(dtype))} | changes
    if changes and source is not None and not said:
        raise ValueError(f"config={config!r}: {source.where} holds no {CONFIG} to change")
    small = source.small() if source else {}
    weights = {p.name for p in Path(folder).glob("model*.safetensors*")}
    done, total = 0, sum(x.nbytes for x in tensors.values())

    def read(tensor: Tensor) -> np.ndarray:
        nonlocal done
        x = tensor.read()
        done += x.nbytes
        if progress is not None:
            progress(done, total)
        return x

    counted = {name: replace(x, read=partial(read, x)) for name, x in tensors.items()}

    with written_aside(folder, overwrite=overwrite, owns={*weights, *small, CONFIG}) as aside:
        aside.mkdir()
        for name, what in small.items():
            if isinstance(what, Path):
                shutil.copyfile(what, aside / name)
            else:
                (aside / name).write_text(what, encoding="utf-8")
        if changes or (said and CONFIG not in small):
            write_json(aside / CONFIG, said | changes)
        shards.write(aside, counted, shard_size=shard_size, metadata={"format": "pt"})
