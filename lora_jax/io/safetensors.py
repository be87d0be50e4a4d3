"""Save and load an adapter as one safetensors file that contains everything.

The arrays have names such as ``layers_0/query/kernel.a``. The metadata contains the record of the
rest, and a SHA-256 of everything: a file with one changed bit is not loaded.
"""

import json
import os
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax._adapter.params import Adapter, LoraParams
from lora_jax._weights.paths import PyTree
from lora_jax.io import _files as files
from lora_jax.io import _record as records

__all__ = ["about", "load", "save"]

_KEYS = {"lora_jax", "sha256", "about"}


def save(
    path: str | os.PathLike[str],
    adapter: Adapter | LoraParams,
    *,
    content: bool = False,
    about: str = "",
    overwrite: bool = False,
) -> None:
    """Write an adapter as one file.

    The file is written under another name and renamed once it is on the disk: a process killed at
    any point leaves what was there before.

    Args:
        path: of the file, in an existing folder.
        adapter: an Adapter or a LoraParams. With a LoraParams, the file also records its base: the
            names, shapes and dtypes of the leaves.
        content: whether to record a checksum of every leaf of the base, which reads all of it.
        about: a text of your own, kept in the file's metadata.
        overwrite: whether an existing file may be replaced.

    Raises:
        TypeError: ``adapter`` is of the wrong kind.
        ValueError: the adapter is spread over several processes; or an initializer changed its
            base, and the base is not passed.
        OSError: the file cannot be written; FileExistsError without ``overwrite``.

    Example:
        >>> import jax.numpy as jnp, lora_jax, tempfile
        >>> from lora_jax.io import safetensors
        >>> params = {"query": {"kernel": jnp.ones((3, 2))}}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     safetensors.save(f"{folder}/a.safetensors", lora_jax.lorafy(params, rank=1))
        ...     list(safetensors.load(f"{folder}/a.safetensors", params).adapter.factors)
        ['query/kernel']
    """
    adapter, base = records.parts_of(adapter, "safetensors.save")
    record = records.record_of(adapter, base, content=content)
    write(path, adapter, record, about=about, overwrite=overwrite)


def load(path: str | os.PathLike[str], params: PyTree | None = None, *, finite: bool = True) -> Any:
    """Read an adapter that :func:`save` wrote.

    Args:
        path: of the file.
        params: the parameters that the adapter was trained on, or None.
        finite: whether to reject values that are not finite.

    Returns:
        A LoraParams of ``params``; without them, the Adapter alone.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is damaged, is no adapter, or belongs to another model than ``params``.
        UserWarning: the base had another precision than ``params``.
    """
    adapter, record = read(path, finite=finite)
    return records.on_base(adapter, record, params, os.fspath(path))


def about(path: str | os.PathLike[str]) -> str:
    """Read the text that :func:`save` was given."""
    with files.open_tensors(path) as tensors:
        return _metadata(tensors.metadata, os.fspath(path))[1]


def write(
    path: str | os.PathLike[str],
    adapter: Adapter,
    record: Any,
    *,
    about: str = "",
    overwrite: bool = False,
) -> None:
    """Write an adapter beside its record."""
    tensors = records.to_host(records.arrays_of(adapter))
    metadata = {
        "lora_jax": json.dumps(record, sort_keys=True),
        "about": about,
        "sha256": files.digest(tensors, [record, about]),
    }
    with files.written_aside(path, overwrite=overwrite) as partial:
        files.write_tensors(partial, tensors, metadata)


def read(path: str | os.PathLike[str], *, finite: bool = True) -> tuple[Adapter, Any]:
    """Read an adapter and its record."""
    where = os.fspath(path)
    with files.open_tensors(path) as tensors:
        record, about, expected = _metadata(tensors.metadata, where)
        arrays = dict(tensors)
    if files.digest(arrays, [record, about]) != expected:
        raise ValueError(f"{where} is damaged: its contents are not those that were written")
    records.check_record(record, where)
    adapter = records.adapter_of(record, arrays, where, finite=finite)
    return jax.tree.map(jnp.asarray, adapter), record


def _metadata(metadata: dict[str, str], where: str) -> tuple[Any, str, str]:
    """Return the record, the text of the user, and the digest."""
    if metadata.keys() != _KEYS:
        hint = " PEFT's files are folders: lora_jax.io.peft" if "format" in metadata else ""
        raise ValueError(
            f"{where} is no adapter of lora_jax: its metadata has the keys {sorted(metadata)}, "
            f"expected {sorted(_KEYS)}.{hint}"
        )
    record = files.parse_json(metadata["lora_jax"], f"{where}: its record")
    return record, metadata["about"], metadata["sha256"]
