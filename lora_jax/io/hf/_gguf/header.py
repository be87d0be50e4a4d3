"""Read the header of a GGUF file: the model's key-value pairs, and where its tensors are.

The reader of the gguf library is not used: it loops forever on a damaged length, accepts strings
that are cut off, and makes a hundred thousand arrays to hold a vocabulary. Only the library's table
of types and its dequantization are used.
"""

import functools
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, prod
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

FLOATS = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}

_LARGEST = 64 * 2**20  # bytes, far more than any header has

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}

_STRING, _ARRAY = 8, 9
_AXES = 4  # at most


def import_gguf() -> Any:
    """Import the library of GGUF's types.

    Raises:
        ImportError: the library is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            "GGUF files are read with gguf, which is not installed: pip install 'lora-jax[gguf]'"
        ) from error
    return gguf


def block_of(kind: str) -> tuple[int, int]:
    """Return how many numbers a block of a type has, and how many bytes."""
    gguf = import_gguf()
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]


def dequantize(data: np.ndarray, kind: str) -> np.ndarray:
    """Dequantize rows of blocks to float32.

    Raises:
        ValueError: a damaged scale makes numbers that are not finite.
    """
    gguf = import_gguf()
    with np.errstate(all="ignore"):
        x = gguf.dequantize(data, gguf.GGMLQuantizationType[kind])
    if not np.isfinite(x).all():
        raise ValueError("has scales that are not finite numbers")
    return x


@dataclass(frozen=True)
class TensorInfo:
    """Describe a tensor of a file.

    Attributes:
        kind: the name of its type.
        shape: in PyTorch's axes.
        start: the offset of its first byte.
    """

    kind: str
    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Header:
    """Hold the header of a file.

    Attributes:
        path: of the file.
        values: by key.
        tensors: by name.
    """

    path: Path
    values: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    @property
    def architecture(self) -> str:
        """Return llama.cpp's name for the kind of model."""
        return self.text("general.architecture")

    def own(self) -> set[str]:
        """Return the keys of the architecture, without its name."""
        start = f"{self.architecture}."
        return {key.removeprefix(start) for key in self.values if key.startswith(start)}

    def text(self, key: str, default: str | None = None) -> str:
        """Return a string.

        Raises:
            ValueError: there is none; the methods for other kinds raise alike.
        """
        value = self.values.get(key, default)
        return self._checked(key, value, isinstance(value, str), "a string")

    def count(self, key: str, default: int | None = None) -> int:
        """Return a positive integer of the architecture."""
        key = f"{self.architecture}.{key}"
        value = self.values.get(key, default)
        return self._checked(key, value, type(value) is int and value > 0, "a positive integer")

    def real(self, key: str, default: float | None = None) -> float:
        """Return a positive number of the architecture."""
        key = f"{self.architecture}.{key}"
        value = self.values.get(key, default)
        good = type(value) is float and 0 < value < inf
        return self._checked(key, value, good, "a positive, finite number")

    def token(self, role: str, size: int) -> int | None:
        """Return the number of the token with a role, or None."""
        key = f"tokenizer.ggml.{role}_token_id"
        value = self.values.get(key)
        good = value is None or (type(value) is int and 0 <= value < size)
        return self._checked(key, value, good, f"an integer below {size}")

    def texts(self, key: str) -> list[str]:
        """Return a list of strings."""
        value = self.values.get(key)
        good = isinstance(value, list) and all(isinstance(x, str) for x in value)
        return self._checked(key, value, good, "a list of strings")

    def _checked(self, key: str, value: Any, good: bool, expected: str) -> Any:
        if not good:
            found = f"{key}={value!r:.100}" if key in self.values else f"without {key}"
            raise ValueError(f"{self.path}: {found}: expected {expected}")
        return value


