"""A tensor of a GGUF file, which is read when it is asked for."""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.io.hf._gguf.file import FLOATS, block_of, dequantize

_CHUNK = 2**20  # numbers that are dequantized at once


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file.

    Attributes:
        path: of the file.
        name: of it there.
        dtype: of its entries when it is read.
        shape: of it, in PyTorch's axes.
        start: where its bytes begin.
        kind: what llama.cpp calls the type of its entries.
        heads: how many heads its rows are, each in the order of interleaved rotary embeddings; 0
            where rows are in order.
        added: to its entries.
    """

    path: Path
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    kind: str
    heads: int = 0
    added: float = 0.0

    @property
    def size(self) -> int:
        """In bytes, when it is read."""
        return prod(self.shape) * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        """For NumPy: what is in the file."""
        return self.read() if dtype is None else self.read().astype(dtype)

    def read(self) -> np.ndarray:
        """The array: its own memory, and little more while it is made."""
        rows, width = prod(self.shape[:-1]), self.shape[-1]
        block, size = block_of(self.kind)
        x, order = np.empty((rows, width), self.dtype), self._order(rows)
        with self.path.open("rb") as file:
            file.seek(self.start)
            for first in range(0, rows, step := max(1, _CHUNK // width)):
                here = order[first : first + step]
                data = np.fromfile(file, np.uint8, len(here) * width // block * size)
                if len(data) != len(here) * width // block * size:
                    raise ValueError(f"{self.path} was cut off while {self.name!r} was read")
                x[here] = self._numbers(data.reshape(len(here), -1))
        if self.added:
            x -= self.dtype.type(self.added)
        return x.reshape(self.shape)

    def _order(self, rows: int) -> np.ndarray:
        """Where the rows of the file go: those of a pair are neighbours there, halves here."""
        order = np.arange(rows)
        return order.reshape(self.heads, 2, -1).swapaxes(1, 2).reshape(-1) if self.heads else order

    def _numbers(self, data: np.ndarray) -> np.ndarray:
        if self.kind in FLOATS:
            return data.view(self.dtype)
        try:
            return dequantize(data, self.kind)
        except ValueError as error:
            raise ValueError(f"{self.path}: {self.name!r} {error}") from None
