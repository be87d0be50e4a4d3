"""Read a whole model."""

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._adapter.factors import is_concrete
from lora_jax._weights.paths import PyTree, flatten
from lora_jax.io import _torch as torch_names
from lora_jax.io.hf._families import Family, family_of
from lora_jax.io.hf._names import Names
from lora_jax.io.hf._source import open_source
from lora_jax.io.hf._write import Progress


def load(
    folder: str | os.PathLike[str],
    like: PyTree,
    family: str | Family | None = None,
    *,
    names: torch_names.Names = None,
    kinds: Mapping[str, str] | None = None,
    layout: Mapping[str, str] | None = None,
    tied: Mapping[str, str] | None = None,
    ignore: str | None = None,
    new: str | None = None,
    progress: Progress = None,
) -> PyTree:
    """Read the weights of a model into a tree of parameters, one tensor at a time.

    Args:
        folder: with ``config.json`` and ``model.safetensors``, or several files and their index;
            or a GGUF file, whose quantized weights come dequantized (extra ``gguf``).
        like: a tree of arrays or ``jax.ShapeDtypeStruct``s, such as
            ``jax.eval_shape(model.init, ...)["params"]``: its shapes, dtypes and, where there are
            some, shardings are those of the result.
        family: how the tensors are named: one of :data:`FAMILIES`, by name, or a :class:`Family`.
            None: that of the ``model_type`` in ``config.json``.
        names: instead of the family's: the name of a module there, by the path of it here, as in
            :func:`lora_jax.io.peft.save`.
        kinds: likewise, as there.
        layout: likewise, as in ``lorafy``: where the axes of a leaf are not what its name says.
        tied: likewise: the names of tensors that are others where the files have them not, such
            as ``{"lm_head.weight": "model.embed_tokens.weight"}``.
        ignore: likewise: a regular expression of tensors that may be left over.
        new: a regular expression of leaves that the files have not, such as a head to be trained:
            they stay as they are in ``like``.
        progress: called with the bytes that are read, and their total.

    Returns:
        The parameters.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: a file is damaged; the family is not known; tensors are missing, left over, or
            of another shape.

    Example:
        >>> import jax.numpy as jnp, tempfile
        >>> from lora_jax.io import hf
        >>> params = {"query": {"kernel": jnp.arange(6.0).reshape(3, 2)}}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     hf.save(f"{folder}/model", params)
        ...     hf.load(f"{folder}/model", params, hf.Family())["query"]["kernel"].shape
        (3, 2)
    """
    source = open_source(folder)
    changes = {"names": names, "kinds": kinds, "layout": layout, "tied": tied, "ignore": ignore}
    known = family_of(source.config, source.where, family, **changes)
    leaves, tree = flatten(like)
    found = Names(leaves, known, source, new)
    wanted = {
        path: [(place, found.name(place)) for place in found.places.of(path)]
        for path in found.places.places
        if path not in found.new
    }
    for parts in wanted.values():
        for place, name in parts:
            found.check_shape(place, name)
    used = [name for parts in wanted.values() for _, name in parts]
    found.left_over(used)
    done, total = 0, sum(source.tensors[name].nbytes for name in used)
    result = {}
    for path, leaf in leaves.items():
        if path not in wanted:
            result[path] = _kept(path, leaf)
            continue
        arrays = []
        for place, name in wanted[path]:
            arrays.append(found.inward(source.tensors[name].read(), place, name))
            done += source.tensors[name].nbytes
            if progress is not None:
                progress(done, total)
        whole = arrays[0] if len(arrays) == 1 else np.stack(arrays)
        result[path] = _on_device(whole.reshape(leaf.shape), leaf)
    return jax.tree.unflatten(tree, [result[path] for path in leaves])


def _kept(path: str, leaf: Any) -> Any:
    if not is_concrete(leaf):
        raise ValueError(
            f"new: {path!r} is to stay as it is in like, which has its shape only: put an array "
            "there, such as model.init(...) makes"
        )
    return leaf


def _on_device(x: np.ndarray, leaf: Any) -> jax.Array:
    x = x.astype(leaf.dtype)
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        return jnp.asarray(x)
    if not sharding.is_fully_addressable:  # every process has read all of it: no need to compare
        return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)
    return jax.device_put(x, sharding)
