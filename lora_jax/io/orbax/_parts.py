"""Write and read the parts of a checkpoint, each by itself, beside a record of their leaves."""

import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from orbax.checkpoint import v1 as ocp

from lora_jax._weights.paths import PyTree
from lora_jax.io.orbax._leaves import (
    VALUES,
    Leaves,
    has_entries,
    kind_of,
    known_of,
    shape_of,
    spec_of,
    stored,
    sum_of,
)

# None: uncommitted, on the default device.
Shardings: TypeAlias = Sharding | Callable[[str, tuple[int, ...]], Sharding | None] | None


def absolute(path: str | os.PathLike[str]) -> str:
    """Make a path absolute; a URL is kept."""
    where = os.fspath(path)
    return where if "://" in where else os.path.abspath(where)


def exists(where: str) -> bool:
    """Return whether there is a file or a directory, on any storage that Orbax knows."""
    return ocp.Context().file.path_class(where).exists()


def checkpointables(record: Any, parts: Mapping[str, Leaves]) -> dict[str, Any]:
    """Collect what Orbax writes: the parts that have arrays, and ``config``."""
    notes: dict[str, Any] = {}
    arrays: dict[str, Any] = {}
    for part, leaves in parts.items():
        kinds = {name: kind_of(x, label) for name, (label, x) in leaves.items()}
        kept = {name: x for name, (_, x) in leaves.items() if has_entries(kinds[name])}
        arrays[part] = {name: stored(x) for name, x in kept.items()}
        notes[part] = {
            name: [label, kinds[name], *(known_of(x) if kinds[name] not in VALUES else [x])]
            for name, (label, x) in leaves.items()
        }
    config = {"record": record, "leaves": notes}
    written = {part: found for part, found in arrays.items() if found}  # Orbax refuses empty ones
    return written | {"config": config | {"sha256": _sha256(config)}}


def _sha256(config: Any) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def write(path: str | os.PathLike[str], written: dict[str, Any]) -> None:
    """Write a checkpoint that does not exist yet."""
    where = absolute(path)
    if exists(where):
        raise FileExistsError(f"{where} exists, and is not replaced: choose another path")
    with context():
        ocp.save_checkpointables(where, written)


def context() -> ocp.Context:
    """Make Orbax write ``config`` as JSON: it takes a dict of strings for a tree."""
    context = ocp.Context()
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="config")
    context.checkpointables.registry = registry
    return context


# Reading: first the record, then what agrees with it


def config_of(where: str) -> tuple[Any, dict[str, Any]]:
    """Read the record, and the notes on the leaves of every part."""
    if not exists(where):
        raise FileNotFoundError(f"{where}: there is no checkpoint")
    with reading(where, "config"):
        config = ocp.load_checkpointables(where, {"config": None})["config"]
    if not isinstance(config, dict) or config.keys() != {"record", "leaves", "sha256"}:
        raise ValueError(f"{where} is no checkpoint of lora_jax, or it is damaged: see its config")
    if _sha256({"record": config["record"], "leaves": config["leaves"]}) != config["sha256"]:
        raise ValueError(f"{where} is damaged: its config is not what was written")
    return config["record"], config["leaves"]


@contextlib.contextmanager
def reading(where: str, part: str) -> Iterator[None]:
    """Turn Orbax's errors, which are of many kinds, into one."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"{where}: Orbax cannot read {part!r}: it is damaged, or no checkpoint of lora_jax: "
            f"{error}"
        ) from error


def default_sharding(tree: PyTree) -> Sharding | None:
    """Return the replicated sharding on the mesh of the tree's arrays, if there is a mesh."""
    for x in jax.tree.leaves(tree):
        sharding = getattr(x, "sharding", None)
        if isinstance(sharding, NamedSharding):
            return NamedSharding(sharding.mesh, PartitionSpec())
    return None


def shardings_of(
    notes: Mapping[str, Any], shardings: Shardings, params: PyTree
) -> dict[str, Sharding | None]:
    """Find the sharding of every array that the notes describe."""
    default, found = default_sharding(params), {}
    for name, (label, kind, *_) in notes.items():
        sharding = shardings if shardings is not None else default
        if callable(sharding):
            sharding = sharding(label, shape_of(kind))
        found[name] = _fitting(sharding, kind, label)
    return found


