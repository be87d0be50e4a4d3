"""Plain parameters as an Orbax checkpoint."""

import os

from lora_jax._weights.paths import PyTree
from lora_jax.io.orbax._leaves import by_number, has_entries, kind_of, own_tree, rebuilt
from lora_jax.io.orbax._parts import (
    absolute,
    agreed,
    checkpointables,
    config_of,
    default_place,
    read,
    write,
)


def save_params(path: str | os.PathLike[str], params: PyTree) -> None:
    """Write parameters, such as ``merge`` returns, as a new Orbax checkpoint.

    They are the checkpointable ``params``, in their own tree: ``ocp.load(path, like)`` of Orbax
    reads them too. Only where keys contain dots, which Orbax confuses with nested ones, is it
    nested dicts instead, with ``%2E`` for ``.`` and ``%25`` for ``%``. Typed PRNG keys are
    written as their data.

    Args:
        path: of the checkpoint, a directory that does not exist.
        params: a tree of arrays.

    Raises:
        TypeError: a leaf is no array, or has size zero, which Orbax does not write.
        FileExistsError: there is something at ``path``.

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
            what = f"an array of shape {x.shape}" if hasattr(x, "shape") else type(x).__name__
            raise TypeError(f"save_params: {label} is {what}, expected an array with entries")
    written = checkpointables({"format": "lora_jax params", "version": 1}, {"params": leaves})
    write(path, written | {"params": own_tree(params, written.get("params", {}))})


def load_params(path: str | os.PathLike[str], like: PyTree) -> PyTree:
    """Read parameters that :func:`save_params` wrote.

    Args:
        path: of the checkpoint.
        like: a tree of the same structure, shapes and dtypes, of arrays or of
            ``jax.ShapeDtypeStruct``s. Each array comes back with the sharding of the one given
            here; where that has none, a copy on every device of the mesh of the others, or on the
            default device if there is no mesh.

    Returns:
        The parameters.

    Raises:
        FileNotFoundError: there is no checkpoint at ``path``.
        ValueError: it is damaged, is one of something else, or not of the structure, shapes and
            dtypes of ``like``; or a sharding does not fit.
    """
    where = absolute(path)
    _, notes = config_of(where)
    leaves = by_number(like, "params")
    places = agreed(leaves, notes.get("params"), "params", default_place(like), where)
    names = own_tree(like, {name: name for name in places})
    found = read(where, notes, {"params": places}, {"params": names})
    return rebuilt(like, found["params"])
