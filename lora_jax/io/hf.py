"""Whole models as Hugging Face lays them out: in, out, and merged without loading them.

A folder with ``config.json`` and safetensors files in PyTorch's names and axes.
"""

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._merge import merge as merge_params
from lora_jax._params import Adapter, LoraParams, check
from lora_jax._paths import PyTree, flatten, nearest
from lora_jax._quantized import dequantize_array, is_quantized
from lora_jax._ranges import entry
from lora_jax.io import _shards as shards
from lora_jax.io._hf_merge import merge as merge
from lora_jax.io._hf_write import dtype_of, narrowed, write
from lora_jax.io._torch import Map, Names, Place, from_torch, to_torch, torch_shape

# What files of known models hold beside their weights: recomputed, or of no use.
_BESIDE = r"(.*\.)?position_ids|.*\.rotary_emb\.inv_freq|(.*\.)?h\.\d+\.attn\.(masked_)?bias"


def load(
    folder: str | os.PathLike[str],
    like: PyTree,
    *,
    names: Names = None,
    kinds: Mapping[str, str] | None = None,
    layout: Mapping[str, str] | None = None,
    tied: Mapping[str, str] | None = None,
    ignore: str | None = None,
) -> PyTree:
    """Read the weights of a model into a tree of parameters, one tensor at a time.

    Args:
        folder: with ``model.safetensors``, or several files and their index.
        like: a tree of arrays or ``jax.ShapeDtypeStruct``s, such as
            ``jax.eval_shape(model.init, ...)["params"]``: its shapes, dtypes and, where there are
            some, shardings are those of the result.
        names: the name of a module there, by the path of it here, as in
            :func:`lora_jax.io.peft.save`.
        kinds: as there.
        layout: as in ``lorafy``.
        tied: the names of tensors that are others where the files have them not, such as
            ``{"lm_head.weight": "model.embed_tokens.weight"}``.
        ignore: a regular expression of tensors in the files that may be left over.

    Returns:
        The parameters.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: a file is damaged; tensors are missing, left over, or of another shape.

    Example:
        >>> import jax.numpy as jnp, tempfile
        >>> from lora_jax.io import hf
        >>> params = {"query": {"kernel": jnp.arange(6.0).reshape(3, 2)}}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     hf.save(f"{folder}/model", params)
        ...     hf.load(f"{folder}/model", params)["query"]["kernel"].shape
        (3, 2)
    """
    tensors = shards.tensors_in(folder)
    leaves, tree = flatten(like)
    places = Map(leaves, names, kinds, layout)
    used: set[str] = set()
    new = {}
    for path, leaf in leaves.items():
        if path not in places.places:
            new[path] = leaf  # no array
            continue
        parts = []
        for place in places.of(path):
            name = _name(place, tensors, tied, str(folder))
            used.add(name)
            letters, kind = _form(places, place, name)
            expected = torch_shape(place.shape, letters, kind) if letters else None
            x = tensors[name].read()
            if letters is None:
                expected = place.shape
            elif not letters:
                expected = (int(np.prod(place.shape)),)
            if x.shape != expected:
                raise ValueError(
                    f"{folder}: {name!r} has shape {x.shape}, and {path!r} of shape {place.shape} "
                    f"wants {expected}"
                )
            parts.append(x if letters is None else from_torch(x, place.shape, letters, kind))
        whole = parts[0] if len(parts) == 1 else np.stack(parts)
        new[path] = _on_device(whole.reshape(leaf.shape), leaf)
    _check_left_over(tensors.keys() - used, ignore, str(folder))
    return jax.tree.unflatten(tree, [new[path] for path in leaves])


def _on_device(x: np.ndarray, leaf: Any) -> jax.Array:
    x = x.astype(leaf.dtype)
    sharding = getattr(leaf, "sharding", None)
    return jnp.asarray(x) if sharding is None else jax.device_put(x, sharding)


def _name(
    place: Place, tensors: Mapping[str, Any], tied: Mapping[str, str] | None, where: str
) -> str:
    """The name of a tensor in the files: of a module's weight, a parameter's own, or a tied one."""
    full = f"{place.module}.{place.suffix}"
    for name in (full, place.module, (tied or {}).get(full, full)):
        if name in tensors:
            return name
    raise ValueError(
        f"{where} has no tensor {full} for {place.path!r}. Nearest: {nearest(full, tensors)}. If "
        "it has another name there, say names=; if it is another one as well, tied="
    )