def _fitting(sharding: Any, kind: str, label: str) -> Sharding | None:
    """Return the sharding of an array once it fits."""
    if sharding is not None and not isinstance(sharding, Sharding):
        raise TypeError(
            f"the sharding of {label} is {sharding!r}, expected a jax.sharding.Sharding"
        )
    try:
        if sharding is not None:
            sharding.shard_shape(shape_of(kind))
    except (ValueError, IndexError) as error:
        raise ValueError(
            f"{label} of {kind} cannot have the sharding {sharding}: "
            f"{_misfit(sharding, shape_of(kind)) or error}. Give it one of its own, by a function "
            "of name and shape or by the target's leaf, or take a mesh of other sizes"
        ) from error
    return sharding


def _misfit(sharding: Sharding | None, shape: tuple[int, ...]) -> str | None:
    """Say which axis of an array is not divided by which axis of the mesh."""
    if not isinstance(sharding, NamedSharding):
        return None
    if len(sharding.spec) > len(shape):
        return f"it has {len(shape)} axes, and {sharding.spec} is for {len(sharding.spec)}"
    for k, (size, axes) in enumerate(zip(shape, sharding.spec, strict=False)):
        names = (axes,) if isinstance(axes, str) else axes if isinstance(axes, tuple) else ()
        sizes = {name: sharding.mesh.shape[name] for name in names}
        if size % math.prod(sizes.values()):
            by = " x ".join(f"mesh axis {name!r} of size {n}" for name, n in sizes.items())
            return f"axis {k} of {size} entries is not divided by {by}"
    return None


def agreed(
    leaves: Leaves, notes: Any, part: str, default: Sharding | None, where: str
) -> dict[str, Sharding | None]:
    """Find the shardings of the arrays of a target, once it agrees with what was saved."""
    if notes is None:
        raise ValueError(f"{where} was saved without {part}")
    found = {}
    saved = [(label, kind) for label, kind, *_ in notes.values()]
    for had, (name, leaf) in itertools.zip_longest(saved, leaves.items(), fillvalue=(None, None)):
        label, x = leaf or (None, None)
        if had[0] != label:
            raise ValueError(
                f"{where}: {part} has another structure: {had[0] or 'nothing'} was saved where "
                f"{label or 'nothing'} is given. Give a tree like the one that was saved"
            )
        if had[1] != (kind := kind_of(x, str(label))):
            raise ValueError(f"{where}: {label} was saved as {had[1]}, and {kind} is given")
        if has_entries(kind):
            sharding = getattr(x, "sharding", None)
            if sharding is None or (isinstance(x, jax.Array) and not x.committed):
                sharding = default
            found[name] = _fitting(sharding, kind, str(label))
    return found


def read(
    where: str,
    notes: Mapping[str, Any],
    shardings: Mapping[str, Mapping[str, Sharding | None]],
    trees: Mapping[str, PyTree] | None = None,
) -> dict[str, dict[str, Any]]:
    """Read the leaves of parts by name; their arrays lie flat, or as the names in ``trees``."""
    found = {}
    for part, kept in shardings.items():
        tree = (trees or {}).get(part) or {name: name for name in kept}
        target = functools.partial(_target, notes[part], kept, where)
        targets, loaded = jax.tree.map(target, tree), None
        if kept:  # one part at a time: where one fails, Orbax forgets to await the others
            with reading(where, part):
                loaded = ocp.load(where, targets, checkpointable_name=part)
        arrays = dict(zip(jax.tree.leaves(tree), jax.tree.leaves(loaded), strict=True))
        found[part] = {
            name: _leaf(note, arrays.get(name), kept.get(name), where)
            for name, note in notes[part].items()
        }
    return found


def _target(
    notes: Mapping[str, Any], shardings: Mapping[str, Sharding | None], where: str, name: str
) -> Any:
    """Make what tells Orbax to read an array as it was, and where to put it."""
    (label, kind, known, *_), sharding = notes[name], shardings[name]
    is_numpy = kind.startswith("numpy ")
    shape, dtype = spec_of(kind, known)
    if not is_numpy and jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"{where}: {label} is {kind}, which JAX has with jax_enable_x64 only")
    if is_numpy or sharding is None:
        return np.broadcast_to(np.zeros((), dtype), shape)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _leaf(note: Any, x: Any, sharding: Sharding | None, where: str) -> Any:
    """Make a leaf of what Orbax read, and compare its checksum."""
    label, kind, known, *impl = note
    if kind in VALUES:
        return known
    if x is None:
        x = np.zeros(*spec_of(kind, known))
    if sharding is None and not kind.startswith("numpy "):
        x = jnp.asarray(x)  # uncommitted, unlike those of Orbax
    if sum_of(x) != known:
        raise ValueError(f"{where} is damaged: {label} is not what was written")
    return jax.random.wrap_key_data(x, impl=impl[0]) if impl else x
