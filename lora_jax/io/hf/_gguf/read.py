"""Read one tensor of a GGUF file."""

from functools import partial
from math import prod
from pathlib import Path

import numpy as np

from lora_jax.io._tensor import Tensor
from lora_jax.io.hf._gguf.header import FLOATS, TensorInfo, block_of, dequantize

_CHUNK = 2**20  # entries that are dequantized at a time


def lazy(path: Path, name: str, info: TensorInfo, *, heads: int, added: float) -> Tensor:
    """Make a tensor of the file that is read when asked for, as the model here has it.

    Args:
        path: of the file.
        name: of the tensor there.
        info: of the tensor there.
        heads: how many heads the rows are, if each is in the order of interleaved rotary
            embeddings; else 0.
        added: what the file adds to every entry.
    """
    dtype = FLOATS.get(info.kind, np.dtype(np.float32))
    read = partial(_read, path, name, info, dtype, heads, added)
    return Tensor(info.shape, dtype, read, info.kind)


def _read(
    path: Path, name: str, info: TensorInfo, dtype: np.dtype, heads: int, added: float
) -> np.ndarray:
    """Read a tensor into memory of its own, with little more in use meanwhile."""
    rows, width = prod(info.shape[:-1]), info.shape[-1]
    block, size = block_of(info.kind)
    x, order = np.empty((rows, width), dtype), _order(rows, heads)
    with path.open("rb") as file:
        file.seek(info.start)
        for first in range(0, rows, step := max(1, _CHUNK // width)):
            here = order[first : first + step]
            data = np.fromfile(file, np.uint8, len(here) * width // block * size)
            if len(data) != len(here) * width // block * size:
                raise ValueError(f"{path} was cut off while {name!r} was read")
            data = data.reshape(len(here), -1)
            x[here] = _numbers(data, info.kind, dtype, f"{path}: {name!r}")
    if added:
        x -= dtype.type(added)
    return x.reshape(info.shape)


def _order(rows: int, heads: int) -> np.ndarray:
    """Find where the rows of the file go: a pair is neighbours there, in two halves here."""
    order = np.arange(rows)
    return order.reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1) if heads else order


def _numbers(data: np.ndarray, kind: str, dtype: np.dtype, where: str) -> np.ndarray:
    if kind in FLOATS:
        return data.view(dtype)
    try:
        return dequantize(data, kind)
    except ValueError as error:
        raise ValueError(f"{where} {error}") from None
