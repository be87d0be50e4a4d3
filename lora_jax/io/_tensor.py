"""A tensor that is read when it is asked for, wherever it is stored."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any, TypeAlias

import numpy as np

Progress: TypeAlias = Callable[[int, int], None] | None  # called with bytes done and in all


@dataclass(frozen=True)
class Tensor:
    """Hold the shape and the dtype of an array, and the way to get it.

    NumPy and JAX take it for an array: ``jnp.asarray(tensor)`` reads it.

    Attributes:
        shape: of the array.
        dtype: of the array.
        read: returns the array; each call reads it anew, into memory of its own.
        kind: the file's own name for the type of the entries, where it has one.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    kind: str | None = None

    @property
    def nbytes(self) -> int:
        """The size of the array in memory."""
        return prod(self.shape) * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        x = self.read()
        return x if dtype is None else x.astype(dtype)


def counted(tensors: Mapping[str, Tensor], total: int, progress: Progress) -> Mapping[str, Tensor]:
    """Make tensors that report, each time one is read, the bytes read so far and the total."""
    done = 0

    def read(tensor: Tensor) -> np.ndarray:
        nonlocal done
        x = tensor.read()
        done += tensor.nbytes
        if progress is not None:
            progress(done, total)
        return x

    return {name: replace(x, read=partial(read, x)) for name, x in tensors.items()}
