"""The leaves of the model that an adapter is for, as far as they are known."""

import functools
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import jax.numpy as jnp
import numpy as np

from lora_jax._adapter.factors import Rows
from lora_jax._adapter.params import Adapter
from lora_jax._weights.ranges import split_range
from lora_jax.cli._read.forms import AdapterFile, Checkpoint
from lora_jax.cli._read.path import open_path
from lora_jax.io._fit import fitted
from lora_jax.io._kinds import from_torch
from lora_jax.io._tensor import Tensor
from lora_jax.io._torch import Names, as_name, as_path, module_path
from lora_jax.io.hf._quantized import check_plain
from lora_jax.io.hf._source import Source, open_source
from lora_jax.io.hf._ties import Ties
from lora_jax.io.peft import _config as configs
from lora_jax.io.peft._own import is_new_head
from lora_jax.io.peft._save import places_of


class UnknownBaseError(ValueError):
    """An adapter does not tell what its base is like, and that matters."""


class Absent(Tensor):
    """A leaf whose path, shape and dtype are known, but not its entries."""

    def __init__(self, path: str, shape: tuple[int, ...], dtype: Any):
        super().__init__(shape, dtype, functools.partial(_needed, path))


def _needed(path: str) -> NoReturn:
    folder = "" if path.rpartition("/")[2] in ("kernel", "embedding") else "the model's folder or "
    raise UnknownBaseError(
        f"this needs what is in the base's {path!r}: pass --like, {folder}an Orbax checkpoint of "
        "its parameters"
    )


def leaves_like(path: str) -> dict[str, Any]:
    """Return the leaves of a model, or of the base that an adapter has recorded.

    Raises:
        ValueError: the adapter has no record of its base.
    """
    found = open_path(path)
    if isinstance(found, Checkpoint):
        return leaves_of(found)
    if (recorded := recorded_leaves(found)) is None:
        raise ValueError(
            f"--like {path}: it is an adapter without a record of its base; expected a model, or "
            "an adapter of lora_jax that was saved as a LoraParams"
        )
    return recorded


def leaves_of(model: Checkpoint) -> dict[str, Any]:
    """Return the tensors of a model by paths.

    Raises:
        ValueError: the model is quantized.
    """
    if model.format == "orbax":
        return dict(model.tensors)
    check_plain(source_of(model))
    return {as_path(name): tensor for name, tensor in model.tensors.items()}


def fitted_leaves(
    leaves: Mapping[str, Any], keys: Iterable[str], source: Source, full: Mapping[str, Any]
) -> dict[str, Any]:
    """Name the leaves of a model's files as an adapter does, which may have another prefix.

    A tied head that the files leave out is a leaf if it has an entry of its own among the ``keys``,
    and so is a new head among the ``full`` leaves.
    """
    leaves = {**new_heads(full), **leaves}
    wanted = {as_name(module_path(as_path(split_range(key)[0]))[0]) for key in keys}
    heads = Ties.of(source).missing(source.tensors)
    own = {as_path(name): x for name, x in heads.items() if name.removesuffix(".weight") in wanted}
    leaves = {**leaves, **own}
    modules = {path: module_path(path, leaves)[0] for path in leaves}
    names = fitted(sorted(wanted), [as_name(x) for x in modules.values()], source.where)
    return {
        as_path(names[as_name(module)]) + path.removeprefix(module): leaves[path]
        for path, module in modules.items()
    }


