"""Read and write folders of safetensors files as Hugging Face lays them out, tensor by tensor.

A folder has one file, ``model.safetensors``, or several files and an index that maps the names of
tensors to files.
"""

import json
import os
from collections.abc import Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lora_jax.io._files import open_tensors, read_json, write_json
from lora_jax.io._tensor import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}

_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def tensors_in(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Find all tensors of a folder, by name.

    Raises:
        FileNotFoundError: there is no model, or a file that the index names is missing.
        ValueError: a file is damaged, lies outside the folder, or has other tensors than the index
            says.
    """
    folder = Path(folder)
    if (folder / INDEX).exists():
        return _by_index(folder)
    if (folder / SINGLE).exists():
        return tensors_in_file(folder / SINGLE)
    pickles = sorted(p.name for p in folder.glob("*.bin")) if folder.is_dir() else []
    hint = (
        f", but {pickles[0]}, a pickle, which could run anything when it is read: "
        "model.save_pretrained(folder) writes safetensors"
        if pickles
        else ""
    )
    raise FileNotFoundError(f"{folder} holds neither {SINGLE} nor {INDEX}{hint}")


def _by_index(folder: Path) -> dict[str, Tensor]:
    index = read_json(folder / INDEX)
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise ValueError(f"{folder / INDEX}: expected a weight_map of tensors' names to files")
    for file in sorted(set(files.values())):
        if Path(file).name != file or file in ("", ".", ".."):
            raise ValueError(f"{folder / INDEX}: {file!r} is no name of a file in {folder}")
        if not (folder / file).exists():
            raise FileNotFoundError(f"{folder / file} is missing, and {INDEX} names it")
    found: dict[str, Tensor] = {}
    for file in sorted(set(files.values())):
        tensors = tensors_in_file(folder / file)
        wanted = {name for name, own in files.items() if own == file}
        if wanted != tensors.keys():
            raise ValueError(
                f"{folder / file} does not hold what {INDEX} lists: without "
                f"{sorted(wanted - tensors.keys())[:5]}, and with "
                f"{sorted(tensors.keys() - wanted)[:5]}"
            )
        found |= tensors
    return {name: found[name] for name in files}


def tensors_in_file(path: Path) -> dict[str, Tensor]:
    """Find all tensors of a file, by name; raise if it is damaged."""
    with open_tensors(path) as file:  # the library checks the header
        shapes = file.shapes
    with path.open("rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        header = json.loads(raw.read(length))
    found = {}
    for name, shape in shapes.items():
        kind, (begin, _) = header[name]["dtype"], header[name]["data_offsets"]
        if kind not in _DTYPES:
            raise ValueError(f"{path}: {name!r} is of type {kind}, which NumPy has not")
        read = partial(_read, path, 8 + length + begin, shape, _DTYPES[kind])
        found[name] = Tensor(shape, _DTYPES[kind], read)
    return found


def _read(path: Path, start: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Read an array into memory of its own; nothing is mapped."""
    size = prod(shape) * dtype.itemsize
    data = np.fromfile(path, np.uint8, size, offset=start)
    if len(data) != size:
        raise ValueError(f"{path} was cut off while it was read")
    return data.view(dtype).reshape(shape)


def write(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    shard_size: int,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors, each read when its turn comes, in files of at most ``shard_size`` bytes.

    Args:
        folder: an existing folder.
        tensors: by name.
        shard_size: the largest size of a file in bytes; a larger tensor gets a file of its own.
        metadata: of each file.
    """
    shards = _shards(tensors, shard_size)
    count = len(shards)
    names = [f"model-{k + 1:05d}-of-{count:05d}.safetensors" for k in range(count)]
    names = names if count > 1 else [SINGLE]
    for file, shard in zip(names, shards, strict=True):
        _write_one(folder / file, {name: tensors[name] for name in shard}, metadata)
    if count > 1:
        weight_map = {name: f for f, shard in zip(names, shards, strict=True) for name in shard}
        total = sum(x.nbytes for x in tensors.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(tensors: Mapping[str, Tensor], shard_size: int) -> list[list[str]]:
    """Divide names among files, in their order."""
    shards: list[list[str]] = [[]]
    left = shard_size
    for name, tensor in tensors.items():
        if shards[-1] and tensor.nbytes > left:
            shards.append([])
            left = shard_size
        shards[-1].append(name)
        left -= tensor.nbytes
    return shards


def _write_one(path: Path, tensors: Mapping[str, Tensor], metadata: Any) -> None:
    """Write one file; the library would need all arrays at once."""
    # Descending by the size of an entry, as the library does: every array begins aligned.
    names = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        x = tensors[name]
        start, end = end, end + x.nbytes
        header[name] = {
            "dtype": _NAMES[x.dtype],
            "shape": list(x.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            x, expected = tensors[name].read(), tensors[name]
            if (x.shape, x.dtype) != (expected.shape, expected.dtype):
                raise AssertionError(f"{name}: {x.shape} {x.dtype}, expected {expected}")
            np.asarray(x, order="C").reshape(-1).view(np.uint8).tofile(file)
