"""Write a whole model."""

import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax._adapter.params import Adapter, LoraParams, check
from lora_jax._merge import merge as merge_params
from lora_jax._weights.paths import PyTree
from lora_jax._weights.quantized import dequantize_array, is_quantized
from lora_jax._weights.ranges import entry
from lora_jax.io import _torch as torch_names
from lora_jax.io._tensor import Tensor
from lora_jax.io._torch import Place
from lora_jax.io.hf._families import Family, family_of
from lora_jax.io.hf._names import Names
from lora_jax.io.hf._source import Source, open_source
from lora_jax.io.hf._write import Progress, dtype_of, narrowed, write


def save(
    folder: str | os.PathLike[str],
    params: PyTree,
    family: str | Family | None = None,
    *,
    source: str | os.PathLike[str] | None = None,
    names: torch_names.Names = None,
    kinds: Mapping[str, str] | None = None,
    layout: Mapping[str, str] | None = None,
    tied: Mapping[str, str] | None = None,
    ignore: str | None = None,
    new: str | None = None,
    config: Mapping[str, Any] | None = None,
    dtype: Any = None,
    shard_size: int = 5 * 10**9,
    overwrite: bool = False,
    progress: Progress = None,
) -> None:
    """Write parameters as a model in PyTorch's names and axes; a LoraParams merged.

    Adapted weights are merged one leaf at a time, and each tensor is written before the next is
    made.

    Args:
        folder: to write, in one that exists.
        params: parameters, or a LoraParams.
        family: as in :func:`load`; without a source and without names, the paths with dots.
        source: the folder or the GGUF file they came from: its configuration, tokenizer and other
            small files are copied, its tensors must be those written, and what :func:`load` left
            over is kept.
        names: as in :func:`load`.
        kinds: as there.
        layout: as there.
        tied: as there: what ``source`` has not is not written, and must be the other still.
        ignore: as there: those tensors of ``source`` are written as they are.
        new: as there: written beside the tensors of ``source``.
        config: changes of ``config.json``, such as ``architectures`` and ``num_labels`` for a new
            head; without a source, all of it.
        dtype: of the floating tensors; None leaves each as it is.
        shard_size: in bytes, of a file.
        overwrite: whether a model that was written before may be replaced.
        progress: called with the bytes that are written, and their total.

    Raises:
        OSError: it cannot be written; FileExistsError without ``overwrite``.
        ValueError: a leaf has no name; tensors of ``source`` are missing or have other shapes; or
            finite numbers would be infinite in ``dtype``.
    """
    lora_params = params if isinstance(params, LoraParams) else LoraParams(params, Adapter({}))
    leaves = check(lora_params)
    opened = open_source(source) if source is not None else None
    changes = {"names": names, "kinds": kinds, "layout": layout, "tied": tied, "ignore": ignore}
    if opened is None and family is None:
        family = Family()
    known = family_of(opened.config if opened else None, str(source), family, **changes)
    plan = _Plan(leaves, known, opened, new, dtype)
    merged: dict[str, Any] = {}  # the last leaf that was merged, whose layers come one by one

    def tensor(place: Place, name: str) -> np.ndarray:
        if place.path not in merged:
            merged.clear()
            merged[place.path] = _merged(lora_params, place.path, leaves, dtype)
        return plan.names.outward(plan.names.places.array(place, merged), place, name)

    def made(name: str, wanted: np.dtype) -> np.ndarray:
        place = plan.places.get(name)
        x = plan.names.tensors[name].read() if place is None else tensor(place, name)
        return narrowed(x, wanted, name)

    for place, name, first in plan.twins:
        if not np.array_equal(tensor(place, name), tensor(first, name)):
            raise ValueError(
                f"{place.path!r} is tied to {name!r} in {source}, and they differ here: they were "
                "adapted or trained apart, and one tensor cannot be both"
            )
    write(
        folder,
        {
            out: Tensor(shape, wanted, partial(made, name, wanted))
            for out, (name, shape, wanted) in plan.written.items()
        },
        source=opened,
        config=config,
        dtype=dtype,
        shard_size=shard_size,
        overwrite=overwrite,
        progress=progress,
    )


class _Plan:
    """What is to be written.

    Attributes:
        names: of the leaves.
        places: of the leaves, by the names of their tensors; the other tensors are kept.
        written: by the name to write, the name that ``places`` or the source has, the shape and
            the dtype.
        twins: the places that share a tensor with another, which comes last.
    """

    def __init__(
        self,
        leaves: Mapping[str, Any],
        family: Family,
        source: Source | None,
        new: str | None,
        dtype: Any,
    ):
        self.names = Names(leaves, family, source, new)
        before = self.names.tensors
        self.places: dict[str, Place] = {}
        self.twins: list[tuple[Place, str, Place]] = []
        specs: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        for path in self.names.places.places:
            for place in self.names.places.of(path):
                name = self.names.name(place)
                if name in self.places:  # tied: written once
                    self.twins.append((place, name, self.places[name]))
                    continue
                self.places[name] = place
                shape = self.names.shape(place, name)
                specs[name] = shape, dtype_of(leaves[path].dtype, dtype)
                if name in before:
                    self.names.check_shape(place, name)
        same = self.names.left_over(specs)  # stored twice: written twice
        for name, kept in before.items():
            specs.setdefault(name, (kept.shape, dtype_of(kept.dtype, dtype)))
        order = [*before, *(name for name in specs if name not in before)]
        self.written: dict[str, tuple[str, tuple[int, ...], np.dtype]] = {}
        for name in order:
            shape, wanted = specs[name]
            own = same[name] if name in same else name
            self.written[self.names.outside(name)] = own, shape, wanted


def _merged(lora_params: LoraParams, path: str, leaves: Mapping[str, Any], dtype: Any) -> Any:
    """One leaf with what the adapter adds to it, in the wider of its dtype and the one wanted."""
    adapter = lora_params.adapter
    own = {key: f for key, f in adapter.factors.items() if entry(key, leaves)[0] == path}
    full = {path: adapter.full[path]} if path in adapter.full else {}
    if not own and not full:
        return leaves[path]
    leaf = dequantize_array(leaves[path]) if is_quantized(leaves[path]) else leaves[path]
    if dtype is not None and jnp.dtype(dtype).itemsize > leaf.dtype.itemsize:
        leaf = leaf.astype(dtype)
    one = LoraParams({path: leaf}, Adapter(own, full))
    return merge_params(one)[path]