def new_heads(full: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the full leaves that may be of a head which the model lacks, by path."""
    found = {as_path(key): np.asarray(x) for key, x in full.items()}
    return {
        path: Tensor(x.shape, x.dtype, lambda x=x: x)
        for path, x in found.items()
        if is_new_head(as_name(path.rpartition("/")[0]))
    }


def full_names(source: Source) -> Names:
    """Return the names that modules have beside a head, if the files lack its prefix."""
    ties, end = Ties.of(source), ".weight"
    if not (ties.groups and ties.prefix):
        return None

    def named(path: str) -> str:
        name = as_name(path)
        is_full = name.startswith(ties.prefix)
        return name if is_full else ties.outside(name + end).removesuffix(end)

    return named


def has_head(task_type: str | None, source: Source | None) -> bool | None:
    """Return whether the table of a model is its head, by its task or its configuration.

    None: neither is known.
    """
    if task_type is not None or source is None:
        return configs.has_head({"task_type": task_type})
    ties = Ties.of(source)
    return True if ties.tables else False if ties.known else None


def source_of(model: Checkpoint) -> Source:
    """Return a model in PyTorch's names, with its configuration if it has one."""
    config = None if model.format == "safetensors" else open_source(model.path).config
    return Source(str(model.path), model.tensors, config)


def source_like(path: str) -> Source | None:
    """Return the model at a path; None unless there is one in PyTorch's names."""
    found = open_path(path)
    if not isinstance(found, Checkpoint) or found.format == "orbax":
        return None
    return source_of(found)


def recorded_leaves(found: AdapterFile) -> dict[str, Any] | None:
    """Return the leaves of the base that an adapter of ours has recorded; None without a record."""
    record = found.native and found.native[1]["base"]
    if not record:
        return None
    leaves = record["leaves"].items()
    return {path: Absent(path, tuple(shape), jnp.dtype(dtype)) for path, (dtype, *shape) in leaves}


def adapted_leaves(adapter: Adapter, *, full: bool = False) -> dict[str, Any]:
    """Return the leaves that an adapter itself tells of; with ``full``, its full leaves too.

    Raises:
        UnknownBaseError: it does not tell what a leaf is like.
    """
    parts = [
        key
        for key, f in adapter.factors.items()
        if isinstance(f, Rows) or split_range(key)[1] is not None
    ]
    parts += [] if full else adapter.full
    if parts:
        raise UnknownBaseError(
            f"the adapter has no record of its base, and without {parts[0]!r} means nothing here: "
            "pass --like, the model's folder, an Orbax checkpoint of its parameters, or another "
            "adapter of it; or save it as a LoraParams"
        )
    found = {path: Absent(path, f.weight_shape, f.b.dtype) for path, f in adapter.factors.items()}
    return found | {path: Absent(path, x.shape, x.dtype) for path, x in adapter.full.items()}


def with_stand_ins(leaves: Mapping[str, Any], adapter: Adapter) -> dict[str, Any]:
    """Return the leaves as ``peft.save`` takes them.

    Absent weights with DoRA are zeros: ``peft.save`` needs their norms only where a part of a
    weight is not adapted. Tables with rows are arrays, not to be read when they are asked for.
    """
    found = dict(leaves)
    for key, f in adapter.factors.items():
        if f.magnitude is not None and isinstance(found.get(key), Absent):
            found[key] = np.broadcast_to(np.zeros((), np.float32), found[key].shape)
        elif isinstance(f, Rows) and key in found:
            found[key] = jnp.asarray(np.asarray(found[key]))
    return found


def with_tables(
    leaves: Mapping[str, Any],
    adapter: Adapter,
    model: Source,
    names: Names,
    kinds: Mapping[str, str] | None,
) -> dict[str, Any]:
    """Return the leaves, those of which rows train from the files of the model."""
    keys = [key for key, f in adapter.factors.items() if isinstance(f, Rows) and key in leaves]
    places = places_of(adapter, leaves, names, kinds)
    found = {key: place for key in keys for place in places.of(key)}
    stored = {as_path(name): x for name, x in model.tensors.items()}
    wanted = [f"{place.module}.weight" for place in found.values()]
    stored = fitted_leaves(stored, wanted, model, {})
    return {
        **leaves,
        **{
            key: from_torch(stored[path].read(), place.shape, *places.form(place))
            for key, place in found.items()
            if (path := as_path(f"{place.module}.weight")) in stored
        },
    }
