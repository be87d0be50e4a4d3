"""Write a tree of parameters as a model."""

import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax._adapter.params import Adapter, LoraParams, check
from lora_jax._merge import merge as merge_params
from lora_jax._weights.paths import PyTree, not_parameters
from lora_jax._weights.quantized import plain_array
from lora_jax._weights.ranges import part_of
from lora_jax.io import _torch as torch_names
from lora_jax.io._places import Place
from lora_jax.io._tensor import Progress, Tensor
from lora_jax.io.hf._apart import as_configured
from lora_jax.io.hf._families import FLAG, Family, family_of
from lora_jax.io.hf._names import TensorNames
from lora_jax.io.hf._rest import in_files
from lora_jax.io.hf._source import Source, open_source
from lora_jax.io.hf._write import Output, dtype_of, narrowed, write_model


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
    """Write parameters as a model in PyTorch's names and axes; a LoraParams is merged.

    Adapted weights are merged one leaf at a time, and each tensor is written before the next one
    is made.

    Args:
        folder: to write, in an existing folder.
        params: parameters, or a LoraParams. PRNG keys and their counters are left out, and so is
            what else is no parameter, unless ``names`` names it: running statistics.
        family: as in :func:`load`. Without a source and without names, the paths with dots are the
            names.
        source: the folder or the GGUF file that the parameters came from. Its configuration,
            tokenizer, license and own code are copied; its tensors must be those written; what
            :func:`load` left over is kept.
        names: as in :func:`load`.
        kinds: as in :func:`load`.
        layout: as in :func:`load`.
        tied: as in :func:`load`. A tensor that ``source`` leaves out is not written; it must still
            equal the other one.
        ignore: as in :func:`load`: those tensors of ``source`` are written as they are.
        new: as in :func:`load`: those leaves are written beside the tensors of ``source``.
        config: changes of ``config.json``, such as ``architectures`` and ``num_labels`` for a new
            head; without a source, all of it.
        dtype: of the floating tensors; None leaves each as it is.
        shard_size: the largest size of a file in bytes.
        overwrite: whether an existing model may be replaced.
        progress: called with the bytes written so far, and their total.

    Raises:
        OSError: the model cannot be written; FileExistsError without ``overwrite``.
        ValueError: a leaf has no name; ``source`` is quantized; its tensors are missing or have
            other shapes; or finite numbers would be infinite in ``dtype``.
        UserWarning: a leaf that is no parameter is left out, other than PRNG keys and counters.
    """
    lora_params = params if isinstance(params, LoraParams) else LoraParams(params, Adapter({}))
    if isinstance(lora_params.base, LoraParams):
        lora_params = LoraParams(merge_params(lora_params.base), lora_params.adapter)
    opened = open_source(source) if source is not None else None
    changes = {"names": names, "kinds": kinds, "layout": layout, "tied": tied, "ignore": ignore}
    if opened is None and family is None:
        family = Family()
    known = family_of(opened.config if opened else None, str(source), family, **changes)
    output = Output(folder, config, dtype, shard_size, overwrite, progress)
    write(output, lora_params, not_parameters(lora_params.base), known, opened, new)


def write(
    output: Output,
    lora_params: LoraParams,
    others: Mapping[str, str],
    family: Family,
    source: Source | None,
    new: str | None = None,
) -> None:
    """Write a model; ``others`` are the leaves of the base that are no parameters, described."""
    leaves = check(lora_params).leaves
    leaves = in_files(leaves, others, family, source, "hf.save", stacklevel=4)
    names = TensorNames(leaves, family, source, new)
    contents = _Contents(lora_params, leaves, names, output.dtype)
    contents.check_twins()
    tensors, config = as_configured(contents.tensors, source, output.config)
    write_model(output._replace(config=config), tensors, source)


class _Contents:
    """Collect the tensors to write: the leaves, merged, and what is kept of the source.

    Attributes:
        tensors: by the name to write.
    """

    def __init__(
        self, lora_params: LoraParams, leaves: Mapping[str, Any], names: TensorNames, dtype: Any
    ):
        self._lora_params, self._leaves, self._names = lora_params, leaves, names
        self._dtype = dtype
        self._merged: dict[str, Any] = {}  # the last merged leaf: its layers come one by one
        self._twins: list[tuple[Place, str, Place]] = []
        places: dict[str, Place] = {}
        found: dict[str, Tensor] = {}  # by the name in the source
        for path in names.places.places:
            for place in names.places.of(path):
                name = names.name(place)
                if name in places:  # tied: written once
                    self._twins.append((place, name, places[name]))
                    continue
                if name in names.tensors:
                    names.check_shape(place, name)
                places[name] = place
                wanted = dtype_of(leaves[path].dtype, dtype)
                read = partial(self._narrowed, place, name, wanted)
                found[name] = Tensor(names.shape(place, name), wanted, read)
        same = names.left_over(found)
        for name, kept in names.tensors.items():
            if name not in found:
                own = same[name] if name in same else name  # stored twice: written twice
                wanted = dtype_of(kept.dtype, dtype)
                read = partial(self._narrowed, places.get(own), own, wanted)
                found[name] = Tensor(kept.shape, wanted, read)
        order = [*names.tensors, *(name for name in found if name not in names.tensors)]
        self.tensors = {names.outside(name): found[name] for name in order}

    def check_twins(self) -> None:
        """Raise unless leaves that share a tensor are equal."""
        for place, name, first in self._twins:
            if not np.array_equal(self._tensor(place, name), self._tensor(first, name)):
                is_own = f"{place.module}.{place.suffix}".endswith(name)
                head = first if is_own else place
                raise ValueError(
                    f"{place.path!r} is tied to {name!r} in {self._names.where}, and they differ "
                    "here: they were adapted or trained apart, and one tensor cannot be both. To "
                    f"write both, pass new={head.path!r} and config={{{FLAG!r}: False}}"
                )

    def _narrowed(self, place: Place | None, name: str, wanted: np.dtype) -> np.ndarray:
        """Make a tensor of a place, or keep that of the source, in the dtype that is wanted."""
        x = self._names.tensors[name].read() if place is None else self._tensor(place, name)
        return narrowed(x, wanted, name)

    def _tensor(self, place: Place, name: str) -> np.ndarray:
        if place.path not in self._merged:
            self._merged = {}  # before the next one is made
            self._merged = {place.path: self._leaf(place.path)}
        return self._names.outward(self._names.places.array(place, self._merged), place, name)

    def _leaf(self, path: str) -> Any:
        """Merge one leaf, in the wider of its dtype and the one that is wanted."""
        adapter = self._lora_params.adapter
        factors = {
            k: f for k, f in adapter.factors.items() if part_of(k, self._leaves).path == path
        }
        full = {path: adapter.full[path]} if path in adapter.full else {}
        leaf = self._leaves[path]
        if not factors and not full:
            return leaf
        leaf = plain_array(leaf)
        if self._dtype is not None and jnp.dtype(self._dtype).itemsize > leaf.dtype.itemsize:
            leaf = leaf.astype(self._dtype)
        return merge_params(LoraParams({path: leaf}, Adapter(factors, full)))[path]