def _form(places: Map, place: Place, name: str) -> tuple[Any, Any]:
    """The letters and the kind; None for a parameter of its own, whose axes are the same."""
    return (None, None) if name == place.module else places.form(place)


def _check_left_over(left: Iterable[str], ignore: str | None, where: str) -> None:
    patterns = [_BESIDE, *([ignore] if ignore else [])]
    left = sorted(n for n in left if not any(re.fullmatch(p, n) for p in patterns))
    if left:
        raise ValueError(
            f"{where}: {len(left)} tensors have no place in the parameters, such as {left[:5]}. If "
            "the model does without, say ignore=, a pattern of their names"
        )


def save(
    folder: str | os.PathLike[str],
    params: PyTree,
    *,
    source: str | os.PathLike[str] | None = None,
    names: Names = None,
    kinds: Mapping[str, str] | None = None,
    layout: Mapping[str, str] | None = None,
    tied: Mapping[str, str] | None = None,
    ignore: str | None = None,
    dtype: Any = None,
    shard_size: int = 5 * 10**9,
    overwrite: bool = False,
) -> None:
    """Write parameters as a model in PyTorch's names and axes; a LoraParams merged.

    Adapted weights are merged one leaf at a time, and each tensor is written before the next is
    made.

    Args:
        folder: to write, in one that exists.
        params: parameters, or a LoraParams.
        source: the folder they came from: its configuration, tokenizer and other small files are
            copied, its tensors must be those written, and what :func:`load` left over is kept.
        names: the name of a module there, by the path of it here, as in :func:`load`.
        kinds: as there.
        layout: as there.
        tied: as there: what ``source`` has not is not written, and must be the other still.
        ignore: as there: those tensors of ``source`` are written as they are.
        dtype: of the floating tensors; None leaves each as it is.
        shard_size: in bytes, of a file.
        overwrite: whether a model that was written before may be replaced.

    Raises:
        OSError: it cannot be written; FileExistsError without ``overwrite``.
        ValueError: a leaf has no name; tensors of ``source`` are missing or have other shapes; or
            finite numbers would be infinite in ``dtype``.
    """
    lora_params = params if isinstance(params, LoraParams) else LoraParams(params, Adapter({}))
    leaves = check(lora_params)
    places = Map(leaves, names, kinds, layout)
    before = shards.tensors_in(source) if source is not None else {}
    specs: dict[str, shards.Spec] = {}
    where: dict[str, Place] = {}
    twins: list[tuple[str, Place]] = []
    for path in places.places:
        for place in places.of(path):
            name = f"{place.module}.{place.suffix}" if places.is_module(path) else place.module
            if before:
                name = _name(place, before, tied, str(source))
            letters, kind = _form(places, place, name)
            if name in where:  # tied: written once
                twins.append((name, place))
                continue
            shape = place.shape if letters is None else torch_shape(place.shape, letters, kind)
            where[name], specs[name] = place, (shape, dtype_of(leaves[path].dtype, dtype))
            if before and before[name].shape != shape:
                raise ValueError(
                    f"{source}: {name!r} has shape {before[name].shape}, and {path!r} would be "
                    f"{shape}: these are another model's parameters"
                )
    if before:
        _check_left_over(before.keys() - specs.keys(), ignore, str(source))
        for name, kept in before.items():
            if name not in specs:
                specs[name] = kept.shape, kept.dtype
        specs = {name: specs[name] for name in before}
    merged: dict[str, Any] = {}  # the last leaf that was merged, whose layers come one by one

    def tensor(name: str, place: Place) -> np.ndarray:
        if place.path not in merged:
            merged.clear()
            merged[place.path] = _merged(lora_params, place.path, leaves, dtype)
        x = places.array(place, merged)
        letters, kind = _form(places, place, name)
        return x if letters is None else to_torch(x, letters, kind)

    def make(name: str) -> np.ndarray:
        if name not in where:
            return before[name].read()
        return narrowed(tensor(name, where[name]), specs[name][1], name)

    for name, place in twins:
        if not np.array_equal(tensor(name, place), tensor(name, where[name])):
            raise ValueError(
                f"{place.path!r} is tied to {name!r} in {source}, and they differ here: they were "
                "adapted or trained apart, and one tensor cannot be both"
            )
    write(folder, specs, make, source, dtype, shard_size, overwrite)


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
