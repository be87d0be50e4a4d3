"""Save and load an adapter as one safetensors file that contains everything.

The arrays have names such as ``layers_0/query/kernel.a``. The metadata contains the record of the
rest, and a SHA-256 of everything: a file with one changed bit is not loaded.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax._adapter.params import Adapter, LoraParams
from lora_jax._weights.paths import PyTree
from lora_jax.io import _files as files
from lora_jax.io import _record as records
from lora_jax.io import _state as states
from lora_jax.io._schema import check_record

__all__ = ["about", "load", "save"]

_KEYS = {"lora_jax", "sha256", "about"}
_STATE = ".state"  # ends the names of a state's arrays


def save(
    path: str | os.PathLike[str],
    adapter: Adapter | LoraParams,
    *,
    state: PyTree = None,
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
            names, shapes and dtypes of the parameters.
        state: what else the model has after training, as a tree of arrays: running statistics, PRNG
            keys, counters; ``nnx.state(model, nnx.Not(nnx.Param))``, or Linen's variables without
            ``params``. None saves nothing of it, and warns if the base has any; ``{}`` does not.
        content: whether to record a checksum of every leaf of the base, which reads all of it.
        about: a text of your own, kept in the file's metadata.
        overwrite: whether an existing file may be replaced.

    Raises:
        TypeError: ``adapter`` or a leaf of ``state`` is of the wrong kind.
        ValueError: the adapter is spread over several processes; an initializer changed its
            base, and the base is not passed; or ``state`` has parameters of the base.
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
    leaves = states.leaves_of(state, base, "safetensors.save")
    record = records.record_of(adapter, base, leaves, content=content)
    write(path, adapter, record, leaves, about=about, overwrite=overwrite)


def load(
    path: str | os.PathLike[str],
    params: PyTree | None = None,
    *,
    state: PyTree = None,
    finite: bool = True,
) -> Any:
    """Read an adapter that :func:`save` wrote.

    Args:
        path: of the file.
        params: the parameters that the adapter was trained on, or None.
        state: a tree like the saved state, of arrays or ``jax.ShapeDtypeStruct``s; each leaf gets
            the sharding of its leaf here. None reads none, and warns if the file has any.
        finite: whether to reject values that are not finite in the adapter.

    Returns:
        A LoraParams of ``params``; without them, the Adapter alone. With ``state``, a pair of that
        and the state.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is damaged, is no adapter, or belongs to another model than ``params``
            or ``state``.
        UserWarning: the base had another precision than ``params``.
    """
    adapter, record, leaves = read(path, finite=finite)
    where = os.fspath(path)
    found = records.on_base(adapter, record, params, where)
    if state is None:
        states.check_asked(record, where)
        return found
    return found, states.rebuilt(state, record, leaves, where)


def about(path: str | os.PathLike[str]) -> str:
    """Read the text that :func:`save` was given."""
    with files.open_tensors(path) as tensors:
        return _metadata(tensors.metadata, os.fspath(path))[1]


def write(
    path: str | os.PathLike[str],
    adapter: Adapter,
    record: Any,
    state: Mapping[str, Any],
    *,
    about: str = "",
    overwrite: bool = False,
) -> None:
    """Write an adapter beside its record, and the leaves of a state."""
    arrays = records.arrays_of(adapter)
    arrays |= {f"{path}{_STATE}": states.data_of(x) for path, x in state.items()}
    tensors = records.to_host(arrays)
    metadata = {
        "lora_jax": json.dumps(record, sort_keys=True),
        "about": about,
        "sha256": files.digest(tensors, [record, about]),
    }
    with files.written_aside(path, overwrite=overwrite) as partial:
        files.write_tensors(partial, tensors, metadata)


def read(
    path: str | os.PathLike[str], *, finite: bool = True
) -> tuple[Adapter, Any, dict[str, Any]]:
    """Read an adapter, its record, and the leaves of the state by path."""
    where = os.fspath(path)
    with files.open_tensors(path) as tensors:
        record, about, expected = _metadata(tensors.metadata, where)
        arrays = dict(tensors)
    if files.digest(arrays, [record, about]) != expected:
        raise ValueError(f"{where} is damaged: its contents are not those that were written")
    check_record(record, where)
    state = {}
    for path, note in record.get("state", {}).items():
        if (name := f"{path}{_STATE}") not in arrays:
            raise ValueError(f"{where} is damaged: it has no array {name!r}")
        state[path] = states.typed(arrays.pop(name), note)
    adapter = records.adapter_of(record, arrays, where, finite=finite)
    return jax.tree.map(jnp.asarray, adapter), record, state


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