def read_header(path: Path) -> Header:
    """Read the header of a file, with the tensors in their order.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is no GGUF file, is cut off, is one of several files of a model, or
            contradicts itself.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            values, tensors = _read(_Bytes(file, size), size)
        except ValueError as error:
            raise ValueError(f"{path} is no complete GGUF file: {error}") from error
    if (files := values.get("split.count", 1)) != 1:
        raise ValueError(
            f"{path} is one of {files} files of a model: make them one, with llama-gguf-split "
            "--merge FIRST WHOLE"
        )
    return Header(path, values, tensors)


class _Bytes:
    """Read a file from its beginning up to the largest possible end of the header."""

    def __init__(self, file: BinaryIO, size: int):
        self._file, self._size, self.position = file, min(size, _LARGEST), 0

    def take(self, count: int) -> bytes:
        if count > self._size - self.position:
            raise ValueError(
                f"{count:,} bytes are to follow at {self.position:,}, and the header can have "
                f"{self._size:,}"
            )
        self.position += count
        data = self._file.read(count)
        if len(data) != count:
            raise ValueError("it was cut off while it was read")
        return data

    def number(self, letter: str) -> Any:
        data = self.take(struct.calcsize(f"<{letter}"))
        if letter == "?" and data > b"\1":
            raise ValueError(f"{data[0]} is neither true nor false")
        (value,) = struct.unpack(f"<{letter}", data)
        # the shortest number with this float32: 1e-05, not 9.999999747378752e-06
        return float(str(np.float32(value))) if letter == "f" else value

    def text(self) -> str:
        return self.take(self.number("Q")).decode()

    def value(self) -> Any:
        return self._of(self.number("I"))

    def _of(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise ValueError(f"a value at {self.position:,} is of type {kind}, which there is not")
        kind, count = self.number("I"), self.number("Q")
        if kind == _STRING:
            return [self.text() for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"a list at {self.position:,} is of type {kind}, which there is not")
        dtype = np.dtype(_SCALARS[kind]).newbyteorder("<")
        return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()


def _read(data: _Bytes, size: int) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """Read the values and the tensors; check the tensors against the size of the file."""
    if data.take(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    if (version := data.number("I")) not in (2, 3):
        raise ValueError(f"version {version}, expected 2 or 3, lowest byte first")
    tensors, keys = data.number("Q"), data.number("Q")
    values: dict[str, Any] = {}
    for _ in range(keys):
        if (key := data.text()) in values:
            raise ValueError(f"{key!r} stands twice")
        values[key] = data.value()
    infos = [_info(data) for _ in range(tensors)]
    align = values.get("general.alignment", 32)
    if type(align) is not int or align < 1 or align & (align - 1):
        raise ValueError(f"general.alignment={align!r}, expected a power of two")
    start = end = data.position + -data.position % align
    found: dict[str, TensorInfo] = {}
    for name, kind, shape, offset in infos:
        if name in found:
            raise ValueError(f"a tensor {name!r} stands twice")
        if offset != (expected := end - start + -end % align if found else 0):
            raise ValueError(f"{name!r} begins at {offset:,}, expected {expected:,}")
        found[name] = TensorInfo(kind, shape, start + offset)
        end = start + offset + _bytes(name, kind, shape)
    if not end <= size <= end + -end % align:
        raise ValueError(f"{size:,} bytes, and its tensors end at {end:,}")
    return values, found


def _info(data: _Bytes) -> tuple[str, str, tuple[int, ...], int]:
    """Read the name, the type, the shape and the offset of a tensor."""
    name, axes = data.text(), data.number("I")
    if not 1 <= axes <= _AXES:
        raise ValueError(f"{name!r} has {axes} axes, expected 1 to {_AXES}")
    shape = tuple(data.number("Q") for _ in range(axes))[::-1]
    number = data.number("I")
    if (kind := _kinds().get(number)) is None:
        raise ValueError(
            f"{name!r} is of type {number}, which this version of gguf cannot dequantize: expected "
            f"one of {_kinds()}"
        )
    return name, kind, shape, data.number("Q")


@functools.cache
def _kinds() -> dict[int, str]:
    """Find the types that can be read, by number."""
    found = {}
    for kind in import_gguf().GGMLQuantizationType:
        try:
            if kind.name not in FLOATS:
                dequantize(np.zeros((1, block_of(kind.name)[1]), np.uint8), kind.name)
        except NotImplementedError:
            continue
        found[int(kind)] = kind.name
    return found


def _bytes(name: str, kind: str, shape: tuple[int, ...]) -> int:
    """Compute the size of a tensor in the file."""
    block, size = block_of(kind)
    if shape[-1] % block or not prod(shape):
        raise ValueError(f"{name!r}, {kind} of shape {shape}: expected rows in blocks of {block}")
    return prod(shape) // block * size
