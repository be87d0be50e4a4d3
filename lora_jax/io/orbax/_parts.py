"""Checkpoints of Orbax: parts, each read without the others, beside a record of their leaves."""

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

Place: TypeAlias = Sharding | None  # None: the default device, where JAX may move it from
Places: TypeAlias = Sharding | Callable[[str, tuple[int, ...]], Place] | None


def absolute(path: str | os.PathLike[str]) -> str:
    where = os.fspath(path)
    return where if "://" in where else os.path.abspath(where)


def exists(where: str) -> bool:
    return ocp.Context().file.path_class(where).exists()


def checkpointables(record: Any, parts: Mapping[str, Leaves]) -> dict[str, Any]:
    """All that Orbax is to write: the parts that have arrays, and ``config``."""
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
    said = {"record": record, "leaves": notes}
    written = {part: found for part, found in arrays.items() if found}  # Orbax refuses empty ones
    return written | {"config": said | {"sha256": _sha256(said)}}


def _sha256(said: Any) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def write(path: str | os.PathLike[str], written: dict[str, Any]) -> None:
    where = absolute(path)
    if exists(where):
        raise FileExistsError(f"{where} exists, and is not replaced: choose another path")
    with context():
        ocp.save_checkpointables(where, written)


def context() -> ocp.Context:
    """Orbax's defaults, but ``config`` as JSON: a dict of strings would be a tree to it."""
    context = ocp.Context()
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="config")
    context.checkpointables.registry = registry
    return context


# Reading: the record first, then what is agreed with it, all of it or nothing


def config_of(where: str) -> tuple[Any, dict[str, Any]]:
    """The record, and the notes on the leaves of every part."""
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
    """What Orbax raises is of many kinds, and hides the first error in others."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"{where}: Orbax cannot read {part!r}: it is damaged, or no checkpoint of lora_jax: "
            f"{error}"
        ) from error


def default_place(tree: PyTree) -> Place:
    """A copy on every device of the mesh of the tree's arrays, if they have one."""
    for x in jax.tree.leaves(tree):
        sharding = getattr(x, "sharding", None)
        if isinstance(sharding, NamedSharding):
            return NamedSharding(sharding.mesh, PartitionSpec())
    return None


def placed(notes: Mapping[str, Any], shardings: Places, params: PyTree) -> dict[str, Place]:
    """Where named arrays go."""
    default, places = default_place(params), {}
    for name, (label, kind, *_) in notes.items():
        place = shardings if shardings is not None else default
        if callable(place):
            place = place(label, shape_of(kind))
        places[name] = _fitting(place, kind, label)
    return places


def _fitting(place: Any, kind: str, label: str) -> Place:
    if place is not None and not isinstance(place, Sharding):
        raise TypeError(f"the sharding of {label} is {place!r}, expected a jax.sharding.Sharding")
    try:
        if place is not None:
            place.shard_shape(shape_of(kind))
    except (ValueError, IndexError) as error:
        raise ValueError(
            f"{label} of {kind} cannot have the sharding {place}: "
            f"{_misfit(place, shape_of(kind)) or error}. Give it one of its own, by a function of "
            "name and shape or by the target's leaf, or take a mesh of other sizes"
        ) from error
    return place


def _misfit(place: Place, shape: tuple[int, ...]) -> str | None:
    """Which axis of an array is not divided by which of the mesh, in words."""
    if not isinstance(place, NamedSharding):
        return None
    if len(place.spec) > len(shape):
        return f"it has {len(shape)} axes, and {place.spec} is for {len(place.spec)}"
    for k, (size, axes) in enumerate(zip(shape, place.spec, strict=False)):
        names = (axes,) if isinstance(axes, str) else axes if isinstance(axes, tuple) else ()
        sizes = {name: place.mesh.shape[name] for name in names}
        if size % math.prod(sizes.values()):
            by = " x ".join(f"mesh axis {name!r} of size {n}" for name, n in sizes.items())
            return f"axis {k} of {size} entries is not divided by {by}"
    return None


def agreed(leaves: Leaves, notes: Any, part: str, default: Place, where: str) -> dict[str, Place]:
    """Where the arrays of a target go, once they are found to be those that were saved."""
    if notes is None:
        raise ValueError(f"{where} was saved without {part}")
    places = {}
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
            place = getattr(x, "sharding", None)
            if place is None or (isinstance(x, jax.Array) and not x.committed):
                place = default
            places[name] = _fitting(place, kind, str(label))
    return places


def read(
    where: str,
    notes: Mapping[str, Any],
    places: Mapping[str, Mapping[str, Place]],
    trees: Mapping[str, PyTree] | None = None,
) -> dict[str, dict[str, Any]]:
    """The leaves of parts by name. Their arrays lie flat, or as the names in ``trees``."""
    found = {}
    for part, kept in places.items():
        tree = (trees or {}).get(part) or {name: name for name in kept}
        read = functools.partial(_target, notes[part], kept, where)
        targets, loaded = jax.tree.map(read, tree), None
        if kept:  # one part at a time: where one fails, Orbax forgets to await the others
            with reading(where, part):
                loaded = ocp.load(where, targets, checkpointable_name=part)
        arrays = dict(zip(jax.tree.leaves(tree), jax.tree.leaves(loaded), strict=True))
        found[part] = {
            name: _leaf(note, arrays.get(name), kept.get(name), where)
            for name, note in notes[part].items()
        }
    return found


def _target(notes: Mapping[str, Any], places: Mapping[str, Place], where: str, name: str) -> Any:
    """What tells Orbax to read an array as it was, and where to."""
    (label, kind, known, *_), place = notes[name], places[name]
    is_numpy = kind.startswith("numpy ")
    shape, dtype = spec_of(kind, known)
    if not is_numpy and jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"{where}: {label} is {kind}, which JAX has with jax_enable_x64 only")
    if is_numpy or place is None:
        return np.broadcast_to(np.zeros((), dtype), shape)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)


def _leaf(note: Any, x: Any, place: Place, where: str) -> Any:
    label, kind, known, *impl = note
    if kind in VALUES:
        return known
    if x is None:
        x = np.zeros(*spec_of(kind, known))
    if place is None and not kind.startswith("numpy "):
        x = jnp.asarray(x)  # unlike those of Orbax, JAX may move it to where the others are
    if sum_of(x) != known:
        raise ValueError(f"{where} is damaged: {label} is not what was written")
    return jax.random.wrap_key_data(x, impl=impl[0]) if impl else x
