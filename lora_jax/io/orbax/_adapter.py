"""Save and load one adapter as an Orbax checkpoint."""

import os
from collections.abc import Mapping
from typing import Any

from lora_jax._adapter.params import Adapter, LoraParams
from lora_jax._weights.paths import PyTree
from lora_jax.io import _record as records
from lora_jax.io import _state as states
from lora_jax.io._schema import check_record
from lora_jax.io.orbax._leaves import Leaves, by_name, labeled, rebuilt
from lora_jax.io.orbax._parts import (
    Shardings,
    absolute,
    agreed,
    checkpointables,
    config_of,
    default_sharding,
    read,
    shardings_of,
    write,
)


def save(
    path: str | os.PathLike[str],
    adapter: Adapter | LoraParams,
    *,
    state: PyTree = None,
    content: bool = False,
) -> None:
    """Write an adapter as a new Orbax checkpoint.

    Orbax writes under another name and renames: a process killed at any point leaves no checkpoint
    or a complete one. An existing checkpoint is never replaced, since Orbax would delete it first.

    Args:
        path: of the checkpoint, a directory that does not exist.
        adapter: an Adapter or a LoraParams. With a LoraParams, the base is recorded as well: the
            names, shapes and dtypes of its parameters.
        state: what else the model has after training, as in ``safetensors.save``.
        content: whether to record a checksum of every leaf of the base, which reads all of it.

    Raises:
        TypeError: ``adapter`` or a leaf of ``state`` is of the wrong kind.
        ValueError: an initializer changed the base of the adapter, and the base is not passed; or
            ``state`` has parameters of the base.
        FileExistsError: ``path`` exists.

    Example:
        >>> import jax.numpy as jnp, lora_jax, tempfile
        >>> from lora_jax.io import orbax
        >>> params = {"query": {"kernel": jnp.ones((3, 2))}}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     orbax.save(f"{folder}/adapter", lora_jax.lorafy(params, rank=1))
        ...     list(orbax.load(f"{folder}/adapter", params).adapter.factors)
        ['query/kernel']
    """
    adapter, base = records.parts_of(adapter, "orbax.save")
    leaves = states.leaves_of(state, base, "orbax.save")
    write_adapter(path, adapter, records.record_of(adapter, base, leaves, content=content), leaves)


def write_adapter(
    path: str | os.PathLike[str], adapter: Adapter, record: Any, state: Mapping[str, Any]
) -> None:
    """Write an adapter beside its record, and the leaves of a state."""
    leaves = {"adapter": by_name(records.arrays_of(adapter))}
    leaves |= {"state": by_name(state)} if state else {}
    write(path, checkpointables(record, leaves))


def load(
    path: str | os.PathLike[str],
    params: PyTree | None = None,
    *,
    state: PyTree = None,
    shardings: Shardings = None,
    finite: bool = True,
) -> Any:
    """Read the adapter that :func:`save` wrote, or that of a step of a :class:`Checkpointer`.

    Args:
        path: of the checkpoint; ``directory/step`` for a step.
        params: the parameters that the adapter was trained on, or None.
        state: a tree like the saved state, as in ``safetensors.load``.
        shardings: where the arrays go: one sharding for all, or a function of an array's name,
            such as ``layers_0/query/kernel.a``, and its shape. None replicates the arrays on the
            mesh of ``params``, or puts them on the default device if there is no mesh.
        finite: whether to reject values that are not finite in the adapter.

    Returns:
        A LoraParams of ``params``; without them, the Adapter alone. With ``state``, a pair of that
        and the state.

    Raises:
        FileNotFoundError: there is no checkpoint at ``path``.
        ValueError: the checkpoint is damaged, is no adapter, or belongs to another model than
            ``params`` or ``state``; or a sharding does not fit.
        UserWarning: the base had another precision than ``params``.
    """
    where = absolute(path)
    targets = {} if state is None else {"state": by_name(states.arrays_of(state, where))}
    adapter, record, found = read_adapter(where, params, targets, shardings, finite=finite)
    lora_params = records.on_base(adapter, record, params, where)
    if state is None:
        states.check_asked(record, where)
        return lora_params
    return lora_params, rebuilt(state, found["state"])


def read_adapter(
    where: str,
    params: PyTree | None,
    targets: Mapping[str, Leaves],
    shardings: Shardings,
    *,
    finite: bool,
) -> tuple[Adapter, Any, dict[str, dict[str, Any]]]:
    """Read an adapter, its record, and the parts that agree with targets."""
    record, notes = config_of(where)
    check_record(record, where)
    wanted = {"adapter": shardings_of(notes["adapter"], shardings, params)}
    if "state" in targets:
        states.check_agrees(dict(targets["state"].values()), record, where)
    for part, leaves in targets.items():
        wanted[part] = agreed(leaves, notes.get(part), part, default_sharding(params), where)
    found = read(where, notes, wanted)
    arrays = labeled(notes["adapter"], found["adapter"])
    return records.adapter_of(record, arrays, where, finite=finite), record, found


def read_state(where: str) -> dict[str, Any]:
    """Read the leaves of the state in a checkpoint by path; none if it has no state."""
    notes = config_of(where)[1]
    if "state" not in notes:
        return {}
    found = read(where, notes, {"state": shardings_of(notes["state"], None, None)})
    return labeled(notes["state"], found["state"])
