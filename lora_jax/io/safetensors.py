"""An adapter as one safetensors file, which says all of itself.

The arrays have names such as ``layers_0/query/kernel.a``; the metadata holds the record of the
rest, with a SHA-256 of everything: a file of which one bit has changed is not loaded.
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

    It is written aside and renamed once it is on the disk: a process killed at any point leaves
    what was there before.

    Args:
        path: of the file, in a folder that exists.
        adapter: with a LoraParams, the file also says which base it is of: the names, shapes and
            dtypes of its leaves.
        content: whether to note a checksum of every leaf of the base, which reads all of it.
        about: words of yours, kept in the file's metadata.
        overwrite: whether an existing file may be replaced.

    Raises:
        TypeError: ``adapter`` is of the wrong kind.
        ValueError: it is spread over several processes, or of a base that an initializer changed
            and that is not given.
        OSError: it cannot be written; FileExistsError without ``overwrite``.

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
    tensors = records.to_host(records.arrays_of(adapter))
    metadata = {
        "lora_jax": json.dumps(record, sort_keys=True),
        "about": about,
        "sha256": files.digest(tensors, [record, about]),
    }
    with files.written_aside(path, overwrite=overwrite) as partial:
        files.write_tensors(partial, tensors, metadata)


def load(path: str | os.PathLike[str], params: PyTree | None = None, *, finite: bool = True) -> Any:
    """Read an adapter that :func:`save` wrote.

    Args:
        path: of the file.
        params: the parameters it was trained on, or None.
        finite: whether to refuse values that are not.

    Returns:
        A LoraParams of ``params``; without them the Adapter alone.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, is no adapter, or is one of another model than ``params``.
        UserWarning: ``params`` are of another precision than its base was.
    """
    where = os.fspath(path)
    with files.open_tensors(path) as tensors:
        record, about, expected = _metadata(tensors.metadata, where)
        arrays = dict(tensors)
    if files.digest(arrays, [record, about]) != expected:
        raise ValueError(f"{where} is damaged: its contents are not those that were written")
    records.check_record(record, where)
    adapter = records.adapter_of(record, arrays, where, finite=finite)
    return records.on_base(jax.tree.map(jnp.asarray, adapter), record, params, where)


def about(path: str | os.PathLike[str]) -> str:
    """The words that :func:`save` was given."""
    with files.open_tensors(path) as tensors:
        return _metadata(tensors.metadata, os.fspath(path))[1]


def _metadata(metadata: dict[str, str], where: str) -> tuple[Any, str, str]:
    if metadata.keys() != _KEYS:
        hint = " PEFT's files are folders: lora_jax.io.peft" if "format" in metadata else ""
        raise ValueError(
            f"{where} is no adapter of lora_jax: its metadata has the keys {sorted(metadata)}, "
            f"expected {sorted(_KEYS)}.{hint}"
        )
    record = files.parse_json(metadata["lora_jax"], f"{where}: its record")
    return record, metadata["about"], metadata["sha256"]
