"""Folders of safetensors files as Hugging Face lays them out, read and written a tensor at a time.

One file, ``model.safetensors``, or several beside an index that says which holds what.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lora_jax.io._files import open_tensors, read_json, write_json

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


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file.

    Attributes:
        path: of the file.
        dtype: of its entries.
        shape: of it.
        start: where its bytes begin.
    """

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        """In bytes."""
        return prod(self.shape) * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        """For NumPy: what is in the file."""
        return self.read() if dtype is None else self.read().astype(dtype)

    def read(self) -> np.ndarray:
        """The array: its own memory, nothing is mapped."""
        data = np.fromfile(self.path, np.uint8, self.size, offset=self.start)
        if len(data) != self.size:
            raise ValueError(f"{self.path} was cut off while it was read")
        return data.view(self.dtype).reshape(self.shape)


def tensors_in(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All tensors of a folder, by name.

    Raises:
        FileNotFoundError: there is no model, or a file that the index names is missing.
        ValueError: a file is damaged, lies outside the folder, or does not hold what the index
            says, or holds more.
    """
    folder = Path(folder)
    if (folder / INDEX).exists():
        return _by_index(folder)
    if (folder / SINGLE).exists():
        return tensors_of(folder / SINGLE)
    pickles = sorted(p.name for p in folder.glob("*.bin")) if folder.is_dir() else []
    hint = (
        f", but {pickles[0]}, a pickle, which could run anything when it is read: "
        "model.save_pretrained(folder) writes safetensors"
        if pickles
        else ""
    )
    raise FileNotFoundError(f"{folder} holds neither {SINGLE} nor {INDEX}{hint}")


def _by_index(folder: Path) -> dict[str, Tensor]:
    said = read_json(folder / INDEX)
    where = said.get("weight_map") if isinstance(said, dict) else None
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise ValueError(f"{folder / INDEX}: expected a weight_map of tensors' names to files")
    for file in sorted(set(where.values())):
        if Path(file).name != file or file in ("", ".", ".."):
            raise ValueError(f"{folder / INDEX}: {file!r} is no name of a file in {folder}")
        if not (folder / file).exists():
            raise FileNotFoundError(f"{folder / file} is missing, and {INDEX} names it")
    found: dict[str, Tensor] = {}
    for file in sorted(set(where.values())):
        of_file = tensors_of(folder / file)
        wanted = {name for name, own in where.items() if own == file}
        if wanted != of_file.keys():
            raise ValueError(
                f"{folder / file} does not hold what {INDEX} says: without "
                f"{sorted(wanted - of_file.keys())[:5]}, and with "
                f"{sorted(of_file.keys() - wanted)[:5]}"
            )
        found |= of_file
    return {name: found[name] for name in where}


def tensors_of(path: Path) -> dict[str, Tensor]:
    with open_tensors(path) as file:  # the library checks the whole header
        shapes = file.shapes
    with path.open("rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        header = json.loads(raw.read(length))
    found = {}
    for name, shape in shapes.items():
        said = header[name]
        if said["dtype"] not in _DTYPES:
            raise ValueError(f"{path}: {name!r} is of type {said['dtype']}, which NumPy has not")
        start = 8 + length + said["data_offsets"][0]
        found[name] = Tensor(path, _DTYPES[said["dtype"]], shape, start)
    return found


Spec = tuple[tuple[int, ...], np.dtype]


def write(
    folder: Path,
    specs: Mapping[str, Spec],
    make: Callable[[str], np.ndarray],
    *,
    shard_size: int,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors, each made when its turn comes, in files of at most ``shard_size`` bytes.

    Args:
        folder: that exists.
        specs: shapes and dtypes by name.
        make: gives the array of a name.
        shard_size: of a file, in bytes; a tensor that is larger has one of its own.
        metadata: of each file.
    """
    shards = _shards(specs, shard_size)
    count = len(shards)
    names = [f"model-{k + 1:05d}-of-{count:05d}.safetensors" for k in range(count)]
    names = names if count > 1 else [SINGLE]
    for file, shard in zip(names, shards, strict=True):
        _write_one(folder / file, {name: specs[name] for name in shard}, make, metadata)
    if count > 1:
        weight_map = {name: f for f, shard in zip(names, shards, strict=True) for name in shard}
        total = sum(map(size, specs.values()))
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def size(spec: Spec) -> int:
    """In bytes."""
    return prod(spec[0]) * spec[1].itemsize


def _shards(specs: Mapping[str, Spec], shard_size: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    left = shard_size
    for name, spec in specs.items():
        if shards[-1] and size(spec) > left:
            shards.append([])
            left = shard_size
        shards[-1].append(name)
        left -= size(spec)
    return shards


def _write_one(
    path: Path, specs: Mapping[str, Spec], make: Callable[[str], np.ndarray], metadata: Any
) -> None:
    """One file: the library wants all arrays at once, so that the format is written here."""
    # By descending size of an entry, as the library does: so every array begins aligned.
    names = sorted(specs, key=lambda name: -specs[name][1].itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        start, end = end, end + size(specs[name])
        shape, dtype = specs[name]
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            x = make(name)
            if (x.shape, x.dtype) != specs[name]:
                raise AssertionError(f"{name}: {x.shape} {x.dtype}, expected {specs[name]}")
            np.asarray(x, order="C").reshape(-1).view(np.uint8).tofile(file)
