"""Save and load plain parameters as an Orbax checkpoint."""

import os
from typing import Any

from lora_jax._weights.paths import PyTree, not_parameters
from lora_jax.io.orbax._leaves import by_number, has_entries, kind_of, own_tree, rebuilt
from lora_jax.io.orbax._parts import (
    absolute,
    agreed,
    checkpointables,
    config_of,
    default_sharding,
    read,
    write,
)


def save_params(path: str | os.PathLike[str], params: PyTree) -> None:
    """Write parameters, such as ``merge`` returns, as a new Orbax checkpoint.

    The parameters are the checkpointable ``params``, in their own tree: Orbax's
    ``ocp.load(path, like)`` reads them too. If keys contain dots, which Orbax confuses with nested
    keys, the tree is nested dicts instead, with ``%2E`` for ``.`` and ``%25`` for ``%``. Typed PRNG
    keys are written as their data.

    Args:
        path: of the checkpoint, a directory that does not exist.
        params: a tree of arrays.

    Raises:
        TypeError: a leaf is no array, or has size zero, which Orbax does not write.
        FileExistsError: ``path`` exists.

    Example:
        >>> import jax.numpy as jnp, tempfile
        >>> from lora_jax.io import orbax
        >>> params = {"a.b": jnp.zeros(2), "a": {"b": jnp.ones(2)}}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     orbax.save_params(f"{folder}/merged", params)
        ...     orbax.load_params(f"{folder}/merged", params)["a"]["b"]
        Array([1., 1.], dtype=float32)
    """
    leaves = by_number(params, "params")
    if not leaves:
        raise TypeError(f"save_params: params={params!r} has no arrays")
    for label, x in leaves.values():
        if not has_entries(kind_of(x, label)):
            found = f"an array of shape {x.shape}" if hasattr(x, "shape") else type(x).__name__
            raise TypeError(f"save_params: {label} is {found}, expected an array with entries")
    record: dict[str, Any] = {"format": "lora_jax params", "version": 1}
    if others := not_parameters(params):
        record["others"] = others
    written = checkpointables(record, {"params": leaves})
    write(path, written | {"params": own_tree(params, written.get("params", {}))})


def load_params(path: str | os.PathLike[str], like: PyTree) -> PyTree:
    """Read parameters that :func:`save_params` wrote.

    Args:
        path: of the checkpoint.
        like: a tree of arrays or ``jax.ShapeDtypeStruct``s with the same structure, shapes and
            dtypes. Each array gets the sharding of its leaf here. A leaf without one is replicated
            on the mesh of the others, or put on the default device if there is no mesh.

    Returns:
        The parameters.

    Raises:
        FileNotFoundError: there is no checkpoint at ``path``.
        ValueError: the checkpoint is damaged, contains something else, or has another structure,
            other shapes or other dtypes than ``like``; or a sharding does not fit.
    """
    where = absolute(path)
    _, notes = config_of(where)
    leaves = by_number(like, "params")
    targets = agreed(leaves, notes.get("params"), "params", default_sharding(like), where)
    names = own_tree(like, {name: name for name in targets})
    found = read(where, notes, {"params": targets}, {"params": names})
    return rebuilt(like, found["params"])
