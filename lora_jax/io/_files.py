"""Write files and folders completely or not at all, and read them strictly."""

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Collection, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy

LARGEST_JSON = 64 * 2**20  # bytes, far more than any configuration or index has
_FLOAT8 = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD, RENAME_EXCHANGE


@contextlib.contextmanager
def written_aside(
    path: str | os.PathLike[str], *, overwrite: bool, owns: Collection[str] = ()
) -> Iterator[Path]:
    """Give a name to write a file or a folder under; it becomes ``path`` once all is on the disk.

    Whatever happens, ``path`` is the old version or the new one. A killed process leaves
    ``.NAME.*.partial``, which is never read.

    Args:
        path: of a file or a folder, whose parent exists.
        overwrite: whether ``path`` may exist.
        owns: the names that a folder may contain when it is overwritten.

    Raises:
        FileExistsError: ``path`` exists, or contains other files.
        FileNotFoundError: its folder does not exist.
        OSError: ``path`` cannot be written.
    """
    path = Path(path).absolute()
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent} to write in: make it")
    if os.path.lexists(path):
        if not overwrite:
            raise FileExistsError(f"{path} exists: pass overwrite=True, or another path")
        if path.is_dir() and (foreign := sorted(set(os.listdir(path)) - set(owns))):
            raise FileExistsError(
                f"{path} holds {', '.join(foreign[:5])}, which would be lost: choose another folder"
            )
    partial = path.parent / f".{path.name}.{secrets.token_hex(4)}.partial"
    try:
        yield partial
        for file in [*partial.rglob("*"), partial]:
            _flush(file)
        _put(partial, path, overwrite)
        _flush(path.parent)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put(partial: Path, path: Path, overwrite: bool) -> None:
    """Rename in one step, whether or not ``path`` exists."""
    if not os.path.lexists(path):
        os.rename(partial, path)
    elif not overwrite:
        raise FileExistsError(f"{path} was made by somebody else meanwhile")
    elif partial.is_dir() != path.is_dir() or path.is_symlink():
        raise FileExistsError(f"{path} is of another kind than what is saved there")
    elif not partial.is_dir():
        os.replace(partial, path)
    else:
        _exchange(partial, path)


def _exchange(one: Path, other: Path) -> None:
    """Exchange two folders in one step; a rename cannot replace a folder."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        code = errno.ENOSYS
    elif libc.renameat2(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return
    else:
        code = ctypes.get_errno()
    raise OSError(
        code,
        f"{os.strerror(code)}: this system cannot exchange two folders in one step, so that "
        f"{other} might be lost halfway: save to a new folder instead",
    )


def write_json(path: Path, value: Any) -> None:
    """Write JSON as PEFT does: sorted, indented by two spaces."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not JSON, contains a key twice, or is far too large.
    """
    if (size := path.stat().st_size) > LARGEST_JSON:
        raise ValueError(f"{path}: {size:,} bytes, expected at most {LARGEST_JSON:,}")
    return parse_json(path.read_bytes(), str(path))


def parse_json(text: str | bytes, where: str) -> Any:
    """Parse a JSON text; ``where`` names its place in errors."""

    def unique(pairs):
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key stands twice in one object")
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from None


def write_tensors(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file.

    Raises:
        OSError: the file cannot be written.
    """
    arrays = {name: np.asarray(x, order="C") for name, x in tensors.items()}
    try:
        safetensors.numpy.save_file(arrays, path, metadata=dict(metadata))
        path.chmod(0o666 & ~_umask())  # the library makes it readable by its owner alone
    except safetensors.SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


class ArrayFile(Mapping[str, np.ndarray]):
    """Map names to the arrays of an open safetensors file, each read when it is asked for.

    Attributes:
        path: of the file.
        metadata: the file's strings.
        shapes: of the arrays.
    """

    def __init__(self, path: Path, file: Any):
        self.path, self._file = path, file
        with reading(path):
            self.metadata: dict[str, str] = dict(file.metadata() or {})
            self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}

    def __getitem__(self, name: str) -> np.ndarray:
        """Read an array into memory of its own, which outlives the file."""
        if name not in self.shapes:
            raise KeyError(name)
        with reading(self.path):
            kind = self._file.get_slice(name).get_dtype()
            if kind in _FLOAT8:  # which the library knows in frameworks other than NumPy only
                return _read_float8(self.path, name, self.shapes[name], _FLOAT8[kind])
            if kind.startswith(("F4", "F6_", "F8_")):
                raise ValueError(f"{self.path}: {name!r} is of type {kind}, which NumPy has not")
            return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _read_float8(path: Path, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    with path.open("rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        start, _ = json.loads(raw.read(length))[name]["data_offsets"]
        raw.seek(8 + length + start)
        return np.frombuffer(raw.read(prod(shape)), dtype).reshape(shape).copy()


@contextlib.contextmanager
def open_tensors(path: str | os.PathLike[str]) -> Iterator[ArrayFile]:
    """Open a safetensors file, mapped into memory.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is no safetensors file, is cut off, or has arrays of types that NumPy
            has not.
    """
    path = Path(path)
    with path.open("rb"):  # raises the system's own errors
        pass
    with reading(path):
        file = safetensors.safe_open(path, framework="np")
    with file:
        yield ArrayFile(path, file)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn errors of the library into ours."""
    try:
        yield
    except (safetensors.SafetensorError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{path} is no complete safetensors file: {error}") from error


def digest(tensors: Mapping[str, Any], record: Any) -> str:
    """Compute a SHA-256 of a record and of arrays: names, dtypes, shapes and every bit."""
    total = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    for name in sorted(tensors):
        x = np.asarray(tensors[name], order="C")
        total.update(f"\n{name} {x.dtype} {x.shape}\n".encode())
        total.update(x.reshape(-1).view(np.uint8).data)
    return total.hexdigest()
